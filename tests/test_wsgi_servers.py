"""The adapters between WSGI and ASGI, each under the servers that people run, with the frameworks that they use.

Flask and Django are served by hypercorn (asyncio and trio) and uvicorn; Starlette and FastAPI by waitress and gunicorn. Each
server is a process of its own, and is driven by plain HTTP clients. Nothing here sleeps to prove something: what an application
does unseen, it tells through a pipe (see ``served_apps.py``), and each step waits for what it is about.
"""

from __future__ import annotations

import fcntl
import hashlib
import http.client
import itertools
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self
from urllib.parse import unquote, unquote_to_bytes

import pytest
from served_apps import BLOB, EVENTS

pytestmark = pytest.mark.usefixtures("unmeasured_processes")

PATIENCE = 30.0
HOST = "127.0.0.1"
SHA256 = hashlib.sha256(BLOB).hexdigest()
_names = (f"n{number}" for number in itertools.count())


@dataclass(frozen=True)
class Kind:
    """A framework under a server. ``root``: the root path that the server is told."""

    framework: str
    server: str
    backend: str = "asyncio"
    root: str = ""

    def __str__(self) -> str:
        return f"{self.framework}-{self.server}-{self.backend}"

    @property
    def is_wsgi(self) -> bool:
        """Whether the server speaks WSGI, and the framework ASGI."""
        return self.server in {"waitress", "gunicorn", "wsgiref"}

    @property
    def prefix(self) -> str:
        """What the server expects before each path: uvicorn, that a proxy has taken the root path away."""
        return "" if self.server == "uvicorn" else self.root

    def command(self, descriptor: int, *, broken: bool = False) -> list[str]:
        """The command that serves on an inherited socket."""
        arguments = repr(self.backend) + (", True" if broken else "")
        factory = f"{self.framework}_app"
        bind = f"fd://{descriptor}"
        if self.server in {"hypercorn", "anycorn"}:
            command = f"{self.server} -k {self.backend} --keep-alive 60 --root-path={self.root} -b {bind}".split()
            return ["-m", *command, f"served_apps:{factory}()"]
        if self.server == "uvicorn":
            command = f"uvicorn --fd {descriptor} --lifespan on --timeout-keep-alive 60 --root-path={self.root}".split()
            return ["-m", *command, "--factory", f"served_apps:{factory}"]
        if self.server in {"waitress", "wsgiref"}:
            return ["served_apps.py", f"{factory}({arguments})", str(descriptor), self.root, self.server]
        command = f"gunicorn -k gthread -w 2 --threads 8 --keep-alive 60 --no-control-socket -b {bind}".split()
        if self.framework == "fastapi":
            command.append("--preload")  # the application is made by one process, and served by its forks
        return ["-m", *command, f"served_apps:{factory}({arguments})"]


OUTWARD = [Kind("flask", "hypercorn"), Kind("flask", "hypercorn", "trio"), Kind("flask", "uvicorn")]
OUTWARD += [Kind("django", kind.server, kind.backend, "/base") for kind in OUTWARD]
INWARD = [Kind("starlette", server, backend) for server in ("waitress", "gunicorn") for backend in ("asyncio", "trio")]
KINDS = [*OUTWARD, *INWARD, *(Kind("fastapi", kind.server, kind.backend, "/base") for kind in INWARD)]
EDGES = [*OUTWARD[:3], Kind("flask", "anycorn"), Kind("flask", "anycorn", "trio"), *INWARD]
EDGES += [Kind("starlette", "wsgiref", backend) for backend in ("asyncio", "trio")]
FIRST = {
    "flask-uvicorn-asyncio",
    "flask-hypercorn-trio",
    "django-hypercorn-asyncio",
    "starlette-waitress-trio",
    "starlette-gunicorn-asyncio",
    "fastapi-gunicorn-trio",
    "flask-anycorn-trio",
    "starlette-wsgiref-asyncio",
}
"""Each framework, server, backend and kind of root path once or twice; the other combinations are slow."""


