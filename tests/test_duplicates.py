"""Messages that Redis hands out twice, or too late, are received once, in order."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from anyio import create_task_group, fail_after
from hypothesis import given
from hypothesis import strategies as st
from layers_on_redis import PATIENCE, new_prefix, until
from redis_server import Proxy, RedisServer, new_directory

from anyio_channels import RedisChannelLayer
from anyio_channels.redis.duplicates import GENERATION, MARK_LENGTH, MOST_HEARD, LastHeard, Marks, RecentPops


@given(st.lists(st.integers(0, 300)), st.integers(0, 2**32 - 1))
def test_what_does_not_come_after_the_last_is_dropped(order: list[int], start: int) -> None:
    """In whatever order they come, and whatever number the sender began with."""
    heard = LastHeard()
    highest = -1
    for number in order:
        payload = b"sender__" + ((start + number) % 2**32).to_bytes(4, "big") + b"body"
        assert heard.is_new("room", payload) is (number > highest)
        highest = max(highest, number)


def test_senders_and_channels_are_told_apart() -> None:
    """Another sender, and another channel, have numbers of their own."""
    one, other, heard = Marks(), Marks(), LastHeard()
    first = one.next()
    assert len(first) == MARK_LENGTH
    assert [heard.is_new("a", mark) for mark in (first, first, one.next(), other.next())] == [True, False, True, True]
    assert heard.is_new("b", first)


def test_which_senders_are_remembered_is_bounded() -> None:
    """Of many senders the one heard least lately is forgotten."""
    heard = LastHeard()
    marks = [Marks().next() for _ in range(MOST_HEARD + 1)]
    assert all(heard.is_new("a", mark) for mark in marks)
    assert len(heard) == MOST_HEARD
    assert [heard.is_new("a", mark) for mark in (marks[1], marks[0])] == [False, True]
    assert len(heard) == MOST_HEARD
    assert [heard.is_new("a", mark) for mark in (marks[1], marks[3], marks[2])] == [False, False, True]


@given(st.lists(st.integers(0, 3)))
def test_what_was_taken_is_not_taken_again(order: list[int]) -> None:
    """Unless it was given back; key, score and beginning tell messages apart."""
    messages = [("a", b"entry", 1.0), ("b", b"entry", 1.0), ("a", b"other", 1.0), ("a", b"entry", 2.0)]
    taken, seen = RecentPops(), set[int]()
    for number in order:
        assert taken.is_new(*messages[number]) is (number not in seen)
        seen.add(number)
        if number == 3:
            taken.forget(*messages[number])
            seen.discard(number)


def test_what_was_taken_is_remembered_for_a_while() -> None:
    """Of very many messages the last are known, and those before them are forgotten."""
    taken = RecentPops()
    most = GENERATION * 3
    assert all(taken.is_new("a", b"entry", float(number)) for number in range(most))
    last = range(most - GENERATION, most)
    assert not any(taken.is_new("a", b"entry", float(number)) for number in last)
    assert taken.is_new("a", b"entry", 0.0)
    for number in last:  # from either generation
        taken.forget("a", b"entry", float(number))
        assert taken.is_new("a", b"entry", float(number))


class Deployment:
    """A primary, a replica that hears of it through a proxy, and a proxy before whichever is the primary."""

    def __init__(self, primary: RedisServer, replica: RedisServer, feed: Proxy, way: Proxy) -> None:
        self.primary = primary
        self.replica = replica
        self.feed = feed
        self.way = way

    def fail_over(self) -> None:
        self.primary.kill()
        with self.replica.client() as client:
            client.execute_command("REPLICAOF", "NO", "ONE")
        self.way.target = (self.replica.host, self.replica.port)
        self.way.cut_all()

    def waiting(self, prefix: str) -> int:
        """How many messages, and members of groups, the replica holds."""
        with self.replica.client() as client:
            return sum(client.zcard(key) for key in client.scan_iter(f"{prefix}*", _type="zset"))


@asynccontextmanager
async def deployed(tmp_path: Path) -> AsyncIterator[Deployment]:
    with (
        RedisServer(new_directory(tmp_path, "primary"), "--repl-diskless-sync-delay", "0") as primary,
        RedisServer(new_directory(tmp_path, "replica")) as replica,
    ):
        async with Proxy(primary.host, primary.port) as feed, Proxy(primary.host, primary.port) as way:
            with replica.client() as client:
                client.execute_command("REPLICAOF", feed.host, feed.port)
                await until(lambda: client.info("replication")["master_link_status"] == "up")
            yield Deployment(primary, replica, feed, way)


@pytest.mark.anyio
async def test_a_replica_that_knows_of_no_pop_takes_over(tmp_path: Path) -> None:
    """What a process has read from channels of its own comes once, though the new primary has it still."""
    async with deployed(tmp_path) as there:
        layer = RedisChannelLayer([there.way.url], prefix=new_prefix(), timeout=2.0)
        async with layer, layer.subscribe("room") as inbox:
            there.way.refuse()
            there.way.cut_all()
            await until(lambda: layer.statistics().connections == 0)
            async with RedisChannelLayer([there.primary.url], prefix=layer.prefix) as sender:
                for number in range(5):
                    await sender.send(inbox.channel, {"n": number})
                await sender.group_send("room", {"n": 5})
            await until(lambda: there.waiting(layer.prefix) == 6 + 1)
            there.feed.swallow()
            there.way.refuse(False)
            with fail_after(PATIENCE):
                assert [(await inbox.receive())["n"] for _ in range(6)] == [0, 1, 2, 3, 4, 5]
            await until(lambda: layer.statistics().connections == 2)
            before = layer.statistics().reconnects
            there.fail_over()
            assert there.waiting(layer.prefix) >= 6 + 1
            await until(lambda: layer.statistics().reconnects == before + 2)
            await layer.send(inbox.channel, {"n": 6})
            with fail_after(PATIENCE):
                assert await inbox.receive() == {"n": 6}


@pytest.mark.anyio
@pytest.mark.parametrize("waits", [False, True], ids=["fetched", "waited for"])
async def test_a_normal_channel_whose_pops_were_lost(waits: bool, tmp_path: Path) -> None:
    """The same for a normal channel, whose messages are fetched one by one or waited for."""
    async with deployed(tmp_path) as there:
        layer = RedisChannelLayer([there.way.url], prefix=new_prefix(), timeout=2.0)
        async with layer, create_task_group() as tg:
            got: list[Any] = []

            async def read() -> None:
                got.append((await layer.receive("jobs"))["n"])

            for number in range(3):
                await layer.send("jobs", {"n": number})
            await until(lambda: there.waiting(layer.prefix) == 3)
            there.feed.swallow()
            for _ in range(3):
                await read()
            there.fail_over()
            assert there.waiting(layer.prefix) == 3
            if waits:
                tg.start_soon(read)  # while there is no connection: it goes to the blocking pop
            await until(lambda: layer.statistics().reconnects == 1)
            await layer.send("jobs", {"n": 3})
            if not waits:
                await read()
            await until(lambda: len(got) == 4)
            assert got == [0, 1, 2, 3]
