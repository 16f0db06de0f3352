"""Who owns a channel, and when it ends: what the contract kit cannot see of it, in Redis and in other processes."""

from __future__ import annotations

import copy
import gc
import logging
import pickle
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import pytest
from anyio import ClosedResourceError, create_task_group, fail_after, to_thread
from anyio.lowlevel import checkpoint
from layers_on_redis import KINDS, PATIENCE, PUBSUB, QUEUE, Kind, both, grow_older, new_prefix, until, until_answered
from redis_server import RedisServer

from anyio_channels import InMemoryChannelLayer, RedisChannelLayer
from anyio_channels.local.expiry import Expirable, ExpiryIndex
from anyio_channels.redis import servers
from anyio_channels.redis.wire import Names
from anyio_channels.testing import Clock

pytestmark = [pytest.mark.anyio, pytest.mark.two_loops]

MEMORY = Kind("memory", InMemoryChannelLayer, KINDS[0].features)
each = pytest.mark.parametrize("kind", [MEMORY, *KINDS], ids=lambda kind: kind.name)


@asynccontextmanager
async def opened(kind: Kind, server: RedisServer, **options: Any) -> AsyncGenerator[tuple[Any, Clock]]:
    """Open a layer with a clock that the test holds."""
    clock = Clock()
    layer = InMemoryChannelLayer(clock=clock, **options) if kind is MEMORY else kind.factory(server)(clock, **options)
    async with layer:
        yield layer, clock


async def cancelled_receive(layer: Any, channel: str) -> None:
    """Wait for a message, and give up."""
    async with create_task_group() as tg:
        tg.start_soon(layer.receive, channel)
        await until(lambda: layer.statistics().waiting_receivers)
        tg.cancel_scope.cancel()


# Names


@each
@pytest.mark.parametrize("length", [1, 42, 43, 50])
async def test_every_prefix_that_is_allowed_makes_a_valid_name(
    kind: Kind, length: int, redis_server: RedisServer
) -> None:
    """A channel with the longest prefix can be sent to, and its inbox hears broadcasts."""
    async with opened(kind, redis_server) as (layer, _), layer.subscribe("room", prefix="p" * length) as inbox:
        name = await layer.new_channel("p" * length)
        assert layer.require_valid_channel_name(name)
        await layer.send(name, {"n": 1})
        await layer.group_send("room", {"n": 2})
        with fail_after(PATIENCE):
            assert await layer.receive(name) == {"n": 1}
            assert await inbox.receive() == {"n": 2}


async def test_a_copy_of_a_name_is_plain() -> None:
    """Only what new_channel() returned is watched: pickled and copied, it is a str; it equals its copies."""
    name = await InMemoryChannelLayer().new_channel()
    for one in (str(name), copy.copy(name), copy.deepcopy(name), pickle.loads(pickle.dumps(name))):
        assert type(one) is str
        assert one == name
        assert hash(one) == hash(name)
    assert repr(name) == repr(str(name))


@both
async def test_another_process_s_channel(kind: Kind, redis_server: RedisServer) -> None:
    """receive() of it is refused, and takes nothing: its process gets every message, also of its other channels."""
    prefix = new_prefix()
    async with (
        kind.layer_class([redis_server.url], prefix=prefix) as owner,
        kind.layer_class([redis_server.url], prefix=prefix) as other,
    ):
        one, two = await owner.new_channel(), await owner.new_channel()
        for _ in range(3):
            with pytest.raises(RuntimeError, match="belongs to another process"):
                await other.receive(one)
        for number in range(20):
            await other.send(one, {"n": number})
            await other.send(two, {"n": number})
        with fail_after(PATIENCE):
            for channel in (one, two):
                assert [(await owner.receive(channel))["n"] for _ in range(20)] == list(range(20))


# The end


@each
async def test_a_consumer_that_goes_away_leaves_nothing(kind: Kind, redis_server: RedisServer) -> None:
    """Consumers come, are read, and are forgotten: in groups, in the statistics and in Redis nothing of them is left."""
    async with opened(kind, redis_server, expiry=10) as (layer, clock):
        names = []
        for number in range(30):
            name = await layer.new_channel()
            await layer.group_add(f"room{number % 3}", name)
            names.append(str(name))
            if number % 2:
                await cancelled_receive(layer, name)
            else:
                await layer.send(name, {})
                with fail_after(PATIENCE):
                    await layer.receive(name)
        del name
        await checkpoint()
        gc.collect()
        await clock.advance(layer, 10)
        assert [await layer.group_channels(f"room{number}") for number in range(3)] == [set(), set(), set()]
        counts = layer.statistics()
        assert (counts.groups, counts.members, counts.channels) == (0, 0, 0)
        for one in names:
            with pytest.raises(ClosedResourceError, match="has ended"):
                await layer.receive(one)
        if kind is not MEMORY:
            with redis_server.client() as client:
                await until(lambda: not set(names) & {one.decode() for one in client.pubsub_channels()})
                await until(lambda: not list(client.scan_iter(f"{layer.prefix}:group:*")))