@dataclass(frozen=True)
class Answer:
    status: int
    headers: list[tuple[str, str]]
    body: bytes

    def values(self, name: str) -> list[str]:
        return [value for key, value in self.headers if key.lower() == name]

    @property
    def json(self) -> dict[str, Any]:
        assert self.status == 200, self
        answer: dict[str, Any] = json.loads(self.body)
        return answer


class Server:
    """A server in a process of its own, from the ``with`` block's beginning on."""

    # The watcher reads until the test process is gone, then kills the server and its children, which share its process group.
    _COMMAND: ClassVar = 'exec 3<&0; (read _ <&3; kill -9 -$$) 2>/dev/null & exec "$@" </dev/null 3<&-'

    def __init__(self, kind: Kind, directory: Path, *, broken: bool = False) -> None:
        self.kind = kind
        self.broken = broken
        self.directory = directory
        self.log = directory / "log"
        self.heard: list[str] = []
        """What the applications told."""
        self._rest = b""
        self._has_stopped = False

    def __enter__(self) -> Self:
        told = self.directory / "told"
        os.mkfifo(told)
        self._told = os.open(told, os.O_RDWR | os.O_NONBLOCK)  # for both, so that it never ends
        environment = {**os.environ, "SERVED": str(self.directory), "PYTHONUNBUFFERED": "1"}
        if self.kind.server == "gunicorn":
            environment["SCRIPT_NAME"] = self.kind.root
        with socket.create_server((HOST, 0), backlog=512) as listener, self.log.open("ab") as log:
            # From here on connections are accepted, by the system: nobody need wait until the server is ready.
            self.port: int = listener.getsockname()[1]
            descriptor = fcntl.fcntl(listener.fileno(), fcntl.F_DUPFD, 10)  # the shell names only those below
            try:
                self.process = subprocess.Popen(
                    ["/bin/sh", "-c", self._COMMAND, "sh", sys.executable, *self._command(descriptor)],
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=log,
                    cwd=Path(__file__).parent,
                    env=environment,
                    pass_fds=[descriptor],
                    start_new_session=True,
                )
            finally:
                os.close(descriptor)
        return self

    def _command(self, descriptor: int) -> list[str]:
        return self.kind.command(descriptor, broken=self.broken)

    def __exit__(self, *_: object) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()
        os.close(self._told)

    def stop(self) -> None:
        """Have it end in order."""
        self.process.terminate()
        with self.explained():
            code = self.process.wait(PATIENCE)
            # uvicorn ends by the signal that it was sent, after its work.
            assert code == (-signal.SIGTERM if self.kind.server == "uvicorn" else 0)
            self.listen()

    # What it says

    def said(self, since: int = 0) -> str:
        return self.log.read_bytes()[since:].decode(errors="replace")

    def said_so_far(self) -> int:
        return self.log.stat().st_size

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Add to what is raised what the server said."""
        try:
            yield
        except Exception as error:
            error.add_note(f"{self.kind} told {self.heard[-20:]}, and said:\n{self.said()[-6000:]}")
            raise

    def await_said(self, pattern: str, since: int = 0) -> None:
        """Wait until the log has it."""
        deadline = time.monotonic() + PATIENCE
        with self.explained():
            while not re.search(pattern, self.said(since)):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{pattern!r} is not in the log")
                time.sleep(0.02)  # nothing tells when a file has grown

    def listen(self, seconds: float = 0) -> None:
        """Take in what was told."""
        if select.select([self._told], [], [], seconds)[0]:
            *lines, self._rest = (self._rest + os.read(self._told, 65_536)).split(b"\n")
            self.heard += [line.decode() for line in lines]

    def await_told(self, *lines: str) -> None:
        deadline = time.monotonic() + PATIENCE
        with self.explained():
            while missing := [line for line in lines if line not in self.heard]:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"nobody told {missing}")
                self.listen(1)

    # Its clients

    def connect(self) -> closing[http.client.HTTPConnection]:
        return closing(http.client.HTTPConnection(HOST, self.port, timeout=PATIENCE))

    @contextmanager
    def open(self, path: str, method: str = "GET", **options: Any) -> Iterator[http.client.HTTPResponse]:
        """Send one request and read the head of the response."""
        with self.connect() as connection, self.explained():
            connection.request(method, self.kind.prefix + path, **options)
            with connection.getresponse() as response:
                yield response

    def ask(self, path: str, method: str = "GET", **options: Any) -> Answer:
        with self.open(path, method, **options) as response:
            return Answer(response.status, response.getheaders(), response.read())

    def send(self, path: str, method: str = "GET", *lines: str, buffer_size: int | None = None) -> socket.socket:
        """Send the head of a request, and leave the rest to the caller."""
        client = socket.socket()
        if buffer_size is not None:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_size)
        client.settimeout(PATIENCE)
        client.connect((HOST, self.port))
        head = [f"{method} {self.kind.prefix}{path} HTTP/1.1", f"Host: {HOST}:{self.port}", *lines, "", ""]
        client.sendall("\r\n".join(head).encode())
        return client

    def storm(self, requests: int, clients: int) -> None:
        """Send so many requests, each client one at a time, and check the answers."""

        def visit(numbers: range) -> list[int]:
            wrong = []
            with self.connect() as connection:
                for number in numbers:
                    connection.request("GET", f"{self.kind.prefix}/hello/{number}")
                    response = connection.getresponse()
                    if (response.status, response.read()) != (200, b"hello %d" % number):
                        wrong.append(number)
            return wrong

        with self.explained(), ThreadPoolExecutor(clients) as pool:
            wrong = list(pool.map(visit, [range(start, requests, clients) for start in range(clients)]))
            assert wrong == [[]] * clients


def read_response(client: socket.socket) -> bytes:
    with http.client.HTTPResponse(client) as response:
        response.begin()
        assert response.status == 200
        return response.read()


def in_turn(kinds: list[Kind]) -> list[Any]:
    """Return ``kinds`` as parameters, all but the first of their kind marked slow."""
    return [pytest.param(kind, marks=[] if str(kind) in FIRST else pytest.mark.slow, id=str(kind)) for kind in kinds]


@pytest.fixture(scope="module", params=in_turn(KINDS))
def shared_server(request: pytest.FixtureRequest) -> Iterator[Server]:
    """One for many tests, which must end in order, whatever they did to it."""
    with tempfile.TemporaryDirectory() as directory, Server(request.param, Path(directory)) as server:
        yield server
        server.stop()


@pytest.fixture
def server(shared_server: Server, request: pytest.FixtureRequest) -> Iterator[Server]:
    since = shared_server.said_so_far()
    yield shared_server
    # Shown if the test fails.
    request.node.add_report_section("teardown", str(shared_server.kind), shared_server.said(since))


@pytest.fixture(scope="module", params=in_turn(EDGES))
def edge_server(request: pytest.FixtureRequest) -> Iterator[Server]:
    """As ``shared_server``, of other kinds: what would break the protocol, each server takes in its own way."""
    with tempfile.TemporaryDirectory() as directory, Server(request.param, Path(directory)) as server:
        yield server
        server.stop()


@pytest.fixture
def name() -> str:
    """One that no other request has."""
    return next(_names)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Start a server that a test may do to what it likes."""
    with ExitStack() as stack:
        yield lambda kind, **options: stack.enter_context(Server(kind, tmp_path, **options))


