"""What Redis, the network and bad input do to the layers on Redis: each against a real server that really does it."""

from __future__ import annotations

import gc
import logging
import sys
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import anyio
import msgpack
import pytest
import redis
import redis.exceptions
from anyio import create_task_group, fail_after, to_thread
from conftest import here
from cryptography.fernet import Fernet
from layers_on_redis import (
    PATIENCE,
    PUBSUB,
    QUEUE,
    Kind,
    LayerOnRedis,
    arrive,
    arrives,
    both,
    events,
    new_prefix,
    popper,
    session,
    subscriptions,
    transport,
    until,
    until_answered,
    until_sent,
)
from redis_server import Proxy, RedisServer, Script, TLSProxy, free_port, make_certificates

import anyio_channels
from anyio_channels import ChannelFull, MessagesLost, RedisChannelLayer, RedisPubSubChannelLayer
from anyio_channels.redis.client import Request
from anyio_channels.redis.queue import room
from anyio_channels.redis.wire import Names

pytestmark = [pytest.mark.anyio, pytest.mark.two_loops]


def make(kind: Kind, url: str, **options: Any) -> Any:
    return kind.layer_class([url], **{"timeout": 2.0, "connect_timeout": 2.0, "prefix": new_prefix(), **options})


class Numbered:
    """Numbered messages to an inbox from one sender that goes on whatever happens, and a reader that notes what came."""

    def __init__(self, sender: LayerOnRedis, inbox: Any) -> None:
        self.sender = sender
        self.inbox = inbox
        self.sent: list[int] = []
        self.failed: list[Exception] = []
        self.received: list[int] = []
        self.number = 0

    async def send(self) -> None:
        while True:
            self.number += 1
            try:
                await self.sender.send(self.inbox.channel, {"n": self.number})
            except redis.exceptions.RedisError as error:
                self.failed.append(error)
            except ChannelFull:
                pass
            else:
                self.sent.append(self.number)
            await anyio.lowlevel.checkpoint()

    async def receive(self) -> None:
        while True:
            self.received.append((await self.inbox.receive())["n"])


@asynccontextmanager
async def under_load(kind: Kind, url: str, **options: Any) -> AsyncGenerator[Numbered]:
    """Two layers, a sender in one and a reader in the other; afterwards nothing came twice or out of order."""
    prefix = new_prefix()
    async with (
        make(kind, url, prefix=prefix, **options) as sender,
        make(kind, url, prefix=prefix, **options) as receiver,
        receiver.subscribe("room", capacity=100_000) as inbox,
        create_task_group() as tg,
    ):
        load = Numbered(sender, inbox)
        tg.start_soon(load.send)
        tg.start_soon(load.receive)
        await until(lambda: len(load.received) > 10)
        yield load
        before = len(load.received)
        await until(lambda: len(load.received) > before + 10)
        tg.cancel_scope.cancel()
    assert load.received == sorted(set(load.received))


# Redis goes away


@both
async def test_killed_under_load(kind: Kind, server: RedisServer) -> None:
    """Redis killed and started again: sends fail with an error that says so, readers go on, nothing twice or reordered."""
    async with under_load(kind, server.url) as load:
        await to_thread.run_sync(server.kill)
        await until(lambda: load.failed)
        await to_thread.run_sync(server.start)
        sent = len(load.sent)
        await until(lambda: len(load.sent) > sent)
    assert all(f"127.0.0.1:{server.port}" in str(error) for error in load.failed)
    assert all("may have run" in str(error) or "was not sent" in str(error) for error in load.failed)


@both
async def test_paused_under_load(kind: Kind, server: RedisServer) -> None:
    """A Redis that stands still: sends fail in time, and all goes on when it does."""
    async with under_load(kind, server.url, timeout=0.3, connect_timeout=0.3) as load:
        server.pause()
        await until(lambda: len(load.failed) > 1)
        server.resume()
        failed = len(load.sent)
        await until(lambda: len(load.sent) > failed)
    assert any(isinstance(error, redis.exceptions.TimeoutError) for error in load.failed)


@both
async def test_sends_that_are_cancelled_while_redis_stands_still(kind: Kind, server: RedisServer) -> None:
    """A cancelled send takes its bytes along, unless they were written; all others arrive, and the books are exact."""
    options: dict[str, Any] = {"capacity": 5000, "timeout": PATIENCE}
    async with make(kind, server.url, **options) as layer, layer.subscribe() as inbox:
        server.pause()
        async with create_task_group() as tg:
            for _ in range(2000):
                tg.start_soon(layer.send, inbox.channel, {"type": "x", "text": "y" * 20_000})
            await anyio.wait_all_tasks_blocked()
            tg.cancel_scope.cancel()
        gc.collect()  # asyncio's tasks hold the frames that they were cancelled in
        held = sum(len(one.data) for one in gc.get_objects() if isinstance(one, Request))
        assert held < 2**24, f"{held} of 40,000,000 bytes are held"
        server.resume()
        received = 0
        with fail_after(PATIENCE):
            await layer.send(inbox.channel, {"type": "last"})
            while (await inbox.receive())["type"] != "last":
                received += 1
        assert 0 < received < 2000
        assert layer.statistics().sent == received + 1


@both
async def test_a_reader_goes_on_by_itself(kind: Kind, server: RedisServer, caplog: pytest.LogCaptureFixture) -> None:
    """Readers that wait while Redis is away are not told; one line is logged when it goes and one when it is back."""
    async with (
        make(kind, server.url, keep_alive=0.2) as layer,
        layer.subscribe("room") as inbox,
        create_task_group() as tg,
    ):
        got: list[Any] = []

        async def read() -> None:
            got.append(await inbox.receive())

        tg.start_soon(read)
        tg.start_soon(layer.receive, "normal")
        await until(
            lambda: (
                layer.statistics().waiting_receivers == 2
                and layer.statistics().connections == len(layer.options.router.running)
            )
        )
        with caplog.at_level(logging.INFO, "anyio_channels"):
            await to_thread.run_sync(server.kill)
            await until(lambda: layer.statistics().connections == 0)
            await to_thread.run_sync(server.start)
            await until(lambda: layer.statistics().connections == len(layer.options.router.running))
        await layer.group_send("room", {"n": 1})
        await until(lambda: got == [{"n": 1}])
        assert layer.statistics().reconnects == len(layer.options.router.running)
        lines = [record.getMessage() for record in caplog.records]
        assert sum("trying again" in line for line in lines) == len(layer.options.router.running)
        assert sum("connected again" in line for line in lines) == len(layer.options.router.running)
        tg.cancel_scope.cancel()


