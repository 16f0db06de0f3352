"""WSGI applications called as ASGI applications; under real servers they are in test_wsgi_servers.py."""

from __future__ import annotations

import io
import re
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any
from wsgiref.validate import validator

import pytest
from anyio import (
    CancelScope,
    Event,
    create_task_group,
    fail_after,
    from_thread,
    run,
    to_thread,
    wait_all_tasks_blocked,
)
from anyio.lowlevel import checkpoint

from anyio_channels.wsgi import WsgiToAsgi

pytestmark = pytest.mark.two_loops

PATIENCE = 20.0
TEXT = [("Content-Type", "text/plain")]

Environ = dict[str, Any]


class Request:
    """An ASGI server's side of one request: ``body`` comes chunk by chunk, then nothing until ``leave``."""

    def __init__(self, *body: bytes, is_whole: bool = True, **scope: Any) -> None:
        self.scope: dict[str, Any] = {
            "type": "http",
            "http_version": "1.1",
            "method": "POST" if body else "GET",
            "scheme": "http",
            "path": "/",
            "raw_path": b"/",
            "query_string": b"",
            "root_path": "",
            "headers": [],
            "server": ("example.org", 8080),
            "client": ("10.0.0.1", 50000),
        } | scope
        chunks = body or (b"",)
        self.to_come = deque(
            {"type": "http.request", "body": chunk, "more_body": number < len(chunks) or not is_whole}
            for number, chunk in enumerate(chunks, 1)
        )
        self.sent: list[MutableMapping[str, Any]] = []
        self.news = Event()
        self.left = Event()
        self.allowed = -1  # so many chunks more does the client take; any number

    async def receive(self) -> MutableMapping[str, Any]:
        await checkpoint()
        if self.to_come:
            return self.to_come.popleft()
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: MutableMapping[str, Any]) -> None:
        await checkpoint()
        while message.get("body") and not self.allowed:
            await self.next_news()
        self.allowed -= bool(message.get("body"))
        self.sent.append(message)
        self.tell()

    def tell(self) -> None:
        self.news.set()
        self.news = Event()

    async def next_news(self) -> None:
        await self.news.wait()

    def take_more(self, count: int) -> None:
        self.allowed = count
        self.tell()

    @property
    def status(self) -> int:
        status: int = self.sent[0]["status"]
        return status

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        headers: list[tuple[bytes, bytes]] = self.sent[0]["headers"]
        return headers

    @property
    def body(self) -> bytes:
        return b"".join(message["body"] for message in self.sent[1:])

    @property
    def is_complete(self) -> bool:
        return bool(self.sent) and not self.sent[-1].get("more_body", True)

    async def until(self, is_so: Callable[[], bool]) -> None:
        with fail_after(PATIENCE):
            while not is_so():
                await self.news.wait()


async def ask(app: Any, *body: bytes, is_checked: bool = True, **scope: Any) -> Request:
    """Make one request of a WSGI application, with the validator of the standard library around it."""
    request = Request(*body, **scope)
    with fail_after(PATIENCE):
        await WsgiToAsgi(validator(app) if is_checked else app)(request.scope, request.receive, request.send)
    return request


def echo(environ: Environ, start_response: Any) -> list[bytes]:
    body = b"".join(iter(lambda: environ["wsgi.input"].read(1000), b""))
    start_response("200 OK", TEXT)
    return [body]


@pytest.mark.anyio
async def test_a_request_and_its_response() -> None:
    """A list of one chunk is the whole body, so its length is told (PEP 3333, "Handling the Content-Length Header")."""
    for is_checked, length in (True, []), (False, [(b"content-length", b"3")]):
        request = await ask(echo, b"ab", b"", b"c", is_checked=is_checked)
        assert request.status == 200
        assert request.headers == [(b"content-type", b"text/plain"), *length]
        assert request.body == b"abc"
        assert request.is_complete


# What the application is told


async def environ_of(**scope: Any) -> Environ:
    found: Environ = {}

    def app(environ: Environ, start_response: Any) -> list[bytes]:
        found.update(environ)
        return echo(environ, start_response)

    body = scope.pop("body", ())
    await ask(app, *body, **scope)
    return found


@pytest.mark.anyio
async def test_environ() -> None:
    environ = await environ_of(
        method="PUT",
        path="/a b/é",
        raw_path=b"/a%20b/%C3%A9",
        query_string=b"q=%C3%A9&r",
        scheme="https",
        http_version="2",
        headers=[(b"host", b"example.org"), (b"content-type", b"a/b"), (b"content-length", b"3"), (b"x-one", b"\xe9")],
        body=[b"abc"],
    )
    told = {name: value for name, value in environ.items() if name.isupper()}
    assert told == {
        "REQUEST_METHOD": "PUT",
        "SCRIPT_NAME": "",
        "PATH_INFO": "/a b/\xc3\xa9",
        "QUERY_STRING": "q=%C3%A9&r",
        "SERVER_PROTOCOL": "HTTP/2",
        "SERVER_NAME": "example.org",
        "SERVER_PORT": "8080",
        "REMOTE_ADDR": "10.0.0.1",
        "REMOTE_PORT": "50000",
        "HTTP_HOST": "example.org",
        "CONTENT_TYPE": "a/b",
        "CONTENT_LENGTH": "3",
        "HTTP_X_ONE": "\xe9",
    }
    assert environ["wsgi.url_scheme"] == "https"
    assert environ["wsgi.errors"] is not None
    assert environ["asgi.scope"]["path"] == "/a b/é"


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("root", "path", "raw", "script", "info"),
    [
        ("", "/", b"/", "", "/"),
        ("/app", "/app/x", b"/app/x", "/app", "/x"),
        ("/app/", "/app/x", b"/app/x", "/app", "/x"),
        ("/app", "/app", b"/app", "/app", ""),
        ("/app", "/x", b"/x", "/app", "/x"),
        ("/app", "/application", b"/application", "/app", "/application"),
        ("/é", "/é/ü", b"/%C3%A9/%C3%BC", "/\xc3\xa9", "/\xc3\xbc"),
        ("", "/�", b"/%FF", "", "/\xff"),
        ("", "/a/b", b"/a%2Fb", "", "/a/b"),
        ("", "/é", None, "", "/\xc3\xa9"),
        ("", "/rewritten", b"/original", "", "/rewritten"),
    ],
    ids=str,
)
async def test_paths(root: str, path: str, raw: bytes | None, script: str, info: str) -> None:
    """The bytes of the path arrive, spelt as latin-1, below the root path; what a router rewrote counts."""
    environ = await environ_of(root_path=root, path=path, raw_path=raw)
    assert (environ["SCRIPT_NAME"], environ["PATH_INFO"]) == (script, info)


