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
from typing import Any, Literal, Self
from urllib.parse import urlencode

import pytest
from anyio import Event, create_task_group, fail_after, run
from layers_on_redis import new_prefix
from playwright.sync_api import Browser, Page, expect, sync_playwright
from redis_server import RedisServer
from starlette.testclient import TestClient
from websockets.asyncio.client import ClientConnection as AsyncConnection
from websockets.asyncio.client import connect as connect_async
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect
from websockets.typing import Origin

from anyio_channels import InMemoryChannelLayer
from anyio_channels.demo.app import create_app

PATIENCE = 60.0
expect.set_options(timeout=1000 * PATIENCE)
MAX_TEXT = 2000
BACKENDS = ["asyncio", "trio"]
on_asyncio, on_trio = (pytest.mark.parametrize("backend", [name]) for name in BACKENDS)
"""What the chat does is the same code on both; these take turns, and what depends on the event loop runs on each."""
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Demo:
    """``anyio-channels demo`` in a process, from its announcement on."""

    def __init__(self, *options: str) -> None:
        self.errors = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115 - closed with the process
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-W", "error", "-m", "anyio_channels.cli", "demo", "--port", "0", *options],
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
        with connect(
            self.url(room, name), compression=None, max_size=None, open_timeout=PATIENCE, **options
        ) as websocket:
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
        self.deadline = time.monotonic() + 3 * PATIENCE
        self.id: str = self.await_message("welcome")["id"]

    def receive(self) -> dict[str, Any]:
        assert time.monotonic() < self.deadline, "the statistics still come, but what was waited for does not"
        message: dict[str, Any] = json.loads(self.socket.recv(PATIENCE))
        return message

    def await_message(self, kind: str, **values: Any) -> dict[str, Any]:
        """Read on until a message of that kind with those values, and return it."""
        while True:
            message = self.receive()
            if message["type"] == kind and values.items() <= message.items():
                return message

    def await_sign_of(self, name: str) -> None:
        """Read on until that visitor asks who is here, or answers."""
        while (message := self.receive())["type"] not in {"here", "who"} or message["name"] != name:
            pass

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


@on_trio
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


@on_asyncio
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


@on_trio
def test_what_is_no_websocket(demo: Demo) -> None:
    """Text that is not UTF-8, a frame without mask, unknown frames: the visitor is gone, and the server quiet."""
    host, port = demo.host.split(":")
    with demo.visit("ann") as ann:
        for frame in (b"\x81\x82\0\0\0\0\xff\xfe", b"\x81\x02hi", b"\x83\x80\0\0\0\0", b"\xff" * 20):
            with socket.create_connection((host, int(port)), PATIENCE) as raw:
                raw.sendall(
                    b"GET /ws?room=lobby&name=eve HTTP/1.1\r\nHost: localhost\r\n"
                    b"Upgrade: websocket\r\nConnection: Upgrade\r\n"
                    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
                )
                ann.await_message("joined", name="eve")
                raw.sendall(frame)
                ann.await_message("left", name="eve")


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


def answer_to(demo: Demo, path: str, *hosts: str, upgrade: bool = False) -> str:
    """Return the head and the beginning of the body of the answer to a request with these Host fields."""
    host, port = demo.host.split(":")
    fields = [f"Host: {name}" for name in hosts] + ["Connection: close"] * (not upgrade)
    if upgrade:
        fields += ["Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13"]
        fields += ["Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="]
    with socket.create_connection((host, int(port)), PATIENCE) as raw:
        raw.sendall("\r\n".join([f"GET {path} HTTP/1.1", *fields, "", ""]).encode())
        answer = b""
        while (chunk := raw.recv(65536)) and not (upgrade and b"welcome" in answer + chunk):
            answer += chunk
    return (answer + chunk).decode(errors="replace")


VISIT = "/ws?room=lobby&name=eve"


@pytest.mark.parametrize(
    "name", ["localhost", "LOCALHOST:1", "localhost.:80", "127.0.0.1", "127.0.0.1:8000", "[::1]", "[::1]:8000"]
)
def test_names_of_this_machine(shared_demo: Demo, name: str) -> None:
    """The page and the chat answer to the names of the loopback address."""
    assert answer_to(shared_demo, "/", name).startswith("HTTP/1.1 200 ")
    assert answer_to(shared_demo, VISIT, name, upgrade=True).startswith("HTTP/1.1 101 ")