@both
async def test_each_connection_killed_in_turn(kind: Kind, server: RedisServer) -> None:
    """CLIENT KILL of any of our connections: it comes back, and messages come again."""
    with server.client() as client:
        async with make(kind, server.url) as layer, layer.subscribe("room") as inbox:
            await layer.group_send("room", {"n": 0})
            await inbox.receive()
            ours = [one for one in client.client_list() if one["id"] != str(client.client_id())]
            assert 1 <= len(ours) <= 2
            for number, one in enumerate(ours, 1):
                client.client_kill_filter(_id=one["id"])
                await until(lambda number=number: layer.statistics().reconnects == number)  # type: ignore[misc]
                await layer.group_send("room", {"n": number})
                with fail_after(PATIENCE):
                    assert await inbox.receive() == {"n": number}


@pytest.mark.parametrize("on_gap", ["event", "raise"])
@both
async def test_an_inbox_is_told_of_the_outage(kind: Kind, on_gap: Any, server: RedisServer) -> None:
    """on_gap: a reader learns, between what it received before and after, that it may have missed something."""
    async with make(kind, server.url) as layer, layer.subscribe("room", on_gap=on_gap) as inbox:
        await layer.group_send("room", {"n": 1})
        await until(lambda: layer.statistics().buffered_messages == 1)
        await to_thread.run_sync(server.restart)
        await until(
            lambda: (
                layer.statistics().reconnects and layer.statistics().connections == len(layer.options.router.running)
            )
        )
        await layer.group_send("room", {"n": 2})
        assert await inbox.receive() == {"n": 1}
        if on_gap == "event":
            assert await inbox.receive() == {"type": "channel_layer.gap", "missed": None}
        else:
            with pytest.raises(MessagesLost, match="how many is not known"):
                await inbox.receive()
        assert await inbox.receive() == {"n": 2}


async def test_on_disconnect_and_on_reconnect(server: RedisServer) -> None:
    """The pub/sub layer puts messages of those types into every channel of the process, as channels_redis documents."""
    layer = RedisPubSubChannelLayer([server.url], on_disconnect="gone", on_reconnect="back")
    async with layer, layer.subscribe() as inbox:
        channel = await layer.new_channel()
        await to_thread.run_sync(server.restart)
        with fail_after(PATIENCE):
            for receive in (inbox.receive, lambda: layer.receive(channel)):
                assert [await receive(), await receive()] == [{"type": "gone"}, {"type": "back"}]


@both
async def test_memberships_survive_a_redis_that_lost_them(kind: Kind, server: RedisServer) -> None:
    """FLUSHALL: an open inbox is a member again within one keep_alive, without a reconnect."""
    async with make(kind, server.url, keep_alive=0.1) as layer, layer.subscribe("room") as inbox:
        with server.client() as client:
            client.flushall()
        with fail_after(PATIENCE):
            while inbox.channel not in await layer.group_channels("room"):
                await anyio.sleep(0.01)  # until the next keep-alive
        await layer.group_send("room", {"n": 1})
        assert await inbox.receive() == {"n": 1}
        assert layer.statistics().reconnects == 0


async def test_memberships_are_renewed(server: RedisServer) -> None:
    """group_expiry shorter than the life of an inbox: it stays a member, and one that nobody renews does not."""
    layer = make(QUEUE, server.url, group_expiry=0.3)
    async with layer, layer.subscribe("room") as inbox:
        await layer.group_add("room", "nobody")
        assert await layer.group_channels("room") == {"nobody", inbox.channel}
        with fail_after(PATIENCE):
            while "nobody" in await layer.group_channels("room"):
                await anyio.sleep(0.05)  # real time passes in Redis
        assert await layer.group_channels("room") == {inbox.channel}


@both
async def test_script_flush(kind: Kind, server: RedisServer) -> None:
    """SCRIPT FLUSH: nobody notices."""
    async with make(kind, server.url) as layer, layer.subscribe("room") as inbox:
        for number in range(3):
            with server.client() as client:
                client.script_flush()
            await layer.send(inbox.channel, {"n": number})
            await layer.group_send("room", {"n": number})
            with fail_after(PATIENCE):
                assert [await inbox.receive(), await inbox.receive()] == [{"n": number}] * 2
            await layer.inbox_leave(inbox.channel, "room")
            await inbox.join("room")


async def test_script_flush_before_a_pop_that_waits(server: RedisServer) -> None:
    """What empties a key is sent again behind the pop that waits: it has as much time as that."""
    layer = make(QUEUE, server.url, timeout=0.2, keep_alive=1.0)
    async with layer, layer.subscribe() as inbox, create_task_group() as tg:
        tg.start_soon(layer.receive, "work")
        await until(lambda: popper(layer).blocked)
        with server.client() as client:
            client.script_flush()
        for number in range(3):
            await layer.send(inbox.channel, {"n": number})
            with fail_after(PATIENCE):
                assert await inbox.receive() == {"n": number}
            await anyio.sleep(0.4)  # nothing but time would end the connection
        assert layer.statistics().reconnects == 0
        tg.cancel_scope.cancel()


async def test_out_of_memory(server: RedisServer) -> None:
    """maxmemory reached: sending fails with what Redis says, receiving goes on, also from a channel not waited for before."""
    async with make(QUEUE, server.url) as layer, create_task_group() as tg:
        got: list[Any] = []

        async def read(channel: str) -> None:
            got.append(await layer.receive(channel))

        await layer.send("full", {"n": 1})
        tg.start_soon(read, "waiting")
        await until(lambda: layer.statistics().waiting_receivers == 1 and popper(layer).popping)
        with server.client() as client:
            client.config_set("maxmemory-policy", "noeviction")
            client.config_set("maxmemory", 1)
            with pytest.raises(redis.exceptions.ResponseError, match=rf"127\.0\.0\.1:{server.port}.*OOM|maxmemory"):
                await layer.send("full", {"n": 2})
            tg.start_soon(read, "later")
            await until(lambda: "later" in {channel.name for channel in popper(layer).blocked.values()})
            tg.start_soon(read, "full")
            await until(lambda: {"n": 1} in got)
            client.config_set("maxmemory", 0)
        await layer.send("waiting", {"n": 3})
        await layer.send("later", {"n": 4})
        await until(lambda: len(got) == 3)


