"""Redis Cluster: commands find their node, also while slots and nodes change."""

from __future__ import annotations

import itertools
import time
from contextlib import suppress
from functools import partial
from itertools import pairwise
from typing import Any

import anyio
import pytest
import redis.exceptions
from anyio import ClosedResourceError, create_task_group, fail_after
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test
from layers_on_redis import (
    CASES,
    PATIENCE,
    PUBSUB,
    QUEUE,
    Books,
    Kind,
    arrives,
    both,
    events,
    hears,
    hold_inbox,
    link_to_channel,
    new_prefix,
    pass_on_both,
    session,
    subscriptions,
    until,
)
from ormsgpack import packb
from redis.crc import key_slot
from redis_server import RedisCluster, RedisServer, free_port, wait_until

from anyio_channels import ChannelFull, MessagesLost, RedisChannelLayer, create_channel_layer
from anyio_channels.redis.client import make_router
from anyio_channels.redis.duplicates import Marks
from anyio_channels.redis.queue.channels import QueueChannel, State
from anyio_channels.redis.wire import Names
from anyio_channels.testing import Check, contract_machine

pytestmark = pytest.mark.two_loops


def make(kind: Kind, hosts: Any, **options: Any) -> Any:
    return kind.layer_class(
        hosts, cluster=True, **{"timeout": 10.0, "connect_timeout": 5.0, "prefix": new_prefix(), **options}
    )


@pytest.mark.anyio
@pytest.mark.diagonal(("kind", "check"), CASES, start=2)
async def test_layer_passes_on_a_cluster(kind: Kind, check: Check, quiet_cluster: RedisCluster) -> None:
    """Each layer on a cluster keeps every clause that applies to it."""
    await check(kind.factory(*quiet_cluster.nodes[:3], hosts=quiet_cluster.hosts, cluster=True), kind.features)


@both
@pytest.mark.slow
def test_layer_on_a_cluster_matches_the_model(
    kind: Kind, quiet_cluster: RedisCluster, anyio_backend: tuple[str, dict[str, Any]]
) -> None:
    """Each layer on a cluster does what the plain-dict model does, on every backend."""
    factory = kind.factory(*quiet_cluster.nodes[:3], hosts=quiet_cluster.hosts, cluster=True)
    run_state_machine_as_test(
        contract_machine(factory, *anyio_backend, features=kind.features),
        settings=settings(settings(), max_examples=5, stateful_step_count=30, suppress_health_check=list(HealthCheck)),
    )


@pytest.mark.anyio
@both
async def test_names_are_spread_and_all_arrive(kind: Kind, quiet_cluster: RedisCluster) -> None:
    """Process-specific channels, normal channels and groups arrive from any node; then no server has more than one connection."""
    one = make(kind, quiet_cluster.hosts)
    await pass_on_both(one, make(kind, quiet_cluster.hosts[1:], prefix=one.prefix), kind, 3)
    assert repr(one).startswith(
        f"<{kind.layer_class.__name__} Redis Cluster at 127.0.0.1:{quiet_cluster.nodes[0].port}, "
    )


@pytest.mark.anyio
async def test_members_in_many_slots(quiet_cluster: RedisCluster) -> None:
    """A broadcast to members in many slots reaches each; who is full is counted; flushing empties every node."""
    async with make(QUEUE, quiet_cluster.hosts, capacity=1) as layer, make(QUEUE, quiet_cluster.hosts) as stranger:
        channels = [f"member{number}" for number in range(30)]
        for channel in channels:
            await layer.group_add("room", channel)
        await layer.send(channels[0], {"n": 0})
        await layer.group_send("room", {"n": 1})
        assert layer.statistics().dropped_full == 1
        assert [(await layer.receive(channel))["n"] for channel in channels] == [0] + [1] * 29
        await layer.group_send("room", {"n": 2})
        await stranger.send("spared", {"n": 3})
        await layer.flush()
        assert await layer.group_channels("room") == set()
        for node in quiet_cluster.nodes[:3]:
            with node.client() as client:
                assert not [key for key in client.keys(f"{layer.prefix}*") if b"member" in key or b"group" in key]
        assert await stranger.receive("spared") == {"n": 3}


@pytest.mark.anyio
async def test_senders_who_wait(quiet_cluster: RedisCluster) -> None:
    """send(wait=True) hears of room, in whatever slot."""
    async with make(QUEUE, quiet_cluster.hosts, capacity=1) as layer:
        for channel in ("a", "b", "c", "d"):
            await layer.send(channel, {"n": 0})
            async with create_task_group() as tg:
                tg.start_soon(lambda channel=channel: layer.send(channel, {"n": 1}, wait=True))  # type: ignore[misc]
                with fail_after(PATIENCE):
                    assert [await layer.receive(channel), await layer.receive(channel)] == [{"n": 0}, {"n": 1}]


def owned_by(layer: Any, key: str, node: RedisServer) -> bool:
    return bool(layer.options.router.owner("", key).server.address.port == node.port)


def owning(layer: Any, channel: str) -> int:
    """The port of the node that owns ``channel``."""
    name = Names(layer.prefix).channel(channel) if isinstance(layer, RedisChannelLayer) else channel
    port: int = layer.options.router.owner("", name).server.address.port
    return port


