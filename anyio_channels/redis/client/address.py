"""Where Redis servers are and how to log in there: from URLs and options to frozen dataclasses. The only parser of these.

Rules:
- options are those that ``hosts`` of channels_redis and the URLs of the ``redis`` package have; the ``redis`` package parses
  the query of a URL. An unknown option is a ``TypeError`` that lists the known ones. One of theirs that means nothing here
  is ignored, and named once in the log for each list of hosts.
- TLS verifies the server's certificate and name unless it is told not to.
- a password is in no ``repr``, log or error.
- nothing is connected here; the files of TLS options are read at once, so that a missing one is told early.
"""

from __future__ import annotations

import os
import re
import ssl
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar
from urllib.parse import parse_qsl, urlencode, urlsplit

from redis.connection import SSLConnection, parse_url
from redis.credentials import CredentialProvider

from anyio_channels.log import HOST_OPTIONS_IGNORED, shown

Host = str | tuple[str, int] | list[Any] | dict[str, Any]
"""One entry of ``hosts``: a URL, ``(host, port)``, or a ``dict`` of options (``{"address": url, ...}`` or ``{"host": ...}``)."""

DEFAULT_URL: Final = "redis://localhost:6379"
_TLS_OPTIONS: Final = frozenset(
    {
        "ssl_ca_certs", "ssl_ca_data", "ssl_ca_path", "ssl_cert_reqs", "ssl_certfile", "ssl_check_hostname", "ssl_ciphers",
        "ssl_context", "ssl_keyfile", "ssl_min_version", "ssl_password",
    }
)  # fmt: skip
_SENTINEL_PORT: Final = 26379
_MOST_SECONDS: Final = 10**9  # as of every option of a layer
T = TypeVar("T")
_SENTINEL_HOST: Final = re.compile(r"(?:\[([^\]]+)\]|([^:\[\]@]+))(?::(\d{1,5}))?")


@dataclass(frozen=True, kw_only=True)
class Address:
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
    keep_alive: float | None = None
    tls: ssl.SSLContext | None = field(default=None, repr=False)
    ignored: tuple[str, ...] = field(default=(), repr=False, compare=False)
    """The names of options that were given and mean nothing here."""

    @property
    def name(self) -> str:
        """The name used in error messages."""
        if self.path is not None:
            return f"Redis at {self.path}"
        return f"Redis at [{self.host}]:{self.port}" if ":" in self.host else f"Redis at {self.host}:{self.port}"


@dataclass(frozen=True)
class SentinelAddress:
    """A primary that sentinels watch under a name."""

    sentinels: tuple[Address, ...]
    master_name: str
    primary: Address
    """How to log in there; the sentinels say where it is."""

    @property
    def ignored(self) -> tuple[str, ...]:
        """The names of options that were given and mean nothing here."""
        return (*self.primary.ignored, *(name for one in self.sentinels for name in one.ignored))


class SplitURL(NamedTuple):
    """What a URL with options for somebody else says."""

    hosts: list[Host]
    is_cluster: bool
    rest: list[tuple[str, str]]
    """The options in the query that are for somebody else."""


# Hosts


def parse_hosts(hosts: Sequence[Host] | None) -> list[Address | SentinelAddress]:
    """Return the addresses for ``hosts``; for ``None``, the server on this machine.

    Raises ``TypeError`` for an unknown option and ``ValueError`` for a value that cannot be.
    """
    if hosts is None:
        hosts = [DEFAULT_URL]
    if isinstance(hosts, str | bytes | Mapping) or not isinstance(hosts, Sequence):
        raise TypeError("hosts must be a list of Redis hosts, even if there is only one")
    if not hosts:
        raise ValueError("hosts must name at least one Redis host; leave it out for redis://localhost:6379")
    addresses = [parse_host(host) for host in hosts]
    if ignored := sorted({name for address in addresses for name in address.ignored}):
        HOST_OPTIONS_IGNORED.write(options=", ".join(ignored))
    return addresses


def parse_host(host: Host) -> Address | SentinelAddress:
    """Return the address for one entry of ``hosts``; raises as ``parse_hosts``."""
    if isinstance(host, str):
        options = _parse_url(host)
    elif isinstance(host, Mapping):
        options = dict(host)
        if "address" in options:
            options = _parse_url(options.pop("address")) | options
    elif _is_pair(host):
        options = {"host": host[0], "port": host[1]}
    else:
        raise TypeError("an entry of hosts must be a URL, a (host, port) pair or a dict of options")
    if "sentinels" in options or "master_name" in options:
        return _to_sentinels(options)
    return _to_address(options)