@both
async def test_a_replica_refuses(kind: Kind, server: RedisServer, tmp_path: Path) -> None:
    """READONLY: sending to a replica is an error that says so and names it; receiving waits."""
    (tmp_path / "replica").mkdir()
    with server.client() as client:
        client.config_set("repl-diskless-sync-delay", 0)
    with (
        RedisServer(tmp_path / "replica", "--replicaof", server.host, str(server.port)) as replica,
        replica.client() as client,
    ):
        await until(lambda: client.info("replication")["master_link_status"] == "up")
        async with make(kind, replica.url, keep_alive=0.2) as layer:
            if kind is PUBSUB:
                await layer.send("a", {})  # a replica publishes to those subscribed there
                return
            with pytest.raises(redis.exceptions.ReadOnlyError, match=str(replica.port)):
                await layer.send("a", {})
            async with create_task_group() as tg:
                got: list[Any] = []

                async def read() -> None:
                    got.append(await layer.receive("a"))

                tg.start_soon(read)
                await until(lambda: popper(layer).refused)
                client.execute_command("REPLICAOF", "NO", "ONE")
                await layer.send("a", {"n": 1})
                await until(lambda: got)


@both
async def test_loading(kind: Kind, tmp_path: Path) -> None:
    """LOADING: a layer waits until Redis has loaded its data, if that is soon enough."""
    with RedisServer(tmp_path) as server:
        with server.client() as client:
            for number in range(500):
                client.set(f"key{number}", "value")
            client.save()
        port = server.port
        # 500 keys of 2 ms each, and it answers in between.
        slow = ("--key-load-delay", "2000", "--loading-process-events-interval-bytes", "1024")
        await to_thread.run_sync(server.kill)
    with RedisServer(tmp_path, *slow, "--dbfilename", "dump.rdb", port=port) as server:
        async with make(kind, server.url, connect_timeout=PATIENCE) as layer:
            await layer.send("a", {})


# The way in


@both
async def test_errors_at_opening(kind: Kind, server: RedisServer, tmp_path: Path) -> None:
    """Wrong password, unknown host, refused port, untrusted certificate: an error that names server and cause, no password."""
    with server.client() as client:
        client.acl_setuser("app", enabled=True, passwords=["+right"], keys=["*"], channels=["*"], categories=["+@all"])
    nobody = free_port()
    cases: list[tuple[str, type[Exception], str]] = [
        (f"redis://app:wr0ng-secret@{server.host}:{server.port}", redis.exceptions.AuthenticationError, "WRONGPASS"),
        (
            f"redis://127.0.0.1:{nobody}",
            redis.exceptions.ConnectionError,
            f"127.0.0.1:{nobody} cannot be reached.*refused|failed",
        ),
        (
            "redis://no-such-host.invalid:1",
            redis.exceptions.ConnectionError,
            "no-such-host.invalid:1 cannot be reached",
        ),
        (f"unix://{tmp_path}/nothing.sock", redis.exceptions.ConnectionError, "nothing.sock cannot be reached"),
    ]
    for url, error, words in cases:
        layer = make(kind, url, connect_timeout=0.5)
        with pytest.raises(error, match=words) as caught:
            await layer.__aenter__()
        assert "wr0ng-secret" not in f"{caught.value!r} {caught.value} {caught.value.__cause__!r} {layer!r}"
        with pytest.raises(RuntimeError, match="is not open; write 'async with layer:'"):
            await layer.send("a", {})
    async with make(kind, f"redis://app:right@{server.host}:{server.port}") as layer:
        await layer.send("a", {})


@both
async def test_tls(kind: Kind, server: RedisServer, tmp_path: Path) -> None:
    """rediss:// verifies the certificate by default, and works with the right authority; an untrusted one is said so."""
    certificates = make_certificates(tmp_path)
    async with TLSProxy(server.host, server.port, certificates) as proxy:
        with pytest.raises(redis.exceptions.ConnectionError, match=f"{proxy.port} cannot be reached.*certificate"):
            await make(kind, proxy.url).__aenter__()
        async with (
            make(kind, f"{proxy.url}?ssl_ca_certs={certificates.ca_file}") as layer,
            layer.subscribe("room") as inbox,
        ):
            await layer.group_send("room", {"n": 1})
            assert await inbox.receive() == {"n": 1}
        async with make(kind, f"{proxy.url}?ssl_cert_reqs=none") as layer:
            await layer.send("a", {})


@both
async def test_unix_socket_user_and_database(kind: Kind, server: RedisServer) -> None:
    """A unix socket, an ACL user and a database number all work."""
    with server.client() as client:
        client.acl_setuser("other", enabled=True, passwords=["+pw"], keys=["*"], channels=["*"], categories=["+@all"])
    url = f"unix://other:pw@{server.unix_socket}?db=3&client_name=chat"
    async with make(kind, url) as layer, layer.subscribe("room") as inbox:
        await layer.group_send("room", {"n": 1})
        assert await inbox.receive() == {"n": 1}
        with server.client() as client:
            ours = [one for one in client.client_list() if one["user"] == "other"]
            assert {(one["name"], one["db"]) for one in ours} == {("chat", "3")}


async def test_no_permission(server: RedisServer) -> None:
    """An ACL that forbids a key: the sender and the reader of that channel are told which server refused; others are not."""
    with server.client() as client:
        client.acl_setuser(
            "app", enabled=True, passwords=["+pw"], keys=["asgi:*", "asgigood", "asgispecific*"], channels=["*"],
            categories=["+@all", "-@dangerous"],
        )  # fmt: skip
    async with (
        make(QUEUE, f"redis://app:pw@{server.host}:{server.port}", prefix="asgi") as layer,
        create_task_group() as tg,
    ):
        got: list[Any] = []

        async def read() -> None:
            got.append(await layer.receive("good"))

        tg.start_soon(read)
        await until(lambda: popper(layer).popping)
        calls: list[Callable[[], Any]] = [lambda: layer.send("bad", {}), lambda: layer.receive("bad")]
        for call in calls:
            with pytest.raises(redis.exceptions.ResponseError, match=str(server.port)), fail_after(PATIENCE):
                await call()
        await layer.send("good", {"n": 1})
        await until(lambda: got == [{"n": 1}])
        async with layer.subscribe("room") as inbox:
            await layer.group_send("room", {"n": 2})
            with fail_after(PATIENCE):
                assert await inbox.receive() == {"n": 2}
    with server.client() as client:
        client.acl_setuser("app", enabled=True, reset_keys=True, keys=["asgi:*"])
    async with make(QUEUE, f"redis://app:pw@{server.host}:{server.port}", prefix="asgi") as layer:
        async with layer.subscribe() as inbox:
            with pytest.raises(redis.exceptions.ResponseError, match=str(server.port)), fail_after(PATIENCE):
                await inbox.receive()


