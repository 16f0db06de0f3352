"""The in-memory layer: a dict of channels and a dict of groups, under one lock.

Rules:
- every decision is in a plain function, callable from any thread; the async methods check for cancellation, call it,
  and wait only in the mailbox.
- a message is encoded once, however many members it goes to; each receiver decodes its own copy.
- a channel is in the dict while anything is in it, waits at it or lists it in a group, and may be there a little
  longer: idle channels are dropped when due in the expiry index, or when the dict has doubled.
- a channel knows its groups and a group its channels, so nobody scans. An open inbox's memberships do not expire.
- broadcasts that find members full are logged once per group and ``expiry`` seconds, and always counted.
"""

from __future__ import annotations

import logging
import math
import re
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from typing import Any, Final

from anyio import ClosedResourceError, WouldBlock

from anyio_channels.exceptions import ChannelFull, MessagesLost

from .backend import CANCELLED, thread
from .base import BaseChannelLayer, ChannelLayerStatistics, Message, OnGap, Overflow, require_seconds
from .codec import Codec
from .expiry import Expirable
from .mailbox import Books, Gap, Mailbox, Mailroom, Waiter

__all__ = ["InMemoryChannelLayer", "channel_layer"]

_logger = logging.getLogger("anyio_channels")
_SLACK: Final = 1024


class _Channel(Mailbox[bytes]):
    """A mailbox with a name that can be a member of groups."""

    __slots__ = ("dropped", "groups", "layer", "name", "on_gap", "owned")

    def __init__(
        self,
        layer: InMemoryChannelLayer,
        name: str,
        capacity: int,
        *,
        owned: bool = False,
        overflow: Overflow = "drop_new",
        on_gap: OnGap = "ignore",
    ) -> None:
        super().__init__(
            layer._room,  # noqa: SLF001 - a part of the layer
            capacity,
            owned=owned,
            drop_old=overflow == "drop_old",
            track_gaps=on_gap != "ignore",
        )
        self.layer = layer
        self.name = name
        self.owned = owned
        self.dropped = False  # it was idle, and whoever has just found it looks again
        self.on_gap = on_gap
        self.groups: set[_Group] | None = None

    @property
    def idle(self) -> bool:
        return not (self.owned or self.groups) and super().idle

    def expired_unread(self) -> None:
        if not self.owned:
            self.leave_all()

    def fall_due(self, now: float, rung: list[Waiter]) -> float | None:
        due = super().fall_due(now, rung)
        if self.idle and not self.closed:
            self.layer._forget_channel(self)  # noqa: SLF001 - a part of the layer
        return due

    def leave_all(self) -> None:
        for group in tuple(self.groups or ()):
            group.discard(self)


class _Group(Expirable):
    """The members of a group, and when the memberships that can expire do."""

    __slots__ = ("expiries", "layer", "members", "name", "quiet_until")

    def __init__(self, layer: InMemoryChannelLayer, name: str) -> None:
        self.layer = layer
        self.name = name
        self.members: dict[str, _Channel] = {}
        # The earliest first: joining again moves to the end. A plain dict is slow to give its first key after many deletions.
        self.expiries: OrderedDict[str, float] = OrderedDict()
        self.quiet_until = -math.inf
        self.listed = False

    @property
    def dead(self) -> bool:
        return not self.expiries

    def add(self, channel: _Channel, expires_at: float | None) -> None:
        name = channel.name
        if name not in self.members:
            self.layer._members += 1  # noqa: SLF001 - a part of the layer
            self.members[name] = channel
            if channel.groups is None:
                channel.groups = set()
            channel.groups.add(self)
        elif name not in self.expiries:
            return  # an inbox's membership, which does not expire
        self.expiries.pop(name, None)
        if expires_at is not None:
            self.expiries[name] = expires_at

    def discard(self, channel: _Channel) -> None:
        if self.members.pop(channel.name, None) is not None:
            self.layer._members -= 1  # noqa: SLF001 - a part of the layer
            self.expiries.pop(channel.name, None)
            (channel.groups or set()).discard(self)
            if not self.members:
                self.layer._groups.pop(self.name, None)  # noqa: SLF001 - a part of the layer

    def fall_due(self, now: float, rung: list[Waiter]) -> float | None:  # noqa: ARG002 - nobody waits for a group
        while self.expiries:
            name, expires_at = next(iter(self.expiries.items()))
            if expires_at > now:
                return expires_at
            self.discard(self.members[name])
        return None

    def deliver(self, entry: tuple[float, bytes], exclude: frozenset[str], now: float, rung: list[Waiter]) -> int:
        """Put ``entry`` into the channel of every member but ``exclude``; return how many of them were full."""
        missed = 0
        for channel in self.present(now, rung):
            if channel.name not in exclude and not channel.put(entry, now, rung):
                channel.miss(rung)
                missed += 1
        return missed

    def present(self, now: float, rung: list[Waiter]) -> list[_Channel]:
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


