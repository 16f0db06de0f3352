"""What the layers on Redis do beyond the contract that all layers share."""

from __future__ import annotations

import gc
import logging
import os
import re
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import anyio
import pytest
import redis
import redis.exceptions
from anyio import ClosedResourceError, create_task_group, fail_after, to_thread
from layers_on_redis import (
    PUBSUB,
    QUEUE,
    Kind,
    both,
    grow_older,
    hears,
    link_to_group,
    new_prefix,
    popper,
    session,
    settle_queue,
    transport,
)
from ormsgpack import packb
from redis_server import RedisServer

import anyio_channels
from anyio_channels import (
    ChannelFull,
    RedisChannelLayer,
    RedisPubSubChannelLayer,
    create_channel_layer,
    create_redis_channel_layer,
)
from anyio_channels.contract.layer import Life
from anyio_channels.contract.message import RESERVED_KEY
from anyio_channels.redis.wire import Names

pytestmark = pytest.mark.two_loops

PATIENCE = 20.0
asynchronous = pytest.mark.anyio


async def until(condition: Callable[[], object]) -> None:
    """Wait for what must happen on the other side of a network."""
    with fail_after(PATIENCE):
        while not condition():
            await anyio.sleep(0.002)


def make(kind: Kind, server: RedisServer, **options: Any) -> Any:
    return kind.layer_class([server.url], **{"prefix": new_prefix(), **options})


# Opening, closing, and whose layer it is


@asynchronous
@both
async def test_not_open(kind: Kind, redis_server: RedisServer) -> None:
    """A layer used before it is open says what to write."""
    layer = make(kind, redis_server)
    for call in (lambda: layer.send("a", {}), lambda: layer.receive("a"), layer.new_channel, layer.flush):
        with pytest.raises(RuntimeError, match="is not open; write 'async with layer:'"):
            await call()
    await layer.close()
    async with layer:
        await layer.send("a", {})
    with pytest.raises(ClosedResourceError, match="open it again with 'async with layer:'"):
        await layer.send("a", {})
    async with layer:
        await layer.send("a", {})


@asynchronous
@both
async def test_errors_of_the_block_come_out_as_they_are(kind: Kind, redis_server: RedisServer) -> None:
    """An error, a group of errors and a cancellation leave the block of a layer unwrapped."""
    with pytest.raises(ValueError, match="plain"):
        async with make(kind, redis_server):
            raise ValueError("plain")
    with pytest.raises(ExceptionGroup) as caught:
        async with make(kind, redis_server), create_task_group():
            raise ValueError("grouped")
    assert [type(one) for one in caught.value.exceptions] == [ValueError]
    with anyio.CancelScope() as scope:
        async with make(kind, redis_server):
            scope.cancel()
            await anyio.sleep_forever()
    assert scope.cancelled_caught


@asynchronous
@both
async def test_cancelled_while_opening(kind: Kind, redis_server: RedisServer) -> None:
    """Opening can be cancelled at any point, and leaves no connection and no task behind."""
    name = new_prefix()
    url = f"{redis_server.url}?client_name={name}"
    with redis_server.client() as client:
        for checkpoints in range(12):
            with anyio.CancelScope() as scope:

                async def cancel(scope: anyio.CancelScope = scope, checkpoints: int = checkpoints) -> None:
                    for _ in range(checkpoints):
                        await anyio.lowlevel.checkpoint()
                    scope.cancel()

                async with create_task_group() as tg:
                    tg.start_soon(cancel)
                    async with kind.layer_class([url]) as layer:
                        await layer.send("a", {})
            await until(lambda: not [one for one in client.client_list() if one["name"] == name])


@asynchronous
@both
async def test_joined_again_after_a_join_that_was_cancelled(kind: Kind, redis_server: RedisServer) -> None:
    """What a cancelled join leaves behind is put in order before the next join, and does not end its membership."""
    async with make(kind, redis_server) as layer, layer.subscribe() as inbox:
        for checkpoints in range(12):
            async with create_task_group() as tg:
                tg.start_soon(inbox.join, "room")
                for _ in range(checkpoints):
                    await anyio.lowlevel.checkpoint()
                tg.cancel_scope.cancel()
            await inbox.join("room")
            await layer.group_send("room", {"n": checkpoints})
            with anyio.fail_after(20):
                assert await inbox.receive() == {"n": checkpoints}
            await inbox.leave("room")


