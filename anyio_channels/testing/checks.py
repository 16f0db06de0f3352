"""Example checks: one clause of the contract each.

Rules:
- a check makes its own layers with the factory, opens and closes them, and needs nothing else.
- it fails with ``ContractViolation`` whose first word is the clause; it is not to hang on a broken layer, so all of
  them run under a time limit.
- what must not happen is shown by what happens next in a known order, never by waiting a while. What must happen is waited
  for, where a layer says that things take their time (``Features.settles_within``).
- where the contract leaves a layer a choice, ``Features`` says what it chose, and a check asks for nothing else.
"""

from __future__ import annotations

import datetime
import gc
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, fields
from typing import Any, Final, Literal, Protocol, TypeAlias, cast
from weakref import ref

import anyio
from anyio import CancelScope, ClosedResourceError, create_task_group, fail_after, move_on_after
from anyio.lowlevel import checkpoint, current_token

from anyio_channels.contract.layer import BaseChannelLayer, ChannelLayerStatistics, Message
from anyio_channels.exceptions import ChannelFull, MessagesLost, MessageTooLarge

__all__ = [
    "CHECKS",
    "Check",
    "Clock",
    "ContractViolation",
    "Features",
    "LayerFactory",
    "Subject",
    "listen",
    "run_checks",
    "settle",
    "until",
]

_TIME_LIMIT: Final = 20.0
"""Seconds after which a check is taken to hang."""


class Clock:
    """The time that the kit gives to a layer; it moves when the kit says so.

    A layer whose time is not a function of its own (that of a database, say) has a factory that sets ``move``.
    """

    def __init__(self) -> None:
        """Start at some time."""
        self.now: float = 1_000_000.0
        self.move: Callable[[BaseChannelLayer, float], Awaitable[None]] | None = None
        """Called with the layer and the seconds that passed, to make the layer's store that much older."""
        self.settle: Callable[[BaseChannelLayer], Awaitable[None]] | None = None
        """Called with the layer to wait until nothing is on its way any more; for a layer with ``Features.settles_within``."""

    def __call__(self) -> float:
        """Return the time in seconds."""
        return self.now

    async def advance(self, layer: BaseChannelLayer, seconds: float) -> None:
        """Let ``seconds`` pass for ``layer``."""
        self.now += seconds
        if self.move is not None:
            await self.move(layer, seconds)


class LayerFactory(Protocol):
    """Makes the layer to be checked, not yet opened: blank, whatever was made before."""

    def __call__(self, clock: Clock, **options: Any) -> BaseChannelLayer:
        """``options``: ``expiry``, ``group_expiry``, ``capacity``, ``channel_capacity``, ``max_message_size``, ``default``."""
        ...


@dataclass(frozen=True, kw_only=True)
class Features:
    """What a layer does where the contract leaves it a choice. As made, it does everything, at once, and alone."""

    keeps_unread: bool = True
    """A message to a channel that nobody reads yet is kept until it expires; if not, it is lost."""
    channel_full: Literal["all", "normal", "none"] = "all"
    """On which channels ``send`` raises ``ChannelFull``; on the others, what does not fit is dropped on arrival."""
    any_member: bool = True
    """Every channel can join a group; if not, only one that this process made or receives from."""
    any_reader: bool = True
    """Every process-specific channel can be received from; if not, one of another process is a ``RuntimeError``."""
    ends_channels: bool = True
    """The channels of ``new_channel()`` end some time after their last use; if not, a membership of theirs expires."""
    knows_all: bool = True
    """``statistics()`` says what there is; if not, only what this process does and holds."""
    settles_within: float = 0.0
    """Seconds that it may take until what was sent has arrived."""


@dataclass(frozen=True)
class Subject:
    """What is checked."""

    make: LayerFactory
    features: Features = Features()

    def __call__(self, clock: Clock, **options: Any) -> BaseChannelLayer:
        """Make a layer."""
        return self.make(clock, **options)


class ContractViolation(AssertionError):  # noqa: N818 - what it is, in the words of the contract
    """The layer does not keep a clause of the contract."""


_Run: TypeAlias = Callable[[Subject], Awaitable[None]]
_Applies: TypeAlias = Callable[[Features], bool]


@dataclass(frozen=True)
class Check:
    """One named check."""

    clause: str
    """The clause of the contract that it is about, as ``BaseChannelLayer`` calls it."""
    run: _Run
    applies: _Applies
    """Whether a layer with these features is held to it."""

    @property
    def name(self) -> str:
        """The name of its function, without ``check_``."""
        return cast("str", getattr(self.run, "__name__", "")).removeprefix("check_")

    async def __call__(self, factory: LayerFactory, features: Features | None = None) -> None:
        """Run it: return, or raise ``ContractViolation``."""
        try:
            with fail_after(_TIME_LIMIT):
                await self.run(Subject(factory, features or Features()))
        except ContractViolation as violation:
            raise ContractViolation(f"{self.clause}: {violation}") from violation.__cause__
        except Exception as error:
            raise ContractViolation(f"{self.clause}: {self.name} ended with {error!r}") from error


_checks: list[Check] = []


def _clause(clause: str, applies: _Applies = lambda _: True) -> Callable[[_Run], _Run]:
    def register(run: _Run) -> _Run:
        _checks.append(Check(clause, run, applies))
        return run

    return register


async def run_checks(factory: LayerFactory, features: Features | None = None) -> None:
    """Run every check that applies on layers made by ``factory``; raise an ``ExceptionGroup`` of all violations, if any."""
    violations: list[ContractViolation] = []
    for check in CHECKS:
        if not check.applies(features or Features()):
            continue
        try:
            await check(factory, features)
        except ContractViolation as violation:
            violations.append(violation)
    if violations:
        raise ExceptionGroup("the layer does not keep the contract", violations)


def _common(statistics: ChannelLayerStatistics) -> dict[str, int]:
    """What every layer counts."""
    return {one.name: getattr(statistics, one.name) for one in fields(ChannelLayerStatistics)}


