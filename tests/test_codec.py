"""Messages to bytes: what may be sent, what is refused and with which words."""

from __future__ import annotations

import datetime
import decimal
import enum
import json
import sys
import time
import uuid
from collections import OrderedDict, namedtuple
from typing import Any

import msgpack
import pytest
from channels_redis.serializers import registry
from hypothesis import given
from hypothesis import strategies as st

from anyio_channels import MessageTooLarge
from anyio_channels.contract.message import (
    EXCLUDE_KEY,
    MAX_DEPTH,
    RESERVED_KEY,
    Codec,
    SerializerFormat,
    Unreadable,
)
from anyio_channels.redis.wire import PayloadCodec


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


@given(st.dictionaries(st.text().filter(lambda key: key not in {RESERVED_KEY, EXCLUDE_KEY}), values))
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


# Payloads in Redis. The other side is channels_redis, whose bytes these are.

FORMATS: list[SerializerFormat] = ["msgpack", "json"]
KEYS = [None, ["one"], [b"two", "one"]]

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)
reserved = {RESERVED_KEY, EXCLUDE_KEY}
messages: st.SearchStrategy[dict[str, Any]] = st.dictionaries(st.text().filter(lambda key: key not in reserved), values)
json_messages: st.SearchStrategy[dict[str, Any]] = st.dictionaries(
    st.text().filter(lambda key: key not in reserved), json_values
)


def payload_codec(serializer_format: SerializerFormat = "msgpack", **options: Any) -> PayloadCodec:
    return PayloadCodec(4 * 1024 * 1024, None, serializer_format=serializer_format, **options)


def read(codec: PayloadCodec, payload: bytes) -> dict[str, Any]:
    return codec.decode_body(codec.unseal(payload))


def written_by_msgpack_or_json(serializer_format: SerializerFormat, message: dict[str, Any]) -> bytes:
    """As they write it who never heard of us."""
    data: bytes = json.dumps(message).encode() if serializer_format == "json" else msgpack.packb(message)
    return data


@given(
    st.data(), st.sampled_from(FORMATS), st.sampled_from(KEYS), st.sampled_from([0, 1, 12]), st.sampled_from([None, 60])
)
def test_payloads_are_those_of_channels_redis(
    data: st.DataObject,
    serializer_format: SerializerFormat,
    keys: list[str | bytes] | None,
    prefix_length: int,
    expiry: int | None,
) -> None:
    """In both formats, with and without keys and random bytes, either side reads what the other has written."""
    message: dict[str, Any] = data.draw({"json": json_messages, "msgpack": messages}[serializer_format])
    ours = payload_codec(
        serializer_format, symmetric_encryption_keys=keys, random_prefix_length=prefix_length, expiry=expiry
    )
    theirs = registry.get_serializer(
        serializer_format, symmetric_encryption_keys=keys, random_prefix_length=prefix_length, expiry=expiry
    )
    body = ours.encode(message)
    assert body == theirs.as_bytes(message)
    assert theirs.deserialize(ours.seal(body)) == message
    assert read(ours, theirs.serialize(message)) == message
    assert ours.encode_again(ours.decode_body(body)) == body
    assert ours.decode(body) == message
    addressed = ours.address(body, RESERVED_KEY, "specific.x!y")
    assert theirs.deserialize(ours.seal(addressed)) == {**message, RESERVED_KEY: "specific.x!y"}


@pytest.mark.parametrize("serializer_format", FORMATS)
@pytest.mark.parametrize("size", [0, 1, 14, 15, 16, 65534, 65535, 65536])
def test_an_address_is_spliced_in(size: int, serializer_format: SerializerFormat) -> None:
    """address() gives the bytes that encoding the message with the key would have given, however many keys there are."""
    codec = payload_codec(serializer_format)
    message = {f"{number}": number for number in range(size)}
    body = codec.encode(message)
    names: str | list[str]
    for names in ("a", "specific.\u00e9!x", [], ["a", 'b"'], [f"{number}" for number in range(70)]):
        for key in (RESERVED_KEY, EXCLUDE_KEY):
            addressed = codec.address(body, key, names)
            assert addressed == written_by_msgpack_or_json(serializer_format, {**message, key: names})
            assert codec.decode_body(addressed) == {**message, key: names}
    assert codec.encode(message) == body


