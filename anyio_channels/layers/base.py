"""The import path of ``fast_channels.layers.base``."""

from anyio_channels.contract.layer import (
    MESSAGE_VARIABLES,
    BaseChannelLayer,
    ChannelLayerStatistics,
    Inbox,
    Message,
    OnGap,
    Overflow,
)
from anyio_channels.contract.message import SerializerFormat
from anyio_channels.contract.options import require_choice, require_count, require_seconds

__all__ = [
    "MESSAGE_VARIABLES",
    "BaseChannelLayer",
    "ChannelLayerStatistics",
    "Inbox",
    "Message",
    "OnGap",
    "Overflow",
    "SerializerFormat",
    "require_choice",
    "require_count",
    "require_seconds",
]
