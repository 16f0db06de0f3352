"""The chat: a page, and a WebSocket for each visitor of a room.

Rules:
- a room is a group, a visitor is an inbox. Nothing is remembered here, so any number of processes can share a layer.
- who is here: whoever comes says so to the room, and all who are there answer. After a gap it asks again.
- what a browser sends is checked before it touches the layer; what is wrong with it is said to that browser only. What it
  numbers (``ref``) is answered with that number, so it knows what was said and what was not.
- another room or name is another socket. A browser may ask first whether it would be let in, and stays where it is if not.
- a browser that does not keep up loses the oldest messages, is told how many, and slows nobody down.
- while the layer's server is away, who is in stays in, is told so, what was not sent, and when it is back, and asks then who
  is here; who comes meanwhile is asked to come later.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import AsyncGenerator, Iterable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from anyio import create_task_group, move_on_after, sleep
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.routing import Mount, WebSocketRoute
from starlette.staticfiles import StaticFiles
from starlette.websockets import WebSocket

from anyio_channels.contract.layer import BaseChannelLayer, Inbox
from anyio_channels.exceptions import ChannelFull

from .guard import Guard

__all__ = ["MIN_MESSAGE_SIZE", "Visitor", "chat", "create_app"]

_MAX_ROOM: Final = 50
_MAX_NAME: Final = 30
_MAX_TEXT: Final = 2000
MIN_MESSAGE_SIZE: Final = 16 * 1024
"""What the longest text, name and channel take as bytes, and more: a layer must allow it."""
_REFUSED: Final = 4000
"""The close code that tells the page not to try again; the reason says why."""

_LATER: Final = 1013
"""The close code of a service that is away (https://www.iana.org/assignments/websocket/websocket.xhtml)."""
_CANNOT_REACH: Final = "The chat cannot reach its server now"
_AWAY: tuple[type[Exception], ...] = ()
"""What a layer raises while its server is away or refuses."""
with suppress(ImportError):
    from redis.exceptions import RedisError

    _AWAY = (RedisError,)

_INBOX: Final = 1000
_PUSH_EVERY: Final = 1.0
_FAREWELL: Final = 5.0
_ROOM: Final = re.compile(rf"[a-zA-Z0-9._-]{{1,{_MAX_ROOM}}}")


def create_app(layer: BaseChannelLayer, address: str = "127.0.0.1", hosts: Iterable[str] = ()) -> Starlette:
    """Return the chat as an ASGI application that talks through ``layer``, which the caller opens and closes.

    ``address``: the IP address that it is served at. ``hosts``: names by which it may be visited, beside those of the address.
    """
    page = StaticFiles(directory=Path(__file__).parent / "static", html=True)
    guard = Middleware(Guard, address=address, allowed=hosts)
    app = Starlette(routes=[WebSocketRoute("/ws", chat), Mount("/", page)], middleware=[guard])
    app.state.layer = layer
    return app


async def chat(websocket: WebSocket) -> None:
    """Serve one visitor of one room until the socket closes, whoever closes it, and however abruptly."""
    layer: BaseChannelLayer = websocket.app.state.layer
    await websocket.accept()
    try:
        room, name = parse_visit(websocket)
    except ValueError as error:
        await websocket.close(_REFUSED, str(error))
        return
    group = f"chat.{room}"
    try:
        async with layer.subscribe(group, capacity=_INBOX, overflow="drop_old", on_gap="event") as inbox:
            visitor = Visitor(websocket, layer, group, inbox, {"id": inbox.channel, "name": name})
            async with visitor.present():
                await visitor.stay(room)
    except _AWAY:  # only before the visitor was in
        await websocket.close(_LATER, f"{_CANNOT_REACH}.")


@dataclass(slots=True)
class Visitor:
    """What goes on between one browser and its room."""

    websocket: WebSocket
    layer: BaseChannelLayer
    group: str
    inbox: Inbox
    me: dict[str, str]
    lost: bool = False
    """Whether messages were missed, and who came and went among them, since the visitor last asked who is here."""
    away: bool = False
    """Whether the browser was told that the layer's server is away."""

    @asynccontextmanager
    async def present(self) -> AsyncGenerator[None]:
        """Tell the others when I come, and when I leave, even if that is by cancellation."""
        await self.tell_others("joined")
        try:
            yield
        finally:
            # Shielded, for a server that stops cancels; not for ever, for a layer over a network may hang.
            with move_on_after(_FAREWELL, shield=True), suppress(*_AWAY):
                await self.tell_others("left")

    async def stay(self, room: str) -> None:
        """Be in the room until the socket closes."""
        await self.websocket.send_json({"type": "welcome", "room": room, **self.me})
        async with create_task_group() as tasks:
            tasks.start_soon(self.forward)
            tasks.start_soon(self.keep_posted)
            while (frame := await self.websocket.receive())["type"] == "websocket.receive":
                await self.answer_to(frame)
            tasks.cancel_scope.cancel()

    async def answer_to(self, frame: Mapping[str, Any]) -> None:
        """Do what the browser asks, and tell it what came of that."""
        request = parse_request(frame)
        ref = {"ref": number} if isinstance(number := request.get("ref"), int) else {}
        try:
            answer = await self.obey(request)
        except ValueError as error:
            answer = {"type": "error", "text": str(error)}
        except _AWAY:
            self.away = True
            answer = {"type": "error", "text": f"{_CANNOT_REACH}: say that again if it does not show.", "away": True}
        if ref or answer["type"] == "error":
            await self.websocket.send_json({**answer, **ref})

    async def obey(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Do what the browser asks and return the answer, or raise ``ValueError`` with a sentence."""
        match request:
            case {"type": "say", "text": str(text)}:
                await self.say(require_text(text))
                return {"type": "sent"}
            case {"type": "visit", "room": str(room), "name": str(name)}:
                room, name = require_visit(room, name)
                return {"type": "visit", "room": room, "name": name}
        raise ValueError('Not understood: send {"type": "say", "text": "..."} as a text frame.')

    async def say(self, text: str) -> None:
        """Say it to all in the room."""
        await self.layer.group_send(self.group, {"type": "said", **self.me, "text": text, "at": time.time()})

    async def tell_others(self, what: str) -> None:
        """Send ``what``, and who I am, to all in the room but me."""
        await self.layer.group_send(self.group, {"type": what, **self.me}, exclude={self.inbox.channel})

    async def forward(self) -> None:
        """Hand the room's messages to the browser, and answer those who ask who is here."""
        async for message in self.inbox:
            if message["type"] in {"joined", "who"}:
                # Whoever has no room for the answer will find a gap when it reads on, and ask again.
                with suppress(ChannelFull, *_AWAY):
                    await self.layer.send(message["id"], {"type": "here", **self.me})
            elif message["type"] == "channel_layer.gap":
                self.lost = True
            await self.websocket.send_json(message)

    async def keep_posted(self) -> None:
        """Show the browser the layer's statistics, once a second, and ask who is here if that was missed.

        Not at each gap: the answers may be what the next gap is made of.
        """
        while True:
            lost, self.lost = self.lost, False
            try:
                if lost:
                    await self.websocket.send_json({"type": "roll_call"})
                if lost or self.away:
                    await self.tell_others("who")
                here = len(await self.layer.group_channels(self.group))
            except _AWAY:
                self.lost |= lost
                if not self.away:
                    self.away = True
                    await self.websocket.send_json({"type": "away", "text": f"{_CANNOT_REACH}."})
            else:
                if self.away:
                    self.away = False
                    await self.websocket.send_json({"type": "back"})
                values = asdict(self.layer.statistics())
                await self.websocket.send_json({"type": "statistics", "here": here, "values": values})
            await sleep(_PUSH_EVERY)


def parse_visit(websocket: WebSocket) -> tuple[str, str]:
    """Return the room and the name that a browser asks for, or raise ``ValueError`` with a sentence for the visitor."""
    # Every page in the browser may open a socket to this address; only ours may chat.
    origin = websocket.headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != websocket.headers.get("host"):
        raise ValueError("This chat is only for its own page.")
    query: Mapping[str, str] = websocket.query_params
    return require_visit(query.get("room", ""), query.get("name", ""))


def require_visit(room: str, name: str) -> tuple[str, str]:
    """Return the room and the name, or raise ``ValueError`` with a sentence for the visitor."""
    if _ROOM.fullmatch(room) is None:
        raise ValueError(f"A room name is 1 to {_MAX_ROOM} ASCII letters, digits, hyphens, underscores, periods.")
    name = name.strip()
    if not (1 <= len(name) <= _MAX_NAME and name.isprintable()):
        raise ValueError(f"Your name must have 1 to {_MAX_NAME} printable characters.")
    return room, name


def parse_request(frame: Mapping[str, Any]) -> dict[str, Any]:
    """Return the JSON object in ``frame``, or an empty one."""
    try:
        request = json.loads(frame.get("text") or "")
    except (ValueError, RecursionError):
        return {}
    return request if isinstance(request, dict) else {}


def require_text(text: str) -> str:
    """Return what is to be said, or raise ``ValueError`` with a sentence."""
    text = text.strip()
    if not 1 <= len(text) <= _MAX_TEXT:
        raise ValueError(f"A message has 1 to {_MAX_TEXT} characters, not {len(text)}.")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("A message must be valid Unicode: it has half of a surrogate pair.") from None
    return text