def require(condition: object, seen: str) -> None:
    """Raise ``ContractViolation`` saying what was seen, unless ``condition``."""
    if not condition:
        raise ContractViolation(seen)


async def settle(layer: BaseChannelLayer, waiting_receivers: int, features: Features | None = None) -> None:
    """Let all tasks run until so many receivers wait; give up when all tasks are blocked, or after ``settles_within``."""
    await until(lambda: layer.statistics().waiting_receivers == waiting_receivers, features or Features())


async def until(condition: Callable[[], bool], features: Features) -> bool:
    """Let all tasks run until ``condition`` holds, and return whether it does at the end."""
    for _ in range(20):
        if condition():
            return True
        await checkpoint()
    await anyio.wait_all_tasks_blocked()
    with move_on_after(features.settles_within):
        while not condition():  # noqa: ASYNC110 - what it waits for is far away, and rings no bell here
            await anyio.sleep(0.0005)
    return condition()


async def listen(subject: Subject, layer: BaseChannelLayer, *channels: str) -> None:
    """See that messages to ``channels`` are kept from now on: a layer that keeps none otherwise is received from once."""
    if subject.features.keeps_unread and subject.features.any_member:
        return
    for channel in channels:
        waiting = layer.statistics().waiting_receivers
        async with create_task_group() as tg:
            tg.start_soon(layer.receive, channel)
            await settle(layer, waiting + 1, subject.features)
            tg.cancel_scope.cancel()


async def left_on(layer: BaseChannelLayer, channel: str) -> list[Message]:
    """Receive all that is on ``channel`` and return it in order; needs room for one more message there.

    A marker is sent behind the messages, so that the end is seen and nobody waits for a message that does not come.
    """
    await layer.send(channel, {"marker": True}, wait="!" not in channel)
    found: list[Message] = []
    while "marker" not in (message := await layer.receive(channel)):
        found.append(message)
    return found


@asynccontextmanager
async def opened(factory: Subject, **options: Any) -> AsyncGenerator[tuple[BaseChannelLayer, Clock]]:
    """Make and open a layer; a bound small enough to be reached is set for what is not given."""
    clock = Clock()
    layer = factory(clock, **{"expiry": 10.0, "group_expiry": 100.0, "capacity": 5, **options})
    async with layer:
        yield layer, clock


async def _refused(
    kind: type[Exception] | tuple[type[Exception], ...], call: Callable[[], Awaitable[object]], what: str
) -> Exception:
    try:
        await call()
    except kind as error:
        return error
    except Exception as error:
        raise ContractViolation(f"{what} raised {error!r}") from error
    raise ContractViolation(f"{what} was accepted")


BAD_NAMES: Final[tuple[Any, ...]] = (
    "", "!", "!a", "a!b!c", "a b", "a\n", "é", "a!\u0661", "\u0661", "a/b", "a:b", "x" * 100, None, 5, b"a", ["a"],
)  # fmt: skip
"""No channel may be called like these."""
GOOD_NAMES: Final = ("a", "A-Z_0.9", "x" * 99, "specific.a!b", "a!", "a!B-_.9", ".", "-")
"""Channels may be called like these."""
BAD_VALUES: Final[tuple[tuple[Any, str], ...]] = (
    ({1, 2}, "message['v']"),
    (1j, "message['v']"),
    (object(), "message['v']"),
    (2**64, "message['v']"),
    (-(2**63) - 1, "message['v']"),
    ("\ud800", "message['v']"),
    (uuid.UUID(int=1), "message['v']"),
    (datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC), "message['v']"),
    ([1, {"w": {1}}], "message['v'][1]['w']"),
    ({1: 2}, "message['v']"),
    ({"w": {None: 2}}, "message['v']['w']"),
)
"""No message may hold these, and the error says where they are."""
GOOD_MESSAGE: Final[Message] = {
    "str": "\0 \U0001f600 é", "bytes": b"\0\xff", "int": 2**63 - 1, "negative": -(2**63), "float": 1.5, "true": True,
    "none": None, "list": [1, [2, {"deep": []}]], "dict": {"": {}, "a b": [None]}, "": "empty key",
}  # fmt: skip
"""Every type that a message may hold."""


@_clause("Names")
async def check_names(factory: Subject) -> None:
    """Good names are accepted; bad ones are a ``TypeError`` that names the value, and leave nothing behind."""
    async with opened(factory) as (layer, _):
        for name in GOOD_NAMES:
            if "!" in name and not factory.features.any_reader:
                await layer.send(name, {"name": name})
                continue
            await listen(factory, layer, name)
            await layer.send(name, {"name": name})
            require((await layer.receive(name)) == {"name": name}, f"channel {name!r} did not carry a message")
        for name in BAD_NAMES:
            calls: list[tuple[str, Callable[[], Awaitable[object]]]] = [
                ("send", lambda name=name: layer.send(name, {})),  # type: ignore[misc]
                ("receive", lambda name=name: layer.receive(name)),  # type: ignore[misc]
                ("group_add", lambda name=name: layer.group_add("group", name)),  # type: ignore[misc]
                ("group_discard", lambda name=name: layer.group_discard("group", name)),  # type: ignore[misc]
                ("exclude", lambda name=name: layer.group_send("group", {}, exclude=[name])),  # type: ignore[misc]
                ("group_add's group", lambda name=name: layer.group_add(name, "a")),  # type: ignore[misc]
                ("group_discard's group", lambda name=name: layer.group_discard(name, "a")),  # type: ignore[misc]
                ("group_send", lambda name=name: layer.group_send(name, {})),  # type: ignore[misc]
                ("group_channels", lambda name=name: layer.group_channels(name)),  # type: ignore[misc]
            ]
            for method, call in calls:
                error = await _refused(TypeError, call, f"{method} of the name {name!r}")
                require(
                    isinstance(name, str) and len(name) > 20 or repr(name) in str(error),  # noqa: PLR2004, RUF021
                    f"the error of {method} does not name {name!r}: {error}",
                )
        await _refused(TypeError, lambda: layer.group_add("a!b", "a"), "a group name with '!'")
        await _refused(TypeError, lambda: layer.new_channel("a!"), "a prefix with '!'")
        await _refused(TypeError, lambda: layer.group_send("group", {}, exclude="abc"), "a str as exclude")
        counts = layer.statistics()
        require(
            (counts.groups, counts.members, counts.buffered_messages, counts.waiting_receivers) == (0, 0, 0, 0),
            f"refused calls left something behind: {counts}",
        )