@pytest.mark.anyio
async def test_headers_that_come_twice_and_ambiguous_ones() -> None:
    environ = await environ_of(
        headers=[
            (b"accept", b"a"),
            (b"cookie", b"a=1"),
            (b"accept", b"b"),
            (b"cookie", b"b=2"),
            (b"x_forwarded-for", b"1.2.3.4"),
        ]
    )
    assert environ["HTTP_ACCEPT"] == "a,b"
    assert environ["HTTP_COOKIE"] == "a=1; b=2"
    assert "HTTP_X_FORWARDED_FOR" not in environ  # it would pass for X-Forwarded-For


CHUNKED = (b"transfer-encoding", b"chunked")


def told_length(number: bytes) -> tuple[bytes, bytes]:
    return b"content-length", number


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("headers", "told", "streamed"),
    [
        ([told_length(b"5")], "5", "5"),
        ([CHUNKED], "5", None),
        ([], "5", None),
        ([told_length(b"3"), CHUNKED], "5", None),
        ([CHUNKED, told_length(b"30")], "5", None),
        ([told_length(b"3")], "5", "3"),  # which a server would not let through: it stays the server's to say
        ([told_length("²".encode("latin-1"))], "5", None),
        ([told_length(b"5"), told_length(b"5")], "5", None),
        ([told_length(b"-1")], "5", None),
    ],
    ids=str,
)
async def test_the_length_is_that_of_what_was_received(headers: Any, told: str, streamed: str | None) -> None:
    """Where it is known (RFC 3875, 4.1.2); otherwise, Transfer-Encoding makes a Content-Length void (RFC 9112, 6.3)."""
    seen: list[Any] = []

    def app(environ: Environ, start_response: Any) -> list[bytes]:
        assert "HTTP_TRANSFER_ENCODING" not in environ  # it has been decoded
        seen.append((environ.get("CONTENT_LENGTH"), environ["wsgi.input"].read()))
        start_response("200 OK", TEXT)
        return []

    for buffer_size in (10, 1):
        request = Request(b"he", b"llo", headers=headers)
        with fail_after(PATIENCE):
            await WsgiToAsgi(app, buffer_size=buffer_size)(request.scope, request.receive, request.send)
    assert seen == [(told, b"hello"), (streamed, b"hello")]


@pytest.mark.anyio
async def test_an_empty_body_whose_length_was_told() -> None:
    for headers, told in ([told_length(b"0")], "0"), ([told_length(b"3"), CHUNKED], "0"), ([], None), ([CHUNKED], None):
        environ = await environ_of(headers=headers)
        assert environ.get("CONTENT_LENGTH") == told


@pytest.mark.anyio
async def test_a_scope_that_says_little() -> None:
    request = Request()
    request.scope = {"type": "http", "method": "GET", "path": "/x"}
    found: Environ = {}

    def app(environ: Environ, start_response: Any) -> list[bytes]:
        found.update(environ)
        return echo(environ, start_response)

    await WsgiToAsgi(validator(app))(request.scope, request.receive, request.send)
    assert (found["SERVER_NAME"], found["SERVER_PORT"], found["PATH_INFO"]) == ("localhost", "80", "/x")
    assert "REMOTE_ADDR" not in found


@pytest.mark.anyio
async def test_unix_socket() -> None:
    environ = await environ_of(server=("/run/app.sock", None), scheme="https")
    assert (environ["SERVER_NAME"], environ["SERVER_PORT"]) == ("/run/app.sock", "443")


@pytest.mark.anyio
async def test_context_of_the_request_is_seen() -> None:
    """What a middleware in front has set in its context, the application sees in its thread."""
    variable: ContextVar[str] = ContextVar("variable")
    variable.set("seen")
    seen: list[str] = []

    def app(environ: Environ, start_response: Any) -> Iterator[bytes]:
        seen.append(variable.get())
        start_response("200 OK", TEXT)
        yield b"x"
        seen.append(variable.get())

    await ask(app)
    assert seen == ["seen", "seen"]


@pytest.mark.anyio
async def test_one_thread_for_all_of_a_request() -> None:
    threads: list[threading.Thread] = []

    class Result:
        def __iter__(self) -> Iterator[bytes]:
            threads.append(threading.current_thread())
            yield b"a"
            threads.append(threading.current_thread())

        def close(self) -> None:
            threads.append(threading.current_thread())

    def app(environ: Environ, start_response: Any) -> Result:
        threads.append(threading.current_thread())
        start_response("200 OK", TEXT)
        return Result()

    await ask(app)
    assert len(threads) == 4
    assert len(set(threads)) == 1
    assert threads[0] is not threading.current_thread()


# How a response starts


@pytest.mark.anyio
async def test_start_response_is_called_late() -> None:
    def app(environ: Environ, start_response: Any) -> Iterator[bytes]:
        yield b""
        start_response("404 Not Found", TEXT)
        yield b""
        yield b"late"

    request = await ask(app, is_checked=False)
    assert (request.status, request.body, request.is_complete) == (404, b"late", True)


@pytest.mark.anyio
async def test_nothing_but_headers() -> None:
    def app(environ: Environ, start_response: Any) -> Iterable[bytes]:
        start_response("204 No Content", [("X-A", "1")])
        return [b""]

    request = await ask(app)
    assert (request.status, request.headers, request.body) == (204, [(b"x-a", b"1")], b"")


