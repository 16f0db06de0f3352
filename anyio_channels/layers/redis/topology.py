"""Which server owns a name: the one place that decides it.

Rules:
- a name is owned by the server of its non-local part, so that a channel, its process and what is sent to it meet there.
- the layers ask for every name, and do not know how many servers there are.
- a cluster is in ``cluster``.
- several servers share the names as channels_redis has them do: by twelve bits of the CRC-32 of the name, in equal ranges.
"""

from __future__ import annotations

from binascii import crc32
from collections.abc import Callable, Sequence
from typing import Final, Protocol

import redis.exceptions

from .endpoint import Endpoint, Host, parse_host, require_hosts
from .link import Link, Server
from .sentinel import Sentinels, is_sentinel, parse_sentinel

__all__ = ["Options", "Topology"]

_RING: Final = 4096


class Options(Protocol):
    """What a topology wants to know of its layer."""

    connect_timeout: float
    keep_alive: float


class Topology:
    """The servers of one layer, and the links to them while it is open."""

    link_class: type[Link] = Link
    clustered: bool = False
    """Whether it is a cluster: one key for each script, and sharded pub/sub."""
    passing: tuple[type[redis.exceptions.RedisError], ...] = ()
    """Refusals after which the owner is to be asked for again."""

    def __init__(self, hosts: Sequence[Host] | None) -> None:
        """Take ``hosts`` as a layer does. ``TypeError`` and ``ValueError`` for what cannot be."""
        self.endpoints: list[Endpoint | Sentinels] = [
            parse_sentinel(host) if is_sentinel(host) else parse_host(host) for host in require_hosts(hosts)
        ]
        if len(self.endpoints) > _RING:
            raise ValueError(f"hosts names {len(self.endpoints)} Redis servers; {_RING} is the most")
        self.links: list[Link] = []
        self.is_note: Callable[[object], bool] = lambda _: False
        """Whether an argument of a script is a channel on which it says what it did, in a cluster."""

    @property
    def name(self) -> str:
        """How ``repr`` calls the servers."""
        return ", ".join(endpoint.name for endpoint in self.endpoints)

    async def open(
        self,
        make_link: Callable[[Server], Link],
        serve: Callable[[Link], object],  # noqa: ARG002 - for those whose servers change
        changed: Callable[[set[int], set[int]], object],  # noqa: ARG002
        options: Options,  # noqa: ARG002
    ) -> None:
        """Make the links, not running.

        ``serve(link)`` is called with each link that is made later, ``changed(moved, lost)`` when slots have another owner,
        and which of them lost theirs. Raises errors of the ``redis`` package within ``options.connect_timeout`` seconds.
        """
        self.links = [make_link(endpoint) for endpoint in self.endpoints]

    async def run(self) -> None:
        """Follow changes until cancelled; these servers do not change."""

    def follow(self, error: redis.exceptions.RedisError) -> None:
        """A server answered with one of ``passing``; only in a cluster."""

    def key_at(self, link: Link, key: str) -> str | None:  # noqa: ARG002 - any will do
        """Return ``key``, or one that begins with it and is owned by the server of ``link``, if there is one."""
        return key

    def owner(self, name: str, key: str | bytes) -> Link:  # noqa: ARG002 - several servers go by the name
        """Return the link to the server that owns ``name``, whose key there is ``key``."""
        links = self.links
        if len(links) == 1:
            return links[0]
        # In floating point, as theirs is: that decides who has a number on the edge between two.
        return links[int(crc32(name.encode()) % _RING / (_RING / len(links)))]
