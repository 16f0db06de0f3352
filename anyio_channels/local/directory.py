"""The channels and groups that one process holds, by name, and who owns them.

Rules:
- a channel is listed while anything is in it, waits at it or lists it in a group, and may be listed a little longer: idle
  channels are dropped when they are due in the expiry index, or when their number has doubled.
- a channel knows its groups and a group its channels, so nobody scans. The memberships of an open inbox do not expire.
- where channels must be subscribed to (``keeps_idle``), an idle one stays listed until a message expires there unread: it
  could not be read later otherwise. The names of channels and groups that end are added to ``ended``.
- all methods are to be called under the lock of the mailroom, unless they say otherwise.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from math import inf
from typing import Any, Final

from anyio_channels.contract.layer import Message, OnGap, Overflow
from anyio_channels.exceptions import MessagesLost

from .expiry import Expirable
from .mailbox import Gap, Mailbox
from .waiting import Mailroom, Waiter

__all__ = ["Channel", "Directory", "Group"]

_SLACK: Final = 1024


class Channel(Mailbox[Any]):
    """A mailbox with a name that can be a member of groups."""

    __slots__ = ("attended", "directory", "dropped", "groups", "kept", "name", "on_gap", "owned")

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
            directory.mailroom,
            capacity,
            owned=owned,
            drop_old=overflow == "drop_old",
            track_gaps=on_gap != "ignore",
        )
        self.directory: Directory = directory
        self.name: str = name
        self.owned: bool = owned
        self.dropped: bool = False
        """Whether it was dropped from the list because it was idle: a reader that had just found it looks again."""
        self.kept: bool = directory.keeps_idle
        """Whether it stays listed while it is idle."""
        self.attended: bool = not directory.keeps_idle
        """Whether messages come here by themselves, so that a reader can simply wait."""
        self.on_gap: OnGap = on_gap
        self.groups: set[Group] | None = None

    @property
    def idle(self) -> bool:
        """Whether nothing is in here, nobody waits, nothing keeps or owns it and no group lists it."""
        return not (self.kept or self.owned or self.groups) and super().idle

    def reader_waits(self) -> None:
        """Somebody reads it: it stays listed where that is needed."""
        self.kept = self.directory.keeps_idle

    def expired_unread(self) -> None:
        """The reader is gone, unless it is an inbox's, whose reader is only slow."""
        if not self.owned:
            self.leave_all()
            self.kept = self.kept and bool(self.entries)

    def fall_due(self, now: float, rung: list[Waiter]) -> float | None:
        """Drop what has expired, and the channel itself if nothing is left of it."""
        due = super().fall_due(now, rung)
        if self.idle and not self.closed:
            self.directory.forget(self)
        return due

    def gap_message(self, gap: Gap) -> Message:
        """Return what the reader gets in the place of ``gap``, or raise ``MessagesLost``, as the inbox was opened."""
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
        """Return the members as they are now, without those whose membership, or whose message unread, has expired."""
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

    def __init__(self, mailroom: Mailroom, get_capacity: Callable[[str], int], *, keeps_idle: bool = False) -> None:
        """``get_capacity`` says how many messages a channel of that name holds."""
        self.mailroom: Mailroom = mailroom
        self.channels: dict[str, Channel] = {}
        self.groups: dict[str, Group] = {}
        self.members: int = 0
        self.inboxes: int = 0
        self.closed: bool = False
        self.keeps_idle: bool = keeps_idle
        self.ended: deque[tuple[str, bool]] = deque()
        """The names of channels and groups (``True``) that have ended; the keeper of subscriptions empties it."""
        self._get_capacity = get_capacity
        self._trim_at = _SLACK
        self._forgotten = 0

    # Channels

    def add(self, name: str) -> Channel:
        """Make the channel ``name``, which must be valid and not be listed."""
        self._trim_if_grown()
        channel = self.channels[name] = self.channel_class(self, name, self._get_capacity(name))
        return channel

    def find(self, name: str) -> Channel:
        """Find or make the channel ``name``, which must be valid. Takes the lock itself."""
        with self.mailroom:
            return self.channels.get(name) or self.add(name)

    def open_inbox(self, name: str, capacity: int | None, overflow: Overflow, on_gap: OnGap) -> Channel:
        """Make the channel of an inbox. Takes the lock itself."""
        with self.mailroom:
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

    def close_inbox(self, name: str) -> list[str]:
        """End the channel of an inbox, if it is still there; return the groups that it was in. Takes the lock itself."""
        rung: list[Waiter] = []
        groups: list[str] = []
        with self.mailroom:
            inbox = self.channels.get(name)
            if inbox is not None:
                groups = [group.name for group in inbox.groups or ()]
                inbox.leave_all()
                inbox.close(rung)
                self.inboxes -= inbox.owned  # not so if the layer was closed meanwhile, and opened again
                self.forget(inbox)
        self.mailroom.wake(rung)
        return groups

    def drop(self, channel: Channel) -> None:
        """End ``channel``, with all that is in it, unless a reader or an inbox has it. Takes the lock itself."""
        rung: list[Waiter] = []
        with self.mailroom:
            if not (channel.closed or channel.owned or channel.demand):
                channel.clear(rung)
                channel.leave_all()
                self.forget(channel)
        self.mailroom.wake(rung)

    def forget(self, channel: Channel) -> None:
        """Take ``channel`` off the list."""
        channel.closed = True
        channel.dropped = not channel.owned
        del self.channels[channel.name]
        if self.keeps_idle:
            self.ended.append((channel.name, False))
        self._forgotten += 1
        if self._forgotten > len(self.channels) + _SLACK:
            self.channels = dict(self.channels)  # a dict never shrinks by itself
            self._forgotten = 0

    # Groups

    def join(self, group: str, member: Channel, expires_at: float | None) -> None:
        """Make ``member`` a member of ``group`` until then, or as long as its inbox."""
        target = self.groups.get(group)
        if target is None:
            target = self.groups[group] = Group(self, group)
        target.add(member, expires_at)
        if expires_at is not None and not target.listed:
            self.mailroom.index.add(target, expires_at)

    def leave(self, group: str, channel: str) -> None:
        """End a membership, if there is one. Takes the lock itself."""
        with self.mailroom:
            member = self.channels.get(channel)
            if member is not None and group in self.groups:
                self.groups[group].discard(member)

    def members_of(self, group: str) -> set[str]:
        """Return the names of the members of ``group`` as they are now. Takes the lock itself."""
        rung: list[Waiter] = []
        with self.mailroom:
            target = self.groups.get(group)
            now = self.mailroom.clock()
            names = set() if target is None else {channel.name for channel in target.present(now, rung)}
        self.mailroom.wake(rung)
        return names

    def end_group(self, group: Group) -> None:
        """``group`` has no members any more."""
        if self.groups.pop(group.name, None) is not None and self.keeps_idle:
            self.ended.append((group.name, True))

    # All of it

    def mark_outage(self, is_touched: Callable[[Channel], bool]) -> None:
        """Mark a gap of unknown size in the inboxes that ask for gaps and are touched. Takes the lock itself."""
        rung: list[Waiter] = []
        with self.mailroom:
            for channel in self.channels.values():
                if channel.track_gaps and is_touched(channel):
                    channel.mark_outage(rung)
        self.mailroom.wake(rung)

    def sweep(self, limit: float = 8) -> None:
        """Drop up to ``limit`` of the things that have expired. Takes the lock itself."""
        rung: list[Waiter] = []
        with self.mailroom:
            self.mailroom.index.sweep(self.mailroom.clock(), rung, limit)
        self.mailroom.wake(rung)

    def figures(self, *, sweep: bool = True) -> dict[str, int]:
        """Return what ``ChannelLayerStatistics`` shows of this process. Takes the lock itself, from any thread.

        ``sweep``: drop all that has expired first.
        """
        if sweep:
            self.sweep(inf)
        with self.mailroom:
            books = self.mailroom.books
            return {
                "channels": books.occupied + self.inboxes,
                "buffered_messages": books.buffered,
                "groups": len(self.groups),
                "members": self.members,
                "waiting_receivers": books.waiting_receivers,
                "sent": books.sent,
                "received": books.received,
                "expired": books.expired,
                "dropped_full": books.dropped_full,
                "dropped_unreadable": 0,
                "discarded": books.discarded,
            }

    def clear(self) -> None:
        """Throw away all messages and memberships; who waits goes on waiting. Takes the lock itself."""
        rung: list[Waiter] = []
        with self.mailroom:
            for channel in tuple(self.channels.values()):
                channel.clear(rung)
                channel.leave_all()
            self._trim()
        self.mailroom.wake(rung)

    def close(self) -> None:
        """Close and forget all channels; who waits gets ``ClosedResourceError``. Takes the lock itself."""
        rung: list[Waiter] = []
        with self.mailroom:
            self.closed = True
            for channel in self.channels.values():
                channel.close(rung)
            self.channels = {}
            self.groups = {}
            self.members = self.inboxes = 0
            self.mailroom.index.clear()
        self.mailroom.wake(rung)

    def _trim_if_grown(self) -> None:
        if len(self.channels) >= self._trim_at:
            self._trim()

    def _trim(self) -> None:
        for channel in tuple(self.channels.values()):
            if channel.idle:
                self.forget(channel)
        self._trim_at = 2 * len(self.channels) + _SLACK