@pytest.mark.parametrize(
    "name",
    [
        *(
            "evil.example",
            "127.0.0.1.evil.example",
            "localhost.evil.example:80",
            "192.0.2.1",
            "127.0.0.2",
            "[2001:db8::1]",
        ),
        *(
            "",
            "0.0.0.0",
            "x@localhost",
            "localhost:evil",
            "[::1",
            "local host",
            "localhost, evil.example",
            "l\u00f6calhost",
        ),
    ],
)
def test_names_that_lead_here(shared_demo: Demo, name: str) -> None:
    """With another Host nothing is served, whatever leads here (DNS rebinding): neither the page nor the chat."""
    for answer in (answer_to(shared_demo, "/", name), answer_to(shared_demo, VISIT, name, upgrade=True)):
        assert answer.startswith("HTTP/1.1 400 ")
        assert "welcome" not in answer


def test_who_is_refused_is_told_what_to_do(shared_demo: Demo) -> None:
    """The answer names the host and the option."""
    for upgrade in (False, True):
        answer = answer_to(shared_demo, VISIT, "evil.example", upgrade=upgrade)
        assert "This chat does not answer to the host 'evil.example'." in answer
        assert "--allow-host" in answer
    for hosts in ([], ["localhost", "evil.example"]):
        assert answer_to(shared_demo, "/", *hosts).startswith("HTTP/1.1 400 ")


def test_other_names_are_allowed() -> None:
    """--allow-host, and the address that it listens on, are names too."""
    options = ["--host", "127.0.0.2", "--allow-host", "Chat.Example", "--allow-host", "[2001:DB8::1]"]
    with Demo(*options) as demo:
        for name in ("chat.example:80", "CHAT.example", "[2001:db8::1]", "127.0.0.2", "localhost"):
            assert answer_to(demo, "/", name).startswith("HTTP/1.1 200 ")
        for name in ("evil.example", "x.chat.example", "192.0.2.1"):
            assert answer_to(demo, "/", name).startswith("HTTP/1.1 400 ")
        demo.stop(signal.SIGINT)
    with Demo("--host", "localhost") as demo:
        assert answer_to(demo, "/", "localhost").startswith("HTTP/1.1 200 ")
        demo.stop(signal.SIGINT)


def test_an_address_beyond_loopback() -> None:
    """Where it listens beyond loopback, it answers to any IP address, which leads nowhere else, and to no other name."""
    with TestClient(create_app(InMemoryChannelLayer(), "0.0.0.0", ["chat.example"])) as client:
        for name, code in {"192.0.2.1": 200, "[2001:db8::1]:80": 200, "chat.example": 200, "evil.example": 400}.items():
            assert client.get("/", headers={"host": name}).status_code == code


def test_no_page_has_the_chat_in_a_frame(shared_demo: Demo) -> None:
    """Every answer forbids frames and guessing its type."""
    for path, host in (("/", "localhost"), ("/chat.js", "localhost"), ("/nosuch", "localhost"), ("/", "evil.example")):
        head = answer_to(shared_demo, path, host).partition("\r\n\r\n")[0]
        assert re.search(r"(?i)\r\ncontent-security-policy: default-src 'self'; .*; frame-ancestors 'none'(\r|$)", head)
        assert re.search(r"(?i)\r\nx-content-type-options: nosniff(\r|$)", head)


@pytest.mark.browser
def test_a_page_that_frames_the_chat(shared_demo: Demo, open_page: Callable[..., Page]) -> None:
    page = open_page()
    page.set_content(f'<iframe src="{shared_demo.address}"></iframe>')
    expect(page.frame_locator("iframe").get_by_role("status")).to_have_count(0)
    page.wait_for_function("frames[0].length === 0")
    assert page.frames[1].url.startswith("chrome-error:")


