"""Message to bytes and back: what a message may hold, how large it may be, and how it looks in Redis.

Rules:
- a message is a ``dict`` with ``str`` keys; its values are ``str``, ``bytes``, ``int`` (64 bit), ``float``, ``bool``,
  ``None``, and lists and dicts of those. Tuples arrive as lists, ``bytearray`` and ``memoryview`` as ``bytes``, and
  an instance of a subclass (a ``StrEnum``, a ``SafeString``) as the plain type.
- anything else goes through the user's ``default`` once or is refused, with the place where it stands.
- encoding copies: what the sender does to its dict afterwards reaches nobody, and each decoding is a fresh dict.
- in Redis a message is a payload: MessagePack or JSON, encrypted if there are keys, behind random bytes if it goes into a
  sorted set. These are the bytes of channels_redis 4.3 (https://github.com/django/channels_redis).
- what comes out of Redis may be anybody's bytes: all that is no message of ours is an ``Unreadable``, nothing else.
- pure functions: no I/O, no state, safe in every thread.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import reprlib
from collections.abc import Callable, Sequence
from typing import Any, Final, Literal, Protocol, TypeAlias

import ormsgpack
from ormsgpack import packb, unpackb

from anyio_channels.exceptions import MessageTooLarge

__all__ = ["EXCLUDE_KEY", "MAX_DEPTH", "RESERVED_KEY", "Codec", "PayloadCodec", "SerializerFormat", "Unreadable"]

SerializerFormat: TypeAlias = Literal["msgpack", "json"]
"""How messages look in Redis."""
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
"""How many lists and dicts may stand in one another, the message among them."""
_RULE: Final = (
    "a message holds str, bytes, int (64 bit), float, bool, None, and lists and dicts (with str keys) of those; "
    "give the layer default= to convert other types"
)


class Codec:
    """How one layer turns messages into bytes."""

    __slots__ = ("_default", "_max_size")

    decode: Final[Callable[[bytes], dict[str, Any]]] = staticmethod(unpackb)
    """Return a fresh message from bytes that ``encode`` made."""

    def __init__(self, max_message_size: int, default: Callable[[Any], Any] | None) -> None:
        """``max_message_size`` is in encoded bytes; ``default`` converts a value that no message may hold."""
        self._max_size = max_message_size
        self._default = default

    def encode(self, message: dict[str, Any]) -> bytes:
        """Return the MessagePack bytes of ``message``, or raise ``TypeError`` or ``MessageTooLarge``."""
        if not isinstance(message, dict):
            raise TypeError(f"a message must be a dict, not {reprlib.repr(message)}")
        if RESERVED_KEY in message or EXCLUDE_KEY in message:
            key = RESERVED_KEY if RESERVED_KEY in message else EXCLUDE_KEY
            raise TypeError(f"message[{key!r}] is reserved for the layers and cannot be sent")
        try:
            data = packb(message, None, _STRICT)
        except TypeError:
            # Exact types are the common case and take one call; the walk serves subclasses and default=,
            # and is the one place that knows where in the message the trouble is.
            data = packb(self._plain(message, "message", 0), None, _STRICT)
        if len(data) > self._max_size:
            raise self._too_large(data)
        return data

    def _too_large(self, data: bytes) -> MessageTooLarge:
        return MessageTooLarge(
            f"the message is {len(data)} bytes encoded; max_message_size of this layer is {self._max_size}"
        )

    def _plain_bytes(self, value: bytes | bytearray | memoryview, where: str) -> bytes:  # noqa: ARG002 - JSON refuses it
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
                    raise TypeError(f"{where} is {reprlib.repr(value)}, which does not fit 64 bits; {_RULE}")
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
            raise TypeError(f"{where} is {reprlib.repr(value)}, a {type(value).__qualname__}: {_RULE}")
        try:
            converted = self._default(value)
        except TypeError as error:
            raise TypeError(
                f"{where} is {reprlib.repr(value)}, a {type(value).__qualname__}, and default= refused it: {error}"
            ) from error
        return self._plain(converted, where, depth + 1)


def _plain_str(value: str, where: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise TypeError(f"{where} is {reprlib.repr(value)}, which is not valid Unicode: {error.reason}") from error
    return str.__str__(value)


def _plain_key(key: object, where: str) -> str:
    if not isinstance(key, str):
        raise TypeError(f"{where} has the key {reprlib.repr(key)}, a {type(key).__qualname__}: {_RULE}")
    return _plain_str(key, f"a key of {where}")


class Unreadable(Exception):  # noqa: N818 - what the bytes are
    """These bytes are no message of ours; the text says why."""


class _Crypter(Protocol):
    def encrypt(self, msg: bytes) -> bytes: ...
    def decrypt(self, msg: bytes, ttl: int | None = None) -> bytes: ...


class PayloadCodec(Codec):
    """How one Redis layer turns messages into payloads.

    ``encode`` gives the body of a message, ``address`` adds the channels it is for, ``seal`` encrypts it and makes it unique;
    ``unseal`` and ``decode_body`` are the way back. A body is what ``max_message_size`` counts.
    """

    __slots__ = ("_crypter", "_is_json", "_prefix_length", "_ttl")

    def __init__(
        self,
        max_message_size: int,
        default: Callable[[Any], Any] | None,
        *,
        serializer_format: SerializerFormat = "msgpack",
        symmetric_encryption_keys: Sequence[str | bytes] | None = None,
        random_prefix_length: int = 0,
        expiry: float | None = None,
    ) -> None:
        """Take the options of a Redis layer.

        ``random_prefix_length``: bytes in front of a payload. ``expiry``: seconds; an encrypted payload is readable for that
        and ten seconds more, for the clocks of two machines differ.
        """
        super().__init__(max_message_size, default)
        if serializer_format not in ("msgpack", "json"):
            raise ValueError(f"serializer_format must be 'msgpack' or 'json', not {serializer_format!r}")
        self._is_json = serializer_format == "json"
        self._crypter = _make_crypter(symmetric_encryption_keys)
        self._prefix_length = random_prefix_length
        self._ttl = None if expiry is None else math.ceil(expiry) + 10

    def encode(self, message: dict[str, Any]) -> bytes:
        """Return the body of ``message``, or raise ``TypeError`` or ``MessageTooLarge``."""
        data = super().encode(message)
        if not self._is_json:
            return data
        # MessagePack was the judge of what a message may hold; JSON only refuses bytes besides. A message that is too large
        # in one is so in the other, but for numbers and escapes.
        try:
            data = json.dumps(message).encode()
        except TypeError:
            # What default= made is in data already, and it is asked once.
            data = json.dumps(self._plain(unpackb(data), "message", 0)).encode()
        if len(data) > self._max_size:
            raise self._too_large(data)
        return data

    def address(self, body: bytes, key: str, names: str | list[str]) -> bytes:
        """Return ``body`` with ``names`` under the reserved ``key``, without encoding the message again."""
        if self._is_json:
            separator = b", " if len(body) > len(b"{}") else b""
            return body[:-1] + separator + json.dumps({key: names}).encode()[1:]
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
        return head + body[start:] + packb(key) + packb(names)

    def seal(self, body: bytes, prefix: bytes | None = None) -> bytes:
        """Return the payload for ``body``, a different one at each call if there are keys or a random prefix.

        ``prefix``: as long as the random prefix, to be used in its place.
        """
        if self._crypter is not None:
            body = self._crypter.encrypt(body)
        # Not the module random: its state is the same in two processes after a fork, and equal payloads are one to Redis.
        if self._prefix_length:
            return (os.urandom(self._prefix_length) if prefix is None else prefix) + body
        return body

    def unseal(self, payload: bytes) -> bytes:
        """Return the body in ``payload``, or raise ``Unreadable``."""
        if self._prefix_length:
            payload = payload[self._prefix_length :]
        if self._crypter is None:
            return payload
        from cryptography.fernet import InvalidToken  # noqa: PLC0415 - there, or there would be no crypter

        try:
            return self._crypter.decrypt(payload, self._ttl)
        except (InvalidToken, TypeError) as error:
            raise Unreadable("it was not encrypted with a key of this layer, or too long ago") from error

    def decode_body(self, body: bytes) -> dict[str, Any]:
        """Return a fresh message from a body, reserved keys and all, or raise ``Unreadable``."""
        try:
            # A sentinel behind the body shows whether the body ends where it should: unpackb() does not look.
            message = json.loads(body) if self._is_json else _unpack_whole(body)
        except (ValueError, RecursionError) as error:
            raise Unreadable(f"it is no {'JSON' if self._is_json else 'MessagePack'}: {error}") from error
        if not isinstance(message, dict):
            raise Unreadable(f"it holds a {type(message).__name__}, not a message")
        return message

    @property
    def decode_copy(self) -> Callable[[bytes], dict[str, Any]]:
        """What returns a fresh message from a body that was decoded once before, so that it is known to be one."""
        return json.loads if self._is_json else unpackb

    def encode_again(self, message: dict[str, Any]) -> bytes:
        """Return the body of a message that came out of Redis, or raise ``Unreadable``: not all that is read can be written."""
        try:
            return json.dumps(message).encode() if self._is_json else packb(message)
        except (TypeError, RecursionError) as error:
            raise Unreadable(f"it is nested too deep: {error}") from error

    def _plain_bytes(self, value: bytes | bytearray | memoryview, where: str) -> bytes:
        if self._is_json:
            raise TypeError(
                f"{where} is {reprlib.repr(value)}: JSON cannot carry bytes; use serializer_format='msgpack'"
            )
        return bytes(value)


_END: Final = os.urandom(16)
"""Nobody can know it, so it stands in no body."""
_SENTINEL: Final = packb(_END)


def _unpack_whole(body: bytes) -> Any:
    # A list of the body and a sentinel: bytes behind a whole message would stand in the place of the sentinel.
    value, sentinel = unpackb(b"\x92" + body + _SENTINEL)
    if sentinel != _END:
        raise ValueError("bytes follow the message")
    return value


def _make_crypter(keys: Sequence[str | bytes] | None) -> _Crypter | None:
    if keys is None:
        return None
    if isinstance(keys, str | bytes) or not isinstance(keys, Sequence):
        raise TypeError("symmetric_encryption_keys must be a list of keys, even if there is only one")
    if not keys:
        return None
    if not all(isinstance(key, str | bytes) and key for key in keys):
        raise TypeError("each of symmetric_encryption_keys must be a str or bytes, and not empty")
    try:
        from cryptography.fernet import Fernet, MultiFernet  # noqa: PLC0415 - an optional dependency
    except ImportError as error:
        raise ImportError(
            "symmetric_encryption_keys needs cryptography: pip install 'anyio_channels[encryption]'"
        ) from error
    return MultiFernet(
        [
            Fernet(base64.urlsafe_b64encode(hashlib.sha256(key.encode() if isinstance(key, str) else key).digest()))
            for key in keys
        ]
    )
