"""Layers broken on purpose, each in one clause of the contract: the kit must catch every one of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import anyio

from anyio_channels import InMemoryChannelLayer
from anyio_channels.contract.layer import Life, Message
from anyio_channels.local.directory import Channel, Group
from anyio_channels.local.waiting import Waiter


class OverAccepts(InMemoryChannelLayer):
    """Checks for room, lets others run, then sends without looking again, as a peer does."""

    async def send(self, channel: str, message: Message, *, wait: bool = False) -> None:
        before = self._here.channels.get(channel)
        await super().send(channel, message, wait=wait) if before is None else await anyio.lowlevel.checkpoint()
        if before is not None:
            full = len(before.entries) >= before.capacity
            await anyio.lowlevel.checkpoint()
            if not full:
                before._limit += 1
                before.capacity += 1
            await super().send(channel, message, wait=wait)


class DeliversTwice(InMemoryChannelLayer):
    """Every third message comes twice."""

    count = 0

    async def receive(self, channel: str) -> Message:
        message = await super().receive(channel)
        self.count += 1
        if self.count % 3 == 0:
            source = self._here.channels[channel]
            source.entries.insert(0, (self._clock() + self.expiry, self._encode(message)))
            self._mailroom.books.sent += 1
            source._books.occupied += source._weight if len(source.entries) == 1 else 0
        return message


class Reorders(InMemoryChannelLayer):
    """The newest of three messages comes first."""

    def _put(self, channel: str, data: bytes) -> None:
        super()._put(channel, data)
        entries = self._here.channels[channel].entries
        if len(entries) > 2:
            entries.insert(0, entries.pop())


class ForgetsDiscard(InMemoryChannelLayer):
    """Leaving a group does nothing."""

    async def group_discard(self, group: str, channel: str) -> None:
        self.require_valid_group_name(group)
        self.require_valid_channel_name(channel)
        await self._check_in()


class IgnoresExpiry(InMemoryChannelLayer):
    """Messages live for ever."""

    def __init__(self, expiry: float = 60, group_expiry: float = 86400, **options: Any) -> None:
        super().__init__(10.0**9, group_expiry, **options)


class IgnoresGroupExpiry(InMemoryChannelLayer):
    """Memberships live for ever."""

    def __init__(self, expiry: float = 60, group_expiry: float = 86400, **options: Any) -> None:
        super().__init__(expiry, 10.0**9, **options)


class LosesOnCancel(InMemoryChannelLayer):
    """Takes the message first and lets others run afterwards, so a cancellation loses it."""

    async def receive(self, channel: str) -> Message:
        message = await super().receive(channel)
        await anyio.lowlevel.checkpoint()
        return message


class SharesOneMessage(InMemoryChannelLayer):
    """All receivers of a broadcast get the same object."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        known: dict[bytes, Message] = {}
        decode = self._decode
        self._decode = lambda data: known.setdefault(data, decode(data))


