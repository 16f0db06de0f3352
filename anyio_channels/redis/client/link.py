"""A connection that comes back: connect, shake hands, restore, serve, and again.

Rules:
- ``run()`` goes on until it is cancelled. After each failure it waits with exponential backoff and jitter, which success
  sets back; the first connection is no exception.
- a connection is handed out only when what its owner wants restored (subscriptions) is restored.
- one path for a command: a ``Call`` is sent by a plain function, and ``execute`` waits for it. What can be mended when the
  reply comes (``NOSCRIPT`` here, redirections in a cluster) is mended in ``mend``, for those who wait and those who do not.
- a script goes out whole the first time on each connection, and by its digest then; so it is not refused where that would
  let what is behind it overtake it.
- a call during an outage waits for the connection at most ``timeout`` seconds in all, then fails with the cause.
- refusals that waiting does not cure (password, certificate, permission) are told at once to whoever opens the link.
"""

from __future__ import annotations

import time
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha1
from typing import Any, Final

import hiredis
import redis.exceptions
from anyio import CancelScope, Event, create_task_group, fail_after, move_on_after
from redis.backoff import ExponentialWithJitterBackoff

from anyio_channels.log import (
    CONNECTION_FAILED,
    CONNECTION_LOST,
    CONNECTION_REFUSED,
    CONNECTION_RESTORED,
    Troubles,
    said,
)

from . import replies
from .connection import Connection, reply_to
from .errors import ConnectionLost, ConnectionTimeout, LinkRetired, NotRESP3, is_refusal, says_nothing
from .protocol import Argument, Done, Parse, Request
from .server import Server

_BACKOFF: Final = ExponentialWithJitterBackoff(cap=0.5, base=0.02)
_MOST_HOPS: Final = 16
_MOST_FAILURES: Final = 5
"""The backoff doubles no further: beyond its cap there is no jitter, and all processes would try at the same time."""
_KEYS_AT_ONCE: Final = 1000
"""How many keys one SCAN looks at."""
_QUIET: Final = 10.0
"""Seconds in which a connection that is lost again and again is logged once."""


@dataclass(frozen=True, slots=True)
class Script:
    """A Lua script and its digest."""

    text: str
    digest: str
    parse: Parse | None
    """Turns the reply into what callers get, as in ``Request``."""
    announces: bool
    """Whether its last argument is a sharded Redis channel on which it says what it did."""

    @classmethod
    def of(cls, text: str, parse: Parse | None = None, *, announces: bool = False) -> Script:
        """Return the script for ``text``."""
        return cls(text, sha1(text.encode(), usedforsecurity=False).hexdigest(), parse, announces)


@dataclass(frozen=True, kw_only=True, slots=True)
class Timeouts:
    """Seconds, for all servers of a router that have none of their own."""

    timeout: float
    """In which a call succeeds or fails."""
    connect_timeout: float
    """In which a connection is made, and what is to be restored is restored."""
    keep_alive: float
    """Between signs of life where nobody else gives them."""


class LinkEvents:
    """What the client tells its user; override what you need. Only ``restore`` may wait."""

    def on_new(self, link: Link) -> None:
        """A router made a link to a server, at its opening or later; it does not run yet."""

    async def restore(self, link: Link, connection: Connection) -> None:
        """Make a new connection what the last one was, before anybody else may use it."""

    def on_up(self, link: Link) -> None:
        """A connection is there, and restored."""

    def on_down(self, link: Link) -> None:
        """The connection was lost, after ``on_up``."""

    def on_push(self, link: Link, push: list[Any]) -> None:
        """The server sent something unasked."""

    def on_moved(self, moved: set[int], lost: set[int]) -> None:
        """Slots of a cluster were asked for; ``moved``: have another owner; ``lost``: also those whose owner was gone."""