def test_keys_change_one_by_one() -> None:
    """The first key encrypts, all of them decrypt: so a key can be replaced while messages are under way."""
    before, between, after = (
        payload_codec(symmetric_encryption_keys=keys) for keys in (["old"], ["new", "old"], ["new"])
    )
    body = before.encode({"a": 1})
    assert read(between, before.seal(body)) == {"a": 1}
    assert read(after, between.seal(body)) == {"a": 1}
    with pytest.raises(Unreadable):
        read(before, between.seal(body))


@pytest.mark.parametrize(
    ("options", "length"),
    [
        ({}, 0),
        ({"symmetric_encryption_keys": []}, 0),
        ({"random_prefix_length": 12}, 12),
        ({"symmetric_encryption_keys": ["one"]}, 0),
    ],
)
def test_payloads_differ(options: dict[str, Any], length: int) -> None:
    """With random bytes or keys the same message is another payload each time, for Redis keeps equal ones but once."""
    codec = payload_codec(**options)
    body = codec.encode({"a": 1})
    payloads = {codec.seal(body) for _ in range(20)}
    assert len(payloads) == (1 if options in ({}, {"symmetric_encryption_keys": []}) else 20)
    assert all(codec.unseal(payload) == body for payload in payloads)
    if length:
        assert {payload[length:] for payload in payloads} == {body}


def bare(serializer_format: SerializerFormat, levels: int) -> bytes:
    """A message nested so deep, with brackets in a string too, written by somebody who never heard of us."""
    if serializer_format == "json":
        return b'{"t":"[{\\"[","x":' + b"[" * (levels - 1) + b"]" * (levels - 1) + b"}"
    return b"\x82\xa1t\xa1[\xa1x" + b"\x91" * (levels - 2) + b"\x90"


@pytest.mark.parametrize("serializer_format", FORMATS)
def test_the_depth_of_what_arrives(serializer_format: SerializerFormat) -> None:
    """What comes in may be nested as deep as what goes out, whatever stack it is read on."""
    codec = payload_codec(serializer_format)
    deepest = read(codec, bare(serializer_format, MAX_DEPTH))
    assert codec.encode(deepest)

    def at_depth(frames: int, body: bytes) -> dict[str, Any]:
        return at_depth(frames - 1, body) if frames else read(codec, body)

    for frames in (0, 300, 500):
        assert at_depth(frames, bare(serializer_format, MAX_DEPTH)) == deepest
        for levels in (MAX_DEPTH + 1, 700, 1200, 100_000):
            with pytest.raises(Unreadable, match="it is nested|Recursion limit"):
                at_depth(frames, bare(serializer_format, levels))


@pytest.mark.parametrize("serializer_format", FORMATS)
def test_the_size_of_what_arrives(serializer_format: SerializerFormat) -> None:
    """max_message_size bounds what comes in as it bounds what goes out; the names that a body is addressed to do not count."""
    largest = {"x": "y" * 900, "n": [1, 2]}
    size = len(payload_codec(serializer_format).encode(largest))
    codec = PayloadCodec(size, None, serializer_format=serializer_format)
    body = codec.encode(largest)
    assert codec.decode_body(body) == largest
    names = [f"specific.{number:060d}!{number:x}" for number in range(1000)]
    for key in (RESERVED_KEY, EXCLUDE_KEY):
        for addressed_to in (names[0], names[:3], names[:20], names, ["a"], []):
            found = codec.decode_body(codec.address(body, key, addressed_to))
            assert found == {**largest, key: addressed_to}
            peers = written_by_msgpack_or_json(serializer_format, {**largest, key: addressed_to})
            assert codec.decode_body(peers) == found
    for too_large in (
        {"x": "y" * 901, "n": [1, 2]},
        {**largest, "z": 1, RESERVED_KEY: names},
        {**largest, "longer": "than may be", RESERVED_KEY: names},
        {RESERVED_KEY: names[0], **largest},
        {RESERVED_KEY: "y" * 2000},
        {RESERVED_KEY: ["y" * 2000]},
        {"x": f'"{RESERVED_KEY}": ["a"]' + "y" * 2000},
        {"x": "y" * 2000, EXCLUDE_KEY: 5},
    ):
        with pytest.raises(Unreadable, match=f"it is .* bytes encoded; max_message_size of this layer is {size}"):
            codec.decode_body(written_by_msgpack_or_json(serializer_format, too_large))


