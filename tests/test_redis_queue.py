"""What the queue layer keeps when clocks step, memory is short, calls are cancelled, and Redis goes back in time."""

from __future__ import annotations

import asyncio
import math
import random
import time
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import pytest
import redis.exceptions
from anyio import create_task_group, fail_after, get_cancelled_exc_class
from anyio.lowlevel import checkpoint
from channels_redis.serializers import registry
from layers_on_redis import (
    KINDS,
    PATIENCE,
    QUEUE,
    Kind,
    link_to_channel,
    link_to_group,
    new_prefix,
    port_of,
    until,
    until_answered,
    until_sent,
)
from ormsgpack import packb
from redis_server import Proxy, RedisCluster, RedisServer

from anyio_channels import ChannelFull, RedisChannelLayer
from anyio_channels.redis.client import Link, Request
from anyio_channels.redis.client.connection import reply_to
from anyio_channels.redis.wire import Names
from anyio_channels.wakeup import thread

pytestmark = [pytest.mark.anyio, pytest.mark.two_loops]


@pytest.fixture
def two_servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[RedisServer]]:
    """Two servers of the test's own, over which names are spread."""
    with (
        RedisServer(tmp_path_factory.mktemp("one")) as one,
        RedisServer(tmp_path_factory.mktemp("other")) as other,
    ):
        yield [one, other]


def make(kind: Kind, *servers: RedisServer, **options: Any) -> Any:
    hosts = [server.url for server in servers]
    return kind.layer_class(hosts, **{"timeout": PATIENCE, "prefix": new_prefix(), **options})


def key_of(layer: Any, channel: str = "jobs") -> str:
    return Names(layer.prefix).channel(channel)


def payload(number: int) -> bytes:
    return b"%012d" % number + packb({"n": number})


async def receive(layer: Any, count: int, channel: str = "jobs") -> list[int]:
    with fail_after(PATIENCE):
        return [(await layer.receive(channel))["n"] for _ in range(count)]


@asynccontextmanager
async def begun(layer: Any, *calls: Callable[[], Coroutine[Any, Any, object]]) -> AsyncIterator[None]:
    """Cancel the calls at the end of the block, when all were sent and Redis, which is paused, has not answered."""
    async with create_task_group() as tg:
        for call in calls:
            tg.start_soon(call)
            await until_sent(layer)
        yield
        tg.cancel_scope.cancel()


# Scores and clocks


@pytest.mark.parametrize("score", [2e9, 1e16, 1.79e18, 1e300, math.inf])
async def test_waiting_for_room_behind_foreign_scores(redis_server: RedisServer, score: float) -> None:
    """send(wait=True) waits, and sends when there is room, however far ahead the oldest entry is."""
    layer = make(QUEUE, redis_server, capacity=2)
    async with layer:
        with redis_server.client() as client:
            client.zadd(key_of(layer), {payload(0): score, payload(1): score})
        await waits_and_sends(layer)


async def test_waiting_for_room_behind_foreign_scores_in_a_cluster(quiet_cluster: RedisCluster) -> None:
    """The same for the script of a cluster."""
    layer = RedisChannelLayer(
        quiet_cluster.hosts, cluster=True, capacity=2, prefix=new_prefix(), timeout=PATIENCE, connect_timeout=PATIENCE
    )
    async with layer:
        await link_to_channel(layer, "jobs").execute("ZADD", key_of(layer), "inf", payload(0), "inf", payload(1))
        await waits_and_sends(layer)


async def waits_and_sends(layer: Any) -> None:
    sent: list[bool] = []

    async def send() -> None:
        await layer.send("jobs", {"n": 2}, wait=True)
        sent.append(True)

    async with create_task_group() as tg:
        tg.start_soon(send)
        await until_answered(layer)
        assert not sent
        assert sorted(await receive(layer, 3)) == [0, 1, 2]