async def read_in_vain(layer: LayerOnRedis, refused: list[Exception]) -> None:
    """Read a channel that this user may not, and note what that is told."""
    try:
        await layer.receive("bad")
    except redis.exceptions.NoPermissionError as error:
        refused.append(error)


async def test_no_permission_for_a_subscription(server: RedisServer) -> None:
    """An ACL that forbids a Redis channel: whoever would subscribe is told, and nothing is left of the attempt."""
    with server.client() as client:
        client.acl_setuser("app", enabled=True, passwords=["+pw"], keys=["*"], channels=["good*"], categories=["+@all"])
    async with make(PUBSUB, f"redis://app:pw@{server.host}:{server.port}") as layer:
        for call in (lambda: layer.receive("bad"), layer.new_channel, layer.subscribe().__aenter__):
            with pytest.raises(redis.exceptions.NoPermissionError, match=str(server.port)):
                await call()
        refused: list[Exception] = []

        async with create_task_group() as tg:
            tg.start_soon(read_in_vain, layer, refused)
            tg.start_soon(read_in_vain, layer, refused)
        assert len(refused) == 2
        assert not subscriptions(layer).wanted
        channel = await layer.new_channel("good")
        with pytest.raises(redis.exceptions.NoPermissionError):
            await layer.group_add("room", channel)
        assert await layer.group_channels("room") == set()


@pytest.mark.parametrize(
    "answer", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"+OK\r\n" * 20, b"$-5\r\n", b"-ERR no\r\n" * 9]
)
@both
async def test_a_server_that_is_no_redis(kind: Kind, answer: bytes) -> None:
    """Nonsense, or nothing at all: an error within connect_timeout that names the server."""
    async with Script(answer) as server:
        with pytest.raises(redis.exceptions.RedisError, match=str(server.port)), fail_after(PATIENCE):
            await make(kind, server.url, connect_timeout=0.3).__aenter__()


@both
@pytest.mark.slow
async def test_cut_after_every_byte(kind: Kind, server: RedisServer) -> None:
    """The connection cut after N bytes, for every N of a handshake and a send: an error or success, never a hang or both."""
    async with make(kind, server.url) as layer:
        await layer.send("a", {"n": 0})  # from now on Redis has the scripts
    async with Proxy(server.host, server.port) as proxy, make(kind, proxy.url) as layer:
        opened = {"n_bytes_to_server": proxy.bytes_to_server, "n_bytes_to_client": proxy.bytes_to_client}
        await layer.send("a", {"n": 0})
        # Numbers in replies may grow by a few digits.
        ends = {"n_bytes_to_server": proxy.bytes_to_server + 20, "n_bytes_to_client": proxy.bytes_to_client + 20}
    outcomes: set[str] = set()
    limiter = anyio.CapacityLimiter(32)

    async def attempt(direction: str, count: int) -> None:
        async with limiter, Proxy(server.host, server.port) as proxy:
            proxy.cut_after(**{direction: count})
            # With fewer bytes than the handshake has it never opens; with more it must, however slow the machine is.
            can_open = count > opened[direction] + 20
            layer = make(kind, proxy.url, connect_timeout=PATIENCE if can_open else 0.1, timeout=2.0)
            with fail_after(PATIENCE), suppress(redis.exceptions.RedisError):
                async with layer:
                    try:
                        await layer.send("a", {"n": 1})
                    except redis.exceptions.RedisError as error:
                        outcomes.add("may have" if "may have run" in str(error) else "not sent")
                        if kind is QUEUE and "not sent" in str(error):
                            with server.client() as client:
                                assert client.zcard(f"{layer.prefix}a") == 0
                    else:
                        outcomes.add("sent")

    async with create_task_group() as tg:
        for direction, end in ends.items():
            # The handshake of the two layers is the same: one of them goes through it.
            for count in range(1 if kind is PUBSUB else opened[direction], end):
                tg.start_soon(attempt, direction, count)
    assert {"sent", "may have"} <= outcomes


# The connection is dead and nobody says so


@both
async def test_half_open(kind: Kind, server: RedisServer) -> None:
    """A connection that swallows everything is noticed by a layer that only listens, within keep_alive + timeout."""
    async with Proxy(server.host, server.port) as proxy:
        async with (
            make(kind, proxy.url, keep_alive=0.2) as layer,
            layer.subscribe("room") as inbox,
        ):
            await until(lambda: layer.statistics().connections == len(layer.options.router.running))
            proxy.swallow()
            await until(lambda: layer.statistics().connections == 0)
            proxy.stop_swallowing()
            await until(lambda: layer.statistics().connections == len(layer.options.router.running))
            with server.client() as client:
                if kind is QUEUE:
                    await until(lambda: client.zcard(Names(layer.prefix).group("room")) == 1)
            async with make(kind, server.url, prefix=layer.prefix) as other:
                await other.group_send("room", {"n": 1})
            with fail_after(PATIENCE):
                assert await inbox.receive() == {"n": 1}


@both
async def test_an_idle_reader_waits_for_ever(kind: Kind, server: RedisServer) -> None:
    """A reader idle for many time-outs and keep-alives still waits, on the same connection."""
    async with make(kind, server.url, keep_alive=0.05, timeout=0.3) as layer, create_task_group() as tg:
        got: list[Any] = []

        async def read() -> None:
            got.append(await layer.receive("a"))

        tg.start_soon(read)
        await until(lambda: layer.statistics().waiting_receivers == 1)
        before = layer.statistics().commands
        await until(lambda: layer.statistics().commands > before + 20)  # keep-alives only
        assert not got
        assert layer.statistics().reconnects == 0
        await layer.send("a", {"n": 1})
        await until(lambda: got == [{"n": 1}])


