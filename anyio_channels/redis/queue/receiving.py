"""How messages of the queue layer come to this process: a machine of three states, without I/O.

Rules:
- a normal channel is *idle*; *fetching*: a pop for its readers is in flight on the connection for commands; or *blocked*:
  its source tells when a message is there. Never two at once, so messages cannot overtake each other.
- a message of a normal channel stays in Redis until a reader waits here. One that was popped for a reader who is gone goes
  back to where it was, by its score. While Redis is away it waits here, for the next reader.
- events come in as calls of plain functions; what is wanted goes out as calls of ``Requests`` and ``Source``, which answer
  by further events, some of them before the call returns.
- a reader may leave while the lock is held. What it leaves behind is put in order soon afterwards, by ``tidy``.
- a refusal is an outage: readers wait, and it is tried again after a pause. Only one that is about a key (``ABOUT_ONE_NAME``)
  is told to the readers of that key, and to nobody else.
- a refusal at one server delays nothing at another: what cannot be given back now is parked until that server is there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Final, Protocol

from anyio_channels.log import POP_FAILED, POP_REFUSED, Troubles, said
from anyio_channels.redis.client import ABOUT_ONE_NAME, ConnectionLost

from .channels import QueueChannel, State
from .delivery import Delivery, Popped

__all__ = ["Receiving", "Requests", "Source"]

_PAUSE: Final = 0.2
"""Seconds until what a server refused for a while is tried again."""


class Source(ABC):
    """What tells that a message has come: the blocking pop of one server, or the notices of a cluster.

    Its events are ``Receiving.popped``, ``senders_wait``, ``announced``, ``released`` and ``source_refused``. What comes for
    process-specific channels it delivers itself.
    """

    must_stop: bool = False
    """Whether ``stop_waiting`` is wanted for channels that are idle too."""

    def __init__(self) -> None:
        """Start with nothing wanted."""
        self.own: dict[str, str] = {}
        """Keys that only this process reads, with the non-local names of their channels."""
        self.blocked: dict[str, QueueChannel] = {}
        """The normal channels that are blocked here, by their keys."""

    @abstractmethod
    def wait_for(self, channel: QueueChannel) -> None:
        """A channel was added to ``blocked``: tell when a message is there."""

    @abstractmethod
    def stop_waiting(self, channel: QueueChannel) -> None:
        """Nobody reads ``channel``: if it is blocked, release it as soon as it is certain that nothing was popped for it."""

    @abstractmethod
    def wait_for_own(self, key: str) -> None:
        """A key was added to ``own``: pop whatever is there, and whatever comes."""

    @abstractmethod
    def try_again(self) -> None:
        """The pause after a refusal is over."""

    @abstractmethod
    async def until_ended(self) -> None:
        """Wait until what was popped before this call has come; for as long as the caller allows."""


class Requests(Protocol):
    """What the machine asks of Redis. Each fetch ends with ``Receiving.fetched`` or ``refused``."""

    def can_ask(self, channel: QueueChannel) -> bool:
        """Whether the server of ``channel`` is there now."""

    def source_of(self, channel: QueueChannel) -> Source:
        """Return the source that waits for ``channel``."""

    def fetch(self, channel: QueueChannel, count: int, *, tell: bool) -> None:
        """Pop so many messages, and tell those who wait for room; ``tell``: there are some, whatever Redis says."""

    def give_back(self, channel: QueueChannel, items: Sequence[Popped]) -> None:
        """Put ``items`` back to where they were; ends with ``Receiving.gave_back``."""

    def soon(self, act: Callable[[], object]) -> None:
        """Call ``act`` when no lock is held."""

    def after(self, seconds: float, act: Callable[[], object]) -> None:
        """Call ``act`` after so many seconds."""


class Receiving:
    """The normal channels of one layer."""

    def __init__(self, requests: Requests, delivery: Delivery, troubles: Troubles) -> None:
        """``delivery``: where messages go."""
        self._requests = requests
        self._delivery = delivery
        self._troubles = troubles
        self._untidy: set[QueueChannel] = set()
        self._parked: set[QueueChannel] = set()
        self._fetching: dict[str, QueueChannel] = {}
        self.is_closing: bool = False
        """Whether messages arriving now have no reader: they are given back at the end."""
        self.late: list[tuple[QueueChannel, Popped]] = []
        """Messages to give back at the end."""

    # Readers

    def begin(self, channel: QueueChannel) -> None:
        """Readers wait at an idle channel: see that as many messages come."""
        if self.is_closing:
            return
        if self._requests.can_ask(channel):
            self._fetch(channel)
        else:
            self._block(channel)

    def _fetch(self, channel: QueueChannel) -> None:
        channel.state = State.FETCHING
        channel.announced = False
        self._fetching[channel.key] = channel
        self._requests.fetch(channel, channel.demand, tell=channel.senders_wait)

    def _block(self, channel: QueueChannel) -> None:
        channel.state = State.BLOCKED
        source = self._requests.source_of(channel)
        source.blocked[channel.key] = channel
        source.wait_for(channel)

    def is_fetching(self, key: str) -> bool:
        """Whether a fetch from ``key`` is under way."""
        return key in self._fetching

    def look_after(self, channel: QueueChannel) -> None:
        """A reader left, or may have: there may be something to give back. Callable under the lock."""
        if not self._untidy:
            self._requests.soon(self.tidy)
        self._untidy.add(channel)

    def tidy(self) -> None:
        """Give back what was popped for readers who left, and stop waiting for them."""
        untidy, self._untidy = self._untidy, set()
        for channel in untidy:
            if channel.demand:
                continue  # somebody came, and began anew
            if channel.state is not State.FETCHING:
                self._requests.source_of(channel).stop_waiting(channel)
            if self._requests.can_ask(channel):
                items = self._delivery.withdraw(channel)
                if items:
                    self._requests.give_back(channel, items)
            else:
                self._parked.add(channel)  # a reader here may have it meanwhile

    def unpark(self) -> None:
        """A server is there: try again what could not be given back."""
        parked, self._parked = self._parked, set()
        for channel in parked:
            self.look_after(channel)

    # What comes

    def fetched(self, channel: QueueChannel, entries: Sequence[tuple[bytes, bytes]], now: float) -> None:
        """A fetch is over: so many came, by the server's time ``now``."""
        channel.senders_wait = False
        for entry, score in entries:
            self._put(channel, entry, score, now)
        self._go_on(channel)

    def refused(self, channel: QueueChannel, error: Exception) -> None:
        """A fetch failed."""
        if not isinstance(error, ConnectionLost):
            if self._is_about_one_key(error):
                self._delivery.fail(channel, error)
            else:
                self._requests.after(_PAUSE, self._requests.source_of(channel).try_again)
        self._go_on(channel)

    def _go_on(self, channel: QueueChannel) -> None:
        channel.state = State.IDLE
        self._fetching.pop(channel.key, None)
        if not channel.demand:
            if channel.unclaimed or self._requests.source_of(channel).must_stop:
                self.look_after(channel)
        elif channel.announced:
            self.begin(channel)
        else:
            self._block(channel)

    def popped(self, source: Source, key: str, entry: bytes, score: float, now: float) -> None:
        """A source popped a message from ``key``, one of ``blocked``, by the server's time ``now``."""
        channel = source.blocked.pop(key)
        channel.state = State.IDLE
        popped = self._delivery.open(key, entry, repr(score))
        if popped is not None:
            if self.is_closing:
                self.late.append((channel, popped))
                return
            self._delivery.put(channel, popped, now)
        if channel.demand or channel.senders_wait:
            self.begin(channel)
        elif channel.unclaimed:
            self.look_after(channel)  # its last reader left while the pop was on its way

    def senders_wait(self, source: Source, key: str) -> None:
        """A source says that somebody waits for room in ``key``, one of ``blocked``: pop, and tell them."""
        channel = source.blocked.pop(key)
        channel.senders_wait = True
        self._fetch(channel)

    def announced(self, source: Source, key: str) -> None:
        """A source says that there may be a message in ``key``, which is not one of ``own``."""
        channel = source.blocked.pop(key, None)
        if channel is not None:
            channel.state = State.IDLE
            self.begin(channel)
            return
        fetching = self._fetching.get(key)
        if fetching is not None:
            fetching.announced = True

    def released(self, source: Source, channel: QueueChannel) -> None:
        """A source does not wait for ``channel`` any more, and nothing was popped for it."""
        source.blocked.pop(channel.key, None)
        channel.state = State.IDLE
        if channel.demand:
            self.begin(channel)  # somebody came meanwhile

    def source_refused(self, source: Source, error: Exception, key: str | None = None) -> None:
        """A source was refused, over ``key``, one of ``own``, or over all of its keys: it is tried again after a pause.

        If one of many keys is the reason, whose it is shows when they are fetched one by one.
        """
        self._requests.after(_PAUSE, source.try_again)
        if not self._is_about_one_key(error):
            return
        channels = list(source.blocked.values()) if key is None else []
        if not channels:
            self._delivery.fail_own(source.own if key is None else [key], error)
        for channel in channels:
            self.released(source, channel)

    def _is_about_one_key(self, error: Exception) -> bool:
        """Log a refusal; return whether readers are to be told, and not to wait: decided here for all sources."""
        is_about_one_key = isinstance(error, ABOUT_ONE_NAME)
        self._troubles.note(POP_FAILED if is_about_one_key else POP_REFUSED, error=said(error))
        return is_about_one_key

    def gave_back(self, channel: QueueChannel, items: Sequence[Popped], now: float, error: Exception | None) -> None:
        """A give-back is over, by the server's time ``now``."""
        if error is None:
            return
        if self.is_closing or isinstance(error, ABOUT_ONE_NAME) or getattr(error, "may_have_run", False):
            self._delivery.lose(channel, items, error)
            return
        for item in items:
            self._delivery.put_again(channel, item, now)  # for a reader here, or to be given back later
        self._parked.add(channel)
        self._requests.after(_PAUSE, self.unpark)

    def _put(self, channel: QueueChannel, entry: bytes, score: bytes | str, now: float) -> None:
        popped = self._delivery.open(channel.key, entry, score)
        if popped is None:
            return
        if self.is_closing:
            self.late.append((channel, popped))
        else:
            self._delivery.put(channel, popped, now)

    # The end

    def close(self) -> None:
        """Readers get nothing any more: what was popped for them is given back at the end."""
        self.is_closing = True
        for channel in self._delivery.normal_channels():
            self.late += [(channel, item) for item in self._delivery.withdraw(channel, promised=True)]
