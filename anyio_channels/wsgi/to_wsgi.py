"""An ASGI application (Starlette, FastAPI) as a WSGI application.

Rules (PEP 3333, and https://asgi.readthedocs.io/en/latest/specs/www.html):
- one event loop, in a thread of its own (``portal``), runs all requests of a process, and the application's lifespan.
- a request has the server's thread: it reads the body there when the application asks for it, and yields what it sends, each
  chunk as it comes. Nothing else is done in that thread, so nothing of the application blocks it.
- the application sends ahead of the server by the buffer at most, then waits.
- the server closing the response before its end cancels the application. What that does after the end of the response (a
  background task) goes on, and its errors are logged.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import AbstractAsyncContextManager
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Final, Self

from anyio import ClosedResourceError, Event, current_effective_deadline, get_cancelled_exc_class
from anyio.lowlevel import checkpoint

from anyio_channels.contract.options import require_count
from anyio_channels.log import APP_FAILED_AFTER_RESPONSE, APP_FAILED_AT_CLOSE, said
from anyio_channels.portal import Portal

from .lifespan import lifespan
from .translate import AsgiApplication, Message, StartResponse, body_length_of, request_length_of, scope_of, start_of

__all__ = ["AsgiToWsgi"]

_AT_ONCE: Final = 64 * 1024
"""A body of this size is read before the application is called."""
_PIECE: Final = 256 * 1024
"""A larger one is read in pieces of this size: each is a turn of the thread and the loop."""
_READ: Final = object()
_END: Final = object()
_PLAIN: Final = [("Content-Type", "text/plain; charset=utf-8")]


class AsgiToWsgi:
    """The ASGI application ``app`` as a WSGI application.

    ::

        application = AsgiToWsgi(starlette_app)  # gunicorn main:application, waitress-serve main:application

    Its event loop and lifespan start with the first request of a process, or with ``open()``, and end with ``close()``, at the
    latest when the process exits; ``with`` does both. A forked process starts its own. ``scope["wsgi.environ"]`` is the
    environment of the request. WSGI has no WebSockets: the request to open one is answered with 501, unheard.

    What the application raises before its response has started is raised to the server, which logs an ``Exception`` and answers
    500, and does with ``SystemExit`` what it does with any WSGI application's; later, it ends the response there.
    """

    def __init__(
        self,
        app: AsgiApplication,
        backend: str = "asyncio",
        *,
        backend_options: dict[str, Any] | None = None,
        buffer_size: int = 64 * 1024,
    ) -> None:
        """Keep ``app``.

        ``backend``: ``"asyncio"`` or ``"trio"``. ``backend_options``: as for ``anyio.run``, such as ``{"use_uvloop": True}``.
        ``buffer_size``: how many bytes of a response the application may be ahead of the server, but for one chunk.

        Raises ``TypeError`` or ``ValueError`` naming the option and its rule.
        """
        if not callable(app):
            raise TypeError(f"app must be an ASGI application, not {app!r:.100}")
        self.app = app
        self._backend = backend
        self._backend_options = backend_options
        self._buffer_size = require_count("buffer_size", buffer_size)
        # A fork finds none of its own: no lock that another thread held, no loop without a thread.
        self._hosts: dict[int, _Host] = {}
        self._host()

    def __repr__(self) -> str:
        """Say which application."""
        return f"AsgiToWsgi({self.app!r:.200})"

    def open(self) -> Self:
        """Start the event loop and the application's lifespan in this process, and return ``self``; what fails is raised."""
        self._host().portal.open()
        return self

    def close(self) -> None:
        """Cancel the requests, shut the application down, and end the event loop. Where it is not open, do nothing.

        Requests that come later get ``anyio.ClosedResourceError``; ``open()`` opens it again.
        """
        self._host().portal.close()

    def __enter__(self) -> Self:
        """Open it."""
        return self.open()

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close it."""
        self.close()

    def __call__(self, environ: dict[str, Any], start_response: StartResponse) -> Iterator[bytes]:
        """Serve one request."""
        if environ.get("HTTP_UPGRADE", "").lower() == "websocket":
            start_response("501 Not Implemented", _PLAIN)
            return iter([b"This application is served through WSGI, which has no WebSockets.\n"])
        host = self._host()
        host.portal.ensure_open()
        exchange = _Exchange(self.app, host, environ, self._buffer_size)
        try:
            start_response(*exchange.start())
        except BaseException:
            exchange.close()
            raise
        return exchange

    def _host(self) -> _Host:
        pid = os.getpid()
        host = self._hosts.get(pid)
        if host is None:
            host = _Host(self.app, repr(self), self._backend, self._backend_options)
            host = self._hosts.setdefault(pid, host)  # another thread may have been faster
        return host


class _Host:
    """The event loop of one process, and what the application's lifespan has put into the state."""

    def __init__(self, app: AsgiApplication, name: str, backend: str, backend_options: dict[str, Any] | None) -> None:
        self.state: dict[str, Any] = {}

        def make_resident() -> AbstractAsyncContextManager[None]:
            self.state.clear()
            return lifespan(app, self.state)

        self.portal = Portal(name, make_resident, backend, backend_options)


