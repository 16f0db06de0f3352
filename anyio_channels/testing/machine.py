"""A state machine: random steps on a layer, each compared with a model made of plain dicts and lists.

Rules:
- the model is the oracle: it holds, for each channel, the messages that must come next and when they expire, and for each
  group when each membership ends. It shares no code with any layer.
- the layer runs in an event loop of its own, in another thread; each step is one call into it, and when it returns all
  readers that can run have run. So every step has one right outcome.
- each message is a number that is sent once: a duplicate, a loss and a wrong order show as a wrong number.
- what is drawn never depends on chance outside Hypothesis (random names, the order in which trio runs tasks).
- after every step ``statistics()`` and the members of every group must be what the model says.
- where the contract leaves a layer a choice (``Features``), the model chooses alike.
"""

from __future__ import annotations

import gc
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from math import inf
from typing import Any, ClassVar, Final, Literal, TypeAlias
from weakref import ref

from anyio import CancelScope, ClosedResourceError, create_task_group
from anyio.from_thread import BlockingPortal, start_blocking_portal
from anyio.lowlevel import checkpoint
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from anyio_channels.contract.layer import BaseChannelLayer, Inbox, Message
from anyio_channels.exceptions import ChannelFull

from .checks import Clock, ContractViolation, Features, LayerFactory, Subject, listen, require, settle, until

__all__ = ["contract_machine"]

EXPIRY: Final = 10.0
GROUP_EXPIRY: Final = 25.0
CAPACITIES: Final = {"normal": 3, "big.one": 5}
"""The normal channels of the machine, with the capacity that each must have."""
PROCESS_SPECIFIC: Final = 2
"""How many process-specific channels it has besides, at first, of the layer's capacity."""
MOST_PROCESS_SPECIFIC: Final = 4
GROUPS: Final = ("red", "blue")
INBOXES: Final = ("first", "second")
_WAIT: Final = 30.0
"""Seconds after which a call into the event loop is taken to hang."""

_Overflow: TypeAlias = Literal["drop_new", "drop_old"]
_OnGap: TypeAlias = Literal["ignore", "event"]


@dataclass
class _Entry:
    """A message, or a gap (``number`` is ``None``) of ``missed`` messages."""

    number: int | None
    expires_at: float = inf
    missed: int = 0


@dataclass
class _Channel:
    """What the model knows of a channel; ``owned`` by an inbox or not."""

    capacity: int
    owned: bool = False
    overflow: _Overflow = "drop_new"
    on_gap: _OnGap = "ignore"
    normal: bool = False
    kept: bool = True
    """Whether a message to it is kept, and not lost because nobody listens."""
    timed: bool = False
    """Whether it ends some time after its last use."""
    used: float = 0.0
    deserted: bool = False
    """Whether its last reader was cancelled."""
    collected: bool = False
    """Whether the name that ``new_channel()`` returned was garbage-collected."""
    entries: list[_Entry] = field(default_factory=list)
    readers: list[Future[Message]] = field(default_factory=list)

    def use(self, now: float, *, cancelled: bool = False) -> None:
        """A reader has come or gone."""
        self.used, self.deserted = now, cancelled

    def is_over(self, now: float) -> bool:
        lasts = EXPIRY if self.deserted or self.collected else GROUP_EXPIRY
        return self.timed and not self.readers and self.used + lasts <= now

    def messages(self) -> int:
        return sum(entry.number is not None for entry in self.entries)

    def gap(self, position: int) -> None:
        """One more message is missed at ``position``, in front of the entry there."""
        if self.on_gap == "ignore":
            return
        for at in (position - 1, position):
            if 0 <= at < len(self.entries) and self.entries[at].number is None:
                self.entries[at].missed += 1
                return
        self.entries.insert(position, _Entry(None, missed=1))


@dataclass
class _Counts:
    sent: int = 0
    received: int = 0
    expired: int = 0
    dropped_full: int = 0
    discarded: int = 0


