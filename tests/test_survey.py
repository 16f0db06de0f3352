"""What Redis holds for a layer, as a survey sees it from outside."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import pytest
import redis.exceptions
from anyio import create_task_group
from layers_on_redis import Kind, both, grow_older, hold_inbox, new_prefix
from redis_server import RedisServer, new_directory

from anyio_channels import RedisChannelLayer, RedisPubSubChannelLayer
from anyio_channels.doctor.seen import ChannelSeen, GroupSeen, Look, ServerSeen
from anyio_channels.doctor.survey import RedisLayer, Survey
from anyio_channels.redis.wire import keys_of, odd_keys, prefixes_of_groups, shown_prefixes

pytestmark = [pytest.mark.anyio, pytest.mark.two_loops]


async def look_at(layer: RedisLayer) -> Look:
    async with Survey(layer) as survey:
        await survey.require()
        return await survey.look()


async def test_queue(redis_server: RedisServer) -> None:
    """Channels with their unexpired messages, groups with their members; expired ones and others' keys are not counted."""
    prefix = new_prefix()
    options: dict[str, Any] = {"prefix": prefix, "expiry": 30, "capacity": 3, "channel_capacity": {"b*": 7}}
    async with RedisChannelLayer([redis_server.url], **options) as layer, layer.subscribe("room", "hall") as inbox:
        await layer.group_add("room", "a")
        for channel in ("a", "a", "b", "old"):
            await layer.send(channel, {})
        await layer.send("specific.other!1", {})
        with redis_server.client() as client:
            client.zadd(f"{prefix}old", {client.zrange(f"{prefix}old", 0, 0)[0]: 1})
            client.zadd(f"{prefix}:group:gone", {"a": 1})
            client.set(f"{prefix}string", "no channel")
            client.zadd(f"{prefix}no name", {"x": 1})
            client.zadd(f"{prefix}2:group:room", {"x": 1})
            client.zadd(f"{prefix}2a", {"x": 1})
        before = dict.fromkeys(redis_server_keys(redis_server, prefix))
        look = await look_at(RedisChannelLayer([redis_server.url], **options))
        assert look.channels == (
            ChannelSeen("a", 2, 3, None),
            ChannelSeen("b", 1, 7, None),
            ChannelSeen("specific.other!", 1, 3, None),
        )
        assert look.groups == (GroupSeen("hall", 1, None), GroupSeen("room", 2, None))
        assert (look.depth, look.members, look.foreign) == (4, 3, 2)
        assert [server.error for server in look.servers] == [None]
        async with Survey(RedisChannelLayer([redis_server.url], **options)) as survey:
            await survey.require()
            members = await survey.members("room")
        assert members is not None
        assert members.keys() == {inbox.channel, "a"}
        assert all(0 <= seconds < 30 for seconds in members.values())
        assert redis_server_keys(redis_server, prefix) == set(before)


def redis_server_keys(server: RedisServer, prefix: str) -> set[bytes]:
    with server.client() as client:
        return set(client.scan_iter(f"{prefix}*"))


async def test_many_channels(redis_server: RedisServer) -> None:
    """What does not come in one step of SCAN, or fit into one pipeline, is seen too."""
    prefix = new_prefix()
    layer = RedisChannelLayer([redis_server.url], prefix=prefix)
    now = time.time()
    with redis_server.client() as client, client.pipeline() as pipeline:
        for number in range(2500):
            pipeline.zadd(f"{prefix}channel{number}", {"x": now})
        pipeline.execute()
        look = await look_at(layer)
        assert (len(look.channels), look.depth) == (2500, 2500)
        async with Survey(layer) as survey:
            await survey.require()
            await survey.erase()
    assert redis_server_keys(redis_server, prefix) == set()


async def test_looking_leaves_no_trace(redis_server: RedisServer) -> None:
    """A prefix that nobody uses stays so when it is looked at."""
    prefix = new_prefix()
    look = await look_at(RedisChannelLayer([redis_server.url], prefix=prefix))
    assert (look.channels, look.groups, look.depth, look.members) == ((), (), 0, 0)
    assert redis_server_keys(redis_server, prefix) == set()


