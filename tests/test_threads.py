"""One layer, several event loops and threads at once: asyncio, trio, and none."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import anyio
import pytest
import trio
from anyio.from_thread import start_blocking_portal
from conftest import here

from anyio_channels import InMemoryChannelLayer

PAIRS = [("asyncio", "trio"), ("asyncio", "asyncio"), ("trio", "trio")]


def run_one(backend: str, function: Callable[[], Awaitable[object]]) -> None:
    anyio.run(function, backend=backend)


def run_all(*functions: tuple[str, Callable[[], Awaitable[object]]]) -> None:
    """Run each function in a thread and an event loop of its own; raise what any of them raises."""
    with ThreadPoolExecutor(len(functions)) as pool:
        futures = [pool.submit(run_one, backend, function) for backend, function in functions]
        for future in futures:
            future.result(60)


@pytest.mark.parametrize("backends", PAIRS, ids="-".join)
def test_ping_pong(backends: tuple[str, str]) -> None:
    """Two threads with a loop each send 10,000 messages to and fro; none is lost, and nobody sleeps for ever."""
    layer = InMemoryChannelLayer()

    async def play(mine: str, theirs: str) -> None:
        for number in range(5000):
            if mine == "ping":
                await layer.send(theirs, {"n": number})
            assert await layer.receive(mine) == {"n": number}
            if mine == "pong":
                await layer.send(theirs, {"n": number})

    run_all((backends[0], lambda: play("ping", "pong")), (backends[1], lambda: play("pong", "ping")))
    counts = layer.statistics()
    assert (counts.sent, counts.received, counts.waiting_receivers) == (10_000, 10_000, 0)


def test_a_thread_without_a_loop_wakes_readers() -> None:
    """send_nowait and group_send_nowait from a plain thread wake readers on asyncio and trio."""
    layer = InMemoryChannelLayer(capacity=1000)
    got: dict[str, list[int]] = {"asyncio": [], "trio": []}
    ready = threading.Barrier(3)

    async def read(backend: str) -> None:
        async with layer.subscribe("group") as inbox:
            await anyio.to_thread.run_sync(ready.wait)
            while len(got[backend]) < 1000:
                got[backend].append((await inbox.receive())["n"])

    def send() -> None:
        ready.wait()
        for number in range(1000):
            layer.group_send_nowait("group", {"n": number})

    sender = threading.Thread(target=send)
    sender.start()
    run_all(("asyncio", lambda: read("asyncio")), ("trio", lambda: read("trio")))
    sender.join()
    assert got == {"asyncio": list(range(1000)), "trio": list(range(1000))}


@pytest.mark.anyio
async def test_a_fresh_thread_wakes_a_reader() -> None:
    """A thread that has never run a loop, and knows of none, wakes a reader that waits."""
    layer = InMemoryChannelLayer()
    async with anyio.create_task_group() as tg:
        tg.start_soon(layer.receive, "a")
        await anyio.wait_all_tasks_blocked()
        thread = threading.Thread(target=layer.send_nowait, args=("a", {}))
        thread.start()
        thread.join()
    assert layer.statistics().received == 1


def test_a_loop_that_goes_on_takes_what_is_there() -> None:
    """A loop that stood still when its reader was called for a message finds that message when it runs again."""
    layer = InMemoryChannelLayer()
    loop, task = dead_asyncio_reader(layer, close=False)
    layer.send_nowait("a", {"n": 1})
    assert layer.statistics().waiting_receivers == 0
    assert loop.run_until_complete(task) == {"n": 1}
    loop.close()


def test_many_threads_one_channel() -> None:
    """Senders that wait and readers in four loops share one small channel: each message arrives once, and all end."""
    layer = InMemoryChannelLayer(capacity=3)
    got: list[int] = []

    async def send(first: int) -> None:
        for number in range(first, first + 500):
            await layer.send("a", {"n": number}, wait=True)

    async def read() -> None:
        for _ in range(500):
            got.append((await layer.receive("a"))["n"])  # noqa: PERF401 - appending shares the list between threads

    run_all(("asyncio", lambda: send(0)), ("trio", lambda: send(500)), ("asyncio", read), ("trio", read))
    assert sorted(got) == list(range(1000))
    assert layer.statistics().buffered_messages == 0


def test_exact_capacity_across_threads() -> None:
    """A hundred threads send at once to a channel of capacity 5: five are accepted."""
    layer = InMemoryChannelLayer(capacity=5)
    start = threading.Barrier(100)

    def send(number: int) -> bool:
        start.wait()
        with contextlib.suppress(layer.ChannelFull):
            layer.send_nowait("a", {"n": number})
            return True
        return False

    with ThreadPoolExecutor(100) as pool:
        assert sum(pool.map(send, range(100))) == 5


def dead_asyncio_reader(layer: InMemoryChannelLayer, *, close: bool) -> list[Any]:
    """Leave a reader waiting in an asyncio loop that never runs again; return what must stay alive for that."""
    loop = asyncio.new_event_loop()

    async def start() -> asyncio.Task[Any]:
        task = asyncio.ensure_future(layer.receive("a"))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        return task

    task = loop.run_until_complete(start())
    if close:
        task._log_destroy_pending = False  # type: ignore[attr-defined]
        loop.close()
    return [loop, task]


@pytest.mark.parametrize("close", [True, False], ids=["closed", "standing still"])
@pytest.mark.parametrize("waiting", [1, 2, 500])
def test_a_receiver_whose_asyncio_loop_died_swallows_nothing(waiting: int, *, close: bool) -> None:
    """A loop that was closed, or just never runs again, is passed over: the message is for the living."""
    layer = InMemoryChannelLayer()
    kept = [dead_asyncio_reader(layer, close=close) for _ in range(waiting)]
    assert layer.statistics().waiting_receivers == waiting
    layer.send_nowait("a", {"n": 1})

    async def read() -> None:
        with anyio.fail_after(5):
            assert await layer.receive("a") == {"n": 1}
            layer.send_nowait("a", {"n": 2})
            assert await layer.receive("a") == {"n": 2}

    anyio.run(read)
    anyio.run(read_after(layer), backend="trio")
    for loop, task in kept:
        if not close:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                loop.run_until_complete(task)
            loop.close()
    assert layer.statistics().waiting_receivers == 0


def read_after(layer: InMemoryChannelLayer) -> Callable[[], Awaitable[None]]:
    async def read() -> None:
        layer.send_nowait("a", {"n": 3})
        assert await layer.receive("a") == {"n": 3}

    return read


def test_a_receiver_whose_trio_run_ended_swallows_nothing() -> None:
    """Trio cancels what is left when a run ends; and a run that ended is passed over as well."""
    layer = InMemoryChannelLayer()

    async def leave() -> trio.lowlevel.TrioToken:
        async with anyio.create_task_group() as tg:
            tg.start_soon(layer.receive, "a")
            await anyio.wait_all_tasks_blocked()
            tg.cancel_scope.cancel()
        return trio.lowlevel.current_trio_token()

    token = anyio.run(leave, backend="trio")
    assert layer.statistics().waiting_receivers == 0
    # A reader that trio had no chance to cancel, as after a crash of the run: its token is all that is left.
    reader = here(layer).find("a")

    async def join() -> None:
        from anyio_channels.local.waiting import Waiter
        from anyio_channels.wakeup import thread

        waiter = Waiter(reader, thread.state.new_bell()[0], token)
        reader._take_or_join(waiter, in_front=False)

    anyio.run(join, backend="trio")
    assert layer.statistics().waiting_receivers == 1
    layer.send_nowait("a", {"n": 1})
    assert layer.receive_nowait("a") == {"n": 1}
    assert layer.statistics().waiting_receivers == 0


def test_a_reader_cancelled_in_its_own_loop_while_another_sends() -> None:
    """Cancellation in one thread races with sends from another 2,000 times: every message is found."""
    layer = InMemoryChannelLayer(capacity=10)
    got: list[int] = []
    rounds = 2000
    with start_blocking_portal("trio") as portal:

        async def read_with_time_out() -> None:
            with anyio.move_on_after(0.0002):  # short enough to race with the send; no outcome is wrong
                got.append((await layer.receive("a"))["n"])

        for number in range(rounds):
            future = portal.start_task_soon(read_with_time_out)
            layer.send_nowait("a", {"n": number})
            future.result(10)
            with contextlib.suppress(anyio.WouldBlock):
                got.append(layer.receive_nowait("a")["n"])
    assert got == list(range(rounds))


def test_backends_one_after_the_other_in_one_thread() -> None:
    """asyncio, trio, uvloop, none and asyncio again in one thread: what the thread knows of its backend is renewed."""
    layer = InMemoryChannelLayer()

    async def use() -> None:
        for number in range(5):
            await layer.send("a", {"n": number})
            assert await layer.receive("a") == {"n": number}
        async with anyio.create_task_group() as tg:
            tg.start_soon(layer.receive, "b")
            await anyio.wait_all_tasks_blocked()
            await layer.send("b", {})
        with anyio.CancelScope() as scope:
            scope.cancel()
            await layer.send("a", {})
        assert scope.cancelled_caught

    for backend, options in (("asyncio", {}), ("trio", {}), ("asyncio", {"use_uvloop": True}), ("trio", {})) * 2:
        layer.send_nowait("c", {})
        layer.receive_nowait("c")
        anyio.run(use, backend=backend, backend_options=options)


def test_an_async_call_without_a_loop_says_so() -> None:
    """The async methods need an event loop; the plain functions do not."""
    layer = InMemoryChannelLayer()
    for coroutine in (layer.send("a", {}), layer.receive("a"), layer.new_channel()):
        with pytest.raises(anyio.NoEventLoopError):
            coroutine.send(None)
        coroutine.close()


def test_trio_as_a_guest_of_asyncio() -> None:
    """In trio's guest mode both backends run in one thread; tasks of both meet on one layer."""
    layer = InMemoryChannelLayer()
    done: list[object] = []

    async def guest() -> None:
        for number in range(200):
            assert await layer.receive("to.trio") == {"n": number}
            await layer.send("to.asyncio", {"n": number})
        done.append("trio")

    async def host() -> None:
        loop = asyncio.get_running_loop()
        ended = loop.create_future()
        trio.lowlevel.start_guest_run(
            guest,
            run_sync_soon_threadsafe=loop.call_soon_threadsafe,
            done_callback=ended.set_result,
        )
        for number in range(200):
            await layer.send("to.trio", {"n": number})
            assert await layer.receive("to.asyncio") == {"n": number}
        (await ended).unwrap()

    asyncio.run(asyncio.wait_for(host(), 30))
    assert done == ["trio"]
