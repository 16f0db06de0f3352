"""What goes wrong with Redis, as exceptions of the ``redis`` package, and what time cures.

Rules:
- an error reply becomes the class that the ``redis`` package has for it; its text names the server.
- a reply that will not come is a ``ConnectionLost``, which says whether the command may have run.
- three questions have three answers, each defined here and nowhere else: whether a new server will be ready soon
  (``NOT_READY``), whether a command that did not run may be sent again (``MAY_SEND_AGAIN``), and whether a refusal is about
  one key or Redis channel (``ABOUT_ONE_NAME``). Every other refusal, known or not, is an outage: readers wait.
- a refusal that is about a key or Redis channel names those that were asked for, which Redis does not.
- what to do about a server of another kind is worded here, once: opening a layer says it, and so does the check-up.
"""

from __future__ import annotations

import re
import ssl
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

import redis.exceptions

IF_TLS: Final = "if the port is for TLS, use rediss:// or ssl=True"
IF_NOT_TLS: Final = "if the port is not for TLS, use redis:// or ssl=False"
IF_UNTRUSTED: Final = "check that its certificate is trusted (?ssl_ca_certs=/path/ca.pem) and is for this host name"
RESP3_NEEDED: Final = "Redis 6.2 or newer is needed, or Valkey; a proxy in between must speak RESP3"
NO_SENTINELS: Final = "a Redis Cluster needs no sentinels: hosts names some of its nodes"
NO_CLUSTER: Final = "it is not a cluster: use redis:// instead of redis+cluster://"


class Shown(redis.exceptions.RedisError):
    """An error whose ``repr`` has its text: that of redis 8 has only a category and the name of the class."""

    def __repr__(self) -> str:
        return Exception.__repr__(self)


class Unreachable(Shown, redis.exceptions.ConnectionError):
    """A server cannot be used now."""


class HandshakeEndedError(OSError):
    """A server closed a connection on which TLS was being agreed on."""


class NotRESP3(Unreachable):
    """A server does not speak RESP3."""


class ClusterNodeError(Shown, redis.exceptions.ResponseError):
    """A server that was taken for one that stands alone is a node of a cluster."""


class WrongTypeError(redis.exceptions.ResponseError):
    """A key holds something else than the command is for."""


def _shown(kind: type[redis.exceptions.RedisError]) -> type[redis.exceptions.RedisError]:
    return type(kind.__name__, (Shown, kind), {"__module__": kind.__module__, "__doc__": kind.__doc__})


_KINDS: Final[dict[str, type[redis.exceptions.RedisError]]] = {
    "ASK": redis.exceptions.AskError,
    "CLUSTERDOWN": redis.exceptions.ClusterDownError,
    "CROSSSLOT": redis.exceptions.ClusterCrossSlotError,
    "LOADING": redis.exceptions.BusyLoadingError,
    "MASTERDOWN": redis.exceptions.MasterDownError,
    "MOVED": redis.exceptions.MovedError,
    "NOAUTH": redis.exceptions.AuthenticationError,
    "NOPERM": redis.exceptions.NoPermissionError,
    "NOSCRIPT": redis.exceptions.NoScriptError,
    "OOM": redis.exceptions.OutOfMemoryError,
    "READONLY": redis.exceptions.ReadOnlyError,
    "TRYAGAIN": redis.exceptions.TryAgainError,
    "WRONGPASS": redis.exceptions.AuthenticationError,
    "WRONGTYPE": WrongTypeError,
}
_ERRORS: Final = {code: _shown(kind) for code, kind in _KINDS.items()}
_OTHER: Final = _shown(redis.exceptions.ResponseError)
_IN_SCRIPT: Final = re.compile(r"(ACL failure in script|The user executing the script)|: -?(NOPERM|WRONGTYPE) ")
"""How an error with the code ERR says that a command in a script was refused; the latter two are Redis 6's words."""
_TLS_ALERT: Final = r'got "\x15"'
"""How hiredis says that what came begins as an alert of TLS does."""
_OF_LOGIN: Final = re.compile(r"AUTH|[Cc]lient name|password")
"""What HELLO is refused with that is about its own arguments."""
_OF_ONE_NAME: Final = frozenset(
    {"EXISTS", "PEXPIRE", "PUBLISH", "SPUBLISH", "ZADD", "ZCOUNT", "ZRANGE", "ZRANGEBYSCORE", "ZREM"}
)
"""Commands whose first argument is a key or a Redis channel."""
_SHOWN: Final = 3


class ConnectionLost(Unreachable):
    """The reply will not come; the text says which server, why, and whether the command may have run."""

    def __init__(self, text: str, *, may_have_run: bool) -> None:
        """``may_have_run``: whether the command had been handed to the operating system."""
        super().__init__(f"{text}; " + ("the command may have run" if may_have_run else "the command was not sent"))
        self.why: str = text
        self.may_have_run: bool = may_have_run


