"""One process of the storm on Redis: it sends, receives and is cancelled at random, and tells its parent what it did.

Rules:
- it is started with a :class:`Plan` as JSON; it says lines of JSON, and goes on when the parent says one.
- a sender numbers its messages, so a message is known by ``worker.sender.number``; it tries the next when one is done.
- nothing lies between an operation's last await and the note made of it, so the notes are exact.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import sys
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from dataclasses import asdict, dataclass, field
from typing import Any

import anyio
from anyio import CancelScope, ClosedResourceError, create_task_group, sleep, to_thread
from anyio.lowlevel import checkpoint
from layers_on_redis import LayerOnRedis
from redis.exceptions import OutOfMemoryError

from anyio_channels import ChannelFull, RedisChannelLayer, RedisPubSubChannelLayer

WORKERS = 3
SINGLE = [f"single.{number}" for number in range(WORKERS)]
"""Normal channels that one task reads: in the queue layer that of the worker with the number, in pub/sub one in each."""
SHARED = [f"shared.{number}" for number in range(7)]
"""Normal channels that all read."""
NORMAL = [*SINGLE, *SHARED]
GROUPS = ["group.0", "group.1", "group.2"]
PASSING = "passing"
"""The group of those who come and go."""
INBOXES = 10
SMALL: dict[int, dict[str, Any]] = {
    7: {"capacity": 3, "on_gap": "event"},
    8: {"capacity": 3, "on_gap": "event"},
    9: {"capacity": 3, "on_gap": "event", "overflow": "drop_old"},
}
"""The inboxes that may be full, by their numbers. The others hold whatever comes."""
SENDERS = 30
READERS = 30
VISITORS = 3
GUESTS = 5
CAPACITY = 10


@dataclass(frozen=True)
class Plan:
    """What a worker is to do."""

    kind: str
    backend: str
    number: int
    url: str
    prefix: str
    seed: int
    messages: int
    troubled: bool = False
    """Whether Redis is put in trouble meanwhile."""

    def make_layer(self) -> LayerOnRedis:
        options: dict[str, Any] = {"prefix": self.prefix, "expiry": 600, "timeout": 20}
        if self.kind == "queue":
            return RedisChannelLayer([self.url], capacity=CAPACITY, **options)
        return RedisPubSubChannelLayer([self.url], capacity=100_000, **options)

    def pairs(self, members: int) -> int:
        """What one message to a group counts in the statistics of its sender."""
        return members if self.kind == "queue" else 1


@dataclass
class Books:
    """What went in and what came out."""

    sent: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Of each message where it was sent, and what became of that: ``"sent"``, ``"cancelled"``, or ``"full"``; that may have
    been Redis as a whole."""
    received: dict[str, list[str]] = field(default_factory=dict)
    """The messages of each channel, in the order in which they came."""
    missed: dict[str, int] = field(default_factory=dict)
    """How many messages each small inbox missed because it was full."""
    accepted: int = 0
    """What the statistics of the layer should call sent, but for groups."""
    taken: int = 0
    """What the statistics of the layer should call received."""
    statistics: dict[str, Any] = field(default_factory=dict)
    logged: list[str] = field(default_factory=list)
    """What the layer said, but that something was full."""


class Sender:
    """Numbers its messages."""

    def __init__(self, worker: Worker, name: str) -> None:
        self.worker = worker
        self.name = f"{worker.plan.number}.{name}"
        self.count = 0

    async def send(self, target: str, send: Callable[[dict[str, Any]], Awaitable[None]], accepted: int) -> None:
        books = self.worker.books
        self.count += 1
        message = f"{self.name}.{self.count}"
        books.sent[message] = (target, "cancelled")
        try:
            await send({"id": message})
        except (ChannelFull, OutOfMemoryError):
            books.sent[message] = (target, "full")
        else:
            books.sent[message] = (target, "sent")
            books.accepted += accepted


