"""Which Redis channels are wanted, on which server, and whether Redis confirmed it.

Rules:
- all that is wanted is subscribed to again before a new connection is used.
- what is given up is unsubscribed in the order in which it was decided, so Redis sees it in that order.
- one that Redis forbids does not keep the others away.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import redis.exceptions

from .connection import Connection
from .link import Link
from .topology import Topology

__all__ = ["Subscription", "Subscriptions"]


class Subscription:
    """A Redis channel that is wanted, where, and whether Redis confirmed it on the connection that is up."""

    __slots__ = ("confirmed", "link")

    def __init__(self, link: Link) -> None:
        """``link``: to the server that owns it."""
        self.link: Link = link
        self.confirmed: bool = False


class Subscriptions:
    """The subscriptions of one layer."""

    def __init__(
        self,
        topology: Topology,
        execute: Callable[..., Awaitable[Any]],
        refused: Callable[[str, Exception], object],
    ) -> None:
        """``execute(link, *command)`` sends a command; ``refused(name, error)`` hears what could not be restored."""
        self.wanted: dict[str, Subscription] = {}
        self._topology = topology
        self._execute = execute
        self._refused = refused

    def want(self, name: str) -> Subscription:
        """The Redis channel ``name`` is to be subscribed to."""
        subscription = self.wanted.get(name)
        if subscription is None:
            subscription = self.wanted[name] = Subscription(self._topology.owner(name, name))
        return subscription

    def unwant(self, name: str) -> None:
        """The Redis channel ``name`` is not needed any more."""
        subscription = self.wanted.pop(name, None)
        if subscription is not None:
            subscription.link.submit("UNSUBSCRIBE", name)

    async def confirm(self, name: str) -> None:
        """Have Redis confirm a wanted subscription, unless it has."""
        subscription = self.wanted[name]
        if not subscription.confirmed:
            await self._execute(subscription.link, "SUBSCRIBE", name)
            # If the connection was lost right after, all are told that nothing is confirmed before anybody asks again.
            subscription.confirmed = subscription.link.connection is not None

    async def restore(self, link: Link, connection: Connection) -> None:
        """Subscribe to all that is wanted there, on a new connection."""
        wanted = {name: one for name, one in self.wanted.items() if one.link is link}
        requests = [(name, connection.submit("SUBSCRIBE", name)) for name in wanted]
        await connection.execute("PING")  # they are answered when this is
        for name, request in requests:
            if isinstance(request.error, redis.exceptions.ResponseError):
                self._refused(name, request.error)
                continue
            wanted[name].confirmed = True
            if name not in self.wanted:
                connection.submit("UNSUBSCRIBE", name)  # given up meanwhile

    def lost(self, link: Link) -> None:
        """The connection was lost, and with it what it had confirmed."""
        for subscription in self.wanted.values():
            if subscription.link is link:
                subscription.confirmed = False