# Requests and responses


def test_thousand_requests(server: Server) -> None:
    """A thousand requests, fifty at a time: each gets its own answer."""
    server.storm(requests=1000, clients=50)


@pytest.mark.parametrize(
    "raw",
    ["/echo/plain", "/echo/caf%C3%A9/%E2%82%AC%20%25", "/echo/a%2Fb;c=d+e", "/echo/~%7E!$&'()*,:@", "/echo/%FF%FE"],
)
def test_paths(server: Server, raw: str) -> None:
    """Whatever is percent-encoded in a path, the application gets those bytes; and the root path apart."""
    kind = server.kind
    answer = server.ask(f"{raw}?q=%C3%A9+1&q=&q=%26").json
    assert answer["q"] == ["\xe9 1", "", "&"]
    assert answer["root"] == kind.root
    if kind.is_wsgi:
        assert (answer["path"], answer["raw"]) == (unquote(raw), kind.root + raw)
    else:
        assert bytes.fromhex(answer["bytes"]) == unquote_to_bytes(raw)
    if "%FF" not in raw:  # which each framework spells its own way
        assert answer["path"] == unquote(raw)
    if raw == "/echo/plain":
        assert answer["url"] == f"http://{HOST}:{server.port}{kind.root}{raw}"


def test_unknown_path(server: Server) -> None:
    """A path that the application does not know is the framework's to answer."""
    assert server.ask("/nothing").status == 404


