"""Redis Cluster: which node owns a key, and how commands find their way when that changes.

Rules (https://redis.io/docs/latest/operate/oss_and_stack/reference/cluster-spec/):
- the slot of a key is computed by the ``redis`` package; CLUSTER SLOTS says which primary has it.
- MOVED and ASK are followed at once, TRYAGAIN and CLUSTERDOWN waited for; no caller sees them, as long as it lasts no longer
  than ``timeout``. A command that may have run is not sent again.
- who owns what is asked for again when a node is lost or says MOVED, until all owners can be reached.
- a node that owns nothing any more is muted before another one is listened to, so nothing is heard twice.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from typing import Any, Final, cast

import redis.exceptions
from anyio import Event, create_task_group, move_on_after, sleep
from redis.crc import key_slot

from .connection import Argument, Connection, Request
from .endpoint import Endpoint, Host, parse_host, require_hosts
from .link import Link, LinkRetired, Server
from .sentinel import Sentinels, is_sentinel
from .topology import Options, Topology

__all__ = ["Cluster"]

_SLOTS: Final = 16384
_PAUSE: Final = 0.05
_LONGEST_PAUSE: Final = 0.5
_ASK_SECONDS: Final = 1.0
_KEEP_SECONDS: Final = 10.0
"""So long a node that slots are on their way to is kept, though it owns none yet."""
_MOST_HOPS: Final = 16
_AT_THIS_NODE: Final = frozenset(
    {
        "ASKING",
        "CONFIG",
        "CLUSTER",
        "INFO",
        "PING",
        "PUBSUB",
        "SCAN",
        "SSUBSCRIBE",
        "SUBSCRIBE",
        "SUNSUBSCRIBE",
        "TIME",
        "UNSUBSCRIBE",
    }
)
"""Commands that are for one node, whoever owns what."""
_WAIT: Final = (
    redis.exceptions.ClusterDownError,
    redis.exceptions.TryAgainError,
    redis.exceptions.MasterDownError,
    redis.exceptions.ReadOnlyError,
    LinkRetired,
)

Address = tuple[str, int]


class ClusterLink(Link):
    """The way to one node, or to another one if that node says so."""

    cluster: Cluster

    async def execute(self, *command: Argument) -> Any:
        """Send ``command`` to whoever owns its key, and return the reply, as ``Link.execute`` says."""
        key = _key_of(command)
        if key is None:
            return await super().execute(*command)
        give_up = time.monotonic() + self.timeout
        link: Link = self
        hops = 0
        asking = False
        while True:
            try:
                if asking:
                    return await self._ask_there(link, key, command, give_up)
                return await Link.execute(link, *command)
            except redis.exceptions.AskError as error:
                if time.monotonic() > give_up:
                    raise
                asking = not isinstance(error, redis.exceptions.MovedError)
                link = self.cluster.target(error, link)
                self.cluster.follow(error)
                await sleep(_PAUSE if hops else 0)  # they may not agree yet
                hops += 1
            except _WAIT as error:
                if time.monotonic() > give_up:
                    raise
                self.cluster.follow(error)
                await sleep(_PAUSE)
                asking = False
                link = self.cluster.owner("", key)

    async def _ask_there(self, link: Link, key: str | bytes, command: Sequence[Argument], give_up: float) -> Any:
        """The slot is on its way to the node of ``link``, which has the key already."""
        connection: Connection | None = None
        with move_on_after(give_up - time.monotonic()):
            connection = await link.ready()
        if connection is None:
            raise link.down_error()
        connection.submit("ASKING")
        reply = await connection.execute(*command)
        if self.cluster.is_note(command[-1]):
            self.cluster.owner("", key).submit("SPUBLISH", command[-1], "")  # who listens still does so there
        return reply

    def submit(self, *command: Argument, done: Callable[[Request], object] | None = None) -> None:
        """Send ``command`` to whoever owns its key, without waiting, as ``Link.submit`` says."""
        if _key_of(command) is None:
            super().submit(*command, done=done)
            if command[0] == "SUNSUBSCRIBE" and self.connection is not None:
                self.connection.fence()
        else:
            self._submit(self, command, done, _MOST_HOPS, asking=False)

    def _submit(
        self,
        link: Link,
        command: Sequence[Argument],
        done: Callable[[Request], object] | None,
        hops: int,
        *,
        asking: bool,
    ) -> None:
        def answered(request: Request) -> None:
            error = request.error
            if isinstance(error, redis.exceptions.AskError) and hops:
                target = self.cluster.target(error, link)
                self.cluster.follow(error)
                is_ask = not isinstance(error, redis.exceptions.MovedError)
                self._submit(target, command, done, hops - 1, asking=is_ask)
            elif done is not None:
                done(request)

        if asking and link.connection is not None:
            link.connection.submit("ASKING")
        Link.submit(link, *command, done=answered)


class Cluster(Topology):
    """The nodes of a Redis Cluster."""

    link_class: type[Link] = ClusterLink
    clustered: bool = True
    passing: tuple[type[redis.exceptions.RedisError], ...] = (*_WAIT, redis.exceptions.MovedError)

    def __init__(self, hosts: Sequence[Host] | None) -> None:
        """``hosts``: some of the nodes, with what it takes to log in, which is the same at all of them."""
        self._first: list[Endpoint] = []
        for host in require_hosts(hosts):
            if is_sentinel(host):
                raise ValueError("a Redis Cluster needs no sentinels: hosts names some of its nodes")
            endpoint = parse_host(host)
            if endpoint.path is not None:
                raise ValueError(f"a node of a Redis Cluster is reached by host and port, not at {endpoint.path!r}")
            if endpoint.db:
                raise ValueError(f"a Redis Cluster has only database 0, not {endpoint.db}")
            self._first.append(endpoint)
        self.endpoints: list[Endpoint | Sentinels] = [*self._first]
        self.links: list[Link] = []
        self.is_note: Callable[[object], bool] = lambda _: False

    @property
    def name(self) -> str:
        """How ``repr`` calls the cluster: by the nodes that were named."""
        return "Redis Cluster at " + ", ".join(f"{one.host}:{one.port}" for one in self._first)

    async def open(
        self,
        make_link: Callable[[Server], Link],
        serve: Callable[[Link], object],
        changed: Callable[[set[int], set[int]], object],
        options: Options,
    ) -> None:
        """Ask the first nodes who owns what, and make the links, not running."""
        self._make_link = make_link
        self._serve: Callable[[Link], object] = lambda _: None
        self._changed: Callable[[set[int], set[int]], object] = lambda _, __: None
        self._by_address: dict[Address, Link] = {}
        self._owners: list[Link | None] = [None] * _SLOTS
        self._bell = Event()
        self._leaving: list[Link] = []
        self._turn = 0
        self._moved_at: dict[int, float] = {}
        self._kept_until: dict[Link, float] = {}
        self.links = []
        error: Exception = redis.exceptions.ConnectionError(f"{self.name} did not answer in time")
        self._keep_alive = options.keep_alive
        with move_on_after(options.connect_timeout):
            while not self.links:
                try:
                    self._apply(await self._ask_first())
                except redis.exceptions.RedisError as caught:
                    error = caught
                    if isinstance(caught, redis.exceptions.ResponseError | redis.exceptions.AuthenticationError):
                        break  # a wrong password, or no cluster
                    await sleep(_PAUSE)
        if not self.links:
            raise error
        self._serve = serve
        self._changed = changed

    def owner(self, name: str, key: str | bytes) -> Link:  # noqa: ARG002 - a cluster goes by the key
        """Return the link to the node that owns ``key``."""
        return self.owner_of_slot(_slot(key))

    def key_at(self, link: Link, key: str) -> str | None:
        """Return a key that begins with ``key`` and that the node of ``link`` owns, if one is found soon."""
        tries = (f"{key}:{{{number}}}" for number in range(32 * len(self.links)))
        return next((one for one in tries if self._owners[_slot(one)] is link), None)

    def link_to(self, address: Address) -> Link:
        """Find or make the link to the node at ``address``."""
        link = self._by_address.get(address)
        if link is None:
            host, port = address
            link = self._by_address[address] = self._make_link(replace(self._first[0], host=host, port=port))
            cast("ClusterLink", link).cluster = self
            link.on_trouble = self.refresh_soon
            self.links.append(link)
            self._serve(link)
        return link

    def target(self, error: redis.exceptions.AskError, link: Link) -> Link:
        """Return the link to the node that ``error``, said by the node of ``link``, names; without a host, it is the same."""
        target = self.link_to((error.host or cast("Endpoint", link.endpoint).host, error.port))
        if not isinstance(error, redis.exceptions.MovedError):
            self._kept_until[target] = time.monotonic() + _KEEP_SECONDS
        return target

    def follow(self, error: redis.exceptions.RedisError) -> None:
        """A node said MOVED: another one owns that slot now, and perhaps more; or it cannot serve it now."""
        if not isinstance(error, redis.exceptions.AskError) or isinstance(error, redis.exceptions.MovedError):
            self.refresh_soon()
        if isinstance(error, redis.exceptions.MovedError):
            now = time.monotonic()
            if now - self._moved_at.get(error.slot_id, -1.0) > _PAUSE:  # nodes that disagree send one back and forth
                self._moved_at[error.slot_id] = now
                self._assign({error.slot_id: self.target(error, self.owner_of_slot(error.slot_id))})

    def owner_of_slot(self, slot: int) -> Link:
        """Return the link to the node that owns ``slot``."""
        return self._owners[slot] or self.links[0]

    def refresh_soon(self) -> None:
        """Ask who owns what."""
        self._bell.set()

    async def run(self) -> None:
        """Follow changes until cancelled."""
        async with create_task_group() as tasks:
            while True:
                with move_on_after(self._keep_alive):
                    await self._bell.wait()  # and now and then, for not every change is heard of
                pause = _PAUSE
                while True:
                    self._bell = Event()
                    with suppress(redis.exceptions.RedisError):
                        self._apply(await self._ask())
                    leaving, self._leaving = self._leaving, []
                    for link in leaving:
                        tasks.start_soon(link.retire)
                    if all(link.connection is not None for link in self.links):
                        self._moved_at.clear()
                        break
                    await sleep(pause)
                    pause = min(2 * pause, _LONGEST_PAUSE)

    # The inside

    async def _ask(self) -> list[Any]:
        """Return what CLUSTER SLOTS says, and the host that said so; from a node that we have a connection to, if any answers."""
        self._turn += 1
        turn = self._turn % len(self.links)
        for link in self.links[turn:] + self.links[:turn]:
            if link.connection is not None:
                with suppress(redis.exceptions.RedisError), move_on_after(_ASK_SECONDS):
                    table = await link.connection.execute("CLUSTER", "SLOTS")
                    if table:
                        return [cast("Endpoint", link.endpoint).host, table]
        return await self._ask_first()

    async def _ask_first(self) -> list[Any]:
        """As ``_ask``, from the nodes that were named: all at the same time, the first answer counts."""
        answers: list[list[Any]] = []
        errors: list[redis.exceptions.RedisError] = []

        async def ask(endpoint: Endpoint) -> None:
            try:
                answers.append([endpoint.host, await _ask_node(endpoint)])
                asking.cancel_scope.cancel()
            except OSError as caught:
                why = str(caught) or "it did not answer in time"
                errors.append(redis.exceptions.ConnectionError(f"{endpoint.name} cannot be reached: {why}"))
            except redis.exceptions.RedisError as caught:
                errors.append(caught)

        async with create_task_group() as asking:
            for endpoint in self._first:
                asking.start_soon(ask, endpoint)
        if not answers:
            raise errors[-1]
        return answers[0]

    def _apply(self, answer: list[Any]) -> None:
        """Take over what CLUSTER SLOTS said."""
        its_host, table = answer
        found: dict[int, Link] = {}
        for first, last, (host, port, *_), *_ in table:
            # A node that does not know its own address leaves it out.
            link = self.link_to(((host or b"").decode() or its_host, port))
            found.update(dict.fromkeys(range(first, last + 1), link))
        now = time.monotonic()
        self._kept_until = {link: until for link, until in self._kept_until.items() if until > now}
        used = {*found.values(), *self._kept_until}
        self._leaving += [link for link in self.links if link not in used]
        self.links = [link for link in self.links if link in used]
        for link in self._leaving:
            link.on_trouble = None
            if link.connection is not None:
                link.connection.mute()
        self._by_address = {address: link for address, link in self._by_address.items() if link in used}
        self._assign(found)

    def _assign(self, found: dict[int, Link]) -> None:
        moved: set[int] = set()
        lost: set[int] = set()
        for slot, link in found.items():
            before = self._owners[slot]
            if before is not link:
                self._owners[slot] = link
                if before is not None:
                    moved.add(slot)
                    if before not in self.links or before.connection is None:
                        lost.add(slot)
        self._changed(moved, lost)


async def _ask_node(endpoint: Endpoint) -> Any:
    table = await endpoint.ask("CLUSTER", "SLOTS", timeout=_ASK_SECONDS)
    if not table:
        raise redis.exceptions.ClusterDownError(f"{endpoint.name}: no node of the cluster owns a slot")
    return table


def _key_of(command: Sequence[Argument]) -> str | bytes | None:
    """Return the key that says where ``command`` belongs, if one does."""
    if command[0] in _AT_THIS_NODE:
        return None
    key = command[3] if command[0] in {"EVAL", "EVALSHA"} else command[1]
    return key if isinstance(key, bytes) else str(key)


@lru_cache(maxsize=65536)
def _slot(key: str | bytes) -> int:
    slot: int = key_slot(key.encode() if isinstance(key, str) else key)
    return slot
