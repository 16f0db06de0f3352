"""The real channels_redis and fast-channels on the other side of one Redis, in both directions, for both layers."""

from __future__ import annotations

import asyncio
import importlib
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest
import redis
from anyio import create_task_group, fail_after, sleep, to_thread
from layers_on_redis import PUBSUB, QUEUE, Kind, both, grow_older, hears, new_prefix, popper
from redis_server import RedisServer

from anyio_channels.redis.wire import Names

pytestmark = [pytest.mark.anyio, pytest.mark.two_loops]

PATIENCE = 20.0
MESSAGE = {"type": "chat.message", "text": "héllo", "list": [1, -5, 2.5, True, None], "dict": {"a": {"b": []}}}
PEERS = {
    ("channels_redis", "queue"): ("channels_redis.core", "RedisChannelLayer"),
    ("channels_redis", "pubsub"): ("channels_redis.pubsub", "RedisPubSubChannelLayer"),
    ("fast_channels", "queue"): ("fast_channels.layers.redis", "RedisChannelLayer"),
    ("fast_channels", "pubsub"): ("fast_channels.layers.redis", "RedisPubSubChannelLayer"),
}
FORMATS: list[dict[str, Any]] = [
    {},
    {"serializer_format": "json"},
    {"symmetric_encryption_keys": ["a secret"]},
    {"symmetric_encryption_keys": ["a secret"], "serializer_format": "json"},
]
peers = pytest.mark.parametrize("package", ["channels_redis", "fast_channels"])


class Peer:
    """A layer of a peer, in an asyncio loop and a thread of its own: peers run nowhere else."""

    def __init__(self, package: str, kind: Kind, *urls: str, **options: Any) -> None:
        module, name = PEERS[package, kind.name]
        # Without a time-out: from redis 8.0 on its default ends their readers after five idle seconds.
        hosts = [{"address": url, "socket_timeout": None} for url in urls]
        self.layer: Any = getattr(importlib.import_module(module), name)(hosts=hosts, **options)
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.prefix = options["prefix"]
        self.urls = urls
        self.is_pubsub = kind is PUBSUB
        self.groups: set[str] = set()

    async def call(self, method: str, *args: Any) -> Any:
        """Call a method of the layer in its own loop.

        Theirs do not wait until Redis has heard that they subscribe, so what is published next may come before it. Here that
        is waited for.
        """

        def run() -> Any:
            coroutine: Coroutine[Any, Any, Any] = getattr(self.layer, method)(*args)
            return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(PATIENCE)

        group = f"{self.prefix}__group__{args[0]}" if method == "group_add" else None
        before = 0 if group is None else self._listeners(group)
        result = await to_thread.run_sync(run, abandon_on_cancel=True)
        if self.is_pubsub and method == "new_channel":
            await until(lambda: self._listeners(result))
        if self.is_pubsub and group is not None and group not in self.groups:
            self.groups.add(group)
            await until(lambda: self._listeners(group) > before)
        return result

    def _listeners(self, name: str) -> int:
        count = 0
        for url in self.urls:
            with redis.Redis.from_url(url) as client:
                count += client.pubsub_numsub(name)[0][1]
        return count

    def close(self) -> None:
        """End its loop, and with it the layer's connections."""

        async def end() -> None:
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()

        asyncio.run_coroutine_threadsafe(end(), self.loop).result(PATIENCE)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()  # peers close their connections in a patched close()


@asynccontextmanager
async def side_by_side(
    package: str, kind: Kind, *servers: RedisServer, **options: Any
) -> AsyncGenerator[tuple[Any, Peer]]:
    """Our layer and a peer's, with the same options."""
    options = {"prefix": new_prefix(), **options}
    urls = [server.url for server in servers]
    ours = kind.layer_class(urls, **options)
    peer = Peer(package, kind, *urls, **options)
    peer.thread.start()
    try:
        async with ours:
            yield ours, peer
    finally:
        await to_thread.run_sync(peer.close)


async def until(condition: Callable[[], object]) -> None:
    with fail_after(PATIENCE):
        while not condition():
            await sleep(0.002)


@peers
@both
@pytest.mark.parametrize("options", FORMATS, ids=lambda options: "+".join(options) or "msgpack")
async def test_process_specific_channels(
    kind: Kind, package: str, options: dict[str, Any], redis_server: RedisServer
) -> None:
    """What a peer sends to a channel of ours arrives, and what we send to one of theirs, in every format."""
    async with side_by_side(package, kind, redis_server, **options) as (ours, peer), ours.subscribe() as inbox:
        channel = await ours.new_channel()
        for number in range(3):
            await peer.call("send", inbox.channel, {**MESSAGE, "n": number})
            await peer.call("send", channel, {**MESSAGE, "n": number})
        with fail_after(PATIENCE):
            assert [await inbox.receive() for _ in range(3)] == [{**MESSAGE, "n": number} for number in range(3)]
            assert [await ours.receive(channel) for _ in range(3)] == [{**MESSAGE, "n": number} for number in range(3)]
        theirs = await peer.call("new_channel")
        for number in range(3):
            await ours.send(theirs, {**MESSAGE, "n": number})
        assert [await peer.call("receive", theirs) for _ in range(3)] == [
            {**MESSAGE, "n": number} for number in range(3)
        ]