@pytest.mark.anyio
@both
async def test_failover_under_load(kind: Kind, cluster: RedisCluster) -> None:
    """The primary that owns an inbox is killed: it goes on at the replica that is elected; nothing is delivered twice."""
    layer = make(kind, cluster.hosts)
    sender = make(kind, cluster.hosts[1:], prefix=layer.prefix, timeout=0.3)
    async with layer, sender, create_task_group() as tg:
        inbox = await tg.start(hold_inbox, layer, "room")
        tolerant = await tg.start(partial(hold_inbox, layer, on_gap="event"))
        books = Books(sender, inbox)
        tg.start_soon(books.send)
        tg.start_soon(books.receive)
        await books.go_on()
        victim = next(node for node in cluster.nodes if node.port == owning(layer, inbox.channel))
        victim.kill()
        await until(lambda: owning(layer, inbox.channel) != victim.port)
        await books.go_on()
        await layer.group_send("room", {"n": 10**9})
        await until(lambda: 10**9 in books.received)
        if owning(layer, tolerant.channel) != victim.port:
            await layer.send(tolerant.channel, {"n": 1})
            with fail_after(PATIENCE):
                while (await tolerant.receive()) != {"n": 1}:
                    pass
        assert len(layer.options.router.links) == 3
        tg.cancel_scope.cancel()
    books.received.remove(10**9)
    books.balance()


@pytest.mark.anyio
@both
async def test_planned_failover(kind: Kind, cluster: RedisCluster) -> None:
    """CLUSTER FAILOVER, as for maintenance: delivery goes on at the new primary, and the old one is let go.

    Nobody may say so: the old primary takes and hands on what is published to it.
    """
    layer = make(kind, cluster.hosts, keep_alive=0.2)
    async with layer, create_task_group() as tg:
        inbox = await tg.start(hold_inbox, layer, "room")
        books = Books(layer, inbox)
        tg.start_soon(books.send)
        tg.start_soon(books.receive)
        await books.go_on()
        port = owning(layer, inbox.channel)
        number = next(number for number, node in enumerate(cluster.nodes) if node.port == port)
        cluster.ask(cluster.nodes[number + 3], "FAILOVER")
        await until(lambda: owning(layer, inbox.channel) == cluster.nodes[number + 3].port)
        await books.go_on()
        await until(lambda: layer.statistics().connections == 3)
        tg.cancel_scope.cancel()
    books.balance()


@pytest.mark.anyio
@both
async def test_slot_migrated_under_load(kind: Kind, cluster: RedisCluster) -> None:
    """The slots of an inbox, of its group and of a queue move under load: no error reaches a caller, nothing is lost in order."""
    layer = make(kind, cluster.hosts)
    sender = make(kind, cluster.hosts, prefix=layer.prefix)
    async with layer, sender, create_task_group() as tg:
        inbox = await tg.start(hold_inbox, layer, "room")
        books = Books(sender, inbox)
        tg.start_soon(books.send)
        tg.start_soon(books.receive)
        await books.go_on()
        keys = [Names(layer.prefix).group("room")]
        keys += (
            [inbox.channel]
            if kind is PUBSUB
            else [Names(layer.prefix).channel(inbox.channel), Names(layer.prefix).channel("work")]
        )
        for key in keys:
            slot = key_slot(key.encode())
            source = cluster.owner(slot)
            target = next(node for node in cluster.nodes[:3] if node is not source)
            await anyio.to_thread.run_sync(partial(cluster.migrate, slot, target, while_moving=pause))
            await books.go_on()
            await layer.group_send("room", {"n": 10**9})
            await until(lambda: 10**9 in books.received)
            books.received.remove(10**9)
            if kind is QUEUE:
                await layer.send("work", {"n": 1})
                assert await layer.receive("work") == {"n": 1}
            await until(partial(owned_by, layer, key, target))
        tg.cancel_scope.cancel()
    assert books.failed == []
    books.balance()


def fail_over(cluster: RedisCluster, new: RedisServer) -> None:
    """Have ``new``, a replica, take over from its primary, as for maintenance; return when it has."""
    ask_at = 0.0

    def has_taken_over() -> bool:
        nonlocal ask_at
        if time.monotonic() > ask_at:  # on a busy machine the others may not have voted in time
            ask_at = time.monotonic() + 3
            with suppress(redis.exceptions.ResponseError):  # it was the primary a moment ago, and is not a replica yet
                cluster.ask(new, "FAILOVER")
        return bool(client.info("replication")["role"] == "master")

    with new.client() as client:
        wait_until(has_taken_over)


def has_gap_and_more(got: list[int | None], begun: int) -> bool:
    """Whether there is a gap (``None``) from ``begun`` on, and a message behind it."""
    return None in got[begun:] and got[-1] is not None