@pytest.mark.parametrize(
    ("serializer_format", "body", "words"),
    [
        ("msgpack", b"\x80\x00", "it is no MessagePack: bytes follow the message"),
        ("msgpack", b"\x80\xa4end!", "bytes follow the message"),
        ("msgpack", b"\x80\x80\x80", "bytes follow the message"),
        ("msgpack", b"", "it is no MessagePack: "),
        ("msgpack", b"\x81\xa1a", "it is no MessagePack: "),
        ("msgpack", b"\x82\xa1a\x01", "it is no MessagePack: "),
        ("msgpack", b"\x81\xa1a\xa9abc", "it is no MessagePack: "),
        ("msgpack", b"\xdf\xff\xff\xff\xff", "it is no MessagePack: "),
        ("msgpack", b"\xc1", "it is no MessagePack: "),
        ("msgpack", b"\x81\x01\x02", "it is no MessagePack: "),
        ("msgpack", b"\x81\xc4\x01a\x02", "it is no MessagePack: "),
        ("msgpack", b"\x81\xa1a\x81\x01\x02", "it is no MessagePack: "),
        ("msgpack", b"\x81\xa1\xff\x01", "it is no MessagePack: "),
        ("msgpack", b"\x81\xa1a\xd6\xff\0\0\0\0", "it is no MessagePack: ext_hook missing"),
        ("msgpack", b"\x81\xa1a\xc7\x01\x05a", "it is no MessagePack: ext_hook missing"),
        ("msgpack", b"\x81\xa1v" + b"\x91" * 100_000 + b"\x00", "it is no MessagePack: "),
        ("msgpack", b"\x90", "it holds a list, not a message"),
        ("msgpack", b"\xc0", "it holds a NoneType, not a message"),
        ("msgpack", b'{"a": 1}', "it is no MessagePack: bytes follow the message"),
        ("json", b"", "it is no JSON: "),
        ("json", b'{"a": 1', "it is no JSON: "),
        ("json", b"{} {}", "it is no JSON: "),
        ("json", b"{1: 2}", "it is no JSON: "),
        ("json", b'{"a": "\xff"}', "it is no JSON: "),
        ("json", b'{"a": ' + b"9" * 5000 + b"}", "it is no JSON: "),
        ("json", b'{"v": ' + b"[" * 500_000, "it is nested deeper than 255 levels"),
        ("json", b"\x81\xa1a\x01", "it is no JSON: "),
        ("json", b"[]", "it holds a list, not a message"),
        ("json", b"5", "it holds a int, not a message"),
    ],
)
def test_unreadable(serializer_format: SerializerFormat, body: bytes, words: str) -> None:
    """Bytes that are no message, or more than one, are Unreadable in words that say why, behind random bytes too."""
    with pytest.raises(Unreadable, match=words):
        read(payload_codec(serializer_format), body)
    with pytest.raises(Unreadable, match=words):
        read(payload_codec(serializer_format, random_prefix_length=3), b"\x80{}" + body)


@pytest.mark.parametrize("serializer_format", FORMATS)
@pytest.mark.parametrize("keys", [None, ["one"]])
def test_shorter_than_the_random_bytes(serializer_format: SerializerFormat, keys: list[str] | None) -> None:
    """A payload of less than the random bytes has no message behind them."""
    codec = payload_codec(serializer_format, random_prefix_length=12, symmetric_encryption_keys=keys)
    for payload in (b"", b"\x80", b"{}", b"x" * 11, b"x" * 12):
        with pytest.raises(Unreadable):
            read(codec, payload)


