"""The pub/sub layer: a ``Hub`` whose transport is Redis' pub/sub, in the bytes of channels_redis 4.3.

Rules:
- a Redis channel for each channel name, and one for each group: every process publishes there, and each delivers to its own
  members. Redis keeps nothing: a message to a channel that nobody reads is dropped.
- what is wanted is subscribed to again before a new connection is used. Whatever may have been missed meanwhile is told to
  the hub, once the connection is there; in a cluster, once the subscription is confirmed wherever its slot is now.
- a subscription that is asked for or given up is sent in the same plain function in which that is decided, so Redis sees
  the order of the decisions.
- one connection to each server serves all; the hub takes pushes without waiting.
"""

from __future__ import annotations

import re
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final

import redis.exceptions
from anyio.abc import TaskStatus

from anyio_channels.contract.message import SerializerFormat, Unreadable
from anyio_channels.local.deliveries import Deliveries, group_topic
from anyio_channels.local.hub import Hub
from anyio_channels.local.transport import Transport

from .client import Connection, Host, Link, LinkEvents, Request, Subscriptions, at_each
from .duplicates import MARK_LENGTH, LastHeard, Marks
from .servers import OnRedis, RedisLayerStatistics, RedisOptions, every, log_keep_alive
from .wire import Names, PayloadCodec

__all__ = ["RedisPubSubChannelLayer"]

_GROUP: Final = group_topic("")


class PubSub(Transport, LinkEvents):
    """Carries topics over Redis channels."""

    outage: tuple[type[Exception], ...] = (redis.exceptions.ConnectionError,)
    _deliveries: Deliveries

    def __init__(
        self, options: RedisOptions, codec: PayloadCodec, on_disconnect: str | None, on_reconnect: str | None
    ) -> None:
        """``codec``: its payloads are what travels. ``on_disconnect``, ``on_reconnect``: as in the layer."""
        self._options = options
        self._on_disconnect = on_disconnect
        self._on_reconnect = on_reconnect
        self._router = options.router
        self._codec = codec
        self._names = Names(options.prefix)
        self._publish = "SPUBLISH" if options.cluster else "PUBLISH"
        self._reset()

    def _reset(self) -> None:
        self.subscriptions: Subscriptions = Subscriptions(self._router, self._refused, on_resumed=self._missing)
        self._topics: dict[str, list[str]] = {}  # by the Redis channel; a channel may be called as a group's is
        self._marks = Marks()
        self._heard = LastHeard()

    def _name(self, topic: str) -> str:
        """Return the Redis channel of ``topic``."""
        return self._names.group_topic(topic[len(_GROUP) :]) if topic.startswith(_GROUP) else topic

    # What the hub asks for

    async def run(self, deliveries: Deliveries, *, task_status: TaskStatus[None]) -> None:
        """Connect, and serve until cancelled. Raises as ``RedisOptions.run``."""
        self._deliveries = deliveries
        self._reset()
        keep_alive = partial(every, self._options.keep_alive, self._keep_alive)
        await self._options.run(self, keep_alive, task_status=task_status)

    def _keep_alive(self) -> None:
        self._deliveries.sweep()
        for link in self._router.links:
            if link.connection is not None:
                link.submit("PING", done=partial(log_keep_alive, self._deliveries.layer, link))

    def publish(self, topic: str, body: bytes) -> Awaitable[object]:
        """Publish ``body``. Raises ``redis.ConnectionError``, saying whether it may have been sent, within ``timeout``."""
        name = self._name(topic)
        payload = self._codec.seal(body, self._marks.next() if self._options.cluster else None)
        return self._router.owner(name, name).execute(self._publish, name, payload, late=self._published_late)

    def _published_late(self, request: Request) -> None:
        """Count what was published although its caller was cancelled."""
        if request.error is None:
            self._deliveries.sent_late += 1

    async def subscribe(self, topic: str) -> None:
        """Subscribe, and have Redis confirm it. Raises ``redis.ResponseError`` when Redis refuses."""
        name = self._name(topic)
        topics = self._topics.setdefault(name, [])
        if topic not in topics:
            topics.append(topic)
        if not self.subscriptions.want(name).confirmed:
            await self.subscriptions.confirm(name)

    def unsubscribe(self, topic: str) -> None:
        """Unsubscribe, if no other topic goes through the same Redis channel."""
        name = self._name(topic)
        self._topics[name] = topics = [one for one in self._topics.get(name, ()) if one != topic]
        if not topics:
            del self._topics[name]
            self.subscriptions.unwant(name)

    async def catch_up(self) -> None:
        """Wait until what was published before has come: it is in front of the answer, on the same connection."""
        await at_each(Link.caught_up, self._router.links)

    # What the client tells

    async def restore(self, link: Link, connection: Connection) -> None:
        """Subscribe to what is wanted, on a new connection."""
        await self.subscriptions.restore(link, connection)

    def on_up(self, link: Link) -> None:
        """Tell what may have been missed; what is wanted was restored before."""
        self.subscriptions.restored(link)
        if link.connects > 1:
            self._tell_all(self._on_reconnect)

    def on_down(self, link: Link) -> None:
        """Nothing is confirmed any more."""
        self.subscriptions.lost(link)
        self._tell_all(self._on_disconnect)

    def _tell_all(self, message_type: str | None) -> None:
        if message_type is not None:
            self._deliveries.tell_all({"type": message_type})

    def on_moved(self, moved: set[int], lost: set[int]) -> None:  # noqa: ARG002 - what is wanted knows where it is
        """Follow slots to their new owners; what may be missed until then is told there."""
        self.subscriptions.move()

    def _missing(self, name: str) -> None:
        """Something that was published to the Redis channel ``name`` may not have come."""
        for topic in self._topics.get(name, ()):
            self._deliveries.missing(topic)

    def on_push(self, link: Link, push: list[Any]) -> None:
        """Deliver a message."""
        kind = push[0] if push else None
        if kind in (b"message", b"smessage"):
            name = push[1].decode("utf-8", "replace")
            topics = self._topics.get(name)
            if topics is None:
                return
            if link.connection is None:  # others are being restored
                self.subscriptions.heard(link, name)
            if self._options.cluster and not self._heard.is_new(name, push[2]):
                self._missing(name)  # it came already, or so late that it may never have come: nobody can tell
                return
            try:
                body = self._codec.unseal(push[2])
            except Unreadable as why:
                self._deliveries.drop_unreadable(name, why)
                return
            for topic in tuple(topics):
                self._deliveries.deliver(topic, body, name)
        elif kind == b"sunsubscribe":
            self.subscriptions.dropped(push[1].decode("utf-8", "replace"))

    def _refused(self, name: str, error: Exception) -> None:
        self._missing(name)
        for topic in self._topics.get(name, ()):
            self._deliveries.unheard(topic, error, name)