@pytest.mark.anyio
async def test_a_planned_failover_is_told_at_once(cluster: RedisCluster) -> None:
    """Where a broadcast that was accepted may be lost, a gap is told; also if the slot goes back, and long before keep_alive."""
    async with make(PUBSUB, cluster.hosts, keep_alive=600) as layer, create_task_group() as tg:
        inbox = await tg.start(partial(hold_inbox, layer, "room", on_gap="event"))
        accepted: set[int] = set()
        got: list[int | None] = []

        async def send() -> None:
            for number in itertools.count():
                with suppress(redis.exceptions.RedisError):
                    await layer.group_send("room", {"n": number})
                    accepted.add(number)
                await anyio.sleep(0.001)  # there are other tasks

        async def receive() -> None:
            with suppress(ClosedResourceError):  # closed and cancelled at once
                while True:
                    got.append((await inbox.receive()).get("n"))  # None for a gap

        tg.start_soon(send)
        tg.start_soon(receive)
        await until(lambda: got)
        old = cluster.owner(key_slot(Names(layer.prefix).group_topic("room").encode()))
        for new in (cluster.nodes[cluster.nodes.index(old) + 3], old):
            begun = len(got)
            await anyio.to_thread.run_sync(partial(fail_over, cluster, new))
            await until(partial(has_gap_and_more, got, begun))
        tg.cancel_scope.cancel()
    for before, after in pairwise(got):
        if before is not None and after is not None:
            assert not accepted.intersection(range(before + 1, after)), f"missed between {before} and {after}"


@pytest.mark.anyio
async def test_a_slot_that_goes_back_at_once(cluster: RedisCluster) -> None:
    """Whoever listens in a slot that its node gave away and took back is told of a gap, and nobody else; they hear again."""
    prefix = "{" + new_prefix() + "}"  # all groups are in one slot
    async with (
        make(PUBSUB, cluster.hosts, prefix=prefix, keep_alive=600) as layer,
        layer.subscribe("a", "b", on_gap="raise") as inbox,
        layer.subscribe("a", on_gap="event") as other,
        layer.subscribe(on_gap="event") as elsewhere,
    ):
        slot = key_slot(prefix.encode())
        assert slot not in {key_slot(one.channel.encode()) for one in (inbox, other, elsewhere)}
        owner = cluster.owner(slot)
        cluster.ask(owner, "DELSLOTS", slot)
        cluster.ask(owner, "ADDSLOTS", slot)
        with fail_after(PATIENCE):
            with pytest.raises(MessagesLost):
                await inbox.receive()
            assert (await other.receive())["type"] == "channel_layer.gap"
            await until(lambda: all(hears(layer, Names(prefix).group_topic(group)) for group in "ab"))
            await layer.group_send("a", {"n": 1})
            while True:
                with suppress(MessagesLost):  # of the other group
                    assert await inbox.receive() == {"n": 1}
                    break
            assert await other.receive() == {"n": 1}
            await layer.send(elsewhere.channel, {"n": 2})
            assert await elsewhere.receive() == {"n": 2}


def pause() -> None:
    """Leave the load some time in the middle of a migration."""
    time.sleep(0.3)


@pytest.mark.anyio
async def test_in_the_middle_of_a_migration(cluster: RedisCluster) -> None:
    """While a slot moves, keys that moved are found at its new node (ASK), those that did not at its old one."""
    async with make(QUEUE, cluster.hosts, capacity=2) as layer, make(QUEUE, cluster.hosts) as other:
        slot = key_slot(Names(layer.prefix).channel("work").encode())
        source = cluster.owner(slot)
        target = next(node for node in cluster.nodes[:3] if node is not source)
        await layer.send("work", {"n": 0})
        cluster.ask(target, "SETSLOT", slot, "IMPORTING", cluster.ask(source, "MYID"))
        cluster.ask(source, "SETSLOT", slot, "MIGRATING", cluster.ask(target, "MYID"))
        await layer.send("work", {"n": 1})  # the key is still at the source
        with source.client() as client:
            client.execute_command("MIGRATE", target.host, target.port, Names(layer.prefix).channel("work"), 0, 5000)
        with pytest.raises(ChannelFull):
            await layer.send("work", {"n": 2})  # asked for at the target
        with fail_after(PATIENCE):
            assert [await layer.receive("work"), await layer.receive("work")] == [{"n": 0}, {"n": 1}]
        async with create_task_group() as tg:
            got: list[Any] = []

            async def read() -> None:
                got.append(await layer.receive("work"))

            tg.start_soon(read)
            await until(lambda: session(layer).notices.blocked)
            await layer.send("work", {"n": 3})
            for node in cluster.nodes[:3]:
                cluster.ask(node, "SETSLOT", slot, "NODE", cluster.ask(target, "MYID"))
            await until(lambda: got == [{"n": 3}])
        await other.send("elsewhere", {"n": 1})


