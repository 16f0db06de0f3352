"""ASGI applications called as WSGI applications, and both adapters in a row; real servers are in test_wsgi_servers.py."""

from __future__ import annotations

import io
import logging
import queue
import re
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from wsgiref.util import setup_testing_defaults
from wsgiref.validate import validator

import pytest
from anyio import (
    ClosedResourceError,
    Event,
    create_task_group,
    get_cancelled_exc_class,
    run,
    sleep_forever,
    to_thread,
    wait_all_tasks_blocked,
)
from anyio.lowlevel import current_token
from hypothesis import given
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from anyio_channels.portal import Portal
from anyio_channels.wsgi import AsgiToWsgi, WsgiToAsgi

PATIENCE = 20.0
TEXT = [(b"content-type", b"text/plain")]

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

OPTIONS = [
    pytest.param(("asyncio", {"use_uvloop": False}), id="asyncio"),
    pytest.param(("asyncio", {"use_uvloop": True}), id="uvloop"),
    pytest.param(("trio", {}), id="trio"),
]


@pytest.fixture(params=OPTIONS)
def serve(request: pytest.FixtureRequest) -> Callable[..., AsgiToWsgi]:
    """Make an adapter on each backend; to be closed by the test."""
    backend, options = request.param

    def make(app: Any, **others: Any) -> AsgiToWsgi:
        return AsgiToWsgi(app, backend, backend_options=options, **others)

    return make


Serve = Callable[..., AsgiToWsgi]


def portal_of(wsgi: AsgiToWsgi) -> Portal:
    """Return the event loop that the application lives in."""
    return wsgi._host().portal


class Answer:
    """What a WSGI server gets."""

    def __init__(self) -> None:
        self.status = ""
        self.headers: list[tuple[str, str]] = []
        self.body = b""

    def start(self, status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Callable[[bytes], object]:
        self.status = status
        self.headers = headers
        return lambda chunk: None


def environ_of(body: bytes | None = None, **environ: Any) -> dict[str, Any]:
    result: dict[str, Any] = {"REQUEST_METHOD": "GET", "SERVER_PROTOCOL": "HTTP/1.1", "QUERY_STRING": ""}
    if body is not None:
        result |= {"REQUEST_METHOD": "POST", "CONTENT_LENGTH": str(len(body)), "wsgi.input": io.BytesIO(body)}
    result |= environ
    setup_testing_defaults(result)
    return result


def ask(app: Any, body: bytes | None = None, *, is_checked: bool = True, **environ: Any) -> Answer:
    """Make one request as a WSGI server does, with the validator of the standard library in between."""
    answer = Answer()
    chunks = (validator(app) if is_checked else app)(environ_of(body, **environ), answer.start)
    try:
        for chunk in chunks:
            answer.body += chunk
    finally:
        if hasattr(chunks, "close"):
            chunks.close()
    return answer


async def read_all(receive: Receive) -> bytes:
    body: bytes = b""
    while True:
        message = await receive()
        assert message["type"] == "http.request"
        body += message["body"]
        if not message["more_body"]:
            return bytes(body)


async def start(send: Send, status: int = 200, headers: list[tuple[bytes, bytes]] | None = None) -> None:
    await send({"type": "http.response.start", "status": status, "headers": TEXT if headers is None else headers})


async def send_body(send: Send, body: bytes, *, more: bool = False) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": more})


async def echo(scope: Message, receive: Receive, send: Send) -> None:
    body = await read_all(receive)
    await start(send)
    await send_body(send, body)


def test_requests_and_responses(serve: Serve) -> None:
    with serve(echo) as app:
        for body in (b"abc", b"", None, b"x" * 3_000_000):
            answer = ask(app, body)
            assert (answer.status, answer.headers) == ("200 OK", [("content-type", "text/plain")])
            assert answer.body == (body or b"")


# What the application is told


def scope_of(body: bytes | None = None, **environ: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}

    async def app(scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            found.update(scope)
            await echo(scope, receive, send)

    with AsgiToWsgi(app) as wsgi:
        ask(wsgi, body, is_checked=False, **environ)
    return found


def test_scope() -> None:
    scope = scope_of(
        b"abc",
        REQUEST_METHOD="PUT",
        SCRIPT_NAME="/app",
        PATH_INFO="/a b/\xc3\xa9",
        QUERY_STRING="q=%C3%A9",
        SERVER_NAME="example.org",
        SERVER_PORT="8443",
        SERVER_PROTOCOL="HTTP/1.0",
        HTTP_HOST="example.org",
        HTTP_X_ONE="\xe9",
        CONTENT_TYPE="a/b",
        REMOTE_ADDR="10.0.0.1",
        REMOTE_PORT="50000",
        **{"wsgi.url_scheme": "https"},
    )
    environ = scope.pop("wsgi.environ")
    assert environ["PATH_INFO"] == "/a b/\xc3\xa9"
    assert scope == {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.0",
        "method": "PUT",
        "scheme": "https",
        "path": "/app/a b/é",
        "raw_path": b"/app/a%20b/%C3%A9",
        "query_string": b"q=%C3%A9",
        "root_path": "/app",
        "headers": [
            (b"host", b"example.org"),
            (b"x-one", b"\xe9"),
            (b"content-type", b"a/b"),
            (b"content-length", b"3"),
        ],
        "server": ("example.org", 8443),
        "client": ("10.0.0.1", 50000),
        "state": {},
        "extensions": {},
    }


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"PATH_INFO": "/a/b", "RAW_URI": "/a%2Fb?x=1"}, {"raw_path": b"/a%2Fb", "path": "/a/b"}),
        ({"PATH_INFO": "/a/b", "REQUEST_URI": "/a%2Fb"}, {"raw_path": b"/a%2Fb"}),
        ({"PATH_INFO": "/rewritten", "RAW_URI": "/original"}, {"raw_path": b"/rewritten"}),
        ({"PATH_INFO": "/\xff"}, {"raw_path": b"/%FF", "path": "/�"}),
        ({"PATH_INFO": "", "SCRIPT_NAME": "/app"}, {"path": "/app", "root_path": "/app"}),
        ({"SERVER_PORT": ""}, {"server": ("127.0.0.1", None)}),
        ({"SERVER_PORT": None}, {"server": ("127.0.0.1", None)}),
        ({"SERVER_PORT": 8080}, {"server": ("127.0.0.1", 8080)}),
        ({"SERVER_PORT": "²"}, {"server": ("127.0.0.1", None)}),
        ({"REMOTE_ADDR": "::1", "REMOTE_PORT": 50000}, {"client": ("::1", 50000)}),
        ({"REMOTE_ADDR": "::1", "REMOTE_PORT": None}, {"client": ("::1", 0)}),
        ({"REMOTE_ADDR": "::1", "REMOTE_PORT": "²"}, {"client": ("::1", 0)}),
        ({"SERVER_PROTOCOL": "HTTP/1.1"}, {"http_version": "1.1"}),
        ({"SERVER_PROTOCOL": "HTTP/2.0"}, {"http_version": "2"}),
        ({"SERVER_PROTOCOL": "HTTP/2"}, {"http_version": "2"}),
        ({"SERVER_PROTOCOL": "HTTP/3.0"}, {"http_version": "3"}),
        ({"REMOTE_ADDR": "10.0.0.1"}, {"client": ("10.0.0.1", 0)}),
        ({}, {"client": None}),
    ],
    ids=str,
)
def test_paths_and_addresses(environ: dict[str, Any], expected: dict[str, Any]) -> None:
    """The path as it came is told where the server tells it; otherwise it is quoted anew."""
    scope = scope_of(**environ)
    assert {name: scope[name] for name in expected} == expected


