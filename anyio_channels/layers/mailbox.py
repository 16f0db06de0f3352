"""One bounded, expiring, cancel-safe first-in-first-out with waiters: the only place that waits and wakes.

Rules:
- an item stays in its mailbox until a reader that is past its last ``await`` takes it. Waking hands over nothing: it
  *promises* one item to a waiter. A waiter that is cancelled instead gives the promise back, and the next is woken.
- a reader that need not wait takes only what is not promised, so nobody is overtaken: waiters are served in turn.
- every change of state is synchronous and under the lock of the ``Mailroom``; it collects the waiters to be rung, who
  are rung after the lock was released. Nothing blocks or calls out under the lock.
- a waiter belongs to the event loop it waits in, and is rung there: directly, or through the non-blocking call of that
  loop's own token (``call_soon_threadsafe``, ``run_sync_soon``) from anywhere else. A loop that has ended forfeits
  the promise; a loop that stands still is rung, but no item is kept for it.
- giving back may happen in the middle of a locked section of the same thread (garbage collection closes a coroutine):
  it goes through ``Mailroom.abandon``, which never waits for the lock. Whoever releases the lock looks after it.
- gaps mark where messages were missed; they take no room and never expire.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from types import TracebackType
from typing import Any, Final, Generic, TypeAlias, TypeVar

from anyio import ClosedResourceError, Event, move_on_after

from .backend import Bell, thread
from .expiry import Expirable, ExpiryIndex

__all__ = ["Books", "Gap", "Mailbox", "Mailroom"]

T = TypeVar("T")

_NEVER: Final = -inf
_LONG: Final = 16
"""How many entries make a deque better than a list."""

_Entries: TypeAlias = "deque[tuple[float, T | Gap]] | list[tuple[float, T | Gap]]"


@dataclass(slots=True)
class Books:
    """What went through the mailboxes of one mailroom; each item ends under exactly one heading."""

    sent: int = 0
    received: int = 0
    expired: int = 0
    dropped_full: int = 0
    discarded: int = 0
    occupied: int = 0
    """How many mailboxes that nobody owns hold an item."""
    waiting_receivers: int = 0
    waiting_senders: int = 0

    @property
    def buffered(self) -> int:
        """How many items wait in the mailboxes: those that have not ended yet."""
        return self.sent - self.received - self.expired - self.dropped_full - self.discarded


@dataclass(slots=True, eq=False)
class Gap:
    """Stands in a mailbox where items are missing; ``None``: nobody knows how many."""

    missed: int | None


class Waiter:
    """One task's wait: a bell, and the loop that may ring it."""

    __slots__ = ("bell", "line", "loop", "mailbox", "promised", "settled")

    line: Line

    def __init__(self, mailbox: Mailbox[Any], bell: Bell, loop: Any) -> None:
        self.bell: Bell = bell
        self.loop: Any = loop
        self.mailbox: Mailbox[Any] = mailbox
        self.promised: bool = False
        self.settled: bool = False

    def schedule(self) -> bool:
        """Ring from another thread or loop, without waiting; return whether that loop is there to look."""
        # TrioToken and asyncio's loop are both reached through anyio's token; neither type is imported.
        call_soon: Callable[[Callable[[], object]], object] = (
            getattr(self.loop, "call_soon_threadsafe", None) or self.loop.run_sync_soon
        )
        is_running: Callable[[], bool] | None = getattr(self.loop, "is_running", None)
        try:
            call_soon(self.bell.set)
        except RuntimeError:  # the loop is closed (asyncio), the run has finished (trio)
            return False
        return is_running is None or is_running()


class Line(OrderedDict[Waiter, None]):
    """Those who wait for the same thing, first come first; ``promised`` counts those called but not yet there."""

    __slots__ = ("promised",)

    def __init__(self) -> None:
        super().__init__()
        self.promised: int = 0

    def join(self, waiter: Waiter, *, in_front: bool) -> None:
        """Wait; ``in_front``: it had its turn and found nothing, so it keeps its place."""
        waiter.line = self
        self[waiter] = None
        if in_front:
            self.move_to_end(waiter, last=False)

    def call(self, rung: list[Waiter]) -> None:
        """Promise the first in the line what it waits for."""
        waiter = self.popitem(last=False)[0]
        waiter.promised = True
        self.promised += 1
        rung.append(waiter)

    def settle(self, waiter: Waiter) -> None:
        """The wait is over, whether it was called or not."""
        waiter.settled = True
        if waiter.promised:
            self.promised -= 1
        else:
            del self[waiter]


