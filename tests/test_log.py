"""What is logged: every event of the documentation by the real trouble, its fields, and how few lines that makes."""

from __future__ import annotations

import ast
import logging
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest
from anyio import create_task_group, fail_after, to_thread
from conftest import Clock
from layers_on_redis import PATIENCE, PUBSUB, QUEUE, Kind, arrives, both, hold_inbox, new_prefix, session, until
from redis_server import Proxy, RedisServer, free_port

import anyio_channels
from anyio_channels import InMemoryChannelLayer, log
from anyio_channels.log import EVENTS, LogEvent, Troubles
from anyio_channels.redis.wire import Names
from anyio_channels.sync import SyncChannelLayer

pytestmark = pytest.mark.two_loops

DOCS = Path(__file__).parent.parent / "docs" / "observability.md"
PACKAGE = Path(anyio_channels.__file__).parent
SECRET = "s3cret-pass"


class Lines(logging.Handler):
    """All that was logged, at every level."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.records: list[logging.LogRecord] = []
        self.came = threading.Event()

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)
        self.came.set()

    def of(self, event: LogEvent) -> list[dict[str, Any]]:
        """The fields of each line of ``event``."""
        return [
            {name: record.__dict__[f"anyio_channels_{name}"] for name in event.fields}
            for record in self.records
            if record.__dict__["anyio_channels_event"] == event.name
        ]


@pytest.fixture
def lines() -> Iterator[Lines]:
    handler = Lines()
    logger = logging.getLogger("anyio_channels")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    yield handler
    logger.removeHandler(handler)
    logger.setLevel(level)
    for record in handler.records:
        assert SECRET not in record.getMessage() + repr(record.__dict__)


# The documentation


def test_the_table_is_the_code() -> None:
    """The page lists each event with its level and its fields, and no other."""
    rows = re.findall(r"^\| `([a-z_.]+)` \| ([A-Z]+) \| ([^|]+) \|", DOCS.read_text(), re.MULTILINE)
    documented = {name: (level, re.findall(r"`(\w+)`", fields)) for name, level, fields in rows}
    assert len(documented) == len(rows)
    assert documented == {event.name: (logging.getLevelName(event.level), list(event.fields)) for event in EVENTS}


def test_all_events_are_listed() -> None:
    """Each event of the module is in its list."""
    assert {event.name for event in EVENTS} == {
        value.name for value in vars(log).values() if isinstance(value, LogEvent)
    }


def test_nothing_else_logs() -> None:
    """No module but that of the events writes to a logger, so there is no line without an event."""
    found = [
        (path.relative_to(PACKAGE).as_posix(), node.lineno)
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Import) and any(alias.name == "logging" for alias in node.names)
    ]
    # The demo's server switches the logger off for a moment, and the command line shows what is logged.
    assert {name for name, _ in found} == {"log.py", "demo/server.py", "cli/running.py"}


def test_fields_clash_with_nothing() -> None:
    """No field is one that the standard library gives a record."""
    record = logging.LogRecord("", 0, "", 0, "", (), None)
    for event in EVENTS:
        assert not {f"anyio_channels_{name}" for name in ("event", *event.fields)} & vars(record).keys()


def test_a_line_that_nobody_wants(lines: Lines) -> None:
    """Below the logger's level nothing is made."""
    logging.getLogger("anyio_channels").setLevel(logging.ERROR)
    log.CONNECTION_RESTORED.write()
    assert lines.records == []


# Troubles


def counts(lines: Lines) -> list[int]:
    return [record.__dict__["anyio_channels_count"] for record in lines.records]


