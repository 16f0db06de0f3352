"""The two layers on Redis, as the contract kit takes them: their features, and factories that know their server."""

from __future__ import annotations

import itertools
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeAlias

import anyio
import anyio.abc
import pytest
import redis.exceptions
from anyio import ClosedResourceError, create_task_group, fail_after
from redis_server import RedisServer

from anyio_channels import ChannelFull, RedisChannelLayer, RedisPubSubChannelLayer
from anyio_channels.layers.base import BaseChannelLayer
from anyio_channels.local.directory import Channel
from anyio_channels.redis.client import Link, LinkEvents, Server, Subscriptions
from anyio_channels.redis.pubsub import PubSub
from anyio_channels.redis.queue.blocking import BlockingPop
from anyio_channels.redis.queue.channels import QueueChannel
from anyio_channels.redis.queue.session import Session
from anyio_channels.redis.wire import Names
from anyio_channels.testing import CHECKS, Clock, Features, LayerFactory

PATIENCE = 60.0
LayerOnRedis: TypeAlias = RedisChannelLayer | RedisPubSubChannelLayer
_numbers = itertools.count()


def new_prefix() -> str:
    """A prefix that no other test has, so that they can share a server."""
    return f"test{next(_numbers)}."


def grow_older(client: Any, prefix: str, seconds: float) -> None:
    """Make all messages and memberships in Redis so much older: scores are times."""
    for key in client.scan_iter(f"{prefix}*"):
        if client.type(key) == b"zset":
            for member, score in client.zrange(key, 0, -1, withscores=True):
                client.zadd(key, {member: score - seconds})


@dataclass(frozen=True)
class Kind:
    """One of the layers, and what it chooses where the contract leaves it a choice."""

    name: str
    layer_class: type[Any]
    features: Features

    def factory(self, *servers: RedisServer, hosts: list[Any] | None = None, **fixed: Any) -> LayerFactory:
        """Make layers on ``servers`` for the kit, each with a prefix of its own and the kit's clock.

        ``hosts``: how the layers find them, if not by their URLs. ``fixed``: more options.
        """

        def make(clock: Clock, **options: Any) -> BaseChannelLayer:
            prefix = new_prefix()
            found = hosts or [server.url for server in servers]
            layer: BaseChannelLayer = self.layer_class(found, prefix=prefix, clock=clock, **fixed, **options)
            if isinstance(layer, RedisChannelLayer):
                clock.move = move_queue(servers, prefix)
                clock.settle = settle_queue
            else:
                clock.settle = settle_pubsub
            return layer

        return make


def move_queue(servers: Sequence[RedisServer], prefix: str) -> Callable[[BaseChannelLayer, float], Awaitable[None]]:
    """Let time pass in Redis too, in steps as long as those in which an open layer renews its memberships."""

    async def move(layer: BaseChannelLayer, seconds: float) -> None:
        assert isinstance(layer, RedisChannelLayer)
        left = seconds
        while left > 0:
            step = min(left, layer.group_expiry / 3)
            left -= step
            for server in servers:
                with server.client() as client:
                    grow_older(client, prefix, step)
            for link in layer.options.router.links:
                assert link.connection is not None
                session(layer).memberships.renew(link)
                await link.execute("PING")

    return move


def session(layer: BaseChannelLayer) -> Session:
    """Return what lives while a queue layer is open."""
    assert isinstance(layer, RedisChannelLayer)
    return layer._session


def transport(layer: BaseChannelLayer) -> PubSub:
    """Return what carries the messages of a pub/sub layer."""
    assert isinstance(layer, RedisPubSubChannelLayer)
    found = layer.transport
    assert isinstance(found, PubSub)
    return found


def subscriptions(layer: BaseChannelLayer) -> Subscriptions:
    """Return what a layer has Redis send it."""
    return session(layer).subscriptions if isinstance(layer, RedisChannelLayer) else transport(layer).subscriptions


def events(layer: BaseChannelLayer) -> LinkEvents:
    """Return what hears of the connections of a layer."""
    return session(layer) if isinstance(layer, RedisChannelLayer) else transport(layer)


def arrives(layer: BaseChannelLayer, channel: Channel, entry: bytes, score: float) -> None:
    """Let a message for a normal channel come, as if it had been fetched for a reader who is gone."""
    arrive(layer, channel, [(entry, score)])


def arrive(layer: BaseChannelLayer, channel: Channel, entries: Sequence[tuple[bytes, float]]) -> None:
    """Let messages for a normal channel come together, as if they had been fetched for as many readers."""
    assert isinstance(channel, QueueChannel)
    now = session(layer).link_of(channel.key).server_time
    session(layer).receiving.fetched(channel, [(entry, str(score).encode()) for entry, score in entries], now)


def link_to_channel(layer: BaseChannelLayer, name: str) -> Link:
    """Return the link to the server that owns the channel ``name``."""
    if isinstance(layer, RedisChannelLayer):
        return session(layer).link_of(Names(layer.prefix).channel(name))
    assert isinstance(layer, RedisPubSubChannelLayer)
    return layer.options.router.owner(name, name)


def port_of(link: Link) -> int:
    """Return the port of the server that ``link`` leads to."""
    assert isinstance(link.server, Server)
    return link.server.address.port


def link_to_group(layer: BaseChannelLayer, name: str) -> Link:
    """Return the link to the server that owns the group ``name``."""
    if isinstance(layer, RedisChannelLayer):
        return session(layer).link_of(Names(layer.prefix).group(name))
    assert isinstance(layer, RedisPubSubChannelLayer)
    topic = Names(layer.prefix).group_topic(name)
    return layer.options.router.owner(topic, topic)


