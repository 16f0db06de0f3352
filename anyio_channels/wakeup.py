"""Ring one task, in whatever loop it waits; know when to let others run. The one module that knows backends.

Rules:
- nothing here refers to an event loop for longer than a wait: only to anyio's class for the backend, which is the same for
  all its loops. Neither backend is imported: what a backend's own package offers is found through anyio's token and
  ``sys.modules``, with anyio's own tools behind it for any other backend.
- a thread may run one backend after the other, or trio as a guest of asyncio. So what is remembered is checked before use
  (``new_bell``), or using it wrongly can only cost a checkpoint or delay one by ``YIELD_EVERY`` calls (``is_due``).
- a task that waits once, of which there may be thousands at a time, waits at a bare future on asyncio, which costs a third
  of an event, and at trio's own event on trio, without anyio's around it.
- trio raises ``KeyboardInterrupt`` between any two instructions, except in functions that are marked. ``hold_interrupts``
  marks all code that a layer runs, coroutines too, so that trio raises it where the main task waits, as a cancellation. This
  is done when a backend is first seen or a layer is made, so calls cost nothing.
- anyio finds the backend anew in every call, through a context variable. That is most of the price of a check for
  cancellation, and the reason for remembering.
"""

from __future__ import annotations

import inspect
import math
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from types import CodeType, FunctionType, ModuleType, SimpleNamespace
from typing import Any, Final, Protocol

from anyio import Event, NoEventLoopError, current_effective_deadline, get_cancelled_exc_class
from anyio.abc import AsyncBackend
from anyio.lowlevel import checkpoint, current_token

__all__ = ["CANCELLED", "YIELD_EVERY", "Bell", "Ringable", "ThreadState", "held", "hold_interrupts", "thread"]

YIELD_EVERY: Final = 48
"""Of so many calls in a row that need not wait, one lets the other tasks of the thread run."""

CANCELLED: Final = -math.inf
"""The effective deadline of a task whose cancel scope was cancelled."""


class Ringable(Protocol):
    """What wakes one task."""

    def set(self) -> object:
        """Ring, in the loop of the task that waits. Ringing again does nothing."""


class Bell(Ringable, Protocol):
    """What one task waits at, once."""

    @property
    def waiting(self) -> Awaitable[object]:
        """Returns when the bell was rung; to be awaited once, by the task that made the bell."""


class _FutureBell:
    """A bell on an asyncio loop."""

    __slots__ = ("waiting",)

    def __init__(self, loop: Any) -> None:
        self.waiting: Any = loop.create_future()

    def set(self) -> None:
        if not self.waiting.done():  # it was rung before, or the task was cancelled
            try:
                self.waiting.set_result(None)
            except Exception:
                if not self.waiting.cancelled():  # it is if asyncio's handler of Ctrl-C ran between the two
                    raise


class _EventBell:
    """A bell on any other loop."""

    __slots__ = ("_event", "set")

    def __init__(self, event: Any) -> None:
        self._event: Any = event
        self.set: Callable[[], object] = event.set

    @property
    def waiting(self) -> Awaitable[object]:
        waiting: Awaitable[object] = self._event.wait()
        return waiting


class ThreadState:
    """How many calls a thread may still make without giving way, and its backend as last seen."""

    __slots__ = ("_cancelled_class", "_has_futures", "_make_event", "backend_class", "deadline", "left")

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
        self._make_event: Callable[[], Any] = Event

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
        return (_FutureBell(loop) if self._has_futures else _EventBell(self._make_event())), loop

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
        package = sys.modules.get(type(token.native_token).__module__.partition(".")[0])
        self._make_event = getattr(package, "Event", backend_class.create_event)
        self._cancelled_class = get_cancelled_exc_class()
        self.deadline = backend_class.current_effective_deadline
        hold_interrupts()
        return backend_class


class _Thread(threading.local):
    """The state of the running thread; one look-up here is cheaper than one for each attribute."""

    def __init__(self) -> None:
        self.state: ThreadState = ThreadState()


thread: Final = _Thread()

_PACKAGE: Final = __name__.partition(".")[0]
_NOT_OF_A_LAYER: Final = ("cli", "demo", "doctor", "portal", "sync", "testing", "wsgi")
"""Parts that run other people's code, or are programs of their own."""
held: Final[dict[str, int]] = {}
"""The modules in which trio raises no ``KeyboardInterrupt``, and how many names each had; empty until trio is seen."""


def hold_interrupts() -> None:
    """If trio is loaded, keep it from raising ``KeyboardInterrupt`` in the code of layers, except where the main task waits.

    Covers the modules that are loaded now. Calling it again is cheap.
    """
    trio = sys.modules.get("trio")
    enable = getattr(getattr(trio, "lowlevel", None), "enable_ki_protection", None)
    if enable is None:  # not there, or only half imported by another thread
        return
    for name, module in tuple(sys.modules.items()):
        package, _, rest = name.partition(".")
        is_ours = package == _PACKAGE and rest.partition(".")[0] not in _NOT_OF_A_LAYER
        if is_ours and isinstance(module, ModuleType):  # it is None if somebody forbade its import
            size = len(vars(module))
            if held.get(name) != size:  # it is new, or was being imported
                for code in _codes_of(module, name):
                    enable(SimpleNamespace(__code__=code))
                held[name] = size


def _codes_of(holder: ModuleType | type, module: str) -> Iterator[CodeType]:
    """Return the code of all functions that ``holder`` defines, with those inside them."""
    for value in tuple(vars(holder).values()):
        value = inspect.unwrap(getattr(value, "fget", value))  # noqa: PLW2901 - of a property, behind decorators
        if getattr(value, "__module__", None) != module:
            continue
        if isinstance(value, type):
            yield from _codes_of(value, module)
        elif isinstance(value, FunctionType):
            yield from _with_inner(value.__code__)


def _with_inner(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _with_inner(constant)
