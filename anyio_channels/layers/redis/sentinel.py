"""A primary found and followed through Redis Sentinel.

Rules (https://redis.io/docs/latest/develop/reference/sentinel-clients/):
- all sentinels are asked for the primary's address at each connection, at the same time; one that does not answer costs no
  time as long as another does.
- the server found must say that it is a primary. If it does not, or cannot be reached, the sentinels are asked again, and an
  answer that differs is preferred: a sentinel may lag behind the others.
- one connection to one of the sentinels listens for ``+switch-master``, so that nobody waits for a time-out.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import redis.exceptions
from anyio import create_task_group
from anyio.abc import ByteStream

from .connection import Connection
from .endpoint import Endpoint, Host, parse_host, parse_url_options
from .link import Link

__all__ = ["Sentinels", "is_sentinel", "parse_sentinel"]

_SCHEMES: Final = ("redis+sentinel", "rediss+sentinel")
_HOST: Final = re.compile(r"(?:\[([^\]]+)\]|([^:\[\]@]+))(?::(\d{1,5}))?")
_DEFAULT_PORT: Final = 26379
_SWITCH_WORDS: Final = 5
_ASK_SECONDS: Final = 1.0
"""How long one sentinel may take to answer."""


class Sentinels:
    """Some sentinels and the primary that they watch under one name."""

    def __init__(self, sentinels: Sequence[Endpoint], master_name: str, primary: Endpoint) -> None:
        """``primary``: how to log in there; its address is what the sentinels say."""
        self.sentinels: list[Endpoint] = list(sentinels)
        self.master_name: str = master_name
        self.primary: Endpoint = primary
        self.timeout: float | None = primary.timeout
        self.connect_timeout: float | None = primary.connect_timeout
        self._found: Endpoint | None = None
        self._doubted: tuple[str, int] | None = None
        self._turn = 0
        self._question = ("SENTINEL", "GET-MASTER-ADDR-BY-NAME", master_name)

    @property
    def name(self) -> str:
        """How errors call the primary: by its name, and its address as last heard."""
        return self.name_at(None if self._found is None else (self._found.host, self._found.port))

    def name_at(self, address: tuple[str, int] | None) -> str:
        """How errors call the primary when it is at ``address``."""
        where = ", ".join(f"{one.host}:{one.port}" for one in self.sentinels)
        found = "" if address is None else f" at {address[0]}:{address[1]}"
        return f"Redis {self.master_name!r}{found} (Sentinel at {where})"

    async def connect(self) -> ByteStream:
        """Ask for the primary and open a stream to it."""
        host, port = await self._ask()
        found = replace(self.primary, host=host, port=port)
        stream: ByteStream | None = None
        try:
            stream = await found.connect()
        finally:
            self._found = found  # at last, for another link may connect at the same time
            if stream is None:
                self._doubted = (host, port)
        return stream

    async def shake_hands(self, connection: Connection) -> float:
        """Log in, as at any server, and see that it is a primary."""
        found = self._found or self.primary
        server_time = await found.shake_hands(connection)
        if not connection.is_primary:
            self._doubted = (found.host, found.port)
            raise redis.exceptions.ConnectionError(f"{self.name} is no primary at the moment")
        self._doubted = None
        return server_time

    async def _ask(self) -> tuple[str, int]:
        answers: list[tuple[str, int]] = []
        troubles: list[str] = []

        async def ask(sentinel: Endpoint) -> None:
            try:
                answer = _address(await sentinel.ask(*self._question, timeout=_ASK_SECONDS))
            except (OSError, redis.exceptions.RedisError) as error:
                troubles.append(f"{sentinel.host}:{sentinel.port}: {str(error) or 'it did not answer in time'}")
                return
            answers.append(answer)
            if answer != self._doubted:
                asking.cancel_scope.cancel()

        async with create_task_group() as asking:
            for sentinel in self.sentinels:
                asking.start_soon(ask, sentinel)
        if not answers:
            raise redis.exceptions.ConnectionError(
                f"no sentinel told where {self.master_name!r} is: {'; '.join(troubles)}"
            )
        return answers[-1]

    # Following

    def watch(self, switched: Callable[[str], object], *, timeout: float, connect_timeout: float) -> Link:
        """Return the link that calls ``switched`` with ``name_at`` of the primary when that may be new, not running."""

        def hear(push: list[Any]) -> None:
            said = push[-1].split() if push[:2] == [b"message", b"+switch-master"] else []
            if said[:1] == [self.master_name.encode()] and len(said) == _SWITCH_WORDS and said[4].isdigit():
                switched(self.name_at((said[3].decode(), int(said[4]))))

        async def listen(connection: Connection) -> None:
            await connection.execute("SUBSCRIBE", "+switch-master")
            # It may have been said while nobody listened.
            switched(self.name_at(_address(await connection.execute(*self._question))))

        return Link(
            _AnySentinel(self),
            timeout=timeout,
            connect_timeout=connect_timeout,
            restore=listen,
            on_up=lambda _: None,
            on_push=hear,
        )

    def next_sentinel(self) -> Endpoint:
        """Return one after the other, over and over."""
        self._turn += 1
        return self.sentinels[self._turn % len(self.sentinels)]


class _AnySentinel:
    """Whichever sentinel can be reached."""

    timeout = None
    connect_timeout = None

    def __init__(self, sentinels: Sentinels) -> None:
        self._sentinels = sentinels
        self._one = sentinels.sentinels[0]

    @property
    def name(self) -> str:
        return f"Sentinel at {self._one.host}:{self._one.port}"

    async def connect(self) -> ByteStream:
        self._one = self._sentinels.next_sentinel()
        return await self._one.connect()

    async def shake_hands(self, connection: Connection) -> float:
        await connection.execute(*await self._one.greeting())
        return time.time()


def _address(reply: Any) -> tuple[str, int]:
    """Return what GET-MASTER-ADDR-BY-NAME said."""
    if reply is None:
        raise redis.exceptions.ConnectionError("it knows no such primary")
    return reply[0].decode(), int(reply[1])


def is_sentinel(host: Host) -> bool:
    """Whether an entry of ``hosts`` names sentinels."""
    if isinstance(host, Mapping):
        if "sentinels" in host or "master_name" in host:
            return True
        host = host.get("address", "")
    return isinstance(host, str) and host.partition("://")[0] in _SCHEMES


def parse_sentinel(host: Host) -> Sentinels:
    """Return the sentinels that an entry of ``hosts`` names, as a ``dict`` of channels_redis or a URL.

    Raises ``TypeError`` for an unknown option and ``ValueError`` for a value that cannot be.
    """
    options = dict(host) if isinstance(host, Mapping) else {"address": host}
    if "address" in options:
        options = _parse_url(options.pop("address")) | options
    found = options.pop("sentinels", None)
    master_name = options.pop("master_name", None)
    of_sentinels = options.pop("sentinel_kwargs", None) or {}
    if not isinstance(found, Sequence) or isinstance(found, str) or not found:
        raise TypeError("sentinels of a Redis host must be a list of (host, port) pairs, with one at least")
    if not isinstance(master_name, str) or not master_name:
        raise TypeError("master_name of a Redis host must be the name that the sentinels have for it (str)")
    if not isinstance(of_sentinels, Mapping):
        raise TypeError("sentinel_kwargs of a Redis host must be a dict of options for the sentinels")
    if unused := sorted({"host", "port", "path", "unix_socket_path"} & options.keys()):
        raise ValueError(f"{', '.join(unused)} of a Redis host have no effect beside sentinels, who say where it is")
    sentinels: list[Endpoint] = []
    for one in found:
        if isinstance(one, str | Mapping) or not isinstance(one, Sequence) or len(one) != 2:  # noqa: PLR2004 - host and port
            raise TypeError(f"an entry of sentinels must be a (host, port) pair, not {one!r:.100}")
        sentinels.append(parse_host({**of_sentinels, "host": one[0], "port": one[1]}))
    return Sentinels(sentinels, master_name, parse_host(options))


def _parse_url(url: Any) -> dict[str, Any]:
    scheme, _, rest = url.partition("://")
    rest, mark, query = rest.partition("?")
    login, at, place = rest.rpartition("@")
    servers, _, path = place.partition("/")
    master_name, _, db = path.partition("/")
    pairs = [pair for server in servers.split(",") if (pair := _HOST.fullmatch(server))]
    if not master_name or len(pairs) <= servers.count(",") or not re.fullmatch(r"\d*", db):
        # No part of it here: it may hold a password.
        raise ValueError(
            "a Sentinel URL is redis+sentinel://[user[:password]@]host[:port][,host[:port]...]/master_name[/db][?options]"
        )
    # The rest is as in any URL of a Redis; the host is what the sentinels will say.
    options = parse_url_options(f"{scheme.partition('+')[0]}://{login}{at}primary/{db}{mark}{query}")
    del options["host"]
    of_sentinels = {name: value for name, value in options.items() if name.startswith("ssl")}
    for name in ("username", "password"):
        if f"sentinel_{name}" in options:
            of_sentinels[name] = options.pop(f"sentinel_{name}")
    return {
        **options,
        "sentinels": [(pair[1] or pair[2], int(pair[3] or _DEFAULT_PORT)) for pair in pairs],
        "master_name": master_name,
        "sentinel_kwargs": of_sentinels,
    }