@_clause("Messages")
async def check_message_types(factory: Subject) -> None:
    """All permitted types arrive as they were sent, tuples as lists."""
    async with opened(factory) as (layer, _):
        await listen(factory, layer, "a")
        await layer.send("a", GOOD_MESSAGE)
        require((got := await layer.receive("a")) == GOOD_MESSAGE, f"sent {GOOD_MESSAGE!r}, received {got!r}")
        require(type(got["true"]) is bool, "True did not arrive as a bool")
        await layer.send("a", {"tuple": (1, (2,))})
        require((got := await layer.receive("a")) == {"tuple": [1, [2]]}, f"tuples arrived as {got!r}")


@_clause("Messages")
async def check_refused_messages(factory: Subject) -> None:
    """What a message may not hold is a ``TypeError`` that says where it is, and nothing is left behind."""
    async with opened(factory) as (layer, _), layer.subscribe("group") as inbox:
        await listen(factory, layer, "a")
        for value, where in BAD_VALUES:
            for method in (layer.send, layer.group_send):
                target = "a" if method == layer.send else "group"
                what = f"{method.__name__} of {value!r}"
                error = await _refused(TypeError, lambda t=target, v=value, m=method: m(t, {"v": v}), what)  # type: ignore[misc]
                require(where in str(error), f"the error for {what} does not say that it is at {where}: {error}")
        for message in (None, [("a", 1)], "text", {"__asgi_channel__": "a"}, {5: 1}):
            for send in (layer.send, layer.group_send):
                target = "a" if send == layer.send else "group"
                call = cast("Callable[[], Awaitable[object]]", lambda t=target, m=message, s=send: s(t, m))
                await _refused(TypeError, call, f"{send.__name__} of the message {message!r}")
        require(not (got := await left_on(layer, "a")), f"refused messages were left on the channel: {got!r}")
        require(not (got := await left_on(layer, inbox.channel)), f"refused messages reached a member: {got!r}")


@_clause("Messages")
async def check_message_size(factory: Subject) -> None:
    """More than ``max_message_size`` encoded bytes are ``MessageTooLarge``; the default lets 1 MB of JSON through."""
    async with opened(factory, max_message_size=100) as (layer, _):
        require(layer.MessageTooLarge is MessageTooLarge, "the layer has no attribute MessageTooLarge")
        await _refused(MessageTooLarge, lambda: layer.send("a", {"v": "x" * 200}), "a message of over 200 bytes")
        await _refused(
            MessageTooLarge, lambda: layer.group_send("g", {"v": b"x" * 200}), "a broadcast of over 200 bytes"
        )
        await listen(factory, layer, "a")
        await layer.send("a", {"v": "x" * 20})
        require(await left_on(layer, "a") == [{"v": "x" * 20}], "a refused message was left, or a small one refused")
    async with opened(factory) as (layer, _):
        await listen(factory, layer, "a")
        for million in ({"v": "x" * 1_000_000}, {"v": [1.5] * 250_000}):
            await layer.send("a", million)
            require(await layer.receive("a") == million, "a message of 1 MB did not arrive whole")


@_clause("Messages")
async def check_default(factory: Subject) -> None:
    """``default`` converts what no message may hold, and is asked about nothing else."""
    asked: list[object] = []

    def default(value: object) -> str:
        asked.append(value)
        if isinstance(value, uuid.UUID):
            return str(value)
        raise TypeError("only UUIDs")

    value = uuid.UUID(int=5)
    async with opened(factory, default=default) as (layer, _), layer.subscribe("group") as inbox:
        await listen(factory, layer, "a")
        await layer.send("a", {"v": [value], "w": 1})
        require((got := await layer.receive("a")) == {"v": [str(value)], "w": 1}, f"default= gave {got!r}")
        await layer.group_send("group", {"v": value})
        require((got := await inbox.receive()) == {"v": str(value)}, f"default= of group_send gave {got!r}")
        require(set(map(type, asked)) == {uuid.UUID}, f"default= was asked about {asked!r}")
        error = await _refused(TypeError, lambda: layer.send("a", {"v": {1}}), "a set that default= refuses")
        require("message['v']" in str(error), f"the error does not say where the set is: {error}")


@_clause("Isolation")
async def check_isolation(factory: Subject) -> None:
    """The sender and each receiver have their own copy, however deep."""
    async with opened(factory) as (layer, _), layer.subscribe("group") as one, layer.subscribe("group") as two:
        message: Message = {"list": [1], "dict": {"a": {}}}
        await listen(factory, layer, "a")
        await layer.send("a", message)
        await layer.group_send("group", message)
        message["list"].append(2)
        message["dict"]["a"]["b"] = 1
        expected = {"list": [1], "dict": {"a": {}}}
        for got in (await layer.receive("a"), first := await one.receive(), first_again := dict(first)):
            require(got == expected, f"what the sender did after sending arrived: {got!r}")
        first["list"].append(3)
        first_again["dict"]["a"]["c"] = 1
        require((got := await two.receive()) == expected, f"two members share one message: {got!r}")


