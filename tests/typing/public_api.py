"""Read by type checkers, never run: what users write must have the types they expect."""

from __future__ import annotations

import re
from typing import Any, assert_type

from fastapi import FastAPI
from flask import Flask
from starlette.applications import Starlette

from anyio_channels import (
    BaseChannelLayer,
    ChannelLayerStatistics,
    Inbox,
    InMemoryChannelLayer,
    MessagesLost,
    RedisChannelLayer,
    RedisPubSubChannelLayer,
    channel_layers,
    create_channel_layer,
    create_redis_channel_layer,
    get_channel_layer,
)
from anyio_channels.sync import SyncChannelLayer, SyncInbox
from anyio_channels.testing import Clock, Features, contract_machine, run_checks
from anyio_channels.urls import register_scheme
from anyio_channels.wsgi import AsgiToWsgi, WsgiToAsgi


async def use(layer: InMemoryChannelLayer) -> None:
    async with layer as opened:
        assert_type(opened, InMemoryChannelLayer)
    async with layer.subscribe("a", "b", overflow="drop_old", on_gap="raise") as inbox:
        assert_type(inbox, Inbox)
        assert_type(inbox.channel, str)
        assert_type(await inbox.receive(), dict[str, Any])
        async for message in inbox:
            assert_type(message, dict[str, Any])
    assert_type(await layer.receive("a"), dict[str, Any])
    assert_type(await layer.group_channels("a"), set[str])
    assert_type(layer.statistics(), ChannelLayerStatistics)
    layer.subscribe("a", overflow="nonsense")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    InMemoryChannelLayer(capactiy=5)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


async def use_redis() -> None:
    async with RedisChannelLayer([("host", 6379)], symmetric_encryption_keys=["key"]) as queue:
        assert_type(queue, RedisChannelLayer)
        assert_type(queue.statistics().connections, int)
    async with RedisPubSubChannelLayer(["redis://host"], on_reconnect="again") as pubsub:
        assert_type(await pubsub.receive("a"), dict[str, Any])
    assert_type(create_redis_channel_layer("redis://host"), RedisChannelLayer)
    RedisChannelLayer(serializer_format="pickle")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def make(clock: Clock, **options: Any) -> BaseChannelLayer:
    return InMemoryChannelLayer(clock=clock, channel_capacity={"a*": 1, re.compile("b"): 2}, **options)


async def check() -> None:
    await run_checks(make)
    await run_checks(make, Features(keeps_unread=False))
    contract_machine(make, "trio", {"restrict_keyboard_interrupt_to_checkpoints": True})
    assert_type(get_channel_layer(), BaseChannelLayer | None)
    assert_type(create_channel_layer("memory://"), BaseChannelLayer)
    assert_type(MessagesLost(5).missed, int | None)


def make_from_url(url: str, *, capacity: int = 5) -> BaseChannelLayer:
    return InMemoryChannelLayer(capacity=capacity + len(url))


def register() -> None:
    register_scheme("mine", make_from_url)
    register_scheme("mine", len)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def use_synchronously(layer: InMemoryChannelLayer) -> None:
    with SyncChannelLayer(layer, "trio") as sync:
        assert_type(sync, SyncChannelLayer)
        assert_type(sync.receive("a", timeout=5), dict[str, Any])
        assert_type(sync.group_channels("a"), set[str])
        assert_type(sync.statistics(), ChannelLayerStatistics)
        with sync.subscribe("a", overflow="drop_old") as inbox:
            assert_type(inbox, SyncInbox)
            for message in inbox:
                assert_type(message, dict[str, Any])


async def open_all() -> None:
    async with channel_layers.open() as nothing:
        assert_type(nothing, None)
    Starlette(lifespan=channel_layers.open)
    FastAPI(lifespan=channel_layers.open)


def adapt() -> None:
    asgi = WsgiToAsgi(Flask("app"), threads=4, spool=True)
    with AsgiToWsgi(Starlette(), backend_options={"use_uvloop": True}) as wsgi:
        AsgiToWsgi(asgi)
        WsgiToAsgi(wsgi)
