"""What Redis holds for a layer, seen from outside: by a process that sends and receives nothing.

Rules:
- a survey only reads, over connections of its own. It does not even write the key that marks a prefix as used.
- it asks all servers of the layer at the same time; SCAN finds the keys, never KEYS.
- a server that cannot be asked is in the look, with the reason; the others are seen all the same.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Final, Self, TypeAlias

import redis.exceptions
from anyio import AsyncContextManagerMixin, CancelScope, create_task_group

from anyio_channels.contract.names import Names as Rules
from anyio_channels.redis.client import Link, LinkEvents, Router, Timeouts, at_each, make_router, replies
from anyio_channels.redis.pubsub import RedisPubSubChannelLayer
from anyio_channels.redis.queue.layer import RedisChannelLayer
from anyio_channels.redis.wire import Names, glob_escaped, group_names, keys_of, prefixes_of_groups

from .asking import ask_all, ask_server, why
from .seen import ChannelSeen, GroupSeen, Look, ServerSeen

__all__ = ["RedisLayer", "Survey"]

RedisLayer: TypeAlias = RedisChannelLayer | RedisPubSubChannelLayer
_AT_ONCE: Final = 1000
"""How many names one PUBSUB NUMSUB has."""


class Survey(AsyncContextManagerMixin):
    """A reading view of the servers of one layer, connected for as long as ``async with survey:`` runs.

    Entering begins to connect, and waits for nothing but the nodes of a cluster. It raises errors of the ``redis`` package
    where those cannot be asked for, and ``RuntimeError`` for a layer that is open. The connections outlive a cancellation
    all around the block, so that what the block must remove can still be removed.
    """

    def __init__(self, layer: RedisLayer) -> None:
        """``layer``: for its options; it is not opened."""
        options = layer.options
        self.layer: RedisLayer = layer
        self.names: Names = Names(options.prefix)
        self.router: Router = make_router(options.hosts, cluster=options.cluster)
        """Knows the servers; not the one of the layer, which may be opened meanwhile."""

    @asynccontextmanager
    async def __asynccontextmanager__(self) -> AsyncGenerator[Self]:
        layer, options = self.layer, self.layer.options
        if layer.statistics().connections:
            raise RuntimeError(f"a survey takes a layer that is not open, and connects by itself; {layer!r} is open")
        timeouts = Timeouts(
            timeout=options.timeout, connect_timeout=options.connect_timeout, keep_alive=options.keep_alive
        )
        await self.router.open(LinkEvents(), timeouts)
        failure: Exception | None = None
        scope = CancelScope(shield=True)
        async with create_task_group() as tasks:
            tasks.start_soon(self._live, scope)
            try:
                yield self
            except Exception as error:  # noqa: BLE001 - raised below, where no group wraps it
                failure = error
            finally:
                scope.cancel()
        if failure is not None:
            raise failure

    async def _live(self, scope: CancelScope) -> None:
        with scope:
            await self.router.run()

    @property
    def links(self) -> list[Link]:
        """The links to all servers that there are now; none before the block."""
        return list(self.router.links)

    async def require(self) -> None:
        """Wait until the servers are reached. Raises as opening the layer does: if none is, or one refuses."""
        await self.router.reached()
        if isinstance(self.layer, RedisChannelLayer) and not self.router.clustered:
            there = [(one.server, one.connection) for one in self.links if one.connection is not None]
            for server, connection in there:
                server.require_alone(connection)

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
        key = self.names.group(group)
        link = self.router.owner(group, key)
        now = await link.execute("TIME", parse=replies.seconds)
        oldest = f"({now - self.layer.group_expiry!r}"
        found = await link.execute("ZRANGEBYSCORE", key, oldest, "+inf", "WITHSCORES", parse=replies.scored)
        return {
            name.decode("utf-8", "backslashreplace"): max(0.0, now - score)
            for name, score in sorted(found, key=lambda pair: (pair[1], pair[0]))
        }

    async def erase(self) -> None:
        """Remove every key that begins with the prefix, whoever made it: for a prefix that no other layer has.

        Raises what the first server that fails says, when all have been asked. If cancelled, some keys may be left.
        """

        async def erase_there(link: Link) -> None:
            found = await link.scan(glob_escaped(self.names.prefix) + "*")
            await ask_all(link, [("UNLINK", key) for key in found])

        await at_each(erase_there, self.links)

    # One server

    async def _look_at(self, link: Link) -> Look:
        at = time.monotonic()
        if link.connection is None:
            return Look((), (), (ServerSeen(link.name, why(link.down_error()), at),), 0)
        try:
            server = await ask_server(link)
            if isinstance(self.layer, RedisChannelLayer):
                channels, groups, foreign = await self._queues(link, self.layer)
            else:
                channels, groups = await self._subscriptions(link)
                foreign = 0
        except redis.exceptions.RedisError as error:
            return Look((), (), (ServerSeen(link.name, why(error), at),), 0)
        return Look(tuple(channels), tuple(groups), (server,), foreign)

    async def _queues(self, link: Link, layer: RedisChannelLayer) -> tuple[list[ChannelSeen], list[GroupSeen], int]:
        start, of_groups = self.names.prefix.encode(), self.names.group("").encode()
        keys = sorted(keys_of(start, await link.scan(glob_escaped(self.names.prefix) + "*")))
        is_group = [key.startswith(of_groups) for key in keys]
        now = await link.execute("TIME", parse=replies.seconds)
        oldest = {True: f"({now - layer.group_expiry!r}", False: f"({now - layer.expiry!r}"}
        commands = [("ZCOUNT", key, oldest[group], "+inf") for key, group in zip(keys, is_group, strict=True)]
        counts = await ask_all(link, commands, parse=replies.whole)
        channels: list[ChannelSeen] = []
        groups: list[GroupSeen] = []
        foreign = 0
        for key, group, count in zip(keys, is_group, counts, strict=True):
            name = key[len(of_groups if group else start) :].decode("utf-8", "replace")
            rule = Rules.group_name_regex if group else Rules.channel_name_regex
            if isinstance(count, Exception) or not rule.fullmatch(name):
                foreign += 1
            elif count and group:
                groups.append(GroupSeen(name, count, None))
            elif count:
                channels.append(ChannelSeen(name, count, layer.get_capacity(name), None))
        return channels, groups, foreign

    async def _subscriptions(self, link: Link) -> tuple[list[ChannelSeen], list[GroupSeen]]:
        shard = "SHARD" if self.router.clustered else ""
        found = await link.execute("PUBSUB", f"{shard}CHANNELS", parse=replies.bytes_list)
        groups = group_names(self.names.prefix.encode(), found)
        channels = [name for name in found if name not in groups and _is_channel(name)]
        names = [*groups, *channels]
        counts: dict[bytes, int] = {}
        for start in range(0, len(names), _AT_ONCE):
            command = ("PUBSUB", f"{shard}NUMSUB", *names[start : start + _AT_ONCE])
            counts |= await link.execute(*command, parse=replies.counts)
        return (
            [ChannelSeen(name.decode(), None, None, counts[name]) for name in channels if counts.get(name)],
            [
                GroupSeen(group.decode("utf-8", "replace"), None, counts[name])
                for name, group in groups.items()
                if counts.get(name)
            ],
        )


def _is_channel(name: bytes) -> bool:
    """Whether ``name`` may be the Redis channel of a channel, and is not that of a group of another prefix."""
    return not prefixes_of_groups([name]) and bool(Rules.channel_name_regex.fullmatch(name.decode("utf-8", "replace")))
