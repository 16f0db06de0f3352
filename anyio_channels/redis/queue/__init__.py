"""The queue layer: messages wait in Redis, in the bytes of channels_redis 4.3."""
