"""What every channel layer is: names, capacities, and the contract.

The docstrings of ``BaseChannelLayer`` are the contract; ``anyio_channels.testing`` checks it. A third party writes a
layer by inheriting from it and implementing ``send``, ``receive``, ``new_channel``, ``group_add``, ``group_discard``,
``group_send``, ``group_channels``, ``flush``, ``statistics`` and ``close``. Everything else here is built on those;
a layer that can do better for ``subscribe`` overrides the four ``inbox_*`` methods too.
"""

from __future__ import annotations

import fnmatch
import math
import re
import reprlib
import warnings
from collections.abc import Callable, Collection, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from types import TracebackType
from typing import Any, ClassVar, Final, Literal, Self, TypeAlias

from anyio import CancelScope

from anyio_channels.exceptions import ChannelFull, MessageTooLarge

from .backend import YIELD_EVERY, thread
from .inbox import Inbox

__all__ = ["BaseChannelLayer", "ChannelLayerStatistics", "Message", "OnGap", "Overflow"]

Message: TypeAlias = dict[str, Any]
"""A message: a ``dict`` with ``str`` keys."""
Overflow: TypeAlias = Literal["drop_new", "drop_old"]
"""What a full inbox does with the next broadcast."""
OnGap: TypeAlias = Literal["ignore", "event", "raise"]
"""What an inbox that missed messages gets in their place."""
MESSAGE_VARIABLES: Final[list[ContextVar[Any]]] = []
"""Context variables that ``receive`` sets in the receiving task; ``SyncChannelLayer`` takes them along to its caller's thread."""

_NAME: Final = "[a-zA-Z0-9._-]+"


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
    """Messages thrown away unread by ``flush``, by closing, or with the inbox they were for."""