class _Exchange:
    """One request, between the thread of the server and the event loop; the iterable that WSGI asks for."""

    def __init__(self, app: AsgiApplication, host: _Host, environ: dict[str, Any], buffer_size: int) -> None:
        self._app = app
        self._portal = host.portal
        self._left = request_length_of(environ)  # None: until it ends
        self._scope = scope_of(environ, self._left)
        self._scope["state"] = host.state.copy()
        self._buffer_size = buffer_size
        self._input = environ["wsgi.input"]
        self._is_head = environ["REQUEST_METHOD"] == "HEAD"
        self._inbox: SimpleQueue[Any] = SimpleQueue()  # what the thread is to do
        self._future: Future[None] | None = None
        self._error: BaseException | None = None
        # Of the thread.
        self._has_ended = False  # the application
        self._is_told = False  # the server, that there is no body to come
        self._is_complete = False  # the response
        self._taken = 0  # bytes of the chunk that the server has
        # Of the loop.
        self._is_begun = False
        self._bell = Event()
        self._piece: tuple[bytes, bool] | None = None
        self._is_asked = False  # the thread, for a piece
        self._is_read = False  # the body
        self._is_over = False  # the request: there will be nothing to receive
        self._head: tuple[str, list[tuple[str, str]]] | None = None
        self._unsent: int | None = None  # of the Content-Length that the application has given
        self._is_sent = False
        self._lock = threading.Lock()  # of these two
        self._ahead = 0
        self._room: Event | None = None

    # In the thread of the server

    def start(self) -> tuple[str, list[tuple[str, str]]]:
        """Have the application called, and return the start of its response."""
        if self._left is not None and self._left <= _AT_ONCE:
            self._take(*self._read())
        call = f"{self._app!r:.200} through WSGI"
        self._future = self._portal.start(call, self._run, done=self._see_that_it_ends)
        if self._next_message() is None or self._head is None:
            raise RuntimeError(f"{self._app!r:.200} returned without a response")
        return self._head

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> bytes:
        """Wait for the next chunk. The one before it has been sent, or the server would not ask."""
        while not (self._is_complete or self._is_told):
            self._make_room()
            message = self._next_message()
            if message is None:
                raise RuntimeError(f"{self._app!r:.200} returned before its response was complete")
            self._is_complete = not message["more_body"]
            body: bytes = message["body"]
            if self._is_head:
                if body:
                    break  # WSGI servers differ in whether they leave it out; what it has been up to here is the header
            elif body:
                self._taken = len(body)
                return body
        if self._is_head and not self._is_told:
            self._is_told = True
            return b""  # without a chunk, wsgiref would say that the response to GET has none (RFC 9110, 9.3.2)
        raise StopIteration

    def close(self) -> None:
        """Cancel the application, unless its response is complete, and wait for its end."""
        if self._future is not None and not self._is_complete:
            self._portal.cancel(self._future)
            while not self._has_ended:
                self._has_ended = self._inbox.get() is _END
            self._inbox.put(_END)  # another thread may wait for it as well
            error, self._error = self._error, None
            if error is not None and not isinstance(error, ClosedResourceError):
                APP_FAILED_AT_CLOSE.write(app=repr(self._app), error=said(error), exc_info=error)

    def _next_message(self) -> Message | None:
        """Do what the application asks of this thread, until it sends something; return that, or ``None`` at its end."""
        while not self._has_ended:
            item = self._inbox.get()
            if item is _READ:
                self._portal.call_soon(self._take, *self._read())
            elif item is _END:
                self._has_ended = True
                self._inbox.put(_END)
            else:
                message: Message = item
                return message
        error, self._error = self._error, None
        if error is not None:
            raise error
        return None

    def _read(self) -> tuple[bytes | None, bool]:
        """Return the next piece of the body, and whether there is more; no piece if the client is gone."""
        size = _PIECE if self._left is None else min(self._left, _PIECE)
        try:
            data: bytes = self._input.read(size) if size else b""
        except OSError:
            return None, True
        if self._left is None:
            return data, bool(data)
        self._left -= len(data)
        return (data, self._left > 0) if data or not size else (None, True)

    def _make_room(self) -> None:
        with self._lock:
            self._ahead -= self._taken
            room, self._room = self._room, None
        self._taken = 0
        if room is not None:
            self._portal.call_soon(room.set)

    # In the event loop

    def _see_that_it_ends(self, future: Future[None]) -> None:
        if future.cancelled() and not self._is_begun:  # the event loop was closed first
            self._error = ClosedResourceError(f"{self._portal.name} was closed")
            self._inbox.put(_END)

    async def _run(self) -> None:
        self._is_begun = True
        try:
            await self._app(self._scope, self._receive, self._send)
        except get_cancelled_exc_class() as error:
            self._error = (
                ClosedResourceError(f"{self._portal.name} was closed")
                if current_effective_deadline() == -math.inf
                else RuntimeError(f"{self._app!r:.200} let out {error!r}, which nobody had asked for")
            )
            raise
        except BaseException as error:
            if self._is_sent:
                APP_FAILED_AFTER_RESPONSE.write(app=repr(self._app), error=said(error), exc_info=error)
            self._error = error
            if not isinstance(error, Exception):
                raise
        finally:
            self._inbox.put(_END)

    def _take(self, data: bytes | None, more: bool) -> None:  # noqa: FBT001 - called from the thread, by position
        """A piece of the body is here, or there will be none."""
        if data is None:
            self._is_over = True
        else:
            self._piece = data, more
        self._bell.set()

    async def _receive(self) -> Message:
        while self._piece is None and not self._is_over:
            if not (self._is_asked or self._is_read):
                self._is_asked = True
                self._inbox.put(_READ)
            if self._bell.is_set():
                self._bell = Event()
            await self._bell.wait()
        if self._piece is None:
            return {"type": "http.disconnect"}
        (body, more), self._piece = self._piece, None
        self._is_asked = False
        self._is_read = not more
        return {"type": "http.request", "body": body, "more_body": more}

    async def _send(self, message: Message) -> None:
        kind = message["type"]
        expected = "http.response.body" if self._head else "http.response.start"
        if kind != expected or self._is_sent:
            state = "after its response was complete" if self._is_sent else f"where {expected!r} is due"
            raise RuntimeError(f"{self._app!r:.200} sent {kind!r} {state}")
        if kind == "http.response.start":
            self._head = start_of(message)
            if not self._is_head:
                self._unsent = body_length_of(message["status"], self._head[1])
        else:
            message = self._checked(message)
            size = len(message["body"])
            if size:
                with self._lock:
                    self._ahead += size
            if not message["more_body"]:
                self._is_sent = self._is_over = True
                self._bell.set()
        self._inbox.put(message)
        while not self._is_sent:
            with self._lock:
                if self._ahead <= self._buffer_size:
                    break
                room = self._room = self._room or Event()  # several tasks may send
            await room.wait()
        await checkpoint()

    def _checked(self, message: Message) -> Message:
        """Return a piece of the body as WSGI takes it: bytes, no more and no fewer than the application has said."""
        body, more = message.get("body", b""), message.get("more_body", False)
        if isinstance(body, bytearray | memoryview):  # Starlette sends these too
            body = bytes(body)
        if not isinstance(body, bytes):
            raise TypeError(f"body must be bytes, not {body!r:.100}")
        if self._unsent is not None:
            if len(body) > self._unsent:
                raise RuntimeError(
                    f"{self._app!r:.200} sent {len(body)} bytes where Content-Length leaves room for {self._unsent}"
                )
            if len(body) < self._unsent and not more:
                missing = self._unsent - len(body)
                raise RuntimeError(f"{self._app!r:.200} sent {missing} bytes fewer than its Content-Length says")
            self._unsent -= len(body)
        return {"body": body, "more_body": more}
