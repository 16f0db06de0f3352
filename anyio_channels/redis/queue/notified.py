"""The notices of a cluster: a ``Source`` where one pop cannot wait for keys of different slots.

Rules:
- senders publish to a sharded channel in the slot of the key; readers listen there, and pop on hearing it.
- a pop follows each confirmation of the subscription too, so nothing that was sent before is overlooked.
- one pop of a key at a time; what is heard meanwhile makes another one follow.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from anyio import Event

from anyio_channels.redis.client import ConnectionLost, Request, Subscriptions

from .channels import QueueChannel
from .delivery import DRAIN, Delivery
from .receiving import Receiving, Source
from .setup import Setup

__all__ = ["Notices"]


class Notices(Source):
    """What is waited for in a cluster, at all its nodes."""

    must_stop: bool = True

    def __init__(
        self,
        setup: Setup,
        receiving: Receiving,
        delivery: Delivery,
        subscriptions: Subscriptions,
        pop: Callable[[str, int, Callable[[Request], object]], object],
    ) -> None:
        """``delivery``: where messages for this process go. ``pop(key, count, done)`` pops without waiting."""
        super().__init__()
        self._names = setup.names
        self._receiving = receiving
        self._delivery = delivery
        self._subscriptions = subscriptions
        self._pop = pop
        self._draining: set[str] = set()
        self._again: set[str] = set()
        self._ended: Event | None = None

    def wait_for(self, channel: QueueChannel) -> None:
        """Listen for a message to ``channel``."""
        self._listen(channel.key)

    def stop_waiting(self, channel: QueueChannel) -> None:
        """Do not listen any more: nothing is popped here before it is asked for."""
        if channel.key in self.blocked:
            self._receiving.released(self, channel)
        self._subscriptions.unwant(self._names.sent(channel.key))

    def wait_for_own(self, key: str) -> None:
        """Listen for messages to this process."""
        self._listen(key)

    def _listen(self, key: str) -> None:
        name = self._names.sent(key)
        self._subscriptions.want(name)
        self._subscriptions.ask(name)

    def heard(self, key: str) -> None:
        """Something was sent there, or may have been."""
        if key in self.own:
            self._drain(key)
        else:
            self._receiving.announced(self, key)

    async def until_ended(self) -> None:
        """Wait until all that was there before this call was popped."""
        for key in self.own:
            self._drain(key)
        while self._draining:
            self._ended = ended = self._ended or Event()
            await ended.wait()

    def _drain(self, key: str) -> None:
        if key in self._draining:
            self._again.add(key)
            return
        self._draining.add(key)
        self._pop(key, DRAIN, partial(self._drained, key))

    def _drained(self, key: str, request: Request) -> None:
        self._draining.discard(key)
        more = key in self._again
        self._again.discard(key)
        error = request.error
        if error is None:
            more = self._delivery.drained(key, self.own[key], request.reply) or more
        elif not isinstance(error, ConnectionLost):
            self._receiving.source_refused(self, error, key)
        if more:
            self._drain(key)
        elif not self._draining and self._ended is not None:
            self._ended.set()
            self._ended = None

    def try_again(self) -> None:
        """Look everywhere, after a refusal."""
        for key in (*self.own, *self.blocked):
            self.heard(key)
