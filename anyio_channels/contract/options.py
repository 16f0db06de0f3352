"""Checks for the options of layers. Each returns the value, or raises an error that names the option and its rule.

Rules:
- a value of the wrong type is a ``TypeError``, one out of range a ``ValueError``.
- ``bool`` is not a number here, although Python says it is.
- each bound is one that every layer keeps: within ``MOST_SECONDS``, times in milliseconds fit the integers of Redis, and
  the timers of every event loop and thread hold them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from anyio_channels.log import shown

__all__ = [
    "MOST_SECONDS",
    "require_callable",
    "require_choice",
    "require_clock",
    "require_count",
    "require_seconds",
]

MOST_SECONDS: Final = 10**9
"""The longest duration: 31 years."""
_MOST_COUNT: Final = 2**63 - 1


def require_seconds(option: str, value: object) -> float:
    """Return ``value`` if it is a positive number of seconds, at most ``MOST_SECONDS``, or raise naming ``option``."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{option} must be a number of seconds, not {value!r}")
    if not 0 < value < float("inf"):
        raise ValueError(f"{option} must be a positive, finite number of seconds, not {shown(value)}")
    if value > MOST_SECONDS:
        raise ValueError(f"{option} must be at most {MOST_SECONDS} seconds (31 years), not {shown(value)}")
    return value


def require_count(option: str, value: object, most: int = _MOST_COUNT) -> int:
    """Return ``value`` if it is an ``int`` from 1 to ``most``, or raise naming ``option``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{option} must be an int, not {value!r}")
    if value < 1:
        raise ValueError(f"{option} must be at least 1, not {shown(value)}")
    if value > most:
        raise ValueError(f"{option} must be at most {most}, not {shown(value)}")
    return value


def require_choice(option: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise ``ValueError`` naming ``option`` unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{option} must be one of {', '.join(map(repr, choices))}, not {shown(value)}")


def require_callable(option: str, value: Callable[[Any], Any] | None) -> Callable[[Any], Any] | None:
    """Return ``value`` if it is callable or ``None``, or raise naming ``option``."""
    if value is not None and not callable(value):
        raise TypeError(f"{option} must be callable, not {value!r}")
    return value


def require_clock(value: Callable[[], float]) -> Callable[[], float]:
    """Return ``value`` if it is a clock: a function without arguments that returns seconds."""
    if not callable(value):
        raise TypeError(f"clock must be a function that returns seconds, not {value!r}")
    return value
