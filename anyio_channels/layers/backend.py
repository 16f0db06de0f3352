"""What a thread knows of the backend (asyncio or trio) that runs in it, asked as seldom as is safe.

Rules:
- nothing here refers to an event loop: only to anyio's class for the backend, which is the same for all its loops.
- a thread may run one backend after the other, or trio as a guest of asyncio. So what is kept is checked before use
  (``new_event``), or using it wrongly can only cost a checkpoint or delay one by ``YIELD_EVERY`` calls (``is_due``).
- anyio finds the backend anew in every call, through a context variable; that is most of the price of a check for
  cancellation, and the reason for this module.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

from anyio import Event, NoEventLoopError, current_effective_deadline, get_cancelled_exc_class
from anyio.abc import AsyncBackend
from anyio.lowlevel import checkpoint, current_token

__all__ = ["CANCELLED", "YIELD_EVERY", "ThreadState", "thread"]

YIELD_EVERY: Final = 48
"""Of so many calls in a row that need not wait, one lets the other tasks of the thread run."""

CANCELLED: Final = -math.inf
"""The effective deadline of a task whose cancel scope was cancelled."""


class ThreadState:
    """How many calls a thread may still make without giving way, and its backend as last seen."""

    __slots__ = ("_cancelled_class", "backend_class", "deadline", "left")

    deadline: Callable[[], float]
    backend_class: type[AsyncBackend] | None
    left: int

    def __init__(self) -> None:
        """Know nothing: the first call looks."""
        self.left = 0
        self.deadline = current_effective_deadline
        self.backend_class = None
        self._cancelled_class: type[BaseException] | None = None

    def is_due(self, calls: int = 1) -> bool:
        """Whether the running task should pass a checkpoint before its next ``calls`` calls."""
        self.left -= calls
        try:
            return self.left < 0 or self.deadline() == CANCELLED
        except RuntimeError:  # another backend than last time, or none
            return True

    async def give_way(self) -> None:
        """Pass a checkpoint: be cancelled, or let other tasks run."""
        if get_cancelled_exc_class() is not self._cancelled_class:
            self._look_up()
        self.left = YIELD_EVERY - 1
        await checkpoint()

    def new_event(self) -> tuple[Event, Any]:
        """Return a new event of the running backend, and the native token of the running loop."""
        backend_class = self.backend_class
        if backend_class is None or get_cancelled_exc_class() is not self._cancelled_class:
            backend_class = self._look_up()
        return backend_class.create_event(), backend_class.current_token()

    def running_loop(self) -> Any:
        """Return the native token of the loop that runs in this thread, or ``None``."""
        if self.backend_class is not None:
            with suppress(RuntimeError):  # another backend than last time, or none
                return self.backend_class.current_token()
        try:
            return current_token().native_token
        except NoEventLoopError:
            return None

    def _look_up(self) -> type[AsyncBackend]:
        backend_class = self.backend_class = current_token().backend_class
        self._cancelled_class = get_cancelled_exc_class()
        self.deadline = backend_class.current_effective_deadline
        return backend_class


class _Thread(threading.local):
    """The state of the running thread; one look-up here is cheaper than one for each attribute."""

    def __init__(self) -> None:
        self.state: ThreadState = ThreadState()


thread: Final = _Thread()