async def test_expired_memberships_are_no_members(redis_server: RedisServer) -> None:
    """Members are those that have not expired by the layer's group_expiry."""
    layer = RedisChannelLayer([redis_server.url], prefix=new_prefix(), group_expiry=60)
    async with layer:
        await layer.group_add("room", "old")
        with redis_server.client() as client:
            grow_older(client, layer.options.prefix, 61)
        await layer.send("unrelated", {})
    async with Survey(layer) as survey:
        await survey.require()
        assert await survey.members("room") == {}
        assert (await survey.look()).groups == ()


async def test_pubsub(tmp_path: Path) -> None:
    """Redis channels with those who listen, groups with their processes; members and depth are not known."""
    with RedisServer(tmp_path) as server:
        layers = [RedisPubSubChannelLayer([server.url], prefix="mine") for _ in range(2)]
        other = RedisPubSubChannelLayer([server.url], prefix="other")
        async with layers[0] as one, layers[1] as two, other:
            async with one.subscribe("room") as first, two.subscribe("room", "hall"), two.subscribe("room"):
                async with other.subscribe("theirs"):
                    looker = RedisPubSubChannelLayer([server.url], prefix="mine")
                    async with Survey(looker) as survey:
                        await survey.require()
                        look = await survey.look()
                        assert await survey.members("room") is None
            assert look.groups == (GroupSeen("hall", None, 1), GroupSeen("room", None, 2))
            assert ChannelSeen(first.channel, None, None, 1) in look.channels
            assert len(look.channels) == 4
            assert (look.depth, look.members, look.foreign) == (None, None, 0)


@both
async def test_several_servers(kind: Kind, tmp_path: Path) -> None:
    """All servers are asked; one that is down is named with the reason, and what the others hold is seen."""
    with RedisServer(new_directory(tmp_path, "one")) as one, RedisServer(new_directory(tmp_path, "two")) as two:
        urls = [one.url, two.url]
        options: dict[str, Any] = {"connect_timeout": 1, "timeout": 1}
        async with kind.layer_class(urls) as layer, create_task_group() as tasks:
            groups = [f"group{number}" for number in range(10)]
            await tasks.start(_hold, layer, groups)
            whole = await look_at(kind.layer_class(urls, **options))
            assert [group.name for group in whole.groups] == groups
            assert [server.error for server in whole.servers] == [None, None]
            two.kill()
            rest = await look_at(kind.layer_class(urls, **options))
            tasks.cancel_scope.cancel()
        assert 0 < len(rest.groups) < 10
        assert rest.servers[0].error is None
        assert rest.servers[1].error is not None
        assert str(two.port) in rest.servers[1].error
        assert rest.rates_since(whole).evicted_keys is None


async def _hold(layer: Any, groups: list[str], *, task_status: Any) -> None:
    await hold_inbox(layer, *groups, task_status=task_status)


async def test_a_server_that_stands_still(tmp_path: Path) -> None:
    """A server that no longer answers is named, after the layer's timeout."""
    with RedisServer(tmp_path) as server:
        layer = RedisChannelLayer([server.url], timeout=0.3)
        async with Survey(layer) as survey:
            await survey.require()
            server.pause()
            try:
                look = await survey.look()
            finally:
                server.resume()
        assert look.servers[0].error is not None
        assert "did not answer in time" in look.servers[0].error
        assert "command" not in look.servers[0].error


@both
async def test_nobody_is_there(kind: Kind, tmp_path: Path) -> None:
    """Where no server can be reached, require() raises as opening the layer does; outside of the block as it is."""
    with RedisServer(tmp_path) as server:
        layer = kind.layer_class([server.url], connect_timeout=0.2)
    with pytest.raises(redis.exceptions.ConnectionError, match=str(server.port)):
        await look_at(layer)
    with pytest.raises(redis.exceptions.ConnectionError):
        await look_at(kind.layer_class([server.url], connect_timeout=0.2, cluster=True))


async def test_erase(redis_server: RedisServer) -> None:
    """erase() leaves nothing that begins with the prefix, and all else."""
    prefix, other = new_prefix(), new_prefix()
    async with RedisChannelLayer([redis_server.url], prefix=prefix) as layer, layer.subscribe("room"):
        await layer.send("a", {})
        with redis_server.client() as client:
            client.set(other, 1)
        async with Survey(RedisChannelLayer([redis_server.url], prefix=prefix)) as survey:
            await survey.require()
            await survey.erase()
        assert redis_server_keys(redis_server, prefix) == set()
        assert redis_server_keys(redis_server, other) == {other.encode()}


