"""Several independent Redis servers: names are spread over them, and one that is down takes only its own along."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest
import redis
import redis.exceptions
from anyio import create_task_group, fail_after
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test
from layers_on_redis import (
    CASES,
    PATIENCE,
    QUEUE,
    Kind,
    both,
    hold_inbox,
    link_to_channel,
    link_to_group,
    new_prefix,
    pass_on_both,
    port_of,
    until,
    until_answered,
)
from redis_server import RedisServer, free_port

from anyio_channels import MessagesLost
from anyio_channels.redis.queue import room
from anyio_channels.testing import Check, contract_machine

pytestmark = pytest.mark.two_loops


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[RedisServer]]:
    """Two servers that the tests share."""
    with RedisServer(tmp_path_factory.mktemp("one")) as one, RedisServer(tmp_path_factory.mktemp("two")) as two:
        yield [one, two]


@pytest.fixture
def own_pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[RedisServer]]:
    """Two servers of the test's own, to be killed."""
    with RedisServer(tmp_path_factory.mktemp("one")) as one, RedisServer(tmp_path_factory.mktemp("two")) as two:
        yield [one, two]


def make(kind: Kind, servers: list[RedisServer], **options: Any) -> Any:
    options = {"timeout": 2.0, "connect_timeout": 2.0, "prefix": new_prefix(), **options}
    return kind.layer_class([server.url for server in servers], **options)


def names_on(layer: Any, server: RedisServer, count: int, start: str = "name") -> list[str]:
    """Channel or group names that ``server`` owns."""
    return [
        name
        for name in (f"{start}{number}" for number in range(100 * count))
        if owner_of(layer, name).server.address.port == server.port
    ][:count]


def owner_of(layer: Any, name: str) -> Any:
    return layer.options.router.owner(name, name)


@pytest.mark.anyio
@pytest.mark.diagonal(("kind", "check"), CASES, start=0)
async def test_layer_passes_on_two_servers(kind: Kind, check: Check, pair: list[RedisServer]) -> None:
    """Each layer on two servers keeps every clause that applies to it."""
    await check(kind.factory(*pair), kind.features)


@both
@pytest.mark.slow
def test_layer_on_two_servers_matches_the_model(
    kind: Kind, pair: list[RedisServer], anyio_backend: tuple[str, dict[str, Any]]
) -> None:
    """Each layer on two servers does what the plain-dict model does, on every backend."""
    run_state_machine_as_test(
        contract_machine(kind.factory(*pair), *anyio_backend, features=kind.features),
        settings=settings(settings(), max_examples=6, stateful_step_count=30, suppress_health_check=list(HealthCheck)),
    )


@pytest.mark.anyio
@both
async def test_names_are_spread_and_all_arrive(kind: Kind, pair: list[RedisServer]) -> None:
    """Process-specific channels, normal channels and groups arrive, wherever they live, between two processes."""
    one = make(kind, pair)
    await pass_on_both(one, make(kind, pair, prefix=one.prefix), kind, 4 if kind is QUEUE else 2)


@pytest.mark.anyio
async def test_a_broadcast_to_members_on_both(pair: list[RedisServer]) -> None:
    """One broadcast goes to the processes on both servers; who is full is counted, wherever it is."""
    layer = make(QUEUE, pair, capacity=1)
    async with layer:
        channels = [*names_on(layer, pair[0], 3), *names_on(layer, pair[1], 3)]
        for channel in channels:
            await layer.group_add("room", channel)
        assert await layer.group_channels("room") == set(channels)
        await layer.send(channels[0], {"n": 0})
        await layer.send(channels[-1], {"n": 0})
        await layer.group_send("room", {"n": 1})
        assert layer.statistics().dropped_full == 2
        assert [(await layer.receive(channel))["n"] for channel in channels] == [0, 1, 1, 1, 1, 0]
        await layer.group_send("room", {"n": 2})
        await layer.flush()
        assert await layer.group_channels("room") == set()
        for server in pair:
            with server.client() as client:
                assert not [key for key in client.keys(f"{layer.prefix}*") if b"name" in key or b"group" in key]


@pytest.mark.anyio
@both
async def test_one_server_down(kind: Kind, own_pair: list[RedisServer]) -> None:
    """What the other server owns goes on; errors name the one that is down; when it is back, all goes on."""
    up, down = own_pair
    layer = make(kind, own_pair)
    async with layer, create_task_group() as tg:
        here, there = names_on(layer, up, 1)[0], names_on(layer, down, 1)[0]
        got: list[str] = []

        async def read(channel: str) -> None:
            while True:
                got.append((await layer.receive(channel))["to"])

        for channel in (here, there):
            tg.start_soon(read, channel)
            await reachable(layer, channel, got)
        down.kill()
        await until(lambda: layer.statistics().connections < len(layer.options.router.running))
        got.clear()
        await layer.send(here, {"to": here})
        await until(lambda: got == [here])
        with pytest.raises(redis.exceptions.ConnectionError, match=rf":{down.port}\b"):
            await layer.send(there, {"to": there})
        down.start()
        await reachable(layer, there, got)
        await layer.send(here, {"to": here})
        await until(lambda: got.count(here) == 2)
        tg.cancel_scope.cancel()


async def reachable(layer: Any, channel: str, got: list[str]) -> None:
    """Send to ``channel`` until a message arrives there."""
    with fail_after(PATIENCE):
        while channel not in got:
            with suppress(redis.exceptions.ConnectionError):
                await layer.send(channel, {"to": channel})
            await anyio.sleep(0.01)


