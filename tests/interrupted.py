"""Ctrl-C at chosen moments: run one scenario again and again, each time with SIGINT at another instruction of the package.

``test_interrupts.py`` runs it as a script, because a lock that is left held would stop the caller: ``python interrupted.py
LOOP UNIT MOST [URL PREFIX]``. UNIT is ``line`` or ``opcode``, of which MOST are chosen evenly, or ``timer``: MOST random
moments of a busy layer. It prints as JSON how many runs there were, how many of them ended by it, and what was wrong.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import signal
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any

import anyio
import redis.exceptions
import trio
from anyio.abc import TaskStatus
from conftest import LOOPS, here

import anyio_channels
from anyio_channels import ChannelFull, InMemoryChannelLayer, create_channel_layer

PATIENCE = 60
"""Seconds in which one run ends."""
interrupts: list[str] = []
"""How the runs that were interrupted have ended."""
PACKAGE = str(Path(anyio_channels.__file__).parent)


class Interrupt:
    """A trace function that raises SIGINT at one of the lines, or instructions, of the package."""

    def __init__(self, at: int, unit: str) -> None:
        self.at = at
        self.opcodes = unit == "opcode"
        self.count = 0
        self.place = ""

    def __call__(self, frame: FrameType, event: str, arg: Any) -> Any:
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = self.opcodes, not self.opcodes
        return self.step

    def step(self, frame: FrameType, event: str, arg: Any) -> Any:
        if event in ("line", "opcode"):
            self.count += 1
            if self.count == self.at:
                self.place = f"{frame.f_code.co_filename}:{frame.f_lineno}"
                signal.raise_signal(signal.SIGINT)
        return self.step


async def use_in_memory(layer: InMemoryChannelLayer, got: list[object]) -> None:
    """Everything that takes the lock, with readers and a sender that wait."""

    async def read(channel: str, count: int) -> None:
        for _ in range(count):
            got.append(await layer.receive(channel))  # noqa: PERF401 - what came before it was interrupted counts

    async def belong(task_status: TaskStatus[None]) -> None:
        async with layer.subscribe("room", on_gap="event") as inbox:
            task_status.started()
            for _ in range(2):
                got.append(await inbox.receive())  # noqa: PERF401 - as above

    async def send_when_room() -> None:
        await layer.send("full", {"n": 2}, wait=True)

    async with anyio.create_task_group() as tg:
        tg.start_soon(read, "a", 2)
        tg.start_soon(read, "a", 1)
        await tg.start(belong)
        await anyio.wait_all_tasks_blocked()
        for number in range(3):
            await layer.send("a", {"n": number})
        await layer.group_send("room", {"n": 1})
        name = await layer.new_channel()
        await layer.group_add("room", name)
        layer.group_send_nowait("room", {"n": 2})
        layer.send_nowait("b", {})
        got.append(layer.receive_nowait("b"))
        got.append(await layer.receive(name))
        await layer.group_discard("room", name)
        await layer.send("full", {"n": 1})
        tg.start_soon(send_when_room)
        await anyio.wait_all_tasks_blocked()
        got.append(await layer.receive("full"))
        got.append(await layer.receive("full"))
        layer.statistics()
        await layer.flush()


@trio.lowlevel.enable_ki_protection  # within trio's own start_soon() a Ctrl-C can lose a task, for which its nursery waits
async def storm(layer: Any) -> None:
    """Senders and readers that go on until they are interrupted."""

    async def read() -> None:
        async with layer.subscribe("room", overflow="drop_old") as inbox:
            async for _ in inbox:
                pass

    async def send(channel: str) -> None:
        while True:
            await layer.group_send("room", {"n": 1})
            await layer.send(channel, {"n": 1})
            await layer.receive(channel)

    async with layer, anyio.create_task_group() as tg:
        for number in range(5):
            tg.start_soon(read)
            tg.start_soon(send, f"c{number}")


async def use_redis(layer: Any, got: list[object]) -> None:
    """Sending and receiving on an inbox, a group and a normal channel, and closing in order."""

    async def read() -> None:
        got.append(await layer.receive("a"))

    async with layer, layer.subscribe("room") as inbox:
        async with anyio.create_task_group() as tg:
            tg.start_soon(read)
            await layer.send(inbox.channel, {"n": 1})
            await layer.group_send("room", {"n": 2})
            got.append(await inbox.receive())
            got.append(await inbox.receive())
            await anyio.wait_all_tasks_blocked()
            tg.cancel_scope.cancel()
        layer.statistics()


def drained(layer: InMemoryChannelLayer) -> int:
    """How many messages can be received: none that waits is promised to somebody who is gone."""
    count = 0
    for channel in tuple(here(layer).channels):
        with suppress(anyio.WouldBlock):
            while True:
                layer.receive_nowait(channel)
                count += 1
    return count


def run_storm(loop: str, seconds: float, url: str | None, prefix: str) -> list[str]:
    """Interrupt a busy layer so many seconds after its start, and return what was wrong.

    Between two steps of a task of the layer trio may be in anyio's code, which is not marked. Then the layer ends as by a bug.
    """
    layer = InMemoryChannelLayer() if url is None else create_channel_layer(url, prefix=prefix)
    backend, options = LOOPS[loop]

    def begin() -> None:
        signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
        # Again later, for the first may be lost where Python swallows exceptions, as in a callback of the garbage collector.
        signal.setitimer(signal.ITIMER_REAL, seconds, 2)
        try:
            anyio.run(storm, layer, backend=backend, backend_options=options)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

    error = interrupted(begin)
    signal.setitimer(signal.ITIMER_REAL, 0)
    if isinstance(error, BaseExceptionGroup):
        error = error.split(redis.exceptions.ConnectionError)[1]
    waiting = layer.statistics().waiting_receivers
    return ([] if error is None else [repr(error)]) + ([f"{waiting} wait"] if waiting else [])


def interrupted(call: Callable[[], object]) -> BaseException | None:
    """Call it, and return what it raised besides ``KeyboardInterrupt``. If it hangs, say where, and end the process."""
    faulthandler.dump_traceback_later(PATIENCE, exit=True)
    try:
        call()
    except KeyboardInterrupt as error:
        interrupts.append(repr(error))
        return None
    except BaseExceptionGroup as error:
        ours, others = error.split(KeyboardInterrupt)
        interrupts.extend(() if ours is None else (repr(ours),))
        return others
    except BaseException as error:  # noqa: BLE001 - it is told
        return error
    return None


def run(loop: str, interrupt: Interrupt, url: str | None, prefix: str) -> list[str]:
    """Run the scenario once, and return what was wrong."""
    layer: Any
    if url is None:
        layer = InMemoryChannelLayer(capacity=1, channel_capacity={"a": 10, "specific.*": 10})
    else:
        layer = create_channel_layer(url, prefix=prefix)
    got: list[object] = []
    backend, options = LOOPS[loop]
    wrong: list[str] = []

    async def main() -> None:
        with anyio.fail_after(30):
            await (use_in_memory if url is None else use_redis)(layer, got)

    sys.settrace(interrupt)
    error = interrupted(lambda: anyio.run(main, backend=backend, backend_options=options))
    sys.settrace(None)
    if error is not None:
        wrong.append(repr(error))
    figures = layer.statistics()
    ends = figures.received + figures.expired + figures.dropped_full + figures.discarded + figures.buffered_messages
    if figures.waiting_receivers:
        wrong.append(f"{figures.waiting_receivers} wait")
    if url is None:
        if figures.sent != ends:
            wrong.append(f"the books: {figures}")
        if figures.received != len(got):
            wrong.append(f"{figures.received} were taken, {len(got)} were returned")
        with suppress(ChannelFull):
            layer.send_nowait("b", {})
        there = layer.statistics().buffered_messages
        if drained(layer) != there:
            wrong.append("a message cannot be received")
    return [f"{interrupt.place}: {one}" for one in wrong]


def run_everywhere(loop: str, unit: str, most: int, url: str | None, prefix: str) -> list[str]:
    """Interrupt the scenario at so many lines or instructions, chosen evenly, and return what was wrong."""
    run(loop, Interrupt(0, unit), url, prefix)
    whole = Interrupt(0, unit)
    wrong = run(loop, whole, url, prefix)
    for number in range(most):
        wrong += run(loop, Interrupt(1 + number * whole.count // most, unit), url, prefix)
    return wrong


def main() -> None:
    """Do what the command line says."""
    loop, unit, count, *where = sys.argv[1:]
    url, prefix = where or (None, "")
    most = int(count)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell runs in the background ignores it
    if unit == "timer":
        logging.getLogger("anyio_channels").addHandler(logging.NullHandler())  # mailboxes are full now and then
        default = sys.unraisablehook
        sys.unraisablehook = lambda what: (
            None if what.exc_type is KeyboardInterrupt else default(what)
        )  # it is repeated
        warnings.simplefilter("ignore")  # it may strike in this file or in anyio, which then leave coroutines behind
        random = Random(1)
        wrong = [
            one
            for number in range(most)
            for one in run_storm(loop, random.uniform(0.005, 0.04), url, f"{prefix}{number}.")
        ]
    else:
        warnings.simplefilter("error")
        wrong = run_everywhere(loop, unit, most, url, prefix)
    sys.stdout.write(json.dumps({"runs": most, "interrupts": len(interrupts), "wrong": wrong}))


if __name__ == "__main__":
    main()
