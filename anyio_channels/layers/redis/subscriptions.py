"""Which Redis channels are wanted, on which server, and whether Redis confirmed it.

Rules:
- all that is wanted is subscribed to again before a new connection is used.
- what is given up is unsubscribed in the order in which it was decided, so Redis sees it in that order.
- one that Redis forbids does not keep the others away.
- in a cluster subscriptions are sharded, and go where their slot goes.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Final

import redis.exceptions
from anyio import sleep

from .connection import Connection, Request
from .link import Link
from .topology import Topology

__all__ = ["Subscription", "Subscriptions"]

_PAUSE: Final = 0.05


class Subscription:
    """A Redis channel that is wanted, where, and whether Redis confirmed it on the connection that is up."""

    __slots__ = ("asked", "confirmed", "link")

    def __init__(self, link: Link) -> None:
        """``link``: to the server that owns it."""
        self.link: Link = link
        self.confirmed: bool = False
        self.asked: bool = False
        """Whether a request that nobody waits for is on its way."""


class Subscriptions:
    """The subscriptions of one layer."""

    def __init__(
        self,
        topology: Topology,
        execute: Callable[..., Awaitable[Any]],
        refused: Callable[[str, Exception], object],
        confirmed: Callable[[str], object] | None = None,
    ) -> None:
        """``execute(link, *command)`` sends a command; ``refused(name, error)`` hears what could not be restored.

        ``confirmed(name)`` is called with each that Redis confirmed when nobody waited for it.
        """
        self.wanted: dict[str, Subscription] = {}
        self._topology = topology
        self._execute = execute
        self._refused = refused
        self._confirmed = confirmed
        self._subscribe = "SSUBSCRIBE" if topology.clustered else "SUBSCRIBE"
        self._unsubscribe = "SUNSUBSCRIBE" if topology.clustered else "UNSUBSCRIBE"

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
            subscription.link.submit(self._unsubscribe, name)

    async def confirm(self, name: str) -> None:
        """Have Redis confirm a wanted subscription, unless it has."""
        give_up = time.monotonic() + self.wanted[name].link.timeout
        while (subscription := self.wanted.get(name)) is not None and not subscription.confirmed:
            link = subscription.link
            try:
                await self._execute(link, self._subscribe, name)
            except self._topology.passing as error:
                if time.monotonic() > give_up:
                    raise
                self._topology.follow(error)
                await sleep(_PAUSE)
                self._renew(name)
                continue
            if self.wanted.get(name) is subscription:
                # If the connection was lost right after, all are told that nothing is confirmed before anybody asks again.
                subscription.confirmed = link.connection is not None
                return

    def _renew(self, name: str) -> None:
        """Its owner may have changed: what was asked for elsewhere does not count any more."""
        owner = self._topology.owner(name, name)
        if name in self.wanted and owner is not self.wanted[name].link:
            self.wanted[name] = Subscription(owner)

    def ask(self, name: str) -> None:
        """Have Redis confirm a wanted subscription, unless it has, without waiting."""
        subscription = self.wanted[name]
        if not (subscription.confirmed or subscription.asked) and subscription.link.connection is not None:
            subscription.asked = True
            subscription.link.submit(
                self._subscribe, name, done=partial(self._answered, name, subscription, subscription.link)
            )

    def _answered(self, name: str, subscription: Subscription, link: Link, request: Request) -> None:
        subscription.asked = False
        if self.wanted.get(name) is not subscription:
            return
        if request.error is None:
            subscription.confirmed = link.connection is not None
            self._tell(name)
        else:
            self._fail(name, request.error)

    def _fail(self, name: str, error: Exception) -> None:
        if isinstance(error, self._topology.passing):
            self._topology.follow(error)
        elif isinstance(error, redis.exceptions.ResponseError):
            self._refused(name, error)

    def _tell(self, name: str) -> None:
        if self._confirmed is not None:
            self._confirmed(name)

    async def restore(self, link: Link, connection: Connection) -> None:
        """Subscribe to all that is wanted there, on a new connection."""
        wanted = {name: one for name, one in self.wanted.items() if one.link is link}
        requests = [(name, connection.submit(self._subscribe, name)) for name in wanted]
        await connection.execute("PING")  # they are answered when this is
        for name, request in requests:
            if request.error is not None:
                self._fail(name, request.error)
            elif name not in self.wanted:
                connection.submit(self._unsubscribe, name)  # given up meanwhile
            else:
                wanted[name].confirmed = True

    def restored(self, link: Link) -> None:
        """A connection on which all was restored is in use."""
        for name, subscription in tuple(self.wanted.items()):
            if subscription.link is link:
                if subscription.confirmed:
                    self._tell(name)
                else:
                    self.ask(name)  # wanted while others were being restored

    def move(self) -> None:
        """Slots have other owners: go there."""
        for name in tuple(self.wanted):
            self._renew(name)  # the server that it was at has ended it, or is not listened to any more
            self.ask(name)

    def dropped(self, name: str) -> None:
        """The server ended a subscription: its slot has moved away."""
        subscription = self.wanted.get(name)
        if subscription is not None:
            subscription.confirmed = False
            self.ask(name)  # and hear where it is now

    def lost(self, link: Link) -> None:
        """The connection was lost, and with it what it had confirmed."""
        for subscription in self.wanted.values():
            if subscription.link is link:
                subscription.confirmed = False
