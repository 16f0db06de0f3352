"""What this package logs: events, each with a name and fields that stay.

Rules:
- one logger, ``anyio_channels``. A record has the name of its event and its fields as attributes that begin with
  ``anyio_channels_``. docs/observability.md lists them all; a test holds the list to this module.
- trouble that may come with each message goes through ``Troubles``, which writes one line when it begins and then a line now
  and then. There is no timer: a line is written by the next call after its time, or at closing.
- no password and nothing out of a message is in a record.
- a handler or filter of the application that raises costs the line, which may come in the middle of our own work, and
  nothing else. It is shown as ``logging`` shows the errors that its own handlers catch: on standard error, unless
  ``logging.raiseExceptions`` is off.
"""

from __future__ import annotations

import logging
import math
import reprlib
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from .forks import in_each_child

__all__ = ["EVENTS", "PREFIX", "LogEvent", "Troubles", "said", "shown"]

PREFIX: Final = "anyio_channels_"
"""What the attributes of a record begin with that are ours."""
OTHERS: Final = "*"
"""Stands for all subjects beyond those that are remembered; no name can be that."""
_MOST: Final = 100
"""How many subjects in trouble are remembered."""
_LOGGER: Final = logging.getLogger("anyio_channels")

_Line: TypeAlias = "tuple[LogEvent, str, dict[str, Any]]"


@dataclass(frozen=True, slots=True)
class LogEvent:
    """One kind of thing that is logged."""

    name: str
    level: int
    text: str
    """A format that names fields."""
    fields: tuple[str, ...]
    again: str = ""
    """The format for what came since the last line, if it goes through ``Troubles``: ``count`` in ``seconds``."""
    subject: str = ""
    """The field that says what is in trouble, each for itself."""

    def write(self, *, exc_info: BaseException | bool | None = None, **fields: Any) -> None:
        """Log it."""
        self._log(self.text, fields, exc_info)

    def _log(self, text: str, fields: dict[str, Any], exc_info: BaseException | bool | None = None) -> None:  # noqa: FBT001 - logging's
        if not _LOGGER.isEnabledFor(self.level):
            return
        extra = {PREFIX + name: fields[name] for name in self.fields}
        try:
            _LOGGER.log(self.level, text, fields, extra={PREFIX + "event": self.name, **extra}, exc_info=exc_info)
        except Exception:  # noqa: BLE001 - whatever a handler or filter raises
            if logging.raiseExceptions and sys.stderr is not None:
                with suppress(OSError):  # nobody reads standard error any more
                    traceback.print_exc(file=sys.stderr)


def said(error: BaseException) -> str:
    """Return what the field ``error`` holds."""
    return str(error) or repr(error)


class _Repr(reprlib.Repr):
    def repr_int(self, x: int, level: int) -> str:
        if x.bit_length() > _LONG_INT:  # Python refuses to write one of more than 4,300 digits
            return f"an int of {x.bit_length()} bits"
        return super().repr_int(x, level)


_LONG_INT: Final = 1024
shown: Final = _Repr().repr
"""Return the ``repr`` of any value, cut to a length fit for an error message."""


class _Quiet:
    """Trouble that was told, and what came since."""

    __slots__ = ("count", "event", "fields", "since")

    def __init__(self, event: LogEvent, since: float, fields: dict[str, Any]) -> None:
        self.event = event
        self.since = since
        self.count = 0
        self.fields = fields


