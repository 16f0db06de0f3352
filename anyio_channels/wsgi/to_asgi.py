"""A WSGI application (Flask, Django) as an ASGI application, on asyncio and trio.

Rules (PEP 3333, and https://asgi.readthedocs.io/en/latest/specs/www.html, section "WSGI Compatibility"):
- each request has one worker thread, in which everything of the application runs, from the call to ``close()``. The threads are
  limited for each adapter and event loop, apart from anyio's own.
- a request body that fits the buffer is there before a thread is taken, and a response that fits it frees the thread before
  the client has it: clients that are slow with little cost no thread. What is larger flows, at the pace of the slower side.
- the thread hands on every chunk at once, without waiting for the event loop as long as the buffer has room.
- headers go out with the first chunk that is not empty, or at the end. No more of the body goes out than Content-Length says.
- when the client goes away, the thread is told at its next read or write, by the exception of a cancelled call.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from anyio import CapacityLimiter, Event, create_task_group, from_thread, to_thread
from anyio.lowlevel import EventLoopToken, RunVar, current_token

from anyio_channels.contract.options import require_count

from .body import Body, first_of
from .translate import (
    ExcInfo,
    Receive,
    Scope,
    Send,
    Write,
    WsgiApplication,
    body_length_of,
    environ_of,
    response_head,
    set_content_length,
)

__all__ = ["WsgiToAsgi"]


class WsgiToAsgi:
    """The WSGI application ``app`` as an ASGI application.

    ::

        app = WsgiToAsgi(flask_app)  # hypercorn main:app, uvicorn main:app, Mount("/old", app)

    It answers ``lifespan`` and closes WebSockets unheard. What the WSGI application raises goes on to the ASGI server, which
    logs it, and answers 500 if nothing was sent yet; ``SystemExit`` and ``KeyboardInterrupt`` in a ``BaseExceptionGroup``.
    ``environ["asgi.scope"]`` is the scope of the request.
    """

    def __init__(
        self, app: WsgiApplication, *, threads: int = 40, buffer_size: int = 256 * 1024, spool: bool = False
    ) -> None:
        """Keep ``app``.

        ``threads``: how many requests are in the application at the same time; others wait. ``buffer_size``: how many bytes of
        a request body, and of a response, are kept in memory at most, but for one chunk. ``spool``: take in the whole body
        before the application is called, what does not fit the buffer in a temporary file; so a slow upload costs no
        thread. Otherwise the application reads a large body while it comes. Django needs it: of a chunked body larger than the
        buffer it reads nothing otherwise (ticket 35838).

        Raises ``TypeError`` or ``ValueError`` naming the option and its rule.
        """
        if not callable(app):
            raise TypeError(f"app must be a WSGI application, not {app!r:.100}")
        self.app = app
        self._threads = require_count("threads", threads)
        self._buffer_size = require_count("buffer_size", buffer_size)
        self._spool = spool
        # Of the event loop, not of this object: a limiter serves one loop, and tests have many.
        self._limiter: RunVar[CapacityLimiter] = RunVar("anyio_channels.wsgi")

    def __repr__(self) -> str:
        """Say which application."""
        return f"WsgiToAsgi({self.app!r})"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI connection.

        If cancelled, the application is told at its next read or write, and waited for.
        """
        kind = scope["type"]
        if kind == "http":
            await self._serve(scope, receive, send)
        elif kind == "lifespan":
            await _live(receive, send)
        elif kind == "websocket":
            await receive()
            await send({"type": "websocket.close"})  # WSGI has none: before accepting, this is a refusal with 403
        else:
            raise ValueError(f"{self!r} serves scopes of the types 'http' and 'lifespan', not {kind!r}")

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = Body(receive, self._buffer_size, spool=self._spool)
        try:
            if await body.begin():
                await self._exchange(scope, body, send)
        finally:
            body.close()

    async def _exchange(self, scope: Scope, body: Body, send: Send) -> None:
        exchange = _Exchange(self.app, scope, body, send, self._buffer_size)
        error: Exception | None = None
        async with create_task_group() as tasks:
            exchange.start_soon = tasks.start_soon
            exchange.cancel = tasks.cancel_scope.cancel
            tasks.start_soon(exchange.watch)
            try:
                await to_thread.run_sync(exchange.run, limiter=self._get_limiter())
            except Exception as caught:  # noqa: BLE001 - raised below, for a task group would wrap it
                error = caught
            await exchange.finish()
            tasks.cancel_scope.cancel()
        error = exchange.error or error
        if error is not None:
            raise error

    def _get_limiter(self) -> CapacityLimiter:
        try:
            return self._limiter.get()
        except LookupError:
            limiter = CapacityLimiter(self._threads)
            self._limiter.set(limiter)
            return limiter


