"""What goes wrong with Redis, as exceptions of the ``redis`` package, and what time cures.

Rules:
- an error reply becomes the class that the ``redis`` package has for it; its text names the server.
- a reply that will not come is a ``ConnectionLost``, which says whether the command may have run.
- three questions have three answers, each defined here and nowhere else: whether a new server will be ready soon
  (``NOT_READY``), whether a command that did not run may be sent again (``MAY_SEND_AGAIN``), and whether a refusal is about
  one key or Redis channel (``ABOUT_ONE_NAME``). Every other refusal, known or not, is an outage: readers wait.
"""

from __future__ import annotations

import re
import ssl
from contextlib import suppress
from typing import Final

import redis.exceptions


class Shown(redis.exceptions.RedisError):
    """An error whose ``repr`` has its text: that of redis 8 has only a category and the name of the class."""

    def __repr__(self) -> str:
        return Exception.__repr__(self)


class Unreachable(Shown, redis.exceptions.ConnectionError):
    """A server cannot be used now."""


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


class ConnectionLost(Unreachable):
    """The reply will not come; the text says which server, why, and whether the command may have run."""

    def __init__(self, text: str, *, may_have_run: bool) -> None:
        """``may_have_run``: whether the command had been handed to the operating system."""
        super().__init__(f"{text}; " + ("the command may have run" if may_have_run else "the command was not sent"))
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
    return isinstance(error, ssl.SSLError) or (
        isinstance(error, redis.exceptions.ResponseError | redis.exceptions.AuthenticationError)
        and not isinstance(error, NOT_READY)
        and "BUSY" not in str(error)  # a script that runs long; it has no class of its own
    )


def to_error(text: str, server: str) -> redis.exceptions.RedisError:
    """Return the error that an error reply stands for, as a class of the ``redis`` package.

    It names the server; a redirection has the text that its class wants, which names the other one.
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
    return kind(f"{server}: {text}")
