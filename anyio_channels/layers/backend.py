from anyio_channels.wakeup import *  # noqa
from anyio_channels.wakeup import Bell, CANCELLED, YIELD_EVERY, ThreadState, thread  # noqa