class Troubles:
    """Tells trouble in few lines; callable from any thread.

    The first of a kind is a line at once. What comes in the next ``quiet_for`` seconds is counted, and told in one line when
    that time is over, so that the counts of all lines add up. At most ``_MOST`` subjects are remembered, and those beyond share
    one line.
    """

    def __init__(self, clock: Callable[[], float], quiet_for: float, owner: object = None) -> None:
        """``clock`` returns seconds. ``owner``: its ``repr`` is the field ``layer``."""
        self._clock = clock
        self._quiet_for = quiet_for
        self._owner = owner
        self._renew_lock()
        in_each_child(self, Troubles._renew_lock)
        self._quiet: dict[tuple[str, str], _Quiet] = {}
        self.due: float = math.inf
        """When there may be something to tell that nobody has told (seconds of the clock)."""

    def _renew_lock(self) -> None:
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """How many subjects are remembered."""
        return len(self._quiet)

    def note(self, event: LogEvent, subject: str = "", count: int = 1, **fields: Any) -> bool:
        """It happened ``count`` times to ``subject``; return whether that was told already."""
        key = (event.name, subject)
        now = self._clock()
        lines: list[_Line] = []
        self._lock.acquire()  # cheaper than a with statement: each broadcast to full members comes here
        try:
            quiet = self._quiet.get(key)
            if quiet is not None and now < self.due:
                quiet.count += count
                if fields:
                    quiet.fields.update(fields)
                return False
            is_told = self._note(event, key, count, fields, now, lines)
            self._look(now, lines)
        finally:
            self._lock.release()
        self._write(lines)
        return is_told

    def _note(
        self,
        event: LogEvent,
        key: tuple[str, str],
        count: int,
        fields: dict[str, Any],
        now: float,
        lines: list[_Line],
    ) -> bool:
        quiet = self._quiet.get(key)
        if quiet is None and len(self._quiet) >= _MOST:
            self._look(now, lines)
            if event.subject and len(self._quiet) >= _MOST:
                key = (event.name, OTHERS)
                quiet = self._quiet.get(key)
        if quiet is None or (not quiet.count and quiet.since + self._quiet_for <= now):
            fields[event.subject] = key[1]
            self._quiet[key] = _Quiet(event, now, fields)
            self.due = min(self.due, now + self._quiet_for)
            lines.append((event, event.text, {**fields, "count": count, "seconds": 0.0}))
            return True
        quiet.count += count
        quiet.fields.update(fields)
        return quiet.since + self._quiet_for <= now

    def look(self) -> bool:
        """Tell what is due; return whether there was anything."""
        now = self._clock()
        if now < self.due:
            return False
        lines: list[_Line] = []
        with self._lock:
            self._look(now, lines)
        self._write(lines)
        return bool(lines)

    def close(self) -> None:
        """Tell all that was not told, and forget it."""
        with self._lock:
            now = self._clock()
            lines = [_again(quiet, now) for quiet in self._quiet.values() if quiet.count]
            self._quiet.clear()
            self.due = math.inf
        self._write(lines)

    def _look(self, now: float, lines: list[_Line]) -> None:
        if now < self.due:
            return
        for key, quiet in tuple(self._quiet.items()):
            if quiet.since + self._quiet_for > now:
                continue
            if quiet.count:
                lines.append(_again(quiet, now))
                quiet.count, quiet.since = 0, now
            else:
                del self._quiet[key]
        self.due = min((quiet.since for quiet in self._quiet.values()), default=math.inf) + self._quiet_for

    def _write(self, lines: list[_Line]) -> None:
        for event, text, fields in lines:
            event._log(text, {"layer": repr(self._owner), **fields})  # noqa: SLF001 - of this module


def _again(quiet: _Quiet, now: float) -> _Line:
    return quiet.event, quiet.event.again, {**quiet.fields, "count": quiet.count, "seconds": now - quiet.since}


