"""Refusals that are about the server and pass: readers wait, it is logged once, and what is sent then arrives."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager, suppress
from typing import Any

import pytest
import redis
import redis.exceptions
from anyio import create_task_group, fail_after
from layers_on_redis import PATIENCE, PUBSUB, QUEUE, Kind, both, hears, new_prefix, popper, subscriptions, until
from redis_server import RedisServer, busy

from anyio_channels import log
from anyio_channels.redis.wire import Names

pytestmark = [pytest.mark.anyio, pytest.mark.two_loops]

Trouble = Callable[[RedisServer], AbstractContextManager[None]]


def make(kind: Kind, server: RedisServer, **options: Any) -> Any:
    options = {"timeout": 2.0, "connect_timeout": 2.0, "keep_alive": 0.2, "prefix": new_prefix(), **options}
    return kind.layer_class([server.url], **options)


@contextmanager
def demoted(server: RedisServer) -> Iterator[None]:
    """The server becomes a replica, of one that is not there, and a primary again."""
    with server.client() as client:
        client.execute_command("REPLICAOF", server.host, 1)
        yield
        client.execute_command("REPLICAOF", "NO", "ONE")


@contextmanager
def without_replicas(server: RedisServer) -> Iterator[None]:
    """NOREPLICAS: writes need a replica that is not there."""
    with server.client() as client:
        client.config_set("min-replicas-to-write", 1)
        yield
        client.config_set("min-replicas-to-write", 0)


@contextmanager
def unable_to_save(server: RedisServer) -> Iterator[None]:
    """MISCONF: the last snapshot failed."""
    with server.client() as client:
        client.config_set("save", "3600 1000000")
        # Its name is that of a directory, so the finished snapshot cannot be put there.
        (server.directory / "dump.rdb").mkdir()
        with suppress(redis.exceptions.ResponseError):
            client.bgsave()
        while client.info("persistence")["rdb_last_bgsave_status"] == "ok":
            pass
        yield
        client.config_set("save", "")
        (server.directory / "dump.rdb").rmdir()


def unblock(server: RedisServer) -> bool:
    """An administrator ends a command that blocks, with an error; return whether there was one."""
    with server.client() as client:
        return any(client.execute_command("CLIENT", "UNBLOCK", one["id"], "ERROR") for one in client.client_list())


@asynccontextmanager
async def reading(layer: Any, *receives: Callable[[], Any]) -> AsyncGenerator[None]:
    """Have readers wait in this block, and get one message each in its end, which goes to the group and to ``jobs``."""
    got: list[Any] = []

    async def read(receive: Callable[[], Any]) -> None:
        got.append(await receive())

    async with create_task_group() as tg:
        for receive in receives:
            tg.start_soon(read, receive)
        await until(lambda: layer.statistics().waiting_receivers == len(receives))
        yield
        assert not got
        await until_served(layer)
        await layer.group_send("room", {"n": 1})
        await layer.send("jobs", {"n": 1})
    assert got == [{"n": 1}] * len(receives)


async def until_served(layer: Any) -> None:
    """Return when Redis takes messages again."""
    while True:
        with suppress(redis.exceptions.RedisError):
            await layer.send("other", {"n": 0})
            return


def events(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was logged of pops and memberships."""
    names = [getattr(one, log.PREFIX + "event", "") for one in caplog.records]
    return [name for name in names if name.startswith(("pop.", "membership."))]