@pytest.mark.parametrize("back", [0.5, 3, 30, 59])
@pytest.mark.parametrize("broadcast", [False, True], ids=["send", "group_send"])
async def test_order_over_a_step_of_the_clock(redis_server: RedisServer, back: float, broadcast: bool) -> None:
    """The server's clock goes back by less than expiry: messages keep their order, also beside an entry with a foreign score."""
    layer = make(QUEUE, redis_server, expiry=60)
    async with layer:
        await layer.group_add("room", "jobs")
        send = partial(layer.group_send, "room") if broadcast else partial(layer.send, "jobs")
        for number in range(5):
            await send({"n": number})
        with redis_server.client() as client:  # what was sent before the step has scores that are ahead after it
            for entry, score in client.zrange(key_of(layer), 0, -1, withscores=True):
                client.zadd(key_of(layer), {entry: score + back})
            client.zadd(key_of(layer), {payload(99): 1e16})
        for number in range(5, 10):
            await send({"n": number})
        assert await receive(layer, 11) == [*range(10), 99]


# Memory, and capacity


async def test_a_cancelled_receive_out_of_memory(server: RedisServer) -> None:
    """What was popped for a reader who is cancelled goes back, also where Redis takes no more data."""
    async with make(QUEUE, server) as layer:
        for number in range(3):
            await layer.send("jobs", {"n": number})
        with server.client() as client:
            client.config_set("maxmemory-policy", "noeviction")
            client.config_set("maxmemory", 1)
            server.pause()
            async with begun(layer, *[partial(layer.receive, "jobs")] * 2):
                pass
            server.resume()
            await until_answered(layer)
            assert client.zcard(key_of(layer)) == 3
        assert await receive(layer, 3) == [0, 1, 2]
        assert layer.statistics().discarded == 0


async def test_what_exact_leaves_out(server: RedisServer) -> None:
    """Room made by a pop may be taken before what was popped comes back: then a channel holds more than its capacity.

    It loses nothing, keeps the order, and takes nothing until it holds fewer than its capacity.
    """
    async with make(QUEUE, server, capacity=2) as layer:
        for number in range(2):
            await layer.send("jobs", {"n": number})
        server.pause()
        async with create_task_group() as senders:
            async with begun(layer, partial(layer.receive, "jobs")):
                senders.start_soon(layer.send, "jobs", {"n": 2})  # on the same connection: Redis sees it after the pop
                await until_sent(layer)
            server.resume()
        await until_answered(layer)
        with server.client() as client:
            assert client.zcard(key_of(layer)) == 3
        for number in range(2):
            with pytest.raises(ChannelFull):
                await layer.send("jobs", {"n": 9})
            assert await receive(layer, 1) == [number]
        await layer.send("jobs", {"n": 3})
        assert await receive(layer, 2) == [2, 3]


async def test_waiting_for_room_in_a_process(redis_server: RedisServer) -> None:
    """send(wait=True) to a process-specific channel is refused with a way out, and sends nothing."""
    async with make(QUEUE, redis_server) as layer, layer.subscribe() as inbox:
        with pytest.raises(RuntimeError, match=rf"'{inbox.channel}'.*send to a normal channel"):
            await layer.send(inbox.channel, {"n": 1}, wait=True)
        await layer.send(inbox.channel, {"n": 2})
        with fail_after(PATIENCE):
            assert await inbox.receive() == {"n": 2}
        assert layer.statistics().sent == 1


# Books


@asynccontextmanager
async def writes_paused(*servers: RedisServer) -> AsyncIterator[None]:
    """Have Redis take scripts and messages, and run them after the block."""
    for server in servers:
        with server.client() as client:
            client.execute_command("CLIENT", "PAUSE", 60_000, "WRITE")
    try:
        yield
    finally:
        for server in servers:
            with server.client() as client:
                client.execute_command("CLIENT", "UNPAUSE")


