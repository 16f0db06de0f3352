"""Message to bytes and back: what a message may hold, and how large it may be.

Rules:
- a message is a ``dict`` with ``str`` keys; its values are ``str``, ``bytes``, ``int`` (64 bit), ``float``, ``bool``,
  ``None``, and lists and dicts of those. Tuples arrive as lists, ``bytearray`` and ``memoryview`` as ``bytes``, and
  an instance of a subclass (a ``StrEnum``, a ``SafeString``) as the plain type.
- anything else goes through the user's ``default`` once or is refused, with the place where it stands.
- encoding copies: what the sender does to its dict afterwards reaches nobody, and each decoding is a fresh dict.
- pure functions: no I/O, no state, safe in every thread.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable
from typing import Any, Final

import ormsgpack
from ormsgpack import packb, unpackb

from anyio_channels.exceptions import MessageTooLarge

__all__ = ["MAX_DEPTH", "Codec"]

RESERVED_KEY: Final = "__asgi_channel__"
"""Redis layers put the full name of a process-specific channel under this key (channel layer specification)."""

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
        if RESERVED_KEY in message:
            raise TypeError(f"message[{RESERVED_KEY!r}] is reserved for the layers and cannot be sent")
        try:
            data = packb(message, None, _STRICT)
        except TypeError:
            # Exact types are the common case and take one call; the walk serves subclasses and default=,
            # and is the one place that knows where in the message the trouble is.
            data = packb(self._plain(message, "message", 0), None, _STRICT)
        if len(data) > self._max_size:
            raise MessageTooLarge(
                f"the message is {len(data)} bytes encoded; max_message_size of this layer is {self._max_size}"
            )
        return data

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
                return bytes(value)
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
