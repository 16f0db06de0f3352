"""The in-memory layer, where the contract kit does not look: growth, logging, the plain functions, and odd moments."""

from __future__ import annotations

import asyncio
import gc
import math
import sys
import threading
from collections.abc import Callable
from typing import Any

import anyio
import pytest
from conftest import Clock, here
from ormsgpack import unpackb

from anyio_channels import ChannelFull, InMemoryChannelLayer, MessagesLost
from anyio_channels.layers.memory import channel_layer
from anyio_channels.local.waiting import Waiter

pytestmark = pytest.mark.anyio


async def test_plain_functions(layer: InMemoryChannelLayer) -> None:
    """send_nowait, receive_nowait and group_send_nowait do what their async twins do, without waiting."""
    with pytest.raises(anyio.WouldBlock):
        layer.receive_nowait("a")
    layer.send_nowait("a", {"n": 1})
    assert layer.receive_nowait("a") == {"n": 1}
    await layer.group_add("group", "a")
    await layer.group_add("group", "b")
    layer.group_send_nowait("group", {"n": 2}, exclude=("b",))
    assert layer.receive_nowait("a") == {"n": 2}
    with pytest.raises(anyio.WouldBlock):
        layer.receive_nowait("b")
    for _ in range(5):
        layer.send_nowait("a", {})
    with pytest.raises(ChannelFull, match="channel 'a' holds 5 unexpired messages, its capacity"):
        layer.send_nowait("a", {})
    for call in (layer.send_nowait, layer.group_send_nowait):
        with pytest.raises(TypeError, match="name must be"):
            call(["a"], {})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="name must be"):
        layer.receive_nowait("no name")
    with pytest.raises(TypeError, match="exclude must be a collection of channel names, not 5"):
        layer.group_send_nowait("group", {}, exclude=5)  # type: ignore[arg-type]


async def test_receive_nowait_leaves_what_is_promised(layer: InMemoryChannelLayer) -> None:
    """A message that woke a waiting reader is that reader's: whoever does not wait cannot overtake it."""
    got: list[Any] = []

    async def read() -> None:
        got.append(await layer.receive("a"))

    async with anyio.create_task_group() as tg:
        tg.start_soon(read)
        await anyio.wait_all_tasks_blocked()
        layer.send_nowait("a", {"n": 1})
        with pytest.raises(anyio.WouldBlock):
            layer.receive_nowait("a")
        layer.send_nowait("a", {"n": 2})
        assert layer.receive_nowait("a") == {"n": 1}
    assert got == [{"n": 2}]


async def test_never_opened_or_closed_needs_nothing() -> None:
    """The ready-made layer works without ``async with``; and with it, again and again."""
    await channel_layer.send("a", {"n": 1})
    assert await channel_layer.receive("a") == {"n": 1}
    for _ in range(2):
        async with channel_layer:
            await channel_layer.send("a", {"n": 1})
            assert channel_layer.statistics().sent >= 1
        with pytest.raises(anyio.ClosedResourceError, match="closed; open it again with 'async with layer:'"):
            await channel_layer.send("a", {})
        with pytest.raises(anyio.ClosedResourceError):
            channel_layer.receive_nowait("a")
    async with channel_layer:
        counts = channel_layer.statistics()
        assert (counts.sent, counts.buffered_messages, counts.discarded) == (0, 0, 0)
    await channel_layer.open()  # as it was before this test, for others


@pytest.mark.slow
async def test_a_hundred_thousand_unread_channels_leave_nothing(clock: Clock) -> None:
    """Channels that were sent a message each and never read leave the layer as small as it was, once they expired."""
    layer = InMemoryChannelLayer(clock=clock, expiry=10)
    for number in range(100_000):
        layer.send_nowait(f"reply.{number}", {"n": number})
    clock.advance(10)
    counts = layer.statistics()
    assert (counts.channels, counts.buffered_messages, counts.expired) == (0, 0, 100_000)
    assert len(here(layer).channels) == len(here(layer).mailroom.index) == 0


async def test_expired_messages_are_reclaimed_by_the_way(clock: Clock) -> None:
    """Traffic on one channel reclaims what expired on others, a few at each call, without statistics() or a scan."""
    layer = InMemoryChannelLayer(clock=clock, expiry=10)
    for number in range(1000):
        layer.send_nowait(f"reply.{number}", {"n": number})
    clock.advance(10)
    for _ in range(1000):
        layer.send_nowait("busy", {})
        layer.receive_nowait("busy")
    assert set(here(layer).channels) == {"busy"}


