"""The tutorial, followed to the letter: its files in a folder, its commands in processes, WebSockets on the other side."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from doc_pages import ROOT, read_blocks
from playwright.sync_api import Page, expect, sync_playwright
from redis_server import RedisServer, free_port, wait_until
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

pytestmark = pytest.mark.usefixtures("unmeasured_processes")

PATIENCE = 20.0
expect.set_options(timeout=1000 * PATIENCE)
PAGE = ROOT / "docs" / "tutorial.md"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
BLOCKS = read_blocks(PAGE)
SERVE = [
    command
    for block in BLOCKS
    if block.language == "sh"
    for command in block.text.splitlines()
    if "chat:app" in command
]


def write_files(directory: Path, step: int) -> None:
    """Put the files into ``directory`` that are there after that step."""
    heading = f"## Step {step + 1}: "
    lines = PAGE.read_text("utf-8").splitlines()
    end = next((number for number, line in enumerate(lines, 1) if line.startswith(heading)), len(lines))
    for block in BLOCKS:
        if block.file is not None and block.line < end:
            (directory / block.file).write_text(block.text, encoding="utf-8")


def run_as_written(command: str) -> tuple[list[str], dict[str, str]]:
    """Return the words of a command line of the page, and what it sets in the environment."""
    words = shlex.split(command)
    variables = {}
    while "=" in words[0]:
        name, _, variables[name] = words.pop(0).partition("=")
    assert words[0].startswith(".venv/bin/")
    return [sys.executable, "-P", "-W", "error", "-m", words[0].removeprefix(".venv/bin/"), *words[1:]], variables


class Server:
    """The chat, as a command of the page starts it, but at another port and with another Redis."""

    def __init__(self, directory: Path, command: str, layer: str | None = None) -> None:
        words, variables = run_as_written(command)
        port = free_port()
        self.address = f"127.0.0.1:{port}"
        words = [re.sub(r"^127\.0\.0\.1:80\d\d$", self.address, word) for word in words]
        assert self.address in words
        if layer is not None:
            assert variables == {"CHAT_LAYER": "redis://localhost:6379"}
            variables["CHAT_LAYER"] = layer
        self.log = directory / f"{port}.log"
        environment = {**os.environ, **variables, "PYTHONPATH": str(directory)}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(words, cwd=directory, env=environment, stdout=log, stderr=log)

    def wait_until_it_answers(self) -> None:
        def answers() -> bool:
            assert self.process.poll() is None, self.log.read_text()
            try:
                urllib.request.urlopen(f"http://{self.address}/", timeout=PATIENCE).close()
            except OSError:
                return False
            return True

        wait_until(answers)

    def visit(self, name: str, room: str = "lobby") -> ClientConnection:
        return connect(f"ws://{self.address}/rooms/{room}?name={name}", compression=None, open_timeout=PATIENCE)

    def stop(self) -> None:
        """Ctrl-C ends it in order, whoever is there."""
        self.process.send_signal(signal.SIGINT)
        assert self.process.wait(PATIENCE) == 0, self.log.read_text()
        assert "Traceback" not in self.log.read_text()

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


@contextmanager
def serve(directory: Path, *commands: str, layer: str | None = None) -> Iterator[list[Server]]:
    """Serve with each of the commands, at the same time."""
    with ExitStack() as stack:
        servers = []
        for command in commands:
            servers.append(Server(directory, command, layer))
            stack.callback(servers[-1].end)
        for server in servers:
            server.wait_until_it_answers()
        yield servers


def hear(listener: ClientConnection) -> dict[str, Any]:
    message: dict[str, Any] = json.loads(listener.recv(PATIENCE))
    return message


def expect_heard(listener: ClientConnection, *expected: tuple[str, str]) -> None:
    """Receive so many messages; their types and names are these."""
    assert [(message["type"], message["name"]) for message in (hear(listener) for _ in expected)] == list(expected)


def meet(ann: ClientConnection, server: Server) -> None:
    """Bob comes to where Ann is already, and goes."""
    expect_heard(ann, ("joined", "ann"))
    with server.visit("bob") as bob:
        expect_heard(ann, ("joined", "bob"))
        expect_heard(bob, ("joined", "bob"), ("here", "ann"))
        for speaker, name in ((ann, "ann"), (bob, "bob")):
            speaker.send(f"from {name}")
            for listener in (ann, bob):
                heard = hear(listener)
                assert (heard["type"], heard["name"], heard["text"]) == ("said", name, f"from {name}")
    expect_heard(ann, ("left", "bob"))


def test_commands_of_the_page() -> None:
    assert len(SERVE) == 4
    assert [command for command in SERVE if "trio" in command] == [SERVE[1], SERVE[3]]


def test_step_1_talk(tmp_path: Path) -> None:
    """What is said in a room comes to all who are there, and to nobody elsewhere."""
    write_files(tmp_path, 1)
    with (
        serve(tmp_path, SERVE[0]) as [server],
        server.visit("") as one,
        server.visit("") as other,
        server.visit("", "garden") as elsewhere,
    ):
        # Who has heard himself is in.
        for listener, text in ((other, "in"), (elsewhere, "elsewhere")):
            listener.send(text)
            assert hear(listener) == {"type": "said", "text": text}
        one.send("hello")
        while (heard := hear(one)) != {"type": "said", "text": "hello"}:
            assert heard == {"type": "said", "text": "in"}
        assert hear(other) == {"type": "said", "text": "hello"}
        elsewhere.send("bye")
        assert hear(elsewhere) == {"type": "said", "text": "bye"}
        server.stop()


@pytest.mark.parametrize("command", SERVE[:2], ids=["asyncio", "trio"])
def test_steps_2_and_3_who_is_there(command: str, tmp_path: Path) -> None:
    write_files(tmp_path, 3)
    with serve(tmp_path, command) as [server], server.visit("ann") as ann:
        meet(ann, server)
        with server.visit("eve", "caf%C3%A9") as refused, pytest.raises(ConnectionClosed, match="1008.*A room name is"):
            refused.recv(PATIENCE)
        meet_again(ann, server)
        server.stop()


def meet_again(ann: ClientConnection, server: Server) -> None:
    """A connection that breaks is one that left."""
    with server.visit("bob") as bob:
        expect_heard(ann, ("joined", "bob"))
        bob.socket.shutdown(socket.SHUT_RDWR)
        expect_heard(ann, ("left", "bob"))


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["redis", "redis+pubsub"])
def test_step_4_two_processes(scheme: str, redis: RedisServer, tmp_path: Path) -> None:
    """Ann's process runs asyncio, Bob's trio."""
    assert f"{scheme}://localhost:6379" in PAGE.read_text("utf-8")
    write_files(tmp_path, 4)
    with (
        serve(tmp_path, *SERVE[2:], layer=f"{scheme}://{redis.host}:{redis.port}") as [one, other],
        one.visit("ann") as ann,
    ):
        meet(ann, other)
        one.stop()
        with pytest.raises(ConnectionClosed):
            hear(ann)
        other.stop()


def test_step_5_its_test(tmp_path: Path) -> None:
    write_files(tmp_path, 5)
    commands = [block.text.split(" && ")[1] for block in BLOCKS if "pytest test_chat.py" in block.text]
    assert len(commands) == 1
    words, _ = run_as_written(commands[0].strip())
    words[words.index("pytest") :] = [
        "pytest",
        "-W",
        "error",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:asyncio",  # which warns when it starts, and is here for another page
        *words[words.index("pytest") + 1 :],
    ]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    result = subprocess.run(
        words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stdout
    assert re.search(r"^=+ 2 passed", result.stdout, re.MULTILINE), result.stdout


@pytest.mark.slow
@pytest.mark.browser
def test_in_the_browser(tmp_path: Path) -> None:
    """Two tabs; what is said is text, whatever it looks like."""
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed (looked for chromium, chromium-browser and google-chrome)")
    write_files(tmp_path, 3)
    with serve(tmp_path, SERVE[1]) as [server], sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        wails: list[str] = []

        def open_tab(name: str) -> Page:
            tab = browser.new_page()
            tab.set_default_timeout(1000 * PATIENCE)
            tab.on("pageerror", lambda error: wails.append(str(error)))
            tab.goto(f"http://{server.address}/?name={name}")
            return tab

        ann = open_tab("ann")
        expect(ann.locator("#here")).to_have_text("ann")
        bob = open_tab("bob")
        for tab in (ann, bob):
            expect(tab.locator("#here")).to_have_text("ann, bob")
        ann.get_by_role("textbox", name="Message").fill("<b>hello</b>")
        ann.get_by_role("button", name="Send").click()
        for tab in (ann, bob):
            expect(tab.locator("#log li")).to_have_text(["ann: <b>hello</b>"])
        bob.close()
        expect(ann.locator("#here")).to_have_text("ann")
        assert wails == []
        browser.close()
        server.stop()
