"""What ``subscribe()`` hands out.

Rules:
- an inbox is its ``async with`` block: it is a channel and its memberships, and neither outlives the block.
- it holds no messages: those are the layer's. It knows which groups it is in, so that leaving leaves them all.
- leaving the block is shielded from cancellation; nothing else is.
"""

from __future__ import annotations

from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from anyio import CancelScope, ClosedResourceError

if TYPE_CHECKING:
    from .base import BaseChannelLayer, OnGap, Overflow

__all__ = ["Inbox"]


class Inbox:
    """A channel of one's own, and the groups it belongs to, for the length of an ``async with`` block.

    Made by ``BaseChannelLayer.subscribe``, which documents its options. Iterating over it receives for ever::

        async with layer.subscribe("room") as inbox:
            async for message in inbox: ...
    """

    def __init__(
        self,
        layer: BaseChannelLayer,
        groups: tuple[str, ...],
        prefix: str,
        capacity: int | None,
        overflow: Overflow,
        on_gap: OnGap,
    ) -> None:
        """Called by ``subscribe()``."""
        self._layer = layer
        self._initial_groups = groups
        self._options: tuple[str, int | None, Overflow, OnGap] = (prefix, capacity, overflow, on_gap)
        self._channel: str | None = None
        self._groups: set[str] = set()
        self._closed = False

    def __repr__(self) -> str:
        """Say which channel of which layer."""
        return f"<Inbox {self._channel or '(not entered)'} of {self._layer!r}>"

    @property
    def channel(self) -> str:
        """The name of the channel: others may ``send`` to it, and ``exclude`` it."""
        if self._channel is None:
            raise RuntimeError("an inbox has a channel only inside 'async with layer.subscribe(...)'")
        return self._channel

    async def __aenter__(self) -> Self:
        """Make the channel and join the groups. If cancelled, neither is left behind."""
        if self._channel is not None:
            raise RuntimeError("an inbox can be entered once; call subscribe() for another")
        self._channel = await self._layer.inbox_open(*self._options)
        try:
            for group in self._initial_groups:
                await self.join(group)
        except BaseException:
            await self._close()
            raise
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Leave the groups and free the channel, also when cancelled."""
        await self._close()

    async def receive(self) -> dict[str, Any]:
        """Wait for the next message and return it, as ``BaseChannelLayer.receive`` does.

        Raises ``MessagesLost`` once for each gap if the inbox was opened with ``on_gap="raise"``, and
        ``anyio.ClosedResourceError`` when the block was left or the layer closed. If cancelled, nothing was taken.
        """
        if self._closed:
            raise ClosedResourceError
        return await self._layer.receive(self.channel)

    def __aiter__(self) -> Self:
        """Iterate over the messages as they come; never ends by itself."""
        return self

    async def __anext__(self) -> dict[str, Any]:
        """Receive the next message."""
        return await self.receive()

    async def join(self, group: str) -> None:
        """Become a member of ``group`` until ``leave`` or the end of the block; nothing happens if it is one.

        Raises ``TypeError`` for a name that breaks the rules, and ``anyio.ClosedResourceError`` when the block was left or the
        layer closed. If cancelled, a member or not; the end of the block leaves the group either way.
        """
        if self._closed:
            raise ClosedResourceError
        self._layer.require_valid_group_name(group)
        self._groups.add(group)  # before, not after: if cancelled half way, closing leaves it all the same
        await self._layer.inbox_join(self.channel, group)

    async def leave(self, group: str) -> None:
        """End the membership in ``group``; nothing happens if there is none.

        Raises what ``join`` raises. If cancelled, a member or not; the end of the block leaves the group either way.
        """
        if self._closed:
            raise ClosedResourceError
        await self._layer.inbox_leave(self.channel, group)
        self._groups.discard(group)

    async def _close(self) -> None:
        self._closed = True
        # A layer that was closed meanwhile has forgotten the channel already.
        with CancelScope(shield=True), suppress(ClosedResourceError):
            await self._layer.inbox_close(self.channel, tuple(self._groups))
