"""``channel_layers.open()``: the registered layers, open for the length of a block or of an application."""

from __future__ import annotations

import http.client
import importlib
import json
import socket
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import anyio
import pytest
from anyio import CancelScope, create_task_group, fail_after, to_thread
from anyio.lowlevel import checkpoint
from fastapi import FastAPI
from hypercorn import Config
from layers_on_redis import new_prefix
from redis_server import RedisServer
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from anyio_channels import BaseChannelLayer, ChannelLayerRegistry, InMemoryChannelLayer, create_channel_layer

pytestmark = pytest.mark.two_loops

PATIENCE = 20.0
asynchronous = pytest.mark.anyio


class Recorder(InMemoryChannelLayer):
    """Tells when it is opened and closed. It is equal to others, and has no hash: layers are told apart by identity."""

    def __init__(self, name: str, told: list[str], on_open: Callable[[], Awaitable[None]] = checkpoint) -> None:
        super().__init__()
        self.name = name
        self.told = told
        self.on_open = on_open

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Recorder)

    async def open(self) -> None:
        await self.on_open()
        self.told.append(f"{self.name} opened")

    async def close(self) -> None:
        await super().close()
        self.told.append(f"{self.name} closed")


def registry_of(*layers: BaseChannelLayer) -> ChannelLayerRegistry:
    registry = ChannelLayerRegistry()
    for number, layer in enumerate(layers):
        registry.register(f"layer{number}", layer)
    return registry


@asynchronous
async def test_all_are_open_for_the_length_of_the_block() -> None:
    """Opened as they were registered, closed the other way round, once each however many aliases they have."""
    told: list[str] = []
    one, two = Recorder("one", told), Recorder("two", told)
    registry = registry_of(one, two, one)
    for _ in range(2):  # as often as one likes
        async with registry.open():
            assert told == ["one opened", "two opened"]
            registry.unregister("layer1")
            registry.register("late", Recorder("late", told))
        assert told == ["one opened", "two opened", "two closed", "one closed"]
        registry = registry_of(one, two, one)
        told.clear()


@asynchronous
async def test_no_layers() -> None:
    """Where none is registered, nothing is opened."""
    async with ChannelLayerRegistry().open():
        pass


@asynchronous
async def test_one_that_cannot_be_opened() -> None:
    """Those before it are closed, those behind it are not opened, and its error comes out as it is."""

    async def fail() -> None:
        raise OSError("the test said so")

    told: list[str] = []
    registry = registry_of(Recorder("one", told), Recorder("two", told, fail), Recorder("three", told))
    with pytest.raises(OSError, match="the test said so"):
        async with registry.open():
            pytest.fail("opened")
    assert told == ["one opened", "one closed"]


@asynchronous
async def test_one_that_is_open_already() -> None:
    """Whoever opened a layer closes it: opening it once more is refused, and it stays open."""
    told: list[str] = []
    one, two = Recorder("one", told), Recorder("two", told)
    async with two:
        with pytest.raises(RuntimeError, match="is already open"):
            async with registry_of(one, two).open():
                pytest.fail("opened")
        assert told == ["two opened", "one opened", "one closed"]


@asynchronous
async def test_errors_of_the_block_come_out_as_they_are(redis_server: RedisServer) -> None:
    """Also through layers with tasks of their own, all of which are closed."""
    layers = [create_channel_layer(f"{redis_server.url}?prefix={new_prefix()}") for _ in range(2)]
    with pytest.raises(ZeroDivisionError):
        async with registry_of(InMemoryChannelLayer(), *layers).open():
            await layers[0].send("a", {"n": 1})
            raise ZeroDivisionError
    for layer in layers:
        with pytest.raises(anyio.ClosedResourceError):
            await layer.send("a", {})


@asynchronous
async def test_cancelled_while_opening() -> None:
    """What was opened is closed."""
    told: list[str] = []
    scope = CancelScope()

    async def cancel() -> None:
        scope.cancel()
        await checkpoint()

    with scope:
        async with registry_of(Recorder("one", told), Recorder("two", told, cancel)).open():
            pytest.fail("opened")
    assert scope.cancelled_caught
    assert told == ["one opened", "one closed"]


# Under a server


def get(port: int) -> Any:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    try:
        connection.request("GET", "/")
        return json.loads(connection.getresponse().read())
    finally:
        connection.close()


def starlette_app(registry: ChannelLayerRegistry, endpoint: Callable[[], Awaitable[Any]]) -> Any:
    async def view(_: Request) -> JSONResponse:
        return JSONResponse(await endpoint())

    return Starlette(routes=[Route("/", view)], lifespan=registry.open)


def fastapi_app(registry: ChannelLayerRegistry, endpoint: Callable[[], Awaitable[Any]]) -> Any:
    app = FastAPI(lifespan=registry.open)
    app.get("/")(endpoint)
    return app


@asynchronous
@pytest.mark.parametrize("make_app", [starlette_app, fastapi_app])
async def test_lifespan_of_an_application(
    make_app: Callable[..., Any], redis_server: RedisServer, anyio_backend_name: str
) -> None:
    """``lifespan=registry.open`` is all it takes: the layers are open while the server serves, and closed when it stops."""
    memory = InMemoryChannelLayer()
    on_redis = create_channel_layer(f"{redis_server.url}?prefix={new_prefix()}")
    registry = registry_of(memory, on_redis)

    async def endpoint() -> list[Any]:
        for layer in (memory, on_redis):
            await layer.send("a", {"via": type(layer).__name__})
        return [await layer.receive("a") for layer in (memory, on_redis)]

    serve = importlib.import_module(f"hypercorn.{anyio_backend_name}").serve
    config = Config()
    stopping = anyio.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener, fail_after(PATIENCE):
        port = listener.getsockname()[1]
        config.bind = f"fd://{listener.detach()}"
        config.loglevel = "WARNING"
        async with create_task_group() as tg:
            tg.start_soon(partial(serve, make_app(registry, endpoint), config, shutdown_trigger=stopping.wait))
            answer = await to_thread.run_sync(get, port)
            stopping.set()
    assert answer == [{"via": "InMemoryChannelLayer"}, {"via": "RedisChannelLayer"}]
    for layer in (memory, on_redis):
        with pytest.raises(anyio.ClosedResourceError):
            await layer.send("a", {})