@both
def test_another_event_loop(kind: Kind, redis_server: RedisServer, anyio_backend: tuple[str, dict[str, Any]]) -> None:
    """A layer used from another event loop than the one that opened it says so at once."""

    async def use(layer: Any, channel: str) -> None:
        calls: list[Callable[[], Any]] = [
            lambda: layer.send("a", {}),
            lambda: layer.receive("a"),
            lambda: layer.receive(channel),
        ]
        for call in calls:
            with fail_after(PATIENCE), pytest.raises(RuntimeError, match="was opened in another event loop"):
                await call()

    async def main() -> None:
        async with make(kind, redis_server) as layer:
            channel = await layer.new_channel()
            await to_thread.run_sync(lambda: anyio.run(use, layer, channel, backend="trio"))
            await to_thread.run_sync(lambda: anyio.run(use, layer, channel, backend="asyncio"))
            await layer.send("a", {})

    anyio.run(main, backend=anyio_backend[0], backend_options=anyio_backend[1])


@asynchronous
@both
async def test_left_open(kind: Kind, redis_server: RedisServer) -> None:
    """A layer that was opened and never closed is a ResourceWarning."""
    layer = make(kind, redis_server)
    layer._life = Life.OPEN
    with pytest.warns(ResourceWarning, match="unclosed channel layer <Redis"):
        del layer
        gc.collect()


@asynchronous
@both
async def test_nothing_is_left_in_redis(kind: Kind, redis_server: RedisServer) -> None:
    """After closing, inboxes have left no key, no subscription and no connection; one key says that the prefix is used."""
    name = new_prefix()
    with redis_server.client() as client:
        async with kind.layer_class([f"{redis_server.url}?client_name={name}"], prefix=name) as layer:
            async with layer.subscribe("room", "other") as inbox:
                await layer.group_send("room", {"n": 1})
                await layer.send(inbox.channel, {"n": 2})
            await layer.new_channel()
        await until(lambda: not [one for one in client.client_list() if one["name"] == name])
        assert {key.decode() for key in client.keys(f"{name}*")} <= {f"{name}:prefix"}
        assert not client.pubsub_channels(f"{name}*")


@asynchronous
async def test_closing_gives_back(redis_server: RedisServer) -> None:
    """What was on its way to a reader of a normal channel is in Redis again after closing, in its place."""
    layer = make(QUEUE, redis_server)
    other = make(QUEUE, redis_server, prefix=layer.prefix)
    async with other:
        async with layer, create_task_group() as tg:
            # Popped for a reader who is cancelled at the same moment: it is here, and nobody's.
            source = session(layer).here.find("a")
            scope = anyio.CancelScope()

            async def read() -> None:
                with scope:
                    await layer.receive("a")

            tg.start_soon(read)
            await until(lambda: popper(layer).blocked and popper(layer).popping)
            await other.send("a", {"n": 1})
            await other.send("a", {"n": 2})
            await until(lambda: source.entries or scope.cancelled_caught or not layer.statistics().waiting_receivers)
            scope.cancel()
        got = [await other.receive("a") for _ in range(1)]
        assert got[0]["n"] in (1, 2)


@asynchronous
async def test_reopened_layer_is_blank(redis_server: RedisServer) -> None:
    """A layer opened again has new names, and nothing of what it held."""
    layer = make(PUBSUB, redis_server)
    async with layer:
        first = await layer.new_channel()
        await layer.send(first, {"n": 1})
        await until(lambda: layer.statistics().buffered_messages)
    async with layer:
        assert layer.statistics().buffered_messages == layer.statistics().sent == 0
        assert (await layer.new_channel()).split("!")[0] != first.split("!")[0]


# Channels and their neighbours


@asynchronous
@both
async def test_a_slow_reader_costs_its_neighbours_nothing(kind: Kind, redis_server: RedisServer) -> None:
    """A channel that nobody reads never costs another of its process a message or a ChannelFull; what it misses is counted."""
    layer = make(kind, redis_server, capacity=10)
    sender = make(kind, redis_server, capacity=10, prefix=layer.prefix)
    async with layer, sender, layer.subscribe("room") as idle, layer.subscribe("room") as busy:
        for number in range(100):
            await sender.send(idle.channel, {"n": number})
            await sender.send(busy.channel, {"n": number})
            assert await busy.receive() == {"n": number}
        assert layer.statistics().dropped_full == 90
        assert [(await idle.receive())["n"] for _ in range(10)] == list(range(10))


@asynchronous
async def test_an_inbox_does_not_wait_behind_normal_channels(redis_server: RedisServer) -> None:
    """What is sent to an inbox comes in front of the next message of a normal channel, however many of those have one."""
    got: list[str] = []
    async with make(QUEUE, redis_server) as layer, layer.subscribe() as inbox, create_task_group() as tg:

        async def read(channel: str) -> None:
            await layer.receive(channel)
            got.append(channel)

        busy = [f"busy.{number}" for number in range(30)]
        names = Names(layer.prefix)
        for _ in range(3):  # which of all keys comes first in a pop changes with each
            got.clear()
            for name in (*busy, inbox.channel):
                tg.start_soon(read, name)
            await until(lambda: layer.statistics().waiting_receivers == len(busy) + 1)
            await settle_queue(layer)
            with redis_server.client() as client:  # the event loop stands still meanwhile: they are all there at once
                now = client.time()[0]
                for name in busy:
                    client.zadd(names.channel(name), {os.urandom(12) + packb({}): now})
                client.zadd(names.channel(inbox.channel), {os.urandom(12) + packb({RESERVED_KEY: inbox.channel}): now})
            await until(lambda: len(got) == len(busy) + 1)
            assert got.index(inbox.channel) < 5


