"""What takes the place of the blocking pop in a cluster, where one pop cannot wait for keys of different slots.

Rules:
- whoever sends says so on a sharded channel in the slot of the key; who waits listens there, and pops when it hears it.
- a pop follows each confirmation of the subscription too, so nothing sent before is overlooked.
- one pop for a key at a time; what is heard meanwhile makes another one follow.
"""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Final

from anyio import Event

from anyio_channels.redis.client import OUTAGE, ConnectionLost, Link, Request

from .scripts import PoppedReply

if TYPE_CHECKING:
    from .intake import QueueChannel, QueueIntake

__all__ = ["Notices"]

_DRAIN: Final = 1000


class Notices:
    """What is waited for in a cluster; one for all its nodes."""

    def __init__(self, layer: QueueIntake) -> None:
        """``layer``: where messages go."""
        self.own: dict[str, str] = {}
        self.blocked: dict[str, QueueChannel] = {}
        self.trouble: Exception | None = None
        self.fetches: Counter[Link] = Counter()
        self._layer = layer
        self._draining: set[str] = set()
        self._again: set[str] = set()
        self._meanwhile: set[str] = set()  # normal channels of which something was heard while they were fetched
        self._ended: Event | None = None

    def commands_up(self) -> None:
        """Subscriptions were restored before; what they say is heard."""

    def set_clock(self, link: Link) -> None:
        """Pops come with the time."""

    # What is waited for

    def own_key(self, key: str, start: str) -> None:
        """See that what is sent to the process-specific channels that begin with ``start`` comes here."""
        if key not in self.own:
            self.own[key] = start
            self._listen(key)

    def block(self, channel: QueueChannel) -> None:
        """Wait for a message to the normal ``channel``."""
        if channel.key in self._meanwhile:
            self._meanwhile.discard(channel.key)
            self._layer.fetch(channel)
            return
        channel.blocked = True
        self.blocked[channel.key] = channel
        self._listen(channel.key)

    def release(self, channel: QueueChannel) -> None:
        """Nobody waits at ``channel`` any more."""
        if self.blocked.pop(channel.key, None) is not None:
            channel.blocked = False
            self._layer.look_after(channel)
        self._meanwhile.discard(channel.key)
        self._layer.subscriptions.unwant(self._layer.note_key(channel.key))

    def _listen(self, key: str) -> None:
        name = self._layer.note_key(key)
        self._layer.subscriptions.want(name)
        self._layer.subscriptions.ask(name)

    def heard(self, key: str) -> None:
        """Something was sent there, or it may have been."""
        if key in self.own:
            self._drain(key)
        elif key in self.blocked:
            channel = self.blocked.pop(key)
            channel.blocked = False
            self._layer.fetch(channel)
        elif self._layer.note_key(key) in self._layer.subscriptions.wanted:
            self._meanwhile.add(key)

    async def wind_up(self) -> None:
        """Nothing that is on its way here is to be given back, but for what is fetched."""

    async def until_ended(self) -> None:
        """Wait for all that was popped before this call; for as long as the caller allows."""
        for key in self.own:
            self._drain(key)
        while self._draining:
            self._ended = ended = self._ended or Event()
            await ended.wait()

    async def forget_keys(self, link: Link) -> None:
        """Remove what only this process reads."""
        for key in self.own:
            link.submit("UNLINK", key)
        await link.execute("PING")

    # The pop

    def _drain(self, key: str) -> None:
        if key in self._draining:
            self._again.add(key)
            return
        self._draining.add(key)
        self._layer.pop_soon(key, _DRAIN, done=partial(self._drained, key))

    def _drained(self, key: str, request: Request) -> None:
        self._draining.discard(key)
        more = key in self._again
        self._again.discard(key)
        if request.error is None:
            popped: PoppedReply = request.reply
            self._layer.count_expired(popped.expired)
            for entry, score in popped.entries:
                self._layer.put_own(key, self.own[key], entry, float(score), popped.now)
            more = more or len(popped.entries) >= _DRAIN
        else:
            if not isinstance(request.error, OUTAGE):
                self._layer.fail_own([key], request.error)
            self.refused(request.error)
        if more:
            self._drain(key)
        elif not self._draining and self._ended is not None:
            self._ended.set()
            self._ended = None

    def refused(self, error: Exception) -> None:
        """A node does not pop, for a while."""
        if not isinstance(error, ConnectionLost):
            self._layer.log_pop_refused(error)
        self.trouble = error
        self._layer.note_chore()

    def try_again(self) -> None:
        """The pause after trouble is over."""
        self.trouble = None
        for key in (*self.own, *self.blocked):
            self.heard(key)
