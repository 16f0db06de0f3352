"""Layers by alias."""

from __future__ import annotations

import pytest

from anyio_channels import (
    ChannelLayerRegistry,
    InMemoryChannelLayer,
    channel_layers,
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