@peers
@pytest.mark.parametrize("options", FORMATS, ids=lambda options: "+".join(options) or "msgpack")
async def test_normal_channels(package: str, options: dict[str, Any], redis_server: RedisServer) -> None:
    """A queue is one queue for both: what either sends, either receives, in order, bytes too where the format has them."""
    async with side_by_side(package, QUEUE, redis_server, **options) as (ours, peer):
        message = MESSAGE if "serializer_format" in options else {**MESSAGE, "bytes": b"\x00\xff"}
        await peer.call("send", "work", {**message, "n": 0})
        await ours.send("work", {**message, "n": 1})
        await peer.call("send", "work", {**message, "n": 2})
        await ours.send("work", {**message, "n": 3})
        got = [await ours.receive("work"), await peer.call("receive", "work"), await ours.receive("work")]
        got.append(await peer.call("receive", "work"))
        assert got == [{**message, "n": number} for number in range(4)]
        async with create_task_group() as tg:  # into a reader that waits already
            waited: list[Any] = []

            async def read() -> None:
                waited.append(await ours.receive("later"))

            tg.start_soon(read)
            await until(lambda: popper(ours).blocked and popper(ours).popping)
            await peer.call("send", "later", message)
        assert waited == [message]


@peers
async def test_normal_channels_of_pubsub(package: str, redis_server: RedisServer) -> None:
    """A normal channel of the pub/sub layer carries messages both ways."""
    async with side_by_side(package, PUBSUB, redis_server) as (ours, peer), create_task_group() as tg:
        got: list[Any] = []

        async def read() -> None:
            got.append(await ours.receive("normal"))

        tg.start_soon(read)
        await until(lambda: hears(ours, "normal"))
        await peer.call("send", "normal", MESSAGE)
        await until(lambda: got == [MESSAGE])


@peers
@both
@pytest.mark.parametrize("options", FORMATS, ids=lambda options: "+".join(options) or "msgpack")
async def test_groups(kind: Kind, package: str, options: dict[str, Any], redis_server: RedisServer) -> None:
    """A group with members of both is one group: a broadcast of either reaches each member once."""
    async with (
        side_by_side(package, kind, redis_server, **options) as (ours, peer),
        ours.subscribe("room") as inbox,
        ours.subscribe("room") as other,
    ):
        channel = await ours.new_channel()
        await ours.group_add("room", channel)
        theirs, gone = await peer.call("new_channel"), await peer.call("new_channel")
        await peer.call("group_add", "room", theirs)
        await peer.call("group_add", "room", gone)
        await peer.call("group_discard", "room", gone)
        for number in range(2):
            await peer.call("group_send", "room", {**MESSAGE, "n": 2 * number})
            with fail_after(PATIENCE):
                await until(lambda number=number: ours.statistics().buffered_messages == 3 * (2 * number + 1))  # type: ignore[misc]
            await ours.group_send("room", {**MESSAGE, "n": 2 * number + 1})
        expected = [{**MESSAGE, "n": number} for number in range(4)]
        with fail_after(PATIENCE):
            assert [await inbox.receive() for _ in range(4)] == expected
            assert [await other.receive() for _ in range(4)] == expected
            assert [await ours.receive(channel) for _ in range(4)] == expected
        assert [await peer.call("receive", theirs) for _ in range(4)] == expected
        if kind is QUEUE:
            assert await ours.group_channels("room") == {inbox.channel, other.channel, channel, theirs}
            await ours.group_discard("room", theirs)
            await ours.group_add("room", "normal")
            await peer.call("group_send", "room", MESSAGE)
            assert await ours.receive("normal") == MESSAGE
            await ours.group_send("room", {"n": 9}, exclude=[inbox.channel])
            assert await peer.call("receive", "normal") == {"n": 9}


@peers
@both
async def test_rotated_keys(kind: Kind, package: str, redis_server: RedisServer) -> None:
    """While keys are changed, either side may already have the new one in front."""
    prefix = new_prefix()
    peer = Peer(package, kind, redis_server.url, prefix=prefix, symmetric_encryption_keys=["new", "old"])
    peer.thread.start()
    ours = kind.layer_class([redis_server.url], prefix=prefix, symmetric_encryption_keys=[b"old", "new"])
    try:
        async with ours, ours.subscribe() as inbox:
            await peer.call("send", inbox.channel, MESSAGE)
            with fail_after(PATIENCE):
                assert await inbox.receive() == MESSAGE
            theirs = await peer.call("new_channel")
            await ours.send(theirs, MESSAGE)
            assert await peer.call("receive", theirs) == MESSAGE
    finally:
        await to_thread.run_sync(peer.close)


