"""The demo, served by its own command in its own process, to browsers and to plain WebSocket clients.

Nothing here sleeps: each step waits for what it is about, and fails when that does not come.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlencode

import pytest
from anyio import create_task_group, fail_after, run
from playwright.sync_api import Browser, Page, expect, sync_playwright
from websockets.asyncio.client import connect as connect_async
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

PATIENCE = 20.0
MAX_TEXT = 2000
BACKENDS = ["asyncio", "trio"]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Demo:
    """``anyio-channels demo`` in a process, from its announcement on."""

    def __init__(self, *options: str) -> None:
        self.errors = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115 - closed with the process
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", "-m", "anyio_channels.cli", "demo", "--port", "0", *options],
            stdout=subprocess.PIPE,
            stderr=self.errors,
            encoding="utf-8",
        )
        assert self.process.stdout is not None
        with Deadline(self.process.kill):
            self.announcement = self.process.stdout.readline()
        found = re.search(r"http://([\w.\[\]:]+):(\d+)", self.announcement)
        assert found is not None, self.announcement + self.said_wrong()
        self.address = found[0]
        self.host = f"{found[1]}:{found[2]}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdout is not None
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()
        self.errors.close()

    def said_wrong(self) -> str:
        self.errors.seek(0)
        return self.errors.read()

    def stop(self, number: int) -> float:
        """End it with a signal, check that it went in order, and return how long it took."""
        started = time.monotonic()
        self.process.send_signal(number)
        code = self.process.wait(PATIENCE)
        assert self.process.stdout is not None
        assert (code, self.process.stdout.read(), self.said_wrong()) == (0, "", "")
        return time.monotonic() - started

    def url(self, room: str = "lobby", name: str = "ann") -> str:
        return f"ws://{self.host}/ws?" + urlencode({"room": room, "name": name})

    @contextmanager
    def visit(self, name: str, room: str = "lobby", **options: Any) -> Iterator[Visitor]:
        with connect(self.url(room, name), compression=None, max_size=None, **options) as websocket:
            yield Visitor(websocket)


class Deadline:
    """Calls a function unless the block ends in time."""

    def __init__(self, late: Callable[[], object]) -> None:
        self.timer = threading.Timer(PATIENCE, late)

    def __enter__(self) -> None:
        self.timer.start()

    def __exit__(self, *_: object) -> None:
        self.timer.cancel()
        self.timer.join()


class Visitor:
    """A browser's part, played by a plain WebSocket."""

    def __init__(self, websocket: ClientConnection) -> None:
        self.socket = websocket
        self.id: str = self.await_message("welcome")["id"]

    def receive(self) -> dict[str, Any]:
        message: dict[str, Any] = json.loads(self.socket.recv(PATIENCE))
        return message

    def await_message(self, kind: str, **values: Any) -> dict[str, Any]:
        """Read on until a message of that kind with those values, and return it."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            message = self.receive()
            if message["type"] == kind and values.items() <= message.items():
                return message
        raise TimeoutError(f"no {kind} {values}")

    def say(self, text: str) -> None:
        self.socket.send(json.dumps({"type": "say", "text": text}))


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def demo(backend: str) -> Iterator[Demo]:
    """A demo that must end in order, whatever was done to it."""
    with Demo("--backend", backend) as demo:
        yield demo
        demo.stop(signal.SIGINT)


# The command


def test_announcement(backend: str) -> None:
    with Demo("--backend", backend, "--layer", "memory://?capacity=50") as demo:
        assert demo.announcement == f"Chat on {demo.address} ({backend}, memory://) - Ctrl-C stops it\n"
        demo.stop(signal.SIGTERM)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_signal_with_open_sockets(backend: str, number: int) -> None:
    with Demo("--backend", backend) as demo, demo.visit("ann") as ann, demo.visit("bob") as bob:
        ann.await_message("joined", name="bob")
        assert demo.stop(number) < 5
        for visitor in (ann, bob):
            with pytest.raises(ConnectionClosed):
                visitor.await_message("nothing")


def test_page_and_its_files(demo: Demo) -> None:
    for path, kind in (("/", "text/html"), ("/chat.js", "text/javascript"), ("/chat.css", "text/css")):
        with urllib.request.urlopen(demo.address + path, timeout=PATIENCE) as response:
            assert response.headers["content-type"].startswith(kind)
            body = response.read().decode()
        assert not re.findall(r"(?:https?:)?//[\w-]+\.\w+", body), "the page must fetch nothing from elsewhere"


def test_ipv6() -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    with Demo("--host", "::1") as demo, demo.visit("ann"):
        assert "http://[::1]:" in demo.announcement
        demo.stop(signal.SIGINT)


# The rooms


def test_nonsense_is_refused_and_harms_nobody(demo: Demo) -> None:
    with demo.visit("ann") as ann, demo.visit("bob") as bob:
        ann.await_message("joined", name="bob")
        for nonsense in (
            "no JSON",
            "",
            b"\x00\xff",
            b'{"type": "say", "text": "binary"}',
            "[" * 60_000,
            "1" * 10_000,
            "NaN",
            "[]",
            '{"type": "say"}',
            '{"type": "say", "text": 1}',
            '{"type": "say", "text": ["hi"]}',
            '{"type": ["say"], "text": "hi"}',
            '{"type": "said", "text": "hi", "name": "bob"}',
        ):
            ann.socket.send(nonsense)
            assert "Not understood" in ann.await_message("error")["text"]
        ann.say(" ")
        assert "1 to 2000" in ann.await_message("error")["text"]
        ann.say("x" * (MAX_TEXT + 1))
        assert "not 2001" in ann.await_message("error")["text"]
        ann.socket.send(r'{"type": "say", "text": "\ud83d"}')
        assert "surrogate" in ann.await_message("error")["text"]
        ann.say("\U0001f600" * MAX_TEXT)
        said = bob.await_message("said")
        assert (said["name"], said["text"]) == ("ann", "\U0001f600" * MAX_TEXT)
        assert abs(said["at"] - time.time()) < PATIENCE
        ann.say("x" * 100_000)
        with pytest.raises(ConnectionClosed, match="1009"):
            ann.await_message("nothing")
        bob.await_message("left", name="ann")


@pytest.mark.parametrize("frame", [b"\x81\x82\0\0\0\0\xff\xfe", b"\x81\x02hi", b"\x83\x80\0\0\0\0", b"\xff" * 20])
def test_what_is_no_websocket(frame: bytes) -> None:
    """Text that is not UTF-8, a frame without mask, unknown frames: the server says no more, and neither stops nor wails."""
    with Demo() as demo, demo.visit("ann") as ann:
        host, port = demo.host.split(":")
        with socket.create_connection((host, int(port)), PATIENCE) as raw:
            raw.sendall(
                b"GET /ws?room=lobby&name=eve HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
            )
            ann.await_message("joined", name="eve")
            raw.sendall(frame)
            ann.await_message("left", name="eve")
        demo.stop(signal.SIGINT)


@pytest.mark.parametrize(
    ("query", "trouble"),
    [
        ({"room": "no spaces", "name": "ann"}, "room name"),
        ({"room": "", "name": "ann"}, "room name"),
        ({"room": "r" * 51, "name": "ann"}, "room name"),
        ({"room": "caf\xe9", "name": "ann"}, "room name"),
        ({"room": "lobby\n", "name": "ann"}, "room name"),
        ({"name": "ann"}, "room name"),
        ({"room": "lobby"}, "name must"),
        ({"room": "lobby", "name": " "}, "name must"),
        ({"room": "lobby", "name": "n" * 31}, "name must"),
        ({"room": "lobby", "name": "a\x00b"}, "name must"),
        ({"room": "lobby", "name": "a\u202eb"}, "name must"),
    ],
)
def test_bad_room_or_name(shared_demo: Demo, query: dict[str, str], trouble: str) -> None:
    with (
        connect(f"ws://{shared_demo.host}/ws?{urlencode(query)}") as refused,
        pytest.raises(ConnectionClosed) as caught,
    ):
        refused.recv(PATIENCE)
    assert caught.value.rcvd is not None
    assert caught.value.rcvd.code == 4000
    assert trouble in caught.value.rcvd.reason


def test_pages_of_others_are_refused(shared_demo: Demo) -> None:
    with (
        connect(shared_demo.url(), origin="http://evil.example") as refused,  # type: ignore[arg-type]
        pytest.raises(ConnectionClosed, match="only for its own page"),
    ):
        refused.recv(PATIENCE)
    with shared_demo.visit("ann", origin=shared_demo.address):
        pass


@pytest.fixture(scope="module")
def shared_demo() -> Iterator[Demo]:
    with Demo() as demo:
        yield demo
        demo.stop(signal.SIGINT)


def test_leaving_abruptly_is_leaving(demo: Demo) -> None:
    with demo.visit("ann") as ann, demo.visit("bob") as bob:
        ann.await_message("joined", name="bob")
        bob.await_message("here", name="ann")
        bob.socket.socket.shutdown(socket.SHUT_RDWR)  # no closing handshake
        ann.await_message("left", name="bob", id=bob.id)


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_hundred_visitors(backend: str) -> None:
    visitors = 200

    async def visit(number: int, steps: Steps) -> None:
        name = f"visitor-{number}"
        here: set[str] = set()
        heard: set[str] = set()
        async with connect_async(demo.url(name=name), compression=None) as websocket:
            async for frame in websocket:
                message = json.loads(frame)
                match message["type"]:
                    case "welcome" | "joined" | "here":
                        here.add(message["name"])
                        if len(here) == visitors and steps.once("present", name):
                            await steps.all_at("present")
                            await websocket.send(json.dumps({"type": "say", "text": f"from {name}"}))
                    case "said":
                        assert message["text"] == f"from {message['name']}"
                        assert message["name"] not in heard
                        heard.add(message["name"])
                        if len(heard) == visitors:
                            steps.once("heard", name)
                            await steps.all_at("heard")
                            return
                    case kind:
                        assert kind == "statistics"

    class Steps:
        """Who got how far; nobody goes on before all are there."""

        def __init__(self) -> None:
            from anyio import Event

            self.there: dict[str, set[str]] = {"present": set(), "heard": set()}
            self.complete = {"present": Event(), "heard": Event()}

        def once(self, step: str, name: str) -> bool:
            new = name not in self.there[step]
            self.there[step].add(name)
            if len(self.there[step]) == visitors:
                self.complete[step].set()
            return new

        async def all_at(self, step: str) -> None:
            await self.complete[step].wait()

    async def main() -> None:
        steps = Steps()
        with fail_after(4 * PATIENCE):
            async with create_task_group() as tasks:
                for number in range(visitors):
                    tasks.start_soon(visit, number, steps)

    with Demo("--backend", backend) as demo:
        run(main)
        with demo.visit("after") as after:
            while (statistics := after.await_message("statistics"))["here"] > 1:
                pass
            assert statistics["values"]["members"] == statistics["values"]["groups"] == 1
            assert statistics["values"]["dropped_full"] == 0
        demo.stop(signal.SIGTERM)


def test_slow_visitor_stalls_nobody(demo: Demo) -> None:
    """Two browsers stop reading. One goes on later and learns what it missed, one never: the demo must end all the same."""
    text = "\U0001f600" * MAX_TEXT
    with demo.visit("ann") as ann, demo.visit("bob") as bob:
        host, port = demo.host.split(":")
        slow_sockets = []
        for _ in range(2):
            slow_socket = socket.socket()
            slow_socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32 * 1024)
            slow_socket.connect((host, int(port)))
            slow_sockets.append(slow_socket)
        with (
            demo.visit("slow", sock=slow_sockets[0], max_queue=1, ping_interval=None) as slow,
            demo.visit("stuck", sock=slow_sockets[1], max_queue=1, ping_interval=None),
        ):
            ann.await_message("joined", name="stuck")
            dropped = sent = 0
            while dropped < 2 * 100:
                for _ in range(100):
                    ann.say(text)
                sent += 100
                for visitor in (ann, bob):
                    heard = 0
                    while heard < 100:
                        message = visitor.receive()
                        assert message["type"] in {"said", "here", "joined", "statistics"}
                        heard += message["type"] == "said"
                        if message["type"] == "statistics":
                            dropped = message["values"]["dropped_full"]
            ann.say("the last")
            heard = missed = 0
            while (message := slow.receive()).get("text") != "the last":
                heard += message["type"] == "said"
                missed += message.get("missed", 0)
            assert missed > 0
            assert heard + missed >= sent  # what was missed is more than what was said
            ann.await_message("who", name="slow")  # it asks again who is here, for it may have missed that
            slow.await_message("here", name="bob")
            demo.stop(signal.SIGINT)
