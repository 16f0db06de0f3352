"""Which server owns a key: the one place that decides it; and the life of the links to the servers.

Rules:
- whoever has a command asks the router for the link to send it on, and does not know how many servers there are.
- several servers share the names as channels_redis has them do: by twelve bits of the CRC-32 of the name, in equal ranges.
- the router owns the tasks of its links: ``run()`` runs them all, and what they need, until it is cancelled; a link that is
  added later is started through it.
- a cluster is in ``cluster``.
"""

from __future__ import annotations

from binascii import crc32
from collections.abc import Sequence
from typing import Final

import redis.exceptions
from anyio import create_task_group, sleep, sleep_forever
from anyio.abc import TaskGroup

from .address import Address, SentinelAddress
from .at_each import try_each
from .link import Link, LinkEvents, Timeouts
from .sentinel import Sentinels
from .server import Server

_RING: Final = 4096


class Router:
    """Servers that are independent of each other, and the links to them while it is open."""

    clustered: bool = False
    """Whether it is a cluster: one key for each script, and sharded pub/sub."""
    passing: tuple[type[redis.exceptions.RedisError], ...] = ()
    """Refusals after which the owner is to be asked for again."""

    def __init__(self, addresses: Sequence[Address | SentinelAddress]) -> None:
        """``addresses``: of the servers; nothing is connected yet."""
        if len(addresses) > _RING:
            raise ValueError(f"hosts names {len(addresses)} Redis servers; {_RING} is the most")
        self.servers: list[Server] = [
            Sentinels(one) if isinstance(one, SentinelAddress) else Server(one) for one in addresses
        ]
        self._reset()

    def _reset(self) -> None:
        self.links: list[Link] = []
        """The links to the servers, one to each."""
        self.running: list[Link] = []
        """All links that run, those to sentinels among them."""
        self._tasks: TaskGroup | None = None

    @property
    def name(self) -> str:
        """The servers' names, as for ``repr``."""
        return ", ".join(server.name for server in self.servers)

    def owner(self, name: str, key: str | bytes) -> Link:  # noqa: ARG002 - a cluster goes by the key
        """Return the link to the server that owns ``name``, whose key there is ``key``."""
        links = self.links
        if len(links) == 1:
            return links[0]
        # In floating point, as theirs is: that decides who has a number on the edge between two.
        return links[int(crc32(name.encode()) % _RING / (_RING / len(links)))]

    def key_at(self, link: Link, key: str) -> str | None:  # noqa: ARG002 - any will do
        """Return ``key``, or one that begins with it and is owned by the server of ``link``, if there is one."""
        return key

    def follow(self, error: redis.exceptions.RedisError) -> None:
        """A server answered with one of ``passing``; only in a cluster."""

    def changed(self, link: Link) -> None:
        """What the server of ``link`` owns has changed, and it has not said how; only in a cluster."""

    async def open(self, events: LinkEvents, timeouts: Timeouts) -> None:
        """Make the links, not running; ``events`` hears of each.

        Raises errors of the ``redis`` package within ``connect_timeout`` seconds, where servers must be asked for others.
        """
        self._reset()
        self._events = events
        self._timeouts = timeouts
        await self._find_links()

    async def _find_links(self) -> None:
        for server in self.servers:
            self.add_link(Link(server, self._timeouts, self._events))

    def add_link(self, link: Link) -> None:
        """Use the server of ``link``, a new one."""
        self.links.append(link)
        self._events.on_new(link)
        self.start(link)

    def second_link(self, link: Link, events: LinkEvents) -> Link:
        """Return another link to the server of ``link``, not running: for commands that block there."""
        return Link(link.server, self._timeouts, events)

    async def run(self) -> None:
        """Run all links, and follow changes, until cancelled."""
        try:
            async with create_task_group() as tasks:
                self._tasks = tasks
                for link in self.links:
                    self.start(link)
                for server in self.servers:
                    if isinstance(server, Sentinels):
                        tasks.start_soon(self._watch, server)
                await self._follow_changes()
        finally:
            self._tasks = None

    def start(self, link: Link) -> None:
        """Have ``link`` run as long as ``run()`` does; before ``run()``, which starts all, this does nothing."""
        if link not in self.running and self._tasks is not None:
            self.running.append(link)
            self._tasks.start_soon(link.run)

    async def _follow_changes(self) -> None:
        """Do what must be done when servers change. These servers do not change."""
        await sleep_forever()

    async def _watch(self, sentinels: Sentinels) -> None:
        """Hear of it when there is another primary, and go there."""

        def switched(name: str) -> None:
            for link in self.running:
                if link.server is sentinels and (link.connection is None or link.connection.server != name):
                    link.reconnect("Sentinel says that there is another primary")

        watch = sentinels.watch(switched, self._timeouts)
        self.start(watch)
        while True:
            await sleep(self._timeouts.keep_alive)
            watch.submit("PING")  # whether it is answered the connection itself sees

    async def reached(self) -> None:
        """Wait until the servers are reached, or are not within ``connect_timeout`` seconds.

        Raises an error of the ``redis`` package if none can be reached, or one refuses in a way that waiting does not cure.
        """
        links = list(self.links)
        ended = await try_each(
            Link.opened, links, enough=lambda error: error is not None and any(link.refused for link in links)
        )
        errors = [error for _, error in ended if error is not None]
        if len(errors) == len(links) or any(link.refused for link in links):
            raise errors[-1]
