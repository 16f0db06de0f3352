"""What a thread knows of the backend (asyncio or trio) that runs in it, asked as seldom as is safe.

Rules:
- nothing here refers to an event loop: only to anyio's class for the backend, which is the same for all its loops.
- a thread may run one backend after the other, or trio as a guest of asyncio. So what is kept is checked before use
  (``new_event``), or using it wrongly can only cost a checkpoint or delay one by ``YIELD_EVERY`` calls (``is_due``).
- one task that waits once, of which there may be thousands at a time, waits at a future of its asyncio loop, which costs a
  third of an event. The loop is reached through anyio's token; trio has nothing of the kind, and waits at an event.
- anyio finds the backend anew in every call, through a context variable; that is most of the price of a check for
  cancellation, and the reason for this module.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, Final, Protocol

from anyio import Event, NoEventLoopError, current_effective_deadline, get_cancelled_exc_class
from anyio.abc import AsyncBackend
from anyio.lowlevel import checkpoint, current_token

__all__ = ["CANCELLED", "YIELD_EVERY", "Bell", "ThreadState", "thread"]

YIELD_EVERY: Final = 48
"""Of so many calls in a row that need not wait, one lets the other tasks of the thread run."""

CANCELLED: Final = -math.inf
"""The effective deadline of a task whose cancel scope was cancelled."""


class Bell(Protocol):
    """What one task waits at, once."""

    def set(self) -> object:
        """Ring, in the loop of the task that waits; again does nothing."""

    def wait(self) -> Awaitable[object]:
        """Wait for the ringing; to be called once."""


class _FutureBell:
    """A bell on an asyncio loop."""

    __slots__ = ("_future",)

    def __init__(self, loop: Any) -> None:
        self._future: Any = loop.create_future()

    def set(self) -> None:
        if not self._future.done():  # it was rung before, or the task was cancelled
            self._future.set_result(None)

    def wait(self) -> Awaitable[object]:
        future: Awaitable[object] = self._future
        return future


class ThreadState:
    """How many calls a thread may still make without giving way, and its backend as last seen."""

    __slots__ = ("_cancelled_class", "_has_futures", "backend_class", "deadline", "left")

    deadline: Callable[[], float]
    backend_class: type[AsyncBackend] | None
    left: int

    def __init__(self) -> None:
        """Know nothing: the first call looks."""
        self.left = 0
        self.deadline = current_effective_deadline
        self.backend_class = None
        self._cancelled_class: type[BaseException] | None = None
        self._has_futures: bool = False

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
        backend_class = self._running_backend()
        return backend_class.create_event(), backend_class.current_token()

    def new_bell(self) -> tuple[Bell, Any]:
        """Return a new bell for the running task, and the native token of the running loop."""
        backend_class = self._running_backend()
        loop = backend_class.current_token()
        return (_FutureBell(loop) if self._has_futures else backend_class.create_event()), loop

    def running_loop(self) -> Any:
        """Return the native token of the loop that runs in this thread, or ``None``."""
        if self.backend_class is not None:
            with suppress(RuntimeError):  # another backend than last time, or none
                return self.backend_class.current_token()
        try:
            return current_token().native_token
        except NoEventLoopError:
            return None

    def _running_backend(self) -> type[AsyncBackend]:
        """Return anyio's class for the backend that runs the task, as last seen if that still holds."""
        backend_class = self.backend_class
        if backend_class is None or get_cancelled_exc_class() is not self._cancelled_class:
            backend_class = self._look_up()
        return backend_class

    def _look_up(self) -> type[AsyncBackend]:
        token = current_token()
        backend_class = self.backend_class = token.backend_class
        self._has_futures = hasattr(token.native_token, "create_future")
        self._cancelled_class = get_cancelled_exc_class()
        self.deadline = backend_class.current_effective_deadline
        return backend_class


class _Thread(threading.local):
    """The state of the running thread; one look-up here is cheaper than one for each attribute."""

    def __init__(self) -> None:
        self.state: ThreadState = ThreadState()


thread: Final = _Thread()
