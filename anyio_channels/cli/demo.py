"""``anyio-channels demo``: the chat in the browser.

Rules:
- a wrong option exits with 2, an address or layer that cannot be had with 1, a signal with 0; none with a traceback.
- the address must be written before it serves on: where it cannot be, it exits with 1, where nobody reads, with 0.
- only running it needs the extra ``demo``.
"""

from __future__ import annotations

import errno
import socket
from contextlib import suppress

import anyio
import click

from anyio_channels.contract.layer import BaseChannelLayer
from anyio_channels.urls import create_channel_layer

from .options import backend_option, censored, filled, require_backend, shown, url_option
from .output import NobodyReads, write

__all__ = ["demo"]


def _to_host_names(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    from anyio_channels.demo.guard import host_name  # noqa: PLC0415 - the extra

    try:
        return tuple(host_name(value) for value in filled(ctx, param, values))
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


@click.command()
@backend_option
@url_option(
    default="memory://",
    show_default=True,
    help="The channel layer to use. Processes share rooms with redis://host:6379/0 or redis+pubsub://host:6379/0.",
)
@click.option("--host", default="127.0.0.1", show_default=True, callback=filled, help="The address to listen on.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8000,
    show_default=True,
    help="The port to listen on; 0 takes a free one.",
)
@click.option(
    "--allow-host",
    "allowed",
    multiple=True,
    metavar="NAME",
    callback=_to_host_names,
    help="Another name by which browsers may visit it, as behind a proxy; may be repeated. Else it is localhost and the "
    "address, so that pages of other sites cannot get in by a name that leads here.",
)
def demo(backend: str, url: str, host: str, port: int, allowed: tuple[str, ...]) -> None:
    """Serve a chat, for several browser tabs.

    It has rooms, and runs until Ctrl-C. Needs the extra: pip install 'anyio_channels[demo]'.

    \b
    Examples:
      anyio-channels demo
      anyio-channels demo --backend trio --port 0
      anyio-channels demo --layer redis://localhost:6379/0
      anyio-channels demo --host 0.0.0.0 --allow-host chat.example

    Exit codes: 0 when stopped, 1 when it cannot listen or reach the layer, 2 when called wrongly.
    """
    from anyio_channels.demo.guard import host_name  # noqa: PLC0415 - the extra
    from anyio_channels.demo.server import listen  # noqa: PLC0415

    layer = _create_layer(url)
    require_backend(backend, "demo")
    try:
        listener = listen(host, port)
    except (OSError, UnicodeError) as error:  # the latter for a host that can be no name
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
            trouble = f"{address} is taken by another program; choose another with --port (0 takes a free one)"
        else:
            trouble = f"cannot listen on {address}: {error}; choose another address with --host and --port"
        raise click.ClickException(trouble) from error
    with suppress(ValueError):  # one that can be listened on, and be no name in a URL
        allowed += (host_name(host),)
    with listener:
        anyio.run(_run, layer, url, listener, backend, allowed, backend=backend)


async def _run(
    layer: BaseChannelLayer, url: str, listener: socket.socket, backend: str, allowed: tuple[str, ...]
) -> None:
    from anyio_channels.demo.server import LayerRefusedError, serve_chat  # noqa: PLC0415 - the extra

    async def announce(address: str) -> None:
        await write(f"Chat on {address} ({backend}, {shown(url)}) - Ctrl-C stops it")

    try:
        await serve_chat(layer, listener, announce, allowed)
    except NobodyReads:
        pass  # so nobody will ever know where it is
    except LayerRefusedError as error:
        trouble = f"cannot open the layer {shown(url)}: {censored(error.__cause__, url)}"
        raise click.ClickException(trouble) from error


def _create_layer(url: str) -> BaseChannelLayer:
    from anyio_channels.demo.app import MIN_MESSAGE_SIZE  # noqa: PLC0415 - the extra

    try:
        layer = create_channel_layer(url)
    except (TypeError, ValueError, OSError) as error:
        raise click.BadParameter(censored(error, url), param_hint="--layer") from error
    except ImportError as error:
        raise click.UsageError(str(error)) from error
    if layer.max_message_size < MIN_MESSAGE_SIZE:
        raise click.BadParameter(
            f"the chat needs a max_message_size of {MIN_MESSAGE_SIZE} or more", param_hint="--layer"
        )
    return layer
