"""What every channel layer is: the contract, in the docstrings of ``BaseChannelLayer`` and ``Inbox``.

Rules:
- ``anyio_channels.testing`` checks what is promised here, for any layer.
- a third party writes a layer by implementing ``send``, ``receive``, ``new_channel``, ``group_add``, ``group_discard``,
  ``group_send``, ``group_channels``, ``flush``, ``statistics`` and ``close``. Everything else here is built on those.
  A layer that can do better for ``subscribe`` also overrides the four ``inbox_*`` methods.
- an inbox is its ``async with`` block: a channel and its memberships, and neither outlives the block. It holds no
  messages; those are the layer's.
- one ``Life`` says where in its life a layer is. There are no flags beside it.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Collection, Coroutine, Mapping
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass
from enum import Enum
from types import TracebackType
from typing import Any, ClassVar, Final, Literal, Self, TypeAlias

from anyio import CancelScope, ClosedResourceError

from anyio_channels.exceptions import ChannelFull, MessageTooLarge, in_a_fork
from anyio_channels.wakeup import YIELD_EVERY, hold_interrupts, thread

from .names import Names
from .options import require_callable, require_choice, require_count, require_seconds

__all__ = ["BaseChannelLayer", "ChannelLayerStatistics", "Inbox", "Life", "Message", "OnGap", "Overflow"]

Message: TypeAlias = dict[str, Any]
"""A message: a ``dict`` with ``str`` keys."""
Overflow: TypeAlias = Literal["drop_new", "drop_old"]
"""What a full inbox does with the next broadcast."""
OnGap: TypeAlias = Literal["ignore", "event", "raise"]
"""What an inbox that missed messages gets in their place."""
MESSAGE_VARIABLES: Final[list[ContextVar[Any]]] = []
"""Context variables that ``receive`` sets in the receiving task; ``SyncChannelLayer`` takes them along to its caller's thread."""


class Life(Enum):
    """Where in its life a layer is."""

    NEW = "new"
    OPENING = "opening"
    OPEN = "open"
    CLOSING = "closing"
    CLOSED = "closed"


@dataclass(frozen=True, slots=True)
class ChannelLayerStatistics:
    """A snapshot of a layer.

    The first five fields say what is there now; the others count (message, channel) pairs since the layer was made, or
    opened again after closing. Each pair that was sent ends under exactly one heading::

        sent == received + expired + dropped_full + dropped_unreadable + discarded + buffered_messages
    """

    channels: int
    """Channels that hold a message or belong to an open inbox."""
    buffered_messages: int
    """Messages that wait to be received."""
    groups: int
    """Groups with at least one member."""
    members: int
    """Memberships, over all groups."""
    waiting_receivers: int
    """Calls of ``receive`` that wait for a message."""
    sent: int
    """Messages accepted by ``send``, and for ``group_send`` one for each member it was meant for."""
    received: int
    """Messages handed to a receiver."""
    expired: int
    """Messages that nobody received in time."""
    dropped_full: int
    """Messages that a full member of a group missed, or that made room for newer ones."""
    dropped_unreadable: int
    """Bytes in a shared store that are no message of ours."""
    discarded: int
    """Messages thrown away unread by ``flush``, by closing, or with the channel they were for."""