@dataclass(slots=True, eq=False, repr=False)
class Call(Request):
    """A request that a link sees through, over more than one connection if it must be."""

    link: Link = field(kw_only=True)
    """Who mends it."""
    script: Script | None = None
    """The one that ``command`` runs."""
    hops: int = _MOST_HOPS
    """How many more redirections may be followed at once."""

    def settle(self) -> None:
        """Tell whoever asked, unless the link sends it again."""
        if (self.error is None and not self.asking) or self.abandoned or not self.link.mend(self):
            Request.settle(self)


class Link:
    """The way to one server, up or down."""

    def __init__(self, server: Server, timeouts: Timeouts, events: LinkEvents) -> None:
        """``events`` hears what happens to the link."""
        self.server: Server = server
        self.timeout: float = server.address.timeout or timeouts.timeout
        self.connect_timeout: float = server.address.connect_timeout or timeouts.connect_timeout
        self.connection: Connection | None = None
        """The connection, while it is up."""
        self.connects: int = 0
        """How often it came up."""
        self.error: Exception | None = None
        """Why it is not up."""
        self.clock_offset: float = 0.0
        """What to add to ``time.monotonic()`` to have the server's time, in seconds."""
        self.refused: bool = False
        """Whether the server refused in a way that waiting does not cure."""
        self.retired: bool = False
        """Whether the server is not used any more."""
        self._events = events
        self._scope = CancelScope()
        self._news = Event()
        self._hurry = Event()
        self._past_commands = 0
        self._over = False  # run() has ended
        self._troubles = Troubles(time.monotonic, _QUIET)
        self._is_told = False  # that it is down
        self._known: set[str] = set()  # digests of the scripts that the connection carried whole

    @property
    def name(self) -> str:
        """The server's name in error messages."""
        return self.server.name

    @property
    def server_time(self) -> float:
        """The server's time, in seconds since 1970, as well as it is known."""
        return time.monotonic() + self.clock_offset

    @property
    def commands(self) -> int:
        """How many commands were sent, the handshakes among them."""
        return self._past_commands + (0 if self.connection is None else self.connection.commands)

    async def run(self) -> None:
        """Keep the connection up until cancelled or retired. Calls that wait for it then get ``ConnectionLost``."""
        try:
            with self._scope:
                await self._run()
        finally:
            self._over = True
            self._tell()
            self._troubles.close()

    def retire(self) -> None:
        """Deliver no pushes any more, and end the connection when all that is in flight is answered.

        Calls that wait for it to be up get ``LinkRetired``.
        """
        self.retired = True
        self._tell()
        if self.connection is None:
            self._scope.cancel()
        else:
            self.connection.mute()
            self.connection.submit("PING", done=lambda _: self._scope.cancel())

    async def _run(self) -> None:
        failures = 0
        while True:
            connects = self.connects
            try:
                with fail_after(self.connect_timeout):
                    stream = await self.server.connect()
            except (OSError, redis.exceptions.RedisError) as error:
                self._fail(error)
            else:
                on_push = partial(self._events.on_push, self)
                await self._serve(Connection(stream, self.name, timeout=self.timeout, on_push=on_push))
            failures = min(failures + 1, _MOST_FAILURES) if self.connects == connects else 1
            with move_on_after(_BACKOFF.compute(failures)):
                await self._hurry.wait()
            self._hurry = Event()

    async def _serve(self, connection: Connection) -> None:
        """Serve ``connection`` until it ends."""
        async with create_task_group() as tasks:
            tasks.start_soon(connection.run)
            try:
                with fail_after(self.connect_timeout):
                    before = time.monotonic()
                    self.set_clock(await self.server.shake_hands(connection), before)
                    await self._events.restore(self, connection)
            except (OSError, redis.exceptions.RedisError) as error:
                self._fail(error)
            else:
                self._up(connection)
                try:
                    await connection.wait_ended()
                    self._lose(connection)
                finally:
                    self.connection = None
                    self._past_commands += connection.commands
            finally:
                tasks.cancel_scope.cancel()

    def reconnect(self, why: str) -> None:
        """Give the connection up and make a new one at once."""
        self._hurry.set()
        if self.connection is not None:
            self.connection.end(why)

    def set_clock(self, server_time: float, asked_at: float) -> None:
        """Note the server's time, which it told between ``asked_at`` (``time.monotonic()``) and now."""
        self.clock_offset = server_time - (asked_at + time.monotonic()) / 2

    # Waiting for it

    async def ready(self) -> Connection:
        """Wait for the connection to be up, for as long as the caller allows."""
        while self.connection is None:
            if self.retired:
                raise LinkRetired(f"{self.name} is not used any more", may_have_run=False)
            if self._over:
                raise ConnectionLost(f"{self.name}: the link was closed", may_have_run=False)
            await self._news.wait()
        return self.connection

    async def opened(self) -> None:
        """Wait for the first connection, at most ``connect_timeout`` seconds.

        Raises an error of the ``redis`` package that names the server and the cause, at once where waiting would not help.
        """
        with move_on_after(self.connect_timeout):
            while self.connection is None and not self.refused:
                await self._news.wait()
        if self.connection is None:
            raise self.down_error()

    # Calls

    def execute(
        self, *command: Argument, parse: Parse | None = None, late: Done | None = None
    ) -> Coroutine[Any, Any, Any]:
        """Send ``command`` and return its reply, within ``timeout`` seconds, also if the connection is down at first.

        Raises what ``Connection.execute`` raises, and ``ConnectionLost`` when it does not come up in time. If cancelled,
        the command was not sent, or it may run and its reply goes to ``late``, as to ``done`` of a ``Request`` that waits.
        """
        return self.see_through(command, parse, late=late)

    def call(
        self, script: Script, keys: Sequence[str], *args: Argument, late: Done | None = None
    ) -> Coroutine[Any, Any, Any]:
        """Run ``script`` on ``keys`` and return what it returns.

        Raises what ``execute`` raises, and leaves behind what ``execute`` does.
        """
        return self.see_through(self._to_run(script, keys, args), script.parse, script, late)

    async def caught_up(self) -> None:
        """Wait until all that was sent before is answered, as ``execute`` does; a refusal is an answer."""
        with suppress(redis.exceptions.ResponseError):  # PING is refused where others are not, as by MISCONF
            await self.execute("PING")

    async def scan(self, pattern: str) -> set[bytes]:
        """Return all keys of this server that match ``pattern``; takes time in proportion to all keys of the database.

        Raises what ``execute`` raises. A key that comes or goes meanwhile may be in it or not.
        """
        found: set[bytes] = set()
        cursor = 0
        while True:
            cursor, keys = await self.execute(
                "SCAN", cursor, "MATCH", pattern, "COUNT", _KEYS_AT_ONCE, parse=replies.scanned
            )
            found.update(keys)
            if cursor == 0:
                return found

    def submit(self, *command: Argument, parse: Parse | None = None, done: Done | None = None) -> None:
        """Send ``command`` without waiting for it; ``done`` is called with the answered request, at once if the link is down."""
        self.send(Call(command, parse, done, link=self))

    def call_soon(
        self, script: Script, keys: Sequence[str], *args: Argument, done: Done, timeout: float | None = None
    ) -> None:
        """Run ``script`` on ``keys`` as ``submit`` does; ``timeout`` as in ``Connection.send``."""
        command = self._to_run(script, keys, args)
        self.send(Call(command, script.parse, done, link=self, script=script), timeout)

    def _to_run(self, script: Script, keys: Sequence[str], args: Sequence[Argument]) -> Sequence[Argument]:
        if script.digest in self._known:
            return ("EVALSHA", script.digest, len(keys), *keys, *args)
        if self.connection is not None:
            self._known.add(script.digest)
        return ("EVAL", script.text, len(keys), *keys, *args)

    def send(self, call: Call, timeout: float | None = None) -> None:
        """Send ``call``; it is settled at once if the link is down."""
        if self.connection is None:
            call.error = self.down_error()
            call.settle()
        else:
            self.connection.send(call, timeout)

    def see_through(
        self,
        command: Sequence[Argument],
        parse: Parse | None,
        script: Script | None = None,
        late: Done | None = None,
    ) -> Coroutine[Any, Any, Any]:
        """Send ``command``, at once if the link is up, and return what waits for the reply, as ``execute`` says."""
        call = Call(command, parse, late, waits=True, link=self, script=script)
        if self.connection is None:
            return self.send_when_up(call, time.monotonic() + self.timeout)
        self.connection.send(call)
        return reply_to(call)  # not a coroutine itself: one frame less for each reply to go through

    async def send_when_up(self, call: Call, give_up: float) -> Any:
        """Send ``call`` when the link is up, if that is before ``give_up``, and wait for the reply."""
        timeout = None
        if self.connection is None:
            with move_on_after(give_up - time.monotonic()):
                await self.ready()
            timeout = max(0.0, give_up - time.monotonic())
        self.send(call, timeout)
        return await reply_to(call)

    def mend(self, call: Call) -> bool:
        """Send a call that failed again, if that mends it; ``False``: whoever asked is to be told."""
        if not isinstance(call.error, redis.exceptions.NoScriptError) or call.script is None:
            return False
        # Whoever flushed the scripts flushed them all.
        self._known = {call.script.digest}
        call.command = ("EVAL", call.script.text, *call.command[2:])
        call.data = hiredis.pack_command(call.command)  # type: ignore[arg-type] # as in Request
        call.begin_again()
        self.send(call, max(0.0, call.due - time.monotonic()))
        return True

    # The inside

    def _up(self, connection: Connection) -> None:
        if self._is_told and self.connects:
            CONNECTION_RESTORED.write(server=self.name)
        self._is_told = False
        self._known.clear()
        self.connection = connection
        self.connects += 1
        self.error = None
        self.refused = False
        self._events.on_up(self)
        self._tell()

    def _lose(self, connection: Connection) -> None:
        self.connection = None
        self.error = connection.lost(may_have_run=False)
        self._is_told = self._troubles.note(CONNECTION_LOST, server=self.name, error=_reason(self.error))
        self._events.on_down(self)
        self.on_trouble()

    def _fail(self, error: Exception) -> None:
        """It did not come up."""
        if self.error is None:
            event = CONNECTION_REFUSED if is_refusal(error) else CONNECTION_FAILED
            event.write(server=self.name, error=self._why(error))
            self._is_told = True
        elif self._troubles.look():
            self._is_told = True
        if says_nothing(error) and self.error is not None:  # why an earlier try failed says more
            error.__cause__ = self.error.__cause__ if says_nothing(self.error) else self.error
        self.error = error
        self.refused = is_refusal(error)
        if self.refused:
            self._tell()
        self.on_trouble()

    def on_trouble(self) -> None:
        """The server cannot be reached, or was lost: for those who know of others."""

    def _tell(self) -> None:
        self._news.set()
        self._news = Event()

    def down_error(self) -> ConnectionLost | redis.exceptions.RedisError:
        """Return the error that says why there is no connection."""
        error = self.error
        if isinstance(error, redis.exceptions.AuthenticationError | redis.exceptions.ResponseError | NotRESP3):
            refusal = type(error)(_reason(error))
            refusal.__cause__ = error
            return refusal
        kind = ConnectionTimeout if isinstance(error, TimeoutError) or error is None else ConnectionLost
        lost = kind(f"{self.name} cannot be reached: {self._why(error)}", may_have_run=False)
        lost.__cause__ = error
        return lost

    def _why(self, error: BaseException | None) -> str:
        """Return why it is not up, and if it never was, what to do."""
        reason = _reason(error).removeprefix(f"{self.name}: ")
        if reason.startswith(f"{self.name} "):
            reason = f"it{reason[len(self.name) :]}"
        return reason + ("" if self.connects else self.server.advice(error or TimeoutError()))


def _reason(error: BaseException | None) -> str:
    if error is None or says_nothing(error):
        before = None if error is None else error.__cause__
        return "it did not answer in time" + ("" if before is None else f"; before that: {_reason(before)}")
    if isinstance(error, ConnectionLost):
        return error.why
    return said(error)
