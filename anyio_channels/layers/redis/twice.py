"""What tells a message that was heard already, or that comes too late, where a cluster may say it twice.

While a node takes over from another, both hand on what is published in their shard, each in its own time. So each message
begins with who sent it and a number that grows; of each sender, what does not come after the last one heard is dropped.
"""

from __future__ import annotations

import secrets
from collections import OrderedDict
from typing import Final

__all__ = ["MARK_LENGTH", "Heard", "Marks"]

_SENDER: Final = 8
_NUMBER: Final = 4
MARK_LENGTH: Final = _SENDER + _NUMBER
"""Bytes of a mark."""
_NUMBERS: Final = 1 << (8 * _NUMBER)
_MOST: Final = 65536
"""So many senders and channels are remembered."""


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
