"""How messages of the queue layer come out of Redis, into the mailboxes of this process.

Rules:
- a normal channel's messages stay in Redis until a reader waits here. A message that was popped for a reader who is gone
  goes back to where it was, by its score; while Redis is away it waits here for the next reader.
- a process-specific channel's messages are in one key for the whole process, which this process alone reads: it is emptied
  as messages come, into a mailbox for each channel, so that a slow reader costs its neighbours nothing.
- a normal channel is *idle*, *fetching* (a pop is in flight on the connection for commands) or *blocked* (its key is in
  the blocking pop). Never two at once, so messages cannot overtake each other.
- one blocking pop at a time, on a connection of its own, over all keys wanted. To change the keys a message to ourselves
  (the wake key) ends it. Its reply is handled, and the next pop sent, in one plain function.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Final

import redis.exceptions
from anyio import Event, sleep
from anyio.abc import TaskGroup

from anyio_channels.layers.base import Message
from anyio_channels.layers.codec import RESERVED_KEY, Unreadable
from anyio_channels.layers.local import Channel, Directory
from anyio_channels.layers.mailbox import Waiter

from .connection import Argument, Connection, ConnectionLost, Request
from .layer import RedisLayer
from .link import Link, call_soon
from .scripts import GIVE_BACK, POP

__all__ = ["Failure", "Popped", "QueueChannel", "QueueIntake"]

_DRAIN: Final = 1000
"""How many messages are popped at once from what only this process reads."""
_UNBOUNDED: Final = 2**62
_PASSING: Final = (
    redis.exceptions.ConnectionError,
    redis.exceptions.ReadOnlyError,
    redis.exceptions.MasterDownError,
    redis.exceptions.TryAgainError,
    redis.exceptions.ClusterDownError,
)
"""What will pass: readers wait."""
_TROUBLE_PAUSE: Final = 0.2


class Popped:
    """A message of a normal channel, with what it takes to put it back."""

    __slots__ = ("entry", "message", "score")

    def __init__(self, message: Message, entry: bytes, score: bytes | str) -> None:
        """``entry`` and ``score`` are what Redis held."""
        self.message: Message = message
        self.entry: bytes = entry
        self.score: bytes | str = score


class Failure:
    """Stands in a mailbox for a reader whose messages cannot be fetched."""

    __slots__ = ("error",)

    def __init__(self, error: Exception) -> None:
        """``error`` is what the reader gets."""
        self.error: Exception = error


class QueueChannel(Channel):
    """A channel of this process, and how its messages come."""

    __slots__ = ("blocked", "fetching", "key", "normal")

    directory: _QueueDirectory

    def __init__(self, directory: Directory, name: str, capacity: int, **options: Any) -> None:
        """Begin idle."""
        super().__init__(directory, name, capacity, **options)
        layer = self.directory.layer
        self.normal: bool = "!" not in name
        self.key: str = layer.channel_key(name)
        self.fetching: bool = False
        self.blocked: bool = False

    @property
    def idle(self) -> bool:
        """Whether nothing is in here or on its way here."""
        return not (self.fetching or self.blocked) and super().idle

    def reader_waits(self) -> None:
        """Have the messages of a normal channel fetched."""
        if self.normal:
            self.directory.layer.fetch(self)

    def reader_left(self) -> None:
        """There may be something to give back."""
        if self.normal:
            self.directory.layer.look_after(self)

    def expired_unread(self) -> None:
        """The reader is gone, unless it is an inbox's: its groups are told in Redis too."""
        if not self.owned and self.groups:
            self.directory.layer.leave_soon([(group.name, self.name) for group in self.groups])
            self.leave_all()


class _QueueDirectory(Directory):
    channel_class: type[Channel] = QueueChannel

    def __init__(self, layer: QueueIntake) -> None:
        super().__init__(
            layer._room,  # noqa: SLF001 - a part of the layer
            # What was popped for a reader has been counted in Redis.
            lambda name: layer.get_capacity(name) if "!" in name else _UNBOUNDED,
        )
        self.layer: QueueIntake = layer