@both
async def test_a_thousand_readers(kind: Kind, server: RedisServer) -> None:
    """1,000 readers hold at most 3 connections, send nothing while idle, all receive, and leave no connection behind."""
    with server.client() as client:
        async with make(kind, server.url, timeout=PATIENCE) as layer, create_task_group() as tg:
            got: list[Any] = []

            async def read(number: int) -> None:
                if number % 2:
                    async with layer.subscribe("room") as inbox:
                        got.append(await inbox.receive())
                else:
                    got.append(await layer.receive(f"normal.{number}"))

            for number in range(1000):
                tg.start_soon(read, number)
            await until(lambda: layer.statistics().waiting_receivers == 1000)
            await until(lambda: layer.statistics().connections == len(layer.options.router.running))
            assert len(client.client_list()) - 1 <= 3
            await layer.options.router.links[0].execute("PING")
            if isinstance(layer, RedisChannelLayer):
                await popper(layer).until_ended()
                await until(lambda: len(popper(layer).blocked) == 500 and not popper(layer).waking)
                await popper(layer).until_ended()
            before = layer.statistics().commands
            started = time.monotonic()
            await anyio.sleep(0.3)  # idle; a keep-alive comes every 15 seconds
            assert layer.statistics().commands == before or time.monotonic() - started > 10
            await layer.group_send("room", {"n": 0})
            for number in range(0, 1000, 2):
                await layer.send(f"normal.{number}", {"n": number})
            await until(lambda: len(got) == 1000)
        await until(lambda: len(client.client_list()) == 1)


# What others put under our names


def payload(message: Any, prefix: bytes = b"x" * 12) -> bytes:
    return prefix + bytes(msgpack.packb(message))


DAMAGED = [
    b"",
    b"short",
    b"x" * 12,
    b"x" * 12 + b"\xc1",
    payload([1]),
    payload(5),
    payload({"a": 1}) + b"junk",
    payload({"a": 1})[:-1],
]


async def test_damaged_entries_in_queues(server: RedisServer, caplog: pytest.LogCaptureFixture) -> None:
    """Foreign and damaged entries under our keys are skipped, counted, and logged once per channel; readers go on."""
    deep: Any = []
    for _ in range(400):  # MessagePack can be read deeper than it can be written again
        deep = [deep]
    layer = make(QUEUE, server.url)
    async with layer, layer.subscribe("room") as inbox, create_task_group() as tg:
        got: list[Any] = []

        async def read(receive: Any) -> None:
            while True:
                got.append(await receive())

        tg.start_soon(read, inbox.receive)
        tg.start_soon(read, lambda: layer.receive("normal"))
        keys = [Names(layer.prefix).channel(inbox.channel), Names(layer.prefix).channel("normal")]
        names = [
            b"",
            {"__asgi_channel__": 5},
            {"__asgi_channel__": ["other!a"]},
            {"__asgi_channel__": [1]},
            {"no": "name"},
        ]
        with server.client() as client:
            now = time.time()
            for key in keys:
                for number, entry in enumerate(DAMAGED):
                    client.zadd(key, {entry or b"0": now + number / 1000})
            for number, foreign in enumerate(names):
                client.zadd(keys[0], {payload(foreign, b"%12d" % number): now + number / 1000})
            client.zadd(Names(layer.prefix).group("room"), {b"\xff bad name": now})
        await until(lambda: layer.statistics().dropped_unreadable == 2 * len(DAMAGED) + len(names))
        await layer.group_send("room", {"n": 1})
        await layer.send("normal", {"n": 2})
        await until(lambda: len(got) == 2)
        tg.cancel_scope.cancel()
    assert sorted(message["n"] for message in got) == [1, 2]
    skipped = [record for record in caplog.records if "skipped what is no message" in record.getMessage()]
    assert len(skipped) == 3  # the two keys and the group


async def test_damaged_messages_in_pubsub(server: RedisServer, caplog: pytest.LogCaptureFixture) -> None:
    """Foreign bytes on our Redis channels are skipped, counted, and logged once per channel; readers go on."""
    layer = make(PUBSUB, server.url)
    async with layer, layer.subscribe("room") as inbox:
        with server.client() as client:
            for entry in (b"", b"\xc1", payload([1], b""), payload({"a": 1}, b"") + b"junk"):
                client.publish(inbox.channel, entry)
                client.publish(Names(layer.prefix).group_topic("room"), entry)
            client.publish(inbox.channel, payload({"__asgi_exclude__": 5, "n": 0}, b""))
        await layer.group_send("room", {"n": 1})
        with fail_after(PATIENCE):
            assert (await inbox.receive())["n"] == 0
            assert await inbox.receive() == {"n": 1}
        assert layer.statistics().dropped_unreadable == 8
    assert len([record for record in caplog.records if "skipped what is no message" in record.getMessage()]) <= 2


@both
async def test_tokens_that_cannot_be_read(kind: Kind, server: RedisServer) -> None:
    """What was encrypted with another key, or so long ago that it expired, or not at all, is skipped and counted."""
    import base64
    import hashlib

    def fernet(key: str) -> Fernet:
        return Fernet(base64.urlsafe_b64encode(hashlib.sha256(key.encode()).digest()))

    layer = make(kind, server.url, symmetric_encryption_keys=["right"], expiry=10)
    async with layer, layer.subscribe() as inbox:
        body = bytes(msgpack.packb({"__asgi_channel__": inbox.channel, "n": 0}))
        tokens = [fernet("wrong").encrypt(body), body]
        if kind is QUEUE:
            tokens.append(fernet("right").encrypt_at_time(body, int(time.time()) - 3600))
        with server.client() as client:
            for number, token in enumerate(tokens):
                if kind is QUEUE:
                    client.zadd(Names(layer.prefix).channel(inbox.channel), {b"%12d" % number + token: time.time()})
                else:
                    client.publish(inbox.channel, token)
        await layer.send(inbox.channel, {"n": 1})
        with fail_after(PATIENCE):
            assert await inbox.receive() == {"n": 1}
        assert layer.statistics().dropped_unreadable == len(tokens)


async def test_a_key_of_another_type(server: RedisServer) -> None:
    """A key of ours that holds something else: its sender and its reader are told; other readers go on."""
    layer = make(QUEUE, server.url, keep_alive=0.3)
    async with layer, create_task_group() as tg:
        got: list[Any] = []

        async def read(channel: str) -> None:
            try:
                got.append(await layer.receive(channel))
            except redis.exceptions.ResponseError as error:
                got.append(error)

        tg.start_soon(read, "good")
        tg.start_soon(read, "bad")
        await until(lambda: len(popper(layer).blocked) == 2 and popper(layer).popping)
        with server.client() as client:
            client.set(Names(layer.prefix).channel("bad"), "text")
        with pytest.raises(redis.exceptions.ResponseError, match="WRONGTYPE"):
            await layer.send("bad", {})
        with pytest.raises(redis.exceptions.ResponseError, match="WRONGTYPE"), fail_after(PATIENCE):
            await layer.receive("bad")
        await layer.send("good", {"n": 1})
        await until(lambda: {"n": 1} in got)
        tg.start_soon(read, "good")  # the blocking pop begins anew, with the key of another type in it
        await until(lambda: any(isinstance(one, redis.exceptions.ResponseError) for one in got))
        await layer.send("good", {"n": 2})
        await until(lambda: {"n": 2} in got)


