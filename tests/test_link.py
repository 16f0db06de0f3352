"""A link without a server: what it does when a connection cannot be had, ends, or forgets a script."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import redis.exceptions
from anyio import EndOfStream, Event, create_task_group, fail_after
from anyio.abc import ByteStream
from scripted_stream import PATIENCE, ScriptedStream

from anyio_channels.redis.client import Connection, Link, LinkEvents, Request, Script, Server, Timeouts
from anyio_channels.redis.client import link as module
from anyio_channels.redis.client.address import Address

pytestmark = [pytest.mark.anyio, pytest.mark.two_loops]

LONG = 1000.0
"""Seconds that no test waits for."""


class PlayedServer(Server):
    """Whatever it was told comes of each attempt to connect, one after the other; then a stream that says nothing."""

    def __init__(self, *outcomes: ScriptedStream | Exception) -> None:
        super().__init__(Address(host="there", port=1))
        self.outcomes = deque(outcomes)
        self.refusal: Exception | None = None

    async def connect(self) -> ByteStream:
        outcome = self.outcomes.popleft() if self.outcomes else ScriptedStream()
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    async def shake_hands(self, connection: Connection) -> float:
        if self.refusal is not None:
            raise self.refusal
        return time.time()


@asynccontextmanager
async def running(server: PlayedServer) -> AsyncIterator[Link]:
    """A link to ``server`` that runs in the block, which ends in time."""
    link = Link(server, Timeouts(timeout=LONG, connect_timeout=LONG, keep_alive=LONG), LinkEvents())
    with fail_after(PATIENCE):
        async with create_task_group() as tasks:
            tasks.start_soon(link.run)
            yield link
            tasks.cancel_scope.cancel()


async def test_a_refusal_that_waiting_does_not_cure() -> None:
    """Whoever opens the link is told at once, whatever time there is."""
    server = PlayedServer()
    server.refusal = redis.exceptions.AuthenticationError("WRONGPASS")
    async with running(server) as link:
        with pytest.raises(redis.exceptions.AuthenticationError, match="WRONGPASS"):
            await link.opened()


@pytest.mark.parametrize("silences", [1, 2])
async def test_a_silence_does_not_hide_why_an_earlier_try_failed(
    monkeypatch: pytest.MonkeyPatch, silences: int
) -> None:
    """The try that the time to open cuts off tells what was wrong before, if anything was."""

    class Backoff:
        def compute(self, _: int) -> float:
            return 0.0

    monkeypatch.setattr(module, "_BACKOFF", Backoff())
    server = PlayedServer(OSError("nobody is there"), *(TimeoutError() for _ in range(silences)))
    server.refusal = redis.exceptions.AuthenticationError("WRONGPASS")
    told: list[str] = []

    class Watched(Link):
        def on_trouble(self) -> None:
            told.append(str(self.down_error()))

    link = Watched(server, Timeouts(timeout=LONG, connect_timeout=LONG, keep_alive=LONG), LinkEvents())
    with fail_after(PATIENCE):
        async with create_task_group() as tasks:
            tasks.start_soon(link.run)
            with pytest.raises(redis.exceptions.AuthenticationError, match="WRONGPASS"):
                await link.opened()
            tasks.cancel_scope.cancel()
    assert len(told) == 2 + silences
    assert "cannot be reached: nobody is there;" in told[0]
    for one in told[1:-1]:
        assert "cannot be reached: it did not answer in time; before that: nobody is there;" in one


def test_a_pause_is_short() -> None:
    """However often connecting failed, the next try comes within half a second, and not when those of others do."""
    pauses = [module._BACKOFF.compute(module._MOST_FAILURES) for _ in range(400)]
    assert max(pauses) <= 0.5
    assert len(set(pauses)) > 200, "no jitter"


async def test_success_sets_the_backoff_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each failure in a row makes the next pause longer, and a connection that came up makes it short again."""
    failures: list[int] = []

    class Backoff:
        def compute(self, number: int) -> float:
            failures.append(number)
            return 0.0

    monkeypatch.setattr(module, "_BACKOFF", Backoff())
    short = [ScriptedStream() for _ in range(3)]
    for one in short:
        one.feed(EndOfStream())
    gone = [OSError("nobody is there") for _ in range(20)]
    async with running(PlayedServer(short[0], short[1], *gone, short[2])) as link:
        while link.connects < 4:
            await link.ready()
            connection = link.connection
            assert connection is not None
            if link.connects < 4:
                await connection.wait_ended()
    assert failures == [1, 1, *range(2, 6), *[5] * 16, 1]


async def test_a_script_that_is_sent_again_is_due_as_before() -> None:
    """A server that forgot a script gets it whole, and no more time for it than there was."""
    stream = ScriptedStream()
    stream.answer(b":1\r\n")
    stream.answer(b"-NOSCRIPT gone\r\n")
    stream.answer(b":2\r\n")
    script = Script.of("return 1")
    done: list[Request] = []
    told = Event()

    def note(request: Request) -> None:
        done.append(request)
        told.set()

    async with running(PlayedServer(stream)) as link:
        await link.opened()
        assert await link.call(script, ["key"]) == 1
        begun = time.monotonic()
        link.call_soon(script, ["key"], done=note, timeout=LONG / 2)
        await told.wait()
    assert [write.split(b"\r\n")[2] for write in stream.written] == [b"EVAL", b"EVALSHA", b"EVAL"]
    assert done[0].reply == 2
    assert done[0].due < begun + LONG * 0.75