@_clause("Delivery")
async def check_order(factory: Subject) -> None:
    """One writer, one reader: everything arrives once and in order, also into a reader that waits."""
    async with opened(factory, capacity=200) as (layer, _):
        for channel in ("normal", await layer.new_channel()):
            await listen(factory, layer, channel)
            for number in range(100):
                await layer.send(channel, {"n": number})
            got = [message["n"] for message in await left_on(layer, channel)]
            require(got == list(range(100)), f"0 to 99 were sent to {channel!r}, received: {got}")
            got = []
            async with create_task_group() as tg:

                async def read(channel: str = channel, got: list[int] = got) -> None:
                    while len(got) < 100:  # noqa: PLR2004 - as many as are sent
                        got.append((await layer.receive(channel))["n"])

                tg.start_soon(read)
                for number in range(100):
                    await settle(layer, 1, factory.features)
                    await layer.send(channel, {"n": number})
            require(got == list(range(100)), f"0 to 99 were sent to a waiting reader of {channel!r}, received: {got}")


@_clause("Delivery")
async def check_readers_in_turn(factory: Subject) -> None:
    """Readers that wait on one channel are served one message each, in the order they came."""
    async with opened(factory) as (layer, _), create_task_group() as tg:
        got: list[tuple[int, int]] = []

        async def read(reader: int) -> None:
            got.append((reader, (await layer.receive("a"))["n"]))

        for reader in range(4):
            tg.start_soon(read, reader)
            await settle(layer, reader + 1, factory.features)
        for number in range(4):
            await layer.send("a", {"n": number})
            await settle(layer, 3 - number, factory.features)
            await _until(factory, lambda number=number: len(got) > number, "a reader waits beside a message")  # type: ignore[misc]
        require(got == [(n, n) for n in range(4)], f"(reader, message) should be in turn, but were {got}")


async def _until(subject: Subject, condition: Callable[[], bool], otherwise: str) -> None:
    for _ in range(100):
        if condition():
            return
        await checkpoint()
    require(await until(condition, subject.features), otherwise)


@_clause("Cancellation")
async def check_cancelled_receive(factory: Subject) -> None:
    """A receive that is cancelled before, or at the moment when, its message comes has taken nothing."""
    async with opened(factory) as (layer, _):
        await listen(factory, layer, "a")
        with move_on_after(0):
            await layer.receive("a")
        await layer.send("a", {"n": 1})
        require(await left_on(layer, "a") == [{"n": 1}], "a message sent after a cancelled receive was lost")
        for number in range(2):  # the reader is cancelled after, then before the message is sent
            got: list[Message] = []
            async with create_task_group() as tg:

                async def read(got: list[Message] = got) -> None:
                    got.append(await layer.receive("a"))

                tg.start_soon(read)
                await settle(layer, 1, factory.features)
                if number:
                    tg.cancel_scope.cancel()
                with CancelScope(shield=True):
                    await layer.send("a", {"n": 2})
                tg.cancel_scope.cancel()
            got += await left_on(layer, "a")
            require(got == [{"n": 2}], f"one message was sent to a reader just cancelled; found: {got!r}")
        require(layer.statistics().waiting_receivers == 0, "a cancelled receiver still counts as waiting")


@_clause("Cancellation")
async def check_cancelled_receiver_passes_on(factory: Subject) -> None:
    """A message that came for a receiver just cancelled goes to the next who waits."""
    async with opened(factory) as (layer, _), create_task_group() as tg:
        got: list[Message] = []
        first = CancelScope()

        async def read(scope: CancelScope) -> None:
            with scope:
                got.append(await layer.receive("a"))

        tg.start_soon(read, first)
        await settle(layer, 1, factory.features)
        tg.start_soon(read, CancelScope())
        await settle(layer, 2, factory.features)
        await layer.send("a", {"n": 1})
        first.cancel()
        await _until(
            factory, lambda: len(got) == 1, "a reader still waits beside a message that the reader before it gave up"
        )
        tg.cancel_scope.cancel()


@_clause("Cancellation")
async def check_native_cancellation(factory: Subject) -> None:
    """On asyncio, ``Task.cancel()`` between the arrival of a message and the wake-up loses nothing."""
    loop: Any = current_token().native_token
    if not hasattr(loop, "create_task"):
        return  # trio has cancel scopes only
    async with opened(factory) as (layer, _):
        for late in (False, True):
            task = loop.create_task(layer.receive("a"))
            await settle(layer, 1, factory.features)
            if late:
                await layer.send("a", {"n": 1})
                task.cancel()
            else:
                task.cancel()
                await layer.send("a", {"n": 1})
            got: list[Message] = []
            try:
                got.append(await task)
            except anyio.get_cancelled_exc_class():
                pass  # the task's, not ours: nobody cancelled this check
            got += await left_on(layer, "a")
            require(got == [{"n": 1}], f"one message was sent to a task just cancelled; found: {got!r}")


@_clause("Cancellation")
async def check_every_call_is_cancellable(factory: Subject) -> None:
    """In a cancelled scope every async call is cancelled, and has done nothing."""
    async with opened(factory) as (layer, _):
        await listen(factory, layer, "a", "b", "c")
        await layer.send("a", {"n": 1})
        await layer.group_add("group", "b")
        if not factory.features.keeps_unread:
            await _until(factory, lambda: layer.statistics().buffered_messages == 1, "a message did not arrive")
        before = _common(layer.statistics())
        calls: list[Callable[[], Awaitable[object]]] = [
            lambda: layer.send("a", {}),
            lambda: layer.send("a", {}, wait=True),
            lambda: layer.receive("a"),
            lambda: layer.receive("empty"),
            layer.new_channel,
            lambda: layer.group_add("group", "c"),
            lambda: layer.group_discard("group", "b"),
            lambda: layer.group_send("group", {}),
            lambda: layer.group_channels("group"),
            layer.flush,
            layer.subscribe("group").__aenter__,
        ]
        for number, call in enumerate(calls):
            with CancelScope() as scope:
                scope.cancel()
                await call()
            require(scope.cancelled_caught, f"call {number} of the list did not notice its cancellation")
        after = _common(layer.statistics())
        require(before == after, f"cancelled calls did something: before {before}, after {after}")


