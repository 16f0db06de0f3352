"""The channels and groups that one process holds, by name, and who owns them.

Rules:
- a channel is listed while anything is in it, waits at it or lists it in a group, and may be listed a little longer: idle
  channels are dropped when they are due in the expiry index, or when their number has doubled.
- a channel knows its groups and a group its channels, so nobody scans.
- a process-specific channel of this process ends with its inbox, or some time after its last use: ``group_expiry``, or
  ``expiry`` if nobody can use it again that we know of. Nothing ends while somebody waits. Its memberships last as long as it
  does; those of other channels expire.
- where channels must be subscribed to (``keeps_idle``), a normal channel that nobody reads stays listed for as long, for it
  could not be read later otherwise. The names of channels and groups that end are added to ``ended``.
- all methods are to be called under the lock of the mailroom, unless they say otherwise.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from functools import partial
from math import inf
from typing import Any, Final, cast
from weakref import ref

from anyio import ClosedResourceError

from anyio_channels.contract.layer import Message, OnGap, Overflow
from anyio_channels.exceptions import MessagesLost

from .expiry import Expirable
from .mailbox import Gap, Mailbox
from .waiting import Afterwards, Mailroom, Waiter, anyone

__all__ = ["Channel", "Directory", "Group"]

_SLACK: Final = 1024


class _Name(str):
    """What ``new_channel()`` returns: a name that the layer is told of when nobody has it any more."""

    __slots__ = ("__weakref__",)

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        """Be copied as the plain name: only this one is watched."""
        return str, (str(self),)


class _Watch(ref[_Name]):
    """Sees that a name was garbage-collected."""

    __slots__ = ("channel",)

    channel: Channel


def _name_is_gone(watch: ref[_Name]) -> None:
    """Called by the garbage collector, at any moment, perhaps within a locked section."""
    cast("_Watch", watch).channel.name_is_gone()


class Channel(Mailbox[Any]):
    """A mailbox with a name that can be a member of groups."""

    __slots__ = ("attended", "deserted_until", "directory", "dropped", "groups", "name", "on_gap", "owned", "watch")

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
        self.attended: bool = not directory.keeps_idle
        """Whether messages come here by themselves, so that a reader can simply wait."""
        self.on_gap: OnGap = on_gap
        self.groups: set[Group] | None = None
        self.watch: _Watch | None = None
        self.deserted_until: float = inf
        """What ``ends_at`` was set to when the last reader was cancelled."""

    @property
    def is_timed(self) -> bool:
        """Whether it ends some time after its last use."""
        return -inf < self.life < inf

    @property
    def idle(self) -> bool:
        """Whether nothing is in here, nobody waits, nothing keeps or owns it and no group lists it."""
        return not (self.is_timed or self.owned or self.groups) and super().idle

    # Its end, if that is a matter of time

    def begin(self, now: float) -> None:
        """It is used for the first time: from now on it ends some time after its last use."""
        directory = self.directory
        self.life: float = directory.life
        self.grace: float = directory.grace
        self.ends_at: float = now + self.life
        if not self.listed:
            directory.mailroom.index.add(self, self._look_again(now))

    def use(self, now: float) -> None:
        """It is used, though not read: its time begins anew, unless somebody waits, or its end is not a matter of time."""
        if self.ends_at == inf:
            return
        if self.ends_at == self.deserted_until:
            self.ends_at = self.deserted_until = now + self.grace
        else:
            self.ends_at = now + self.life

    def reader_gave_up(self) -> None:
        """A reader took nothing and will not."""
        super().reader_gave_up()
        self.deserted_until = self.ends_at

    def name_is_gone(self) -> None:
        """Nobody has the name that ``new_channel()`` returned. Safe at any moment: the rest is for the next sweep."""
        if self.ends_at not in (inf, self.deserted_until):
            self.ends_at -= self.life - self.grace
        self.life = self.grace
        self.directory.mailroom.index.hasten(self)

    def may_be_over(self) -> None:
        """What has kept it beyond its time may be gone. Called under the lock."""
        if self.is_timed and not self.groups:
            self.directory.mailroom.index.hasten(self)

    def is_over(self, now: float) -> bool:
        """Whether its time is over. Nothing ends while somebody waits; nor does a normal channel that is in use otherwise."""
        if self.ends_at > now or anyone(self._readers):
            return False
        return "!" in self.name or not (self.groups or self.entries or anyone(self._senders))

    def reader_joins(self, rung: list[Waiter]) -> None:
        """There is nothing to wait for if it has ended."""
        if self.ends_at != inf and self.is_over(self._mailroom.clock()):
            if self.is_timed:
                self.directory.end(self, rung)
            raise ClosedResourceError(self.directory.why_ended(self.name))

    def reader_looks(self) -> None:
        """A reader found nothing and does not wait. ``ClosedResourceError`` if there will be nothing. Takes the lock itself."""
        rung: list[Waiter] = []
        try:
            with self._mailroom:
                self.reader_joins(rung)
                if self.ends_at != inf:
                    self.ends_at = self._mailroom.clock() + self.life
        finally:
            self._mailroom.wake(rung)

    def _look_again(self, now: float) -> float:
        """Return when it may have to end, whatever happens to it before."""
        if not now < self.ends_at < inf:
            return now + self.grace
        early = self.ends_at - (self.life - self.grace)  # if its name is collected
        return min(self.ends_at, early if early > now else now + self.grace)

    def fall_due(self, now: float, rung: list[Waiter]) -> float | None:
        """Drop what has expired, and the channel itself if its time is over, or nothing is left of it."""
        if self.closed:
            return None
        due = super().fall_due(now, rung)
        if self.is_timed:
            if self.is_over(now):
                self.directory.end(self, rung)
                return None
            again = self._look_again(now)
            return again if due is None else min(due, again)
        if self.idle:
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
            channel.may_be_over()
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
        """Return the members as they are now, without those whose time, or whose membership's, is over."""
        self.fall_due(now, rung)
        self.end_members(now, rung)
        return list(self.members.values())

    def end_members(self, now: float, rung: list[Waiter]) -> None:
        """End the channels whose time is over, if more has fallen due than was looked at."""
        if self.directory.mailroom.index.next_due <= now:
            for channel in tuple(self.members.values()):
                if channel.ends_at <= now:
                    channel.fall_due(now, rung)