@pytest.mark.parametrize("take", ["receive", "receive_nowait"])
async def test_a_copy_of_a_forgotten_name(take: str) -> None:
    """A message that is there is not received from a channel whose time is over, though nobody has looked since."""
    clock = Clock()
    layer = InMemoryChannelLayer(clock=clock, expiry=10)
    name = str(await layer.new_channel())
    await clock.advance(layer, 9)
    await layer.send(name, {"n": 1})
    await clock.advance(layer, 1)
    with pytest.raises(ClosedResourceError, match="has ended"):
        await getattr(layer, take)(name)
    assert layer.statistics().discarded == 1


async def test_looking_without_waiting_is_a_use() -> None:
    """receive_nowait() that finds nothing begins the time of its channel anew, unless somebody waits there."""
    clock = Clock()
    layer = InMemoryChannelLayer(clock=clock, expiry=10, group_expiry=30)
    name = await layer.new_channel()
    await layer.group_add("room", name)
    await cancelled_receive(layer, name)
    await clock.advance(layer, 5)
    with pytest.raises(anyio.WouldBlock):
        layer.receive_nowait(name)
    await clock.advance(layer, 29)
    async with create_task_group() as tg:
        assert await layer.group_channels("room") == {name}
        tg.start_soon(layer.receive, name)
        await anyio.wait_all_tasks_blocked()
        with pytest.raises(anyio.WouldBlock):
            layer.receive_nowait(name)
        await clock.advance(layer, 100)
        assert await layer.group_channels("room") == {name}
        tg.cancel_scope.cancel()
    await clock.advance(layer, 10)
    assert await layer.group_channels("room") == set()
    with pytest.raises(ClosedResourceError):
        layer.receive_nowait(name)


async def test_a_name_of_somebody_s_own_in_memory() -> None:
    """In memory every process-specific name is ours: a member until group_expiry after its last use, and read again later."""
    clock = Clock()
    layer = InMemoryChannelLayer(clock=clock, expiry=10, group_expiry=30)
    await layer.send("a!b", {"n": 0})
    await layer.group_add("room", "a!b")
    assert await layer.receive("a!b") == {"n": 0}
    for _ in range(3):
        await clock.advance(layer, 29)
        await layer.group_send("room", {"n": 1})
        assert await layer.receive("a!b") == {"n": 1}
    await clock.advance(layer, 30)
    assert await layer.group_channels("room") == set()
    await layer.send("a!b", {"n": 2})
    assert await layer.receive("a!b") == {"n": 2}


@each
async def test_cancelled_before_it_waits(kind: Kind, redis_server: RedisServer) -> None:
    """A receive() that is cancelled although there is a message counts as cancelled: its channel ends after expiry."""
    async with opened(kind, redis_server, expiry=10, group_expiry=1000) as (layer, clock):
        name = await layer.new_channel()
        await layer.group_add("room", name)
        await layer.send(name, {"n": 1})
        await until(lambda: layer.statistics().buffered_messages)
        with anyio.CancelScope() as scope:
            scope.cancel()
            await layer.receive(name)
        await clock.advance(layer, 10)
        assert await layer.group_channels("room") == set()


@each
async def test_the_end_is_logged(kind: Kind, redis_server: RedisServer, caplog: pytest.LogCaptureFixture) -> None:
    """One line for each channel that ended by itself, with what was thrown away; none for what was closed."""
    caplog.set_level(logging.INFO, "anyio_channels")
    async with opened(kind, redis_server, expiry=10) as (layer, clock):
        name = str(await layer.new_channel())
        await clock.advance(layer, 9)
        await layer.send(name, {})
        await until(lambda: layer.statistics().buffered_messages)
        await clock.advance(layer, 1)
        assert layer.statistics().discarded == 1
        kept = await layer.new_channel()
    ended = [one.__dict__ for one in caplog.records if one.__dict__["anyio_channels_event"] == "channel.ended"]
    assert [(one["anyio_channels_channel"], one["anyio_channels_discarded"]) for one in ended] == [(name, 1)]
    assert kept not in caplog.text


