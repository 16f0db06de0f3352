"""What both Redis layers are: options, the life of an open layer, the event loop it belongs to, its books.

Rules:
- an open layer is one task in its task group, and all that it runs is below that task; ``close()`` ends it and waits for
  its end, so nothing is left behind.
- a layer belongs to the event loop that opened it, and says so to others.
- while it is down, readers go on waiting. Calls fail within ``timeout`` seconds.
- what must be done later (giving back, unsubscribing) is noted in ``_chores`` by whoever notices it, in plain functions,
  and done by one task that sleeps until there is something.
"""

from __future__ import annotations

import re
import secrets
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from threading import get_ident
from types import TracebackType
from typing import Any

import redis.exceptions
from anyio import CancelScope, ClosedResourceError, Event, create_task_group, move_on_after, sleep
from anyio.lowlevel import current_token

from anyio_channels.layers.backend import thread
from anyio_channels.layers.base import BaseChannelLayer, ChannelLayerStatistics, Message, require_seconds
from anyio_channels.layers.codec import PayloadCodec, SerializerFormat
from anyio_channels.layers.local import Channel, Directory
from anyio_channels.layers.mailbox import Books, Mailroom, Waiter
from anyio_channels.log import CHANNEL_DROPPED, CLOSE_UNFINISHED, KEEP_ALIVE_FAILED, MESSAGE_UNREADABLE, Troubles, said
from anyio_channels.redis.client import (
    Connection,
    ConnectionLost,
    Host,
    Link,
    LinkEvents,
    Router,
    Server,
    Timeouts,
    at_each,
    make_router,
)

__all__ = ["RedisLayer", "RedisLayerStatistics"]


@dataclass(frozen=True, slots=True)
class RedisLayerStatistics(ChannelLayerStatistics):
    """A snapshot of what this process does with a layer on Redis.

    Everything is counted in this process: what others have sent and received, and what waits in Redis, is not in it. So a
    message that was sent here and received elsewhere is in ``sent`` only.
    """

    connections: int
    """Connections to Redis that are up."""
    reconnects: int
    """How often a connection was lost and came back."""
    commands: int
    """Commands sent to Redis, handshakes among them."""


class _Events(LinkEvents):
    """Hands on to a layer what the client tells."""

    def __init__(self, layer: RedisLayer) -> None:
        self._layer = layer

    def on_new(self, link: Link) -> None:
        self._layer._new_link(link)  # noqa: SLF001 - a part of the layer

    async def restore(self, link: Link, connection: Connection) -> None:
        await self._layer._restore(link, connection)  # noqa: SLF001

    def on_up(self, link: Link) -> None:
        self._layer._up(link)  # noqa: SLF001

    def on_down(self, link: Link) -> None:
        self._layer._down(link)  # noqa: SLF001

    def on_push(self, link: Link, push: list[Any]) -> None:  # noqa: ARG002 - a name says where it is from
        self._layer._pushed(push)  # noqa: SLF001

    def on_moved(self, moved: set[int], lost: set[int]) -> None:
        self._layer._servers_changed(moved, lost)  # noqa: SLF001