class InMemoryChannelLayer(BaseChannelLayer):
    """A channel layer within one process: for any number of threads and event loops, asyncio and trio at once.

    It works with and without ``async with layer:``. All methods may be called from every thread that runs an event
    loop; ``send_nowait``, ``receive_nowait``, ``group_send_nowait`` and ``statistics`` also from threads that run none.

    Expired messages are never delivered and never count. Their memory is reclaimed a few at each sending or joining call,
    in whatever channel, and all at once by ``statistics()``; there is no background task.
    """

    group_expiry: float

    def __init__(
        self,
        expiry: float = 60,
        group_expiry: float = 86400,
        capacity: int = 100,
        channel_capacity: Mapping[str | re.Pattern[str], int] | None = None,
        *,
        max_message_size: int = 4 * 1024 * 1024,
        default: Callable[[Any], Any] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Take the options of ``BaseChannelLayer``, and two of its own.

        ``group_expiry``: seconds after which a membership made by ``group_add`` ends. ``clock``: what tells the time, in
        seconds; a test gives one that it moves itself.
        """
        super().__init__(expiry, capacity, channel_capacity, max_message_size=max_message_size, default=default)
        self.group_expiry = require_seconds("group_expiry", group_expiry)
        if not callable(clock):
            raise TypeError(f"clock must be a function that returns seconds, not {clock!r}")
        self._clock = clock
        codec = Codec(self.max_message_size, self.default)
        self._encode = codec.encode
        self._decode = codec.decode
        self._room = Mailroom(clock)
        self._channels: dict[str, _Channel] = {}
        self._groups: dict[str, _Group] = {}
        self._members = 0
        self._inboxes = 0
        self._trim_at = _SLACK
        self._forgotten = 0
        self._closed = False

    def __repr__(self) -> str:
        """Say which layer it is by its options."""
        return f"<{type(self).__name__} expiry={self.expiry} capacity={self.capacity}>"

    async def open(self) -> None:
        """Open the layer again if it was closed; it is blank then, its statistics too."""
        with self._room:
            if self._closed:
                self._room.books = Books()
                self._closed = False

    async def close(self) -> None:
        """Close the layer, as ``BaseChannelLayer.close`` says."""
        await super().close()
        rung: list[Waiter] = []
        with self._room:
            self._closed = True
            for channel in self._channels.values():
                channel.close(rung)
            self._channels = {}
            self._groups = {}
            self._members = self._inboxes = 0
            self._room.index.clear()
        self._room.wake(rung)

    # Messages

    async def send(self, channel: str, message: Message, *, wait: bool = False) -> None:
        """Send ``message`` to ``channel``, as ``BaseChannelLayer.send`` says."""
        state = thread.state
        left = state.left = state.left - 1
        try:
            due = left < 0 or state.deadline() == CANCELLED
        except RuntimeError:
            due = True
        if due:
            await state.give_way()
        if not wait:
            self.send_nowait(channel, message)
            return
        data = self._encode(message)
        while True:
            target = self._get_channel(channel)
            try:
                await target.put_when_room(data, self.expiry)
            except ClosedResourceError:
                if not target.dropped:
                    raise
                # An idle channel was dropped from the dict between finding it and waiting at it.
            else:
                return

    def send_nowait(self, channel: str, message: Message) -> None:
        """Send ``message`` to ``channel``, from any thread, with or without an event loop.

        Raises what ``send`` raises.
        """
        data = self._encode(message)
        room = self._room
        rung: list[Waiter] = []
        room.lock.acquire()  # half the price of a with statement, here on the hottest path
        try:
            now = self._clock()
            if now >= room.index.next_due:
                room.index.sweep(now, rung)
            target = self._channels.get(channel) or self._add_channel(channel)
            accepted = target.put((now + self.expiry, data), now, rung)
        except TypeError:
            self.require_valid_channel_name(channel)  # an unhashable one, which the dict refuses with other words
            raise
        finally:
            room.lock.release()
            if rung or room.abandoned:
                room.wake(rung)
        if not accepted:
            raise ChannelFull(f"channel {channel!r} holds {target.capacity} unexpired messages, its capacity")

    async def receive(self, channel: str) -> Message:
        """Wait for the next message on ``channel``, as ``BaseChannelLayer.receive`` says."""
        while True:
            try:
                source = self._channels.get(channel) or self._get_channel(channel)
            except TypeError:
                source = self._get_channel(channel)  # refuses an unhashable name in the words of the rule
            if source.entries:
                state = thread.state
                left = state.left = state.left - 1
                try:
                    due = left < 0 or state.deadline() == CANCELLED
                except RuntimeError:
                    due = True
                if due:
                    await state.give_way()
                rung: list[Waiter] = []
                room = self._room
                room.lock.acquire()  # _take_nowait(), without the call
                try:
                    item = source.take_nowait(rung)
                finally:
                    room.lock.release()
                if rung or room.abandoned:
                    room.wake(rung)
            else:
                item = None
            if item is None:
                try:
                    item = await source.take()
                except ClosedResourceError:
                    if not source.dropped:
                        raise
                    # An idle channel was dropped from the dict between finding it and waiting at it.
                    continue
            return self._decode(item) if isinstance(item, bytes) else _gap_message(source, item)

    def receive_nowait(self, channel: str) -> Message:
        """Return the next message on ``channel``, from any thread, with or without an event loop.

        Raises ``anyio.WouldBlock`` when there is none, or none that is not promised to a reader who waits already, and
        what ``receive`` raises.
        """
        source = self._get_channel(channel)
        item = self._take_nowait(source)
        if item is None:
            raise WouldBlock
        return self._decode(item) if isinstance(item, bytes) else _gap_message(source, item)

    async def new_channel(self, prefix: str = "specific.") -> str:
        """Return a process-specific channel name that nobody has, starting with ``prefix``."""
        self._require_valid_prefix(prefix)
        await self._check_in()
        self._require_open()
        return _new_name(prefix)

    async def flush(self) -> None:
        """Throw away all messages and memberships, as ``BaseChannelLayer.flush`` says."""
        await self._check_in()
        rung: list[Waiter] = []
        with self._room:
            self._require_open()
            for channel in tuple(self._channels.values()):
                channel.clear(rung)
                channel.leave_all()
            self._trim()
        self._room.wake(rung)

    # Groups

    async def group_add(self, group: str, channel: str) -> None:
        """Make ``channel`` a member of ``group``, as ``BaseChannelLayer.group_add`` says."""
        await self._check_in()
        self._join(group, channel, self.group_expiry)

    async def group_discard(self, group: str, channel: str) -> None:
        """End the membership of ``channel`` in ``group``, as ``BaseChannelLayer.group_discard`` says."""
        self.require_valid_group_name(group)
        self.require_valid_channel_name(channel)
        await self._check_in()
        with self._room:
            self._require_open()
            member = self._channels.get(channel)
            if member is not None and group in self._groups:
                self._groups[group].discard(member)

    async def group_send(self, group: str, message: Message, *, exclude: Collection[str] = ()) -> None:
        """Send ``message`` to every member of ``group``, as ``BaseChannelLayer.group_send`` says."""
        members = self._groups.get(group) if group.__class__ is str else None
        await self._check_in(1 if members is None else 1 + len(members.members) // 8)
        self.group_send_nowait(group, message, exclude=exclude)

    def group_send_nowait(self, group: str, message: Message, *, exclude: Collection[str] = ()) -> None:
        """Send ``message`` to every member of ``group``, from any thread, with or without an event loop.

        Raises what ``group_send`` raises.
        """
        self.require_valid_group_name(group)
        excluded = self._require_valid_exclude(exclude)
        data = self._encode(message)
        room = self._room
        rung: list[Waiter] = []
        try:
            with room:
                self._require_open()
                now = self._clock()
                room.index.sweep(now, rung)
                target = self._groups.get(group)
                missed = 0 if target is None else target.deliver((now + self.expiry, data), excluded, now, rung)
        finally:
            room.wake(rung)
        if missed and target is not None and now >= target.quiet_until:
            target.quiet_until = now + self.expiry
            _logger.warning(
                "group %r: %d of its members were full and missed a message; in the next %s s more such are only counted",
                group,
                missed,
                self.expiry,
            )

    async def group_channels(self, group: str) -> set[str]:
        """Return the members of ``group`` as they are now."""
        self.require_valid_group_name(group)
        await self._check_in()
        rung: list[Waiter] = []
        with self._room:
            self._require_open()
            target = self._groups.get(group)
            channels = set() if target is None else {channel.name for channel in target.present(self._clock(), rung)}
        self._room.wake(rung)
        return channels

    def statistics(self) -> ChannelLayerStatistics:
        """Return a snapshot of what the layer holds and has done, from any thread; reclaims all that has expired."""
        rung: list[Waiter] = []
        room = self._room
        with room:
            room.index.sweep(self._clock(), rung, math.inf)
            books = room.books
            snapshot = ChannelLayerStatistics(
                channels=books.occupied + self._inboxes,
                buffered_messages=books.buffered,
                groups=len(self._groups),
                members=self._members,
                waiting_receivers=books.waiting_receivers,
                sent=books.sent,
                received=books.received,
                expired=books.expired,
                dropped_full=books.dropped_full,
                dropped_unreadable=0,
                discarded=books.discarded,
            )
        room.wake(rung)
        return snapshot

    # Inboxes

    async def inbox_open(self, prefix: str, capacity: int | None, overflow: Overflow, on_gap: OnGap) -> str:
        """Make the channel of an inbox."""
        await self._check_in()
        name = _new_name(prefix)
        with self._room:
            self._require_open()
            self._trim_if_grown()
            self._inboxes += 1
            self._channels[name] = _Channel(
                self,
                name,
                self.get_capacity(name) if capacity is None else capacity,
                owned=True,
                overflow=overflow,
                on_gap=on_gap,
            )
        return name

    async def inbox_close(self, channel: str, groups: Collection[str]) -> None:  # noqa: ARG002 - the channel knows them
        """Leave all groups and forget the channel, at once."""
        rung: list[Waiter] = []
        with self._room:
            inbox = self._channels.get(channel)
            if inbox is not None:
                inbox.leave_all()
                inbox.close(rung)
                self._inboxes -= 1
                self._forget_channel(inbox)
        self._room.wake(rung)

    async def inbox_join(self, channel: str, group: str) -> None:
        """Make the inbox a member of ``group`` until it leaves."""
        await self._check_in()
        self._join(group, channel, None)

    # The inside; all below are called with the lock held, unless they say otherwise

    def _take_nowait(self, source: _Channel) -> bytes | Gap | None:
        """Take what is not promised to others; without the lock."""
        room = self._room
        rung: list[Waiter] = []
        room.lock.acquire()
        try:
            item = source.take_nowait(rung)
        finally:
            room.lock.release()
        if rung or room.abandoned:
            room.wake(rung)
        return item

    def _get_channel(self, name: str) -> _Channel:
        """Find or make the channel; without the lock."""
        self.require_valid_channel_name(name)
        with self._room:
            return self._channels.get(name) or self._add_channel(name)

    def _add_channel(self, name: str) -> _Channel:
        self.require_valid_channel_name(name)
        self._require_open()
        self._trim_if_grown()
        channel = self._channels[name] = _Channel(self, name, self.get_capacity(name))
        return channel

    def _join(self, group: str, channel: str, expiry: float | None) -> None:
        """Make ``channel`` a member, for ``expiry`` seconds or as long as its inbox; without the lock."""
        self.require_valid_group_name(group)
        self.require_valid_channel_name(channel)
        rung: list[Waiter] = []
        with self._room:
            self._require_open()
            now = self._clock()
            index = self._room.index
            index.sweep(now, rung)
            member = self._channels.get(channel) or self._add_channel(channel)
            member.expire(now, rung)
            target = self._groups.get(group)
            if target is None:
                target = self._groups[group] = _Group(self, group)
            target.add(member, None if expiry is None else now + expiry)
            if expiry is not None and not target.listed:
                index.add(target, now + expiry)
        self._room.wake(rung)

    def _require_open(self) -> None:
        if self._closed:
            raise ClosedResourceError(f"{self!r} is closed; open it again with 'async with layer:'")

    def _forget_channel(self, channel: _Channel) -> None:
        channel.closed = True
        channel.dropped = not channel.owned
        del self._channels[channel.name]
        self._forgotten += 1
        if self._forgotten > len(self._channels) + _SLACK:
            self._channels = dict(self._channels)  # a dict never shrinks by itself
            self._forgotten = 0

    def _trim_if_grown(self) -> None:
        if len(self._channels) >= self._trim_at:
            self._trim()

    def _trim(self) -> None:
        for channel in tuple(self._channels.values()):
            if channel.idle:
                self._forget_channel(channel)
        self._trim_at = 2 * len(self._channels) + _SLACK


def _gap_message(source: _Channel, gap: Gap) -> Message:
    if source.on_gap == "raise":
        raise MessagesLost(gap.missed)
    return {"type": "channel_layer.gap", "missed": gap.missed}


def _new_name(prefix: str) -> str:
    return f"{prefix}inmemory!{secrets.token_hex(12)}"


channel_layer: Final = InMemoryChannelLayer()
"""A ready-made layer for applications of one process."""