async def test_one_of_two_readers_is_served() -> None:
    """The other one waits as long as it likes: its channel does not end under it, and it gets what comes."""
    clock = Clock()
    layer = InMemoryChannelLayer(clock=clock, expiry=10, group_expiry=30)
    got: list[Any] = []
    channel = await layer.new_channel()

    async def read() -> None:
        got.append(await layer.receive(channel))

    await layer.group_add("room", channel)
    async with create_task_group() as tg:
        for _ in range(2):
            tg.start_soon(read)
        await anyio.wait_all_tasks_blocked()
        await layer.send(channel, {"n": 1})
        await anyio.wait_all_tasks_blocked()
        await clock.advance(layer, 100)
        assert await layer.group_channels("room") == {channel}
        await layer.group_send("room", {"n": 2})
        with fail_after(PATIENCE):
            while len(got) < 2:
                await checkpoint()
    assert got == [{"n": 1}, {"n": 2}]


async def test_a_name_that_is_collected_late() -> None:
    """Where the last use is longer ago than expiry when the name goes, the channel ends with it."""
    clock = Clock()
    layer = InMemoryChannelLayer(clock=clock, expiry=10, group_expiry=100)
    name = await layer.new_channel()
    await layer.group_add("room", name)
    await clock.advance(layer, 50)
    assert layer.statistics().members == 1  # everything that is due was looked at
    del name
    gc.collect()
    assert await layer.group_channels("room") == set()


async def test_what_is_hastened_during_a_sweep() -> None:
    """The garbage collector may run while things are swept: the next sweep looks at what it found, not a later one."""

    class Due(Expirable):
        __slots__ = ("looked_at", "meanwhile")
        dead = False

        def __init__(self, meanwhile: Callable[[], object] = lambda: None) -> None:
            self.listed = False
            self.looked_at = 0
            self.meanwhile = meanwhile

        def fall_due(self, now: float, rung: list[Any]) -> float | None:
            self.looked_at += 1
            self.meanwhile()
            return None

    index = ExpiryIndex()
    collected = Due()
    index.add(collected, 1000.0)
    index.add(Due(lambda: index.hasten(collected)), 1.0)
    index.sweep(1.0, [])
    assert index.next_due <= 1.0
    index.sweep(1.0, [])
    assert (collected.looked_at, index.next_due) == (1, 1000.0)


async def test_many_that_end_at_once_are_not_sent_to() -> None:
    """A broadcast reaches nobody whose time is over, though more are over than one call looks after."""
    clock = Clock()
    layer = InMemoryChannelLayer(clock=clock, expiry=10, group_expiry=30)
    names = [await layer.new_channel() for _ in range(100)]
    for name in names:
        await layer.group_add("room", name)
    await clock.advance(layer, 20)
    for name in names[:5]:
        await layer.group_add("room", name)
    await clock.advance(layer, 10)
    await layer.group_send("room", {})
    assert layer.statistics().sent == 5
    assert await layer.group_channels("room") == set(names[:5])


async def test_nobody_reads_what_comes_too_late() -> None:
    """What is sent to a channel that has ended is kept for nobody, and expires."""
    clock = Clock()
    layer = InMemoryChannelLayer(clock=clock, expiry=10)
    name = str(await layer.new_channel())
    await clock.advance(layer, 10)
    await layer.send(name, {})
    assert layer.statistics().buffered_messages == 1
    for _ in range(2):
        with pytest.raises(ClosedResourceError, match="has ended"):
            await layer.receive(name)
    with anyio.CancelScope() as scope:
        scope.cancel()
        await layer.receive(name)
    with pytest.raises(ClosedResourceError, match="has ended"):
        await layer.group_add("room", name)
    await clock.advance(layer, 10)
    counts = layer.statistics()
    assert (counts.channels, counts.expired, counts.groups) == (0, 1, 0)


async def test_flush_ends_no_channel() -> None:
    """Messages and memberships are gone; the channel can be received from, and joins again."""
    layer = InMemoryChannelLayer()
    name = await layer.new_channel()
    await layer.group_add("room", name)
    await layer.flush()
    await layer.group_add("room", name)
    await layer.group_send("room", {"n": 1})
    assert await layer.receive(name) == {"n": 1}


