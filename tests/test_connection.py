"""One connection to a Redis server, played by a script: replies, pushes, cancellation, time-outs and every way to end."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import hiredis
import pytest
import redis.exceptions
from anyio import (
    BrokenResourceError,
    CancelScope,
    ClosedResourceError,
    EndOfStream,
    Event,
    connect_tcp,
    create_task_group,
    sleep,
)
from anyio.abc import ByteStream, TaskStatus
from anyio.lowlevel import checkpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis_server import Listener
from scripted_stream import NAME, PATIENCE, ScriptedStream, in_time, serving, settle

from anyio_channels.redis.client.connection import Connection, reply_to
from anyio_channels.redis.client.errors import ConnectionLost, ConnectionTimeout
from anyio_channels.redis.client.protocol import Request

pytestmark = pytest.mark.anyio

# What anyio gives each test is a backend, which is the same for all examples of one test.
each_example_has_a_loop = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
on_asyncio = pytest.mark.parametrize(
    "anyio_backend",
    [("asyncio", {"use_uvloop": False}), ("asyncio", {"use_uvloop": True})],
    ids=["asyncio", "uvloop"],
)

ENDS: list[tuple[bytes | Exception, str]] = [
    (b"HTTP/1.1 400 Bad Request\r\n", "what the server sent is no RESP3: .*'H'|\"H\""),
    (EndOfStream(), "the server closed it"),
    (ClosedResourceError(), "it broke: ClosedResourceError"),
    (ConnectionResetError("reset"), "it broke: ConnectionResetError.'reset'"),
    (ssl.SSLError(1, "bad record mac"), "it broke: SSLError.1, 'bad record mac'"),
]


def broken(cause: BaseException) -> BrokenResourceError:
    """As anyio raises it."""
    error = BrokenResourceError()
    error.__cause__ = cause
    return error


def submit(connection: Connection, count: int = 1) -> tuple[list[Request], list[Request]]:
    """That many requests, and those of them that are done, in the order in which they were."""
    done: list[Request] = []
    return [connection.submit("ECHO", number, done=done.append) for number in range(count)], done


# Writing


async def test_what_is_queued_goes_out_in_one_write() -> None:
    """All requests of a moment are one write, and so are all that come while a write hangs; their order is kept."""
    stream = ScriptedStream()
    stream.stall()
    async with serving(stream) as connection:
        first = [connection.submit("ECHO", number) for number in range(3)]
        await stream.wrote()
        then = [connection.submit("ECHO", number) for number in range(3, 6)]
        await settle()
        assert stream.written == [b"".join(request.data for request in first)]
        assert [request.written for request in first + then] == [True] * 3 + [False] * 3
        stream.go_on()
        await stream.wrote(2)
        assert stream.written[1:] == [b"".join(request.data for request in then)]
        stream.answer(b"".join(b":%d\r\n" % number for number in range(6)) + b"+last\r\n")
        assert await connection.execute("PING") == b"last"
        assert [request.result() for request in first + then] == list(range(6))
        assert connection.commands == 7


async def test_replies_come_while_a_write_hangs() -> None:
    """Reading does not wait for writing: else two sides that both wait to be read would wait for ever."""
    stream = ScriptedStream()
    stream.stall()
    async with serving(stream) as connection:
        stream.answer(b"+OK\r\n")
        assert await connection.execute("PING") == b"OK"


# Callers who go


class Caller:
    """A task that executes one command, and two ways to cancel it."""

    def __init__(self, connection: Connection, number: int) -> None:
        self.connection = connection
        self.number = number
        self.scope = CancelScope()
        self.task: asyncio.Task[Any] | None = None
        self.reply: Any = None
        self.cancelled = False
        self.error: Exception | None = None

    async def run(self, *, task_status: TaskStatus[None]) -> None:
        task_status.started()
        with self.scope:
            try:
                self.reply = await self.connection.execute("ECHO", self.number)
            except Exception as error:  # noqa: BLE001 - whatever it is, the test says what it should be
                self.error = error
        self.cancelled = self.scope.cancelled_caught

    async def run_in_task(self, *, task_status: TaskStatus[None]) -> None:
        """In a task of asyncio's own, to be cancelled in asyncio's own way."""
        self.task = asyncio.ensure_future(self.connection.execute("ECHO", self.number))
        task_status.started()
        try:
            self.reply = await self.task
        except asyncio.CancelledError:
            self.cancelled = True

    def cancel(self) -> None:
        if self.task is None:
            self.scope.cancel()
        else:
            self.task.cancel()


POINTS = ["at once", "in the queue", "while it is written", "in flight", "half of the reply is there"]


async def check_cancelled_caller(point: str, run: Callable[[Caller], Any]) -> None:
    stream = ScriptedStream()
    async with serving(stream) as connection, create_task_group() as tasks:
        callers = [Caller(connection, number) for number in range(3)]
        if point == "in the queue":
            stream.stall()
        await tasks.start(run(callers[0]))
        await stream.wrote()
        if point == "while it is written":
            await settle()
            stream.stall()
        await tasks.start(run(callers[1]))
        if point != "at once":
            await settle()
        await tasks.start(run(callers[2]))
        if point == "half of the reply is there":
            stream.feed(b":0\r\n$1")
            await settle()
        callers[1].cancel()
        await settle()
        assert callers[1].cancelled
        stream.go_on()
        await settle()
        sent = list(replies_to(stream.written))
        assert sent[0] == b":0\r\n"
        assert sent[-1] == b":2\r\n"
        if point == "in the queue":
            assert len(sent) == 2
        elif point != "at once":
            assert len(sent) == 3
        if point == "half of the reply is there":
            stream.feed(b"\r\n1\r\n" + sent[2])
        else:
            stream.feed(*sent)
        await settle()
        assert [callers[0].reply, callers[1].reply, callers[2].reply] == [0, None, 2]
        stream.answer(b"+OK\r\n")
        assert await connection.execute("PING") == b"OK"


@pytest.mark.parametrize("point", POINTS)
async def test_a_cancelled_caller_is_in_nobodys_way(point: str) -> None:
    """Cancelled before its command is written, it never is; after that, its reply is swallowed: all others get their own."""
    await check_cancelled_caller(point, lambda caller: caller.run)


@pytest.mark.parametrize("point", POINTS)
@on_asyncio
async def test_a_cancelled_task_is_in_nobodys_way(point: str) -> None:
    """What asyncio's Task.cancel() cancels is as what a cancel scope cancels."""
    await check_cancelled_caller(point, lambda caller: caller.run_in_task)


