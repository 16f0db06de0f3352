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

import math
import re
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Collection, Mapping
from threading import get_ident
from types import TracebackType
from typing import Any

from anyio import TASK_STATUS_IGNORED, CancelScope, ClosedResourceError
from anyio.abc import TaskStatus

from anyio_channels.contract.layer import BaseChannelLayer, ChannelLayerStatistics, Life, Message, OnGap, Overflow
from anyio_channels.contract.message import EXCLUDE_KEY, Codec, Unreadable
from anyio_channels.contract.options import require_clock, require_seconds
from anyio_channels.exceptions import ChannelFull
from anyio_channels.log import (
    CHANNEL_DROPPED,
    GROUP_SEND_DROPPED,
    MESSAGE_UNREADABLE,
    SUBSCRIPTION_REFUSED,
    Troubles,
    said,
)
from anyio_channels.wakeup import CANCELLED, thread

from .directory import Channel, Directory
from .home import Home
from .waiting import Mailroom, Waiter

__all__ = ["Hub", "Transport", "group_topic"]

_GROUP = "group:"


def group_topic(group: str) -> str:
    """Return the topic of the group ``group``."""
    return _GROUP + group


class Transport(ABC):
    """What carries the messages of a ``Hub`` between processes.

    A transport knows topics and bytes, and nothing of channels, members or waiting. It calls three plain functions of its
    hub, in the event loop that opened the layer: ``deliver`` for each message that comes, ``missing`` where some may have
    been lost, and ``unheard`` for a topic that it can no longer subscribe to.
    """

    outage: tuple[type[Exception], ...] = (OSError,)
    """Errors of ``subscribe`` that pass: the topic stays wanted, and the transport subscribes to it as soon as it can."""

    @abstractmethod
    async def run(self, hub: Hub, *, task_status: TaskStatus[None]) -> None:
        """Connect, call ``task_status.started()``, and carry messages until cancelled.

        Called once for each opening of the layer, in a task of its own. What it raises before ``started()``, opening
        raises. Lost connections are its own affair: it comes back, subscribes again to all that is wanted, and tells the
        hub what may be missing. When it is cancelled, calls of the other methods that still wait raise one of ``outage``;
        the hub turns that into ``ClosedResourceError``.
        """

    @abstractmethod
    def publish(self, topic: str, body: bytes) -> Awaitable[object]:
        """Send ``body`` to all processes that subscribe to ``topic``; if cancelled, it was sent or was not.

        A coroutine function, or a plain one that returns an awaitable.
        """

    @abstractmethod
    async def subscribe(self, topic: str) -> None:
        """Return when what is published to ``topic`` from now on will come; at once if it is subscribed to already.

        The topic is wanted from the call on until ``unsubscribe``, also if the call is cancelled or raises. One of
        ``outage`` means *not now*; any other error, that the topic cannot be had.
        """

    @abstractmethod
    def unsubscribe(self, topic: str) -> None:
        """The topic is not wanted any more. Must not wait; what is subscribed to and given up is seen in that order."""

    async def catch_up(self) -> None:  # noqa: B027 - not every transport can know it
        """Return when what was published before the call has been delivered here, if the transport can know that."""


