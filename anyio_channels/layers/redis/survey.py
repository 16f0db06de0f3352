"""What Redis holds for a layer, looked at from outside: by a process that sends and receives nothing.

Rules:
- it reads only, over connections of its own: not even the key that says that a prefix is used is written.
- all servers of the layer are asked, each with pipelines; SCAN finds the keys, never KEYS.
- what a server does not tell, or must not tell this user, is ``None``: nothing is guessed.
- key names are asked of the layer and of ``keys``.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, Self

import redis.exceptions
from anyio import CancelScope, Event, create_task_group

from anyio_channels.layers.base import BaseChannelLayer

from .connection import Argument, Connection, Request
from .keys import glob_escaped, group_names, keys_of, prefixes_of_groups
from .layer import RedisLayer
from .link import Link, Server
from .queue import RedisChannelLayer
from .topology import Topology

__all__ = ["ChannelSeen", "GroupSeen", "Look", "Rates", "ServerSeen", "Survey", "ask_all", "ask_server"]

_AT_ONCE: Final = 1000
"""How many commands are in flight at once."""
_SECTIONS: Final = ("server", "clients", "memory", "persistence", "stats", "replication", "cluster")
_COUNTED: Final = ("zadd", "zpopmin", "bzpopmin", "publish", "spublish")


@dataclass(frozen=True, slots=True)
class ChannelSeen:
    """A channel: in the queue layer a key with messages, in the pub/sub layer a Redis channel that somebody listens to."""

    name: str
    """Up to and including its ``!``, in the queue layer: all channels of a process share a key."""
    depth: int | None
    """Unexpired messages that wait in Redis. ``None`` for pub/sub, which keeps none."""
    capacity: int | None
    """How many of them the layer that asks would let in."""
    listeners: int | None
    """Connections that listen, one for each process. ``None`` for the queue layer, where Redis does not know."""


@dataclass(frozen=True, slots=True)
class GroupSeen:
    """A group."""

    name: str
    members: int | None
    """Members whose membership has not expired. ``None`` for pub/sub, where only their processes know."""
    processes: int | None
    """Processes that have a member. ``None`` for the queue layer, where Redis does not know."""


@dataclass(frozen=True, slots=True)
class ServerSeen:
    """One server, or why there is nothing of it."""

    name: str
    error: str | None
    at: float
    """When it was asked, by ``time.monotonic()``."""
    info: Mapping[str, str] = field(default_factory=dict)
    """What INFO says; empty if this user must not ask."""
    calls: Mapping[str, int] = field(default_factory=dict)
    """How often which command was called, by everybody, since the server started."""

    def number(self, name: str) -> int | None:
        """Return the whole number that INFO has under ``name``."""
        text = self.info.get(name, "")
        return int(text) if text.isdecimal() else None


@dataclass(frozen=True, slots=True)
class Rates:
    """What happened a second between two looks, on all servers together and by whomever; ``None`` where nobody can know."""

    commands: Mapping[str, float | None]
    """Calls of those commands that carry messages."""
    evicted_keys: float | None
    """Keys that a server threw away for lack of memory."""
    cut_off: float | None
    """Clients that a server disconnected because they read too slowly (newer Redis)."""


@dataclass(frozen=True, slots=True)
class Look:
    """All that was seen at one time."""

    channels: tuple[ChannelSeen, ...]
    groups: tuple[GroupSeen, ...]
    servers: tuple[ServerSeen, ...]
    foreign: int
    """Keys that look like ours and hold something else."""

    @property
    def depth(self) -> int | None:
        """Messages that wait in all channels; ``None`` for pub/sub."""
        return _sum(channel.depth for channel in self.channels)

    @property
    def members(self) -> int | None:
        """Memberships in all groups; ``None`` for pub/sub."""
        return _sum(group.members for group in self.groups)

    def rates_since(self, before: Look) -> Rates:
        """Return what happened a second since ``before``."""
        pairs = [(one, other) for one in before.servers for other in self.servers if one.name == other.name]
        return Rates(
            {name: _rate(pairs, lambda server, name=name: _calls(server, name)) for name in _COUNTED},
            _rate(pairs, lambda server: server.number("evicted_keys")),
            _rate(pairs, lambda server: server.number("client_output_buffer_limit_disconnections")),
        )


def _calls(server: ServerSeen, name: str) -> int | None:
    return server.calls.get(name, 0) if server.calls else None


def _sum(values: Any) -> int | None:
    numbers = list(values)
    return None if None in numbers else sum(numbers)


def _rate(pairs: Sequence[tuple[ServerSeen, ServerSeen]], count: Any) -> float | None:
    rate = 0.0
    for before, after in pairs:
        first, second = count(before), count(after)
        if first is None or second is None or second < first or after.at <= before.at:
            return None  # not told, or the server was restarted
        rate += (second - first) / (after.at - before.at)
    return rate if pairs else None


class Survey:
    """A reading view of the servers of one layer, which is not open; connected for as long as ``async with survey:`` runs."""

    def __init__(self, layer: RedisLayer) -> None:
        """``layer``: for its servers, its prefix and its key names."""
        self.layer: RedisLayer = layer

    async def __aenter__(self) -> Self:
        """Begin to connect; nothing is waited for.

        Raises errors of the ``redis`` package where the nodes of a cluster cannot be asked for, and ``RuntimeError`` for a
        layer that is open: it needs its connections for itself.
        """
        layer = self.layer
        if layer.is_open:
            raise RuntimeError(f"a survey takes a layer that is not open, and connects by itself; {layer!r} is open")
        await self._topology.open(self._make_link, self._serve, lambda *_: None, layer)
        # Whoever cancels all around the block may have something to remove yet, for which the connections are needed.
        self._scope = CancelScope(shield=True)
        self._tasks = create_task_group()
        await self._tasks.__aenter__()
        self._tasks.start_soon(self._live)
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close the connections."""
        self._scope.cancel()
        # The error of the block is not the task group's, which would wrap it.
        await self._tasks.__aexit__(None, None, None)

    async def _live(self) -> None:
        with self._scope:
            async with create_task_group() as tasks:
                self._runs = tasks
                for link in self.links:
                    self._serve(link)
                tasks.start_soon(self._topology.run)

    def _serve(self, link: Link) -> None:
        self._runs.start_soon(link.run)

    @property
    def _topology(self) -> Topology:
        return self.layer._topology  # noqa: SLF001 - a part of the layer

    def _make_link(self, server: Server) -> Link:
        async def restore(connection: Connection) -> None:
            """There is nothing to restore."""

        layer = self.layer
        return self._topology.link_class(
            server, timeout=layer.timeout, connect_timeout=layer.connect_timeout, restore=restore, on_up=lambda _: None
        )

    @property
    def links(self) -> list[Link]:
        """The links to all servers that there are now."""
        return list(self._topology.links)

    async def require(self) -> None:
        """Wait until the servers are reached. Raises as opening the layer does: if none is, or one refuses."""
        await self.layer._until_reached()  # noqa: SLF001 - a part of the layer

    async def look(self) -> Look:
        """Look at everything once. Takes time in proportion to all keys of the database."""
        parts = await self._at_each(self._look_at)
        return Look(
            tuple(sorted((one for part in parts for one in part.channels), key=lambda one: one.name)),
            tuple(sorted((one for part in parts for one in part.groups), key=lambda one: one.name)),
            tuple(server for part in parts for server in part.servers),
            sum(part.foreign for part in parts),
        )

    async def members(self, group: str) -> dict[str, float] | None:
        """Return the members of ``group``, each with the seconds since it joined or was renewed; ``None`` for pub/sub."""
        if not isinstance(self.layer, RedisChannelLayer):
            return None
        key = self.layer.group_key(group)
        link = self._topology.owner(group, key)
        now = _seconds(await link.execute("TIME"))
        found = await link.execute("ZRANGEBYSCORE", key, f"({now - self.layer.group_expiry!r}", "+inf", "WITHSCORES")
        # RESP3 pairs them.
        return {
            name.decode("utf-8", "backslashreplace"): max(0.0, now - score)
            for name, score in sorted(found, key=lambda pair: (pair[1], pair[0]))
        }

    async def scan(self, link: Link, pattern: str) -> set[bytes]:
        """Return all keys of one server that match ``pattern``."""
        found: set[bytes] = set()
        cursor: Any = 0
        while True:
            cursor, keys = await link.execute("SCAN", cursor, "MATCH", pattern, "COUNT", _AT_ONCE)
            found.update(keys)
            if int(cursor) == 0:
                return found

    async def erase(self) -> None:
        """Remove every key that begins with the prefix, whoever made it: for a prefix that nobody else has."""

        async def erase_there(link: Link) -> None:
            found = await self.scan(link, glob_escaped(self.layer.prefix) + "*")
            await ask_all(link, [("UNLINK", key) for key in found])

        await self._at_each(erase_there)

    # The inside

    async def _at_each(self, call: Any) -> list[Any]:
        """Return what ``call`` returns for each link, in their order; they run at the same time."""
        results: dict[int, Any] = {}
        errors: list[Exception] = []
        links = self.links

        async def run(number: int, link: Link) -> None:
            try:
                results[number] = await call(link)
            except redis.exceptions.RedisError as error:
                errors.append(error)

        async with create_task_group() as tasks:
            for number, link in enumerate(links):
                tasks.start_soon(run, number, link)
        if errors:
            raise errors[0]
        return [results[number] for number in range(len(links))]

    async def _look_at(self, link: Link) -> Look:
        at = time.monotonic()
        if link.connection is None:
            return Look((), (), (ServerSeen(link.name, _why(link.down_error()), at),), 0)
        try:
            server = await ask_server(link)
            if isinstance(self.layer, RedisChannelLayer):
                channels, groups, foreign = await self._queues(link, self.layer)
            else:
                channels, groups = await self._subscriptions(link)
                foreign = 0
        except redis.exceptions.RedisError as error:
            return Look((), (), (ServerSeen(link.name, _why(error), at),), 0)
        return Look(tuple(channels), tuple(groups), (server,), foreign)

    async def _queues(self, link: Link, layer: RedisChannelLayer) -> tuple[list[ChannelSeen], list[GroupSeen], int]:
        start = layer.prefix.encode()
        of_groups = layer.group_key("").encode()
        keys = sorted(keys_of(start, await self.scan(link, glob_escaped(layer.prefix) + "*")))
        now = _seconds(await link.execute("TIME"))
        oldest = {True: f"({now - layer.group_expiry!r}", False: f"({now - layer.expiry!r}"}
        is_group = [key.startswith(of_groups) for key in keys]
        counts = await ask_all(
            link, [("ZCOUNT", key, oldest[group], "+inf") for key, group in zip(keys, is_group, strict=True)]
        )
        channels: list[ChannelSeen] = []
        groups: list[GroupSeen] = []
        foreign = 0
        for key, group, count in zip(keys, is_group, counts, strict=True):
            name = key[len(of_groups if group else start) :].decode("utf-8", "replace")
            is_ours = (BaseChannelLayer.group_name_regex if group else BaseChannelLayer.channel_name_regex).fullmatch(
                name
            )
            if is_ours is None or isinstance(count, Exception):
                foreign += 1
            elif count and group:
                groups.append(GroupSeen(name, count, None))
            elif count:
                channels.append(ChannelSeen(name, count, layer.get_capacity(name), None))
        return channels, groups, foreign

    async def _subscriptions(self, link: Link) -> tuple[list[ChannelSeen], list[GroupSeen]]:
        shard = "SHARD" if self.layer.cluster else ""
        found = await link.execute("PUBSUB", f"{shard}CHANNELS")
        ours = group_names(self.layer.prefix.encode(), found)
        others = [name for name in found if name not in ours]
        channels = [
            name
            for name in others
            if not prefixes_of_groups([name])
            and BaseChannelLayer.channel_name_regex.fullmatch(name.decode("utf-8", "replace"))
        ]
        names = [*ours, *channels]
        counts: dict[bytes, int] = {}
        for start in range(0, len(names), _AT_ONCE):
            counts |= _paired(await link.execute("PUBSUB", f"{shard}NUMSUB", *names[start : start + _AT_ONCE]))
        return (
            [ChannelSeen(name.decode(), None, None, counts[name]) for name in channels if counts[name]],
            [
                GroupSeen(group.decode("utf-8", "replace"), None, counts[name])
                for name, group in ours.items()
                if counts[name]
            ],
        )


