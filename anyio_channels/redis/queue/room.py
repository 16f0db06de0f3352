"""Sending when there is room: ``send(wait=True)`` to a full channel.

Rules:
- a sender who waits leaves a marker in Redis; whoever pops then publishes to it. In a cluster every pop publishes.
- of the senders to one channel in this process one asks at a time, and the others wait behind it, in turn.
- channels_redis does not publish when it pops, so room is also looked for every second.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Final

from anyio import Event, Lock, move_on_after

from anyio_channels.redis.client import Connection, Link

from .setup import Setup

__all__ = ["WaitingSenders"]

_RECHECK: Final = 1.0
"""Seconds after which a sender looks for room that nobody announced."""


class _Queue:
    """Those who wait for room in one channel."""

    __slots__ = ("bell", "link", "lock", "users")

    def __init__(self, link: Link) -> None:
        self.link = link
        self.lock = Lock()
        self.bell = Event()
        self.users = 0


class WaitingSenders:
    """All who wait for room in this process."""

    def __init__(self, setup: Setup) -> None:
        """Start with nobody waiting."""
        self._router = router = setup.router
        self._names = setup.names
        self.queues: dict[str, _Queue] = {}  # by the key of the channel
        self._subscribe = "SSUBSCRIBE" if router.clustered else "SUBSCRIBE"
        self._unsubscribe = "SUNSUBSCRIBE" if router.clustered else "UNSUBSCRIBE"

    def _owner(self, key: str) -> Link:
        return self._router.owner(key[len(self._names.prefix) :], key)

    async def send(self, key: str, attempt: Callable[[Link], Awaitable[int]]) -> None:
        """Send by ``attempt(link)`` as soon as there is room.

        ``attempt`` returns -1 when it has sent, else the milliseconds until the oldest message of the channel expires.
        If cancelled while it waits, nothing was sent.
        """
        queue = self.queues.setdefault(key, _Queue(self._owner(key)))
        marker = self._names.room(key)
        queue.users += 1
        try:
            async with queue.lock:
                listening_to: Connection | None = None
                while True:
                    queue.bell = Event()
                    wait = await attempt(self._owner(key))
                    if wait < 0:
                        return
                    queue.link = self._owner(key)  # it may have moved
                    if listening_to is not queue.link.connection:
                        listening_to = queue.link.connection
                        with suppress(*self._router.passing):
                            await queue.link.execute(self._subscribe, marker)
                        continue  # room may have been made meanwhile
                    with move_on_after(min(wait / 1000, _RECHECK)):
                        await queue.bell.wait()
        finally:
            queue.users -= 1
            if not queue.users:
                del self.queues[key]
                queue.link.submit(self._unsubscribe, marker)

    def heard(self, key: str) -> None:
        """Room was made in the channel with ``key``."""
        if (queue := self.queues.get(key)) is not None:
            queue.bell.set()

    def look_again(self) -> None:
        """Have all look for room: a connection is new, or the layer is being closed."""
        for queue in self.queues.values():
            queue.bell.set()

    def restore(self, link: Link, connection: Connection) -> None:
        """Listen again on a new connection. A sender that misses a notification checks again every second."""
        for key, queue in self.queues.items():
            if queue.link is link:
                connection.submit(self._subscribe, self._names.room(key))
