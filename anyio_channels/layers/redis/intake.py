"""How messages of the queue layer come out of Redis, into the mailboxes of this process.

Rules:
- a normal channel's messages stay in Redis until a reader waits here. A message that was popped for a reader who is gone
  goes back to where it was, by its score; while Redis is away it waits here for the next reader.
- a process-specific channel's messages are in one key for the whole process, which this process alone reads: it is emptied
  as messages come, into a mailbox for each channel, so that a slow reader costs its neighbours nothing.
- a normal channel is *idle*, *fetching* (a pop is in flight on the connection for commands) or *blocked* (its key is in
  the blocking pop). Never two at once, so messages cannot overtake each other.
- the blocking pop of each server is in ``pop``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import Any, Final

from anyio import sleep

from anyio_channels.layers.base import Message
from anyio_channels.layers.codec import RESERVED_KEY, Unreadable
from anyio_channels.layers.local import Channel, Directory
from anyio_channels.layers.mailbox import Waiter
from anyio_channels.log import GIVE_BACK_FAILED, POP_REFUSED, SUBSCRIPTION_REFUSED, said
from anyio_channels.redis.client import OUTAGE, ConnectionLost, Link, LinkEvents, Request, Subscriptions

from .layer import RedisLayer
from .notices import Notices
from .pop import Popper
from .scripts import CLUSTERED, GIVE_BACK, POP, PoppedReply
from .twice import Taken

__all__ = ["Failure", "Popped", "QueueChannel", "QueueIntake"]

_UNBOUNDED: Final = 2**62
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
        self._taken = Taken()
        self.least_capacity: int = min([self.capacity, *(capacity for _, capacity in self.channel_capacity)])
        """The smallest capacity that a channel may have. For parts of the layer."""
        self._poppers: dict[Link, Popper | Notices] = {}
        self._notices = Notices(self)
        # A blocking pop listens for itself; in a cluster these are the channels of note_key().
        self.subscriptions: Subscriptions = Subscriptions(self._router, self._log_forbidden, self._listening)
        self._restless: set[QueueChannel] = set()
        self._late: defaultdict[Link, list[tuple[QueueChannel, Popped]]] = defaultdict(list)
        self._to_leave: list[tuple[str, str]] = []

    def _make_directory(self) -> Directory:
        return _QueueDirectory(self)

    def _new_link(self, link: Link) -> None:
        self._poppers[link] = self._notices if self._router.clustered else Popper(self, link)
        super()._new_link(link)

    def second_link(self, link: Link, events: LinkEvents) -> Link:
        """Return another link to the same server, not running. For parts of the layer."""
        return self._router.second_link(link, events)

    def start_link(self, link: Link) -> None:
        """Have ``link`` run as long as the layer, unless it does. For parts of the layer."""
        self._router.start(link)

    def _log_forbidden(self, name: str, error: Exception) -> None:
        self._troubles.note(SUBSCRIPTION_REFUSED, name, error=said(error))

    def _listening(self, name: str) -> None:
        """Redis confirmed that this process listens to a note: what was sent before is fetched."""
        self._notices.heard(name[len(self.prefix) + len(":sent:{") : -1])

    def note_key(self, key: str) -> str:
        """Return the Redis channel that says that something was sent to ``key``, in a cluster; in the same slot as that."""
        return f"{self.prefix}:sent:{{{key}}}"

    def pop_soon(self, key: str, count: int, done: Callable[[Request], object]) -> None:
        """Pop so many messages, and tell senders who wait for room. For parts of the layer."""
        link = self._router.owner(key[len(self.prefix) :], key)
        if self._router.clustered:
            link.call_soon(CLUSTERED[POP], [key], count, self.expiry, self.room_key(key), done=done)
        else:
            link.call_soon(POP, [key, self.room_key(key)], count, self.expiry, done=done)

    # Keys

    def channel_key(self, name: str) -> str:
        """Return the key that holds the messages of the channel ``name``, and of all of its process."""
        return self.prefix + self.non_local_name(name)

    def group_key(self, group: str) -> str:
        """Return the key that holds the members of ``group``."""
        return f"{self.prefix}:group:{group}"

    def room_key(self, key: str) -> str:
        """Return the key that says that somebody waits for room in the channel with ``key``; in the same slot as that."""
        return f"{self.prefix}:room:{{{key}}}"

    def _link_of(self, name: str) -> Link:
        """Return the link to the server that owns the channel ``name``."""
        name = self.non_local_name(name)
        return self._router.owner(name, self.prefix + name)

    def _link_of_group(self, group: str) -> Link:
        return self._router.owner(group, self.group_key(group))

    def _places(self, channel: Channel) -> Iterator[tuple[str, str]]:
        name = self.non_local_name(channel.name)
        yield name, self.prefix + name
        for group in channel.groups or ():
            yield group.name, self.group_key(group.name)

    def leave_soon(self, memberships: list[tuple[str, str]]) -> None:
        """End memberships, each of ``(group, channel)``, as soon as Redis is there. For parts of the layer."""
        self._to_leave += memberships
        self.note_chore()
        self._leave_now()

    def _leave_now(self) -> None:
        leaving, self._to_leave = self._to_leave, []
        for group, channel in leaving:
            link = self._link_of_group(group)
            link.submit("ZREM", self.group_key(group), channel, done=partial(self._left, group, channel))

    def _left(self, group: str, channel: str, request: Request) -> None:
        if isinstance(request.error, ConnectionLost):
            self._to_leave.append((group, channel))  # leaving twice does no harm

    # Receiving from a normal channel

    def fetch(self, channel: QueueChannel) -> None:
        """Readers wait at a normal channel: see that as many messages come. For parts of the layer."""
        if channel.fetching or channel.blocked or not self._is_open:
            return
        link = self._link_of(channel.name)
        popper = self._poppers[link]
        if link.connection is None:
            popper.block(channel)
            return
        channel.fetching = True
        popper.fetches[link] += 1
        self.pop_soon(channel.key, channel.demand, done=partial(self._fetched, channel, link))

    def _fetched(self, channel: QueueChannel, link: Link, request: Request) -> None:
        channel.fetching = False
        popper = self._poppers[link]
        popper.fetches[link] -= 1
        if request.error is None:
            self._popped(channel, request.reply)
        elif not isinstance(request.error, OUTAGE):
            self._fail_readers(channel, request.error)
        else:
            popper.refused(request.error)
        if channel.demand:
            popper.block(channel)
        else:
            self.look_after(channel)

    def _popped(self, channel: QueueChannel, popped: PoppedReply) -> None:
        """Entries of a normal channel came."""
        self._expired_there += popped.expired
        for entry, score in popped.entries:
            self.put_normal(channel, entry, score, popped.now)

    def count_expired(self, expired: int) -> None:
        """So many messages had expired in Redis. For parts of the layer."""
        self._expired_there += expired

    def put_normal(self, channel: QueueChannel, entry: bytes, score: bytes | str, server_time: float) -> None:
        """A message to a normal channel came. For parts of the layer."""
        sent_at = float(score)
        if not self._taken.is_new(channel.key, entry, sent_at):
            return
        try:
            message = self._codec.decode_body(self._codec.unseal(entry))
        except Unreadable as why:
            self._drop_unreadable(channel.key, why)
            return
        message.pop(RESERVED_KEY, None)  # a broadcast of channels_redis names normal channels too
        popped = Popped(message, entry, score)
        if not self._is_open:
            self._late[self._link_of(channel.name)].append((channel, popped))
            return
        rung: list[Waiter] = []
        with self._room:
            now = self._clock()
            expires_at = now + self.expiry - max(0.0, server_time - sent_at)
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
        self.note_chore()

    async def _do_chores(self) -> None:
        restless, self._restless = self._restless, set()
        for channel in restless:
            if channel.demand:
                self.fetch(channel)
                continue
            link = self._link_of(channel.name)
            self._poppers[link].release(channel)
            if link.connection is None:
                self._restless.add(channel)  # until Redis is back; a reader here may have it meanwhile
                continue
            with self._room:
                items = channel.withdraw()
            self._give_back(link, channel, [item for item in items if isinstance(item, Popped)])
        in_trouble = [popper for popper in self._poppers.values() if popper.trouble is not None]
        if in_trouble:
            await sleep(_TROUBLE_PAUSE)
            for popper in in_trouble:
                popper.try_again()
        self._leave_now()

    def _give_back(self, link: Link, channel: QueueChannel, items: list[Popped]) -> None:
        """Put popped messages back to where they were."""
        if not items:
            return
        key = channel.key
        for item in items:
            self._taken.forget(key, item.entry, float(item.score))
        arguments = [part for item in items for part in (item.score, item.entry)]

        def done(request: Request) -> None:
            error = request.error
            if error is None:
                return
            if self._is_open and isinstance(error, OUTAGE) and not getattr(error, "may_have_run", False):
                for item in items:
                    self.put_normal(channel, item.entry, item.score, link.server_time)  # for a reader here, or later
                self.look_after(channel)
                self._poppers[link].refused(error)
                return
            self._troubles.note(GIVE_BACK_FAILED, key, len(items), error=said(error))
            self._room.books.sent += len(items)
            self._room.books.discarded += len(items)

        # Whole: were it refused because Redis does not know it, the next pop would overtake it.
        link.submit("EVAL", GIVE_BACK.text, 1, key, self.expiry, *arguments, done=done)

    # Process-specific channels

    def _own_key(self, name: str) -> None:
        """See that what is sent to the process of ``name``, a process-specific channel, comes here."""
        self._poppers[self._link_of(name)].own_key(self.channel_key(name), self.non_local_name(name))

    def _is_own(self, channel: str) -> bool:
        return "!" in channel and self.channel_key(channel) in self._poppers[self._link_of(channel)].own

    def fail_own(self, keys: Collection[str], error: Exception) -> None:
        """Those who read what is in ``keys`` are told that it cannot be fetched. For parts of the layer."""
        for channel in tuple(self._here.channels.values()):
            if self.channel_key(channel.name) in keys:
                self._fail_readers(channel, error)

    def log_pop_refused(self, error: Exception) -> None:
        """Log that a server does not pop. For parts of the layer."""
        self._troubles.note(POP_REFUSED, error=said(error))

    def put_own(self, key: str, start: str, entry: bytes, score: float, server_time: float) -> None:
        """A message for channels of this process came, whose names begin with ``start``. For parts of the layer."""
        if not self._taken.is_new(key, entry, score):
            return
        try:
            message = self._codec.decode_body(self._codec.unseal(entry))
            names = message.pop(RESERVED_KEY, None)
            if isinstance(names, str):
                names = [names]
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

    def _begin_closing(self) -> None:
        with self._room:
            for channel in self._here.channels.values():
                if isinstance(channel, QueueChannel) and channel.normal:
                    self._late[self._link_of(channel.name)] += [
                        (channel, item) for item in channel.withdraw(promised=True) if isinstance(item, Popped)
                    ]
            for group in self._here.groups.values():  # of inboxes that are still open: nobody else would end these
                self._to_leave += [(group.name, name) for name in group.members if name not in group.expiries]

    async def _wind_up(self, link: Link) -> None:
        popper = self._poppers[link]
        await popper.wind_up()
        while popper.fetches[link]:
            await link.execute("PING")
        await link.ready()
        for channel, popped in self._late.pop(link, ()):
            self._give_back(link, channel, [popped])
        self._leave_now()
        await popper.forget_keys(link)
