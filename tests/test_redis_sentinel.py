"""A primary that Sentinel watches: found at each connection, verified, and followed when it changes."""

from __future__ import annotations

from typing import Any

import pytest
import redis.exceptions
from anyio import Event, create_task_group, fail_after, to_thread
from anyio.lowlevel import checkpoint
from layers_on_redis import CASES, PATIENCE, QUEUE, Books, Kind, both, new_prefix, until
from redis_server import RedisServer, Sentinels, free_port

from anyio_channels import create_channel_layer
from anyio_channels.redis.client import make_router
from anyio_channels.redis.client import sentinel as module
from anyio_channels.redis.client.address import SentinelAddress, parse_host, parse_hosts
from anyio_channels.testing import Check

pytestmark = pytest.mark.two_loops


def make(kind: Kind, *hosts: Any, **options: Any) -> Any:
    return kind.layer_class(list(hosts), **{"timeout": 2.0, "connect_timeout": 5.0, "prefix": new_prefix(), **options})


@pytest.mark.anyio
@pytest.mark.diagonal(("kind", "check"), CASES, start=1)
async def test_layer_passes_behind_sentinels(kind: Kind, check: Check, quiet_sentinels: Sentinels) -> None:
    """Each layer behind Sentinel keeps every clause that applies to it."""
    await check(kind.factory(quiet_sentinels.servers[0], hosts=[quiet_sentinels.host]), kind.features)


@pytest.mark.anyio
@both
async def test_mixed_with_a_plain_host(kind: Kind, quiet_sentinels: Sentinels, redis_server: RedisServer) -> None:
    """One server is found by sentinels, the other named; names are spread over both."""
    layer = make(kind, quiet_sentinels.host, redis_server.url)
    async with layer:
        owners = set()
        for number in range(20):
            async with layer.subscribe(f"group{number}") as inbox:
                await layer.send(inbox.channel, {"n": 1})
                await layer.group_send(f"group{number}", {"n": 2})
                with fail_after(PATIENCE):
                    assert {(await inbox.receive())["n"], (await inbox.receive())["n"]} == {1, 2}
            owners.add(layer.options.router.owner(f"name{number}", ""))
        assert owners == set(layer.options.router.links)


@pytest.mark.anyio
@both
async def test_failover_under_load(kind: Kind, sentinels: Sentinels) -> None:
    """The primary is killed: delivery goes on by itself at the one that is elected, nothing is delivered twice."""
    old = sentinels.primary()
    (new,) = [server for server in sentinels.servers if server is not old]
    layer = make(kind, sentinels.host)
    sender = make(kind, sentinels.host, prefix=layer.prefix, timeout=0.2)
    async with layer, sender, layer.subscribe("room") as inbox, create_task_group() as tg:
        books = Books(sender, inbox)
        tg.start_soon(books.send)
        tg.start_soon(books.receive)
        await until(lambda: len(books.received) > 20)
        old.kill()
        await until(new.is_primary)
        count = len(books.received)
        await until(lambda: len(books.received) > count)
        await layer.group_send("room", {"n": 10**9})
        await until(lambda: 10**9 in books.received)
        tg.cancel_scope.cancel()
    books.received.remove(10**9)
    books.balance()


@pytest.mark.anyio
@both
async def test_failover_of_a_primary_that_stands_still(kind: Kind, sentinels: Sentinels) -> None:
    """The primary hangs with its connections open: +switch-master is followed, without waiting for a time-out."""
    old = sentinels.primary()
    (new,) = [server for server in sentinels.servers if server is not old]
    layer = make(kind, sentinels.host, timeout=600.0, keep_alive=600.0)
    async with layer, layer.subscribe("room") as inbox:
        await layer.send(inbox.channel, {"n": 0})
        assert await inbox.receive() == {"n": 0}
        old.pause()
        try:
            await until(lambda: all(link.connects > 1 and link.connection for link in layer.options.router.links))
            with fail_after(PATIENCE):
                if kind is QUEUE:
                    await until(lambda: layer.statistics().connections == len(layer.options.router.running))
                await layer.group_send("room", {"n": 1})
                assert await inbox.receive() == {"n": 1}
            assert new.is_primary()
        finally:
            old.resume()


@pytest.mark.anyio
@both
async def test_planned_failover(kind: Kind, sentinels: Sentinels) -> None:
    """SENTINEL FAILOVER, as for maintenance: who listens on both ends goes on at the new primary."""
    old = sentinels.primary()
    layer = make(kind, sentinels.host)
    async with layer, layer.subscribe("room") as inbox, create_task_group() as tg:
        books = Books(layer, inbox)
        tg.start_soon(books.send)
        tg.start_soon(books.receive)
        await until(lambda: len(books.received) > 20)
        await to_thread.run_sync(sentinels.fail_over)
        await until(lambda: f":{old.port}" not in layer.options.router.links[0].name.partition("(")[0])
        count = len(books.received)
        await until(lambda: len(books.received) > count + 20)
        tg.cancel_scope.cancel()
    books.balance()


