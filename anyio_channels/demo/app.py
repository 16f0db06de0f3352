"""The chat: a page, and a WebSocket for each visitor of a room.

Rules:
- a room is a group, a visitor is an inbox. Nothing is remembered here, so any number of processes can share a layer.
- who is here: whoever comes says so to the room, and all who are there answer. After a gap one asks again.
- what a browser sends is checked before it touches the layer; what is wrong with it is said to that browser only.
- a browser that does not keep up loses the oldest messages, is told how many, and slows nobody down.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from anyio import create_task_group, move_on_after, sleep
from starlette.applications import Starlette
from starlette.routing import Mount, WebSocketRoute
from starlette.staticfiles import StaticFiles
from starlette.websockets import WebSocket

from anyio_channels.exceptions import ChannelFull
from anyio_channels.layers import BaseChannelLayer, Inbox

__all__ = ["MAX_NAME", "MAX_ROOM", "MAX_TEXT", "MIN_MESSAGE_SIZE", "REFUSED", "chat", "create_app"]

MAX_ROOM: Final = 50
MAX_NAME: Final = 30
MAX_TEXT: Final = 2000
MIN_MESSAGE_SIZE: Final = 16 * 1024
"""What the longest text, name and channel take as bytes, and more: a layer must allow it."""
REFUSED: Final = 4000
"""The close code that tells the page not to try again; the reason says why."""

_INBOX: Final = 1000
_PUSH_EVERY: Final = 1.0
_FAREWELL: Final = 5.0
_ROOM: Final = re.compile(rf"[a-zA-Z0-9._-]{{1,{MAX_ROOM}}}")


def create_app(layer: BaseChannelLayer) -> Starlette:
    """Return the chat as an ASGI application that talks through ``layer``, which the caller opens and closes."""
    page = StaticFiles(directory=Path(__file__).parent / "static", html=True)
    app = Starlette(routes=[WebSocketRoute("/ws", chat), Mount("/", page)])
    app.state.layer = layer
    return app


async def chat(websocket: WebSocket) -> None:
    """Serve one visitor of one room until the socket closes, whoever closes it, and however abruptly."""
    layer: BaseChannelLayer = websocket.app.state.layer
    await websocket.accept()
    try:
        room, name = parse_visit(websocket)
    except ValueError as error:
        await websocket.close(REFUSED, str(error))
        return
    group = f"chat.{room}"
    async with layer.subscribe(group, capacity=_INBOX, overflow="drop_old", on_gap="event") as inbox:
        me = {"id": inbox.channel, "name": name}
        await websocket.send_json({"type": "welcome", "room": room, **me})
        async with present(layer, group, me), create_task_group() as tasks:
            tasks.start_soon(forward, layer, group, me, inbox, websocket)
            tasks.start_soon(push_statistics, layer, group, websocket)
            while (frame := await websocket.receive())["type"] == "websocket.receive":
                try:
                    text = parse_text(frame)
                except ValueError as error:
                    await websocket.send_json({"type": "error", "text": str(error)})
                else:
                    await layer.group_send(group, {"type": "said", **me, "text": text, "at": time.time()})
            tasks.cancel_scope.cancel()


@asynccontextmanager
async def present(layer: BaseChannelLayer, group: str, me: dict[str, str]) -> AsyncGenerator[None]:
    """Tell the others in the room about ``me``: now that I come, and when I leave, even if that is by cancellation."""
    await layer.group_send(group, {"type": "joined", **me}, exclude={me["id"]})
    try:
        yield
    finally:
        # Shielded, for a server that stops cancels; not for ever, for a layer over a network may hang.
        with move_on_after(_FAREWELL, shield=True):
            await layer.group_send(group, {"type": "left", **me}, exclude={me["id"]})


async def forward(layer: BaseChannelLayer, group: str, me: dict[str, str], inbox: Inbox, websocket: WebSocket) -> None:
    """Hand the room's messages to the browser, and answer those who ask who is here."""
    async for message in inbox:
        if message["type"] in {"joined", "who"}:
            # Whoever has no room for the answer will find a gap when it reads on, and ask again.
            with suppress(ChannelFull):
                await layer.send(message["id"], {"type": "here", **me})
        elif message["type"] == "channel_layer.gap":
            # Who came and went is among what was missed, and so are questions to me.
            await layer.group_send(group, {"type": "who", **me}, exclude={inbox.channel})
        await websocket.send_json(message)


async def push_statistics(layer: BaseChannelLayer, group: str, websocket: WebSocket) -> None:
    """Show the browser the layer's statistics, once a second."""
    while True:
        here = len(await layer.group_channels(group))
        await websocket.send_json({"type": "statistics", "here": here, "values": asdict(layer.statistics())})
        await sleep(_PUSH_EVERY)


def parse_visit(websocket: WebSocket) -> tuple[str, str]:
    """Return the room and the name that a browser asks for, or raise ``ValueError`` with a sentence for the visitor."""
    # Every page in the browser may open a socket to this address; only ours may chat.
    origin = websocket.headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != websocket.headers.get("host"):
        raise ValueError("This chat is only for its own page.")
    query: Mapping[str, str] = websocket.query_params
    room = query.get("room", "")
    if _ROOM.fullmatch(room) is None:
        raise ValueError(f"A room name is 1 to {MAX_ROOM} ASCII letters, digits, hyphens, underscores, periods.")
    name = query.get("name", "").strip()
    if not (1 <= len(name) <= MAX_NAME and name.isprintable()):
        raise ValueError(f"Your name must have 1 to {MAX_NAME} printable characters.")
    return room, name


def parse_text(frame: Mapping[str, Any]) -> str:
    """Return the text of ``{"type": "say", "text": ...}`` in ``frame``, or raise ``ValueError`` with a sentence."""
    try:
        said = json.loads(frame.get("text") or "")
    except (ValueError, RecursionError):
        said = None
    match said:
        case {"type": "say", "text": str(text)}:
            text = text.strip()
        case _:
            raise ValueError('Not understood: send {"type": "say", "text": "..."} as a text frame.')
    if not 1 <= len(text) <= MAX_TEXT:
        raise ValueError(f"A message has 1 to {MAX_TEXT} characters, not {len(text)}.")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("A message must be valid Unicode: it has half of a surrogate pair.") from None
    return text
