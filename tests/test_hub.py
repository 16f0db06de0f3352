"""A layer on a transport, without Redis: what the hub asks of one, and what it makes of what it is told."""

from __future__ import annotations

from typing import Any

import anyio
import pytest
from anyio import create_task_group, fail_after
from anyio.abc import TaskStatus
from conftest import Clock
from ormsgpack import packb

from anyio_channels import InMemoryChannelLayer
from anyio_channels.hub import Deliveries, Hub, Transport, group_topic

pytestmark = pytest.mark.anyio

PATIENCE = 60.0


class Wire:
    """What connects the processes of a layer: here, objects in one."""

    def __init__(self) -> None:
        self.ends: list[WireTransport] = []


class WireTransport(Transport):
    """Hands on at once what is published, and does as the test tells it."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self.topics: set[str] = set()
        self.calls: list[tuple[str, str]] = []
        self.error: Exception | None = None
        self.deliveries: Deliveries

    async def run(self, deliveries: Deliveries, *, task_status: TaskStatus[None]) -> None:
        if self.error is not None:
            raise self.error
        self.deliveries = deliveries
        self.wire.ends.append(self)
        try:
            task_status.started()
            await anyio.sleep_forever()
        finally:
            self.wire.ends.remove(self)

    async def publish(self, topic: str, body: bytes) -> None:
        await anyio.lowlevel.checkpoint()
        if self.error is not None:
            raise self.error
        for end in self.wire.ends:
            if topic in end.topics:
                end.deliveries.deliver(topic, body)

    async def subscribe(self, topic: str) -> None:
        self.calls.append(("subscribe", topic))
        self.topics.add(topic)
        await anyio.lowlevel.checkpoint()
        if self.error is not None:
            raise self.error

    def unsubscribe(self, topic: str) -> None:
        self.calls.append(("unsubscribe", topic))
        self.topics.discard(topic)


def make(wire: Wire | None = None, **options: Any) -> tuple[Hub, WireTransport]:
    transport = WireTransport(wire or Wire())
    return Hub(transport, **options), transport


async def test_two_processes_hear_each_other() -> None:
    """A channel and a group are heard by whoever subscribes, and by nobody who does not."""
    wire = Wire()
    (one, _), (other, other_end) = make(wire), make(wire)
    async with one, other, one.subscribe("room") as inbox, other.subscribe("room") as theirs:
        await one.group_send("room", {"n": 1}, exclude=[inbox.channel])
        await other.send(inbox.channel, {"n": 2})
        with fail_after(PATIENCE):
            assert [await inbox.receive(), await theirs.receive()] == [{"n": 2}, {"n": 1}]
        assert inbox.channel not in other_end.topics
        assert one.statistics().sent == other.statistics().sent == 1


async def test_what_comes_for_nobody_is_dropped() -> None:
    """A message to a channel or group that is not here any more is neither kept nor looked at."""
    layer, transport = make()
    async with layer:
        for topic in ("gone", group_topic("gone")):
            transport.deliveries.deliver(topic, b"\xc1 not a message")
        transport.deliveries.unheard("gone", LookupError("no"))
        counts = layer.statistics()
        assert (counts.buffered_messages, counts.dropped_unreadable) == (0, 0)


async def test_what_ends_is_unsubscribed_from(clock: Clock) -> None:
    """A channel whose message expired unread, and a group whose memberships have, end with the next message that comes."""
    layer, transport = make(clock=clock, expiry=10, group_expiry=10)
    async with layer, layer.subscribe() as inbox:
        gone = await layer.new_channel()
        await layer.group_add("room", gone)
        await layer.send(gone, {"n": 1})
        clock.advance(10)
        transport.deliveries.deliver(inbox.channel, packb({"n": 2}))
        transport.deliveries.deliver(inbox.channel, packb({"n": 3}))
        assert transport.topics == {inbox.channel}
        assert [await inbox.receive(), await inbox.receive()] == [{"n": 2}, {"n": 3}]


async def test_what_is_here_again_stays_subscribed(clock: Clock) -> None:
    """A group that ended and began again between two looks is not unsubscribed from."""
    layer, transport = make(clock=clock, group_expiry=10)
    async with layer, layer.subscribe() as inbox:
        await layer.group_add("room", inbox.channel)
        clock.advance(10)
        await layer.group_add("room", inbox.channel)
        await layer.group_send("room", {"n": 1})
        assert await inbox.receive() == {"n": 1}
        assert ("unsubscribe", group_topic("room")) not in transport.calls


async def test_a_full_channel_and_a_full_member(caplog: pytest.LogCaptureFixture) -> None:
    """A mailbox that is full misses what comes, whichever way: it is counted and logged."""
    layer, transport = make(capacity=1)
    async with layer, layer.subscribe("room") as inbox:
        for _ in range(2):
            await layer.send(inbox.channel, {})
            await layer.group_send("room", {})
        transport.deliveries.tell_all({"type": "told"})
        assert layer.statistics().dropped_full == 4
    assert {record.__dict__["anyio_channels_event"] for record in caplog.records} == {
        "channel.dropped",
        "group_send.dropped",
    }


async def test_a_gap_is_told_to_those_it_touches() -> None:
    """Only inboxes of the topics that may have missed something hear of it."""
    layer, transport = make()
    async with (
        layer,
        layer.subscribe("room", on_gap="event") as touched,
        layer.subscribe("other", on_gap="event") as spared,
    ):
        transport.deliveries.missing(lambda topic: topic == group_topic("room"))
        await layer.send(spared.channel, {"n": 1})
        with fail_after(PATIENCE):
            assert await touched.receive() == {"type": "channel_layer.gap", "missed": None}
            assert await spared.receive() == {"n": 1}
        transport.deliveries.missing()
        assert [await one.receive() for one in (touched, spared)] == [{"type": "channel_layer.gap", "missed": None}] * 2


async def test_an_outage_is_waited_through_by_readers_only() -> None:
    """While the transport is away a reader waits, and whoever sends or joins is told."""
    layer, transport = make()
    async with layer, create_task_group() as tg:
        got: list[Any] = []

        async def read() -> None:
            got.append(await layer.receive("work"))

        transport.error = ConnectionError("away")
        tg.start_soon(read)
        await anyio.wait_all_tasks_blocked()
        for call in (layer.send("work", {}), layer.group_send("room", {}), layer.new_channel()):
            with pytest.raises(ConnectionError, match="away"):
                await call
        with pytest.raises(ConnectionError, match="away"):
            await layer.subscribe("room").__aenter__()
        assert transport.topics == {"work"}
        transport.error = None
        transport.deliveries.deliver("work", packb({"n": 1}))
        await anyio.wait_all_tasks_blocked()
        assert got == [{"n": 1}]


async def test_a_channel_that_cannot_be_had() -> None:
    """Its reader is told, nothing of it stays, and the next who reads it asks anew."""
    layer, transport = make()
    async with layer:
        transport.error = LookupError("no")
        for _ in range(2):
            with pytest.raises(LookupError):
                await layer.receive("work")
        assert transport.topics == set()
        assert transport.calls == [("subscribe", "work"), ("unsubscribe", "work")] * 2


async def test_a_subscription_that_was_lost_for_good(caplog: pytest.LogCaptureFixture) -> None:
    """It is logged, and the next reader of the channel is told why."""
    layer, transport = make()
    async with layer:
        with anyio.move_on_after(0):
            await layer.receive("other")
        channel = await layer.new_channel()
        transport.error = LookupError("no")
        transport.deliveries.unheard(channel, transport.error)
        with pytest.raises(LookupError):
            await layer.receive(channel)
    assert "no; readers wait in vain" in caplog.text


async def test_a_cancelled_first_receive_leaves_nothing() -> None:
    """A reader that is cancelled before there is a channel has made none."""
    layer, transport = make()
    async with layer:
        with anyio.CancelScope() as scope:
            scope.cancel()
            await layer.receive("work")
        assert transport.calls == []


async def test_joining_again_in_vain_keeps_the_membership() -> None:
    """A second group_add that fails ends nothing; a first one leaves nothing."""
    layer, transport = make()
    async with layer:
        channel = await layer.new_channel()
        await layer.group_add("room", channel)
        transport.error = ConnectionError("away")
        for group in ("room", "other"):
            with pytest.raises(ConnectionError):
                await layer.group_add(group, channel)
        assert await layer.group_channels("room") == {channel}
        assert await layer.group_channels("other") == set()


async def test_opening_that_fails() -> None:
    """What the transport raises is raised as it is, and the layer can be opened again."""
    layer, transport = make()
    transport.error = ConnectionError("away")
    with pytest.raises(ConnectionError, match="away"):
        await layer.__aenter__()
    with pytest.raises(RuntimeError, match="is not open"):
        await layer.send("a", {})
    transport.error = None
    async with layer:
        await layer.send("a", {})
    with pytest.raises(anyio.ClosedResourceError, match="closed; open it again"):
        await layer.send("a", {})


async def test_listening_begins_as_receive_does() -> None:
    """What is sent from then on comes; without a transport it comes anyhow."""
    layer, transport = make()
    async with layer:
        await layer._listen("work")
        assert transport.topics == {"work"}
        await layer.send("work", {"n": 1})
        assert await layer.receive("work") == {"n": 1}
    memory = InMemoryChannelLayer()
    await memory._listen("work")
    await memory.send("work", {"n": 1})
    assert await memory.receive("work") == {"n": 1}


async def test_who_it_is() -> None:
    """A layer of one's own has a repr, as others do."""
    layer, _ = make(expiry=5, capacity=7)
    assert repr(layer) == "<Hub expiry=5 capacity=7>"
