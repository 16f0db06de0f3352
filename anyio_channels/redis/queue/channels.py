"""The channels of the queue layer in one process, and the state in which each receives.

Rules:
- a normal channel has a key of its own in Redis; all process-specific channels of a process share one.
- the mailbox of a normal channel has no bound of its own: what is popped for a waiting reader was counted in Redis.
- what readers do is told to ``Receiving``, which owns ``state`` and ``announced``.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Any, Final, Protocol

from anyio_channels.local.directory import Channel, Directory
from anyio_channels.local.waiting import Mailroom, Waiter

__all__ = ["QueueChannel", "QueueDirectory", "State"]

_UNBOUNDED: Final = 2**62


class State(Enum):
    """How the messages of a normal channel come."""

    IDLE = "idle"
    FETCHING = "fetching"
    BLOCKED = "blocked"


class QueueChannel(Channel):
    """A channel of this process, and how its messages come."""

    __slots__ = ("announced", "key", "normal", "senders_wait", "state")

    directory: QueueDirectory

    def __init__(self, directory: Directory, name: str, capacity: int, **options: Any) -> None:
        """Begin idle."""
        super().__init__(directory, name, capacity, **options)
        self.normal: bool = "!" not in name
        self.key: str = self.directory.key_of(name)
        self.state: State = State.IDLE
        self.announced: bool = False
        """Whether its source announced something while it was fetching."""
        self.senders_wait: bool = False
        """Whether somebody waits for room whom only the next fetch will tell: their marker was taken from Redis."""

    @property
    def idle(self) -> bool:
        """Whether nothing is in here or on its way here."""
        return self.state is State.IDLE and super().idle

    def reader_waits(self) -> None:
        """Have the messages of a normal channel fetched."""
        if self.normal and self.state is State.IDLE:
            self.directory.receiving.begin(self)

    def reader_left(self) -> None:
        """There may be something to give back."""
        if self.normal:
            self.directory.receiving.look_after(self)


class _Readers(Protocol):
    def begin(self, channel: QueueChannel) -> None: ...
    def look_after(self, channel: QueueChannel) -> None: ...


class QueueDirectory(Directory):
    """The channels of this process, and the groups that its process-specific channels are in."""

    channel_class: type[Channel] = QueueChannel
    receiving: _Readers
    """Hears of readers; to be set before there are any."""

    def __init__(
        self,
        mailroom: Mailroom,
        get_capacity: Callable[[str], int],
        key_of: Callable[[str], str],
        leave: Callable[[list[tuple[str, str]]], object],
        **options: Any,
    ) -> None:
        """``key_of``: returns the key of a channel. ``leave``: ends memberships in Redis, without waiting.

        ``options``: those of ``Directory``.
        """
        # What was popped for the reader of a normal channel has been counted in Redis.
        super().__init__(mailroom, lambda name: get_capacity(name) if "!" in name else _UNBOUNDED, **options)
        self.key_of: Callable[[str], str] = key_of
        self.leave_in_redis: Callable[[list[tuple[str, str]]], object] = leave

    def end(self, channel: Channel, rung: list[Waiter]) -> None:
        """End a channel whose time is over; its groups are told in Redis too."""
        if channel.groups:
            self.leave_in_redis([(group.name, channel.name) for group in channel.groups])
        super().end(channel, rung)
