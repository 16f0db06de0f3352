"""What a survey saw: frozen snapshots, and the rates between two of them.

Rules:
- what a server does not report, or this user may not ask, is ``None``. Nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import methodcaller
from typing import Final

__all__ = ["ChannelSeen", "GroupSeen", "Look", "Rates", "ServerSeen"]

_COUNTED: Final = ("zadd", "zpopmin", "bzpopmin", "publish", "spublish")


@dataclass(frozen=True, slots=True)
class ChannelSeen:
    """A channel: in the queue layer a key with messages, in the pub/sub layer a Redis channel with subscribers."""

    name: str
    """In the queue layer up to and including its ``!``: all channels of a process share a key."""
    depth: int | None
    """Unexpired messages that wait in Redis. ``None`` for pub/sub, which keeps none."""
    capacity: int | None
    """How many of them the layer that asks would let in."""
    listeners: int | None
    """Connections that subscribe to it, one for each process. ``None`` for the queue layer, where Redis does not know."""


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
    """One server, or why it could not be asked."""

    name: str
    error: str | None
    at: float
    """When it was asked, by ``time.monotonic()``."""
    info: Mapping[str, str] = field(default_factory=dict)
    """What INFO reports; empty if this user may not ask."""
    calls: Mapping[str, int] = field(default_factory=dict)
    """How often each command was called, by all clients, since the server started."""

    def number(self, name: str) -> int | None:
        """Return the whole number that INFO has under ``name``."""
        text = self.info.get(name, "")
        return int(text) if text.isdecimal() else None

    def called(self, command: str) -> int | None:
        """Return how often ``command`` was called, if the server reports calls at all."""
        return self.calls.get(command, 0) if self.calls else None


@dataclass(frozen=True, slots=True)
class Rates:
    """What happened a second between two looks, on all servers together and by all clients; ``None`` if unknown."""

    commands: Mapping[str, float | None]
    """Calls of the commands that carry messages."""
    evicted_keys: float | None
    """Keys that a server evicted for lack of memory."""
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
            {name: _rate(pairs, methodcaller("called", name)) for name in _COUNTED},
            _rate(pairs, lambda server: server.number("evicted_keys")),
            _rate(pairs, lambda server: server.number("client_output_buffer_limit_disconnections")),
        )


def _sum(values: Iterable[int | None]) -> int | None:
    total = 0
    for value in values:
        if value is None:
            return None
        total += value
    return total


def _rate(pairs: Sequence[tuple[ServerSeen, ServerSeen]], count: Callable[[ServerSeen], int | None]) -> float | None:
    rate = 0.0
    for before, after in pairs:
        first, second = count(before), count(after)
        if first is None or second is None or second < first or after.at <= before.at:
            return None  # not reported, or the server was restarted
        rate += (second - first) / (after.at - before.at)
    return rate if pairs else None
