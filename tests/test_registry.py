"""Layers by alias, and layers from URLs."""

from __future__ import annotations

from typing import Any

import pytest

from anyio_channels import (
    ChannelLayerRegistry,
    InMemoryChannelLayer,
    channel_layers,
    create_channel_layer,
    get_channel_layer,
    has_layers,
    register_channel_layer,
    unregister_channel_layer,
)
from anyio_channels.layers.memory import channel_layer


def test_registry() -> None:
    """get of an unknown alias is None, [] a KeyError that lists the known, unregistering an unknown one nothing."""
    registry = ChannelLayerRegistry()
    one, two = InMemoryChannelLayer(), InMemoryChannelLayer()
    with pytest.raises(KeyError, match="registered as 'x'; registered: none"):
        registry["x"]
    registry.register("one", one)
    registry.register("two", one)
    registry.register("two", two)
    assert registry.get("one") is one
    assert registry["two"] is two
    assert registry.get("three") is None
    assert "one" in registry
    assert "three" not in registry
    assert len(registry) == 2
    assert registry.list_aliases() == ["one", "two"]
    assert repr(registry) == "<ChannelLayerRegistry ['one', 'two']>"
    with pytest.raises(KeyError, match="registered as 'three'; registered: 'one', 'two'"):
        registry["three"]
    registry.unregister("three")
    registry.unregister("one")
    assert registry.list_aliases() == ["two"]
    registry.clear()
    assert len(registry) == 0


def test_only_layers_are_registered() -> None:
    """Something else, such as a URL, is refused when it is registered, not when it is used."""
    with pytest.raises(TypeError, match="only a BaseChannelLayer can be registered, not 'memory://'"):
        channel_layers.register("x", "memory://")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="an alias must be a str, not 5"):
        channel_layers.register(5, channel_layer)  # type: ignore[arg-type]


def test_the_registry_of_the_process() -> None:
    """The functions work on channel_layers, with the alias "default" as Django Channels has it."""
    assert not has_layers()
    register_channel_layer("default", channel_layer)
    try:
        assert has_layers()
        assert get_channel_layer() is channel_layer
        assert get_channel_layer("other") is None
        assert channel_layers["default"] is channel_layer
    finally:
        unregister_channel_layer("default")
    assert not has_layers()


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