class ConnectionTimeout(ConnectionLost, redis.exceptions.TimeoutError):
    """The reply will not come: the server did not answer in time."""


class LinkRetired(ConnectionLost):
    """The link is not used any more: ask the router for another one."""


_PASSING: Final = (redis.exceptions.ClusterDownError, redis.exceptions.TryAgainError)  # the first is MASTERDOWN's too
NOT_READY: Final = (redis.exceptions.BusyLoadingError, *_PASSING)
"""Refusals of a handshake that only mean *not yet*. ``READONLY`` is not among them: a replica stays one."""
MAY_SEND_AGAIN: Final = (*_PASSING, redis.exceptions.ReadOnlyError, LinkRetired)
"""The command did not run, and the node that owns its key, which may be another one by now, will take it."""
ABOUT_ONE_NAME: Final = (redis.exceptions.NoPermissionError, WrongTypeError)
"""Only this key or Redis channel is refused, and waiting does not cure it: whoever reads it is told, and nobody else."""


def is_refusal(error: Exception) -> bool:
    """Whether a server refused a new connection in a way that waiting does not cure."""
    return isinstance(error, ssl.SSLError | NotRESP3) or (
        isinstance(error, redis.exceptions.ResponseError | redis.exceptions.AuthenticationError)
        and not isinstance(error, NOT_READY)
        and "BUSY" not in str(error)  # a script that runs long; it has no class of its own
    )


def says_nothing(error: BaseException) -> bool:
    """Whether there was no answer in time, and nothing else is known."""
    return isinstance(error, TimeoutError) and not str(error)


def what_may_be_wrong(error: BaseException, *, tls: bool) -> str:
    """Return what to do about ``error``, with which a new connection ended, if it tells that; ``tls``: whether it had TLS."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return IF_UNTRUSTED
    if "cluster support disabled" in str(error):
        return NO_CLUSTER
    if tls:
        return IF_NOT_TLS if isinstance(error, ssl.SSLError | HandshakeEndedError) or says_nothing(error) else ""
    if not isinstance(error, ConnectionLost) or isinstance(error, ConnectionTimeout):
        return ""
    cause = error.__cause__
    if cause is None or isinstance(cause, OSError) or _TLS_ALERT in str(cause):
        return IF_TLS
    return RESP3_NEEDED


def not_resp3(error: redis.exceptions.ResponseError, text: str) -> str | None:
    """Return what a server does that answers HELLO with ``error``, in the words ``text``; ``None``: it refuses the login."""
    code = text.partition(" ")[0]
    is_login = code.isupper() and code not in ("ERR", "NOPROTO")  # a proxy's words have no code
    if type(error) is not _OTHER or is_login or _OF_LOGIN.search(text):
        return None
    if "unknown command" in text:
        return f"does not know HELLO: {RESP3_NEEDED}"
    return f"answers HELLO with {text!r}: {RESP3_NEEDED}"


def to_error(text: str, server: str, command: Sequence[bytes | str | int | float] = ()) -> redis.exceptions.RedisError:
    """Return the error that an error reply to ``command`` stands for, as a class of the ``redis`` package.

    It names the server, and the keys or Redis channels that it is about; a redirection has the text that its class wants,
    which names the other server.
    """
    code, _, rest = text.partition(" ")
    if code in ("ASK", "MOVED"):
        with suppress(ValueError):
            return _ERRORS[code](rest)
        code = "ERR"  # it does not say where to
    if code == "ERR" and (found := _IN_SCRIPT.search(rest)) is not None:
        code = "NOPERM" if found[1] else found[2]
    kind = _ERRORS.get(code, _OTHER)
    if rest == "max number of clients reached":
        kind = Unreachable  # as in the redis package: another attempt may succeed
    if issubclass(kind, ABOUT_ONE_NAME) and "run " not in text:  # that names a command
        text += _asked_for(command)
    return kind(f"{server}: {text}")


def _asked_for(command: Sequence[bytes | str | int | float]) -> str:
    """Return the names in ``command``, as the end of a text."""
    word = command[0] if command else ""
    if word in ("EVAL", "EVALSHA", "BZMPOP"):
        names = command[3 : 3 + int(command[2])]
    elif word == "BZPOPMIN":
        names = command[1:-1]
    elif word in ("SUBSCRIBE", "SSUBSCRIBE", "UNLINK"):
        names = command[1:]
    else:
        names = command[1:2] if word in _OF_ONE_NAME else ()
    if not names:
        return ""
    shown = [repr(one.decode("utf-8", "replace") if isinstance(one, bytes) else one) for one in names[:_SHOWN]]
    more = len(names) - _SHOWN
    return f" ({', '.join(shown)}{f' and {more} more' if more > 0 else ''})"