@_clause("Expiry")
async def check_expiry(factory: Subject) -> None:
    """A message unread for ``expiry`` seconds is gone, and its room is free at once; not before."""
    features = factory.features
    async with opened(factory, expiry=10, capacity=2) as (layer, clock):
        await listen(factory, layer, "a")
        await layer.send("a", {"n": 0})
        await clock.advance(layer, 5)
        await layer.send("a", {"n": 1})
        await clock.advance(layer, 4)
        if features.channel_full != "none":
            await _refused(ChannelFull, lambda: layer.send("a", {}), "a third message to a channel of capacity 2")
        else:
            await _until(factory, lambda: layer.statistics().buffered_messages == 2, "two messages did not arrive")  # noqa: PLR2004
        await clock.advance(layer, 1)
        await layer.send("a", {"n": 2})
        got = [(await layer.receive("a"))["n"], (await layer.receive("a"))["n"]]
        require(got == [1, 2], f"message 0 expired, 1 and 2 did not; received {got}")
        await layer.send("a", {"n": 3})
        if not features.keeps_unread:
            await _until(factory, lambda: layer.statistics().buffered_messages == 1, "a message did not arrive")
        await clock.advance(layer, 10)
        await listen(factory, layer, "a")
        require(not (left := await left_on(layer, "a")), f"an expired message was delivered: {left}")
        require((expired := layer.statistics().expired) == 2, f"2 messages expired, statistics() says {expired}")  # noqa: PLR2004


@_clause("Expiry")
async def check_expiry_keeps_members(factory: Subject) -> None:
    """A message that expires unread ends no membership: the reader may only be slow."""
    async with opened(factory, expiry=10) as (layer, clock), layer.subscribe("group") as inbox:
        slow = await layer.new_channel()
        await layer.group_add("group", slow)
        await layer.group_send("group", {"n": 1})
        await _until(factory, lambda: layer.statistics().buffered_messages == 2, "a broadcast to two did not arrive")  # noqa: PLR2004
        await clock.advance(layer, 11)
        members = await layer.group_channels("group")
        require(members == {inbox.channel, slow}, f"should be members: the inbox and {slow!r}; are: {members}")
        await layer.group_send("group", {"n": 2})
        for channel in (inbox.channel, slow):
            require((got := await layer.receive(channel)) == {"n": 2}, f"{channel!r} received {got}")


async def _at_group(layer: BaseChannelLayer, channel: str, expected: bool, why: str) -> None:  # noqa: FBT001
    members = await layer.group_channels("group")
    what = "should" if expected else "should not"
    require((channel in members) is expected, f"{channel!r} {what} be a member {why}; members are {members}")


async def _cancelled_receive(factory: Subject, layer: BaseChannelLayer, channel: str) -> None:
    waiting = layer.statistics().waiting_receivers
    async with create_task_group() as tg:
        tg.start_soon(layer.receive, channel)
        await settle(layer, waiting + 1, factory.features)
        tg.cancel_scope.cancel()


@_clause("Ownership", lambda features: features.ends_channels)
async def check_channel_in_use(factory: Subject) -> None:
    """A channel of ``new_channel()`` and its memberships last for ``group_expiry`` after each use of it by a reader."""
    async with opened(factory, expiry=10, group_expiry=100) as (layer, clock):
        channel = await layer.new_channel()
        await layer.group_add("group", channel)
        for use in range(3):
            await clock.advance(layer, 90)
            await layer.group_send("group", {"n": use})
            require((got := await layer.receive(channel)) == {"n": use}, f"use {use} received {got}")
        await clock.advance(layer, 99)
        await _at_group(layer, channel, True, "99 of 100 s after its last use")  # noqa: FBT003
        await clock.advance(layer, 1)
        await _at_group(layer, channel, False, "group_expiry after its last use")  # noqa: FBT003
        error = await _refused(ClosedResourceError, lambda: layer.receive(channel), "receive() of a channel that ended")
        require(channel in str(error), f"the error does not say which channel has ended: {error}")
        counts = layer.statistics()
        require((counts.groups, counts.members) == (0, 0), f"a channel that ended left a trace: {counts}")


@_clause("Ownership", lambda features: features.ends_channels)
async def check_channel_of_cancelled_reader(factory: Subject) -> None:
    """It ends ``expiry`` seconds after a cancelled ``receive``, and what is in it is discarded; waiting again saves it."""
    async with opened(factory, expiry=10, group_expiry=100) as (layer, clock):
        gone, back = await layer.new_channel(), await layer.new_channel()
        for channel in (gone, back):
            await layer.group_add("group", channel)
            await _cancelled_receive(factory, layer, channel)
        await clock.advance(layer, 9)
        await layer.group_send("group", {"n": 1})
        await _until(factory, lambda: layer.statistics().buffered_messages == 2, "a broadcast to two did not arrive")  # noqa: PLR2004
        require((got := await layer.receive(back)) == {"n": 1}, f"received {got}")
        await clock.advance(layer, 1)
        await _at_group(layer, gone, False, "expiry after its last receive was cancelled")  # noqa: FBT003
        await _at_group(layer, back, True, "for its last receive returned")  # noqa: FBT003
        require((seen := layer.statistics().discarded) == 1, f"1 message was in it; statistics() has discarded {seen}")
        await _refused(ClosedResourceError, lambda: layer.receive(gone), "receive() of a channel that ended")
        await _refused(
            ClosedResourceError, lambda: layer.group_add("group", gone), "group_add() of a channel that ended"
        )
        await layer.group_discard("group", gone)