@asynchronous
async def test_capacity_is_exact_among_processes(redis_server: RedisServer) -> None:
    """100 sends at once from each of two layers to one channel of capacity 5: five are accepted, no more."""
    prefix = new_prefix()
    one, two = (make(QUEUE, redis_server, capacity=5, prefix=prefix) for _ in range(2))
    accepted: list[int] = []

    async def send(layer: Any, number: int) -> None:
        try:
            await layer.send("a", {"n": number})
        except ChannelFull:
            return
        accepted.append(number)

    async with one, two, create_task_group() as tg:
        for number in range(100):
            tg.start_soon(send, one, number)
            tg.start_soon(send, two, -number)
    assert len(accepted) == 5


@asynchronous
async def test_a_burst_fits_a_mailbox_of_pubsub(redis_server: RedisServer) -> None:
    """A pub/sub mailbox holds 1,000 messages if not told otherwise, whichever way the layer was made; the next one is dropped."""
    for layer in (
        RedisPubSubChannelLayer([redis_server.url], prefix=new_prefix()),
        create_channel_layer(f"redis+pubsub://{redis_server.host}:{redis_server.port}", prefix=new_prefix()),
    ):
        async with layer, layer.subscribe("room") as inbox:
            for number in range(1001):
                await layer.group_send("room", {"n": number})
            await until(lambda: layer.statistics().dropped_full)  # noqa: B023 - called in this round
            assert layer.statistics().buffered_messages == 1000
            assert [await inbox.receive() for _ in range(1000)] == [{"n": number} for number in range(1000)]


@asynchronous
@both
async def test_calls_to_redis(kind: Kind, redis_server: RedisServer) -> None:
    """A send is one command, a broadcast is two on the queue layer and one on pub/sub, whatever else there is."""
    async with make(kind, redis_server) as layer:
        for number in range(10):
            await layer.group_add("room", await layer.new_channel() if kind is PUBSUB else f"normal.{number}")
        for number in range(100):
            await layer.group_add(f"room.{number}", await layer.new_channel())
        await layer.send("normal.0", {"n": 0})  # the scripts are there from now on
        await layer.group_send("room", {"n": 0})
        counts = [layer.statistics().commands]
        await layer.send("normal.0", {"n": 1})
        counts.append(layer.statistics().commands)
        await layer.group_send("room", {"n": 2})
        counts.append(layer.statistics().commands)
        assert [after - before for before, after in pairwise(counts)] == [1, 1 if kind is PUBSUB else 2]


@asynchronous
async def test_order_by_the_servers_clock(redis_server: RedisServer) -> None:
    """Messages keep their order although the clock of another client runs ahead; one that is far ahead is not followed."""
    layer = make(QUEUE, redis_server)
    async with layer:
        with redis_server.client() as client:
            entry = b"x" * 12 + b"\x81\xa1n\x00"
            client.zadd(Names(layer.prefix).channel("a"), {entry: time.time() + 0.5})
            for number in range(1, 5):
                await layer.send("a", {"n": number})
            assert [(await layer.receive("a"))["n"] for _ in range(5)] == [0, 1, 2, 3, 4]
            client.zadd(Names(layer.prefix).channel("a"), {entry: time.time() + 500})
            await layer.send("a", {"n": 1})
            assert [(await layer.receive("a"))["n"] for _ in range(2)] == [1, 0]


@asynchronous
async def test_many_messages_at_once_keep_their_order(redis_server: RedisServer) -> None:
    """More messages than are popped at once, sent before anybody reads: each comes once and in order."""
    layer = make(QUEUE, redis_server, capacity=5000)
    async with layer, make(QUEUE, redis_server, capacity=5000, prefix=layer.prefix) as sender:
        for channel in (await sender.new_channel(), "normal"):
            async with create_task_group() as tg:
                for number in range(2500):
                    tg.start_soon(sender.send, channel, {"n": number})
            reader = sender if "!" in channel else layer
            got = [(await reader.receive(channel))["n"] for _ in range(2500)]
            assert sorted(got) == list(range(2500))


