"""Layers from URLs, and schemes of others."""

from __future__ import annotations

import re
import sys
from typing import Any

import pytest

from anyio_channels import (
    InMemoryChannelLayer,
    RedisChannelLayer,
    RedisPubSubChannelLayer,
    create_channel_layer,
    create_redis_channel_layer,
)
from anyio_channels.urls import register_scheme


def test_memory_urls() -> None:
    """A URL gives the options; keyword arguments give them too, and those that a URL cannot say."""
    layer = create_channel_layer("memory://?capacity=10&expiry=0.5&group_expiry=7&max_message_size=99", default=str)
    assert isinstance(layer, InMemoryChannelLayer)
    assert (layer.capacity, layer.expiry, layer.group_expiry, layer.max_message_size) == (10, 0.5, 7, 99)
    assert layer.default is str
    assert create_channel_layer("memory://", channel_capacity={"a*": 3}).get_capacity("ab") == 3


@pytest.mark.parametrize(
    ("url", "options", "error", "words"),
    [
        ("nonsense://", {}, ValueError, "unknown channel layer URL scheme 'nonsense://'; there are: memory://"),
        ("", {}, ValueError, "unknown channel layer URL scheme"),
        (5, {}, TypeError, "must be a str, not int"),
        (
            "memory://?capactiy=1",
            {},
            TypeError,
            "unknown option 'capactiy' in a channel layer URL; there are: expiry, ",
        ),
        (
            "memory://?capacity=many",
            {},
            ValueError,
            "option capacity in a channel layer URL must be a number, not 'many'",
        ),
        ("memory://?capacity=", {}, ValueError, "must be a number, not ''"),
        ("memory://?capacity=0", {}, ValueError, "capacity must be at least 1"),
        ("memory://?capacity=1&capacity=2", {}, TypeError, "'capacity' of a channel layer is given twice"),
        ("memory://?capacity=1", {"capacity": 2}, TypeError, "'capacity' of a channel layer is given twice"),
        (
            "memory://",
            {"capactiy": 2},
            TypeError,
            "unknown option 'capactiy' for this channel layer; there are: expiry",
        ),
        ("memory:", {}, ValueError, "has two slashes behind its scheme: memory://"),
        ("memory://host", {}, ValueError, "has no host, path or fragment"),
        ("memory:///path", {}, ValueError, "has no host, path or fragment"),
    ],
)
def test_bad_urls(url: Any, options: dict[str, Any], error: type[Exception], words: str) -> None:
    """What a URL gets wrong is an error that says what there is."""
    with pytest.raises(error, match=words):
        create_channel_layer(url, **options)


def test_several_servers_in_a_url() -> None:
    """A URL with several hosts is a layer over all of them, each with what else the URL says."""
    layer = create_channel_layer("redis+pubsub://ann:pw@a:1,b/2?prefix=chat")
    assert "Redis at a:1, Redis at b:6379" in repr(layer)
    assert "chat" in repr(layer)
    with pytest.raises(ValueError, match="a Redis URL is"):
        create_channel_layer("redis://a:1,b:x/0")


def test_each_option_of_a_layer_is_one_of_its_urls() -> None:
    """A URL gives what is a number or text; for the rest the error says how else to give it."""
    layer = create_channel_layer(
        "redis+pubsub://h?prefix=p&expiry=1&group_expiry=2&capacity=3&serializer_format=json&max_message_size=4"
        "&timeout=5&connect_timeout=6&keep_alive=7",
        on_disconnect="gone",
    )
    assert isinstance(layer, RedisPubSubChannelLayer)
    options = layer.options
    assert (options.prefix, layer.expiry, layer.group_expiry, layer.capacity) == ("p", 1, 2, 3)
    assert (options.serializer_format, layer.max_message_size) == ("json", 4)
    assert (options.timeout, options.connect_timeout, options.keep_alive) == (5, 6, 7)
    assert layer.on_disconnect == "gone"
    for name in ("channel_capacity", "symmetric_encryption_keys", "default", "clock", "cluster", "on_reconnect"):
        with pytest.raises(TypeError, match=f"option '{name}' cannot be said in a channel layer URL: give it as a key"):
            create_channel_layer(f"redis+pubsub://h?{name}=1")
    with pytest.raises(ValueError, match="serializer_format must be"):
        create_channel_layer("redis://h?serializer_format=xml")
    with pytest.raises(TypeError, match="unknown option 'on_reconnect' in a channel layer URL"):
        create_channel_layer("redis://h?on_reconnect=1")
    with pytest.raises(TypeError, match="unknown option 'hosts'"):
        create_channel_layer("redis://h", hosts=[])


