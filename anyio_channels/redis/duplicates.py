"""Filters for messages that Redis may deliver twice.

Rules:
- pub/sub in a cluster: while a node takes over from another, both hand on what is published in their shard, each in its own
  time. So each message begins with a mark: its sender, and a number that grows. Of each sender on each Redis channel, a
  message that does not come after the last one heard is dropped.
- queues: replication is asynchronous, so a replica that is promoted may still hold what the old primary handed out, as may a
  server that was restarted from its disk. So recent pops are remembered by key, score and first bytes, which no two
  messages share: no two in a channel have the same score, and their bytes begin at random.
- memory is bounded: by the number of senders and Redis channels, and by the number of pops.
"""

from __future__ import annotations

import secrets
from collections import OrderedDict
from typing import Final

__all__ = ["GENERATION", "MARK_LENGTH", "MOST_HEARD", "LastHeard", "Marks", "RecentPops"]

_SENDER: Final = 8
_NUMBER: Final = 4
MARK_LENGTH: Final = _SENDER + _NUMBER
"""Bytes of a mark."""
_NUMBERS: Final = 1 << (8 * _NUMBER)
MOST_HEARD: Final = 65536
"""Remember at most this many pairs of a sender and a Redis channel."""
_FIRST_BYTES: Final = 64
GENERATION: Final = 16384
"""Remember at least this many recent pops, at most twice as many."""


class Marks:
    """Makes the marks of one sender."""

    def __init__(self) -> None:
        """Pick a unique sender id."""
        self._sender = secrets.token_bytes(_SENDER)
        self._count = 0

    def next(self) -> bytes:
        """Return the mark of the next message."""
        self._count += 1
        return self._sender + (self._count % _NUMBERS).to_bytes(_NUMBER, "big")


class LastHeard:
    """Remembers the last message heard from each sender on each Redis channel."""

    def __init__(self) -> None:
        """Start with nothing heard."""
        self._last: OrderedDict[tuple[str, bytes], int] = OrderedDict()

    def __len__(self) -> int:
        """How many pairs of a sender and a Redis channel are remembered."""
        return len(self._last)

    def is_new(self, name: str, payload: bytes) -> bool:
        """Whether ``payload`` comes after the last one heard from its sender on the Redis channel ``name``."""
        key = (name, payload[:_SENDER])
        number = int.from_bytes(payload[_SENDER:MARK_LENGTH], "big")
        last = self._last.pop(key, None)
        is_new = last is None or 0 < (number - last) % _NUMBERS < _NUMBERS // 2
        self._last[key] = number if last is None or is_new else last
        if len(self._last) > MOST_HEARD:
            self._last.popitem(last=False)
        return is_new


class RecentPops:
    """Remembers which messages were popped recently."""

    def __init__(self) -> None:
        """Start with nothing popped."""
        self._young: set[int] = set()
        self._old: set[int] = set()

    def is_new(self, key: str, entry: bytes, score: float) -> bool:
        """Whether ``entry`` of ``key`` was not popped before. It is remembered from now on."""
        mark = _mark(key, entry, score)
        if mark in self._young or mark in self._old:
            return False
        self._young.add(mark)
        if len(self._young) >= GENERATION:
            self._old, self._young = self._young, set()
        return True

    def forget(self, key: str, entry: bytes, score: float) -> None:
        """``entry`` goes back to where it was popped, and may be popped again."""
        mark = _mark(key, entry, score)
        self._young.discard(mark)
        self._old.discard(mark)


def _mark(key: str, entry: bytes, score: float) -> int:
    return hash((key, score, entry[:_FIRST_BYTES]))
