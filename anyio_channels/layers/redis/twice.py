"""What tells a message that was heard already from a new one, where a cluster may say it twice.

While a node takes over from another, both hand on what is published in their shard, each in its own time. So each message
begins with who sent it and a number, and each process remembers the last numbers of each sender.
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
_WINDOW: Final = 256
"""So many numbers before the last are remembered; what is older is taken for a repetition."""
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
    """Remembers what was heard."""

    def __init__(self) -> None:
        """Nothing yet."""
        self._senders: OrderedDict[tuple[str, bytes], tuple[int, int]] = OrderedDict()

    def is_new(self, name: str, payload: bytes) -> bool:
        """Whether ``payload`` was not heard on the Redis channel ``name`` before; from now on it was."""
        key = (name, payload[:_SENDER])
        number = int.from_bytes(payload[_SENDER:MARK_LENGTH], "big")
        last, mask = self._senders.pop(key, (number - 1, 0))
        ahead = (number - last) % _NUMBERS
        if ahead < _NUMBERS // 2:
            is_new = ahead > 0
            mask = (mask << ahead | 1) % (1 << _WINDOW) if ahead < _WINDOW else 1
            last = number if is_new else last
        else:
            behind = _NUMBERS - ahead
            is_new = behind < _WINDOW and not mask >> behind & 1
            mask |= 1 << behind if is_new else 0
        self._senders[key] = (last, mask)
        if len(self._senders) > _MOST:
            self._senders.popitem(last=False)
        return is_new
