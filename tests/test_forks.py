"""Ctrl-C and forks, in processes whose coverage is measured: what is protected from Ctrl-C on trio, and what a fork finds."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from layers_on_redis import Kind, both, new_prefix
from redis_server import RedisServer
from test_interrupts import run_script, url_of

from anyio_channels.wakeup import thread


@pytest.mark.parametrize("is_cancelled", [True, False])
def test_a_bell_whose_task_was_cancelled_just_now(is_cancelled: bool) -> None:
    """Where a signal handler cancels the task between looking and ringing, ringing does nothing; other errors are raised."""

    class Raced:
        """A future that the handler cancels when it has said that it is not done; or that fails."""

        def __init__(self, future: asyncio.Future[None]) -> None:
            self.future = future
            self.cancelled = future.cancelled

        def done(self) -> bool:
            return is_cancelled and self.future.cancel() and False

        def set_result(self, result: None) -> None:
            if not is_cancelled:
                raise RuntimeError("the event loop is closed")
            self.future.set_result(result)

    async def main() -> None:
        bell: Any = thread.state.new_bell()[0]
        bell.waiting = Raced(bell.waiting)
        if is_cancelled:
            bell.set()
            assert bell.waiting.cancelled()
        else:
            with pytest.raises(RuntimeError, match="the event loop is closed"):
                bell.set()

    asyncio.run(main())


FIRST_CALLS = """
import os, sys
from anyio_channels import InMemoryChannelLayer  # before trio is there

held = []


def clock():
    if "trio" in sys.modules:
        held.append(sys.modules["trio"].lowlevel.currently_ki_protected())
    return 0.0


async def nowait(name, *args):
    try:
        getattr(layer, name)(*args)
    except Exception as error:
        assert type(error).__name__ == "WouldBlock", repr(error)


async def call(name, *args):
    await getattr(layer, name)(*args)


async def subscribe():
    async with layer.subscribe("room"):
        pass


layer = InMemoryChannelLayer(clock=clock)
first_calls = [
    (nowait, "send_nowait", "a", {}),
    (nowait, "receive_nowait", "a"),
    (nowait, "group_send_nowait", "room", {}),
    (nowait, "statistics"),
    (call, "send", "a", {}),
    (call, "receive", "a"),
    (call, "group_send", "room", {}),
    (call, "group_add", "room", "a"),
    (call, "group_channels", "room"),
    (call, "new_channel"),
    (subscribe,),
]
if "--async-first" in sys.argv:
    import anyio
    anyio.run(layer.send, "a", {})
for first in first_calls:
    if not (child := os.fork()):
        layer.send_nowait("a", {})  # there is something to receive
        import trio
        trio.run(*first)
        assert first == (subscribe,) or held, first
        assert all(held), first
        sys.exit()
    assert os.waitpid(child, 0)[1] == 0, first
"""


@pytest.mark.parametrize(
    "before",
    [
        pytest.param((), id="first"),
        pytest.param(("--async-first",), id="asyncio before", marks=pytest.mark.slow),
    ],
)
def test_the_first_call_on_trio(before: tuple[str, ...], tmp_path: Path) -> None:
    """Whatever a program calls first on trio, and wherever it imports trio, no lock is taken where Ctrl-C could be raised."""
    (tmp_path / "first.py").write_text(FIRST_CALLS)
    run_script(tmp_path / "first.py", *before)


FORKS = """
import logging, os, sys, threading, time, warnings

import anyio
from anyio_channels import ChannelFull, InMemoryChannelLayer

warnings.simplefilter("ignore", DeprecationWarning)  # about forks in a process with threads


def in_child(check):
    if not (child := os.fork()):
        check()
        sys.exit()
    until = time.monotonic() + 30
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
        if time.monotonic() > until:
            os.kill(child, 9)
        time.sleep(0.001)
    assert ended == (child, 0), ended


entered, let_go = threading.Event(), threading.Event()


def clock():
    if threading.current_thread().name == "sender":
        entered.set()
        let_go.wait()
    return 0.0


