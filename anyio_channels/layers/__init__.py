"""The layers: everything here can be imported from ``anyio_channels`` as well."""

from __future__ import annotations

from anyio_channels.exceptions import ChannelFull, MessagesLost, MessageTooLarge

from .base import BaseChannelLayer, ChannelLayerStatistics
from .inbox import Inbox
from .memory import InMemoryChannelLayer
from .registry import (
    ChannelLayerRegistry,
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
    "channel_layers",
    "create_channel_layer",
    "get_channel_layer",
    "has_layers",
    "register_channel_layer",
    "unregister_channel_layer",
]
