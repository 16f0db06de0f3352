"""The bytes of channels_redis 4.3: payloads, and the name of every key and Redis channel, in one place.

Rules:
- a *body* is an encoded message (``contract.message``); a *payload* is what Redis sees of it: encrypted if there are keys,
  behind random bytes if it goes into a sorted set, where equal entries would be one.
- queue layer: the key of a channel is ``prefix`` and its non-local name, of a group ``prefix:group:NAME``. What only we
  keep has names that channels_redis does not use: ``prefix:prefix``, ``:wake:``, ``:waiting:{KEY}``, ``:sent:{KEY}``; those
  with braces share the slot of KEY in a cluster.
- pub/sub layer: the Redis channel of a channel is its name, of a group ``prefix__group__NAME``.
- a prefix shows itself by the keys that name a group, mark the prefix as used, or live for moments; never by the key of a
  channel, which may just as well be that of a longer name under a shorter prefix.
- pure functions: no I/O.
"""

from __future__ import annotations

import base64
import hashlib
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, Protocol

from anyio_channels.contract.message import Codec, SerializerFormat, Unreadable

__all__ = [
    "Names",
    "PayloadCodec",
    "glob_escaped",
    "group_names",
    "keys_of",
    "odd_keys",
    "other_prefixes",
    "prefixes_of_groups",
    "shown_prefixes",
]


class Names:
    """The names of keys and Redis channels under one prefix."""

    __slots__ = ("_group", "_room", "_sent", "group_topic_start", "mark", "prefix")

    def __init__(self, prefix: str) -> None:
        """``prefix``: of all keys."""
        self.prefix: str = prefix
        self._group = f"{prefix}:group:"
        self._room = f"{prefix}:waiting:{{"
        self._sent = f"{prefix}:sent:{{"
        self.mark: str = f"{prefix}:prefix"
        """The key that marks the prefix as used, so that flushing a shorter prefix spares its keys."""
        self.group_topic_start: str = f"{prefix}__group__"

    def channel(self, name: str) -> str:
        """Return the key that holds the messages of the channel ``name``, and of all channels of its process."""
        head, mark, _ = name.partition("!")
        return self.prefix + head + mark

    def group(self, name: str) -> str:
        """Return the key that holds the members of the group ``name``."""
        return self._group + name

    def group_topic(self, name: str) -> str:
        """Return the Redis channel of the group ``name`` in the pub/sub layer."""
        return self.group_topic_start + name

    def room(self, key: str) -> str:
        """Return the name that says that somebody waits for room in the channel with ``key``; in the same slot as that."""
        return f"{self._room}{key}}}"

    def sent(self, key: str) -> str:
        """Return the Redis channel that tells readers that something was sent to ``key``, in a cluster; in its slot."""
        return f"{self._sent}{key}}}"

    def key_of_room(self, name: str) -> str | None:
        """Return the key that ``name`` was made from by ``room``, if it was."""
        return name[len(self._room) : -1] if name.startswith(self._room) else None

    def key_of_sent(self, name: str) -> str | None:
        """Return the key that ``name`` was made from by ``sent``, if it was."""
        return name[len(self._sent) : -1] if name.startswith(self._sent) else None

    def routed_by(self, key: str) -> str:
        """Return what several servers share keys by: the non-local name of a channel, or the name of a group."""
        return key[len(self._group) :] if key.startswith(self._group) else key[len(self.prefix) :]

    def wake(self, client: str) -> str:
        """Return the key by which the process ``client`` ends its own blocking pop."""
        return f"{self.prefix}:wake:{client}"


class _Crypter(Protocol):
    def encrypt(self, msg: bytes) -> bytes: ...
    def decrypt(self, msg: bytes, ttl: int | None = None) -> bytes: ...