@pytest.mark.anyio
async def test_repeated_headers_are_kept_in_order() -> None:
    def app(environ: Environ, start_response: Any) -> Iterable[bytes]:
        start_response("200 OK", [*TEXT, ("Set-Cookie", "a=1"), ("X-A", "ü\tx"), ("Set-Cookie", "b=2")])
        return iter([b"x", b"y"])

    request = await ask(app, is_checked=False)
    assert request.headers[1:] == [(b"set-cookie", b"a=1"), (b"x-a", b"\xfc\tx"), (b"set-cookie", b"b=2")]
    assert request.body == b"xy"


@pytest.mark.anyio
async def test_write() -> None:
    """What is written comes before what is returned."""

    def app(environ: Environ, start_response: Any) -> Iterable[bytes]:
        write = start_response("200 OK", TEXT)
        write(b"a")
        write(b"b")
        return iter([b"c"])

    request = await ask(app)
    assert request.body == b"abc"


@pytest.mark.anyio
async def test_write_and_a_list() -> None:
    """The one chunk of the list is not the whole body then, and its length not that of the body."""

    def app(environ: Environ, start_response: Any) -> Iterable[bytes]:
        start_response("200 OK", TEXT)(b"hello ")
        return [b"world"]

    request = await ask(app, is_checked=False)
    assert (request.headers, request.body) == ([(b"content-type", b"text/plain")], b"hello world")


@pytest.mark.anyio
async def test_space_around_a_value_is_no_part_of_it() -> None:
    """Django's cookies begin with a space, which strict servers refuse."""

    def app(environ: Environ, start_response: Any) -> Iterable[bytes]:
        start_response("200 OK", [("Set-Cookie", " a=1 ")])
        return []

    request = await ask(app, is_checked=False)
    assert request.headers == [(b"set-cookie", b"a=1")]


@pytest.mark.anyio
async def test_an_error_page_replaces_what_was_not_sent() -> None:
    def app(environ: Environ, start_response: Any) -> Iterable[bytes]:
        start_response("200 OK", TEXT)
        try:
            dict[str, str]()["x"]
        except KeyError:
            start_response("500 Oops", [*TEXT, ("X-Error", "1")], sys.exc_info())
        return [b"error"]

    request = await ask(app)
    assert (request.status, request.body) == (500, b"error")
    assert (b"x-error", b"1") in request.headers


@pytest.mark.anyio
async def test_an_error_page_comes_too_late() -> None:
    """PEP 3333: with exc_info after the headers were sent, start_response() raises it again."""

    def app(environ: Environ, start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", TEXT)
        yield b"a"
        try:
            dict[str, str]()["x"]
        except KeyError:
            start_response("500 Oops", TEXT, sys.exc_info())
        yield b"never"

    request = Request()
    with pytest.raises(KeyError, match="x"):
        await WsgiToAsgi(app)(request.scope, request.receive, request.send)
    assert (request.status, request.body, request.is_complete) == (200, b"a", False)


WRONG: dict[str, tuple[Any, Any, str]] = {
    "status of bytes": (b"200 OK", TEXT, "status must be a str such as '200 OK', not b'200 OK'"),
    "status without number": ("OK", TEXT, "status must be a str such as '200 OK', not 'OK'"),
    "status with a line break": ("200 OK\r\nX: y", TEXT, "status must be a str"),
    "headers of a tuple": ("200 OK", (), "headers must be a list of"),
    "a header of three": ("200 OK", [("a", "b", "c")], r"got \('a', 'b', 'c'\) in it"),
    "a header of bytes": ("200 OK", [(b"a", "b")], r"got \(b'a', 'b'\) in it"),
    "a name with a space": ("200 OK", [("a b", "c")], "'a b' is not a valid name of an HTTP header"),
    "a value beyond latin-1": ("200 OK", [("a", "€")], "the value of header 'a' must be in latin-1, not '€'"),
    "a value that ends the header": ("200 OK", [("a", "b\r\nc: d")], "holds a control character"),
    "a value with NUL": ("200 OK", [("a", "b\0")], r"the value of header 'a' holds a control character: 'b\\x00'"),
    "a name without letters": ("200 OK", [("", "c")], "'' is not a valid name of an HTTP header"),
    "a name beyond latin-1": ("200 OK", [("€", "c")], "is not a valid name of an HTTP header"),
    "an interim status": ("100 Continue", TEXT, "status must be from 200 to 599, the final ones of HTTP, not 100"),
    "a switch of protocols": ("101 Switching Protocols", TEXT, "from 200 to 599.*not 101"),
    "the last interim status": ("199 Unknown", TEXT, "from 200 to 599.*not 199"),
    "a status beyond all": ("600 Unknown", TEXT, "from 200 to 599.*not 600"),
    "a status of zeros": ("000 None", TEXT, "from 200 to 599.*not 0"),
    "a status of other digits": ("2\u0660\u0660 OK", TEXT, "status must be a str such as '200 OK'"),
    "a status with NUL": ("200 O\0K", TEXT, "status must be a str such as '200 OK'"),
    "two lengths": (
        "200 OK",
        [("Content-Length", "2"), ("content-length", "3")],
        "Content-Length is given twice, as 2 and as 3",
    ),
    "a length that is no number": (
        "200 OK",
        [("Content-Length", "²")],
        "Content-Length must be a number of bytes, not '²'",
    ),
    "a list of lengths": ("200 OK", [("Content-Length", "2, 2")], "must be a number of bytes, not '2, 2'"),
    "no length": ("200 OK", [("Content-Length", "")], "must be a number of bytes, not ''"),
}


@pytest.mark.anyio
@pytest.mark.parametrize(("status", "headers", "match"), WRONG.values(), ids=WRONG)
async def test_start_response_refuses(status: Any, headers: Any, match: str) -> None:
    def app(environ: Environ, start_response: Any) -> list[bytes]:
        start_response(status, headers)
        return []

    request = Request()
    with pytest.raises((TypeError, ValueError), match=match):
        await WsgiToAsgi(app)(request.scope, request.receive, request.send)
    assert request.sent == []


def never_starts(environ: Environ, start_response: Any) -> list[bytes]:
    return []


def starts_after_its_body(environ: Environ, start_response: Any) -> Iterator[bytes]:
    yield b"a"


def returns_str(environ: Environ, start_response: Any) -> list[Any]:
    start_response("200 OK", TEXT)
    return ["text"]


def starts_twice(environ: Environ, start_response: Any) -> list[bytes]:
    start_response("200 OK", TEXT)
    start_response("200 OK", TEXT)
    return []


def stops(environ: Environ, start_response: Any) -> list[bytes]:
    raise StopIteration


def exits(environ: Environ, start_response: Any) -> list[bytes]:
    raise GeneratorExit


def returns_none(environ: Environ, start_response: Any) -> None:
    start_response("200 OK", TEXT)


async def is_asynchronous(environ: Environ, start_response: Any) -> list[bytes]:
    return [b"never"]


def returns_bytes(environ: Environ, start_response: Any) -> bytes:
    start_response("200 OK", TEXT)
    return b"text"


def returns_too_little(environ: Environ, start_response: Any) -> list[bytes]:
    start_response("200 OK", [("Content-Length", "5")])
    return [b"te", b"x"]


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("app", "match"),
    [
        (never_starts, "never_starts.* returned without calling start_response"),
        (starts_after_its_body, "must be called before the first chunk"),
        (returns_str, "a chunk of a response must be bytes, not 'text'"),
        (starts_twice, "called a second time, without exc_info"),
        (stops, "stops.* raised StopIteration"),
        (exits, "exits.* raised GeneratorExit"),
        (returns_none, "returns_none.* must return an iterable of bytes, such as a list, not None"),
        (is_asynchronous, "is_asynchronous.* must return an iterable of bytes, such as a list, not <coroutine"),
        (returns_bytes, "returns_bytes.* must return an iterable of bytes, such as a list, not b'text'"),
        (returns_too_little, "returns_too_little.* returned 2 bytes fewer than its Content-Length says"),
    ],
)
async def test_applications_that_break_the_rules(app: Any, match: str) -> None:
    request = Request()
    with fail_after(PATIENCE), pytest.raises((RuntimeError, TypeError), match=match):
        await WsgiToAsgi(app)(request.scope, request.receive, request.send)
    assert request.sent == []