async def test_a_normal_channel_on_pubsub(redis_server: RedisServer) -> None:
    """It stays subscribed expiry after a cancelled receive(), and longer while it is in a group."""
    async with opened(PUBSUB, redis_server, expiry=10, group_expiry=30) as (layer, clock):
        for name in ("alone", "member"):
            await cancelled_receive(layer, name)
        await layer.group_add("room", "member")

        async def hears(*names: str) -> None:
            layer.statistics()
            with redis_server.client() as client:
                await until(lambda: {one.decode() for one in client.pubsub_channels("[am]*")} == {*names})

        await clock.advance(layer, 9)
        await hears("alone", "member")
        await clock.advance(layer, 1)
        await hears("member")
        await clock.advance(layer, 15)
        await hears("member")
        await layer.group_discard("room", "member")
        await hears()
        await cancelled_receive(layer, "again")
        await clock.advance(layer, 10)
        async with create_task_group() as tg:
            tg.start_soon(layer.receive, "again")  # its end and its beginning are seen in one
            await anyio.wait_all_tasks_blocked()
            tg.cancel_scope.cancel()
        await hears("again")


# Memberships


@each
async def test_a_second_join_that_is_cancelled(kind: Kind, redis_server: RedisServer) -> None:
    """Whoever is a member stays one, wherever a further join, or group_add, is cancelled."""
    async with opened(kind, redis_server) as (layer, _), layer.subscribe("room") as inbox:
        channel = await layer.new_channel()
        await layer.group_add("room", channel)
        joins: list[Callable[[], Any]] = [lambda: inbox.join("room"), lambda: layer.group_add("room", channel)]
        for rounds in range(12):
            async with create_task_group() as tg:
                for join in joins:
                    tg.start_soon(join)
                for _ in range(rounds):
                    await checkpoint()
                tg.cancel_scope.cancel()
            assert await layer.group_channels("room") == {inbox.channel, channel}
            await layer.group_send("room", {"n": rounds})
            with fail_after(PATIENCE):
                assert await inbox.receive() == {"n": rounds}
                assert await layer.receive(channel) == {"n": rounds}


@each
async def test_one_of_two_joins_is_cancelled(kind: Kind, redis_server: RedisServer) -> None:
    """Two calls join at once, and one is cancelled: what the other has done stays."""
    async with opened(kind, redis_server) as (layer, _), layer.subscribe() as inbox:
        for rounds in range(12):
            group = f"room{rounds}"
            async with create_task_group() as tg, create_task_group() as cancelled:
                cancelled.start_soon(inbox.join, group)
                tg.start_soon(inbox.join, group)
                for _ in range(rounds):
                    await checkpoint()
                cancelled.cancel_scope.cancel()
            assert await layer.group_channels(group) == {inbox.channel}
            await layer.group_send(group, {"n": rounds})
            with fail_after(PATIENCE):
                assert await inbox.receive() == {"n": rounds}


@each
async def test_a_first_join_that_is_cancelled(kind: Kind, redis_server: RedisServer) -> None:
    """It is a member or is not; and if the layer does not believe it, Redis does not either."""
    async with opened(kind, redis_server) as (layer, _), layer.subscribe() as inbox:
        for rounds in range(12):
            group = f"room{rounds}"
            async with create_task_group() as tg:
                tg.start_soon(inbox.join, group)
                for _ in range(rounds):
                    await checkpoint()
                tg.cancel_scope.cancel()
            joined = layer.statistics().groups == 1
            assert await layer.group_channels(group) == ({inbox.channel} if joined else set())
            await inbox.leave(group)


async def test_an_inbox_that_is_left_while_it_joins(redis_server: RedisServer) -> None:
    """A join that Redis answers after the block was left leaves no member behind."""
    async with opened(QUEUE, redis_server) as (layer, _):
        for rounds in range(8):
            ended: list[object] = []

            async def join(inbox: Any, ended: list[object] = ended) -> None:
                try:
                    await inbox.join("room")
                except ClosedResourceError as error:
                    ended.append(error)
                else:
                    ended.append(None)

            async with create_task_group() as tg:
                async with layer.subscribe() as inbox:
                    tg.start_soon(join, inbox)
                    for _ in range(rounds):
                        await checkpoint()
            assert len(ended) == 1
            assert await layer.group_channels("room") == set()
        assert layer.statistics().members == 0


async def test_redis_comes_back_empty(tmp_path: Path) -> None:
    """What group_add() made for a channel of new_channel() is there again, as an inbox's is."""
    with RedisServer(tmp_path) as server:
        async with RedisChannelLayer([server.url], prefix=new_prefix()) as layer, layer.subscribe("room") as inbox:
            channel = await layer.new_channel()
            await layer.group_add("room", channel)
            await to_thread.run_sync(server.kill)
            await to_thread.run_sync(server.start)
            await until(lambda: layer.statistics().reconnects)
            with fail_after(PATIENCE):
                assert await layer.group_channels("room") == {channel, inbox.channel}


