"""What both layers on Redis share: their common options, their servers, and the statistics about those.

Rules:
- the options are checked here, once, for both layers; each layer's signature names them for its users.
- nothing is connected here: a layer's task opens the router, and runs it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

import redis.exceptions
from anyio import create_task_group, sleep
from anyio.abc import TaskStatus

from anyio_channels.contract.layer import ChannelLayerStatistics
from anyio_channels.contract.message import SerializerFormat
from anyio_channels.contract.options import require_seconds
from anyio_channels.log import KEEP_ALIVE_FAILED, said

from .client import Host, Link, LinkEvents, Request, Router, Sentinels, Timeouts, make_router

__all__ = ["OnRedis", "RedisLayerStatistics", "RedisOptions", "every", "log_keep_alive", "when_late"]


@dataclass(frozen=True, slots=True)
class RedisLayerStatistics(ChannelLayerStatistics):
    """A snapshot of what this process does with a layer on Redis.

    Everything is counted in this process: what others have sent and received, and what waits in Redis, is not in it. So a
    message that was sent here and received elsewhere is in ``sent`` only.
    """

    connections: int
    """Connections to Redis that are up."""
    reconnects: int
    """How often a connection was lost and came back."""
    commands: int
    """Commands sent to Redis, handshakes among them."""


@dataclass(frozen=True, kw_only=True)
class RedisOptions:
    """The options that both layers on Redis have, and the in-memory layer has not."""

    hosts: Sequence[Host] | None
    prefix: str
    symmetric_encryption_keys: Sequence[str | bytes] | None
    serializer_format: SerializerFormat
    timeout: float
    connect_timeout: float
    keep_alive: float
    cluster: bool
    router: Router = field(init=False)
    """The servers that ``hosts`` names."""

    def __post_init__(self) -> None:
        """Raise ``TypeError`` or ``ValueError`` naming the option and its rule."""
        if not isinstance(self.prefix, str):
            raise TypeError(f"prefix must be a str, not {self.prefix!r}")
        for option in ("timeout", "connect_timeout", "keep_alive"):
            require_seconds(option, getattr(self, option))
        if not isinstance(self.cluster, bool):
            raise TypeError(f"cluster must be True or False, not {self.cluster!r}")
        object.__setattr__(self, "router", make_router(self.hosts, cluster=self.cluster))
        if intervals := [one.address.keep_alive for one in self.router.servers if one.address.keep_alive is not None]:
            object.__setattr__(self, "keep_alive", min(intervals))

    def figures(self) -> dict[str, int]:
        """Return what ``RedisLayerStatistics`` adds to the figures of every layer."""
        links = self.router.running
        return {
            "connections": sum(link.connection is not None for link in links),
            "reconnects": sum(max(0, link.connects - 1) for link in links),
            "commands": sum(link.commands for link in links),
        }

    async def run(
        self, events: LinkEvents, beside: Callable[[], Coroutine[Any, Any, None]], *, task_status: TaskStatus[None]
    ) -> None:
        """Connect to the servers, say so by ``task_status``, and run them until cancelled, with ``beside`` in a task.

        Raises an error of the ``redis`` package that names the server and the cause, within ``connect_timeout`` seconds. Of
        several servers one must be there, and none may refuse; those that cannot be reached then are logged and tried on.
        """
        timeouts = Timeouts(timeout=self.timeout, connect_timeout=self.connect_timeout, keep_alive=self.keep_alive)
        await self.router.open(events, timeouts)
        failures: list[redis.exceptions.RedisError] = []
        async with create_task_group() as tasks:
            tasks.start_soon(self.router.run)
            tasks.start_soon(beside)
            try:
                await self.router.reached()
            except redis.exceptions.RedisError as error:
                failures.append(error)
                tasks.cancel_scope.cancel()
            else:
                task_status.started()
        raise failures[0]  # only a failure ends the block in order; here no group wraps it


class OnRedis:
    """What both layers on Redis let their users see."""

    options: RedisOptions
    prefix: str
    timeout: float
    connect_timeout: float
    keep_alive: float
    cluster: bool
    expiry: float
    capacity: int

    def _use(self, options: RedisOptions) -> None:
        self.options = options
        self.prefix = options.prefix
        self.timeout = options.timeout
        self.connect_timeout = options.connect_timeout
        self.keep_alive = options.keep_alive
        self.cluster = options.cluster

    def __repr__(self) -> str:
        """Show the servers and options that tell one layer from another; no password is among them."""
        return (
            f"<{type(self).__name__} {self.options.router.name} prefix={self.prefix!r} expiry={self.expiry} "
            f"capacity={self.capacity}>"
        )

    @property
    def server(self) -> tuple[str, int | None] | None:
        """Host and port of the one server, or its unix socket; ``None`` for several, behind Sentinel, and for a cluster."""
        server = self.options.router.servers[0]
        if self.cluster or len(self.options.router.servers) > 1 or isinstance(server, Sentinels):
            return None
        address = server.address
        return (address.host, address.port) if address.path is None else (address.path, None)


async def every(seconds: float, act: Callable[[], object]) -> None:
    """Call ``act`` every so many seconds, until cancelled."""
    while True:
        await sleep(seconds)
        act()


async def when_late(seconds: float, act: Callable[[], object]) -> None:
    """Call ``act`` whenever a timer of so many seconds fires more than as many too late: this process stood still."""
    while True:
        due = time.monotonic() + seconds
        await sleep(seconds)
        if time.monotonic() - due > seconds:
            act()


def log_keep_alive(layer: object, link: Link, request: Request) -> None:
    """Log a sign of life that failed; whether one is answered at all is seen by the connection itself."""
    if request.error is not None:
        KEEP_ALIVE_FAILED.write(layer=repr(layer), server=link.name, error=said(request.error))