# What is begun, left or held while Redis is away


@asynccontextmanager
async def away(proxy: Proxy, layer: Any) -> AsyncGenerator[None]:
    """Redis cannot be reached in this block, and can afterwards."""
    proxy.refuse()
    proxy.cut_all()
    await until(lambda: layer.statistics().connections == 0)
    yield
    proxy.refuse(False)
    await until(lambda: layer.statistics().connections == len(layer.options.router.running))


@both
async def test_receiving_begun_while_away(kind: Kind, server: RedisServer) -> None:
    """A receive that begins while Redis is away waits, on a channel that is new too; calls that need Redis fail."""
    async with Proxy(server.host, server.port) as proxy, make(kind, proxy.url, timeout=0.2, keep_alive=0.05) as layer:
        async with create_task_group() as tg:
            got: list[Any] = []

            async def read() -> None:
                got.append(await layer.receive("new"))

            async with away(proxy, layer):
                tg.start_soon(read)
                await until(lambda: layer.statistics().waiting_receivers == 1)
                for call in (lambda: layer.send("a", {}), lambda: layer.group_send("room", {}), layer.flush):
                    with pytest.raises(redis.exceptions.ConnectionError, match="cannot be reached.*was not sent"):
                        await call()
            await until(lambda: kind is QUEUE or subscriptions(layer).wanted["new"].confirmed)
            await layer.send("new", {"n": 1})
            await until(lambda: got == [{"n": 1}])


@both
async def test_inboxes_while_away(kind: Kind, server: RedisServer) -> None:
    """An inbox is left at once while Redis is away, and Redis is told later; one that cannot join is no member."""
    async with Proxy(server.host, server.port) as proxy, make(kind, proxy.url, timeout=0.2) as layer:
        async with layer.subscribe("stays") as stays:
            async with layer.subscribe("room"):
                proxy.refuse()
                proxy.cut_all()
                await until(lambda: layer.statistics().connections == 0)
                with pytest.raises(redis.exceptions.ConnectionError):
                    await stays.join("other")
                with pytest.raises(redis.exceptions.ConnectionError):
                    await stays.join("stays")  # it is a member already, and stays one
                if kind is PUBSUB:
                    with pytest.raises(redis.exceptions.ConnectionError):
                        await layer.new_channel()
                    with pytest.raises(redis.exceptions.ConnectionError):
                        await layer.subscribe().__aenter__()
            assert layer.statistics().groups == 1
            proxy.refuse(False)
            await until(lambda: layer.statistics().connections == len(layer.options.router.running))
            assert await layer.group_channels("room") == await layer.group_channels("other") == set()
            assert await layer.group_channels("stays") == {stays.channel}
            if kind is PUBSUB:
                with server.client() as client:
                    assert set(client.pubsub_channels("*")) == {
                        name.encode() for name in (stays.channel, Names(layer.prefix).group_topic("stays"))
                    }


@both
async def test_closing_many_inboxes_while_away(kind: Kind, server: RedisServer) -> None:
    """An inbox that is closed while Redis is away costs the same however many were closed before it."""
    few, many = [await calls_to_close(kind, server, count) for count in (150, 300)]
    assert few > 150
    assert many < 2.5 * few, f"{few} calls to close 150 inboxes, {many} to close 300"


async def calls_to_close(kind: Kind, server: RedisServer, count: int) -> int:
    """Open so many inboxes, kill Redis, close them one by one; return how many calls of functions of the package that took."""
    package = str(Path(anyio_channels.__file__).parent)
    calls = 0

    def note(frame: FrameType, event: str, _: object) -> None:
        nonlocal calls
        calls += event == "call" and frame.f_code.co_filename.startswith(package)

    async with make(kind, server.url) as layer:
        inboxes = [layer.subscribe(f"room{number % 10}") for number in range(count)]
        for inbox in inboxes:
            await inbox.__aenter__()
        await to_thread.run_sync(server.kill)
        await until(lambda: layer.statistics().connections == 0)
        sys.setprofile(note)
        try:
            for inbox in inboxes:
                await inbox.__aexit__(None, None, None)
                for _ in range(3):  # what it leaves to be done soon is done
                    await anyio.lowlevel.checkpoint()
        finally:
            sys.setprofile(None)
        assert layer.statistics().members == 0
        await to_thread.run_sync(server.start)
    return calls


@pytest.mark.parametrize("make_channel", ["subscribe", "new_channel"])
async def test_a_channel_whose_making_is_cancelled(make_channel: str, server: RedisServer) -> None:
    """Whoever is cancelled while Redis is to confirm the subscription leaves nothing, neither here nor in Redis."""
    async with make(PUBSUB, server.url, timeout=PATIENCE) as layer:
        server.pause()
        async with create_task_group() as tg:
            tg.start_soon(layer.subscribe().__aenter__ if make_channel == "subscribe" else layer.new_channel)
            await until(lambda: subscriptions(layer).wanted)
            await anyio.wait_all_tasks_blocked()
            tg.cancel_scope.cancel()
        assert layer.statistics().channels == 0
        assert not subscriptions(layer).wanted
        server.resume()
        await layer.flush()  # what was sent before it is done
        with server.client() as client:
            assert client.pubsub_channels("*") == []


async def test_a_pop_that_is_cut_off(server: RedisServer) -> None:
    """If only the connection of the pop is lost, which may have taken something, inboxes that ask for it are told."""
    async with make(QUEUE, server.url) as layer, layer.subscribe(on_gap="event") as inbox:
        with server.client() as client:

            def popping() -> list[Any]:
                return [one["id"] for one in client.client_list() if one["cmd"].startswith("bz")]

            await until(popping)
            client.client_kill_filter(_id=popping()[0])
        with fail_after(PATIENCE):
            assert await inbox.receive() == {"type": "channel_layer.gap", "missed": None}