def test_a_body_whose_end_the_server_marks() -> None:
    """Without a length, all is read if the server says that its input ends (``wsgi.input_terminated``), and nothing otherwise."""
    for is_terminated, expected in (True, b"x" * 100_000), (False, b""):
        environ: dict[str, Any] = {"wsgi.input": io.BytesIO(b"x" * 100_000), "wsgi.input_terminated": is_terminated}
        with AsgiToWsgi(echo) as app:
            assert ask(app, is_checked=False, **environ).body == expected


LENGTHS: dict[str, tuple[dict[str, Any], list[tuple[bytes, bytes]], bytes]] = {
    "a length": ({"CONTENT_LENGTH": "3"}, [(b"content-length", b"3")], b"abc"),
    "an int": ({"CONTENT_LENGTH": 3}, [(b"content-length", b"3")], b"abc"),
    "None": ({"CONTENT_LENGTH": None}, [], b""),
    "two of each": (
        {"CONTENT_LENGTH": "3", "HTTP_CONTENT_LENGTH": "5", "CONTENT_TYPE": "a/b", "HTTP_CONTENT_TYPE": "c/d"},
        [(b"content-type", b"a/b"), (b"content-length", b"3")],
        b"abc",
    ),
    "only the wrong ones": ({"HTTP_CONTENT_LENGTH": "5", "HTTP_CONTENT_TYPE": "c/d"}, [], b""),
    "another digit": ({"CONTENT_LENGTH": "²"}, [(b"content-length", b"0")], b""),
    "more digits than a number may have": ({"CONTENT_LENGTH": "9" * 5000}, [(b"content-length", b"0")], b""),
    "another digit, and an end": ({"CONTENT_LENGTH": "²", "wsgi.input_terminated": True}, [], b"abcdef"),
    "chunks, and an end": (
        {"CONTENT_LENGTH": "3", "HTTP_TRANSFER_ENCODING": "chunked", "wsgi.input_terminated": True},
        [(b"transfer-encoding", b"chunked")],
        b"abcdef",
    ),
    "chunks, and no end": (
        {"CONTENT_LENGTH": "3", "HTTP_TRANSFER_ENCODING": "chunked"},
        [(b"transfer-encoding", b"chunked"), (b"content-length", b"3")],
        b"abc",
    ),
}


