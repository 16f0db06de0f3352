"""One server: open a stream to it, log in, and agree on RESP3.

Rules:
- whatever is wrong with an address, a network or TLS is an ``OSError``; what the server refuses is an error of the ``redis``
  package.
- the whole handshake is one write, and its first refusal is the one that is told: it is the reason for the others.
- a password is in no error; what a credential provider raises is named by its class only.
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Any, Final

import redis.exceptions
from anyio import BrokenResourceError, EndOfStream, connect_tcp, connect_unix, create_task_group, fail_after, to_thread
from anyio.abc import ByteStream

from . import replies
from .address import Address
from .connection import Connection, reply_to
from .errors import (
    NOT_READY,
    ClusterNodeError,
    ConnectionLost,
    HandshakeEndedError,
    NotRESP3,
    Unreachable,
    not_resp3,
    what_may_be_wrong,
)
from .protocol import Parse, Request

_LIBRARY: Final = "anyio_channels"


class Server:
    """One server at a known address."""

    def __init__(self, address: Address) -> None:
        """``address``: where it is, and how to log in."""
        self.address: Address = address

    @property
    def name(self) -> str:
        """The name used in error messages."""
        return self.address.name

    async def connect(self) -> ByteStream:
        """Open a stream. Raises ``OSError`` (also for TLS) for what goes wrong; the caller sets a time-out."""
        address = self.address
        try:
            if address.path is not None:
                return await connect_unix(address.path)
            if address.tls is None:
                return await connect_tcp(address.host, address.port)
            return await connect_tcp(address.host, address.port, ssl_context=address.tls, tls_standard_compatible=False)
        except OSError as error:  # also a refused certificate, which is a ValueError too
            if error.__cause__ is None:
                raise
            # "All connection attempts failed" says less than what each of them said.
            raise OSError(reasons(error.__cause__)) from error.__cause__
        except ValueError as error:
            raise OSError(f"its name cannot be used: {error}") from error
        except (EndOfStream, BrokenResourceError) as error:
            raise HandshakeEndedError("the server ended the TLS handshake") from error

    async def _credentials(self) -> tuple[str | None, str | None]:
        provider = self.address.credential_provider
        if provider is None:
            return self.address.username, self.address.password
        try:
            # It may ask a service over the network, and knows nothing of our event loop.
            found = await to_thread.run_sync(provider.get_credentials, abandon_on_cancel=True)
        except Exception as error:
            # Whatever it raises; and what it says may hold what it should not.
            raise Unreachable(f"{self.name}: the credential provider failed with {type(error).__name__}") from error
        return (found[0], found[1]) if len(found) == 2 else (None, found[0])  # noqa: PLR2004 - or a password alone

    async def _hello(self) -> list[str]:
        """Return the command that logs in and agrees on RESP3."""
        username, password = await self._credentials()
        hello = ["HELLO", "3"]
        if username or password:
            hello += ["AUTH", username or "default", password or ""]
        if self.address.client_name:
            hello += ["SETNAME", self.address.client_name]
        return hello

    async def log_in(self, connection: Connection) -> None:
        """Log in and agree on RESP3, and nothing else: all that a sentinel takes."""
        hello = connection.submit(*await self._hello(), parse=replies.greeting, waits=True)
        await self._greeting(connection, hello)

    async def _greeting(self, connection: Connection, hello: Request) -> Any:
        """Return what the server says of itself, or raise its refusal at once: its other answers do not matter then."""
        try:
            return await reply_to(hello)
        except redis.exceptions.ResponseError as error:
            why = not_resp3(error, str(error).removeprefix(f"{connection.server}: "))
            if why is None:
                raise
            raise NotRESP3(f"{self.name} {why}") from error

    async def shake_hands(self, connection: Connection) -> float:
        """Log in, agree on RESP3, choose the database; return the server's time in seconds.

        Raises the server's refusal as an error of the ``redis`` package; ``BusyLoadingError`` while it loads its data.
        """
        hello = connection.submit(*await self._hello(), parse=replies.greeting, waits=True)
        connection.submit("CLIENT", "SETINFO", "LIB-NAME", _LIBRARY)  # Redis 7.2; refusal does not matter
        select = connection.submit("SELECT", self.address.db) if self.address.db else hello
        ping = connection.submit("PING")  # refused while loading, when TIME is not
        time = connection.submit("TIME", parse=replies.seconds, waits=True)
        connection.version, connection.is_primary, connection.in_cluster = await self._greeting(connection, hello)
        with suppress(redis.exceptions.RedisError):  # told below, unless SELECT was refused
            await reply_to(time)
        select.result()
        now: float = time.result()
        if isinstance(ping.error, NOT_READY):
            raise ping.error  # any other refusal, as MISCONF, is of PING and writes, not of all that is needed
        return now

    async def ask(self, *command: str, parse: Parse, timeout: float) -> Any:  # noqa: ASYNC109 - of its connection
        """Log in on a connection of its own, send ``command``, and return the reply.

        Raises an error of the ``redis`` package.
        """
        failure: redis.exceptions.RedisError | None = None
        try:
            with fail_after(timeout):
                hello = await self._hello()
                connection = Connection(await self.connect(), self.name, timeout=timeout)
                async with create_task_group() as tasks:
                    tasks.start_soon(connection.run)
                    login = connection.submit(*hello, parse=replies.greeting, waits=True)
                    request = connection.submit(*command, parse=parse, waits=True)
                    try:
                        await self._greeting(connection, login)
                        await reply_to(request)
                    except redis.exceptions.RedisError as error:  # told below, where no group wraps it
                        failure = error
                    tasks.cancel_scope.cancel()
        except OSError as error:
            why = str(error) or "it did not answer in time"
            raise Unreachable(f"{self.name} cannot be reached: {why}{self.advice(error)}") from error
        if failure is None:
            return request.result()
        if not (advice := self.advice(failure)):
            raise failure
        if isinstance(failure, ConnectionLost):
            raise Unreachable(failure.why + advice) from failure
        raise type(failure)(f"{failure}{advice}") from failure

    def require_alone(self, connection: Connection) -> None:
        """Raise ``ClusterNodeError`` if this server, on the other end of ``connection``, is a node of a cluster."""
        if connection.in_cluster:
            raise ClusterNodeError(f"{self.name} is a node of a cluster: {self.cluster_advice}")

    @property
    def cluster_advice(self) -> str:
        """What to do if it is a node of a cluster."""
        address = self.address
        where = "host:port" if address.path is not None else self.name.removeprefix("Redis at ")
        return f"use redis{'' if address.tls is None else 's'}+cluster://{where} or cluster=True"

    def advice(self, error: BaseException) -> str:
        """Return what to do about ``error``, with which a first connection ended, as the end of a text; it may be empty."""
        found = what_may_be_wrong(error, tls=self.address.tls is not None)
        return found and f"; {found}"


def reasons(cause: BaseException) -> str:
    """Return why the addresses of a host cannot be connected to, each reason once and in the system's words."""
    errors = cause.exceptions if isinstance(cause, BaseExceptionGroup) else (cause,)
    return "; ".join(
        dict.fromkeys(os.strerror(one.errno) if isinstance(one, OSError) and one.errno else str(one) for one in errors)
    )
