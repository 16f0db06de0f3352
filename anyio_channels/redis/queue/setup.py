"""What the parts of one queue layer have in common: its options, and what is made from them once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from anyio_channels.log import Troubles
from anyio_channels.redis.client import Router
from anyio_channels.redis.servers import RedisOptions
from anyio_channels.redis.wire import Names, PayloadCodec

__all__ = ["Setup"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Setup:
    """The options of a queue layer, as its parts see them."""

    layer: object
    """Its ``repr`` is in the log."""
    options: RedisOptions
    names: Names
    codec: PayloadCodec
    expiry: float
    group_expiry: float
    get_capacity: Callable[[str], int]
    clock: Callable[[], float]
    troubles: Troubles

    @property
    def router(self) -> Router:
        """The servers."""
        return self.options.router
