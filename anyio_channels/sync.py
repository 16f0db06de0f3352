"""Any channel layer from synchronous code: scripts, Celery and RQ tasks, Django and Flask views.

Rules:
- the layer lives in an event loop of its own, in a thread of its own (``portal``); each call goes there and waits for the answer.
- what the layer promises holds here too. What is a cancel scope there is a ``timeout`` here.
- the methods have the names and arguments of the asynchronous ones; the pure ones are the layer's own.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Collection
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import Any, ClassVar, Self, TypeVar

from anyio import CancelScope, ClosedResourceError, Event, create_task_group, move_on_after
from anyio.abc import TaskStatus
from anyio.lowlevel import checkpoint

from .contract.layer import (
    MESSAGE_VARIABLES,
    BaseChannelLayer,
    ChannelLayerStatistics,
    Inbox,
    Message,
    OnGap,
    Overflow,
)
from .contract.options import require_seconds
from .exceptions import ChannelFull, MessageTooLarge
from .portal import Portal

__all__ = ["SyncChannelLayer", "SyncInbox"]

T = TypeVar("T")


class SyncChannelLayer:
    """A channel layer whose methods wait for their results, for any number of threads.

    ::

        with SyncChannelLayer(RedisChannelLayer(hosts=["redis://localhost"])) as layer:
            layer.group_send("room", {"type": "chat.message", "text": "hello"})

    Where no block fits (a WSGI application), ``open()`` and ``close()`` do what entering and leaving it does; what is left open
    is closed when the interpreter exits, behind all threads that are no daemons (children of ``multiprocessing`` end without
    that). Make it anywhere, and open it in each process that uses it, after it was forked: in a fork of the process that
    opened it every call is a ``RuntimeError`` that says so.

    Every call raises what its asynchronous twin raises, and also: ``RuntimeError`` when an event loop runs a task in the
    calling thread, which the call would block, and when the layer was not opened; ``anyio.ClosedResourceError`` when it was
    closed, or is while the call waits. An exception that interrupts a call that waits, as Ctrl-C does or a soft time limit of
    Celery, cancels the call: a message is then not sent, or not taken, unless it was so already.
    """

    MAX_NAME_LENGTH: ClassVar[int] = BaseChannelLayer.MAX_NAME_LENGTH
    """A name must be shorter than this."""
    channel_name_regex: ClassVar[re.Pattern[str]] = BaseChannelLayer.channel_name_regex
    """What a whole channel name must match."""
    group_name_regex: ClassVar[re.Pattern[str]] = BaseChannelLayer.group_name_regex
    """What a whole group name must match."""
    ChannelFull: ClassVar[type[ChannelFull]] = ChannelFull
    MessageTooLarge: ClassVar[type[MessageTooLarge]] = MessageTooLarge

    def __init__(
        self, layer: BaseChannelLayer, backend: str = "asyncio", *, backend_options: dict[str, Any] | None = None
    ) -> None:
        """Keep ``layer``, which must not be open.

        ``backend``: ``"asyncio"`` or ``"trio"``. ``backend_options``: as for ``anyio.run``, such as ``{"use_uvloop": True}``.
        ``TypeError`` and ``ValueError`` for what cannot be.
        """
        if not isinstance(layer, BaseChannelLayer):
            raise TypeError(f"layer must be a channel layer, not {layer!r:.100}")
        self.layer = layer
        self._portal = Portal(repr(self), lambda: layer, backend, backend_options)

    def __repr__(self) -> str:
        """Say which layer."""
        return f"SyncChannelLayer({self.layer!r})"

    def open(self) -> Self:
        """Open the layer, and return ``self``; raises what opening that layer raises. A closed one may be opened again."""
        self._portal.open()
        return self

    def close(self) -> None:
        """Close the layer and end its event loop. Closing twice, or in a fork of the process that opened it, does nothing.

        Calls that wait in other threads get ``anyio.ClosedResourceError``.
        """
        self._portal.close()

    def __enter__(self) -> Self:
        """Open the layer."""
        return self.open()

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the layer."""
        self.close()

    # Messages

    def send(self, channel: str, message: Message, *, wait: bool = False, timeout: float | None = None) -> None:
        """Send ``message`` to ``channel``, as ``BaseChannelLayer.send``.

        ``timeout``: with ``wait=True``, how many seconds to wait for room, 0 for not at all; ``TimeoutError`` when there was
        none.
        """
        what = f"there was no room in channel {channel!r}"
        if timeout is not None and not wait:
            raise ValueError(f"timeout={timeout!r} has no effect without wait=True: send() does not wait for room")
        if _is_zero(timeout):
            try:
                self._call("send()", self.layer.send, channel, message)
            except ChannelFull as error:
                raise TimeoutError(what) from error
        else:
            self._call("send()", _within, timeout, what, partial(self.layer.send, channel, message, wait=wait))

    def receive(self, channel: str, timeout: float | None = None) -> Message:
        """Wait for the next message on ``channel`` and return it, as ``BaseChannelLayer.receive``.

        ``timeout``: how many seconds to wait, ``None`` for ever; ``TimeoutError`` when nothing came. 0 takes what is there
        now; a layer over a network asks its server, and waits for the answer only.
        """
        receive = partial(self.layer.receive, channel)
        arrived = partial(self.layer._arrived, channel)  # noqa: SLF001 - the half of receive() that this needs
        return _with_variables(self._call("receive()", _receive_within, timeout, channel, receive, arrived))

    def new_channel(self, prefix: str = "specific.") -> str:
        """Return a process-specific channel name that nobody has, starting with ``prefix``."""
        return self._call("new_channel()", self.layer.new_channel, prefix)

    def flush(self) -> None:
        """Throw away all messages and memberships."""
        self._call("flush()", self.layer.flush)

    # Groups

    def group_add(self, group: str, channel: str) -> None:
        """Make ``channel`` a member of ``group``, or renew its membership for ``group_expiry`` seconds."""
        self._call("group_add()", self.layer.group_add, group, channel)

    def group_discard(self, group: str, channel: str) -> None:
        """End the membership of ``channel`` in ``group``; nothing happens if it is not a member."""
        self._call("group_discard()", self.layer.group_discard, group, channel)

    def group_send(self, group: str, message: Message, *, exclude: Collection[str] = ()) -> None:
        """Send ``message`` once to every member of ``group``, but for the channels in ``exclude``."""
        self._call("group_send()", partial(self.layer.group_send, group, message, exclude=exclude))

    def group_channels(self, group: str) -> set[str]:
        """Return the members of ``group`` as they are now."""
        return self._call("group_channels()", self.layer.group_channels, group)

    # The structured API

    def subscribe(
        self,
        *groups: str,
        prefix: str = "specific.",
        capacity: int | None = None,
        overflow: Overflow = "drop_new",
        on_gap: OnGap = "ignore",
    ) -> SyncInbox:
        """Return an inbox for ``with``, as ``BaseChannelLayer.subscribe`` does for ``async with``."""
        inbox = self.layer.subscribe(*groups, prefix=prefix, capacity=capacity, overflow=overflow, on_gap=on_gap)
        return SyncInbox(self._portal, self.layer, inbox)

    # What needs no waiting

    def statistics(self) -> ChannelLayerStatistics:
        """Return a snapshot of what the layer holds and has done."""

        async def statistics() -> ChannelLayerStatistics:
            return self.layer.statistics()

        return self._call("statistics()", statistics)

    @property
    def extensions(self) -> list[str]:
        """The extensions of the channel layer specification that the layer has."""
        return self.layer.extensions

    @property
    def expiry(self) -> float:
        """After how many seconds an unread message expires."""
        return self.layer.expiry

    @property
    def capacity(self) -> int:
        """How many unexpired messages a channel holds."""
        return self.layer.capacity

    @property
    def channel_capacity(self) -> list[tuple[re.Pattern[str], int]]:
        """Other capacities, compiled: the first pattern that matches wins."""
        return self.layer.channel_capacity

    def get_capacity(self, channel: str) -> int:
        """Return the capacity of ``channel``."""
        return self.layer.get_capacity(channel)

    def match_type_and_length(self, name: object) -> bool:
        """Whether ``name`` is a ``str`` shorter than ``MAX_NAME_LENGTH``."""
        return self.layer.match_type_and_length(name)

    def require_valid_channel_name(self, name: object, receive: bool = False) -> bool:  # noqa: FBT001, FBT002 - the peers' signature
        """Return ``True``, or raise ``TypeError`` naming the value and the rule."""
        return self.layer.require_valid_channel_name(name, receive)

    def require_valid_group_name(self, name: object) -> bool:
        """Return ``True``, or raise ``TypeError`` naming the value and the rule."""
        return self.layer.require_valid_group_name(name)

    def non_local_name(self, name: str) -> str:
        """Return ``name`` up to and including its ``!``, or all of it if it has none."""
        return self.layer.non_local_name(name)

    @property
    def server(self) -> tuple[str, int | None] | None:
        """Host and port of the one server that the layer uses (its unix socket and ``None``); ``None`` for none or several."""
        return self.layer.server

    def _call(self, method: str, function: Callable[..., Awaitable[T]], *args: object) -> T:
        return self._portal.call(f"SyncChannelLayer.{method}", function, *args)