class ContractMachine(RuleBasedStateMachine):
    """The rules; ``contract_machine`` fills in what is to be checked."""

    factory: ClassVar[LayerFactory]
    backend: ClassVar[str]
    backend_options: ClassVar[dict[str, Any]]
    features: ClassVar[Features]

    def __init__(self) -> None:
        """Start an event loop and open a layer in it."""
        super().__init__()
        self.clock: Clock = Clock()
        self.layer: BaseChannelLayer = type(self).factory(
            self.clock,
            expiry=EXPIRY,
            group_expiry=GROUP_EXPIRY,
            capacity=3,
            channel_capacity={"big.*": 5},
        )
        self.portal_context: AbstractContextManager[BlockingPortal] = start_blocking_portal(
            type(self).backend, type(self).backend_options
        )
        self.portal: BlockingPortal = self.portal_context.__enter__()
        self.layer_context: AbstractContextManager[BaseChannelLayer] = self.portal.wrap_async_context_manager(
            self.layer
        )
        self.layer_context.__enter__()
        # What a layer that keeps nothing unread subscribes to ends as well.
        timed = self.features.ends_channels and not self.features.keeps_unread
        self.channels: dict[str, _Channel] = {
            name: _Channel(capacity, normal=True, timed=timed, used=self.now) for name, capacity in CAPACITIES.items()
        }
        self.call(listen, Subject(type(self).factory, self.features), self.layer, *self.channels)
        for channel in self.channels.values():
            channel.deserted = timed
        self.fixed: list[str] = list(self.channels)
        self.names: dict[str, str] = {}
        self.ended: list[str] = []
        for _ in range(PROCESS_SPECIFIC):
            self._new_channel()
        self.groups: dict[str, dict[str, float]] = {group: {} for group in GROUPS}
        self.inboxes: dict[str, tuple[AbstractContextManager[Inbox], Inbox]] = {}
        self.counts: _Counts = _Counts()
        self.next_number: int = 0

    # The model

    @property
    def now(self) -> float:
        """The time."""
        return self.clock.now

    def new_message(self) -> tuple[int, Message]:
        """A message that was never sent before."""
        self.next_number += 1
        return self.next_number, {"number": self.next_number}

    def raises_full(self, channel: _Channel) -> bool:
        """Whether ``send`` to a full ``channel`` raises, and does not lose the message on arrival."""
        return self.features.channel_full == "all" or (self.features.channel_full == "normal" and channel.normal)

    def held_here(self, channel: _Channel) -> bool:
        """Whether ``statistics()`` knows what is in ``channel``."""
        return self.features.knows_all or not self.features.keeps_unread or not channel.normal

    def idle(self) -> list[str]:
        """Which of the fixed channels nobody reads, and which hold nothing."""
        return [
            name
            for name in self.fixed
            if not self.channels[name].readers and not self.channels[name].entries and self.channels[name].kept
        ]

    def model_put(self, channel: _Channel, number: int) -> bool:
        """The model of a send; ``False``: the channel is full."""
        if not channel.kept:
            return True
        if channel.messages() >= channel.capacity:
            if channel.overflow == "drop_new":
                return False
            oldest = next(at for at, entry in enumerate(channel.entries) if entry.number is not None)
            del channel.entries[oldest]
            self.counts.dropped_full += 1
            channel.gap(oldest)
        self.counts.sent += 1
        channel.entries.append(_Entry(number, self.now + EXPIRY))
        return True

    def model_take(self, channel: _Channel) -> Message:
        """The model of a receive; there must be something."""
        channel.use(self.now)
        entry = channel.entries.pop(0)
        if entry.number is None:
            return {"type": "channel_layer.gap", "missed": entry.missed}
        self.counts.received += 1
        return {"number": entry.number}

    def model_time(self) -> None:
        """Drop what has expired."""
        for channel in self.channels.values():
            expired = 0
            at = 0
            while at < len(channel.entries):
                if channel.entries[at].number is not None and channel.entries[at].expires_at <= self.now:
                    del channel.entries[at]
                    expired += 1
                    before = len(channel.entries)
                    channel.gap(at)
                    at += len(channel.entries) - before
                    self._join_gaps(channel)
                else:
                    at += 1
            self.counts.expired += expired
        for members in self.groups.values():
            for name in [name for name, ends in members.items() if ends <= self.now]:
                del members[name]
        self.model_ends()

    def model_ends(self) -> None:
        """Channels whose time is over end: process-specific ones for good, others until they are read again."""
        for name, channel in tuple(self.channels.items()):
            if not channel.is_over(self.now):
                continue
            if channel.normal:
                in_use = channel.entries or any(name in members for members in self.groups.values())
                channel.kept = channel.kept and bool(in_use)
                continue
            self.counts.discarded += channel.messages()
            for members in self.groups.values():
                members.pop(name, None)
            del self.channels[name]
            self.fixed.remove(name)
            self.names.pop(name, None)
            self.ended.append(name)

    @staticmethod
    def _join_gaps(channel: _Channel) -> None:
        for at in range(len(channel.entries) - 1, 0, -1):
            if channel.entries[at].number is None and channel.entries[at - 1].number is None:
                channel.entries[at - 1].missed += channel.entries[at].missed
                del channel.entries[at]

    # Calls into the event loop

    def call(self, function: Callable[..., Awaitable[Any]], *args: Any) -> Any:
        """Run ``function`` in the event loop; but for ``ChannelFull``, an error or a call that hangs is a violation."""
        what = getattr(function, "__name__", repr(function))
        future = self.portal.start_task_soon(function, *args)
        try:
            return future.result(_WAIT)
        except (ChannelFull, ContractViolation):
            raise
        except TimeoutError as error:
            raise ContractViolation(f"{what} did not come back") from error
        except Exception as error:
            raise ContractViolation(f"{what} raised {error!r}") from error

    def waiting(self) -> int:
        """How many readers wait, by the model."""
        return sum(len(channel.readers) for channel in self.channels.values())

    def deliver(self) -> None:
        """Messages in the model go to the readers in the model, and each real reader must have the same."""
        served: list[tuple[str, list[Future[Message]], list[Message]]] = []
        for name, channel in self.channels.items():
            count = min(len(channel.readers), len(channel.entries))
            expected = [self.model_take(channel) for _ in range(count)]
            served.append((name, channel.readers[:count], expected))
            del channel.readers[:count]
        self.quiet()
        for name, futures, expected in served:
            try:
                got = [future.result(_WAIT) for future in futures]
            except TimeoutError as error:
                raise ContractViolation(
                    f"Delivery: a reader of {name!r} still waits beside one of {expected}"
                ) from error
            # Several who are called at once run in any order; who came later is not called before.
            require(
                sorted(got, key=repr) == sorted(expected, key=repr),
                f"Delivery: the readers of {name!r} should have received {expected}, got {got}",
            )

    def quiet(self) -> None:
        """Wait until as many readers wait as the model says, and nothing is on its way."""
        self.call(settle, self.layer, self.waiting(), self.features)
        if self.clock.settle is not None:
            self.call(self.clock.settle, self.layer)
        self.call(until, lambda: self.seen() == self.modelled(), self.features)

    def seen(self) -> dict[str, int]:
        """What ``statistics()`` says, of what the layer has to know."""
        statistics = self.layer.statistics()
        return {name: getattr(statistics, name) for name in self.modelled()}

    def modelled(self) -> dict[str, int]:
        """What ``statistics()`` should say."""
        members = [
            [name for name in members if self.held_here(self.channels[name])] for members in self.groups.values()
        ]
        here = [channel for channel in self.channels.values() if self.held_here(channel)]
        should = {
            "buffered_messages": sum(channel.messages() for channel in here),
            "channels": sum(channel.owned or channel.messages() > 0 for channel in here),
            "groups": sum(bool(names) for names in members),
            "members": sum(map(len, members)),
            "waiting_receivers": self.waiting(),
            "received": self.counts.received,
            "dropped_full": self.counts.dropped_full,
        }
        if self.features.knows_all:
            should |= vars(self.counts)
        return should

    def expect(self, what: str, got: object, expected: object) -> None:
        """Compare."""
        require(got == expected, f"{what}: should be {expected}, is {got}")

    # The rules

    @rule(data=st.data())
    def send(self, data: st.DataObject) -> None:
        """Send one message: ``ChannelFull`` exactly when full."""
        name = data.draw(st.sampled_from(list(self.channels)))
        self._send(name)

    def _send(self, name: str) -> None:
        number, message = self.new_message()
        channel = self.channels[name]
        accepted = self.model_put(channel, number)
        if not accepted and not self.raises_full(channel):
            self.model_miss(channel)
            accepted = True
        try:
            self.call(self.layer.send, name, message)
        except ChannelFull:
            self.expect(f"Capacity: {name!r} refused a message, accepting it", False, accepted)  # noqa: FBT003
        else:
            self.expect(f"Capacity: {name!r} took a message, accepting it", True, accepted)  # noqa: FBT003
        self.deliver()

    @rule(data=st.data(), count=st.integers(2, 7))
    def send_concurrently(self, data: st.DataObject, count: int) -> None:
        """Several tasks send at once to a channel that nobody reads: as many succeed as there is room for."""
        names = [
            name for name in self.fixed if not self.channels[name].readers and self.raises_full(self.channels[name])
        ]
        if not names:
            return
        name = data.draw(st.sampled_from(names))
        channel = self.channels[name]
        accepted: list[int] = self.call(self._send_all, name, [self.new_message() for _ in range(count)])
        room = channel.capacity - channel.messages()
        self.expect(f"Capacity: concurrent sends accepted by {name!r}", len(accepted), min(count, room))
        before = len(channel.entries)
        for number in accepted:
            self.model_put(channel, number)
        if self.features.settles_within:
            # Who was served first need not have gone on first.
            for _ in range(before):
                self._receive(name)
            got = sorted(self.call(self.layer.receive, name)["number"] for _ in accepted)
            for _ in accepted:
                self.model_take(channel)
            self.expect(f"Delivery on {name!r}", got, sorted(accepted))

    async def _send_all(self, name: str, messages: list[tuple[int, Message]]) -> list[int]:
        accepted: list[int] = []

        async def send(number: int, message: Message) -> None:
            try:
                await self.layer.send(name, message)
            except ChannelFull:
                return
            accepted.append(number)

        async with create_task_group() as tg:
            for number, message in messages:
                tg.start_soon(send, number, message)
        return accepted

    @precondition(lambda self: any(channel.entries for channel in self.channels.values()))
    @rule(data=st.data())
    def receive(self, data: st.DataObject) -> None:
        """Receive a message that is there."""
        name = data.draw(st.sampled_from([name for name, channel in self.channels.items() if channel.entries]))
        self._receive(name)

    def _receive(self, name: str) -> None:
        self.expect(f"Delivery on {name!r}", self.call(self.layer.receive, name), self.model_take(self.channels[name]))

    @rule(data=st.data())
    def start_reader(self, data: st.DataObject) -> None:
        """Start one more reader, which waits if there is nothing for it."""
        self._start_reader(data.draw(st.sampled_from(list(self.channels))))

    def _start_reader(self, name: str) -> None:
        self.channels[name].kept = True
        self.channels[name].use(self.now)
        self.channels[name].readers.append(self.portal.start_task_soon(self.layer.receive, name))
        self.deliver()

    @precondition(lambda self: self.waiting())
    @rule(data=st.data())
    def cancel_reader(self, data: st.DataObject) -> None:
        """Cancel a reader that waits: it has taken nothing, and the others keep their turn."""
        names = [name for name, channel in self.channels.items() if channel.readers]
        channel = self.channels[data.draw(st.sampled_from(names))]
        future = channel.readers.pop(data.draw(st.integers(0, len(channel.readers) - 1)))
        future.cancel()
        channel.use(self.now, cancelled=True)  # if others wait, what they do counts
        self.quiet()

    @rule(data=st.data(), late=st.booleans())
    def cancel_reader_as_message_comes(self, data: st.DataObject, late: bool) -> None:  # noqa: FBT001
        """Cancel a reader just before or after its message was sent: it has the message, or the channel still does."""
        idle = self.idle()
        if not idle:
            return
        name = data.draw(st.sampled_from(idle))
        number, message = self.new_message()
        got: Message | None = self.call(self._race, name, message, late)
        self.model_put(self.channels[name], number)
        if got is not None:
            self.expect(f"Cancellation: a reader of {name!r} received", got, self.model_take(self.channels[name]))
        else:
            self.channels[name].use(self.now, cancelled=True)
        self.quiet()
        if got is None and self.features.settles_within:
            self._receive(name)  # which of the two it was is chance, and what is drawn next must not depend on it

    async def _race(self, name: str, message: Message, late: bool) -> Message | None:  # noqa: FBT001
        got: list[Message] = []
        reader = CancelScope()

        async def read() -> None:
            with reader:
                got.append(await self.layer.receive(name))

        async with create_task_group() as tg:
            tg.start_soon(read)
            await settle(self.layer, self.waiting() + 1, self.features)
            if late:
                await self.layer.send(name, message)
                reader.cancel()
            else:
                reader.cancel()
                await self.layer.send(name, message)
        return got[0] if got else None

    @rule(data=st.data(), group=st.sampled_from(GROUPS))
    def group_add(self, data: st.DataObject, group: str) -> None:
        """Join, or renew."""
        name = data.draw(st.sampled_from(list(self.channels)))
        channel = self.channels[name]
        if not channel.kept:
            self.call(listen, Subject(type(self).factory, self.features), self.layer, name)
            channel.kept = True
            channel.use(self.now, cancelled=True)
        self.call(self.layer.group_add, group, name)
        members = self.groups[group]
        lasts = self.features.ends_channels and not channel.normal
        members[name] = inf if lasts else max(members.get(name, 0.0), self.now + GROUP_EXPIRY)
        if lasts:
            channel.use(self.now, cancelled=channel.deserted)

    @rule(data=st.data(), group=st.sampled_from(GROUPS))
    def group_discard(self, data: st.DataObject, group: str) -> None:
        """Leave, or do nothing."""
        name = data.draw(st.sampled_from(list(self.channels)))
        self.call(self.layer.group_discard, group, name)
        self.groups[group].pop(name, None)
        self.model_ends()

    @rule(data=st.data(), group=st.sampled_from(GROUPS))
    def group_send(self, data: st.DataObject, group: str) -> None:
        """Broadcast, perhaps without some: every other member once, but for those that are full."""
        self._group_send(group, data.draw(st.lists(st.sampled_from(list(self.channels)), max_size=2)))

    @rule(group=st.sampled_from(GROUPS), count=st.integers(2, 6))
    def broadcast_many(self, group: str, count: int) -> None:
        """Broadcast until members are full."""
        for _ in range(count):
            self._group_send(group, [])

    def _group_send(self, group: str, exclude: list[str]) -> None:
        number, message = self.new_message()
        self.call(lambda: self.layer.group_send(group, message, exclude=exclude))
        for name in self.groups[group]:
            channel = self.channels[name]
            if name not in exclude and not self.model_put(channel, number):
                self.model_miss(channel)
        self.deliver()

    def model_miss(self, channel: _Channel) -> None:
        """The model of a message that finds ``channel`` full and is lost."""
        self.counts.sent += 1
        self.counts.dropped_full += 1
        channel.gap(len(channel.entries))

    @rule(
        inbox=st.sampled_from(INBOXES),
        groups=st.lists(st.sampled_from(GROUPS), unique=True),
        capacity=st.integers(1, 3),
        overflow=st.sampled_from(("drop_new", "drop_old")),
        on_gap=st.sampled_from(("ignore", "event")),
    )
    def open_or_close_inbox(
        self, inbox: str, groups: list[str], capacity: int, overflow: _Overflow, on_gap: _OnGap
    ) -> None:
        """Enter or leave the block of an inbox; it is left with readers waiting, with messages unread, or without."""
        if inbox in self.inboxes:
            context, opened = self.inboxes.pop(inbox)
            channel = self.channels.pop(opened.channel)
            for members in self.groups.values():
                members.pop(opened.channel, None)
            self.counts.discarded += channel.messages()
            context.__exit__(None, None, None)
            self._require_closed(channel.readers)
        else:
            subscription = self.layer.subscribe(*groups, capacity=capacity, overflow=overflow, on_gap=on_gap)
            context = self.portal.wrap_async_context_manager(subscription)
            opened = context.__enter__()
            self.inboxes[inbox] = (context, opened)
            self.channels[opened.channel] = _Channel(capacity, owned=True, overflow=overflow, on_gap=on_gap)
            for group in groups:
                self.groups[group][opened.channel] = inf

    @precondition(lambda self: self.inboxes)
    @rule(data=st.data(), group=st.sampled_from(GROUPS), leave=st.booleans())
    def join_or_leave(self, data: st.DataObject, group: str, leave: bool) -> None:  # noqa: FBT001
        """An inbox joins or leaves a group."""
        _, inbox = self.inboxes[data.draw(st.sampled_from(list(self.inboxes)))]
        if leave:
            self.call(inbox.leave, group)
            self.groups[group].pop(inbox.channel, None)
        else:
            self.call(inbox.join, group)
            self.groups[group][inbox.channel] = inf

    @rule(seconds=st.sampled_from((1.0, EXPIRY / 2, EXPIRY, GROUP_EXPIRY / 2, GROUP_EXPIRY)))
    def let_time_pass(self, seconds: float) -> None:
        """Let messages and memberships expire."""
        self.call(self.clock.advance, self.layer, seconds)
        self.model_time()

    @rule(often=st.integers(0, 9))
    def flush(self, often: int) -> None:
        """Blank the layer; not at every opportunity, or there would be little to see."""
        if often:
            return
        self.call(self.layer.flush)
        for channel in self.channels.values():
            self.counts.discarded += channel.messages()
            channel.entries.clear()
        for members in self.groups.values():
            members.clear()
        self.model_ends()

    # The channels of new_channel()

    def _new_channel(self) -> None:
        name = self.call(self.layer.new_channel, "proc.")
        plain = str(name)
        self.names[plain] = name
        self.channels[plain] = _Channel(3, timed=self.features.ends_channels, used=self.now)
        self.fixed.append(plain)

    @precondition(lambda self: len(self.fixed) < len(CAPACITIES) + MOST_PROCESS_SPECIFIC)
    @rule()
    def new_channel(self) -> None:
        """Make one more."""
        self._new_channel()

    @precondition(lambda self: self.names and self.features.ends_channels)
    @rule(data=st.data())
    def forget_name(self, data: st.DataObject) -> None:
        """Nobody has what ``new_channel()`` returned any more, but for a copy."""
        name = data.draw(st.sampled_from(list(self.names)))
        watch = ref(self.names.pop(name))
        self.call(checkpoint)
        gc.collect()
        require(watch() is None, "Ownership: the layer keeps the name that new_channel() returned")
        self.channels[name].collected = True
        self.model_ends()

    @precondition(lambda self: self.ended)
    @rule(data=st.data())
    def receive_on_an_ended_one(self, data: st.DataObject) -> None:
        """A channel that has ended is not there to be received from, and nobody waits there in vain."""
        name = data.draw(st.sampled_from(self.ended))
        self._require_closed([self.portal.start_task_soon(self.layer.receive, name)])

    @rule(data=st.data())
    def hog(self, data: st.DataObject) -> None:
        """A task that only sends and receives lets another run in time."""
        idle = self.idle()
        if idle:
            name = data.draw(st.sampled_from(idle))
            calls, turns = self.call(self._hog, name)
            self.channels[name].use(self.now)
            self.counts.sent += calls // 2
            self.counts.received += calls // 2
            least = calls // self.layer.YIELD_EVERY - 1  # the last time both may run, the other comes second
            require(turns >= least, f"Yielding: in {calls} calls another task ran {turns} times; at least {least}")

    async def _hog(self, name: str) -> tuple[int, int]:
        turns = 0
        calls = 0

        async def other() -> None:
            nonlocal turns
            while True:
                turns += 1
                await checkpoint()

        async with create_task_group() as tg:
            tg.start_soon(other)
            while calls < 4 * self.layer.YIELD_EVERY:
                await self.layer.send(name, {})
                await self.layer.receive(name)
                calls += 2
            tg.cancel_scope.cancel()
        return calls, turns

    # What must be true after every step

    @invariant()
    def statistics_add_up(self) -> None:
        """``statistics()`` says what the model says."""
        self.call(until, lambda: self.seen() == self.modelled(), self.features)
        seen = self.seen()
        for name, expected in self.modelled().items():
            self.expect(f"Statistics: {name}", seen[name], expected)

    @invariant()
    def members_are_known(self) -> None:
        """``group_channels()`` says what the model says."""
        for group, members in self.groups.items():
            self.expect(f"Groups: {group!r}", self.call(self.layer.group_channels, group), set(members))

    def _require_closed(self, readers: list[Future[Message]]) -> None:
        for future in readers:
            try:
                got = future.result(_WAIT)
            except ClosedResourceError:
                continue
            except TimeoutError as error:
                raise ContractViolation("Closing: a reader still waits") from error
            raise ContractViolation(f"Closing: a reader should have got ClosedResourceError, received {got}")

    def teardown(self) -> None:
        """Receive all that should be there, close, and see that nobody is left waiting."""
        try:
            for name, channel in self.channels.items():
                while channel.entries:
                    self._receive(name)
            self.call(self.layer.close)
            for channel in self.channels.values():
                self._require_closed(channel.readers)
        finally:
            for context, _ in self.inboxes.values():
                context.__exit__(None, None, None)
            self.layer_context.__exit__(None, None, None)
            self.portal.call(self.portal.stop, True)  # noqa: FBT003 - also cancels what a broken layer left waiting
            self.portal_context.__exit__(None, None, None)


def contract_machine(
    factory: LayerFactory,
    backend: str = "asyncio",
    backend_options: dict[str, Any] | None = None,
    features: Features | None = None,
) -> type[RuleBasedStateMachine]:
    """Return a state machine for layers that ``factory`` makes, on ``backend`` with ``backend_options`` as anyio takes them.

    Run it with ``hypothesis.stateful.run_state_machine_as_test``, or hand its ``TestCase`` to a test runner::

        TestMyLayer = contract_machine(make_layer, "trio").TestCase
    """

    class Machine(ContractMachine):
        pass

    Machine.factory = staticmethod(factory)
    Machine.backend = backend
    Machine.backend_options = backend_options or {}
    Machine.features = features or Features()
    Machine.__name__ = Machine.__qualname__ = f"ContractMachine[{getattr(factory, '__name__', factory)}, {backend}]"
    return Machine
