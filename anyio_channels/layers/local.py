"""The channels and groups that one process holds: what the layers with mailboxes of their own share.

Rules:
- a channel is listed while anything is in it, waits at it or lists it in a group, and may be listed a little longer: idle
  channels are dropped when due in the expiry index, or when their number has doubled.
- a channel knows its groups and a group its channels, so nobody scans. An open inbox's memberships do not expire.
- all methods are to be called with the lock of the mailroom held, unless they say otherwise.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Final

from anyio_channels.exceptions import MessagesLost

from .base import Message, OnGap, Overflow
from .expiry import Expirable
from .mailbox import Gap, Mailbox, Mailroom, Waiter

__all__ = ["Channel", "Directory", "Group"]

_SLACK: Final = 1024


class Channel(Mailbox[Any]):
    """A mailbox with a name that can be a member of groups."""

    __slots__ = ("directory", "dropped", "groups", "name", "on_gap", "owned")

    def __init__(
        self,
        directory: Directory,
        name: str,
        capacity: int,
        *,
        owned: bool = False,
        overflow: Overflow = "drop_new",
        on_gap: OnGap = "ignore",
    ) -> None:
        """``owned``: by an open inbox, with the options of ``subscribe()``."""
        super().__init__(
            directory.room,
            capacity,
            owned=owned,
            drop_old=overflow == "drop_old",
            track_gaps=on_gap != "ignore",
        )
        self.directory: Directory = directory
        self.name: str = name
        self.owned: bool = owned
        self.dropped: bool = False  # it was idle, and whoever has just found it looks again
        self.on_gap: OnGap = on_gap
        self.groups: set[Group] | None = None

    @property
    def idle(self) -> bool:
        """Whether nothing is in here, nobody waits, no inbox owns it and no group lists it."""
        return not (self.owned or self.groups) and super().idle

    def expired_unread(self) -> None:
        """The reader is gone, unless it is an inbox's."""
        if not self.owned:
            self.leave_all()

    def fall_due(self, now: float, rung: list[Waiter]) -> float | None:
        """Drop what has expired, and the channel itself if nothing is left of it."""
        due = super().fall_due(now, rung)
        if self.idle and not self.closed:
            self.directory.forget(self)
        return due

    def gap_message(self, gap: Gap) -> Message:
        """Return what the reader gets in the place of ``gap``, or raise ``MessagesLost``, as the inbox was told."""
        if self.on_gap == "raise":
            raise MessagesLost(gap.missed)
        return {"type": "channel_layer.gap", "missed": gap.missed}

    def leave_all(self) -> None:
        """End all memberships."""
        for group in tuple(self.groups or ()):
            group.discard(self)


class Group(Expirable):
    """The members of a group, and when the memberships that can expire do."""

    __slots__ = ("directory", "expiries", "members", "name")

    def __init__(self, directory: Directory, name: str) -> None:
        """Start without members."""
        self.directory: Directory = directory
        self.name: str = name
        self.members: dict[str, Channel] = {}
        # The earliest first: joining again moves to the end. A plain dict is slow to give its first key after many deletions.
        self.expiries: OrderedDict[str, float] = OrderedDict()
        self.listed = False

    @property
    def dead(self) -> bool:
        """Whether no membership here can expire."""
        return not self.expiries

    def add(self, channel: Channel, expires_at: float | None) -> None:
        """Make ``channel`` a member until then, or until it is discarded."""
        name = channel.name
        if name not in self.members:
            self.directory.members += 1
            self.members[name] = channel
            if channel.groups is None:
                channel.groups = set()
            channel.groups.add(self)
        elif name not in self.expiries:
            return  # an inbox's membership, which does not expire
        self.expiries.pop(name, None)
        if expires_at is not None:
            self.expiries[name] = expires_at

    def discard(self, channel: Channel) -> None:
        """End the membership of ``channel``; the last one ends the group."""
        if self.members.pop(channel.name, None) is not None:
            self.directory.members -= 1
            self.expiries.pop(channel.name, None)
            (channel.groups or set()).discard(self)
            if not self.members:
                self.directory.end_group(self)

    def fall_due(self, now: float, rung: list[Waiter]) -> float | None:  # noqa: ARG002 - nobody waits for a group
        """End the memberships that have expired."""
        while self.expiries:
            name, expires_at = next(iter(self.expiries.items()))
            if expires_at > now:
                return expires_at
            self.discard(self.members[name])
        return None

    def deliver(self, entry: tuple[float, Any], exclude: frozenset[str], now: float, rung: list[Waiter]) -> int:
        """Put ``entry`` into the channel of every member but ``exclude``; return how many of them were full."""
        missed = 0
        for channel in self.present(now, rung):
            if channel.name not in exclude and not channel.put(entry, now, rung):
                channel.miss(rung)
                missed += 1
        return missed

    def present(self, now: float, rung: list[Waiter]) -> list[Channel]:
        """The members as they are now: without those whose membership expired, or on whom a message expired unread."""
        self.fall_due(now, rung)
        channels = list(self.members.values())
        for channel in channels:
            if channel.has_expired(now):
                break
        else:
            return channels
        for channel in channels:
            channel.expire(now, rung)
        return list(self.members.values())