@on_asyncio
async def test_a_task_cancelled_after_its_reply_came() -> None:
    """A reply that came for a task which is cancelled before it runs again is gone with it, and not the next one's."""
    stream = ScriptedStream()
    async with serving(stream) as connection, create_task_group() as tasks:
        caller = Caller(connection, 0)
        await tasks.start(caller.run_in_task)
        await settle()
        connection.submit("ECHO", 1, done=lambda _: caller.cancel())
        next_one = connection.submit("ECHO", 2)
        await stream.wrote(2)
        stream.feed(b":0\r\n:1\r\n:2\r\n")
        stream.answer(b"+OK\r\n")
        assert await connection.execute("PING") == b"OK"
        assert (caller.cancelled, caller.reply) == (True, None)
        assert next_one.result() == 2


async def test_a_queue_of_cancelled_callers() -> None:
    """Where everyone went before the write, there is none."""
    stream = ScriptedStream()
    stream.stall()
    async with serving(stream) as connection, create_task_group() as tasks:
        submit(connection)
        await stream.wrote()
        callers = [Caller(connection, number) for number in range(2)]
        for caller in callers:
            await tasks.start(caller.run)
        await settle()
        assert connection.pending == 3
        for caller in callers:
            caller.cancel()
        await settle()
        assert connection.pending == 1
        stream.go_on()
        await settle()
        assert len(stream.written) == 1
        stream.feed(b":0\r\n")
        stream.answer(b"+OK\r\n")
        assert await connection.execute("PING") == b"OK"