@pytest.mark.anyio
@both
async def test_node_added(kind: Kind, cluster: RedisCluster, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A node joins and takes slots over: it is found, and used."""
    layer = make(kind, cluster.hosts)
    async with layer, create_task_group() as tg:
        inbox = await tg.start(hold_inbox, layer, "room")
        books = Books(layer, inbox)
        tg.start_soon(books.send)
        tg.start_soon(books.receive)
        await books.go_on()
        added = await anyio.to_thread.run_sync(cluster.add_node)
        key = inbox.channel if kind is PUBSUB else Names(layer.prefix).channel(inbox.channel)
        await anyio.to_thread.run_sync(cluster.migrate, key_slot(key.encode()), added)
        await until(lambda: layer.options.router.owner("", key).server.address.port == added.port)
        await books.go_on()
        assert layer.statistics().connections == 4
        tg.cancel_scope.cancel()
    assert books.failed == []
    books.balance()


@pytest.mark.anyio
async def test_clusterdown(cluster: RedisCluster, caplog: pytest.LogCaptureFixture) -> None:
    """A slot that nobody serves for a while: senders and readers wait for it, within the time-out."""
    prefix = new_prefix()
    async with (
        make(QUEUE, cluster.hosts, prefix=prefix) as layer,
        make(QUEUE, cluster.hosts, prefix=prefix, timeout=0.3) as hasty,
    ):
        slot = key_slot(Names(layer.prefix).channel("work").encode())
        owner = cluster.owner(slot)
        for node in cluster.nodes[:3]:
            cluster.ask(node, "DELSLOTS", slot)
        with pytest.raises(redis.exceptions.ClusterDownError, match="Hash slot not served"):
            await hasty.send("work", {"n": 0})
        await hasty.group_add("room", "work")
        await hasty.group_add("room", "other")
        with pytest.raises(redis.exceptions.ClusterDownError, match="Hash slot not served"):
            await hasty.group_send("room", {"n": 0})
        assert await hasty.receive("other") == {"n": 0}
        async with create_task_group() as tg:
            got: list[Any] = []

            async def read() -> None:
                got.append(await layer.receive("work"))

            tg.start_soon(read)
            tg.start_soon(layer.send, "work", {"n": 1})
            await until(lambda: "readers go on waiting" in caplog.text)
            for node in cluster.nodes[:3]:
                cluster.ask(node, "SETSLOT", slot, "NODE", cluster.ask(owner, "MYID"))
            await until(lambda: got == [{"n": 1}])


@pytest.mark.anyio
@both
async def test_who_may_have_missed_something_is_told(kind: Kind, cluster: RedisCluster) -> None:
    """An inbox whose node is lost hears of a gap; one that lives elsewhere does not."""
    async with make(kind, cluster.hosts) as layer, create_task_group() as tg:
        inbox = await tg.start(partial(hold_inbox, layer, on_gap="raise"))
        port = owning(layer, inbox.channel)
        victim = next(node for node in cluster.nodes if node.port == port)
        victim.kill()
        await until(lambda: owning(layer, inbox.channel) != port)
        with fail_after(PATIENCE), pytest.raises(MessagesLost):
            await inbox.receive()
        await until(lambda: layer.statistics().connections == 3)
        await layer.send(inbox.channel, {"n": 1})
        with fail_after(PATIENCE):
            while True:
                with suppress(MessagesLost):
                    assert await inbox.receive() == {"n": 1}
                    break
        tg.cancel_scope.cancel()


@pytest.mark.anyio
@both
async def test_connections_cut(kind: Kind, quiet_cluster: RedisCluster) -> None:
    """All connections are killed: readers go on when they are back, and all that was sent before waits or is told of."""
    async with make(kind, quiet_cluster.hosts) as layer, create_task_group() as tg:
        inbox = await tg.start(hold_inbox, layer, "room")
        got: list[Any] = []

        async def read() -> None:
            got.append(await layer.receive("normal"))

        tg.start_soon(read)
        await anyio.wait_all_tasks_blocked()
        for node in quiet_cluster.nodes[:3]:
            with node.client() as client:
                client.client_kill_filter(skipme=True, _type="normal")
                client.client_kill_filter(skipme=True, _type="pubsub")
        await until(lambda: layer.statistics().reconnects == 3 and layer.statistics().connections == 3)
        if kind is PUBSUB:
            await until(lambda: hears(layer, "normal"))
        await layer.send("normal", {"n": 1})
        await layer.group_send("room", {"n": 2})
        with fail_after(PATIENCE):
            assert await inbox.receive() == {"n": 2}
        await until(lambda: got == [{"n": 1}])
        tg.cancel_scope.cancel()


@pytest.mark.anyio
@both
async def test_opening(kind: Kind, quiet_cluster: RedisCluster, redis_server: RedisServer) -> None:
    """The first node may be gone; a server that is no cluster, a wrong password, nobody there: told within seconds."""
    gone = ("127.0.0.1", free_port())
    async with make(kind, [gone, quiet_cluster.hosts[0]]) as layer:
        assert layer.statistics().connections == 3
    with pytest.raises(redis.exceptions.ResponseError, match="cluster support disabled"):
        await make(kind, [redis_server.url]).open()
    with pytest.raises(redis.exceptions.ConnectionError, match=f":{gone[1]} cannot be reached"):
        await make(kind, [gone], connect_timeout=0.3).open()
    with pytest.raises(redis.exceptions.AuthenticationError) as caught:
        await make(kind, [f"redis://nobody:wr0ng@127.0.0.1:{quiet_cluster.nodes[0].port}"]).open()
    assert "wr0ng" not in str(caught.value)


@pytest.mark.anyio
async def test_a_first_node_that_hangs_and_an_empty_cluster(
    cluster: RedisCluster, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A node that accepts and does not answer is passed over; a cluster without slots says so."""
    cluster.nodes[3].pause()
    async with make(QUEUE, [cluster.nodes[3].url, cluster.nodes[0].url]) as layer:
        assert layer.statistics().connections == 3
    with pytest.raises(redis.exceptions.ConnectionError, match="did not answer in time"):
        await make(QUEUE, [cluster.nodes[3].url], connect_timeout=0.3).open()
    with RedisServer(tmp_path_factory.mktemp("empty"), "--cluster-enabled", "yes") as empty:
        with pytest.raises(redis.exceptions.ClusterDownError, match="no node of the cluster owns a slot"):
            await make(QUEUE, [empty.url], connect_timeout=0.3).open()


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"hosts": ["redis://a/1"]}, ValueError, "a Redis Cluster has only database 0, not 1"),
        ({"hosts": ["unix:///a"]}, ValueError, "is reached by host and port, not at '/a'"),
        ({"hosts": ["redis+sentinel://a/m"]}, ValueError, "a Redis Cluster needs no sentinels"),
        ({"cluster": "yes"}, TypeError, "cluster must be True or False, not 'yes'"),
        ({"prefix": "a{b"}, ValueError, "prefix in a Redis Cluster"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], error: type[Exception], text: str) -> None:
    """Each mistake is told with its rule."""
    with pytest.raises(error) as caught:
        RedisChannelLayer(**{"cluster": True, **options})
    assert text in str(caught.value)


