"""The base layer: options, names, capacities, and what a layer inherits that overrides little."""

from __future__ import annotations

import gc
import re
from collections.abc import Awaitable, Callable, Collection
from typing import Any

import anyio
import pytest

import anyio_channels
from anyio_channels import (
    BaseChannelLayer,
    ChannelFull,
    ChannelLayerStatistics,
    InMemoryChannelLayer,
    MessagesLost,
    MessageTooLarge,
)
from anyio_channels.layers.base import Message

base = BaseChannelLayer()


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"expiry": 0}, ValueError, "expiry must be a positive, finite number of seconds, not 0"),
        ({"expiry": float("nan")}, ValueError, "not nan"),
        ({"expiry": float("inf")}, ValueError, "not inf"),
        ({"expiry": "60"}, TypeError, "expiry must be a number of seconds, not '60'"),
        ({"expiry": True}, TypeError, "not True"),
        ({"group_expiry": -1}, ValueError, "group_expiry must be"),
        ({"expiry": 1e16}, ValueError, "expiry must be at most 1000000000 seconds .31 years., not 1e[+]16"),
        ({"expiry": 10**9 + 1}, ValueError, "expiry must be at most 1000000000 seconds"),
        ({"group_expiry": 10**400}, ValueError, "group_expiry must be at most .*, not an int of 1329 bits"),
        ({"group_expiry": -(10**5000)}, ValueError, "group_expiry must be a positive, .*, not an int of 16610 bits"),
        ({"capacity": 0}, ValueError, "capacity must be at least 1, not 0"),
        ({"capacity": 2**63}, ValueError, "capacity must be at most 9223372036854775807, not 9223372036854775808"),
        ({"max_message_size": 10**5000}, ValueError, "max_message_size must be at most .*, not an int of"),
        ({"channel_capacity": {"a*": 2**70}}, ValueError, r"channel_capacity\['a\*'\] must be at most"),
        ({"capacity": 1.5}, TypeError, "capacity must be an int, not 1.5"),
        ({"capacity": True}, TypeError, "not True"),
        ({"max_message_size": 0}, ValueError, "max_message_size must be at least 1"),
        ({"default": 5}, TypeError, "default must be callable, not 5"),
        ({"clock": 5}, TypeError, "clock must be a function that returns seconds, not 5"),
        ({"channel_capacity": [1]}, TypeError, "channel_capacity must be a mapping"),
        ({"channel_capacity": {5: 1}}, TypeError, "a pattern of channel_capacity must be a glob"),
        ({"channel_capacity": {re.compile(b"a"): 1}}, TypeError, "a pattern of channel_capacity must be a glob"),
        ({"channel_capacity": {"a*": 0}}, ValueError, r"channel_capacity\['a\*'\] must be at least 1"),
        ({"capactiy": 10}, TypeError, "capactiy"),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], words: str) -> None:
    """A bad or misspelt option is an error that names it, when the layer is made and not when it is used."""
    with pytest.raises(error, match=words):
        InMemoryChannelLayer(**options)


def test_the_largest_options() -> None:
    """The bounds of options are themselves allowed, and work."""
    layer = InMemoryChannelLayer(expiry=10**9, group_expiry=1e9, capacity=2**63 - 1, max_message_size=2**63 - 1)
    layer.send_nowait("a", {"n": 1})
    assert layer.receive_nowait("a") == {"n": 1}


@pytest.mark.parametrize("value", [10**5000, -(10**5000)], ids=["large", "small"])
def test_values_too_long_to_write(value: int) -> None:
    """An int that Python itself refuses to write is refused as any other value that does not belong there."""
    layer = InMemoryChannelLayer()
    with pytest.raises(TypeError, match=r"message\['n'\] is an int of 16610 bits, which does not fit 64 bits"):
        layer.send_nowait("a", {"n": value})
    with pytest.raises(TypeError, match="message has the key an int of 16610 bits"):
        layer.send_nowait("a", {value: 1})  # type: ignore[dict-item]
    with pytest.raises(TypeError, match="Channel name must be .* got an int of 16610 bits"):
        layer.send_nowait(value, {})  # type: ignore[arg-type]


def test_positional_options_are_those_of_the_peers() -> None:
    """The order of the options is the one that users of the peers know."""
    layer = InMemoryChannelLayer(1.5, 2.5, 3, {"a": 4})
    assert (layer.expiry, layer.group_expiry, layer.capacity, layer.get_capacity("a")) == (1.5, 2.5, 3, 4)
    other = BaseChannelLayer(5, 6, {"b*": 7})
    assert (other.expiry, other.capacity, other.get_capacity("bee"), other.get_capacity("c")) == (5, 6, 7, 6)