@pytest.mark.parametrize("path", ["/whole", "/pieces"])
def test_large_response(server: Server, path: str) -> None:
    answer = server.ask(path)
    assert (answer.status, len(answer.body)) == (200, len(BLOB))
    assert hashlib.sha256(answer.body).hexdigest() == SHA256


def test_large_body(server: Server, name: str) -> None:
    answer = server.ask(f"/digest/{name}", "POST", body=BLOB)
    assert answer.json == {"length": len(BLOB), "sha256": SHA256}


def test_body_without_a_length(server: Server, name: str) -> None:
    """A chunked body: Django takes one only if it is told the length, which the adapter knows for what fits its buffer."""
    body = BLOB[:100_000]
    chunks = [body[start : start + 7000] for start in range(0, len(body), 7000)]
    answer = server.ask(f"/digest/{name}", "POST", body=iter(chunks), encode_chunked=True)
    assert answer.json == {"length": len(body), "sha256": hashlib.sha256(body).hexdigest()}


def test_repeated_headers(server: Server) -> None:
    answer = server.ask("/cookies")
    assert [value.partition(";")[0] for value in answer.values("set-cookie")] == ["one=1", "two=2"]


def test_head(server: Server) -> None:
    """HEAD is answered as GET is, without the body: what follows on the connection is the next response."""
    with server.connect() as connection, server.explained():
        for path in ("/hello/1", "/whole", "/pieces"):
            lengths = []
            for method in ("HEAD", "GET"):
                connection.request(method, server.kind.prefix + path)
                response = connection.getresponse()
                assert response.status == 200
                assert bool(response.read()) == (method == "GET")
                lengths.append(response.getheader("content-length"))
            assert path == "/pieces" or lengths[0] == lengths[1]


@pytest.mark.parametrize("path", ["/hello/1", "/whole", "/pieces"])
def test_connection_is_closed(server: Server, path: str) -> None:
    """A client that asks for it has its connection closed when the response has ended."""
    with server.explained(), server.send(path, "GET", "Connection: close") as client, client.makefile("rb") as stream:
        assert stream.read().startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("path", ["/hello/1", "/whole", "/pieces"])
def test_nothing_follows_the_head(server: Server, path: str) -> None:
    """The response to HEAD ends with its header, byte for byte."""
    if server.kind.server == "waitress" and path == "/pieces":
        pytest.skip("waitress ends a response without length in chunks, to HEAD too, whatever the application")
    with server.explained(), server.send(path, "HEAD", "Connection: close") as client, client.makefile("rb") as stream:
        head, separator, rest = stream.read().partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 "), head
    assert (separator, rest[:100]) == (b"\r\n\r\n", b"")


def test_websocket_is_refused(server: Server) -> None:
    """The client is told: 501 where the server could not serve it, 403 where the application does not."""
    headers = {
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
        "Sec-WebSocket-Version": "13",
    }
    since = server.said_so_far()
    answer = server.ask("/hello/1", headers=headers)
    assert answer.status == (501 if server.kind.is_wsgi else 403)
    assert server.ask("/hello/1").body == b"hello 1"
    assert "Traceback" not in server.said(since)


# Errors


