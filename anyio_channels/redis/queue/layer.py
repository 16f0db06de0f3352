"""The queue layer: messages wait in Redis, in the bytes of channels_redis 4.3.

Rules:
- this is the API; what lives while the layer is open is a ``Session``, a new one at each opening.
- what must happen at once in Redis is one script; a broadcast is two calls: who the members are, and the messages.
- a large broadcast is several calls, one after the other: neither this process nor Redis handles too much of it at once.
- a call checks its input, then for cancellation, then that the layer is open; only then does it touch Redis.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from threading import get_ident
from typing import Any, Final

import redis.exceptions
from anyio import TASK_STATUS_IGNORED, CancelScope, ClosedResourceError, Event
from anyio.abc import TaskStatus

from anyio_channels.contract.layer import BaseChannelLayer, Life, Message, OnGap, Overflow
from anyio_channels.contract.message import RESERVED_KEY, SerializerFormat
from anyio_channels.contract.options import require_clock, require_count, require_seconds
from anyio_channels.exceptions import ChannelFull
from anyio_channels.local.directory import Channel
from anyio_channels.local.home import AtHome, Home
from anyio_channels.log import GROUP_SEND_DROPPED, Troubles
from anyio_channels.redis.client import ConnectionLost, Done, Host, Link, Request, Script, at_each
from anyio_channels.redis.servers import OnRedis, RedisLayerStatistics, RedisOptions
from anyio_channels.redis.wire import Names, PayloadCodec
from anyio_channels.wakeup import thread

from .delivery import Popped
from .scripts import CLUSTERED, GROUP_MEMBERS, GROUP_SEND, SEND, SEND_WAITING, BroadcastReply
from .session import Session
from .setup import Setup

__all__ = ["RedisChannelLayer"]

_LONGEST_PREFIX: Final = 255
_PIECE_KEYS: Final = 1000
"""How many keys one call of a broadcast sends to at most."""
_PIECE_BYTES: Final = 2**23
"""How many bytes it adds to Redis, about, unless the entry for one key alone is larger."""
_NAME_BYTES: Final = 50
_TAGGED: Final = re.compile(r"[^{}]*\{[^{}]+\}[^{}]*")


class RedisChannelLayer(OnRedis, AtHome):
    """A channel layer whose messages wait in Redis, for any number of processes; channels_redis' bytes.

    To be opened by ``async with layer:`` and used in the event loop that opened it. It holds at most two connections to each
    server: one for commands, and one for the blocking pop as soon as something is to be received; one to each in a cluster.
    """

    _outage = (ConnectionLost,)

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
        ``symmetric_encryption_keys``: the first encrypts, all decrypt. ``random_prefix_length``: up to 255 bytes that make
        each entry unique. ``serializer_format``: ``"msgpack"`` or ``"json"``. ``timeout``: seconds in which a call succeeds or
        fails. ``connect_timeout``: seconds in which a connection is made. ``keep_alive``: seconds between signs of life on an
        idle connection; one that is dead is noticed within ``keep_alive + timeout``. ``clock``: what tells the time in this
        process, in seconds.

        Raises ``TypeError`` or ``ValueError`` naming the option and its rule; nothing is connected yet.
        """
        require_count("random_prefix_length", random_prefix_length, _LONGEST_PREFIX)
        if cluster and isinstance(prefix, str) and re.search("[{}]", prefix) and not _TAGGED.fullmatch(prefix):
            raise ValueError(
                f"prefix in a Redis Cluster has no braces, or one whole tag as in '{{app}}', not {prefix!r}"
            )
        super().__init__(expiry, capacity, channel_capacity, max_message_size=max_message_size, default=default)
        self.group_expiry: float = require_seconds("group_expiry", group_expiry)
        options = RedisOptions(
            hosts=hosts,
            prefix=prefix,
            symmetric_encryption_keys=symmetric_encryption_keys,
            serializer_format=serializer_format,
            timeout=timeout,
            connect_timeout=connect_timeout,
            keep_alive=keep_alive,
            cluster=cluster,
        )
        self._use(options)
        self._codec = PayloadCodec(
            self.max_message_size,
            self.default,
            serializer_format=serializer_format,
            symmetric_encryption_keys=symmetric_encryption_keys,
            random_prefix_length=random_prefix_length,
            expiry=expiry,
        )
        self._clock = require_clock(clock)
        self._troubles = Troubles(clock, self.expiry, self)
        self._router = options.router
        self._names = Names(prefix)
        self._home = Home(self)
        self._setup = Setup(
            layer=self,
            options=options,
            names=self._names,
            codec=self._codec,
            expiry=self.expiry,
            group_expiry=self.group_expiry,
            get_capacity=self.get_capacity,
            clock=clock,
            troubles=self._troubles,
        )
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._session = Session(self._setup)
        self._here = self._session.here
        self._sent = 0
        self._missed = 0

    # Opening and closing

    async def open(self) -> None:
        """Connect; called by ``async with``.

        Raises an error of the ``redis`` package that names the server and the cause, within ``connect_timeout`` seconds. Of
        several servers one must be there, and none may refuse; those that cannot be reached then are logged and tried on.
        If cancelled, the layer is not open.
        """
        self._begin_anew()
        await self._home.open(self._run)

    async def _run(self, *, task_status: TaskStatus[None] = TASK_STATUS_IGNORED) -> None:
        await self._session.run(task_status=task_status)

    async def close(self) -> None:
        """Close the layer: end all waits, give back what was not received, close the connections.

        Readers and senders that wait, and all later calls, get ``anyio.ClosedResourceError``. Takes up to ``timeout``
        seconds when Redis does not answer. Closing twice, or in a fork, does nothing. If cancelled, the layer is closed all the
        same, but normal channels' messages that were on their way to a reader here may be lost.
        """
        if self._life is not Life.OPEN or self._is_foreign:
            return
        self._life = Life.CLOSING
        self._session.begin_closing()
        try:
            await self._session.wind_up()
        finally:
            try:
                with CancelScope(shield=True):
                    await self._home.stop()
            finally:
                self._life = Life.CLOSED
                self._troubles.close()

    # Sending

    async def send(self, channel: str, message: Message, *, wait: bool = False) -> None:
        """Send ``message`` to ``channel``, as ``BaseChannelLayer.send`` says.

        The capacity of a process-specific channel is shared, in Redis, by all channels of its process; they are emptied by that
        process as messages come. Raises ``redis.ConnectionError``, saying whether the message may have been sent, when Redis
        does not answer within ``timeout`` seconds. ``wait=True`` is a ``RuntimeError`` for a process-specific channel: only its
        process knows whether there is room in its mailbox.

        If cancelled, the message was sent or was not. One that was counts as ``sent`` as soon as Redis has said so.
        """
        self.require_valid_channel_name(channel)
        if wait and "!" in channel:
            raise RuntimeError(
                f"send(wait=True) cannot wait for room in {channel!r}: on the queue layer only the process that reads a "
                "process-specific channel knows its room; send to a normal channel (a name without '!'), or without wait=True"
            )
        capacity = self.get_capacity(channel)
        body = self._codec.encode(message)
        if "!" in channel:
            body = self._codec.address(body, RESERVED_KEY, channel)
        state = thread.state
        if state.is_due():
            await state.give_way()
        if self._life is not Life.OPEN or state.running_loop() is not self._home.token:
            self._home.require_open()  # says what is wrong
        key = self._names.channel(channel)
        entry = self._codec.seal(body)
        if wait:
            attempt = partial(self._send_or_wait, key=key, entry=entry, capacity=capacity)
            await self._told(self._session.senders.send(key, attempt))
        elif await self._send_now(key, entry, capacity, self._sent_late) < 0:
            raise ChannelFull(f"channel {channel!r} holds {capacity} unexpired messages, its capacity")
        self._sent += 1

    async def _send_now(self, key: str, entry: bytes, capacity: int, late: Done) -> int:
        """Send, and return how many messages had expired there; -1 minus that if the channel is full, and it was not sent.

        ``late`` hears of the reply if this is cancelled.
        """
        link = self._router.owner(key[len(self.prefix) :], key)
        try:  # as _told() does, without the call: for each message
            if self._router.clustered:
                sent = self._names.sent(key)
                reply: int = await link.call(CLUSTERED[SEND], [key], entry, capacity, self.expiry, sent, late=late)
            else:
                reply = await link.call(SEND, [key], entry, capacity, self.expiry, late=late)
        except ConnectionLost as error:
            self._raise_if_closed(error)
            raise
        self._session.delivery.expired_elsewhere += (
            reply if reply >= 0 else -1 - reply
        )  # as _note_expired(), without the call
        return reply

    def _note_expired(self, reply: int) -> None:
        self._session.delivery.expired_elsewhere += reply if reply >= 0 else -1 - reply

    def _sent_late(self, request: Request) -> None:
        """Count a send whose caller was cancelled, if it happened."""
        if request.error is None:
            self._note_expired(request.reply)
            self._sent += request.reply >= 0

    async def _send_or_wait(self, link: Link, key: str, entry: bytes, capacity: int) -> int:
        """Send and return -1; or the milliseconds until the oldest message of the channel expires."""
        self._home.require_open()
        if self._router.clustered:
            expired, milliseconds = await self._call(
                link,
                CLUSTERED[SEND_WAITING],
                [key],
                entry,
                capacity,
                self.expiry,
                self._names.sent(key),
                late=self._waited_late,
            )
        else:
            expired, milliseconds = await self._call(
                link,
                SEND_WAITING,
                [key, self._names.room(key)],
                entry,
                capacity,
                self.expiry,
                late=self._waited_late,
            )
        self._session.delivery.expired_elsewhere += expired
        return int(milliseconds)

    def _waited_late(self, request: Request) -> None:
        """Count a send that waited for room and was cancelled, if it happened."""
        if request.error is None:
            expired, milliseconds = request.reply
            self._session.delivery.expired_elsewhere += expired
            self._sent += milliseconds < 0

    async def group_send(self, group: str, message: Message, *, exclude: Collection[str] = ()) -> None:
        """Send ``message`` to every member of ``group``, as ``BaseChannelLayer.group_send`` says.

        Where the members are on several servers, those of one that is down are not sent it, the others are, and the error
        says which is down. More than 1,000 keys of one server, or 8 MiB of entries, take several calls, each of which succeeds or
        fails within ``timeout``; if Redis refuses one of them, the others are sent.

        If cancelled, all on one server were sent it or none, by several calls too, unless the connection breaks; in a cluster
        that holds for each key, that is for each normal channel and each process.
        """
        self.require_valid_group_name(group)
        excluded = self._require_valid_exclude(exclude)
        body = self._codec.encode(message)
        await self._check_in()
        self._home.require_open()
        self._sweep(group)
        members: dict[str, list[str]] = {}  # by the key, which those of one process share
        for name in await self._members(group):
            if name not in excluded:
                members.setdefault(self._names.channel(name), []).append(name)
        batches: dict[Link, dict[str, list[str]]] = {}
        for key, names in members.items():
            batches.setdefault(self._session.link_of(key), {})[key] = names

        async def send_there(link: Link) -> None:
            if self._router.clustered:
                await self._send_to_slots(group, body, batches[link])
            else:
                await self._told(self._send_there(link, group, body, batches[link]))

        if batches:
            await at_each(send_there, list(batches))

    async def _send_there(self, link: Link, group: str, body: bytes, batch: dict[str, list[str]]) -> None:
        """Send to the members of ``group`` on one server, by a call for each piece, in which the body is once.

        When the first has run the others follow, also if this is cancelled, or one of them is refused.
        """
        pieces = _pieces(batch, len(body))
        errors: list[Exception] = []
        ended = Event()

        def answered(piece: dict[str, list[str]], request: Request) -> None:
            if request.error is None:
                self._count(group, piece, request.reply)
            else:
                errors.append(request.error)
                if not isinstance(request.error, redis.exceptions.ResponseError) or link.connection is None:
                    ended.set()  # the server is away
                    return
            send_next()

        def send_next() -> None:
            if (piece := next(pieces, None)) is None:
                ended.set()
            else:
                link.call_soon(*self._to_call(body, piece), done=partial(answered, piece))

        piece = next(pieces)
        try:
            reply = await link.call(*self._to_call(body, piece), late=partial(answered, piece))
            self._count(group, piece, reply)
        except redis.exceptions.ResponseError as error:
            errors.append(error)
        if len(piece) < len(batch):
            send_next()
            await ended.wait()
        if errors:
            raise errors[0]

    def _to_call(self, body: bytes, piece: dict[str, list[str]]) -> tuple[Any, ...]:
        """Return the script, keys and arguments that send to the members in ``piece``."""
        common, around = self._codec.seal_each(body, RESERVED_KEY, piece.values())
        arguments: list[Any] = [self.expiry, common]
        for names, (before, behind) in zip(piece.values(), around, strict=True):
            arguments += (self.get_capacity(names[0]), before, behind)
        return GROUP_SEND, list(piece), *arguments

    def _count(self, group: str, batch: dict[str, list[str]], reply: BroadcastReply) -> None:
        """Keep the books of a broadcast to the members in ``batch``."""
        self._session.delivery.expired_elsewhere += reply.expired
        members = list(batch.values())
        self._sent += sum(map(len, members))
        self._miss(group, sum(len(names) for number, names in enumerate(members, 1) if number in reply.full))
        for number, names in enumerate(members, 1):
            if number in reply.stale:
                self._session.memberships.remove_dead(group, names)

    async def _send_to_slots(self, group: str, body: bytes, batch: dict[str, list[str]]) -> None:
        """Send to the members on one node of a cluster: a call for each key, those of one piece at the same time."""
        missed = 0

        def count(key: str, reply: int) -> int:
            """Keep the books of one reply, and return how many members missed the message."""
            if reply not in (0, -1):
                self._session.memberships.remove_dead(group, batch[key])
            self._sent += len(batch[key])
            return len(batch[key]) if reply < 0 else 0

        async def send(key: str) -> None:
            nonlocal missed
            names = batch[key]

            def late(request: Request) -> None:
                if request.error is None:
                    self._note_expired(request.reply)
                    self._miss(group, count(key, request.reply))

            entry = self._codec.seal(self._codec.address(body, RESERVED_KEY, names))
            reply = await self._send_now(key, entry, self.get_capacity(names[0]), late)
            missed += count(key, reply)

        refusals: list[redis.exceptions.ResponseError] = []
        try:
            for piece in _pieces(batch, len(body)):
                try:
                    await at_each(send, list(piece))
                except redis.exceptions.ResponseError as error:
                    refusals.append(error)
        finally:
            self._miss(group, missed)
        if refusals:
            raise refusals[0]

    def _miss(self, group: str, missed: int) -> None:
        if missed:
            self._missed += missed
            self._troubles.note(GROUP_SEND_DROPPED, group, missed)

    # Receiving

    async def receive(self, channel: str) -> Message:
        """Wait for the next message on ``channel``, as ``BaseChannelLayer.receive`` says.

        Goes on waiting while Redis is away. Raises ``redis.ResponseError`` when Redis refuses to hand out this channel.
        """
        source = self._here.channels.get(channel) if isinstance(channel, str) else None  # a name that is there is valid
        item = None
        if source is not None and self._life is Life.OPEN and get_ident() == self._home.thread:
            if source.entries:
                state = thread.state
                if state.is_due():
                    try:
                        await state.give_way()
                    except BaseException:
                        source.reader_gave_up()
                        raise
                item = source.take_at_once()
            elif "!" in channel:
                item = await source.take()
        if source is None or item is None:
            source, item = await self._wait(channel)
        if item.__class__ is bytes:
            return self._codec.decode(item)  # one of several copies
        if item.__class__ is dict:
            message: Message = item
            return message
        if isinstance(item, Popped):
            return item.message
        return self._session.delivery.message_of(source, item)

    async def _wait(self, channel: str) -> tuple[Channel, Any]:
        """Wait for the next item on ``channel``, in turn, and return it with the channel's mailbox."""
        self.require_valid_channel_name(channel)
        self._home.require_open()
        if "!" not in channel:
            await self._check_in(0)  # it asks Redis before it waits
        while True:
            source = self._here.find(channel)
            try:
                return source, await source.take()
            except ClosedResourceError:
                if not source.dropped:
                    raise
                # It was idle, and dropped from the list between finding it and waiting at it.

    async def _arrived(self, channel: str) -> None:
        """Return when all that waits for a reader here has been popped; at once while its server is away."""
        await self._session.popped(channel)

    async def new_channel(self, prefix: str = "specific.") -> str:
        """Return a process-specific channel name that nobody has, starting with ``prefix``."""
        self._require_valid_prefix(prefix)
        await self._check_in()
        self._home.require_open()
        return self._here.make(self._new_name(prefix))

    def _new_name(self, prefix: str) -> str:
        name = f"{prefix}{self._session.client}!{secrets.token_hex(8)}"
        self._session.own(name)
        return name

    async def flush(self) -> None:
        """Throw away all messages and memberships of this ``prefix``, as ``BaseChannelLayer.flush`` says.

        Keys of a longer prefix stay, if a layer of that prefix is or was open (channels_redis: if it has a group). Takes time in
        proportion to all keys in the database. If cancelled, some may be thrown away and others not.
        """
        await self._check_in()
        self._home.require_open()
        self._here.clear()
        await self._told(at_each(self._session.flush_server, self._router.links))
        self._here.clear()

    # Groups

    async def group_add(self, group: str, channel: str) -> None:
        """Make ``channel`` a member of ``group``, as ``BaseChannelLayer.group_add`` says."""
        self.require_valid_group_name(group)
        self.require_valid_channel_name(channel)
        await self._check_in()
        self._home.require_open()
        if self._here.is_ours(channel):
            await self._told(self._session.memberships.join(group, str(channel)))
        else:
            await self._told(self._session.memberships.add(group, channel))

    async def group_discard(self, group: str, channel: str) -> None:
        """End the membership of ``channel`` in ``group``, as ``BaseChannelLayer.group_discard`` says."""
        self.require_valid_group_name(group)
        self.require_valid_channel_name(channel)
        await self._check_in()
        self._home.require_open()
        self._here.leave(group, channel)
        await self._told(self._session.memberships.discard(group, channel))

    async def group_channels(self, group: str) -> set[str]:
        """Return the members of ``group`` as they are now, in whatever process."""
        self.require_valid_group_name(group)
        await self._check_in()
        self._home.require_open()
        self._sweep(group)
        return set(await self._members(group))

    def _sweep(self, group: str) -> None:
        """Drop what has expired in this process; members of ``group`` whose time is over have left before Redis is asked."""
        self._here.sweep(group=group)
        self._session.memberships.leave_now()
        self._troubles.look()

    async def _members(self, group: str) -> list[str]:
        names: list[str] = []
        key = self._names.group(group)
        for raw in await self._call(self._session.memberships.owner(group), GROUP_MEMBERS, [key], self.group_expiry):
            name = _member_name(raw)
            if name is None:
                self._session.delivery.drop_unreadable(key, f"{raw!r} is not a channel name")
            else:
                names.append(name)
        return names

    # Inboxes

    async def inbox_open(self, prefix: str, capacity: int | None, overflow: Overflow, on_gap: OnGap) -> str:
        """Make the channel of an inbox."""
        await self._check_in()
        self._home.require_open()
        name = self._new_name(prefix)
        self._here.open_inbox(name, capacity, overflow, on_gap)
        return name

    async def inbox_close(self, channel: str, groups: Collection[str]) -> None:
        """Leave all groups and forget the channel at once; Redis is told without waiting, also if it is away now."""
        self._home.require_open()
        joined = {*groups, *self._here.close_inbox(channel)}
        self._session.memberships.leave_soon((group, channel) for group in joined)

    async def inbox_join(self, channel: str, group: str) -> None:
        """Make the inbox a member of ``group`` until it leaves; it is renewed, and joined again after an outage."""
        await self._check_in()
        self._home.require_open()
        await self._told(self._session.memberships.join(group, channel))

    # Everything else

    def statistics(self) -> RedisLayerStatistics:
        """Return a snapshot of what this process does with the layer.

        ``groups`` and ``members`` are those of its own process-specific channels; ``buffered_messages`` those that wait in this
        process; ``expired`` counts those too that a call of this process found expired in Redis.
        """
        # What expires here may have to be told to Redis, which only the thread of the event loop can do.
        figures = self._here.figures(sweep=get_ident() == self._home.thread)
        figures["sent"] = self._sent
        figures["expired"] += self._session.delivery.expired_elsewhere
        figures["dropped_full"] += self._missed
        figures["dropped_unreadable"] = self._session.delivery.unreadable
        self._troubles.look()
        return RedisLayerStatistics(**figures, **self.options.figures())

    async def _call(self, link: Link, script: Script, keys: Sequence[str], *args: Any, late: Done | None = None) -> Any:
        return await self._told(link.call(script, keys, *args, late=late))


def _pieces(batch: dict[str, list[str]], size: int) -> Iterator[dict[str, list[str]]]:
    """Cut ``batch``, which is not empty, so that no piece has too many keys or bytes; ``size``: of the body."""
    piece: dict[str, list[str]] = {}
    total = 0
    for key, names in batch.items():
        here = size + _NAME_BYTES * len(names)
        if piece and (len(piece) == _PIECE_KEYS or total + here > _PIECE_BYTES):
            yield piece
            piece = {}
            total = 0
        piece[key] = names
        total += here
    yield piece


@lru_cache(maxsize=65536)
def _member_name(raw: bytes) -> str | None:
    """Return the channel name that a member of a group is, or ``None``; the same ones come at every broadcast."""
    name = raw.decode("utf-8", "replace")
    is_name = len(name) < BaseChannelLayer.MAX_NAME_LENGTH and BaseChannelLayer.channel_name_regex.fullmatch(name)
    return name if is_name else None