class BaseChannelLayer:
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
        A message unread for ``expiry`` seconds is never delivered, and frees its place at once. Its channel leaves all
        groups, for its reader is gone, unless it belongs to an open inbox, whose reader is only slow.
    Capacity
        Exact: a channel never holds more than its capacity of unexpired messages.
    Groups
        A membership ends by ``group_discard``, with the inbox that joined, or, if it was made by ``group_add``,
        ``group_expiry`` seconds after the last one.
    Yielding
        Every async call checks for cancellation. A call that need not wait does not always give way to other tasks, but
        of ``YIELD_EVERY`` calls in a row at least one does.
    Opening and closing
        ``async with layer:`` opens and closes. Afterwards every call raises ``anyio.ClosedResourceError``, and so do the
        readers who were waiting. A closed layer may be opened again; it is blank then.
    """

    MAX_NAME_LENGTH: ClassVar[int] = 100
    """A name must be shorter than this."""
    YIELD_EVERY: ClassVar[int] = YIELD_EVERY
    """Of so many calls in a row that need not wait, one lets the other tasks of the thread run."""

    channel_name_regex: ClassVar[re.Pattern[str]] = re.compile(rf"{_NAME}(![a-zA-Z0-9._-]*)?")
    """What a whole channel name must match."""
    group_name_regex: ClassVar[re.Pattern[str]] = re.compile(_NAME)
    """What a whole group name must match."""
    invalid_name_error: ClassVar[str] = (
        "{} name must be a str shorter than "
        f"{MAX_NAME_LENGTH} of ASCII letters, digits, hyphens, underscores and periods"
    )
    """The rule for names, with a place for the kind of name."""

    ChannelFull: ClassVar[type[ChannelFull]] = ChannelFull
    MessageTooLarge: ClassVar[type[MessageTooLarge]] = MessageTooLarge
    extensions: ClassVar[list[str]] = ["groups", "flush"]
    """The extensions of the channel layer specification that the layer has."""

    expiry: float
    capacity: int
    channel_capacity: list[tuple[re.Pattern[str], int]]
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
        self._opened = False
        self.expiry = require_seconds("expiry", expiry)
        self.capacity = require_count("capacity", capacity)
        self.channel_capacity = self.compile_capacities({} if channel_capacity is None else channel_capacity)
        self.max_message_size = require_count("max_message_size", max_message_size)
        if default is not None and not callable(default):
            raise TypeError(f"default must be callable, not {default!r}")
        self.default = default

    # Opening and closing

    async def __aenter__(self) -> Self:
        """Open the layer. ``RuntimeError`` if it is open already: whoever opened it closes it."""
        if self._opened:
            raise RuntimeError(f"{self!r} is already open; open a layer once, in the lifespan of the application")
        self._opened = True
        try:
            await self.open()
        except BaseException:
            self._opened = False
            raise
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the layer, also when cancelled."""
        with CancelScope(shield=True):
            await self.close()

    def __del__(self) -> None:
        """Warn about a layer that was opened and never closed."""
        if getattr(self, "_opened", False):
            warnings.warn(f"unclosed channel layer {self!r}", ResourceWarning, stacklevel=1, source=self)

    async def open(self) -> None:
        """Get ready; called by ``async with``. A layer without connections need not override it."""

    async def close(self) -> None:
        """Close the layer and throw away its buffered messages. Closing twice does nothing.

        Readers and senders that wait, and all later calls, get ``anyio.ClosedResourceError``. Layers that override it
        call this one too. Never waits for other tasks, so there is nothing for a cancellation to leave behind.
        """
        self._opened = False

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

        Raises ``TypeError`` for a name that breaks the rules, and ``anyio.ClosedResourceError`` when the layer is closed,
        before or during the wait.

        If cancelled, nothing was taken: the message stays where it is, for the next reader.
        """
        raise self._not_implemented("receive")

    async def new_channel(self, prefix: str = "specific.") -> str:
        """Return a process-specific channel name that nobody has, starting with ``prefix``.

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
        """Make ``channel`` a member of ``group``, or renew its membership for ``group_expiry`` seconds.

        Raises ``TypeError`` for a name that breaks the rules, and ``anyio.ClosedResourceError`` when closed. If cancelled, it
        is a member or is not.
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

    # Names

    def match_type_and_length(self, name: object) -> bool:
        """Whether ``name`` is a ``str`` shorter than ``MAX_NAME_LENGTH``."""
        return isinstance(name, str) and len(name) < self.MAX_NAME_LENGTH

    def require_valid_channel_name(self, name: object, receive: bool = False) -> bool:  # noqa: FBT001, FBT002 - the peers' signature
        """Return ``True``, or raise ``TypeError`` naming the value and the rule.

        With ``receive=True`` a process-specific name must end at its ``!``, as the specification asks of servers that
        receive for a whole process.
        """
        if not (self.match_type_and_length(name) and self.channel_name_regex.fullmatch(str(name))):
            rule = self.invalid_name_error.format("Channel")
            raise TypeError(f"{rule}, and at most one '!' behind the first of them; got {reprlib.repr(name)}")
        if receive and "!" in str(name) and not str(name).endswith("!"):
            raise TypeError(f"Specific channel names in receive() must end at the !; got {name!r}")
        return True

    def require_valid_group_name(self, name: object) -> bool:
        """Return ``True``, or raise ``TypeError`` naming the value and the rule."""
        if not (self.match_type_and_length(name) and self.group_name_regex.fullmatch(str(name))):
            raise TypeError(f"{self.invalid_name_error.format('Group')}; got {reprlib.repr(name)}")
        return True

    def non_local_name(self, name: str) -> str:
        """Return ``name`` up to and including its ``!``, or all of it if it has none."""
        head, mark, _ = name.partition("!")
        return head + mark

    def _require_valid_prefix(self, prefix: object) -> None:
        if not (isinstance(prefix, str) and len(prefix) <= _MAX_PREFIX and self.group_name_regex.fullmatch(prefix)):
            rule = f"prefix must be a str of 1 to {_MAX_PREFIX} ASCII letters, digits, hyphens, underscores and periods"
            raise TypeError(f"{rule}; got {reprlib.repr(prefix)}")

    def _require_valid_exclude(self, exclude: object) -> frozenset[str]:
        if isinstance(exclude, str | bytes) or not isinstance(exclude, Collection):
            raise TypeError(f"exclude must be a collection of channel names, not {reprlib.repr(exclude)}")
        for name in exclude:
            self.require_valid_channel_name(name)
        return frozenset(exclude)

    # Capacities

    def compile_capacities(
        self, channel_capacity: Mapping[str | re.Pattern[str], int]
    ) -> list[tuple[re.Pattern[str], int]]:
        """Return the patterns of ``channel_capacity`` compiled, in order; a ``str`` is a glob."""
        if not isinstance(channel_capacity, Mapping):
            raise TypeError(
                f"channel_capacity must be a mapping of patterns to capacities, not {reprlib.repr(channel_capacity)}"
            )
        compiled: list[tuple[re.Pattern[str], int]] = []
        for pattern, capacity in channel_capacity.items():
            if not isinstance(pattern, str | re.Pattern) or (
                isinstance(pattern, re.Pattern) and not isinstance(pattern.pattern, str)
            ):
                raise TypeError(
                    "a pattern of channel_capacity must be a glob (str) or a compiled regular expression for str, "
                    f"not {pattern!r}"
                )
            regex = re.compile(fnmatch.translate(pattern)) if isinstance(pattern, str) else pattern
            compiled.append((regex, require_count(f"channel_capacity[{pattern!r}]", capacity)))
        return compiled

    def get_capacity(self, channel: str) -> int:
        """Return the capacity of ``channel``: that of the first pattern it matches, or the layer's."""
        for pattern, capacity in self.channel_capacity:
            if pattern.match(channel):
                return capacity
        return self.capacity

    # For layers

    async def _check_in(self, calls: int = 1) -> None:
        """Check for cancellation, and give way to other tasks when it is time to; ``calls`` weighs a large call.

        To be awaited by an async call before it changes anything, unless it waits anyhow.
        """
        state = thread.state
        if state.is_due(calls):
            await state.give_way()

    def _not_implemented(self, method: str) -> NotImplementedError:
        return NotImplementedError(f"{type(self).__name__} must implement {method}()")


_MAX_PREFIX: Final = 50


def require_seconds(option: str, value: object) -> float:
    """Return ``value`` if it is a positive, finite number, or raise naming ``option``."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{option} must be a number of seconds, not {value!r}")
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{option} must be a positive, finite number of seconds, not {value!r}")
    return value


def require_count(option: str, value: object) -> int:
    """Return ``value`` if it is a positive ``int``, or raise naming ``option``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{option} must be an int, not {value!r}")
    if value < 1:
        raise ValueError(f"{option} must be at least 1, not {value!r}")
    return value


def require_choice(option: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise ``ValueError`` naming ``option`` unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{option} must be one of {', '.join(map(repr, choices))}, not {value!r}")
