"""The two layers on Redis, as the contract kit takes them: their features, and factories that know their server."""

from __future__ import annotations

import itertools
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from redis_server import RedisServer

from anyio_channels import RedisChannelLayer, RedisPubSubChannelLayer
from anyio_channels.layers.base import BaseChannelLayer
from anyio_channels.layers.redis.pop import Popper
from anyio_channels.testing import Clock, Features, LayerFactory

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
            for link in layer._topology.links:
                assert link.connection is not None
                layer._rejoin(link)
                await layer._execute(link, "PING")

    return move


async def settle_queue(layer: BaseChannelLayer) -> None:
    """Wait until what was popped has come, and what is to be given back is there."""
    assert isinstance(layer, RedisChannelLayer)
    for _ in range(2):
        for link in layer._topology.links:
            await layer._poppers[link].until_ended()
            await layer._execute(link, "PING")


async def settle_pubsub(layer: BaseChannelLayer) -> None:
    """Wait until what was published before has come: it is on the same connection."""
    assert isinstance(layer, RedisPubSubChannelLayer)
    for link in layer._topology.links:
        await layer._execute(link, "PING")


QUEUE = Kind(
    "queue",
    RedisChannelLayer,
    Features(channel_full="normal", leaves_groups="process-specific", knows_all=False, settles_within=5),
)
PUBSUB = Kind(
    "pubsub",
    RedisPubSubChannelLayer,
    Features(keeps_unread=False, channel_full="none", any_member=False, knows_all=False, settles_within=5),
)
KINDS = (QUEUE, PUBSUB)


def popper(layer: RedisChannelLayer) -> Popper:
    """Return what waits in Redis for ``layer``, on its first server."""
    found = layer._poppers[layer._topology.links[0]]
    assert isinstance(found, Popper)
    return found


def hears(layer: RedisPubSubChannelLayer, name: str) -> bool:
    """Whether Redis has confirmed the subscription to the Redis channel ``name``."""
    subscription = layer.subscriptions.wanted.get(name)
    return subscription is not None and subscription.confirmed