def test_first_matching_capacity_wins() -> None:
    """Globs and regular expressions are tried in order."""
    layer = BaseChannelLayer(capacity=1, channel_capacity={"http.request": 2, "http.*": 3, re.compile(r"ws\.\d+"): 4})
    assert [layer.get_capacity(name) for name in ("http.request", "http.x", "ws.12!a", "ws.x", "x")] == [2, 3, 4, 1, 1]
    compiled = layer.compile_capacities({"a?": 5})
    assert [(bool(pattern.match("ab")), capacity) for pattern, capacity in compiled] == [(True, 5)]


def test_names() -> None:
    """The helpers that users of the peers know are here, stricter where the peers let nonsense through."""
    assert base.require_valid_channel_name("a.b-c_d!x")
    assert base.require_valid_channel_name("a!", receive=True)
    assert base.require_valid_group_name("a.b-c_d")
    assert base.match_type_and_length("x" * 99)
    assert not base.match_type_and_length("x" * 100)
    assert not base.match_type_and_length(b"x")
    assert base.non_local_name("a!b") == "a!"
    assert base.non_local_name("a") == "a"
    assert base.channel_name_regex.fullmatch("a!b")
    assert not base.group_name_regex.fullmatch("a!b")
    assert base.MAX_NAME_LENGTH == 100
    with pytest.raises(TypeError, match=r"Channel name must be a str shorter than 100 of ASCII .* got 'a\\n'"):
        base.require_valid_channel_name("a\n")
    with pytest.raises(TypeError, match="Specific channel names in receive.. must end at the !; got 'a!b'"):
        base.require_valid_channel_name("a!b", receive=True)
    with pytest.raises(TypeError, match=r"Group name must be .* got 'a!'"):
        base.require_valid_group_name("a!")
    with pytest.raises(TypeError, match=r"prefix must be a str of 1 to 50 .* got ''"):
        base.subscribe("group", prefix="")
    with pytest.raises(TypeError, match=r"prefix must be .* got 'xxx"):
        base.subscribe("group", prefix="x" * 51)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"capacity": 0}, ValueError, "capacity must be at least 1"),
        ({"capacity": 10**400}, ValueError, "capacity must be at most 9223372036854775807, not an int of 1329 bits"),
        ({"overflow": 10**5000}, ValueError, "overflow must be one of .*, not an int of 16610 bits"),
        ({"overflow": "drop"}, ValueError, "overflow must be one of 'drop_new', 'drop_old', not 'drop'"),
        ({"on_gap": None}, ValueError, "on_gap must be one of 'ignore', 'event', 'raise', not None"),
    ],
)
def test_bad_subscriptions(options: dict[str, Any], error: type[Exception], words: str) -> None:
    """Bad options of subscribe() are refused by the call itself, before anything is opened."""
    with pytest.raises(error, match=words):
        base.subscribe("group", **options)
    with pytest.raises(TypeError, match="Group name"):
        base.subscribe("no group")


def test_exceptions_are_attributes() -> None:
    """The channel layer specification asks for the exceptions on the layer, too."""
    assert base.ChannelFull is ChannelFull
    assert base.MessageTooLarge is MessageTooLarge
    assert base.extensions == ["groups", "flush"]
    assert str(MessagesLost(1)) == "1 message was missed here"
    assert str(MessagesLost(2)) == "2 messages were missed here"
    assert str(MessagesLost(None)) == "messages were missed here, how many is not known"
    assert MessagesLost(3).missed == 3


@pytest.mark.anyio
async def test_what_a_third_party_must_write() -> None:
    """A layer that lacks a method says which one."""

    class Lazy(BaseChannelLayer):
        pass

    layer = Lazy()
    calls: dict[str, Callable[[], Awaitable[object]]] = {
        "send": lambda: layer.send("a", {}),
        "receive": lambda: layer.receive("a"),
        "new_channel": layer.new_channel,
        "flush": layer.flush,
        "group_add": lambda: layer.group_add("g", "a"),
        "group_discard": lambda: layer.group_discard("g", "a"),
        "group_send": lambda: layer.group_send("g", {}),
        "group_channels": lambda: layer.group_channels("g"),
    }
    for name, call in calls.items():
        with pytest.raises(NotImplementedError, match=rf"Lazy must implement {name}\(\)"):
            await call()
    with pytest.raises(NotImplementedError, match="statistics"):
        layer.statistics()