def _to_sentinels(options: dict[str, Any]) -> SentinelAddress:
    found = options.pop("sentinels", None)
    master_name = options.pop("master_name", None)
    of_sentinels = options.pop("sentinel_kwargs", None) or {}
    if not isinstance(found, Sequence) or isinstance(found, str) or not found:
        raise TypeError("sentinels of a Redis host must be a list of (host, port) pairs, with one at least")
    if not isinstance(master_name, str) or not master_name:
        raise TypeError("master_name of a Redis host must be the name that the sentinels have for it (str)")
    if not isinstance(of_sentinels, Mapping):
        raise TypeError("sentinel_kwargs of a Redis host must be a dict of options for the sentinels")
    if unused := sorted({"host", "port", "path", "unix_socket_path"} & options.keys()):
        raise ValueError(f"{', '.join(unused)} of a Redis host have no effect beside sentinels, who say where it is")
    if odd := [one for one in found if not _is_pair(one)]:
        raise TypeError(f"an entry of sentinels must be a (host, port) pair, not {odd[0]!r:.100}")
    sentinels = tuple(_to_address({**of_sentinels, "host": host, "port": port}) for host, port in found)
    return SentinelAddress(sentinels, master_name, _to_address(options))


def _is_pair(host: object) -> bool:
    return isinstance(host, Sequence) and not isinstance(host, str) and len(host) == 2  # noqa: PLR2004


def _to_address(options: dict[str, Any]) -> Address:
    for name in options:
        if name not in _OPTIONS:
            raise TypeError(f"unknown option {name!r} of a Redis host; there are: {', '.join(_OPTIONS)}")
    values = {_FIELDS.get(name, name): rule(name, options[name]) for name, rule in _RULES.items() if name in options}
    path = options.get("path") or options.get("unix_socket_path")
    with_tls = values.pop("ssl", False)
    if with_tls and path:
        raise ValueError("a Redis host on a unix socket has no TLS")
    if not with_tls and (unused := sorted(_TLS_OPTIONS & options.keys())):
        raise ValueError(f"{', '.join(unused)} of a Redis host have no effect without TLS: use rediss:// or ssl=True")
    ignored = tuple(name for name in options if name in _IGNORED)
    return Address(**values, path=path, tls=_tls_context(options) if with_tls else None, ignored=ignored)


# URLs


def _parse_url(url: object) -> dict[str, Any]:
    """Return the options that the URL of a server, or of sentinels, gives."""
    if not isinstance(url, str):
        raise TypeError("the address of a Redis host must be a URL (str)")
    scheme = url.partition("://")[0]
    if scheme in ("redis+sentinel", "rediss+sentinel"):
        return _parse_sentinel_url(url)
    if scheme not in ("redis", "rediss", "unix"):
        raise ValueError("a Redis URL begins with redis://, rediss:// or unix://")
    try:
        parts = urlsplit(url)
        is_sound = parts.port != 0 and (scheme == "unix" or re.fullmatch(r"(/\d*)?", parts.path) is not None)
    except ValueError:
        is_sound = False
    if not is_sound:
        socket = url.partition("?")[0].partition("://")[2]
        if scheme != "unix" and socket.startswith("/") and "@" not in socket:
            raise ValueError(
                f"a Redis URL with a unix socket begins with unix://: write unix://{socket}, and the database as ?db="
            )
        # No part of it here: a password with a character that it must not have is where a port or path should be.
        raise ValueError(
            "a Redis URL is redis://[user[:password]@]host[:port][/db][?options], or unix:///run/redis.sock for a unix socket; "
            "characters like / ? # [ ] in a user or password must be percent-encoded"
        )
    options: dict[str, Any] = dict(parse_url(url))  # type: ignore[no-untyped-call]
    if options.pop("connection_class", None) is SSLConnection:
        options["ssl"] = True
    if scheme == "unix" and "path" not in options:
        raise ValueError("a Redis URL with unix:// must have the path of the socket, as unix:///run/redis.sock")
    return options


def _parse_sentinel_url(url: str) -> dict[str, Any]:
    scheme, login, servers, path = _parts(url)
    master_name, _, db = path[1:].partition("/")
    pairs = [pair for server in servers.split(",") if (pair := _SENTINEL_HOST.fullmatch(server))]
    if not master_name or len(pairs) <= servers.count(",") or not re.fullmatch(r"\d*", db):
        # No part of it here: it may hold a password.
        raise ValueError(
            "a Sentinel URL is redis+sentinel://[user[:password]@]host[:port][,host[:port]...]/master_name[/db][?options]"
        )
    # The rest is as in any URL of a Redis; the host is what the sentinels will say.
    options = _parse_url(f"{scheme.partition('+')[0]}://{login}primary/{db}?{url.partition('?')[2]}")
    del options["host"]
    of_sentinels = {name: value for name, value in options.items() if name.startswith("ssl")}
    for name in ("username", "password"):
        if f"sentinel_{name}" in options:
            of_sentinels[name] = options.pop(f"sentinel_{name}")
    return {
        **options,
        "sentinels": [(pair[1] or pair[2], int(pair[3] or _SENTINEL_PORT)) for pair in pairs],
        "master_name": master_name,
        "sentinel_kwargs": of_sentinels,
    }


