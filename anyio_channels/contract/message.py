"""Messages to bytes and back: what a message may hold, and how large it may be.

Rules:
- a message is a ``dict`` with ``str`` keys; its values are ``str``, ``bytes``, ``int`` (64 bit), ``float``, ``bool``,
  ``None``, and lists and dicts of those. Tuples arrive as lists, ``bytearray`` and ``memoryview`` as ``bytes``, and
  an instance of a subclass (a ``StrEnum``, a ``SafeString``) as the plain type.
- anything else goes through the user's ``default`` once or is refused, with the place where it stands.
- encoding copies: what the sender does to its dict afterwards reaches nobody, and each decoding is a fresh dict.
- the bytes are MessagePack, or JSON where the user asks for it. What a message may hold is the same for both, but for
  ``bytes``, which JSON cannot carry.
- bytes from outside this process may be anything: whatever is not a message is an ``Unreadable``, and nothing else. The
  bounds of size and depth hold for them as for what is sent; the size is checked before anything is decoded.
- pure functions: no I/O, no state, safe in every thread.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from typing import Any, Final, Literal, TypeAlias

import ormsgpack
from ormsgpack import packb, unpackb

from anyio_channels.exceptions import MessageTooLarge
from anyio_channels.log import shown

__all__ = ["EXCLUDE_KEY", "MAX_DEPTH", "RESERVED_KEY", "Codec", "SerializerFormat", "Unreadable"]

SerializerFormat: TypeAlias = Literal["msgpack", "json"]
"""How messages look between processes."""
RESERVED_KEY: Final = "__asgi_channel__"
"""Redis layers put the full name of a process-specific channel under this key (channel layer specification)."""
EXCLUDE_KEY: Final = "__asgi_exclude__"
"""The Redis pub/sub layer puts the channels under this key that are to miss a broadcast."""

_STRICT: Final = (
    ormsgpack.OPT_PASSTHROUGH_DATACLASS
    | ormsgpack.OPT_PASSTHROUGH_DATETIME
    | ormsgpack.OPT_PASSTHROUGH_ENUM
    | ormsgpack.OPT_PASSTHROUGH_SUBCLASS
    | ormsgpack.OPT_PASSTHROUGH_UUID
)
MAX_DEPTH: Final = 255
"""How deep lists and dicts may nest, the message itself included."""
_RULE: Final = (
    "a message holds str, bytes, int (64 bit), float, bool, None, and lists and dicts (with str keys) of those; "
    "give the layer default= to convert other types"
)


class Codec:
    """How one layer turns messages into bytes."""

    __slots__ = ("_default", "_is_json", "_max_size", "decode")

    decode: Callable[[bytes], dict[str, Any]]
    """Return a fresh message from bytes that ``encode`` made, or that ``decode_body`` has read before."""

    def __init__(
        self,
        max_message_size: int,
        default: Callable[[Any], Any] | None,
        *,
        serializer_format: SerializerFormat = "msgpack",
    ) -> None:
        """``max_message_size`` is in encoded bytes; ``default`` converts a value that a message may not hold."""
        if serializer_format not in ("msgpack", "json"):
            raise ValueError(f"serializer_format must be 'msgpack' or 'json', not {serializer_format!r}")
        self._max_size = max_message_size
        self._default = default
        self._is_json = serializer_format == "json"
        self.decode = json.loads if self._is_json else unpackb

    def encode(self, message: dict[str, Any]) -> bytes:
        """Return the bytes of ``message``, or raise ``TypeError`` or ``MessageTooLarge``."""
        if not isinstance(message, dict):
            raise TypeError(f"a message must be a dict, not {shown(message)}")
        if RESERVED_KEY in message or EXCLUDE_KEY in message:
            key = RESERVED_KEY if RESERVED_KEY in message else EXCLUDE_KEY
            raise TypeError(f"message[{key!r}] is reserved for the layers and cannot be sent")
        try:
            data = packb(message, None, _STRICT)
        except TypeError:
            # Exact types are the common case and take one call. The walk serves subclasses and default=, and is the one
            # place that knows where in the message the trouble is.
            data = packb(self._plain(message, "message", 0), None, _STRICT)
        if self._is_json:
            # MessagePack is the judge of what a message may hold; JSON refuses only bytes as well.
            try:
                data = json.dumps(message).encode()
            except TypeError:
                # What default= returned is in data already; it is asked only once.
                data = json.dumps(self._plain(unpackb(data), "message", 0)).encode()
        if len(data) > self._max_size:
            raise MessageTooLarge(
                f"the message is {len(data)} bytes encoded; max_message_size of this layer is {self._max_size}"
            )
        return data

    def address(self, body: bytes, key: str, names: str | list[str]) -> bytes:
        """Return ``body`` with ``names`` under the reserved ``key``, without encoding the message again."""
        return self.before_names(body, key) + self.names(names)

    def before_names(self, body: bytes, key: str) -> bytes:
        """Return the part of ``address(body, key, names)`` that is the same whatever the names; ``names()`` is the rest."""
        if self._is_json:
            separator = b", " if len(body) > len(b"{}") else b""
            return body[:-1] + separator + json.dumps(key).encode() + b": "
        first = body[0]
        if first <= 0x8F:  # noqa: PLR2004 - a map of up to 15 entries (https://github.com/msgpack/msgpack/blob/master/spec.md)
            size, start = first & 0x0F, 1
        else:
            start = 3 if first == 0xDE else 5  # noqa: PLR2004 - map 16, map 32
            size = int.from_bytes(body[1:start], "big")
        size += 1
        if size <= 15:  # noqa: PLR2004
            head = bytes((0x80 | size,))
        elif size <= 0xFFFF:  # noqa: PLR2004
            head = b"\xde" + size.to_bytes(2, "big")
        else:
            head = b"\xdf" + size.to_bytes(4, "big")
        return head + body[start:] + packb(key)

    def names(self, names: str | list[str]) -> bytes:
        """Return the last part of ``address(body, key, names)``, behind ``before_names()``."""
        return json.dumps(names).encode() + b"}" if self._is_json else packb(names)

    def decode_body(self, body: bytes) -> dict[str, Any]:
        """Return a fresh message from a body, reserved keys and all, or raise ``Unreadable``."""
        if len(body) > self._max_size:
            self._require_size(body)
        if self._is_json and body.count(b"[") + body.count(b"{") > MAX_DEPTH:
            _require_depth(body)
        try:
            # A sentinel behind the body shows whether the body ends where it should: unpackb() does not look.
            message = json.loads(body) if self._is_json else _unpack_whole(body)
        except (ValueError, RecursionError) as error:
            raise Unreadable(f"it is no {'JSON' if self._is_json else 'MessagePack'}: {error}") from error
        if not isinstance(message, dict):
            raise Unreadable(f"it holds a {type(message).__name__}, not a message")
        if not self._is_json and len(body) - len(body.translate(None, _OPENS)) > MAX_DEPTH:
            self.encode_again(message)  # it may be nested deeper than that; whoever packs it sees
        return message

    def _require_size(self, body: bytes) -> None:
        """Raise ``Unreadable`` unless what makes ``body`` larger than a message may be is the names it is addressed to."""
        # max_message_size does not count them. They are the last entry, as we and channels_redis write it.
        size = max(body.rfind(RESERVED_KEY.encode()), body.rfind(EXCLUDE_KEY.encode()))
        if size == -1 or (_JSON_NAMES if self._is_json else _NAMES).fullmatch(body, size) is None:
            size = len(body) + _KEY_COSTS
        if size > self._max_size + _KEY_COSTS:
            raise Unreadable(f"it is {len(body)} bytes encoded; max_message_size of this layer is {self._max_size}")

    def encode_again(self, message: dict[str, Any]) -> bytes:
        """Return the body of a message that came out of Redis, or raise ``Unreadable``: not all that is read can be written."""
        try:
            return json.dumps(message).encode() if self._is_json else packb(message)
        except (TypeError, RecursionError) as error:
            raise Unreadable(f"it is nested too deep: {error}") from error

    def _plain_bytes(self, value: bytes | bytearray | memoryview, where: str) -> bytes:
        if self._is_json:
            raise TypeError(f"{where} is {shown(value)}: JSON cannot carry bytes; use serializer_format='msgpack'")
        return bytes(value)

    def _plain(self, value: Any, where: str, depth: int) -> Any:  # noqa: C901, PLR0911 - one case for each type
        if depth > MAX_DEPTH or (depth == MAX_DEPTH and isinstance(value, list | tuple | dict)):
            raise TypeError(f"{where[:80]}... is nested deeper than {MAX_DEPTH} levels; no layer carries that")
        match value:
            case None | bool():
                return value
            case str():
                return _plain_str(value, where)
            case int():
                if not -(2**63) <= value < 2**64:
                    raise TypeError(f"{where} is {shown(value)}, which does not fit 64 bits; {_RULE}")
                return int.__int__(value)
            case float():
                return float.__float__(value)
            case bytes() | bytearray() | memoryview():
                return self._plain_bytes(value, where)
            case list() | tuple():
                return [self._plain(item, f"{where}[{index}]", depth + 1) for index, item in enumerate(value)]
            case dict():
                return {
                    _plain_key(key, where): self._plain(item, f"{where}[{key!r}]", depth + 1)
                    for key, item in value.items()
                }
        if self._default is None:
            raise TypeError(f"{where} is {shown(value)}, a {type(value).__qualname__}: {_RULE}")
        try:
            converted = self._default(value)
        except TypeError as error:
            raise TypeError(
                f"{where} is {shown(value)}, a {type(value).__qualname__}, and default= refused it: {error}"
            ) from error
        return self._plain(converted, where, depth + 1)


def _plain_str(value: str, where: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise TypeError(f"{where} is {shown(value)}, which is not valid Unicode: {error.reason}") from error
    return str.__str__(value)


def _plain_key(key: object, where: str) -> str:
    if not isinstance(key, str):
        raise TypeError(f"{where} has the key {shown(key)}, a {type(key).__qualname__}: {_RULE}")
    return _plain_str(key, f"a key of {where}")


class Unreadable(Exception):  # noqa: N818 - what the bytes are
    """These bytes are no message of ours; the text says why."""


_OPENS: Final = bytes([*range(0x80, 0xA0), *range(0xDC, 0xE0)])
"""What a map or a list begins with in MessagePack; text and numbers may hold these bytes too."""
_KEY_COSTS: Final = 3
"""At most so many bytes stand between a message and a reserved key behind it: a longer header, a separator."""
_NAMES: Final = re.compile(
    rb"__asgi_(?:channel|exclude)__(?:[\x90-\x9f]|\xdc..|\xdd....)?(?:(?:[\xa0-\xbf]|\xd9[\0-\x63])[\w.!-]{1,99}+)*+",
    re.DOTALL,
)
_JSON_NAMES: Final = re.compile(rb'__asgi_(?:channel|exclude)__": *+\[?(?:"[\w.!-]{1,99}+"[, ]*+)*+\]?\}')
"""A reserved key with names of channels, to the end of a body."""
_STRING: Final = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)
_BRACKET: Final = re.compile(rb"[\[\]{}]")


def _require_depth(body: bytes) -> None:
    """Raise ``Unreadable`` for JSON nested deeper than ``MAX_DEPTH``, whatever the depth of the stack here or at the reader."""
    depth = 0
    for bracket in _BRACKET.findall(_STRING.sub(b"", body)):
        depth += 1 if bracket in b"[{" else -1
        if depth > MAX_DEPTH:
            raise Unreadable(f"it is nested deeper than {MAX_DEPTH} levels")


_END: Final = os.urandom(16)
"""Random, so it cannot occur in a message."""
_SENTINEL: Final = packb(_END)


def _unpack_whole(body: bytes) -> Any:
    # A list of the body and a sentinel: bytes behind a whole message would stand in the place of the sentinel.
    value, sentinel = unpackb(b"\x92" + body + _SENTINEL)
    if sentinel != _END:
        raise ValueError("bytes follow the message")
    return value