@pytest.mark.parametrize("where", ["inside", "outside"])
def test_error_before_the_response(server: Server, where: str, name: str) -> None:
    """An exception before the first byte, in the framework or outside: the client gets a 500, the log the traceback."""
    since = server.said_so_far()
    answer = server.ask(f"/{where}/{name}")
    assert answer.status == 500
    assert name.encode() not in answer.body
    server.await_said(rf"Traceback \(most recent call last\):(?s:.*)\nRuntimeError: broken {name}\n", since)
    assert server.ask("/hello/1").body == b"hello 1"


def test_error_in_the_response(server: Server, name: str) -> None:
    """An exception after the first byte: the client gets what there was, and sees the cut; the log has the traceback."""
    since = server.said_so_far()
    with server.open(f"/late/{name}") as response:
        assert response.status == 200
        with pytest.raises(http.client.IncompleteRead) as caught:
            response.read()
        assert caught.value.partial == b"the beginning"
    server.await_said(rf"Traceback \(most recent call last\):(?s:.*)\nRuntimeError: broken {name}\n", since)
    assert server.ask("/hello/1").body == b"hello 1"


# What would break the protocol


@pytest.mark.parametrize(
    ("edge", "why"),
    [
        ("interim", "status must be from 200 to 599, the final ones of HTTP, not 101"),
        ("split", "the value of header 'X-A' holds a control character"),
        ("nul", "the value of header 'X-A' holds a control character"),
        ("nameless", "'' is not a valid name of an HTTP header"),
        ("lengths", "Content-Length is given twice, as 2 and as 3"),
    ],
)
def test_a_head_that_would_break_the_response(edge_server: Server, edge: str, why: str) -> None:
    """It is an error of the application's, which the server logs and answers with 500; and the server goes on."""
    since = edge_server.said_so_far()
    answer = edge_server.ask(f"/edge/{edge}")
    assert (answer.status, answer.values("x-a"), answer.values("set-cookie")) == (500, [], [])
    edge_server.await_said(f"ValueError: {re.escape(why)}", since)
    assert edge_server.ask("/hello/1").body == b"hello 1"


def test_a_response_that_says_how_its_connection_is_used(edge_server: Server) -> None:
    """That is left to the server: one of length, chunks and the connection's end tells where the body ends."""
    answer = edge_server.ask("/edge/chunked")
    assert (answer.status, answer.body, answer.values("x-a")) == (200, b"hello", ["1"])
    assert len(answer.values("content-length") + answer.values("transfer-encoding")) <= 1


def test_a_response_longer_than_its_length(edge_server: Server) -> None:
    """A WSGI application's is cut off where it says that it ends; an ASGI application's fails, as it does under ASGI servers."""
    since = edge_server.said_so_far()
    if edge_server.kind.is_wsgi:
        with suppress(http.client.HTTPException, ConnectionError):
            assert len(edge_server.ask("/edge/long").body) != 5
        edge_server.await_said("sent 5 bytes where Content-Length leaves room for 2", since)
    else:
        answer = edge_server.ask("/edge/long")
        assert (answer.status, answer.values("content-length"), answer.body) == (200, ["2"], b"he")
        assert "Traceback" not in edge_server.said(since)
    assert edge_server.ask("/hello/1").body == b"hello 1"


@pytest.mark.parametrize("path", ["/hello/1", "/whole", "/pieces"])
def test_head_says_nothing_wrong_of_the_length(edge_server: Server, path: str) -> None:
    """A length in the response to HEAD is that of the response to GET (RFC 9110, 9.3.2)."""
    head, answer = edge_server.ask(path, "HEAD"), edge_server.ask(path)
    assert (head.status, head.body) == (200, b"")
    assert head.values("content-length") in ([], [str(len(answer.body))])


def test_two_lengths_of_a_body(server: Server, name: str) -> None:
    """With a Content-Length beside the chunks, what was received is read, or the server refuses it (RFC 9112, 6.3)."""
    check_two_lengths(server, name)


def test_two_lengths_of_a_body_under_other_servers(edge_server: Server, name: str) -> None:
    """As above."""
    assert edge_server.ask("/hello/1").body == b"hello 1"  # a server that is not up yet could not be stopped in order
    if edge_server.kind.server == "wsgiref":
        pytest.skip("wsgiref does not read chunks, whatever the application")
    check_two_lengths(edge_server, name)


