"""The import path of ``fast_channels.layers.redis``."""

from anyio_channels.redis.pubsub import RedisPubSubChannelLayer
from anyio_channels.redis.queue.layer import RedisChannelLayer
from anyio_channels.redis.servers import RedisLayerStatistics

__all__ = ["RedisChannelLayer", "RedisLayerStatistics", "RedisPubSubChannelLayer"]