def test_urls() -> None:
    """redis+cluster:// makes a layer on a cluster, of either kind."""
    layer = create_channel_layer("redis+cluster://a:1,b:2/?prefix=x")
    assert layer.__class__.__name__ == "RedisChannelLayer"
    assert repr(layer).startswith("<RedisChannelLayer Redis Cluster at a:1, b:2 prefix='x'")
    layer = create_channel_layer("rediss+cluster+pubsub://me:secret@a?ssl_cert_reqs=none")
    assert repr(layer).startswith("<RedisPubSubChannelLayer Redis Cluster at a:6379 ")
    with pytest.raises(ValueError, match="has only database 0"):
        create_channel_layer("redis+cluster://a/1")


def test_slots_of_what_belongs_together() -> None:
    """What is told about a key is told in its slot, also with a prefix that has a tag."""
    for prefix in ("asgi", "{app}", "x{app}y"):
        layer = RedisChannelLayer(cluster=True, prefix=prefix)
        for name in ("work", "specific.abc!"):
            key = Names(layer.prefix).channel(name)
            assert (
                key_slot(Names(layer.prefix).sent(key).encode())
                == key_slot(Names(layer.prefix).room(key).encode())
                == key_slot(key.encode())
            )
    assert make_router(None, cluster=True).name == "Redis Cluster at localhost:6379"


def owners(layer: Any) -> list[Any]:
    """Who owns each slot, as the layer sees it; to be put wrong."""
    found: list[Any] = layer.options.router._owners
    return found


def assign(layer: Any, found: dict[int, Any]) -> None:
    """Have the layer hear that some slots have these owners."""
    layer.options.router._assign(found)


def forget_moves(layer: Any) -> None:
    """Have the layer believe the next MOVED, however soon after another one it comes."""
    layer.options.router._moved_at.clear()


async def ask(layer: Any) -> tuple[str, list[Any]]:
    """Have the layer ask who owns what."""
    told: tuple[str, list[Any]] = await layer.options.router._ask()
    return told


def other_owner(layer: Any, key: str) -> Any:
    """A link to a node that does not own ``key``."""
    owner = layer.options.router.owner("", key)
    return next(link for link in layer.options.router.links if link is not owner)


@pytest.mark.anyio
@both
async def test_a_map_that_is_out_of_date(kind: Kind, quiet_cluster: RedisCluster) -> None:
    """Whatever a process does first after a change that it did not hear of, it is sent on."""
    async with make(kind, quiet_cluster.hosts) as layer, make(kind, quiet_cluster.hosts, prefix=new_prefix()) as other:
        topology = layer.options.router
        right = list(owners(layer))
        for number in range(3):
            owners(layer)[:] = [topology.links[number]] * len(right)
            async with layer.subscribe(f"room{number}") as inbox:
                owners(layer)[:] = [topology.links[(number + 1) % 3]] * len(right)
                await layer.group_send(f"room{number}", {"n": 1})
                owners(layer)[:] = [topology.links[(number + 2) % 3]] * len(right)
                with fail_after(PATIENCE):
                    assert await inbox.receive() == {"n": 1}
                await layer.send(inbox.channel, {"n": 2})
                with fail_after(PATIENCE):
                    assert await inbox.receive() == {"n": 2}
                owners(layer)[:] = [topology.links[number]] * len(right)  # leaving goes astray as well
        topology.refresh_soon()
        await until(lambda: owners(layer) == right)
        for number in range(3):
            with fail_after(PATIENCE):
                while kind is QUEUE and await other.group_channels(f"room{number}"):
                    await anyio.sleep(0.01)


@pytest.mark.anyio
async def test_what_a_cluster_says_twice_is_delivered_once(quiet_cluster: RedisCluster) -> None:
    """The same bytes, published twice, are one message: nodes that take over from each other do that."""
    async with make(PUBSUB, quiet_cluster.hosts) as layer, layer.subscribe() as inbox:
        payload = Marks().next() + packb({"n": 1})
        link = layer.options.router.owner("", inbox.channel)
        for _ in range(2):
            assert await link.execute("SPUBLISH", inbox.channel, payload) == 1
        await layer.send(inbox.channel, {"n": 2})
        with fail_after(PATIENCE):
            assert [await inbox.receive(), await inbox.receive()] == [{"n": 1}, {"n": 2}]