def check_two_lengths(server: Server, name: str) -> None:
    lines = ["Content-Length: 3", "Transfer-Encoding: chunked", "Connection: close"]
    with server.explained(), server.send(f"/digest/{name}", "POST", *lines) as client:
        client.sendall(b"5\r\nhello\r\n0\r\n\r\n")
        with http.client.HTTPResponse(client) as response:
            response.begin()
            if server.kind.server == "gunicorn":
                assert response.status == 400
            else:
                assert response.status == 200
                assert json.loads(response.read()) == {"length": 5, "sha256": hashlib.sha256(b"hello").hexdigest()}


def test_an_application_that_exits(edge_server: Server, name: str) -> None:
    """An application that exits ends no ASGI server; a WSGI server does what it does with any application, and serves on."""
    since = edge_server.said_so_far()
    with edge_server.send(f"/exit/{name}", "GET", "Connection: close") as client:
        server = edge_server.kind.server
        if server == "gunicorn":
            assert client.recv(1) == b""
            edge_server.await_said("exited with code 1", since)
        else:
            group = "" if edge_server.kind.is_wsgi else "BaseExceptionGroup(?s:.*)"
            edge_server.await_said(rf"{group}SystemExit: {name}\n", since)
            if server != "waitress":  # which keeps the client waiting
                with http.client.HTTPResponse(client) as response:
                    response.begin()
                    assert response.status == 500
    assert edge_server.ask("/hello/1").body == b"hello 1"


@pytest.mark.parametrize(("framework", "length"), [("django", 0), ("spooling_django", 400_000)])
def test_a_large_chunked_body_in_django(start: Callable[..., Server], framework: str, length: int, name: str) -> None:
    """Django reads nothing without CONTENT_LENGTH (ticket 35838): with ``spool=True`` there always is one."""
    server = start(Kind(framework, "hypercorn", "trio"))
    chunks = iter([BLOB[:200_000], BLOB[200_000:400_000]])
    answer = server.ask(f"/digest/{name}", "POST", body=chunks, encode_chunked=True)
    assert answer.json == {"length": length, "sha256": hashlib.sha256(BLOB[:length]).hexdigest()}


# Clients that go, and clients that stay


def test_client_goes_while_the_response_comes(server: Server, name: str) -> None:
    """The generator is closed, or the application's task cancelled, and nobody complains."""
    since = server.said_so_far()
    with server.open(f"/endless/{name}") as response:
        assert len(response.read(100_000)) == 100_000
    server.await_told(f"began {name}", f"closed {name}")
    assert server.ask("/hello/1").body == b"hello 1"
    assert "Traceback" not in server.said(since)


def test_client_goes_while_its_body_comes(server: Server, name: str) -> None:
    """Reading is interrupted."""
    if server.kind.server == "waitress":
        pytest.skip("waitress takes in the whole body first: the application never hears of this one")
    since = server.said_so_far()
    with server.send(f"/digest/{name}", "POST", f"Content-Length: {len(BLOB)}") as client:
        client.sendall(BLOB[:2_000_000])
        server.await_told(f"reading {name}")
    server.await_told(f"interrupted {name}")
    assert server.ask("/hello/1").body == b"hello 1"
    # An ASGI framework says that the client is gone by an exception, which this application lets pass.
    assert server.kind.is_wsgi or "Traceback" not in server.said(since)


def test_clients_that_do_not_read(server: Server) -> None:
    """A few clients that take nothing of a long response keep nobody else waiting."""
    names = [next(_names) for _ in range(3)]
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(server.send(f"/endless/{name}", buffer_size=4096))
        server.await_told(*(f"began {name}" for name in names))
        server.storm(requests=100, clients=5)
    server.await_told(*(f"closed {name}" for name in names))