@pytest.mark.anyio
async def test_sentinels_down(sentinels: Sentinels, monkeypatch: pytest.MonkeyPatch) -> None:
    """One sentinel killed and one that hangs: the third is enough, at once; with none the error names them and the cause."""
    one, other, last = sentinels.sentinels
    one.kill()
    other.pause()
    with monkeypatch.context() as patch:
        patch.setattr(module, "_ASK_SECONDS", 600.0)
        async with make(QUEUE, sentinels.host, connect_timeout=60.0) as layer:
            assert await layer.group_channels("room") == set()
    other.kill()
    last.kill()
    layer = make(QUEUE, sentinels.host, connect_timeout=0.5)
    with pytest.raises(redis.exceptions.ConnectionError, match="no sentinel told where 'mymaster' is") as caught:
        await layer.open()
    assert all(f":{port}" in str(caught.value) for _, port in sentinels.addresses)


@pytest.mark.anyio
async def test_the_sentinel_that_is_listened_to_dies(sentinels: Sentinels) -> None:
    """Another one is listened to instead, and a failover then is followed."""
    layer = make(QUEUE, sentinels.host)
    async with layer:
        (watch,) = [link for link in layer.options.router.running if link not in layer.options.router.links]
        await until(lambda: watch.connection is not None)
        port = int(watch.name.rpartition(":")[2])
        (heard,) = [one for one in sentinels.sentinels if one.port == port]
        heard.kill()
        await until(lambda: watch.connects == 2 and watch.connection is not None)
        assert watch.name.rpartition(":")[2] != str(port)
        await layer.send("a", {"n": 1})
        assert await layer.receive("a") == {"n": 1}