class SyncInbox:
    """A channel of one's own, and the groups it belongs to, for the length of a ``with`` block.

    Made by ``SyncChannelLayer.subscribe``. Iterating over it receives for ever::

        with layer.subscribe("room") as inbox:
            for message in inbox: ...

    Leaving the block leaves the groups and frees the channel. Whoever waits in another thread then, or when the layer is closed,
    gets ``anyio.ClosedResourceError``.
    """

    def __init__(self, portal: Portal, layer: BaseChannelLayer, inbox: Inbox) -> None:
        """Called by ``subscribe()``."""
        self._portal = portal
        self._layer = layer
        self._inbox = inbox
        # Of the loop.
        self._entering: Event | None = None
        self._is_in = False

    def __repr__(self) -> str:
        """Say which channel of which layer."""
        return f"<Sync{repr(self._inbox)[1:]}"

    @property
    def channel(self) -> str:
        """The name of the channel: others may ``send`` to it, and ``exclude`` it."""
        return self._inbox.channel

    def __enter__(self) -> Self:
        """Make the channel and join the groups. If interrupted while it waits, neither is left behind."""
        try:
            self._call("subscribe()", self._enter)
        except BaseException:
            self._portal.see_to(self._leave)  # the interrupt may have come when it was in already
            raise
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Leave the groups and free the channel; in a fork of the process that entered, nothing."""
        if self._portal.is_foreign:
            return
        try:
            with suppress(ClosedResourceError):  # the layer was closed meanwhile, and has forgotten the channel
                self._portal.call("SyncChannelLayer.subscribe() at its end", self._leave, cancels=False)
        except BaseException:
            self._portal.see_to(self._leave)  # the interrupt may have come before it was told to
            raise

    async def _enter(self) -> None:
        self._entering = Event()
        try:
            await self._inbox.__aenter__()
            self._is_in = True
        finally:
            self._entering.set()

    async def _leave(self) -> None:
        if self._entering is not None:
            with CancelScope(shield=True):
                await self._entering.wait()
                if self._is_in:
                    self._is_in = False
                    await self._inbox.__aexit__(None, None, None)

    def receive(self, timeout: float | None = None) -> Message:
        """Wait for the next message and return it, as ``Inbox.receive``.

        ``timeout``: as for ``SyncChannelLayer.receive``.
        """
        channel = self.channel
        arrived = partial(self._layer._arrived, channel)  # noqa: SLF001 - as in SyncChannelLayer.receive
        answer = self._call("subscribe().receive()", _receive_within, timeout, channel, self._inbox.receive, arrived)
        return _with_variables(answer)

    def __iter__(self) -> Self:
        """Iterate over the messages as they come; never ends by itself."""
        return self

    def __next__(self) -> Message:
        """Receive the next message."""
        return self.receive()

    def join(self, group: str) -> None:
        """Become a member of ``group`` until ``leave`` or the end of the block."""
        self._call("subscribe().join()", self._inbox.join, group)

    def leave(self, group: str) -> None:
        """End the membership in ``group``; nothing happens if there is none."""
        self._call("subscribe().leave()", self._inbox.leave, group)

    def _call(self, method: str, function: Callable[..., Awaitable[T]], *args: object) -> T:
        return self._portal.call(f"SyncChannelLayer.{method}", function, *args)


async def _within(seconds: float | None, what: str, function: Callable[[], Awaitable[T]]) -> T:
    """Call ``function``, which takes nothing when it is cancelled."""
    if seconds is not None:
        require_seconds("timeout", seconds)
    with move_on_after(seconds):
        return await function()
    raise TimeoutError(f"{what} within {seconds} s")


async def _receive_within(
    seconds: float | None,
    channel: str,
    receive: Callable[[], Awaitable[Message]],
    arrived: Callable[[], Awaitable[None]],
) -> tuple[Message, list[Any]]:
    """Receive as ``_within``; return what the task was told about the message, too."""
    if _is_zero(seconds):
        return await _receive_now(channel, receive, arrived)
    message = await _within(seconds, f"no message came on channel {channel!r}", receive)
    return message, [variable.get(None) for variable in MESSAGE_VARIABLES]


async def _receive_now(
    channel: str, receive: Callable[[], Awaitable[Message]], arrived: Callable[[], Awaitable[None]]
) -> tuple[Message, list[Any]]:
    """Receive what is there. A reader waits in its turn, and is cancelled when there is nothing for it, so none is lost."""
    received: tuple[Message, list[Any]] | None = None
    trouble: Exception | None = None

    async def read(*, task_status: TaskStatus[None]) -> None:
        nonlocal received, trouble
        task_status.started()
        try:
            message = await receive()
            received = message, [variable.get(None) for variable in MESSAGE_VARIABLES]
        except Exception as error:  # noqa: BLE001 - raised below, outside the task group
            trouble = error

    async with create_task_group() as tasks:
        await tasks.start(read)
        await _let_others_run()
        if received is None and trouble is None:
            await arrived()
            await _let_others_run()
        tasks.cancel_scope.cancel()
    if trouble is not None:
        raise trouble
    if received is None:
        raise TimeoutError(f"there is no message on channel {channel!r}")
    return received


async def _let_others_run() -> None:
    """Let the reader come to where it waits, or leave: it gives way to others once before, and is rung once after."""
    for _ in range(3):
        await checkpoint()


def _is_zero(seconds: float | None) -> bool:
    return seconds == 0 and not isinstance(seconds, bool)


def _with_variables(received: tuple[Message, list[Any]]) -> Message:
    """Return the message, and let this thread know what the task was told about it."""
    message, values = received
    for variable, value in zip(MESSAGE_VARIABLES, values, strict=False):  # there may be one more by now
        variable.set(value)
    return message