async def test_leaving_that_redis_did_not_hear_of(server: RedisServer) -> None:
    """An inbox has left its groups in the end, also if the connection was lost with what it told Redis."""
    async with Proxy(server.host, server.port) as proxy, make(QUEUE, proxy.url) as layer:
        async with layer.subscribe("room"):
            proxy.swallow()
        await until_sent(layer)
        proxy.stop_swallowing()
        proxy.cut_all()
        with server.client() as client:
            await until(lambda: not client.exists(Names(layer.prefix).group("room")))


async def test_joining_that_is_cancelled(server: RedisServer) -> None:
    """An inbox whose joining is cancelled, while Redis is doing it perhaps, is no member."""
    async with make(QUEUE, server.url, timeout=PATIENCE) as layer, layer.subscribe() as inbox:
        server.pause()
        async with create_task_group() as tg:
            tg.start_soon(inbox.join, "room")
            await until_sent(layer)
            tg.cancel_scope.cancel()
        server.resume()
        assert await layer.group_channels("room") == set()


async def test_held_while_away(server: RedisServer) -> None:
    """What was popped for a reader who is gone waits here while Redis is away: for a reader here, or to be given back."""
    async with Proxy(server.host, server.port) as proxy, make(QUEUE, proxy.url, timeout=0.2) as layer:
        source = session(layer).here.find("a")
        async with away(proxy, layer):
            for number in range(3):
                entry = payload({"n": number}, b"%12d" % number)
                arrives(layer, source, entry, time.time() + number / 1000)
            await anyio.wait_all_tasks_blocked()
            assert await layer.receive("a") == {"n": 0}
        with server.client() as client:
            await until(lambda: client.zcard(Names(layer.prefix).channel("a")) == 2)
        assert [await layer.receive("a"), await layer.receive("a")] == [{"n": 1}, {"n": 2}]
        assert layer.statistics().received == 3


async def test_what_the_readers_here_do_not_take(server: RedisServer) -> None:
    """Of two messages that come at once, a reader who waits gets the first; the second is given back when he leaves."""
    async with make(QUEUE, server.url) as layer, create_task_group() as tg:
        got: list[Any] = []

        async def read() -> None:
            got.append(await layer.receive("a"))

        tg.start_soon(read)
        await until(lambda: layer.statistics().waiting_receivers == 1)
        now = time.time()
        entries = [(payload({"n": number}, b"%12d" % number), now + number / 1000) for number in range(2)]
        arrive(layer, session(layer).here.find("a"), entries)
        await until(lambda: got == [{"n": 0}])
        assert await layer.receive("a") == {"n": 1}
        assert layer.statistics().received == 2


async def test_what_cannot_be_given_back(server: RedisServer, caplog: pytest.LogCaptureFixture) -> None:
    """A message that Redis does not take back is counted as discarded, and logged."""
    async with make(QUEUE, server.url) as layer:
        source = session(layer).here.find("a")
        with server.client() as client:
            client.set(Names(layer.prefix).channel("a"), "text")
        arrives(layer, source, payload({"n": 1}), time.time())
        await until(lambda: layer.statistics().discarded == 1)
        assert "could not be given back" in caplog.text


@pytest.mark.parametrize("pops_many", [True, False])
async def test_scripts_lost_while_messages_come(server: RedisServer, pops_many: bool) -> None:
    """A burst for this process comes whole and in order, from a Redis that lost the scripts, and from one before 7.0."""
    options = {"capacity": 5000, "timeout": PATIENCE}  # for the 2,500 at once on a busy machine
    layer = make(QUEUE, server.url, **options)
    async with layer, make(QUEUE, server.url, prefix=layer.prefix, **options) as sender, create_task_group() as tg:
        tg.start_soon(layer.receive, "normal")  # so that the blocking pop takes one at a time
        await until(lambda: popper(layer).popping and popper(layer).blocked)
        popper(layer).pops_many = pops_many
        channel = await layer.new_channel()
        for burst in range(3):
            with server.client() as client:
                client.script_flush()
            for number in range(100):
                await sender.send(channel, {"n": number, "burst": burst})
            with fail_after(PATIENCE):
                got = [await layer.receive(channel) for _ in range(100)]
            assert got == [{"n": number, "burst": burst} for number in range(100)]
        async with create_task_group() as senders:
            for number in range(2500):
                senders.start_soon(sender.send, channel, {"n": number})
        with fail_after(PATIENCE):
            assert sorted([(await layer.receive(channel))["n"] for _ in range(2500)]) == list(range(2500))
        tg.cancel_scope.cancel()


async def test_closing_while_redis_stands_still(server: RedisServer, caplog: pytest.LogCaptureFixture) -> None:
    """Closing takes no longer than timeout when Redis does not answer, and when it is gone."""
    layer = make(QUEUE, server.url, timeout=0.2)
    with fail_after(PATIENCE):
        async with layer, layer.subscribe("room"):
            await until(lambda: popper(layer).popping)
            server.pause()
        server.resume()
        async with layer:
            await layer.new_channel()
            await until(lambda: popper(layer).popping)
            await to_thread.run_sync(server.kill)


@both
async def test_used_while_it_is_closed(kind: Kind, server: RedisServer) -> None:
    """Whoever uses a layer that is closed, or is being closed, is told so, and not that it was never opened."""
    async with make(kind, server.url, timeout=PATIENCE) as layer, create_task_group() as tg:
        server.pause()
        tg.start_soon(layer.close)
        await anyio.wait_all_tasks_blocked()
        for call in (lambda: layer.send("a", {}), lambda: layer.receive("a"), layer.new_channel, layer.flush):
            with pytest.raises(anyio.ClosedResourceError):
                await call()
        server.resume()


@both
async def test_closed_in_the_middle_of_a_call(kind: Kind, server: RedisServer) -> None:
    """A call that waits for Redis when the layer is closed gets ClosedResourceError."""
    layer = make(kind, server.url, timeout=3.0)
    ended: list[str] = []

    async def call(what: str, *args: Any) -> None:
        try:
            await getattr(layer, what)(*args)
        except anyio.ClosedResourceError:
            ended.append(what)

    async with layer:
        server.pause()
        calls: list[tuple[Any, ...]] = [("send", "a", {}), ("group_send", "room", {}), ("flush",)]
        if kind is PUBSUB:
            calls.append(("new_channel",))
        async with create_task_group() as tg:
            for one in calls:
                tg.start_soon(call, *one)
            await anyio.wait_all_tasks_blocked()
            await layer.close()
        assert len(ended) == len(calls)
        server.resume()