@given(st.sampled_from(FORMATS), st.binary())
def test_any_bytes(serializer_format: SerializerFormat, data: bytes) -> None:
    """Whatever stands in Redis is a message or Unreadable, and a message can be written again or is Unreadable then."""
    codec = payload_codec(serializer_format)
    for body in (data, b"\x81\xa1a" + data, b'{"a": ' + data + b"}"):
        try:
            message = codec.decode_body(body)
            assert repr(codec.decode_body(codec.encode_again(message))) == repr(message)  # NaN too
        except Unreadable:
            pass
    with pytest.raises(Unreadable):
        payload_codec(serializer_format, symmetric_encryption_keys=["one"]).unseal(data)


@given(messages, json_messages, st.binary(min_size=1), st.data())
def test_not_quite_a_message(
    message: dict[str, Any], json_message: dict[str, Any], junk: bytes, data: st.DataObject
) -> None:
    """A message that is cut anywhere, or followed by anything, is Unreadable."""
    for serializer_format in FORMATS:
        codec = payload_codec(serializer_format)
        one = json_message if serializer_format == "json" else message
        body = codec.encode(one)
        end = data.draw(st.integers(0, len(body) - 1))
        with pytest.raises(Unreadable):
            codec.decode_body(body[:end])
        if serializer_format == "msgpack" or junk.strip(b" \t\r\n"):
            with pytest.raises(Unreadable):
                codec.decode_body(body + junk)


@pytest.mark.parametrize("serializer_format", FORMATS)
def test_too_deep_to_be_written_again(serializer_format: SerializerFormat) -> None:
    """What can be read but not be written again, for it is nested too deep, is Unreadable then."""
    codec = payload_codec(serializer_format)
    with pytest.raises(Unreadable, match="it is nested too deep"):
        codec.encode_again(nested(100_000))
    if serializer_format == "msgpack":
        with pytest.raises(Unreadable, match="it is nested too deep"):
            codec.decode_body(b"\x81\xa1v" + b"\x91" * 300 + b"\x00")


def test_tokens_expire() -> None:
    """An encrypted payload is readable for expiry and 10 seconds more; without expiry, or with a longer one, it still is."""
    theirs = registry.get_serializer("msgpack", symmetric_encryption_keys=["one"])
    now = int(time.time())
    late, too_late, long_ago = (
        theirs.crypter.encrypt_at_time(msgpack.packb({"a": 1}), now - age) for age in (65, 75, 10**9)
    )
    codec = payload_codec(symmetric_encryption_keys=["one"], expiry=59.5)
    assert read(codec, late) == {"a": 1}
    for payload in (too_late, long_ago):
        with pytest.raises(Unreadable, match="it was not encrypted with a key of this layer, or too long ago"):
            read(codec, payload)
    assert read(payload_codec(symmetric_encryption_keys=["one"], expiry=120), too_late) == {"a": 1}
    assert read(payload_codec(symmetric_encryption_keys=["one"]), long_ago) == {"a": 1}


def test_the_wrong_key() -> None:
    """Without the right key nothing is readable: not with another one, not with none, nor what was not encrypted."""
    plain = payload_codec()
    body = plain.encode({"a": 1})
    one, other = (payload_codec(symmetric_encryption_keys=[key]) for key in ("one", "other"))
    for codec, payload in (
        (other, one.seal(body)),
        (one, body),
        (one, one.seal(body)[:-1]),
        (one, b"x" + one.seal(body)),
        (plain, one.seal(body)),
        (payload_codec("json"), one.seal(body)),
    ):
        with pytest.raises(Unreadable) as info:
            read(codec, payload)
        assert "one" not in str(info.value)


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({"v": b"x"}, r"message\['v'\] is b'x': JSON cannot carry bytes; use serializer_format='msgpack'"),
        ({"user": {"avatar": [0, b"x"]}}, r"message\['user'\]\['avatar'\]\[1\] is b'x': JSON cannot carry bytes"),
        ({"v": Raw(b"x")}, r"message\['v'\] is b'x': JSON cannot carry bytes"),
        ({"v": bytearray(b"x")}, r"message\['v'\] is .*b'x'.*: JSON cannot carry bytes"),
        ({"v": memoryview(b"x")}, r"message\['v'\] is .*: JSON cannot carry bytes"),
        ({"v": Level.LOW, "w": [b"x"]}, r"message\['w'\]\[0\] is b'x': JSON cannot carry bytes"),
        ({"v": 2**64}, "does not fit 64 bits"),
        ({"v": "\ud800"}, "not valid Unicode"),
        ({1: 2}, "message has the key 1, a int"),
        ({"__asgi_exclude__": []}, r"message\['__asgi_exclude__'\] is reserved"),
        ([], "a message must be a dict"),
    ],
)
def test_json_refuses(message: Any, words: str) -> None:
    """JSON carries what MessagePack does but bytes: those are refused with their place, whatever default= there is."""
    for default in (None, str):
        with pytest.raises(TypeError, match=words):
            PayloadCodec(1000, default, serializer_format="json").encode(message)