def test_many_slow_clients(server: Server) -> None:
    """More clients than the adapter has threads do not read their small responses: the others are served all the same."""
    # gunicorn writes in the thread of the application: small is what fits the buffers of the system.
    is_tight = server.kind.server != "gunicorn"
    size, buffer_size = (200_000, 4096) if is_tight else (20_000, None)
    names = [next(_names) for _ in range(45)]
    with ExitStack() as stack:
        clients = [stack.enter_context(server.send(f"/lump/{name}/{size}", buffer_size=buffer_size)) for name in names]
        server.await_told(*(f"lump {name}" for name in names))
        server.storm(requests=100, clients=5)
        assert read_response(clients[0]) == bytes(size)  # it is still there for who reads after all


def test_many_slow_uploads(server: Server) -> None:
    """Bodies that come slowly take no thread before they are there, as far as they fit the buffer."""
    if server.kind.server == "gunicorn":
        pytest.skip("gunicorn reads the body in the thread of the application, and has only so many")
    body = BLOB[:1000]
    sha256 = hashlib.sha256(body).hexdigest().encode()
    with ExitStack() as stack:
        clients = [
            stack.enter_context(server.send(f"/digest/{next(_names)}", "POST", f"Content-Length: {len(body)}"))
            for _ in range(45)
        ]
        for client in clients:
            client.sendall(body[:500])
        server.storm(requests=100, clients=5)
        for client in clients:
            client.sendall(body[500:])
            assert sha256 in read_response(client)


def test_events(server: Server, name: str) -> None:
    """Nothing is held back: the application sends an event only after the client has acknowledged the one before."""
    with server.open(f"/events/{name}") as response:
        assert response.getheader("content-type", "").startswith("text/event-stream")
        for number in range(EVENTS):
            assert response.readline() == b"data: event %d\n" % number
            assert response.readline() == b"\n"
            assert server.ask(f"/acknowledge/{name}", "POST").body == b"acknowledged"
        assert response.read() == b""


# Start and end


@pytest.mark.parametrize("kind", in_turn(INWARD))
def test_lifespan(kind: Kind, start: Callable[..., Server]) -> None:
    """Once for each process, at its start or first request and at its end; requests see the state."""
    server = start(kind)
    processes: set[int] = set()
    deadline = time.monotonic() + PATIENCE
    while len(processes) < (2 if kind.server == "gunicorn" else 1):  # which of them gets a request is up to the system
        assert time.monotonic() < deadline, f"all requests go to {processes}\n{server.said()}"
        with ThreadPoolExecutor(10) as pool:
            processes.update(answer.json["started"] for answer in pool.map(server.ask, ["/echo/x"] * 10))
    server.listen()
    assert sorted(server.heard) == sorted(f"startup {process}" for process in processes)
    server.stop()
    assert sorted(server.heard[len(processes) :]) == sorted(f"shutdown {process}" for process in processes)
    assert "Traceback" not in server.said()


def test_lifespan_of_a_process_without_requests(start: Callable[..., Server]) -> None:
    """gunicorn's workers start the application with their first request: without one there is nothing to end."""
    server = start(Kind("starlette", "gunicorn"))
    answer = server.ask("/echo/x").json
    server.await_said("(?s)(application made.*){2}")  # before that, a worker may not know SIGTERM yet
    server.stop()
    assert server.heard[0] == f"startup {answer['started']}"
    assert server.heard == [f"startup {answer['started']}", f"shutdown {answer['started']}"]


BROKEN = r"RuntimeError: .*failed at startup: (?s:.*)there is no database"


def test_lifespan_that_fails_at_open(start: Callable[..., Server]) -> None:
    """The process does not start to serve, and its log says why."""
    server = start(Kind("starlette", "waitress"), broken=True)
    assert server.process.wait(PATIENCE) == 1
    server.await_said(BROKEN)


def test_lifespan_that_fails_at_the_first_request(start: Callable[..., Server]) -> None:
    """Each request is a try, which fails; the log says why."""
    server = start(Kind("starlette", "gunicorn"), broken=True)
    for _ in range(3):
        since = server.said_so_far()
        assert server.ask("/hello/1").status == 500
        server.await_said(BROKEN, since)
    server.stop()
