"""The import path of ``fast_channels.layers.base``."""

from anyio_channels.contract.layer import (
    BaseChannelLayer,
    ChannelLayerStatistics,
    Inbox,
    Message,
    OnGap,
    Overflow,
)
from anyio_channels.contract.message import SerializerFormat

__all__ = [
    "BaseChannelLayer",
    "ChannelLayerStatistics",
    "Inbox",
    "Message",
    "OnGap",
    "Overflow",
    "SerializerFormat",
]