async def test_channels_that_come_and_go_leave_nothing(clock: Clock) -> None:
    """Connections, reply channels and groups by the thousand do not pile up."""
    layer = InMemoryChannelLayer(clock=clock)
    async with layer.subscribe("lobby"):
        for number in range(6000):
            async with layer.subscribe("lobby", f"user.{number}") as inbox:
                await layer.send(inbox.channel, {})
            name = await layer.new_channel()
            await layer.send(name, {})
            await layer.receive(name)
            await layer.group_add(f"group.{number}", name)
            await layer.group_discard(f"group.{number}", name)
            if not number % 1000:
                clock.advance(layer.expiry)
        counts = layer.statistics()
        assert (counts.channels, counts.groups, counts.members) == (1, 1, 1)
        assert len(here(layer).channels) < 3000
        assert len(here(layer).mailroom.index) < 5000


async def test_a_wait_that_is_cancelled_again_and_again_leaves_nothing(layer: InMemoryChannelLayer) -> None:
    """A reader that looks for a message with a time-out, for ever, leaves no trace of its attempts."""
    for _ in range(1000):
        with anyio.move_on_after(0):
            await layer.receive("a")
    assert layer.statistics().waiting_receivers == 0
    assert here(layer).channels["a"].idle


async def test_one_broadcast_is_one_copy(layer: InMemoryChannelLayer) -> None:
    """All members hold the same bytes until they receive."""
    for number in range(100):
        await layer.group_add("group", f"a.{number}")
    await layer.group_send("group", {"text": "x" * 1000})
    held = {id(channel.entries[0][1]) for channel in here(layer).channels.values()}
    assert len(held) == 1


def lines_run(call: Callable[[], object]) -> int:
    """Return how many lines of Python ``call`` runs, in a thread of its own, which no other tool is tracing."""
    lines = 0

    def trace(_frame: object, event: str, _: object) -> Any:
        nonlocal lines
        lines += event == "line"
        return trace

    def run() -> None:
        sys.settrace(trace)
        call()
        sys.settrace(None)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return lines


async def test_no_call_looks_at_other_channels(layer: InMemoryChannelLayer) -> None:
    """Sending, receiving and broadcasting run as many lines beside 5,000 full channels and groups as beside none."""

    def calls() -> None:
        layer.send_nowait("a", {})
        layer.receive_nowait("a")
        layer.group_send_nowait("group", {})
        layer.receive_nowait("a")

    await layer.group_add("group", "a")
    calls()
    alone = lines_run(calls)
    for number in range(5000):
        layer.send_nowait(f"other.{number}", {})
        await layer.group_add(f"group.{number}", f"other.{number}")
    assert 0 < lines_run(calls) <= alone + 5