class RedisPubSubChannelLayer(OnRedis, Hub):
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
        capacity: int = 1000,
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
        mailbox of each channel in this process; ten times that of the other layers, since channels_redis' pub/sub has no
        bound and a burst should fit. ``on_disconnect``, ``on_reconnect``: if given, a message of that type is put into
        every channel of this process when the connection is lost, and when it is there again.

        Raises ``TypeError`` or ``ValueError`` naming the option and its rule; nothing is connected yet.
        """
        for option, value in (("on_disconnect", on_disconnect), ("on_reconnect", on_reconnect)):
            if not isinstance(value, str | None):
                raise TypeError(f"{option} must be the type of a message (str), not {value!r}")
        self.on_disconnect: str | None = on_disconnect
        self.on_reconnect: str | None = on_reconnect
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
        codec = PayloadCodec(
            max_message_size,
            default,
            serializer_format=serializer_format,
            symmetric_encryption_keys=symmetric_encryption_keys,
            random_prefix_length=MARK_LENGTH if cluster else 0,
        )
        super().__init__(
            PubSub(options, codec, on_disconnect, on_reconnect),
            expiry=expiry,
            group_expiry=group_expiry,
            capacity=capacity,
            channel_capacity=channel_capacity,
            max_message_size=max_message_size,
            default=default,
            clock=clock,
            codec=codec,
        )

    def statistics(self) -> RedisLayerStatistics:
        """Return a snapshot of this process: ``sent`` counts its calls of ``send`` and ``group_send``."""
        return RedisLayerStatistics(**self._figures(), **self.options.figures())