class SharesWithSender(InMemoryChannelLayer):
    """Decodes nothing: hands on the sender's own dict."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        encode = self._encode
        kept: dict[bytes, Message] = {}

        def keep(message: Message) -> bytes:
            data = encode(message)
            kept[data] = message
            return data

        self._encode = keep
        decode = self._decode
        self._decode = lambda data: kept.get(data) or decode(data)


class NeverYields(InMemoryChannelLayer):
    """Never lets another task run unless it waits."""

    async def send(self, channel: str, message: Message, *, wait: bool = False) -> None:
        if anyio.current_effective_deadline() == float("-inf"):
            await anyio.lowlevel.checkpoint()
        if wait:
            await super().send(channel, message, wait=wait)
        else:
            self.send_nowait(channel, message)

    async def receive(self, channel: str) -> Message:
        if anyio.current_effective_deadline() == float("-inf"):
            await anyio.lowlevel.checkpoint()
        try:
            return self.receive_nowait(channel)
        except anyio.WouldBlock:
            return await super().receive(channel)


class DropsWaiters(InMemoryChannelLayer):
    """A flush throws the channels away under those who wait at them."""

    async def flush(self) -> None:
        await super().flush()
        self._here.channels = {}


class SkipsFull(InMemoryChannelLayer):
    """A full member stops the broadcast: those behind it miss it too."""

    async def group_send(self, group: str, message: Message, *, exclude: Collection[str] = ()) -> None:
        with self.stopping():
            await super().group_send(group, message, exclude=exclude)

    def group_send_nowait(self, group: str, message: Message, *, exclude: Collection[str] = ()) -> None:
        with self.stopping():
            super().group_send_nowait(group, message, exclude=exclude)

    @contextmanager
    def stopping(self) -> Iterator[None]:
        original = Group.present

        def present(self: Group, now: float, rung: list[Waiter]) -> list[Channel]:
            found = original(self, now, rung)
            full = [number for number, channel in enumerate(found) if len(channel.entries) >= channel._limit]
            return found[: full[0] + 1] if full else found

        Group.present = present  # type: ignore[method-assign]
        try:
            yield
        finally:
            Group.present = original  # type: ignore[method-assign]


class WithOtherChannels(InMemoryChannelLayer):
    """Has channels of another kind."""

    kind: type[Channel] = Channel

    def _reset(self) -> None:
        super()._reset()
        self._here.channel_class = self.kind


class _Leaves(Channel):
    __slots__ = ()

    def expire(self, now: float, rung: list[Waiter]) -> None:
        before = len(self.entries)
        super().expire(now, rung)
        if len(self.entries) < before:
            self.leave_all()

    def fall_due(self, now: float, rung: list[Waiter]) -> float | None:
        self.expire(now, rung)
        return super().fall_due(now, rung)


class LeavesOnExpiry(WithOtherChannels):
    """A slow reader is out of its groups."""

    kind = _Leaves


class _Lasts(Channel):
    __slots__ = ()

    def is_over(self, now: float) -> bool:
        return False


class NeverEnds(WithOtherChannels):
    """A channel that nobody uses any more lasts for ever."""

    kind = _Lasts


class _EndsUnderReaders(Channel):
    __slots__ = ()

    def _take_or_join(self, waiter: Waiter, *, in_front: bool) -> Any:
        before = self.ends_at
        item = super()._take_or_join(waiter, in_front=in_front)
        if item is None:
            self.ends_at = before
        return item

    def is_over(self, now: float) -> bool:
        return self.ends_at <= now


class EndsUnderReaders(WithOtherChannels):
    """A channel ends some time after it was made, though somebody waits there."""

    kind = _EndsUnderReaders


class KeepsNames(InMemoryChannelLayer):
    """The names of channels are never garbage-collected."""

    async def new_channel(self, prefix: str = "specific.") -> str:
        name = await super().new_channel(prefix)
        self.__dict__.setdefault("kept", []).append(name)
        return name


class AcceptsAnyName(InMemoryChannelLayer):
    """Checks names like the peers, with ``match`` and ``$``."""

    def require_valid_channel_name(self, name: object, receive: bool = False) -> bool:
        if isinstance(name, str) and name.endswith("\n"):
            name = name[:-1]
        return super().require_valid_channel_name(name, receive)


class WorksClosed(InMemoryChannelLayer):
    """Closing leaves those who wait waiting."""

    async def close(self) -> None:
        self._life = Life.NEW


class ClosesWithAMessage(InMemoryChannelLayer):
    """Who waits at closing receives an empty message."""

    async def receive(self, channel: str) -> Message:
        try:
            return await super().receive(channel)
        except anyio.ClosedResourceError:
            return {}


class ForgetsToWake(InMemoryChannelLayer):
    """A message does not wake who waits for it."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)

        class Deaf(type(self._mailroom)):  # type: ignore[misc]
            __slots__ = ()

            def wake(self, rung: list[Waiter]) -> None:
                pass

        self._mailroom.__class__ = Deaf


class RaisesOtherErrors(InMemoryChannelLayer):
    """Refuses bad names with an error that nobody catches."""

    def require_valid_channel_name(self, name: object, receive: bool = False) -> bool:
        try:
            return super().require_valid_channel_name(name, receive)
        except TypeError as error:
            raise LookupError(*error.args) from error


class NeverWaits(InMemoryChannelLayer):
    """A send that should wait for room drops its message instead."""

    async def send(self, channel: str, message: Message, *, wait: bool = False) -> None:
        try:
            await super().send(channel, message)
        except self.ChannelFull:
            if not wait:
                raise


class RefusesAlways(InMemoryChannelLayer):
    """Every channel is full."""

    def _put(self, channel: str, data: bytes) -> None:
        raise self.ChannelFull(channel)


class HangsInSend(InMemoryChannelLayer):
    """A send never comes back."""

    async def send(self, channel: str, message: Message, *, wait: bool = False) -> None:
        await anyio.sleep_forever()


class FailsInSend(InMemoryChannelLayer):
    """A send fails."""

    async def send(self, channel: str, message: Message, *, wait: bool = False) -> None:
        raise RuntimeError("no")


BROKEN: list[tuple[Callable[..., InMemoryChannelLayer], set[str]]] = [
    (OverAccepts, {"Capacity"}),
    (DeliversTwice, {"Delivery"}),
    (Reorders, {"Delivery"}),
    (ForgetsDiscard, {"Groups"}),
    (IgnoresExpiry, {"Expiry"}),
    (IgnoresGroupExpiry, {"Groups"}),
    (LosesOnCancel, {"Cancellation"}),
    (SharesOneMessage, {"Isolation"}),
    (SharesWithSender, {"Isolation"}),
    (NeverYields, {"Yielding"}),
    (DropsWaiters, {"Flush"}),
    (SkipsFull, {"Groups"}),
    (LeavesOnExpiry, {"Expiry"}),
    (NeverEnds, {"Ownership"}),
    (EndsUnderReaders, {"Ownership"}),
    (KeepsNames, {"Ownership"}),
    (AcceptsAnyName, {"Names"}),
    (WorksClosed, {"Opening and closing"}),
    (ClosesWithAMessage, {"Opening and closing"}),
    (ForgetsToWake, {"Delivery"}),
    (RaisesOtherErrors, {"Names"}),
    (NeverWaits, {"Capacity"}),
    (RefusesAlways, {"Capacity", "Delivery"}),
    (HangsInSend, {"Delivery"}),
    (FailsInSend, {"Delivery"}),
]
"""Each with a clause that the checks must name."""

NOT_FOR_THE_MACHINE = {SharesOneMessage, SharesWithSender, AcceptsAnyName, RaisesOtherErrors, NeverWaits}
"""The machine's messages are one number each, and its names are good: these are the checks' to find."""
