"""What is written: messages and tables for people, JSON for programs.

Rules:
- writing never holds up the event loop: who reads more slowly is waited for, and a signal still ends it.
- on a terminal nothing that others sent can be more than text: what is not printable is escaped.
- whoever stops reading (``| head -1``) ends the command quietly.
- JSON is ASCII, one document a line; what JSON cannot say (bytes, infinities) is an object with one reserved key, which
  ``send`` takes as well.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import os
import select
import stat
import sys
from typing import Any, Final

import click
from anyio import sleep_forever, wait_readable, wait_writable
from rich.console import Console, RenderableType
from rich.highlighter import JSONHighlighter
from rich.text import Text

__all__ = [
    "NobodyReads",
    "console",
    "from_json",
    "note",
    "printable",
    "read_chunk",
    "render",
    "to_json",
    "to_text",
    "watch_reader",
    "write",
]

_BYTES: Final = "__bytes__"
_FLOAT: Final = "__float__"
_TOO_DEEP: Final = "__too_deep__"
_CHUNK: Final = 65536
_WIDE: Final = 1000
_HIGHLIGHTER: Final = JSONHighlighter()


class NobodyReads(Exception):  # noqa: N818 - no error: the reader has had enough
    """Whoever read the output is gone."""


def console() -> Console:
    """Return what renders for standard output: as wide as a terminal, or as wide as needed for a file or pipe."""
    return Console(highlight=False, emoji=False, markup=False, width=None if is_terminal() else _WIDE)


def is_terminal() -> bool:
    """Whether a person looks at standard output."""
    return sys.stdout is not None and sys.stdout.isatty()


def note(text: str) -> None:
    """Tell the person at the terminal, not the program behind the pipe."""
    click.echo(text, err=True)


async def write(text: str) -> None:
    """Write a line to standard output as soon as there is room.

    Raises ``NobodyReads`` when the reader is gone, and ``click.ClickException`` when it cannot be written. If cancelled, a part
    may have been written.
    """
    if sys.stdout is None:
        return  # closed by whoever started us; its number may be another file's by now
    fd = sys.stdout.fileno()
    data = memoryview((text + "\n").encode(sys.stdout.encoding, "backslashreplace"))
    can_wait = _can_wait(fd)
    try:
        while data:
            if can_wait:
                await wait_writable(fd)
            # So much goes into a pipe at once where there is room at all.
            data = data[os.write(fd, data[: select.PIPE_BUF]) :]
    except BrokenPipeError:
        raise NobodyReads from None
    except OSError as error:
        raise click.ClickException(f"cannot write the output: {error.strerror}") from error


async def watch_reader() -> None:
    """Raise ``NobodyReads`` when whoever reads standard output through a pipe is gone; otherwise it goes on for ever."""
    if sys.stdout is not None and stat.S_ISFIFO(os.fstat(sys.stdout.fileno()).st_mode):
        await wait_readable(sys.stdout.fileno())  # what the system says of the end that writes, when nobody can read
        raise NobodyReads
    await sleep_forever()


async def read_chunk() -> bytes:
    """Return what standard input has, as soon as it has something; nothing at its end. If cancelled, nothing was read."""
    if sys.stdin is None:
        return b""
    fd = sys.stdin.fileno()
    if _can_wait(fd):
        await wait_readable(fd)
    return os.read(fd, _CHUNK)


def _can_wait(fd: int) -> bool:
    """Whether the system tells when there is room: not for files, which always have."""
    mode = os.fstat(fd).st_mode
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) or os.isatty(fd)


def render(to: Console, *things: RenderableType, soft_wrap: bool = False) -> str:
    """Return ``things`` as they look on the terminal of ``to``."""
    with to.capture() as captured:
        for thing in things:
            to.print(thing, soft_wrap=soft_wrap)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def to_json(value: Any) -> str:
    """Return ``value`` as one line of JSON; what is too deep for Python's own JSON is an object that says so."""
    return _dump(value, ensure_ascii=True)


def to_text(value: Any) -> Text:
    """Return ``value`` as JSON for people, coloured, without a character that a terminal would obey."""
    return _HIGHLIGHTER(printable(_dump(value, ensure_ascii=False)))


def printable(text: str) -> str:
    """Return ``text`` with everything escaped that is not to be seen, or does something."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def from_json(text: str) -> Any:
    """Return the value that ``text`` is as JSON. ``ValueError`` with a sentence for what is none."""
    try:
        return json.loads(text, object_hook=_special)
    except json.JSONDecodeError as error:
        raise ValueError(f"it is no JSON: {error.msg} at character {error.pos + 1}") from error
    except RecursionError as error:
        raise ValueError("its values are too deep in one another") from error


def _dump(value: Any, *, ensure_ascii: bool) -> str:
    try:
        return json.dumps(_plain(value), ensure_ascii=ensure_ascii, allow_nan=False)
    except RecursionError:
        return json.dumps({_TOO_DEEP: True})


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_plain(one) for one in value]
    if isinstance(value, bytes):
        return {_BYTES: base64.b64encode(value).decode()}
    if isinstance(value, float) and not math.isfinite(value):
        return {_FLOAT: repr(value)}
    return value


def _special(found: dict[str, Any]) -> Any:
    match found:
        case {"__bytes__": str(text), **rest} if not rest:
            try:
                return base64.b64decode(text, validate=True)
            except (binascii.Error, ValueError) as error:
                raise ValueError(f"{_BYTES} must be base64, not {text!r:.50}") from error
        case {"__float__": str(text), **rest} if not rest and text in {"nan", "inf", "-inf"}:
            return float(text)
    return found
