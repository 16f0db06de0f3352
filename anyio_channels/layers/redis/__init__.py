"""The layers on Redis. Importing them needs the extra ``anyio_channels[redis]``."""

from __future__ import annotations

from .layer import RedisLayerStatistics
from .pubsub import RedisPubSubChannelLayer
from .queue import RedisChannelLayer

__all__ = ["RedisChannelLayer", "RedisLayerStatistics", "RedisPubSubChannelLayer"]
