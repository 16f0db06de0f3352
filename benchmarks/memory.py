"""The in-memory layer beside the in-memory layers of Django Channels and fast-channels, in one run.

One command, from the project's folder (on Windows, Scripts in the place of bin):

    python3 -m venv .venv && .venv/bin/pip install -q -U pip && .venv/bin/pip install -q . --group benchmarks \
        && .venv/bin/python benchmarks/memory.py

The rounds alternate between the layers and the backends, so that a slow moment of the machine hits all of them; of each
figure the best round counts, for what disturbs a round only ever makes it slower. Peers are set up as their own
documentation says, with the same capacity and expiry. Memory is measured in a process of its own.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import gc
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import anyio
import anyio.lowlevel

from anyio_channels import InMemoryChannelLayer

MESSAGE = {"type": "chat.message", "room": "lobby", "user": "ada", "text": "hello there everyone"}
MEMBERS = 1000
BACKENDS: dict[str, tuple[str, dict[str, Any]]] = {
    "asyncio": ("asyncio", {"use_uvloop": False}),
    "uvloop": ("asyncio", {"use_uvloop": True}),
    "trio": ("trio", {}),
}
OURS = "anyio_channels"
API = "with OpenTelemetry's API"
SDK = "with its SDK"
PACKAGES = (
    "anyio_channels", "channels", "fast-channels", "anyio", "trio", "uvloop", "ormsgpack", "opentelemetry-api",
    "opentelemetry-sdk",
)  # fmt: skip


def make_layer(kind: str, **options: Any) -> Any:
    """Make a layer of ours or of a peer."""
    if kind == OURS:
        return InMemoryChannelLayer(**options)
    if kind in (API, SDK):
        from anyio_channels.otel import OpenTelemetryChannelLayer

        return OpenTelemetryChannelLayer(
            InMemoryChannelLayer(**options), tracer_provider=sdk_provider() if kind == SDK else None
        )
    if kind == "channels":
        from django.conf import settings

        if not settings.configured:
            settings.configure()
        from channels.layers import InMemoryChannelLayer as Peer
    else:
        from fast_channels.layers import InMemoryChannelLayer as Peer
    return Peer(**options)


@functools.cache
def sdk_provider() -> Any:
    """OpenTelemetry as an application sets it up, with an exporter that throws everything away."""
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

    class Nowhere(SpanExporter):
        def export(self, spans: Any) -> SpanExportResult:  # noqa: ARG002 - nowhere
            return SpanExportResult.SUCCESS

    provider = TracerProvider()
    provider.add_span_processor(BatchSpanProcessor(Nowhere()))
    return provider


async def make_group(layer: Any) -> list[str]:
    """Make a group of MEMBERS new channels."""
    channels = [await layer.new_channel() for _ in range(MEMBERS)]
    for channel in channels:
        await layer.group_add("group", channel)
    return channels


async def pairs(layer: Any, count: int = 2000) -> float:
    """Seconds for one send and one receive."""
    start = time.perf_counter()
    for _ in range(count):
        await layer.send("channel", MESSAGE)
        await layer.receive("channel")
    return (time.perf_counter() - start) / count


async def pairs_alone(layer: Any) -> float:
    """One task sends and receives."""
    return await pairs(layer)


async def received_in_turn(layer: Any, rounds: int = 2) -> float:
    """A broadcast, which one task then receives for every member; seconds a delivery."""
    channels = await make_group(layer)
    start = time.perf_counter()
    for _ in range(rounds):
        await layer.group_send("group", MESSAGE)
        for channel in channels:
            await layer.receive(channel)
    return (time.perf_counter() - start) / rounds / MEMBERS


async def received_by_waiting_tasks(layer: Any, rounds: int = 5) -> float:
    """A broadcast, for which every member waits in a task of its own; seconds a delivery."""
    channels = await make_group(layer)

    async def read(channel: str) -> None:
        for _ in range(rounds):
            await layer.receive(channel)

    async with anyio.create_task_group() as tg:
        for channel in channels:
            tg.start_soon(read, channel)
        await anyio.wait_all_tasks_blocked()
        start = time.perf_counter()
        for _ in range(rounds):
            await layer.group_send("group", MESSAGE)
            await anyio.lowlevel.checkpoint()
    return (time.perf_counter() - start) / rounds / MEMBERS


async def broadcast_alone(layer: Any, rounds: int = 5) -> float:
    """A broadcast that nobody receives; seconds a delivery."""
    await make_group(layer)
    start = time.perf_counter()
    for _ in range(rounds):
        await layer.group_send("group", MESSAGE)
    return (time.perf_counter() - start) / rounds / MEMBERS


async def among_100(layer: InMemoryChannelLayer) -> float:
    """Send and receive while 100 other channels hold a message."""
    for number in range(100):
        await layer.send(f"other.{number}", MESSAGE)
    return min([await pairs(layer) for _ in range(5)])


async def among_100_000(layer: InMemoryChannelLayer) -> float:
    """Send and receive while 100,000 other channels hold a message."""
    for number in range(100_000):
        await layer.send(f"other.{number}", MESSAGE)
    return min([await pairs(layer) for _ in range(5)])  # filling takes long, so one filling serves for five


@dataclass
class Row:
    """One workload: what is measured, on which layers, and against what it is held."""

    title: str
    run: Callable[[Any], Awaitable[float]]
    peers: tuple[str, ...] = ("channels", "fast-channels")
    goal: float | None = None
    best: dict[tuple[str, str], float] = field(default_factory=dict)

    def note(self, backend: str, kind: str, seconds: float) -> None:
        """Keep the best."""
        self.best[backend, kind] = min(seconds, self.best.get((backend, kind), seconds))


ROWS = [
    Row("send + receive, one task", pairs_alone, goal=2),
    Row("group_send to 1,000 members, then each is received", received_in_turn, goal=35),
    Row("group_send to 1,000 members, each waits in its own task", received_by_waiting_tasks),
    Row("group_send to 1,000 members alone", broadcast_alone, goal=20),
    Row("send + receive beside 100 filled channels", among_100, peers=()),
    Row("send + receive beside 100,000 filled channels", among_100_000, peers=()),
]
OTEL_ROWS = [
    Row("send + receive, one task", pairs_alone, peers=(API, SDK)),
    Row("group_send to 1,000 members, then each is received", received_in_turn, peers=(API, SDK)),
    Row("group_send to 1,000 members alone", broadcast_alone, peers=(API, SDK)),
]


def measure(rounds: int) -> None:
    """Fill in the rows."""
    for number in range(rounds):
        for backend, (name, options) in BACKENDS.items():
            for row in ROWS:
                if row.run is among_100_000 and number % 4:
                    continue  # most of its time is filling the channels
                for kind in (OURS, *(row.peers if name == "asyncio" else ())):
                    seconds = anyio.run(row.run, make_layer(kind), backend=name, backend_options=options)
                    row.note(backend, kind, seconds)
            for row in OTEL_ROWS:
                for kind in (OURS, API, SDK):
                    row.note(backend, kind, anyio.run(row.run, make_layer(kind), backend=name, backend_options=options))
        print(f"\rround {number + 1} of {rounds}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)


def resident() -> float:
    """The resident memory of this process in MB, without what it has freed."""
    gc.collect()
    if sys.platform == "linux":
        # The C library keeps freed memory for later use; ask it to give that back, or it would count as ours.
        ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/statm") as statm:  # noqa: PTH123
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


async def memory_of_a_broadcast() -> dict[str, float]:
    """How much 1 MB to 1,000 members adds, and what is left of it when all have received."""
    layer = InMemoryChannelLayer()
    channels = await make_group(layer)
    message = {"type": "file", "data": "x" * 1_000_000}
    before = resident()
    await layer.group_send("group", message)
    sent = resident()
    most = sent
    for channel in channels:
        await layer.receive(channel)
        most = max(most, resident())
    return {
        "1 MB to 1,000 members: MB more when sent": sent - before,
        "the same, at most while received": most - before,
    }


async def memory_of_unread_channels() -> dict[str, float]:
    """How much 100,000 channels with an unread message add, and what is left when they expired."""
    now = 0.0
    layer = InMemoryChannelLayer(clock=lambda: now, expiry=10)
    for number in range(1000):  # what the interpreter needs once
        await layer.send(f"warm.{number}", MESSAGE)
    now = 10.0
    layer.statistics()
    before = resident()
    for number in range(100_000):
        await layer.send(f"reply.{number}", MESSAGE)
    filled = resident()
    now = 20.0
    layer.statistics()
    return {"100,000 unread channels: MB more": filled - before, "the same, after they expired": resident() - before}


MEMORY = {"broadcast": memory_of_a_broadcast, "unread": memory_of_unread_channels}


def measure_memory() -> dict[str, float]:
    """Run each memory measurement in a fresh process."""
    figures: dict[str, float] = {}
    for name in MEMORY:
        command = [sys.executable, __file__, "--memory", name]
        figures |= json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return figures


def report(figures: dict[str, float], rounds: int) -> dict[str, Any]:
    """Return all figures with what they depend on."""
    versions = {}
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
            row.title: {f"{kind} on {backend}": round(best * 1e6, 3) for (backend, kind), best in row.best.items()}
            for row in ROWS
        },
        "microseconds with OpenTelemetry": {
            row.title: {f"{kind} on {backend}": round(best * 1e6, 3) for (backend, kind), best in row.best.items()}
            for row in OTEL_ROWS
        },
        "megabytes": {title: round(megabytes, 1) for title, megabytes in figures.items()},
    }


def print_table(figures: dict[str, float]) -> None:
    """Print what is measured, microseconds an operation, with ratios to the peers and between the backends."""
    head = f"{'microseconds a delivery, or a send + receive':56} {'backend':8} {'ours':>8} {'channels':>18} {'fast-channels':>18}"
    print(f"Python {platform.python_version()}, {platform.system()} {platform.machine()}, {os.cpu_count()} cores")
    print(head, "-" * len(head), sep="\n")
    for row in ROWS:
        for backend in BACKENDS:
            ours = row.best[backend, OURS]
            cells = []
            for peer in ("channels", "fast-channels"):
                theirs = row.best.get((backend, peer))
                cells.append("" if theirs is None else f"{theirs * 1e6:.2f} = {theirs / ours:5.1f}x")
            goal = f"  goal {row.goal:g}x" if row.goal and backend == "asyncio" else ""
            if backend == "trio":
                goal = f"  {row.best['asyncio', OURS] / ours:.2f} of ours on asyncio (goal 0.75)"
            title = row.title if backend == "asyncio" else ""
            print(f"{title:56} {backend:8} {ours * 1e6:8.2f} {cells[0]:>18} {cells[1]:>18}{goal}")
    few, many = (next(row for row in ROWS if row.run is run).best for run in (among_100, among_100_000))
    slower = {backend: many[backend, OURS] / few[backend, OURS] for backend in BACKENDS}
    print(
        f"\n100,000 filled channels against 100: {', '.join(f'{b} {s:.2f}x' for b, s in slower.items())} (goal: 1.2x)"
    )
    for title, megabytes in figures.items():
        print(f"{title:48} {megabytes:8.1f}")
    print_otel_table()


def print_otel_table() -> None:
    """Print what OpenTelemetry around our layer costs."""
    print(f"\n{'microseconds, as above':56} {'backend':8} {'ours':>8} {API:>26} {SDK:>22}")
    for row in OTEL_ROWS:
        for backend in BACKENDS:
            ours, api, sdk = (row.best[backend, kind] * 1e6 for kind in (OURS, API, SDK))
            title = row.title if backend == "asyncio" else ""
            print(
                f"{title:56} {backend:8} {ours:8.2f} {api:17.2f} = {api / ours:5.2f}x {sdk:13.2f} = {sdk / ours:5.2f}x"
            )


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12, help="how often everything is measured (default 12)")
    parser.add_argument("--json", metavar="FILE", help="also write the figures to FILE")
    parser.add_argument("--memory", choices=MEMORY, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory:
        print(json.dumps(anyio.run(MEMORY[arguments.memory])))
        return
    measure(arguments.rounds)
    figures = measure_memory()
    print_table(figures)
    if arguments.json:
        with open(arguments.json, "w") as file:  # noqa: PTH123
            file.write(json.dumps(report(figures, arguments.rounds), indent=2) + "\n")


if __name__ == "__main__":
    main()