@both
async def test_a_reader_during_an_outage_hears_of_closing_at_once(kind: Kind, server: RedisServer) -> None:
    """A reader that began while Redis was away waits for nothing when the layer is closed."""
    with fail_after(PATIENCE):
        async with make(kind, server.url, timeout=86400) as layer, create_task_group() as tg:
            await to_thread.run_sync(server.kill)
            await until(lambda: not layer.statistics().connections)
            ended: list[str] = []

            async def read() -> None:
                with pytest.raises(anyio.ClosedResourceError):
                    await layer.receive("a")
                ended.append("a")

            tg.start_soon(read)
            await anyio.wait_all_tasks_blocked()
            await layer.close()
    assert ended == ["a"]


async def test_waiting_for_room_through_a_reconnect(server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sender that waits for room goes on waiting through a reconnect that is quick enough.

    It has no command on its way when the connection ends: of one that may have run it is told.
    """
    monkeypatch.setattr(room, "_RECHECK", 60.0)
    layer = make(QUEUE, server.url, capacity=1)
    async with layer, create_task_group() as tg:
        await layer.send("a", {"n": 0})
        tg.start_soon(lambda: layer.send("a", {"n": 1}, wait=True))
        with server.client() as client:
            await until(lambda: client.pubsub_channels("*:waiting:*"))
            await until_answered(layer)
            client.client_kill_filter(_type="pubsub")
            await until(lambda: layer.statistics().reconnects and client.pubsub_channels("*:waiting:*"))
        assert [await layer.receive("a"), await layer.receive("a")] == [{"n": 0}, {"n": 1}]


async def test_subscriptions_at_odd_moments(server: RedisServer) -> None:
    """A subscription cut off is made again; one given up while all are restored is ended; a channel dropped is listed again."""
    async with Proxy(server.host, server.port) as proxy, make(PUBSUB, proxy.url) as layer, create_task_group() as tg:
        got: list[Any] = []

        async def read(channel: str) -> None:
            got.append(await layer.receive(channel))

        async with layer.subscribe("room"):
            proxy.swallow()
            tg.start_soon(read, "cut")
            await until(lambda: "cut" in subscriptions(layer).wanted)
            await anyio.wait_all_tasks_blocked()
            proxy.stop_swallowing()
            proxy.cut_all()
            await until(lambda: subscriptions(layer).wanted["cut"].confirmed)
            server.pause()
            tg.start_soon(
                subscriptions(layer).restore, layer.options.router.links[0], layer.options.router.links[0].connection
            )
            tg.start_soon(read, "dropped")
            await until(lambda: "dropped" in here(layer).channels)
            here(layer).forget(here(layer).channels["dropped"])
        server.resume()
        with server.client() as client:
            await until(lambda: set(client.pubsub_channels("*")) == {b"cut", b"dropped"})
        for channel in ("cut", "dropped"):
            await layer.send(channel, {"to": channel})
        await until(lambda: len(got) == 2)


@both
async def test_other_pushes_mean_nothing(kind: Kind, server: RedisServer) -> None:
    """Pushes of a kind that the layers did not ask for are passed over."""
    async with make(kind, server.url) as layer, layer.subscribe("room") as inbox:
        for push in ([], [b"invalidate", [b"key"]], [b"message", b"nobody", b"text"]):
            events(layer).on_push(layer.options.router.links[0], push)
        await layer.group_send("room", {"n": 1})
        assert await inbox.receive() == {"n": 1}


@both
async def test_a_bug_of_ours_is_told(kind: Kind, server: RedisServer) -> None:
    """An error in a task of the layer ends its block as an exception group; nothing goes on half dead."""
    layer = make(kind, server.url)

    def broken(*_: Any) -> None:
        raise ZeroDivisionError

    with pytest.raises(ExceptionGroup) as caught, fail_after(PATIENCE):
        async with layer, layer.subscribe("room"):
            if kind is PUBSUB:
                transport(layer).on_push = broken  # type: ignore[assignment, method-assign]
                layer.options.router.links[0].reconnect("the test said so")  # the new connection hands pushes to that
                await until(lambda: layer.statistics().reconnects == 1)
            with server.client() as client:
                for name in subscriptions(layer).wanted:
                    client.publish(name, "")
                if kind is QUEUE:
                    session(layer).later.soon(broken)
            await anyio.sleep_forever()
    assert caught.value.split(ZeroDivisionError)[1] is None


@both
async def test_a_credential_provider(kind: Kind, server: RedisServer) -> None:
    """Credentials come from the provider, also after a failure of it; what it said when it failed is not repeated."""

    class Provider(redis.CredentialProvider):
        failures = 1

        def get_credentials(self) -> tuple[str, str]:
            if self.failures:
                self.failures -= 1
                raise OSError("s3cret")
            return "app", "right"

    with server.client() as client:
        client.acl_setuser("app", enabled=True, passwords=["+right"], keys=["*"], channels=["*"], categories=["+@all"])
    host = {"host": server.host, "port": server.port, "credential_provider": Provider()}
    async with kind.layer_class([host]) as layer:
        await layer.send("a", {})
    host["credential_provider"].failures = 10**9  # type: ignore[attr-defined]
    with pytest.raises(redis.exceptions.ConnectionError, match="credential provider failed with OSError") as caught:
        await kind.layer_class([host], connect_timeout=0.3).__aenter__()
    assert "s3cret" not in str(caught.value)


async def test_a_forbidden_subscription_does_not_keep_the_others_away(
    server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    """After an outage all that Redis permits is subscribed to again; what it does not is logged, and its new readers told."""
    with server.client() as client:
        client.acl_setuser("app", enabled=True, passwords=["+pw"], keys=["*"], channels=["good*"], categories=["+@all"])
    async with (
        Proxy(server.host, server.port) as proxy,
        make(PUBSUB, f"redis://app:pw@{proxy.host}:{proxy.port}") as layer,
        create_task_group() as tg,
    ):
        channel = await layer.new_channel("good")
        refused: list[Exception] = []

        async with away(proxy, layer):
            tg.start_soon(read_in_vain, layer, refused)
            await until(lambda: "bad" in subscriptions(layer).wanted)
        await layer.send(channel, {"n": 1})
        with fail_after(PATIENCE):
            assert await layer.receive(channel) == {"n": 1}
        assert "wait in vain for 'bad'" in caplog.text
        await until(lambda: refused)
        tg.cancel_scope.cancel()
