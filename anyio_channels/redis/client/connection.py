"""Drives the protocol over one byte stream to a Redis server.

Rules:
- one reader and one writer. The writer sends all that is queued in one write, or in a few if it is much (implicit
  pipelining); the reader never waits for the writer or for whoever is told: replies wake their callers, pushes are handed to
  a plain function.
- every decision is in a plain function: ``submit`` never waits, and ``execute`` only waits for what it submitted.
- a time-out ends the wait of its caller and nothing else. The connection ends when the oldest request was not answered for
  its time since it was *written*: what waited for the connection before, or has little time left, costs others nothing.
- one task watches the time-outs of all requests: it sleeps until the first is due, not once for each request. An event loop
  that stood still reads what has come meanwhile before anything is found to be late.
- a cancelled caller takes its request along if it was not written yet, bytes and all; else its reply is swallowed. The
  same goes for one who waited too long.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import Any, Final

import redis.exceptions
from anyio import (
    BrokenResourceError,
    CancelScope,
    ClosedResourceError,
    EndOfStream,
    aclose_forcefully,
    create_task_group,
    move_on_after,
    sleep,
)
from anyio.abc import ByteStream

from anyio_channels.wakeup import Bell, thread

from .errors import ConnectionLost, ConnectionTimeout
from .protocol import Argument, Done, Parse, Request, RespProtocol

_CHUNK: Final = 65536
_LOOK: Final = 0.01
"""Seconds, at least, for the reader to read what has come, before anything is found to be late."""


class Connection:
    """One connection, from the first byte to the last.

    ``run()`` serves it until it ends. All else is for the event loop that runs it.
    """

    def __init__(
        self, stream: ByteStream, server: str, *, timeout: float, on_push: Callable[[list[Any]], object] | None = None
    ) -> None:
        """``server``: the name used in error messages. ``timeout``: seconds in which a request that was written is answered.

        ``on_push`` is called with each push that confirms nothing; it must not wait.
        """
        self.server: str = server
        self.timeout: float = timeout
        self.version: tuple[int, ...] = (0,)
        """The server's version, once the handshake told it."""
        self.is_primary: bool = True
        """Whether the server said in the handshake that it takes writes."""
        self.in_cluster: bool = False
        """Whether the server said in the handshake that it is a node of a cluster."""
        self.commands: int = 0
        """How many commands were submitted."""
        self._protocol = RespProtocol(server)
        self._stream = stream
        self._on_push = on_push
        self._stop: Callable[[], None] | None = None
        self._ended_event = thread.state.new_event()[0]
        self._writer_bell: Bell | None = None
        self._watch_bell: Bell | None = None
        self._watch_until = 0.0

    @property
    def ended(self) -> bool:
        """Whether it has ended."""
        return self._protocol.ended

    @property
    def pending(self) -> int:
        """How many requests are not settled."""
        return sum(1 for _ in self._protocol.pending)

    async def run(self) -> None:
        """Serve the connection until it ends, then close the stream. Never raises for what the server or network did."""
        try:
            async with create_task_group() as tasks:
                self._stop = tasks.cancel_scope.cancel
                for task in (self._read, self._write, self._watch):
                    tasks.start_soon(self._guard, task)
                if self.ended:
                    self._stop()
        finally:
            self.end("it was closed")
            # Not aclose(): TLS would wait for the other side to say goodbye, and it may not be there. Shielded, for who hears
            # of the end may cancel us now, and what is raised here, a mistake of ours, must not be lost in that.
            with CancelScope(shield=True):
                await aclose_forcefully(self._stream)

    def end(self, why: str, *, cause: BaseException | None = None, kind: type[ConnectionLost] = ConnectionLost) -> None:
        """End the connection, if it has not ended: everyone who waits gets a ``ConnectionLost`` that says ``why``."""
        waiting = self._protocol.end(why, cause=cause, kind=kind)
        self._finish()
        for request in waiting:
            request.settle()

    def _finish(self) -> None:
        self._ended_event.set()
        if self._stop is not None:
            self._stop()

    def mute(self) -> None:
        """Deliver no pushes any more."""
        self._on_push = None

    async def wait_ended(self) -> None:
        """Wait until the connection has ended."""
        await self._ended_event.wait()

    def lost(self, *, may_have_run: bool) -> ConnectionLost:
        """Return the error for a request on a connection that has ended."""
        return self._protocol.lost(may_have_run=may_have_run)

    # Requests

    def send(self, request: Request, timeout: float | None = None) -> None:
        """Queue ``request`` and return at once; it is settled when it is answered, or never will be.

        On a connection that has ended it is settled before this returns. ``timeout``: seconds in which a caller who waits has
        the reply or a ``ConnectionTimeout``, if not those of the connection; if they are more, Redis too may take so long.
        """
        self.commands += 1
        own = self.timeout if timeout is None else timeout
        request.due = time.monotonic() + own
        if request.patience < own or request.patience < self.timeout:
            request.patience = max(own, self.timeout)
        protocol = self._protocol
        if protocol.ended:
            request.error = protocol.lost(may_have_run=False)
            request.settle()
            return
        request.queue = queue = protocol.queue
        queue[request] = None
        if request.waits and request.bell is None:  # else it is sent again, and waited for since
            request.bell = thread.state.new_bell()[0]
        if self._writer_bell is not None:
            self._writer_bell.set()
        if request.due < self._watch_until and self._watch_bell is not None:
            self._watch_bell.set()

    def submit(
        self, *command: Argument, parse: Parse | None = None, done: Done | None = None, waits: bool = False
    ) -> Request:
        """Send ``command`` as ``send`` does; the rest as in ``Request``."""
        request = Request(command, parse, done, waits)
        self.send(request)
        return request

    def fence(self) -> None:
        """Keep what is submitted next apart from ``SUNSUBSCRIBE``, submitted last.

        A cluster that ends the subscription by itself at that moment says so by the same push that would answer it, and then
        answers it with an error.
        """
        self.submit("PING").is_fence = True

    def execute(self, *command: Argument, parse: Parse | None = None) -> Coroutine[Any, Any, Any]:
        """Send ``command`` and return its reply, as ``parse`` returns it.

        Raises what the server replied as an error of the ``redis`` package, and ``ConnectionLost`` when the connection
        ended. If cancelled, the command was not sent, or it may run and its reply is swallowed.
        """
        # Not itself a coroutine function: one frame less for each reply to go through.
        return reply_to(self.submit(*command, parse=parse, waits=True))

    async def caught_up(self) -> None:
        """Wait until all that was sent before is answered. Raises ``ConnectionLost``."""
        with suppress(redis.exceptions.ResponseError):  # PING is refused where others are not, as by MISCONF
            await self.execute("PING")

    # The inside

    async def _guard(self, task: Callable[[], Awaitable[None]]) -> None:
        """Run one of the three tasks; the connection ends with the first that does."""
        try:
            await task()
        except EndOfStream:
            self.end("the server closed it")
        except (BrokenResourceError, ClosedResourceError, OSError) as error:
            self.end(f"it broke: {error.__cause__ or error!r}", cause=error)

    async def _read(self) -> None:
        stream = self._stream
        protocol = self._protocol
        while not protocol.ended:
            events = protocol.receive(await stream.receive(_CHUNK))
            was_open = not protocol.ended
            for event in events:
                is_cut_off = was_open and protocol.ended  # by whoever was told of an event before this one
                if isinstance(event, Request):
                    if is_cut_off and event.error is None:
                        event.error = protocol.lost(may_have_run=True)
                    if event.error is not None or event.asking:
                        event.settle()
                    elif event.bell is not None:  # settle(), without the call: for each reply
                        event.bell.set()
                    elif event.done is not None:
                        event.done(event)
                elif self._on_push is not None and not is_cut_off:
                    self._on_push(event)
        self._finish()

    async def _write(self) -> None:
        stream = self._stream
        protocol = self._protocol
        while True:
            if not protocol.queue:
                self._writer_bell = bell = thread.state.new_bell()[0]
                await bell.waiting
                self._writer_bell = None
            data = protocol.data_to_send(time.monotonic())
            if data:
                await stream.send(data)

    async def _watch(self) -> None:
        """Sleep until something may be late, let the reader read what has come, and end what is late then."""
        while not self.ended:
            until = self._first_due(now := time.monotonic())
            if until <= now:
                # The loop may have stood still: it gets as long again, and the reader its turn.
                await sleep(max(_LOOK, min(now - until, self.timeout)))
                self._end_what_is_late(now)  # what became late meanwhile gets as much
                continue
            self._watch_until = until
            self._watch_bell = bell = thread.state.new_bell()[0]
            with move_on_after(until - now):
                await bell.waiting
            self._watch_bell = None

    def _first_due(self, now: float) -> float:
        """Return when something may be late. What is late behind the oldest request is so only when that is answered."""
        oldest = self._protocol.oldest
        first = float("inf")
        for request in self._protocol.pending:
            if request.waits and not request.abandoned:
                first = min(first, request.due)
            late_at = (
                request.written_at if request.written else now
            ) + request.patience  # or later, if it is not written yet
            if late_at > now or request is oldest:
                first = min(first, late_at)
        return first

    def _end_what_is_late(self, now: float) -> None:
        oldest = self._protocol.oldest
        if oldest is not None and oldest.written_at + oldest.patience <= now:
            self.end("the server did not answer in time", kind=ConnectionTimeout)
            return
        for request in tuple(self._protocol.pending):
            if request.waits and not request.abandoned and request.due <= now:
                request.drop()
                request.error = ConnectionTimeout(
                    f"{self.server}: the server did not answer in time", may_have_run=request.written
                )
                request.settle()


async def reply_to(request: Request) -> Any:
    """Wait for the reply to ``request``, which ``waits`` and was just sent, and return it or raise its error.

    If cancelled, the request is abandoned: it was not written, or it may run and only ``done`` hears the reply.
    """
    if request.bell is not None:
        try:
            await request.bell.waiting
        except BaseException:
            request.abandon()
            raise
    if request.error is not None:
        raise request.error
    return request.reply
