"""Which layer a command works on: its options, the layer they make, and what of them may be shown.

Rules:
- user, password and query of a URL are shown nowhere, keys neither; both can be kept out of the list of processes.
- what cannot be a layer is a wrong call, and says which option is to blame.
"""

from __future__ import annotations

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
from anyio_channels.contract.options import MOST_SECONDS
from anyio_channels.memory import InMemoryChannelLayer
from anyio_channels.urls import create_channel_layer

__all__ = [
    "Choice",
    "backend_option",
    "censored",
    "filled",
    "keeps_messages",
    "layer_options",
    "require_backend",
    "shown",
    "url_option",
    "without_secrets",
]

Command = TypeVar("Command", bound=Callable[..., Any])

URL_VARIABLE: Final = "ANYIO_CHANNELS_URL"
_KEY_VARIABLE: Final = "ANYIO_CHANNELS_KEY"
_OWN: Final = frozenset({"capacity", "expiry", "group_expiry", "prefix"})
_URL: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_FORM: Final = "//[user[:password]@]"
"""Part of how errors describe a URL: nobody's password."""


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
        except (TypeError, ValueError, OSError) as error:
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
        if not seconds <= MOST_SECONDS:  # also what is not a number
            self.fail(f"{value!r} is not a number of seconds up to {MOST_SECONDS}", param, ctx)
        return seconds


def filled(ctx: click.Context, param: click.Parameter, value: Any) -> Any:  # noqa: ARG001 - a callback of click
    """Return the value of an option, or refuse one that is empty, as ``"$UNSET"`` is in a script."""
    if any(isinstance(one, str) and not one.strip() for one in (value if isinstance(value, tuple) else (value,))):
        raise click.BadParameter("it is empty; is a variable of the shell not set?")
    return value


def url_option(**options: Any) -> Callable[[Command], Command]:
    """Take ``--layer URL``, also from the environment, where an empty one counts as none."""
    return click.option(
        "--layer", "url", envvar=URL_VARIABLE, show_envvar=True, metavar="URL", callback=filled, **options
    )


def backend_option(command: Command) -> Command:
    """Take ``--backend``."""
    kinds = click.Choice(["asyncio", "trio"])
    option = click.option("--backend", type=kinds, default="asyncio", show_default=True, help="What it runs on.")
    return option(command)


def layer_options(
    arguments: str = "", *, default: str | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Take all that says which layer, and hand it to the command as ``choice``.

    The URL may be an argument, beside ``arguments``: those of the command, as its usage names them ("CHANNEL [WHAT]"), which
    are handed to it in small letters. ``default``: the URL, if there need be none.
    """

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(command)
        def wrapped(
            words: tuple[str, ...],
            url: str | None,
            prefix: str | None,
            key: tuple[str, ...],
            key_file: Path | None,
            backend: str,
            **rest: Any,
        ) -> Any:
            named, given = _sort(words, arguments.split())
            if given is not None:
                source = click.get_current_context().get_parameter_source("url")
                if source is click.core.ParameterSource.COMMANDLINE:
                    raise click.UsageError("the layer is given twice: as the argument URL, and by --layer")
                url = given
            url = url or default
            if url is None:
                raise click.UsageError(
                    f"no layer is given: add its URL, as redis://localhost:6379/0, or set the environment variable "
                    f"{URL_VARIABLE}"
                )
            blame = "--layer" if given is None else "URL"
            return command(choice=Choice(url, prefix, _keys(key, key_file), backend, blame), **named, **rest)

        options: list[Callable[[Any], Any]] = [
            click.argument("words", nargs=-1, metavar=f"[URL] {arguments}".strip()),
            url_option(
                help="The layer, as redis://localhost:6379/0 or redis+pubsub://localhost:6379/0; the argument URL says it too."
            ),
            click.option(
                "--prefix", callback=filled, help="The prefix of the layer, if it is not 'asgi' and not in the URL."
            ),
            click.option(
                "--key",
                multiple=True,
                metavar="SECRET",
                callback=filled,
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
        for option in reversed(options):
            wrapped = option(wrapped)
        return wrapped

    return decorate


def _sort(words: tuple[str, ...], names: list[str]) -> tuple[dict[str, str | None], str | None]:
    """Return the arguments by name, and the URL if one of ``words`` is it.

    It may stand anywhere: no channel or group has a colon in its name, and no message begins as a URL does.
    """
    rest = list(words)
    place = next((number for number, word in enumerate(rest) if not names or _URL.match(word)), None)
    url = None if place is None else rest.pop(place)
    if url is not None and not url.strip():
        raise click.BadParameter("it is empty; is a variable of the shell not set?", param_hint="URL")
    if extra := rest[len(names) :]:
        raise click.UsageError(f"Got unexpected extra argument{'s' * (len(extra) > 1)} ({' '.join(extra)})")
    named: dict[str, str | None] = {name.strip("[]").lower(): None for name in names}
    named.update(zip(named, rest, strict=False))
    for name in names[len(rest) :]:
        if not name.startswith("["):
            raise click.MissingParameter(param_hint=f"'{name}'", param_type="argument")
    return named, url


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
    return str(error) if found is None else without_secrets(str(error), re.escape(found[1]))


def without_secrets(text: str, pattern: str = r"(?<=//).+(?=@)") -> str:
    """Return ``text`` without what ``pattern`` finds: else what is between the // and the @ of a URL, whichever it is."""
    return _FORM.join(re.sub(pattern, "***", part, flags=re.DOTALL) for part in text.split(_FORM))