async def test_a_cancelled_subscriber_is_in_nobodys_way() -> None:
    """The confirmations of a cancelled SUBSCRIBE are swallowed as a reply is."""
    stream = ScriptedStream()
    pushes: list[list[Any]] = []
    async with serving(stream, on_push=pushes.append) as connection, create_task_group() as tasks:
        with CancelScope() as scope:
            tasks.start_soon(cancel_when_written, stream, scope)
            await connection.execute("SUBSCRIBE", "a", "b")
        assert scope.cancelled_caught
        stream.feed(b">3\r\n+subscribe\r\n+a\r\n:1\r\n>3\r\n+subscribe\r\n+b\r\n:2\r\n")
        stream.answer(b"+OK\r\n")
        assert await connection.execute("PING") == b"OK"
        assert pushes == []


async def cancel_when_written(stream: ScriptedStream, scope: CancelScope) -> None:
    await stream.wrote()
    await settle()
    scope.cancel()


def replies_to(written: list[bytes]) -> Iterator[bytes]:
    """What a server says to ECHO."""
    reader = hiredis.Reader()
    for data in written:
        reader.feed(data)
    while command := reader.gets():
        yield b":%s\r\n" % command[1]


# Ends


@pytest.mark.parametrize(("end", "words"), [*ENDS, (broken(OSError(5, "no route")), "it broke: OSError.5, 'no route'")])
async def test_everyone_is_told_of_the_end(end: bytes | Exception, words: str) -> None:
    """At the first thing that is wrong everyone gets a ConnectionLost: which server, why, whether the command may have run."""
    stream = ScriptedStream()
    async with serving(stream) as connection:
        answered = connection.submit("ECHO", "answered")
        (in_flight,), done = submit(connection)
        await stream.wrote()
        await settle()
        stream.stall()
        being_written = connection.submit("ECHO", "being written", done=done.append)
        await stream.wrote(2)
        queued = connection.submit("ECHO", "queued", done=done.append)
        if isinstance(end, bytes):
            stream.feed(b"+good\r\n" + end + b"+good\r\n", b"+good\r\n")
        else:
            stream.feed(b"+good\r\n", end, b"+good\r\n")
        await connection.wait_ended()
        await settle()
        assert answered.result() == b"good"
        assert stream.closed
        assert done == [in_flight, being_written, queued]
        for request in done:
            with pytest.raises(ConnectionLost, match=words) as info:
                request.result()
            assert not isinstance(info.value, ConnectionTimeout)
            check_lost(info.value, may_have_run=request is not queued)
        later = connection.submit("ECHO", "later", done=done.append)
        assert done[3:] == [later]
        with pytest.raises(ConnectionLost, match=words) as info:
            await connection.execute("ECHO", "later still")
        check_lost(info.value, may_have_run=False)
        assert len(stream.written) == 2
        assert isinstance(later.error, ConnectionLost)
        check_lost(later.error, may_have_run=False)


def check_lost(error: ConnectionLost, *, may_have_run: bool) -> None:
    assert isinstance(error, redis.exceptions.ConnectionError)
    assert error.may_have_run == may_have_run
    assert str(error).startswith(f"{NAME}: the connection ended: ")
    assert str(error).endswith("; the command may have run" if may_have_run else "; the command was not sent")


async def test_a_write_that_fails() -> None:
    """A write that failed may have arrived; what is behind it has not."""
    stream = ScriptedStream()
    stream.stall()
    async with serving(stream) as connection:
        (first,), _ = submit(connection)
        await stream.wrote()
        (second,), _ = submit(connection)
        cause = OSError(32, "broken pipe")
        stream.go_on(broken(cause))
        await connection.wait_ended()
        for request in (first, second):
            with pytest.raises(ConnectionLost, match="it broke: BrokenPipeError.32, 'broken pipe'") as info:
                request.result()
            assert isinstance(info.value.__cause__, BrokenResourceError)
            assert info.value.may_have_run == (request is first)


