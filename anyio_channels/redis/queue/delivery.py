"""From an entry of a sorted set to a message in a mailbox of this process, and back.

Rules:
- an entry is whatever anybody put there: what is not a message of ours is dropped, counted, and logged once.
- a message that was popped before, and that Redis hands out again after a failover, is dropped.
- a message to one channel is decoded on arrival; one to several stays encoded, for each reader has a copy of its own.
- expiry counts from the time at which the message was sent, by the server's clock.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any, Final

from anyio_channels.contract.layer import Message
from anyio_channels.contract.message import RESERVED_KEY, Unreadable
from anyio_channels.local.directory import Channel, Directory
from anyio_channels.local.waiting import Waiter
from anyio_channels.log import CHANNEL_DROPPED, GIVE_BACK_FAILED, MESSAGE_UNREADABLE, said
from anyio_channels.redis.duplicates import RecentPops

from .channels import QueueChannel
from .scripts import PoppedReply
from .setup import Setup

__all__ = ["DRAIN", "Delivery", "Failure", "Popped"]

DRAIN: Final = 1000
"""How many messages are popped at once from what only this process reads."""


class Popped:
    """A message of a normal channel, with what it takes to put it back."""

    __slots__ = ("entry", "message", "score")

    def __init__(self, message: Message, entry: bytes, score: bytes | str) -> None:
        """``entry`` and ``score`` are what Redis held."""
        self.message: Message = message
        self.entry: bytes = entry
        self.score: bytes | str = score


class Failure:
    """Takes the place of a message for a reader whose messages cannot be fetched."""

    __slots__ = ("error",)

    def __init__(self, error: Exception) -> None:
        """``error`` is what the reader gets."""
        self.error: Exception = error


class Delivery:
    """The mailboxes of one layer, as what comes from Redis sees them."""

    def __init__(self, setup: Setup, here: Directory) -> None:
        """``here``: the channels of this process."""
        self._here = here
        self._mailroom = here.mailroom
        self._codec = setup.codec
        self._expiry = setup.expiry
        self._troubles = setup.troubles
        self._recent = RecentPops()
        self.unreadable: int = 0
        """How much came that was not a message."""
        self.expired_elsewhere: int = 0
        """How many messages were found expired in Redis."""

    # From Redis

    def open(self, key: str, entry: bytes, score: bytes | str) -> Popped | None:
        """Return the message of a normal channel that ``entry`` is; ``None`` if it came before or is not one."""
        if not self._recent.is_new(key, entry, float(score)):
            return None
        try:
            message = self._codec.decode_body(self._codec.unseal(entry))
        except Unreadable as why:
            self.drop_unreadable(key, why)
            return None
        message.pop(RESERVED_KEY, None)  # a broadcast of channels_redis names normal channels too
        return Popped(message, entry, score)

    def put(self, channel: QueueChannel, popped: Popped, server_time: float) -> None:
        """Put a message of a normal channel where its reader finds it."""
        self._put([channel], popped, float(popped.score), server_time)

    def put_own(self, key: str, start: str, entry: bytes, score: float, server_time: float) -> None:
        """Put a message for channels of this process, whose names begin with ``start``, into their mailboxes."""
        if not self._recent.is_new(key, entry, score):
            return
        try:
            message = self._codec.decode_body(self._codec.unseal(entry))
            names = message.pop(RESERVED_KEY, None)
            if isinstance(names, str):
                names = [names]
            are_ours = isinstance(names, list)
            for name in names if are_ours else ():
                are_ours = are_ours and isinstance(name, str) and name.startswith(start)
            if not are_ours:
                raise Unreadable(f"{RESERVED_KEY} should name channels of this process, but is {names!r:.100}")  # noqa: TRY301
            item = message if len(names) == 1 else self._codec.encode_again(message)
        except Unreadable as why:
            self.drop_unreadable(key, why)
            return
        self._put(names, item, score, server_time)

    def drained(self, key: str, start: str, popped: PoppedReply) -> bool:
        """Put all that a script popped for channels of this process into their mailboxes; whether there may be more."""
        self.expired_elsewhere += popped.expired
        for entry, score in popped.entries:
            self.put_own(key, start, entry, float(score), popped.now)
        return len(popped.entries) >= DRAIN

    def _put(self, names: Sequence[str | QueueChannel], item: Any, score: float, server_time: float) -> None:
        """Put ``item`` into channels, or those of these names."""
        mailroom = self._mailroom
        rung: list[Waiter] = []
        full: list[str] = []
        mailroom.lock.acquire()
        try:
            now = mailroom.clock()
            expires_at = now + self._expiry - max(0.0, server_time - score)
            for name in names:
                channel = (self._here.channels.get(name) or self._here.add(name)) if isinstance(name, str) else name
                if expires_at <= now:
                    mailroom.books.sent += 1
                    mailroom.books.expired += 1
                elif not channel.put((expires_at, item), now, rung):
                    channel.miss(rung)
                    full.append(channel.name)
        finally:
            mailroom.lock.release()
            if rung or mailroom.abandoned:
                mailroom.wake(rung)
        for name in full:
            self._troubles.note(CHANNEL_DROPPED, name)

    def drop_unreadable(self, key: str, why: object) -> None:
        """Count and log what is not a message of ours."""
        self.unreadable += 1
        self._troubles.note(MESSAGE_UNREADABLE, key, error=str(why))

    # To readers

    def message_of(self, channel: Channel, item: Any) -> Message:
        """Return what a reader gets for ``item``, which is not a message, or raise the error that it stands for."""
        if isinstance(item, Failure):
            self._mailroom.books.received -= 1  # it was not a message
            self._mailroom.books.sent -= 1
            raise item.error
        return channel.gap_message(item)

    def fail(self, channel: Channel, error: Exception) -> None:
        """Tell those who wait at ``channel`` that its messages cannot be fetched."""
        rung: list[Waiter] = []
        with self._mailroom:
            now = self._mailroom.clock()
            for _ in range(channel.demand):
                channel.put((now + self._expiry, Failure(error)), now, rung)
        self._mailroom.wake(rung)

    def fail_own(self, keys: Collection[str], error: Exception) -> None:
        """Tell those who read what is in ``keys`` that it cannot be fetched."""
        for channel in tuple(self._here.channels.values()):
            if isinstance(channel, QueueChannel) and channel.key in keys:
                self.fail(channel, error)

    # Back to Redis

    def normal_channels(self) -> Iterator[QueueChannel]:
        """Return the normal channels that are listed now."""
        for channel in tuple(self._here.channels.values()):
            if isinstance(channel, QueueChannel) and channel.normal:
                yield channel

    def withdraw(self, channel: QueueChannel, *, promised: bool = False) -> list[Popped]:
        """Take out what no reader of ``channel`` was promised, or all, to be given back."""
        with self._mailroom:
            items = channel.withdraw(promised=promised)
        return [item for item in items if isinstance(item, Popped)]

    def forget(self, channel: QueueChannel, items: Sequence[Popped]) -> None:
        """``items`` are given back, and may come again."""
        for item in items:
            self._recent.forget(channel.key, item.entry, float(item.score))

    def put_again(self, channel: QueueChannel, popped: Popped, server_time: float) -> None:
        """Put back into its mailbox what Redis did not take."""
        self._recent.is_new(channel.key, popped.entry, float(popped.score))
        self.put(channel, popped, server_time)

    def lose(self, channel: QueueChannel, items: Sequence[Popped], error: Exception) -> None:
        """Count and log what was popped for a reader who left, and that Redis did not take back."""
        self._troubles.note(GIVE_BACK_FAILED, channel.key, len(items), error=said(error))
        self._mailroom.books.sent += len(items)
        self._mailroom.books.discarded += len(items)
