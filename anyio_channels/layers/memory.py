"""The import path of ``fast_channels.layers.in_memory``, and of the ready-made layer."""

from anyio_channels.memory import InMemoryChannelLayer, channel_layer

__all__ = ["InMemoryChannelLayer", "channel_layer"]
