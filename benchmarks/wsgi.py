"""The adapters between WSGI and ASGI beside those of asgiref and a2wsgi, under real servers, in one run.

What the figures are not: they are of one server process and one client process on one machine, over loopback, with applications
that do nothing; the kernel and the server are in every figure, and in a real application most of the time is its own. The column
"no adapter" has the same application written for the server's own interface: what is lost against it is the adapter's. Rates
within 10 % of one another, and memory within 1 MB, are the same; where other programs run too, only the ratios say something,
and of those the ones of CPU time most. Where an adapter takes a number of threads it keeps its own default (ours 40, a2wsgi 10),
which decides much when clients are slow; --threads gives all of them the same number, but asgiref, which has one. A response
that is larger than what an adapter takes off the application's hands (ours 1 MiB, a2wsgi 10 pieces) holds a thread for as long
as its client takes: with as many such clients as threads all others wait, under every adapter, and that is not measured here.
asgiref has no adapter from ASGI to WSGI, and the one that it has fails when a connection serves several requests (as in asgiref
issue 491: "CurrentThreadExecutor already quit or is broken") unless uvicorn is run with --reset-contextvars, as here for all.

One command, from the project's folder:

    python3 -m venv .venv && .venv/bin/pip install -q -U pip && .venv/bin/pip install -q . --group benchmarks \
        && .venv/bin/python benchmarks/wsgi.py

wsgi-to-asgi: a WSGI application under uvicorn, on asyncio's own loop. asgi-to-wsgi: an ASGI application under gunicorn with
threads, which hands a body on as it comes (waitress first stores it, and would so hide what an adapter does).

Every figure is taken on a server process that was just started, and that answered some small requests before. The rounds
alternate between the adapters, so that a slow moment of the machine hits all of them; of each figure the median of the rounds
counts. An adapter that fails at a workload, or does not answer in --timeout seconds, is reported and not asked again.
All of it takes some three minutes.

small-1, small-50: a request of some 50 bytes, answered by 14, again and again over 1 or 50 connections that stay open.
stream: the application makes a piece of a response every 10 ms; from there to the client, the median of the pieces.
download, upload: 100 MB in pieces of 64 KiB; how much memory the server takes at most, above what it took before.
slow-downloads, slow-uploads: 50 clients get 200 kB at some 60 kB/s each, or send 16 KiB at some 20 kB/s each, one after the
other, while one more client makes small requests; those are what is measured.

Memory and CPU time are read from /proc, so it needs Linux.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import select
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any

import anyio

OURS = "anyio_channels"
NONE = "no adapter"
ADAPTERS: dict[str, dict[str, tuple[str, str]]] = {
    "wsgi-to-asgi": {
        OURS: ("anyio_channels.wsgi", "WsgiToAsgi"),
        "asgiref": ("asgiref.wsgi", "WsgiToAsgi"),
        "a2wsgi": ("a2wsgi", "WSGIMiddleware"),
    },
    "asgi-to-wsgi": {
        OURS: ("anyio_channels.wsgi", "AsgiToWsgi"),
        "a2wsgi": ("a2wsgi", "ASGIMiddleware"),
    },
}
THREADS = {OURS: "threads", "a2wsgi": "workers"}
"""How an adapter from WSGI to ASGI is told the number of threads."""
NAMES = (OURS, "asgiref", "a2wsgi", NONE)
PACKAGES = ("anyio_channels", "asgiref", "a2wsgi", "uvicorn", "httptools", "h11", "gunicorn", "anyio")
HOST = "127.0.0.1"
SMALL = b"hello, client\n"
REQUEST = b"GET / HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n\r\n"
PIECE = 64 * 1024
LARGE = 100_000_000
MEDIUM = 200_000
STAMP = 32
"""Bytes in a piece of the stream: the time at which it was made."""
STAMPS = 50
INTERVAL = 0.01
SLOW = 50
TICK = 0.05
"""Seconds between two steps of a slow client."""
SLOW_READ = 4096
SLOW_WRITE = 1024
SLOW_BODY = 16 * 1024


# The applications: the same answers, once for WSGI, once for ASGI


def pieces(size: int) -> Iterator[bytes]:
    """Yield that many bytes."""
    piece = bytes(PIECE)
    for start in range(0, size, PIECE):
        yield piece[: size - start]


def stamp() -> bytes:
    """Return a piece of the stream."""
    return f"{time.monotonic():{STAMP}.9f}".encode()


def stamps() -> Iterator[bytes]:
    """Yield a piece of the stream now and then."""
    for _ in range(STAMPS):
        yield stamp()
        time.sleep(INTERVAL)


def answer(path: str) -> tuple[int, Iterable[bytes]]:
    """Return the size and the pieces of a body."""
    if path == "/":
        return len(SMALL), (SMALL,)
    if path == "/download":
        return LARGE, pieces(LARGE)
    if path == "/medium":
        return MEDIUM, pieces(MEDIUM)
    body = str(os.getpid()).encode()
    return len(body), (body,)


def wsgi_app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    """Answer as WSGI."""
    path = environ["PATH_INFO"]
    if path == "/stream":
        start_response("200 OK", [("Content-Type", "text/plain")])
        return stamps()
    body: Iterable[bytes]
    if path == "/upload":
        read = environ["wsgi.input"].read
        size = 0
        while data := read(PIECE):
            size += len(data)
        body = (str(size).encode(),)
        size = len(body[0])
    else:
        size, body = answer(path)
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", str(size))])
    return body


async def asgi_app(scope: dict[str, Any], receive: Callable[..., Any], send: Callable[..., Any]) -> None:
    """Answer as ASGI."""
    if scope["type"] == "lifespan":
        for step in ("startup", "shutdown"):
            await receive()
            await send({"type": f"lifespan.{step}.complete"})
        return
    path = scope["path"]
    headers = [(b"content-type", b"text/plain")]
    if path == "/stream":
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for _ in range(STAMPS):
            await send({"type": "http.response.body", "body": stamp(), "more_body": True})
            await anyio.sleep(INTERVAL)
        await send({"type": "http.response.body", "body": b""})
        return
    body: Iterable[bytes]
    if path == "/upload":
        size, more = 0, True
        while more:
            message = await receive()
            size += len(message.get("body", b""))
            more = message.get("more_body", False)
        body = (str(size).encode(),)
        size = len(body[0])
    else:
        size, body = answer(path)
    headers.append((b"content-length", str(size).encode()))
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    for piece in body:
        size -= len(piece)
        await send({"type": "http.response.body", "body": piece, "more_body": size > 0})


# Servers: this same script, told by the parent what to serve


def application(direction: str, adapter: str, threads: int = 0) -> Any:
    """Return what the server serves. ``threads``: those of an adapter from WSGI to ASGI; 0 is its default."""
    inner: Any = wsgi_app if direction == "wsgi-to-asgi" else asgi_app
    if adapter == NONE:
        return asgi_app if direction == "wsgi-to-asgi" else wsgi_app
    module, name = ADAPTERS[direction][adapter]
    options = {THREADS[adapter]: threads} if threads and direction == "wsgi-to-asgi" and adapter in THREADS else {}
    adapted = getattr(importlib.import_module(module), name)(inner, **options)
    if adapter == OURS and direction == "asgi-to-wsgi":
        adapted.open()
    return adapted


def http_parser() -> str:
    """Return the parser that uvicorn uses."""
    return "httptools" if importlib.util.find_spec("httptools") else "h11"


def serve(plan: dict[str, Any]) -> None:
    """Serve an ASGI application with uvicorn, on a socket that listens already."""
    uvicorn = importlib.import_module("uvicorn")
    app = application(plan["direction"], plan["adapter"], plan["adapter threads"])
    config = uvicorn.Config(
        app,
        loop="asyncio",
        http=http_parser(),
        ws="none",
        interface="asgi3",
        lifespan="off",
        reset_contextvars=True,  # asgiref needs it, see above
        log_level="error",
        access_log=False,
    )
    uvicorn.Server(config).run(sockets=[socket.socket(fileno=plan["fd"])])


def command(plan: dict[str, Any]) -> list[str]:
    """Return how a server is started."""
    if plan["direction"] == "wsgi-to-asgi":
        return [sys.executable, __file__, "--serve", json.dumps(plan)]
    made = f"{Path(__file__).stem}:application({plan['direction']!r}, {plan['adapter']!r})"
    found = [sys.executable, "-m", "gunicorn", "--bind", f"fd://{plan['fd']}", "--worker-class", "gthread"]
    found += ["--threads", str(plan["server threads"]), "--keep-alive", "10", "--log-level", "error"]
    return [*found, "--chdir", str(Path(__file__).parent), "--no-control-socket", made]


class Server:
    """A server process that answers requests."""

    def __init__(self, port: int, timeout: float) -> None:
        """``timeout``: seconds in which it answers."""
        self.port = port
        self.timeout = timeout
        self.pid = int(self.get("/pid"))  # gunicorn's worker is a child of what was started

    def connect(self) -> socket.socket:
        """Return a new connection."""
        made = socket.create_connection((HOST, self.port), self.timeout)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return made

    @contextmanager
    def response(self, method: str, path: str, body: Iterable[bytes] = (), size: int = 0) -> Generator[HTTPResponse]:
        """Make a request on a new connection."""
        with closing(HTTPConnection(HOST, self.port, timeout=self.timeout)) as connection:
            connection.putrequest(method, path)
            if size:
                connection.putheader("Content-Length", str(size))
            connection.endheaders()
            for piece in body:
                connection.send(piece)
            found = connection.getresponse()
            if found.status != 200:  # noqa: PLR2004
                raise RuntimeError(f"{path} was answered with {found.status}")
            yield found

    def get(self, path: str) -> bytes:
        """Return a body."""
        with self.response("GET", path) as response:
            return response.read()

    def memory(self, key: str) -> int:
        """Return the bytes that are in memory: now ("VmRSS") or at most ("VmHWM")."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024
        raise RuntimeError(f"/proc does not say {key}")

    def forget_peak(self) -> None:
        """Let the most memory count from here on."""
        Path(f"/proc/{self.pid}/clear_refs").write_text("5")

    def cpu(self) -> float:
        """Return the seconds of CPU time that the process took."""
        user, system = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def kill(process: subprocess.Popen[bytes]) -> None:
    """End a process and its children at once: nothing of it is needed any more."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextmanager
def opened(plan: dict[str, Any]) -> Generator[Server]:
    """Start a server; end it on the way out. ``RuntimeError`` with what it logged if something goes wrong."""
    with ExitStack() as stack, tempfile.TemporaryFile() as log:
        with socket.create_server((HOST, 0), backlog=1024) as listener:
            port = listener.getsockname()[1]
            started = command({**plan, "fd": listener.fileno()})
            # In a session of its own, so that Ctrl-C reaches this process alone, which then ends the others.
            process = subprocess.Popen(
                started, pass_fds=[listener.fileno()], start_new_session=True, stdout=log, stderr=log
            )
            stack.callback(kill, process)
        try:
            yield Server(port, plan["timeout"])
        except TimeoutError:
            raise RuntimeError(f"no answer in {plan['timeout']:g} s") from None
        except Exception as error:
            log.seek(0)
            said = log.read().decode(errors="replace").strip().splitlines()
            raise RuntimeError(f"{type(error).__name__}: {error}" + (f" ({said[-1]})" if said else "")) from error


# Slow clients: this same script in a process of its own


def stay_slow(plan: dict[str, Any]) -> None:
    """Be many slow clients until the parent ends this process; end it before that when one is not answered as it should be."""
    step = slow_upload if plan["workload"] == "slow-uploads" else slow_download

    def repeat(number: int) -> None:
        try:
            time.sleep(TICK * number / SLOW)  # not all at once
            while True:
                step(plan["port"])
        except Exception as error:  # noqa: BLE001 - the parent reports it
            print(f"a slow client: {type(error).__name__}: {error}", flush=True)
            os._exit(1)

    for number in range(SLOW):
        threading.Thread(target=repeat, args=[number], daemon=True).start()
    print("started", flush=True)
    signal.pause()


def slow_download(port: int) -> None:
    """Get a medium response, slowly."""
    with socket.socket() as connection:
        # Segments as on Ethernet, and a small window, or the kernel would take the whole response off the server's hands.
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 1460)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SLOW_READ)
        connection.connect((HOST, port))
        connection.sendall(b"GET /medium HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        got = b""
        while data := connection.recv(SLOW_READ):
            got += data
            time.sleep(TICK)
        if len(got.partition(b"\r\n\r\n")[2]) != MEDIUM:
            raise RuntimeError(f"{len(got)} bytes came, of a head and {MEDIUM}")


def slow_upload(port: int) -> None:
    """Send a body, slowly."""
    with socket.create_connection((HOST, port)) as connection:
        head = f"POST /upload HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {SLOW_BODY}\r\n\r\n"
        connection.sendall(head.encode())
        for _ in range(SLOW_BODY // SLOW_WRITE):
            connection.sendall(bytes(SLOW_WRITE))
            time.sleep(TICK)
        got = b""
        while data := connection.recv(PIECE):
            got += data
        if got.partition(b"\r\n\r\n")[2] != str(SLOW_BODY).encode():
            raise RuntimeError(f"an upload was answered with {got[:60]!r}")


# Workloads: each returns its figures


class Asker:
    """A connection that makes small requests, one after the other."""

    def __init__(self, connection: socket.socket) -> None:
        """Make the first request."""
        self.connection = connection
        self.held = b""
        self.ask()

    def ask(self) -> None:
        """Make a request."""
        self.asked = time.perf_counter()
        self.connection.sendall(REQUEST)

    def answered(self) -> bool:
        """Read what came; ``False`` if the answer is not complete, for the head may come before the body."""
        data = self.connection.recv(PIECE)
        if not data:
            raise ConnectionError("the connection was closed")
        if self.held:
            data = self.held + data
        if not data.startswith(b"HTTP/1.1 200"[: len(data)]):
            raise RuntimeError(f"a request was answered with {data.splitlines()[0].decode()}")
        complete = data.endswith(SMALL)
        self.held = b"" if complete else data
        return complete


def small_requests(server: Server, connections: int, seconds: float) -> list[float]:
    """Make small requests over that many connections for that long; return how long each took."""
    took: list[float] = []
    with ExitStack() as stack, select.epoll() as poll:
        opened_all = [stack.enter_context(server.connect()) for _ in range(connections)]
        end = time.perf_counter() + seconds
        askers = {connection.fileno(): Asker(connection) for connection in opened_all}
        for number in askers:
            poll.register(number, select.EPOLLIN)
        while askers:
            ready = poll.poll(server.timeout)
            if not ready:
                raise TimeoutError
            for number, _ in ready:
                asker = askers[number]
                if not asker.answered():
                    continue
                now = time.perf_counter()
                took.append(now - asker.asked)
                if now < end:
                    asker.ask()
                else:
                    del askers[number]
    return took


def percentile(values: Sequence[float], share: float) -> float:
    """Return the smallest of ``values`` that ``share`` of them do not exceed."""
    return sorted(values)[math.ceil(share * len(values)) - 1]


def measure_small(server: Server, connections: int, arguments: argparse.Namespace) -> dict[str, float]:
    """Small requests, as fast as they are answered."""
    small_requests(server, connections, 0.2)  # threads start, caches fill
    cpu, start = server.cpu(), time.perf_counter()
    took = small_requests(server, connections, arguments.seconds)
    seconds = time.perf_counter() - start
    return {
        "requests/s": len(took) / seconds,
        "p99 ms": percentile(took, 0.99) * 1e3,
        "CPU us/request": (server.cpu() - cpu) / len(took) * 1e6,
    }


def measure_small_1(server: Server, arguments: argparse.Namespace) -> dict[str, float]:
    """Over one connection."""
    return measure_small(server, 1, arguments)


def measure_small_50(server: Server, arguments: argparse.Namespace) -> dict[str, float]:
    """Over 50 connections."""
    return measure_small(server, 50, arguments)


def measure_stream(server: Server, _: argparse.Namespace) -> dict[str, float]:
    """From the making of a piece to its arrival."""
    late = []
    with server.response("GET", "/stream") as response:
        while piece := response.read(STAMP):
            late.append(time.monotonic() - float(piece))
    if len(late) != STAMPS:
        raise RuntimeError(f"{len(late)} pieces of {STAMPS} came")
    return {"delay ms": statistics.median(late) * 1e3}


def measure_large(server: Server, transfer: Callable[[Server], int]) -> dict[str, float]:
    """100 MB in one direction."""
    small_requests(server, 1, 0.1)
    server.forget_peak()
    idle, cpu, start = server.memory("VmRSS"), server.cpu(), time.perf_counter()
    size = transfer(server)
    seconds = time.perf_counter() - start
    if size != LARGE:
        raise RuntimeError(f"{size} bytes of {LARGE} came")
    return {"seconds": seconds, "peak MB": (server.memory("VmHWM") - idle) / 1e6, "CPU ms": (server.cpu() - cpu) * 1e3}


def measure_download(server: Server, _: argparse.Namespace) -> dict[str, float]:
    """100 MB to the client."""

    def download(server: Server) -> int:
        buffer = bytearray(4 * PIECE)
        size = 0
        with server.response("GET", "/download") as response:
            while count := response.readinto(buffer):
                size += count
        return size

    return measure_large(server, download)


def measure_upload(server: Server, _: argparse.Namespace) -> dict[str, float]:
    """100 MB to the application."""

    def upload(server: Server) -> int:
        with server.response("POST", "/upload", pieces(LARGE), LARGE) as response:
            return int(response.read())

    return measure_large(server, upload)


def measure_slow(server: Server, workload: str, arguments: argparse.Namespace) -> dict[str, float]:
    """Small requests while other clients are slow."""
    small_requests(server, 1, 0.1)
    plan = json.dumps({"workload": workload, "port": server.port})
    with subprocess.Popen(
        [sys.executable, __file__, "--slow", plan], stdout=subprocess.PIPE, start_new_session=True
    ) as slow:
        try:
            if slow.stdout is None or not slow.stdout.readline():
                raise RuntimeError("the slow clients did not start")
            time.sleep(0.5)
            start = time.perf_counter()
            took = small_requests(server, 1, arguments.seconds)
            seconds = time.perf_counter() - start
            if slow.poll() is not None:
                raise RuntimeError(slow.stdout.readline().decode().strip())
        finally:
            kill(slow)
    return {"requests/s": len(took) / seconds, "p99 ms": percentile(took, 0.99) * 1e3}


def measure_slow_downloads(server: Server, arguments: argparse.Namespace) -> dict[str, float]:
    """While 50 clients take their responses slowly."""
    return measure_slow(server, "slow-downloads", arguments)


def measure_slow_uploads(server: Server, arguments: argparse.Namespace) -> dict[str, float]:
    """While 50 clients send their requests slowly."""
    return measure_slow(server, "slow-uploads", arguments)


BOTH: dict[str, Callable[[Server, argparse.Namespace], dict[str, float]]] = {
    "small-1": measure_small_1,
    "small-50": measure_small_50,
    "stream": measure_stream,
    "download": measure_download,
    "upload": measure_upload,
}
WORKLOADS = {
    "wsgi-to-asgi": {**BOTH, "slow-downloads": measure_slow_downloads, "slow-uploads": measure_slow_uploads},
    "asgi-to-wsgi": BOTH,  # here it is the server that has to do with slow clients, and its threads
}
DIGITS = {"requests/s": 0, "p99 ms": 2, "CPU us/request": 0, "delay ms": 2, "seconds": 3, "peak MB": 1, "CPU ms": 0}
"""The figures, and the digits after the point with which each is printed."""


# Measuring


@dataclass
class Cell:
    """What one adapter did at one workload."""

    rounds: list[dict[str, float]] = field(default_factory=list)
    failed: str = ""

    def median(self, figure: str) -> float | None:
        """Return the median of a figure; ``None`` if there is none."""
        found = [one[figure] for one in self.rounds if figure in one]
        return statistics.median(found) if found and not self.failed else None


Found = dict[tuple[str, str], dict[str, Cell]]
"""By direction and workload, for each adapter."""


def measure(arguments: argparse.Namespace) -> Found:
    """Take all figures that were asked for."""
    found: Found = {
        (direction, workload): {
            name: Cell() for name in arguments.adapter if name == NONE or name in ADAPTERS[direction]
        }
        for direction in arguments.direction
        for workload in WORKLOADS[direction]
        if workload in arguments.workload
    }
    for number in range(arguments.rounds):
        for (direction, workload), cells in found.items():
            progress(f"round {number + 1} of {arguments.rounds}: {direction} {workload}")
            for adapter, cell in cells.items():
                if not cell.failed:
                    try:
                        cell.rounds.append(measure_one(direction, workload, adapter, arguments))
                    except Exception as error:  # noqa: BLE001 - it is reported, and the others are measured
                        cell.failed = str(error) or type(error).__name__
                        progress(f"{direction} {workload} {adapter}: failed: {cell.failed}\n")
    progress("\n")
    return found


def measure_one(direction: str, workload: str, adapter: str, arguments: argparse.Namespace) -> dict[str, float]:
    """Take the figures of one adapter at one workload, once."""
    plan = {
        "direction": direction,
        "adapter": adapter,
        "adapter threads": arguments.threads,
        "server threads": arguments.server_threads,
        "timeout": arguments.timeout,
    }
    with opened(plan) as server:
        return WORKLOADS[direction][workload](server, arguments)


def progress(text: str) -> None:
    """Say on standard error what is going on, in one line."""
    print(f"\r{text:60}", end="", file=sys.stderr, flush=True)


# Reporting


def versions() -> dict[str, str]:
    """Return the versions of what was measured, and of what it ran on."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "from source" if package == OURS else "not installed"
    return found