async def _live(receive: Receive, send: Send) -> None:
    """Answer the lifespan protocol: there is nothing to start."""
    while True:
        kind = (await receive())["type"]
        await send({"type": f"{kind}.complete"})
        if kind == "lifespan.shutdown":
            return


class _Exchange:
    """One call of the application, and its response on the way from the thread to the server."""

    start_soon: Callable[..., object]
    cancel: Callable[[], object]

    def __init__(self, app: WsgiApplication, scope: Scope, body: Body, send: Send, buffer_size: int) -> None:
        self._app = app
        self._scope = scope
        self._body = body
        self._send = send
        self._buffer_size = buffer_size
        self._is_head = scope["method"] == "HEAD"
        self._token: EventLoopToken = current_token()
        self._lock = threading.Lock()  # of the three that follow
        self._chunks: list[bytes] = []
        self._buffered = 0
        self._sending = False  # somebody in the loop sends what is buffered, or is about to
        self._head: dict[str, Any] | None = None
        self._left: int | None = None  # of the Content-Length that the application has given
        self._head_handed_on = False
        self._head_sent = False
        self._returned = False
        self._is_over = False
        self._is_gone = False  # the client
        self._is_ending = False
        self._is_complete = False
        self._bell = Event()
        self._sender_ended: Event | None = None
        self._room = Event()
        self.error: Exception | None = None
        """What sending raised."""

    # In the thread

    def run(self) -> None:
        """Call the application and hand on what it returns."""
        try:
            self._run()
        except (StopIteration, GeneratorExit) as error:  # which no future can hold, and no coroutine should let out
            raise RuntimeError(f"{self._app!r:.200} raised {type(error).__name__}") from error
        finally:
            self._returned = True

    def _run(self) -> None:
        result = self._app(environ_of(self._scope, self._body.open(), self._body.length), self._start_response)
        try:
            if isinstance(result, list | tuple):
                self._hand_on_all(result)
            elif isinstance(result, str | bytes) or not hasattr(result, "__iter__"):
                raise TypeError(
                    f"{self._app!r:.200} must return an iterable of bytes, such as a list, not {result!r:.100}"
                )
            else:
                self._hand_on_each(result)
            if self._head is None:
                raise RuntimeError(f"{self._app!r:.200} returned without calling start_response()")
            self._is_complete = True
        finally:
            close = getattr(result, "close", None)
            if close is not None:
                close()

    def _hand_on_all(self, chunks: Sequence[bytes]) -> None:
        """All of it is here already: there is nothing to gain from sending before the thread is free."""
        for chunk in chunks:
            self._check(chunk)
        if len(chunks) == 1 and self._head is not None and not self._head_handed_on:
            set_content_length(self._head, len(chunks[0]))
        if self._left is not None:
            chunks = [self._fitting(chunk) for chunk in chunks]
            self._require_all()
        if not self._is_head:
            with self._lock:
                self._chunks += chunks

    def _hand_on_each(self, chunks: Iterable[bytes]) -> None:
        for chunk in chunks:
            self._check(chunk)
            fitting = self._fitting(chunk)
            self._hand_on(fitting)
            if len(fitting) < len(chunk) or (self._is_head and self._head_handed_on):
                return  # PEP 3333: stop when enough has been sent
        self._require_all()

    def _fitting(self, chunk: bytes) -> bytes:
        """Return as much of a chunk as its Content-Length leaves room for (PEP 3333, "Handling the Content-Length Header")."""
        if self._left is not None:
            chunk = chunk[: self._left]
            self._left -= len(chunk)
        return chunk

    def _require_all(self) -> None:
        if self._left:
            raise RuntimeError(f"{self._app!r:.200} returned {self._left} bytes fewer than its Content-Length says")

    def _start_response(self, status: str, headers: list[tuple[str, str]], exc_info: ExcInfo | None = None) -> Write:
        if exc_info is not None:
            try:
                if self._head_handed_on:
                    raise exc_info[1].with_traceback(exc_info[2])
            finally:
                exc_info = None  # it refers to this frame
        elif self._head is not None:
            raise RuntimeError("start_response() was called a second time, without exc_info")
        head = response_head(status, headers)
        self._left = None if self._is_head else body_length_of(head["status"], head["headers"])
        self._head = head
        return self._write

    def _check(self, chunk: bytes) -> None:
        if not isinstance(chunk, bytes):
            raise TypeError(f"a chunk of a response must be bytes, not {chunk!r:.100}")
        if chunk and self._head is None:
            raise RuntimeError("start_response() must be called before the first chunk that is not empty")

    def _write(self, chunk: bytes) -> None:
        """What ``start_response()`` returns."""
        self._check(chunk)
        if self._left is not None and len(chunk) > self._left:
            raise RuntimeError(f"write() of {len(chunk)} bytes, where Content-Length leaves room for {self._left}")
        self._hand_on(self._fitting(chunk))

    def _hand_on(self, chunk: bytes) -> None:
        from_thread.check_cancelled()
        if not chunk:
            return
        self._head_handed_on = True
        if self._is_head:
            chunk = b""
        with self._lock:
            self._chunks.append(chunk)
            self._buffered += len(chunk)
            must_wake = not self._sending
            self._sending = True
            must_wait = self._buffered > self._buffer_size
        if must_wake:
            self._token.backend_class.run_sync_soon(self._wake, (), self._token.native_token)
        if must_wait:
            from_thread.run(self._wait_for_room)
            from_thread.check_cancelled()  # on asyncio, a wait that began after the request was cancelled is not

    # In the event loop

    async def watch(self) -> None:
        """Take in what comes of the body; cancel the request when the client goes away.

        Not once the end is being sent: a server may say that the client is gone while it is busy with that. However the
        request is cancelled, this is: so it is here that a thread that waits is let go.
        """
        try:
            await self._body.go_on()
            self._is_gone = True
            if not self._is_ending:
                self.cancel()
        finally:
            self._is_over = True
            self._room.set()
            self._body.end()

    def _wake(self) -> None:
        if self._returned or self._is_over:
            return  # all is sent at once, or nothing any more
        if self._sender_ended is None:
            self._sender_ended = Event()
            self.start_soon(self._send_on, self._sender_ended)
        self._bell.set()

    async def _send_on(self, ended: Event) -> None:
        """Send what is handed on, until the application has returned."""
        try:
            while not self._returned:
                await self._send_buffered(more=True)
                await self._bell.wait()
                self._bell = Event()
        except Exception as error:  # noqa: BLE001 - raised by whoever serves the request
            self._fail(error)
        finally:
            ended.set()

    async def _send_buffered(self, *, more: bool) -> None:
        """Send what is buffered, the head before the first of it; with ``more=False``, that is the end."""
        if not self._head_sent and self._head is not None:
            self._head_sent = True
            await self._send(self._head)
        while True:
            with self._lock:
                body, rest = first_of(self._chunks)
                self._chunks = rest
                if more and not body:
                    self._sending = False
                    return
            is_last = not (more or rest)
            await self._send({"type": "http.response.body", "body": body, "more_body": not is_last})
            if is_last:
                return
            with self._lock:
                self._buffered -= len(body)
            self._room.set()

    def _fail(self, error: Exception) -> None:
        if not (self._is_gone and isinstance(error, OSError)):  # ASGI: so a server may say that the client is gone
            self.error = error
        self.cancel()

    async def _wait_for_room(self) -> None:
        while self._buffered > self._buffer_size and not self._is_over:
            self._room = Event()
            await self._room.wait()

    async def finish(self) -> None:
        """Send what is left, after ``run`` ended, well or not: what was handed on before an error goes out all the same."""
        if self._sender_ended is not None:
            self._bell.set()
            await self._sender_ended.wait()
        try:
            if self._is_complete:
                self._is_ending = True
                await self._send_buffered(more=False)
            elif self._chunks:
                await self._send_buffered(more=True)
        except Exception as error:  # noqa: BLE001 - raised by whoever serves the request
            self._fail(error)
