"""A channel layer on a ``Directory`` and a ``Transport``: everything but what travels.

Rules:
- channels and groups live in the process that reads them. A message goes to a *topic*: the name of a channel, or ``group:``
  and the name of a group (no channel name has a colon).
- without a transport there is one process, and a topic is delivered to at once. With one, sending is publishing: whoever
  subscribes, this process too, is told by the transport and delivers to its own members.
- every decision is a plain function, callable from any thread without a transport; the async methods check for
  cancellation, call it, and wait only in a mailbox or for the transport.
- a message is encoded once, however many members it goes to; each receiver decodes its own copy.
- a channel is subscribed to as long as it is listed, a group as long as it has a member here.
- members that are full are always counted, and logged once for each group and ``expiry`` seconds.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable, Collection, Mapping
from functools import partial
from sys import modules
from threading import get_ident
from typing import Any

from anyio import CancelScope, ClosedResourceError

from anyio_channels.contract.layer import ChannelLayerStatistics, Life, Message, OnGap, Overflow
from anyio_channels.contract.message import EXCLUDE_KEY, Codec
from anyio_channels.contract.names import new_process
from anyio_channels.contract.options import require_clock, require_seconds
from anyio_channels.exceptions import ChannelFull
from anyio_channels.forks import in_each_child
from anyio_channels.log import CHANNEL_ENDED, Troubles
from anyio_channels.wakeup import CANCELLED, held, hold_interrupts, thread

from .deliveries import Deliveries, group_topic
from .directory import Channel, Directory
from .home import AtHome, Home
from .joins import Joins
from .transport import Transport
from .waiting import Mailroom, Waiter

__all__ = ["Hub"]


class Hub(AtHome):
    """A channel layer whose channels and groups live in the processes that read them."""

    group_expiry: float

    def __init__(
        self,
        transport: Transport | None = None,
        *,
        expiry: float = 60,
        group_expiry: float = 86400,
        capacity: int = 100,
        channel_capacity: Mapping[str | re.Pattern[str], int] | None = None,
        max_message_size: int = 4 * 1024 * 1024,
        default: Callable[[Any], Any] | None = None,
        clock: Callable[[], float] = time.monotonic,
        codec: Codec | None = None,
    ) -> None:
        """Take the options of ``BaseChannelLayer``, and more.

        ``transport``: what carries messages between processes; ``None`` for a layer of one process. ``group_expiry``:
        seconds after which a membership made by ``group_add`` ends. ``clock``: tells the time, in seconds; a test gives one
        that it moves itself. ``codec``: how messages become bytes, if not as MessagePack.
        """
        super().__init__(expiry, capacity, channel_capacity, max_message_size=max_message_size, default=default)
        self.group_expiry = require_seconds("group_expiry", group_expiry)
        self._clock = require_clock(clock)
        self._codec = Codec(self.max_message_size, self.default) if codec is None else codec
        self._encode = self._codec.encode
        self._decode = self._codec.decode
        self.transport: Transport | None = transport
        self._outage = () if transport is None else transport.outage
        self._home = Home(self)
        self._troubles = Troubles(clock, self.expiry, self)
        self._reset()
        if transport is None:
            in_each_child(self, Hub._begin_anew)

    def __repr__(self) -> str:
        """Show the options that tell one layer from another."""
        return f"<{type(self).__name__} expiry={self.expiry} capacity={self.capacity}>"

    def _reset(self) -> None:
        """Become blank, as when the layer is opened again."""
        self._mailroom = Mailroom(self._clock)
        # In memory a name of ours is told from one that somebody thought of by what follows the mark.
        self._mark = f"inmemory!{secrets.token_hex(4)}" if self.transport is None else f"{new_process()}!"
        self._here = Directory(
            self._mailroom,
            self.get_capacity,
            mark=self._mark,
            expiry=self.expiry,
            group_expiry=self.group_expiry,
            on_end=self._log_end,
            keeps_idle=self.transport is not None,
        )
        self._published = 0
        self._joins = Joins(self._here)
        unsubscribe = None if self.transport is None else self.transport.unsubscribe
        self._deliveries = Deliveries(self._here, self._codec, self.expiry, self._troubles, unsubscribe, self)

    def _begin_anew(self) -> None:
        """Be blank in a forked child, but closed if it was: a thread of the parent may have been in the middle of a change.

        What the parent made here has ended.
        """
        mark, is_closed = self._mark, self._here.closed
        self._troubles = Troubles(self._clock, self.expiry, self)
        self._reset()
        self._mark = self._here.mark = mark
        self._here.closed = is_closed
        self._life = Life.CLOSED if is_closed else Life.NEW

    def _log_end(self, channel: str, discarded: int) -> None:
        CHANNEL_ENDED.write(layer=repr(self), channel=channel, discarded=discarded)

    # Opening and closing

    async def open(self) -> None:
        """Open the layer; called by ``async with``. If it was closed before, it is blank, its statistics too.

        Raises what the transport raises when it cannot be reached. If cancelled, the layer is not open.
        """
        if self.transport is None:
            if self._here.closed:
                self._reset()
                self._life = Life.NEW if self._life is Life.CLOSED else self._life
            return
        self._reset()
        await self._home.open(partial(self.transport.run, self._deliveries))

    async def close(self) -> None:
        """Close the layer, as ``BaseChannelLayer.close`` says. With a transport, it waits for the end of that; not in a fork.

        If cancelled, the layer is closed all the same.
        """
        was_open = self._life is Life.OPEN
        if self.transport is not None and self._is_foreign:
            return
        if self.transport is None or was_open:
            self._life = Life.CLOSING
            self._here.close()
        try:
            if self.transport is not None and was_open:
                with CancelScope(shield=True):
                    await self._home.stop()
        finally:
            if self.transport is None or was_open:
                self._life = Life.CLOSED
            self._troubles.close()

    def _require_open(self) -> None:
        if self.transport is not None:
            self._home.require_open()
        elif self._here.closed:
            raise ClosedResourceError(f"{self!r} is closed; open it again with 'async with layer:'")

    # Sending

    async def send(self, channel: str, message: Message, *, wait: bool = False) -> None:
        """Send ``message`` to ``channel``, as ``BaseChannelLayer.send`` says.

        With a transport it goes to whoever reads the channel now, in whatever process. There is always room, so
        ``ChannelFull`` is never raised, and ``wait`` changes nothing. Raises the transport's error where it cannot publish.
        """
        state = thread.state
        left = state.left = state.left - 1
        try:
            due = left < 0 or state.deadline() == CANCELLED
        except RuntimeError:
            due = True
        if due:
            await state.give_way()
        if self.transport is not None:
            self.require_valid_channel_name(channel)
            body = self._encode(message)
            self._home.require_open()  # and then as in _publish(), without the calls
            try:
                await self.transport.publish(channel, body)
            except self._outage as error:
                self._raise_if_closed(error)
                raise
            self._published += 1
        elif wait:
            await self._put_when_room(channel, self._encode(message))
        else:
            self._put(channel, self._encode(message))

    def _put(self, channel: str, data: bytes) -> None:
        """Put ``data`` into a channel of this process; from any thread."""
        mailroom = self._mailroom
        rung: list[Waiter] = []
        mailroom.lock.acquire()  # half the price of a with statement, here on the hottest path
        try:
            now = self._clock()
            if now >= mailroom.index.next_due:
                mailroom.index.sweep(now, rung)
            target = self._here.channels.get(channel) or self._add_channel(channel)
            accepted = target.put((now + self.expiry, data), now, rung)
        except TypeError:
            self.require_valid_channel_name(channel)  # an unhashable one, which the dict refuses in other words
            raise
        finally:
            mailroom.lock.release()
            if rung or mailroom.abandoned:
                mailroom.wake(rung)
        if not accepted:
            raise ChannelFull(f"channel {channel!r} holds {target.capacity} unexpired messages, its capacity")

    async def _put_when_room(self, channel: str, data: bytes) -> None:
        while True:
            target = self._find(channel)
            try:
                await target.put_when_room(data, self.expiry)
            except ClosedResourceError:
                if not target.dropped:
                    raise
                # It was idle, and dropped from the list between finding it and waiting at it.
            else:
                return

    async def group_send(self, group: str, message: Message, *, exclude: Collection[str] = ()) -> None:
        """Send ``message`` to every member of ``group``, in all processes, as ``BaseChannelLayer.group_send`` says."""
        members = self._here.groups.get(group) if group.__class__ is str else None
        await self._check_in(1 if members is None else 1 + len(members.members) // 8)
        self.require_valid_group_name(group)
        excluded = self._require_valid_exclude(exclude)
        body = self._encode(message)
        if self.transport is None:
            self._require_open()
            self._deliveries.deliver_to_group(group, body, excluded)
            return
        if excluded:
            body = self._codec.address(body, EXCLUDE_KEY, list(excluded))
        await self._publish(self.transport, group_topic(group), body)

    async def _publish(self, transport: Transport, topic: str, body: bytes) -> None:
        self._home.require_open()
        await self._told(transport.publish(topic, body))
        self._published += 1

    # Receiving

    async def receive(self, channel: str) -> Message:  # noqa: C901, PLR0912 - the hottest path, in one piece
        """Wait for the next message on ``channel``, as ``BaseChannelLayer.receive`` says.

        Goes on waiting while the transport is away. Raises the transport's error for a channel that cannot be had.
        """
        while True:
            source = self._here.channels.get(channel) if isinstance(channel, str) else None
            if source is None or (self.transport is not None and get_ident() != self._home.thread):
                if self.transport is not None:
                    await self._check_in(0)  # before there is a channel to subscribe to
                source = self._source(channel)
            item = None
            if source.entries:
                state = thread.state
                left = state.left = state.left - 1
                try:
                    due = left < 0 or state.deadline() == CANCELLED
                except RuntimeError:
                    due = True
                if due:
                    try:
                        await state.give_way()
                    except BaseException:
                        source.reader_gave_up()
                        raise
                rung: list[Waiter] = []
                mailroom = self._mailroom
                mailroom.lock.acquire()  # take_at_once(), without the call
                try:
                    item = source.take_nowait(rung)
                finally:
                    mailroom.lock.release()
                if rung or mailroom.abandoned:
                    mailroom.wake(rung)
            if item is None:
                try:
                    if not source.attended and self.transport is not None:
                        await self._attend(self.transport, source)
                    item = await source.take()
                except ClosedResourceError:
                    if not source.dropped:
                        raise
                    # It was idle, and dropped from the list between finding it and waiting at it.
                    continue
            if item.__class__ is bytes:
                return self._decode(item)
            return item if item.__class__ is dict else source.gap_message(item)

    async def _listen(self, channel: str) -> None:
        """Do what ``receive`` begins with. What is sent to ``channel`` from then on comes, if the transport is there."""
        source = self._source(channel)
        if self.transport is not None:
            await self._attend(self.transport, source)

    async def _arrived(self, channel: str) -> None:
        """Have what is sent to ``channel`` from now on, if it is not a channel that keeps its messages."""
        await self._listen(channel)

    async def _attend(self, transport: Transport, channel: Channel) -> None:
        """See that messages come to a channel that somebody is about to wait at."""
        try:
            await self._told(transport.subscribe(channel.name))
        except self._outage:
            return  # its messages come when the transport does
        except Exception:
            self._here.drop(channel)
            self._deliveries.forget_ended()
            raise
        channel.attended = True

    def _source(self, name: str) -> Channel:
        """Find or make a channel to be received from; without the lock."""
        if "trio" in modules and not held:
            hold_interrupts()
        self.require_valid_channel_name(name)
        if self.transport is not None or self._here.closed:
            self._require_open()
        return self._here.find(name, is_any_ours=self.transport is None)

    def _find(self, name: str) -> Channel:
        """Find or make the channel; without the lock."""
        self.require_valid_channel_name(name)
        with self._mailroom:
            return self._here.channels.get(name) or self._add_channel(name)

    def _add_channel(self, name: str) -> Channel:
        """Make the channel; under the lock."""
        self.require_valid_channel_name(name)
        if self._here.closed:
            self._require_open()
        return self._here.add(name)

    async def new_channel(self, prefix: str = "specific.") -> str:
        """Return a process-specific channel name that nobody has, starting with ``prefix``.

        With a transport, what is sent to it from now on comes. If cancelled, there is no such channel.
        """
        self._require_valid_prefix(prefix)
        await self._check_in()
        self._require_open()
        name = self._here.make(self._new_name(prefix))
        if self.transport is not None:
            channel = self._here.channels[name]
            try:
                await self._told(self.transport.subscribe(channel.name))
            except BaseException:
                self._here.drop(channel)
                self._deliveries.forget_ended()
                raise
            channel.attended = True
        return name

    def _new_name(self, prefix: str) -> str:
        return f"{prefix}{self._mark}{secrets.token_hex(8)}"

    async def flush(self) -> None:
        """Throw away the messages and memberships of this process, as ``BaseChannelLayer.flush`` says."""
        await self._check_in()
        self._require_open()
        self._here.clear()
        if self.transport is not None:
            await self._told(self.transport.catch_up())
            self._here.clear()
            self._deliveries.forget_ended()

    # Groups

    async def group_add(self, group: str, channel: str) -> None:
        """Make ``channel`` a member of ``group``, as ``BaseChannelLayer.group_add`` says.

        With a transport, what is sent to the group from now on comes, and ``channel`` must be one of this process:
        ``RuntimeError`` for one that this process neither made nor received from.
        """
        self.require_valid_group_name(group)
        self.require_valid_channel_name(channel)
        await self._check_in()
        self._require_open()
        if self.transport is not None and channel not in self._here.channels and not self._here.is_ours(channel):
            raise RuntimeError(
                f"group_add() takes only channels of this process here, and {channel!r} is not one: make it with "
                "new_channel() or subscribe(), or receive from it first"
            )
        await self._join(group, channel)

    async def _join(self, group: str, channel: str) -> None:
        """Make ``channel`` a member."""
        if self.transport is None:
            self._join_here(group, channel)
            return

        def leave() -> None:
            self._here.leave(group, channel)
            self._deliveries.forget_ended()

        with self._joins.undone_by(leave, group, channel):
            self._join_here(group, channel)
            self._deliveries.forget_ended()
            await self._told(self.transport.subscribe(group_topic(group)))

    def _join_here(self, group: str, channel: str) -> None:
        rung: list[Waiter] = []
        with self._mailroom:
            now = self._clock()
            self._mailroom.index.sweep(now, rung)
            member = self._here.member(channel, now, rung) or self._add_channel(channel)
            self._here.join(group, member, now)
        self._mailroom.wake(rung)

    async def group_discard(self, group: str, channel: str) -> None:
        """End the membership of ``channel`` in ``group``, as ``BaseChannelLayer.group_discard`` says."""
        self.require_valid_group_name(group)
        self.require_valid_channel_name(channel)
        await self._check_in()
        self._require_open()
        self._here.leave(group, channel)
        self._deliveries.forget_ended()

    async def group_channels(self, group: str) -> set[str]:
        """Return the members of ``group`` in this process."""
        self.require_valid_group_name(group)
        await self._check_in()
        self._require_open()
        members = self._here.members_of(group)
        self._deliveries.forget_ended()
        return members

    def statistics(self) -> ChannelLayerStatistics:
        """Return a snapshot of what this process holds and has done, from any thread; reclaims all that has expired.

        With a transport, ``sent`` counts the calls of ``send`` and ``group_send``.
        """
        return ChannelLayerStatistics(**self._figures())

    def _figures(self) -> dict[str, int]:
        if "trio" in modules and not held:
            hold_interrupts()
        figures = self._here.figures()
        if self.transport is not None:
            figures["sent"] = self._published + self._deliveries.sent_late
            figures["dropped_unreadable"] = self._deliveries.unreadable
            if get_ident() == self._home.thread:
                self._deliveries.forget_ended()
        self._troubles.look()
        return figures

    # Inboxes

    async def inbox_open(self, prefix: str, capacity: int | None, overflow: Overflow, on_gap: OnGap) -> str:
        """Make the channel of an inbox; with a transport, what is sent to it from now on comes."""
        await self._check_in()
        self._require_open()
        name = self._new_name(prefix)
        channel = self._here.open_inbox(name, capacity, overflow, on_gap)
        if self.transport is not None:
            try:
                await self._told(self.transport.subscribe(name))
            except BaseException:
                await self.inbox_close(name, ())
                raise
            channel.attended = True
        return name

    async def inbox_close(self, channel: str, groups: Collection[str]) -> None:  # noqa: ARG002 - the channel knows them
        """Leave all groups and forget the channel, at once."""
        self._here.close_inbox(channel)
        self._deliveries.forget_ended()

    async def inbox_join(self, channel: str, group: str) -> None:
        """Make the inbox a member of ``group`` until it leaves; with a transport, what is sent to it from now on comes."""
        await self._check_in()
        self._require_open()
        self.require_valid_group_name(group)
        await self._join(group, channel)