def _parts(url: str) -> tuple[str, str, str, str]:
    """Return the scheme of ``url``, its user and password with the @, the names of servers, and the path with its slash."""
    scheme, _, rest = url.partition("?")[0].partition("://")
    login, at, nodes = rest.rpartition("@")
    names, slash, path = nodes.partition("/")
    return scheme, login + at, names, slash + path


def options_of(scheme: str) -> list[str]:
    """Return the names of the options that a URL of ``scheme`` may give for its servers."""
    return [*_OPTIONS, *(["sentinel_password", "sentinel_username"] if scheme.endswith("+sentinel") else [])]


def split_url(url: str, others: Collection[str]) -> SplitURL:
    """Split a URL of one server, or of several behind each other, of sentinels or of a cluster, that has more options.

    ``others``: the names of options that are not for the servers.
    """
    scheme, login, names, path = _parts(url)
    if "," in names and not all(names.split(",")):
        raise ValueError(f"a list of servers in a channel layer URL has one without a name: {names!r}")
    if "," in login + names + path and "@" in login[:-1]:
        raise ValueError(
            "user and password stand once in a channel layer URL, in front of all servers; an @ in them is %40"
        )
    pairs = parse_qsl(urlsplit(url).query, keep_blank_values=True)
    tail = urlencode([pair for pair in pairs if pair[0] not in others])
    is_cluster = scheme.endswith("+cluster")
    scheme = scheme.removesuffix("+cluster")
    is_list = is_cluster or scheme in {"redis", "rediss"}
    hosts: list[Host] = [
        f"{scheme}://{login}{name}{path}{tail and '?'}{tail}" for name in (names.split(",") if is_list else [names])
    ]
    return SplitURL(hosts, is_cluster, [pair for pair in pairs if pair[0] in others])


# Values


def _host(name: str, value: object) -> str:
    if not isinstance(value, str) or not value:
        raise TypeError(f"the {name} of a Redis server must be a str, not {value!r}")
    return value


def _only(kind: type[T], name: str, value: object) -> T | None:
    if value is not None and not isinstance(value, kind):
        raise TypeError(f"{name} of a Redis host must be a {kind.__name__}")  # and not what it is: it may be a password
    return value or None


def _whole(least: int, most: int, name: str, value: object) -> int:
    with suppress(ValueError):
        if isinstance(value, int | str) and least <= int(value) <= most:
            return int(value)
    raise ValueError(f"{name} of a Redis host must be a whole number from {least} to {most}, not {shown(value)}")


def _flag(name: str, value: object) -> bool:
    flag = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}.get(str(value).lower())
    if flag is None:
        raise ValueError(f"{name} of a Redis host must be True or False, not {value!r}")
    return flag


def _seconds(name: str, value: Any) -> float | None:
    if value is None:
        return None
    with suppress(TypeError, ValueError, OverflowError):
        if 0 < (seconds := float(value)) <= _MOST_SECONDS:
            return seconds
    raise ValueError(
        f"{name} of a Redis host must be a positive number of seconds, at most {_MOST_SECONDS}, not {shown(value)}"
    )


def _interval(name: str, value: Any) -> float | None:
    return None if value == 0 else _seconds(name, value)  # 0 is the default of the redis package


_RULES: Final[dict[str, Callable[[str, Any], Any]]] = {
    "client_name": partial(_only, str),
    "credential_provider": partial(_only, CredentialProvider),
    "db": partial(_whole, 0, 2**31),
    "health_check_interval": _interval,
    "host": _host,
    "password": partial(_only, str),
    "port": partial(_whole, 1, 65535),
    "socket_connect_timeout": _seconds,
    "socket_timeout": _seconds,
    "ssl": _flag,
    "username": partial(_only, str),
}
_FIELDS: Final = {
    "health_check_interval": "keep_alive",
    "socket_connect_timeout": "connect_timeout",
    "socket_timeout": "timeout",
}
"""The fields of ``Address`` whose options are called otherwise."""
_IGNORED: Final = frozenset(
    {
        "decode_responses", "driver_info", "encoder_class", "encoding", "encoding_errors", "lib_name", "lib_version",
        "max_connections", "parser_class", "protocol", "retry", "retry_on_error", "retry_on_timeout", "socket_keepalive",
        "socket_keepalive_options", "socket_read_size", "socket_type",
    }
)  # fmt: skip
"""Options of the ``redis`` package, and so of channels_redis, that say how its connections work and not where they lead."""
_OPTIONS: Final = sorted({*_RULES, *_TLS_OPTIONS, *_IGNORED, "path", "unix_socket_path"})
"""Every option a host entry accepts."""