class Hub(BaseChannelLayer):
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
        self._troubles = Troubles(clock, self.expiry, self)
        self._transport = transport
        self._home = Home(self)
        self._reset()

    def _reset(self) -> None:
        """Become blank, as when the layer is opened again."""
        self._mailroom = Mailroom(self._clock)
        self._here = Directory(self._mailroom, self.get_capacity, keeps_idle=self._transport is not None)
        self._local_part = "inmemory" if self._transport is None else secrets.token_hex(16)
        self._published = 0
        self._unreadable = 0

    # Opening and closing

    async def open(self) -> None:
        """Open the layer; called by ``async with``. If it was closed before, it is blank, its statistics too.

        Raises what the transport raises when it cannot be reached. If cancelled, the layer is not open.
        """
        if self._transport is None:
            if self._here.closed:
                self._reset()
                self._life = Life.NEW if self._life is Life.CLOSED else self._life
            return
        self._reset()
        await self._home.open(self._run)

    async def _run(self, *, task_status: TaskStatus[None] = TASK_STATUS_IGNORED) -> None:
        if self._transport is not None:
            await self._transport.run(self, task_status=task_status)

    async def close(self) -> None:
        """Close the layer, as ``BaseChannelLayer.close`` says. With a transport, it waits for the end of that.

        If cancelled, the layer is closed all the same.
        """
        was_open = self._life is Life.OPEN
        if self._transport is None or was_open:
            self._life = Life.CLOSING
            self._here.close()
        if self._transport is None:
            self._life = Life.CLOSED
        elif was_open:
            with CancelScope(shield=True):
                await self._home.stop()
            self._life = Life.CLOSED
        self._troubles.close()

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the layer, also when cancelled."""
        await super().__aexit__(exc_type, exc, traceback)
        await self._home.leave(exc_type, exc, traceback)

    def _require_open(self) -> None:
        if self._transport is not None:
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
        if self._transport is not None:
            self.require_valid_channel_name(channel)
            body = self._encode(message)
            self._home.require_open()  # and then as in _publish(), without the call
            try:
                await self._transport.publish(channel, body)
            except self._transport.outage as error:
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
        if self._transport is None:
            self._require_open()
            self._deliver_to_group(group, body, excluded)
            return
        if excluded:
            body = self._codec.address(body, EXCLUDE_KEY, list(excluded))
        await self._publish(self._transport, group_topic(group), body)

    async def _publish(self, transport: Transport, topic: str, body: bytes) -> None:
        self._home.require_open()
        try:
            await transport.publish(topic, body)
        except transport.outage as error:
            self._raise_if_closed(error)
            raise
        self._published += 1

    async def _subscribe(self, transport: Transport, topic: str) -> None:
        try:
            await transport.subscribe(topic)
        except transport.outage as error:
            self._raise_if_closed(error)
            raise

    def _raise_if_closed(self, error: Exception) -> None:
        if self._life is not Life.OPEN:
            raise ClosedResourceError(f"{self!r} was closed") from error

    # Delivering, to the channels of this process

    def deliver(self, topic: str, body: bytes, where: str | None = None) -> None:
        """Hand on a message that came from the transport. What is not a message is dropped, counted and logged.

        ``where``: what the log calls the topic, if not ``topic``.
        """
        name = topic.removeprefix(_GROUP)
        if name not in (self._here.channels if name is topic else self._here.groups):
            return
        try:
            message, body, excluded = self._decode_delivered(body)
        except Unreadable as why:
            self.drop_unreadable(topic if where is None else where, why)
            return
        if name is not topic:
            self._deliver_to_group(name, body, excluded)
            return
        mailroom = self._mailroom
        rung: list[Waiter] = []
        mailroom.lock.acquire()
        try:
            now = self._clock()
            if now >= mailroom.index.next_due:
                mailroom.index.sweep(now, rung)
            channel = self._here.channels.get(topic)
            is_full = channel is not None and not channel.put((now + self.expiry, message), now, rung)
            if is_full and channel is not None:
                channel.miss(rung)
        finally:
            mailroom.lock.release()
            if rung or mailroom.abandoned:
                mailroom.wake(rung)
        if is_full:
            self._troubles.note(CHANNEL_DROPPED, topic)
        if self._here.ended:
            self._unsubscribe()

    def _decode_delivered(self, body: bytes) -> tuple[Message, bytes, frozenset[str]]:
        """Return the message in ``body``, its bytes, and the channels that are to miss it; or raise ``Unreadable``."""
        message = self._codec.decode_body(body)
        if EXCLUDE_KEY not in message:
            return message, body, frozenset()
        names = message.pop(EXCLUDE_KEY)
        excluded = [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
        return message, self._codec.encode_again(message), frozenset(excluded)

    def _deliver_to_group(self, group: str, body: bytes, excluded: frozenset[str]) -> None:
        mailroom = self._mailroom
        rung: list[Waiter] = []
        try:
            with mailroom:
                now = self._clock()
                mailroom.index.sweep(now, rung)
                target = self._here.groups.get(group)
                missed = 0 if target is None else target.deliver((now + self.expiry, body), excluded, now, rung)
        finally:
            mailroom.wake(rung)
        if missed:
            self._troubles.note(GROUP_SEND_DROPPED, group, missed)
        elif now >= self._troubles.due:
            self._troubles.look()
        if self._here.ended:
            self._unsubscribe()

    def tell_all(self, message: Message) -> None:
        """Put ``message`` into every channel of this process."""
        body = self._encode(message)
        rung: list[Waiter] = []
        full: list[str] = []
        with self._mailroom:
            now = self._clock()
            for channel in tuple(self._here.channels.values()):
                if not channel.put((now + self.expiry, body), now, rung):
                    channel.miss(rung)
                    full.append(channel.name)
        self._mailroom.wake(rung)
        for name in full:
            self._troubles.note(CHANNEL_DROPPED, name)

    def sweep(self) -> None:
        """Drop all that has expired in this process; for a transport to call now and then, and in vain at no cost."""
        self._here.sweep(math.inf)
        self._unsubscribe()
        self._troubles.look()

    def missing(self, is_touched: Callable[[str], bool] = lambda _: True) -> None:
        """Messages to the topics for which ``is_touched`` is true may have been lost: inboxes that ask for it are told."""

        def touches(channel: Channel) -> bool:
            return is_touched(channel.name) or any(is_touched(group_topic(one.name)) for one in channel.groups or ())

        self._here.mark_outage(touches)

    def unheard(self, topic: str, error: Exception, where: str | None = None) -> None:
        """The transport could not subscribe to ``topic`` again: the next who reads it asks anew, and is told why.

        ``where``: what the log calls it, if not ``topic``.
        """
        self._troubles.note(SUBSCRIPTION_REFUSED, topic if where is None else where, error=said(error))
        if (channel := self._here.channels.get(topic)) is not None:
            channel.attended = False

    def drop_unreadable(self, where: str, why: object) -> None:
        """Count and log what came and is not a message of ours."""
        self._unreadable += 1
        self._troubles.note(MESSAGE_UNREADABLE, where, error=str(why))

    # Receiving

    async def receive(self, channel: str) -> Message:  # noqa: C901 - the hottest path, in one piece
        """Wait for the next message on ``channel``, as ``BaseChannelLayer.receive`` says.

        Goes on waiting while the transport is away. Raises the transport's error for a channel that cannot be had.
        """
        while True:
            try:
                source = self._here.channels.get(channel) or self._find(channel)
            except TypeError:
                source = self._find(channel)  # refuses an unhashable name in the words of the rule
            item = None
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
                    if not source.attended and self._transport is not None:
                        await self._attend(self._transport, source)
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
        source = self._find(channel)
        if self._transport is not None and not source.attended:
            await self._attend(self._transport, source)

    async def _attend(self, transport: Transport, channel: Channel) -> None:
        """See that messages come to a channel that somebody is about to wait at."""
        await self._check_in(0)
        try:
            await self._subscribe(transport, channel.name)
        except transport.outage:
            return  # its messages come when the transport does
        except Exception:
            with self._mailroom:
                if not (channel.closed or channel.owned or channel.demand):
                    self._here.forget(channel)
            self._unsubscribe()
            raise
        channel.attended = True

    def _find(self, name: str) -> Channel:
        """Find or make the channel; without the lock."""
        self.require_valid_channel_name(name)
        if self._transport is not None:
            self._require_open()
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
        name = self._new_name(prefix)
        if self._transport is not None:
            channel = self._find(name)
            try:
                await self._subscribe(self._transport, name)
            except BaseException:
                with self._mailroom:
                    if not channel.closed:
                        channel.leave_all()
                        self._here.forget(channel)
                self._unsubscribe()
                raise
            channel.attended = True
        return name

    def _new_name(self, prefix: str) -> str:
        return f"{prefix}{self._local_part}!{secrets.token_hex(12)}"

    async def flush(self) -> None:
        """Throw away the messages and memberships of this process, as ``BaseChannelLayer.flush`` says."""
        await self._check_in()
        self._require_open()
        self._here.clear()
        if self._transport is not None:
            try:
                await self._transport.catch_up()
            except self._transport.outage as error:
                self._raise_if_closed(error)
                raise
            self._here.clear()
            self._unsubscribe()

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
        if self._transport is not None and channel not in self._here.channels:
            raise RuntimeError(
                f"group_add() in a pub/sub layer takes channels of this process, and {channel!r} is none: make it with "
                "new_channel() or subscribe(), or receive from it first"
            )
        await self._join(group, channel, self.group_expiry)

    async def _join(self, group: str, channel: str, expiry: float | None) -> None:
        """Make ``channel`` a member for ``expiry`` seconds, or as long as its inbox."""
        rung: list[Waiter] = []
        with self._mailroom:
            now = self._clock()
            self._mailroom.index.sweep(now, rung)
            member = self._here.channels.get(channel) or self._add_channel(channel)
            member.expire(now, rung)
            is_new = group not in self._here.groups or channel not in self._here.groups[group].members
            self._here.join(group, member, None if expiry is None else now + expiry)
        self._mailroom.wake(rung)
        if self._transport is None:
            return
        self._unsubscribe()
        try:
            await self._subscribe(self._transport, group_topic(group))
        except BaseException:
            if is_new:
                self._here.leave(group, channel)
                self._unsubscribe()
            raise

    async def group_discard(self, group: str, channel: str) -> None:
        """End the membership of ``channel`` in ``group``, as ``BaseChannelLayer.group_discard`` says."""
        self.require_valid_group_name(group)
        self.require_valid_channel_name(channel)
        await self._check_in()
        self._require_open()
        self._here.leave(group, channel)
        self._unsubscribe()

    async def group_channels(self, group: str) -> set[str]:
        """Return the members of ``group`` in this process."""
        self.require_valid_group_name(group)
        await self._check_in()
        self._require_open()
        members = self._here.members_of(group)
        self._unsubscribe()
        return members

    def _unsubscribe(self) -> None:
        """Unsubscribe from what has ended meanwhile, unless it is here again."""
        ended = self._here.ended
        while ended:
            name, is_group = ended.popleft()
            if name not in (self._here.groups if is_group else self._here.channels) and self._transport is not None:
                self._transport.unsubscribe(group_topic(name) if is_group else name)

    def statistics(self) -> ChannelLayerStatistics:
        """Return a snapshot of what this process holds and has done, from any thread; reclaims all that has expired.

        With a transport, ``sent`` counts the calls of ``send`` and ``group_send``.
        """
        return ChannelLayerStatistics(**self._figures())

    def _figures(self) -> dict[str, int]:
        figures = self._here.figures()
        if self._transport is not None:
            figures["sent"] = self._published
            figures["dropped_unreadable"] = self._unreadable
            if get_ident() == self._home.thread:
                self._unsubscribe()
        self._troubles.look()
        return figures

    # Inboxes

    async def inbox_open(self, prefix: str, capacity: int | None, overflow: Overflow, on_gap: OnGap) -> str:
        """Make the channel of an inbox; with a transport, what is sent to it from now on comes."""
        await self._check_in()
        self._require_open()
        name = self._new_name(prefix)
        channel = self._here.open_inbox(name, capacity, overflow, on_gap)
        if self._transport is not None:
            try:
                await self._subscribe(self._transport, name)
            except BaseException:
                await self.inbox_close(name, ())
                raise
            channel.attended = True
        return name

    async def inbox_close(self, channel: str, groups: Collection[str]) -> None:  # noqa: ARG002 - the channel knows them
        """Leave all groups and forget the channel, at once."""
        self._here.close_inbox(channel)
        self._unsubscribe()

    async def inbox_join(self, channel: str, group: str) -> None:
        """Make the inbox a member of ``group`` until it leaves; with a transport, what is sent to it from now on comes."""
        await self._check_in()
        self._require_open()
        self.require_valid_group_name(group)
        await self._join(group, channel, None)