# What Content-Length says of the body


def answering(length: str, *chunks: bytes, written: tuple[bytes, ...] = (), as_list: bool = False) -> Any:
    def app(environ: Environ, start_response: Any) -> Iterable[bytes]:
        write = start_response("200 OK", [("Content-Length", length)])
        for chunk in written:
            write(chunk)
        return list(chunks) if as_list else iter(chunks)

    return app


@pytest.mark.anyio
@pytest.mark.parametrize("as_list", [True, False], ids=["list", "iterator"])
@pytest.mark.parametrize(
    ("length", "chunks", "body"),
    [
        ("2", [b"hello"], b"he"),
        ("2", [b"he", b"llo"], b"he"),
        ("3", [b"he", b"llo", b"more"], b"hel"),
        ("0", [b"hello"], b""),
        ("5", [b"he", b"", b"llo", b""], b"hello"),
    ],
    ids=str,
)
async def test_no_more_goes_out_than_its_length(length: str, chunks: list[bytes], body: bytes, as_list: bool) -> None:
    """PEP 3333, "Handling the Content-Length Header"."""
    request = await ask(answering(length, *chunks, as_list=as_list), is_checked=False)
    assert (request.headers, request.body) == ([(b"content-length", length.encode())], body)
    assert request.is_complete


@pytest.mark.anyio
async def test_the_application_is_not_asked_for_more_than_its_length() -> None:
    """It is closed where it has made too much, and runs to its end where it has not."""
    chunks = Chunks(iter(lambda: b"xx", b""))  # without end

    def app(environ: Environ, start_response: Any) -> Chunks:
        start_response("200 OK", [("Content-Length", "5")])
        return chunks

    request = await ask(app, is_checked=False)
    assert (request.body, request.is_complete, chunks.closed) == (b"xxxxx", True, 1)
    ended: list[str] = []

    def exact(environ: Environ, start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", [("Content-Length", "2")])
        yield b"xx"
        ended.append("ran on")

    assert (await ask(exact, is_checked=False)).body == b"xx"
    assert ended == ["ran on"]


@pytest.mark.anyio
async def test_write_beyond_the_length_is_refused() -> None:
    """Nothing of it goes out: the response is cut off where it was right."""
    request = Request()
    with fail_after(PATIENCE), pytest.raises(RuntimeError, match=r"write\(\) of 3 bytes, where .* leaves room for 2"):
        await WsgiToAsgi(answering("4", written=(b"he", b"llo")))(request.scope, request.receive, request.send)
    assert (request.body, request.is_complete) == (b"he", False)
    request = await ask(answering("4", b"l", b"o", written=(b"he",)), is_checked=False)
    assert request.body == b"helo"


@pytest.mark.anyio
async def test_a_stream_that_is_too_short() -> None:
    """What there was goes out, the response does not look complete, and the error names the application."""
    request = Request()
    with (
        fail_after(PATIENCE),
        pytest.raises(RuntimeError, match=r"app.* returned 3 bytes fewer than its Content-Length"),
    ):
        await WsgiToAsgi(answering("5", b"he"))(request.scope, request.receive, request.send)
    assert (request.body, request.is_complete) == (b"he", False)


@pytest.mark.anyio
@pytest.mark.parametrize(("method", "status"), [("HEAD", "200 OK"), ("GET", "304 Not Modified")])
async def test_a_length_of_what_is_not_sent(method: str, status: str) -> None:
    """The length is that of the response to GET (RFC 9110, 8.6)."""

    def app(environ: Environ, start_response: Any) -> list[bytes]:
        start_response(status, [("Content-Length", "5")])
        return []

    request = await ask(app, is_checked=False, method=method)
    assert (request.headers, request.body, request.is_complete) == ([(b"content-length", b"5")], b"", True)


@pytest.mark.anyio
async def test_the_length_of_an_error_page_counts() -> None:
    def app(environ: Environ, start_response: Any) -> Iterable[bytes]:
        start_response("200 OK", [("Content-Length", "2")])
        try:
            dict[str, str]()["x"]
        except KeyError:
            start_response("500 Oops", [("Content-Length", "5")], sys.exc_info())
        return iter([b"er", b"ror"])

    assert (await ask(app, is_checked=False)).body == b"error"


@pytest.mark.anyio
async def test_fields_of_the_connection_are_left_out() -> None:
    """They are the server's own (PEP 3333, "Other HTTP Features"), and one length that comes twice is one."""

    def app(environ: Environ, start_response: Any) -> list[bytes]:
        fields = [("Transfer-Encoding", "chunked"), ("Connection", "close"), ("Keep-Alive", "5"), ("Upgrade", "x")]
        start_response("200 OK", [*fields, ("X-A", "1"), ("Content-Length", "2"), ("Content-Length", "2")])
        return [b"up"]

    request = await ask(app, is_checked=False)
    assert (request.headers, request.body) == ([(b"x-a", b"1"), (b"content-length", b"2")], b"up")


# Closing the iterable


class Chunks:
    """An iterable that knows whether it was closed."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self.chunks = chunks
        self.closed = 0

    def __iter__(self) -> Iterator[bytes]:
        return iter(self.chunks)

    def close(self) -> None:
        self.closed += 1


def failing(*before: bytes) -> Iterator[bytes]:
    yield from before
    raise KeyError("in the middle")


@pytest.mark.anyio
@pytest.mark.parametrize("before", [(), (b"a",), (b"a", b"b")], ids=len)
async def test_close_is_called_after_an_error(before: tuple[bytes, ...]) -> None:
    """The error is the server's to log, what came before it was sent, and the response does not look complete."""
    chunks = Chunks(failing(*before))

    def app(environ: Environ, start_response: Any) -> Chunks:
        start_response("200 OK", TEXT)
        return chunks

    request = Request()
    with pytest.raises(KeyError, match="in the middle"):
        await WsgiToAsgi(app)(request.scope, request.receive, request.send)
    assert chunks.closed == 1
    assert b"".join(message.get("body", b"") for message in request.sent) == b"".join(before)
    assert not request.is_complete


@pytest.mark.anyio
@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_close_is_called_at_the_end(method: str) -> None:
    chunks = Chunks([b"a", b"b"])

    def app(environ: Environ, start_response: Any) -> Chunks:
        start_response("200 OK", TEXT)
        return chunks

    await ask(app, is_checked=False, method=method)
    assert chunks.closed == 1


@pytest.mark.anyio
async def test_close_fails() -> None:
    """The response was complete, and goes out; the error is the server's to log."""

    class Bad(Chunks):
        def close(self) -> None:
            raise KeyError("close")

    def app(environ: Environ, start_response: Any) -> Bad:
        start_response("200 OK", TEXT)
        return Bad([b"a"])

    request = Request()
    with pytest.raises(KeyError, match="close"):
        await WsgiToAsgi(app)(request.scope, request.receive, request.send)
    assert (request.body, request.is_complete) == (b"a", True)


@pytest.mark.anyio
async def test_an_error_before_anything() -> None:
    def app(environ: Environ, start_response: Any) -> list[bytes]:
        raise KeyError("before")

    request = Request()
    with pytest.raises(KeyError, match="before"):
        await WsgiToAsgi(app)(request.scope, request.receive, request.send)
    assert request.sent == []


# HEAD and files


@pytest.mark.anyio
async def test_head_has_the_headers_of_get_and_no_body() -> None:
    request = await ask(echo, is_checked=False, method="HEAD")
    assert request.headers == [(b"content-type", b"text/plain"), (b"content-length", b"0")]

    def endless(environ: Environ, start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", [*TEXT, ("Content-Length", "12345")])
        while True:
            yield b"x"

    request = await ask(endless, is_checked=False, method="HEAD")
    assert (request.body, request.is_complete) == (b"", True)
    assert (b"content-length", b"12345") in request.headers

    def two(environ: Environ, start_response: Any) -> list[bytes]:
        start_response("200 OK", TEXT)
        return [b"a", b"b"]

    request = await ask(two, method="HEAD")
    assert (request.body, request.is_complete) == (b"", True)


@pytest.mark.anyio
async def test_file_wrapper(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 1000)
    files: list[io.BufferedReader] = []

    def app(environ: Environ, start_response: Any) -> Any:
        file = path.open("rb")
        files.append(file)
        start_response("200 OK", TEXT)
        return environ["wsgi.file_wrapper"](file, 10_000)

    request = await ask(app, is_checked=False)
    assert request.body == path.read_bytes()
    assert files[0].closed


# Bodies


@pytest.mark.anyio
@pytest.mark.parametrize("spool", [False, True], ids=["stream", "spool"])
@pytest.mark.parametrize("length", [0, 1, 10, 30, 5000])
async def test_bodies_of_any_size(spool: bool, length: int) -> None:
    """Whether it fits the buffer or not, the application reads all of it, in its own pieces and by lines."""
    body = bytes(number % 251 for number in range(length))
    chunks = [body[start : start + 7] for start in range(0, length, 7)] or [b""]
    read: list[Any] = []

    def app(environ: Environ, start_response: Any) -> list[bytes]:
        file = environ["wsgi.input"]
        read.extend([file.read(3), file.readline(), file.readlines(), file.read(1), environ.get("CONTENT_LENGTH")])
        start_response("200 OK", TEXT)
        return [read[0] + read[1] + b"".join(read[2])]

    request = Request(*chunks)
    with fail_after(PATIENCE):
        await WsgiToAsgi(app, buffer_size=10, spool=spool)(request.scope, request.receive, request.send)
    assert request.body == body
    assert read[1] == body[3:].split(b"\n")[0] + b"\n" * (b"\n" in body[3:])
    assert read[3] == b""
    is_known = spool or length <= 10
    assert read[4] == (str(length) if is_known and length else None)


@pytest.mark.anyio
@pytest.mark.parametrize("size", [-1, -5, None], ids=str)
async def test_reading_a_negative_size_is_reading_all(size: int | None) -> None:
    """In memory, spooled and streamed alike."""
    read: list[bytes] = []

    def app(environ: Environ, start_response: Any) -> list[bytes]:
        file = environ["wsgi.input"]
        read.extend([file.read(1), file.read(size), file.read(size)])
        start_response("200 OK", TEXT)
        return []

    for options in ({}, {"buffer_size": 2}, {"buffer_size": 2, "spool": True}):
        read.clear()
        request = Request(b"abc", b"def")
        with fail_after(PATIENCE):
            await WsgiToAsgi(app, **options)(request.scope, request.receive, request.send)  # type: ignore[arg-type]
        assert read == [b"a", b"bcdef", b""]


@pytest.mark.anyio
async def test_a_body_of_one_large_chunk() -> None:
    """It is read in pieces, as the application asks for them."""
    body = bytes(range(256)) * 2000
    request = Request(body, b"!")
    with fail_after(PATIENCE):
        await WsgiToAsgi(validator(echo), buffer_size=10)(request.scope, request.receive, request.send)
    assert request.body == body + b"!"


@pytest.mark.anyio
async def test_a_small_body_is_there_before_the_application() -> None:
    """A client that is slow with little holds no thread."""
    entered: list[int] = []

    def app(environ: Environ, start_response: Any) -> list[bytes]:
        entered.append(1)
        return echo(environ, start_response)

    request = Request(b"a", is_whole=False)
    async with create_task_group() as tasks:
        tasks.start_soon(WsgiToAsgi(app), request.scope, request.receive, request.send)
        await wait_all_tasks_blocked()
        assert not entered
        request.left.set()
    assert not entered
    assert request.sent == []


@pytest.mark.anyio
async def test_a_large_body_flows_at_the_pace_of_the_application() -> None:
    """What the application has not read is not taken from the client, but for the buffer."""
    chunks = [b"x" * 10] * 100
    request = Request(*chunks)
    may_read = threading.Event()

    def app(environ: Environ, start_response: Any) -> list[bytes]:
        assert may_read.wait(PATIENCE)
        return echo(environ, start_response)

    async with create_task_group() as tasks:
        tasks.start_soon(WsgiToAsgi(app, buffer_size=50), request.scope, request.receive, request.send)
        await wait_all_tasks_blocked()
        assert len(request.to_come) == 100 - 6
        may_read.set()
        await request.until(lambda: request.is_complete)
        request.left.set()
    assert request.body == b"x" * 1000


@pytest.mark.anyio
async def test_what_has_come_of_a_large_body_is_read_at_once() -> None:
    """The application reads while the body still comes: nothing waits for its end."""
    read: list[bytes] = []
    rest: list[bytes] = []
    has_read = Event()

    def app(environ: Environ, start_response: Any) -> list[bytes]:
        read.append(environ["wsgi.input"].read1(100))
        from_thread.run_sync(has_read.set)
        read.append(environ["wsgi.input"].read())
        start_response("200 OK", TEXT)
        return [b"".join(read)]

    class Slow(Request):
        async def receive(self) -> MutableMapping[str, Any]:
            if not self.to_come and not rest:
                await has_read.wait()
                rest.append(b"b")
                return {"type": "http.request", "body": rest[0], "more_body": False}
            return await super().receive()

    request = Slow(b"a" * 20, is_whole=False)
    with fail_after(PATIENCE):
        await WsgiToAsgi(app, buffer_size=10)(request.scope, request.receive, request.send)
    assert request.body == b"a" * 20 + b"b"
    assert read[0] == b"a" * 20


@pytest.mark.anyio
async def test_the_client_goes_away_while_its_body_is_spooled() -> None:
    """The application is not called, and the file is gone."""
    request = Request(b"x" * 100, is_whole=False)
    request.left.set()
    await WsgiToAsgi(never_starts, buffer_size=10, spool=True)(request.scope, request.receive, request.send)
    assert request.sent == []  # an open file would be a ResourceWarning


@pytest.mark.anyio
async def test_a_chunk_is_sent_before_the_next_is_made() -> None:
    """PEP 3333: no transmission is delayed until the application goes on."""
    may_go_on = threading.Event()

    def app(environ: Environ, start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", TEXT)
        yield b"first"
        assert may_go_on.wait(PATIENCE)
        yield b"second"

    request = Request()
    async with create_task_group() as tasks:
        tasks.start_soon(WsgiToAsgi(app), request.scope, request.receive, request.send)
        await request.until(lambda: len(request.sent) == 2)
        assert (request.body, request.is_complete) == (b"first", False)
        may_go_on.set()
        await request.until(lambda: request.is_complete)
    assert request.body == b"firstsecond"


@pytest.mark.anyio
async def test_a_slow_client_slows_the_application() -> None:
    """The application is ahead of the client by the buffer and one chunk, not more."""
    made: list[int] = []

    def app(environ: Environ, start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", TEXT)
        for number in range(100):
            made.append(number)
            yield b"x" * 10

    request = Request()
    request.take_more(0)
    async with create_task_group() as tasks:
        tasks.start_soon(WsgiToAsgi(app, buffer_size=50), request.scope, request.receive, request.send)
        with fail_after(PATIENCE):
            while len(made) < 6:
                await checkpoint()
        await wait_all_tasks_blocked()
        assert len(made) == 6
        request.take_more(-1)
        await request.until(lambda: request.is_complete)
    assert request.body == b"x" * 1000
    assert len(made) == 100


@pytest.mark.anyio
async def test_a_small_response_to_a_slow_client_holds_no_thread() -> None:
    app = WsgiToAsgi(echo, threads=1)
    slow = Request(b"slow")
    slow.take_more(0)
    async with create_task_group() as tasks:
        tasks.start_soon(app, slow.scope, slow.receive, slow.send)
        await slow.until(lambda: len(slow.sent) == 1)
        other = Request(b"x")
        with fail_after(PATIENCE):
            await app(other.scope, other.receive, other.send)
        assert other.body == b"x"
        tasks.cancel_scope.cancel()


# Threads


@pytest.mark.anyio
async def test_threads_are_limited() -> None:
    """So many requests are in the application; the next waits for one to end. anyio's own threads are not counted."""
    inside: list[int] = []
    go_on = threading.Event()

    def app(environ: Environ, start_response: Any) -> list[bytes]:
        inside.append(1)
        assert go_on.wait(PATIENCE)
        return echo(environ, start_response)

    asgi = WsgiToAsgi(app, threads=2)
    requests = [Request() for _ in range(3)]
    async with create_task_group() as tasks:
        for request in requests:
            tasks.start_soon(asgi, request.scope, request.receive, request.send)
        with fail_after(PATIENCE):
            while len(inside) < 2:
                await checkpoint()
        await wait_all_tasks_blocked()
        assert len(inside) == 2
        assert await to_thread.run_sync(lambda: "free") == "free"
        go_on.set()
    assert len(inside) == 3
    assert all(request.is_complete for request in requests)


def test_one_adapter_in_several_event_loops() -> None:
    """Tests and servers run loops one after the other: nothing of one is left for the next."""
    app = WsgiToAsgi(echo, threads=1)

    async def main() -> bytes:
        request = Request(b"x")
        await app(request.scope, request.receive, request.send)
        return request.body

    assert [run(main, backend=backend) for backend in ("asyncio", "trio", "asyncio")] == [b"x"] * 3


@pytest.mark.anyio
async def test_a_thousand_requests_fifty_at_a_time() -> None:
    app = WsgiToAsgi(validator(echo), threads=10)
    answers: list[bytes] = []

    async def client(number: int) -> None:
        for count in range(20):
            body = b"%d-%d" % (number, count)
            request = Request(body)
            await app(request.scope, request.receive, request.send)
            assert request.body == body
            answers.append(request.body)

    async with create_task_group() as tasks:
        for number in range(50):
            tasks.start_soon(client, number)
    assert len(set(answers)) == 1000


# Cancellation


@pytest.mark.anyio
async def test_the_client_goes_away_while_chunks_are_sent() -> None:
    """The application ends at its next chunk, is closed, and nothing is raised to the server."""
    chunks = Chunks(iter(lambda: b"x", b""))  # without end

    def app(environ: Environ, start_response: Any) -> Chunks:
        start_response("200 OK", TEXT)
        return chunks

    request = Request()
    with fail_after(PATIENCE):
        async with create_task_group() as tasks:
            tasks.start_soon(WsgiToAsgi(app, buffer_size=100), request.scope, request.receive, request.send)
            await request.until(lambda: len(request.body) > 200)
            request.left.set()
    assert chunks.closed == 1


@pytest.mark.anyio
async def test_the_client_goes_away_while_it_is_slow() -> None:
    """A thread that waits for room is told."""
    chunks = Chunks(iter(lambda: b"x" * 10, b""))

    def app(environ: Environ, start_response: Any) -> Chunks:
        start_response("200 OK", TEXT)
        return chunks

    request = Request()
    request.take_more(0)
    with fail_after(PATIENCE):
        async with create_task_group() as tasks:
            tasks.start_soon(WsgiToAsgi(app, buffer_size=100), request.scope, request.receive, request.send)
            await request.until(lambda: len(request.sent) == 1)
            await wait_all_tasks_blocked()
            request.left.set()
    assert chunks.closed == 1


@pytest.mark.anyio
async def test_the_client_goes_away_in_the_middle_of_its_body() -> None:
    """The reader is told, by what no ``except Exception`` takes, and cleans up."""
    seen: list[Any] = []

    def app(environ: Environ, start_response: Any) -> list[bytes]:
        try:
            try:
                environ["wsgi.input"].read()
            except Exception as error:  # noqa: BLE001 - that is the point
                seen.append(error)
        finally:
            seen.append("cleaned up")
        return []

    request = Request(b"x" * 100, is_whole=False)
    with fail_after(PATIENCE):
        async with create_task_group() as tasks:
            tasks.start_soon(WsgiToAsgi(app, buffer_size=10), request.scope, request.receive, request.send)
            await wait_all_tasks_blocked()
            request.left.set()
    assert seen == ["cleaned up"]


@pytest.mark.anyio
@pytest.mark.parametrize("by", ["client", "server"])
@pytest.mark.parametrize("wait", ["read", "write"])
async def test_a_wait_that_begins_when_the_request_is_over(wait: str, by: str) -> None:
    """The thread does not wait for ever for what nobody will bring, or take."""
    begun = threading.Event()
    go_on = threading.Event()
    seen: list[str] = []

    def app(environ: Environ, start_response: Any) -> Iterator[bytes]:
        try:
            start_response("200 OK", TEXT)
            while len(environ["wsgi.input"].read1(1000)) == 1000:
                pass
            if wait == "write":
                yield b"x"
            begun.set()
            assert go_on.wait(PATIENCE)
            if wait == "read":
                environ["wsgi.input"].read()
            else:
                start_response.__self__._buffered = 100
                from_thread.run(start_response.__self__._wait_for_room)
                from_thread.check_cancelled()
        finally:
            seen.append("told")

    request = Request(b"x" * 1500, is_whole=False)
    request.take_more(0)
    with fail_after(PATIENCE):
        async with create_task_group() as tasks:
            tasks.start_soon(WsgiToAsgi(app, buffer_size=1), request.scope, request.receive, request.send)
            while not begun.is_set():
                await checkpoint()
            await wait_all_tasks_blocked()
            if by == "client":
                request.left.set()
            else:
                tasks.cancel_scope.cancel()
            for _ in range(10):
                with CancelScope(shield=True):
                    await checkpoint()
            go_on.set()
    assert seen == ["told"]


@pytest.mark.anyio
async def test_a_server_that_says_early_that_the_client_is_gone() -> None:
    """Hypercorn does so while it is still sending the end of the response: that is not cancelled."""

    class Early(Request):
        is_sent = False

        async def send(self, message: MutableMapping[str, Any]) -> None:
            if not message.get("more_body", True):
                self.left.set()
                for _ in range(10):
                    await checkpoint()
                self.is_sent = True

    request = Early()
    await WsgiToAsgi(echo)(request.scope, request.receive, request.send)
    assert request.is_sent


@pytest.mark.anyio
@pytest.mark.parametrize("spool", [False, True])
@pytest.mark.parametrize("body", [[], [b"x" * 2000], [b"x" * 600] * 2], ids=len)
async def test_an_application_asks_whether_the_client_is_gone(body: list[bytes], spool: bool) -> None:
    """``anyio.from_thread.check_cancelled()`` serves one that neither reads nor writes."""
    gone = threading.Event()
    ended: list[str] = []

    def app(environ: Environ, start_response: Any) -> list[bytes]:
        assert gone.wait(PATIENCE)
        try:
            while True:
                from_thread.check_cancelled()
        finally:
            ended.append("cancelled")

    request = Request(*body)
    with fail_after(PATIENCE):
        async with create_task_group() as tasks:
            wsgi = WsgiToAsgi(app, buffer_size=1000, spool=spool)
            tasks.start_soon(wsgi, request.scope, request.receive, request.send)
            await wait_all_tasks_blocked()
            request.left.set()
            gone.set()
    assert ended == ["cancelled"]


@pytest.mark.anyio
async def test_what_fails_while_cleaning_up_is_the_servers_to_log() -> None:
    class Bad(Chunks):
        def close(self) -> None:
            raise KeyError("close")

    def app(environ: Environ, start_response: Any) -> Bad:
        start_response("200 OK", TEXT)
        return Bad(iter(lambda: b"x", b""))

    request = Request()

    async def serve() -> None:
        with pytest.raises(KeyError, match="close"):
            await WsgiToAsgi(app, buffer_size=100)(request.scope, request.receive, request.send)

    with fail_after(PATIENCE):
        async with create_task_group() as tasks:
            tasks.start_soon(serve)
            await request.until(lambda: len(request.body) > 200)
            request.left.set()


@pytest.mark.anyio
async def test_a_cancelled_call_waits_for_the_application() -> None:
    """Nothing of the request is left behind: neither its thread nor its iterable."""
    chunks = Chunks(iter(lambda: b"x", b""))

    def app(environ: Environ, start_response: Any) -> Chunks:
        start_response("200 OK", TEXT)
        return chunks

    request = Request()
    with fail_after(PATIENCE):
        async with create_task_group() as tasks:
            tasks.start_soon(WsgiToAsgi(app, buffer_size=100), request.scope, request.receive, request.send)
            await request.until(lambda: len(request.body) > 200)
            tasks.cancel_scope.cancel()
    assert chunks.closed == 1


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_task_that_is_cancelled_natively_lets_its_thread_go() -> None:
    """``Task.cancel()`` does not wait for a thread; the application is told at its next chunk."""
    import asyncio

    seen: list[BaseException] = []
    over = threading.Event()
    go_on = threading.Event()

    def app(environ: Environ, start_response: Any) -> Iterator[bytes]:
        write = start_response("200 OK", TEXT)
        yield b"first"
        assert go_on.wait(PATIENCE)
        try:
            write(b"second")
        except BaseException as error:
            seen.append(error)
            raise
        finally:
            over.set()

    request = Request()
    task = asyncio.ensure_future(WsgiToAsgi(app)(request.scope, request.receive, request.send))
    await request.until(lambda: len(request.sent) == 2)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    go_on.set()
    assert await to_thread.run_sync(over.wait, PATIENCE)
    assert isinstance(seen[0], asyncio.CancelledError)


class Failing(Request):
    """``send`` raises, after the client has left if ``leaves``."""

    def __init__(self, error: Exception, *, leaves: bool = False) -> None:
        super().__init__()
        self.error = error
        self.leaves = leaves

    async def send(self, message: MutableMapping[str, Any]) -> None:
        if self.leaves:
            self.left.set()
            await wait_all_tasks_blocked()
        raise self.error


@pytest.mark.anyio
async def test_what_sending_raises() -> None:
    """It is raised to the server, an OSError too, be it the server's way to say that the client is gone or a fault on the way."""
    chunks = Chunks(iter(lambda: b"x", b""))

    def app(environ: Environ, start_response: Any) -> Chunks:
        start_response("200 OK", TEXT)
        return chunks

    for one in (app, echo):
        for error in (FileNotFoundError("/nonexistent/log"), ValueError("refused")):
            request = Failing(error)
            with fail_after(PATIENCE), pytest.raises(type(error)) as caught:
                await WsgiToAsgi(one)(request.scope, request.receive, request.send)
            assert caught.value is error
    assert chunks.closed == 2


@pytest.mark.anyio
async def test_a_server_that_says_twice_that_the_client_is_gone() -> None:
    """ASGI 2.4: ``send`` may raise an OSError after http.disconnect; that is an error of nobody's."""
    request = Failing(OSError("gone"), leaves=True)
    with fail_after(PATIENCE):
        await WsgiToAsgi(echo)(request.scope, request.receive, request.send)
    request = Failing(ValueError("refused"), leaves=True)
    with fail_after(PATIENCE), pytest.raises(ValueError, match="refused"):
        await WsgiToAsgi(echo)(request.scope, request.receive, request.send)


# Other scopes, and what the adapter itself refuses


@pytest.mark.anyio
async def test_lifespan_is_answered() -> None:
    asked = deque(["lifespan.startup", "lifespan.shutdown"])
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": asked.popleft()}

    async def send(message: Any) -> None:
        sent.append(message["type"])

    await WsgiToAsgi(echo)({"type": "lifespan"}, receive, send)
    assert sent == ["lifespan.startup.complete", "lifespan.shutdown.complete"]


@pytest.mark.anyio
async def test_websockets_are_refused() -> None:
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        sent.append(message)

    await WsgiToAsgi(echo)({"type": "websocket", "path": "/"}, receive, send)
    assert sent == [{"type": "websocket.close"}]
    with pytest.raises(ValueError, match="serves scopes of the types 'http' and 'lifespan', not 'smtp'"):
        await WsgiToAsgi(echo)({"type": "smtp"}, receive, send)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"threads": 0}, "threads must be at least 1, not 0"),
        ({"buffer_size": "1"}, "buffer_size must be an int, not '1'"),
        ({"app": 5}, "app must be a WSGI application, not 5"),
        ({"thread": 5}, "thread"),
    ],
    ids=str,
)
def test_wrong_options(options: dict[str, Any], match: str) -> None:
    with pytest.raises((TypeError, ValueError), match=match):
        WsgiToAsgi(**{"app": echo, **options})


def test_repr() -> None:
    assert re.fullmatch(r"WsgiToAsgi\(<function echo at .*>\)", repr(WsgiToAsgi(echo)))