async def test_the_owner_ends_it() -> None:
    """end() says why, the first of several counts, and run() returns."""
    stream = ScriptedStream()
    connection = Connection(stream, NAME, timeout=PATIENCE)
    async with in_time(), create_task_group() as tasks:
        tasks.start_soon(connection.run)
        (request,), done = submit(connection)
        await stream.wrote()
        cause = ValueError("cause")
        connection.end("enough", cause=cause)
        connection.end("more than enough")
        assert done == [request]
        with pytest.raises(ConnectionLost, match="ended: enough; the command may have run") as info:
            request.result()
        assert info.value.__cause__ is cause
    assert stream.closed


async def test_a_mistake_is_not_lost() -> None:
    """What on_push raises comes out of run(), even if its owner cancels it as soon as he hears of the end."""
    stream = ScriptedStream()

    def fail(push: list[Any]) -> None:
        raise ZeroDivisionError

    connection = Connection(stream, NAME, timeout=PATIENCE, on_push=fail)
    with pytest.raises(ExceptionGroup) as info:
        async with in_time(), create_task_group() as tasks:
            tasks.start_soon(connection.run)
            (request,), _ = submit(connection)
            await stream.wrote()
            stream.feed(b">0\r\n")
            await connection.wait_ended()
            tasks.cancel_scope.cancel()
    assert info.group_contains(ZeroDivisionError)
    assert stream.closed
    with pytest.raises(ConnectionLost, match="ended: it was closed; the command may have run"):
        request.result()


async def test_ended_before_it_ran() -> None:
    """A connection that ended before run() closes its stream and serves nobody."""
    stream = ScriptedStream()
    connection = Connection(stream, NAME, timeout=PATIENCE)
    (request,), done = submit(connection)
    connection.submit("SET", "k", "nobody cares")
    connection.end("too early")
    async with in_time():
        await connection.run()
    assert stream.closed
    assert stream.written == []
    assert done == [request]
    with pytest.raises(ConnectionLost, match="ended: too early; the command was not sent"):
        request.result()


async def test_run_is_cancelled() -> None:
    """Who cancels run() closes the connection: everyone else is told."""
    stream = ScriptedStream()
    connection = Connection(stream, NAME, timeout=PATIENCE)
    async with in_time(), create_task_group() as tasks:
        tasks.start_soon(connection.run)
        (request,), _ = submit(connection)
        await stream.wrote()
        tasks.cancel_scope.cancel()
    assert stream.closed
    with pytest.raises(ConnectionLost, match="ended: it was closed; the command may have run"):
        request.result()


async def test_nothing_is_delivered_after_the_end() -> None:
    """Pushes and replies behind the one at which the owner ended the connection reach nobody."""
    stream = ScriptedStream()
    pushes: list[list[Any]] = []

    def end(push: list[Any]) -> None:
        pushes.append(push)
        connection.end("enough")

    async with serving(stream, on_push=end) as connection:
        (request,), done = submit(connection)
        await stream.wrote()
        stream.feed(b">1\r\n:1\r\n>1\r\n:2\r\n+late\r\n>1\r\n:3\r\n")
        await settle()
        assert pushes == [[1]]
        assert done == [request]
        assert isinstance(request.error, ConnectionLost)


async def test_done_may_ask_again() -> None:
    """done may submit another command, also when it is told that the connection ended; it is called once for each."""
    stream = ScriptedStream()
    asked: list[Request] = []

    def again(request: Request) -> None:
        asked.append(request)
        if len(asked) < 5:
            connection.submit("ECHO", len(asked), done=again)

    async with serving(stream) as connection:
        connection.submit("PING", done=again)
        stream.answer(b"+OK\r\n")
        stream.answer(b":1\r\n")
        await stream.wrote(3)
        connection.end("enough")
        assert [request.reply for request in asked] == [b"OK", 1, None, None, None]
        errors = [request.error for request in asked[2:]]
        assert [error.may_have_run for error in errors if isinstance(error, ConnectionLost)] == [True, False, False]