@pytest.mark.parametrize(("environ", "headers", "body"), LENGTHS.values(), ids=LENGTHS)
def test_the_length_is_that_of_the_body(environ: dict[str, Any], headers: list[Any], body: bytes) -> None:
    """It is told once, and is that of what the application reads (RFC 3875, 4.1.18; RFC 9110, 8.6; RFC 9112, 6.3)."""
    seen: list[Any] = []

    async def app(scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            seen.append([pair for pair in scope["headers"] if pair[0] != b"host"])
            await echo(scope, receive, send)

    with AsgiToWsgi(app) as wsgi:
        answer = ask(wsgi, is_checked=False, **{"wsgi.input": io.BytesIO(b"abcdef"), **environ})
    assert (seen, answer.body) == ([headers], body)


# Responses


WRONG: dict[str, tuple[Any, Any, str]] = {
    "no status": (None, [], "status must be an int such as 200, not None"),
    "a bool": (True, [], "status must be an int such as 200, not True"),
    "a str": ("200", [], "status must be an int such as 200, not '200'"),
    "an interim status": (101, [], "status must be from 200 to 599, the final ones of HTTP, not 101"),
    "a status of two digits": (42, [], "from 200 to 599.*not 42"),
    "a status of four digits": (1000, [], "from 200 to 599.*not 1000"),
    "a value that ends the header": (
        200,
        [(b"x", b"a\r\nb: c")],
        r"header 'x' holds a control character: 'a\\r\\nb: c'",
    ),
    "a value with NUL": (200, [(b"x", b"a\0")], "holds a control character"),
    "a name without letters": (200, [(b"", b"a")], "'' is not a valid name of an HTTP header"),
    "a name that ends the header": (200, [(b"x: a\r\ny", b"a")], "is not a valid name of an HTTP header"),
    "a name of other letters": (200, [(b"\xe9", b"a")], "'é' is not a valid name of an HTTP header"),
    "a name of str": (200, [("x", b"a")], r"pairs of bytes; got \('x', b'a'\) among them"),
    "a value of str": (200, [(b"x", "a")], r"pairs of bytes; got \(b'x', 'a'\) among them"),
    "three": (200, [(b"x", b"a", b"b")], "pairs of bytes; got .* among them"),
    "two lengths": (200, [(b"content-length", b"2"), (b"Content-Length", b"3")], "is given twice, as 2 and as 3"),
    "a length that is no number": (200, [(b"content-length", b"\xb2")], "must be a number of bytes, not '²'"),
}


@pytest.mark.parametrize(("status", "headers", "match"), WRONG.values(), ids=WRONG)
def test_what_would_break_the_response_is_refused(serve: Serve, status: Any, headers: Any, match: str) -> None:
    """By ``send``, as ``start_response`` does in the other direction; the application may answer something else then."""
    refused: list[Exception] = []

    async def handle(receive: Receive, send: Send) -> None:
        try:
            await start(send, status, headers)
        except (TypeError, ValueError) as error:
            refused.append(error)
            if (await receive())["body"] == b"raise":
                raise
        await start(send, 500)
        await send_body(send, b"error page")

    with serve(app_of(handle)) as wsgi:
        with pytest.raises((TypeError, ValueError), match=match) as caught:
            ask(wsgi, b"raise")
        assert caught.value is refused[0]
        answer = ask(wsgi, b"answer")
    assert (answer.status, answer.body) == ("500 Internal Server Error", b"error page")


def test_one_length_that_comes_twice_is_one() -> None:
    """So does space around a value go."""

    async def handle(receive: Receive, send: Send) -> None:
        await start(send, 200, [(b"Content-Length", b"2"), (b"content-length", b"2"), (b"X-A", b" a\t")])
        await send_body(send, b"ok")

    with AsgiToWsgi(app_of(handle)) as wsgi:
        answer = ask(wsgi, is_checked=False)
    assert (answer.headers, answer.body) == ([("Content-Length", "2"), ("X-A", "a")], b"ok")


@pytest.mark.parametrize(
    ("length", "chunks", "match"),
    [
        (b"2", [b"hello"], "app.* sent 5 bytes where Content-Length leaves room for 2"),
        (b"3", [b"he", b"llo"], "app.* sent 3 bytes where Content-Length leaves room for 1"),
        (b"6", [b"hello"], "app.* sent 1 bytes fewer than its Content-Length says"),
        (None, ["hello"], "body must be bytes, not 'hello'"),
        (None, [None], "body must be bytes, not None"),
    ],
)
def test_a_body_that_is_not_what_was_said(serve: Serve, length: bytes | None, chunks: Any, match: str) -> None:
    """The server gets what was right of it, and then the error."""

    async def handle(receive: Receive, send: Send) -> None:
        await start(send, 200, [(b"content-length", length)] if length else [])
        for number, chunk in enumerate(chunks, 1):
            await send_body(send, chunk, more=number < len(chunks))

    with serve(app_of(handle)) as wsgi, pytest.raises((RuntimeError, TypeError), match=match):
        ask(wsgi, is_checked=False)


@pytest.mark.parametrize(("method", "status"), [("HEAD", 200), ("GET", 304), ("GET", 204)])
def test_a_length_of_what_is_not_sent(method: str, status: int) -> None:
    """The length is that of the response to GET (RFC 9110, 8.6)."""

    async def handle(receive: Receive, send: Send) -> None:
        await start(send, status, [(b"content-length", b"5")])
        await send_body(send, b"")

    with AsgiToWsgi(app_of(handle)) as wsgi:
        answer = ask(wsgi, REQUEST_METHOD=method, is_checked=False)
    assert (answer.headers, answer.body) == ([("content-length", "5")], b"")


def test_a_body_of_other_bytes(serve: Serve) -> None:
    """WSGI takes ``bytes`` and nothing else; Starlette streams ``memoryview`` too."""

    async def handle(receive: Receive, send: Send) -> None:
        await start(send, 200, [(b"content-length", b"10")])
        await send({"type": "http.response.body", "body": bytearray(b"he"), "more_body": True})
        await send({"type": "http.response.body", "body": memoryview(b"llo12345").cast("I")})

    with serve(app_of(handle)) as wsgi:
        chunks = wsgi(environ_of(), Answer().start)
        assert list(chunks) == [b"he", b"llo12345"]


def test_headers_and_status() -> None:
    async def app(scope: Message, receive: Receive, send: Send) -> None:
        headers = [(b"set-cookie", b"a=1"), (b"transfer-encoding", b"chunked"), (b"set-cookie", b"b=\xfc")]
        await start(send, 299, headers)
        await send_body(send, b"")

    with AsgiToWsgi(app) as wsgi:
        answer = ask(wsgi, is_checked=False)
    # PEP 3333: header fields of the connection are the server's own.
    assert (answer.status, answer.headers) == ("299 Unknown", [("set-cookie", "a=1"), ("set-cookie", "b=\xfc")])


def test_head(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    """The headers of the response and no body, however long; servers differ in whether they leave one out."""
    ended: queue.Queue[str] = queue.Queue()

    async def app(scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return
        try:
            await start(send)
            await send_body(send, b"", more=True)
            await send_body(send, b"x", more=scope["path"] == "/endless")
            while scope["path"] == "/endless":
                await send_body(send, b"x", more=True)
            ended.put("returned")
        except get_cancelled_exc_class():
            ended.put("cancelled")
            raise

    with serve(app) as wsgi:
        for path, end in ("/", "returned"), ("/endless", "cancelled"):
            answer = ask(wsgi, REQUEST_METHOD="HEAD", PATH_INFO=path, is_checked=False)
            assert (answer.headers, answer.body) == ([("content-type", "text/plain")], b"")
            assert ended.get(timeout=PATIENCE) == end


def test_chunks_come_as_they_are_sent(serve: Serve) -> None:
    """The server has each chunk before the application has made the next."""
    may_go_on: list[Event] = []

    async def app(scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return
        await start(send)
        for number in range(5):
            may_go_on.append(Event())
            await send_body(send, b"%d" % number, more=True)
            await may_go_on[-1].wait()
        await send_body(send, b"", more=False)

    with serve(app) as wsgi:
        chunks = wsgi(environ_of(), Answer().start)
        for number in range(5):
            assert next(chunks) == b"%d" % number
            portal_of(wsgi).call_soon(may_go_on[number].set)
        assert list(chunks) == []


def test_the_application_waits_for_a_slow_server(serve: Serve) -> None:
    """It is ahead by the buffer and one chunk at most."""
    sent: list[int] = []
    waits = threading.Semaphore(0)

    async def app(scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return
        await start(send)
        for number in range(100):
            sent.append(number)
            if number == 5:
                waits.release()
            await send_body(send, b"x" * 10, more=number < 99)

    with serve(app, buffer_size=50) as wsgi:
        chunks = wsgi(environ_of(), Answer().start)
        assert waits.acquire(timeout=PATIENCE)
        portal_of(wsgi).call("settling", wait_all_tasks_blocked)
        assert len(sent) == 6
        assert next(chunks) == b"x" * 10  # which the server is sending now: it is not yet through
        portal_of(wsgi).call("settling", wait_all_tasks_blocked)
        assert len(sent) == 6
        assert b"".join(chunks) == b"x" * 990
        assert len(sent) == 100


# Errors


def app_of(handle: Callable[[Receive, Send], Awaitable[None]]) -> Any:
    """An application without lifespan."""

    async def app(scope: Message, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http"
        await handle(receive, send)

    return app


def test_an_error_before_the_response(serve: Serve) -> None:
    """It is raised to the server, which answers 500; the next request is served."""

    async def handle(receive: Receive, send: Send) -> None:
        if (await receive())["body"] == b"bad":
            raise KeyError("before")
        await start(send)
        await send_body(send, b"ok")

    with serve(app_of(handle)) as wsgi:
        with pytest.raises(KeyError, match="before"):
            ask(wsgi, b"bad")
        assert ask(wsgi, b"good").body == b"ok"


def test_an_error_in_the_response(serve: Serve) -> None:
    """The server gets what was sent before, then the error."""

    async def handle(receive: Receive, send: Send) -> None:
        await start(send)
        await send_body(send, b"first", more=True)
        raise KeyError("middle")

    with serve(app_of(handle)) as wsgi:
        chunks = wsgi(environ_of(), Answer().start)
        assert next(chunks) == b"first"
        with pytest.raises(KeyError, match="middle"):
            next(chunks)
        chunks.close()  # type: ignore[attr-defined]


def test_an_error_after_the_response(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    """The response is complete; the error is logged."""
    ended = threading.Event()

    async def handle(receive: Receive, send: Send) -> None:
        try:
            await start(send)
            await send_body(send, b"ok")
            raise KeyError("after")
        finally:
            ended.set()

    with serve(app_of(handle)) as wsgi:
        assert ask(wsgi).body == b"ok"
        assert ended.wait(PATIENCE)
    assert "an error after its response" in caplog.text
    assert "KeyError: 'after'" in caplog.text
    assert "app.failed_after_response" in [record.__dict__["anyio_channels_event"] for record in caplog.records]


async def sends_nothing(receive: Receive, send: Send) -> None:
    pass


async def sends_half(receive: Receive, send: Send) -> None:
    await start(send)
    await send_body(send, b"half", more=True)


async def starts_twice(receive: Receive, send: Send) -> None:
    await start(send)
    await start(send)


async def begins_with_body(receive: Receive, send: Send) -> None:
    await send_body(send, b"x")


async def sends_on(receive: Receive, send: Send) -> None:
    await start(send)
    await send_body(send, b"x")
    await send_body(send, b"y")


@pytest.mark.parametrize(
    ("handle", "match"),
    [
        (sends_nothing, "returned without a response"),
        (sends_half, "returned before its response was complete"),
        (starts_twice, "sent 'http.response.start' where 'http.response.body' is due"),
        (begins_with_body, "sent 'http.response.body' where 'http.response.start' is due"),
    ],
)
def test_applications_that_break_the_rules(handle: Any, match: str) -> None:
    with AsgiToWsgi(app_of(handle)) as wsgi, pytest.raises(RuntimeError, match=match):
        ask(wsgi, is_checked=False)


def test_what_is_sent_after_the_end(caplog: pytest.LogCaptureFixture) -> None:
    with AsgiToWsgi(app_of(sends_on)) as wsgi:
        assert ask(wsgi).body == b"x"
    assert "sent 'http.response.body' after its response was complete" in caplog.text


def test_the_server_refuses_the_response(serve: Serve) -> None:
    """If ``start_response`` raises, the application is cancelled and the error is the server's own."""
    ended = threading.Event()

    async def handle(receive: Receive, send: Send) -> None:
        try:
            await start(send)
            await sleep_forever()
        finally:
            ended.set()

    def refuse(*args: Any) -> Any:
        raise ValueError("refused")

    with serve(app_of(handle)) as wsgi:
        with pytest.raises(ValueError, match="refused"):
            wsgi(environ_of(), refuse)
        assert ended.is_set()


# The end of a request


def test_the_server_closes_the_response(serve: Serve) -> None:
    """The application is cancelled where it waits, and ``close()`` returns when it has cleaned up."""
    ended: list[str] = []

    async def handle(receive: Receive, send: Send) -> None:
        await start(send)
        try:
            while True:
                await send_body(send, b"x" * 1000, more=True)
        except get_cancelled_exc_class():
            ended.append("cancelled")
            raise

    with serve(app_of(handle)) as wsgi:
        chunks = wsgi(environ_of(), Answer().start)
        assert next(chunks)
        chunks.close()  # type: ignore[attr-defined]
        assert ended == ["cancelled"]
        chunks.close()  # type: ignore[attr-defined]


def test_disconnect_is_told_after_the_response(serve: Serve) -> None:
    """Who listens for the end of the connection beside a response gets ``http.disconnect`` at its end."""
    heard: queue.Queue[str] = queue.Queue()

    async def handle(receive: Receive, send: Send) -> None:
        async def listen() -> None:
            heard.put((await receive())["type"])

        assert (await receive())["type"] == "http.request"
        async with create_task_group() as tasks:
            tasks.start_soon(listen)
            tasks.start_soon(listen)
            await start(send)
            await send_body(send, b"ok")

    with serve(app_of(handle)) as wsgi:
        assert ask(wsgi, b"x").body == b"ok"
        assert [heard.get(timeout=PATIENCE) for _ in range(2)] == ["http.disconnect"] * 2


class Broken(io.BytesIO):
    def read(self, size: int | None = -1) -> bytes:
        raise OSError("the client is gone")


@pytest.mark.parametrize("length", [10, 100_000])
@pytest.mark.parametrize("stream", [io.BytesIO(b"abc"), Broken()], ids=["cut off", "broken"])
def test_the_client_goes_away_in_the_middle_of_its_body(length: int, stream: io.BytesIO) -> None:
    got: list[Any] = []

    async def handle(receive: Receive, send: Send) -> None:
        while True:
            message = await receive()
            got.append(message.get("body"))
            if message["type"] == "http.disconnect":
                break
            assert message["more_body"]
        assert (await receive())["type"] == "http.disconnect"
        await start(send)
        await send_body(send, b"to nobody")

    stream.seek(0)
    environ: dict[str, Any] = {"wsgi.input": stream, "CONTENT_LENGTH": str(length)}
    with AsgiToWsgi(app_of(handle)) as wsgi:
        ask(wsgi, is_checked=False, **environ)
    assert got == ([None] if isinstance(stream, Broken) else [b"abc", None])


def test_a_cancelled_receive_loses_nothing(serve: Serve) -> None:
    """What the thread reads for a receive that was cancelled meanwhile, the next one gets."""
    may_read = threading.Event()

    class Slow(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            assert may_read.wait(PATIENCE)
            return super().read(size)

    async def handle(receive: Receive, send: Send) -> None:
        async with create_task_group() as tasks:
            tasks.start_soon(read_all, receive)
            await wait_all_tasks_blocked()
            tasks.cancel_scope.cancel()
        may_read.set()
        body = await read_all(receive)
        await start(send)
        await send_body(send, body)

    with serve(app_of(handle)) as wsgi:
        body = bytes(range(256)) * 1000
        environ: dict[str, Any] = {"wsgi.input": Slow(body), "CONTENT_LENGTH": str(len(body))}
        answer = ask(wsgi, is_checked=False, **environ)
    assert answer.body == body


def test_nothing_is_sent_while_the_body_is_read(serve: Serve) -> None:
    """The server's thread does both: a chunk that is sent while it waits for the body comes when it has that."""
    order: list[str] = []
    may_read = threading.Event()

    class Slow(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            assert may_read.wait(PATIENCE)
            order.append("read")
            return super().read(size)

    async def handle(receive: Receive, send: Send) -> None:
        await start(send)
        async with create_task_group() as tasks:
            tasks.start_soon(read_all, receive)
            await wait_all_tasks_blocked()
            await send_body(send, b"x", more=True)
            may_read.set()
        await send_body(send, b"")

    with serve(app_of(handle)) as wsgi:
        environ: dict[str, Any] = {"wsgi.input": Slow(b"x" * 100_000), "CONTENT_LENGTH": "100000"}
        chunks = wsgi(environ_of(**environ), Answer().start)
        order.extend(chunk.decode() for chunk in chunks)
    assert order == ["read", "x"]


def test_several_tasks_send(serve: Serve) -> None:
    """Each waits for room, and none is forgotten."""

    async def handle(receive: Receive, send: Send) -> None:
        async def send_some(chunk: bytes) -> None:
            for _ in range(5):
                await send_body(send, chunk, more=True)

        await start(send)
        async with create_task_group() as tasks:
            for chunk in (b"a" * 1000, b"b" * 1000, b"c" * 1000):
                tasks.start_soon(send_some, chunk)
        await send_body(send, b"")

    with serve(app_of(handle), buffer_size=100) as wsgi:
        assert sorted(ask(wsgi).body) == sorted(b"abc" * 5000)


def test_closed_by_another_thread(serve: Serve) -> None:
    """Whoever waits for the next chunk is told, and whoever closes returns."""

    async def handle(receive: Receive, send: Send) -> None:
        await start(send)
        await send_body(send, b"x", more=True)
        await sleep_forever()

    with serve(app_of(handle)) as wsgi:
        chunks: Any = wsgi(environ_of(), Answer().start)
        next(chunks)
        errors: list[BaseException] = []

        def read() -> None:
            try:
                next(chunks)
            except (ClosedResourceError, RuntimeError) as error:
                errors.append(error)

        thread = threading.Thread(target=read)
        thread.start()
        closer = threading.Thread(target=chunks.close)
        closer.start()
        for one in (thread, closer):
            one.join(PATIENCE)
            assert not one.is_alive()
        assert errors


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), GeneratorExit(), BaseException("own")], ids=repr)
def test_what_is_no_exception(error: BaseException) -> None:
    """It is raised to the server as it is; other requests go on."""

    async def handle(receive: Receive, send: Send) -> None:
        if (await receive())["body"]:
            raise error
        await start(send)
        await send_body(send, b"ok")

    with AsgiToWsgi(app_of(handle)) as wsgi:
        with pytest.raises(type(error)) as caught:
            ask(wsgi, b"x")
        assert caught.value is error
        assert ask(wsgi).body == b"ok"


def test_a_request_that_lets_out_a_cancellation() -> None:
    """It fails, alone: the application and its lifespan go on."""
    import asyncio

    async def handle(receive: Receive, send: Send) -> None:
        if (await receive())["body"]:
            raise asyncio.CancelledError
        await start(send)
        await send_body(send, b"ok")

    with AsgiToWsgi(app_of(handle)) as wsgi:
        with pytest.raises(RuntimeError, match="let out CancelledError.* which nobody had asked for"):
            ask(wsgi, b"x")
        assert ask(wsgi).body == b"ok"


def test_what_fails_while_a_request_is_closed(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    """There is nobody to raise it to: it is logged."""
    waits = threading.Event()

    async def handle(receive: Receive, send: Send) -> None:
        await start(send)
        await send_body(send, b"x", more=True)
        try:
            waits.set()
            await sleep_forever()
        finally:
            raise KeyError("cleaning up")

    with serve(app_of(handle)) as wsgi:
        chunks: Any = wsgi(environ_of(), Answer().start)
        next(chunks)
        assert waits.wait(PATIENCE)
        chunks.close()
    assert "KeyError: 'cleaning up'" in caplog.text
    assert "app.failed_at_close" in [record.__dict__["anyio_channels_event"] for record in caplog.records]


def test_a_request_while_another_thread_opens(serve: Serve) -> None:
    """It waits for the startup."""
    begun = threading.Event()
    go_on = threading.Event()

    async def app(scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            return await echo(scope, receive, send)
        await receive()
        begun.set()
        await to_thread.run_sync(go_on.wait)
        await send({"type": "lifespan.startup.complete"})
        await receive()
        return await send({"type": "lifespan.shutdown.complete"})

    wsgi = serve(app)
    opener = threading.Thread(target=wsgi.open)
    opener.start()
    assert begun.wait(PATIENCE)
    answers: list[bytes] = []
    client = threading.Thread(target=lambda: answers.append(ask(wsgi, b"x").body))
    client.start()
    go_on.set()
    client.join(PATIENCE)
    opener.join(PATIENCE)
    wsgi.close()
    assert answers == [b"x"]


def test_background_tasks_go_on_after_the_response(serve: Serve) -> None:
    """The server's thread does not wait for them, and its ``close()`` does not cancel them."""
    may_end: list[Event] = []
    begun = threading.Event()
    done = threading.Event()

    async def work() -> None:
        may_end.append(Event())
        begun.set()
        await may_end[0].wait()
        done.set()

    def endpoint(request: Request) -> PlainTextResponse:
        return PlainTextResponse("ok", background=BackgroundTask(work))

    with serve(Starlette(routes=[Route("/", endpoint)])) as wsgi:
        assert ask(wsgi).body == b"ok"
        assert begun.wait(PATIENCE)
        assert not done.is_set()
        portal_of(wsgi).call_soon(may_end[0].set)
        assert done.wait(PATIENCE)


# The event loop and the lifespan


def lifespan_app(events: list[str], *, fails_at: str = "", raises_at: str = "") -> Any:
    async def app(scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            events.append("request")
            await start(send)
            return await send_body(send, scope["state"]["key"].encode())
        scope["state"]["key"] = "value"
        for step in ("startup", "shutdown"):
            assert await receive() == {"type": f"lifespan.{step}"}
            events.append(step)
            if raises_at == step:
                raise KeyError(step)
            outcome = "failed" if fails_at == step else "complete"
            await send({"type": f"lifespan.{step}.{outcome}", "message": "the reason"})
        await receive()  # for ever
        return None

    return app


def test_lifespan(serve: Serve) -> None:
    """It starts with the first request or with open(), once; its state is in each request; it ends with close()."""
    events: list[str] = []
    app = serve(lifespan_app(events))
    assert events == []
    assert ask(app).body == b"value"
    assert ask(app).body == b"value"
    assert events == ["startup", "request", "request"]
    app.close()
    app.close()
    assert events == ["startup", "request", "request", "shutdown"]
    with pytest.raises(ClosedResourceError, match=r"AsgiToWsgi\(.*\) is closed"):
        ask(app)
    with app:
        assert events[4:] == ["startup"]
        with pytest.raises(RuntimeError, match="is already open"):
            app.open()
    assert events[5:] == ["shutdown"]


def test_many_first_requests_at_the_same_time(serve: Serve) -> None:
    events: list[str] = []
    app = serve(lifespan_app(events))
    go = threading.Barrier(20)
    answers: list[bytes] = []

    def client() -> None:
        go.wait()
        answers.append(ask(app).body)

    threads = [threading.Thread(target=client) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    app.close()
    assert answers == [b"value"] * 20
    assert events.count("startup") == events.count("shutdown") == 1


def test_a_startup_that_fails(serve: Serve) -> None:
    """Each request says so, and tries again."""
    events: list[str] = []
    app = serve(lifespan_app(events, fails_at="startup"))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="failed at startup: the reason"):
            ask(app)
    assert events == ["startup", "startup"]
    app.close()


def test_a_shutdown_that_fails(serve: Serve) -> None:
    app = serve(lifespan_app([], fails_at="shutdown")).open()
    with pytest.raises(RuntimeError, match="failed at shutdown: the reason"):
        app.close()
    app.close()


def test_a_lifespan_that_raises(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    """Before it answered, the application does without a lifespan; later, the error is logged."""
    caplog.set_level(logging.INFO)
    events: list[str] = []
    with serve(lifespan_app(events, raises_at="startup")) as app:
        assert ask(app).body == b"value"
    assert "does not support the lifespan protocol" in caplog.text
    assert [record.__dict__["anyio_channels_event"] for record in caplog.records] == ["lifespan.unsupported"]
    caplog.clear()
    with serve(lifespan_app(events, raises_at="shutdown")):
        pass
    assert "an error in its lifespan" in caplog.text
    assert [record.__dict__["anyio_channels_event"] for record in caplog.records] == ["lifespan.failed"]


def test_closing_cancels_the_requests(serve: Serve) -> None:
    """Whoever waits for one is told, and nothing goes on."""
    begun = threading.Event()
    errors: list[BaseException] = []

    async def handle(receive: Receive, send: Send) -> None:
        begun.set()
        await sleep_forever()

    app = serve(app_of(handle))

    def client() -> None:
        try:
            ask(app)
        except ClosedResourceError as error:
            errors.append(error)

    thread = threading.Thread(target=client)
    thread.start()
    assert begun.wait(PATIENCE)
    app.close()
    thread.join(PATIENCE)
    assert re.search(r"AsgiToWsgi\(.*\) was closed", str(errors[0]))


def test_a_request_that_crosses_closing(serve: Serve) -> None:
    """It is told as well: no thread of the server waits for ever."""
    is_held = threading.Event()
    errors: list[BaseException] = []

    def hold(until: threading.Event) -> None:
        is_held.set()
        assert until.wait(PATIENCE)

    def client() -> None:
        try:
            ask(app, b"x")
        except ClosedResourceError as error:
            errors.append(error)

    app = serve(echo).open()
    portal = portal_of(app)
    life = portal._life
    assert life is not None
    may_go_on = threading.Event()
    portal.call_soon(hold, may_go_on)
    assert is_held.wait(PATIENCE)
    thread = threading.Thread(target=client)
    thread.start()
    while not life._pending:
        pass
    life.is_closed = True
    life.stop()
    may_go_on.set()
    thread.join(PATIENCE)
    app.close()
    assert re.search(r"AsgiToWsgi\(.*\) was closed", str(errors[0]))


def test_all_requests_of_a_process_share_one_loop(serve: Serve) -> None:
    loops: set[Any] = set()

    async def handle(receive: Receive, send: Send) -> None:
        loops.add(current_token())
        await start(send)
        await send_body(send, threading.current_thread().name.encode())

    with serve(app_of(handle)) as app:
        names = {ask(app).body for _ in range(5)}
    assert len(loops) == len(names) == 1
    assert names != {threading.current_thread().name.encode()}


def test_a_fork_has_an_event_loop_of_its_own() -> None:
    """gunicorn --preload: what the parent has started is not used, and not ended, by its children."""
    script = f"""
import os, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_asgi_to_wsgi import AsgiToWsgi, ask, lifespan_app
events = []
app = AsgiToWsgi(lifespan_app(events))
assert ask(app).body == b"value"
child = os.fork()
if not child:
    events.clear()
    assert ask(app).body == b"value"
    assert events == ["startup", "request"], events
    app.close()
    assert events[2:] == ["shutdown"]
    sys.exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
assert ask(app).body == b"value"
assert events == ["startup", "request", "request"], events
import atexit
atexit.register(lambda: print(events[-1]))  # which runs before what was registered earlier
"""
    import subprocess

    done = subprocess.run(
        [sys.executable, "-W", "error", "-W", "ignore:This process:DeprecationWarning", "-c", script],
        capture_output=True,
        timeout=PATIENCE,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")


# WebSockets, and what the adapter itself refuses


def test_websockets_are_refused() -> None:
    answer = ask(AsgiToWsgi(echo), is_checked=False, HTTP_UPGRADE="WebSocket", HTTP_CONNECTION="Upgrade")
    assert answer.status == "501 Not Implemented"
    assert b"WebSockets" in answer.body


def test_in_the_thread_of_an_event_loop() -> None:
    """It would block the loop, perhaps for ever: it says so."""

    async def main() -> None:
        with pytest.raises(RuntimeError, match="would block the event loop that runs in this thread"):
            ask(app)

    app = AsgiToWsgi(echo)
    run(main)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"app": 5}, "app must be an ASGI application, not 5"),
        ({"backend": "curio"}, "backend must be one of 'asyncio', 'trio', not 'curio'"),
        ({"buffer_size": 0}, "buffer_size must be at least 1, not 0"),
        ({"buffer": 5}, "buffer"),
    ],
    ids=str,
)
def test_wrong_options(options: dict[str, Any], match: str) -> None:
    with pytest.raises((TypeError, ValueError), match=match):
        AsgiToWsgi(**{"app": echo, **options})


# Both in a row

HOP_BY_HOP: set[str] = {"connection", "te", "trailers", "upgrade", "keep-alive", "content-length"}
NAMES = st.from_regex(r"[a-z][a-z0-9-]{0,8}", fullmatch=True)
FIELDS: st.SearchStrategy[str] = NAMES.filter(lambda name: name not in HOP_BY_HOP)
VALUES = st.text(st.characters(min_codepoint=0x20, max_codepoint=0xFF, exclude_characters="\x7f"), max_size=10).map(
    lambda value: value.strip(" ")
)
PATHS = st.lists(st.binary(max_size=6), max_size=3).map(lambda parts: "/" + b"/".join(parts).decode("latin-1"))
RESPONSES = st.tuples(
    st.sampled_from([200, 201, 204, 301, 404, 418, 500]),
    st.lists(st.tuples(FIELDS, VALUES), max_size=4),
    st.lists(st.binary(max_size=2000), max_size=5),
    st.booleans(),
)


@contextmanager
def both(app: Any, **options: Any) -> Iterator[AsgiToWsgi]:
    with AsgiToWsgi(WsgiToAsgi(app, **options)) as wsgi:
        yield wsgi


def seen_by(app: Any, environ: dict[str, Any], body: bytes) -> tuple[Any, ...]:
    answer = ask(app, body, is_checked=False, **environ)
    return answer.status.split()[0], answer.headers, answer.body


@pytest.mark.parametrize("spool", [False, True], ids=["stream", "spool"])
@given(
    method=st.sampled_from(["GET", "POST", "PUT", "DELETE", "OPTIONS", "X-OWN"]),
    path=PATHS,
    script=st.sampled_from(["", "/app", "/é".encode().decode("latin-1")]),
    query=st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), max_size=20),
    headers=st.dictionaries(NAMES, VALUES, max_size=4),
    body=st.binary(max_size=3000),
    response=RESPONSES,
)
def test_both_in_a_row_change_nothing(
    spool: bool,
    method: str,
    path: str,
    script: str,
    query: str,
    headers: dict[str, str],
    body: bytes,
    response: tuple[int, list[tuple[str, str]], list[bytes], bool],
) -> None:
    """``AsgiToWsgi(WsgiToAsgi(app))`` is ``app``: what it is told, what it reads, and what it answers."""
    seen: list[dict[str, Any]] = []
    read: list[bytes] = []
    status, fields, chunks, is_list = response

    def app(environ: dict[str, Any], start_response: Any) -> Any:
        seen.append({name: value for name, value in environ.items() if name.isupper()})
        read.append(environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"] or 0)))
        start_response(f"{status} Phrase", [*fields, ("content-length", str(sum(map(len, chunks))))])
        return chunks if is_list else iter(chunks)

    environ = {"REQUEST_METHOD": method, "SCRIPT_NAME": script, "PATH_INFO": path, "QUERY_STRING": query}
    environ |= {f"HTTP_{name.upper().replace('-', '_')}": value for name, value in headers.items()}
    environ |= {"REMOTE_ADDR": "10.0.0.1", "REMOTE_PORT": "5"}
    direct = seen_by(app, environ, body)
    with both(app, buffer_size=1000, spool=spool) as wsgi:
        assert seen_by(wsgi, environ, body) == direct
    assert read == [body, body]
    assert seen[1] == seen[0]


def test_both_in_a_row_pass_the_validator() -> None:
    """On both sides of both."""

    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        body = environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"] or 0))
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [body]

    with both(validator(app)) as wsgi:
        assert ask(wsgi, b"abc").body == b"abc"
        assert ask(wsgi, b"x" * 3_000_000).body == b"x" * 3_000_000