@pytest.mark.parametrize("lost", [False, True], ids=["runs", "lost"])
@pytest.mark.parametrize("how", ["pubsub", "queue", "queue, full", "queue, waits", "queue, waits, full"])
async def test_a_cancelled_send_that_happened_is_counted(server: RedisServer, how: str, lost: bool) -> None:
    """A send that was cancelled on its way counts as sent if Redis did it, and only then."""
    kind = next(kind for kind in KINDS if kind.name == how.partition(",")[0])
    full, wait = "full" in how, "waits" in how
    async with make(kind, server, capacity=1) as layer:
        if full:
            await layer.send("jobs", {"n": 0})
        async with writes_paused(server):
            async with begun(layer, partial(layer.send, "jobs", {"n": 1}, wait=wait)):
                pass
            if lost:
                await cut_off(layer, server)
        await until_answered(layer)
        assert layer.statistics().sent == (full or not lost)
        if kind is QUEUE and layer.statistics().sent:
            assert await receive(layer, 1) == [0 if full else 1]
            with server.client() as client:
                assert not client.exists(key_of(layer))


async def cut_off(layer: Any, server: RedisServer) -> None:
    """End the connections to a server, which has not run what came last, and never will."""
    before = layer.statistics().reconnects
    with server.client() as client:
        client.client_kill_filter(_type="normal")
        client.client_kill_filter(_type="pubsub")
    await until(lambda: layer.statistics().reconnects > before)


@pytest.mark.parametrize("lost", [False, True], ids=["runs", "lost"])
async def test_a_cancelled_broadcast_that_happened_is_counted(two_servers: list[RedisServer], lost: bool) -> None:
    """The same for group_send: it asks one server for the members, and is cancelled on its way to that of theirs."""
    async with make(QUEUE, *two_servers, capacity=1) as layer:
        await cancel_a_broadcast(layer, two_servers, lost)


@pytest.mark.parametrize("lost", [False, True], ids=["runs", "lost"])
async def test_a_cancelled_broadcast_in_a_cluster_that_happened_is_counted(
    quiet_cluster: RedisCluster, lost: bool
) -> None:
    """The same in a cluster, where each member is sent it by a call of its own."""
    layer = RedisChannelLayer(
        quiet_cluster.hosts, cluster=True, capacity=1, prefix=new_prefix(), timeout=PATIENCE, connect_timeout=PATIENCE
    )
    async with layer:
        await cancel_a_broadcast(layer, quiet_cluster.nodes[:3], lost)


async def broadcast_and_cancel(layer: RedisChannelLayer, owner: Link, server: RedisServer, *, lost: bool) -> None:
    """Cancel a broadcast that waits for ``owner`` to run it; then its connection is lost, or it is run."""
    async with writes_paused(server):
        async with begun(layer, partial(layer.group_send, "room", {"n": 1})):
            await until(lambda: owner.connection is not None and owner.connection.pending)
            await until_sent(layer)
        if lost:
            await cut_off(layer, server)


async def cancel_a_broadcast(layer: RedisChannelLayer, servers: list[RedisServer], lost: bool) -> None:
    asked = link_to_group(layer, "room")
    owner = next(link for link in layer.options.router.links if link is not asked)
    full, free, *_ = [name for name in (f"jobs{n}" for n in range(60)) if link_to_channel(layer, name) is owner]
    server = next(one for one in servers if one.port == port_of(owner))
    for channel in (full, free):
        await layer.group_add("room", channel)
    await layer.send(full, {"n": 0})
    await broadcast_and_cancel(layer, owner, server, lost=lost)
    await until_answered(layer)
    statistics = layer.statistics()
    assert (statistics.sent, statistics.dropped_full) == ((1, 0) if lost else (3, 1))
    assert await receive(layer, 1, full) == [0]
    if not lost:
        assert await receive(layer, 1, free) == [1]