@asynchronous
async def test_renewed_are_memberships_of_our_channels(redis_server: RedisServer) -> None:
    """Those of an inbox and of a channel of new_channel() are; a normal channel's lasts from its last group_add on."""
    async with make(QUEUE, redis_server) as layer, layer.subscribe("room") as inbox:
        channel = await layer.new_channel()
        await layer.group_add("room", channel)
        await layer.group_add("room", "normal")

        async def joined() -> dict[bytes, float]:
            await link.execute("PING")
            with redis_server.client() as client:
                return dict(client.zrange(Names(layer.prefix).group("room"), 0, -1, withscores=True))

        link = link_to_group(layer, "room")
        before = await joined()
        session(layer).memberships.renew(link)
        after = await joined()
        for ours in (inbox.channel.encode(), channel.encode()):
            assert after[ours] > before[ours]
        assert after[b"normal"] == before[b"normal"]


@asynchronous
async def test_readers_in_several_layers_share(redis_server: RedisServer) -> None:
    """Each message of a normal channel goes to one reader, wherever that is; who was cancelled took nothing."""
    prefix = new_prefix()
    one, two = (make(QUEUE, redis_server, prefix=prefix) for _ in range(2))
    got: list[int] = []

    async def read(layer: Any) -> None:
        while True:
            got.append((await layer.receive("work"))["n"])

    async def give_up(layer: Any) -> None:
        while True:
            with anyio.move_on_after(0.001):
                got.append((await layer.receive("work"))["n"])

    async with one, two, create_task_group() as tg:
        for layer in (one, two):
            tg.start_soon(read, layer)
            tg.start_soon(give_up, layer)
        for number in range(500):
            await one.send("work", {"n": number}, wait=True)
        await until(lambda: len(got) >= 500)
        tg.cancel_scope.cancel()
    assert sorted(got) == list(range(500))


@asynchronous
async def test_room_made_by_a_pop_that_takes_the_marker(redis_server: RedisServer) -> None:
    """If a message and a sender who waits come while a reader is blocked, the pop finds the sender first: it is told."""
    async with make(QUEUE, redis_server) as layer, create_task_group() as tg:
        tg.start_soon(layer.receive, "a")
        await until(lambda: layer.statistics().waiting_receivers)
        await settle_queue(layer)
        key = Names(layer.prefix).channel("a")
        with redis_server.client() as client, client.pubsub() as sender:
            sender.subscribe(Names(layer.prefix).room(key))
            assert sender.get_message(timeout=PATIENCE)["type"] == "subscribe"
            with client.pipeline() as at_once:
                at_once.zadd(Names(layer.prefix).room(key), {"": 0})
                at_once.zadd(key, {os.urandom(12) + packb({}): client.time()[0]})
                at_once.execute()
            await until(lambda: layer.statistics().received)
            told = sender.get_message(timeout=5)  # it is there already, if it comes
            assert told is not None
            assert told["type"] == "message"


@asynchronous
async def test_waiting_for_room_made_elsewhere(redis_server: RedisServer) -> None:
    """send(wait=True) goes on as soon as a reader in another layer, or one that announces nothing, has made room."""
    prefix = new_prefix()
    one, two = (make(QUEUE, redis_server, prefix=prefix, capacity=1) for _ in range(2))
    async with one, two:
        await one.send("a", {"n": 0})
        async with create_task_group() as tg:
            tg.start_soon(lambda: one.send("a", {"n": 1}, wait=True))
            with redis_server.client() as client:
                await until(lambda: client.exists(Names(prefix).room(Names(prefix).channel("a"))))
            assert await two.receive("a") == {"n": 0}
        async with create_task_group() as tg:
            tg.start_soon(lambda: one.send("a", {"n": 2}, wait=True))
            await anyio.wait_all_tasks_blocked()
            with redis_server.client() as client:
                await until(lambda: client.exists(Names(prefix).room(Names(prefix).channel("a"))))
                client.zpopmin(Names(prefix).channel("a"))  # as channels_redis does: nobody is told
        assert await two.receive("a") == {"n": 2}
        assert not session(one).senders.queues
        with redis_server.client() as client:
            await until(lambda: not client.pubsub_channels(f"{prefix}*"))


@asynchronous
async def test_a_channel_called_as_a_group_is(redis_server: RedisServer) -> None:
    """A channel and a group may have the same name in Redis: giving one up does not make the other deaf."""
    async with make(PUBSUB, redis_server) as layer, layer.subscribe("room") as inbox:
        name = Names(layer.prefix).group_topic("room")
        await transport(layer).subscribe(name)
        transport(layer).unsubscribe(name)
        await layer.group_send("room", {"n": 1})
        assert await inbox.receive() == {"n": 1}


@asynchronous
async def test_a_marker_that_is_none_costs_no_message(redis_server: RedisServer) -> None:
    """Where somebody else keeps something under the name of a room's marker, a pop is refused before it takes anything."""
    async with make(QUEUE, redis_server) as layer:
        marker = Names(layer.prefix).room(Names(layer.prefix).channel("a"))
        await layer.send("a", {"n": 1})
        with redis_server.client() as client:
            client.set(marker, "")
            with fail_after(PATIENCE), pytest.raises(redis.exceptions.ResponseError, match="WRONGTYPE"):
                await layer.receive("a")
            client.delete(marker)
        with fail_after(PATIENCE):
            assert await layer.receive("a") == {"n": 1}


