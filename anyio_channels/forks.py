"""What a forked child does first.

Rules:
- only the thread that forked is in the child. A lock that another one held stays held there for ever, and what that one was
  changing stays half changed: so locks are made anew, and what cannot be trusted becomes blank.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final, TypeVar
from weakref import WeakValueDictionary

__all__ = ["in_each_child"]

T = TypeVar("T")

_things: Final[WeakValueDictionary[tuple[int, Callable[[Any], object]], Any]] = WeakValueDictionary()
"""By ``id()``, for not all of them can be hashed."""


def in_each_child(thing: T, act: Callable[[T], object]) -> None:
    """Call ``act(thing)`` first in each forked child, for as long as ``thing`` is there; in the order of these calls."""
    _things[id(thing), act] = thing


def _begin() -> None:
    for (_, act), thing in tuple(_things.items()):
        act(thing)


with suppress(AttributeError):  # Windows has no fork
    os.register_at_fork(after_in_child=_begin)
