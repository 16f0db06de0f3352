"""The pub/sub layer: messages go through Redis to whoever is subscribed, in the bytes of channels_redis 4.3.

Rules:
- a Redis channel for each channel name, and one for each group: every process publishes there, and each delivers to its own
  members. Redis keeps nothing: a message to a channel that nobody reads is dropped.
- a channel is subscribed to as long as it is listed, a group as long as it has a member here. Whoever makes one waits for the
  confirmation; all that is wanted is subscribed to again before a new connection is used.
- the list decides and says what to subscribe and unsubscribe in the same plain function, so Redis sees it in that order.
- a channel is kept when it has no reader for a while, for it cannot be read later otherwise. It is given up when a
  message expires there unread, unless an open inbox owns it.
- one connection serves all; pushes go into bounded mailboxes without waiting.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import redis.exceptions
from redis.crc import key_slot

from anyio_channels.layers.base import Message, OnGap, Overflow
from anyio_channels.layers.codec import EXCLUDE_KEY, SerializerFormat, Unreadable
from anyio_channels.layers.local import Channel, Directory, Group
from anyio_channels.layers.mailbox import Waiter
from anyio_channels.log import GROUP_SEND_DROPPED, SUBSCRIPTION_REFUSED, said
from anyio_channels.redis.client import Connection, ConnectionLost, Host, Link, Subscriptions, at_each

from .layer import RedisLayer, RedisLayerStatistics
from .twice import MARK_LENGTH, Heard, Marks

__all__ = ["RedisPubSubChannelLayer"]


class _PubSubChannel(Channel):
    """A channel that is listed, and so subscribed to, until a message expires there unread."""

    __slots__ = ("deserted",)

    directory: _PubSubDirectory

    def __init__(self, directory: Directory, name: str, capacity: int, **options: Any) -> None:
        super().__init__(directory, name, capacity, **options)
        self.deserted: bool = False
        self.directory.layer.subscriptions.want(name)

    @property
    def idle(self) -> bool:
        return self.deserted and super().idle

    def reader_waits(self) -> None:
        self.deserted = False

    def expired_unread(self) -> None:
        super().expired_unread()
        self.deserted = not (self.owned or self.entries)
        self.directory.layer.look_after(self)


class _PubSubDirectory(Directory):
    channel_class: type[Channel] = _PubSubChannel

    def __init__(self, layer: RedisPubSubChannelLayer) -> None:
        super().__init__(layer._room, layer.get_capacity)  # noqa: SLF001 - a part of the layer
        self.layer: RedisPubSubChannelLayer = layer

    def forget(self, channel: Channel) -> None:
        super().forget(channel)
        self.layer.subscriptions.unwant(channel.name)

    def end_group(self, group: Group) -> None:
        super().end_group(group)
        self.layer.subscriptions.unwant(self.layer.group_key(group.name))


class RedisPubSubChannelLayer(RedisLayer):
    """A channel layer on Redis' pub/sub, for any number of processes; channels_redis' bytes.

    To be opened by ``async with layer:`` and used in the event loop that opened it. It holds one connection to each server.
    Redis keeps no message: what is sent to a channel that no process reads, or during an outage, is lost; ``on_gap`` tells an
    inbox. A normal channel that several processes read gives each a copy; use ``RedisChannelLayer`` to share out work.
    ``send`` never raises ``ChannelFull``: a reader's mailbox is bounded, and what does not fit is dropped, counted, logged.
    """

    def __init__(
        self,
        hosts: Sequence[Host] | None = None,
        prefix: str = "asgi",
        expiry: float = 60,
        group_expiry: float = 86400,
        capacity: int = 100,
        channel_capacity: Mapping[str | re.Pattern[str], int] | None = None,
        symmetric_encryption_keys: Sequence[str | bytes] | None = None,
        serializer_format: SerializerFormat = "msgpack",
        on_disconnect: str | None = None,
        on_reconnect: str | None = None,
        *,
        max_message_size: int = 4 * 1024 * 1024,
        default: Callable[[Any], Any] | None = None,
        timeout: float = 5.0,
        connect_timeout: float = 5.0,
        keep_alive: float = 15.0,
        clock: Callable[[], float] = time.monotonic,
        cluster: bool = False,
    ) -> None:
        """Take the options of ``RedisChannelLayer``, but for ``random_prefix_length``, and two more.

        ``prefix``: of the Redis channels of groups; those of channels are called as the channels are. ``capacity``: of the
        mailbox of each channel in this process. ``on_disconnect``, ``on_reconnect``: if given, a message of that type is
        put into every channel of this process when the connection is lost, and when it is there again.

        Raises ``TypeError`` or ``ValueError`` naming the option and its rule; nothing is connected yet.
        """
        for option, value in (("on_disconnect", on_disconnect), ("on_reconnect", on_reconnect)):
            if not isinstance(value, str | None):
                raise TypeError(f"{option} must be the type of a message (str), not {value!r}")
        self._publish = "SPUBLISH" if cluster else "PUBLISH"
        self.on_disconnect: str | None = on_disconnect
        self.on_reconnect: str | None = on_reconnect
        super().__init__(
            hosts,
            prefix,
            expiry,
            group_expiry,
            capacity,
            channel_capacity,
            symmetric_encryption_keys,
            serializer_format,
            random_prefix_length=MARK_LENGTH if cluster else 0,
            token_expiry=None,
            max_message_size=max_message_size,
            default=default,
            timeout=timeout,
            connect_timeout=connect_timeout,
            keep_alive=keep_alive,
            clock=clock,
            cluster=cluster,
        )

    def _reset(self) -> None:
        self.subscriptions: Subscriptions = Subscriptions(self._router, self._log_forbidden)
        self._deserted: set[_PubSubChannel] = set()
        self._marks = Marks()
        self._heard = Heard()
        super()._reset()

    def _make_directory(self) -> Directory:
        return _PubSubDirectory(self)

    def _link_of(self, name: str) -> Link:
        """Return the link to the server that owns the Redis channel ``name``; by the whole of it, as for channels_redis."""
        return self._router.owner(name, name)

    def _places(self, channel: Channel) -> Iterator[tuple[str, str]]:
        for name in (channel.name, *(self.group_key(group.name) for group in channel.groups or ())):
            yield name, name

    def _servers_changed(self, moved: set[int], lost: set[int]) -> None:  # noqa: ARG002 - either way something may be missed
        if moved:
            self._mark_gaps(lambda _, key: key_slot(key.encode()) in moved)
        self.subscriptions.move()

    def group_key(self, group: str) -> str:
        """Return the Redis channel of ``group``."""
        return f"{self.prefix}__group__{group}"

    # Messages

    async def send(self, channel: str, message: Message, *, wait: bool = False) -> None:  # noqa: ARG002 - there is always room
        """Send ``message`` to ``channel``: to whoever reads it now, in whatever process. Never raises ``ChannelFull``.

        Raises ``TypeError`` and ``MessageTooLarge`` for what breaks the rules for names and messages, and
        ``redis.ConnectionError``, saying whether the message may have been sent, when Redis does not answer within
        ``timeout`` seconds. ``wait`` changes nothing here.

        If cancelled, the message was sent or was not.
        """
        self.require_valid_channel_name(channel)
        body = self._codec.encode(message)
        await self._check_in()
        self._require_open()
        await self._execute(self._link_of(channel), self._publish, channel, self._seal(body))
        self._sent += 1

    def _seal(self, body: bytes) -> bytes:
        return self._codec.seal(body, self._marks.next() if self.cluster else None)

    def _is_attended(self, source: Channel) -> bool:
        return self.subscriptions.wanted[source.name].confirmed

    async def _listen(self, channel: str) -> Channel:
        # Also if Redis is away: the next connection begins with what is wanted.
        await self._check_in(0)
        source = self._channel(channel)
        subscription = self.subscriptions.wanted[channel]
        if not subscription.confirmed and subscription.link.connection is not None:
            await self._confirm_reader(source)
        return source

    async def _confirm_reader(self, source: Channel) -> None:
        try:
            await self.subscriptions.confirm(source.name)
        except ConnectionLost:
            return  # the new connection begins with what is wanted
        except redis.exceptions.ResponseError:
            with self._room:
                if not (source.closed or source.owned or source.demand):
                    self._here.forget(source)
            raise

    async def new_channel(self, prefix: str = "specific.") -> str:
        """Return a process-specific channel name that nobody has, starting with ``prefix``; Redis has confirmed it.

        If cancelled, there is no such channel.
        """
        self._require_valid_prefix(prefix)
        await self._check_in()
        self._require_open()
        channel = self._channel(self._new_name(prefix))
        try:
            await self._confirm(channel.name)
        except BaseException:
            self._forget(channel)
            raise
        return channel.name

    async def flush(self) -> None:
        """Throw away the messages and memberships of this process; Redis keeps none. Who waits goes on waiting.

        If cancelled, that was done, but a message that was on its way may arrive.
        """
        await self._check_in()
        self._require_open()
        self._clear()
        # What was sent before has arrived when this returns.
        await at_each(lambda link: self._execute(link, "PING"), self._router.links)
        self._clear()

    def _clear(self) -> None:
        rung: list[Waiter] = []
        with self._room:
            self._here.clear(rung)
        self._room.wake(rung)

    # Groups

    async def group_add(self, group: str, channel: str) -> None:
        """Make ``channel``, a channel of this process, a member of ``group``; Redis has confirmed it.

        Raises ``RuntimeError`` for a channel that this process neither made nor received from: each process delivers to its
        own members. If cancelled, it is a member or is not.
        """
        self.require_valid_group_name(group)
        self.require_valid_channel_name(channel)
        await self._check_in()
        self._require_open()
        if channel not in self._here.channels:
            raise RuntimeError(
                f"group_add() in a pub/sub layer takes channels of this process, and {channel!r} is none: make it with "
                "new_channel() or subscribe(), or receive from it first"
            )
        await self._join(group, channel, self.group_expiry)

    async def group_discard(self, group: str, channel: str) -> None:
        """End the membership of ``channel`` in ``group``, as ``BaseChannelLayer.group_discard`` says."""
        self.require_valid_group_name(group)
        self.require_valid_channel_name(channel)
        await self._check_in()
        self._require_open()
        with self._room:
            self._here.leave(group, channel)

    async def group_send(self, group: str, message: Message, *, exclude: Collection[str] = ()) -> None:
        """Send ``message`` to every member of ``group``, in all processes, as ``BaseChannelLayer.group_send`` says.

        The names in ``exclude`` travel with the message; members in a process that runs channels_redis receive it all the same.
        """
        self.require_valid_group_name(group)
        excluded = self._require_valid_exclude(exclude)
        body = self._codec.encode(message)
        await self._check_in()
        self._require_open()
        if excluded:
            body = self._codec.address(body, EXCLUDE_KEY, list(excluded))
        key = self.group_key(group)
        await self._execute(self._link_of(key), self._publish, key, self._seal(body))
        self._sent += 1

    async def group_channels(self, group: str) -> set[str]:
        """Return the members of ``group`` in this process."""
        self.require_valid_group_name(group)
        await self._check_in()
        self._require_open()
        rung: list[Waiter] = []
        with self._room:
            target = self._here.groups.get(group)
            names = set() if target is None else {one.name for one in target.present(self._clock(), rung)}
        self._room.wake(rung)
        return names

    def statistics(self) -> RedisLayerStatistics:
        """Return a snapshot of this process: ``sent`` counts its calls of ``send`` and ``group_send``."""
        return self._statistics(self._sent)

    # Inboxes

    async def inbox_open(self, prefix: str, capacity: int | None, overflow: Overflow, on_gap: OnGap) -> str:
        """Make the channel of an inbox; Redis has confirmed it."""
        await self._check_in()
        self._require_open()
        name = self._new_name(prefix)
        self._open_inbox(name, capacity, overflow, on_gap)
        try:
            await self._confirm(name)
        except BaseException:
            await self.inbox_close(name, ())
            raise
        return name

    async def inbox_close(self, channel: str, groups: Collection[str]) -> None:  # noqa: ARG002 - the channel knows them
        """Leave all groups and forget the channel, at once."""
        rung: list[Waiter] = []
        with self._room:
            self._here.close_inbox(channel, rung)
        self._room.wake(rung)

    async def inbox_join(self, channel: str, group: str) -> None:
        """Make the inbox a member of ``group`` until it leaves; Redis has confirmed it."""
        await self._check_in()
        self._require_open()
        await self._join(group, channel, None)

    async def _join(self, group: str, channel: str, expiry: float | None) -> None:
        rung: list[Waiter] = []
        with self._room:
            now = self._clock()
            self._room.index.sweep(now, rung)
            member = self._here.channels[channel]
            member.expire(now, rung)
            is_new = group not in self._here.groups or channel not in self._here.groups[group].members
            self.subscriptions.want(self.group_key(group))
            self._here.join(group, member, None if expiry is None else now + expiry)
        self._room.wake(rung)
        try:
            await self._confirm(self.group_key(group))
        except BaseException:
            if is_new:
                with self._room:
                    self._here.leave(group, channel)
            raise

    # Subscriptions

    def _log_forbidden(self, name: str, error: Exception) -> None:
        self._troubles.note(SUBSCRIPTION_REFUSED, name, error=said(error))

    async def _restore(self, link: Link, connection: Connection) -> None:
        await self.subscriptions.restore(link, connection)

    async def _confirm(self, name: str) -> None:
        try:
            await self.subscriptions.confirm(name)
        except ConnectionLost as error:
            self._raise_closed(error)
            raise

    def _up(self, link: Link) -> None:
        """What is wanted was restored already."""
        if link.connects > 1:
            self.mark_outage(link)
            self._tell_channels(self.on_reconnect)
        self.subscriptions.restored(link)

    def _down(self, link: Link) -> None:
        self.subscriptions.lost(link)
        self._tell_channels(self.on_disconnect)

    def _tell_channels(self, message_type: str | None) -> None:
        if message_type is None:
            return
        body = self._codec.encode({"type": message_type})
        rung: list[Waiter] = []
        with self._room:
            now = self._clock()
            full = [
                channel.name
                for channel in tuple(self._here.channels.values())
                if not self._arrive(channel, (now + self.expiry, body), now, rung)
            ]
        self._room.wake(rung)
        for name in full:
            self._log_dropped(name)

    def _pushed(self, push: list[Any]) -> None:
        """A message came."""
        if push[:1] in ([b"message"], [b"smessage"]):
            name = push[1].decode("utf-8", "replace")
            if not self.cluster or self._heard.is_new(name, push[2]):
                self._deliver(name, push[2])
        elif push[:1] == [b"sunsubscribe"]:
            self.subscriptions.dropped(push[1].decode("utf-8", "replace"))

    def _deliver(self, name: str, payload: bytes) -> None:
        start = f"{self.prefix}__group__"
        group = self._here.groups.get(name[len(start) :]) if name.startswith(start) else None
        channel = self._here.channels.get(name)
        if group is None and channel is None:
            return
        try:
            body = self._codec.unseal(payload)
            message = self._codec.decode_body(body)
            excluded: frozenset[str] = frozenset()
            if EXCLUDE_KEY in message:
                names = message.pop(EXCLUDE_KEY)
                if isinstance(names, list):
                    excluded = frozenset(name for name in names if isinstance(name, str))
                body = self._codec.encode_again(message)
        except Unreadable as why:
            self._drop_unreadable(name, why)
            return
        rung: list[Waiter] = []
        missed = 0
        with self._room:
            now = self._clock()
            expires_at = now + self.expiry
            self._room.index.sweep(now, rung)
            if group is not None:
                missed = group.deliver((expires_at, body), excluded, now, rung)
            is_full = channel is not None and not self._arrive(channel, (expires_at, message), now, rung)
        self._room.wake(rung)
        if group is not None and missed:
            self._troubles.note(GROUP_SEND_DROPPED, group.name, missed)
        if is_full:
            self._log_dropped(name)

    # The life of an open layer

    def look_after(self, channel: _PubSubChannel) -> None:
        """A message expired unread on ``channel``. For parts of the layer."""
        self._deserted.add(channel)
        self.note_chore()

    def _forget(self, channel: Channel) -> None:
        with self._room:
            if not channel.closed:
                channel.leave_all()
                self._here.forget(channel)

    async def _do_chores(self) -> None:
        deserted, self._deserted = self._deserted, set()
        for channel in deserted:
            with self._room:
                if channel.idle and not channel.closed:
                    self._here.forget(channel)

    @property
    def _tick_seconds(self) -> float:
        return self.keep_alive

    async def _tick(self, link: Link) -> None:
        await link.execute("PING")

    def _begin_closing(self) -> None:
        """There is nothing to give back."""

    async def _wind_up(self, link: Link) -> None:
        """There is nothing to give back."""