async def test_a_caller_who_left_is_not_told() -> None:
    """The end of the connection wakes those who wait, and passes over those who went."""
    stream = ScriptedStream()
    async with serving(stream) as connection, create_task_group() as tasks:
        with CancelScope() as scope:
            tasks.start_soon(cancel_when_written, stream, scope)
            await connection.execute("ECHO", 1)
        (request,), done = submit(connection)
        stream.feed(EndOfStream())
        await connection.wait_ended()
        assert done == [request]


# Time-outs. These are real timers: nothing but time ends such a connection.


async def test_a_silent_server() -> None:
    """A request unanswered for ``timeout`` seconds ends the connection: a ConnectionTimeout that is redis' TimeoutError too."""
    stream = ScriptedStream()
    async with serving(stream, timeout=0.05) as connection:
        stream.feed(b">0\r\n")  # a push is no answer
        with pytest.raises(ConnectionTimeout, match="did not answer in time; the command may have run") as info:
            await connection.execute("GET", "k")
        assert isinstance(info.value, redis.exceptions.TimeoutError)
        assert info.value.may_have_run
        await connection.wait_ended()  # at the same time, or as much later as it was written after it was asked for
        with pytest.raises(ConnectionTimeout, match="the server did not answer in time") as info:
            await connection.execute("GET", "k")
        check_lost(info.value, may_have_run=False)
        await settle()
        assert stream.closed


async def test_a_server_that_does_not_read() -> None:
    """A write that hangs is a request unanswered; what is queued behind it was not sent."""
    stream = ScriptedStream()
    stream.stall()
    async with serving(stream, timeout=0.05) as connection:
        (first,), _ = submit(connection)
        await stream.wrote()
        with pytest.raises(ConnectionTimeout, match="the command was not sent") as info:
            await connection.execute("GET", "k")
        check_lost(info.value, may_have_run=False)
        assert isinstance(first.error, ConnectionTimeout)
        check_lost(first.error, may_have_run=True)


@pytest.mark.parametrize("first", ["is written", "hangs"])
async def test_a_request_may_have_its_own_timeout(first: str) -> None:
    """It ends the wait of that caller, and costs the others nothing; a late reply is swallowed, or it is never written."""
    stream = ScriptedStream()
    if first == "hangs":
        stream.stall()
    async with serving(stream) as connection:
        (patient,), done = submit(connection)
        await stream.wrote()
        await settle()
        request = Request(("GET", "k"), waits=True)
        connection.send(request, 0.05)
        with pytest.raises(ConnectionTimeout, match="did not answer in time") as info:
            await reply_to(request)
        assert info.value.may_have_run is (first == "is written")
        assert not done
        assert connection.pending == (2 if first == "is written" else 1)
        stream.go_on()
        stream.feed(b"+OK\r\n", b"+LATE\r\n" if first == "is written" else b"+OK\r\n")
        if first == "hangs":
            assert await connection.execute("PING") == b"OK"
        await settle()
        assert patient.result() == b"OK"
        assert not connection.ended
        assert not connection.pending


async def test_a_timeout_begins_when_a_request_is_written() -> None:
    """A caller with no time left ends nothing, though what it asked for was written and is not answered yet."""
    stream = ScriptedStream()
    async with serving(stream) as connection:
        old = Request(("GET", "old"), waits=True)
        connection.send(old, 0.0)
        young = connection.submit("GET", "young")
        with pytest.raises(ConnectionTimeout):
            await reply_to(old)
        stream.feed(b"+OK\r\n+OK\r\n")
        await settle()
        assert young.result() == b"OK"


async def test_a_patient_request_is_no_end_to_those_behind_it() -> None:
    """What is late behind a request that may take longer is late only when that was answered."""
    stream = ScriptedStream()
    async with serving(stream, timeout=0.02) as connection:
        pop = Request(("BZPOPMIN", "k", 1))
        connection.send(pop, PATIENCE)
        behind = connection.submit("PING")
        await sleep(0.1)  # that a timer ends nothing shows only when it had the time to
        assert not connection.ended
        stream.feed(b"+OK\r\n+PONG\r\n")
        await settle()
        assert behind.result() == b"PONG"
        assert not connection.ended


