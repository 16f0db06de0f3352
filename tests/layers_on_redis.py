"""The two layers on Redis, as the contract kit takes them: their features, and factories that know their server."""

from __future__ import annotations

import itertools
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from redis_server import RedisServer

from anyio_channels import RedisChannelLayer, RedisPubSubChannelLayer
from anyio_channels.layers.base import BaseChannelLayer
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

    def factory(self, server: RedisServer) -> LayerFactory:
        """Make layers on ``server`` for the kit, each with a prefix of its own and the kit's clock."""

        def make(clock: Clock, **options: Any) -> BaseChannelLayer:
            prefix = new_prefix()
            layer: BaseChannelLayer = self.layer_class([server.url], prefix=prefix, clock=clock, **options)
            if isinstance(layer, RedisChannelLayer):
                clock.move = move_queue(server, prefix)
                clock.settle = settle_queue
            else:
                clock.settle = settle_pubsub
            return layer

        return make


def move_queue(server: RedisServer, prefix: str) -> Callable[[BaseChannelLayer, float], Awaitable[None]]:
    """Let time pass in Redis too, in steps as long as those in which an open layer renews its memberships."""

    async def move(layer: BaseChannelLayer, seconds: float) -> None:
        assert isinstance(layer, RedisChannelLayer)
        left = seconds
        with server.client() as client:
            while left > 0:
                step = min(left, layer.group_expiry / 3)
                left -= step
                grow_older(client, prefix, step)
                assert layer._link.connection is not None
                layer._rejoin(layer._link.connection)
                await layer._execute("PING")

    return move


async def settle_queue(layer: BaseChannelLayer) -> None:
    """Wait until what was popped has come, and what is to be given back is there."""
    assert isinstance(layer, RedisChannelLayer)
    for _ in range(2):
        await layer._until_pop_ends()
        await layer._execute("PING")


async def settle_pubsub(layer: BaseChannelLayer) -> None:
    """Wait until what was published before has come: it is on the same connection."""
    assert isinstance(layer, RedisPubSubChannelLayer)
    await layer._execute("PING")


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
