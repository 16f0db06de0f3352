"""RESP3 without I/O: requests in, bytes out; bytes in, answered requests and pushes out, in order, or the end.

Rules:
- requests in flight are in one first-in-first-out. An abandoned request that was handed out already keeps its place, to
  swallow its reply; one that was not handed out yet is dropped at once, with its bytes.
- bytes are handed out in pieces of about ``PIECE`` bytes, so that a peer that stops reading holds few of them.
- SUBSCRIBE and its kin are answered by a push for each name; no other push answers a request.
- the first thing that is wrong ends the protocol for good: bytes that are not RESP3, a reply that no request waits for, a
  reply or a push of the wrong shape, an announcement of more than ``MOST_ELEMENTS`` elements. It never resynchronises:
  what follows is not parsed, and every request that waits is returned with a ``ConnectionLost``.
- no clock, no I/O, no callbacks: the driver tells whoever asked, and knows what is due.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import NoneType
from typing import Any, Final, TypeAlias
from typing import Protocol as Interface

import hiredis
from hiredis import PushNotification

from .errors import ConnectionLost, to_error

Argument: TypeAlias = bytes | str | int | float
"""What a command is made of."""
Parse: TypeAlias = Callable[[Any], Any]
Done: TypeAlias = "Callable[[Request], object]"

MOST_ELEMENTS: Final = 2**20
"""An array, map, set or push may announce this many elements: hiredis allocates the list as soon as it sees the header."""
PIECE: Final = 2**18
"""Bytes after which no further request goes into the same piece."""
_WRONG_SHAPE: Final = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError)
"""What a parser raises for a reply of a wrong type or shape."""

_MORE: Final = object()
_CONFIRMED: Final[dict[Argument, bytes]] = {
    name: name.lower().encode()
    for name in ("SUBSCRIBE", "UNSUBSCRIBE", "PSUBSCRIBE", "PUNSUBSCRIBE", "SSUBSCRIBE", "SUNSUBSCRIBE")
}
"""RESP3 answers these by a push for each name (https://redis.io/docs/latest/develop/reference/protocol-spec/#pushes)."""
_SHAPES: Final[dict[bytes, set[tuple[type, ...]]]] = {
    b"message": {(bytes, bytes, bytes)},
    b"smessage": {(bytes, bytes, bytes)},
    b"pmessage": {(bytes, bytes, bytes, bytes)},
    **{word: {(bytes, bytes, int), (bytes, NoneType, int)} for word in _CONFIRMED.values()},
}
"""What pushes that we know are made of."""
# A header follows a line break, but for the very first one. The single literal in front lets the regular expression engine
# search as fast as memchr; whether a hit is a header or part of a string is asked of hiredis.
_HEADER: Final = re.compile(rb"[*%~>|](\d{7,})")
_NEXT_HEADER: Final = re.compile(rb"\n([*%~>|](\d{7,}))")
_CUT_HEADER: Final = re.compile(rb"(?:\A|\n)([*%~>|]\d{0,7})\Z")
_MOST_DIGITS: Final = 7


class _Bell(Interface):
    """Wakes one task."""

    @property
    def waiting(self) -> Awaitable[object]: ...
    def set(self) -> object: ...


@dataclass(slots=True, eq=False, repr=False)
class Request:
    """A command, and what became of it: it is settled once, when ``reply`` or ``error`` is there."""

    command: Sequence[Argument]
    parse: Parse | None = None
    """Turns the reply into what the caller gets, and raises if it is not what the command returns.

    ``int`` takes an integer as it is, and nothing else.
    """
    done: Done | None = None
    """Called with the request when it is settled; it must neither wait nor raise. With ``waits``: see there."""
    waits: bool = False
    """Whether the task that sends it waits for it: then ``bell`` is rung, and ``done`` is called only if that task was
    cancelled and the request is settled all the same; not for one that was never written, nor for a reply of ``None``."""
    bell: _Bell | None = None
    data: bytes = field(init=False)
    awaits: bytes | None = field(init=False)
    confirmations: int = field(init=False)
    due: float = 0.0
    """When the wait for its reply ends, by the driver's clock."""
    patience: float = 0.0
    """Seconds from being written in which it must be answered, if it is the oldest."""
    reply: Any = None
    error: Exception | None = None
    written: bool = False
    written_at: float = 0.0
    """When it was written, by the driver's clock."""
    abandoned: bool = False
    asking: bool = False
    """Whether a cluster's ASKING goes in front of it: then its owner looks at its success too, in ``settle``."""
    is_fence: bool = False
    """Whether an error in its place is a late answer to what is in front of it."""
    queue: dict[Request, None] | None = None
    """Where it is until it is written."""

    def __post_init__(self) -> None:
        """Pack the command."""
        self.data = hiredis.pack_command(self.command)  # type: ignore[arg-type] # hiredis says "of one item"
        self.awaits = _CONFIRMED.get(self.command[0])
        self.confirmations = len(self.command) - 1

    def settle(self) -> None:
        """Tell whoever asked."""
        if self.bell is not None:
            self.bell.set()
        elif self.done is not None:
            self.done(self)

    def drop(self) -> None:
        """No task waits for it any more: it is not written, or its reply is swallowed."""
        self.abandoned = True
        if self.queue is not None:
            self.queue.pop(self, None)

    def abandon(self) -> None:
        """The task that waited was cancelled: it is not written any more, or ``done`` hears what became of it."""
        self.drop()
        self.bell = None
        if self.reply is not None or self.error is not None:
            self.settle()  # the answer came before the task could run again

    def begin_again(self) -> None:
        """Become as if it had never been sent."""
        self.error = None
        self.written = False

    def result(self) -> Any:
        """Return the reply, or raise the error."""
        if self.error is not None:
            raise self.error
        return self.reply


Event: TypeAlias = "Request | list[Any]"
"""A request that was answered or never will be, or a push (a ``hiredis.PushNotification``)."""


class RespProtocol:
    """One connection as a table of states: open, or ended."""

    def __init__(self, server: str) -> None:
        """``server``: the name used in error messages."""
        self.server: str = server
        self.ended: bool = False
        self._reader = hiredis.Reader(notEnoughData=_MORE)
        self.queue: dict[Request, None] = {}
        """What is to be sent, in order: the driver adds to it, until the end, and says so in ``Request.queue``."""
        self._in_flight: deque[Request] = deque()
        self._held = b""
        self._why: tuple[type[ConnectionLost], str, BaseException | None] = (ConnectionLost, "it was closed", None)

    @property
    def pending(self) -> Iterator[Request]:
        """The requests that are not settled: those in flight, then those in the queue."""
        yield from self._in_flight
        yield from self.queue

    @property
    def oldest(self) -> Request | None:
        """The request that Redis is to answer next."""
        return self._in_flight[0] if self._in_flight else None

    def data_to_send(self, now: float = 0.0) -> bytes:
        """Return the bytes of what is queued, or of its first piece; from ``now`` on they may have run."""
        queue = self.queue
        batch: list[Request] = []
        size = 0
        for request in queue:
            request.written = True
            request.written_at = now
            batch.append(request)
            size += len(request.data)
            if size >= PIECE:
                break
        if len(batch) == len(queue):
            queue.clear()
        else:
            for request in batch:
                del queue[request]
        self._in_flight.extend(batch)
        return batch[0].data if len(batch) == 1 else b"".join([request.data for request in batch])

    def receive(self, data: bytes) -> list[Event]:
        """Take what the server sent, and return what came of it, in order; at the end, all that was still waiting too."""
        gets = self._reader.gets
        events: list[Event] = []
        try:
            is_plain = data[-1:] == b"\n" and not (self._held or _HEADER.match(data) or _NEXT_HEADER.search(data))
            for piece in (data,) if is_plain else self._pieces(data):
                self._reader.feed(piece)
                while not self.ended:
                    try:
                        reply = gets()
                    except TypeError as error:  # a map with a list or a map as a key
                        raise hiredis.ProtocolError(str(error)) from error
                    if reply is _MORE:
                        break
                    is_push = reply.__class__ is PushNotification
                    event = self._take_push(reply) if is_push else self._take_reply(reply)
                    if event is not None:
                        events.append(event)
        except _MisfitError as error:
            events += self.end(str(error), cause=error.__cause__)
        except hiredis.HiredisError as error:
            events += self.end(f"what the server sent is no RESP3: {error}", cause=error)
        return events

    def end(
        self, why: str, *, cause: BaseException | None = None, kind: type[ConnectionLost] = ConnectionLost
    ) -> list[Request]:
        """End, if not ended: return the requests that waited, each with a ``ConnectionLost`` that says ``why``."""
        if self.ended:
            return []
        self.ended = True
        self._why = (kind, why, cause)
        waiting = list(self.pending)
        self._in_flight.clear()
        self.queue.clear()
        for request in waiting:
            request.error = self.lost(may_have_run=request.written)
        return waiting

    def lost(self, *, may_have_run: bool) -> ConnectionLost:
        """Return the error for a request after the end."""
        kind, why, cause = self._why
        error = kind(f"{self.server}: the connection ended: {why}", may_have_run=may_have_run)
        error.__cause__ = cause
        return error

    # The inside

    def _take_reply(self, reply: Any) -> Request | None:
        """Return the request that ``reply`` answers; ``None``: it is late, and answers nothing."""
        in_flight = self._in_flight
        request = in_flight[0] if in_flight else None
        is_error = reply.__class__ is hiredis.ReplyError
        if request is None or (request.awaits is not None and not is_error):
            raise hiredis.ProtocolError(f"a reply that nobody asked for: {reply!r:.100}")
        if is_error:
            if request.is_fence:
                return None
            request.error = to_error(str(reply), self.server, request.command)
        elif request.parse is None:
            request.reply = reply
        elif request.parse is int:  # the most frequent one, without a call
            if reply.__class__ is not int:
                raise _MisfitError(request.command[0], reply)
            request.reply = reply
        else:
            try:
                request.reply = request.parse(reply)
            except _WRONG_SHAPE as error:
                raise _MisfitError(request.command[0], reply) from error
        in_flight.popleft()
        return request

    def _take_push(self, push: list[Any]) -> Event | None:
        """Return what came of a push: itself, the request that it answers, or nothing yet."""
        word = push[0] if push else None
        shapes = _SHAPES.get(word) if word.__class__ is bytes else None
        if shapes is None:
            return push
        if tuple(map(type, push)) not in shapes:
            raise _MisfitError("a push", push)
        first = self._in_flight[0] if self._in_flight else None
        if first is None or first.awaits != word or not _is_answer(first, push):
            return push
        first.confirmations -= 1
        if first.confirmations > 0:
            return None
        self._in_flight.popleft()
        first.reply = push
        return first

    def _pieces(self, data: bytes) -> Iterator[bytes]:
        """Yield ``data`` up to each header that may announce too much, and refuse those that do.

        What was yielded is parsed when the next piece is asked for: then hiredis has bytes left only inside a string, where
        the next bytes, whatever they look like, are not a header.
        """
        if self._held:
            data = self._held + data
            self._held = b""
        if data[-1:] != b"\n" and (cut := _CUT_HEADER.search(data, max(0, len(data) - 2 - _MOST_DIGITS))) is not None:
            # How much it announces shows with the next bytes. No reply ends here, so nobody waits for what is held back.
            self._held = cut[1]
            data = data[: cut.start(1)]
        start = 0
        if (header := _HEADER.match(data)) is not None:
            self._refuse_excess(header[1])
        for header in _NEXT_HEADER.finditer(data):
            yield data[start : header.start(1)]
            start = header.start(1)
            self._refuse_excess(header[2])
        yield data[start:] if start else data

    def _refuse_excess(self, digits: bytes) -> None:
        if (len(digits) > _MOST_DIGITS or int(digits) > MOST_ELEMENTS) and not self._reader.has_data():
            raise hiredis.ProtocolError(f"it announces more than {MOST_ELEMENTS} elements: {digits[:20].decode()}")


class _MisfitError(Exception):
    """A reply or a push that is RESP3, and not what it should be."""

    def __init__(self, name: object, reply: object) -> None:
        super().__init__(f"it does not answer as Redis would: {name} with {reply!r:.100}")


def _is_answer(request: Request, push: list[Any]) -> bool:
    """Whether ``push`` confirms what was asked for: a cluster says ``sunsubscribe`` by itself when a slot has moved."""
    if push[0] != b"sunsubscribe" or push[1] is None:
        return True
    return push[1].decode("utf-8", "replace") in request.command[1:]
