"""Cancelling, coming again and closing at every moment between a message's leaving Redis and its reader's having it.

What a storm meets seldom is made to happen: the test lets the event loop go round so many times, and no more, while Redis
answers whatever it was sent; and it tries one number after the other.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import anyio
import pytest
import redis
from anyio import CancelScope, ClosedResourceError, create_task_group, fail_after
from anyio.lowlevel import checkpoint
from layers_on_redis import new_prefix
from ormsgpack import packb, unpackb
from redis_server import RedisServer

from anyio_channels import RedisChannelLayer
from anyio_channels.redis.wire import Names

pytestmark = pytest.mark.anyio

PATIENCE = 20.0
MOMENTS = range(12)


@pytest.fixture
def client(redis_server: RedisServer) -> Iterator[redis.Redis]:
    """It stops the event loop while it waits: whatever it does happens at one moment of that."""
    with redis_server.client() as client:
        yield client


class Case:
    """A layer, another process that sends to it, and a reader."""

    def __init__(self, server: RedisServer, client: redis.Redis) -> None:
        self.client = client
        self.layer = RedisChannelLayer([server.url], prefix=new_prefix())
        self.received: list[int] = []

    def put(self, *numbers: int) -> None:
        """Another process sends them, one after the other, at once."""
        for number in numbers:
            seconds, microseconds = self.client.time()
            entry = os.urandom(12) + packb({"n": number})
            self.client.zadd(Names(self.layer.prefix).channel("work"), {entry: seconds + microseconds / 1_000_000})

    def left(self) -> list[int]:
        """What is in Redis."""
        entries: Any = self.client.zrange(Names(self.layer.prefix).channel("work"), 0, -1)
        return [unpackb(entry[12:])["n"] for entry in entries]

    async def receive(self) -> None:
        with fail_after(PATIENCE):
            self.received.append((await self.layer.receive("work"))["n"])

    async def read(self) -> None:
        """Receive, unless the layer is closed before."""
        with suppress(ClosedResourceError):
            await self.receive()

    async def go_round(self, rounds: int) -> None:
        """Let the event loop go round so often. Redis has answered all that was sent to it when each begins."""
        for _ in range(rounds):
            self.client.ping()
            await checkpoint()

    async def until_popping(self) -> None:
        """Wait until the reader waits in Redis."""
        with fail_after(PATIENCE):
            while not any(entry["cmd"].startswith("bz") for entry in self.client.client_list()):
                await checkpoint()


async def cancelled(case: Case, scope: CancelScope) -> None:
    with scope:
        await case.receive()


@pytest.mark.parametrize("waits", [False, True], ids=["fetches", "waits"])
async def test_a_reader_that_comes_again_is_in_time(
    redis_server: RedisServer, client: redis.Redis, waits: bool
) -> None:
    """The only reader is cancelled and comes again: it sees the order of sending, whenever messages came meanwhile."""
    for before in MOMENTS:
        for after in range(4):
            client.script_flush()
            case = Case(redis_server, client)
            async with case.layer:
                case.put(0)
                await case.receive()
                async with create_task_group() as tasks:
                    scope = CancelScope()
                    if not waits:
                        case.put(1, 2)
                    tasks.start_soon(cancelled, case, scope)
                    if waits:
                        await case.until_popping()
                    else:
                        await checkpoint()
                    scope.cancel()
                    await case.go_round(before)
                    if waits:
                        case.put(1, 2)
                    for _ in range(after):
                        await checkpoint()
                    while len(case.received) < 3:
                        await case.receive()
            assert (before, after, case.received) == (before, after, [0, 1, 2])


@pytest.mark.parametrize("waits", [False, True], ids=["fetches", "waits"])
async def test_closing_gives_back(redis_server: RedisServer, client: redis.Redis, waits: bool) -> None:
    """A layer is closed while its reader waits: the message is the reader's, or it is in Redis."""
    for known in (True, False):
        for moment in MOMENTS:
            client.script_flush()
            if known:
                other = Case(redis_server, client)
                async with other.layer:
                    other.put(0)
                    await other.receive()
            case = Case(redis_server, client)
            async with create_task_group() as tasks, case.layer:
                if waits:
                    tasks.start_soon(case.read)
                    await case.until_popping()
                case.put(1)
                if not waits:
                    tasks.start_soon(case.read)
                    await checkpoint()
                await case.go_round(moment)
            assert (known, moment, case.received + case.left()) == (known, moment, [1])


async def test_closing_by_cancellation_leaves_the_groups(redis_server: RedisServer, client: redis.Redis) -> None:
    """Whoever cancels all around a layer closes it in order: no membership stays in Redis."""
    case = Case(redis_server, client)
    with CancelScope() as scope:
        async with case.layer, case.layer.subscribe("room"):
            scope.cancel()
            await anyio.sleep_forever()
    assert client.zrange(Names(case.layer.prefix).group("room"), 0, -1) == []


async def test_closing_by_cancellation_gives_back(redis_server: RedisServer, client: redis.Redis) -> None:
    """Whoever cancels all around a layer and its reader closes it in order: no message is lost."""
    for moment in MOMENTS:
        case = Case(redis_server, client)
        async with create_task_group() as tasks, case.layer:
            tasks.start_soon(case.read)
            await case.until_popping()
            case.put(1)
            await case.go_round(moment)
            tasks.cancel_scope.cancel()
        assert (moment, case.received + case.left()) == (moment, [1])
