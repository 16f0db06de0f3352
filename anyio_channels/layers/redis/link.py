"""A connection that comes back: connect, shake hands, restore, serve, and again.

Rules:
- ``run()`` goes on until it is cancelled. After each failure it waits with exponential backoff and jitter, which success
  sets back; the first connection is no exception.
- a connection is handed out only when what its owner wants restored (subscriptions) is restored.
- a call during an outage waits for the connection at most ``timeout`` seconds in all, then fails with the cause.
- refusals that waiting does not cure (password, certificate, permission) are told at once to whoever opens the layer.
"""

from __future__ import annotations

import ssl
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha1
from typing import Any, Final, Protocol

import redis.exceptions
from anyio import CancelScope, Event, create_task_group, fail_after, move_on_after
from anyio.abc import ByteStream
from redis.backoff import ExponentialWithJitterBackoff

from anyio_channels.log import CONNECTION_FAILED, CONNECTION_LOST, CONNECTION_RESTORED, Troubles, said

from .connection import Argument, Connection, ConnectionLost, ConnectionTimeout, Request

__all__ = ["Link", "LinkRetired", "Script", "Server"]

_BACKOFF: Final = ExponentialWithJitterBackoff(cap=0.5, base=0.02)
_PASSING: Final = (
    redis.exceptions.BusyLoadingError,
    redis.exceptions.ClusterDownError,
    redis.exceptions.MasterDownError,
    redis.exceptions.TryAgainError,
)
"""Refusals that waiting cures."""
_MOST_FAILURES: Final = 16
"""The backoff doubles no further."""
_QUIET: Final = 10.0
"""Seconds in which a connection that is lost again and again is logged once."""


@dataclass(frozen=True, slots=True)
class Script:
    """A Lua script and its digest."""

    text: str
    digest: str

    @classmethod
    def of(cls, text: str) -> Script:
        """Return the script for ``text``."""
        return cls(text, sha1(text.encode(), usedforsecurity=False).hexdigest())


class LinkRetired(ConnectionLost):
    """The link is not used any more: another one is to be asked for."""


class Server(Protocol):
    """Where a link leads: one server, or whichever of some has a role."""

    @property
    def name(self) -> str:
        """How errors call it."""

    @property
    def timeout(self) -> float | None:
        """Seconds that a call may take, if the layer's are not to count."""

    @property
    def connect_timeout(self) -> float | None:
        """Seconds that connecting may take, if the layer's are not to count."""

    async def connect(self) -> ByteStream:
        """Open a stream. Raises ``OSError`` and errors of the ``redis`` package."""

    async def shake_hands(self, connection: Connection) -> float:
        """Make ``connection`` ready; return the server's time. Raises errors of the ``redis`` package."""


