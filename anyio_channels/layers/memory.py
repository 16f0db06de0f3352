"""The in-memory layer: a dict of channels and a dict of groups, under one lock.

Rules:
- every decision is in a plain function, callable from any thread; the async methods check for cancellation, call it,
  and wait only in the mailbox.
- a message is encoded once, however many members it goes to; each receiver decodes its own copy.
- broadcasts that find members full are always counted, and logged once per group and ``expiry`` seconds.
"""

from __future__ import annotations

import math
import re
import secrets
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any, Final

from anyio import ClosedResourceError, WouldBlock

from anyio_channels.exceptions import ChannelFull
from anyio_channels.log import GROUP_SEND_DROPPED, Troubles

from .backend import CANCELLED, thread
from .base import BaseChannelLayer, ChannelLayerStatistics, Message, OnGap, Overflow, require_seconds
from .codec import Codec
from .local import Channel, Directory
from .mailbox import Books, Mailroom, Waiter

__all__ = ["InMemoryChannelLayer", "channel_layer"]


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
        self._here = Directory(self._room, self.get_capacity)
        self._troubles = Troubles(clock, self.expiry, self)
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
            self._here.close(rung)
        self._room.wake(rung)
        self._troubles.close()

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
            target = self._here.channels.get(channel) or self._add_channel(channel)
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
                source = self._here.channels.get(channel) or self._get_channel(channel)
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
                room.lock.acquire()  # take_at_once(), without the call
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
            return self._decode(item) if isinstance(item, bytes) else source.gap_message(item)

    def receive_nowait(self, channel: str) -> Message:
        """Return the next message on ``channel``, from any thread, with or without an event loop.

        Raises ``anyio.WouldBlock`` when there is none, or none that is not promised to a reader who waits already, and
        what ``receive`` raises.
        """
        source = self._get_channel(channel)
        item = source.take_at_once()
        if item is None:
            raise WouldBlock
        return self._decode(item) if isinstance(item, bytes) else source.gap_message(item)

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
            self._here.clear(rung)
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
            self._here.leave(group, channel)

    async def group_send(self, group: str, message: Message, *, exclude: Collection[str] = ()) -> None:
        """Send ``message`` to every member of ``group``, as ``BaseChannelLayer.group_send`` says."""
        members = self._here.groups.get(group) if group.__class__ is str else None
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
                target = self._here.groups.get(group)
                missed = 0 if target is None else target.deliver((now + self.expiry, data), excluded, now, rung)
        finally:
            room.wake(rung)
        if missed:
            self._troubles.note(GROUP_SEND_DROPPED, group, missed)
        elif now >= self._troubles.due:
            self._troubles.look()

    async def group_channels(self, group: str) -> set[str]:
        """Return the members of ``group`` as they are now."""
        self.require_valid_group_name(group)
        await self._check_in()
        rung: list[Waiter] = []
        with self._room:
            self._require_open()
            target = self._here.groups.get(group)
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
                channels=books.occupied + self._here.inboxes,
                buffered_messages=books.buffered,
                groups=len(self._here.groups),
                members=self._here.members,
                waiting_receivers=books.waiting_receivers,
                sent=books.sent,
                received=books.received,
                expired=books.expired,
                dropped_full=books.dropped_full,
                dropped_unreadable=0,
                discarded=books.discarded,
            )
        room.wake(rung)
        self._troubles.look()
        return snapshot

    # Inboxes

    async def inbox_open(self, prefix: str, capacity: int | None, overflow: Overflow, on_gap: OnGap) -> str:
        """Make the channel of an inbox."""
        await self._check_in()
        name = _new_name(prefix)
        with self._room:
            self._require_open()
            self._here.open_inbox(name, capacity, overflow, on_gap)
        return name

    async def inbox_close(self, channel: str, groups: Collection[str]) -> None:  # noqa: ARG002 - the channel knows them
        """Leave all groups and forget the channel, at once."""
        rung: list[Waiter] = []
        with self._room:
            self._here.close_inbox(channel, rung)
        self._room.wake(rung)

    async def inbox_join(self, channel: str, group: str) -> None:
        """Make the inbox a member of ``group`` until it leaves."""
        await self._check_in()
        self._join(group, channel, None)

    # The inside; all below are called with the lock held, unless they say otherwise

    def _get_channel(self, name: str) -> Channel:
        """Find or make the channel; without the lock."""
        self.require_valid_channel_name(name)
        with self._room:
            return self._here.channels.get(name) or self._add_channel(name)

    def _add_channel(self, name: str) -> Channel:
        self.require_valid_channel_name(name)
        self._require_open()
        return self._here.add(name)

    def _join(self, group: str, channel: str, expiry: float | None) -> None:
        """Make ``channel`` a member, for ``expiry`` seconds or as long as its inbox; without the lock."""
        self.require_valid_group_name(group)
        self.require_valid_channel_name(channel)
        rung: list[Waiter] = []
        with self._room:
            self._require_open()
            now = self._clock()
            self._room.index.sweep(now, rung)
            member = self._here.channels.get(channel) or self._add_channel(channel)
            member.expire(now, rung)
            self._here.join(group, member, None if expiry is None else now + expiry)
        self._room.wake(rung)

    def _require_open(self) -> None:
        if self._closed:
            raise ClosedResourceError(f"{self!r} is closed; open it again with 'async with layer:'")


def _new_name(prefix: str) -> str:
    return f"{prefix}inmemory!{secrets.token_hex(12)}"


channel_layer: Final = InMemoryChannelLayer()
"""A ready-made layer for applications of one process."""