async def ask_all(link: Link, commands: Sequence[Sequence[Argument]]) -> list[Any]:
    """Send ``commands`` in pipelines, and return the replies in their order; a refusal stands in its place.

    Raises ``ConnectionLost`` if the connection was lost meanwhile.
    """
    answers: dict[int, Any] = {}
    for start in range(0, len(commands), _AT_ONCE):
        batch = commands[start : start + _AT_ONCE]
        answered = Event()

        def done(number: int, last: int, answered: Event, request: Request) -> None:
            answers[number] = request.reply if request.error is None else request.error
            if len(answers) == last:
                answered.set()

        for number, command in enumerate(batch, start):
            link.submit(*command, done=partial(done, number, start + len(batch), answered))
        await answered.wait()
    for answer in answers.values():
        if isinstance(answer, redis.exceptions.ConnectionError):
            raise answer
    return [answers[number] for number in range(len(commands))]


async def ask_server(link: Link) -> ServerSeen:
    """Return what a server tells of itself."""
    sections = [("INFO", section) for section in (*_SECTIONS, "commandstats")]
    at = time.monotonic()
    *answers, stats = await ask_all(link, sections)
    info: dict[str, str] = {}
    for answer in answers:
        if not isinstance(answer, Exception):
            info |= _lines(answer)
    calls: dict[str, int] = {}
    for name, text in {} if isinstance(stats, Exception) else _lines(stats).items():
        calls[name.removeprefix("cmdstat_")] = int(text.partition("calls=")[2].partition(",")[0])
    return ServerSeen(link.name, None, at, info, calls)


def _why(error: Exception) -> str:
    """What a lost connection says of its command concerns nobody here."""
    return str(error).partition("; the command ")[0]


def _lines(answer: Any) -> dict[str, str]:
    text = answer.decode("utf-8", "replace") if isinstance(answer, bytes) else str(answer)
    pairs = (line.partition(":") for line in text.splitlines() if ":" in line and not line.startswith("#"))
    return {name: value for name, _, value in pairs}


def _seconds(reply: Any) -> float:
    return int(reply[0]) + int(reply[1]) / 1_000_000


def _paired(flat: Any) -> dict[bytes, int]:
    return {name: int(count) for name, count in zip(flat[::2], flat[1::2], strict=True)}