class Directory:
    """All channels and groups of one layer in this process, by name."""

    channel_class: type[Channel] = Channel

    def __init__(self, room: Mailroom, get_capacity: Callable[[str], int]) -> None:
        """``get_capacity`` says how many messages a channel of that name holds."""
        self.room: Mailroom = room
        self.channels: dict[str, Channel] = {}
        self.groups: dict[str, Group] = {}
        self.members: int = 0
        self.inboxes: int = 0
        self._get_capacity = get_capacity
        self._trim_at = _SLACK
        self._forgotten = 0

    def add(self, name: str) -> Channel:
        """Make the channel ``name``, which must be valid and not be there."""
        self._trim_if_grown()
        channel = self.channels[name] = self.channel_class(self, name, self._get_capacity(name))
        return channel

    def open_inbox(self, name: str, capacity: int | None, overflow: Overflow, on_gap: OnGap) -> Channel:
        """Make the channel of an inbox."""
        self._trim_if_grown()
        self.inboxes += 1
        channel = self.channels[name] = self.channel_class(
            self,
            name,
            self._get_capacity(name) if capacity is None else capacity,
            owned=True,
            overflow=overflow,
            on_gap=on_gap,
        )
        return channel

    def close_inbox(self, name: str, rung: list[Waiter]) -> None:
        """Leave all groups and forget the channel of an inbox, if it is still there."""
        inbox = self.channels.get(name)
        if inbox is not None:
            inbox.leave_all()
            inbox.close(rung)
            self.inboxes -= 1
            self.forget(inbox)

    def join(self, group: str, member: Channel, expires_at: float | None) -> None:
        """Make ``member`` a member of ``group`` until then, or as long as its inbox."""
        target = self.groups.get(group)
        if target is None:
            target = self.groups[group] = Group(self, group)
        target.add(member, expires_at)
        if expires_at is not None and not target.listed:
            self.room.index.add(target, expires_at)

    def leave(self, group: str, channel: str) -> None:
        """End a membership, if there is one."""
        member = self.channels.get(channel)
        if member is not None and group in self.groups:
            self.groups[group].discard(member)

    def clear(self, rung: list[Waiter]) -> None:
        """Throw away all messages and memberships; who waits goes on waiting."""
        for channel in tuple(self.channels.values()):
            channel.clear(rung)
            channel.leave_all()
        self._trim()

    def close(self, rung: list[Waiter]) -> None:
        """Close and forget all channels."""
        for channel in self.channels.values():
            channel.close(rung)
        self.channels = {}
        self.groups = {}
        self.members = self.inboxes = 0
        self.room.index.clear()

    def forget(self, channel: Channel) -> None:
        """Take ``channel`` off the list."""
        channel.closed = True
        channel.dropped = not channel.owned
        del self.channels[channel.name]
        self._forgotten += 1
        if self._forgotten > len(self.channels) + _SLACK:
            self.channels = dict(self.channels)  # a dict never shrinks by itself
            self._forgotten = 0

    def end_group(self, group: Group) -> None:
        """``group`` has no members any more."""
        self.groups.pop(group.name, None)

    def _trim_if_grown(self) -> None:
        if len(self.channels) >= self._trim_at:
            self._trim()

    def _trim(self) -> None:
        for channel in tuple(self.channels.values()):
            if channel.idle:
                self.forget(channel)
        self._trim_at = 2 * len(self.channels) + _SLACK
