"""Layers that were open when their process forked: the child is told, and harms nobody. See also test_sync_deployed.py."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from anyio import fail_after
from conftest import LOOPS
from layers_on_redis import PATIENCE, Kind, both, new_prefix
from redis_server import RedisServer

from anyio_channels import InMemoryChannelLayer

SCRIPT = """
import os, sys, traceback
import anyio
from anyio_channels import InMemoryChannelLayer, create_channel_layer

BACKEND, OPTIONS, URL, PREFIX = eval(sys.argv[1])
parent = os.getpid()

async def check(layer, inbox):
    for call in (
        lambda: layer.send("a", {}),
        lambda: layer.receive("a"),
        lambda: layer.group_send("room", {}),
        lambda: layer.group_add("room", inbox.channel),
        lambda: layer.group_channels("room"),
        lambda: layer.new_channel(),
        lambda: layer.subscribe("room").__aenter__(),
        lambda: inbox.receive(),
        lambda: inbox.join("other"),
        lambda: layer.flush(),
        lambda: layer.__aenter__(),
    ):
        try:
            with anyio.fail_after(20):
                await call()
        except RuntimeError as error:
            assert f"was opened in process {parent}, and this is a fork of it, process {os.getpid()}: " in str(error), error
        else:
            raise AssertionError(call)
    await layer.close()

def in_child(work):
    child = os.fork()
    if not child:
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0

async def reopen(layer):
    async with layer:  # in memory there is nothing of the parent's to harm
        await layer.send("a", {"n": 1})
        assert await layer.receive("a") == {"n": 1}

async def main():
    for scheme in ("redis", "redis+pubsub"):
        layer = create_channel_layer(URL.replace("redis", scheme), prefix=PREFIX)
        async with layer, layer.subscribe("room") as inbox:
            for backend in ("asyncio", "trio"):
                await anyio.to_thread.run_sync(in_child, lambda: anyio.run(check, layer, inbox, backend=backend))
            await layer.send(inbox.channel, {"n": 0})
            if BACKEND == "trio":  # in the copy of the event loop that opened the layer; asyncio's does not go on
                child = os.fork()
                if not child:
                    try:
                        await layer.group_send("room", {"from": "child"})
                    except RuntimeError as error:
                        os._exit(0 if "this is a fork of it" in str(error) else 1)
                    os._exit(2)
                assert os.waitpid(child, 0)[1] == 0
            for number in range(50):
                await layer.group_send("room", {"n": number + 1})
            assert [(await inbox.receive())["n"] for _ in range(51)] == [*range(51)]
            assert layer.statistics().reconnects == 0
    async with InMemoryChannelLayer() as layer:
        await layer.send("a", {"n": 0})
        await anyio.to_thread.run_sync(in_child, lambda: anyio.run(reopen, layer))

anyio.run(main, backend=BACKEND, backend_options=OPTIONS)
"""


@pytest.mark.parametrize("loop", LOOPS)
def test_a_fork_is_told_and_harms_nobody(loop: str, redis_server: RedisServer) -> None:
    """Each call in a fork is a RuntimeError that says *fork* and names both processes; the parent loses nothing."""
    given = repr((*LOOPS[loop], redis_server.url, new_prefix()))
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, given],  # of forks with threads, from 3.12 on; by trio of uvloop
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr


@pytest.mark.anyio
@pytest.mark.two_loops
@both
async def test_in_a_fork(kind: Kind, redis_server: RedisServer) -> None:
    """The same, where it can be measured: closing does nothing, and there is no warning about a layer left open."""
    async with kind.layer_class([redis_server.url], prefix=new_prefix()) as layer:
        token, layer._opened_by = layer._home.token, os.getpid() + 1
        try:
            layer._home._disown()
            await layer.close()
            calls: list[Callable[[], Awaitable[Any]]] = [
                lambda: layer.send("a", {}),
                lambda: layer.receive("a"),
                layer.__aenter__,
            ]
            for call in calls:
                with (
                    fail_after(PATIENCE),
                    pytest.raises(RuntimeError, match=rf"process {os.getpid() + 1}, and this is a fork of it"),
                ):
                    await call()
        finally:
            layer._home.token, layer._opened_by = token, os.getpid()
        await layer.send("a", {})


@pytest.mark.anyio
@pytest.mark.two_loops
async def test_a_layer_left_open_by_a_parent() -> None:
    """It is the parent's to close, so a fork that lets go of it is not warned."""
    layer = InMemoryChannelLayer()
    await layer.__aenter__()
    layer._opened_by += 1
    layer.__del__()
    layer._opened_by -= 1
    with pytest.warns(ResourceWarning, match="unclosed channel layer"):
        layer.__del__()
    await layer.close()
