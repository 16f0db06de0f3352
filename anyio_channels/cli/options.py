"""Which layer a command works on: its options, the layer they make, and what of them may be shown.

Rules:
- user, password and query of a URL are shown nowhere, keys neither; both can be kept out of the list of processes.
- what cannot be a layer is a wrong call, and says which option is to blame.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import wraps
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, TypeVar
from urllib.parse import parse_qsl, urlencode, urlsplit

import click

from anyio_channels.contract.layer import BaseChannelLayer
from anyio_channels.memory import InMemoryChannelLayer
from anyio_channels.urls import create_channel_layer

__all__ = [
    "Choice",
    "backend_option",
    "censored",
    "keeps_messages",
    "layer_options",
    "require_backend",
    "shown",
    "url_option",
]

Command = TypeVar("Command", bound=Callable[..., Any])

URL_VARIABLE: Final = "ANYIO_CHANNELS_URL"
_KEY_VARIABLE: Final = "ANYIO_CHANNELS_KEY"
_OWN: Final = frozenset({"capacity", "expiry", "group_expiry", "prefix"})


@dataclass(frozen=True, slots=True)
class Choice:
    """What the options say."""

    url: str
    prefix: str | None
    keys: tuple[str, ...]
    backend: str
    blame: str = "--layer"
    """How the command calls the URL."""

    def __post_init__(self) -> None:
        """Refuse a backend that is not installed."""
        require_backend(self.backend, "trio")

    @property
    def shown(self) -> str:
        """The URL without its secrets."""
        return shown(self.url)

    def censor(self, error: object) -> str:
        """Return what ``error`` says without what the URL has of secrets."""
        return censored(error, self.url)

    def make_layer(self, **options: Any) -> BaseChannelLayer:
        """Make the layer, not open; ``options`` go before those of the command line."""
        if self.prefix is not None:
            options.setdefault("prefix", self.prefix)
        if self.keys:
            options["symmetric_encryption_keys"] = list(self.keys)
        try:
            return create_channel_layer(self.url, **options)
        except (TypeError, ValueError) as error:
            raise click.BadParameter(self.censor(error), param_hint=self.blame) from error
        except ImportError as error:
            raise click.UsageError(str(error)) from error

    def make_layer_apart(self, prefix: str, life: float) -> Any:
        """Make a layer on the same servers under another prefix, whose keys live ``life`` seconds at most."""
        place, mark, query = self.url.partition("?")
        rest = [pair for pair in parse_qsl(query, keep_blank_values=True) if pair[0] not in _OWN]
        url = f"{place}{mark}{urlencode(rest)}"
        return replace(self, url=url, prefix=prefix).make_layer(expiry=life, group_expiry=life)

    def make_shared_layer(self) -> Any:
        """Make the layer, which other processes must be able to share."""
        layer = self.make_layer()
        if isinstance(layer, InMemoryChannelLayer):
            raise click.BadParameter(
                "a memory:// layer lives inside one process, and this command is another one: it sees nothing of it. "
                "Use the URL of a Redis that they share",
                param_hint=self.blame,
            )
        return layer


class Seconds(click.FloatRange):
    """A number of seconds that ends."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return the number, or refuse it."""
        seconds: float = super().convert(value, param, ctx)
        if not math.isfinite(seconds):
            self.fail(f"{value!r} is no number of seconds", param, ctx)
        return seconds


def url_option(**options: Any) -> Callable[[Command], Command]:
    """Take ``--layer URL``, also from the environment."""
    return click.option("--layer", "url", envvar=URL_VARIABLE, show_envvar=True, metavar="URL", **options)


def backend_option(command: Command) -> Command:
    """Take ``--backend``."""
    kinds = click.Choice(["asyncio", "trio"])
    option = click.option("--backend", type=kinds, default="asyncio", show_default=True, help="What it runs on.")
    return option(command)


def layer_options(
    *, argument: bool = False, default: str | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Take all that says which layer, and hand it to the command as ``choice``.

    ``argument``: the URL is an argument instead of an option. ``default``: the URL, if there need be none.
    """
    blame = "URL" if argument else "--layer"

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(command)
        def wrapped(
            url: str | None, prefix: str | None, key: tuple[str, ...], key_file: Path | None, backend: str, **rest: Any
        ) -> Any:
            url = url or default
            if url is None:
                what = "the argument URL" if argument else "the option --layer URL"
                raise click.UsageError(f"no layer is given: add {what}, or set the environment variable {URL_VARIABLE}")
            return command(choice=Choice(url, prefix, _keys(key, key_file), backend, blame), **rest)

        options: list[Callable[[Any], Any]] = [
            click.option("--prefix", help="The prefix of the layer, if it is not 'asgi' and not in the URL."),
            click.option(
                "--key",
                multiple=True,
                metavar="SECRET",
                help="A symmetric encryption key of the layer; the first encrypts, all decrypt. Others see it in the list of "
                f"processes: the environment variable {_KEY_VARIABLE} and --key-file hide it.",
            ),
            click.option(
                "--key-file",
                type=click.Path(exists=True, dir_okay=False, path_type=Path),
                help="A file with one such key in each line.",
            ),
            backend_option,
        ]
        if argument:
            options.insert(0, click.argument("url", required=False, envvar=URL_VARIABLE, metavar="[URL]"))
        else:
            options.insert(
                0, url_option(help="The layer, as redis://localhost:6379/0 or redis+pubsub://localhost:6379/0.")
            )
        for option in reversed(options):
            wrapped = option(wrapped)
        return wrapped

    return decorate


def _keys(given: tuple[str, ...], path: Path | None) -> tuple[str, ...]:
    keys = list(given)
    if path is not None:
        try:
            keys += [line for line in path.read_text("utf-8").splitlines() if line]
        except (OSError, ValueError) as error:
            raise click.BadParameter(f"cannot read it: {error}", param_hint="--key-file") from error
        if not keys:
            raise click.BadParameter(f"there is no key in {str(path)!r}", param_hint="--key-file")
    elif not keys:
        keys += [key for key in [os.environ.get(_KEY_VARIABLE)] if key]
    return tuple(keys)


def require_backend(backend: str, extra: str) -> None:
    """Raise ``click.UsageError``, saying how to get it, where ``backend`` is not installed."""
    if find_spec(backend) is None:
        raise click.UsageError(f"{backend} is not installed: pip install 'anyio_channels[{extra}]'")


def keeps_messages(layer: object) -> bool:
    """Whether it is the queue layer: messages wait in Redis, and reading takes them."""
    from anyio_channels.redis.queue.layer import RedisChannelLayer  # noqa: PLC0415 - an optional extra

    return isinstance(layer, RedisChannelLayer)


def shown(url: str) -> str:
    """Return ``url`` without user, password and query."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def censored(error: object, url: str) -> str:
    """Return the text of ``error`` without the user and password in ``url``, which may be no valid URL."""
    found = re.search(r"//([^/?#]+)@", url)
    return str(error) if found is None else str(error).replace(found[1], "***")
