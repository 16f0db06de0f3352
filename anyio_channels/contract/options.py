"""Checks for the options of layers. Each returns the value, or raises an error that names the option and its rule.

Rules:
- a value of the wrong type is a ``TypeError``, one out of range a ``ValueError``.
- ``bool`` is not a number here, although Python says it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

__all__ = ["require_callable", "require_choice", "require_clock", "require_count", "require_seconds"]


def require_seconds(option: str, value: object) -> float:
    """Return ``value`` if it is a positive, finite number, or raise naming ``option``."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{option} must be a number of seconds, not {value!r}")
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{option} must be a positive, finite number of seconds, not {value!r}")
    return value


def require_count(option: str, value: object) -> int:
    """Return ``value`` if it is a positive ``int``, or raise naming ``option``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{option} must be an int, not {value!r}")
    if value < 1:
        raise ValueError(f"{option} must be at least 1, not {value!r}")
    return value


def require_choice(option: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise ``ValueError`` naming ``option`` unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{option} must be one of {', '.join(map(repr, choices))}, not {value!r}")


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
