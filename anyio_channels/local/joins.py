"""Joining a group, where that takes time: what becomes of it if the call fails or is cancelled.

Rules:
- a call that fails undoes what it has done, and nothing else: a membership that was there before stays, and so does one that
  another call makes at the same time.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager

from .directory import Directory

__all__ = ["Joins"]


class _UnderWay:
    """Calls that make the same membership at the same time."""

    __slots__ = ("count", "is_new")

    def __init__(self, *, is_new: bool) -> None:
        self.count = 0
        self.is_new = is_new


class Joins:
    """The joins of one layer that are under way."""

    def __init__(self, here: Directory) -> None:
        """``here``: knows who is a member."""
        self._here = here
        self._under_way: dict[tuple[str, str], _UnderWay] = {}

    @contextmanager
    def undone_by(self, undo: Callable[[], object], group: str, channel: str) -> Generator[None]:
        """Join in the block. If it fails, ``undo`` is called, unless ``channel`` is a member whatever this call did."""
        membership = (group, channel)
        under_way = self._under_way.get(membership)
        if under_way is None:
            under_way = self._under_way[membership] = _UnderWay(is_new=not self._here.has_member(group, channel))
        under_way.count += 1
        try:
            yield
        except BaseException:
            if under_way.is_new and under_way.count == 1:
                undo()
            raise
        else:
            under_way.is_new = False
        finally:
            under_way.count -= 1
            if not under_way.count:
                del self._under_way[membership]
