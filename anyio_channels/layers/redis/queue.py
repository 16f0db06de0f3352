"""The queue layer: messages wait in Redis, in the bytes of channels_redis 4.3.

Rules:
- what must happen at once in Redis is one script; a broadcast is two calls: who the members are, and the messages.
- an open inbox's memberships are renewed here, and joined again whenever the connection is new or Redis was emptied.
- a sender who waits for room leaves a marker in Redis; whoever pops then says so. Of the senders to one channel in this
  process one asks at a time, the others wait behind it in turn.
- how messages come out of Redis is in ``intake``.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any, Final

import redis.exceptions
from anyio import Event, Lock, move_on_after
from redis.crc import key_slot

from anyio_channels.exceptions import ChannelFull
from anyio_channels.layers.base import BaseChannelLayer, Message, OnGap, Overflow, require_count
from anyio_channels.layers.codec import RESERVED_KEY, SerializerFormat
from anyio_channels.layers.mailbox import Waiter
from anyio_channels.log import GROUP_SEND_DROPPED, MEMBERSHIP_REFUSED, said
from anyio_channels.redis.client import Connection, ConnectionLost, Host, Link, Request, Script, at_each, replies

from .intake import QueueIntake
from .keys import glob_escaped, keys_of
from .layer import RedisLayerStatistics
from .scripts import CLUSTERED, GROUP_ADD, GROUP_MEMBERS, GROUP_SEND, SEND, SEND_WAITING, TICK

__all__ = ["RedisChannelLayer"]

_AT_ONCE: Final = 500
"""How many keys or members one command names, where it may be more."""
_RECHECK: Final = 1.0
"""Seconds after which a sender looks for room that nobody announced: channels_redis does not."""
_TAGGED: Final = re.compile(r"[^{}]*\{[^{}]+\}[^{}]*")


class _Room:
    """Those who wait for room in one channel: one asks, the others wait behind it."""

    __slots__ = ("bell", "link", "lock", "users")

    def __init__(self, link: Link) -> None:
        self.link = link
        self.lock = Lock()
        self.bell = Event()
        self.users = 0


class RedisChannelLayer(QueueIntake):
    """A channel layer whose messages wait in Redis, for any number of processes; channels_redis' bytes.

    To be opened by ``async with layer:`` and used in the event loop that opened it. It holds at most two connections to each
    server: one for commands, and one for the blocking pop as soon as something is to be received; one to each in a cluster.
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
        random_prefix_length: int = 12,
        serializer_format: SerializerFormat = "msgpack",
        *,
        max_message_size: int = 4 * 1024 * 1024,
        default: Callable[[Any], Any] | None = None,
        timeout: float = 5.0,
        connect_timeout: float = 5.0,
        keep_alive: float = 15.0,
        clock: Callable[[], float] = time.monotonic,
        cluster: bool = False,
    ) -> None:
        """Take the options of ``BaseChannelLayer``, those of channels_redis, and some more.

        ``hosts``: a list of servers, over which names are spread: each a URL (``redis://user:password@host:6379/0``,
        ``rediss://``, ``unix://``), a ``(host, port)`` pair, a ``dict`` of the ``redis`` package's options, or one with
        ``"sentinels"`` and ``"master_name"``. ``cluster``: they are nodes of one Redis Cluster. ``prefix``: of all keys.
        ``group_expiry``: seconds after which a membership ends that nobody renews; open inboxes renew theirs.
        ``symmetric_encryption_keys``: the first encrypts, all decrypt. ``random_prefix_length``: bytes that make each entry
        unique. ``serializer_format``: ``"msgpack"`` or ``"json"``. ``timeout``: seconds in which a call succeeds or fails.
        ``connect_timeout``: seconds in which a connection is made. ``keep_alive``: seconds between signs of life on an idle
        connection; one that is dead is noticed within ``keep_alive + timeout``. ``clock``: what tells the time in this
        process, in seconds.

        Raises ``TypeError`` or ``ValueError`` naming the option and its rule; nothing is connected yet.
        """
        require_count("random_prefix_length", random_prefix_length)
        if (
            cluster
            and isinstance(prefix, str)
            and prefix.count("{") + prefix.count("}")
            and not _TAGGED.fullmatch(prefix)
        ):
            raise ValueError(
                f"prefix in a Redis Cluster has no braces, or one whole tag as in '{{app}}', not {prefix!r}"
            )
        self._subscribe = "SSUBSCRIBE" if cluster else "SUBSCRIBE"
        self._unsubscribe = "SUNSUBSCRIBE" if cluster else "UNSUBSCRIBE"
        super().__init__(
            hosts,
            prefix,
            expiry,
            group_expiry,
            capacity,
            channel_capacity,
            symmetric_encryption_keys,
            serializer_format,
            random_prefix_length=random_prefix_length,
            token_expiry=expiry,
            max_message_size=max_message_size,
            default=default,
            timeout=timeout,
            connect_timeout=connect_timeout,
            keep_alive=keep_alive,
            clock=clock,
            cluster=cluster,
        )

    def _reset(self) -> None:
        super()._reset()
        self._rooms: dict[str, _Room] = {}
        self._renewed_at: dict[Link, float] = {}

    # Messages

    async def send(self, channel: str, message: Message, *, wait: bool = False) -> None:
        """Send ``message`` to ``channel``, as ``BaseChannelLayer.send`` says.

        The capacity of a process-specific channel is shared, in Redis, by all channels of its process; they are emptied by that
        process as messages come. Raises ``redis.ConnectionError``, saying whether the message may have been sent, when Redis
        does not answer within ``timeout`` seconds.

        If cancelled, the message was sent or was not.
        """
        self.require_valid_channel_name(channel)
        body = self._codec.encode(message)
        await self._check_in()
        self._require_open()
        if "!" in channel:
            body = self._codec.address(body, RESERVED_KEY, channel)
        key = self.channel_key(channel)
        entry = self._codec.seal(body)
        capacity = self.get_capacity(channel)
        link = self._link_of(channel)
        if wait:
            await self._send_when_room(link, key, entry, capacity)
        elif not await self._send_now(link, key, entry, capacity):
            raise ChannelFull(f"channel {channel!r} holds {capacity} unexpired messages, its capacity")
        self._sent += 1

    async def _send_now(self, link: Link, key: str, entry: bytes, capacity: int) -> bool:
        """Send, or return ``False``: the channel is full."""
        reply: int
        if self._router.clustered:
            reply = await self._call(link, CLUSTERED[SEND], [key], entry, capacity, self.expiry, self.note_key(key))
        else:
            reply = await self._call(link, SEND, [key], entry, capacity, self.expiry)
        self._expired_there += reply if reply >= 0 else -1 - reply
        return reply >= 0

    async def new_channel(self, prefix: str = "specific.") -> str:
        """Return a process-specific channel name that nobody has, starting with ``prefix``."""
        self._require_valid_prefix(prefix)
        await self._check_in()
        self._require_open()
        name = self._new_name(prefix)
        self._own_key(name)
        return name

    async def flush(self) -> None:
        """Throw away all messages and memberships of this ``prefix``, as ``BaseChannelLayer.flush`` says.

        Keys of a longer prefix stay, if a layer of that prefix is or was open (channels_redis: if it has a group). Takes time in
        proportion to all keys in the database. If cancelled, some may be thrown away and others not.
        """
        await self._check_in()
        self._require_open()
        self._clear()
        await at_each(self._flush_server, self._router.links)
        self._clear()

    async def _flush_server(self, link: Link) -> None:
        found: set[bytes] = set()
        cursor = 0
        while True:
            scan = ("SCAN", cursor, "MATCH", glob_escaped(self.prefix) + "*", "COUNT", 1000)
            cursor, keys = await self._execute(link, *scan, parse=replies.scanned)
            found.update(keys)
            if cursor == 0:
                break
        for key in keys_of(self.prefix.encode(), found):
            link.submit("UNLINK", key)
        await self._execute(link, "PING")
        with move_on_after(self.timeout):
            await self._poppers[link].until_ended()  # what was popped before may be on its way

    def _clear(self) -> None:
        rung: list[Waiter] = []
        with self._room:
            self._here.clear(rung)
        self._room.wake(rung)

    # Groups

    async def group_add(self, group: str, channel: str) -> None:
        """Make ``channel`` a member of ``group``, as ``BaseChannelLayer.group_add`` says."""
        self.require_valid_group_name(group)
        self.require_valid_channel_name(channel)
        await self._check_in()
        self._require_open()
        await self._call(self._link_of_group(group), GROUP_ADD, [self.group_key(group)], self.group_expiry, channel)
        if self._is_own(channel):
            self._join_here(group, channel, self.group_expiry)

    async def group_discard(self, group: str, channel: str) -> None:
        """End the membership of ``channel`` in ``group``, as ``BaseChannelLayer.group_discard`` says."""
        self.require_valid_group_name(group)
        self.require_valid_channel_name(channel)
        await self._check_in()
        self._require_open()
        with self._room:
            self._here.leave(group, channel)
        await self._execute(self._link_of_group(group), "ZREM", self.group_key(group), channel)

    async def group_send(self, group: str, message: Message, *, exclude: Collection[str] = ()) -> None:
        """Send ``message`` to every member of ``group``, as ``BaseChannelLayer.group_send`` says.

        Where the members are on several servers, those of one that is down are not sent it, the others are, and the error
        says which is down. If cancelled, all on one server were sent it or none.
        """
        self.require_valid_group_name(group)
        excluded = self._require_valid_exclude(exclude)
        body = self._codec.encode(message)
        await self._check_in()
        self._require_open()
        self._sweep()
        members: dict[str, list[str]] = {}  # by the non-local name
        for name in await self._members(group):
            if name not in excluded:
                head, mark, _ = name.partition("!")
                members.setdefault(head + mark, []).append(name)
        if not members:
            return
        batches: dict[Link, list[list[str]]] = {}
        for start, names in members.items():
            batches.setdefault(self._router.owner(start, self.prefix + start), []).append(names)

        async def send_there(link: Link) -> None:
            await self._send_batch(link, group, body, batches[link])

        await at_each(send_there, list(batches))

    async def _send_batch(self, link: Link, group: str, body: bytes, batch: list[list[str]]) -> None:
        """Send to the members of ``group`` on one server; ``batch`` has the names that share a key."""
        arguments: list[Any] = []
        for names in batch:
            arguments += (
                self.get_capacity(names[0]),
                self._codec.seal(self._codec.address(body, RESERVED_KEY, names)),
            )
        if self._router.clustered:
            await self._send_to_slots(link, group, batch, arguments)
            return
        keys = [self.channel_key(names[0]) for names in batch]
        expired, full = await self._call(link, GROUP_SEND, keys, self.expiry, *arguments)
        self._expired_there += expired
        self._sent += sum(map(len, batch))
        self._miss(group, sum(len(names) for number, names in enumerate(batch, 1) if number in full))

    async def _send_to_slots(self, link: Link, group: str, batch: list[list[str]], arguments: list[Any]) -> None:
        """Send to the members on one node of a cluster: a call for each key, all at the same time."""
        missed = 0

        async def send(part: tuple[list[str], int, bytes]) -> None:
            nonlocal missed
            names, capacity, entry = part
            if not await self._send_now(link, self.channel_key(names[0]), entry, capacity):
                missed += len(names)
            self._sent += len(names)

        try:
            await at_each(send, list(zip(batch, arguments[::2], arguments[1::2], strict=True)))
        finally:
            self._miss(group, missed)

    def _miss(self, group: str, missed: int) -> None:
        if missed:
            self._missed += missed
            self._troubles.note(GROUP_SEND_DROPPED, group, missed)

    async def group_channels(self, group: str) -> set[str]:
        """Return the members of ``group`` as they are now, in whatever process."""
        self.require_valid_group_name(group)
        await self._check_in()
        self._require_open()
        self._sweep()
        return set(await self._members(group))

    async def _members(self, group: str) -> list[str]:
        names: list[str] = []
        link = self._link_of_group(group)
        for raw in await self._call(link, GROUP_MEMBERS, [self.group_key(group)], self.group_expiry):
            name = _member_name(raw)
            if name is None:
                self._drop_unreadable(self.group_key(group), f"{raw!r} is no channel name")
            else:
                names.append(name)
        return names

    def statistics(self) -> RedisLayerStatistics:
        """Return a snapshot of what this process does with the layer.

        ``groups`` and ``members`` are those of its own process-specific channels; ``buffered_messages`` those that wait in this
        process; ``expired`` counts those too that a call of this process found expired in Redis.
        """
        return self._statistics(self._sent, self._expired_there)

    # Inboxes

    async def inbox_open(self, prefix: str, capacity: int | None, overflow: Overflow, on_gap: OnGap) -> str:
        """Make the channel of an inbox."""
        await self._check_in()
        self._require_open()
        name = self._new_name(prefix)
        self._own_key(name)
        self._open_inbox(name, capacity, overflow, on_gap)
        return name

    async def inbox_close(self, channel: str, groups: Collection[str]) -> None:
        """Leave all groups and forget the channel at once; Redis is told without waiting, also if it is away now."""
        self._require_open()
        rung: list[Waiter] = []
        with self._room:
            inbox = self._here.channels.get(channel)
            joined = {group.name for group in (inbox.groups if inbox is not None else None) or ()}
            self._here.close_inbox(channel, rung)
        self._room.wake(rung)
        self.leave_soon([(group, channel) for group in joined.union(groups)])

    async def inbox_join(self, channel: str, group: str) -> None:
        """Make the inbox a member of ``group`` until it leaves; it is renewed, and joined again after an outage."""
        await self._check_in()
        self._require_open()
        try:
            link = self._link_of_group(group)
            await self._call(link, GROUP_ADD, [self.group_key(group)], self.group_expiry, channel)
        except BaseException:
            self.leave_soon([(group, channel)])
            raise
        self._join_here(group, channel, None)

    def _join_here(self, group: str, channel: str, expiry: float | None) -> None:
        with self._room:
            member = self._here.channels.get(channel) or self._here.add(channel)
            self._here.join(group, member, None if expiry is None else self._clock() + expiry)

    # Calls

    async def _call(self, link: Link, script: Script, keys: Sequence[str], *args: Any) -> Any:
        try:
            return await link.call(script, keys, *args)
        except ConnectionLost as error:
            self._raise_closed(error)
            raise

    # Sending when there is room

    async def _send_when_room(self, link: Link, key: str, entry: bytes, capacity: int) -> None:
        room = self._rooms.get(key)
        if room is None:
            room = self._rooms[key] = _Room(link)
        marker = self.room_key(key)
        room.users += 1
        try:
            async with room.lock:
                listening_to: Connection | None = None
                while True:
                    self._require_open()
                    room.bell = Event()
                    link = self._router.owner(key[len(self.prefix) :], key)
                    if self._router.clustered:
                        call = self._call(
                            link, CLUSTERED[SEND_WAITING], [key], entry, capacity, self.expiry, self.note_key(key)
                        )
                    else:
                        call = self._call(link, SEND_WAITING, [key, marker], entry, capacity, self.expiry)
                    expired, wait = await call
                    self._expired_there += expired
                    if wait < 0:
                        return
                    link = self._router.owner(key[len(self.prefix) :], key)  # it may have moved
                    if listening_to is not link.connection:
                        listening_to = link.connection
                        with suppress(*self._router.passing):
                            await self._execute(link, self._subscribe, marker)
                        continue  # room may have been made meanwhile
                    with move_on_after(min(wait / 1000, _RECHECK)):
                        await room.bell.wait()
        finally:
            room.users -= 1
            if not room.users:
                del self._rooms[key]
                link.submit(self._unsubscribe, marker)

    def _pushed(self, push: list[Any]) -> None:
        """Somebody made room, or in a cluster, sent something."""
        if push[:1] == [b"sunsubscribe"]:
            self.subscriptions.dropped(push[1].decode("utf-8", "replace"))
        elif push[:1] in ([b"message"], [b"smessage"]):
            name = push[1].decode("utf-8", "replace")
            if name.startswith(f"{self.prefix}:sent:{{"):
                self._listening(name)
                return
            room = self._rooms.get(name[len(self.prefix) + len(":room:{") : -1])
            if room is not None:
                room.bell.set()

    # The life of an open layer

    async def _restore(self, link: Link, connection: Connection) -> None:
        """Whoever waits for room hears of it again."""
        markers = [self.room_key(key) for key, room in self._rooms.items() if room.link is link]
        for marker in markers:
            connection.submit(self._subscribe, marker)  # whoever finds it too late looks again every second
        await self.subscriptions.restore(link, connection)

    def _down(self, link: Link) -> None:
        self.subscriptions.lost(link)

    def _up(self, link: Link) -> None:
        """A connection for commands is up: say what this process holds."""
        if link.connects > 1:
            self.mark_outage(link)
        key = self._router.key_at(link, self._prefix_key)
        if key is not None:
            link.call_soon(TICK, [key], self._prefix_life, done=self._log_refusal)
        self._leave_now()
        self._rejoin(link)
        for room in self._rooms.values():
            room.bell.set()
        self._poppers[link].commands_up()
        self.subscriptions.restored(link)
        self.note_chore()

    def _rejoin(self, link: Link) -> None:
        """Join all groups of open inboxes on that server, again or to renew."""
        self._renewed_at[link] = time.monotonic()
        for group in tuple(self._here.groups.values()):
            if self._link_of_group(group.name) is not link:
                continue
            names = [name for name in group.members if name not in group.expiries]
            for start in range(0, len(names), _AT_ONCE):
                link.call_soon(
                    GROUP_ADD,
                    [self.group_key(group.name)],
                    self.group_expiry,
                    *names[start : start + _AT_ONCE],
                    done=self._log_refusal,
                )

    def _servers_changed(self, moved: set[int], lost: set[int]) -> None:  # noqa: ARG002 - what moves takes its messages along
        if lost:
            self._mark_gaps(lambda _, key: key_slot(key.encode()) in lost)
        self.subscriptions.move()
        self.note_chore()

    @property
    def _tick_seconds(self) -> float:
        return min(self.keep_alive, self.group_expiry / 3)

    @property
    def _prefix_key(self) -> str:
        """The key that says that the prefix is used, so that flushing a shorter one spares it."""
        return f"{self.prefix}:prefix"

    @property
    def _prefix_life(self) -> float:
        return 2 * max(self.group_expiry, self.expiry)

    async def _tick(self, link: Link) -> None:
        before = time.monotonic()
        key = self._router.key_at(link, self._prefix_key)
        there = True
        if key is None:
            now = await link.execute("TIME", parse=replies.seconds)
        else:
            there, now = await link.call(TICK, [key], self._prefix_life)
        link.set_clock(now, before)
        self._poppers[link].set_clock(link)
        if not there or before - self._renewed_at[link] >= self.group_expiry / 3:
            self._rejoin(link)  # Redis was emptied, or it is time

    def _begin_closing(self) -> None:
        super()._begin_closing()
        for room in self._rooms.values():
            room.bell.set()

    def _log_refusal(self, request: Request) -> None:
        if isinstance(request.error, redis.exceptions.ResponseError):
            self._troubles.note(MEMBERSHIP_REFUSED, error=said(request.error))


@lru_cache(maxsize=65536)
def _member_name(raw: bytes) -> str | None:
    """Return the channel name that a member of a group is, or ``None``; the same ones come at every broadcast."""
    name = raw.decode("utf-8", "replace")
    is_name = len(name) < BaseChannelLayer.MAX_NAME_LENGTH and BaseChannelLayer.channel_name_regex.fullmatch(name)
    return name if is_name else None