@pytest.mark.browser
def test_a_page_under_another_name(shared_demo: Demo, launch: Callable[..., Browser]) -> None:
    """In a browser for which another name leads to this machine, there is no chat under it (DNS rebinding)."""
    port = shared_demo.host.rpartition(":")[2]
    with launch("--host-resolver-rules=MAP rebind.example 127.0.0.1") as browser:
        page = browser.new_page()
        page.set_default_timeout(1000 * PATIENCE)
        answer = page.goto(f"http://rebind.example:{port}/")
        assert answer is not None
        assert answer.status == 400
        expect(page.locator("body")).to_contain_text(f"does not answer to the host 'rebind.example:{port}'")
        end = page.evaluate(
            "url => new Promise(done => new WebSocket(url).onclose = event => done([event.code, event.reason]))",
            f"ws://rebind.example:{port}{VISIT}",
        )
        assert end == [1006, ""]  # it was not opened


def test_pages_of_others_are_refused(shared_demo: Demo) -> None:
    with (
        connect(shared_demo.url(), origin=Origin("http://evil.example")) as refused,
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


@on_trio
def test_leaving_abruptly_is_leaving(demo: Demo) -> None:
    with demo.visit("ann") as ann, demo.visit("bob") as bob:
        ann.await_message("joined", name="bob")
        bob.await_message("here", name="ann")
        bob.socket.socket.shutdown(socket.SHUT_RDWR)  # no closing handshake
        ann.await_message("left", name="bob", id=bob.id)


class Crowd:
    """Visitors who all come, then all say something once they see each other, then leave once they heard each other."""

    def __init__(self, demo: Demo, size: int) -> None:
        self.demo = demo
        self.size = size
        self.counts = {"present": 0, "heard": 0}
        self.complete = {"present": Event(), "heard": Event()}

    async def run(self) -> None:
        with fail_after(6 * PATIENCE):
            async with create_task_group() as tasks:
                for number in range(self.size):
                    tasks.start_soon(self.visit, f"visitor-{number}")

    async def visit(self, name: str) -> None:
        async with connect_async(
            self.demo.url(name=name), compression=None, open_timeout=PATIENCE, ping_interval=None
        ) as websocket:
            await self.read_until_all(websocket, {"welcome", "joined", "here"}, "present")
            await websocket.send(json.dumps({"type": "say", "text": f"from {name}"}))
            await self.read_until_all(websocket, {"said"}, "heard")

    async def read_until_all(self, websocket: AsyncConnection, kinds: set[str], step: str) -> None:
        """Read until each of the crowd was named in a message of these kinds, and then wait for the others."""
        names: set[str] = set()
        while len(names) < self.size:
            message = json.loads(await websocket.recv())
            if message["type"] == "said":
                assert message["name"] not in names
                assert message["text"] == f"from {message['name']}"
            else:  # two who come at once may see each other twice, by joining and by answering
                assert message["type"] in {"statistics", "welcome", "joined", "here"}
            if message["type"] in kinds:
                names.add(message["name"])
        self.counts[step] += 1
        if self.counts[step] == self.size:
            self.complete[step].set()
        await self.complete[step].wait()


@pytest.mark.parametrize(("backend", "visitors"), [("asyncio", 200), ("trio", 200)])
@pytest.mark.slow
def test_many_visitors(backend: str, visitors: int) -> None:
    """Each sees all the others, and hears each of them once; nothing of them is left when they are gone."""
    with Demo("--backend", backend) as demo:
        run(Crowd(demo, visitors).run)
        with demo.visit("after") as after:
            while (statistics := after.await_message("statistics"))["here"] > 1:
                pass
            assert statistics["values"]["members"] == statistics["values"]["groups"] == 1
            assert statistics["values"]["dropped_full"] == 0
        demo.stop(signal.SIGTERM)


@on_trio
def test_slow_visitor_stalls_nobody(demo: Demo) -> None:
    """Two stop reading. One goes on later and learns what it missed, one never does: the demo must end all the same."""
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
            demo.visit("slow", sock=slow_sockets[0], max_queue=1, ping_interval=None, close_timeout=0.1) as slow,
            demo.visit("stuck", sock=slow_sockets[1], max_queue=1, ping_interval=None, close_timeout=0.1),
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


# Several processes on one Redis


@pytest.fixture(params=["redis", "redis+pubsub"])
def scheme(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@contextmanager
def two_demos(scheme: str, server: RedisServer, **options: object) -> Iterator[tuple[Demo, Demo]]:
    """One on asyncio, one on trio."""
    url = f"{scheme}://{server.host}:{server.port}/0?" + urlencode({"prefix": new_prefix(), **options})
    with Demo("--backend", "asyncio", "--layer", url) as one, Demo("--backend", "trio", "--layer", url) as other:
        assert "?" not in one.announcement
        yield one, other


def test_processes_share_their_rooms(scheme: str, redis_server: RedisServer) -> None:
    """Visitors of two processes see each other come and go, and hear each other."""
    with two_demos(scheme, redis_server) as (one, other), one.visit("ann") as ann:
        with other.visit("bob") as bob, other.visit("cat", room="garden") as cat:
            ann.await_message("joined", name="bob", id=bob.id)
            bob.await_message("here", name="ann", id=ann.id)
            ann.say("hello, bob")
            bob.await_message("said", name="ann", text="hello, bob")
            bob.say("hello, ann")
            ann.await_message("said", name="ann", text="hello, bob")
            ann.await_message("said", name="bob", text="hello, ann")
            cat.say("for the garden")
            assert cat.await_message("said")["name"] == "cat"
        assert ann.await_message("left")["name"] == "bob"
        one.stop(signal.SIGINT)
        other.stop(signal.SIGTERM)


def test_the_chat_survives_redis(scheme: str, tmp_path: Path) -> None:
    """While Redis is away, who is there is told so, and who comes is asked to come later; then they chat on."""
    with (
        RedisServer(tmp_path) as server,
        two_demos(scheme, server, timeout=1, connect_timeout=1) as (one, other),
        one.visit("ann") as ann,
        other.visit("bob") as bob,
    ):
        ann.await_message("joined", name="bob")
        server.kill()
        ann.say("into the void")
        assert "cannot reach" in ann.await_message("error")["text"]
        with connect(other.url(name="cat")) as refused, pytest.raises(ConnectionClosed, match="1013"):
            refused.recv(PATIENCE)
        server.start()
        for visitor, name in ((ann, "bob"), (bob, "ann")):
            visitor.await_message("channel_layer.gap", missed=None)
            visitor.await_message("roll_call")
            visitor.await_sign_of(name)
        ann.say("back again")
        assert bob.await_message("said")["text"] == "back again"
        bob.say("me too")
        ann.await_message("said", text="me too")
        assert other.said_wrong()
        for demo in (one, other):
            demo.process.send_signal(signal.SIGTERM)
            assert demo.process.wait(PATIENCE) == 0
            said = demo.said_wrong()
            assert said.splitlines() == [line for line in said.splitlines() if line.endswith("; trying again")], said


# The page


@pytest.fixture(scope="module")
def launch() -> Iterator[Callable[..., Browser]]:
    """Start a headless Chromium with more options; it ends with the module at the latest."""
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed (looked for chromium, chromium-browser and google-chrome)")
    quiet = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    quiet += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    with sync_playwright() as playwright:
        yield lambda *options: playwright.chromium.launch(executable_path=CHROMIUM, args=[*quiet, *options])


@pytest.fixture(scope="module")
def browser(launch: Callable[..., Browser]) -> Iterator[Browser]:
    with launch() as browser:
        yield browser


class Tab:
    """A page of the chat, and what a person does with it."""

    def __init__(self, page: Page, address: str, room: str = "") -> None:
        self.page = page
        self.wails: list[str] = []
        page.set_default_timeout(1000 * PATIENCE)
        page.on("pageerror", lambda error: self.wails.append(str(error)))
        page.on("request", lambda request: self.asked_for(request.url, address))
        page.goto(f"{address}/#{room}")
        self.await_status("Connected to")

    def asked_for(self, url: str, address: str) -> None:
        if not url.startswith((address, "data:")):
            self.wails.append(f"fetched {url}")

    def await_status(self, text: str) -> None:
        expect(self.page.get_by_role("status")).to_contain_text(text)

    def fill(self, label: str, text: str) -> None:
        box = self.page.get_by_role("textbox", name=label, exact=True)
        box.fill(text)
        box.press("Enter")

    def say_too_much(self) -> None:
        """Say what the server refuses; the page itself would not let anybody type so much."""
        self.page.locator("#text").evaluate("box => box.removeAttribute('maxlength')")
        self.fill("Message", "x" * (MAX_TEXT + 1))
        self.await_notice("not 2001")

    def await_notice(self, text: str) -> None:
        """Wait for a notice with ``text`` in it, or for none."""
        notice = expect(self.page.get_by_role("alert"))
        notice.to_contain_text(text) if text else notice.to_be_empty()

    def await_typed(self, text: str) -> None:
        expect(self.page.get_by_role("textbox", name="Message", exact=True)).to_have_value(text)

    def await_here(self, *names: str) -> None:
        expect(self.page.locator("#here li")).to_have_text(list(names))

    def await_said(self, *texts: str) -> None:
        said = self.page.locator("#log .said .text")
        expect(said).to_have_count(len(texts))
        expect(said).to_have_text(list(texts))


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Callable[[], Page]]:
    """Open pages without a chat, each with a storage of its own."""
    pages: list[Page] = []

    def open_page() -> Page:
        pages.append(browser.new_page())
        pages[-1].set_default_timeout(1000 * PATIENCE)
        return pages[-1]

    yield open_page
    for page in pages:
        page.close()


@pytest.fixture
def open_tab(browser: Browser) -> Iterator[Callable[..., Tab]]:
    """Open tabs, each with a storage of its own; none may meet an error or fetch anything from elsewhere."""
    tabs: list[Tab] = []

    def open_tab(demo: Demo, name: str, room: str = "") -> Tab:
        tab = Tab(browser.new_page(), demo.address, room)
        tabs.append(tab)
        tab.fill("Your name", name)
        expect(tab.page.locator("#here li.me")).to_have_text(name)
        return tab

    yield open_tab
    for tab in tabs:
        tab.page.close()
        assert tab.wails == []


@pytest.mark.browser
@on_asyncio
def test_two_tabs(demo: Demo, open_tab: Callable[..., Tab]) -> None:
    ann = open_tab(demo, "ann")
    bob = open_tab(demo, "<b>bob</b>")
    for tab in (ann, bob):
        tab.await_here("<b>bob</b>", "ann")
    ann.fill("Message", "hello, bob")
    bob.await_said("hello, bob")
    bob.fill("Message", "<img src=x onerror=alert(1)>")
    for tab in (ann, bob):
        tab.await_said("hello, bob", "<img src=x onerror=alert(1)>")
        assert tab.page.locator("#log img, #log b, #here b").count() == 0
    expect(ann.page.locator(".said.mine .text")).to_have_text(["hello, bob"])
    expect(ann.page.locator(".said:not(.mine) .who")).to_have_text(["<b>bob</b>"])
    expect(ann.page.locator(".said time").first).to_have_text(re.compile(r"\d\d?:\d\d"))

    received = ann.page.locator('#statistics [data-field="received"]')
    before = received.inner_text()
    bob.fill("Message", "count this")
    expect(received).not_to_have_text(before)
    expect(ann.page.locator('#statistics [data-field="members"]')).to_have_text("2")

    bob.page.close()
    ann.await_here("ann")
    expect(ann.page.locator("#log .event").last).to_have_text("<b>bob</b> left")
    expect(ann.page.locator('#statistics [data-field="members"]')).to_have_text("1")


@pytest.mark.browser
def test_rooms_are_separate(shared_demo: Demo, open_tab: Callable[..., Tab]) -> None:
    ann = open_tab(shared_demo, "ann")
    bob = open_tab(shared_demo, "bob")
    bob.fill("Another room", "garden.2")
    bob.await_status("Connected to garden.2")
    bob.await_here("bob")
    ann.await_here("ann")
    cat = open_tab(shared_demo, "cat", "garden.2")
    bob.await_here("bob", "cat")
    ann.fill("Message", "for the lobby")
    ann.await_said("for the lobby")
    cat.fill("Message", "for the garden")
    bob.await_said("for the garden")
    ann.await_said("for the lobby")

    bob.page.get_by_role("link", name="lobby").click()
    bob.await_status("Connected to lobby")
    bob.await_said()
    for tab in (ann, bob):
        tab.await_here("ann", "bob")


@pytest.mark.browser
def test_a_wrong_room_or_name_changes_nothing(shared_demo: Demo, open_tab: Callable[..., Tab]) -> None:
    """What the server would not have is said, kept where it was typed, and leaves the visitor where he is."""
    bob = open_tab(shared_demo, "bob", "yard")
    bob.fill("Message", "still here")
    for label, wrong, trouble in (
        ("Another room", "no such room!", "A room name is"),
        ("Your name", "a\u202eb", "Your name must have"),
    ):
        bob.fill(label, wrong)
        bob.await_notice(trouble)
        expect(bob.page.get_by_role("textbox", name=label, exact=True)).to_have_value(wrong)
    bob.page.evaluate("location.hash = 'no%20such%20room!'")
    expect(bob.page).to_have_url(f"{shared_demo.address}/#yard")
    bob.await_notice("A room name is")
    bob.await_status("Connected to yard")
    bob.await_here("bob")
    bob.await_said("still here")
    bob.fill("Your name", "bobby")
    bob.await_here("bobby")
    bob.await_notice("")
    bob.fill("Another room", "garden.3")
    bob.await_status("Connected to garden.3")
    expect(bob.page.get_by_role("textbox", name="Another room", exact=True)).to_be_empty()
    bob.page.go_back()
    bob.await_status("Connected to yard")
    bob.await_here("bobby")


@pytest.mark.browser
def test_a_visit_that_is_refused_at_first(shared_demo: Demo, open_page: Callable[..., Page]) -> None:
    """Who comes with a room that cannot be is told, and gets in with another."""
    page = open_page()
    page.goto(f"{shared_demo.address}/#no such room!")
    expect(page.get_by_role("status")).to_have_text("Not connected")
    expect(page.get_by_role("alert")).to_contain_text("A room name is")
    page.get_by_role("link", name="lobby").click()
    expect(page.get_by_role("status")).to_contain_text("Connected to lobby")
    expect(page.get_by_role("alert")).to_be_empty()


@pytest.mark.browser
def test_the_fields_take_what_the_server_takes(shared_demo: Demo, open_page: Callable[..., Page]) -> None:
    """The longest room, name and message that fit into the fields are accepted, and none longer."""
    page = open_page()
    page.goto(shared_demo.address)
    boxes = [page.get_by_role("textbox", name=label, exact=True) for label in ("Another room", "Your name", "Message")]
    room, name, text = ("x" * int(box.get_attribute("maxlength") or 0) for box in boxes)
    with shared_demo.visit(name, room) as visitor:
        for kind, request in (
            ("visit", {"type": "visit", "room": room, "name": name}),
            ("sent", {"type": "say", "text": text}),
            ("error", {"type": "visit", "room": f"{room}x", "name": name}),
            ("error", {"type": "visit", "room": room, "name": f"{name}x"}),
            ("error", {"type": "say", "text": f"{text}x"}),
        ):
            visitor.socket.send(json.dumps({**request, "ref": 1}))
            visitor.await_message(kind, ref=1)


@pytest.mark.browser
def test_the_newest_line_is_in_view(shared_demo: Demo, open_tab: Callable[..., Tab]) -> None:
    """It stays there when the log shrinks, and comes into view for who wrote it, but not for who reads further up."""
    ann = open_tab(shared_demo, "ann", "scroll")
    last, first = ann.page.locator("#log li").last, ann.page.locator("#log li").first
    for number in range(40):
        ann.fill("Message", f"line {number}")
    ann.await_said(*(f"line {number}" for number in range(40)))
    expect(last).to_be_in_viewport(ratio=0.99)
    ann.say_too_much()
    expect(last).to_be_in_viewport(ratio=0.99)
    ann.page.set_viewport_size({"width": 390, "height": 400})  # a phone, its keyboard open
    expect(last).to_be_in_viewport(ratio=0.99)
    ann.page.evaluate("log.scrollTop = 0")
    expect(first).to_be_in_viewport(ratio=0.99)
    with shared_demo.visit("bob", "scroll") as bob:
        bob.say("from bob")
        expect(ann.page.locator("#log .text").last).to_have_text("from bob")
        expect(first).to_be_in_viewport(ratio=0.99)
        ann.fill("Message", "from ann")
        expect(ann.page.locator("#log .text").last).to_have_text("from ann")
        expect(ann.page.locator("#log .text").last).to_be_in_viewport(ratio=0.99)


@pytest.mark.browser
def test_what_the_server_refuses_comes_back(shared_demo: Demo, open_tab: Callable[..., Tab]) -> None:
    ann = open_tab(shared_demo, "ann", "refusals")
    ann.say_too_much()
    ann.await_typed("x" * (MAX_TEXT + 1))
    ann.fill("Message", "shorter")
    ann.await_said("shorter")
    ann.await_notice("")
    ann.await_typed("")


@pytest.mark.browser
def test_what_is_not_confirmed_comes_back(open_tab: Callable[..., Tab]) -> None:
    """A message that was under way when the server went is in the field again, or in the log if something else is there."""
    with Demo() as demo:
        ann, bob = open_tab(demo, "ann"), open_tab(demo, "bob")
        ann.await_here("ann", "bob")
        demo.process.send_signal(signal.SIGSTOP)
        for tab in (ann, bob):
            tab.fill("Message", "into the void")
        bob.page.get_by_label("Message", exact=True).fill("something else")
        demo.process.kill()
        for tab in (ann, bob):
            tab.await_status("Disconnected")
            tab.await_notice("say that again if it does not show")
        ann.await_typed("into the void")
        bob.await_typed("something else")
        expect(bob.page.locator("#log .event").last).to_have_text("Not sent: into the void")


@pytest.mark.browser
@pytest.mark.parametrize("scheme", [pytest.param("redis", marks=pytest.mark.slow), "redis+pubsub"])
def test_the_page_while_redis_is_away(scheme: str, open_tab: Callable[..., Tab], tmp_path: Path) -> None:
    """What could not be sent comes back; who comes is told why he must wait; when Redis is back, the notice goes."""
    with RedisServer(tmp_path) as server:
        url = f"{scheme}://{server.host}:{server.port}/0?timeout=1&connect_timeout=1"
        with Demo("--layer", url) as demo:
            ann, bob = open_tab(demo, "ann"), open_tab(demo, "bob")
            ann.await_here("ann", "bob")
            server.kill()
            ann.fill("Message", "into the void")
            ann.await_notice("cannot reach its server now")
            ann.await_typed("into the void")
            ann.await_status("Connected to lobby")
            bob.page.reload()
            bob.await_notice("cannot reach its server now")
            server.start()
            for tab in (ann, bob):
                tab.await_notice("")
                tab.await_here("ann", "bob")
            ann.page.get_by_label("Message", exact=True).press("Enter")
            bob.await_said("into the void")
            demo.process.send_signal(signal.SIGTERM)
            assert demo.process.wait(PATIENCE) == 0


@pytest.mark.browser
def test_a_server_that_is_slow_to_let_somebody_in(open_page: Callable[..., Page], tmp_path: Path) -> None:
    """Who waits to be let in is told that it is the chat which is slow."""
    with RedisServer(tmp_path) as server, Demo("--layer", f"{server.url}?timeout={PATIENCE}") as demo:
        server.pause()
        page = open_page()
        page.goto(demo.address)
        expect(page.get_by_role("status")).to_have_text("Connecting… the chat is slow to answer")
        server.resume()
        expect(page.get_by_role("status")).to_have_text("Connected to lobby")
        demo.stop(signal.SIGTERM)


@pytest.mark.browser
def test_an_empty_room_offers_a_second_tab(shared_demo: Demo, open_tab: Callable[..., Tab]) -> None:
    ann = open_tab(shared_demo, "ann", "empty")
    expect(ann.page.get_by_text("Nobody else is here yet")).to_be_visible()
    with ann.page.expect_popup() as popup:
        ann.page.get_by_role("link", name="open a second tab").click()
    second = popup.value
    expect(second.get_by_role("status")).to_have_text("Connected to empty")
    for page in (ann.page, second):
        expect(page.locator("#here li")).to_have_count(2)
        expect(page.get_by_text("Nobody else is here yet")).to_be_hidden()
    second.close()
    expect(ann.page.get_by_text("Nobody else is here yet")).to_be_visible()


@pytest.mark.browser
def test_statistics_are_folded_away_on_a_phone(shared_demo: Demo, open_tab: Callable[..., Tab]) -> None:
    ann = open_tab(shared_demo, "ann", "fold")
    figures = ann.page.locator("#statistics")
    expect(figures).to_be_visible()
    ann.page.set_viewport_size({"width": 390, "height": 700})
    expect(figures).to_be_hidden()
    ann.page.get_by_text("Layer statistics").click()
    expect(figures).to_be_visible()


CONTRASTS = """() => {
  const channels = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const luminance = (colour) => {
    const [red, green, blue] = channels(colour).map((value) => {
      value /= 255;
      return value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
  };
  const behind = (element) => {
    const colour = getComputedStyle(element).backgroundColor;
    return channels(colour)[3] === 0 ? behind(element.parentElement) : colour;
  };
  return [...document.body.querySelectorAll("*")]
    .filter((element) => element.checkVisibility())
    .filter((element) => [...element.childNodes].some((node) => node.nodeType === Node.TEXT_NODE && node.data.trim()))
    .map((element) => {
      const pair = [luminance(getComputedStyle(element).color), luminance(behind(element))];
      return [element.className + " " + element.textContent, (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05)];
    });
}"""
"""The contrast of each text with what is behind it (WCAG 2.2, 1.4.3)."""


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_can_be_read(
    scheme: Literal["light", "dark"], shared_demo: Demo, open_tab: Callable[..., Tab]
) -> None:
    """Each text has the contrast that WCAG asks for at level AA, 4.5, in light and in the dark."""
    ann = open_tab(shared_demo, "ann", f"colours-{scheme}")
    ann.page.emulate_media(color_scheme=scheme)
    with shared_demo.visit("bob", f"colours-{scheme}") as bob:
        bob.say("hello, ann")
        ann.fill("Message", "hello, bob")
        ann.await_said("hello, ann", "hello, bob")
        ann.page.evaluate("receive({type: 'channel_layer.gap', missed: 3})")
        ann.say_too_much()
        found: list[tuple[str, float]] = ann.page.evaluate(CONTRASTS)
    expect(ann.page.get_by_text("Nobody else is here yet")).to_be_visible()
    found += ann.page.evaluate(CONTRASTS)
    for text in (
        "hello, bob",
        "Layer statistics",
        "Connected to",
        "3 messages missed",
        "Nobody else",
        "not 2001",
        "lobby",
    ):
        assert any(text in one for one, _ in found), text
    assert [(one, contrast) for one, contrast in found if contrast < 4.5] == []


@pytest.mark.browser
def test_the_page_comes_back_when_the_server_does(open_tab: Callable[..., Tab]) -> None:
    with Demo() as demo:
        ann = open_tab(demo, "ann")
        demo.stop(signal.SIGTERM)
        port = demo.host.rpartition(":")[2]
        ann.await_status("Disconnected")
        ann.await_here()
        ann.fill("Message", "into the void")
        expect(ann.page.get_by_role("alert")).to_contain_text("not sent")
        expect(ann.page.get_by_role("textbox", name="Message", exact=True)).to_have_value("into the void")
    with Demo("--port", port) as demo:
        ann.await_status("Connected")
        ann.await_here("ann")
        ann.fill("Message", "back again")
        ann.await_said("back again")
        demo.stop(signal.SIGTERM)


@pytest.mark.browser
def test_a_gap_is_shown(shared_demo: Demo, open_tab: Callable[..., Tab]) -> None:
    """The page's part; that a slow socket gets one is shown above."""
    ann = open_tab(shared_demo, "ann")
    for missed, shown in ((1, "1 message missed"), (1200, "1200 messages missed"), (None, "Some messages missed")):
        ann.page.evaluate("missed => receive({type: 'channel_layer.gap', missed})", missed)
        expect(ann.page.locator("#log .event").last).to_have_text(shown)
    # Those of a slow reader, between single messages, become one.
    ann.page.evaluate("log.replaceChildren()")
    for missed, shown in (
        (1, "1 message missed"),
        (2, "3 messages missed"),
        (None, "Some messages missed"),
        (1, "Some messages missed"),
    ):
        ann.page.evaluate("missed => receive({type: 'channel_layer.gap', missed})", missed)
        ann.page.evaluate("receive({type: 'said', id: 'bob', name: 'bob', text: 'hello', at: 0})")
        expect(ann.page.locator("#log .missed")).to_have_text([shown])
    with shared_demo.visit("bob"):
        ann.await_here("ann", "bob")
        ann.page.evaluate("receive({type: 'roll_call'})")
        ann.await_here("ann")