class BaseChannelLayer(Names):
    """What all channel layers share, and what each must do.

    A channel layer sends messages to *channels* by name, and broadcasts to *groups* of channels. What is promised here
    holds for every layer:

    Names
        ``str`` shorter than 100 characters of ASCII letters, digits, ``-``, ``_`` and ``.``; a channel name may hold one
        ``!`` behind the first character, which makes it *process-specific*. Anything else is a ``TypeError``.
    Messages
        ``dict`` with ``str`` keys; values are ``str``, ``bytes``, ``int`` (64 bit), ``float``, ``bool``, ``None``, and
        lists and dicts of those. Tuples arrive as lists. Other values go through ``default``, or are refused with a
        ``TypeError`` that says where they are. ``__asgi_channel__`` is a reserved key. A message longer than
        ``max_message_size`` is a ``MessageTooLarge``. What is refused leaves nothing behind.
    Isolation
        The sender and each receiver have their own copy.
    Delivery
        At most once. One writer and one reader see the order of sending. Of several readers of one channel each message
        reaches one; those who wait are served in turn.
    Cancellation
        A cancelled ``receive`` has taken nothing; a cancelled ``send`` or ``group_send`` happened whole or not at all.
        That holds for anyio's cancel scopes and for asyncio's own ``Task.cancel()``.
    Expiry
        A message unread for ``expiry`` seconds is never delivered, and frees its place at once. That ends no membership: its
        reader may only be slow.
    Capacity
        Exact: a channel never holds more than its capacity of unexpired messages.
    Groups
        A membership ends by ``group_discard``, and with its channel. That of a normal channel, or of another process's, ends
        ``group_expiry`` seconds after the last ``group_add`` too.
    Ownership
        A process-specific channel is the process's that made it; on Redis, nobody else can receive from it. An inbox ends
        with its block. A channel of ``new_channel()`` ends ``group_expiry`` seconds after its last use, and ``expiry`` seconds
        after it if its last ``receive`` was cancelled or the name that ``new_channel()`` returned was garbage-collected. A use
        is ``new_channel``, a ``group_add`` of it, and a ``receive`` that begins, waits or returns: nothing ends while somebody
        waits. One that has ended is out of its groups, its messages are discarded, and its next ``receive`` raises
        ``anyio.ClosedResourceError``.
    Yielding
        Every async call checks for cancellation. A call that need not wait does not always give way to other tasks, but
        of ``YIELD_EVERY`` calls in a row at least one does.
    Opening and closing
        ``async with layer:`` opens and closes. Afterwards every call raises ``anyio.ClosedResourceError``, and so do the
        readers who were waiting. A closed layer may be opened again; it is blank then.
    """

    YIELD_EVERY: ClassVar[int] = YIELD_EVERY
    """Of so many calls in a row that need not wait, one lets the other tasks of the thread run."""

    ChannelFull: ClassVar[type[ChannelFull]] = ChannelFull
    MessageTooLarge: ClassVar[type[MessageTooLarge]] = MessageTooLarge
    extensions: ClassVar[list[str]] = ["groups", "flush"]
    """The extensions of the channel layer specification that the layer has."""

    expiry: float
    max_message_size: int
    default: Callable[[Any], Any] | None

    def __init__(
        self,
        expiry: float = 60,
        capacity: int = 100,
        channel_capacity: Mapping[str | re.Pattern[str], int] | None = None,
        *,
        max_message_size: int = 4 * 1024 * 1024,
        default: Callable[[Any], Any] | None = None,
    ) -> None:
        """Check and keep the options.

        ``expiry``: seconds until an unread message expires. ``capacity``: how many unexpired messages a channel holds.
        ``channel_capacity``: other capacities for channels that match a glob or compiled regular expression, first match
        wins. ``max_message_size``: bytes of an encoded message; 4 MiB lets through all that is 1 MB as JSON.
        ``default``: called with a value that no message may hold, returns what is sent instead.

        Raises ``TypeError`` or ``ValueError`` naming the option and its rule.
        """
        hold_interrupts()
        self._life = Life.NEW
        self._opened_by = os.getpid()
        self.expiry = require_seconds("expiry", expiry)
        self.capacity: int = require_count("capacity", capacity)
        self.channel_capacity: list[tuple[re.Pattern[str], int]] = self.compile_capacities(
            {} if channel_capacity is None else channel_capacity
        )
        self.max_message_size = require_count("max_message_size", max_message_size)
        self.default = require_callable("default", default)

    # Opening and closing

    @property
    def _is_foreign(self) -> bool:
        """Whether it was opened by a process of which this one is a fork."""
        return self._opened_by != os.getpid()

    async def __aenter__(self) -> Self:
        """Open the layer. ``RuntimeError`` if it is open already, here or in the process that this one is a fork of."""
        if self._life in (Life.OPENING, Life.OPEN, Life.CLOSING):
            if self._is_foreign:
                raise in_a_fork(repr(self), self._opened_by)
            raise RuntimeError(f"{self!r} is already open; open a layer once, in the lifespan of the application")
        before, self._life = self._life, Life.OPENING
        self._opened_by = os.getpid()
        try:
            await self.open()
        except BaseException:
            self._life = before
            raise
        self._life = Life.OPEN
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the layer, also when cancelled."""
        with CancelScope(shield=True):
            await self.close()

    def __del__(self) -> None:
        """Warn about a layer that was opened and never closed."""
        if getattr(self, "_life", Life.NEW) in (Life.OPENING, Life.OPEN) and not self._is_foreign:
            warnings.warn(f"unclosed channel layer {self!r}", ResourceWarning, stacklevel=1, source=self)

    async def open(self) -> None:
        """Get ready; called by ``async with``. A layer without connections need not override it."""

    async def close(self) -> None:
        """Close the layer and throw away its buffered messages. Closing twice does nothing.

        Readers and senders that wait, and all later calls, get ``anyio.ClosedResourceError``. Layers that override it
        call this one too. Never waits for other tasks, so there is nothing for a cancellation to leave behind.
        """
        if self._life is not Life.NEW:
            self._life = Life.CLOSED

    # Messages

    async def send(self, channel: str, message: Message, *, wait: bool = False) -> None:
        """Send ``message`` to ``channel``.

        Raises ``ChannelFull`` when the channel holds its capacity of unexpired messages; with ``wait=True`` it waits for
        room instead, in turn with others who wait, for as long as the caller's cancel scope allows. ``TypeError`` and
        ``MessageTooLarge`` for what breaks the rules for names and messages, ``anyio.ClosedResourceError`` when closed.

        If cancelled, it was sent or it was not: not, in memory and while it waits for room; on Redis it may have been on its
        way already.
        """
        raise self._not_implemented("send")

    async def receive(self, channel: str) -> Message:
        """Wait for the next unexpired message on ``channel`` and return it.

        Raises ``TypeError`` for a name that breaks the rules, ``RuntimeError`` for a process-specific channel of another
        process, and ``anyio.ClosedResourceError`` for one of this process that has ended, or when the layer is closed, before or
        during the wait.

        If cancelled, nothing was taken: the message stays where it is, for the next reader. A channel of ``new_channel()`` then
        ends after ``expiry`` seconds, unless it is received from again; so poll more often than that, or not at all.
        """
        raise self._not_implemented("receive")

    async def new_channel(self, prefix: str = "specific.") -> str:
        """Return a process-specific channel name that nobody has, starting with ``prefix``.

        It ends some time after its last use, as *Ownership* says: sooner if nobody has the ``str`` that is returned here. Keep
        it, not only a copy, as long as the channel is to be used.

        ``prefix``: 1 to 50 ASCII letters, digits, hyphens, underscores and periods; ``TypeError`` for others.
        ``anyio.ClosedResourceError`` when closed. If cancelled, there is no such channel.
        """
        raise self._not_implemented("new_channel")

    async def flush(self) -> None:
        """Throw away all messages and memberships. Who waits for a message goes on waiting.

        Raises ``anyio.ClosedResourceError`` when closed. If cancelled, the layer was flushed or was not.
        """
        raise self._not_implemented("flush")

    # Groups

    async def group_add(self, group: str, channel: str) -> None:
        """Make ``channel`` a member of ``group``, or renew its membership.

        It lasts for ``group_expiry`` seconds; that of a process-specific channel of this process, as long as the channel.
        Raises ``TypeError`` for a name that breaks the rules, and ``anyio.ClosedResourceError`` for a channel of this process
        that has ended, or when closed. If cancelled, it is a member or is not; one that was, still is.
        """
        raise self._not_implemented("group_add")

    async def group_discard(self, group: str, channel: str) -> None:
        """End the membership of ``channel`` in ``group``; nothing happens if it is not a member.

        Raises ``TypeError`` for a name that breaks the rules, and ``anyio.ClosedResourceError`` when closed. If cancelled, it
        is a member or is not.
        """
        raise self._not_implemented("group_discard")

    async def group_send(self, group: str, message: Message, *, exclude: Collection[str] = ()) -> None:
        """Send ``message`` once to every member of ``group``, but for the channels in ``exclude``.

        Never raises ``ChannelFull``: a member that is full misses the message, which is counted and logged. A group without
        members is no error. Raises ``TypeError`` and ``MessageTooLarge`` for what breaks the rules for names and messages, and
        ``anyio.ClosedResourceError`` when closed.

        If cancelled, all were sent it or nobody was.
        """
        raise self._not_implemented("group_send")

    async def group_channels(self, group: str) -> set[str]:
        """Return the members of ``group`` as they are now; the empty set if there are none.

        Raises ``TypeError`` for a name that breaks the rules, and ``anyio.ClosedResourceError`` when closed. If cancelled,
        nothing has changed.
        """
        raise self._not_implemented("group_channels")

    def statistics(self) -> ChannelLayerStatistics:
        """Return a snapshot of what the layer holds and has done; waits for nothing, also works when closed."""
        raise self._not_implemented("statistics")

    @property
    def server(self) -> tuple[str, int | None] | None:
        """Host and port of the one server that the layer uses (its unix socket and ``None``); ``None`` for none or several."""
        return None

    # The structured API

    def subscribe(
        self,
        *groups: str,
        prefix: str = "specific.",
        capacity: int | None = None,
        overflow: Overflow = "drop_new",
        on_gap: OnGap = "ignore",
    ) -> Inbox:
        """Return an inbox for ``async with``: a new channel that is a member of ``groups`` while the block runs.

        ``capacity``: how many messages the inbox holds, if not what the layer gives a channel of that name.
        ``overflow``: what happens when a message finds it full: with ``"drop_new"`` a broadcast is dropped and a ``send``
        raises ``ChannelFull``; with ``"drop_old"`` the oldest message is dropped for either. ``on_gap``: what the reader
        gets in the place of messages that it missed, dropped or expired: nothing (``"ignore"``), a message
        ``{"type": "channel_layer.gap", "missed": n}`` (``"event"``; ``n`` is ``None`` where nobody can know), or one
        ``MessagesLost`` from ``receive`` (``"raise"``). Whoever asks the whole group for what it missed should not do so
        at every gap: the answers may overflow the inbox again.

        Raises ``TypeError`` or ``ValueError``, at once, for a name or an option that breaks the rules. Leaving the block, also by
        an error or by cancellation, leaves all groups, ends the waits of the inbox's readers with ``anyio.ClosedResourceError``
        and throws away what was not read.
        """
        for group in groups:
            self.require_valid_group_name(group)
        self._require_valid_prefix(prefix)
        if capacity is not None:
            require_count("capacity", capacity)
        require_choice("overflow", overflow, ("drop_new", "drop_old"))
        require_choice("on_gap", on_gap, ("ignore", "event", "raise"))
        return Inbox(self, groups, prefix, capacity, overflow, on_gap)

    async def inbox_open(self, prefix: str, capacity: int | None, overflow: Overflow, on_gap: OnGap) -> str:
        """Make the channel of an inbox and return its name; a layer with mailboxes of its own overrides this.

        As inherited it supports only the defaults and raises ``NotImplementedError`` for others.
        """
        if capacity is not None or overflow != "drop_new" or on_gap != "ignore":
            raise NotImplementedError(
                f"{type(self).__name__} does not support the options capacity, overflow and on_gap of subscribe()"
            )
        return await self.new_channel(prefix)

    async def inbox_close(self, channel: str, groups: Collection[str]) -> None:
        """Leave ``groups``, to which the inbox still belongs, and forget its channel. Called shielded."""
        for group in groups:
            await self.group_discard(group, channel)

    async def inbox_join(self, channel: str, group: str) -> None:
        """Make the inbox a member of ``group`` until it leaves."""
        await self.group_add(group, channel)

    async def inbox_leave(self, channel: str, group: str) -> None:
        """End the membership of the inbox in ``group``."""
        await self.group_discard(group, channel)

    # For layers

    async def _check_in(self, calls: int = 1) -> None:
        """Check for cancellation, and give way to other tasks when it is time to; ``calls`` weighs a large call.

        To be awaited by an async call before it changes anything, unless it waits anyhow.
        """
        state = thread.state
        if state.is_due(calls):
            await state.give_way()

    async def _arrived(self, channel: str) -> None:
        """Return when all that is in ``channel`` has come to the reader who waits for it here.

        For a caller who does not want to wait for more. A layer whose messages travel first must override it.
        """
        await self._check_in()

    def _not_implemented(self, method: str) -> NotImplementedError:
        return NotImplementedError(f"{type(self).__name__} must implement {method}()")


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

    def receive(self) -> Coroutine[Any, Any, Message]:
        """Wait for the next message and return it, as ``BaseChannelLayer.receive`` does.

        Raises ``MessagesLost`` once for each gap if the inbox was opened with ``on_gap="raise"``, and
        ``anyio.ClosedResourceError`` when the block was left or the layer closed. If cancelled, nothing was taken.
        """
        if self._closed:
            raise ClosedResourceError
        # Not a coroutine itself: one frame less for each message to go through.
        return self._layer.receive(self.channel)

    def __aiter__(self) -> Self:
        """Iterate over the messages as they come; never ends by itself."""
        return self

    def __anext__(self) -> Coroutine[Any, Any, Message]:
        """Receive the next message."""
        return self.receive()

    async def join(self, group: str) -> None:
        """Become a member of ``group`` until ``leave`` or the end of the block; nothing happens if it is one.

        Raises ``TypeError`` for a name that breaks the rules, and ``anyio.ClosedResourceError`` when the block was left or the
        layer closed. If cancelled, a member or not, and still one if it was; the end of the block leaves the group either way.
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