@asynchronous
async def test_what_says_that_a_sender_waits_goes_by_itself(redis_server: RedisServer) -> None:
    """The key that a sender who waits for room leaves in Redis ends ten seconds after expiry, if nobody takes it away."""
    async with make(QUEUE, redis_server, capacity=1, expiry=20) as layer, create_task_group() as tg:
        await layer.send("a", {})
        tg.start_soon(partial(layer.send, "a", {}, wait=True))
        with redis_server.client() as client:
            await until(lambda: client.keys(f"{layer.prefix}:waiting:*"))
            (key,) = client.keys(f"{layer.prefix}:waiting:*")
            assert 0 < client.pttl(key) <= 30_000
        tg.cancel_scope.cancel()


@asynchronous
async def test_room_that_nobody_waits_for(redis_server: RedisServer) -> None:
    """Room that is announced when the last sender has gone wakes nobody."""
    async with make(QUEUE, redis_server, capacity=1) as layer:
        await layer.send("a", {})
        with anyio.move_on_after(0.01):  # a real moment, in which it begins to wait
            await layer.send("a", {}, wait=True)
        session(layer).senders.heard(Names(layer.prefix).channel("a"))
        assert not session(layer).senders.queues


@asynchronous
async def test_an_idle_channel_dropped_under_a_reader(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A channel that is dropped between a reader's finding it and waiting at it is found again; a closed one is not."""
    async with make(QUEUE, redis_server) as layer:
        here = session(layer).here
        original = here.find
        dropped: list[str] = []

        def find(name: str) -> Any:
            channel = original(name)
            if not dropped:
                dropped.append(name)
                here.forget(channel)
            return channel

        monkeypatch.setattr(here, "find", find)
        await layer.send("a", {"n": 1})
        assert await layer.receive("a") == {"n": 1}
        assert dropped == ["a"]


@asynchronous
async def test_waiting_for_room_through_an_outage(tmp_path: Any) -> None:
    """A sender that waits for room is told when Redis goes away, and nothing of its wait is left."""
    with RedisServer(tmp_path) as server:
        layer = make(QUEUE, server, capacity=1, timeout=0.3)
        async with layer:
            await layer.send("a", {})
            async with create_task_group() as tg:
                failed: list[Exception] = []

                async def send() -> None:
                    try:
                        await layer.send("a", {}, wait=True)
                    except redis.exceptions.ConnectionError as error:
                        failed.append(error)

                tg.start_soon(send)
                await until(lambda: session(layer).senders.queues)
                await to_thread.run_sync(server.kill)
                await until(lambda: failed)
            assert not session(layer).senders.queues


# Expiry, in Redis and here


@asynchronous
async def test_expired_on_the_way(redis_server: RedisServer) -> None:
    """A message that expired in Redis is not delivered, whichever way it is popped."""
    layer = make(QUEUE, redis_server, expiry=10)
    with redis_server.client() as client:
        async with layer, layer.subscribe() as inbox:
            await layer.send("a", {"n": 1})
            grow_older(client, layer.prefix, 11)
            await layer.send("a", {"n": 2})
            assert await layer.receive("a") == {"n": 2}
            await until(lambda: popper(layer).popping)
            # What the blocking pop hands out may be old too.
            entry = b"%12d" % 0 + packb({"n": 3, "__asgi_channel__": inbox.channel})
            client.zadd(Names(layer.prefix).channel(inbox.channel), {entry: time.time() - 11})
            await layer.send(inbox.channel, {"n": 4})
            assert await inbox.receive() == {"n": 4}
            assert layer.statistics().expired == 2


@asynchronous
async def test_pubsub_channel_given_up(redis_server: RedisServer) -> None:
    """A pub/sub channel that nobody uses any more is unsubscribed; an inbox is not, nor is one that is read."""
    now = 0.0
    layer = make(PUBSUB, redis_server, clock=lambda: now, expiry=10)
    with redis_server.client() as client:
        async with layer, layer.subscribe() as inbox:
            gone, read = str(await layer.new_channel()), await layer.new_channel()
            await layer.group_add("room", gone)
            for channel in (gone, read, inbox.channel):
                await layer.send(channel, {})
            await until(lambda: layer.statistics().buffered_messages == 3)
            await layer.receive(read)
            now = 10.0
            assert layer.statistics().expired == 2
            await until(lambda: not client.pubsub_numsub(gone)[0][1])
            assert client.pubsub_numsub(read)[0][1] == client.pubsub_numsub(inbox.channel)[0][1] == 1
            assert await layer.group_channels("room") == set()
            with pytest.raises(anyio.ClosedResourceError, match="has ended"):
                await layer.group_add("room", gone)
            with pytest.raises(RuntimeError, match="takes only channels of this process here, and 'a!b' is not one"):
                await layer.group_add("room", "a!b")


# Flush


@asynchronous
@both
async def test_pushes_that_are_not_ours_are_passed_over(kind: Kind, redis_server: RedisServer) -> None:
    """What Redis may push beside messages harms nothing: here, that a key changed."""
    async with make(kind, redis_server) as layer, layer.subscribe() as inbox:
        (link,) = layer.options.router.links
        key = f"{layer.prefix}tracked"
        await link.execute("CLIENT", "TRACKING", "ON", "BCAST", "PREFIX", key)
        await link.execute("SET", key, "changed")
        await link.execute("DEL", key)
        await layer.send(inbox.channel, {"n": 1})
        with fail_after(PATIENCE):
            assert await inbox.receive() == {"n": 1}


@asynchronous
async def test_flush_keeps_to_its_prefix(redis_server: RedisServer) -> None:
    """Flushing prefix 'asgi' throws away its keys, a peer's backup queues too, and none of prefix 'asgi2' or of others."""
    first, second = make(QUEUE, redis_server, prefix="flush*"), make(QUEUE, redis_server, prefix="flush*2")
    async with first, second, first.subscribe("room") as inbox:
        for layer in (first, second):
            await layer.send("a", {"n": 1})
            await layer.group_add("room", "b")
        await first.send(inbox.channel, {})
        with redis_server.client() as client:
            client.zadd("flush*a$inflight", {b"x": 1})
            client.set("flushother", 1)
            client.mset({f"filler{number}": 1 for number in range(2500)})  # more than one page
            await first.flush()
            assert set(client.scan_iter("flush*")) == {
                b"flushother", b"flush*:prefix", b"flush*2:prefix", b"flush*2a", b"flush*2:group:room",
            }  # fmt: skip
        assert first.statistics().buffered_messages == 0
        assert await second.receive("a") == {"n": 1}


# Names, numbers, words


@asynchronous
async def test_pubsub_groups_are_local(redis_server: RedisServer) -> None:
    """Each process lists its own members; a broadcast reaches all, but for those excluded, wherever they are."""
    prefix = new_prefix()
    one, two = make(PUBSUB, redis_server, prefix=prefix), make(PUBSUB, redis_server, prefix=prefix)
    async with one, two, one.subscribe("room") as here, two.subscribe("room") as there, two.subscribe("room") as also:
        assert await one.group_channels("room") == {here.channel}
        await one.group_send("room", {"n": 1}, exclude=[there.channel])
        await one.group_send("room", {"n": 2})
        assert [await here.receive() for _ in range(2)] == [{"n": 1}, {"n": 2}]
        assert [await also.receive() for _ in range(2)] == [{"n": 1}, {"n": 2}]
        assert await there.receive() == {"n": 2}


@asynchronous
async def test_a_channel_that_is_called_as_a_group_is_in_redis(redis_server: RedisServer) -> None:
    """Both go through one Redis channel, which is subscribed to as long as either is wanted."""
    async with make(PUBSUB, redis_server) as layer, create_task_group() as tg:
        name = Names(layer.prefix).group_topic("room")
        got: list[Any] = []

        async def read() -> None:
            got.append(await layer.receive(name))

        tg.start_soon(read)
        await until(lambda: hears(layer, name))
        async with layer.subscribe("room") as inbox:
            await layer.group_send("room", {"n": 1})
            assert await inbox.receive() == {"n": 1}
            await until(lambda: got == [{"n": 1}])
            tg.start_soon(read)
        await layer.send(name, {"n": 2})
        await until(lambda: got == [{"n": 1}, {"n": 2}])


@asynchronous
async def test_a_normal_channel_of_pubsub_gives_each_process_a_copy(redis_server: RedisServer) -> None:
    """As documented: pub/sub copies; and a channel that was read once keeps what comes for the next call."""
    one, two = make(PUBSUB, redis_server), make(PUBSUB, redis_server)
    async with one, two, create_task_group() as tg:
        got: list[Any] = []

        async def read(layer: Any) -> None:
            got.append(await layer.receive("normal"))

        for layer in (one, two):
            tg.start_soon(read, layer)
            await until(partial(hears, layer, "normal"))
        await one.send("normal", {"n": 1})
        await until(lambda: len(got) == 2)
        await one.send("normal", {"n": 2})
        assert await two.receive("normal") == {"n": 2}


@asynchronous
async def test_statistics(redis_server: RedisServer) -> None:
    """Statistics of a layer on Redis count connections, reconnects and commands too."""
    layer = make(QUEUE, redis_server)
    async with layer:
        before = layer.statistics()
        assert (before.connections, before.reconnects) == (1, 0)
        await layer.send("a", {})
        after = layer.statistics()
        assert (after.sent, after.commands > before.commands) == (1, True)
        await layer.receive("a")
        await until(lambda: layer.statistics().received == 1)
    assert layer.statistics().connections == 0


@asynchronous
@pytest.mark.parametrize("format_", ["msgpack", "json"])
@pytest.mark.parametrize("keys", [None, ["secret"], ["new", "secret"]])
@both
async def test_formats(kind: Kind, format_: Any, keys: Any, redis_server: RedisServer) -> None:
    """MessagePack and JSON, plain and encrypted, directly and by group, with and without exclude."""
    layer = make(kind, redis_server, serializer_format=format_, symmetric_encryption_keys=keys)
    async with layer, layer.subscribe("room") as one, layer.subscribe("room") as two:
        await layer.group_send("room", {"text": "é", "list": [1, None]})
        await layer.group_send("room", {"n": 1}, exclude=[two.channel])
        await layer.send(one.channel, {})
        assert [await one.receive() for _ in range(3)] == [{"text": "é", "list": [1, None]}, {"n": 1}, {}]
        assert await two.receive() == {"text": "é", "list": [1, None]}


@asynchronous
async def test_logged_once(redis_server: RedisServer, caplog: pytest.LogCaptureFixture) -> None:
    """A full member is logged once in expiry seconds, however many messages and members; all are counted."""
    now = 0.0
    layer = make(QUEUE, redis_server, capacity=1, clock=lambda: now)
    async with layer:
        await layer.group_add("room", "a")
        for _ in range(5):
            await layer.group_send("room", {})
        now = 61.0
        await layer.group_send("room", {})
        assert layer.statistics().dropped_full == 5
    records = [record for record in caplog.records if "full" in record.getMessage()]
    assert [record.levelno for record in records] == [logging.WARNING] * 3
    assert [record.__dict__["anyio_channels_count"] for record in records] == [1, 3, 1]


BAD_OPTIONS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"prefix": 5}, TypeError, "prefix must be a str, not 5"),
    ({"expiry": 0}, ValueError, "expiry must be a positive"),
    ({"group_expiry": "1"}, TypeError, "group_expiry must be a number"),
    ({"timeout": -1}, ValueError, "timeout must be a positive"),
    ({"connect_timeout": None}, TypeError, "connect_timeout must be a number"),
    ({"keep_alive": float("inf")}, ValueError, "keep_alive must be a positive"),
    ({"clock": 5}, TypeError, "clock must be a function"),
    ({"serializer_format": "pickle"}, ValueError, "serializer_format must be 'msgpack' or 'json', not 'pickle'"),
    ({"symmetric_encryption_keys": "key"}, TypeError, "must be a list of keys"),
    ({"hosts": "redis://localhost"}, TypeError, "hosts must be a list"),
    ({"capactiy": 5}, TypeError, "unexpected keyword argument 'capactiy'"),
]