async def test_a_loop_that_stood_still() -> None:
    """A reply that came while the event loop stood still for longer than ``timeout`` is read, and the connection lives."""
    stream = ScriptedStream()
    async with serving(stream, timeout=0.05) as connection:
        for _ in range(10):  # on trio, which of two tasks runs first is random
            request = Request(("GET", "k"), waits=True)
            connection.send(request)
            await stream.wrote(connection.commands)
            stream.feed(b"+OK\r\n")
            time.sleep(0.08)  # noqa: ASYNC251 - the loop is to stand still
            assert await reply_to(request) == b"OK"


async def test_nobody_needs_to_wait_for_the_reply() -> None:
    """A request whose caller was cancelled is watched as any other: its reply blocks all behind it."""
    stream = ScriptedStream()
    async with serving(stream, timeout=0.05) as connection, create_task_group() as tasks:
        with CancelScope() as scope:
            tasks.start_soon(cancel_when_written, stream, scope)
            await connection.execute("ECHO", 1)
        await connection.wait_ended()
        with pytest.raises(ConnectionTimeout, match="the command was not sent"):
            await connection.execute("PING")


async def test_an_idle_connection_lives() -> None:
    """No request, no time-out, however long; and a request answered in time does not end the one after it."""
    stream = ScriptedStream()
    async with serving(stream, timeout=0.02) as connection:
        await sleep(0.05)  # that a timer does not go off shows only when it had the time to
        stream.answer(b"+OK\r\n")
        assert await connection.execute("PING") == b"OK"
        stream.answer(b"+OK\r\n")
        answered = connection.submit("PING")
        request = Request(("PING",))
        connection.send(request, 20)
        await sleep(0.05)
        assert not connection.ended
        stream.feed(b"+late\r\n")
        await settle()
        assert (answered.result(), request.result()) == (b"OK", b"late")


# Real streams


class Peer(Listener):
    """Plays a server on a real socket: answers each ECHO with its number, in pieces, or does what the test says."""

    def __init__(self, behave: Callable[[ByteStream], Awaitable[None]] | None = None, pieces: int = 3) -> None:
        super().__init__()
        self.behave = behave
        self.pieces = pieces
        self.gone = Event()

    async def serve(self, client: ByteStream, scope: CancelScope) -> None:
        try:
            if self.behave is not None:
                await self.behave(client)
            reader = hiredis.Reader()
            async for chunk in client:
                reader.feed(chunk)
                replies = b"".join(b"$%d\r\n%s\r\n" % (len(one[1]), one[1]) for one in iter(reader.gets, False))
                size = len(replies) // self.pieces + 1
                for start in range(0, len(replies), size):
                    await client.send(replies[start : start + size])
        finally:
            self.gone.set()


@asynccontextmanager
async def talking(peer: Peer, **options: Any) -> AsyncIterator[Connection]:
    """A connection to ``peer``; when the block is left, both sides have ended."""
    async with in_time(), peer:
        async with serving(await connect_tcp(peer.host, peer.port), **options) as connection:
            yield connection
        await peer.gone.wait()


