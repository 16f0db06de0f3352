"""Where a Redis server is and how to get in: host options and URLs, TLS, credentials, the handshake.

Rules:
- options are those that ``hosts`` of channels_redis and the URLs of the ``redis`` package have; the ``redis`` package parses
  URLs. What is not known is a ``TypeError`` that lists what there is.
- TLS verifies the server's certificate and name unless it is told not to.
- a password is in no ``repr``, log or error.
"""

from __future__ import annotations

import os
import re
import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import urlsplit

import redis.exceptions
from anyio import (
    BrokenResourceError,
    EndOfStream,
    Event,
    connect_tcp,
    connect_unix,
    create_task_group,
    fail_after,
    to_thread,
)
from anyio.abc import ByteStream, SocketStream
from anyio.streams.tls import TLSStream
from redis.connection import SSLConnection, parse_url
from redis.credentials import CredentialProvider

from .connection import Connection

__all__ = ["Endpoint", "Host", "parse_host", "parse_url_options", "require_hosts"]

Host = str | tuple[str, int] | list[Any] | dict[str, Any]
"""One entry of ``hosts``: a URL, ``(host, port)``, or a ``dict`` of options (``{"address": url, ...}`` or ``{"host": ...}``)."""

DEFAULT_URL: Final = "redis://localhost:6379"
_TLS_OPTIONS: Final = frozenset(
    {
        "ssl_ca_certs", "ssl_ca_data", "ssl_ca_path", "ssl_cert_reqs", "ssl_certfile", "ssl_check_hostname", "ssl_ciphers",
        "ssl_context", "ssl_keyfile", "ssl_min_version", "ssl_password",
    }
)  # fmt: skip
OPTIONS: Final = frozenset(
    {
        "client_name", "credential_provider", "db", "host", "password", "path", "port", "socket_connect_timeout",
        "socket_timeout", "ssl", "unix_socket_path", "username",
    }
) | _TLS_OPTIONS  # fmt: skip
"""All that may be said of a server."""


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """One server, and how to log in there."""

    host: str = "localhost"
    port: int = 6379
    path: str | None = None
    """The unix socket, if it is one."""
    db: int = 0
    username: str | None = field(default=None, repr=False)
    password: str | None = field(default=None, repr=False)
    credential_provider: CredentialProvider | None = field(default=None, repr=False)
    client_name: str | None = None
    timeout: float | None = None
    connect_timeout: float | None = None
    tls: ssl.SSLContext | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        """How errors call it."""
        if self.path is not None:
            return f"Redis at {self.path}"
        return f"Redis at [{self.host}]:{self.port}" if ":" in self.host else f"Redis at {self.host}:{self.port}"

    async def connect(self) -> ByteStream:
        """Open a stream. Raises ``OSError`` (also for TLS) for what goes wrong; the caller sets a time-out."""
        try:
            if self.path is not None:
                return await connect_unix(self.path)
            stream = await self._connect_tcp()
            return stream if self.tls is None else await self._start_tls(stream)
        except OSError:
            raise  # also a refused certificate, which is a ValueError besides
        except ValueError as error:
            raise OSError(f"its name cannot be used: {error}") from error
        except (EndOfStream, BrokenResourceError) as error:
            raise OSError("the server ended the TLS handshake; is it a port for TLS?") from error

    async def _connect_tcp(self) -> SocketStream:
        try:
            return await connect_tcp(self.host, self.port)
        except OSError as error:
            if error.__cause__ is None:
                raise
            # "All connection attempts failed" says less than what each of them said.
            raise OSError(_reasons(error.__cause__)) from error.__cause__

    async def _start_tls(self, stream: SocketStream) -> TLSStream:
        try:
            return await TLSStream.wrap(stream, hostname=self.host, ssl_context=self.tls, standard_compatible=False)
        except BaseException:
            await stream.aclose()
            raise

    async def _credentials(self) -> tuple[str | None, str | None]:
        if self.credential_provider is None:
            return self.username, self.password
        try:
            # It may ask a service over the network, and knows nothing of our event loop.
            found = await to_thread.run_sync(self.credential_provider.get_credentials, abandon_on_cancel=True)
        except Exception as error:
            # Whatever it raises; and what it says may hold what it should not.
            raise redis.exceptions.ConnectionError(
                f"{self.name}: the credential provider failed with {type(error).__name__}"
            ) from error
        return (found[0], found[1]) if len(found) == 2 else (None, found[0])  # noqa: PLR2004 - or a password alone

    async def greeting(self) -> list[str]:
        """Return the command that logs in and agrees on RESP3."""
        username, password = await self._credentials()
        hello = ["HELLO", "3"]
        if username or password:
            hello += ["AUTH", username or "default", password or ""]
        if self.client_name:
            hello += ["SETNAME", self.client_name]
        return hello

    async def ask(self, *command: str, timeout: float) -> Any:  # noqa: ASYNC109 - of its own connection
        """Log in on a connection of its own, send ``command``, and return the reply.

        Raises ``OSError``, for a time-out too, and errors of the ``redis`` package.
        """
        reply: Any = None
        trouble: redis.exceptions.RedisError | None = None
        with fail_after(timeout):
            stream = await self.connect()
            connection = Connection(stream, self.name, timeout=timeout)
            async with create_task_group() as tasks:
                tasks.start_soon(connection.run)
                try:
                    await connection.execute(*await self.greeting())
                    reply = await connection.execute(*command)
                except redis.exceptions.RedisError as error:
                    trouble = error
                finally:
                    tasks.cancel_scope.cancel()
        if trouble is not None:
            raise trouble
        return reply

    async def shake_hands(self, connection: Connection) -> float:
        """Log in, agree on RESP3, choose the database; return the server's time in seconds.

        Raises the server's refusal as an error of the ``redis`` package; ``BusyLoadingError`` while it loads its data.
        """
        requests = [connection.submit(*await self.greeting())]
        connection.submit("CLIENT", "SETINFO", "LIB-NAME", "anyio_channels")  # Redis 7.2; refusal does not matter
        if self.db:
            requests.append(connection.submit("SELECT", self.db))
        requests.append(connection.submit("PING"))  # refused while loading, when TIME is not
        answered = Event()
        time = connection.submit("TIME", done=lambda _: answered.set())
        await answered.wait()
        # The first refusal is the reason for those behind it.
        for request in (*requests, time):
            try:
                request.result()
            except redis.exceptions.ResponseError as error:
                if "unknown command" in str(error):
                    raise redis.exceptions.ConnectionError(
                        f"{self.name} does not know HELLO: Redis 6.2 or newer is needed"
                    ) from error
                raise
        greeting = requests[0].reply
        try:
            protocol, version = greeting[b"proto"], greeting[b"version"]
            seconds, microseconds = map(int, time.reply)
        except (LookupError, TypeError, ValueError):
            protocol = None
        if protocol != 3 or not isinstance(time.reply, list):  # noqa: PLR2004
            raise redis.exceptions.ConnectionError(f"{self.name} does not answer as Redis would: {greeting!r:.100}")
        connection.version = tuple(int(part) for part in re.findall(r"\d+", str(version))[:3])
        connection.is_primary = greeting.get(b"role") == b"master"
        return seconds + microseconds / 1_000_000


