"""What replies to generic commands must look like: functions to be given to a request as ``parse``.

Rules:
- each returns the reply in the form that callers use, or raises ``TypeError``, ``ValueError`` or ``LookupError``: then the
  server is not what it seems, and the connection ends.
- nothing is taken for granted: a bulk string is checked to be ``bytes``, a number to be a number.
- plain functions, without state, I/O or knowledge of who asks.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, TypeAlias, TypeVar

T = TypeVar("T")
SlotRange: TypeAlias = tuple[int, int, str, int]
"""Slots from the first number to the second belong to the primary at that host and port."""


def _of(kind: type[T], reply: Any) -> T:
    """``reply``, if that is what it is: ``True`` is not an integer."""
    if reply.__class__ is not kind:
        raise TypeError(f"not of type {kind.__name__}")
    found: T = reply
    return found


def items(reply: Any, count: int | None = None) -> Sequence[Any]:
    """An array, of ``count`` elements if that is given."""
    if not isinstance(reply, list) or (count is not None and len(reply) != count):
        raise TypeError(f"not an array{'' if count is None else f' of {count}'}")
    return reply


def whole(reply: Any) -> int:
    """A number, as from EXISTS, ZCOUNT or CLIENT ID."""
    return _of(int, reply)


def text(reply: Any) -> str:
    """A string that is text, as from TYPE or in INFO."""
    return _of(bytes, reply).decode("utf-8", "replace")


def bytes_list(reply: Any) -> list[bytes]:
    """Strings, as from PUBSUB CHANNELS."""
    return [_of(bytes, one) for one in items(reply)]


def seconds(reply: Any) -> float:
    """TIME, in seconds since 1970."""
    whole_seconds, microseconds = items(reply, 2)
    return int(_of(bytes, whole_seconds)) + int(_of(bytes, microseconds)) / 1_000_000


def greeting(reply: Any) -> tuple[tuple[int, ...], bool, bool]:
    """HELLO, in RESP3: the version, whether it is a primary, and whether it is a node of a cluster."""
    if reply[b"proto"] != 3:  # noqa: PLR2004
        raise ValueError("not RESP3")
    version = tuple(int(part) for part in re.findall(r"\d+", text(reply[b"version"]))[:3])
    return version, reply.get(b"role") == b"master", reply.get(b"mode") == b"cluster"


def slot_ranges(reply: Any) -> list[SlotRange]:
    """CLUSTER SLOTS; the host is empty if the node that was asked does not know its own address."""
    found: list[SlotRange] = []
    for first, last, (host, port, *_), *_ in items(reply):
        if not 0 <= whole(first) <= whole(last) < 16384:  # noqa: PLR2004 - so many slots a cluster has
            raise ValueError("no such slots")
        found.append((first, last, "" if host is None else text(host), whole(port)))
    return found


def scanned(reply: Any) -> tuple[int, list[bytes]]:
    """SCAN: the next cursor, and keys."""
    cursor, keys = items(reply, 2)
    return int(_of(bytes, cursor)), bytes_list(keys)


def address(reply: Any) -> tuple[str, int] | None:
    """SENTINEL GET-MASTER-ADDR-BY-NAME: host and port, or ``None`` for a name that is not known."""
    if reply is None:
        return None
    host, port = bytes_list(items(reply, 2))
    return host.decode(), int(port)


def info(reply: Any) -> dict[str, str]:
    """INFO: the values by their names."""
    pairs = (line.partition(":") for line in text(reply).splitlines() if ":" in line and not line.startswith("#"))
    return {name: value for name, _, value in pairs}


def counts(reply: Any) -> dict[bytes, int]:
    """PUBSUB NUMSUB: how many clients listen to each Redis channel."""
    flat = items(reply)
    return {_of(bytes, name): whole(count) for name, count in zip(flat[::2], flat[1::2], strict=True)}


def scored(reply: Any) -> list[tuple[bytes, float]]:
    """Members of a sorted set with their scores, in pairs, as RESP3 has them."""
    return [(_of(bytes, member), _score(score)) for member, score in items(reply)]


def _score(reply: Any) -> float:
    if reply.__class__ is not float or math.isnan(reply):
        raise TypeError("not a score")
    return float(reply)


def popped_one(reply: Any) -> tuple[str, list[tuple[bytes, float]]] | None:
    """BZPOPMIN: the key, and the one member with its score; ``None`` if nothing came in time."""
    if reply is None:
        return None
    key, member, score = items(reply, 3)
    return popped_many([key, [[member, score]]])


def popped_many(reply: Any) -> tuple[str, list[tuple[bytes, float]]] | None:
    """BZMPOP: the key, and its members with their scores; ``None`` if nothing came in time."""
    if reply is None:
        return None
    key, members = items(reply, 2)
    return _of(bytes, key).decode(), scored(members)