@_clause("Ownership", lambda features: features.ends_channels)
async def check_channel_of_forgotten_name(factory: Subject) -> None:
    """It ends ``expiry`` seconds after its last use if the name that ``new_channel()`` returned was garbage-collected."""
    async with opened(factory, expiry=10, group_expiry=100) as (layer, clock):
        name, kept = await layer.new_channel(), await layer.new_channel()
        copy = str(name)
        for channel in (name, kept):
            await layer.group_add("group", channel)
        await clock.advance(layer, 5)
        watch = ref(name)
        del name, channel
        await checkpoint()
        gc.collect()
        require(watch() is None, "the layer keeps the name that new_channel() returned")
        await _at_group(layer, copy, True, "for expiry after its last use")  # noqa: FBT003
        await clock.advance(layer, 5)
        await _at_group(layer, copy, False, "expiry after its last use, for nobody has its name")  # noqa: FBT003
        await _at_group(layer, kept, True, "for somebody has its name")  # noqa: FBT003
        await _refused(ClosedResourceError, lambda: layer.receive(copy), "receive() of a channel that ended")


@_clause("Ownership", lambda features: features.ends_channels)
async def check_channel_somebody_waits_at(factory: Subject) -> None:
    """Nothing ends while somebody waits, whatever became of other readers and of the name."""
    async with opened(factory, expiry=10, group_expiry=100) as (layer, clock), create_task_group() as tg:
        got: list[Message] = []
        channel = str(await layer.new_channel())

        async def read() -> None:
            got.append(await layer.receive(channel))

        await layer.group_add("group", channel)
        tg.start_soon(read)
        await settle(layer, 1, factory.features)
        await _cancelled_receive(factory, layer, channel)
        gc.collect()
        for _ in range(3):
            await clock.advance(layer, 90)
            await _at_group(layer, channel, True, "while somebody waits")  # noqa: FBT003
        await layer.group_send("group", {"n": 1})
        await _until(factory, lambda: got == [{"n": 1}], "who waited received nothing")
        await clock.advance(layer, 9)
        await _at_group(layer, channel, True, "for expiry after its last use")  # noqa: FBT003
        await clock.advance(layer, 1)
        await _at_group(layer, channel, False, "expiry after its last use, for nobody has its name")  # noqa: FBT003


@_clause("Ownership", lambda features: not features.any_reader)
async def check_foreign_channel(factory: Subject) -> None:
    """``receive`` of a process-specific channel of another process is a ``RuntimeError``; sending to it is not."""
    async with opened(factory) as (layer, _):
        name = f"specific.{'0' * 32}!abc"
        await layer.send(name, {})
        error = await _refused(RuntimeError, lambda: layer.receive(name), "receive() of another process's channel")
        require(name in str(error), f"the error does not name {name!r}: {error}")
        require((seen := layer.statistics().waiting_receivers) == 0, f"{seen} receivers wait")


@_clause("Expiry", lambda features: features.keeps_unread and features.knows_all)
async def check_reclaimed(factory: Subject) -> None:
    """What was never read leaves nothing behind once it expired, without anybody touching its channel."""
    async with opened(factory, expiry=10) as (layer, clock):
        for number in range(200):
            await layer.send(f"unread.{number}", {"n": number})
        require((held := layer.statistics().buffered_messages) == 200, f"200 messages are unread, statistics: {held}")  # noqa: PLR2004
        await clock.advance(layer, 10)
        counts = layer.statistics()
        require(
            (counts.channels, counts.buffered_messages, counts.expired) == (0, 0, 200),
            f"after expiry of all messages the layer still holds something: {counts}",
        )


@_clause("Capacity", lambda features: features.channel_full != "none")
async def check_capacity(factory: Subject) -> None:
    """Of 100 concurrent sends to a channel of capacity 5 exactly 5 succeed; the others are ``ChannelFull``."""
    async with opened(factory, capacity=5, channel_capacity={"big.*": 7}) as (layer, _):
        require(layer.ChannelFull is ChannelFull, "the layer has no attribute ChannelFull")
        for channel, capacity in (("small", 5), ("big.one", 7)):
            accepted: list[int] = []

            async def send(number: int, channel: str = channel, accepted: list[int] = accepted) -> None:
                try:
                    await layer.send(channel, {"n": number})
                except ChannelFull:
                    return
                accepted.append(number)

            async with create_task_group() as tg:
                for number in range(100):
                    tg.start_soon(send, number)
            require(len(accepted) == capacity, f"{len(accepted)} sends to a channel of capacity {capacity} succeeded")
            await layer.receive(channel)
            await layer.send(channel, {"n": 100})
            await _refused(ChannelFull, lambda c=channel: layer.send(c, {}), "one message too many")  # type: ignore[misc]


@_clause("Capacity", lambda features: features.channel_full != "none")
async def check_waiting_send(factory: Subject) -> None:
    """``send(wait=True)`` waits for room, in turn, and sends nothing if cancelled."""
    async with opened(factory, capacity=1) as (layer, _), create_task_group() as tg:
        await layer.send("a", {"n": 0}, wait=True)
        ended: list[int] = []

        async def send(number: int) -> None:
            await layer.send("a", {"n": number}, wait=True)
            ended.append(number)

        async with create_task_group() as cancelled:
            cancelled.start_soon(send, -1)
            await anyio.wait_all_tasks_blocked()
            cancelled.cancel_scope.cancel()
        require(not ended, "send(wait=True) to a full channel did not wait")
        for number in range(1, 4):
            tg.start_soon(send, number)
            await anyio.wait_all_tasks_blocked()
        got = [(await layer.receive("a"))["n"] for _ in range(4)]
        require(got == [0, 1, 2, 3], f"0 to 3 were sent in turn with wait=True, received: {got}")


