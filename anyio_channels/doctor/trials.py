"""Every command and script that a layer uses, tried on one server with names that no layer has.

Rules:
- a refusal is a finding. What is behind it is tried all the same.
- everything that was tried with is removed, also if cancelled, in whatever way this user may remove it. If this process is
  killed, Redis forgets it within seconds; where that is not possible, the key is reported.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from secrets import token_hex
from typing import Any, Final, TypeAlias

import redis.exceptions
from anyio import CancelScope

from anyio_channels.redis.client import Link, Router
from anyio_channels.redis.queue.blocking import POPS_MANY
from anyio_channels.redis.queue.layer import RedisChannelLayer
from anyio_channels.redis.queue.scripts import (
    CLUSTERED,
    GIVE_BACK,
    GROUP_ADD,
    GROUP_MEMBERS,
    GROUP_SEND,
    POP,
    SEND,
    TICK,
)
from anyio_channels.redis.wire import Names, glob_escaped

from .findings import Report, what_to_do
from .survey import RedisLayer, Survey

__all__ = ["Trials"]

Trial: TypeAlias = Callable[[], Awaitable[Any]]

_TRIES: Final = 1000
"""Of this many names, each node of a cluster owns one."""
_SECONDS: Final = 10
"""How long what is tried would stay if this process were killed."""
_BRIEFLY: Final = 0.01
"""How many seconds a blocking pop that is tried may wait."""


class Trials:
    """The trials of one layer on one server."""

    def __init__(self, report: Report, survey: Survey, link: Link, name: str) -> None:
        """``name``: in all keys and Redis channels that are tried with; no one else has it."""
        self._report = report
        self._layer: RedisLayer = survey.layer
        self._names: Names = survey.names
        self._router: Router = survey.router
        self._link = link
        self._name = name
        self._keys: tuple[str, ...] = ()
        self._run = partial(partial, link.execute)
        self._call = partial(partial, link.call)

    async def run(self) -> bool:
        """Try everything, and return whether everything was allowed. Raises what makes the connection fail."""
        trials = self._of_queue() if isinstance(self._layer, RedisChannelLayer) else self._of_pubsub()
        refused: list[redis.exceptions.ResponseError] = []
        try:
            for trial in trials:
                try:
                    await trial()
                except redis.exceptions.ResponseError as error:
                    refused.append(error)
        finally:
            with CancelScope(shield=True):
                for key in self._keys:
                    await self._remove(key)
        server = self._link.name
        if refused:
            said = "; ".join(dict.fromkeys(str(error).removeprefix(f"{server}: ") for error in refused))
            self._report.add("commands", server, "wrong", said, what_to_do(refused[0]))
        else:
            found = f"all {len(trials)} calls that the layer makes are allowed and work"
            self._report.add("commands", server, "ok", found if trials else "nothing of this prefix is kept here")
        return not refused

    async def _remove(self, key: str) -> None:
        for way in (("UNLINK", key), ("DEL", key), ("PEXPIRE", key, _SECONDS * 1000), ("ZPOPMIN", key, _TRIES)):
            try:
                await self._link.execute(*way)
            except redis.exceptions.ResponseError:
                continue
            return
        advice = "delete it: this user may make keys, but neither remove them nor have them expire"
        self._report.add("keys", self._link.name, "warning", f"may be left behind: {key!r}", advice)

    def _of_queue(self) -> list[Trial]:
        names = self._names
        ways = (names.channel, names.group, lambda name: f"{names.mark}:{name}")
        found = [name for make in ways if (name := self._name_here(make))]
        if len(found) < len(ways):
            return []  # a prefix with a tag keeps everything on another node
        self._keys = tuple(found)
        key, group, mark = found
        entry = token_hex(16)
        kind = "S" if self._router.clustered else ""
        of_channel = self._on_a_node if self._router.clustered else self._on_a_server
        return [
            *of_channel(key, entry),
            *self._what_scripts_call(key, mark, entry),
            self._run("EVAL", GIVE_BACK.text, 1, key, _SECONDS, 0, entry),
            self._call(GROUP_ADD, [group], _SECONDS, self._name),
            self._call(GROUP_MEMBERS, [group], _SECONDS),
            self._run("ZREM", group, self._name),
            self._call(TICK, [mark], _SECONDS),
            self._run("UNLINK", mark),
            self._run("UNLINK", key),
            self._run("SCAN", 0, "MATCH", glob_escaped(names.prefix) + "*"),
            *self._listening(kind, names.room(key)),
        ]

    def _on_a_server(self, key: str, entry: str) -> list[Trial]:
        room = self._names.room(key)
        connection = self._link.connection
        pops_many = connection is not None and connection.version >= POPS_MANY
        many = [self._run("ZADD", key, 0, entry), self._run("BZMPOP", _BRIEFLY, 1, key, "MIN")]
        return [
            self._call(SEND, [key], entry, 10, _SECONDS),
            self._call(POP, [key, room], 1, _SECONDS, 0),
            self._call(POP, [key, room], 1, _SECONDS, 0),  # by its digest now
            self._call(GROUP_SEND, [key], _SECONDS, entry, 10, "", ""),
            self._run("BZPOPMIN", key, _BRIEFLY),
            self._run("CLIENT", "ID"),
            *(many if pops_many else []),
        ]

    def _on_a_node(self, key: str, entry: str) -> list[Trial]:
        """In a cluster no pop blocks; scripts announce what they did."""
        room = self._names.room(key)
        return [
            self._call(CLUSTERED[SEND], [key], entry, 10, _SECONDS, self._names.sent(key)),
            self._call(CLUSTERED[POP], [key], 1, _SECONDS, room),
            self._call(CLUSTERED[POP], [key], 1, _SECONDS, room),  # by its digest now
            self._run("ASKING"),
        ]

    def _what_scripts_call(self, key: str, mark: str, entry: str) -> list[Trial]:
        """Where one of these is forbidden inside a script, Redis 7.0 does not say which."""
        return [
            self._run("TIME"),
            self._run("ZADD", key, 0, entry),
            self._run("PEXPIRE", key, _SECONDS * 1000),
            self._run("ZCOUNT", key, "-inf", 0),
            self._run("ZREMRANGEBYSCORE", key, "-inf", -1),
            self._run("ZCARD", key),
            self._run("ZRANGE", key, 0, -1, "WITHSCORES"),
            self._run("ZPOPMIN", key, 1),
            self._run("EXISTS", mark),
            self._run("SET", mark, 1, "PX", _SECONDS * 1000),
        ]

    def _of_pubsub(self) -> list[Trial]:
        kind = "S" if self._router.clustered else ""
        ways = (lambda name: f"specific.{name}!", self._names.group_topic)
        names = [name for make in ways if (name := self._name_here(make))]
        tried = [trial for name in names for trial in self._listening(kind, name)]
        return [*tried, self._run("ASKING")] if self._router.clustered else tried

    def _listening(self, kind: str, name: str) -> list[Trial]:
        return [
            self._run(f"{kind}SUBSCRIBE", name),
            self._run(f"{kind}PUBLISH", name, ""),
            self._run(f"{kind}UNSUBSCRIBE", name),
        ]

    def _name_here(self, make: Callable[[str], str]) -> str | None:
        """Return a name made by ``make`` that no one else has and that this server owns, if there is one."""
        names = (make(f"{self._name}.{number}") for number in range(_TRIES))
        if not self._router.clustered:
            return next(names)
        return next((name for name in names if self._router.owner(name, name) is self._link), None)