def test_one_line_when_it_begins_and_one_when_it_is_over(lines: Lines, clock: Clock) -> None:
    """What comes in the quiet time is told with the next trouble after it, with a look, or at closing; counts add up."""
    troubles = Troubles(clock, 10, "the layer")
    assert troubles.note(log.GROUP_SEND_DROPPED, "a", 3)
    for _ in range(9999):
        assert not troubles.note(log.GROUP_SEND_DROPPED, "a", 3)
    assert counts(lines) == [3]
    assert not troubles.look()
    clock.advance(10)
    assert troubles.note(log.GROUP_SEND_DROPPED, "a", 3)
    assert counts(lines) == [3, 30000]
    assert lines.of(log.GROUP_SEND_DROPPED)[1] == {
        "layer": "'the layer'", "group": "a", "count": 30000, "seconds": 10
    }  # fmt: skip
    troubles.note(log.GROUP_SEND_DROPPED, "a", 1)
    clock.advance(25)
    assert troubles.look()
    assert lines.records[-1].getMessage() == (
        "group 'a': in the last 25 s, members that were full missed 1 more messages"
    )
    clock.advance(10)
    assert not troubles.look()
    assert len(troubles) == 0
    assert troubles.due == float("inf")
    troubles.note(log.GROUP_SEND_DROPPED, "a", 1)
    troubles.note(log.GROUP_SEND_DROPPED, "a", 5)
    assert "more such are counted" in lines.records[-1].getMessage()
    troubles.close()
    troubles.close()
    assert counts(lines) == [3, 30000, 1, 1, 5]


def test_trouble_that_comes_back_begins_anew(lines: Lines, clock: Clock) -> None:
    """After a quiet time without any, the next is a first line again."""
    troubles = Troubles(clock, 10)
    troubles.note(log.CHANNEL_DROPPED, "a")
    troubles.note(log.CHANNEL_DROPPED, "b")
    clock.advance(11)
    assert troubles.note(log.CHANNEL_DROPPED, "a")
    assert counts(lines) == [1, 1, 1]
    assert len(troubles) == 1


def test_memory_is_bounded(lines: Lines, clock: Clock) -> None:
    """Beyond a hundred subjects in trouble they share one, which no name can be; nothing is uncounted."""
    troubles = Troubles(clock, 10)
    for number in range(1000):
        troubles.note(log.CHANNEL_DROPPED, f"a.{number}")
        troubles.note(log.POP_REFUSED, error="no")
    assert len(troubles) == 101
    assert len(lines.records) == 101
    assert lines.of(log.CHANNEL_DROPPED)[-1]["channel"] == "*"
    troubles.close()
    assert sum(line["count"] for line in lines.of(log.CHANNEL_DROPPED)) == 1000
    assert sum(line["count"] for line in lines.of(log.POP_REFUSED)) == 1000
    for number in range(100):
        troubles.note(log.CHANNEL_DROPPED, f"a.{number}")
    clock.advance(10)
    troubles.note(log.CHANNEL_DROPPED, "b")  # there is room again
    assert lines.of(log.CHANNEL_DROPPED)[-1]["channel"] == "b"
    assert len(troubles) == 1
    for number in range(99):
        troubles.note(log.CHANNEL_DROPPED, f"a.{number}")
    clock.advance(10)
    for number in range(99):
        troubles.note(log.CHANNEL_DROPPED, f"c.{number}")
        troubles.note(log.CHANNEL_DROPPED, f"c.{number}")
    troubles.note(log.POP_REFUSED, error="no")
    troubles.note(log.POP_REFUSED, error="no")
    assert len(troubles) == 100