async def use():
    async with layer, layer.subscribe("room") as inbox:
        await layer.group_send("room", {"n": 1})
        assert await inbox.receive() == {"n": 1}


def is_new():
    assert layer.statistics().sent == layer.statistics().groups == 0, layer.statistics()
    for name in (made, inbox.channel):
        try:
            layer.receive_nowait(name)
        except anyio.ClosedResourceError as error:
            assert "has ended" in str(error), error
        else:
            raise AssertionError(name)
    layer.send_nowait("b", {"n": 2})
    assert layer.receive_nowait("b") == {"n": 2}
    assert layer.statistics().received == 1
    for backend in ("asyncio", "trio"):
        anyio.run(use, backend=backend)


def is_closed():
    try:
        closed.send_nowait("a", {})
    except anyio.ClosedResourceError:
        return
    raise AssertionError


async def main():
    global made, inbox
    made = await layer.new_channel()
    inbox = layer.subscribe("room")
    await inbox.__aenter__()
    await closed.close()


closed, layer = InMemoryChannelLayer(), InMemoryChannelLayer(clock=clock)
anyio.run(main)
layer.send_nowait("a", {"n": 1})
sender = threading.Thread(target=layer.send_nowait, args=("a", {"n": 2}), name="sender")
sender.start()
entered.wait()  # it has the lock
in_child(is_new)
in_child(is_closed)
let_go.set()
sender.join()
assert layer.receive_nowait("a") == {"n": 1}, "the parent keeps what it has"
assert layer.receive_nowait("a") == {"n": 2}

stop = False
logging.disable()


def busy():
    while not stop:
        layer.group_send_nowait("room", {})  # it is full soon, which is noted for the log
        try:
            layer.send_nowait("a", {})
            layer.receive_nowait("a")
        except (ChannelFull, anyio.WouldBlock):
            pass


def works():
    layer.send_nowait("b", {"n": 2})
    assert layer.receive_nowait("b") == {"n": 2}
    layer.statistics()
    os._exit(0)


threads = [threading.Thread(target=busy) for _ in range(3)]
for one in threads:
    one.start()
for _ in range(10):
    in_child(works)
stop = True
for one in threads:
    one.join()
"""


def test_a_fork_while_threads_use_the_layer(tmp_path: Path) -> None:
    """A forked child has an empty layer, which works, whatever threads of its parent were doing; a closed one stays closed."""
    (tmp_path / "forks.py").write_text(FORKS)
    run_script(tmp_path / "forks.py")


FORK_ON_REDIS = """
import os, sys, threading, time, warnings

from anyio.from_thread import start_blocking_portal
from anyio_channels import create_channel_layer

warnings.simplefilter("ignore", DeprecationWarning)
url, prefix, backend = sys.argv[1:]
entered, let_go, is_armed = threading.Event(), threading.Event(), False


def clock():
    if is_armed and threading.current_thread() is not threading.main_thread():
        entered.set()
        let_go.wait()
    return time.monotonic()


async def receive(inbox):
    await layer.send(inbox.channel, {})
    return await inbox.receive()


with start_blocking_portal(backend) as portal:
    layer = create_channel_layer(url, prefix=prefix, clock=clock)
    with portal.wrap_async_context_manager(layer), portal.wrap_async_context_manager(layer.subscribe("room")) as inbox:
        is_armed = True
        receiving = portal.start_task_soon(receive, inbox)
        entered.wait()
        if not (child := os.fork()):
            layer.statistics()
            os._exit(0)
        until = time.monotonic() + 30
        while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
            if time.monotonic() > until:
                os.kill(child, 9)
            time.sleep(0.001)
        let_go.set()
        assert receiving.result(30) == {}
        assert ended == (child, 0), ended
"""


@both
@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_fork_while_a_layer_on_redis_is_busy(
    kind: Kind, backend: str, redis_server: RedisServer, tmp_path: Path
) -> None:
    """A forked child may look at the figures of its parent's layer, whatever the parent's event loop was doing."""
    (tmp_path / "forks.py").write_text(FORK_ON_REDIS)
    run_script(tmp_path / "forks.py", url_of(kind, redis_server), new_prefix(), backend)
