"""Applications as they are deployed, for the servers that ``test_sync_deployed`` starts in processes of their own.

The environment says what is deployed: ``LAYER`` is the URL of the channel layer, ``BACKEND`` the event loop of the synchronous
one (``asyncio``, ``asyncio+uvloop`` or ``trio``). A framework is imported by who asks for it: scripts have no use for any.
"""

from __future__ import annotations

import logging
import os
from functools import cache
from typing import TYPE_CHECKING, Any

from anyio import create_task_group

from anyio_channels import channel_layers, create_channel_layer, register_channel_layer
from anyio_channels.sync import SyncChannelLayer

if TYPE_CHECKING:
    from django.http import HttpRequest, HttpResponse
    from flask import Flask
    from starlette.applications import Starlette
    from starlette.websockets import WebSocket

ROOM = "room"


def make_layer() -> SyncChannelLayer:
    """One more, not open."""
    backend, _, loop = os.environ["BACKEND"].partition("+")
    options = {"use_uvloop": True} if loop == "uvloop" else None
    return SyncChannelLayer(create_channel_layer(os.environ["LAYER"]), backend, backend_options=options)


layer = make_layer()
"""Opened by what is told to: a hook of the server, or a script."""


def say(number: int) -> str:
    """Broadcast from synchronous code, and return who did."""
    layer.group_send(ROOM, {"type": "said", "number": number})
    return str(os.getpid())


# WSGI


def make_flask_app() -> Flask:
    from flask import Flask

    app = Flask(__name__)
    app.add_url_rule("/say/<int:number>", view_func=say)
    return app


def make_eager_flask_app() -> Flask:
    """The mistake: what is preloaded opens the layer in the master."""
    layer.open()
    return make_flask_app()


def make_django_app() -> Any:
    import django
    from django.conf import settings
    from django.core.wsgi import get_wsgi_application
    from django.http import HttpResponse
    from django.urls import path

    def view(request: HttpRequest, number: int) -> HttpResponse:
        return HttpResponse(say(number))

    settings.configure(ALLOWED_HOSTS=["127.0.0.1"], ROOT_URLCONF=(path("say/<int:number>", view),))
    django.setup()
    return get_wsgi_application()


# ASGI


def make_starlette_app() -> Starlette:
    """Each WebSocket hears the room, from the moment that it is told so."""
    from starlette.applications import Starlette
    from starlette.routing import WebSocketRoute

    native = create_channel_layer(os.environ["LAYER"])
    register_channel_layer("default", native)

    async def hear(websocket: WebSocket) -> None:
        await websocket.accept()
        async with native.subscribe(ROOM) as inbox, create_task_group() as tasks:

            async def forward() -> None:
                await websocket.send_json({"type": "ready"})
                async for message in inbox:
                    await websocket.send_json(message)

            tasks.start_soon(forward)
            while (await websocket.receive())["type"] != "websocket.disconnect":
                pass
            tasks.cancel_scope.cancel()

    return Starlette(routes=[WebSocketRoute("/", hear)], lifespan=channel_layers.open)


# Celery


@cache
def make_celery_app() -> Any:
    """Tasks, and the signals on which the layer is opened and closed: ``SIGNALS`` names the two."""
    from celery import Celery, signals

    def open_layer(**_: object) -> None:
        layer.open()

    def close_layer(**_: object) -> None:
        layer.close()
        logging.getLogger(__name__).warning("closed in process %s", os.getpid())

    opened_at, closed_at = os.environ["SIGNALS"].split()
    getattr(signals, opened_at).connect(open_layer, weak=False)
    getattr(signals, closed_at).connect(close_layer, weak=False)
    app = Celery(broker=os.environ["BROKER"], backend=os.environ["BROKER"])
    app.conf.task_default_queue = os.environ["QUEUE"]
    app.conf.worker_proc_alive_timeout = 30  # 4 are few on a machine with other things to do
    app.task(say, name="say")
    app.task(take, name="take")
    return app


def take(channel: str, timeout: float | None = None) -> tuple[int, Any]:
    """Say that one waits, wait, and return who got what."""
    layer.group_send(ROOM, {"type": "waits", "channel": channel, "process": os.getpid()})
    return os.getpid(), layer.receive(channel, timeout)


def __getattr__(name: str) -> Any:
    if name == "celery_app":  # the command takes no function that makes one
        return make_celery_app()
    raise AttributeError(name)