GROUP_SEND_DROPPED: Final = LogEvent(
    "group_send.dropped",
    logging.WARNING,
    "group %(group)r: %(count)d of its members were full and missed a message; more such are counted, and told later",
    ("layer", "group", "count", "seconds"),
    "group %(group)r: in the last %(seconds).0f s, members that were full missed %(count)d more messages",
    "group",
)
CHANNEL_DROPPED: Final = LogEvent(
    "channel.dropped",
    logging.WARNING,
    "channel %(channel)r was full and missed a message; more such are counted, and told later",
    ("layer", "channel", "count", "seconds"),
    "channel %(channel)r was full and missed %(count)d more messages in the last %(seconds).0f s",
    "channel",
)
CHANNEL_ENDED: Final = LogEvent(
    "channel.ended",
    logging.INFO,
    "channel %(channel)r ended, for nobody used it any more; %(discarded)d messages in it were thrown away",
    ("layer", "channel", "discarded"),
)
MESSAGE_UNREADABLE: Final = LogEvent(
    "message.unreadable",
    logging.WARNING,
    "skipped what is no message of ours on %(key)r: %(error)s; more such are counted, and told later",
    ("layer", "key", "error", "count", "seconds"),
    "skipped %(count)d more things that are no message of ours on %(key)r in the last %(seconds).0f s, the last: %(error)s",
    "key",
)
POP_REFUSED: Final = LogEvent(
    "pop.refused",
    logging.WARNING,
    "%(error)s; readers go on waiting",
    ("layer", "error", "count", "seconds"),
    "%(error)s; readers go on waiting; %(count)d more times in the last %(seconds).0f s",
)
POP_FAILED: Final = LogEvent(
    "pop.failed",
    logging.WARNING,
    "%(error)s; those who read it are told",
    ("layer", "error", "count", "seconds"),
    "%(error)s; those who read it are told; %(count)d more times in the last %(seconds).0f s",
)
GIVE_BACK_FAILED: Final = LogEvent(
    "give_back.failed",
    logging.WARNING,
    "%(count)d messages of %(key)r could not be given back and are lost: %(error)s",
    ("layer", "key", "error", "count", "seconds"),
    "%(count)d more messages of %(key)r could not be given back in the last %(seconds).0f s and are lost: %(error)s",
    "key",
)
SUBSCRIPTION_REFUSED: Final = LogEvent(
    "subscription.refused",
    logging.WARNING,
    "%(error)s; readers wait in vain for %(key)r",
    ("layer", "key", "error", "count", "seconds"),
    "%(error)s; readers wait in vain for %(key)r; refused %(count)d more times in the last %(seconds).0f s",
    "key",
)
MEMBERSHIP_REFUSED: Final = LogEvent(
    "membership.refused",
    logging.WARNING,
    "%(error)s; memberships could not be renewed or ended",
    ("layer", "error", "count", "seconds"),
    "%(error)s; memberships could not be renewed or ended; %(count)d more times in the last %(seconds).0f s",
)
CLOSE_UNFINISHED: Final = LogEvent(
    "close.unfinished",
    logging.WARNING,
    "%(error)s; closed without telling it",
    ("layer", "server", "error"),
)
KEEP_ALIVE_FAILED: Final = LogEvent(
    "keep_alive.failed",
    logging.DEBUG,
    "%(server)s: keep-alive failed: %(error)s",
    ("layer", "server", "error"),
)
CONNECTION_LOST: Final = LogEvent(
    "connection.lost",
    logging.WARNING,
    "%(error)s; trying again",
    ("server", "error", "count", "seconds"),
    "%(error)s; trying again; lost %(count)d more times in the last %(seconds).0f s",
)
CONNECTION_FAILED: Final = LogEvent(
    "connection.failed",
    logging.WARNING,
    "%(server)s cannot be reached: %(error)s; trying again",
    ("server", "error"),
)
CONNECTION_REFUSED: Final = LogEvent(
    "connection.refused",
    logging.WARNING,
    "%(server)s cannot be used: %(error)s",
    ("server", "error"),
)
CONNECTION_RESTORED: Final = LogEvent(
    "connection.restored",
    logging.INFO,
    "%(server)s: connected again",
    ("server",),
)
HOST_OPTIONS_IGNORED: Final = LogEvent(
    "hosts.options_ignored",
    logging.INFO,
    "hosts has options of the redis package that mean nothing here: %(options)s",
    ("options",),
)
TELEMETRY_FAILED: Final = LogEvent(
    "telemetry.failed",
    logging.WARNING,
    "OpenTelemetry failed, and a message went without it: %(error)s",
    ("layer", "error", "count", "seconds"),
    "OpenTelemetry failed %(count)d more times in the last %(seconds).0f s: %(error)s",
)
EVENT_LOOP_FAILED: Final = LogEvent(
    "event_loop.failed",
    logging.ERROR,
    "%(name)s: its event loop ended with an error",
    ("name", "error"),
)
APP_FAILED_AFTER_RESPONSE: Final = LogEvent(
    "app.failed_after_response",
    logging.ERROR,
    "%(app)s: an error after its response",
    ("app", "error"),
)
APP_FAILED_AT_CLOSE: Final = LogEvent(
    "app.failed_at_close",
    logging.ERROR,
    "%(app)s: an error in a request that was closed",
    ("app", "error"),
)
LIFESPAN_FAILED: Final = LogEvent(
    "lifespan.failed",
    logging.ERROR,
    "%(app)s: an error in its lifespan",
    ("app", "error"),
)
LIFESPAN_UNSUPPORTED: Final = LogEvent(
    "lifespan.unsupported",
    logging.INFO,
    "%(app)s does not support the lifespan protocol",
    ("app", "error"),
)

EVENTS: Final[tuple[LogEvent, ...]] = (
    GROUP_SEND_DROPPED, CHANNEL_DROPPED, CHANNEL_ENDED, MESSAGE_UNREADABLE, POP_REFUSED, POP_FAILED,
    GIVE_BACK_FAILED, SUBSCRIPTION_REFUSED, MEMBERSHIP_REFUSED, CLOSE_UNFINISHED, KEEP_ALIVE_FAILED, CONNECTION_LOST,
    CONNECTION_FAILED, CONNECTION_REFUSED, CONNECTION_RESTORED, HOST_OPTIONS_IGNORED, TELEMETRY_FAILED, EVENT_LOOP_FAILED,
    APP_FAILED_AFTER_RESPONSE, APP_FAILED_AT_CLOSE, LIFESPAN_FAILED, LIFESPAN_UNSUPPORTED,
)  # fmt: skip
"""All that there are."""