@_clause("Groups")
async def check_groups(factory: Subject) -> None:
    """Joining and leaving are idempotent; a broadcast reaches each member once, but for the excluded."""
    async with opened(factory) as (layer, _):
        await listen(factory, layer, "a", "b", "c", "d")
        for channel in ("a", "b", "b", "c"):
            await layer.group_add("group", channel)
        await layer.group_add("other", "d")
        await layer.group_discard("group", "nobody")
        await layer.group_discard("nothing", "a")
        require((seen := await layer.group_channels("group")) == {"a", "b", "c"}, f"members are {seen}")
        await layer.group_send("group", {"n": 1}, exclude={"a", "stranger"})
        await layer.group_discard("group", "b")
        await layer.group_discard("group", "b")
        require((seen := await layer.group_channels("group")) == {"a", "c"}, f"after a discard members are {seen}")
        await layer.group_send("group", {"n": 2})
        await layer.group_send("nothing", {"n": 3})
        got = {channel: await left_on(layer, channel) for channel in "abcd"}
        one, two = {"n": 1}, {"n": 2}
        require(got == {"a": [two], "b": [one], "c": [one, two], "d": []}, f"the members received {got}")
        for channel in ("a", "c"):
            await layer.group_discard("group", channel)
        await layer.group_discard("other", "d")
        counts = layer.statistics()
        require((counts.groups, counts.members) == (0, 0), f"empty groups left a trace: {counts}")


@_clause("Groups")
async def check_group_expiry(factory: Subject) -> None:
    """A membership ends ``group_expiry`` seconds after the last ``group_add``; that of an open inbox does not."""
    async with opened(factory, group_expiry=100) as (layer, clock), layer.subscribe("group") as inbox:
        await listen(factory, layer, "a", "b")
        await layer.group_add("group", "a")
        await layer.group_add("group", "b")
        await clock.advance(layer, 60)
        await layer.group_add("group", "b")
        await clock.advance(layer, 39)
        require((seen := await layer.group_channels("group")) == {"a", "b", inbox.channel}, f"members are {seen}")
        await clock.advance(layer, 2)
        require((seen := await layer.group_channels("group")) == {"b", inbox.channel}, f"members are {seen}")
        await layer.group_send("group", {"n": 1})
        await listen(factory, layer, "a")
        require(not (left := await left_on(layer, "a")), f"a channel whose membership ended received {left}")
        require(len(await left_on(layer, "b")) == 1, "a channel whose membership was renewed received nothing")
        await clock.advance(layer, 200)
        require((seen := await layer.group_channels("group")) == {inbox.channel}, f"members are {seen}")


@_clause("Groups")
async def check_full_member(factory: Subject) -> None:
    """A full member misses a broadcast, the others do not; nothing is raised, and the miss is counted."""
    async with opened(factory, capacity=2) as (layer, _):
        await listen(factory, layer, "full", "free")
        await layer.group_add("group", "full")
        await layer.group_add("group", "free")
        await layer.send("full", {"n": 1})
        await layer.send("full", {"n": 2})
        await layer.group_send("group", {"n": 3})
        await until(lambda: layer.statistics().dropped_full > 0, factory.features)
        require((dropped := layer.statistics().dropped_full) == 1, f"1 message was missed, statistics: {dropped}")
        got = [await layer.receive("full"), await layer.receive("full"), await layer.receive("free")]
        require(got == [{"n": 1}, {"n": 2}, {"n": 3}], f"the members received {got}")
        require(not (left := await left_on(layer, "full")), f"the full member received {left} too")


@_clause("Flush")
async def check_flush(factory: Subject) -> None:
    """``flush`` leaves the layer blank; readers go on waiting."""
    async with opened(factory) as (layer, _), create_task_group() as tg:
        got: list[Message] = []

        async def read() -> None:
            got.append(await layer.receive("waited-on"))

        tg.start_soon(read)
        await settle(layer, 1, factory.features)
        await listen(factory, layer, "a")
        await layer.group_add("group", "a")
        await layer.send("a", {"n": 1})
        await layer.flush()
        counts = layer.statistics()
        require(
            (counts.channels, counts.buffered_messages, counts.groups, counts.members) == (0, 0, 0, 0),
            f"after flush() the layer is not blank: {counts}",
        )
        require(not (seen := await layer.group_channels("group")), f"after flush() a group has members: {seen}")
        require(not (left := await left_on(layer, "a")), f"after flush() a channel holds {left}")
        await layer.send("waited-on", {"n": 2})
        await _until(factory, lambda: got == [{"n": 2}], "a reader that waited during flush() was forgotten")


@_clause("Inboxes")
async def check_subscribe(factory: Subject) -> None:
    """An inbox is a member of its groups inside its block, and leaves no trace after it, however it is left."""
    async with opened(factory) as (layer, _):

        class Leave(Exception):  # noqa: N818 - not an error
            pass

        for way in ("plainly", "by an error", "by cancellation"):
            with CancelScope() as scope:
                try:
                    async with layer.subscribe("one", "two", prefix="mine.") as inbox:
                        require(inbox.channel.startswith("mine.") and "!" in inbox.channel, f"named {inbox.channel}")
                        await inbox.join("three")
                        await inbox.leave("two")
                        for group in ("one", "two", "three"):
                            await layer.group_send(group, {"to": group})
                        await layer.send(inbox.channel, {"to": "inbox"})
                        got = [(await inbox.receive())["to"] for _ in range(3)]
                        require(got == ["one", "three", "inbox"], f"the inbox received {got}")
                        await layer.send(inbox.channel, {"to": "iteration"})
                        require((message := await anext(inbox)) == {"to": "iteration"}, f"iterating gave {message}")
                        if way == "by an error":
                            raise Leave  # noqa: TRY301 - leaving by an error is what is checked
                        if way == "by cancellation":
                            scope.cancel()
                            await checkpoint()
                except Leave:
                    pass
            counts = layer.statistics()
            require(
                (counts.channels, counts.groups, counts.members) == (0, 0, 0), f"an inbox left {way} remains: {counts}"
            )
            await _refused(ClosedResourceError, inbox.receive, "receive of an inbox that was left")