class Link:
    """The way to one server, up or down."""

    def __init__(
        self,
        endpoint: Server,
        *,
        timeout: float,
        connect_timeout: float,
        command_timeout: float | None = None,
        restore: Callable[[Connection], Awaitable[None]],
        on_up: Callable[[Connection], object],
        on_down: Callable[[], object] | None = None,
        on_push: Callable[[list[Any]], object] | None = None,
    ) -> None:
        """``timeout``: seconds that a call may take; ``connect_timeout``: that connecting and restoring may take.

        ``command_timeout``: seconds without an answer after which the connection is given up, if not ``timeout``.
        ``restore`` is awaited with each new connection before it is handed out; the others are called, and must not wait.
        """
        self.endpoint: Server = endpoint
        self.timeout: float = endpoint.timeout or timeout
        self.connect_timeout: float = endpoint.connect_timeout or connect_timeout
        self._command_timeout = self.timeout if command_timeout is None else command_timeout
        self._restore = restore
        self._on_up = on_up
        self._on_down = on_down
        self._on_push = on_push
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
        self.on_trouble: Callable[[], object] | None = None
        """Called when the server cannot be reached or is lost; must not wait."""
        self.retired: bool = False
        """Whether the server is not used any more."""
        self._scope = CancelScope()
        self._news = Event()
        self._hurry = Event()
        self._past_commands = 0
        self._troubles = Troubles(time.monotonic, _QUIET)
        self._is_told = False  # that it is down

    @property
    def name(self) -> str:
        """How errors call the server."""
        return self.endpoint.name

    @property
    def server_time(self) -> float:
        """The server's time, in seconds since 1970, as well as it is known."""
        return time.monotonic() + self.clock_offset

    @property
    def commands(self) -> int:
        """How many commands were sent, the handshakes among them."""
        return self._past_commands + (0 if self.connection is None else self.connection.commands)

    async def run(self) -> None:
        """Keep the connection up until cancelled or retired."""
        try:
            with self._scope:
                await self._run()
        finally:
            self._troubles.close()

    async def retire(self) -> None:
        """End the connection when all that is in flight is answered; calls that wait for it get ``LinkRetired``."""
        self.retired = True
        self._tell()
        if self.connection is not None:
            self.connection.mute()
            with suppress(redis.exceptions.RedisError):
                await self.connection.execute("PING")
        self._scope.cancel()

    async def _run(self) -> None:
        failures = 0
        while True:
            try:
                with fail_after(self.connect_timeout):
                    stream = await self.endpoint.connect()
            except (OSError, redis.exceptions.RedisError) as error:
                self._fail(error)
            else:
                connection = Connection(stream, self.name, timeout=self._command_timeout, on_push=self._on_push)
                if await self._serve(connection):
                    failures = 0
            failures = min(failures + 1, _MOST_FAILURES)
            with move_on_after(_BACKOFF.compute(failures)):
                await self._hurry.wait()
            self._hurry = Event()

    async def _serve(self, connection: Connection) -> bool:
        """Serve ``connection`` until it ends; return whether it ever came up."""
        came_up = False
        async with create_task_group() as tasks:
            tasks.start_soon(connection.run)
            try:
                with fail_after(self.connect_timeout):
                    before = time.monotonic()
                    server_time = await self.endpoint.shake_hands(connection)
                    self.set_clock(server_time, before)
                    await self._restore(connection)
            except (OSError, redis.exceptions.RedisError) as error:
                self._fail(error)
            else:
                came_up = True
                self._up(connection)
                try:
                    await connection.wait_ended()
                    self._lose(connection)
                finally:
                    self.connection = None
                    self._past_commands += connection.commands
            finally:
                tasks.cancel_scope.cancel()
        return came_up

    def reconnect(self, why: str) -> None:
        """Give the connection up and make a new one at once."""
        self._hurry.set()
        if self.connection is not None:
            self.connection.end(why)

    # Calls

    async def ready(self) -> Connection:
        """Wait for the connection to be up, for as long as the caller allows."""
        while self.connection is None:
            if self.retired:
                raise LinkRetired(f"{self.name} is not used any more", may_have_run=False)
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

    async def execute(self, *command: Argument) -> Any:
        """Send ``command`` and return its reply, within ``timeout`` seconds, also if the connection is down at first.

        Raises what ``Connection.execute`` raises, and ``ConnectionLost`` when it does not come up in time. If cancelled,
        the command was not sent, or it may run and its reply is swallowed.
        """
        if self.connection is not None:
            return await self.connection.execute(*command)
        connection: Connection | None = None
        before = time.monotonic()
        with move_on_after(self.timeout):
            connection = await self.ready()
        if connection is None:
            raise self.down_error()
        return await connection.execute(*command, timeout=max(0.0, before + self.timeout - time.monotonic()))

    async def call(self, script: Script, keys: Sequence[str], *args: Argument) -> Any:
        """Run ``script`` on ``keys`` and return what it returns; it is sent whole if the server does not have it.

        Raises what ``execute`` raises, and leaves behind what ``execute`` does.
        """
        try:
            return await self.execute("EVALSHA", script.digest, len(keys), *keys, *args)
        except redis.exceptions.NoScriptError:
            return await self.execute("EVAL", script.text, len(keys), *keys, *args)

    def submit(self, *command: Argument, done: Callable[[Request], object] | None = None) -> None:
        """Send ``command`` without waiting for it; ``done`` is called with the answered request, at once if the link is down."""
        if self.connection is None:
            request = Request(command, 0.0, done)
            request.error = self.down_error()
            request.settle()
        else:
            self.connection.submit(*command, done=done)

    def call_soon(
        self, script: Script, keys: Sequence[str], *args: Argument, done: Callable[[Request], object]
    ) -> None:
        """Run ``script`` on ``keys`` without waiting for it; ``done`` is called with the answered request."""

        def again(request: Request) -> None:
            if isinstance(request.error, redis.exceptions.NoScriptError):
                self.submit("EVAL", script.text, len(keys), *keys, *args, done=done)
            else:
                done(request)

        self.submit("EVALSHA", script.digest, len(keys), *keys, *args, done=again)

    def set_clock(self, server_time: float, asked_at: float) -> None:
        """Note the server's time, which it told between ``asked_at`` (``time.monotonic()``) and now."""
        self.clock_offset = server_time - (asked_at + time.monotonic()) / 2

    # The inside

    def _up(self, connection: Connection) -> None:
        if self._is_told and self.connects:
            CONNECTION_RESTORED.write(server=self.name)
        self._is_told = False
        self.connection = connection
        self.connects += 1
        self.error = None
        self.refused = False
        self._on_up(connection)
        self._tell()

    def _lose(self, connection: Connection) -> None:
        self.connection = None
        self.error = connection.lost(may_have_run=False)
        self._is_told = self._troubles.note(CONNECTION_LOST, server=self.name, error=_reason(self.error))
        if self._on_down is not None:
            self._on_down()
        if self.on_trouble is not None:
            self.on_trouble()

    def _fail(self, error: Exception) -> None:
        """It did not come up."""
        if self.error is None:
            CONNECTION_FAILED.write(server=self.name, error=_reason(error))
            self._is_told = True
        elif self._troubles.look():
            self._is_told = True
        self.error = error
        self.refused = isinstance(error, ssl.SSLError) or (
            isinstance(error, redis.exceptions.ResponseError | redis.exceptions.AuthenticationError)
            and not isinstance(error, _PASSING)
            and "BUSY" not in str(error)  # a script that runs long; it has no class of its own
        )
        if self.refused:
            self._tell()
        if self.on_trouble is not None:
            self.on_trouble()

    def _tell(self) -> None:
        self._news.set()
        self._news = Event()

    def down_error(self) -> ConnectionLost | redis.exceptions.RedisError:
        """Return the error that says why there is no connection."""
        error = self.error
        if isinstance(error, redis.exceptions.AuthenticationError):
            return redis.exceptions.AuthenticationError(_reason(error))
        if isinstance(error, redis.exceptions.ResponseError):
            return type(error)(_reason(error))
        kind = ConnectionTimeout if isinstance(error, TimeoutError) or error is None else ConnectionLost
        lost = kind(f"{self.name} cannot be reached: {_reason(error)}", may_have_run=False)
        lost.__cause__ = error
        return lost


def _reason(error: BaseException | None) -> str:
    if error is None or (isinstance(error, TimeoutError) and not str(error)):
        return "it did not answer in time"
    if isinstance(error, ConnectionLost):
        return str(error.args[0]).rpartition(";")[0]
    return said(error)