@pytest.mark.anyio
async def test_a_gap_is_in_front_of_what_is_heard_again(quiet_cluster: RedisCluster) -> None:
    """Also if that comes while other subscriptions are still being restored on the new connection; once, and only there."""
    async with make(PUBSUB, quiet_cluster.hosts) as layer, layer.subscribe("room", on_gap="event") as inbox:
        name = Names(layer.prefix).group_topic("room")
        link = layer.options.router.link_to("127.0.0.1", free_port())  # it is not up
        marks = Marks()

        def hear(number: int) -> None:
            events(layer).on_push(link, [b"smessage", name.encode(), marks.next() + packb({"n": number})])

        subscriptions(layer).wanted[name].lapsed = True
        hear(1)  # from a node where it is not wanted any more
        subscriptions(layer).wanted[name].link = link
        hear(2)
        hear(3)
        gap = {"type": "channel_layer.gap", "missed": None}
        with fail_after(PATIENCE):
            assert [await inbox.receive() for _ in range(4)] == [{"n": 1}, gap, {"n": 2}, {"n": 3}]


@pytest.mark.anyio
async def test_what_comes_too_late_to_be_in_order_is_told(quiet_cluster: RedisCluster) -> None:
    """A message that another one of its sender overtook, as between two nodes, is a gap for whoever listens there."""
    async with (
        make(PUBSUB, quiet_cluster.hosts) as layer,
        layer.subscribe("room", on_gap="event") as inbox,
        layer.subscribe("room", on_gap="raise") as other,
        layer.subscribe(on_gap="event") as elsewhere,
    ):
        marks = Marks()
        first, second = (marks.next() + packb({"n": number}) for number in (1, 2))
        name = Names(layer.prefix).group_topic("room")
        for payload in (second, first):
            assert await layer.options.router.owner("", name).execute("SPUBLISH", name, payload) == 1
        gap = {"type": "channel_layer.gap", "missed": None}
        with fail_after(PATIENCE):
            assert [await inbox.receive(), await inbox.receive()] == [{"n": 2}, gap]
            assert await other.receive() == {"n": 2}
            with pytest.raises(MessagesLost):
                await other.receive()
            await layer.send(elsewhere.channel, {"n": 3})
            assert await elsewhere.receive() == {"n": 3}


@pytest.mark.anyio
async def test_subscriptions_that_go_astray(quiet_cluster: RedisCluster) -> None:
    """A subscription that is asked for, restored or waited for at the wrong node, or given up meanwhile, ends where it should."""
    async with make(PUBSUB, quiet_cluster.hosts) as layer, layer.subscribe() as inbox:
        name = inbox.channel
        wrong = other_owner(layer, name)
        # Restored at the wrong node.
        subscriptions(layer).wanted[name].link = wrong
        subscriptions(layer).wanted[name].confirmed = False
        wrong.connection.end("the test said so")
        await until(lambda: subscriptions(layer).wanted[name].link is not wrong and hears(layer, name))
        # Asked for at the wrong node.
        subscriptions(layer).wanted[name].link = wrong
        subscriptions(layer).wanted[name].confirmed = False
        forget_moves(layer)
        subscriptions(layer).ask(name)
        subscriptions(layer).ask(name)
        await until(lambda: subscriptions(layer).wanted[name].link is not wrong and hears(layer, name))
        # The server says that it ended one, also one that nobody wants any more; and one given up before it is confirmed.
        for _ in range(2):  # its node is asked once
            events(layer).on_push(layer.options.router.links[0], [b"sunsubscribe", name.encode(), 0])
        events(layer).on_push(layer.options.router.links[0], [b"sunsubscribe", b"unknown", 0])
        assert not hears(layer, name)
        await until(lambda: hears(layer, name))
        # The same, and the connection is lost before the node says where it is now.
        events(layer).on_push(layer.options.router.links[0], [b"sunsubscribe", name.encode(), 0])
        connection = subscriptions(layer).wanted[name].link.connection
        assert connection is not None
        connection.end("the test said so")
        await until(lambda: hears(layer, name))
        subscriptions(layer).want("given up")
        subscriptions(layer).ask("given up")
        subscriptions(layer).unwant("given up")
        # Two nodes that send one back and forth do so with pauses.
        moved = redis.exceptions.MovedError(f"{key_slot(name.encode())} 127.0.0.1:{wrong.server.address.port}")
        owner = layer.options.router.owner("", name)
        forget_moves(layer)
        layer.options.router.follow(moved)
        assert layer.options.router.owner("", name) is wrong
        assign(layer, {key_slot(name.encode()): owner})
        layer.options.router.follow(moved)
        assert layer.options.router.owner("", name) is owner
        await layer.send(name, {"n": 1})
        await until(lambda: hears(layer, name))
        await layer.send(name, {"n": 2})
        with fail_after(PATIENCE):
            while (await inbox.receive()) != {"n": 2}:
                pass


@pytest.mark.anyio
@both
async def test_waiting_for_a_node_that_is_given_up(kind: Kind, quiet_cluster: RedisCluster) -> None:
    """A caller that waits for a node's connection is sent on when that node is not used any more."""
    async with make(kind, quiet_cluster.hosts) as layer, create_task_group() as tg:
        topology = layer.options.router
        right = list(owners(layer))
        owners(layer)[:] = [topology.link_to("127.0.0.1", free_port())] * len(right)
        inboxes: list[Any] = []

        async def subscribe() -> None:
            inboxes.append(await tg.start(hold_inbox, layer, "room"))

        tg.start_soon(subscribe)
        tg.start_soon(layer.send, "anywhere", {"n": 1})
        await anyio.wait_all_tasks_blocked()
        topology.refresh_soon()
        await until(lambda: inboxes and owners(layer) == right)
        await layer.group_send("room", {"n": 1})
        with fail_after(PATIENCE):
            assert await inboxes[0].receive() == {"n": 1}
        assert len(topology.links) == 3
        tg.cancel_scope.cancel()