@both
@pytest.mark.parametrize(("options", "error", "words"), BAD_OPTIONS)
def test_bad_options(kind: Kind, options: dict[str, Any], error: type[Exception], words: str) -> None:
    """A bad option is an error that names it and the rule, when the layer is made."""
    with pytest.raises(error, match=words):
        kind.layer_class(**options)


def test_bad_options_of_one_layer() -> None:
    """Options that only one of the layers has are checked too."""
    with pytest.raises(ValueError, match="random_prefix_length must be at least 1"):
        RedisChannelLayer(random_prefix_length=0)
    with pytest.raises(ValueError, match="random_prefix_length must be at most 255, not 256"):
        RedisChannelLayer(random_prefix_length=256)
    for option in ("expiry", "group_expiry", "timeout", "connect_timeout", "keep_alive"):
        for make in (RedisChannelLayer, RedisPubSubChannelLayer):
            with pytest.raises(ValueError, match=f"^{option} must be at most 1000000000 seconds .*, not 1e[+]17"):
                make(**{option: 1e17})  # type: ignore[arg-type]
    for option in ("on_disconnect", "on_reconnect"):
        with pytest.raises(TypeError, match=f"{option} must be the type of a message"):
            RedisPubSubChannelLayer(**{option: 5})  # type: ignore[arg-type]


