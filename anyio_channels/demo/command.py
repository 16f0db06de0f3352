"""The command line, made with click.

Rules:
- a wrong option exits with 2, an address or layer that cannot be had with 1, a signal with 0; none with a traceback.
- of a layer's URL only what cannot be secret is shown.
"""

from __future__ import annotations

import errno
import re
import socket
from importlib.util import find_spec
from urllib.parse import urlsplit

import anyio
import click

from anyio_channels import __version__
from anyio_channels.layers import BaseChannelLayer, create_channel_layer

from .app import MIN_MESSAGE_SIZE
from .server import LayerRefusedError, listen, serve_chat

__all__ = ["cli"]


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="anyio-channels")
def cli() -> None:
    """Channel layers for asyncio, uvloop and trio."""


@cli.command()
@click.option("--backend", type=click.Choice(["asyncio", "trio"]), default="asyncio", show_default=True)
@click.option(
    "--layer",
    "url",
    default="memory://",
    show_default=True,
    metavar="URL",
    help="The channel layer to use. Processes share rooms with redis://host:6379/0 or redis+pubsub://host:6379/0.",
)
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8000,
    show_default=True,
    help="The port to listen on; 0 takes a free one.",
)
def demo(backend: str, url: str, host: str, port: int) -> None:
    """Serve a chat with rooms, to be opened in several browser tabs."""
    layer = _create_layer(url)
    if find_spec(backend) is None:
        raise click.UsageError(f"{backend} is not installed: pip install 'anyio_channels[demo]'")
    try:
        listener = listen(host, port)
    except (OSError, UnicodeError) as error:  # the latter for a host that can be no name
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
            trouble = f"{address} is taken by another program; choose another with --port (0 takes a free one)"
        else:
            trouble = f"cannot listen on {address}: {error}; choose another address with --host and --port"
        raise click.ClickException(trouble) from error
    with listener:
        anyio.run(_run, layer, url, listener, backend, backend=backend)


async def _run(layer: BaseChannelLayer, url: str, listener: socket.socket, backend: str) -> None:
    try:
        await serve_chat(
            layer,
            listener,
            lambda address: click.echo(f"Chat on {address} ({backend}, {_shown(url)}) - Ctrl-C stops it"),
        )
    except LayerRefusedError as error:
        trouble = f"cannot open the layer {_shown(url)}: {_censored(error.__cause__, url)}"
        raise click.ClickException(trouble) from error


def _create_layer(url: str) -> BaseChannelLayer:
    try:
        layer = create_channel_layer(url)
    except (TypeError, ValueError) as error:
        raise click.BadParameter(_censored(error, url), param_hint="--layer") from error
    except ImportError as error:
        raise click.UsageError(str(error)) from error
    if layer.max_message_size < MIN_MESSAGE_SIZE:
        raise click.BadParameter(
            f"the chat needs a max_message_size of {MIN_MESSAGE_SIZE} or more", param_hint="--layer"
        )
    return layer


def _shown(url: str) -> str:
    """Return ``url`` without user, password and query."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _censored(error: BaseException | None, url: str) -> str:
    """Return the text of ``error`` without the user and password in ``url``, which may be no valid URL."""
    found = re.search(r"//([^/?#]+)@", url)
    return str(error) if found is None else str(error).replace(found[1], "***")
