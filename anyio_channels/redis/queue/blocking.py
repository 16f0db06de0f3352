"""The blocking pop of one server: a ``Source`` for all keys that are waited for there.

Rules:
- one blocking pop at a time, on a connection of its own, over all wanted keys. To change the keys, a message to ourselves
  (the wake key) ends it. ``CLIENT UNBLOCK`` needs a permission that many users lack, and may come before the pop.
- the reply is handled, and the next pop sent, in one plain function: no task is between them.
- what several processes read is popped one message at a time, for a reader who waits. What only this process reads is
  popped as it comes, and drained by a script in front of the next pop.
- a sender that waits for room in a normal channel leaves a marker, which the pop finds before that channel. If this process
  dies with it in hand, the sender checks again within a second.
- a refusal stops this server's pop for a moment, and nothing else.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any, Final

import redis.exceptions
from anyio import Event

from anyio_channels.redis.client import (
    ABOUT_ONE_NAME,
    Argument,
    Connection,
    ConnectionLost,
    Link,
    LinkEvents,
    Request,
    replies,
)

from .channels import QueueChannel
from .delivery import DRAIN, Delivery
from .receiving import Receiving, Source
from .scripts import POP
from .setup import Setup

__all__ = ["POPS_MANY", "BlockingPop"]

POPS_MANY: Final = (7, 0)
"""From this version of Redis on, one pop can take many."""


class BlockingPop(Source, LinkEvents):
    """The pop that waits at one server."""

    def __init__(
        self,
        setup: Setup,
        receiving: Receiving,
        delivery: Delivery,
        commands: Link,
        client: str,
        on_gap: Callable[[], object],
    ) -> None:
        """``delivery``: where messages for this process go. ``commands``: the link for commands to that server.

        ``client``: this process, in the name of its wake key. ``on_gap``: hears that a message may be missing.
        """
        super().__init__()
        self._names = setup.names
        self._expiry = setup.expiry
        self._keep_alive = setup.options.keep_alive
        self._router = setup.router
        self.link: Link = setup.router.second_link(commands, self)
        self._receiving = receiving
        self._delivery = delivery
        self._commands = commands
        self._wake_key = setup.names.wake(client)
        self._on_gap = on_gap
        self._started = False
        self.popping: bool = False
        self.waking: bool = False
        self.refused: bool = False
        self._demoted = False  # the server says that it is a replica, and has served nothing since
        self.pops_many: bool = False
        self._popped_many = False
        self._to_drain: set[str] = set()
        self._ended: Event | None = None
        self._rounds = 0
        self._client_id = 0

    # The connection

    async def restore(self, link: Link, connection: Connection) -> None:  # noqa: ARG002 - there is one
        """Ask who we are, and what the server can do."""
        self._client_id = await connection.execute("CLIENT", "ID", parse=replies.whole)
        self.pops_many = connection.version >= POPS_MANY

    def on_up(self, link: Link) -> None:
        """Pop again."""
        if link.connects > 1:
            self._on_gap()  # the last pop may have taken something that did not come
        self._pop()

    def commands_up(self) -> None:
        """The connection for commands is up."""
        self.waking = False
        if self.popping:
            self._wake()

    # What is waited for

    def wait_for(self, channel: QueueChannel) -> None:  # noqa: ARG002 - it is in blocked
        """Wait for ``channel`` too."""
        self._wake()

    def stop_waiting(self, channel: QueueChannel) -> None:
        """Release ``channel`` when the pop has ended, which may have taken something for it."""
        if channel.key in self.blocked:
            self._wake()

    def wait_for_own(self, key: str) -> None:
        """Drain ``key``, and wait for more."""
        self._to_drain.add(key)
        self._wake()

    def _wake(self) -> None:
        """Have the blocking pop begin anew, for other keys."""
        if not self.popping:
            self._pop()
        elif not self.waking and (connection := self._commands.connection) is not None:
            self.waking = True
            connection.submit("ZADD", self._wake_key, 0, "", done=partial(self._woken, connection))
            connection.submit("PEXPIRE", self._wake_key, int(self._keep_alive * 2000))

    def _woken(self, connection: Connection, request: Request) -> None:
        if isinstance(request.error, redis.exceptions.ResponseError):
            # Out of memory, most likely: nothing can be written. Some users may not call this one, so it comes second.
            connection.submit("CLIENT", "UNBLOCK", self._client_id)
        elif request.error is not None:
            self.waking = False

    async def until_ended(self) -> None:
        """Wait for the end of the pop that is under way."""
        if self.popping:
            self._ended = ended = self._ended or Event()
            self._wake()
            await ended.wait()

    async def forget_keys(self) -> None:
        """Remove what only this process reads, and the wake key."""
        await self._commands.execute("UNLINK", self._wake_key, *self.own)

    # The pop

    def _pop(self) -> None:
        """Send the next blocking pop, and in front of it what drains the keys of this process."""
        if self.popping or self.refused or self._receiving.is_closing:
            return
        for channel in tuple(self.blocked.values()):
            if not channel.demand:
                self._receiving.released(self, channel)
        keys = [*self.own, *self.blocked]
        if not keys:
            return
        if not self._started:
            self._started = True
            self._router.start(self.link)
        connection = self.link.connection
        if connection is None:
            return  # it begins when the connection is up
        self.waking = False
        self._rounds += 1
        patience = self._keep_alive + self.link.timeout
        self._drain(patience)
        # Redis serves the first key that has something: each should come first at times.
        turn = self._rounds % len(keys)
        keys = [self._wake_key, *keys[turn:], *keys[:turn]]
        if self.blocked:
            # In front of each channel, the marker of those who wait for room there: they are told before the next pop.
            keys = [one for key in keys for one in ((self._names.room(key), key) if key in self.blocked else (key,))]
        self.popping = True
        command: tuple[Argument, ...] = ("BZPOPMIN", *keys, self._keep_alive)
        parse: Callable[[Any], Any] = replies.popped_one
        if self.pops_many and not self.blocked:
            # Only keys of this process: it may have all at once.
            command = ("BZMPOP", self._keep_alive, len(keys), *keys, "MIN", "COUNT", DRAIN)
            parse = replies.popped_many
        self._popped_many = parse is replies.popped_many
        connection.send(Request(command, parse, self._answered), patience)

    def _drain(self, patience: float) -> None:
        """Pop what is in the keys of this process now, if there may be something."""
        if self.blocked:
            self._to_drain.update(self.own)  # a busy normal channel must not keep them waiting
        for key in self._to_drain:
            # If Redis does not know the script any more, it is sent again behind the pop, which may take its time.
            self.link.call_soon(
                POP, [key, self._names.room(key)], DRAIN, self._expiry, 0,
                done=partial(self._drained, key), timeout=patience,
            )  # fmt: skip
        self._to_drain.clear()

    def _answered(self, request: Request) -> None:
        self.popping = False
        if self._ended is not None:
            self._ended.set()
            self._ended = None
        error = request.error
        if isinstance(error, ConnectionLost):
            return  # it goes on when the connection is up
        if error is not None:
            if isinstance(error, redis.exceptions.ReadOnlyError) and not self._demoted:
                self._demoted = True
                self._on_gap()  # its data is another server's from now on
            self.refused = True
            self._receiving.source_refused(self, error)
            return
        self._demoted = False
        if request.reply is not None:
            self._hand_on(*request.reply)
        self._pop()

    def _hand_on(self, key: str, entries: list[tuple[bytes, float]]) -> None:
        now = time.monotonic() + self._commands.clock_offset
        start = self.own.get(key)
        if start is not None:
            for entry, score in entries:
                self._delivery.put_own(key, start, entry, score, now)
            if not self._popped_many or len(entries) >= DRAIN:
                self._to_drain.add(key)  # there may be more
        elif key in self.blocked:
            ((entry, score),) = entries
            self._receiving.popped(self, key, entry, score, now)
        elif (full := self._names.key_of_room(key)) is not None and full in self.blocked:
            self._receiving.senders_wait(self, full)

    def _drained(self, key: str, request: Request) -> None:
        if request.error is not None:
            self._to_drain.add(key)
            if isinstance(request.error, ABOUT_ONE_NAME):
                # The pop over this and other keys does not tell which of them was refused.
                self._receiving.source_refused(self, request.error, key)
            return
        if self._delivery.drained(key, self.own[key], request.reply):
            self._to_drain.add(key)

    def try_again(self) -> None:
        """Pop again, after a refusal."""
        self.refused = False
        self._pop()