async def test_erase_without_permission(tmp_path: Path) -> None:
    """What a server refuses is raised."""
    with RedisServer(tmp_path) as server:
        with server.client() as client:
            client.acl_setuser("ann", enabled=True, passwords=["+pw"], keys=["*"], commands=["+@all", "-scan"])
        layer = RedisChannelLayer([server.url.replace("//", "//ann:pw@")])
        with pytest.raises(redis.exceptions.NoPermissionError):
            async with Survey(layer) as survey:
                await survey.require()
                await survey.erase()


async def test_what_a_user_must_not_ask(tmp_path: Path) -> None:
    """Where INFO is forbidden there are no figures of the server, and the keys are seen all the same."""
    with RedisServer(tmp_path) as server:
        with server.client() as client:
            client.acl_setuser("ann", enabled=True, passwords=["+pw"], keys=["asgi*"], commands=["+@all", "-info"])
        async with RedisChannelLayer([server.url]) as layer, layer.subscribe("room"):
            async with Survey(RedisChannelLayer([server.url.replace("//", "//ann:pw@")])) as survey:
                await survey.require()
                before, look = await survey.look(), await survey.look()
        assert [group.name for group in look.groups] == ["room"]
        assert (look.servers[0].info, look.servers[0].calls) == ({}, {})
        rates = look.rates_since(before)
        assert set(rates.commands.values()) == {None}
        assert rates.evicted_keys is None


async def test_rates(redis_server: RedisServer) -> None:
    """Rates are differences of the server's own counters, by the second."""
    layer = RedisPubSubChannelLayer([redis_server.url])
    async with Survey(RedisPubSubChannelLayer([redis_server.url])) as survey:
        await survey.require()
        before = await survey.look()
        async with layer:
            for _ in range(10):
                await layer.send("nobody", {})
        after = await survey.look()
    seconds = after.servers[0].at - before.servers[0].at
    rate = after.rates_since(before).commands["publish"]
    assert rate is not None
    assert rate * seconds >= 9.9


def test_rates_that_nobody_can_know() -> None:
    """Without a server, with one that was restarted, or with one that does not tell, a rate is None."""

    def seen(at: float, evicted: str, calls: dict[str, int]) -> Look:
        return Look((), (), (ServerSeen("a", None, at, {"evicted_keys": evicted}, calls),), 0)

    first = seen(1, "10", {"zadd": 10})
    later = seen(3, "14", {"zadd": 20, "publish": 2}).rates_since(first)
    assert (later.evicted_keys, later.cut_off) == (2.0, None)
    assert later.commands == {"zadd": 5.0, "publish": 1.0, "zpopmin": 0.0, "bzpopmin": 0.0, "spublish": 0.0}
    assert seen(3, "1", {"zadd": 1}).rates_since(first).evicted_keys is None
    assert seen(1, "10", {"zadd": 10}).rates_since(first).evicted_keys is None
    assert dataclasses.replace(first, servers=()).rates_since(first).evicted_keys is None


def test_keys() -> None:
    """Whose a key is: by its name, and by the prefixes that show themselves."""
    found = {b"asgi:group:a", b"asgia", b"asgi2:prefix", b"asgi2a", b"asgi:prefix:{3}", b"asgi x", b"asgi:y", b"asgi!z"}
    assert set(keys_of(b"asgi", found)) == {b"asgi:group:a", b"asgia", b"asgi x", b"asgi!z"}
    assert odd_keys(b"asgi", found) == {b"asgi x", b"asgi:y", b"asgi!z"}
    assert odd_keys(b"asgi", {b"asgia"}) == set()
    assert shown_prefixes([*found, b"b:group:c", b"d:x"]) == {b"asgi", b"asgi2", b"b"}
    assert prefixes_of_groups([b"a__group__b", b"c", b"__group__d"]) == {b"a"}


async def test_a_layer_that_is_open(redis_server: RedisServer) -> None:
    """An open layer keeps its connections to itself."""
    async with RedisChannelLayer([redis_server.url], prefix=new_prefix()) as layer:
        with pytest.raises(RuntimeError, match="that is not open"):
            async with Survey(layer):
                pytest.fail("there is no such survey")
        await layer.send("jobs", {})


def test_survey_is_of_a_layer() -> None:
    """Before it is opened there is no server to be asked."""
    assert Survey(RedisChannelLayer(["redis://localhost"])).links == []
