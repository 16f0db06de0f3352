"""What tells a message that came already, or that comes too late, where Redis may hand it out twice.

Pub/sub in a cluster: while a node takes over from another, both hand on what is published in their shard, each in its own
time. So each message begins with who sent it and a number that grows; of each sender, what does not come after the last one
heard is dropped.

Queues: replication is asynchronous, so a replica that is promoted may hold what the old primary had handed out already, as may
a server that was restarted from its disk. So what was popped of late is remembered by its key, its score and its first bytes,
which no two messages share: the score is the time at the server, where no two in a channel have the same, and bytes begin
at random.
"""

from __future__ import annotations

import secrets
from collections import OrderedDict
from typing import Final

__all__ = ["MARK_LENGTH", "Heard", "Marks", "Taken"]

_SENDER: Final = 8
_NUMBER: Final = 4
MARK_LENGTH: Final = _SENDER + _NUMBER
"""Bytes of a mark."""
_NUMBERS: Final = 1 << (8 * _NUMBER)
_MOST: Final = 65536
"""So many senders and channels are remembered."""
_BEGINNING: Final = 64
_GENERATION: Final = 16384
"""So many of the messages popped last are remembered at least, and twice as many at most."""


class Marks:
    """Makes the marks of one sender."""

    def __init__(self) -> None:
        """A sender that nobody else is."""
        self._sender = secrets.token_bytes(_SENDER)
        self._count = 0

    def next(self) -> bytes:
        """Return the mark of the next message."""
        self._count += 1
        return self._sender + (self._count % _NUMBERS).to_bytes(_NUMBER, "big")


class Heard:
    """Remembers the last that was heard of each sender on each Redis channel."""

    def __init__(self) -> None:
        """Nothing yet."""
        self._last: OrderedDict[tuple[str, bytes], int] = OrderedDict()

    def is_new(self, name: str, payload: bytes) -> bool:
        """Whether ``payload`` comes after the last that was heard of its sender on the Redis channel ``name``."""
        key = (name, payload[:_SENDER])
        number = int.from_bytes(payload[_SENDER:MARK_LENGTH], "big")
        last = self._last.pop(key, None)
        is_new = last is None or 0 < (number - last) % _NUMBERS < _NUMBERS // 2
        self._last[key] = number if last is None or is_new else last
        if len(self._last) > _MOST:
            self._last.popitem(last=False)
        return is_new


class Taken:
    """Remembers which messages were popped of late."""

    def __init__(self) -> None:
        """Nothing yet."""
        self._young: set[int] = set()
        self._old: set[int] = set()

    def is_new(self, key: str, entry: bytes, score: float) -> bool:
        """Whether ``entry`` of ``key`` was not popped before; it is remembered from now on."""
        mark = _mark(key, entry, score)
        if mark in self._young or mark in self._old:
            return False
        self._young.add(mark)
        if len(self._young) >= _GENERATION:
            self._old, self._young = self._young, set()
        return True

    def forget(self, key: str, entry: bytes, score: float) -> None:
        """``entry`` goes back to where it was popped, and may be popped again."""
        mark = _mark(key, entry, score)
        self._young.discard(mark)
        self._old.discard(mark)


def _mark(key: str, entry: bytes, score: float) -> int:
    """Return what stands for a message of the channel with ``key``."""
    return hash((key, score, entry[:_BEGINNING]))
