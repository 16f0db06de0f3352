"""Channel layers for structured concurrency: one codebase under asyncio, uvloop and trio."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import layers
from .contract.layer import BaseChannelLayer, ChannelLayerStatistics, Inbox
from .exceptions import ChannelFull, MessagesLost, MessageTooLarge
from .memory import InMemoryChannelLayer
from .registry import (
    ChannelLayerRegistry,
    channel_layers,
    get_channel_layer,
    has_layers,
    register_channel_layer,
    unregister_channel_layer,
)
from .urls import create_channel_layer, create_redis_channel_layer

if TYPE_CHECKING:
    from .redis.pubsub import RedisPubSubChannelLayer
    from .redis.queue.layer import RedisChannelLayer

__all__ = [
    "BaseChannelLayer",
    "ChannelFull",
    "ChannelLayerRegistry",
    "ChannelLayerStatistics",
    "InMemoryChannelLayer",
    "Inbox",
    "MessageTooLarge",
    "MessagesLost",
    "RedisChannelLayer",
    "RedisPubSubChannelLayer",
    "__version__",
    "channel_layers",
    "create_channel_layer",
    "create_redis_channel_layer",
    "get_channel_layer",
    "has_layers",
    "register_channel_layer",
    "unregister_channel_layer",
]

__version__ = "0.1.0"
"""The version of the package, as its metadata has it."""


def __getattr__(name: str) -> Any:
    """Import the layers on Redis when they are first asked for: they need an extra."""
    if name in ("RedisChannelLayer", "RedisPubSubChannelLayer"):
        return getattr(layers, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
