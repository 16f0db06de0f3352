"""One bounded, expiring first-in-first-out with gaps.

Rules:
- an item stays in its mailbox until a reader that is past its last ``await`` takes it; ``waiting`` has the reasons.
- a reader that need not wait takes only what is promised to nobody, so nobody is overtaken: waiters are served in turn.
- all decisions are plain functions, called under the lock of the ``Mailroom``. They add the waiters to be rung after its
  release to ``rung``. The two coroutines, ``take`` and ``put_when_room``, only wait between them.
- gaps mark where items were missed. They take no room and never expire.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import deque
from dataclasses import dataclass
from math import inf
from typing import Final, Generic, TypeAlias, TypeVar

from anyio import ClosedResourceError, Event, move_on_after

from anyio_channels.wakeup import thread

from .expiry import Expirable
from .waiting import Line, Mailroom, Waiter, anyone

__all__ = ["Gap", "Mailbox"]

T = TypeVar("T")

_NEVER: Final = -inf
_LONG: Final = 16
"""From this many entries on, a deque is better than a list."""

_Entries: TypeAlias = "deque[tuple[float, T | Gap]] | list[tuple[float, T | Gap]]"


@dataclass(slots=True, eq=False)
class Gap:
    """Marks where items are missing, and how many; ``None`` if nobody knows."""

    missed: int | None


class Mailbox(Expirable, Generic[T]):
    """A bounded first-in-first-out of ``(expires_at, item)``, its ``entries``.

    All methods are to be called under the lock of the mailroom, unless they say otherwise.
    """

    __slots__ = (
        "_books",
        "_limit",
        "_mailroom",
        "_readers",
        "_senders",
        "_weight",
        "capacity",
        "closed",
        "drop_old",
        "ends_at",
        "entries",
        "grace",
        "life",
        "track_gaps",
    )

    def __init__(
        self,
        mailroom: Mailroom,
        capacity: int,
        *,
        owned: bool = False,
        drop_old: bool = False,
        track_gaps: bool = False,
    ) -> None:
        """Start empty.

        ``owned``: somebody keeps it and counts it, full or empty. ``drop_old``: when full, the oldest item makes room for
        a new one. ``track_gaps``: a ``Gap`` stands where items were dropped or expired.
        """
        self._mailroom = mailroom
        self._books = mailroom.books
        # An empty deque takes 760 bytes, in pieces that the C library is slow to give back: most channels hold a few
        # messages at most, so they begin with a list. One that is to be filled from the front begins with a deque.
        self.entries: _Entries[T] = deque() if drop_old or track_gaps else []
        self.capacity: int = capacity
        self._limit = capacity  # grows by one with each gap among the entries, so that gaps take no room
        self._readers: Line | None = None
        self._senders: Line | None = None
        self._weight = 0 if owned else 1  # in Books.occupied
        self.listed = False
        self.life: float = inf
        """How long it lasts after a reader took something, in seconds; ``inf``: its end is not a matter of time."""
        self.grace: float = inf
        """How long it lasts after its last reader was cancelled."""
        self.ends_at: float = inf
        """When it ends if nobody reads; ``inf`` as long as somebody waits."""
        self.closed: bool = False
        self.drop_old: bool = drop_old
        self.track_gaps: bool = track_gaps

    @abstractmethod
    def is_over(self, now: float) -> bool:
        """Whether it has ended, or is to end now; called under the lock."""

    def reader_joins(self, rung: list[Waiter]) -> None:
        """A reader found nothing and is about to join the line; called under the lock. Raises if nothing can come."""

    def reader_waits(self) -> None:
        """A reader found nothing and is about to wait; called without the lock."""

    def reader_left(self) -> None:
        """A reader that waited was cancelled; called without the lock, but perhaps within a locked section."""

    @property
    def demand(self) -> int:
        """How many readers wait who were promised nothing."""
        return 0 if self._readers is None else len(self._readers)

    @property
    def unclaimed(self) -> bool:
        """Whether there is an item that was promised to nobody."""
        return len(self.entries) > (0 if self._readers is None else self._readers.promised)

    @property
    def idle(self) -> bool:
        """Whether nothing is in here, nobody waits and nobody is on the way."""
        return not (self.entries or anyone(self._readers) or anyone(self._senders))

    @property
    def dead(self) -> bool:
        """Whether it was closed."""
        return self.closed

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
            self._mailroom.index.add(self, entry[0])
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
        if self.ends_at <= (now := self._mailroom.clock()) and self.is_over(now):
            return None
        if entries[0][0] <= now:
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
        self.ends_at = now + self.life
        if self._senders:
            self._call_senders(rung)
        return item

    def take_at_once(self) -> T | Gap | None:
        """Take what is promised to nobody, without waiting; for callers that do not hold the lock."""
        mailroom = self._mailroom
        rung: list[Waiter] = []
        mailroom.lock.acquire()
        try:
            item = self.take_nowait(rung)
        finally:
            mailroom.lock.release()
        if rung or mailroom.abandoned:
            mailroom.wake(rung)
        return item

    async def take(self) -> T | Gap:
        """Wait for an item in turn and take it. A cancelled call has taken nothing and is forgotten.

        Raises ``ClosedResourceError`` when the mailbox is closed, before or during the wait.
        """
        again = False
        while True:
            bell, loop = thread.state.new_bell()
            waiter = Waiter(self, bell, loop)
            item = self._take_or_join(waiter, in_front=again)
            if item is None:
                try:
                    self.reader_waits()
                    await bell.waiting
                except BaseException:
                    self._mailroom.abandon(waiter)
                    self.reader_left()
                    raise
                item = self._take_promised(waiter)
            if item is not None:
                return item
            again = True  # what it was promised expired, or was flushed

    def _take_or_join(self, waiter: Waiter, *, in_front: bool) -> T | Gap | None:
        mailroom = self._mailroom
        rung: list[Waiter] = []
        mailroom.lock.acquire()
        try:
            if self.closed:
                raise ClosedResourceError
            item = self.take_nowait(rung)
            if item is None:
                self.reader_joins(rung)
                self.ends_at = inf
                if self._readers is None:
                    self._readers = Line()
                self._readers.join(waiter, in_front=in_front)
                self._books.waiting_receivers += 1
        finally:
            mailroom.lock.release()
            if rung or mailroom.abandoned:
                mailroom.wake(rung)
        return item

    def _take_promised(self, waiter: Waiter) -> T | Gap | None:
        mailroom = self._mailroom
        rung: list[Waiter] = []
        mailroom.lock.acquire()
        try:
            self._end_wait(waiter)
            if self.closed:
                raise ClosedResourceError
            self.ends_at = inf  # another reader may have taken something meanwhile
            item = self.take_nowait(rung)
        finally:
            mailroom.lock.release()
        if rung or mailroom.abandoned:
            mailroom.wake(rung)
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
                self._mailroom.abandon(waiter)
                raise

    def _put_or_join(self, item: T, expiry: float, called: Waiter | None, following: Waiter) -> bool:
        mailroom = self._mailroom
        rung: list[Waiter] = []
        with mailroom:
            if called is not None:
                self._end_wait(called)
            if self.closed:
                raise ClosedResourceError
            now = mailroom.clock()
            in_turn = called is not None or not anyone(self._senders)
            done = in_turn and self.put((now + expiry, item), now, rung)
            if not done:
                if self._senders is None:
                    self._senders = Line()
                # A sender that does not wait may have taken the room it was called for: then it keeps its place.
                self._senders.join(following, in_front=called is not None)
                self._books.waiting_senders += 1
                self._call_senders(rung)  # there may be room for more than were called
        mailroom.wake(rung)
        return done

    async def _until_set(self, event: Event) -> None:
        # Room that expiry makes comes at a time known beforehand, so a timer is set for just that.
        mailroom = self._mailroom
        while not event.is_set():
            rung: list[Waiter] = []
            with mailroom:
                now = mailroom.clock()
                self.expire(now, rung)
                oldest = self._oldest()
            mailroom.wake(rung)
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
        if not waiter.is_over:
            self._end_wait(waiter)
            if waiter.line is self._readers:
                self.reader_gave_up()
            self._call_readers(rung)
            self._call_senders(rung)

    def reader_gave_up(self) -> None:
        """A reader took nothing and will not: if nobody else waits, what is left here has so long. Callable without the lock."""
        if not anyone(self._readers):
            self.ends_at = self._mailroom.clock() + self.grace

    def _end_wait(self, waiter: Waiter) -> None:
        """The wait is over, whether the waiter was called or not."""
        if waiter.is_over:
            return
        waiter.is_over = True
        line = waiter.line
        if waiter.promised:
            line.promised -= 1
        else:
            del line[waiter]
        if line is self._readers:
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


def _widened(gap: Gap | None, missed: int | None) -> Gap:
    if gap is None:
        return Gap(missed)
    return Gap(None if gap.missed is None or missed is None else gap.missed + missed)