URLS: list[tuple[str, type[Any], dict[str, Any]]] = [
    ("redis://h:1/2?prefix=p&capacity=5", RedisChannelLayer, {"prefix": "p", "capacity": 5}),
    ("rediss://h?expiry=1.5&serializer_format=json", RedisChannelLayer, {"expiry": 1.5}),
    ("unix:///tmp/redis.sock?db=1&random_prefix_length=16", RedisChannelLayer, {}),
    ("redis+pubsub://h?timeout=2&keep_alive=3", RedisPubSubChannelLayer, {"timeout": 2.0, "keep_alive": 3.0}),
    ("rediss+pubsub://h?ssl_cert_reqs=none", RedisPubSubChannelLayer, {}),
    ("unix+pubsub:///tmp/redis.sock", RedisPubSubChannelLayer, {}),
]


@pytest.mark.parametrize(("url", "layer_class", "options"), URLS)
def test_layers_from_urls(url: str, layer_class: type[Any], options: dict[str, Any]) -> None:
    """Each scheme makes its layer, the query gives options of the layer and of the connection."""
    layer = create_channel_layer(url)
    assert type(layer) is layer_class
    assert {name: getattr(layer, name) for name in options} == options


@pytest.mark.parametrize(
    ("url", "options", "error", "words"),
    [
        (
            "redis://h?capactiy=5",
            {},
            TypeError,
            "unknown option 'capactiy' in a channel layer URL; there are: prefix, expiry, .* connection: client_name",
        ),
        ("redis://h?channel_capacity=5", {}, TypeError, "'channel_capacity' cannot be said in a .* a keyword argument"),
        ("redis://a:6379,", {}, ValueError, "has one without a name: 'a:6379,'"),
        ("redis+cluster://a,,b", {}, ValueError, "has one without a name: 'a,,b'"),
        ("redis+sentinel://,a/m", {}, ValueError, "has one without a name: ',a'"),
        ("redis://u:p@a,u:p@b", {}, ValueError, "user and password stand once in a channel layer URL, in front"),
        ("redis:h:6380/3", {}, ValueError, "has two slashes behind its scheme: redis://"),
        ("redis+pubsub:/h", {}, ValueError, "has two slashes behind its scheme: redis\\+pubsub://"),
        ("redis://h", {"capactiy": 5}, TypeError, "unknown option 'capactiy'"),
        ("redis://h?capacity=x", {}, ValueError, "option capacity in a channel layer URL must be a number, not 'x'"),
        ("redis://h?capacity=1", {"capacity": 2}, TypeError, "given twice"),
        ("redis+pubsub://h?random_prefix_length=5", {}, TypeError, "the pub/sub layer has no such prefix"),
        ("redis+pubsub://h?capacity=1", {"capacity": 2}, TypeError, "given twice"),
        ("redis+pubsub://h", {"random_prefix_length": 5}, TypeError, "unknown option 'random_prefix_length'"),
        ("redis://h/x", {}, ValueError, "Redis URL"),
    ],
)
def test_bad_urls(url: str, options: dict[str, Any], error: type[Exception], words: str) -> None:
    """What a URL gets wrong is said."""
    with pytest.raises(error, match=words):
        create_channel_layer(url, **options)


