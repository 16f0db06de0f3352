"""Layers from URLs: an open table of schemes, each with the function that makes its layer.

Rules:
- the scheme chooses the layer, the query gives its options. An unknown option is an error that lists the known ones.
- the options of a layer are those in its signature, stated there and nowhere else. A URL can give numbers and text;
  functions, lists and mappings are keyword arguments.
- a layer is imported when a URL asks for it, so that nobody needs the extras of the others.
- no error has a part of the URL in it that may be a password.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from inspect import signature
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias, get_origin
from urllib.parse import parse_qsl, urlsplit

from .contract.layer import BaseChannelLayer

if TYPE_CHECKING:
    from .redis.queue.layer import RedisChannelLayer

__all__ = ["Factory", "create_channel_layer", "create_redis_channel_layer", "register_scheme"]

Factory: TypeAlias = Callable[..., BaseChannelLayer]
"""Makes a layer, not open, when called as ``factory(url, **options)``."""

_SCHEME: Final = re.compile(r"[a-z][a-z0-9+.-]*")
_Readers: TypeAlias = dict[str, Callable[[str], Any] | None]
"""The options of a layer, each with the function that reads it from text; ``None`` if a URL cannot give it."""


def create_channel_layer(url: str, **options: Any) -> BaseChannelLayer:
    """Make the layer that ``url`` describes, not yet opened: ``create_channel_layer("memory://?capacity=10")``.

    ``redis://``, ``rediss://`` (TLS) and ``unix://`` are the queue layer on Redis, with ``+pubsub`` (``redis+pubsub://``) the
    pub/sub layer. ``redis://host:port,host:port`` are several servers over which names are spread;
    ``redis+sentinel://host:port,host:port/master_name`` and ``redis+cluster://host:port,host:port``, also with
    ``rediss`` and ``+pubsub`` behind, are those behind Sentinel and on a Redis Cluster. The query gives the layer's options,
    and for Redis those of the ``redis`` package (``ssl_ca_certs``, ``socket_timeout``, ...); ``options`` gives the layer's
    too, and those that a URL cannot give. ``anyio_channels.urls.register_scheme`` adds schemes.

    Raises ``TypeError`` for an option that the layer does not have or that is given twice, ``ValueError`` for an unknown
    scheme, a value of the wrong form, or a part of the URL that means nothing to the layer, and ``ImportError`` for a layer
    whose extra is not installed.
    """
    if not isinstance(url, str):
        raise TypeError(f"a channel layer URL must be a str, not {type(url).__name__}")  # it may hold a password
    scheme = urlsplit(url).scheme
    factory = _schemes.get(scheme)
    if factory is None:
        known = ", ".join(f"{scheme}://" for scheme in _schemes)
        raise ValueError(f"unknown channel layer URL scheme {scheme + '://'!r}; there are: {known}")
    if not url[len(scheme) :].startswith("://"):
        raise ValueError(f"a channel layer URL has two slashes behind its scheme: {scheme}://...")
    return factory(url, **options)


def create_redis_channel_layer(url: str, **options: Any) -> RedisChannelLayer:
    """Make the queue layer on the Redis that ``url`` names, as ``create_channel_layer`` does."""
    layer = create_channel_layer(url, **options)
    from .redis.queue.layer import RedisChannelLayer  # noqa: PLC0415 - as below

    if not isinstance(layer, RedisChannelLayer):
        raise ValueError(  # noqa: TRY004 - a value
            "a URL of the queue layer begins with redis://, rediss://, unix://, redis+sentinel:// or redis+cluster://"
        )
    return layer


def register_scheme(scheme: str, factory: Factory) -> None:
    """Have ``create_channel_layer`` make a layer by ``factory(url, **options)`` for each URL that begins ``scheme://``.

    For layers that are not in this package. The factory gets the whole URL and all keyword arguments that
    ``create_channel_layer`` was given, and returns a layer that is not open. It should raise ``TypeError`` for an option
    that it does not know, so that a misspelt one is not ignored, and keep passwords out of what it raises. A scheme stays
    registered as long as the process runs.

    Raises ``ValueError`` for a scheme that is taken, or is not one: a lower-case letter, then lower-case letters, digits,
    ``+``, ``-`` and ``.``. ``TypeError`` for a scheme that is not a ``str`` and a factory that cannot be called.
    """
    if not isinstance(scheme, str):
        raise TypeError(f"a URL scheme must be a str, not {scheme!r}")
    if not _SCHEME.fullmatch(scheme):
        raise ValueError(
            "a URL scheme is a lower-case ASCII letter, then lower-case letters, digits, '+', '-' and '.', without '://'; "
            f"got {scheme!r}"
        )
    if not callable(factory):
        raise TypeError(f"the factory of a URL scheme must be callable, not {factory!r}")
    if scheme in _schemes:
        raise ValueError(f"the channel layer URL scheme {scheme + '://'!r} is taken; choose another")
    _schemes[scheme] = factory


# The layers of this package


def _create_memory(url: str, /, **options: Any) -> BaseChannelLayer:
    from .memory import InMemoryChannelLayer  # noqa: PLC0415 - layers are imported when a URL asks for one

    parts = urlsplit(url)
    if parts.netloc or parts.path.strip("/") or parts.fragment:
        raise ValueError("a memory:// URL has no host, path or fragment: write memory:// or memory://?capacity=10")
    known = _options_of(InMemoryChannelLayer)
    in_query = _read(parse_qsl(parts.query, keep_blank_values=True), known)
    _require_known(options, known)
    _require_once(in_query, options)
    return InMemoryChannelLayer(**in_query, **options)


def _create_redis(url: str, /, **options: Any) -> BaseChannelLayer:
    scheme, _, rest = url.partition("://")
    server = scheme.removesuffix("+pubsub")
    try:
        from .redis.client import options_of, split_url  # noqa: PLC0415 - as above
        from .redis.pubsub import RedisPubSubChannelLayer  # noqa: PLC0415
        from .redis.queue.layer import RedisChannelLayer  # noqa: PLC0415
    except ImportError as error:
        raise ImportError(f"a {scheme}:// channel layer needs an extra: pip install 'anyio_channels[redis]'") from error
    is_queue = server == scheme
    layer_class = RedisChannelLayer if is_queue else RedisPubSubChannelLayer
    known = _options_of(layer_class)
    del known["hosts"]  # which the URL names
    # The query holds options of the layer and of the connection; the client takes the latter.
    names = [name for name, _ in parse_qsl(urlsplit(url).query, keep_blank_values=True)]
    if not is_queue and "random_prefix_length" in names:
        raise TypeError("option 'random_prefix_length' is one of the queue layer; the pub/sub layer has no such prefix")
    _require_sayable(names, known, options_of(server))
    hosts, is_cluster, of_layer = split_url(f"{server}://{rest}", known)
    in_query = _read(of_layer, known)
    _require_known(options, known)
    _require_once(in_query, options)
    if is_cluster:
        options["cluster"] = True
    return layer_class(hosts, **in_query, **options)


_schemes: Final[dict[str, Factory]] = {
    "memory": _create_memory,
    "redis": _create_redis,
    "rediss": _create_redis,
    "unix": _create_redis,
    "redis+sentinel": _create_redis,
    "rediss+sentinel": _create_redis,
    "redis+cluster": _create_redis,
    "rediss+cluster": _create_redis,
    "redis+pubsub": _create_redis,
    "rediss+pubsub": _create_redis,
    "unix+pubsub": _create_redis,
    "redis+sentinel+pubsub": _create_redis,
    "rediss+sentinel+pubsub": _create_redis,
    "redis+cluster+pubsub": _create_redis,
    "rediss+cluster+pubsub": _create_redis,
}


# Their options


def _options_of(layer_class: type[BaseChannelLayer]) -> _Readers:
    """Return the options in the signature of ``layer_class``: a URL can give what is annotated as a number or text."""
    parameters = signature(layer_class, eval_str=True).parameters.values()
    return {one.name: _reader_of(one.annotation) for one in parameters}


def _reader_of(annotation: Any) -> Callable[[str], Any] | None:
    if annotation in (float, int, str):
        reader: type[float | int | str] = annotation
        return reader
    return str if get_origin(annotation) is Literal else None  # the layer checks the choice


def _sayable(known: _Readers) -> str:
    return ", ".join(name for name, reader in known.items() if reader is not None)


def _read(pairs: Iterable[tuple[str, str]], known: _Readers) -> dict[str, Any]:
    """Return the values of the options in a query."""
    found: dict[str, Any] = {}
    for name, text in pairs:
        reader = known.get(name)
        if reader is None:
            raise TypeError(f"unknown option {name!r} in a channel layer URL; there are: {_sayable(known)}")
        _require_once(found, {name: text})
        try:
            found[name] = reader(text)
        except ValueError:
            raise ValueError(f"option {name} in a channel layer URL must be a number, not {text!r}") from None
    return found


def _require_sayable(names: Iterable[str], known: _Readers, of_connection: Sequence[str]) -> None:
    for name in names:
        if name in known and known[name] is None:
            raise TypeError(f"option {name!r} cannot be said in a channel layer URL: give it as a keyword argument")
        if name not in known and name not in of_connection:
            raise TypeError(
                f"unknown option {name!r} in a channel layer URL; there are: {_sayable(known)}; and of the "
                f"connection: {', '.join(of_connection)}"
            )


def _require_known(options: dict[str, Any], known: Iterable[str]) -> None:
    for name in options:
        if name not in known:
            raise TypeError(f"unknown option {name!r} for this channel layer; there are: {', '.join(known)}")


def _require_once(first: dict[str, Any], second: dict[str, Any]) -> None:
    for name in first.keys() & second.keys():
        raise TypeError(f"option {name!r} of a channel layer is given twice")
