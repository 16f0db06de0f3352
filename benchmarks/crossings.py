"""How often control goes from one file of the package to another, for one message to a reader that waits.

One command, from the project's folder:

    python3 -m venv .venv && .venv/bin/pip install -q -U pip && .venv/bin/pip install -q ".[redis]" \
        && .venv/bin/python benchmarks/crossings.py

It starts a Redis of its own, found as benchmarks/redis_layers.py finds it, unless ``--url`` names one. ``--calls`` also prints
the way that a message takes: the file and the function at each crossing.

What is counted: from the call of ``send`` until the layer is at rest again, each call of a function of the package that is in
another file than the call before it. Returns are not counted. ``sys.setprofile`` sees every task of the thread, so whatever
the layer does beside the message (the next blocking pop) is in the figure too. Of several messages the median counts.
"""

from __future__ import annotations

import argparse
import secrets
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any

import anyio
import anyio.lowlevel
import redis
import redis.backoff
import redis.retry
from redis_layers import find_server

import anyio_channels
from anyio_channels import BaseChannelLayer, InMemoryChannelLayer, RedisChannelLayer, RedisPubSubChannelLayer

PACKAGE = Path(anyio_channels.__file__).parent
MESSAGES = 9
AT_REST = 0.02
"""Seconds in which a layer is done with what follows a message."""


class Counter:
    """Counts while it is the profile function."""

    def __init__(self) -> None:
        """Start before the first call."""
        self.calls: list[tuple[str, str]] = []
        """The file and the function of each call in the package."""

    def __call__(self, frame: FrameType, event: str, _: object) -> None:
        """Take note of a call."""
        if event == "call" and Path(frame.f_code.co_filename).is_relative_to(PACKAGE):
            file = Path(frame.f_code.co_filename).relative_to(PACKAGE).as_posix()
            self.calls.append((file, frame.f_code.co_name))

    def crossings(self) -> list[tuple[str, str]]:
        """Return the calls that are in another file than the call before."""
        return [call for before, call in pairwise(self.calls) if call[0] != before[0]]


async def count(layer: BaseChannelLayer, *, normal: bool) -> list[Counter]:
    """Count for some messages to a normal channel, or to an inbox."""
    counters = []
    received: list[Any] = []

    async def read() -> None:
        received.append(await (layer.receive("normal") if normal else inbox.receive()))

    async with layer, layer.subscribe("room") as inbox, anyio.create_task_group() as tasks:
        channel = "normal" if normal else inbox.channel
        for number in range(MESSAGES):
            received.clear()
            tasks.start_soon(read)
            await anyio.sleep(AT_REST)  # until the server knows that somebody waits
            counter = Counter()
            sys.setprofile(counter)
            await layer.send(channel, {"type": "counted", "number": number})
            while not received:
                await anyio.lowlevel.checkpoint()
            await anyio.sleep(AT_REST)
            sys.setprofile(None)
            counters.append(counter)
    return counters


async def measure(url: str, *, show_calls: bool) -> None:
    """Print a line for each way that a message can take."""
    options: dict[str, Any] = {"hosts": [url], "prefix": f"crossings-{secrets.token_hex(4)}"}
    ways: list[tuple[str, BaseChannelLayer, bool]] = [
        ("memory", InMemoryChannelLayer(), False),
        ("pub/sub", RedisPubSubChannelLayer(**options), False),
        ("queue, to an inbox", RedisChannelLayer(**options), False),
        ("queue, to a normal channel", RedisChannelLayer(**options), True),
    ]
    print(f"{'':28}{'crossings':>10}{'files':>10}{'calls':>10}")
    for name, layer, normal in ways:
        counters = await count(layer, normal=normal)
        middle = statistics.median_low(len(counter.crossings()) for counter in counters)
        counter = next(counter for counter in counters if len(counter.crossings()) == middle)
        print(f"{name:28}{middle:>10}{len({file for file, _ in counter.calls}):>10}{len(counter.calls):>10}")
        if show_calls:
            for file, function in [counter.calls[0], *counter.crossings()]:
                print(f"    {file:32}{function}")


@contextmanager
def own_server() -> Generator[str]:
    """Run a Redis; yields its URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as directory:
        command = [find_server(), "--port", str(port), "--save", "", "--dir", directory, "--loglevel", "warning"]
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            retry = redis.retry.Retry(redis.backoff.ConstantBackoff(0.05), 100)
            with redis.Redis(port=port, retry=retry) as client:
                client.ping()
            yield f"redis://127.0.0.1:{port}/0"
        finally:
            server.terminate()
            server.wait()


def main() -> None:
    """Count, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="of a Redis to use, such as redis://localhost:6379/0")
    parser.add_argument("--backend", choices=["asyncio", "trio"], default="asyncio")
    parser.add_argument("--calls", action="store_true", help="also print the calls")
    arguments = parser.parse_args()

    async def run(url: str) -> None:
        await measure(url, show_calls=arguments.calls)

    if arguments.url:
        anyio.run(run, arguments.url, backend=arguments.backend)
        return
    with own_server() as url:
        anyio.run(run, url, backend=arguments.backend)


if __name__ == "__main__":
    main()