class PayloadCodec(Codec):
    """How one layer on Redis turns messages into payloads.

    ``encode`` gives the body of a message, ``address`` adds the channels it is for, ``seal`` encrypts it and makes it
    unique; ``unseal`` and ``decode_body`` are the way back. ``max_message_size`` counts the body.
    """

    __slots__ = ("_crypter", "_prefix_length", "_ttl")

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
        """Take the options of a layer on Redis.

        ``random_prefix_length``: bytes in front of a payload. ``expiry``: seconds; an encrypted payload is readable for
        that long and ten seconds more, because the clocks of two machines differ.
        """
        super().__init__(max_message_size, default, serializer_format=serializer_format)
        self._crypter = _make_crypter(symmetric_encryption_keys)
        self._prefix_length = random_prefix_length
        self._ttl = None if expiry is None else math.ceil(expiry) + 10

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

    def seal_each(
        self, body: bytes, key: str, addressees: Iterable[list[str]]
    ) -> tuple[bytes, list[tuple[bytes, bytes]]]:
        """Return the payloads for ``body``, each with other names under ``key``, without a copy of it for each.

        They come as the bytes that all have in common, and for each what is before and behind those. With encryption keys they
        have nothing in common: each is encrypted as a whole.
        """
        if self._crypter is not None:
            return b"", [(self.seal(self.address(body, key, names)), b"") for names in addressees]
        return self.before_names(body, key), [(os.urandom(self._prefix_length), self.names(one)) for one in addressees]

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


# What lies under a prefix: on what SCAN and PUBSUB CHANNELS return

_OTHER_PREFIX: Final = re.compile(rb"([^:].*?):(?:group:|waiting:|wake:|sent:|prefix(?:$|:\{))")
_SHOWN: Final = re.compile(rb"(.+?):(?:group:|prefix(?:$|:\{))")
_GROUP: Final = re.compile(rb"(.+?)__group__(.+)")
_OURS: Final = re.compile(
    rb"[\w.-]+(?:!)?|:group:[\w.-]+|:prefix(?:|:\{\d+\})|:(?:wake|waiting|sent):.*", re.ASCII | re.DOTALL
)


def glob_escaped(text: str) -> str:
    """Return the pattern that matches ``text`` and nothing else."""
    return re.sub(r"([*?\[\]\\^])", r"\\\1", text)


def other_prefixes(prefix: bytes, found: Iterable[bytes]) -> set[bytes]:
    """Return the longer prefixes that show themselves among the keys ``found``, which all begin with ``prefix``."""
    return {prefix + match[1] for key in found if (match := _OTHER_PREFIX.match(key[len(prefix) :]))}


def keys_of(prefix: bytes, found: set[bytes]) -> list[bytes]:
    """Return the keys that belong to ``prefix`` and to no longer one that shows itself among them."""
    rests = _rests(prefix, found).items()
    return [key for key, rest in rests if rest.startswith(b":group:") or b":" not in rest]


def _rests(prefix: bytes, found: Iterable[bytes]) -> dict[bytes, bytes]:
    """Return what comes behind ``prefix`` in those of ``found`` that belong to no longer one."""
    others = tuple(other_prefixes(prefix, found))
    return {key: key[len(prefix) :] for key in found if not key.startswith(others)}


def shown_prefixes(found: Iterable[bytes]) -> set[bytes]:
    """Return the prefixes of the queue layer that show themselves among ``found``, keys of whatever prefix."""
    return {match[1] for key in found if (match := _SHOWN.match(key))}


def prefixes_of_groups(found: Iterable[bytes]) -> set[bytes]:
    """Return the prefixes of the pub/sub layer that show themselves among ``found``, names of Redis channels."""
    return {match[1] for name in found if (match := _GROUP.fullmatch(name))}


def group_names(prefix: bytes, found: Iterable[bytes]) -> dict[bytes, bytes]:
    """Return those of ``found``, names of Redis channels, that are groups of ``prefix``, with the names of the groups."""
    start = prefix + b"__group__"
    return {name: name[len(start) :] for name in found if name.startswith(start)}


def odd_keys(prefix: bytes, found: set[bytes]) -> set[bytes]:
    """Return those of ``found``, which begin with ``prefix``, that no layer of it makes, nor one of a longer prefix."""
    return {key for key, rest in _rests(prefix, found).items() if _OURS.fullmatch(rest) is None}
