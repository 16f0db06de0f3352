"""The life of an open layer: one event loop, and one task there that all the layer runs is below.

Rules:
- the layer's ``Life`` is its only state: new, opening, open, closing, closed. Nothing here keeps a second one.
- the task group is entered by ``open`` and left by ``leave``, in the same task: that of ``async with layer:``.
- until the layer is open, the opening call can be cancelled, and its task with it. From then on the task is shielded: a
  cancellation all around the layer closes it in order, and for that the connections are needed.
- the layer stays with the process that opened it: in a fork, which has its sockets too, every call says so.
- an error in the task is a bug of ours, and ends the block as a task group does. An error of the block is left as it is.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from threading import get_ident
from types import TracebackType
from typing import Any, Final, TypeVar

from anyio import TASK_STATUS_IGNORED, CancelScope, ClosedResourceError, Event, create_task_group
from anyio.abc import TaskGroup, TaskStatus
from anyio.lowlevel import current_token

from anyio_channels.contract.layer import BaseChannelLayer, Life
from anyio_channels.exceptions import in_a_fork
from anyio_channels.forks import in_each_child
from anyio_channels.wakeup import hold_interrupts, thread

__all__ = ["AtHome", "Home"]

T = TypeVar("T")
_NO_LOOP: Final = object()


class Home:
    """Where one layer lives while it is open."""

    _scope: CancelScope
    _ended: Event

    def __init__(self, layer: BaseChannelLayer) -> None:
        """``layer``: for its name and its ``Life``."""
        self._layer = layer
        self.token: Any = None
        """The event loop, by its native token."""
        self._tasks: TaskGroup | None = None
        self.thread: int = get_ident()
        """The thread of the event loop; that of the constructor as long as the layer was never opened."""

    async def open(self, run: Callable[..., Awaitable[None]]) -> None:
        """Start ``run(task_status=...)``, and return when it calls ``started()``.

        Raises what ``run`` raises before that, and leaves nothing running then; nor if cancelled.
        """
        hold_interrupts()
        self.token = current_token().native_token
        self.thread = get_ident()
        in_each_child(self, Home._disown)
        self._scope, self._ended = CancelScope(), Event()
        self._layer._life = Life.OPENING  # noqa: SLF001 - it is ours to lead
        tasks = self._tasks = create_task_group()
        await tasks.__aenter__()
        try:
            await tasks.start(self._live, run)
        except BaseException:
            self._layer._life = Life.NEW  # noqa: SLF001
            await tasks.__aexit__(None, None, None)
            raise
        self._scope.shield = True
        self._layer._life = Life.OPEN  # noqa: SLF001

    async def _live(
        self, run: Callable[..., Awaitable[None]], *, task_status: TaskStatus[None] = TASK_STATUS_IGNORED
    ) -> None:
        try:
            with self._scope:
                await run(task_status=task_status)
        finally:
            self._ended.set()

    def _disown(self) -> None:
        """In a fork no event loop is that of the layer, not even the one that goes on here."""
        self.token = _NO_LOOP

    async def stop(self) -> None:
        """End the task and wait for its end. The caller shields this."""
        self._scope.cancel()
        await self._ended.wait()

    async def leave(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Leave the task group, in which nothing runs any more."""
        tasks, self._tasks = self._tasks, None
        if tasks is None:
            return
        if tasks.cancel_scope.cancel_called:
            # The task failed: the task group knows what to do with the cancellation that it made.
            await tasks.__aexit__(exc_type, exc, traceback)
        else:
            # The error of the block is not the task group's, which would wrap it.
            await tasks.__aexit__(None, None, None)

    def require_open(self) -> None:
        """Raise unless the layer is open, and was opened in this event loop."""
        life = self._layer._life  # noqa: SLF001
        if life is not Life.OPEN:
            if life in (Life.CLOSING, Life.CLOSED):
                raise ClosedResourceError(f"{self._layer!r} is closed; open it again with 'async with layer:'")
            raise RuntimeError(
                f"{self._layer!r} is not open; write 'async with layer:' in the lifespan of the application"
            )
        if thread.state.running_loop() is not self.token:
            if self._layer._is_foreign:  # noqa: SLF001
                raise in_a_fork(repr(self._layer), self._layer._opened_by)  # noqa: SLF001
            raise RuntimeError(
                f"{self._layer!r} was opened in another event loop; it serves the event loop that opened it, "
                "so make one for each"
            )


class AtHome(BaseChannelLayer):
    """A layer that has a ``Home``, and calls something that is away when the layer is closed."""

    _home: Home
    _outage: tuple[type[Exception], ...]
    """What calls raise that fail because the layer is being closed, among other reasons."""

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the layer, also when cancelled."""
        try:
            await super().__aexit__(exc_type, exc, traceback)
        finally:
            await self._home.leave(exc_type, exc, traceback)

    async def _told(self, call: Awaitable[T]) -> T:
        """Await ``call``; if it fails because the layer is being closed, say that."""
        try:
            return await call
        except self._outage as error:
            self._raise_if_closed(error)
            raise

    def _raise_if_closed(self, error: Exception) -> None:
        if self._life is not Life.OPEN:
            raise ClosedResourceError(f"{self!r} was closed") from error