class QueueIntake(RedisLayer):
    """The half of the queue layer that receives."""

    def _reset(self) -> None:
        super()._reset()
        self._expired_there = 0
        self._own: dict[str, str] = {}  # keys that only this process reads, with their non-local names
        self._blocked: dict[str, QueueChannel] = {}
        self._to_drain: set[str] = set()
        self._popping = False
        self._pop_ended: Event | None = None
        self._pops_many = False
        self._least_capacity = min([self.capacity, *(capacity for _, capacity in self.channel_capacity)])
        self._pop_trouble: Exception | None = None
        self._pop_text_first = True
        self._waking = False
        self._rounds = 0
        self._client_id = 0
        self._fetches = 0  # pops in flight on the connection for commands
        self._restless: set[QueueChannel] = set()
        self._late: list[tuple[str, Popped]] = []
        self._to_leave: list[tuple[str, str]] = []

    def _make_directory(self) -> Directory:
        return _QueueDirectory(self)

    async def _run(self, tasks: TaskGroup) -> None:
        self._runs = tasks
        self._popper = Link(
            self._topology.owner(""),
            timeout=self.timeout,
            connect_timeout=self.connect_timeout,
            restore=self._ask_for_id,
            on_up=self._popper_up,
        )

    def _popper_up(self, connection: Connection) -> None:  # noqa: ARG002 - the pop asks for it
        if self._popper.connects > 1:
            self._mark_outage()  # the last pop may have taken something that did not come
        self._pop()

    async def _ask_for_id(self, connection: Connection) -> None:
        self._client_id = await connection.execute("CLIENT", "ID")
        self._pops_many = connection.version >= (7, 0)

    # Keys

    def channel_key(self, name: str) -> str:
        """Return the key that holds the messages of the channel ``name``, and of all of its process."""
        return self.prefix + self.non_local_name(name)

    def group_key(self, group: str) -> str:
        """Return the key that holds the members of ``group``."""
        return f"{self.prefix}:group:{group}"

    def _room_key(self, key: str) -> str:
        """Return the key that says that somebody waits for room in the channel with ``key``; in the same slot as that."""
        return f"{self.prefix}:room:{{{key}}}"

    @property
    def _wake_key(self) -> str:
        return f"{self.prefix}:wake:{self._client}"

    def leave_soon(self, memberships: list[tuple[str, str]]) -> None:
        """End memberships, each of ``(group, channel)``, as soon as Redis is there. For parts of the layer."""
        self._to_leave += memberships
        self._note_chore()
        self._leave_now()

    def _leave_now(self) -> None:
        connection = self._link.connection
        if connection is None or not self._to_leave:
            return
        leaving, self._to_leave = self._to_leave, []
        for group, channel in leaving:
            connection.submit("ZREM", self.group_key(group), channel, done=partial(self._left, group, channel))

    def _left(self, group: str, channel: str, request: Request) -> None:
        if isinstance(request.error, ConnectionLost):
            self._to_leave.append((group, channel))  # leaving twice does no harm

    # Receiving from a normal channel

    def fetch(self, channel: QueueChannel) -> None:
        """Readers wait at a normal channel: see that as many messages come. For parts of the layer."""
        if channel.fetching or channel.blocked or not self._is_open:
            return
        connection = self._link.connection
        if connection is None:
            self._block(channel)
            return
        channel.fetching = True
        self._fetches += 1
        call_soon(
            connection,
            POP,
            [channel.key, self._room_key(channel.key)],
            channel.demand,
            self.expiry,
            done=partial(self._fetched, channel),
        )

    def _fetched(self, channel: QueueChannel, request: Request) -> None:
        channel.fetching = False
        self._fetches -= 1
        if request.error is None:
            self._popped(channel, request.reply)
        elif not isinstance(request.error, _PASSING):
            self._fail_readers(channel, request.error)
        if channel.demand:
            self._block(channel)
        else:
            self.look_after(channel)

    def _popped(self, channel: QueueChannel, reply: Any) -> None:
        """Entries of a normal channel came."""
        expired, now, entries = reply
        self._expired_there += expired
        for entry, score in zip(entries[::2], entries[1::2], strict=True):
            self._put_normal(channel, entry, score, float(now))

    def _put_normal(self, channel: QueueChannel, entry: bytes, score: bytes | str, server_time: float) -> None:
        try:
            message = self._codec.decode_body(self._codec.unseal(entry))
        except Unreadable as why:
            self._drop_unreadable(channel.key, why)
            return
        message.pop(RESERVED_KEY, None)  # a broadcast of channels_redis names normal channels too
        popped = Popped(message, entry, score)
        if not self._is_open:
            self._late.append((channel.key, popped))
            return
        rung: list[Waiter] = []
        with self._room:
            now = self._clock()
            expires_at = now + self.expiry - max(0.0, server_time - float(score))
            self._arrive(channel, (expires_at, popped), now, rung)
        self._room.wake(rung)

    def _fail_readers(self, channel: Channel, error: Exception) -> None:
        rung: list[Waiter] = []
        with self._room:
            now = self._clock()
            for _ in range(channel.demand):
                channel.put((now + self.expiry, Failure(error)), now, rung)
        self._room.wake(rung)

    def look_after(self, channel: QueueChannel) -> None:
        """A reader of a normal channel left: there may be something to give back. For parts of the layer."""
        self._restless.add(channel)
        self._note_chore()

    async def _do_chores(self) -> None:
        restless, self._restless = self._restless, set()
        for channel in restless:
            if channel.demand:
                self.fetch(channel)
                continue
            if channel.blocked:
                self._wake()  # it is unblocked when the pop has ended, which may have taken a message already
            connection = self._link.connection
            if connection is None:
                self._restless.add(channel)  # until Redis is back; a reader here may have it meanwhile
                continue
            with self._room:
                items = channel.withdraw()
            self._give_back(connection, channel.key, [item for item in items if isinstance(item, Popped)])
        if self._pop_trouble is not None:
            self._pop_trouble = None
            await sleep(_TROUBLE_PAUSE)
            self._pop()
        self._leave_now()

    def _give_back(self, connection: Connection, key: str, items: list[Popped]) -> None:
        """Put popped messages back to where they were."""
        if not items:
            return
        arguments = [part for item in items for part in (item.score, item.entry)]

        def done(request: Request) -> None:
            if request.error is None:
                return
            self._log_once(
                f"give back {key}", "%d messages of %r could not be given back: %s", len(items), key, request.error
            )
            self._room.books.sent += len(items)
            self._room.books.discarded += len(items)

        # Whole: were it refused because Redis does not know it, the next pop would overtake it.
        connection.submit("EVAL", GIVE_BACK.text, 1, key, self.expiry, *arguments, done=done)

    # The blocking pop

    def _own_key(self, name: str) -> None:
        """See that what is sent to the process of ``name``, a process-specific channel, comes here."""
        key = self.channel_key(name)
        if key not in self._own:
            self._own[key] = self.non_local_name(name)
            self._to_drain.add(key)
            self._wake()

    def _is_own(self, channel: str) -> bool:
        return "!" in channel and self.channel_key(channel) in self._own

    def _block(self, channel: QueueChannel) -> None:
        channel.blocked = True
        self._blocked[channel.key] = channel
        self._wake()

    def _wake(self) -> None:
        """Have the blocking pop begin anew, for other keys."""
        if not self._popping:
            self._pop()
        elif not self._waking and (connection := self._link.connection) is not None:
            self._waking = True
            connection.submit("ZADD", self._wake_key, 0, "", done=partial(self._woken, connection))
            connection.submit("PEXPIRE", self._wake_key, int(self.keep_alive * 2000))

    def _woken(self, connection: Connection, request: Request) -> None:
        if isinstance(request.error, redis.exceptions.ResponseError):
            # Out of memory, most likely: nothing can be written. Some users may not call this one, so it comes second.
            connection.submit("CLIENT", "UNBLOCK", self._client_id)
        elif request.error is not None:
            self._waking = False

    def _pop(self) -> None:
        """Send the next blocking pop, and in front of it what empties the keys of this process."""
        if self._popping or not self._is_open or self._pop_trouble is not None:
            return
        for channel in tuple(self._blocked.values()):
            if not channel.demand:
                channel.blocked = False
                del self._blocked[channel.key]
        keys = [*self._own, *self._blocked]
        if not keys:
            return
        connection = self._popper_link().connection
        if connection is None:
            return  # it begins when the connection is up
        self._waking = False
        self._rounds += 1
        if self._blocked:
            self._to_drain.update(self._own)  # a busy normal channel must not keep them waiting
        for key in self._to_drain:
            script = ("EVALSHA", POP.digest)
            if self._pop_text_first:
                script = ("EVAL", POP.text)
                self._pop_text_first = False
            connection.submit(
                *script, 2, key, self._room_key(key), _DRAIN, self.expiry,
                done=partial(self._drained, key),
            )  # fmt: skip
        self._to_drain.clear()
        # Redis serves the first key that has something: each should come first at times.
        turn = self._rounds % len(keys)
        keys = [self._wake_key, *keys[turn:], *keys[:turn]]
        self._popping = True
        command: tuple[Argument, ...] = ("BZPOPMIN", *keys, self.keep_alive)
        if self._pops_many and not self._blocked:
            # Only keys of this process: it may have all at once.
            command = ("BZMPOP", self.keep_alive, len(keys), *keys, "MIN", "COUNT", _DRAIN)
        connection.submit(*command, done=self._pop_answered, timeout=self.keep_alive + self.timeout)

    def _pop_answered(self, request: Request) -> None:
        self._popping = False
        if self._pop_ended is not None:
            self._pop_ended.set()
            self._pop_ended = None
        if isinstance(request.error, ConnectionLost):
            return  # it goes on when the connection is up
        if request.error is not None:
            self._pop_refused(request.error)
            return
        if request.reply is not None:
            key = request.reply[0].decode()
            if len(request.reply) == 2:  # noqa: PLR2004 - BZMPOP: the key, and a list of pairs
                self._popped_many(key, request.reply[1])
                self._pop()
                return
            _, entry, score = request.reply
            if key in self._own:
                self._put_own(key, entry, score, self._popper.server_time)
                self._to_drain.add(key)
            elif key in self._blocked:
                channel = self._blocked.pop(key)
                channel.blocked = False
                self._put_normal(channel, entry, repr(float(score)), self._popper.server_time)
                self.fetch(channel)  # for more readers, and for senders who wait for room
                self.look_after(channel)  # its last reader may have left while the pop was on its way
        self._pop()

    def _popped_many(self, key: str, entries: list[Any]) -> None:
        if key == self._wake_key:
            return
        server_time = self._popper.server_time
        for entry, score in entries:
            self._put_own(key, entry, score, server_time)
        if len(entries) >= self._least_capacity:
            self._to_drain.add(key)  # it may have been full, and senders may wait for room: that script tells them

    def _give_back_late(self, connection: Connection) -> None:
        late, self._late = self._late, []
        for key, popped in late:
            self._give_back(connection, key, [popped])

    def _drained(self, key: str, request: Request) -> None:
        if request.error is not None:
            self._pop_text_first = True  # Redis has lost the script, most likely
            self._to_drain.add(key)
            return
        expired, now, entries = request.reply
        self._expired_there += expired
        for entry, score in zip(entries[::2], entries[1::2], strict=True):
            self._put_own(key, entry, float(score), float(now))
        if len(entries) >= 2 * _DRAIN:
            self._to_drain.add(key)

    def _pop_refused(self, error: Exception) -> None:
        """Redis does not pop: because of one of the keys, or for a while."""
        if not isinstance(error, _PASSING):
            if not self._blocked:
                # It is a key of this process, and its readers are told.
                for own in tuple(self._here.channels.values()):
                    self._fail_readers(own, error)
            # Whose key it is shows when they are fetched one by one; its readers are told.
            for channel in tuple(self._blocked.values()):
                channel.blocked = False
                del self._blocked[channel.key]
                self.look_after(channel)
        self._log_once("pop", "%s; readers go on waiting", error)
        self._pop_trouble = error
        self._note_chore()

    def _put_own(self, key: str, entry: bytes, score: float, server_time: float) -> None:
        """A message for channels of this process came."""
        try:
            message = self._codec.decode_body(self._codec.unseal(entry))
            names = message.pop(RESERVED_KEY, None)
            if isinstance(names, str):
                names = [names]
            start = self._own[key]
            if not isinstance(names, list) or not all(
                isinstance(name, str) and name.startswith(start) for name in names
            ):
                raise Unreadable(f"{RESERVED_KEY} should name channels of this process, but is {names!r:.100}")  # noqa: TRY301
            # Each receiver has a copy of its own, so what goes to several is kept encoded.
            item = message if len(names) == 1 else self._codec.encode_again(message)
        except Unreadable as why:
            self._drop_unreadable(key, why)
            return
        rung: list[Waiter] = []
        dropped: list[str] = []
        with self._room:
            now = self._clock()
            expires_at = now + self.expiry - max(0.0, server_time - score)
            channels = self._here.channels
            for name in names:
                channel = channels.get(name) or self._here.add(name)
                if not self._arrive(channel, (expires_at, item), now, rung):
                    dropped.append(name)
        self._room.wake(rung)
        for name in dropped:
            self._log_dropped(name)

    def _is_attended(self, source: Channel) -> bool:
        return "!" in source.name

    async def _listen(self, channel: str) -> Channel:
        if "!" in channel:
            self._own_key(channel)
        else:
            await self._check_in(0)  # it asks Redis before it waits
        return self._channel(channel)

    def _open_item(self, source: Channel, item: Any) -> Message:
        if isinstance(item, Popped):
            return item.message
        if isinstance(item, Failure):
            self._room.books.received -= 1  # that was no message
            self._room.books.sent -= 1
            raise item.error
        return super()._open_item(source, item)

    async def _until_pop_ends(self) -> None:
        """Wait for all that was popped before this call; for as long as the caller allows."""
        if self._popping:
            self._pop_ended = ended = self._pop_ended or Event()
            self._wake()
            await ended.wait()

    def _begin_closing(self) -> None:
        with self._room:
            for channel in self._here.channels.values():
                if "!" not in channel.name:
                    self._late += [
                        (self.channel_key(channel.name), item)
                        for item in channel.withdraw(promised=True)
                        if isinstance(item, Popped)
                    ]

    async def _wind_up(self) -> None:
        await self._until_pop_ends()
        while self._fetches:
            await self._link.execute("PING")
        connection = await self._link.ready()
        self._give_back_late(connection)
        self._leave_now()
        await connection.execute("UNLINK", self._wake_key, *self._own)

    def _popper_link(self) -> Link:
        """Return the link of the blocking pop, and start it at the first call."""
        if len(self._links) == 1:
            self._links.append(self._popper)
            self._runs.start_soon(self._popper.run)
        return self._popper
