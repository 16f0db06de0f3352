"""Many readers and senders, cancelled at random in both ways: afterwards the books balance, message by message."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections import Counter
from typing import Any

import anyio
import pytest

from anyio_channels import ChannelFull, InMemoryChannelLayer

pytestmark = pytest.mark.anyio

CHANNELS = [f"channel.{number}" for number in range(20)]
SECONDS = 10  # of the layer's clock: each operation takes a little of them, whatever the machine's speed


class Storm:
    """What went in and what came out, by message."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.now = 0.0
        self.layer = InMemoryChannelLayer(clock=self.clock, capacity=10, expiry=0.5)
        self.sent: Counter[int] = Counter()
        self.received: Counter[int] = Counter()
        self.next_number = 0

    def clock(self) -> float:
        return self.now

    @property
    def over(self) -> bool:
        return self.now >= SECONDS

    async def pause(self) -> None:
        self.now += 0.0002
        if self.random.random() < 0.3:
            await anyio.lowlevel.checkpoint()

    async def send_once(self) -> None:
        self.next_number += 1
        number = self.next_number
        channel = self.random.choice(CHANNELS)
        try:
            await self.layer.send(channel, {"n": number}, wait=self.random.random() < 0.5)
        except ChannelFull:
            return
        self.sent[number] += 1

    async def receive_once(self) -> None:
        self.received[(await self.layer.receive(self.random.choice(CHANNELS)))["n"]] += 1

    async def work(self, once: Any) -> None:
        """Repeat ``once``, each time in a scope that somebody may cancel; or, on asyncio, in a task of its own."""
        native = anyio.get_cancelled_exc_class() is asyncio.CancelledError
        while not self.over:
            await self.pause()
            if native and self.random.random() < 0.5:
                await self.in_a_native_task(once)
            else:
                await self.in_a_scope(once)

    async def in_a_scope(self, once: Any) -> None:
        with anyio.CancelScope() as scope:
            self.victims.append(scope.cancel)
            await once()

    async def in_a_native_task(self, once: Any) -> None:
        task = asyncio.ensure_future(once())
        self.victims.append(task.cancel)
        try:
            await task
        except asyncio.CancelledError:
            if not task.cancelled():
                task.cancel()
                raise

    async def strike(self) -> None:
        """Cancel one wait after the other."""
        for strike in itertools.count(1):
            if self.over:
                break
            await self.pause()
            await anyio.lowlevel.checkpoint()
            if self.victims:
                at = self.random.randrange(len(self.victims))
                self.victims[at], self.victims[-1] = self.victims[-1], self.victims[at]
                self.victims.pop()()
            del self.victims[:-400]
            if strike % 40 == 0:
                self.now += 0.5  # everything unread expires

    async def run(self) -> None:
        self.victims: list[Any] = []
        async with anyio.create_task_group() as tg:
            for _ in range(100):
                tg.start_soon(self.work, self.send_once)
                tg.start_soon(self.work, self.receive_once)
            await self.strike()
            tg.cancel_scope.cancel()


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.slow
async def test_the_books_balance(seed: int) -> None:
    """After 10 seconds of storm: sent = received + expired + still there, each message at most once, nobody waits."""
    storm = Storm(seed)
    await storm.run()
    counts = storm.layer.statistics()
    left: Counter[int] = Counter()
    for channel in CHANNELS:
        while True:
            try:
                left[storm.layer.receive_nowait(channel)["n"]] += 1
            except anyio.WouldBlock:
                break
    assert counts.waiting_receivers == 0
    assert counts.sent == counts.received + counts.expired + counts.buffered_messages
    assert counts.buffered_messages == left.total()
    assert counts.received == storm.received.total()
    assert counts.sent == storm.sent.total()
    assert max((storm.sent).values()) == max((storm.received + left).values()) == 1
    # Nothing lies between an operation's last await and the note made of it, so the notes are exact: what arrived or is
    # there was sent, and what was sent and is gone has expired.
    assert set(storm.received) | set(left) <= set(storm.sent)
    assert len(set(storm.sent) - set(storm.received) - set(left)) == counts.expired
    assert counts.received > 1000
    assert counts.expired > 50
