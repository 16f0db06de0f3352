"""What comes from a transport, into the mailboxes of this process.

Rules:
- a message comes to a *topic*: the name of a channel, or ``group:`` and the name of a group (no channel name has a colon).
- these are plain functions: nothing waits, and no task gets in between. A transport calls them in the event loop that opened
  the layer; in memory, broadcasts come from any thread.
- what is not a message of ours is dropped, counted, and logged once. So are messages for members that are full.
- what has ended here meanwhile, a channel or a group, is unsubscribed from, unless it is here again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

from anyio_channels.contract.layer import Message
from anyio_channels.contract.message import EXCLUDE_KEY, Codec, Unreadable
from anyio_channels.log import (
    CHANNEL_DROPPED,
    GROUP_SEND_DROPPED,
    MESSAGE_UNREADABLE,
    SUBSCRIPTION_REFUSED,
    Troubles,
    said,
)

from .directory import Channel, Directory
from .waiting import Waiter

__all__ = ["Deliveries", "group_topic"]

_GROUP: Final = "group:"


def group_topic(group: str) -> str:
    """Return the topic of the group ``group``."""
    return _GROUP + group


class Deliveries:
    """What a transport tells its layer: that messages came, or may be missing."""

    def __init__(
        self,
        here: Directory,
        codec: Codec,
        expiry: float,
        troubles: Troubles,
        unsubscribe: Callable[[str], object] | None,
        layer: object,
    ) -> None:
        """``here``: the channels of this process. ``unsubscribe``: hears of topics that have ended; ``None`` for no transport.

        ``layer``: its ``repr`` is in the log.
        """
        self._here = here
        self._mailroom = here.mailroom
        self._clock = here.mailroom.clock
        self._codec = codec
        self._expiry = expiry
        self._troubles = troubles
        self._unsubscribe = unsubscribe
        self.layer: object = layer
        """Whose deliveries these are; for its ``repr`` in the log."""
        self.unreadable: int = 0
        """How much came that was not a message."""
        self.sent_late: int = 0
        """How often ``publish`` was cancelled and happened all the same; for the transport to count, if it can know."""

    def deliver(self, topic: str, body: bytes, where: str | None = None) -> None:
        """Hand on a message that came. ``where``: what the log calls the topic, if not ``topic``."""
        is_group = topic.startswith(_GROUP)
        name = topic[len(_GROUP) :] if is_group else topic
        if name not in (self._here.groups if is_group else self._here.channels):
            return
        try:
            message, body, excluded = self._decode(body)
        except Unreadable as why:
            self.drop_unreadable(topic if where is None else where, why)
            return
        if is_group:
            self.deliver_to_group(name, body, excluded)
            return
        mailroom = self._mailroom
        rung: list[Waiter] = []
        mailroom.lock.acquire()
        try:
            now = self._clock()
            if now >= mailroom.index.next_due:
                mailroom.index.sweep(now, rung)
            channel = self._here.channels.get(topic)
            is_full = channel is not None and not channel.put((now + self._expiry, message), now, rung)
            if is_full and channel is not None:
                channel.miss(rung)
        finally:
            mailroom.lock.release()
            if rung or mailroom.abandoned:
                mailroom.wake(rung)
        if is_full:
            self._troubles.note(CHANNEL_DROPPED, topic)
        if self._here.ended:
            self.forget_ended()

    def _decode(self, body: bytes) -> tuple[Message, bytes, frozenset[str]]:
        """Return the message in ``body``, its bytes, and the channels that are to miss it; or raise ``Unreadable``."""
        message = self._codec.decode_body(body)
        if EXCLUDE_KEY not in message:
            return message, body, frozenset()
        names = message.pop(EXCLUDE_KEY)
        excluded = [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
        return message, self._codec.encode_again(message), frozenset(excluded)

    def deliver_to_group(self, group: str, body: bytes, excluded: frozenset[str]) -> None:
        """Put ``body`` into the channels of the members of ``group`` in this process, but for ``excluded``."""
        mailroom = self._mailroom
        rung: list[Waiter] = []
        try:
            with mailroom:
                now = self._clock()
                mailroom.index.sweep(now, rung)
                target = self._here.groups.get(group)
                missed = 0 if target is None else target.deliver((now + self._expiry, body), excluded, now, rung)
        finally:
            mailroom.wake(rung)
        if missed:
            self._troubles.note(GROUP_SEND_DROPPED, group, missed)
        elif now >= self._troubles.due:
            self._troubles.look()
        if self._here.ended:
            self.forget_ended()

    def tell_all(self, message: Message) -> None:
        """Put ``message`` into every channel of this process."""
        body = self._codec.encode(message)
        rung: list[Waiter] = []
        full: list[str] = []
        with self._mailroom:
            now = self._clock()
            for channel in tuple(self._here.channels.values()):
                if not channel.put((now + self._expiry, body), now, rung):
                    channel.miss(rung)
                    full.append(channel.name)
        self._mailroom.wake(rung)
        for name in full:
            self._troubles.note(CHANNEL_DROPPED, name)

    def missing(self, is_touched: str | Callable[[str], bool] = lambda _: True) -> None:
        """Messages to the topics for which ``is_touched`` is true may have been lost: inboxes that ask for it are told.

        With one topic in its place, only those that have it; then it does not matter how many others there are.
        """
        if isinstance(is_touched, str):
            is_group = is_touched.startswith(_GROUP)
            self._here.mark_outage_at(is_touched[len(_GROUP) :] if is_group else is_touched, is_group=is_group)
            return

        def touches(channel: Channel) -> bool:
            return is_touched(channel.name) or any(is_touched(group_topic(one.name)) for one in channel.groups or ())

        self._here.mark_outage(touches)

    def unheard(self, topic: str, error: Exception, where: str | None = None) -> None:
        """``topic`` cannot be subscribed to again: the next who reads it asks anew, and is told why.

        ``where``: what the log calls it, if not ``topic``.
        """
        self._troubles.note(SUBSCRIPTION_REFUSED, topic if where is None else where, error=said(error))
        if (channel := self._here.channels.get(topic)) is not None:
            channel.attended = False

    def drop_unreadable(self, where: str, why: object) -> None:
        """Count and log what came and is not a message of ours."""
        self.unreadable += 1
        self._troubles.note(MESSAGE_UNREADABLE, where, error=str(why))

    def sweep(self) -> None:
        """Drop all that has expired in this process; to be called now and then where there is no traffic."""
        self._here.sweep(math.inf)
        self.forget_ended()
        self._troubles.look()

    def forget_ended(self) -> None:
        """Unsubscribe from what has ended meanwhile, unless it is here again."""
        ended = self._here.ended
        while ended and self._unsubscribe is not None:
            name, is_group = ended.popleft()
            if name not in (self._here.groups if is_group else self._here.channels):
                self._unsubscribe(group_topic(name) if is_group else name)
