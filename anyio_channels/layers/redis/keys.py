"""Whose a key is: what lies under a prefix, and which other prefixes show themselves.

Rules:
- a prefix shows itself by the keys that name a group, say that it is used, or live for moments; never by a channel's key,
  which may as well be that of a longer name under a shorter prefix.
- pure functions on what SCAN and PUBSUB CHANNELS return.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

__all__ = [
    "glob_escaped",
    "group_names",
    "keys_of",
    "odd_keys",
    "other_prefixes",
    "prefixes_of_groups",
    "shown_prefixes",
]

_OTHER_PREFIX: Final = re.compile(rb"([^:].*?):(?:group:|room:|wake:|sent:|prefix(?:$|:\{))")
_SHOWN: Final = re.compile(rb"(.+?):(?:group:|prefix(?:$|:\{))")
_GROUP: Final = re.compile(rb"(.+?)__group__(.+)")
_OURS: Final = re.compile(
    rb"[\w.-]+(?:!)?|:group:[\w.-]+|:prefix(?:|:\{\d+\})|:(?:wake|room|sent):.*", re.ASCII | re.DOTALL
)


def glob_escaped(text: str) -> str:
    """Return the pattern that matches ``text`` and nothing else."""
    return re.sub(r"([*?\[\]\\^])", r"\\\1", text)


def other_prefixes(prefix: bytes, found: Iterable[bytes]) -> set[bytes]:
    """Return the longer prefixes that show themselves among the keys ``found``, which all begin with ``prefix``."""
    return {prefix + match[1] for key in found if (match := _OTHER_PREFIX.match(key[len(prefix) :]))}


def keys_of(prefix: bytes, found: set[bytes]) -> list[bytes]:
    """Return the keys that belong to ``prefix`` and to no longer one that shows itself among them."""
    others = other_prefixes(prefix, found)
    doomed: list[bytes] = []
    for key in found:
        rest = key[len(prefix) :]
        ours = rest.startswith(b":group:") or b":" not in rest
        if ours and not any(key.startswith(other) for other in others):
            doomed.append(key)
    return doomed


def shown_prefixes(found: Iterable[bytes]) -> set[bytes]:
    """Return the prefixes of the queue layer that show themselves among ``found``, keys of whatever prefix."""
    return {match[1] for key in found if (match := _SHOWN.match(key))}


def prefixes_of_groups(found: Iterable[bytes]) -> set[bytes]:
    """Return the prefixes of the pub/sub layer that show themselves among ``found``, names of Redis channels."""
    return {match[1] for name in found if (match := _GROUP.fullmatch(name))}


def group_names(prefix: bytes, found: Iterable[bytes]) -> dict[bytes, bytes]:
    """Return those of ``found``, names of Redis channels, that are groups of ``prefix``, with the names of the groups."""
    start = prefix + b"__group__"
    return {name: name[len(start) :] for name in found if name.startswith(start)}


def odd_keys(prefix: bytes, found: set[bytes]) -> set[bytes]:
    """Return those of ``found``, which begin with ``prefix``, that no layer of it makes, nor one of a longer prefix."""
    others = tuple(other_prefixes(prefix, found))
    return {
        key for key in found if not (others and key.startswith(others)) and _OURS.fullmatch(key[len(prefix) :]) is None
    }
