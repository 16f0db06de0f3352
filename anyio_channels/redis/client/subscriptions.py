"""Which Redis channels are wanted, on which server, and whether Redis confirmed it.

Rules:
- all that is wanted is subscribed to again before a new connection is used: many names in one command, and where one of
  them is forbidden, one by one, so that it does not keep the others away.
- what is given up is unsubscribed in the order in which it was decided, so Redis sees it in that order.
- only a refusal that is about a name is told to whoever wants that name. Any other is an outage: a connection on which what is
  wanted cannot be subscribed to is given up, and made anew.
- in a cluster subscriptions are sharded, and go where their slot goes; one command names only what is in one slot. A node that
  ends one by itself gave its slot away, or took it over, as in a planned failover; it is asked who has the slot now.
- what was confirmed and is not any more has lapsed: something may be missed until it is confirmed again, and that is told then.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Final

import redis.exceptions
from anyio import sleep

from .connection import Connection
from .errors import ABOUT_ONE_NAME, ConnectionLost
from .link import Link
from .protocol import Request
from .router import Router

_PAUSE: Final = 0.05
_AT_ONCE: Final = 200
"""How many names one command has at most."""


@dataclass(slots=True, eq=False)
class Subscription:
    """A Redis channel that is wanted, where, and whether Redis confirmed it on the connection that is up."""

    link: Link
    """To the server that owns it."""
    confirmed: bool = False
    asked: bool = False
    """Whether a request that nobody waits for is on its way."""
    lapsed: bool = False
    """Whether it was confirmed before, or given up by whoever waited for that: something may be missed until it is confirmed."""


class Subscriptions:
    """The subscriptions of one router's user."""

    def __init__(
        self,
        router: Router,
        on_refused: Callable[[str, Exception], object],
        on_confirmed: Callable[[str], object] = lambda _: None,
        on_resumed: Callable[[str], object] = lambda _: None,
    ) -> None:
        """``on_refused(name, error)`` hears what could not be restored, or was asked for without waiting and refused.

        ``on_confirmed(name)`` is called with each that Redis confirmed when nobody waited for it. ``on_resumed(name)`` is called
        when one that had lapsed is confirmed.
        """
        self.wanted: dict[str, Subscription] = {}
        self._router = router
        self._on_refused = on_refused
        self._on_confirmed = on_confirmed
        self._on_resumed = on_resumed
        self._subscribe = "SSUBSCRIBE" if router.clustered else "SUBSCRIBE"
        self._unsubscribe = "SUNSUBSCRIBE" if router.clustered else "UNSUBSCRIBE"
        self._at_once = 1 if router.clustered else _AT_ONCE

    def want(self, name: str) -> Subscription:
        """The Redis channel ``name`` is to be subscribed to."""
        subscription = self.wanted.get(name)
        if subscription is None:
            subscription = self.wanted[name] = Subscription(self._router.owner(name, name))
        return subscription

    def unwant(self, name: str) -> None:
        """The Redis channel ``name`` is not needed any more."""
        subscription = self.wanted.pop(name, None)
        if subscription is not None:
            subscription.link.submit(self._unsubscribe, name)

    async def confirm(self, name: str) -> None:
        """Have Redis confirm a wanted subscription, unless it has. Raises as ``Link.execute`` does.

        What Redis refuses for a while is tried again for ``timeout`` seconds, and then a ``ConnectionLost``. If cancelled, the
        subscription is wanted still, and may be confirmed or not.
        """
        give_up = time.monotonic() + self.wanted[name].link.timeout
        while (subscription := self.wanted.get(name)) is not None and not subscription.confirmed:
            link = subscription.link
            try:
                await link.execute(self._subscribe, name)
            except redis.exceptions.RedisError as error:
                is_passing = isinstance(error, self._router.passing)
                is_refusal = isinstance(error, redis.exceptions.ResponseError) and not isinstance(error, ABOUT_ONE_NAME)
                if not (is_passing or is_refusal):
                    self.wanted.get(name, subscription).lapsed = True
                    raise
                if time.monotonic() > give_up:
                    self.wanted.get(name, subscription).lapsed = True
                    if is_passing:
                        self._on_refused(name, error)
                    else:
                        self._give_up(link, error)
                    raise ConnectionLost(f"{name!r} cannot be subscribed to: {error}", may_have_run=False) from error
                if is_passing:
                    self._router.follow(error)
                await sleep(_PAUSE)
                self._renew(name)
                continue
            if self.wanted.get(name) is subscription:
                self._confirm(name, subscription)
                return

    def _confirm(self, name: str, subscription: Subscription) -> None:
        """Redis confirmed it. If the connection was lost right after, all are told that nothing is before anybody asks again."""
        subscription.confirmed = subscription.link.connection is not None
        if subscription.confirmed and subscription.lapsed:
            self.heard(subscription.link, name)

    def _renew(self, name: str) -> None:
        """Its owner may have changed: what was asked for elsewhere does not count any more."""
        owner = self._router.owner(name, name)
        before = self.wanted.get(name)
        if before is not None and owner is not before.link:
            self.wanted[name] = Subscription(owner, lapsed=before.lapsed or before.confirmed)

    def ask(self, name: str) -> None:
        """Have Redis confirm a wanted subscription, unless it has, without waiting."""
        subscription = self.wanted[name]
        if not (subscription.confirmed or subscription.asked) and subscription.link.connection is not None:
            subscription.asked = True
            subscription.link.submit(self._subscribe, name, done=partial(self._answered, name, subscription))

    def _answered(self, name: str, subscription: Subscription, request: Request) -> None:
        subscription.asked = False
        if self.wanted.get(name) is not subscription:
            return
        if request.error is None:
            self._confirm(name, subscription)
            self._on_confirmed(name)
        else:
            self._fail(name, request.error)

    def _fail(self, name: str, error: Exception) -> None:
        if isinstance(error, self._router.passing):
            self._router.follow(error)
        elif isinstance(error, ABOUT_ONE_NAME):
            self._on_refused(name, error)
        elif isinstance(error, redis.exceptions.ResponseError):
            self._give_up(self.wanted[name].link, error)

    def _give_up(self, link: Link, error: Exception) -> None:
        link.reconnect(f"it does not subscribe: {error}")

    # What happens to links and servers

    async def restore(self, link: Link, connection: Connection) -> None:
        """Subscribe to all that is wanted there, on a new connection."""
        wanted = {name: one for name, one in self.wanted.items() if one.link is link}
        refused = await self._restore(connection, wanted, self._at_once)
        if self._at_once > 1 and refused:
            refused = await self._restore(connection, {name: wanted[name] for name in refused}, 1)
        for error in refused.values():
            if not isinstance(error, (*self._router.passing, *ABOUT_ONE_NAME)):
                raise error  # the connection is not used, but made anew
        for name, error in refused.items():
            self._fail(name, error)

    async def _restore(
        self, connection: Connection, wanted: dict[str, Subscription], at_once: int
    ) -> dict[str, Exception]:
        """Subscribe to so many with one command; return those that were refused."""
        names = list(wanted)
        pieces = [names[start : start + at_once] for start in range(0, len(names), at_once)]
        requests = [connection.submit(self._subscribe, *piece) for piece in pieces]
        await connection.caught_up()
        refused: dict[str, Exception] = {}
        for piece, request in zip(pieces, requests, strict=True):
            if request.error is not None:
                refused |= dict.fromkeys(piece, request.error)
                continue
            for name in piece:
                if name in self.wanted:
                    wanted[name].confirmed = True
                else:
                    connection.submit(self._unsubscribe, name)  # given up meanwhile
        return refused

    def restored(self, link: Link) -> None:
        """A connection on which all was restored is in use."""
        for name, subscription in self._at(link):
            if subscription.confirmed:
                self._confirm(name, subscription)
                self._on_confirmed(name)
            else:
                self.ask(name)  # wanted while others were being restored

    def move(self) -> None:
        """Slots have other owners: go there."""
        for name in tuple(self.wanted):
            self._renew(name)  # the server that it was at has ended it, or is not listened to any more
            self.ask(name)

    def dropped(self, name: str) -> None:
        """The server ended a subscription: its slot has moved away, or to this server. ``move`` follows."""
        subscription = self.wanted.get(name)
        if subscription is not None:
            # Anew, for a confirmation that is on its way does not count any more.
            self.wanted[name] = Subscription(subscription.link, lapsed=True)
            self._router.changed(subscription.link)

    def heard(self, link: Link, name: str) -> None:
        """The Redis channel ``name`` is heard again; to be told of a message, too, that comes while others are being restored."""
        subscription = self.wanted.get(name)
        if subscription is not None and subscription.lapsed and subscription.link is link:
            subscription.lapsed = False
            self._on_resumed(name)

    def lost(self, link: Link) -> None:
        """The connection was lost, and with it what it had confirmed."""
        for _, subscription in self._at(link):
            subscription.lapsed = subscription.lapsed or subscription.confirmed
            subscription.confirmed = False

    def _at(self, link: Link) -> Iterable[tuple[str, Subscription]]:
        return [(name, one) for name, one in self.wanted.items() if one.link is link]
