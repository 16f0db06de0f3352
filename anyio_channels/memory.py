"""The in-memory layer: a ``Hub`` without a transport, and its plain functions."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Collection, Mapping
from sys import modules
from typing import Any, Final

from anyio import WouldBlock

from .contract.layer import Message
from .local.hub import Hub
from .wakeup import held, hold_interrupts

__all__ = ["InMemoryChannelLayer", "channel_layer"]


class InMemoryChannelLayer(Hub):
    """A channel layer within one process: for any number of threads and event loops, asyncio and trio at once.

    It works with and without ``async with layer:``. All methods may be called from every thread that runs an event
    loop; ``send_nowait``, ``receive_nowait``, ``group_send_nowait`` and ``statistics`` also from threads that run none.

    Expired messages are never delivered and never count. Their memory is reclaimed a few at each sending or joining call,
    in whatever channel, and all at once by ``statistics()``; there is no background task.

    A forked child has an empty layer, whatever threads of its parent were doing.
    """

    def __init__(
        self,
        expiry: float = 60,
        group_expiry: float = 86400,
        capacity: int = 100,
        channel_capacity: Mapping[str | re.Pattern[str], int] | None = None,
        *,
        max_message_size: int = 4 * 1024 * 1024,
        default: Callable[[Any], Any] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Take the options of ``BaseChannelLayer``, and two of its own.

        ``group_expiry``: seconds after which a membership made by ``group_add`` ends. ``clock``: tells the time, in
        seconds; a test gives one that it moves itself.
        """
        super().__init__(
            expiry=expiry,
            group_expiry=group_expiry,
            capacity=capacity,
            channel_capacity=channel_capacity,
            max_message_size=max_message_size,
            default=default,
            clock=clock,
        )

    def send_nowait(self, channel: str, message: Message) -> None:
        """Send ``message`` to ``channel``, from any thread, with or without an event loop.

        Raises what ``send`` raises.
        """
        if "trio" in modules and not held:
            hold_interrupts()
        self._put(channel, self._encode(message))

    def receive_nowait(self, channel: str) -> Message:
        """Return the next message on ``channel``, from any thread, with or without an event loop.

        Raises ``anyio.WouldBlock`` when there is none, or none that is not promised to a reader who waits already, and
        what ``receive`` raises.
        """
        source = self._source(channel)
        item = source.take_at_once()
        if item is None:
            source.reader_looks()
            raise WouldBlock
        return self._decode(item) if isinstance(item, bytes) else source.gap_message(item)

    def group_send_nowait(self, group: str, message: Message, *, exclude: Collection[str] = ()) -> None:
        """Send ``message`` to every member of ``group``, from any thread, with or without an event loop.

        Raises what ``group_send`` raises.
        """
        self.require_valid_group_name(group)
        excluded = self._require_valid_exclude(exclude)
        if "trio" in modules and not held:
            hold_interrupts()
        data = self._encode(message)
        self._require_open()
        self._deliveries.deliver_to_group(group, data, excluded)


channel_layer: Final = InMemoryChannelLayer()
"""A ready-made layer for applications of one process."""
