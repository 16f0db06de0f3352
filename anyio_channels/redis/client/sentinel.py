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
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import cycle
from typing import Any, Final

from anyio.abc import ByteStream

from . import replies
from .address import SentinelAddress
from .at_each import try_each
from .connection import Connection
from .errors import NO_SENTINELS, Unreachable
from .link import Link, LinkEvents, Timeouts
from .server import Server

_SWITCH_WORDS: Final = 5
_ASK_SECONDS: Final = 1.0
"""How long one sentinel may take to answer."""


class Sentinels(Server):
    """The primary that some sentinels watch under one name."""

    def __init__(self, address: SentinelAddress) -> None:
        """``address``: where the sentinels are, and how to log in at all of them, and at the primary."""
        super().__init__(address.primary)
        self.master_name: str = address.master_name
        self.servers: list[Server] = [Server(one) for one in address.sentinels]
        self._found: tuple[str, int] | None = None
        self.doubted: tuple[str, int] | None = None
        self.question: tuple[str, ...] = ("SENTINEL", "GET-MASTER-ADDR-BY-NAME", address.master_name)

    @property
    def name(self) -> str:
        """The primary's name in error messages: its own, and its address as last heard."""
        return self.name_at(self._found)

    def name_at(self, place: tuple[str, int] | None) -> str:
        """Return the primary's name in error messages while it is at ``place``."""
        where = ", ".join(f"{one.address.host}:{one.address.port}" for one in self.servers)
        found = "" if place is None else f" at {place[0]}:{place[1]}"
        return f"Redis {self.master_name!r}{found} (Sentinel at {where})"

    @property
    def cluster_advice(self) -> str:
        """What to do if the primary is a node of a cluster."""
        return NO_SENTINELS

    async def connect(self) -> ByteStream:
        """Ask for the primary and open a stream to it."""
        host, port = place = await self.find_primary()
        try:
            return await Server(replace(self.address, host=host, port=port)).connect()
        except BaseException:
            self.doubted = place
            raise
        finally:
            self._found = place  # at last, for another link may connect at the same time

    async def shake_hands(self, connection: Connection) -> float:
        """Log in, as at any server, and see that it is a primary."""
        server_time = await super().shake_hands(connection)
        self.doubted = None if connection.is_primary else self._found
        if not connection.is_primary:
            raise Unreachable(f"{self.name} is no primary at the moment")
        return server_time

    async def find_primary(self) -> tuple[str, int]:
        """Ask all sentinels; the first answer that is not in doubt counts."""

        async def ask(sentinel: Server) -> tuple[str, int]:
            return _known(await sentinel.ask(*self.question, parse=replies.address, timeout=_ASK_SECONDS))

        ended = await try_each(
            ask, self.servers, enough=lambda told: not isinstance(told, Exception) and told != self.doubted
        )
        answers = [told for _, told in ended if not isinstance(told, Exception)]
        if not answers:
            troubles = "; ".join(f"{one.address.host}:{one.address.port}: {error}" for one, error in ended)
            raise Unreachable(f"no sentinel told where {self.master_name!r} is: {troubles}")
        return answers[-1]

    # Following

    def watch(self, switched: Callable[[str], object], timeouts: Timeouts) -> Link:
        """Return the link that calls ``switched`` with ``name_at`` of the primary when that may be new, not running."""
        return Link(_AnySentinel(self.servers), timeouts, _Watch(self, switched))


class _Watch(LinkEvents):
    """Listens to one of the sentinels."""

    def __init__(self, sentinels: Sentinels, switched: Callable[[str], object]) -> None:
        self._sentinels = sentinels
        self._switched = switched

    async def restore(self, link: Link, connection: Connection) -> None:  # noqa: ARG002 - there is one
        await connection.execute("SUBSCRIBE", "+switch-master")
        # It may have been said while nobody listened.
        place = _known(await connection.execute(*self._sentinels.question, parse=replies.address))
        self._switched(self._sentinels.name_at(place))

    def on_push(self, link: Link, push: list[Any]) -> None:  # noqa: ARG002 - there is one
        words = push[-1].split() if push[:2] == [b"message", b"+switch-master"] else []
        is_ours = words[:1] == [self._sentinels.master_name.encode()]
        if is_ours and len(words) == _SWITCH_WORDS and words[4].isdigit():
            self._switched(self._sentinels.name_at((words[3].decode("utf-8", "replace"), int(words[4]))))


class _AnySentinel(Server):
    """Whichever sentinel can be reached."""

    def __init__(self, servers: Sequence[Server]) -> None:
        super().__init__(servers[0].address)
        self._turns = cycle(servers)

    @property
    def name(self) -> str:
        return f"Sentinel at {self.address.host}:{self.address.port}"

    async def connect(self) -> ByteStream:
        self.address = next(self._turns).address
        return await super().connect()

    async def shake_hands(self, connection: Connection) -> float:
        await self.log_in(connection)
        return time.time()


def _known(address: tuple[str, int] | None) -> tuple[str, int]:
    if address is None:
        raise Unreachable("it knows no such primary")
    return address
