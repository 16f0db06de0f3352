"""What an author of a layer writes: how bytes get from one process to another. ``Hub`` makes a channel layer of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable

from anyio.abc import TaskStatus

from .deliveries import Deliveries

__all__ = ["Transport"]


class Transport(ABC):
    """What carries the messages of a ``Hub`` between processes.

    A transport knows topics and bytes, and nothing of channels, members or waiting. It tells ``Deliveries``, in the event
    loop that opened the layer: ``deliver`` for each message that comes, ``missing`` where some may have been lost, and
    ``unheard`` for a topic that it can no longer subscribe to.
    """

    outage: tuple[type[Exception], ...] = (OSError,)
    """Errors of the calls below that pass. A topic stays wanted, and the transport subscribes to it as soon as it can."""

    @abstractmethod
    async def run(self, deliveries: Deliveries, *, task_status: TaskStatus[None]) -> None:
        """Connect, call ``task_status.started()``, and carry messages until cancelled.

        Called once for each opening of the layer, in a task of its own. What it raises before ``started()``, opening
        raises. Lost connections are its own affair: it comes back, subscribes again to all that is wanted, and tells
        what may be missing. When it is cancelled, calls of the other methods that still wait raise one of ``outage``;
        callers get ``ClosedResourceError`` for it.
        """

    @abstractmethod
    def publish(self, topic: str, body: bytes) -> Awaitable[object]:
        """Send ``body`` to all processes that subscribe to ``topic``; if cancelled, it was sent or was not.

        A transport that learns later that a cancelled call was sent adds it to ``Deliveries.sent_late``. A coroutine function, or
        a plain one that returns an awaitable.
        """

    @abstractmethod
    async def subscribe(self, topic: str) -> None:
        """Return when what is published to ``topic`` from now on will come; at once if it is subscribed to already.

        The topic is wanted from the call on until ``unsubscribe``, also if the call is cancelled or raises. One of
        ``outage`` means *not now*; any other error, that the topic cannot be had.
        """

    @abstractmethod
    def unsubscribe(self, topic: str) -> None:
        """The topic is not wanted any more. Must not wait; what is subscribed to and given up is seen in that order."""

    async def catch_up(self) -> None:  # noqa: B027 - not every transport can know it
        """Return when what was published before the call has been delivered here, if the transport can know that."""
