"""Keeps the pages of other sites out of the chat.

Rules:
- anybody's name may lead to this machine (DNS rebinding); a page under such a name is of one origin with the chat, and only its
  Host tells. So the chat answers to the names of its own address, and to those that were allowed. Where it listens beyond
  loopback, it also answers to any IP address, for that leads nowhere else.
- the answer to another Host says how to allow it.
- no response may be framed, or be taken for another type.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from ipaddress import ip_address
from typing import Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["Guard", "host_name"]

_LOOPBACK: Final = frozenset({"localhost", "127.0.0.1", "::1"})
_HOST: Final = re.compile(r"(?:\[([0-9a-f:.]+)\]|([a-z0-9._-]+?)\.?)(?::\d*)?")
_HEADERS: Final = {
    "content-security-policy": "default-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",  # a meta element may not say the last (CSP Level 3, 3.3)
    "x-content-type-options": "nosniff",
}


class Guard:
    """An ASGI application before another."""

    def __init__(self, app: ASGIApp, address: str, allowed: Iterable[str]) -> None:
        """``address``: the IP address that it listens on. ``allowed``: other names, as ``host_name`` returns them."""
        self._app = app
        self._names = _LOOPBACK | {address} | set(allowed)
        self._any_address = not ip_address(address).is_loopback

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or have ``app`` answer."""

        async def send_guarded(message: Message) -> None:
            if message["type"] in {"http.response.start", "websocket.http.response.start"}:
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        app = self._app
        if scope["type"] != "lifespan":
            hosts = Headers(scope=scope).getlist("host")
            if len(hosts) != 1 or not self._answers_to(hosts[0]):
                app = PlainTextResponse(_refusal(", ".join(hosts)), 400)
        await app(scope, receive, send_guarded)

    def _answers_to(self, host: str) -> bool:
        try:
            name = _name_in(host)
        except ValueError:
            return False
        return name in self._names or (self._any_address and _is_address(name))


def host_name(text: str) -> str:
    """Return the name that ``text`` is, as ``Guard`` compares it; ``ValueError`` with a sentence for what is none."""
    name = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    if _is_address(name):
        return name.lower()
    if ":" in name or "[" in name:
        raise ValueError(f"{text!r} must be a host name or an IP address, without scheme and port")
    return _name_in(name)


def _name_in(host: str) -> str:
    found = _HOST.fullmatch(host.lower())
    if found is None:
        raise ValueError(f"{host!r} is not a host name: it has ASCII letters, digits, hyphens, underscores, periods")
    return found[1] or found[2]


def _is_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True


def _refusal(host: str) -> str:
    return (
        f"This chat does not answer to the host {host!r:.100}. Visit it at the address that it shows when it starts, or start "
        "it with --allow-host and that name."
    )