def test_a_native_cancellation_after_the_reply() -> None:
    """A task of asyncio that is cancelled between the reply and its next step has sent its message all the same."""

    async def main() -> None:
        heard: list[Any] = []
        request = Request(("PING",), done=lambda request: heard.append(request.reply), waits=True)
        request.bell = thread.state.new_bell()[0]
        task = asyncio.ensure_future(reply_to(request))
        await asyncio.sleep(0)
        request.reply = 1
        request.settle()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert heard == [1]

    asyncio.run(main())


# Broadcasts in pieces


def put_into_group(client: Any, layer: Any, names: Iterable[str]) -> None:
    client.zadd(Names(layer.prefix).group("room"), dict.fromkeys(names, time.time()))


@pytest.mark.parametrize(
    "options", [{}, {"serializer_format": "json"}, {"random_prefix_length": 20}], ids=["msgpack", "json", "long prefix"]
)
async def test_a_broadcast_goes_out_once(redis_server: RedisServer, options: dict[str, Any]) -> None:
    """What the entries of all members have in common goes to Redis once for each piece; they are those of channels_redis."""
    names = [f"user.{number}" for number in range(100)]
    message = {"text": "x" * 200_000}
    async with Proxy(redis_server.host, redis_server.port) as proxy:
        layer = RedisChannelLayer([proxy.url], prefix=new_prefix(), timeout=PATIENCE, **options)
        async with layer:
            with redis_server.client() as client:
                put_into_group(client, layer, names)
                before = proxy.bytes_to_server
                await layer.group_send("room", message)
                assert proxy.bytes_to_server - before < 1_000_000
                entries = {name: client.zrange(key_of(layer, name), 0, -1) for name in names}
            await layer.flush()
    length = options.get("random_prefix_length", 12)
    theirs = registry.get_serializer(options.get("serializer_format", "msgpack"), random_prefix_length=length)
    for name, (entry,) in entries.items():
        assert entry[length:] == theirs.as_bytes({**message, "__asgi_channel__": [name]})
    assert len({entry[:length] for (entry,) in entries.values()}) == 100


async def most_held(call: Callable[[], Awaitable[object]]) -> int:
    """Return the most bytes that ``call`` held at a time, beyond those that were held before."""
    tracemalloc.start()
    try:
        with fail_after(PATIENCE):
            await call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


async def test_an_encrypted_broadcast_is_held_in_pieces(redis_server: RedisServer) -> None:
    """Where each entry is encrypted by itself, few are held at a time."""
    async with make(QUEUE, redis_server, symmetric_encryption_keys=["secret"]) as layer:
        with redis_server.client() as client:
            put_into_group(client, layer, (f"user.{number}" for number in range(30)))
            held = await most_held(lambda: layer.group_send("room", {"text": "x" * 2_000_000}))
            assert held < 64_000_000, f"{held} bytes for 30 entries of 2,666,000"
            assert all(client.zcard(key_of(layer, f"user.{number}")) == 1 for number in range(30))
            assert len((await layer.receive("user.29"))["text"]) == 2_000_000
            assert layer.statistics().sent == 30
        await layer.flush()


async def test_a_broadcast_in_a_cluster_is_held_in_pieces(quiet_cluster: RedisCluster) -> None:
    """In a cluster, where each key is sent to by itself, few entries are held at a time, also if some are refused."""
    layer = RedisChannelLayer(
        quiet_cluster.hosts, cluster=True, prefix=f"{{{new_prefix()}}}", timeout=PATIENCE, connect_timeout=PATIENCE
    )
    async with layer:
        link = link_to_channel(layer, "user.0")
        for number in range(30):
            await link.execute("ZADD", Names(layer.prefix).group("room"), int(time.time()), f"user.{number}")
        for number in (3, 17):
            await link.execute("SET", key_of(layer, f"user.{number}"), "odd")

        async def send() -> None:
            with pytest.raises(redis.exceptions.ResponseError, match="WRONGTYPE"):
                await layer.group_send("room", {"text": "x" * 2_000_000})

        held = await most_held(send)
        assert held < 40_000_000, f"{held} bytes for 30 entries of 2,000,000"
        assert layer.statistics().sent == 28
        for number in {*range(30)} - {3, 17}:
            assert await link.execute("ZCARD", key_of(layer, f"user.{number}")) == 1
        await layer.flush()