async def settle_queue(layer: BaseChannelLayer) -> None:
    """Wait until what was popped has come, and what is to be given back is there."""
    assert isinstance(layer, RedisChannelLayer)
    for _ in range(2):
        for link in layer.options.router.links:
            await session(layer).sources[link].until_ended()
            await link.execute("PING")


async def settle_pubsub(layer: BaseChannelLayer) -> None:
    """Wait until what was published before has come: it is on the same connection."""
    assert isinstance(layer, RedisPubSubChannelLayer)
    for link in layer.options.router.links:
        await link.execute("PING")


QUEUE = Kind(
    "queue",
    RedisChannelLayer,
    Features(channel_full="normal", any_reader=False, knows_all=False, settles_within=5),
)
PUBSUB = Kind(
    "pubsub",
    RedisPubSubChannelLayer,
    Features(
        keeps_unread=False, channel_full="none", any_member=False, any_reader=False, knows_all=False, settles_within=5
    ),
)
KINDS = (QUEUE, PUBSUB)
both = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)


def popper(layer: RedisChannelLayer) -> BlockingPop:
    """Return what waits in Redis for ``layer``, on its first server."""
    found = session(layer).sources[layer.options.router.links[0]]
    assert isinstance(found, BlockingPop)
    return found


def hears(layer: BaseChannelLayer, name: str) -> bool:
    """Whether Redis has confirmed the subscription to the Redis channel ``name``."""
    subscription = subscriptions(layer).wanted.get(name)
    return subscription is not None and subscription.confirmed


CASES = [
    pytest.param(kind, check, id=f"{kind.name}-{check.name}")
    for kind in KINDS
    for check in CHECKS
    if check.applies(kind.features)
]
"""Each layer with each check of the contract kit that applies to it."""


async def until(condition: Callable[[], object]) -> None:
    """Wait for what must happen on the other side of a network."""
    with fail_after(PATIENCE):
        while not condition():
            await anyio.sleep(0.002)


async def hold_inbox(layer: Any, *groups: str, task_status: anyio.abc.TaskStatus[Any], **options: Any) -> None:
    """Have an inbox open until cancelled; to be started."""
    async with layer.subscribe(*groups, **options) as inbox:
        task_status.started(inbox)
        await anyio.sleep_forever()


class Books:
    """Numbered messages to an inbox from one sender, and what came of them, whatever happens to Redis."""

    def __init__(self, sender: Any, inbox: Any) -> None:
        self.sender = sender
        self.inbox = inbox
        self.failed: list[Exception] = []
        self.received: list[int] = []

    async def send(self) -> None:
        for number in itertools.count():
            try:
                await self.sender.send(self.inbox.channel, {"n": number})
            except redis.exceptions.RedisError as error:
                self.failed.append(error)
            except ChannelFull:
                pass
            await anyio.sleep(0.001)

    async def receive(self) -> None:
        with suppress(ClosedResourceError):  # closed and cancelled at once
            while True:
                self.received.append((await self.inbox.receive())["n"])

    async def go_on(self, count: int = 20) -> None:
        """Wait until so many more have come."""
        before = len(self.received)
        await until(lambda: len(self.received) > before + count)

    def balance(self) -> None:
        """Nothing twice, nothing out of order."""
        odd = [pair for pair in pairwise(self.received) if pair[0] >= pair[1]]
        assert not odd, f"after {odd[0][0]} came {odd[0][1]}"


async def pass_on_both(one: Any, other: Any, kind: Kind, connections: int) -> None:
    """What ``other`` sends to process-specific channels, normal channels and groups reaches ``one``, on all servers."""
    async with one, other, create_task_group() as tg:
        inboxes = [await tg.start(hold_inbox, one, f"group{number}") for number in range(20)]
        for number, inbox in enumerate(inboxes):
            await other.send(inbox.channel, {"to": number})
            await other.group_send(f"group{number}", {"group": number})
            with fail_after(PATIENCE):
                got = [await inbox.receive(), await inbox.receive()]
            assert sorted(got, key=str) == [{"group": number}, {"to": number}]
        got = []

        async def read(channel: str) -> None:
            got.append((await one.receive(channel))["to"])

        names = [f"normal{number}" for number in range(20)]
        for name in names:
            tg.start_soon(read, name)
        if kind is PUBSUB:
            await until(lambda: all(hears(one, name) for name in names))
        for name in names:
            await other.send(name, {"to": name})
        await until(lambda: sorted(got) == sorted(names))
        assert {one.options.router.owner(name, name) for name in names} == set(one.options.router.links)
        assert one.statistics().connections == connections
        await other.flush()
        tg.cancel_scope.cancel()


async def until_answered(layer: LayerOnRedis) -> None:
    """Wait until nothing that ``layer`` sent is unanswered, and all its callers have heard."""
    await _until_pending(layer, pending=False)


async def until_sent(layer: LayerOnRedis) -> None:
    """Wait until something was sent that Redis has not answered, and nobody is about to send more."""
    await _until_pending(layer, pending=True)


async def _until_pending(layer: LayerOnRedis, *, pending: bool) -> None:
    connections = [link.connection for link in layer.options.router.links if link.connection is not None]
    assert connections
    with fail_after(PATIENCE):
        await anyio.wait_all_tasks_blocked()
        while any(one.pending for one in connections) is not pending:
            await anyio.sleep(0.002)
            await anyio.wait_all_tasks_blocked()