@pytest.mark.anyio
async def test_a_sentinel_that_hangs(sentinels: Sentinels, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sentinel that accepts and does not answer is given up; the error says so."""
    for one in sentinels.sentinels:
        one.pause()
    monkeypatch.setattr(module, "_ASK_SECONDS", 0.1)
    layer = make(QUEUE, sentinels.host, connect_timeout=1.0)
    with pytest.raises(redis.exceptions.ConnectionError, match="it did not answer in time"):
        await layer.open()


@pytest.mark.anyio
async def test_what_sentinels_may_say(quiet_sentinels: Sentinels) -> None:
    """An unknown name, a replica in the place of the primary: the error names the primary and the rule."""
    layer = make(QUEUE, {**quiet_sentinels.host, "master_name": "other"}, connect_timeout=0.3)
    with pytest.raises(redis.exceptions.ConnectionError, match="Redis 'other' .*it knows no such primary"):
        await layer.open()
    replica = quiet_sentinels.servers[1]

    async def lag() -> tuple[str, int]:
        return replica.host, replica.port

    layer = make(QUEUE, quiet_sentinels.host, connect_timeout=0.3)
    layer.options.router.servers[0].find_primary = lag
    with pytest.raises(redis.exceptions.ConnectionError, match=f":{replica.port} .*is no primary at the moment"):
        await layer.open()
    # Whom it doubts it asks for again, and takes an answer that differs.
    doubting = layer.options.router.servers[0]
    del doubting.find_primary
    assert doubting.doubted == (replica.host, replica.port)
    async with layer:
        assert doubting.doubted is None
    gone = ("127.0.0.1", free_port())
    doubting.doubted = (quiet_sentinels.servers[0].host, quiet_sentinels.servers[0].port)
    assert await doubting.find_primary() == doubting.doubted  # they all say so

    async def away() -> tuple[str, int]:
        return gone

    doubting.find_primary = away
    with pytest.raises(redis.exceptions.ConnectionError, match=f":{gone[1]}"):
        await layer.open()
    assert doubting.doubted == gone


@pytest.mark.anyio
async def test_a_sentinel_that_lags_behind() -> None:
    """While the primary is not where one sentinel says, another one's answer counts, also if that comes later."""
    old, new = ("127.0.0.1", 1), ("127.0.0.1", 2)
    told = Event()

    class Lagging:
        async def ask(self, *_: Any, **__: Any) -> tuple[str, int]:
            told.set()
            return old

    class Knowing:
        async def ask(self, *_: Any, **_options: Any) -> tuple[str, int]:
            await told.wait()
            for __ in range(5):
                await checkpoint()
            return new

    address = parse_host({"sentinels": [("127.0.0.1", 3), ("127.0.0.1", 4)], "master_name": "mymaster"})
    assert isinstance(address, SentinelAddress)
    asked = module.Sentinels(address)
    asked.servers[:] = [Lagging(), Knowing()]  # type: ignore[list-item]
    assert await asked.find_primary() == old
    asked.doubted = old
    assert await asked.find_primary() == new


@pytest.mark.anyio
async def test_what_is_said_to_those_who_listen(quiet_sentinels: Sentinels) -> None:
    """Only what is said of our primary counts, and only if it can be understood; the connection is kept alive."""
    async with make(QUEUE, quiet_sentinels.host, keep_alive=0.05) as layer:
        (watch,) = [link for link in layer.options.router.running if link not in layer.options.router.links]
        await until(lambda: watch.connection is not None)
        for said in (b"other 127.0.0.1 1 127.0.0.1 2", b"mymaster 127.0.0.1", b"mymaster a b c d", b""):
            watch._events.on_push(watch, [b"message", b"+switch-master", said])
        before = watch.connection.commands
        await until(lambda: watch.connection.commands > before + 2)
        assert layer.statistics().reconnects == 0


@pytest.mark.anyio
async def test_passwords(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Sentinels and the primary have each a password; none of them is in an error."""
    with Sentinels(tmp_path_factory.mktemp("passwords")) as sentinels:
        for one in sentinels.sentinels:
            with one.client() as client:
                client.execute_command("ACL", "SETUSER", "default", "on", ">first5ecret")
        host = {**sentinels.host, "sentinel_kwargs": {"password": "first5ecret"}}
        async with make(QUEUE, host) as layer:
            await layer.send("a", {"n": 1})
        where = ",".join(f"{host}:{port}" for host, port in sentinels.addresses)
        url = f"redis+sentinel://{where}/mymaster/0?sentinel_username=default&sentinel_password=first5ecret"
        async with create_channel_layer(url, prefix=layer.prefix) as other:
            assert await other.receive("a") == {"n": 1}
        wrong = make(QUEUE, {**host, "sentinel_kwargs": {"password": "wr0ng"}}, connect_timeout=0.5)
        with pytest.raises(redis.exceptions.ConnectionError, match="(?i)wrongpass|invalid") as caught:
            await wrong.open()
        assert "wr0ng" not in f"{caught.value!r} {wrong!r}"


@pytest.mark.parametrize(
    ("host", "error", "text"),
    [
        ({"sentinels": [], "master_name": "m"}, TypeError, "sentinels of a Redis host must be a list"),
        ({"sentinels": "a", "master_name": "m"}, TypeError, "sentinels of a Redis host must be a list"),
        ({"sentinels": ["a:1"], "master_name": "m"}, TypeError, "must be a (host, port) pair, not 'a:1'"),
        ({"sentinels": [("a", 1, 2)], "master_name": "m"}, TypeError, "must be a (host, port) pair"),
        ({"sentinels": [("a", 0)], "master_name": "m"}, ValueError, "port of a Redis host"),
        ({"sentinels": [("a", 1)]}, TypeError, "master_name of a Redis host must be"),
        ({"master_name": "m"}, TypeError, "sentinels of a Redis host must be a list"),
        (
            {"sentinels": [("a", 1)], "master_name": "m", "sentinel_kwargs": 5},
            TypeError,
            "sentinel_kwargs of a Redis host",
        ),
        ({"sentinels": [("a", 1)], "master_name": "m", "sentinel_kwargs": {"pasword": "x"}}, TypeError, "'pasword'"),
        ({"sentinels": [("a", 1)], "master_name": "m", "host": "x"}, ValueError, "host of a Redis host have no effect"),
        ({"sentinels": [("a", 1)], "master_name": "m", "pasword": "x"}, TypeError, "unknown option 'pasword'"),
        ("redis+sentinel://a:1", ValueError, "a Sentinel URL is"),
        ("redis+sentinel://a:1/", ValueError, "a Sentinel URL is"),
        ("redis+sentinel://a:x/m", ValueError, "a Sentinel URL is"),
        ("redis+sentinel://a,,b/m", ValueError, "a Sentinel URL is"),
        ("redis+sentinel://a/m/x", ValueError, "a Sentinel URL is"),
        ("redis+sentinel://a/m?x=1", TypeError, "unknown option 'x'"),
    ],
)
def test_hosts_that_cannot_be(host: Any, error: type[Exception], text: str) -> None:
    """Each mistake is told with its rule."""
    with pytest.raises(error) as caught:
        parse_hosts([host])
    assert text in str(caught.value)


def test_urls() -> None:
    """A URL says what the dict of options says."""
    found = parse_host("rediss+sentinel://me:p%40ss@a,b:1,[::1]:2/mymaster/3?ssl_cert_reqs=none&socket_timeout=4")
    assert isinstance(found, SentinelAddress)
    assert [(one.host, one.port) for one in found.sentinels] == [("a", 26379), ("b", 1), ("::1", 2)]
    assert all(one.tls is not None and one.username is None for one in found.sentinels)
    assert (found.master_name, found.primary.timeout) == ("mymaster", 4.0)
    assert (found.primary.username, found.primary.password, found.primary.db) == ("me", "p@ss", 3)
    assert found.primary.tls is not None
    assert module.Sentinels(found).name == "Redis 'mymaster' (Sentinel at a:26379, b:1, ::1:2)"
    layer = create_channel_layer("redis+sentinel+pubsub://a/m?prefix=x")
    assert layer.__class__.__name__ == "RedisPubSubChannelLayer"
    assert make_router([{"address": "redis+sentinel://a/m"}], cluster=False).name == "Redis 'm' (Sentinel at a:26379)"
