"""One byte stream to a Redis server: requests go out, replies and pushes come in. Knows nothing of channels.

Rules:
- one reader and one writer. The writer sends all that is queued in one write (implicit pipelining); the reader waits for
  nobody: replies wake their callers, pushes are handed to a plain function.
- requests in flight stand in one first-in-first-out. A caller that is cancelled leaves its slot there to swallow the
  reply; a request that was not written yet is dropped with its caller.
- the connection ends for good at the first thing that is wrong: bytes that are no RESP3, a reply nobody asked for, the end
  of the stream, a request unanswered for ``timeout`` seconds. It never resynchronises.
- when it ends, everyone who waits gets a ``ConnectionLost`` that says whether the command may have run.
- time-outs are watched by one task for all requests: it sleeps until the oldest is due, not once for each request.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any, Final, TypeAlias

import hiredis
import redis.exceptions
from anyio import (
    BrokenResourceError,
    CancelScope,
    ClosedResourceError,
    EndOfStream,
    aclose_forcefully,
    create_task_group,
    move_on_after,
)
from anyio.abc import ByteStream
from hiredis import PushNotification

from anyio_channels.layers.backend import Bell, thread

__all__ = ["Argument", "Connection", "ConnectionLost", "ConnectionTimeout", "Request", "to_error"]

Argument: TypeAlias = bytes | str | int | float
"""What a command is made of."""

_MORE: Final = object()
_CHUNK: Final = 65536
_CONFIRMED: Final[dict[Argument, bytes]] = {
    name: name.lower().encode()
    for name in ("SUBSCRIBE", "UNSUBSCRIBE", "PSUBSCRIBE", "PUNSUBSCRIBE", "SSUBSCRIBE", "SUNSUBSCRIBE")
}
"""RESP3 answers these by a push for each name (https://redis.io/docs/latest/develop/reference/protocol-spec/#pushes)."""
_ERRORS: Final[dict[str, type[redis.exceptions.RedisError]]] = {
    "ASK": redis.exceptions.AskError,
    "CLUSTERDOWN": redis.exceptions.ClusterDownError,
    "CROSSSLOT": redis.exceptions.ClusterCrossSlotError,
    "LOADING": redis.exceptions.BusyLoadingError,
    "MASTERDOWN": redis.exceptions.MasterDownError,
    "MOVED": redis.exceptions.MovedError,
    "NOAUTH": redis.exceptions.AuthenticationError,
    "NOPERM": redis.exceptions.NoPermissionError,
    "NOSCRIPT": redis.exceptions.NoScriptError,
    "OOM": redis.exceptions.OutOfMemoryError,
    "READONLY": redis.exceptions.ReadOnlyError,
    "TRYAGAIN": redis.exceptions.TryAgainError,
    "WRONGPASS": redis.exceptions.AuthenticationError,
}


class ConnectionLost(redis.exceptions.ConnectionError):
    """The reply will not come; the text says which server, why, and whether the command may have run."""

    def __init__(self, text: str, *, may_have_run: bool) -> None:
        """``may_have_run``: whether the command had been handed to the operating system."""
        super().__init__(f"{text}; " + ("the command may have run" if may_have_run else "the command was not sent"))
        self.may_have_run: bool = may_have_run


class ConnectionTimeout(ConnectionLost, redis.exceptions.TimeoutError):
    """The reply will not come: the server did not answer in time."""


class Request:
    """A command, and what became of it: ``done`` is called once, when ``reply`` or ``error`` is there."""

    __slots__ = (
        "abandoned",
        "awaits",
        "bell",
        "channels",
        "confirmations",
        "data",
        "done",
        "due",
        "error",
        "is_fence",
        "reply",
        "written",
    )

    def __init__(self, command: Sequence[Argument], due: float, done: Callable[[Request], object] | None) -> None:
        """``due``: when it must be answered, by ``time.monotonic()``."""
        self.data: bytes = hiredis.pack_command(tuple(command))  # type: ignore[arg-type] # hiredis says "of one item"
        self.due: float = due
        self.done: Callable[[Request], object] | None = done
        self.awaits: bytes | None = _CONFIRMED.get(command[0])
        self.confirmations: int = len(command) - 1
        self.channels: Sequence[Argument] = command[1:]
        self.bell: Bell | None = None
        """What the caller of ``execute`` waits for."""
        self.reply: Any = None
        self.error: Exception | None = None
        self.written: bool = False
        self.abandoned: bool = False
        self.is_fence: bool = False
        """Whether an error in its place is a late answer to what is in front of it."""

    def settle(self) -> None:
        """Tell whoever asked."""
        if self.bell is not None:
            self.bell.set()
        elif self.done is not None:
            self.done(self)

    def result(self) -> Any:
        """Return the reply, or raise the error."""
        if self.error is not None:
            raise self.error
        return self.reply


def to_error(text: str, server: str) -> redis.exceptions.RedisError:
    """Return the error that an error reply stands for, as a class of the ``redis`` package.

    It names the server; a redirection has the text that its class wants, which names the other one.
    """
    code, _, rest = text.partition(" ")
    if code in ("ASK", "MOVED"):
        with suppress(ValueError):
            return _ERRORS[code](rest)
        code = "ERR"  # it says not where to
    kind = _ERRORS.get(code, redis.exceptions.ResponseError)
    if rest == "max number of clients reached":
        kind = redis.exceptions.ConnectionError  # as in the redis package: another attempt may succeed
    return kind(f"{server}: {text}")


class Connection:
    """One connection, from the first byte to the last.

    ``run()`` serves it until it ends. ``submit`` and ``execute`` are for the event loop that runs it.
    """

    def __init__(
        self, stream: ByteStream, server: str, *, timeout: float, on_push: Callable[[list[Any]], object] | None = None
    ) -> None:
        """``server``: how errors call it. ``timeout``: seconds that a request may take until the connection is given up.

        ``on_push`` is called with each push that confirms nothing; it must not wait.
        """
        self.server: str = server
        self.timeout: float = timeout
        self.ended: bool = False
        self.version: tuple[int, ...] = (0,)
        """The server's version, once the handshake told it."""
        self.is_primary: bool = True
        """Whether the server said in the handshake that it takes writes."""
        self.commands: int = 0
        """How many commands were submitted."""
        self._stream = stream
        self._on_push = on_push
        self._queue: list[Request] = []
        self._in_flight: deque[Request] = deque()
        self._why: tuple[type[ConnectionLost], str, BaseException | None] = (ConnectionLost, "it was closed", None)
        self._stop: Callable[[], None] | None = None
        self._ended_event = thread.state.new_event()[0]
        self._writer_bell: Bell | None = None
        self._watch_bell: Bell | None = None
        self._watch_until = 0.0

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
        if self.ended:
            return
        self.ended = True
        self._why = (kind, why, cause)
        self._ended_event.set()
        if self._stop is not None:
            self._stop()
        waiting = [*self._in_flight, *self._queue]
        self._in_flight.clear()
        self._queue.clear()
        for request in waiting:
            request.error = self.lost(may_have_run=request.written)
            request.settle()

    def mute(self) -> None:
        """Deliver no pushes any more."""
        self._on_push = None

    async def wait_ended(self) -> None:
        """Wait until the connection has ended."""
        await self._ended_event.wait()

    def lost(self, *, may_have_run: bool) -> ConnectionLost:
        """Return the error for a request on a connection that has ended."""
        kind, why, cause = self._why
        error = kind(f"{self.server}: the connection ended: {why}", may_have_run=may_have_run)
        error.__cause__ = cause
        return error

    # Requests

    def submit(
        self, *command: Argument, done: Callable[[Request], object] | None = None, timeout: float | None = None
    ) -> Request:
        """Queue ``command`` and return at once; ``done`` is called with the request when it is answered, or never will be.

        On a connection that has ended ``done`` is called before this returns. ``timeout``: seconds, if not those of the
        connection. ``done`` must neither wait nor raise.
        """
        now = time.monotonic()
        request = Request(command, now + (self.timeout if timeout is None else timeout), done)
        self.commands += 1
        if self.ended:
            request.error = self.lost(may_have_run=False)
            request.settle()
            return request
        self._queue.append(request)
        if self._writer_bell is not None:
            self._writer_bell.set()
        if request.due < self._watch_until and self._watch_bell is not None:
            self._watch_bell.set()
        return request

    def fence(self) -> None:
        """Keep what is submitted next apart from ``SUNSUBSCRIBE``, submitted last.

        A cluster that ends the subscription by itself at that moment says so by the same push that would answer it, and then
        answers it with an error.
        """
        self.submit("PING").is_fence = True

    async def execute(self, *command: Argument, timeout: float | None = None) -> Any:  # noqa: ASYNC109 - of the connection
        """Send ``command`` and return its reply.

        Raises what the server replied as an error of the ``redis`` package, and ``ConnectionLost`` when the connection
        ended. If cancelled, the command was not sent, or it may run and its reply is swallowed.
        """
        bell = thread.state.new_bell()[0]
        request = self.submit(*command, timeout=timeout)
        if request.error is not None:
            raise request.error
        request.bell = bell
        try:
            await bell.wait()
        except BaseException:
            request.abandoned = True
            raise
        return request.result()

    # The inside

    async def _guard(self, task: Callable[[], Awaitable[None]]) -> None:
        """Run one of the three tasks; the connection ends with the first that does."""
        try:
            await task()
        except EndOfStream:
            self.end("the server closed it")
        except (BrokenResourceError, ClosedResourceError, OSError) as error:
            self.end(f"it broke: {error.__cause__ or error!r}", cause=error)
        except hiredis.HiredisError as error:
            self.end(f"what the server sent is no RESP3: {error}", cause=error)

    async def _read(self) -> None:
        stream = self._stream
        reader = hiredis.Reader(notEnoughData=_MORE)
        gets = reader.gets
        in_flight = self._in_flight
        while True:
            reader.feed(await stream.receive(_CHUNK))
            while True:
                try:
                    reply = gets()
                except TypeError as error:  # a map with a list or a map as a key
                    raise hiredis.ProtocolError(str(error)) from error
                if reply is _MORE:
                    break
                if reply.__class__ is PushNotification:
                    self._receive_push(reply)
                elif not in_flight or (in_flight[0].awaits is not None and reply.__class__ is not hiredis.ReplyError):
                    raise hiredis.ProtocolError(f"a reply that nobody asked for: {reply!r:.100}")
                else:
                    request = in_flight.popleft()
                    if reply.__class__ is hiredis.ReplyError:
                        if request.is_fence:
                            in_flight.appendleft(request)
                            continue
                        request.error = to_error(str(reply), self.server)
                    else:
                        request.reply = reply
                    request.settle()

    def _receive_push(self, push: list[Any]) -> None:
        first = self._in_flight[0] if self._in_flight else None
        if (
            first is not None
            and first.awaits is not None
            and push
            and push[0] == first.awaits
            and _is_answer(first, push)
        ):
            first.confirmations -= 1
            if first.confirmations <= 0:
                self._in_flight.popleft()
                first.reply = push
                first.settle()
        elif self._on_push is not None and not self.ended:
            self._on_push(push)

    async def _write(self) -> None:
        stream = self._stream
        while True:
            if not self._queue:
                self._writer_bell = bell = thread.state.new_bell()[0]
                await bell.wait()
                self._writer_bell = None
            queue = self._queue
            self._queue = []
            batch = [request for request in queue if not request.abandoned]
            for request in batch:
                request.written = True
            self._in_flight.extend(batch)
            if batch:
                await stream.send(batch[0].data if len(batch) == 1 else b"".join([one.data for one in batch]))

    async def _watch(self) -> None:
        """Sleep until the oldest request is due, and end the connection if it is still there then."""
        while True:
            now = time.monotonic()
            dues = [request.due for request in (*self._in_flight, *self._queue)]
            if dues and min(dues) <= now:
                self.end("the server did not answer in time", kind=ConnectionTimeout)
                return
            self._watch_until = min(dues, default=float("inf"))
            self._watch_bell = bell = thread.state.new_bell()[0]
            with move_on_after(self._watch_until - now):
                await bell.wait()
            self._watch_bell = None


def _is_answer(request: Request, push: list[Any]) -> bool:
    """Whether ``push`` confirms what was asked for: a cluster says ``sunsubscribe`` by itself when a slot has moved."""
    return push[0] != b"sunsubscribe" or push[1] is None or push[1].decode("utf-8", "replace") in request.channels
