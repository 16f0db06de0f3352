"""The import path of ``fast_channels.layers.registry``."""

from anyio_channels.registry import (
    ChannelLayerRegistry,
    channel_layers,
    get_channel_layer,
    has_layers,
    register_channel_layer,
    unregister_channel_layer,
)
from anyio_channels.urls import create_channel_layer, create_redis_channel_layer

__all__ = [
    "ChannelLayerRegistry",
    "channel_layers",
    "create_channel_layer",
    "create_redis_channel_layer",
    "get_channel_layer",
    "has_layers",
    "register_channel_layer",
    "unregister_channel_layer",
]
