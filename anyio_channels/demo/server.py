"""How the demo is served: anycorn, on whatever backend runs, until a signal.

Rules:
- the address is announced when it answers, not before.
- SIGINT and SIGTERM end it in order: no new connections, then those there are, then the layer; or at once while the
  layer is being opened.
- nobody holds it up: a connection that has not ended shortly after the signal is hung up on.
"""

from __future__ import annotations

import logging
import signal
import socket
from collections.abc import Awaitable, Callable, Collection
from contextlib import AsyncExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any, Final

from anycorn import Config, serve  # pyright: ignore[reportUnknownVariableType]
from anyio import TASK_STATUS_IGNORED, Event, create_task_group, open_signal_receiver, sleep
from anyio.abc import TaskStatus

from anyio_channels.contract.layer import BaseChannelLayer

from .app import create_app

__all__ = ["LayerRefusedError", "listen", "serve_chat"]

_BACKLOG: Final = 1024
_MAX_FRAME: Final = 64 * 1024
_GRACE: Final = 0.3
_HANG_UP_AFTER: Final = 1.0


class LayerRefusedError(Exception):
    """The layer cannot be opened; the cause says why."""


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens at the address, or raise ``OSError``."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=_BACKLOG)


async def serve_chat(
    layer: BaseChannelLayer,
    listener: socket.socket,
    announce: Callable[[str], Awaitable[None]],
    hosts: Collection[str] = (),
) -> None:
    """Open ``layer`` and serve the chat over it at ``listener``, which it closes, until SIGINT or SIGTERM.

    ``announce`` is called with the address of the page as soon as it can be visited; what it raises ends the serving, and
    is raised. ``hosts``: names by which the chat may be visited, beside those of the address. Raises ``LayerRefusedError``.
    """
    opened = Event()
    stopping = Event()
    trouble: Exception | None = None
    async with create_task_group() as watching:
        watch = partial(_watch_signals, opened, stopping, watching.cancel_scope.cancel, listener.getsockname()[1])
        await watching.start(watch)
        async with AsyncExitStack() as stack:
            try:
                await _open_quietly(layer, stack)
            except Exception as error:  # noqa: BLE001 - whatever a layer raises
                trouble = LayerRefusedError()
                trouble.__cause__ = error
            else:
                opened.set()
                trouble = await _serve(layer, listener, announce, stopping, hosts)
        watching.cancel_scope.cancel()
    if trouble is not None:
        raise trouble


async def _open_quietly(layer: BaseChannelLayer, stack: AsyncExitStack) -> None:
    """Open the layer until ``stack`` closes it; what it logs meanwhile is in the error that it raises."""
    logger = logging.getLogger("anyio_channels")
    logger.disabled = True
    try:
        await stack.enter_async_context(layer)
    finally:
        logger.disabled = False


async def _serve(
    layer: BaseChannelLayer,
    listener: socket.socket,
    announce: Callable[[str], Awaitable[None]],
    stopping: Event,
    hosts: Collection[str],
) -> Exception | None:
    """Serve until ``stopping`` is set; return what ``announce`` raised."""
    trouble: Exception | None = None
    # Starlette's types and anycorn's describe the same protocol in different words.
    app: Any = create_app(layer, listener.getsockname()[0], hosts)
    config = Config()
    config.bind = f"fd://{listener.detach()}"
    config.backlog = _BACKLOG
    config.loglevel = "WARNING"
    config.graceful_timeout = _GRACE
    config.websocket_max_message_size = _MAX_FRAME
    config.websocket_permessage_deflate = False  # most connections are from this machine
    async with create_task_group() as serving:

        async def run(*, task_status: TaskStatus[Any]) -> None:
            await serve(app, config, shutdown_trigger=stopping.wait, task_status=task_status)
            serving.cancel_scope.cancel()  # the reader of the announcement may stand still

        addresses = await serving.start(run)
        try:
            await announce(addresses[0])
        except Exception as error:  # noqa: BLE001 - raised by serve_chat(), outside the task groups
            trouble = error
            stopping.set()
    return trouble


async def _watch_signals(
    opened: Event,
    stopping: Event,
    give_up: Callable[[], None],
    port: int,
    *,
    task_status: TaskStatus[None] = TASK_STATUS_IGNORED,
) -> None:
    with open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        task_status.started()
        async for _ in signals:
            if not opened.is_set():
                give_up()
            stopping.set()
            await sleep(_HANG_UP_AFTER)
            _hang_up(port)


def _hang_up(port: int) -> None:
    """End all connections to ``port``.

    anycorn shields its writes from cancellation, so one to a browser that reads no more would never end. Neither ASGI
    nor anycorn gives away the socket, but the system knows which there are.
    """
    for entry in Path("/dev/fd").iterdir():
        try:
            connection = socket.socket(fileno=int(entry.name))
        except OSError:
            continue  # not a socket
        with suppress(OSError):  # it ended meanwhile
            if connection.family in {socket.AF_INET, socket.AF_INET6} and connection.getsockname()[1] == port:
                connection.shutdown(socket.SHUT_RDWR)
        connection.detach()
