from anyio_channels.contract.message import *  # noqa
from anyio_channels.contract.message import EXCLUDE_KEY, MAX_DEPTH, RESERVED_KEY, Codec, SerializerFormat, Unreadable  # noqa
from anyio_channels.redis.wire import PayloadCodec  # noqa