def ratio(figure: str, ours: float, theirs: float) -> str:
    """Return how much better ours is: above 1 there is more of a rate, or less of anything else."""
    if figure == "peak MB" and min(ours, theirs) < 1:
        return ""  # nearly nothing, of which a ratio says nothing
    return f" = {ours / theirs if figure == 'requests/s' else theirs / ours:.2f}x"


def print_table(found: Found, arguments: argparse.Namespace) -> None:
    """Print what was measured, with ratios to the others."""
    print(f"Python {platform.python_version()}, {platform.system()} {platform.machine()}, {os.cpu_count()} cores")
    print(", ".join(f"{package} {version}" for package, version in versions().items()))
    print(
        f"median of {arguments.rounds} rounds; NUMBER = RATIO, where ours is that many times as good; "
        f"gunicorn with {arguments.server_threads} threads"
    )
    table: list[tuple[str, ...]] = [("", "", *arguments.adapter)]
    for (direction, workload), cells in found.items():
        figures = [figure for figure in DIGITS if any(figure in one for cell in cells.values() for one in cell.rounds)]
        for figure in figures or [""]:
            ours = cells[OURS].median(figure) if OURS in cells else None
            row = []
            for adapter in arguments.adapter:
                cell = cells.get(adapter, Cell())
                value = cell.median(figure)
                if value is None:
                    row.append("failed" if cell.failed else "")
                else:
                    compared = ratio(figure, ours, value) if ours is not None and adapter != OURS else ""
                    row.append(f"{value:,.{DIGITS[figure]}f}{compared}")
            table.append((f"{direction}: {workload}" if figure in ("", figures[:1][0]) else "", figure, *row))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for place, line in enumerate(table):
        left, right = line[:2], line[2:]
        cells_of = [cell.ljust(width) for cell, width in zip(left, widths, strict=False)]
        cells_of += [cell.rjust(width) for cell, width in zip(right, widths[2:], strict=True)]
        print("  ".join(cells_of))
        if place == 0:
            print("-" * (sum(widths) + 2 * len(widths) - 2))
    for (direction, workload), cells in found.items():
        for adapter, cell in cells.items():
            if cell.failed:
                print(f"{direction}: {workload}, {adapter}: failed: {cell.failed}")


