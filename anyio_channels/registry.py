"""Layers by alias.

Rules:
- the registry opens and closes a layer only when ``open()`` asks it to; a layer known by two aliases is one layer.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Final

from .contract.layer import BaseChannelLayer

__all__ = [
    "ChannelLayerRegistry",
    "channel_layers",
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
