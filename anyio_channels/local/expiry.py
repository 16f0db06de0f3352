"""When things fall due: one heap for everything in a layer that expires.

Rules:
- an item stands in the heap at most once, at or before the time when it next has something to expire, so a message
  costs nothing here: only the first message of an unlisted channel does.
- whoever holds the layer's lock sweeps a few due items at each sending or joining operation. There is no background
  task and no scan: an item is looked at when its time has come.
- the heap answers "what can be reclaimed", never "is this expired": that is asked of the item itself, by the clock.
- an item can be hastened at any moment, also by the garbage collector within a locked section: the next sweep looks at it.
- dead items (a closed inbox, an emptied group) are dropped when due, or all at once when the heap has doubled.
"""

from __future__ import annotations

import heapq
from abc import ABC, abstractmethod
from collections import deque
from itertools import count
from math import inf
from typing import Any

__all__ = ["Expirable", "ExpiryIndex"]


class Expirable(ABC):
    """Something with parts that expire."""

    __slots__ = ("listed",)

    listed: bool
    """Whether it stands in the heap now."""

    @property
    @abstractmethod
    def dead(self) -> bool:
        """Whether nothing can ever expire here again, so that the heap may forget it."""

    @abstractmethod
    def fall_due(self, now: float, rung: list[Any]) -> float | None:
        """Drop all that has expired; return when the next part will, or ``None`` if nothing is left to expire.

        ``rung`` is passed through from ``ExpiryIndex.sweep``: it collects who is to be woken about it.
        """


class ExpiryIndex:
    """A heap of ``(time, number, item)``."""

    __slots__ = ("_hastened", "_heap", "_numbers", "_trim_at", "next_due")

    _SLACK = 1024

    def __init__(self) -> None:
        """Start empty."""
        self._heap: list[tuple[float, int, Expirable]] = []
        self._hastened: deque[Expirable] = deque()
        self._numbers = count()
        self._trim_at = self._SLACK
        self.next_due: float = inf
        """The earliest time anything may be due (seconds of the layer's clock)."""

    def __len__(self) -> int:
        """How many items the heap holds."""
        return len(self._heap)

    def add(self, item: Expirable, due: float) -> None:
        """List ``item``, which must not be listed."""
        item.listed = True
        heapq.heappush(self._heap, (due, next(self._numbers), item))
        self.next_due = min(self.next_due, due)
        if len(self._heap) > self._trim_at:
            self._trim()

    def hasten(self, item: Expirable) -> None:
        """Have the next sweep look at ``item``, whatever its time is. Safe at any moment, without the lock too."""
        self._hastened.append(item)
        self.next_due = -inf

    def sweep(self, now: float, rung: list[Any], limit: float = 8) -> None:
        """Let up to ``limit`` items that are due drop what has expired, and those that were hastened."""
        heap = self._heap
        while limit > 0 and self._hastened:
            self._hastened.popleft().fall_due(now, rung)
            limit -= 1
        while limit > 0 and heap and heap[0][0] <= now:
            item = heapq.heappop(heap)[2]
            item.listed = False
            due = item.fall_due(now, rung)
            if due is not None:
                item.listed = True
                heapq.heappush(heap, (due, next(self._numbers), item))
            limit -= 1
        self._set_next_due()

    def clear(self) -> None:
        """Forget everything."""
        for _, _, item in self._heap:
            item.listed = False
        self._heap.clear()
        self._hastened.clear()
        self.next_due = inf

    def _trim(self) -> None:
        living = [entry for entry in self._heap if not entry[2].dead]
        for entry in self._heap:
            if entry[2].dead:
                entry[2].listed = False
        heapq.heapify(living)
        self._heap = living
        self._set_next_due()
        self._trim_at = 2 * len(living) + self._SLACK

    def _set_next_due(self) -> None:
        self.next_due = self._heap[0][0] if self._heap else inf
        if self._hastened:  # looked at last: the garbage collector may hasten something at any moment
            self.next_due = -inf