class RedisLayer(BaseChannelLayer):
    """What both Redis layers share; not a layer by itself."""

    prefix: str
    group_expiry: float
    timeout: float
    connect_timeout: float
    keep_alive: float

    def __init__(
        self,
        hosts: Sequence[Host] | None,
        prefix: str,
        expiry: float,
        group_expiry: float,
        capacity: int,
        channel_capacity: Mapping[str | re.Pattern[str], int] | None,
        symmetric_encryption_keys: Sequence[str | bytes] | None,
        serializer_format: SerializerFormat,
        *,
        random_prefix_length: int,
        token_expiry: float | None,
        max_message_size: int,
        default: Callable[[Any], Any] | None,
        timeout: float,
        connect_timeout: float,
        keep_alive: float,
        clock: Callable[[], float],
        cluster: bool,
    ) -> None:
        """Check and keep the options; the layers document them."""
        super().__init__(expiry, capacity, channel_capacity, max_message_size=max_message_size, default=default)
        if not isinstance(prefix, str):
            raise TypeError(f"prefix must be a str, not {prefix!r}")
        self.prefix = prefix
        self.group_expiry = require_seconds("group_expiry", group_expiry)
        self.timeout = require_seconds("timeout", timeout)
        self.connect_timeout = require_seconds("connect_timeout", connect_timeout)
        self.keep_alive = require_seconds("keep_alive", keep_alive)
        if not callable(clock):
            raise TypeError(f"clock must be a function that returns seconds, not {clock!r}")
        self._codec = PayloadCodec(
            self.max_message_size,
            self.default,
            serializer_format=serializer_format,
            symmetric_encryption_keys=symmetric_encryption_keys,
            random_prefix_length=random_prefix_length,
            expiry=token_expiry,
        )
        self._decode = self._codec.decode_copy
        if not isinstance(cluster, bool):
            raise TypeError(f"cluster must be True or False, not {cluster!r}")
        self._router: Router = make_router(hosts, cluster=cluster)
        self.cluster: bool = cluster
        self._clock = clock
        self._troubles = Troubles(clock, self.expiry, self)
        self._is_open = False
        self._was_closed = False
        self._thread = get_ident()
        self._reset()

    def _reset(self) -> None:
        """Become blank, as at each opening."""
        self._room = Mailroom(self._clock)
        self._here = self._make_directory()
        self.client: str = secrets.token_hex(16)
        self._sent = 0
        self._unreadable = 0
        self._missed = 0

    def __repr__(self) -> str:
        """Say which layer it is by its servers and options; no password among them."""
        return (
            f"<{type(self).__name__} {self._router.name} prefix={self.prefix!r} expiry={self.expiry} "
            f"capacity={self.capacity}>"
        )

    @property
    def server(self) -> tuple[str, int | None] | None:
        """Host and port of the one server, or its unix socket; ``None`` for several, behind Sentinel, and for a cluster."""
        server = self._router.servers[0]
        if self.cluster or len(self._router.servers) > 1 or not isinstance(server, Server):
            return None
        address = server.address
        return (address.host, address.port) if address.path is None else (address.path, None)

    # What the two layers make of it

    @abstractmethod
    def _make_directory(self) -> Directory:
        """Return the blank list of channels and groups."""

    def _new_link(self, link: Link) -> None:
        """There is another server to serve."""
        if self._is_open:
            self._runs.start_soon(self._tick_for_ever, link)

    @abstractmethod
    async def _restore(self, link: Link, connection: Connection) -> None:
        """Make a new connection what the last one was."""

    @abstractmethod
    def _up(self, link: Link) -> None:
        """A connection is there, and restored."""

    @abstractmethod
    def _down(self, link: Link) -> None:
        """The connection was lost."""

    @abstractmethod
    def _pushed(self, push: list[Any]) -> None:
        """A server sent something unasked."""

    @abstractmethod
    def _places(self, channel: Channel) -> Iterator[tuple[str, str]]:
        """Where what ``channel`` receives comes from: names and their keys, as ``Router.owner`` takes them."""

    @abstractmethod
    def _servers_changed(self, moved: set[int], lost: set[int]) -> None:
        """Slots of a cluster have other owners; ``lost``: whose owner was gone."""

    async def _execute(self, link: Link, *command: Any, parse: Callable[[Any], Any] | None = None) -> Any:
        """Send a command; while the layer is being closed, errors say so."""
        try:
            return await link.execute(*command, parse=parse)
        except ConnectionLost as error:
            self._raise_closed(error)
            raise

    def _raise_closed(self, error: ConnectionLost) -> None:
        if not self._is_open:
            raise ClosedResourceError(f"{self!r} was closed") from error

    @abstractmethod
    async def _do_chores(self) -> None:
        """Do what was noted; with any link up or down."""

    @abstractmethod
    async def _tick(self, link: Link) -> None:
        """Keep the connection alive and memberships fresh; errors of the connection are for the caller."""

    @abstractmethod
    def _begin_closing(self) -> None:
        """Before the mailboxes are closed: note what is to be given back."""

    @abstractmethod
    async def _wind_up(self, link: Link) -> None:
        """Before closing: give back, while that connection is there."""

    @property
    @abstractmethod
    def _tick_seconds(self) -> float:
        """How often to tick."""

    # Opening and closing

    async def open(self) -> None:
        """Connect; called by ``async with``.

        Raises an error of the ``redis`` package that names the server and the cause, within ``connect_timeout`` seconds. Of
        several servers one must be there, and none may refuse; those that cannot be reached then are logged and tried on.
        """
        self._reset()
        self._token = current_token().native_token
        self._thread = get_ident()
        await self._router.open(_Events(self), self.timeouts)
        self._is_open = True
        self._was_closed = False
        # Whoever cancels all around the layer has it closed in order: until then the connection is needed.
        self._scope = CancelScope(shield=True)
        self._stopped = Event()
        self._chores_bell = Event()
        self._tasks = create_task_group()
        await self._tasks.__aenter__()
        try:
            self._tasks.start_soon(self._live)
            await self._router.reached()
        except BaseException:
            self._is_open = False
            with CancelScope(shield=True):
                await self._stop()
            await self._tasks.__aexit__(None, None, None)
            raise

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the layer, also when cancelled."""
        await super().__aexit__(exc_type, exc, traceback)
        if self._tasks.cancel_scope.cancel_called:
            # One of our tasks failed, which is a bug; the task group knows what to do with the cancellation it made.
            await self._tasks.__aexit__(exc_type, exc, traceback)
        else:
            # Nothing runs there any more. The error of the block is not the task group's, which would wrap it.
            await self._tasks.__aexit__(None, None, None)

    async def close(self) -> None:
        """Close the layer: end all waits, give back what was not received, close the connections.

        Readers and senders that wait, and all later calls, get ``anyio.ClosedResourceError``. Takes up to ``timeout``
        seconds when Redis does not answer. Closing twice does nothing. If cancelled, the layer is closed all the same, but
        normal channels' messages that were on their way to a reader here may be lost.
        """
        await super().close()
        if not self._is_open:
            return
        self._is_open = False
        self._was_closed = True
        self._begin_closing()
        rung: list[Waiter] = []
        with self._room:
            self._here.close(rung)
        self._room.wake(rung)
        try:
            with move_on_after(self.timeout):
                await at_each(self._take_leave, self._router.links)
        finally:
            with CancelScope(shield=True):
                await self._stop()
            self._troubles.close()

    async def _take_leave(self, link: Link) -> None:
        try:
            if link.connection is not None:
                await self._wind_up(link)
        except redis.exceptions.RedisError as error:
            CLOSE_UNFINISHED.write(layer=repr(self), server=link.name, error=said(error))

    async def _stop(self) -> None:
        self._scope.cancel()
        await self._stopped.wait()

    async def _live(self) -> None:
        """All that runs while the layer is open."""
        try:
            with self._scope:
                async with create_task_group() as tasks:
                    self._runs = tasks
                    tasks.start_soon(self._do_chores_for_ever)
                    tasks.start_soon(self._router.run)
                    for link in self._router.links:
                        tasks.start_soon(self._tick_for_ever, link)
        finally:
            self._stopped.set()

    async def _tick_for_ever(self, link: Link) -> None:
        while not link.retired:
            await sleep(self._tick_seconds)
            self._sweep(float("inf"))
            if link.connection is not None:
                try:
                    await self._tick(link)
                except redis.exceptions.RedisError as error:
                    KEEP_ALIVE_FAILED.write(layer=repr(self), server=link.name, error=said(error))

    async def _do_chores_for_ever(self) -> None:
        while True:
            await self._chores_bell.wait()
            self._chores_bell = Event()
            await self._do_chores()

    def note_chore(self) -> None:
        """Something was noted for ``_do_chores``; callable anywhere in the event loop, also under the lock. For parts of it."""
        self._chores_bell.set()

    @property
    def timeouts(self) -> Timeouts:
        """What links to the servers are made with. For parts of the layer."""
        return Timeouts(timeout=self.timeout, connect_timeout=self.connect_timeout, keep_alive=self.keep_alive)

    @property
    def is_open(self) -> bool:
        """Whether the layer is open."""
        return self._is_open

    def _require_open(self) -> None:
        """Raise unless the layer is open, and open in this event loop."""
        if not self._is_open:
            if self._was_closed:
                raise ClosedResourceError(f"{self!r} is closed; open it again with 'async with layer:'")
            raise RuntimeError(f"{self!r} is not open; write 'async with layer:' in the lifespan of the application")
        if thread.state.running_loop() is not self._token:
            raise RuntimeError(
                f"{self!r} was opened in another event loop; a layer on Redis serves the event loop that opened it, "
                "so make one for each"
            )

    # Parts of the API that are alike

    def _sweep(self, limit: float = 8) -> None:
        """Drop some of what has expired in this process."""
        rung: list[Waiter] = []
        with self._room:
            self._room.index.sweep(self._clock(), rung, limit)
        self._room.wake(rung)
        self._troubles.look()

    def _open_inbox(self, name: str, capacity: int | None, overflow: Any, on_gap: Any) -> None:
        with self._room:
            self._here.open_inbox(name, capacity, overflow, on_gap)

    def _new_name(self, prefix: str) -> str:
        return f"{prefix}{self.client}!{secrets.token_hex(12)}"

    def _channel(self, name: str) -> Channel:
        """Find or make the mailbox of a valid name."""
        with self._room:
            return self._here.channels.get(name) or self._here.add(name)

    async def receive(self, channel: str) -> Message:
        """Wait for the next message on ``channel``, as ``BaseChannelLayer.receive`` says.

        Goes on waiting while Redis is away. Raises ``redis.ResponseError`` when Redis refuses to hand out this channel.
        """
        source = self._here.channels.get(channel) if channel.__class__ is str else None  # a name that is there is valid
        item = None
        if source is not None and self._is_open and get_ident() == self._thread:
            if source.entries:
                state = thread.state
                if state.is_due():
                    await state.give_way()
                item = source.take_at_once()
            elif self._is_attended(source):
                item = await source.take()
        if source is None or item is None:
            source, item = await self._wait(channel)
        if item.__class__ is bytes:
            return self._decode(item)  # one of several copies
        if item.__class__ is dict:
            message: Message = item
            return message
        return self._open_item(source, item)

    async def _wait(self, channel: str) -> tuple[Channel, Any]:
        """Wait for the next item on ``channel``, in turn, and return it with the channel's mailbox."""
        self.require_valid_channel_name(channel)
        self._require_open()
        while True:
            source = await self._listen(channel)
            try:
                return source, await source.take()
            except ClosedResourceError:
                if not source.dropped:
                    raise
                # It was idle, and dropped from the list between finding it and waiting at it.

    @abstractmethod
    def _is_attended(self, source: Channel) -> bool:
        """Whether messages come here without anybody asking for them, so that one can just wait."""

    @abstractmethod
    async def _listen(self, channel: str) -> Channel:
        """Find or make a channel to wait at, and see that its messages come."""

    def _open_item(self, source: Channel, item: Any) -> Message:
        """Return what the reader gets for an item that is no message as it is: a gap, if the layer has no others."""
        return source.gap_message(item)

    def _arrive(self, channel: Channel, entry: tuple[float, Any], now: float, rung: list[Waiter]) -> bool:
        """Put what came from Redis into its mailbox; under the lock. ``False``: the mailbox is full, the item dropped."""
        if entry[0] <= now:
            self._room.books.sent += 1
            self._room.books.expired += 1
            return True
        if channel.put(entry, now, rung):
            return True
        channel.miss(rung)
        return False

    def _drop_unreadable(self, where: str, why: object) -> None:
        """Count and log what is no message of ours."""
        self._unreadable += 1
        self._troubles.note(MESSAGE_UNREADABLE, where, error=str(why))

    def _log_dropped(self, name: str) -> None:
        self._troubles.note(CHANNEL_DROPPED, name)

    def mark_outage(self, link: Link) -> None:
        """What the server of ``link`` owns may have missed something. For parts of the layer."""
        self._mark_gaps(lambda name, key: self._router.owner(name, key) is link)

    def _mark_gaps(self, is_touched: Callable[[str, str], bool]) -> None:
        """Every inbox that wants to know is told that it may have missed something, if it lives there."""
        rung: list[Waiter] = []
        with self._room:
            for channel in self._here.channels.values():
                if channel.track_gaps and any(is_touched(*place) for place in self._places(channel)):
                    channel.mark_outage(rung)
        self._room.wake(rung)

    def _statistics(self, sent: int, expired_elsewhere: int = 0) -> RedisLayerStatistics:
        rung: list[Waiter] = []
        is_home = get_ident() == self._thread
        with self._room:
            if is_home:  # what expires here may have to be told to Redis, which only this thread can
                self._room.index.sweep(self._clock(), rung, float("inf"))
            books: Books = self._room.books
            snapshot = RedisLayerStatistics(
                channels=books.occupied + self._here.inboxes,
                buffered_messages=books.buffered,
                groups=len(self._here.groups),
                members=self._here.members,
                waiting_receivers=books.waiting_receivers,
                sent=sent,
                received=books.received,
                expired=books.expired + expired_elsewhere,
                dropped_full=books.dropped_full + self._missed,
                dropped_unreadable=self._unreadable,
                discarded=books.discarded,
                connections=sum(link.connection is not None for link in self._router.running),
                reconnects=sum(max(0, link.connects - 1) for link in self._router.running),
                commands=sum(link.commands for link in self._router.running),
            )
        self._room.wake(rung)
        self._troubles.look()
        return snapshot