MEMBERS = """
import sys, anyio
from anyio_channels import RedisChannelLayer

async def main():
    async with RedisChannelLayer([sys.argv[1]], prefix=sys.argv[2]) as layer:
        for number in range(30):
            await layer.group_add("room", await layer.new_channel())
        print("joined", flush=True)
        await anyio.sleep_forever()

anyio.run(main)
"""


async def test_a_process_that_was_killed(redis_server: RedisServer) -> None:
    """A broadcast that finds messages past expiry in its key takes its members out of that group, and nobody else."""
    prefix = new_prefix()
    peer = f"specific.{'0' * 32}!peer"  # as channels_redis calls one: it reads only while somebody waits
    async with RedisChannelLayer([redis_server.url], prefix=prefix) as layer, layer.subscribe("room") as inbox:
        with subprocess.Popen(  # noqa: ASYNC220
            [sys.executable, "-c", MEMBERS, redis_server.url, prefix], stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            assert await to_thread.run_sync(process.stdout.readline) == "joined\n"
            process.kill()
        await layer.group_add("room", peer)
        await layer.group_add("room", "normal")
        assert len(await layer.group_channels("room")) == 33
        await layer.group_send("room", {"n": 1})
        with redis_server.client() as client:
            for key in client.scan_iter(f"{prefix}*"):
                if client.type(key) == b"zset":
                    for member, score in client.zrange(key, 0, -1, withscores=True):
                        client.zadd(key, {member: score - layer.expiry})
        await layer.group_send("room", {"n": 2})
        assert await layer.group_channels("room") == {inbox.channel, peer, "normal"}
        with fail_after(PATIENCE):
            assert [await inbox.receive() for _ in range(2)] == [{"n": 1}, {"n": 2}]


async def test_a_timer_that_is_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """It tells when it fires more than its own time too late, and not before."""
    now = 0.0
    lengths = [10.0, 19.9, 20.1, 10.0]
    late: list[float] = []

    async def sleep(seconds: float) -> None:
        nonlocal now
        assert seconds == 10.0
        if not lengths:
            raise ClosedResourceError
        now += lengths.pop(0)

    monkeypatch.setattr(servers, "sleep", sleep)
    monkeypatch.setattr(servers, "time", SimpleNamespace(monotonic=lambda: now))
    with pytest.raises(ClosedResourceError):
        await servers.when_late(10.0, lambda: late.append(now))
    assert late == [50.0]


@pytest.mark.parametrize("expiry", [0.2])
async def test_a_process_that_stood_still(expiry: float, redis_server: RedisServer) -> None:
    """It was taken for dead by others: when it goes on, it joins its groups again by itself."""
    async with (
        RedisChannelLayer([redis_server.url], prefix=new_prefix(), expiry=expiry) as layer,
        layer.subscribe("room") as inbox,
    ):
        with redis_server.client() as client:
            time.sleep(expiry * 2)  # noqa: ASYNC251 - this is the standing still
            assert client.zrem(Names(layer.prefix).group("room"), inbox.channel) == 1
        with fail_after(PATIENCE):
            while await layer.group_channels("room") != {inbox.channel}:
                await checkpoint()


@pytest.mark.parametrize("cluster", [False, True])
async def test_who_joined_again_is_not_taken_for_dead(
    cluster: bool, redis_server: RedisServer, request: pytest.FixtureRequest
) -> None:
    """A process that stood still has joined again when a broadcast finds its old messages: it stays a member."""
    nodes = request.getfixturevalue("quiet_cluster").nodes[:3] if cluster else [redis_server]
    prefix = new_prefix()

    def all_grow_older() -> None:
        for node in nodes:
            with node.client() as client:
                grow_older(client, prefix, 60)

    async with RedisChannelLayer([node.url for node in nodes], prefix=prefix, cluster=cluster) as layer:
        name = f"specific.p{'0' * 31}!other"
        await layer.send(name, {"n": 1})
        all_grow_older()
        await layer.group_add("room", name)
        await layer.group_send("room", {"n": 2})
        assert await layer.group_channels("room") == {name}
        all_grow_older()
        await layer.group_send("room", {"n": 3})
        await until_answered(layer)
        assert await layer.group_channels("room") == set()