def test_create_redis_channel_layer() -> None:
    """create_redis_channel_layer() makes queue layers, and nothing else."""
    assert type(create_redis_channel_layer("redis://h", symmetric_encryption_keys=["k"])) is RedisChannelLayer
    for url in ("memory://", "redis+pubsub://h"):
        with pytest.raises(ValueError, match="a URL of the queue layer begins with"):
            create_redis_channel_layer(url)


def test_repr_has_no_password() -> None:
    """A layer's repr names server and options, and no password."""
    text = repr(create_channel_layer("redis://user:s3cret@h:1?capacity=7"))
    assert re.search(r"Redis at h:1 .* capacity=7", text)
    assert "s3cret" not in text


def test_attributes_of_the_packages() -> None:
    """The layers are there under both names, and what is not there is said as usual."""
    for package in (anyio_channels, anyio_channels.layers):
        assert package.RedisChannelLayer is RedisChannelLayer
        with pytest.raises(AttributeError, match="has no attribute 'RedisLayer'"):
            _ = package.RedisLayer


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without redis and hiredis the error says what to install."""
    import sys

    for name in [
        name for name in sys.modules if name.startswith(("anyio_channels.layers.redis", "anyio_channels.redis"))
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(anyio_channels.layers, "redis")
    monkeypatch.setitem(sys.modules, "hiredis", None)
    with pytest.raises(ImportError, match=r"pip install 'anyio_channels\[redis\]'"):
        _ = anyio_channels.RedisChannelLayer
    with pytest.raises(ImportError, match=r"a redis:// channel layer needs an extra"):
        create_channel_layer("redis://h")


@pytest.mark.parametrize("make", [RedisChannelLayer, RedisPubSubChannelLayer])
def test_health_check_interval_is_keep_alive(make: type[RedisChannelLayer | RedisPubSubChannelLayer]) -> None:
    """The interval that channels_redis has for a host is the sign of life here; the shortest holds for the layer."""
    hosts: list[Any] = [
        {"host": "a", "health_check_interval": 9},
        {"host": "b", "health_check_interval": 7},
        "redis://c",
    ]
    assert make(hosts).keep_alive == 7
    assert make(["redis://c"]).keep_alive == 15
    assert make([{"host": "a", "health_check_interval": 0}], keep_alive=3).keep_alive == 3
