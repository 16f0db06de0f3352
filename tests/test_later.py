"""Functions that are called later."""

from __future__ import annotations

import anyio
import pytest
from anyio import create_task_group

from anyio_channels.local.later import Later

pytestmark = pytest.mark.anyio


async def test_soon_is_once() -> None:
    """However often it is asked for before its turn, a function is called once; and again when it is asked for again."""
    calls: list[str] = []
    later = Later()

    def act() -> None:
        calls.append("act")

    async with create_task_group() as tasks:
        later.soon(act)  # before there is anybody to call it
        later.soon(act)
        tasks.start_soon(later.run)
        await anyio.wait_all_tasks_blocked()
        assert calls == ["act"]
        later.soon(act)
        await anyio.wait_all_tasks_blocked()
        assert calls == ["act", "act"]
        tasks.cancel_scope.cancel()


async def test_each_pause_is_its_own() -> None:
    """A short pause does not wait for a long one; without anybody to call it, nothing is called."""
    never = anyio.Event()
    called = anyio.Event()
    later = Later()
    later.after(0.001, called.set)
    async with create_task_group() as tasks:
        tasks.start_soon(later.run)
        await anyio.wait_all_tasks_blocked()
        later.after(3600, never.set)
        assert not called.is_set()
        later.after(0.001, called.set)  # a real pause, of the shortest kind
        await called.wait()
        tasks.cancel_scope.cancel()


async def test_a_function_has_one_pause() -> None:
    """However many ask for a call after a pause, there is one; when it has been made, another can be asked for."""
    calls: list[str] = []
    called = anyio.Event()
    later = Later()

    def act() -> None:
        calls.append("act")
        called.set()

    async with create_task_group() as tasks:
        tasks.start_soon(later.run)
        await anyio.wait_all_tasks_blocked()
        for _ in range(2):
            called = anyio.Event()
            for _ in range(100):
                later.after(0.001, act)
            await called.wait()
            await anyio.wait_all_tasks_blocked()
        assert calls == ["act", "act"]
        tasks.cancel_scope.cancel()
