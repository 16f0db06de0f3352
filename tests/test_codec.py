"""Messages to bytes: what may be sent, what is refused and with which words."""

from __future__ import annotations

import datetime
import decimal
import enum
import json
import uuid
from collections import OrderedDict, namedtuple
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anyio_channels import MessageTooLarge
from anyio_channels.layers.codec import MAX_DEPTH, Codec


class Colour(enum.StrEnum):
    RED = "red"


class Level(enum.IntEnum):
    LOW = 1


class Plain(enum.Enum):
    ONE = 1


class Text(str):
    __slots__ = ()


class Real(float):
    pass


class Raw(bytes):
    pass


Point = namedtuple("Point", "x y")  # noqa: PYI024 - the untyped kind is what users have

codec = Codec(4 * 1024 * 1024, None)

values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(st.dictionaries(st.text().filter(lambda key: key != "__asgi_channel__"), values))
def test_every_message_comes_back_equal(message: dict[str, Any]) -> None:
    """What the rules permit arrives as it was sent, and other MessagePack libraries read the same."""
    data = codec.encode(message)
    assert codec.decode(data) == message
    assert msgpack.unpackb(data) == message


@pytest.mark.parametrize(
    ("value", "arrives"),
    [
        (Colour.RED, "red"),
        (Level.LOW, 1),
        (Text("safe"), "safe"),
        (Real(1.5), 1.5),
        (Raw(b"x"), b"x"),
        (bytearray(b"x"), b"x"),
        (memoryview(b"x"), b"x"),
        (Point(1, Level.LOW), [1, 1]),
        (OrderedDict(a=(1, Colour.RED)), {"a": [1, "red"]}),
        ({Colour.RED: 1, Text("k"): True}, {"red": 1, "k": True}),
        ([None, True, Level.LOW, b"", 0.5], [None, True, 1, b"", 0.5]),
    ],
)
def test_subclasses_arrive_as_the_plain_type(value: object, arrives: object) -> None:
    """An instance of a subclass of a permitted type is sent as that type."""
    got = codec.decode(codec.encode({"v": value}))
    assert got == {"v": arrives}
    assert type(got["v"]) is type(arrives)


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({"v": {1}}, r"message\['v'\] is \{1\}, a set: a message holds .* default="),
        ({"v": Plain.ONE}, r"message\['v'\] is <Plain.ONE: 1>, a Plain"),
        ({"user": {"avatar": [0, object()]}}, r"message\['user'\]\['avatar'\]\[1\] is <object"),
        ({"v": 2**64}, r"message\['v'\] is 18446744073709551616, which does not fit 64 bits"),
        ({"v": -(2**63) - 1}, r"does not fit 64 bits"),
        ({"v": "\ud800"}, r"message\['v'\] is '.ud800', which is not valid Unicode: surrogates"),
        ({"\ud800": 1}, r"a key of message is '.ud800', which is not valid Unicode"),
        ({1: 2}, r"message has the key 1, a int"),
        ({"v": {b"k": 2}}, r"message\['v'\] has the key b'k', a bytes"),
        ({"v": datetime.date(2020, 1, 1)}, r"a date"),
        ({"v": decimal.Decimal(1)}, r"a Decimal"),
        ({"__asgi_channel__": "a"}, r"'__asgi_channel__'\] is reserved"),
        (None, r"a message must be a dict, not None"),
        ([], r"a message must be a dict, not \[\]"),
    ],
)
def test_refused(message: Any, words: str) -> None:
    """What no layer can carry is a TypeError that says what it is and where."""
    with pytest.raises(TypeError, match=words):
        codec.encode(message)


def nested(levels: int) -> dict[str, Any]:
    value: Any = 0
    for _ in range(levels):
        value = [value]
    return {"v": value}


def test_nesting_has_one_bound() -> None:
    """As deep as the bound works, with plain types or with subclasses; one level deeper is refused, and so is a cycle."""
    for leaf in (0, Level.LOW):
        deepest = nested(MAX_DEPTH - 1)
        bottom = deepest["v"]
        while bottom[0]:
            bottom = bottom[0]
        bottom[0] = leaf
        assert codec.decode(codec.encode(deepest))
    with pytest.raises(TypeError, match=f"nested deeper than {MAX_DEPTH} levels"):
        codec.encode(nested(MAX_DEPTH))
    cycle: dict[str, Any] = {}
    cycle["self"] = cycle
    with pytest.raises(TypeError, match="nested deeper"):
        codec.encode(cycle)


def test_default_converts() -> None:
    """default= is asked about what cannot be carried, wherever it is, and its answer is sent instead."""
    asked: list[object] = []

    def default(value: object) -> object:
        asked.append(value)
        return [str(value), Level.LOW] if isinstance(value, uuid.UUID) else uuid.UUID(int=2)

    got = Codec(1000, default).encode({"v": {"w": (uuid.UUID(int=1), Plain.ONE, 5, Colour.RED)}})
    one, two = ([str(uuid.UUID(int=number)), 1] for number in (1, 2))
    assert codec.decode(got) == {"v": {"w": [one, two, 5, "red"]}}
    assert asked == [uuid.UUID(int=1), Plain.ONE, uuid.UUID(int=2)]


def test_default_that_refuses_or_goes_round() -> None:
    """A TypeError of default= is kept as the cause, another error passes, and an endless answer has an end."""

    def refuse(value: object) -> object:
        raise TypeError("not this one")

    with pytest.raises(
        TypeError, match=r"message\['v'\] is \{1\}, a set, and default= refused it: not this one"
    ) as info:
        Codec(1000, refuse).encode({"v": {1}})
    assert isinstance(info.value.__cause__, TypeError)
    with pytest.raises(ZeroDivisionError):
        Codec(1000, lambda value: 1 // 0).encode({"v": {1}})
    with pytest.raises(TypeError, match="nested deeper"):
        Codec(1000, lambda value: value).encode({"v": {1}})


def test_too_large_says_both_sizes() -> None:
    """MessageTooLarge names the size and the bound; exactly the bound is let through."""
    data = codec.encode({"v": "x" * 50})
    assert Codec(len(data), None).encode({"v": "x" * 50}) == data
    with pytest.raises(MessageTooLarge, match=f"is {len(data)} bytes encoded; max_message_size of this layer is 40"):
        Codec(40, None).encode({"v": "x" * 50})


@pytest.mark.parametrize("item", [1.5, 200, 70000, 5_000_000_000, "", "é", "\x01", [], {"": 0}, None, True, -40])
def test_a_megabyte_of_json_fits_by_default(item: object) -> None:
    """The default bound lets through whatever is 1 MB as JSON, also what MessagePack writes longer."""
    count = 2**20 // (len(json.dumps(item)) + 2)
    message = {"v": [item] * count}
    assert codec.decode(codec.encode(message)) == message