@pytest.mark.anyio
async def test_a_broadcast_with_one_server_down(own_pair: list[RedisServer]) -> None:
    """Members on the other server are sent the broadcast, and the error names the one that is down."""
    up, down = own_pair
    layer = make(QUEUE, own_pair, timeout=0.2)
    async with layer:
        group = names_on(layer, up, 1, "group")[0]
        here, there = names_on(layer, up, 1)[0], names_on(layer, down, 1)[0]
        await layer.group_add(group, here)
        await layer.group_add(group, there)
        down.kill()
        with pytest.raises(redis.exceptions.ConnectionError, match=rf":{down.port}\b"):
            await layer.group_send(group, {"n": 1})
        assert await layer.receive(here) == {"n": 1}


@pytest.mark.anyio
@pytest.mark.parametrize("is_home", [True, False], ids=["where the first lives", "the other"])
@both
async def test_only_who_may_have_missed_something_is_told(
    kind: Kind, is_home: bool, own_pair: list[RedisServer]
) -> None:
    """The connection to one server is lost: inboxes that live there, or are in a group there, hear of a gap, others do not."""
    layer = make(kind, own_pair)
    async with layer, create_task_group() as tg:
        inboxes = [await tg.start(partial(hold_inbox, layer, prefix=start, on_gap="raise")) for start in "abcdefgh"]
        home = port_of(link_to_channel(layer, inboxes[0].channel))
        gone = next(server for server in own_pair if (server.port == home) == is_home)
        touched = [port_of(link_to_channel(layer, inbox.channel)) == gone.port for inbox in inboxes]
        if False in touched:  # by chance, all may live there
            joined = touched.index(False)
            await inboxes[joined].join(group_on(layer, gone))
            touched[joined] = True
        with gone.client() as client:
            client.client_kill_filter(skipme=True, _type="normal")
            client.client_kill_filter(skipme=True, _type="pubsub")
        await until(
            lambda: (
                layer.statistics().reconnects and layer.statistics().connections == len(layer.options.router.running)
            )
        )
        for inbox, is_touched in zip(inboxes, touched, strict=True):
            if is_touched:
                with pytest.raises(MessagesLost), fail_after(PATIENCE):
                    await inbox.receive()
            await layer.send(inbox.channel, {"n": 1})
            with fail_after(PATIENCE):
                assert await inbox.receive() == {"n": 1}
        tg.cancel_scope.cancel()


def group_on(layer: Any, server: RedisServer) -> str:
    """A group that ``server`` owns."""
    for number in itertools.count():
        name = f"group{number}"
        link = link_to_group(layer, name)
        if port_of(link) == server.port:
            return name
    raise AssertionError


@pytest.mark.anyio
@both
async def test_opening_with_one_server_down(
    kind: Kind, pair: list[RedisServer], caplog: pytest.LogCaptureFixture
) -> None:
    """A layer opens when one of its servers cannot be reached, and says so; with none of them it does not."""
    gone = ("127.0.0.1", free_port())
    layer = kind.layer_class([pair[0].url, gone], connect_timeout=0.3, timeout=0.3, prefix=new_prefix())
    async with layer:
        assert layer.statistics().connections >= 1
        assert any(f":{gone[1]} cannot be reached" in record.getMessage() for record in caplog.records)
    layer = kind.layer_class([gone, ("127.0.0.1", free_port())], connect_timeout=0.3)
    with pytest.raises(redis.exceptions.ConnectionError, match="cannot be reached"):
        async with layer:
            pass


@pytest.mark.anyio
@both
async def test_opening_with_one_server_that_refuses(kind: Kind, pair: list[RedisServer], tmp_path: Path) -> None:
    """A wrong password at one server is a mistake that opening tells at once, not an outage."""
    with RedisServer(tmp_path, "--requirepass", "right") as strict:
        layer = kind.layer_class([pair[0].url, f"redis://:wrong@127.0.0.1:{strict.port}"], connect_timeout=PATIENCE)
        with fail_after(PATIENCE / 2), pytest.raises(redis.exceptions.AuthenticationError, match=rf":{strict.port}\b"):
            async with layer:
                pass


@pytest.mark.anyio
async def test_senders_who_wait_on_two_servers(pair: list[RedisServer]) -> None:
    """send(wait=True) hears of room on either server."""
    layer = make(QUEUE, pair, capacity=1)
    async with layer:
        for channel in (*names_on(layer, pair[0], 2), *names_on(layer, pair[1], 2)):
            await layer.send(channel, {"n": 0})
            async with create_task_group() as tg:
                tg.start_soon(partial(layer.send, channel, {"n": 1}, wait=True))
                with fail_after(PATIENCE):
                    assert [await layer.receive(channel), await layer.receive(channel)] == [{"n": 0}, {"n": 1}]


@pytest.mark.anyio
async def test_whoever_waits_for_room_hears_of_it_after_a_reconnect(
    own_pair: list[RedisServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sender that waits at a server whose connection is made anew is told of room there; one elsewhere waits on."""
    monkeypatch.setattr(room, "_RECHECK", 60.0)  # a look that is on its way when the connection ends is told of it
    layer = make(QUEUE, own_pair, capacity=1)
    async with layer, create_task_group() as tg:
        names = [names_on(layer, server, 1)[0] for server in own_pair]
        for name in names:
            await layer.send(name, {"n": 0})
            tg.start_soon(partial(layer.send, name, {"n": 1}, wait=True))
        for server in own_pair:
            with server.client() as client:
                await until(lambda client=client: client.pubsub_channels("*:waiting:*"))  # type: ignore[misc]
        await until_answered(layer)
        link_to_channel(layer, names[0]).reconnect("the test said so")
        await until(lambda: layer.statistics().reconnects == 1)
        for name in names:
            with fail_after(PATIENCE):
                assert [await layer.receive(name), await layer.receive(name)] == [{"n": 0}, {"n": 1}]