async def test_a_full_member_is_logged_once(
    layer: InMemoryChannelLayer, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    """Misses are counted each, and logged once per group and expiry; each line says how many since the last."""
    async with layer.subscribe("group", capacity=1), layer.subscribe("group", capacity=1):
        await layer.group_send("group", {})
        for _ in range(5):
            await layer.group_send("group", {})
        first = "group 'group': 2 of its members were full and missed a message; more such are counted, and told later"
        assert [record.getMessage() for record in caplog.records] == [first]
        clock.advance(10)
        await layer.group_send("group", {})
        await layer.group_send("group", {})
        assert [record.getMessage() for record in caplog.records] == [
            first,
            "group 'group': in the last 10 s, members that were full missed 8 more messages",
        ]
        assert layer.statistics().dropped_full == 12
    await layer.close()
    assert [record.__dict__["anyio_channels_count"] for record in caplog.records] == [2, 8, 2]


async def test_expiry_is_a_gap_too(layer: InMemoryChannelLayer, clock: Clock) -> None:
    """An inbox whose reader was too slow hears of what expired, joined with what overflowed before and behind it."""
    async with layer.subscribe("group", capacity=2, on_gap="event") as inbox:
        for number in range(3):
            await layer.group_send("group", {"n": number})
        clock.advance(10)
        await layer.group_send("group", {"n": 3})
        gap = {"type": "channel_layer.gap", "missed": 3}
        assert [layer.receive_nowait(inbox.channel), await inbox.receive()] == [gap, {"n": 3}]
        await layer.group_send("group", {"n": 4})
        clock.advance(5)
        await layer.group_send("group", {"n": 5})
        await layer.group_send("group", {"n": 6})
        clock.advance(5)
        assert layer.statistics().buffered_messages == 1
        assert await inbox.receive() == {"type": "channel_layer.gap", "missed": 1}
        assert await inbox.receive() == {"n": 5}
        assert await inbox.receive() == {"type": "channel_layer.gap", "missed": 1}
        with pytest.raises(anyio.WouldBlock):
            layer.receive_nowait(inbox.channel)
    counts = layer.statistics()
    assert (counts.sent, counts.expired, counts.dropped_full, counts.received) == (7, 3, 2, 2)


async def test_gaps_take_no_room(layer: InMemoryChannelLayer) -> None:
    """With drop_old and with drop_new an inbox holds its full capacity of messages beside its gaps."""
    for overflow, numbers in (("drop_new", [0, 1]), ("drop_old", [4, 5])):
        async with layer.subscribe("group", capacity=2, overflow=overflow, on_gap="raise") as inbox:  # type: ignore[arg-type]
            for number in range(6):
                await layer.group_send("group", {"n": number})
            got: list[object] = []
            while len(got) < 3:
                try:
                    got.append((await inbox.receive())["n"])
                except MessagesLost as lost:
                    got.append(lost.missed)
            assert sorted(got, key=str) == sorted([*numbers, 4], key=str)
            with pytest.raises(anyio.WouldBlock):
                layer.receive_nowait(inbox.channel)


async def test_a_lone_message_makes_way_for_a_newer_one(layer: InMemoryChannelLayer) -> None:
    """An inbox of one message with drop_old always has the newest; send() to it never raises ChannelFull."""
    async with layer.subscribe("group", capacity=1, overflow="drop_old") as inbox:
        for number in range(3):
            await layer.send(inbox.channel, {"n": number})
        await layer.send(inbox.channel, {"n": 3}, wait=True)
        assert await inbox.receive() == {"n": 3}
    assert layer.statistics().dropped_full == 3


async def test_a_gap_wakes_a_second_reader(layer: InMemoryChannelLayer) -> None:
    """If one reader was called for the message that fills an inbox, the gap behind it is for the next."""
    got: list[Any] = []
    async with layer.subscribe("group", capacity=1, on_gap="event") as inbox, anyio.create_task_group() as tg:

        async def read() -> None:
            got.append(await inbox.receive())

        for _ in range(2):
            tg.start_soon(read)
        await anyio.wait_all_tasks_blocked()
        layer.group_send_nowait("group", {"n": 1})
        layer.group_send_nowait("group", {"n": 2})
        await anyio.wait_all_tasks_blocked()
        assert sorted(got, key=len) == [{"n": 1}, {"type": "channel_layer.gap", "missed": 1}]


async def test_waiting_senders_and_those_who_do_not_wait(layer: InMemoryChannelLayer, clock: Clock) -> None:
    """A sender that waits keeps its place when somebody else takes the room; freed room serves as many as fit."""
    done: list[int] = []

    async def send(number: int) -> None:
        await layer.send("a", {"n": number}, wait=True)
        done.append(number)

    async with anyio.create_task_group() as tg:
        for _ in range(5):
            layer.send_nowait("a", {"n": 0})
        for number in (1, 2, 3):
            tg.start_soon(send, number)
            await anyio.wait_all_tasks_blocked()
        layer.receive_nowait("a")
        layer.send_nowait("a", {"n": 9})  # takes the room that the first was called for
        await anyio.wait_all_tasks_blocked()
        assert done == []
        layer.receive_nowait("a")
        await anyio.wait_all_tasks_blocked()
        assert done == [1]
        layer.receive_nowait("a")
        layer.receive_nowait("a")
        layer.receive_nowait("a")  # room for one more than wait
        tg.start_soon(send, 4)  # comes while two were called and have not come: there is room for it as well
        await anyio.wait_all_tasks_blocked()
        assert sorted(done) == [1, 2, 3, 4]
    assert [layer.receive_nowait("a")["n"] for _ in range(5)][:2] == [9, 1]


async def test_a_full_channel_accepts_at_the_moment_its_messages_expire(
    layer: InMemoryChannelLayer, clock: Clock
) -> None:
    """What has expired takes no room, however much else fell due at the same time and has not been looked at."""
    for number in range(20):
        layer.send_nowait(f"other.{number}", {})
    for _ in range(5):
        layer.send_nowait("a", {})
    clock.advance(10)
    layer.send_nowait("a", {"n": 1})
    assert layer.receive_nowait("a") == {"n": 1}


@pytest.mark.parametrize("by", ["receiving", "expiry"])
async def test_a_sender_who_waits_is_not_overtaken(by: str, layer: InMemoryChannelLayer, clock: Clock) -> None:
    """Room belongs to whoever waited first, also between the moment it is made and the moment that sender runs again."""
    layer = InMemoryChannelLayer(clock=clock, capacity=1, expiry=10)
    for _ in range(2):  # the sender that comes later gives way in one of many calls: at most once here
        got: list[Any] = []
        begin = anyio.Event()

        async def read(got: list[Any] = got, begin: anyio.Event = begin) -> None:
            await begin.wait()
            got += [await layer.receive("a"), await layer.receive("a")]

        layer.send_nowait("a", {"n": 0})
        async with anyio.create_task_group() as tg:
            tg.start_soon(read)
            tg.start_soon(lambda: layer.send("a", {"n": 1}, wait=True))
            await anyio.wait_all_tasks_blocked()
            begin.set()
            if by == "receiving":
                layer.receive_nowait("a")
            else:
                clock.advance(10)
            with anyio.fail_after(10):
                await layer.send("a", {"n": 2}, wait=True)
        assert got == [{"n": 1}, {"n": 2}]


async def test_flush_and_expiry_make_room_for_waiting_senders(layer: InMemoryChannelLayer, clock: Clock) -> None:
    """Room that comes without a receive is given to senders that wait: by a flush, and by expiry."""

    async def fill_and_wait(tg: anyio.abc.TaskGroup) -> None:
        for _ in range(5):
            layer.send_nowait("a", {"n": 0})
        tg.start_soon(lambda: layer.send("a", {"n": 1}, wait=True))
        await anyio.wait_all_tasks_blocked()

    async with anyio.create_task_group() as tg:
        await fill_and_wait(tg)
        await layer.flush()
        assert await layer.receive("a") == {"n": 1}
        await fill_and_wait(tg)
        clock.advance(10)
        layer.statistics()
        assert await layer.receive("a") == {"n": 1}


async def test_a_waiting_sender_is_woken_by_expiry_itself() -> None:
    """Nobody needs to touch the layer for a waiting sender to get the room of an expired message."""
    layer = InMemoryChannelLayer(capacity=1, expiry=0.05)  # real time: the timer itself is what is tested
    await layer.send("a", {"n": 1})
    with anyio.fail_after(10):
        await layer.send("a", {"n": 2}, wait=True)
    assert await layer.receive("a") == {"n": 2}


async def test_a_promise_that_expires_or_is_flushed(layer: InMemoryChannelLayer, clock: Clock) -> None:
    """A reader called for a message that is gone when it comes goes on waiting, first in the line."""
    got: list[Any] = []

    async def read(reader: int) -> None:
        got.append((reader, await layer.receive("a")))

    async with anyio.create_task_group() as tg:
        for reader in range(2):
            tg.start_soon(read, reader)
            await anyio.wait_all_tasks_blocked()
        layer.send_nowait("a", {"n": 1})
        clock.advance(10)
        await anyio.wait_all_tasks_blocked()
        assert got == []
        layer.send_nowait("a", {"n": 2})
        await anyio.wait_all_tasks_blocked()
        assert got == [(0, {"n": 2})]
        tg.cancel_scope.cancel()


async def test_an_idle_channel_dropped_under_a_waiter(layer: InMemoryChannelLayer, monkeypatch: Any) -> None:
    """Another thread may drop an idle channel between a task's finding it and waiting at it: it finds it again."""
    for send in (False, True):
        finder = "_find" if send else "_source"
        original = getattr(layer, finder)
        dropped = False

        def get(name: str, original: Any = original) -> Any:
            nonlocal dropped
            channel = original(name)
            if not dropped:
                dropped = True
                here(layer).forget(channel)
            return channel

        monkeypatch.setattr(layer, finder, get)
        if send:
            await layer.send("b", {"n": 1}, wait=True)
            assert layer.receive_nowait("b") == {"n": 1}
        else:
            async with anyio.create_task_group() as tg:
                tg.start_soon(layer.receive, "a")
                await anyio.wait_all_tasks_blocked()
                layer.send_nowait("a", {})
        assert dropped
        monkeypatch.undo()


async def test_members_that_expire_and_come_again(layer: InMemoryChannelLayer, clock: Clock) -> None:
    """Memberships are renewed in the order of joining; an inbox's own is not shortened by group_add."""
    async with layer.subscribe("group") as inbox:
        await layer.group_add("group", inbox.channel)
        await layer.group_add("group", "a")
        clock.advance(60)
        await layer.group_add("group", "b")
        await layer.group_add("group", "a")
        clock.advance(60)
        assert await layer.group_channels("group") == {inbox.channel, "a", "b"}
        clock.advance(60)
        assert await layer.group_channels("group") == {inbox.channel}
        await layer.group_discard("group", inbox.channel)
        assert await layer.group_channels("group") == set()
    assert not here(layer).groups


async def test_a_renewed_membership_does_not_hold_up_the_others(layer: InMemoryChannelLayer, clock: Clock) -> None:
    """Whoever joins again expires later than those who joined meanwhile, and they expire in their own time."""
    await layer.group_add("group", "a")
    clock.advance(10)
    await layer.group_add("group", "b")
    clock.advance(50)
    await layer.group_add("group", "a")
    clock.advance(50)
    assert await layer.group_channels("group") == {"a"}
    assert layer.statistics().members == 1


async def test_a_group_in_which_nothing_could_expire_for_a_while(layer: InMemoryChannelLayer, clock: Clock) -> None:
    """Memberships expire by themselves in a group that had none of that kind for so long that it was forgotten."""
    async with layer.subscribe("group"):
        await layer.group_add("group", "a")
        await layer.group_discard("group", "a")
        for number in range(2000):
            layer.send_nowait(f"other.{number}", {})
        await layer.group_add("group", "a")
        clock.advance(100)
        assert layer.statistics().members == 1


async def test_a_group_of_someone_else_is_no_trace(layer: InMemoryChannelLayer, clock: Clock) -> None:
    """Groups whose memberships all expired are reclaimed without anybody touching them."""
    for number in range(100):
        await layer.group_add(f"group.{number}", "a")
    clock.advance(99)
    assert layer.statistics().members == 100
    clock.advance(1)
    counts = layer.statistics()
    assert (counts.groups, counts.members) == (0, 0)


async def test_leaving_a_closed_layer(layer: InMemoryChannelLayer) -> None:
    """A block may be left after its layer was closed; who waited in it got ClosedResourceError."""
    async with layer:
        async with layer.subscribe("group") as inbox:
            await layer.close()
            with pytest.raises(anyio.ClosedResourceError):
                await inbox.receive()
            with pytest.raises(anyio.ClosedResourceError):
                await inbox.leave("group")
        assert layer.statistics().channels == 0


async def test_a_coroutine_thrown_away_gives_back(layer: InMemoryChannelLayer) -> None:
    """A reader whose coroutine is garbage-collected, even in the middle of another call, keeps no message."""
    reader = layer.receive("a")
    waiting: Any = None
    if anyio.get_cancelled_exc_class() is asyncio.CancelledError:
        waiting = reader.send(None)  # runs to its wait, without a task to wake
    else:
        reader.close()
    layer.send_nowait("a", {"n": 1})
    here(layer).mailroom.lock.acquire()  # as if the collection ran within a locked section
    try:
        reader.close()
        assert bool(here(layer).mailroom.abandoned) == (waiting is not None)
    finally:
        here(layer).mailroom.lock.release()
    gc.collect()
    here(layer).mailroom.wake([])
    assert layer.receive_nowait("a") == {"n": 1}
    assert layer.statistics().waiting_receivers == 0


async def test_every_call_gives_way_in_time(layer: InMemoryChannelLayer) -> None:
    """Whatever mix of calls a task makes, others run at least once in YIELD_EVERY of them; broadcasts count for more."""
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await anyio.lowlevel.checkpoint()

    async with anyio.create_task_group() as tg:
        tg.start_soon(other)
        calls = 0
        while calls < 10 * layer.YIELD_EVERY:
            await layer.group_add("group", "a")
            await layer.group_channels("group")
            await layer.group_discard("group", "a")
            await layer.new_channel()
            await layer.group_send("group", {})
            calls += 5
        assert turns >= 9
        for number in range(8 * layer.YIELD_EVERY):
            await layer.group_add("large", f"m.{number}")
        before = turns
        for _ in range(5):
            await layer.group_send("large", {})
        assert turns - before >= 4
        tg.cancel_scope.cancel()


async def test_repr_names_no_contents(layer: InMemoryChannelLayer) -> None:
    """A layer says what it is, and nothing that was sent."""
    await layer.send("a", {"password": "secret"})
    assert repr(layer) == "<InMemoryChannelLayer expiry=10 capacity=5>"


async def test_time_may_be_fractions(clock: Clock) -> None:
    """Durations are seconds, and fractions of them count."""
    layer = InMemoryChannelLayer(clock=clock, expiry=0.25, group_expiry=0.5)
    await layer.send("a", {})
    await layer.group_add("group", "b")
    clock.advance(0.24)
    assert layer.statistics().buffered_messages == 1
    clock.advance(0.02)
    assert layer.statistics().expired == 1
    clock.advance(0.3)
    assert await layer.group_channels("group") == set()
    layer.statistics()
    assert math.isinf(here(layer).mailroom.index.next_due)


async def test_an_expired_message_in_front_of_a_fresh_one(layer: InMemoryChannelLayer, clock: Clock) -> None:
    """Receiving passes over what has expired."""
    layer.send_nowait("a", {"n": 1})
    clock.advance(5)
    layer.send_nowait("a", {"n": 2})
    clock.advance(5)
    assert layer.receive_nowait("a") == {"n": 2}


async def test_iterating_over_an_inbox(layer: InMemoryChannelLayer) -> None:
    """``async for`` receives one message after the other."""
    async with layer.subscribe("group") as inbox:
        for number in range(3):
            await layer.group_send("group", {"n": number})
        got = []
        async for message in inbox:
            got.append(message["n"])
            if len(got) == 3:
                break
    assert got == [0, 1, 2]


async def test_errors_of_the_clock_pass(layer: InMemoryChannelLayer) -> None:
    """A TypeError that is not about the name comes out as it is."""

    def broken() -> float:
        raise TypeError("no time")

    with pytest.raises(TypeError, match="no time"):
        InMemoryChannelLayer(clock=broken).send_nowait("a", {})


async def test_a_message_that_comes_before_the_wait(layer: InMemoryChannelLayer) -> None:
    """Another thread may send between a reader's look and its wait: it does not wait then, and makes room for others."""
    channel = here(layer).find("a")
    for number in range(5):
        layer.send_nowait("a", {"n": number})
    async with anyio.create_task_group() as tg:
        tg.start_soon(lambda: layer.send("a", {"n": 5}, wait=True))
        await anyio.wait_all_tasks_blocked()
        item = await channel.take()
        assert isinstance(item, bytes)
        assert unpackb(item) == {"n": 0}
    assert [layer.receive_nowait("a")["n"] for _ in range(5)] == [1, 2, 3, 4, 5]


def first_in_line(layer: InMemoryChannelLayer) -> Waiter:
    """The first of those who wait for a message and were promised none."""
    readers = here(layer).channels["a"]._readers
    assert readers
    return next(iter(readers))


async def test_a_coroutine_thrown_away_during_a_call_of_its_own_thread(layer: InMemoryChannelLayer) -> None:
    """What gave up within a locked section is given back when the section ends."""
    got: list[Any] = []

    async def read() -> None:
        got.append(await layer.receive("a"))

    async with anyio.create_task_group() as tg:
        for _ in range(2):
            tg.start_soon(read)
        await anyio.wait_all_tasks_blocked()
        layer.send_nowait("a", {"n": 1})
        with here(layer).mailroom:
            here(layer).mailroom.abandon(first_in_line(layer))  # the second, who still waits
        tg.cancel_scope.cancel()
    assert layer.statistics().waiting_receivers == 0


async def test_a_promise_given_up_during_a_call_of_ones_own_thread(layer: InMemoryChannelLayer) -> None:
    """What gave up within a locked section, and was promised a message, leaves it to the next as soon as the section ends."""
    got: list[Any] = []

    async def read(number: int) -> None:
        got.append((number, await layer.receive("a")))

    async with anyio.create_task_group() as tg:
        for number in range(2):
            tg.start_soon(read, number)
            await anyio.wait_all_tasks_blocked()
        first = first_in_line(layer)
        layer.send_nowait("a", {"n": 1})
        with here(layer).mailroom:
            here(layer).mailroom.abandon(first)
        await anyio.wait_all_tasks_blocked()
        assert got == [(1, {"n": 1})]
        tg.cancel_scope.cancel()
    assert layer.statistics().waiting_receivers == 0


@pytest.mark.slow
async def test_many_memberships_that_expire_one_by_one(clock: Clock) -> None:
    """Looking for the next membership to expire costs the same however many have expired before."""
    layer = InMemoryChannelLayer(clock=clock, group_expiry=100_000)
    for number in range(30_000):
        clock.advance(1)
        await layer.group_add("group", f"m.{number}")
    clock.advance(70_000)
    for left in range(30_000, 0, -1):
        assert layer.statistics().members == left
        clock.advance(1)


async def test_calls_from_worker_threads(layer: InMemoryChannelLayer) -> None:
    """A worker thread of anyio's wakes readers in the loop it serves."""
    async with anyio.create_task_group() as tg:
        tg.start_soon(layer.receive, "a")
        await anyio.wait_all_tasks_blocked()
        await anyio.to_thread.run_sync(layer.send_nowait, "a", {})
    assert layer.statistics().received == 1


async def test_time_outs_of_asyncio(layer: InMemoryChannelLayer) -> None:
    """asyncio's wait_for and timeout, which cancel tasks without anyio's knowledge, lose nothing either."""
    if anyio.get_cancelled_exc_class() is not asyncio.CancelledError:
        return  # there is no such thing on trio
    got = []
    for number in range(300):
        loop = asyncio.get_running_loop()
        delay = (number % 3) * 0.0001  # before, with and after the message: no outcome is wrong
        loop.call_later(0.0001, layer.send_nowait, "a", {"n": number})
        try:
            if number % 2:
                got.append(await asyncio.wait_for(layer.receive("a"), delay))
            else:
                async with asyncio.timeout(delay):
                    got.append(await layer.receive("a"))
        except TimeoutError:
            got.append(await layer.receive("a"))
    assert [message["n"] for message in got] == list(range(300))


@pytest.mark.parametrize("by", ["reader", "sender"])
async def test_what_was_promised_to_one_who_is_cancelled_goes_to_the_next(by: str, layer: InMemoryChannelLayer) -> None:
    """asyncio's own cancellation may strike between a call and its answer: then the next in the line is called."""
    if anyio.get_cancelled_exc_class() is not asyncio.CancelledError:
        return  # on trio, whoever was called is not cancelled any more
    ended: list[str] = []

    async def wait(name: str) -> None:
        await (layer.receive("a") if by == "reader" else layer.send("a", {}, wait=True))
        ended.append(name)

    if by == "sender":
        for _ in range(5):
            layer.send_nowait("a", {})
    with anyio.fail_after(10):
        async with anyio.create_task_group() as tg:
            first = asyncio.ensure_future(wait("first"))
            await anyio.wait_all_tasks_blocked()
            tg.start_soon(wait, "second")
            await anyio.wait_all_tasks_blocked()
            if by == "reader":
                layer.send_nowait("a", {})
            else:
                layer.receive_nowait("a")
            first.cancel()
    assert first.cancelled()
    assert ended == ["second"]


async def test_who_waited_at_closing_does_not_wait_on_in_a_layer_opened_again() -> None:
    """A layer may be opened again before those who waited have run: they get ClosedResourceError all the same."""
    layer = InMemoryChannelLayer(capacity=1)
    ended: list[str] = []

    async def wait(what: str, call: Any) -> None:
        with pytest.raises(anyio.ClosedResourceError):
            await call()
        ended.append(what)

    async with anyio.create_task_group() as tg:
        tg.cancel_scope.deadline = anyio.current_time() + 10
        async with layer:
            await layer.send("full", {})
            for _ in range(2):
                tg.start_soon(wait, "receive", lambda: layer.receive("a"))
                tg.start_soon(wait, "send", lambda: layer.send("full", {}, wait=True))  # more than there is room for
            await anyio.wait_all_tasks_blocked()
        async with layer:
            layer.send_nowait("a", {"n": 1})
            await anyio.wait_all_tasks_blocked()
            assert layer.receive_nowait("a") == {"n": 1}
    assert sorted(ended) == ["receive", "receive", "send", "send"]
