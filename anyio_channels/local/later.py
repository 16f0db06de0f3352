"""Plain functions that are called later, in a task of an open layer: soon, or after a while.

Rules:
- the code that finds work to do may be in the middle of a locked section, where neither waiting nor calling
  out is possible. So it says so here, by a plain function, and goes on.
- a function that is wanted soon is called once, however often it was asked for meanwhile.
- each pause is a task of its own: what waits for one server does not wait for another. A function has one pause at a time.
"""

from __future__ import annotations

from collections.abc import Callable

from anyio import Event, create_task_group, sleep
from anyio.abc import TaskGroup

__all__ = ["Later"]


class Later:
    """Calls functions later, while ``run()`` runs. Otherwise it remembers what is wanted soon, and has no pauses."""

    def __init__(self) -> None:
        """Start with nothing to do; to be called in the event loop that will run it."""
        self._wanted: dict[Callable[[], object], None] = {}
        self._bell = Event()
        self._tasks: TaskGroup | None = None
        self._waiting: set[Callable[[], object]] = set()

    def soon(self, act: Callable[[], object]) -> None:
        """Call ``act`` in the next round of the event loop. Callable anywhere in the loop's thread, also under a lock."""
        self._wanted[act] = None
        self._bell.set()

    def after(self, seconds: float, act: Callable[[], object]) -> None:
        """Call ``act`` after so many seconds, unless such a call of it is waiting already."""
        if self._tasks is not None and act not in self._waiting:
            self._waiting.add(act)
            self._tasks.start_soon(self._call_after, seconds, act)

    async def run(self) -> None:
        """Call what is wanted, until cancelled."""
        try:
            async with create_task_group() as tasks:
                self._tasks = tasks
                while True:
                    await self._bell.wait()
                    self._bell = Event()
                    wanted, self._wanted = self._wanted, {}
                    for act in wanted:
                        act()
        finally:
            self._tasks = None
            self._waiting.clear()

    async def _call_after(self, seconds: float, act: Callable[[], object]) -> None:
        await sleep(seconds)
        self._waiting.discard(act)
        act()