@pytest.mark.parametrize("serializer_format", FORMATS)
def test_subclasses_and_default_in_payloads(serializer_format: SerializerFormat) -> None:
    """Subclasses arrive as the plain type, and default= is asked once for each value, in both formats."""
    asked: list[object] = []

    def default(value: object) -> object:
        asked.append(value)
        return [str(value), Level.LOW]

    codec = PayloadCodec(1000, default, serializer_format=serializer_format)
    number = uuid.UUID(int=1)
    body = codec.encode({"v": (number, Colour.RED, {Text("k"): Real(1.5)}), "w": Level.LOW, "p": Point(1, None)})
    assert codec.decode_body(body) == {"v": [[str(number), 1], "red", {"k": 1.5}], "w": 1, "p": [1, None]}
    assert asked == [number]
    body = payload_codec().encode({"v": Raw(b"x"), "w": bytearray(b"y"), "x": memoryview(b"z")})
    assert payload_codec().decode_body(body) == {"v": b"x", "w": b"y", "x": b"z"}


def test_too_large_as_json() -> None:
    """max_message_size counts the bytes of the format that is written."""
    message = {"v": "\u00e9" * 50}
    size = len(json.dumps(message))
    assert PayloadCodec(size, None, serializer_format="json").encode(message) == json.dumps(message).encode()
    with pytest.raises(MessageTooLarge, match=f"is {size} bytes encoded; max_message_size of this layer is {size - 1}"):
        PayloadCodec(size - 1, None, serializer_format="json").encode(message)
    assert len(PayloadCodec(size - 1, None).encode(message)) < size
    with pytest.raises(MessageTooLarge, match="max_message_size of this layer is 40"):
        PayloadCodec(40, None).encode(message)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"serializer_format": "pickle"}, ValueError, "serializer_format must be 'msgpack' or 'json', not 'pickle'"),
        ({"symmetric_encryption_keys": "s3cret"}, TypeError, "must be a list of keys, even if there is only one"),
        ({"symmetric_encryption_keys": b"s3cret"}, TypeError, "must be a list of keys, even if there is only one"),
        ({"symmetric_encryption_keys": {"s3cret"}}, TypeError, "must be a list of keys"),
        ({"symmetric_encryption_keys": ["s3cret", ""]}, TypeError, "must be a str or bytes, and not empty"),
        ({"symmetric_encryption_keys": [b""]}, TypeError, "must be a str or bytes, and not empty"),
        ({"symmetric_encryption_keys": ["s3cret", None]}, TypeError, "must be a str or bytes, and not empty"),
        ({"symmetric_encryption_keys": [1]}, TypeError, "must be a str or bytes, and not empty"),
    ],
)
def test_refused_options(options: dict[str, Any], error: type[Exception], words: str) -> None:
    """A format that is none and keys that are none are refused; no key is in the error."""
    with pytest.raises(error, match=words) as info:
        PayloadCodec(1000, None, **options)
    assert "s3cret" not in str(info.value)


def test_keys_need_cryptography(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the package cryptography, keys are an ImportError that says what to install; no keys do not need it."""
    monkeypatch.setitem(sys.modules, "cryptography.fernet", None)
    with pytest.raises(ImportError, match=r"pip install 'anyio_channels\[encryption\]'"):
        payload_codec(symmetric_encryption_keys=["one"])
    assert read(payload_codec(), b"\x80") == {}
