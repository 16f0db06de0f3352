"""Memberships in Redis: of groups, by the channels of this process.

Rules:
- the memberships of this process's own channels last as long as the channels: they are renewed every third of
  ``group_expiry``, and joined again when a connection is new, when Redis was emptied, or when this process stood still for so
  long that others may have taken it for dead. Those of other channels last for ``group_expiry``.
- an inbox that ends waits for nothing. While a server is away, what to end there is remembered, and told when it is there
  again; each costs the same, however many are waiting.
- leaving twice does no harm, so what may or may not have happened is done again.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable
from functools import partial
from typing import Final

import redis.exceptions

from anyio_channels.contract.names import is_of_this_package
from anyio_channels.local.directory import Directory
from anyio_channels.local.joins import Joins
from anyio_channels.log import MEMBERSHIP_REFUSED, said
from anyio_channels.redis.client import ABOUT_ONE_NAME, ConnectionLost, Link, Request

from .scripts import GROUP_ADD, GROUP_REMOVE
from .setup import Setup

__all__ = ["Memberships"]

_AT_ONCE: Final = 500
"""How many members one command names at most."""


class Memberships:
    """What Redis knows of the groups of this process, and what it is still to be told."""

    def __init__(self, setup: Setup, here: Directory, soon: Callable[[Callable[[], object]], object]) -> None:
        """``here``: the groups of this process. ``soon``: calls a function when no lock is held."""
        self._router = setup.router
        self._names = setup.names
        self._here = here
        self._expiry = setup.expiry
        self._group_expiry = setup.group_expiry
        self._troubles = setup.troubles
        self._soon = soon
        self._to_leave: defaultdict[Link | None, list[tuple[str, str]]] = defaultdict(list)  # None: not looked at yet
        self._renewed_at: dict[Link, float] = {}
        self._joins = Joins(here)

    def owner(self, group: str) -> Link:
        """Return the link to the server that keeps ``group``."""
        return self._router.owner(group, self._names.group(group))

    async def add(self, group: str, channel: str) -> None:
        """Make ``channel`` a member, for ``group_expiry`` seconds. If cancelled, it is a member or is not."""
        self.leave_now()  # what ended before must not end this one
        await self.owner(group).call(GROUP_ADD, [self._names.group(group)], self._group_expiry, channel)

    async def join(self, group: str, channel: str) -> None:
        """Make ``channel``, one of this process, a member for as long as it lasts.

        If it fails or is cancelled, it is a member if it was one, or if another call makes it one. Raises
        ``ClosedResourceError`` for a channel that has ended.
        """
        self._here.require_living(channel)
        with self._joins.undone_by(partial(self.leave_soon, [(group, channel)]), group, channel):
            await self.add(group, channel)
            self._here.join_ours(group, channel)

    async def discard(self, group: str, channel: str) -> None:
        """End the membership of ``channel``. If cancelled, it is a member or is not."""
        await self.owner(group).execute("ZREM", self._names.group(group), channel)

    # Leaving

    def leave_soon(self, memberships: Iterable[tuple[str, str]]) -> None:
        """End memberships, each of ``(group, channel)``, as soon as Redis is there. Callable under the lock."""
        self._to_leave[None] += memberships
        self._soon(self.leave_now)

    def leave_now(self) -> None:
        """Tell what has not been told yet."""
        for group, channel in self._to_leave.pop(None, ()):
            self._leave(self.owner(group), group, channel)

    def _leave(self, link: Link, group: str, channel: str) -> None:
        if link.connection is None:
            self._to_leave[link].append((group, channel))
        else:
            link.submit("ZREM", self._names.group(group), channel, done=partial(self._left, group, channel))

    def _left(self, group: str, channel: str, request: Request) -> None:
        error = request.error
        if isinstance(error, ConnectionLost):
            self.leave_soon([(group, channel)])  # by then its group may be elsewhere
        elif error is not None:
            self.log_refusal(request)
            if not isinstance(error, ABOUT_ONE_NAME):
                self._to_leave[None].append((group, channel))  # to be told with the next sign of life

    def remove_dead(self, group: str, channels: Collection[str]) -> None:
        """Messages expired unread in what ``channels`` share: their process is dead, and cannot leave ``group`` itself.

        Not if it is a peer's, which reads only while somebody waits. One that only stood still joins again by itself, so what
        joined since the messages were sent stays.
        """
        dead = [name for name in channels if is_of_this_package(name) and not self._here.is_ours(name)]
        for start in range(0, len(dead), _AT_ONCE):
            self.owner(group).call_soon(
                GROUP_REMOVE,
                [self._names.group(group)],
                self._expiry,
                *dead[start : start + _AT_ONCE],
                done=self.log_refusal,
            )

    def servers_changed(self) -> None:
        """Groups may have other owners: what waits for a server that is away is told where they are now."""
        waiting = [one for link in list(self._to_leave) for one in self._to_leave.pop(link)]
        self._to_leave[None] = waiting
        self.leave_now()

    # Renewing

    def up(self, link: Link) -> None:
        """A connection is new: tell what has waited, and join again."""
        for group, channel in self._to_leave.pop(link, ()):
            self._leave(self.owner(group), group, channel)
        self.renew(link)

    def is_due(self, link: Link, now: float) -> bool:
        """Whether it is time to renew at that server; ``now`` is by ``time.monotonic()``."""
        return now - self._renewed_at.get(link, -self._group_expiry) >= self._group_expiry / 3

    def renew_all(self) -> None:
        """Join again everywhere: this process stood still, and others may have taken it for dead."""
        for link in [one for one in self._router.links if one.connection is not None]:
            self.renew(link)

    def renew(self, link: Link) -> None:
        """Join the groups of our own channels at that server, again or to renew."""
        self._renewed_at[link] = time.monotonic()
        for group in tuple(self._here.groups.values()):
            if self.owner(group.name) is not link:
                continue
            names = [name for name in group.members if name not in group.expiries]
            for start in range(0, len(names), _AT_ONCE):
                link.call_soon(
                    GROUP_ADD,
                    [self._names.group(group.name)],
                    self._group_expiry,
                    *names[start : start + _AT_ONCE],
                    done=self.log_refusal,
                )

    def log_refusal(self, request: Request) -> None:
        """Log that Redis does not keep memberships."""
        if isinstance(request.error, redis.exceptions.ResponseError):
            self._troubles.note(MEMBERSHIP_REFUSED, error=said(request.error))

    def close(self) -> None:
        """Our own channels leave their groups: nobody else would end these memberships."""
        self._to_leave[None] += [
            (group.name, name)
            for group in self._here.groups.values()
            for name in group.members
            if name not in group.expiries
        ]