def report(found: Found, arguments: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """Return all figures with what they depend on."""
    hidden = ("json", "serve", "slow")
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "versions": versions(),
        "http parser of uvicorn": http_parser(),
        "options": {name: value for name, value in vars(arguments).items() if name not in hidden},
        "seconds": round(seconds, 1),
        "medians": {
            f"{direction}: {workload}": {
                adapter: f"failed: {cell.failed}"
                if cell.failed
                else {figure: round(cell.median(figure) or 0, 3) for figure in cell.rounds[0]}
                for adapter, cell in cells.items()
            }
            for (direction, workload), cells in found.items()
        },
        "rounds": {
            f"{direction}: {workload}": {
                adapter: [{figure: round(value, 3) for figure, value in one.items()} for one in cell.rounds]
                for adapter, cell in cells.items()
            }
            for (direction, workload), cells in found.items()
        },
    }


def count(text: str) -> int:
    """Return a positive number that was given as an argument."""
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


def parse_arguments() -> argparse.Namespace:
    """Return what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    workloads = list(WORKLOADS["wsgi-to-asgi"])
    add("--direction", nargs="+", choices=ADAPTERS, default=list(ADAPTERS), help="from what to what (default: both)")
    add("--workload", nargs="+", choices=workloads, default=workloads, help="what to measure (default: all)")
    add("--adapter", nargs="+", choices=NAMES, default=list(NAMES), help="whose (default: all)")
    add("--rounds", type=count, default=3, help="how often everything is measured (default %(default)s)")
    add("--seconds", type=float, default=0.6, help="for which small requests are made (default %(default)s)")
    add("--threads", type=count, default=0, help="of the adapters from WSGI to ASGI (default: what each has)")
    add("--server-threads", type=count, default=16, help="of gunicorn (default %(default)s)")
    add("--timeout", type=float, default=10, help="seconds in which an answer comes (default %(default)s)")
    add("--json", metavar="FILE", help="also write the figures to FILE")
    add("--serve", type=json.loads, help=argparse.SUPPRESS)
    add("--slow", type=json.loads, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Run the benchmark, or one server or the slow clients of it."""
    if sys.platform != "linux":
        sys.exit("this benchmark reads /proc and compares clocks between processes, so it needs Linux")
    arguments = parse_arguments()
    if arguments.serve is not None:
        serve(arguments.serve)
    elif arguments.slow is not None:
        stay_slow(arguments.slow)
    else:
        # Both end the servers on the way out.
        signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
        start = time.monotonic()
        try:
            found = measure(arguments)
        except KeyboardInterrupt:
            sys.exit("interrupted")
        print_table(found, arguments)
        if arguments.json:
            result = report(found, arguments, time.monotonic() - start)
            Path(arguments.json).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