class Directory:
    """All channels and groups of one layer in this process, by name."""

    channel_class: type[Channel] = Channel

    def __init__(
        self,
        mailroom: Mailroom,
        get_capacity: Callable[[str], int],
        *,
        mark: str,
        expiry: float,
        group_expiry: float,
        on_end: Callable[[str, int], object],
        keeps_idle: bool = False,
    ) -> None:
        """``get_capacity`` says how many messages a channel of that name holds.

        ``mark``: what the names of channels made here hold, and no others. ``on_end``: hears, without the lock, of a channel
        of ours whose time was over, and how many messages were in it.
        """
        self.mailroom: Mailroom = mailroom
        self.mark: str = mark
        self.life: float = group_expiry
        """How long a channel lasts after its last use, in seconds."""
        self.grace: float = min(expiry, group_expiry)
        """How long, if its last reader was cancelled or nobody has its name."""
        self._on_end = on_end
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
        """Make the channel ``name``, which must be valid and not be listed. One of ours has ended: nobody will read it."""
        self._trim_if_grown()
        name = str(name)  # a plain copy: whether anybody has what new_channel() returned must not depend on us
        channel = self.channels[name] = self.channel_class(self, name, self._get_capacity(name))
        if self.mark in name:
            channel.life = channel.grace = channel.ends_at = -inf
        elif self.keeps_idle:
            channel.begin(self.mailroom.clock())
        return channel

    def make(self, name: str) -> str:
        """Make a channel of ours; return its name, as the one that is watched. Takes the lock itself."""
        returned = _Name(name)
        with self.mailroom:
            self._trim_if_grown()
            channel = self.channels[name] = self.channel_class(self, name, self._get_capacity(name))
            channel.begin(self.mailroom.clock())
            channel.watch = _Watch(returned, _name_is_gone)
            channel.watch.channel = channel
        return returned

    def is_ours(self, name: str) -> bool:
        """Whether the channel ``name`` was made here."""
        return self.mark in name

    def member(self, name: str, now: float, rung: list[Waiter]) -> Channel | None:
        """Return the channel that is to join a group, if it is listed; ``ClosedResourceError`` for one of ours that has ended."""
        channel = self.channels.get(name)
        if channel is not None and channel.ends_at <= now:
            channel.fall_due(now, rung)
            channel = self.channels.get(name)
        if self.mark in name and (channel is None or channel.life == -inf):
            raise ClosedResourceError(self.why_ended(name))
        return channel

    def why_ended(self, name: str) -> str:
        """Return what whoever reads a channel of ours is told that is not there any more."""
        return (
            f"channel {name!r} has ended: its inbox was left, nobody used it for {self.life:g} s (group_expiry), or its last "
            f"receive() was cancelled or its name garbage-collected and nobody used it for {self.grace:g} s (expiry)"
        )

    def end(self, channel: Channel, rung: list[Waiter]) -> None:
        """End a channel whose time is over, with all that is in it."""
        before = self.mailroom.books.discarded
        channel.leave_all()
        channel.close(rung)
        self.forget(channel)
        if self.is_ours(channel.name):
            discarded = self.mailroom.books.discarded - before
            rung.append(Afterwards(partial(self._on_end, channel.name, discarded)))

    def find(self, name: str, *, is_any_ours: bool = False) -> Channel:
        """Find or make the channel ``name``, which must be valid, to be received from. Takes the lock itself.

        Raises ``ClosedResourceError`` for a channel of ours that has ended, and ``RuntimeError`` for one of another process,
        unless there are no others (``is_any_ours``).
        """
        with self.mailroom:
            channel = self.channels.get(name)
            if channel is not None:
                return channel
            if self.mark in name:
                raise ClosedResourceError(self.why_ended(name))
            if "!" in name and not is_any_ours:
                raise RuntimeError(
                    f"channel {name!r} belongs to another process, for its name was not made here: receive() would take the "
                    "messages of that process; send() to it, or have several processes receive from a normal channel (no '!')"
                )
            return self.add(name)

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
        channel.watch = None
        del self.channels[channel.name]
        if self.keeps_idle:
            self.ended.append((channel.name, False))
        self._forgotten += 1
        if self._forgotten > len(self.channels) + _SLACK:
            self.channels = dict(self.channels)  # a dict never shrinks by itself
            self._forgotten = 0

    # Groups

    def join(self, group: str, member: Channel, now: float) -> None:
        """Make ``member`` a member of ``group``: as long as it lasts if it is process-specific, else for ``group_expiry``."""
        expires_at: float | None = None
        if "!" not in member.name:
            expires_at = now + self.life
        elif member.life == inf and not member.owned:
            member.begin(now)
        else:
            member.use(now)
        target = self.groups.get(group)
        if target is None:
            target = self.groups[group] = Group(self, group)
        target.add(member, expires_at)
        if expires_at is not None and not target.listed:
            self.mailroom.index.add(target, expires_at)

    def join_ours(self, group: str, channel: str) -> None:
        """Make a channel of ours a member of ``group``; ``ClosedResourceError`` if it has ended. Takes the lock itself."""
        rung: list[Waiter] = []
        try:
            with self.mailroom:
                now = self.mailroom.clock()
                self.join(group, self.member(channel, now, rung) or self.add(channel), now)
        finally:
            self.mailroom.wake(rung)

    def require_living(self, channel: str) -> None:
        """Raise ``ClosedResourceError`` if ``channel``, one of ours, has ended. Takes the lock itself."""
        rung: list[Waiter] = []
        try:
            with self.mailroom:
                self.member(channel, self.mailroom.clock(), rung)
        finally:
            self.mailroom.wake(rung)

    def has_member(self, group: str, channel: str) -> bool:
        """Whether ``channel`` is a member of ``group`` here."""
        return group in self.groups and channel in self.groups[group].members

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

    def mark_outage_at(self, name: str, *, is_group: bool) -> None:
        """Mark it in the inbox with the channel ``name``, or in those in that group. Takes the lock itself."""
        rung: list[Waiter] = []
        with self.mailroom:
            touched = (
                (self.groups[name].members.values() if name in self.groups else ())
                if is_group
                else (self.channels.get(name),)
            )
            for channel in touched:
                if channel is not None and channel.track_gaps:
                    channel.mark_outage(rung)
        self.mailroom.wake(rung)

    def sweep(self, limit: float = 8, group: str | None = None) -> None:
        """Drop up to ``limit`` of the things that have expired, and all members of ``group`` that have. Takes the lock itself."""
        rung: list[Waiter] = []
        with self.mailroom:
            now = self.mailroom.clock()
            self.mailroom.index.sweep(now, rung, limit)
            if group in self.groups:
                self.groups[group].end_members(now, rung)
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
                channel.may_be_over()
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
