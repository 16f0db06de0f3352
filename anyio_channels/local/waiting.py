"""Waiting in turn, and being woken without being handed anything: the part of a mailbox that is hard to get right.

Rules:
- waking hands over nothing: it *promises* one item, or room for one, to a waiter. A waiter that is cancelled instead gives
  the promise back, and the next in the line is called. So a cancelled wait has taken nothing, however it was cancelled.
- every change of state is a plain function under the lock of the ``Mailroom``. It collects the waiters to ring, and they
  are rung after the lock is released: nothing blocks, and nothing of anybody else's runs, under the lock.
- a waiter belongs to the event loop that it waits in and is rung there: directly, or from elsewhere through the
  non-blocking call of that loop's own token (``call_soon_threadsafe``, ``run_sync_soon``). A loop that has ended forfeits
  the promise; one that stands still is rung, but nothing is kept for it.
- a waiter may give up in the middle of a locked section of its own thread, because the garbage collector may close its
  coroutine there. ``Mailroom.abandon`` therefore never waits for the lock; whoever releases the lock looks after it.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Protocol

from anyio_channels.forks import in_each_child
from anyio_channels.wakeup import Ringable, thread

from .expiry import ExpiryIndex

__all__ = ["Afterwards", "Books", "Line", "Mailroom", "Waiter", "anyone"]


_NOWHERE: Final = object()


@dataclass(slots=True)
class Books:
    """What went through the mailboxes of one mailroom; each item ends under exactly one heading."""

    sent: int = 0
    received: int = 0
    expired: int = 0
    dropped_full: int = 0
    discarded: int = 0
    occupied: int = 0
    """How many mailboxes without an owner hold an item."""
    waiting_receivers: int = 0
    waiting_senders: int = 0

    @property
    def buffered(self) -> int:
        """How many items are in the mailboxes: those that have not ended yet."""
        return self.sent - self.received - self.expired - self.dropped_full - self.discarded


class Place(Protocol):
    """Where a waiter waits."""

    def forget(self, waiter: Waiter, rung: list[Waiter]) -> None:
        """``waiter`` gave up: promise to the next in line what it was promised. Called under the lock."""


class Waiter:
    """One task's wait: its bell, and the loop in which the bell is to be rung."""

    __slots__ = ("bell", "is_over", "line", "loop", "place", "promised")

    line: Line

    def __init__(self, place: Place, bell: Ringable, loop: Any) -> None:
        """``loop`` is the native token of the running event loop."""
        self.bell: Ringable = bell
        self.loop: Any = loop
        self.place: Place = place
        self.promised: bool = False
        self.is_over: bool = False

    def ring_from_elsewhere(self) -> bool:
        """Ring from another thread or loop without waiting; return whether the loop is there to hear it."""
        # Both kinds of token come from anyio's; neither type is imported.
        call_soon: Callable[[Callable[[], object]], object] = (
            getattr(self.loop, "call_soon_threadsafe", None) or self.loop.run_sync_soon
        )
        is_running: Callable[[], bool] | None = getattr(self.loop, "is_running", None)
        try:
            call_soon(self.bell.set)
        except RuntimeError:  # the loop is closed (asyncio), the run has finished (trio)
            return False
        return is_running is None or is_running()


class Afterwards(Waiter):
    """Something to be done when the lock is released, by whoever released it."""

    __slots__ = ("_act",)

    def __init__(self, act: Callable[[], object]) -> None:
        """``act`` is called in whatever thread and loop."""
        self.loop = _NOWHERE
        self._act = act

    def ring_from_elsewhere(self) -> bool:
        """Do it."""
        self._act()
        return True


class Line(OrderedDict[Waiter, None]):
    """Those who wait for the same thing, first come, first served; ``promised`` counts those called but not yet there."""

    __slots__ = ("promised",)

    def __init__(self) -> None:
        """Start empty."""
        super().__init__()
        self.promised: int = 0

    def join(self, waiter: Waiter, *, in_front: bool) -> None:
        """Wait. ``in_front`` is for a waiter that had its turn and found nothing, so it keeps its place."""
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


def anyone(line: Line | None) -> bool:
    """Whether anybody waits in ``line``, or was called and is on the way."""
    return line is not None and bool(line or line.promised)


class Mailroom:
    """What the mailboxes of one layer share: lock, clock, books, expiry, and the ringing of waiters.

    ``with mailroom:`` holds the lock and afterwards looks after waiters that gave up meanwhile. Code on the hottest paths
    may use ``lock`` itself, provided that it calls ``wake()`` whenever ``abandoned`` is not empty.
    """

    __slots__ = ("__weakref__", "abandoned", "books", "clock", "index", "lock")

    def __init__(self, clock: Callable[[], float]) -> None:
        """``clock`` returns seconds, and never goes back."""
        self.lock: threading.Lock = threading.Lock()
        self.clock: Callable[[], float] = clock
        self.books: Books = Books()
        self.index: ExpiryIndex = ExpiryIndex()
        self.abandoned: deque[Waiter] = deque()
        in_each_child(self, Mailroom._renew_lock)

    def _renew_lock(self) -> None:
        self.lock = threading.Lock()

    def __enter__(self) -> None:
        """Take the lock."""
        self.lock.acquire()

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Release the lock, and look after waiters that gave up while it was held."""
        self.lock.release()
        if self.abandoned:
            self._give_back()

    def wake(self, rung: list[Waiter]) -> None:
        """Ring each waiter in its own loop, and look after those who gave up. Never blocks. Not to be called under the lock."""
        if rung:
            self._ring(rung)
        if self.abandoned:
            self._give_back()

    def abandon(self, waiter: Waiter) -> None:
        """``waiter`` will not come: give back what it was promised. Safe at any moment, also under the lock."""
        self.abandoned.append(waiter)
        self._give_back()

    def _give_back(self) -> None:
        """Give back for all who were abandoned. If the lock is taken, its holder does so on releasing it."""
        while self.abandoned and self.lock.acquire(blocking=False):
            rung: list[Waiter] = []
            try:
                while self.abandoned:
                    waiter = self.abandoned.popleft()
                    waiter.place.forget(waiter, rung)
            finally:
                self.lock.release()
            self._ring(rung)

    def _ring(self, waiters: list[Waiter]) -> None:
        here = thread.state.running_loop()
        for waiter in waiters:
            if waiter.loop is here:
                waiter.bell.set()
            elif not waiter.ring_from_elsewhere():
                self.abandoned.append(waiter)
