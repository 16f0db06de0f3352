"""Questions to one server: many commands at once, and what it reports about itself."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

import redis.exceptions

from anyio_channels.redis.client import Argument, Link, replies, try_each

from .seen import ServerSeen

__all__ = ["ask_all", "ask_server", "why"]

_AT_ONCE: Final = 1000
"""How many commands are in flight at once."""
_SECTIONS: Final = ("server", "clients", "memory", "persistence", "stats", "replication", "cluster", "commandstats")
_CALLS: Final = re.compile(r"calls=([0-9]+)")


async def ask_all(
    link: Link, commands: Sequence[Sequence[Argument]], parse: Callable[[Any], Any] | None = None
) -> list[Any]:
    """Send ``commands``, many at once, and return the replies in their order; a refusal is in the place of its reply.

    Raises ``ConnectionLost`` if the connection is lost meanwhile. If cancelled, some commands may have run.
    """

    async def ask(numbered: tuple[int, Sequence[Argument]]) -> Any:
        return await link.execute(*numbered[1], parse=parse)

    answers: list[Any] = [None] * len(commands)
    for start in range(0, len(commands), _AT_ONCE):
        for (number, _), answer in await try_each(ask, list(enumerate(commands[start : start + _AT_ONCE], start))):
            if isinstance(answer, Exception) and not isinstance(answer, redis.exceptions.ResponseError):
                raise answer
            answers[number] = answer
    return answers


async def ask_server(link: Link) -> ServerSeen:
    """Return what a server reports about itself; nothing of a section of INFO that this user may not ask."""
    at = time.monotonic()
    *sections, stats = await ask_all(link, [("INFO", section) for section in _SECTIONS], parse=replies.info)
    info: dict[str, str] = {}
    for section in sections:
        if not isinstance(section, Exception):
            info |= section
    calls = {
        name.removeprefix("cmdstat_"): int(found[1])
        for name, text in ({} if isinstance(stats, Exception) else stats).items()
        if (found := _CALLS.search(text))
    }
    return ServerSeen(link.name, None, at, info, calls)


def why(error: Exception) -> str:
    """Return what ``error`` says about a server, without what became of the command that asked."""
    return str(error).partition("; the command ")[0]