class Thirds(BaseChannelLayer):
    """A third party's layer with the abstract methods only, over another layer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = InMemoryChannelLayer()
        self.fail_opening = False

    async def open(self) -> None:
        await super().open()
        if self.fail_opening:
            raise OSError("no connection")

    async def send(self, channel: str, message: Message, *, wait: bool = False) -> None:
        await self.inner.send(channel, message, wait=wait)

    async def receive(self, channel: str) -> Message:
        return await self.inner.receive(channel)

    async def new_channel(self, prefix: str = "specific.") -> str:
        return await self.inner.new_channel(prefix)

    async def group_add(self, group: str, channel: str) -> None:
        await self.inner.group_add(group, channel)

    async def group_discard(self, group: str, channel: str) -> None:
        await self.inner.group_discard(group, channel)

    async def group_send(self, group: str, message: Message, *, exclude: Collection[str] = ()) -> None:
        await self.inner.group_send(group, message, exclude=exclude)

    def statistics(self) -> ChannelLayerStatistics:
        return self.inner.statistics()


@pytest.mark.anyio
async def test_subscribe_on_a_third_partys_layer() -> None:
    """subscribe() works on the abstract methods alone, but for the options that need a mailbox of ours."""
    async with Thirds() as layer:
        async with layer.subscribe("one", "two") as inbox:
            await inbox.leave("one")
            await inbox.join("three")
            for group in ("one", "two", "three"):
                await layer.group_send(group, {"to": group})
            assert [await inbox.receive(), await inbox.receive()] == [{"to": "two"}, {"to": "three"}]
            assert layer.statistics().members == 2
        assert layer.statistics().members == 0
        with pytest.raises(NotImplementedError, match="Thirds does not support the options capacity"):
            async with layer.subscribe("one", capacity=5):
                pass


@pytest.mark.anyio
async def test_opening_that_fails_is_not_open() -> None:
    """A layer that could not be opened is not open: it can be tried again, and leaves no warning."""
    layer = Thirds()
    layer.fail_opening = True
    with pytest.raises(OSError, match="no connection"):
        async with layer:
            pass
    layer.fail_opening = False
    async with layer:
        pass


@pytest.mark.anyio
async def test_a_layer_left_open_warns() -> None:
    """A layer that was opened and never closed is a ResourceWarning; one never opened or closed is not."""
    layer = InMemoryChannelLayer()
    await layer.__aenter__()
    with pytest.warns(ResourceWarning, match="unclosed channel layer <InMemoryChannelLayer expiry=60"):
        del layer
        gc.collect()
    layer = InMemoryChannelLayer()
    await layer.__aenter__()
    await layer.close()
    del layer


def test_a_layer_that_was_never_made_does_not_warn() -> None:
    """Bad options leave no half-made layer that complains when it goes."""
    with pytest.raises(ValueError, match="capacity"):
        InMemoryChannelLayer(capacity=0)


def test_public_names() -> None:
    """The package and its layers module export the same layer names, and all of them exist."""
    from anyio_channels import layers

    assert set(anyio_channels.__all__) - set(layers.__all__) == {"__version__"}
    for name in layers.__all__:
        assert getattr(anyio_channels, name) is getattr(layers, name)


@pytest.mark.anyio
async def test_an_inbox_is_its_block() -> None:
    """Outside its block an inbox has no channel, and it is entered once."""
    layer = InMemoryChannelLayer()
    inbox = layer.subscribe("group")
    assert "not entered" in repr(inbox)
    with pytest.raises(RuntimeError, match="only inside"):
        _ = inbox.channel
    async with inbox:
        assert inbox.channel in repr(inbox)
        with pytest.raises(RuntimeError, match="entered once"):
            await inbox.__aenter__()
        with pytest.raises(TypeError, match="Group name"):
            await inbox.join("no group")
    for call in (inbox.receive, lambda: inbox.join("a"), lambda: inbox.leave("a")):
        with pytest.raises(anyio.ClosedResourceError):
            await call()


@pytest.mark.anyio
async def test_an_inbox_cancelled_while_joining_leaves_nothing() -> None:
    """If entering is cancelled half way, the channel and the groups joined so far are left."""
    layer = InMemoryChannelLayer()

    class Slow(type(layer)):  # type: ignore[misc]
        async def inbox_join(self, channel: str, group: str) -> None:
            await super().inbox_join(channel, group)
            if group == "second":
                await anyio.sleep_forever()

    layer.__class__ = Slow

    async def enter() -> None:
        async with layer.subscribe("first", "second"):
            pytest.fail("entered")

    async with anyio.create_task_group() as tg:
        tg.start_soon(enter)
        await anyio.wait_all_tasks_blocked()
        assert layer.statistics().members == 2
        tg.cancel_scope.cancel()
    counts = layer.statistics()
    assert (counts.channels, counts.groups, counts.members) == (0, 0, 0)


@pytest.mark.anyio
async def test_closing_what_was_never_opened() -> None:
    """Closing a layer that was never opened changes nothing: it can be opened afterwards."""
    layer = BaseChannelLayer()
    await layer.close()
    async with layer:
        pass