def _reasons(cause: BaseException) -> str:
    """Return why the addresses of a host cannot be connected to, each reason once and in the system's words."""
    errors = cause.exceptions if isinstance(cause, BaseExceptionGroup) else (cause,)
    return "; ".join(
        dict.fromkeys(os.strerror(one.errno) if isinstance(one, OSError) and one.errno else str(one) for one in errors)
    )


def require_hosts(hosts: Sequence[Host] | None) -> Sequence[Host]:
    """Return ``hosts`` if it is what a layer takes; for ``None``, the server on this machine."""
    if hosts is None:
        return [DEFAULT_URL]
    if isinstance(hosts, str | bytes | Mapping) or not isinstance(hosts, Sequence):
        raise TypeError("hosts must be a list of Redis hosts, even if there is only one")
    if not hosts:
        raise ValueError("hosts must name at least one Redis host; leave it out for redis://localhost:6379")
    return hosts


def parse_host(host: Host) -> Endpoint:
    """Return the endpoint for one entry of ``hosts``.

    Raises ``TypeError`` for an unknown option and ``ValueError`` for a value that cannot be.
    """
    if isinstance(host, str):
        options = parse_url_options(host)
    elif isinstance(host, Mapping):
        options = dict(host)
        if "address" in options:
            options = parse_url_options(options.pop("address")) | options
    elif isinstance(host, Sequence) and len(host) == 2:  # noqa: PLR2004 - host and port
        options = {"host": host[0], "port": host[1]}
    else:
        raise TypeError("an entry of hosts must be a URL, a (host, port) pair or a dict of options")
    for name in options:
        if name not in OPTIONS:
            raise TypeError(f"unknown option {name!r} of a Redis host; there are: {', '.join(sorted(OPTIONS))}")
    return _to_endpoint(options)