@pytest.mark.anyio
async def test_what_is_heard_while_a_message_is_fetched(quiet_cluster: RedisCluster) -> None:
    """It makes another fetch follow, when the first found nothing."""
    async with make(QUEUE, quiet_cluster.hosts) as layer, create_task_group() as tg:
        got: list[Any] = []

        async def read() -> None:
            got.append(await layer.receive("work"))

        tg.start_soon(read)
        await until(lambda: session(layer).notices.blocked)
        source = session(layer).here.channels["work"]
        assert isinstance(source, QueueChannel)
        session(layer).notices.heard(source.key)
        assert source.state is State.FETCHING
        session(layer).notices.heard(source.key)
        await until(lambda: session(layer).notices.blocked)
        session(layer).notices.heard("unknown")
        session(layer).notices.try_again()  # looks at what is waited for
        await until(lambda: session(layer).notices.blocked)
        session(layer).notices.heard(next(iter(session(layer).notices.own), source.key))
        await layer.send("work", {"n": 1})
        await until(lambda: got == [{"n": 1}])


@pytest.mark.anyio
async def test_what_is_heard_while_a_key_is_drained(quiet_cluster: RedisCluster) -> None:
    """It makes the key be drained once more, however often it is heard: the first may have come too early."""
    async with make(QUEUE, quiet_cluster.hosts, keep_alive=60) as layer, layer.subscribe() as inbox:
        key = Names(layer.prefix).channel(inbox.channel)
        await until(lambda: hears(layer, Names(layer.prefix).sent(key)))
        await session(layer).notices.until_ended()
        before = layer.statistics().commands
        for _ in range(3):
            session(layer).notices.heard(key)
        connection = link_to_channel(layer, inbox.channel).connection
        assert connection is not None
        await until(lambda: not connection.pending)
        assert layer.statistics().commands == before + 2


@pytest.mark.anyio
@both
async def test_a_prefix_with_a_tag(kind: Kind, quiet_cluster: RedisCluster) -> None:
    """All is on one node; the others are kept alive all the same."""
    async with make(kind, quiet_cluster.hosts, prefix="{" + new_prefix() + "}", keep_alive=0.05) as layer:
        async with layer.subscribe("room") as inbox:
            before = layer.statistics().commands
            await until(lambda: layer.statistics().commands > before + 12)
            await layer.group_send("room", {"n": 1})
            with fail_after(PATIENCE):
                assert await inbox.receive() == {"n": 1}


@pytest.mark.anyio
async def test_a_migration_that_does_not_go_on(cluster: RedisCluster) -> None:
    """A reader hears what is sent to the new node; nodes that contradict each other are told of in the end."""
    async with (
        make(QUEUE, cluster.hosts) as layer,
        make(QUEUE, cluster.hosts, prefix=layer.prefix, timeout=0.4) as hasty,
        layer.subscribe("room") as inbox,
    ):
        for key in (Names(layer.prefix).channel(inbox.channel), Names(layer.prefix).group("room")):
            slot = key_slot(key.encode())
            source = cluster.owner(slot)
            target = next(node for node in cluster.nodes[:3] if node is not source)
            cluster.ask(target, "SETSLOT", slot, "IMPORTING", cluster.ask(source, "MYID"))
            cluster.ask(source, "SETSLOT", slot, "MIGRATING", cluster.ask(target, "MYID"))
        with source.client() as client:
            client.execute_command("MIGRATE", target.host, target.port, Names(layer.prefix).group("room"), 0, 5000)
        await layer.send(inbox.channel, {"n": 1})
        with fail_after(PATIENCE):
            assert await inbox.receive() == {"n": 1}
        await inbox.leave("room")
        session(layer).memberships.leave_soon([("room", inbox.channel)])
        assert await layer.group_channels("room") == set()
        cluster.ask(target, "SETSLOT", slot, "STABLE")  # it sends back who is sent to it
        await until(lambda: hasty.statistics().connections == 3)
        with pytest.raises(redis.exceptions.AskError):
            await hasty.group_add("room", "work")
        target.kill()
        with pytest.raises(redis.exceptions.ConnectionError, match=rf":{target.port}\b"):
            await hasty.group_add("room", "work")


@pytest.mark.anyio
async def test_asking_who_owns_what(cluster: RedisCluster) -> None:
    """A node that knows nothing, or was lost, is passed over; if all were lost, those that were named are asked."""
    node = cluster.nodes[2]

    def is_reset() -> bool:
        with node.client() as client, suppress(redis.exceptions.ResponseError):
            client.flushall()  # only a node without keys is reset, and the layer has just said that its prefix is used
            return bool(cluster.ask(node, "RESET"))
        return False

    async with make(QUEUE, cluster.hosts) as layer:
        await until(is_reset)
        for _ in range(3):
            _, table = await ask(layer)
            assert table
        for link in layer.options.router.links:
            link.connection.end("the test said so")
        host, table = await ask(layer)
        assert host == "127.0.0.1"
        assert table