def test_urls_of_redis() -> None:
    """The scheme chooses the layer, and a cluster; an option of the other layer is told apart from a misspelt one."""
    assert type(create_redis_channel_layer("redis://h?random_prefix_length=16", default=str)) is RedisChannelLayer
    for url in ("memory://", "redis+pubsub://h"):
        with pytest.raises(ValueError, match="a URL of the queue layer begins with"):
            create_redis_channel_layer(url)
    assert create_redis_channel_layer("redis+cluster://a,b").options.cluster
    assert not create_redis_channel_layer("redis://a,b").options.cluster
    with pytest.raises(
        TypeError, match="'random_prefix_length' is one of the queue layer; the pub/sub layer has no such"
    ):
        create_channel_layer("redis+pubsub://h?random_prefix_length=5")


def test_a_layer_whose_extra_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the redis package, the error says what to install, and other layers can be made."""
    monkeypatch.setitem(sys.modules, "anyio_channels.redis.client", None)
    with pytest.raises(ImportError, match=r"a unix\+pubsub:// channel layer .*: pip install 'anyio_channels\[redis\]'"):
        create_channel_layer("unix+pubsub:///run/redis.sock")
    assert isinstance(create_channel_layer("memory://"), InMemoryChannelLayer)


# Schemes of others. What is registered stays, so each test has a scheme of its own.


def test_a_scheme_of_somebody_else() -> None:
    """create_channel_layer gives a registered factory the whole URL and all options, and returns what it returns."""
    calls: list[Any] = []

    def make(url: str, **options: Any) -> InMemoryChannelLayer:
        calls.append((url, options))
        return InMemoryChannelLayer(**options)

    register_scheme("nats+tls.v2-x", make)
    layer = create_channel_layer("nats+tls.v2-x://user@host:4222/path?a=b", capacity=7)
    assert calls == [("nats+tls.v2-x://user@host:4222/path?a=b", {"capacity": 7})]
    assert layer.capacity == 7
    with pytest.raises(TypeError, match="capactiy"):
        create_channel_layer("nats+tls.v2-x://", capactiy=7)
    with pytest.raises(ValueError, match=r"there are: memory://, redis://, .*, nats\+tls\.v2-x://$"):
        create_channel_layer("nats://host")


def test_a_scheme_is_registered_once() -> None:
    """A taken scheme is refused, whether the package or another one took it, and goes on working."""
    register_scheme("mine", lambda url: InMemoryChannelLayer(capacity=3))
    for scheme in ("memory", "redis+cluster+pubsub", "mine"):
        with pytest.raises(ValueError, match=rf"the channel layer URL scheme '{re.escape(scheme)}://' is taken"):
            register_scheme(scheme, lambda url: InMemoryChannelLayer(capacity=4))
    assert create_channel_layer("mine://").capacity == 3
    assert create_channel_layer("memory://").capacity == 100


@pytest.mark.parametrize("scheme", ["", "Nats", "nats://", "nats:", "1nats", "na_ts", "n\u00e4ts", "nats\n", "+x"])
def test_a_scheme_that_no_url_can_have(scheme: str) -> None:
    """A scheme is checked by the rule for URLs when it is registered."""
    with pytest.raises(ValueError, match="a URL scheme is a lower-case ASCII letter, then .*; got '"):
        register_scheme(scheme, InMemoryChannelLayer)


def test_a_scheme_and_a_factory_of_a_wrong_type() -> None:
    """A mistake is told when it is made, not when a URL asks for the layer."""
    with pytest.raises(TypeError, match="a URL scheme must be a str, not b'nats'"):
        register_scheme(b"nats", InMemoryChannelLayer)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="the factory of a URL scheme must be callable, not 'nats'"):
        register_scheme("nats", "nats")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown channel layer URL scheme 'nats://'"):
        create_channel_layer("nats://")