@pytest.mark.parametrize("odd", [0, 1500], ids=["the first", "another"])
async def test_a_refused_piece_of_a_broadcast(redis_server: RedisServer, odd: int) -> None:
    """A piece that Redis refuses does not keep the others from being sent; the sender is told."""
    names = [f"user.{number}" for number in range(2500)]
    async with make(QUEUE, redis_server) as layer:
        with redis_server.client() as client:
            put_into_group(client, layer, names)
            in_order = [name.decode() for name in client.zrange(Names(layer.prefix).group("room"), 0, -1)]
            client.set(key_of(layer, in_order[odd]), "odd")
            with pytest.raises(redis.exceptions.ResponseError, match="WRONGTYPE"), fail_after(PATIENCE):
                await layer.group_send("room", {"n": 1})
            piece = odd // 1000 * 1000
            others = in_order[:piece] + in_order[piece + 1000 :]
            assert all(client.exists(key_of(layer, name)) for name in others)
            assert layer.statistics().sent == len(others)
            client.delete(key_of(layer, in_order[odd]))
            await layer.group_send("room", {"n": 2})
            assert layer.statistics().sent == len(others) + 2500
            assert await receive(layer, 1, in_order[odd]) == [2]
            assert await receive(layer, 2, others[-1]) == [1, 2]
        await layer.flush()


@pytest.mark.parametrize("lost", [False, True], ids=["runs", "lost"])
async def test_a_cancelled_broadcast_in_pieces(two_servers: list[RedisServer], lost: bool) -> None:
    """A broadcast in pieces that is cancelled when the first was sent is sent whole, unless the connection is lost."""
    async with make(QUEUE, *two_servers) as layer:
        asked = link_to_group(layer, "room")
        owner = next(link for link in layer.options.router.links if link is not asked)
        server, other = sorted(two_servers, key=lambda one: one.port != port_of(owner))
        names = [name for name in (f"user.{n}" for n in range(6000)) if link_to_channel(layer, name) is owner][:2500]
        with other.client() as client:
            put_into_group(client, layer, names)
        await broadcast_and_cancel(layer, owner, server, lost=lost)
        with fail_after(PATIENCE), server.client() as client:
            await until(lambda: lost or client.exists(key_of(layer, names[-1])))
            await until_answered(layer)
            found = sum(
                client.exists(*(key_of(layer, name) for name in names[start : start + 500]))
                for start in range(0, 2500, 500)
            )
        await until(lambda: layer.statistics().sent == found)
        assert found == (0 if lost else 2500)


@pytest.mark.parametrize("natively", [False, True], ids=["scope", "task"])
async def test_a_broadcast_cancelled_behind_its_first_piece(redis_server: RedisServer, natively: bool) -> None:
    """Cancelled while it waits for the others, by a scope or by asyncio itself, it ends, and they are sent all the same."""
    async with make(QUEUE, redis_server) as layer:
        names = [f"user.{number}" for number in range(9000)]
        with redis_server.client() as client:
            put_into_group(client, layer, names)
        with fail_after(PATIENCE):
            if natively and get_cancelled_exc_class() is asyncio.CancelledError:
                task = asyncio.ensure_future(layer.group_send("room", {"n": 1}))
                await until(lambda: layer.statistics().sent >= 2000)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            else:
                async with create_task_group() as tg:
                    tg.start_soon(layer.group_send, "room", {"n": 1})
                    await until(lambda: layer.statistics().sent >= 2000)
                    tg.cancel_scope.cancel()
            assert layer.statistics().sent < 9000
            await until(lambda: layer.statistics().sent == 9000)
            assert await receive(layer, 1, names[-1]) == [1]
        await layer.flush()


