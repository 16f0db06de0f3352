"""Layers by alias, and layers from URLs.

Rules:
- the registry opens and closes a layer only when asked to by ``open()``; a layer known by two aliases is one layer.
- in a URL the scheme says which layer, the query gives its options; what it does not know is an error that lists what
  there is. Options that a URL cannot say (functions, mappings) are keyword arguments.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import parse_qsl, urlsplit

from .base import BaseChannelLayer

if TYPE_CHECKING:
    from .redis import RedisChannelLayer

__all__ = [
    "ChannelLayerRegistry",
    "channel_layers",
    "create_channel_layer",
    "create_redis_channel_layer",
    "get_channel_layer",
    "has_layers",
    "register_channel_layer",
    "unregister_channel_layer",
]


class ChannelLayerRegistry:
    """Channel layers by alias."""

    def __init__(self) -> None:
        """Start empty."""
        self._layers: dict[str, BaseChannelLayer] = {}

    def __repr__(self) -> str:
        """List the aliases."""
        return f"<ChannelLayerRegistry {self.list_aliases()}>"

    def register(self, alias: str, layer: BaseChannelLayer) -> None:
        """Make ``layer`` known as ``alias``, in the place of one that was. ``TypeError`` for what is no layer."""
        if not isinstance(alias, str):
            raise TypeError(f"an alias must be a str, not {alias!r}")
        if not isinstance(layer, BaseChannelLayer):
            raise TypeError(f"only a BaseChannelLayer can be registered, not {layer!r}")
        self._layers[alias] = layer

    def unregister(self, alias: str) -> None:
        """Forget ``alias``; nothing happens if it is not known. The layer is not closed."""
        self._layers.pop(alias, None)

    def get(self, alias: str) -> BaseChannelLayer | None:
        """Return the layer known as ``alias``, or ``None``."""
        return self._layers.get(alias)

    def list_aliases(self) -> list[str]:
        """Return all aliases, in the order of registration."""
        return list(self._layers)

    def clear(self) -> None:
        """Forget all aliases. No layer is closed."""
        self._layers.clear()

    @asynccontextmanager
    async def open(self, app: object = None, /) -> AsyncIterator[None]:  # noqa: ARG002 - who calls it as a lifespan gives one
        """Open every registered layer for as long as the block runs: ``async with channel_layers.open():``.

        Fits where an ASGI framework takes a lifespan: ``Starlette(lifespan=channel_layers.open)``, and FastAPI's too;
        ``app`` is what they pass, and is not used. Layers are opened in the order of registration and closed in the
        reverse order, also when cancelled; a layer known by two aliases is opened once. What is registered or forgotten
        while the block runs changes nothing about which layers are open.

        Raises what a layer raises that cannot be opened, when those opened before it have been closed: ``RuntimeError``
        if it is open already. If cancelled while opening, all are closed.
        """
        async with AsyncExitStack() as stack:
            for layer in {id(layer): layer for layer in self._layers.values()}.values():
                await stack.enter_async_context(layer)
            yield

    def __contains__(self, alias: object) -> bool:
        """Whether ``alias`` is known."""
        return alias in self._layers

    def __getitem__(self, alias: str) -> BaseChannelLayer:
        """Return the layer known as ``alias``; the ``KeyError`` for an unknown one lists the known."""
        try:
            return self._layers[alias]
        except KeyError:
            known = ", ".join(map(repr, self._layers)) or "none"
            raise KeyError(f"no channel layer is registered as {alias!r}; registered: {known}") from None

    def __len__(self) -> int:
        """How many aliases are known."""
        return len(self._layers)


channel_layers: Final = ChannelLayerRegistry()
"""The registry of the process."""


def get_channel_layer(alias: str = "default") -> BaseChannelLayer | None:
    """Return the layer registered as ``alias``, or ``None``."""
    return channel_layers.get(alias)


def register_channel_layer(alias: str, layer: BaseChannelLayer) -> None:
    """Register ``layer`` as ``alias`` in ``channel_layers``."""
    channel_layers.register(alias, layer)


def unregister_channel_layer(alias: str) -> None:
    """Forget ``alias`` in ``channel_layers``; nothing happens if it is not known."""
    channel_layers.unregister(alias)


def has_layers() -> bool:
    """Whether any layer is registered in ``channel_layers``."""
    return len(channel_layers) > 0


def create_channel_layer(url: str, **options: Any) -> BaseChannelLayer:
    """Make the layer that ``url`` describes, not yet opened: ``create_channel_layer("memory://?capacity=10")``.

    ``redis://``, ``rediss://`` (TLS) and ``unix://`` are the queue layer on Redis, with ``+pubsub`` (``redis+pubsub://``) the
    pub/sub layer. ``redis://host:port,host:port`` are several servers over which names are spread;
    ``redis+sentinel://host:port,host:port/master_name`` and ``redis+cluster://host:port,host:port``, also with
    ``rediss`` and ``+pubsub`` behind, are those behind Sentinel and on a Redis Cluster. The query gives the layer's options,
    and for Redis those of the ``redis`` package (``ssl_ca_certs``, ``socket_timeout``, ...); ``options`` gives the layer's
    too, and those that a URL cannot say.

    Raises ``TypeError`` for an option that the layer does not have or that is given twice, ``ValueError`` for an unknown
    scheme, a value of the wrong form, or a part of the URL that means nothing to the layer, and ``ImportError`` for a layer
    whose extra is not installed.
    """
    if not isinstance(url, str):
        raise TypeError(f"a channel layer URL must be a str, not {type(url).__name__}")  # it may hold a password
    scheme = urlsplit(url).scheme
    create = _SCHEMES.get(scheme)
    if create is None:
        known = ", ".join(f"{scheme}://" for scheme in _SCHEMES)
        raise ValueError(f"unknown channel layer URL scheme {scheme + '://'!r}; there are: {known}")
    if not url[len(scheme) :].startswith("://"):
        raise ValueError(f"a channel layer URL has two slashes behind its scheme: {scheme}://...")
    return create(url, options)


def create_redis_channel_layer(url: str, **options: Any) -> RedisChannelLayer:
    """Make the queue layer on the Redis that ``url`` names, as ``create_channel_layer`` does."""
    layer = create_channel_layer(url, **options)
    from .redis import RedisChannelLayer  # noqa: PLC0415 - as below

    if not isinstance(layer, RedisChannelLayer):
        raise ValueError(  # noqa: TRY004 - a value
            "a URL of the queue layer begins with redis://, rediss://, unix://, redis+sentinel:// or redis+cluster://"
        )
    return layer


def _create_memory(url: str, options: dict[str, Any]) -> BaseChannelLayer:
    from .memory import InMemoryChannelLayer  # noqa: PLC0415 - layers are imported when a URL asks for one

    parts = urlsplit(url)
    if parts.netloc or parts.path.strip("/") or parts.fragment:
        raise ValueError("a memory:// URL has no host, path or fragment: write memory:// or memory://?capacity=10")
    in_query = _query_options(
        parse_qsl(parts.query, keep_blank_values=True),
        {"expiry": float, "group_expiry": float, "capacity": int, "max_message_size": int},
    )
    _require_known_options(options, (*_COMMON_OPTIONS, "clock"))
    _require_once(in_query, options)
    return InMemoryChannelLayer(**in_query, **options)


def _create_redis(url: str, options: dict[str, Any]) -> BaseChannelLayer:
    scheme, _, rest = url.partition("://")
    server = scheme.removesuffix("+pubsub")
    try:
        from anyio_channels.redis.client import options_of, split_url  # noqa: PLC0415 - as above

        from .redis import RedisChannelLayer, RedisPubSubChannelLayer  # noqa: PLC0415
    except ImportError as error:
        raise ImportError(f"a {scheme}:// channel layer needs an extra: pip install 'anyio_channels[redis]'") from error
    # The query holds options of the layer and of the connection; the client takes the latter.
    pairs = parse_qsl(urlsplit(url).query, keep_blank_values=True)
    _require_options_of_urls(options_of(server), [name for name, _ in pairs])
    hosts, is_cluster, of_layer = split_url(f"{server}://{rest}", _REDIS_TYPES)
    in_query = _query_options(of_layer, _REDIS_TYPES)
    if is_cluster:
        options = {**options, "cluster": True}
    if server != scheme:
        _require_known_options(options, (*_REDIS_OPTIONS, "on_disconnect", "on_reconnect"))
        if "random_prefix_length" in in_query:
            raise TypeError(
                "option 'random_prefix_length' is one of the queue layer; the pub/sub layer has no such prefix"
            )
        _require_once(in_query, options)
        return RedisPubSubChannelLayer(hosts, **in_query, **options)
    _require_known_options(options, (*_REDIS_OPTIONS, "random_prefix_length"))
    _require_once(in_query, options)
    return RedisChannelLayer(hosts, **in_query, **options)


_SCHEMES: Final[dict[str, Callable[[str, dict[str, Any]], BaseChannelLayer]]] = {
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
_REDIS_TYPES: Final[dict[str, Callable[[str], Any]]] = {
    "prefix": str,
    "expiry": float,
    "group_expiry": float,
    "capacity": int,
    "max_message_size": int,
    "random_prefix_length": int,
    "serializer_format": str,
    "timeout": float,
    "connect_timeout": float,
    "keep_alive": float,
}
_REDIS_OPTIONS: Final = (
    "prefix", "expiry", "group_expiry", "capacity", "channel_capacity", "max_message_size", "default",
    "symmetric_encryption_keys", "serializer_format", "timeout", "connect_timeout", "keep_alive", "clock", "cluster",
)  # fmt: skip
_COMMON_OPTIONS: Final = ("expiry", "group_expiry", "capacity", "channel_capacity", "max_message_size", "default")


def _query_options(pairs: Iterable[tuple[str, str]], types: dict[str, Callable[[str], Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, text in pairs:
        if name not in types:
            raise TypeError(f"unknown option {name!r} in a channel layer URL; there are: {', '.join(types)}")
        _require_once(found, {name: text})
        try:
            found[name] = types[name](text)
        except ValueError:
            raise ValueError(f"option {name} in a channel layer URL must be a number, not {text!r}") from None
    return found


def _require_options_of_urls(known: Sequence[str], names: Iterable[str]) -> None:
    for name in names:
        if name in _REDIS_OPTIONS and name not in _REDIS_TYPES:
            raise TypeError(f"option {name!r} cannot be said in a channel layer URL: give it as a keyword argument")
        if name not in _REDIS_TYPES and name not in known:
            raise TypeError(
                f"unknown option {name!r} in a channel layer URL; there are: {', '.join(_REDIS_TYPES)}; and of the "
                f"connection: {', '.join(known)}"
            )


def _require_known_options(options: dict[str, Any], known: tuple[str, ...]) -> None:
    for name in options:
        if name not in known:
            raise TypeError(f"unknown option {name!r} for this channel layer; there are: {', '.join(known)}")


def _require_once(first: dict[str, Any], second: dict[str, Any]) -> None:
    for name in first.keys() & second.keys():
        raise TypeError(f"option {name!r} of a channel layer is given twice")