class Worker:
    """A process of the storm."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.random = random.Random(f"{plan.seed}.{plan.number}")
        self.layer = plan.make_layer()
        self.other = plan.make_layer()
        self.books = Books()
        self.running: dict[object, Callable[[], object]] = {}
        self.left = plan.messages
        self.native = False
        self.over = False

    # Between the worker and its parent

    async def say(self, **what: Any) -> Any:
        """Say it, and return what the parent answers; ``None`` when that is nothing."""
        sys.stdout.write(json.dumps(what) + "\n")
        sys.stdout.flush()
        line = await to_thread.run_sync(sys.stdin.readline)
        return json.loads(line) if line else None

    async def run(self) -> None:
        self.native = anyio.get_cancelled_exc_class() is asyncio.CancelledError
        async with self.layer, self.other, AsyncExitStack() as stack:
            mine = {}
            for number in range(INBOXES):
                groups = GROUPS if number == 0 else [GROUPS[number % len(GROUPS)]]
                options = SMALL.get(number, {"capacity": 100_000})
                inbox = await stack.enter_async_context(self.layer.subscribe(*groups, **options))
                mine[inbox.channel] = groups
            if self.plan.kind == "pubsub":
                for channel in NORMAL:
                    await self.until_kept(channel)
            inboxes: dict[str, list[str]] = (await self.say(inboxes=mine))["inboxes"]
            await self.storm(list(mine), inboxes)
            await self.say(done="quiet")  # no worker does anything now
            await self.drain(list(mine))
            self.books.statistics = asdict(self.layer.statistics())
        await self.say(**asdict(self.books))

    # The storm

    async def storm(self, mine: list[str], inboxes: dict[str, list[str]]) -> None:
        """Send so many messages as planned, and read until the others have sent theirs too."""
        members = {group: sum(group in groups for groups in inboxes.values()) for group in GROUPS}
        single = SINGLE if self.plan.kind == "pubsub" else [SINGLE[self.plan.number]]
        async with create_task_group() as guests, create_task_group() as readers:
            if self.plan.kind == "queue":
                guests.start_soon(self.have_guests)
            readers.start_soon(self.strike)
            for channel in (*mine, *single):
                readers.start_soon(self.read, lambda channel=channel: channel)
            for _ in range(READERS - len(mine) - len(single)):
                readers.start_soon(self.read, lambda: self.random.choice(SHARED))
            for number in range(VISITORS):
                readers.start_soon(self.visit, Sender(self, f"visitor-{number}"))
            async with create_task_group() as senders:
                for number in range(SENDERS):
                    senders.start_soon(self.send, Sender(self, str(number)), list(inboxes), members)
            await self.say(done="sending")
            self.over = True
            readers.cancel_scope.cancel()
        # What was begun and not waited for is on these connections: it has happened when this is answered.
        await self.other.group_send("nobody", {})
        await self.layer.group_send("nobody", {})
        self.books.accepted += self.plan.pairs(0)

    async def strike(self) -> None:
        """Cancel one wait after the other."""
        while True:
            await sleep(self.random.random() * 0.003)
            for _ in range(self.random.randrange(16)):
                if self.running:
                    self.running.pop(self.random.choice(list(self.running)))()

    async def send(self, sender: Sender, inboxes: list[str], members: dict[str, int]) -> None:
        layer = self.layer

        async def once() -> None:
            wait = self.random.random() < 0.5
            draw = self.random.random()
            if draw < 0.1:
                group = self.random.choice(GROUPS)
                pairs = self.plan.pairs(members[group])
                await sender.send(group, lambda message: layer.group_send(group, message), pairs)
            else:
                channel = self.random.choice(inboxes if draw < 0.4 else [*SINGLE, *SHARED * 3])
                for _ in range(self.random.randint(1, 3)):
                    await sender.send(
                        channel, lambda message: layer.send(channel, message, wait=wait and "!" not in channel), 1
                    )

        while self.left > 0:
            self.left -= 1
            await self.risk(once)

    async def read(self, choose: Callable[[], str]) -> None:
        async def once() -> None:
            channel = choose()
            self.note(channel, await self.layer.receive(channel))

        while True:
            await self.risk(once)

    def note(self, channel: str, message: dict[str, Any]) -> None:
        if message.get("type") == "channel_layer.gap":
            self.books.missed[channel] = self.books.missed.get(channel, 0) + message["missed"]
        else:
            self.books.taken += 1
            self.note_elsewhere(channel, message)

    def note_elsewhere(self, channel: str, message: dict[str, Any]) -> None:
        """Another layer than that of the statistics received it."""
        if "id" in message:
            self.books.received.setdefault(channel, []).append(message["id"])

    async def visit(self, sender: Sender) -> None:
        """Come, say something, hear a little and go, and be cancelled anywhere in that."""
        layer = self.other

        async def once() -> None:
            with suppress(OutOfMemoryError):
                await come()

        async def come() -> None:
            async with layer.subscribe(PASSING) as inbox:
                await sender.send(PASSING, lambda message: layer.group_send(PASSING, message), 0)
                for _ in range(self.random.randrange(4)):
                    self.note_elsewhere(inbox.channel, await inbox.receive())

        while True:
            await self.risk(once)

    async def have_guests(self) -> None:
        """Open a layer, read there, and close it while its readers wait, again and again."""

        async def read(layer: LayerOnRedis) -> None:
            with suppress(ClosedResourceError):
                while True:
                    channel = self.random.choice(SHARED)
                    self.note_elsewhere(channel, await layer.receive(channel))

        while not self.over:
            async with create_task_group() as guests, self.plan.make_layer() as layer:
                for _ in range(GUESTS):
                    guests.start_soon(read, layer)
                await sleep(self.random.random() * 0.05)

    async def risk(self, once: Callable[[], Awaitable[None]]) -> None:
        """Do it once, in a scope that somebody may cancel; or, on asyncio, in a task of its own."""
        me = object()
        try:
            if self.native and self.random.random() < 0.5:
                await self.in_a_native_task(me, once)
            else:
                with CancelScope() as scope:
                    self.running[me] = scope.cancel
                    await once()
        finally:
            self.running.pop(me, None)

    async def in_a_native_task(self, me: object, once: Callable[[], Awaitable[None]]) -> None:
        task = asyncio.ensure_future(once())
        self.running[me] = task.cancel
        try:
            await task
        except asyncio.CancelledError:
            if not task.cancelled():
                task.cancel()
                raise

    # Before and after

    async def until_kept(self, channel: str) -> None:
        """From now on what is sent to the normal channel is kept here: that begins with a reader."""

        async def read() -> None:
            self.note(channel, await self.layer.receive(channel))
            tasks.cancel_scope.cancel()

        async with create_task_group() as tasks:
            tasks.start_soon(read)
            while True:
                with CancelScope(shield=True):  # each is counted
                    await self.layer.send(channel, {"type": "begin"})
                self.books.accepted += 1
                await checkpoint()

    async def drain(self, mine: list[str]) -> None:
        """Receive all that was sent before to the channels that nobody else reads."""
        for number, channel in enumerate(mine):
            if number not in SMALL:
                await self.drain_until_the_end(channel, 1)
        if self.plan.kind == "pubsub":
            for channel in NORMAL:
                await self.drain_until_the_end(channel, WORKERS)
        for number in SMALL:  # nothing is on its way to them any more, but they may have no room for a last message
            while self.layer._here.channels[mine[number]].entries:
                self.note(mine[number], await self.layer.receive(mine[number]))

    async def drain_until_the_end(self, channel: str, ends: int) -> None:
        """Receive all that was sent to the channel before; so many workers do so with it, each for itself."""
        await self.layer.send(channel, {"type": "end"}, wait="!" not in channel)
        self.books.accepted += 1
        while ends:
            message = await self.layer.receive(channel)
            self.note(channel, message)
            ends -= message.get("type") == "end"


class Log(logging.Handler):
    """Keeps what the layer says, but for what it is made to say here."""

    def __init__(self, texts: list[str], known: set[str]) -> None:
        super().__init__()
        self.texts = texts
        self.known = known

    def emit(self, record: logging.LogRecord) -> None:
        if record.__dict__["anyio_channels_event"] not in self.known:
            self.texts.append(record.getMessage())


def main() -> None:
    plan = Plan(**json.loads(sys.argv[1]))
    worker = Worker(plan)
    known = {"group_send.dropped", "channel.dropped"}
    if plan.troubled:
        known |= {"pop.refused", "membership.refused"}
    logging.getLogger("anyio_channels").addHandler(Log(worker.books.logged, known))
    backend, _, loop = plan.backend.partition("+")
    anyio.run(worker.run, backend=backend, backend_options={"use_uvloop": True} if loop == "uvloop" else {})


if __name__ == "__main__":
    main()