@peers
async def test_capacity_and_expiry_are_shared(package: str, redis_server: RedisServer) -> None:
    """What a peer sent counts for our capacity, and expires for us by the server's clock."""
    async with side_by_side(package, QUEUE, redis_server, capacity=2, expiry=10) as (ours, peer):
        await peer.call("send", "a", {"n": 1})
        await ours.send("a", {"n": 2})
        with pytest.raises(ours.ChannelFull):
            await ours.send("a", {"n": 3})
        with pytest.raises(Exception) as full:
            await peer.call("send", "a", {"n": 3})
        assert type(full.value).__name__ == "ChannelFull"
        with redis_server.client() as client:
            grow_older(client, ours.prefix, 10)
        await ours.send("a", {"n": 4})
        assert await ours.receive("a") == {"n": 4}
        assert ours.statistics().expired == 2


@peers
async def test_their_flush_and_ours(package: str, redis_server: RedisServer) -> None:
    """A flush of either leaves a queue blank for both, and both go on."""
    async with side_by_side(package, QUEUE, redis_server) as (ours, peer):
        for method, flush in (("send", ours.flush), ("send", lambda: peer.call("flush"))):
            await peer.call(method, "a", {"n": 1})
            await ours.send("b", {"n": 1})
            await flush()
            with redis_server.client() as client:
                left = {key for key in client.scan_iter(f"{ours.prefix}*") if not key.endswith(b":prefix")}
            assert left == set()
        await peer.call("send", "a", {"n": 2})
        assert await ours.receive("a") == {"n": 2}


async def test_exclude_is_visible_to_peers_of_pubsub(redis_server: RedisServer) -> None:
    """As documented: a peer's member receives a broadcast that excludes it, with the reserved key; ours do not see the key."""
    async with (
        side_by_side("channels_redis", PUBSUB, redis_server) as (ours, peer),
        ours.subscribe("room") as one,
        ours.subscribe("room") as two,
    ):
        theirs = await peer.call("new_channel")
        await peer.call("group_add", "room", theirs)
        await ours.group_send("room", {"n": 1}, exclude=[one.channel, theirs])
        await ours.group_send("room", {"n": 2})
        assert await one.receive() == {"n": 2}
        assert [await two.receive(), await two.receive()] == [{"n": 1}, {"n": 2}]
        got = await peer.call("receive", theirs)
        assert got.pop("__asgi_exclude__")
        assert got == {"n": 1}


def test_keys_are_theirs(redis_server: RedisServer) -> None:
    """The keys of groups and channels are byte for byte those of channels_redis."""
    from channels_redis.core import RedisChannelLayer as Theirs

    ours = QUEUE.layer_class([redis_server.url], prefix="p")
    theirs = Theirs(hosts=[redis_server.url], prefix="p")
    assert Names(ours.prefix).group("room").encode() == theirs._group_key("room")
    assert Names(ours.prefix).channel("a.b!c") == "p" + theirs.non_local_name("a.b!c")
    assert isinstance(redis_server.client(), redis.Redis)


@peers
@both
async def test_two_servers(
    kind: Kind, package: str, redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Over two servers, what theirs delivers at all goes both ways; its queues lose what is sent to a channel."""
    with RedisServer(tmp_path_factory.mktemp("second")) as second:
        async with side_by_side(package, kind, redis_server, second) as (ours, peer):
            for number in range(8):
                theirs = await peer.call("new_channel")
                await ours.send(theirs, {**MESSAGE, "n": number})
                assert await peer.call("receive", theirs) == {**MESSAGE, "n": number}
                group = f"group{number}"
                async with ours.subscribe(group) as inbox:
                    await peer.call("group_add", group, theirs)
                    await ours.group_send(group, {**MESSAGE, "of": "ours"})
                    await peer.call("group_send", group, {**MESSAGE, "of": "theirs"})
                    with fail_after(PATIENCE):
                        got = [await inbox.receive(), await inbox.receive()]
                    assert [one["of"] for one in got] == ["ours", "theirs"]
                    assert (await peer.call("receive", theirs))["of"] == "ours"
                    assert (await peer.call("receive", theirs))["of"] == "theirs"
                    if kind is PUBSUB:
                        await peer.call("send", inbox.channel, {**MESSAGE, "n": number})
                        with fail_after(PATIENCE):
                            assert await inbox.receive() == {**MESSAGE, "n": number}
