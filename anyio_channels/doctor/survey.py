"""What Redis holds for a layer, looked at from outside: by a process that sends and receives nothing.

Rules:
- it reads only, over connections of its own: not even the key that says that a prefix is used is written.
- all servers of the layer are asked, each with pipelines; SCAN finds the keys, never KEYS.
- what a server does not tell, or must not tell this user, is ``None``: nothing is guessed.
- key names are asked of the layer and of ``keys``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, Self

import redis.exceptions
from anyio import CancelScope, Event, create_task_group

from anyio_channels.layers.base import BaseChannelLayer
from anyio_channels.redis.client import Argument, Link, LinkEvents, Request, Router, at_each, replies

from .keys import glob_escaped, group_names, keys_of, prefixes_of_groups
from .layer import RedisLayer
from .queue import RedisChannelLayer

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
        await self._router.open(LinkEvents(), layer.timeouts)
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
            await self._router.run()

    @property
    def _router(self) -> Router:
        return self.layer._router  # noqa: SLF001 - a part of the layer

    @property
    def links(self) -> list[Link]:
        """The links to all servers that there are now."""
        return list(self._router.links)

    async def require(self) -> None:
        """Wait until the servers are reached. Raises as opening the layer does: if none is, or one refuses."""
        await self._router.reached()

    async def look(self) -> Look:
        """Look at everything once. Takes time in proportion to all keys of the database."""
        parts = await at_each(self._look_at, self.links)
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
        link = self._router.owner(group, key)
        now = await link.execute("TIME", parse=replies.seconds)
        oldest = f"({now - self.layer.group_expiry!r}"
        found = await link.execute("ZRANGEBYSCORE", key, oldest, "+inf", "WITHSCORES", parse=replies.scored)
        return {
            name.decode("utf-8", "backslashreplace"): max(0.0, now - score)
            for name, score in sorted(found, key=lambda pair: (pair[1], pair[0]))
        }

    async def scan(self, link: Link, pattern: str) -> set[bytes]:
        """Return all keys of one server that match ``pattern``."""
        found: set[bytes] = set()
        cursor = 0
        while True:
            scan = ("SCAN", cursor, "MATCH", pattern, "COUNT", _AT_ONCE)
            cursor, keys = await link.execute(*scan, parse=replies.scanned)
            found.update(keys)
            if cursor == 0:
                return found

    async def erase(self) -> None:
        """Remove every key that begins with the prefix, whoever made it: for a prefix that nobody else has."""

        async def erase_there(link: Link) -> None:
            found = await self.scan(link, glob_escaped(self.layer.prefix) + "*")
            await ask_all(link, [("UNLINK", key) for key in found])

        await at_each(erase_there, self.links)

    # The inside

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
        now = await link.execute("TIME", parse=replies.seconds)
        oldest = {True: f"({now - layer.group_expiry!r}", False: f"({now - layer.expiry!r}"}
        is_group = [key.startswith(of_groups) for key in keys]
        counts = await ask_all(
            link,
            [("ZCOUNT", key, oldest[group], "+inf") for key, group in zip(keys, is_group, strict=True)],
            parse=replies.whole,
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
        found = await link.execute("PUBSUB", f"{shard}CHANNELS", parse=replies.bytes_list)
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
            command = ("PUBSUB", f"{shard}NUMSUB", *names[start : start + _AT_ONCE])
            counts |= await link.execute(*command, parse=replies.counts)
        return (
            [ChannelSeen(name.decode(), None, None, counts[name]) for name in channels if counts.get(name)],
            [
                GroupSeen(group.decode("utf-8", "replace"), None, counts[name])
                for name, group in ours.items()
                if counts.get(name)
            ],
        )


async def ask_all(
    link: Link, commands: Sequence[Sequence[Argument]], parse: Callable[[Any], Any] | None = None
) -> list[Any]:
    """Send ``commands`` in pipelines, and return the replies in their order; a refusal is in its reply's place.

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
            link.submit(*command, parse=parse, done=partial(done, number, start + len(batch), answered))
        await answered.wait()
    for answer in answers.values():
        if isinstance(answer, redis.exceptions.ConnectionError):
            raise answer
    return [answers[number] for number in range(len(commands))]


async def ask_server(link: Link) -> ServerSeen:
    """Return what a server tells of itself."""
    sections = [("INFO", section) for section in (*_SECTIONS, "commandstats")]
    at = time.monotonic()
    *answers, stats = await ask_all(link, sections, parse=replies.info)
    info: dict[str, str] = {}
    for answer in answers:
        if not isinstance(answer, Exception):
            info |= answer
    calls = {
        name.removeprefix("cmdstat_"): int(count)
        for name, text in ({} if isinstance(stats, Exception) else stats).items()
        if (count := text.partition("calls=")[2].partition(",")[0]).isdecimal()
    }
    return ServerSeen(link.name, None, at, info, calls)


def _why(error: Exception) -> str:
    """What a lost connection says of its command concerns nobody here."""
    return str(error).partition("; the command ")[0]
