"""A primary found and followed through Redis Sentinel.

Rules (https://redis.io/docs/latest/develop/reference/sentinel-clients/):
- all sentinels are asked for the primary's address at each connection, at the same time; one that does not answer costs no
  time as long as another does.
- the server found must say that it is a primary. If it does not, or cannot be reached, the sentinels are asked again, and an
  answer that differs is preferred: a sentinel may lag behind the others.
- one connection to one of the sentinels listens for ``+switch-master``, so that nobody waits for a time-out.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

import redis.exceptions
from anyio.abc import ByteStream

from . import replies
from .address import SentinelAddress
from .at_each import try_each
from .connection import Connection
from .link import Link, LinkEvents, Timeouts
from .server import Server

__all__ = ["Sentinels"]

_SWITCH_WORDS: Final = 5
_ASK_SECONDS: Final = 1.0
"""How long one sentinel may take to answer."""


class Sentinels:
    """Some sentinels and the primary that they watch under one name."""

    def __init__(self, address: SentinelAddress) -> None:
        """``address``: where the sentinels are, and how to log in at all of them."""
        self.address: SentinelAddress = address
        self.timeout: float | None = address.primary.timeout
        self.connect_timeout: float | None = address.primary.connect_timeout
        self.servers: list[Server] = [Server(one) for one in address.sentinels]
        self._found: Server | None = None
        self.doubted: tuple[str, int] | None = None
        """Where the primary was not when it was looked for there last."""
        self._turn = 0
        self._question = ("SENTINEL", "GET-MASTER-ADDR-BY-NAME", address.master_name)

    @property
    def name(self) -> str:
        """The primary's name in error messages: its own, and its address as last heard."""
        return self.name_at(None if self._found is None else (self._found.address.host, self._found.address.port))

    def name_at(self, address: tuple[str, int] | None) -> str:
        """Return the primary's name in error messages while it is at ``address``."""
        where = ", ".join(f"{one.host}:{one.port}" for one in self.address.sentinels)
        found = "" if address is None else f" at {address[0]}:{address[1]}"
        return f"Redis {self.address.master_name!r}{found} (Sentinel at {where})"

    async def connect(self) -> ByteStream:
        """Ask for the primary and open a stream to it."""
        host, port = await self.ask()
        found = Server(replace(self.address.primary, host=host, port=port))
        stream: ByteStream | None = None
        try:
            stream = await found.connect()
        finally:
            self._found = found  # at last, for another link may connect at the same time
            if stream is None:
                self.doubted = (host, port)
        return stream

    async def shake_hands(self, connection: Connection) -> float:
        """Log in, as at any server, and see that it is a primary."""
        found = self._found or Server(self.address.primary)
        server_time = await found.shake_hands(connection)
        if not connection.is_primary:
            self.doubted = (found.address.host, found.address.port)
            raise redis.exceptions.ConnectionError(f"{self.name} is no primary at the moment")
        self.doubted = None
        return server_time

    async def ask(self) -> tuple[str, int]:
        """Ask all sentinels; the first answer that is not in doubt counts."""

        async def ask(sentinel: Server) -> tuple[str, int]:
            return _known(await sentinel.ask(*self._question, parse=replies.address, timeout=_ASK_SECONDS))

        ended = await try_each(
            ask, self.servers, enough=lambda told: not isinstance(told, Exception) and told != self.doubted
        )
        answers = [told for _, told in ended if not isinstance(told, Exception)]
        if not answers:
            troubles = (
                f"{one.address.host}:{one.address.port}: {str(error) or 'it did not answer in time'}"
                for one, error in ended
            )
            raise redis.exceptions.ConnectionError(
                f"no sentinel told where {self.address.master_name!r} is: {'; '.join(troubles)}"
            )
        return answers[-1]

    # Following

    def watch(self, switched: Callable[[str], object], timeouts: Timeouts) -> Link:
        """Return the link that calls ``switched`` with ``name_at`` of the primary when that may be new, not running."""
        return Link(_AnySentinel(self), timeouts, _Watch(self, switched))

    def next_sentinel(self) -> Server:
        """Return one after the other, over and over."""
        self._turn += 1
        return self.servers[self._turn % len(self.servers)]

    async def ask_on(self, connection: Connection) -> tuple[str, int]:
        """Ask a sentinel on a connection to it."""
        return _known(await connection.execute(*self._question, parse=replies.address))


class _Watch(LinkEvents):
    """Listens to one of the sentinels."""

    def __init__(self, sentinels: Sentinels, switched: Callable[[str], object]) -> None:
        self._sentinels = sentinels
        self._switched = switched

    async def restore(self, link: Link, connection: Connection) -> None:  # noqa: ARG002 - there is one
        await connection.execute("SUBSCRIBE", "+switch-master")
        # It may have been said while nobody listened.
        self._switched(self._sentinels.name_at(await self._sentinels.ask_on(connection)))

    def on_push(self, link: Link, push: list[Any]) -> None:  # noqa: ARG002 - there is one
        words = push[-1].split() if push[:2] == [b"message", b"+switch-master"] else []
        is_ours = words[:1] == [self._sentinels.address.master_name.encode()]
        if is_ours and len(words) == _SWITCH_WORDS and words[4].isdigit():
            self._switched(self._sentinels.name_at((words[3].decode("utf-8", "replace"), int(words[4]))))


class _AnySentinel:
    """Whichever sentinel can be reached."""

    timeout = None
    connect_timeout = None

    def __init__(self, sentinels: Sentinels) -> None:
        self._sentinels = sentinels
        self._one = sentinels.servers[0]

    @property
    def name(self) -> str:
        return f"Sentinel at {self._one.address.host}:{self._one.address.port}"

    async def connect(self) -> ByteStream:
        self._one = self._sentinels.next_sentinel()
        return await self._one.connect()

    async def shake_hands(self, connection: Connection) -> float:
        await self._one.log_in(connection)
        return time.time()


def _known(address: tuple[str, int] | None) -> tuple[str, int]:
    if address is None:
        raise redis.exceptions.ConnectionError("it knows no such primary")
    return address
