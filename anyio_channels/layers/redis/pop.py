"""The blocking pop on one server: one for all keys that are waited for there.

Rules:
- one blocking pop at a time, on a connection of its own, over all keys wanted. To change the keys a message to ourselves
  (the wake key) ends it. Its reply is handled, and the next pop sent, in one plain function.
- what several processes read is popped one message at a time, for a reader who waits. What only this process reads is
  popped as it comes, and emptied in between.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import redis.exceptions
from anyio import Event

from anyio_channels.redis.client import OUTAGE, Argument, Connection, ConnectionLost, Link, LinkEvents, Request, replies

from .scripts import POP, PoppedReply

if TYPE_CHECKING:
    from .intake import QueueChannel, QueueIntake

__all__ = ["POPS_MANY", "Popper"]

_DRAIN: Final = 1000
"""How many messages are popped at once from what only this process reads."""
POPS_MANY: Final = (7, 0)
"""The version of Redis from which on one pop takes many."""


class Popper(LinkEvents):
    """What is waited for on one server, and the pop that waits there."""

    def __init__(self, layer: QueueIntake, link: Link) -> None:
        """``link``: for commands to that server; ``layer``: where messages go."""
        self.own: dict[str, str] = {}
        """Keys that only this process reads, with their non-local names."""
        self.blocked: dict[str, QueueChannel] = {}
        """Normal channels whose key is in the blocking pop, or will be, by that key."""
        self.popping: bool = False
        self.waking: bool = False
        self.trouble: Exception | None = None
        """Why the pop was refused, until it is tried again."""
        self.fetches: Counter[Link] = Counter()
        """Pops in flight on the connection for commands."""
        self.pops_many: bool = False
        self._layer = layer
        self._commands = link
        self._to_drain: set[str] = set()
        self._ended: Event | None = None
        self._rounds = 0
        self._popped_at_once = False
        self._client_id = 0
        self._wake_key = f"{layer.prefix}:wake:{layer.client}"
        self.link: Link = layer.second_link(link, self)

    async def restore(self, link: Link, connection: Connection) -> None:  # noqa: ARG002 - there is one
        """Ask who we are, and what the server can."""
        self._client_id = await connection.execute("CLIENT", "ID", parse=replies.whole)
        self.pops_many = connection.version >= POPS_MANY

    def on_up(self, link: Link) -> None:
        """Pop again."""
        if link.connects > 1:
            self._layer.mark_outage(self._commands)  # the last pop may have taken something that did not come
        self.pop()

    def set_clock(self, link: Link) -> None:
        """The time at the server of ``link``, ours, is known anew."""
        self.link.clock_offset = link.clock_offset

    def release(self, channel: QueueChannel) -> None:
        """Nobody waits at ``channel`` any more: it is unblocked when the pop has ended, which may have taken something."""
        if channel.blocked:
            self.wake()

    def refused(self, error: Exception) -> None:
        """A pop of one key was refused for a while; this one will wait for it."""

    def commands_up(self) -> None:
        """The connection for commands is up."""
        self.waking = False
        if self.popping:
            self.wake()

    # What is waited for

    def own_key(self, key: str, start: str) -> None:
        """See that what is sent to the process-specific channels that begin with ``start`` comes here."""
        if key not in self.own:
            self.own[key] = start
            self._to_drain.add(key)
            self.wake()

    def block(self, channel: QueueChannel) -> None:
        """Wait for a message to the normal ``channel``."""
        channel.blocked = True
        self.blocked[channel.key] = channel
        self.wake()

    def unblock_all(self) -> list[QueueChannel]:
        """Wait for none of the normal channels any more; return them."""
        channels = list(self.blocked.values())
        self.blocked.clear()
        for channel in channels:
            channel.blocked = False
        return channels

    def wake(self) -> None:
        """Have the blocking pop begin anew, for other keys."""
        if not self.popping:
            self.pop()
        elif not self.waking and (connection := self._commands.connection) is not None:
            self.waking = True
            connection.submit("ZADD", self._wake_key, 0, "", done=partial(self._woken, connection))
            connection.submit("PEXPIRE", self._wake_key, int(self._layer.keep_alive * 2000))

    def _woken(self, connection: Connection, request: Request) -> None:
        if isinstance(request.error, redis.exceptions.ResponseError):
            # Out of memory, most likely: nothing can be written. Some users may not call this one, so it comes second.
            connection.submit("CLIENT", "UNBLOCK", self._client_id)
        elif request.error is not None:
            self.waking = False

    async def until_ended(self) -> None:
        """Wait for all that was popped before this call; for as long as the caller allows."""
        if self.popping:
            self._ended = ended = self._ended or Event()
            self.wake()
            await ended.wait()

    async def wind_up(self) -> None:
        """Wait for what may be on its way to a reader, to be given back."""
        await self.until_ended()

    async def forget_keys(self, link: Link) -> None:
        """Remove what only this process reads, and the wake key."""
        await link.execute("UNLINK", self._wake_key, *self.own)

    # The pop

    def pop(self) -> None:
        """Send the next blocking pop, and in front of it what empties the keys of this process."""
        layer = self._layer
        if self.popping or not layer.is_open or self.trouble is not None:
            return
        for channel in tuple(self.blocked.values()):
            if not channel.demand:
                channel.blocked = False
                del self.blocked[channel.key]
        keys = [*self.own, *self.blocked]
        if not keys:
            return
        layer.start_link(self.link)
        connection = self.link.connection
        if connection is None:
            return  # it begins when the connection is up
        self.waking = False
        self._rounds += 1
        patience = layer.keep_alive + layer.timeout
        if self.blocked:
            self._to_drain.update(self.own)  # a busy normal channel must not keep them waiting
        for key in self._to_drain:
            # If Redis does not know the script any more, it is sent again behind the pop, which may take its time.
            self.link.call_soon(
                POP, [key, layer.room_key(key)], _DRAIN, layer.expiry,
                done=partial(self._drained, key), timeout=patience,
            )  # fmt: skip
        self._to_drain.clear()
        # Redis serves the first key that has something: each should come first at times.
        turn = self._rounds % len(keys)
        keys = [self._wake_key, *keys[turn:], *keys[:turn]]
        self.popping = True
        command: tuple[Argument, ...] = ("BZPOPMIN", *keys, layer.keep_alive)
        parse: Callable[[Any], Any] = replies.popped_one
        if self.pops_many and not self.blocked:
            # Only keys of this process: it may have all at once.
            command = ("BZMPOP", layer.keep_alive, len(keys), *keys, "MIN", "COUNT", _DRAIN)
            parse = replies.popped_many
        self._popped_at_once = parse is replies.popped_many
        connection.submit(*command, parse=parse, done=self._answered, timeout=patience)

    def _answered(self, request: Request) -> None:
        self.popping = False
        if self._ended is not None:
            self._ended.set()
            self._ended = None
        if isinstance(request.error, ConnectionLost):
            return  # it goes on when the connection is up
        if request.error is not None:
            self._refused(request.error)
            return
        if request.reply is not None:
            self._popped(*request.reply)
        self.pop()

    def _popped(self, key: str, entries: list[tuple[bytes, float]]) -> None:
        server_time = self.link.server_time
        if key in self.own:
            for entry, score in entries:
                self._layer.put_own(key, self.own[key], entry, score, server_time)
            if not self._popped_at_once or len(entries) >= self._layer.least_capacity:
                # There may be more; or it may have been full, and senders may wait for room: that script tells them.
                self._to_drain.add(key)
        elif key in self.blocked:
            channel = self.blocked.pop(key)
            channel.blocked = False
            for entry, score in entries:
                self._layer.put_normal(channel, entry, repr(score), server_time)
            self._layer.fetch(channel)  # for more readers, and for senders who wait for room
            self._layer.look_after(channel)  # its last reader may have left while the pop was on its way

    def _drained(self, key: str, request: Request) -> None:
        if request.error is not None:
            self._to_drain.add(key)
            return
        popped: PoppedReply = request.reply
        self._layer.count_expired(popped.expired)
        for entry, score in popped.entries:
            self._layer.put_own(key, self.own[key], entry, float(score), popped.now)
        if len(popped.entries) >= _DRAIN:
            self._to_drain.add(key)

    def _refused(self, error: Exception) -> None:
        """Redis does not pop: because of one of the keys, or for a while."""
        if not isinstance(error, OUTAGE):
            if not self.blocked:
                self._layer.fail_own(self.own, error)  # it is a key of this process
            # Whose key it is shows when they are fetched one by one; its readers are told.
            for channel in self.unblock_all():
                self._layer.look_after(channel)
        self._layer.log_pop_refused(error)
        self.trouble = error
        self._layer.note_chore()

    def try_again(self) -> None:
        """The pause after trouble is over."""
        self.trouble = None
        self.pop()