@pytest.mark.anyio
async def test_a_key_that_holds_something_else(quiet_cluster: RedisCluster) -> None:
    """Who reads it is told what Redis says; others go on, and so does it when the key is right again."""
    async with make(QUEUE, quiet_cluster.hosts) as layer, layer.subscribe() as inbox, create_task_group() as tg:
        got: list[Any] = []

        async def read() -> None:
            got.append(await layer.receive("work"))

        tg.start_soon(read)
        await until(lambda: session(layer).notices.blocked)
        key = Names(layer.prefix).channel(inbox.channel)
        (node,) = [one for one in quiet_cluster.nodes if one.port == owning(layer, inbox.channel)]
        with node.client() as client:
            client.set(key, "something else")
            with fail_after(PATIENCE), pytest.raises(redis.exceptions.ResponseError, match="WRONGTYPE"):
                async with create_task_group() as readers:
                    readers.start_soon(tell, layer, key)
                    try:
                        await inbox.receive()
                    except redis.exceptions.ResponseError as error:
                        caught = error
                    readers.cancel_scope.cancel()
                raise caught
            client.delete(key)
        await layer.send(inbox.channel, {"n": 1})
        await layer.send("work", {"n": 2})
        with fail_after(PATIENCE):
            assert await inbox.receive() == {"n": 1}
        await until(lambda: got == [{"n": 2}])


async def tell(layer: Any, key: str) -> None:
    """Say that something was sent, when a reader waits."""
    await anyio.wait_all_tasks_blocked()
    session(layer).notices.heard(key)


@pytest.mark.anyio
async def test_no_permission_to_listen(quiet_cluster: RedisCluster, caplog: pytest.LogCaptureFixture) -> None:
    """A user who may not listen to where senders say that there is something: it is logged, once."""
    for node in quiet_cluster.nodes:
        with node.client() as client:
            client.execute_command("ACL", "SETUSER", "deaf", "on", ">pass", "~*", "+@all", "resetchannels")
    hosts = [url.replace("redis://", "redis://deaf:pass@") for url in quiet_cluster.hosts]
    async with make(QUEUE, hosts) as layer, create_task_group() as tg:
        tg.start_soon(layer.receive, "work")
        await until(lambda: any("readers wait in vain" in record.getMessage() for record in caplog.records))
        tg.cancel_scope.cancel()


def times_asked(cluster: RedisCluster) -> int:
    """How often the nodes were asked who owns what."""
    times = 0
    for node in cluster.nodes:
        with node.client() as client:
            times += client.info("commandstats").get("cmdstat_cluster|slots", {}).get("calls", 0)
    return times


@pytest.mark.anyio
async def test_subscribing_at_odd_moments(cluster: RedisCluster, caplog: pytest.LogCaptureFixture) -> None:
    """The connection is lost with a request on its way; pushes of another kind; a slot that nobody serves for long."""
    async with (
        make(PUBSUB, cluster.hosts) as sender,
        make(PUBSUB, cluster.hosts, prefix=sender.prefix, timeout=0.3) as layer,
        create_task_group() as tg,
    ):
        tg.start_soon(layer.receive, "work")
        await until(lambda: hears(layer, "work"))
        events(layer).on_push(layer.options.router.links[0], [b"invalidate", None])
        subscription = subscriptions(layer).wanted["work"]
        subscription.confirmed = False
        subscriptions(layer).ask("work")
        connection = subscription.link.connection
        assert connection is not None
        connection.end("the test said so")
        await until(lambda: hears(layer, "work"))
        slot = key_slot(b"nobody")
        owner = cluster.owner(slot)
        for node in cluster.nodes[:3]:
            cluster.ask(node, "DELSLOTS", slot)
        got: list[Any] = []
        before = times_asked(cluster)

        async def read() -> None:
            got.append(await layer.receive("nobody"))

        tg.start_soon(read)
        await until(lambda: "Hash slot not served; readers wait in vain for 'nobody'" in caplog.text)
        assert times_asked(cluster) - before < 15, "it asks who owns what again and again, without a pause"
        for node in cluster.nodes[:3]:
            cluster.ask(node, "SETSLOT", slot, "NODE", cluster.ask(owner, "MYID"))
        await until(lambda: hears(layer, "nobody"))
        await sender.send("nobody", {"n": 1})
        await until(lambda: got == [{"n": 1}])
        tg.cancel_scope.cancel()


@pytest.mark.anyio
async def test_giving_back_to_a_node_that_is_just_found(quiet_cluster: RedisCluster) -> None:
    """A message that cannot be given back yet is kept for a reader here, and given back later."""
    async with make(QUEUE, quiet_cluster.hosts) as layer:
        await layer.send("work", {"n": 1})
        key = Names(layer.prefix).channel("work")
        slot = key_slot(key.encode())
        owner = layer.options.router.owner("", key)
        entry, score = await owner.execute("ZPOPMIN", key)
        assign(layer, {slot: layer.options.router.link_to("127.0.0.1", free_port())})
        source = session(layer).here.find("work")
        arrives(layer, source, entry, score)
        assert isinstance(source, QueueChannel)
        session(layer).give_back(source, session(layer).delivery.withdraw(source))
        assert source.entries
        assign(layer, {slot: owner})
        await until(lambda: not source.entries)
        with fail_after(PATIENCE):
            assert await layer.receive("work") == {"n": 1}
        assert layer.statistics().discarded == 0