@_clause("Inboxes")
async def check_overflow_and_gaps(factory: Subject) -> None:
    """A full inbox drops what ``overflow`` says, and tells its reader as ``on_gap`` says, in its place in the order."""
    expected: dict[tuple[str, str], list[object]] = {
        ("drop_new", "ignore"): [0, 1, 5],
        ("drop_old", "ignore"): [2, 3, 5],
        ("drop_new", "event"): [0, 1, "gap 2", 5],
        ("drop_old", "event"): ["gap 2", 2, 3, 5],
        ("drop_new", "raise"): [0, 1, "lost 2", 5],
        ("drop_old", "raise"): ["lost 2", 2, 3, 5],
    }
    for (overflow, on_gap), should in expected.items():
        async with opened(factory) as (layer, _):
            options: dict[str, Any] = {"capacity": 2, "overflow": overflow, "on_gap": on_gap}
            async with layer.subscribe("group", **options) as inbox:
                for number in range(4):
                    await layer.group_send("group", {"n": number})
                await until(lambda: layer.statistics().dropped_full == 2, factory.features)  # noqa: PLR2004 - called at once
                got: list[object] = []
                while len(got) < len(should):
                    if len(got) == len(should) - 1:
                        await layer.group_send("group", {"n": 5})
                    try:
                        message = await inbox.receive()
                    except MessagesLost as lost:
                        got.append(f"lost {lost.missed}")
                    else:
                        got.append(f"gap {message['missed']}" if "missed" in message else message["n"])
            require(got == should, f"overflow={overflow!r}, on_gap={on_gap!r}: should get {should}, got {got}")
            require((seen := layer.statistics().dropped_full) == 2, f"2 were dropped, statistics() says {seen}")  # noqa: PLR2004


@_clause("Statistics", lambda features: features.knows_all)
async def check_statistics(factory: Subject) -> None:
    """The books balance: what was sent was received, expired, was dropped, discarded, or is still there."""
    async with opened(factory, capacity=3, expiry=10) as (layer, clock):
        async with layer.subscribe("group", capacity=2, overflow="drop_old") as inbox:
            await layer.group_add("group", "a")
            for number in range(5):
                await layer.group_send("group", {"n": number})
            await layer.receive("a")
            await inbox.receive()
        await clock.advance(layer, 10)
        await layer.send("b", {})
        await layer.send("c", {})
        await layer.receive("c")
        counts = layer.statistics()
        seen = {
            "sent": counts.sent, "received": counts.received, "expired": counts.expired,
            "dropped_full": counts.dropped_full, "discarded": counts.discarded, "buffered": counts.buffered_messages,
            "channels": counts.channels,
        }  # fmt: skip
        should = {
            "sent": 12, "received": 3, "expired": 2, "dropped_full": 5, "discarded": 1, "buffered": 1, "channels": 1,
        }  # fmt: skip
        require(seen == should, f"should be {should}, are {seen}")


@_clause("Yielding")
async def check_yielding(factory: Subject) -> None:
    """A task that only sends and receives lets the others run, at least once in ``YIELD_EVERY`` calls."""
    async with opened(factory) as (layer, _), create_task_group() as tg:
        await listen(factory, layer, "a")
        turns = 0

        async def other() -> None:
            nonlocal turns
            while True:
                turns += 1
                await checkpoint()

        tg.start_soon(other)
        rounds = 10
        for _ in range(rounds * layer.YIELD_EVERY):
            await layer.send("a", {})
            await layer.receive("a")
        require(turns >= rounds, f"another task ran {turns} times during {2 * rounds * layer.YIELD_EVERY} calls")
        tg.cancel_scope.cancel()


@_clause("Opening and closing")
async def check_closing(factory: Subject) -> None:
    """After closing, those who waited and all who call get ``ClosedResourceError``; closing twice is nothing."""
    layer = factory(Clock(), capacity=1)
    ended: list[str] = []
    who_wait = ["inbox", "receive", *(["send"] if factory.features.channel_full != "none" else [])]

    async def wait_for(what: str, call: Callable[[], Awaitable[object]]) -> None:
        try:
            await call()
        except ClosedResourceError:
            ended.append(what)

    inbox = layer.subscribe("group")
    async with layer, create_task_group() as tg:
        await _refused(RuntimeError, layer.__aenter__, "opening an open layer")
        async with inbox:
            await layer.send("full", {})
            tg.start_soon(wait_for, "receive", lambda: layer.receive("a"))
            tg.start_soon(wait_for, "inbox", inbox.receive)
            if "send" in who_wait:
                tg.start_soon(wait_for, "send", lambda: layer.send("full", {}, wait=True))
            await settle(layer, 2, factory.features)
            await anyio.wait_all_tasks_blocked()
            await layer.close()
            await _until(factory, lambda: len(ended) == len(who_wait), "who waited at closing still waits")
    require(sorted(ended) == who_wait, f"ClosedResourceError reached only {ended}")
    await layer.close()
    calls: Iterable[Callable[[], Awaitable[object]]] = (
        lambda: layer.send("a", {}),
        lambda: layer.send("a", {}, wait=True),
        lambda: layer.receive("a"),
        layer.new_channel,
        lambda: layer.group_add("group", "a"),
        lambda: layer.group_discard("group", "a"),
        lambda: layer.group_send("group", {}),
        lambda: layer.group_channels("group"),
        layer.flush,
        layer.subscribe("group").__aenter__,
        inbox.receive,
    )
    for number, call in enumerate(calls):
        await _refused(ClosedResourceError, call, f"call {number} of the list, on a closed layer,")


@_clause("Names")
async def check_new_channels(factory: Subject) -> None:
    """``new_channel`` gives process-specific names that nobody has."""
    async with opened(factory) as (layer, _):
        names = [await layer.new_channel() for _ in range(100)] + [await layer.new_channel("p.") for _ in range(100)]
        require(len(set(names)) == len(names), "new_channel() gave one name twice")
        for name in names[:1] + names[-1:]:
            layer.require_valid_channel_name(name)
            require("!" in name, f"{name!r} is not process-specific")
        require(names[0].startswith("specific.") and names[-1].startswith("p."), f"prefixes: {names[0]}, {names[-1]}")
        require(layer.extensions == ["groups", "flush"], f"extensions are {layer.extensions!r}")


CHECKS: Final[tuple[Check, ...]] = tuple(_checks)
"""All checks."""