@pytest.mark.parametrize("trouble", [demoted, without_replicas, unable_to_save])
@pytest.mark.parametrize("with_normal", [False, True])
@both
async def test_readers_wait_through_a_refusal(
    kind: Kind, with_normal: bool, trouble: Trouble, server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    """Readers of inboxes and of normal channels wait while the server refuses, and receive what is sent then."""
    async with make(kind, server) as layer, layer.subscribe("room") as first, layer.subscribe("room") as second:
        normal = [lambda: layer.receive("jobs")] * with_normal
        with fail_after(PATIENCE):
            async with reading(layer, first.receive, second.receive, *normal):
                with trouble(server):
                    if kind is QUEUE:
                        await until(lambda: "pop.refused" in events(caplog))
    assert set(events(caplog)) == ({"pop.refused"} if kind is QUEUE else set())


@pytest.mark.parametrize("with_normal", [False, True])
async def test_readers_wait_through_an_unblock(
    with_normal: bool, server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    """An administrator's CLIENT UNBLOCK ... ERROR ends a pop, and costs no reader anything."""
    async with make(QUEUE, server, keep_alive=PATIENCE) as layer, layer.subscribe("room") as inbox:
        normal = [lambda: layer.receive("jobs")] * with_normal
        with fail_after(PATIENCE):
            async with reading(layer, inbox.receive, *normal):
                await until(lambda: unblock(server))
                await until(lambda: "pop.refused" in events(caplog))
    assert events(caplog) == ["pop.refused"]


@pytest.mark.parametrize(("trouble", "is_told"), [(demoted, True), (without_replicas, False)])
async def test_an_inbox_is_told_of_a_demotion(
    trouble: Trouble, is_told: bool, server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    """A replica has the data of another server, which may lack what was sent: one gap. Who only refuses has lost nothing."""
    async with (
        make(QUEUE, server) as layer,
        layer.subscribe("room", on_gap="event") as inbox,
        create_task_group() as tg,
    ):
        got: list[Any] = []

        async def read() -> None:
            while True:
                got.append(await inbox.receive())

        tg.start_soon(read)
        with trouble(server):
            await until(lambda: "pop.refused" in events(caplog))
            if is_told:
                await until(lambda: got)
            before = layer.statistics().commands
            await until(lambda: layer.statistics().commands > before + 5)  # it is refused again
        await until_served(layer)
        await layer.group_send("room", {"n": 1})
        await until(lambda: {"n": 1} in got)
        assert got == [{"type": "channel_layer.gap", "missed": None}] * is_told + [{"n": 1}]
        tg.cancel_scope.cancel()


async def test_fetching_waits_through_a_script(server: RedisServer, caplog: pytest.LogCaptureFixture) -> None:
    """BUSY: a reader that comes while a script runs waits, and has its message when that is over."""
    async with make(QUEUE, server) as layer, create_task_group() as tg:
        got: list[Any] = []

        async def read() -> None:
            got.append(await layer.receive("jobs"))

        with busy(server):
            tg.start_soon(read)
            await until(lambda: "pop.refused" in events(caplog))
            assert "BUSY" in caplog.text
        await layer.send("jobs", {"n": 1})
        await until(lambda: got == [{"n": 1}])


async def test_subscribing_waits_through_a_refusal(server: RedisServer) -> None:
    """A reader that comes while Redis is busy waits, as in any outage, and has its message when that is over."""
    async with (
        make(PUBSUB, server) as sender,
        make(PUBSUB, server, prefix=sender.prefix, timeout=0.2) as layer,
        create_task_group() as tg,
    ):
        got: list[Any] = []

        async def read(channel: str) -> None:
            got.append(await layer.receive(channel))

        with busy(server):
            tg.start_soon(read, "a")
            await until(lambda: "a" in subscriptions(layer).wanted)
            await until(lambda: layer.statistics().connections == 0)  # given up, after timeout seconds
            tg.start_soon(read, "b")
        await until(lambda: hears(layer, "a") and hears(layer, "b"))
        for channel in ("a", "b"):
            await sender.send(channel, {"to": channel})
        await until(lambda: len(got) == 2)


async def test_leaving_waits_through_a_refusal(server: RedisServer, caplog: pytest.LogCaptureFixture) -> None:
    """An inbox that is closed while Redis writes nothing leaves its groups when it writes again."""
    async with make(QUEUE, server) as layer, layer.subscribe("room"):
        group = Names(layer.prefix).group("room")
        with server.client() as client:
            async with layer.subscribe("room"):
                assert client.zcard(group) == 2
                client.config_set("min-replicas-to-write", 1)
            await until(lambda: "membership.refused" in events(caplog))
            assert client.zcard(group) == 2
            client.config_set("min-replicas-to-write", 0)
            await until(lambda: client.zcard(group) == 1)


async def test_leaving_that_is_forbidden(server: RedisServer, caplog: pytest.LogCaptureFixture) -> None:
    """A membership that this user may not end is told of, and not tried again."""
    async with make(QUEUE, server) as layer:
        with server.client() as client:
            async with layer.subscribe("room"):
                client.execute_command("ACL", "SETUSER", "default", "-zrem")
            await until(lambda: "membership.refused" in events(caplog))
            client.execute_command("ACL", "SETUSER", "default", "+zrem")
            for _ in range(3):  # signs of life
                before = layer.statistics().commands
                await until(lambda before=before: layer.statistics().commands > before)  # type: ignore[misc]
            assert client.zcard(Names(layer.prefix).group("room")) == 1


@pytest.mark.parametrize("with_normal", [False, True])
async def test_one_key_that_is_refused(with_normal: bool, server: RedisServer) -> None:
    """WRONGTYPE: who reads what is in that key is told, also while others wait for other keys; they go on."""
    async with make(QUEUE, server) as layer, layer.subscribe("room") as inbox, create_task_group() as tg:
        got: list[Any] = []

        async def read() -> None:
            got.append(await layer.receive("jobs"))

        if with_normal:
            tg.start_soon(read)
            await until(lambda: popper(layer).blocked)
        with server.client() as client:
            client.set(Names(layer.prefix).channel(inbox.channel), "text")
        with fail_after(PATIENCE), pytest.raises(redis.exceptions.ResponseError, match="WRONGTYPE"):
            await inbox.receive()
        await layer.send("jobs", {"n": 1})
        await until(lambda: len(got) == with_normal)


@both
async def test_opened_while_redis_cannot_save(kind: Kind, server: RedisServer) -> None:
    """MISCONF is the answer to PING and to writes: pub/sub works there, also after a reconnect; the queue layer opens."""
    with unable_to_save(server):
        async with make(kind, server) as layer:
            if kind is QUEUE:
                with pytest.raises(redis.exceptions.ResponseError, match="MISCONF"):
                    await layer.send("a", {})
                return
            async with layer.subscribe("room") as inbox:
                with server.client() as client:
                    client.client_kill_filter(_type="pubsub")
                await until(lambda: layer.statistics().reconnects == 1)
                await layer.group_send("room", {"n": 1})
                with fail_after(PATIENCE):
                    assert await inbox.receive() == {"n": 1}
                await layer.flush()