async def test_each_its_own_reply_on_a_real_stream() -> None:
    """Hundreds of callers at once, of whom many are cancelled: each of the others gets its own reply."""
    async with talking(Peer()) as connection, create_task_group() as tasks:
        callers = [Caller(connection, number) for number in range(300)]
        for caller in callers:
            await tasks.start(caller.run)
            if caller.number % 7 == 0:
                callers[caller.number // 2].cancel()
            if caller.number % 50 == 0:
                await settle()
    assert [caller.reply for caller in callers if not caller.cancelled] == [
        b"%d" % caller.number for caller in callers if not caller.cancelled
    ]
    assert not any(caller.error for caller in callers)
    assert sum(not caller.cancelled for caller in callers) > 200


async def test_a_peer_that_does_not_read() -> None:
    """A write that hangs keeps nobody from hearing what the peer says, and a large reply comes whole."""
    pushes: list[Any] = []
    go_on = Event()

    async def behave(client: ByteStream) -> None:
        await client.send(b">3\r\n+message\r\n+a\r\n$1000000\r\n%s\r\n" % (b"\n" * 1_000_000))
        await go_on.wait()

    def hear(push: list[Any]) -> None:
        pushes.append(push)
        go_on.set()

    large = b"x" * 8_000_000
    async with talking(Peer(behave, pieces=100), on_push=hear) as connection, create_task_group() as tasks:
        tasks.start_soon(connection.execute, "ECHO", large)
        assert await connection.execute("ECHO", large) == large
    assert pushes == [[b"message", b"a", b"\n" * 1_000_000]]


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (b"*2\r\n$5\r\nhel", "the server closed it"),
        (b"HTTP/1.1 400 Bad Request\r\n", "no RESP3"),
        (b"*1048577\r\n", "announces more than 1048576 elements"),
    ],
)
async def test_a_peer_that_goes_wrong(said: bytes, words: str) -> None:
    """Whoever waits is told why, and the socket is closed."""

    async def behave(client: ByteStream) -> None:
        await client.receive()
        await client.send(said)
        if "closed" in words:
            await client.aclose()

    async with talking(Peer(behave)) as connection:
        with pytest.raises(ConnectionLost, match=words):
            await connection.execute("ECHO", "x" * 10)
        await connection.wait_ended()


async def test_a_real_stream_is_closed() -> None:
    """Whoever cancels run() lets the peer go, also one that is just being written to and does not read."""

    async def behave(client: ByteStream) -> None:
        await stop.wait()

    stop = Event()
    peer = Peer(behave)
    async with in_time(), peer, create_task_group() as tasks:
        stream = await connect_tcp(peer.host, peer.port)
        connection = Connection(stream, NAME, timeout=PATIENCE)
        tasks.start_soon(connection.run)
        request = connection.submit("ECHO", b"x" * 8_000_000)
        await settle()
        tasks.cancel_scope.cancel()
    with pytest.raises(ConnectionLost, match="it was closed; the command may have run"):
        request.result()
    with pytest.raises(ClosedResourceError):
        await stream.receive()


# All at once

steps = st.one_of(
    st.just(("call", 0)),
    st.just(("answer", 0)),
    st.just(("push", 0)),
    st.just(("stall", 0)),
    st.just(("go on", 0)),
    st.tuples(st.just("cancel"), st.integers(0, 20)),
    st.tuples(st.just("let run"), st.integers(1, 5)),
)


@each_example_has_a_loop
@given(st.lists(steps, max_size=40))
async def test_who_gets_which_reply(script: list[tuple[str, int]]) -> None:  # noqa: C901 - a case for each step
    """Whoever calls, is cancelled, or is pushed to, in whatever order: everyone who stays gets the reply to his own command."""
    stream = ScriptedStream()
    pushes: list[list[Any]] = []
    async with serving(stream, patience=5, on_push=pushes.append) as connection, create_task_group() as tasks:
        callers: list[Caller] = []
        pushed = answered = 0

        def answer() -> bool:
            nonlocal answered
            waiting = [*replies_to(stream.written)][answered:]
            if waiting:
                stream.feed(waiting[0])
                answered += 1
            return bool(waiting)

        for step, number in script:
            match step:
                case "call":
                    callers.append(Caller(connection, len(callers)))
                    await tasks.start(callers[-1].run)
                case "cancel" if callers:
                    callers[number % len(callers)].cancel()
                case "answer":
                    answer()
                case "push":
                    stream.feed(b">1\r\n:%d\r\n" % pushed)
                    pushed += 1
                case "stall":
                    stream.stall()
                case "go on":
                    stream.go_on()
                case "let run":
                    for _ in range(number):
                        await checkpoint()
        stream.go_on()
        last = Caller(connection, len(callers))
        callers.append(last)
        await tasks.start(last.run)
        while last.reply is None:
            if not answer():
                await checkpoint()
    written = [int(reply[1:]) for reply in replies_to(stream.written)]
    assert written == sorted(set(written))
    assert pushes == [[number] for number in range(pushed)]
    for caller in callers:
        assert caller.error is None
        assert caller.reply == (None if caller.cancelled else caller.number)
        assert caller.cancelled or caller.number in written
