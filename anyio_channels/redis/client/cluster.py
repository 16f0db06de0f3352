"""Redis Cluster: which node owns a key, and how commands find their way when that changes.

Rules (https://redis.io/docs/latest/operate/oss_and_stack/reference/cluster-spec/):
- the slot of a key is computed by the ``redis`` package; CLUSTER SLOTS says which primary has it.
- MOVED and ASK are followed at once, for every call. Who waits for a call also waits for what passes: TRYAGAIN, CLUSTERDOWN,
  a node that is not connected yet; no caller sees them, as long as they last no longer than ``timeout``. A command that may
  have run is not sent again.
- who owns what is asked for again when a node is lost or says MOVED, until all owners can be reached. A node whose slots have
  changed is asked itself: it knows about them before the others do.
- a node that owns nothing any more is muted before another one is listened to, so nothing is heard twice.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, Final

import redis.exceptions
from anyio import Event, move_on_after, sleep
from redis.crc import key_slot

from . import replies
from .address import Address, Host, SentinelAddress, parse_hosts
from .at_each import try_each
from .errors import MAY_SEND_AGAIN, NO_SENTINELS, Unreachable, is_refusal, to_error
from .link import Call, Link, LinkEvents, Script, Timeouts
from .protocol import Argument, Done, Parse, Request
from .router import Router
from .server import Server

_SLOTS: Final = 16384
_PAUSE: Final = 0.05
_LONGEST_PAUSE: Final = 0.5
_ASK_SECONDS: Final = 1.0
_KEEP_SECONDS: Final = 10.0
"""Keep a node that slots are migrating to for this long, even while it owns none."""
_AT_THIS_NODE: Final = frozenset(
    {
        "ASKING", "CONFIG", "CLUSTER", "INFO", "PING", "PUBSUB", "SCAN", "SSUBSCRIBE", "SUBSCRIBE", "SUNSUBSCRIBE", "TIME",
        "UNSUBSCRIBE",
    }
)  # fmt: skip
"""Commands that are for one node, whoever owns what."""


class ClusterLink(Link):
    """The way to one node, or to another one if that node says so."""

    def __init__(self, server: Server, timeouts: Timeouts, events: LinkEvents, cluster: Cluster) -> None:
        """``cluster``: knows the other nodes."""
        super().__init__(server, timeouts, events)
        self._cluster = cluster

    def send(self, call: Call, timeout: float | None = None) -> None:
        """Send ``call`` to this node."""
        if call.asking and self.connection is not None:
            self.connection.submit("ASKING")
        super().send(call, timeout)
        if call.command[0] == "SUNSUBSCRIBE" and self.connection is not None:
            self.connection.fence()

    def mend(self, call: Call) -> bool:
        """Follow a redirection; the one place that does."""
        error = call.error
        if error is None:
            if call.script is not None and call.script.announces:
                # Who listens still does so at the old node.
                self._cluster.owner("", _key_of(call.command) or "").submit("SPUBLISH", call.command[-1], "")
            return False
        if not isinstance(error, redis.exceptions.AskError) or _key_of(call.command) is None:
            return super().mend(call)
        target = self._cluster.target(error, self)
        self._cluster.follow(error)
        call.link = target
        call.asking = not isinstance(error, redis.exceptions.MovedError)
        if not call.hops or (target.connection is None and call.waits):
            return False  # whoever waits for the call waits for that too
        call.hops -= 1
        call.begin_again()
        target.send(call)
        return True

    async def see_through(
        self,
        command: Sequence[Argument],
        parse: Parse | None,
        script: Script | None = None,
        late: Done | None = None,
    ) -> Any:
        """Send ``command`` to whoever owns its key, and wait for the reply, as ``execute`` says."""
        key = _key_of(command)
        give_up = time.monotonic() + self.timeout
        link: Link = self
        asking = False
        while True:
            call = Call(command, parse, late, waits=True, asking=asking, link=link, script=script)
            try:
                return await link.send_when_up(call, give_up)
            except (redis.exceptions.AskError, *MAY_SEND_AGAIN) as error:
                if key is None or time.monotonic() > give_up:
                    raise
                link, asking = call.link, call.asking
                if not isinstance(error, redis.exceptions.AskError):
                    self._cluster.follow(error)
                    await sleep(_PAUSE)
                    link, asking = self._cluster.owner("", key), False
                else:
                    await sleep(0 if link.connection is None else _PAUSE)  # they do not agree yet

    def on_trouble(self) -> None:
        """Ask who owns what now."""
        self._cluster.refresh_soon()


class Cluster(Router):
    """The nodes of a Redis Cluster."""

    clustered: bool = True
    passing: tuple[type[redis.exceptions.RedisError], ...] = (*MAY_SEND_AGAIN, redis.exceptions.MovedError)

    def __init__(self, addresses: Sequence[Address | SentinelAddress]) -> None:
        """``addresses``: of some of the nodes, with what it takes to log in, which is the same at all of them."""
        super().__init__(addresses)
        for address in addresses:
            if isinstance(address, SentinelAddress):
                raise ValueError(NO_SENTINELS)  # noqa: TRY004
            if address.path is not None:
                raise ValueError(f"a node of a Redis Cluster is reached by host and port, not at {address.path!r}")
            if address.db:
                raise ValueError(f"a Redis Cluster has only database 0, not {address.db}")

    def _reset(self) -> None:
        super()._reset()
        self._by_address: dict[tuple[str, int], ClusterLink] = {}
        self._owners: list[Link | None] = [None] * _SLOTS
        self._bell = Event()
        self._turn = 0
        self._moved_at: dict[int, float] = {}
        self._kept_until: dict[Link, float] = {}
        self._asked: set[Link] = set()

    @property
    def name(self) -> str:
        """The cluster's name, as for ``repr``: the nodes that were named."""
        return "Redis Cluster at " + ", ".join(f"{one.address.host}:{one.address.port}" for one in self.servers)

    async def _find_links(self) -> None:
        """Ask the first nodes who owns what."""
        error: Exception = Unreachable(f"{self.name} did not answer in time{self.servers[0].advice(TimeoutError())}")
        with move_on_after(self._timeouts.connect_timeout):
            while not self.links:
                try:
                    self._apply(*await self._ask_first())
                except redis.exceptions.RedisError as caught:
                    error = caught
                    if isinstance(caught, redis.exceptions.ResponseError) or is_refusal(caught):
                        break  # a wrong password, or no cluster
                    await sleep(_PAUSE)
        if not self.links:
            raise error

    def owner(self, name: str, key: str | bytes) -> Link:  # noqa: ARG002 - a cluster goes by the key
        """Return the link to the node that owns ``key``."""
        return self.owner_of_slot(_slot(key))

    def key_at(self, link: Link, key: str) -> str | None:
        """Return a key that begins with ``key`` and that the node of ``link`` owns, if one is found soon."""
        tries = (f"{key}:{{{number}}}" for number in range(32 * len(self.links)))
        return next((one for one in tries if self._owners[_slot(one)] is link), None)

    def link_to(self, host: str, port: int) -> ClusterLink:
        """Find or make the link to the node at that address."""
        link = self._by_address.get((host, port))
        if link is None:
            server = Server(replace(self.servers[0].address, host=host, port=port))
            link = self._by_address[host, port] = ClusterLink(server, self._timeouts, self._events, self)
            self.add_link(link)
        return link

    def target(self, error: redis.exceptions.AskError, link: Link) -> Link:
        """Return the link to the node that ``error``, said by the node of ``link``, names; without a host, it is the same."""
        target = self.link_to(error.host or link.server.address.host, error.port)
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

    def changed(self, link: Link) -> None:
        """Ask the node of ``link`` who owns what it owned; ``on_moved`` is called when it has answered, if it does."""
        if link not in self._asked:
            self._asked.add(link)
            link.submit("CLUSTER", "SLOTS", parse=replies.slot_ranges, done=partial(self._told, link))

    def _told(self, link: Link, request: Request) -> None:
        self._asked.discard(link)
        table = [] if request.error is not None else request.reply
        self._apply(link.server.address.host, table, only_from=link)

    async def _follow_changes(self) -> None:
        pause = _PAUSE
        while True:
            with move_on_after(self._timeouts.keep_alive):
                await self._bell.wait()  # and now and then, for not every change is heard of
            self._bell = Event()
            with suppress(redis.exceptions.RedisError):
                self._apply(*await self._ask())
            if all(link.connection is not None for link in self.links):
                self._moved_at.clear()
            else:
                self._bell.set()
            await sleep(pause)  # what it said may be refused at once, and asked again
            pause = min(2 * pause, _LONGEST_PAUSE) if self._bell.is_set() else _PAUSE

    # The inside

    async def _ask(self) -> tuple[str, list[replies.SlotRange]]:
        """Return what CLUSTER SLOTS says, and the host that said so; from a node that we have a connection to, if any answers."""
        self._turn += 1
        turn = self._turn % len(self.links)
        for link in self.links[turn:] + self.links[:turn]:
            if link.connection is not None:
                with suppress(redis.exceptions.RedisError), move_on_after(_ASK_SECONDS):
                    table = await link.connection.execute("CLUSTER", "SLOTS", parse=replies.slot_ranges)
                    if table:
                        return link.server.address.host, table
        return await self._ask_first()

    async def _ask_first(self) -> tuple[str, list[replies.SlotRange]]:
        """As ``_ask``, from the nodes that were named: all at the same time, the first answer counts."""

        async def ask(server: Server) -> tuple[str, list[replies.SlotRange]]:
            table = await server.ask("CLUSTER", "SLOTS", parse=replies.slot_ranges, timeout=_ASK_SECONDS)
            if not table:
                raise to_error("CLUSTERDOWN no node of the cluster owns a slot", server.name)
            return server.address.host, table

        ended = await try_each(ask, self.servers, enough=lambda told: not isinstance(told, Exception))
        for _, told in ended:
            if not isinstance(told, Exception):
                return told
            error = told
        raise error

    def _apply(self, its_host: str, table: list[replies.SlotRange], *, only_from: Link | None = None) -> None:
        """Take over what CLUSTER SLOTS said, or of that, only who has what ``only_from`` owned."""
        found: dict[int, Link] = {}
        for first, last, host, port in table:
            # A node that does not know its own address leaves it out.
            slots = [slot for slot in range(first, last + 1) if only_from in (None, self._owners[slot])]
            if slots:
                found.update(dict.fromkeys(slots, self.link_to(host or its_host, port)))
        others = () if only_from is None else (link for slot, link in enumerate(self._owners) if slot not in found)
        now = time.monotonic()
        self._kept_until = {link: until for link, until in self._kept_until.items() if until > now}
        used = {*found.values(), *others, *self._kept_until}
        leaving = [link for link in self.links if link not in used]
        self.links: list[Link] = [link for link in self.links if link in used]  # anew, for some go through the old one
        for link in leaving:
            link.retire()
        self._by_address = {address: link for address, link in self._by_address.items() if link in used}
        self._assign(found)

    def _assign(self, found: dict[int, Link]) -> None:
        moved = {slot for slot, link in found.items() if self._owners[slot] not in (None, link)}
        up = {link for link in self.links if link.connection is not None}
        lost = {slot for slot in moved if self._owners[slot] not in up}
        for slot, link in found.items():
            self._owners[slot] = link
        if self._tasks is not None:
            self._events.on_moved(moved, lost)


def make_router(hosts: Sequence[Host] | None, *, cluster: bool) -> Router:
    """Return the router for ``hosts``: nodes of one cluster, or servers that are independent of each other.

    Raises ``TypeError`` for an unknown option and ``ValueError`` for a value that cannot be; nothing is connected yet.
    """
    addresses = parse_hosts(hosts)
    return Cluster(addresses) if cluster else Router(addresses)


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
