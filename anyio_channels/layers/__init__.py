"""The layers: everything here can be imported from ``anyio_channels`` as well."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from anyio_channels.exceptions import ChannelFull, MessagesLost, MessageTooLarge

from .base import BaseChannelLayer, ChannelLayerStatistics, Inbox
from .memory import InMemoryChannelLayer
from .registry import (
    ChannelLayerRegistry,
    channel_layers,
    create_channel_layer,
    create_redis_channel_layer,
    get_channel_layer,
    has_layers,
    register_channel_layer,
    unregister_channel_layer,
)

if TYPE_CHECKING:
    from .redis import RedisChannelLayer, RedisPubSubChannelLayer

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
    "channel_layers",
    "create_channel_layer",
    "create_redis_channel_layer",
    "get_channel_layer",
    "has_layers",
    "register_channel_layer",
    "unregister_channel_layer",
]


def __getattr__(name: str) -> Any:
    """Import the layers on Redis when they are first asked for: they need an extra."""
    if name in ("RedisChannelLayer", "RedisPubSubChannelLayer"):
        try:
            from . import redis  # noqa: PLC0415
        except ImportError as error:
            raise ImportError(f"{name} needs an extra: pip install 'anyio_channels[redis]'") from error
        return getattr(redis, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