def _tls_context(options: dict[str, Any]) -> ssl.SSLContext:
    given = options.get("ssl_context")
    if given is not None:
        if not isinstance(given, ssl.SSLContext):
            raise TypeError(f"ssl_context of a Redis host must be an ssl.SSLContext, not {given!r}")
        return given
    context = _trusting_context(options)
    requirement = options.get("ssl_cert_reqs", "required")
    levels = {"required": ssl.CERT_REQUIRED, "optional": ssl.CERT_OPTIONAL, "none": ssl.CERT_NONE}
    level = requirement
    if requirement is None or isinstance(requirement, str):  # the redis package takes None, and Celery CERT_NONE
        level = levels.get(str(requirement).lower().removeprefix("cert_"))
    if not isinstance(level, ssl.VerifyMode):
        raise ValueError(f"ssl_cert_reqs must be one of {', '.join(map(repr, levels))}, not {requirement!r}")  # noqa: TRY004
    check = _flag("ssl_check_hostname", options.get("ssl_check_hostname", True))
    context.check_hostname = check and level is not ssl.CERT_NONE
    context.verify_mode = level
    _load_own_certificate(context, options)
    if options.get("ssl_min_version") is not None:
        context.minimum_version = ssl.TLSVersion(int(options["ssl_min_version"]))  # redis before 6 leaves it a str
    if options.get("ssl_ciphers"):
        try:
            context.set_ciphers(options["ssl_ciphers"])
        except ssl.SSLError as error:
            raise ValueError(
                f"ssl_ciphers of a Redis host names no cipher that there is: {options['ssl_ciphers']!r}"
            ) from error
    return context


def _trusting_context(options: dict[str, Any]) -> ssl.SSLContext:
    """Return a context that trusts the authorities that ``options`` names, or those of the system."""
    given = {name: options[name] for name in ("ssl_ca_certs", "ssl_ca_path", "ssl_ca_data") if options.get(name)}
    if "ssl_ca_certs" in given:
        _require_path("ssl_ca_certs", given["ssl_ca_certs"])
    if "ssl_ca_path" in given:
        _require_path("ssl_ca_path", given["ssl_ca_path"])
    try:
        return ssl.create_default_context(
            cafile=given.get("ssl_ca_certs"), capath=given.get("ssl_ca_path"), cadata=given.get("ssl_ca_data")
        )
    except (ssl.SSLError, TypeError, ValueError) as error:
        which = " or ".join(name if name == "ssl_ca_data" else f"{name} ({given[name]!r})" for name in given)
        raise ValueError(f"{which} of a Redis host holds no certificates in PEM: {error}") from error


def _load_own_certificate(context: ssl.SSLContext, options: dict[str, Any]) -> None:
    """Have the client identify itself by the certificate that ``options`` names, if they do."""
    files = {name: options[name] for name in ("ssl_certfile", "ssl_keyfile") if options.get(name)}
    if "ssl_certfile" not in files:
        if unused := [name for name in ("ssl_keyfile", "ssl_password") if options.get(name)]:
            raise ValueError(f"{', '.join(unused)} of a Redis host needs ssl_certfile too, the certificate")
        return
    for name, path in files.items():
        _require_path(name, path)
    try:
        # Not None for the password: OpenSSL would ask for it at the terminal.
        context.load_cert_chain(files["ssl_certfile"], files.get("ssl_keyfile"), options.get("ssl_password") or "")
    except (ssl.SSLError, TypeError, ValueError) as error:
        which = " and ".join(f"{name} ({path!r})" for name, path in files.items())
        rule = (
            "a certificate and its private key in PEM (ssl_keyfile if the key is elsewhere, ssl_password if it has one)"
        )
        raise ValueError(f"{which} of a Redis host must hold {rule}: {error}") from error


def _require_path(name: str, path: Any) -> None:
    """Raise unless ``path``, the value of option ``name``, is there and can be read: OpenSSL does not say which file it was."""
    try:
        if name == "ssl_ca_path":
            for directory in os.fsdecode(path).split(os.pathsep):
                with os.scandir(directory):
                    pass
        else:
            Path(os.fsdecode(path)).open("rb").close()
    except OSError as error:
        raise OSError(error.errno, f"{name} of a Redis host cannot be read: {error.strerror}", path) from error
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} of a Redis host must be a path, not {path!r}") from error