def test_from_many_threads(lines: Lines, clock: Clock) -> None:
    """No count is lost between threads."""
    troubles = Troubles(clock, 10)

    def note() -> None:
        for number in range(1000):
            troubles.note(log.CHANNEL_DROPPED, f"a.{number % 3}")

    threads = [threading.Thread(target=note) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    troubles.close()
    assert sum(counts(lines)) == 4000
    assert len(lines.records) == 6


# Each event by the real trouble


@pytest.mark.anyio
async def test_ten_thousand_broadcasts_to_a_full_member(lines: Lines, clock: Clock) -> None:
    """They are one line when it begins and one that says how many, and the counts are those of statistics()."""
    layer = InMemoryChannelLayer(clock=clock, capacity=5)
    async with layer, layer.subscribe("room"):
        for _ in range(10_000):
            layer.group_send_nowait("room", {})
        assert counts(lines) == [1]
        dropped = layer.statistics().dropped_full
    assert counts(lines) == [1, 9994]
    assert sum(counts(lines)) == dropped == 9995
    assert {line["layer"] for line in lines.of(log.GROUP_SEND_DROPPED)} == {repr(layer)}


@pytest.mark.anyio
async def test_told_by_a_broadcast_that_nobody_missed(lines: Lines, clock: Clock) -> None:
    """When the members read again, the next broadcast after the quiet time tells the rest; so do statistics()."""
    layer = InMemoryChannelLayer(clock=clock, capacity=1, expiry=60)
    async with layer.subscribe("room") as inbox:
        for _ in range(2):
            for _ in range(5):
                layer.group_send_nowait("room", {})
            await inbox.receive()
            clock.advance(60)
            layer.group_send_nowait("calm", {})
            clock.advance(60)
            layer.statistics()
        for _ in range(3):
            layer.group_send_nowait("room", {})
        clock.advance(59)
        layer.statistics()
        assert counts(lines) == [1, 3, 1, 3, 1]
        clock.advance(1)
        layer.statistics()
    assert counts(lines) == [1, 3, 1, 3, 1, 1]


async def dropped_are(layer: Any, count: int) -> None:
    await until(lambda: layer.statistics().dropped_full == count)


@both
@pytest.mark.anyio
async def test_full_members_on_redis(kind: Kind, redis_server: RedisServer, lines: Lines) -> None:
    """Groups and channels are told apart, and the counts of all lines are those of statistics()."""
    layer = kind.layer_class([redis_server.url], prefix=new_prefix(), capacity=2)
    async with layer, layer.subscribe("room", capacity=1) as inbox:
        for number in range(10):
            await layer.group_send("room", {"n": number})
            await layer.send(inbox.channel, {"n": number})
            await dropped_are(layer, 2 * number + 1)
        dropped = layer.statistics().dropped_full
    assert sum(counts(lines)) == dropped == 19
    channels = lines.of(log.CHANNEL_DROPPED)
    assert {line["channel"] for line in channels} == {inbox.channel}
    if kind is PUBSUB:
        assert lines.of(log.GROUP_SEND_DROPPED)[0]["group"] == "room"
        assert [line["count"] for line in channels] == [1, 9]


@pytest.mark.anyio
async def test_a_full_key_in_redis(redis_server: RedisServer, lines: Lines) -> None:
    """A member of a group whose messages nobody fetches is full in Redis: group_send.dropped."""
    layer = QUEUE.layer_class([redis_server.url], prefix=new_prefix(), capacity=1)
    async with layer:
        await layer.group_add("room", "normal")
        for _ in range(3):
            await layer.group_send("room", {})
    assert [(line["group"], line["count"]) for line in lines.of(log.GROUP_SEND_DROPPED)] == [("room", 1), ("room", 1)]


@pytest.mark.anyio
async def test_told_of_an_outage_in_a_full_channel(server: RedisServer, lines: Lines) -> None:
    """The message that says that the connection was lost finds a channel full: that is told and counted too."""
    layer = PUBSUB.layer_class([server.url], capacity=1, on_disconnect="down", on_reconnect="up", timeout=0.5)
    async with layer:
        channel = await layer.new_channel()
        await to_thread.run_sync(server.kill)
        await until(lambda: layer.statistics().buffered_messages == 1)
        await to_thread.run_sync(server.start)
        await until(lambda: layer.statistics().dropped_full == 1)
    assert [line["channel"] for line in lines.of(log.CHANNEL_DROPPED)] == [channel]


@both
@pytest.mark.parametrize("serializer_format", ["msgpack", "json"])
@pytest.mark.anyio
async def test_too_large_or_too_deep(
    kind: Kind, serializer_format: Any, redis_server: RedisServer, lines: Lines
) -> None:
    """What a peer sends beyond the bounds of this layer is counted and logged; what keeps them, after it, is received."""
    of_peer = {"prefix": new_prefix(), "serializer_format": serializer_format}
    layer = kind.layer_class([redis_server.url], max_message_size=1000, **of_peer)
    peer = kind.layer_class([redis_server.url], **of_peer)
    depths = b'{"__asgi_channel__":"%s","x":' + b"[" * 400 + b"]" * 400 + b"}"
    async with layer, peer, layer.subscribe("room") as inbox:
        await peer.group_send("room", {"x": "y" * 1001})
        await peer.send(inbox.channel, {"x": "y" * 16_000})
        if serializer_format == "json":
            with redis_server.client() as client:
                body = depths.replace(b"%s", inbox.channel.encode())
                if kind is PUBSUB:
                    client.publish(inbox.channel, body)
                else:
                    client.zadd(Names(layer.prefix).channel(inbox.channel), {b" " * 12 + body: 2**40})
        await until(lambda: layer.statistics().dropped_unreadable == (3 if serializer_format == "json" else 2))
        await peer.group_send("room", {"x": "y" * 900})
        with fail_after(PATIENCE):
            assert await inbox.receive() == {"x": "y" * 900}
    assert "max_message_size of this layer is 1000" in lines.of(log.MESSAGE_UNREADABLE)[0]["error"]


class Broken(logging.Handler):
    """A handler, or a filter, of an application, with a mistake in it."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.calls = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.calls += 1
        raise LookupError("the handler broke")

    def refuse(self, record: logging.LogRecord) -> bool:
        self.calls += 1
        raise LookupError("the filter broke")


@pytest.fixture(params=["handler", "filter"])
def broken(request: pytest.FixtureRequest) -> Iterator[Broken]:
    found = Broken()
    logger = logging.getLogger("anyio_channels")
    if request.param == "filter":
        logger.addFilter(found.refuse)
        yield found
        logger.removeFilter(found.refuse)
    else:
        logger.addHandler(found)
        yield found
        logger.removeHandler(found)


@pytest.mark.anyio
async def test_a_handler_that_raises_costs_its_line(broken: Broken, capsys: pytest.CaptureFixture[str]) -> None:
    """A broadcast that logs has happened, and raises nothing; what broke is on standard error, as of any handler."""
    layer = InMemoryChannelLayer(capacity=1)
    async with layer, layer.subscribe("room") as inbox:
        await layer.group_send("room", {"n": 1})
        await layer.group_send("room", {"n": 2})
        assert broken.calls == 1
        assert await inbox.receive() == {"n": 1}
        assert layer.statistics().dropped_full == 1
    assert "LookupError: the" in capsys.readouterr().err


class NobodyReads:
    """Standard error whose other end is closed."""

    def write(self, text: str) -> int:
        raise BrokenPipeError

    def flush(self) -> None: ...


@pytest.mark.parametrize("how", ["quiet", "none", "closed"])
def test_a_handler_that_raises_without_standard_error(
    how: str, broken: Broken, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where what broke cannot be shown, or should not be, it is not."""
    if how == "quiet":
        monkeypatch.setattr(logging, "raiseExceptions", False)
    else:
        monkeypatch.setattr("sys.stderr", None if how == "none" else NobodyReads())
    log.CONNECTION_FAILED.write(server="here", error="refused")
    assert broken.calls == 1
    monkeypatch.undo()
    assert capsys.readouterr() == ("", "")


@both
@pytest.mark.anyio
async def test_a_handler_that_raises_ends_no_layer(kind: Kind, redis_server: RedisServer, broken: Broken) -> None:
    """What is logged in the tasks of a layer does not end its block: it goes on as if the line were written."""
    layer = kind.layer_class([redis_server.url], prefix=new_prefix())
    async with layer, layer.subscribe("room") as inbox:
        with redis_server.client() as client:
            if kind is PUBSUB:
                client.publish(inbox.channel, "\xc1")
            else:
                client.zadd(Names(layer.prefix).channel(inbox.channel), {f"{0:12d}\xc1": 2**40})
        await until(lambda: layer.statistics().dropped_unreadable == 1)
        await layer.send(inbox.channel, {"n": 1})
        with fail_after(PATIENCE):
            assert await inbox.receive() == {"n": 1}
    assert broken.calls == 1


@both
@pytest.mark.anyio
async def test_unreadable(kind: Kind, redis_server: RedisServer, lines: Lines) -> None:
    """message.unreadable: with the key, not the bytes."""
    layer = kind.layer_class([redis_server.url], prefix=new_prefix())
    async with layer, layer.subscribe("room") as inbox, create_task_group() as tg:
        tg.start_soon(inbox.receive)
        with redis_server.client() as client:
            for number in range(5):
                if kind is PUBSUB:
                    client.publish(inbox.channel, f"\xc1 {SECRET}")
                else:
                    client.zadd(Names(layer.prefix).channel(inbox.channel), {f"{number:12d}\xc1 {SECRET}": 2**40})
        await until(lambda: layer.statistics().dropped_unreadable == 5)
        tg.cancel_scope.cancel()
    found = lines.of(log.MESSAGE_UNREADABLE)
    assert [line["count"] for line in found] == [1, 4]
    key = inbox.channel if kind is PUBSUB else Names(layer.prefix).channel(inbox.channel)
    assert {line["key"] for line in found} == {key}


@both
@pytest.mark.anyio
async def test_an_outage_is_two_lines(kind: Kind, server: RedisServer, lines: Lines) -> None:
    """connection.lost and connection.restored, once for each connection, however often it was tried; no password."""
    with server.client() as client:
        client.config_set("requirepass", SECRET)
        url = server.url.replace("redis://", f"redis://:{SECRET}@")
        async with Proxy(server.host, server.port) as proxy:
            where = url.replace(f":{server.port}", f":{proxy.port}").replace(server.host, proxy.host)
            async with kind.layer_class([where], prefix=new_prefix(), keep_alive=0.2) as layer:
                proxy.refuse()
                proxy.cut_all()
                await until(lambda: layer.statistics().connections == 0)
                proxy.refuse(False)
                await until(lambda: layer.statistics().connections == 1)
        client.config_set("requirepass", "")
    (lost,) = lines.of(log.CONNECTION_LOST)
    assert lost["server"] == f"Redis at {proxy.host}:{proxy.port}"
    assert lost["server"] in lost["error"]
    assert [line["server"] for line in lines.of(log.CONNECTION_RESTORED)] == [lost["server"]]


@pytest.mark.anyio
async def test_a_connection_that_comes_and_goes(server: RedisServer, lines: Lines, clock: Clock) -> None:
    """A server that ends each connection at once is one line in ten seconds, which says how often."""
    layer = PUBSUB.layer_class([server.url])
    async with layer:
        (link,) = layer.options.router.running
        link._troubles._clock = clock

        async def kill() -> None:
            before = link.connects
            with server.client() as client:
                client.client_kill_filter(_type="normal", skipme=True)
            await until(lambda: link.connects > before and link.connection is not None)

        for _ in range(4):
            await kill()
        assert len(lines.of(log.CONNECTION_LOST)) == len(lines.of(log.CONNECTION_RESTORED)) == 1
        clock.advance(10)
        await kill()
        assert [line["count"] for line in lines.of(log.CONNECTION_LOST)] == [1, 4]
        assert len(lines.of(log.CONNECTION_RESTORED)) == 2
        await kill()
        assert len(lines.of(log.CONNECTION_LOST)) == len(lines.of(log.CONNECTION_RESTORED)) == 2
        # An outage in the quiet time is told when that is over.
        await to_thread.run_sync(server.kill)
        await until(lambda: link.connection is None)
        clock.advance(10)
        await until(lambda: len(lines.of(log.CONNECTION_LOST)) == 3)
        await to_thread.run_sync(server.start)
        await until(lambda: link.connection is not None)
        assert len(lines.of(log.CONNECTION_RESTORED)) == 3
    assert [line["count"] for line in lines.of(log.CONNECTION_LOST)] == [1, 4, 2]


@both
@pytest.mark.anyio
async def test_never_reached(kind: Kind, redis_server: RedisServer, lines: Lines) -> None:
    """connection.failed: one of two servers is not there when the layer is opened; once, however often it is tried."""
    gone = free_port()
    hosts = [redis_server.url, f"redis://:{SECRET}@127.0.0.1:{gone}"]
    async with kind.layer_class(hosts, prefix=new_prefix(), connect_timeout=0.3):
        pass
    (failed,) = lines.of(log.CONNECTION_FAILED)
    assert failed["server"] == f"Redis at 127.0.0.1:{gone}"


@pytest.mark.anyio
async def test_keep_alive_and_closing_without_an_answer(server: RedisServer, lines: Lines) -> None:
    """keep_alive.failed and close.unfinished: Redis stands still, and then the layer is closed."""
    # The connection gives up long before closing does.
    hosts = [f"{server.url}?socket_timeout=0.2"]
    layer = QUEUE.layer_class(hosts, timeout=PATIENCE, keep_alive=0.1, prefix=new_prefix())
    async with layer:
        server.pause()
        await until(lambda: lines.of(log.KEEP_ALIVE_FAILED))
        server.resume()
        await until(lambda: layer.options.router.links[0].connection is not None)
        server.pause()
    server.resume()
    assert lines.of(log.KEEP_ALIVE_FAILED)[0]["server"] == f"Redis at {server.host}:{server.port}"
    assert lines.of(log.CLOSE_UNFINISHED)[0]["server"] == f"Redis at {server.host}:{server.port}"


@pytest.mark.anyio
async def test_what_redis_refuses(server: RedisServer, lines: Lines) -> None:
    """pop.failed, give_back.failed and membership.refused: keys of another type, and a user who may not write."""
    layer = QUEUE.layer_class([server.url], prefix=new_prefix())
    async with layer, create_task_group() as tg:
        inbox = await tg.start(hold_inbox, layer, "room")
        with server.client() as client:
            client.delete(Names(layer.prefix).channel(inbox.channel))
            client.set(Names(layer.prefix).channel(inbox.channel), "text")
            await until(lambda: lines.of(log.POP_FAILED))
            client.delete(Names(layer.prefix).channel(inbox.channel))
            client.set(Names(layer.prefix).channel("a"), "text")
            client.delete(Names(layer.prefix).group("room"))
            client.set(Names(layer.prefix).group("room"), "text")
            session(layer).memberships.renew(layer.options.router.links[0])
            await until(lambda: lines.of(log.MEMBERSHIP_REFUSED))
            client.delete(Names(layer.prefix).group("room"))
        source = session(layer).here.find("a")
        arrives(layer, source, b"%12d\x80" % 0, layer.options.router.links[0].server_time)
        await until(lambda: lines.of(log.GIVE_BACK_FAILED))
        with server.client() as client:
            client.delete(Names(layer.prefix).channel("a"))
        tg.cancel_scope.cancel()
    assert "WRONGTYPE" in lines.of(log.POP_FAILED)[0]["error"]
    assert "WRONGTYPE" in lines.of(log.MEMBERSHIP_REFUSED)[0]["error"]
    assert lines.of(log.GIVE_BACK_FAILED)[0]["key"] == Names(layer.prefix).channel("a")


@pytest.mark.anyio
async def test_a_subscription_that_is_refused(server: RedisServer, lines: Lines) -> None:
    """subscription.refused: a user who may not listen to a channel, found after an outage; without the password."""
    with server.client() as client:
        client.acl_setuser(
            "app", enabled=True, passwords=[f"+{SECRET}"], keys=["*"], channels=["*"], categories=["+@all"]
        )
        layer = PUBSUB.layer_class([f"redis://app:{SECRET}@{server.host}:{server.port}"], prefix=new_prefix())
        async with layer:
            channel = await layer.new_channel()
            client.acl_setuser("app", enabled=True, reset_channels=True, channels=["other"])
            client.client_kill_filter(_type="pubsub", skipme=True)
            client.client_kill_filter(_type="normal", skipme=True)
            with fail_after(PATIENCE):
                await until(lambda: lines.of(log.SUBSCRIPTION_REFUSED))
    assert lines.of(log.SUBSCRIPTION_REFUSED)[0]["key"] == channel


def test_an_event_loop_that_fails(lines: Lines) -> None:
    """event_loop.failed: a part of a layer raises in the thread behind a SyncChannelLayer; with a traceback."""

    class HasABug(InMemoryChannelLayer):
        async def __aenter__(self) -> Self:
            self.tasks = create_task_group()
            await self.tasks.__aenter__()
            return await super().__aenter__()

        async def __aexit__(
            self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
        ) -> None:
            await super().__aexit__(exc_type, exc, traceback)
            await self.tasks.__aexit__(exc_type, exc, traceback)

        async def new_channel(self, prefix: str = "specific.") -> str:
            self.tasks.start_soon(self.fail)
            return await super().new_channel(prefix)

        async def fail(self) -> None:
            raise LookupError("a bug")

    layer = SyncChannelLayer(HasABug())
    layer.open()
    layer.new_channel()
    assert lines.came.wait(PATIENCE)
    with pytest.raises(ExceptionGroup):
        layer.close()
    (failed,) = lines.of(log.EVENT_LOOP_FAILED)
    assert failed["name"] == repr(layer)
    assert lines.records[0].exc_info is not None


def test_every_event_is_produced_somewhere() -> None:
    """Each event is looked for by a test that makes its trouble, here or where its part of the package is tested."""
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    names = {id(value): name for name, value in vars(log).items() if isinstance(value, LogEvent)}
    assert [
        event.name
        for event in EVENTS
        if f"lines.of(log.{names[id(event)]})" not in tests and f'"{event.name}"' not in tests
    ] == []