def parse_url_options(url: object) -> dict[str, Any]:
    """Return the options that the URL of a Redis server says."""
    if not isinstance(url, str):
        raise TypeError("the address of a Redis host must be a URL (str)")
    scheme = url.partition("://")[0]
    if scheme not in ("redis", "rediss", "unix"):
        raise ValueError("a Redis URL begins with redis://, rediss:// or unix://")
    try:
        parts = urlsplit(url)
        is_sound = parts.port != 0 and (scheme == "unix" or re.fullmatch(r"(/\d*)?", parts.path) is not None)
    except ValueError:
        is_sound = False
    if not is_sound:
        # No part of it here: a password with a character that it must not have is where a port or path should be.
        raise ValueError(
            "a Redis URL is redis://[user[:password]@]host[:port][/db][?options]; "
            "characters like / ? # [ ] in a user or password must be percent-encoded"
        )
    options: dict[str, Any] = dict(parse_url(url))  # type: ignore[no-untyped-call]
    connection_class = options.pop("connection_class", None)
    if connection_class is SSLConnection:
        options["ssl"] = True
    if scheme == "unix" and "path" not in options:
        raise ValueError("a Redis URL with unix:// must have the path of the socket, as unix:///run/redis.sock")
    return options


def _to_endpoint(options: dict[str, Any]) -> Endpoint:
    path = options.get("path") or options.get("unix_socket_path")
    host, port, db = options.get("host", "localhost"), options.get("port", 6379), options.get("db", 0)
    if not isinstance(host, str) or not host:
        raise TypeError(f"the host of a Redis server must be a str, not {host!r}")
    port, db = _whole("port", port, 1, 65535), _whole("db", db, 0, 2**31)
    provider = options.get("credential_provider")
    if provider is not None and not isinstance(provider, CredentialProvider):
        raise TypeError("credential_provider must be a redis.CredentialProvider")
    for name in ("username", "password", "client_name"):
        if not isinstance(options.get(name), str | None):
            raise TypeError(f"{name} of a Redis host must be a str")
    with_tls = _flag("ssl", options.get("ssl", False))
    if with_tls and path:
        raise ValueError("a Redis host on a unix socket has no TLS")
    if not with_tls and (unused := sorted(_TLS_OPTIONS & options.keys())):
        raise ValueError(f"{', '.join(unused)} of a Redis host have no effect without TLS: use rediss:// or ssl=True")
    return Endpoint(
        host=host,
        port=port,
        path=path,
        db=db,
        username=options.get("username") or None,
        password=options.get("password") or None,
        credential_provider=provider,
        client_name=options.get("client_name"),
        timeout=_seconds("socket_timeout", options.get("socket_timeout")),
        connect_timeout=_seconds("socket_connect_timeout", options.get("socket_connect_timeout")),
        tls=_tls_context(options) if with_tls else None,
    )


def _whole(name: str, value: object, least: int, most: int) -> int:
    try:
        number = int(value) if isinstance(value, int | str) else None
    except ValueError:
        number = None
    if number is None or not least <= number <= most:
        raise ValueError(f"{name} of a Redis host must be a whole number from {least} to {most}, not {value!r}")
    return number


def _flag(name: str, value: object) -> bool:
    flag = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}.get(str(value).lower())
    if flag is None:
        raise ValueError(f"{name} of a Redis host must be True or False, not {value!r}")
    return flag


def _seconds(name: str, value: Any) -> float | None:
    if value is None:
        return None
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise ValueError(f"{name} of a Redis host must be a positive number of seconds, not {value!r}")
    return seconds


def _tls_context(options: dict[str, Any]) -> ssl.SSLContext:
    given = options.get("ssl_context")
    if given is not None:
        if not isinstance(given, ssl.SSLContext):
            raise TypeError(f"ssl_context of a Redis host must be an ssl.SSLContext, not {given!r}")
        return given
    context = ssl.create_default_context(
        cafile=options.get("ssl_ca_certs"), capath=options.get("ssl_ca_path"), cadata=options.get("ssl_ca_data")
    )
    requirement = options.get("ssl_cert_reqs", "required")
    levels = {"required": ssl.CERT_REQUIRED, "optional": ssl.CERT_OPTIONAL, "none": ssl.CERT_NONE}
    level = levels.get(requirement) if isinstance(requirement, str) else requirement
    if not isinstance(level, ssl.VerifyMode):
        raise ValueError(f"ssl_cert_reqs must be one of {', '.join(map(repr, levels))}, not {requirement!r}")  # noqa: TRY004
    check = _flag("ssl_check_hostname", options.get("ssl_check_hostname", True))
    context.check_hostname = check and level is not ssl.CERT_NONE
    context.verify_mode = level
    if options.get("ssl_certfile"):
        context.load_cert_chain(options["ssl_certfile"], options.get("ssl_keyfile"), options.get("ssl_password"))
    if options.get("ssl_min_version") is not None:
        context.minimum_version = ssl.TLSVersion(int(options["ssl_min_version"]))  # redis before 6 leaves it a str
    if options.get("ssl_ciphers"):
        context.set_ciphers(options["ssl_ciphers"])
    return context
