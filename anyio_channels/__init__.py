"""Channel layers for structured concurrency: one codebase under asyncio, uvloop and trio."""

from __future__ import annotations

from .exceptions import ChannelFull, MessagesLost, MessageTooLarge
from .layers import (
    BaseChannelLayer,
    ChannelLayerRegistry,
    ChannelLayerStatistics,
    Inbox,
    InMemoryChannelLayer,
    channel_layers,
    create_channel_layer,
    get_channel_layer,
    has_layers,
    register_channel_layer,
    unregister_channel_layer,
)

__all__ = [
    "BaseChannelLayer",
    "ChannelFull",
    "ChannelLayerRegistry",
    "ChannelLayerStatistics",
    "InMemoryChannelLayer",
    "Inbox",
    "MessageTooLarge",
    "MessagesLost",
    "__version__",
    "channel_layers",
    "create_channel_layer",
    "get_channel_layer",
    "has_layers",
    "register_channel_layer",
    "unregister_channel_layer",
]

__version__ = "0.1.0"