class Mailroom:
    """What the mailboxes of one layer share: lock, clock, books, expiry, and the ringing of waiters.

    ``with mailroom:`` holds the lock and afterwards looks after waiters that gave up meanwhile. Code on the hottest
    path may use ``lock`` itself, if it then calls ``wake()`` whenever ``abandoned`` is not empty.
    """

    __slots__ = ("abandoned", "books", "clock", "index", "lock")

    def __init__(self, clock: Callable[[], float]) -> None:
        """``clock`` returns seconds, and never goes back."""
        self.lock: threading.Lock = threading.Lock()
        self.clock: Callable[[], float] = clock
        self.books: Books = Books()
        self.index: ExpiryIndex = ExpiryIndex()
        self.abandoned: deque[Waiter] = deque()

    def __enter__(self) -> None:
        """Take the lock."""
        self.lock.acquire()

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Release the lock, and look after waiters that gave up while it was held."""
        self.lock.release()
        if self.abandoned:
            self._settle()

    def wake(self, rung: list[Waiter]) -> None:
        """Ring each waiter in its own loop, and look after those who gave up. Never blocks; not to be called locked."""
        if rung:
            self._ring(rung)
        if self.abandoned:
            self._settle()

    def abandon(self, waiter: Waiter) -> None:
        """``waiter`` will not come: give back what it was promised. Safe at any moment, also within the lock."""
        self.abandoned.append(waiter)
        self._settle()

    def _settle(self) -> None:
        """Give back for all who were abandoned; if the lock is held, its holder does so on releasing it."""
        while self.abandoned and self.lock.acquire(blocking=False):
            rung: list[Waiter] = []
            try:
                while self.abandoned:
                    waiter = self.abandoned.popleft()
                    waiter.mailbox.forget(waiter, rung)
            finally:
                self.lock.release()
            self._ring(rung)

    def _ring(self, waiters: list[Waiter]) -> None:
        here = thread.state.running_loop()
        for waiter in waiters:
            if waiter.loop is here:
                waiter.bell.set()
            elif not waiter.schedule():
                self.abandoned.append(waiter)


class Mailbox(Expirable, Generic[T]):
    """A bounded first-in-first-out of ``(expires_at, item)``, its ``entries``.

    All methods but ``take`` and ``put_when_room`` are to be called with the lock of the mailroom held; they add the
    waiters that are to be rung after its release to ``rung``.
    """

    __slots__ = (
        "_books",
        "_limit",
        "_readers",
        "_room",
        "_senders",
        "_weight",
        "capacity",
        "closed",
        "drop_old",
        "entries",
        "track_gaps",
    )

    def __init__(
        self, room: Mailroom, capacity: int, *, owned: bool = False, drop_old: bool = False, track_gaps: bool = False
    ) -> None:
        """Start empty.

        ``owned``: somebody keeps it and counts it, full or empty. ``drop_old``: when full, the oldest item makes room for
        a new one. ``track_gaps``: a ``Gap`` stands where items were dropped or expired.
        """
        self._room = room
        self._books = room.books
        # An empty deque takes 760 bytes, in pieces that the C library is slow to give back: most channels hold a few
        # messages at most, so they begin with a list. One that is to be filled from the front begins with a deque.
        self.entries: _Entries[T] = deque() if drop_old or track_gaps else []
        self.capacity: int = capacity
        self._limit = capacity  # grows by one with each gap among the entries, so that gaps take no room
        self._readers: Line | None = None
        self._senders: Line | None = None
        self._weight = 0 if owned else 1  # in Books.occupied
        self.listed = False
        self.closed: bool = False
        self.drop_old: bool = drop_old
        self.track_gaps: bool = track_gaps

    def expired_unread(self) -> None:
        """Items expired here unread; called under the lock."""

    def reader_waits(self) -> None:
        """A reader found nothing and is about to wait; called without the lock."""

    def reader_left(self) -> None:
        """A reader that waited was cancelled; called without the lock, but perhaps within a locked section."""

    @property
    def demand(self) -> int:
        """How many readers wait who were promised nothing."""
        return 0 if self._readers is None else len(self._readers)

    @property
    def idle(self) -> bool:
        """Whether nothing is in here, nobody waits and nobody is on the way."""
        return not (self.entries or _anyone(self._readers) or _anyone(self._senders))

    @property
    def dead(self) -> bool:
        """Whether it was closed."""
        return self.closed

    def has_expired(self, now: float) -> bool:
        """Whether the oldest item may be past its time."""
        return bool(self.entries) and self.entries[0][0] <= now

    def put(self, entry: tuple[float, T], now: float, rung: list[Waiter]) -> bool:
        """Add ``entry``, or return ``False``: the mailbox is full of unexpired items."""
        entries = self.entries
        books = self._books
        if entries:
            if entries[0][0] <= now:
                self.expire(now, rung)
            if len(entries) >= self._limit:
                if not self.drop_old:
                    return False
                self._drop_oldest()
            if not entries:
                books.occupied += self._weight
            elif len(entries) == _LONG and isinstance(entries, list):
                entries = self.entries = deque(entries)
        else:
            books.occupied += self._weight
        books.sent += 1
        entries.append(entry)
        if self._readers:
            self._call_readers(rung)
        if not self.listed:
            self._room.index.add(self, entry[0])
        return True

    def miss(self, rung: list[Waiter]) -> None:
        """Account for an item that ``put`` refused and that nobody will send again."""
        books = self._books
        books.sent += 1
        books.dropped_full += 1
        if not self.track_gaps:
            return
        self._widen_last(1, rung)

    def mark_outage(self, rung: list[Waiter]) -> None:
        """Something may be missing here, and nobody knows how much; where gaps are tracked."""
        self._widen_last(None, rung)

    def _widen_last(self, missed: int | None, rung: list[Waiter]) -> None:
        last = self.entries[-1][1] if self.entries else None
        if isinstance(last, Gap):
            last.missed = _widened(last, missed).missed
        else:
            self.entries.append((_NEVER, Gap(missed)))
            self._limit += 1
            self._call_readers(rung)

    def take_nowait(self, rung: list[Waiter]) -> T | Gap | None:
        """Take the oldest item that is promised to no waiter, or return ``None``."""
        entries = self.entries
        readers = self._readers
        if not entries or (readers is not None and len(entries) <= readers.promised):
            return None
        if entries[0][0] <= (now := self._room.clock()):
            self.expire(now, rung)
            if len(entries) <= (0 if readers is None else readers.promised):
                return None
            if isinstance(gap := entries[0][1], Gap):  # always at or before now
                _pop_first(entries)
                self._limit -= 1
                if not entries:
                    self._books.occupied -= self._weight
                return gap
        item = entries.pop(0)[1] if type(entries) is list else _pop_first(entries)[1]
        books = self._books
        if not entries:
            books.occupied -= self._weight
        books.received += 1
        if self._senders:
            self._call_senders(rung)
        return item

    def take_at_once(self) -> T | Gap | None:
        """Take what is promised to nobody, without waiting; for callers that do not hold the lock."""
        room = self._room
        rung: list[Waiter] = []
        room.lock.acquire()
        try:
            item = self.take_nowait(rung)
        finally:
            room.lock.release()
        if rung or room.abandoned:
            room.wake(rung)
        return item

    async def take(self) -> T | Gap:
        """Wait for an item in turn and take it. A cancelled call has taken nothing and is forgotten.

        Raises ``ClosedResourceError`` when the mailbox is closed, before or during the wait.
        """
        again = False
        while True:
            waiter = Waiter(self, *thread.state.new_bell())
            item = self._take_or_join(waiter, in_front=again)
            if item is None:
                try:
                    self.reader_waits()
                    await waiter.bell.wait()
                except BaseException:
                    self._room.abandon(waiter)
                    self.reader_left()
                    raise
                item = self._take_promised(waiter)
            if item is not None:
                return item
            again = True  # what it was promised expired, or was flushed

    def _take_or_join(self, waiter: Waiter, *, in_front: bool) -> T | Gap | None:
        room = self._room
        rung: list[Waiter] = []
        room.lock.acquire()
        try:
            if self.closed:
                raise ClosedResourceError
            item = self.take_nowait(rung)
            if item is None:
                if self._readers is None:
                    self._readers = Line()
                self._readers.join(waiter, in_front=in_front)
                self._books.waiting_receivers += 1
        finally:
            room.lock.release()
        if rung or room.abandoned:
            room.wake(rung)
        return item

    def _take_promised(self, waiter: Waiter) -> T | Gap | None:
        room = self._room
        rung: list[Waiter] = []
        room.lock.acquire()
        try:
            self._settle(waiter)
            if self.closed:
                raise ClosedResourceError
            item = self.take_nowait(rung)
        finally:
            room.lock.release()
        if rung or room.abandoned:
            room.wake(rung)
        return item

    async def put_when_room(self, item: T, expiry: float) -> None:
        """Wait for room in turn and add ``item``, to expire ``expiry`` seconds later.

        A cancelled call has added nothing and is forgotten. Raises ``ClosedResourceError`` when the mailbox is closed,
        before or during the wait.
        """
        waiter: Waiter | None = None
        while True:
            event, loop = thread.state.new_event()
            following = Waiter(self, event, loop)
            if self._put_or_join(item, expiry, waiter, following):
                return
            waiter = following
            try:
                await self._until_set(event)
            except BaseException:
                self._room.abandon(waiter)
                raise

    def _put_or_join(self, item: T, expiry: float, called: Waiter | None, following: Waiter) -> bool:
        room = self._room
        rung: list[Waiter] = []
        with room:
            if called is not None:
                self._settle(called)
            if self.closed:
                raise ClosedResourceError
            now = room.clock()
            in_turn = called is not None or not _anyone(self._senders)
            done = in_turn and self.put((now + expiry, item), now, rung)
            if not done:
                if self._senders is None:
                    self._senders = Line()
                # A sender that does not wait may have taken the room it was called for: then it keeps its place.
                self._senders.join(following, in_front=called is not None)
                self._books.waiting_senders += 1
                self._call_senders(rung)  # there may be room for more than were called
        room.wake(rung)
        return done

    async def _until_set(self, event: Event) -> None:
        # Room that expiry makes comes at a time known beforehand, so a timer is set for just that.
        room = self._room
        while not event.is_set():
            rung: list[Waiter] = []
            with room:
                now = room.clock()
                self.expire(now, rung)
                oldest = self._oldest()
            room.wake(rung)
            with move_on_after(inf if oldest is None else oldest - now):
                await event.wait()

    def expire(self, now: float, rung: list[Waiter]) -> None:
        """Drop every item that is past its time."""
        entries = self.entries
        gap: Gap | None = None
        expired = 0
        while entries and entries[0][0] <= now:
            item = _pop_first(entries)[1]
            if isinstance(item, Gap):
                self._limit -= 1
                gap = _widened(gap, item.missed)
            else:
                expired += 1
                if self.track_gaps:
                    gap = _widened(gap, 1)
        if gap is not None:
            entries.insert(0, (_NEVER, gap))
            self._limit += 1
        if not expired:
            return
        books = self._books
        books.expired += expired
        if not entries:
            books.occupied -= self._weight
        self._call_senders(rung)
        self.expired_unread()

    def fall_due(self, now: float, rung: list[Waiter]) -> float | None:
        """Drop what has expired; return when the oldest item left will."""
        self.expire(now, rung)
        return self._oldest()

    def clear(self, rung: list[Waiter]) -> None:
        """Throw away all items; who waits goes on waiting."""
        entries = self.entries
        if entries:
            gaps = sum(isinstance(item, Gap) for _, item in entries)
            self._limit -= gaps
            self._books.discarded += len(entries) - gaps
            self._books.occupied -= self._weight
            entries.clear()
        self._call_senders(rung)

    def withdraw(self, *, promised: bool = False) -> list[T]:
        """Take out all items that are promised to nobody, or all, as if they had never been put in; with no gaps tracked."""
        entries = self.entries
        keep = 0 if promised or self._readers is None else self._readers.promised
        taken = [item for _, item in list(entries)[keep:] if not isinstance(item, Gap)]
        for _ in taken:
            entries.pop()
        if taken:
            self._books.sent -= len(taken)
            if not entries:
                self._books.occupied -= self._weight
        return taken

    def close(self, rung: list[Waiter]) -> None:
        """Throw away all items, now and later; who waits gets ``ClosedResourceError``."""
        self.closed = True
        self.clear(rung)
        for line in (self._readers, self._senders):
            while line:
                line.call(rung)

    def forget(self, waiter: Waiter, rung: list[Waiter]) -> None:
        """``waiter`` gave up: what it was promised goes to the next."""
        if not waiter.settled:
            self._settle(waiter)
            self._call_readers(rung)
            self._call_senders(rung)

    def _settle(self, waiter: Waiter) -> None:
        if waiter.settled:
            return
        waiter.line.settle(waiter)
        if waiter.line is self._readers:
            self._books.waiting_receivers -= 1
        else:
            self._books.waiting_senders -= 1

    def _call_readers(self, rung: list[Waiter]) -> None:
        line = self._readers
        while line and len(self.entries) > line.promised:
            line.call(rung)

    def _call_senders(self, rung: list[Waiter]) -> None:
        line = self._senders
        while line and len(self.entries) + line.promised < self._limit:
            line.call(rung)

    def _drop_oldest(self) -> None:
        entries = self.entries
        gap: Gap | None = None
        while isinstance(item := _pop_first(entries)[1], Gap):
            self._limit -= 1
            gap = _widened(gap, item.missed)
        self._books.dropped_full += 1
        if self.track_gaps:
            entries.insert(0, (_NEVER, _widened(gap, 1)))
            self._limit += 1
        if not entries:
            self._books.occupied -= self._weight

    def _oldest(self) -> float | None:
        return next((expires_at for expires_at, item in self.entries if not isinstance(item, Gap)), None)


def _pop_first(entries: _Entries[T]) -> tuple[float, T | Gap]:
    return entries.pop(0) if isinstance(entries, list) else entries.popleft()


def _anyone(line: Line | None) -> bool:
    return line is not None and bool(line or line.promised)


def _widened(gap: Gap | None, missed: int | None) -> Gap:
    if gap is None:
        return Gap(missed)
    return Gap(None if gap.missed is None or missed is None else gap.missed + missed)