# What is lost, and what comes twice


async def test_a_popped_message_is_lost_with_the_connection(server: RedisServer) -> None:
    """What Redis had popped when the connection broke is lost, never received twice; the reader gets the next one."""
    got: list[int] = []
    async with Proxy(server.host, server.port) as proxy:
        layer = RedisChannelLayer([proxy.url], prefix=new_prefix(), timeout=PATIENCE)
        async with layer, create_task_group() as tg:

            async def read() -> None:
                got.extend(await receive(layer, 1))

            await layer.send("jobs", {"n": 0})
            server.pause()
            before = proxy.bytes_to_server
            tg.start_soon(read)
            await until(lambda: proxy.bytes_to_server > before)
            proxy.swallow()
            server.resume()
            with server.client() as client:
                await until(lambda: not client.exists(key_of(layer)))
                proxy.stop_swallowing()
                proxy.cut_all()
                await until(lambda: layer.statistics().reconnects >= 1)
                await layer.send("jobs", {"n": 1})
            await until(lambda: got)
        assert got == [1]


async def test_what_a_snapshot_brings_back(server: RedisServer) -> None:
    """A server restarted from its snapshot still holds what was received since: its reader drops it, another one does not."""
    async with make(QUEUE, server) as layer, make(QUEUE, server, prefix=layer.prefix) as other:
        for number in range(5):
            await layer.send("jobs", {"n": number})
        with server.client() as client:
            client.save()
        assert await receive(layer, 5) == [0, 1, 2, 3, 4]
        server.kill()
        server.start()
        with server.client() as client:
            assert client.zcard(key_of(layer)) == 5
            assert await receive(other, 2) == [0, 1]
            await layer.send("jobs", {"n": 5})
            assert await receive(layer, 1) == [5]
            assert not client.exists(key_of(layer))


# At random


@pytest.mark.slow
async def test_clock_steps_at_random(redis_server: RedisServer) -> None:
    """One writer and one reader see the order of sending, however the server's clock goes by less than expiry."""
    steps = random.Random(12)
    async with make(QUEUE, redis_server, expiry=1000) as layer:
        with redis_server.client() as client:
            got: list[int] = []
            for number in range(600):
                await layer.send("jobs", {"n": number})
                if steps.random() < 0.1:  # a clock that goes back and forth is the same as scores that do
                    entries = client.zrange(key_of(layer), 0, -1, withscores=True)
                    ahead = entries[-1][1] - sum(map(int, client.time()[:1])) if entries else 0
                    step = steps.uniform(0, 900 - ahead) if steps.random() < 0.5 else -ahead
                    for entry, score in entries:
                        client.zadd(key_of(layer), {entry: score + step})
                for _ in range(min(steps.randrange(3), number + 1 - len(got))):
                    got += await receive(layer, 1)
            got += await receive(layer, 600 - len(got))
            assert got == list(range(600))


@pytest.mark.slow
async def test_out_of_memory_at_random(server: RedisServer) -> None:
    """Readers are cancelled at random moments while Redis takes no more data and takes some again: each message comes once."""
    moments = random.Random(12)
    got: list[int] = []

    async with make(QUEUE, server, capacity=500) as layer:

        async def read() -> None:
            got.append((await layer.receive("jobs"))["n"])

        for number in range(500):
            await layer.send("jobs", {"n": number})
        with server.client() as client:
            client.config_set("maxmemory-policy", "noeviction")
            for _ in range(300):
                client.config_set("maxmemory", moments.randrange(2))
                async with create_task_group() as tg:
                    for _ in range(moments.randrange(1, 6)):
                        tg.start_soon(read)
                    for _ in range(moments.randrange(8)):
                        await checkpoint()
                    tg.cancel_scope.cancel()
            client.config_set("maxmemory", 0)
        assert got
        got += await receive(layer, 500 - len(got))
        assert sorted(got) == list(range(500))
        assert layer.statistics().discarded == 0
