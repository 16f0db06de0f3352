"""Scale, measured: group_send to members spread over 8 processes, and many channels, on one or more Redis servers.

One command, from the project's folder:

    python3 -m venv .venv && .venv/bin/pip install -q -U pip && .venv/bin/pip install -q ".[redis]" --group benchmarks \
        && .venv/bin/python benchmarks/scale.py

It starts its own servers, found as benchmarks/redis_layers.py finds them: one ("one"), two that do not know of each other
("two"), and a Redis Cluster of three primaries without replicas ("cluster"). What cannot be opened is reported and skipped.

Broadcasts: every process holds its share of the members of one group, and one task there receives for all of them. The parent
sends one broadcast after the other. The latency of one is the time from the call of ``group_send`` to the last delivery in the
last process. A group is on one server, and so is all that is sent to one process; what more servers give is that the processes
are spread.

Channels: every process holds its share of the open inboxes of a queue layer. The parent sends to inboxes drawn at random, from
many tasks. The latency of a message is the time from the call of ``send`` to the return of ``receive``. Sending does not wait for
the readers, so when they are slower the latency is mostly the time that a message lies in the queue.

Clocks are compared between processes and memory is read from /proc, so it needs Linux.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import platform
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncGenerator, Generator, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import anyio
import anyio.abc
import anyio.to_thread
import redis
from anyio.streams.buffered import BufferedByteReceiveStream
from redis_layers import MESSAGE, find_server

from anyio_channels import RedisChannelLayer, RedisPubSubChannelLayer

LAYERS: dict[str, type[RedisChannelLayer | RedisPubSubChannelLayer]] = {
    "queue": RedisChannelLayer,
    "pub/sub": RedisPubSubChannelLayer,
}
TOPOLOGIES = {"one": 1, "two": 2, "cluster": 3}
PACKAGES = ("anyio_channels", "anyio", "redis", "hiredis", "ormsgpack")
GROUP = "everyone"
WARM_UP = 3
"""How many broadcasts, or messages for each sender, are sent before those that count."""
BUS = 10_000
"""What a cluster adds to a port for its own talk."""
SLOTS = 16_384
LONGEST = 64 * 1024 * 1024
"""Bytes in a worker's report, at most."""


# Servers


class Nodes:
    """The servers of one topology, and what they say of themselves."""

    def __init__(self, urls: list[str], options: dict[str, Any]) -> None:
        """``options``: with which the layers are opened."""
        self.urls = urls
        self.options = options
        self.clients = [redis.Redis.from_url(url) for url in urls]

    def clear(self) -> None:
        """Empty all servers."""
        for client in self.clients:
            client.flushall()

    def memory(self) -> int:
        """Return the bytes that all servers use."""
        return sum(int(client.info("memory")["used_memory"]) for client in self.clients)

    def cpu(self) -> list[float]:
        """Return the seconds of CPU time that each server took since it was started."""
        found = [client.info("cpu") for client in self.clients]
        return [float(one["used_cpu_user"]) + float(one["used_cpu_sys"]) for one in found]

    @property
    def version(self) -> str:
        """The version of the servers."""
        return str(self.clients[0].info("server")["redis_version"])


def free_port() -> int:
    """Return a port that is free, and that of a cluster's own talk with it."""
    while True:
        with socket.socket() as one, socket.socket() as other:
            one.bind(("127.0.0.1", 0))
            port = int(one.getsockname()[1])
            with suppress(OSError, OverflowError):
                other.bind(("127.0.0.1", port + BUS))
                return port


def stop(server: subprocess.Popen[bytes]) -> None:
    """End a server."""
    server.terminate()
    try:
        server.wait(10)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


@contextmanager
def opened(topology: str, timeout: float) -> Generator[Nodes]:
    """Start the servers of a topology; end them on the way out."""
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        ports = []
        for number in range(TOPOLOGIES[topology]):
            ports.append(free_port())
            log = Path(directory, f"{number}.log")
            command = [find_server(), "--port", str(ports[-1]), "--bind", "127.0.0.1", "--save", "", "--dir", directory]
            command += ["--loglevel", "warning", "--logfile", str(log)]
            if topology == "cluster":
                command += ["--cluster-enabled", "yes", "--cluster-config-file", f"{number}.conf"]
            # In a session of its own, so that Ctrl-C reaches this process alone, which then ends the others.
            server = subprocess.Popen(command, start_new_session=True)
            stack.callback(stop, server)
            wait_for(server, ports[-1], log, timeout)
        urls = [f"redis://127.0.0.1:{port}" for port in ports]
        nodes = Nodes(urls, {"hosts": urls})
        for client in nodes.clients:
            stack.callback(client.close)
        if topology == "cluster":
            join_cluster(nodes, ports, timeout)
            nodes.options = {"hosts": urls[:1], "cluster": True}
        yield nodes


def wait_for(server: subprocess.Popen[bytes], port: int, log: Path, timeout: float) -> None:
    """Return when a server answers. ``RuntimeError`` with what it logged if it does not."""
    deadline = time.monotonic() + timeout
    with redis.Redis(port=port) as client:
        while True:
            try:
                client.ping()
            except redis.ConnectionError:
                if server.poll() is not None or time.monotonic() > deadline:
                    said = log.read_text(errors="replace") if log.exists() else ""
                    raise RuntimeError(f"a server does not answer at port {port}: {said.strip()}") from None
                time.sleep(0.02)
            else:
                return


def join_cluster(nodes: Nodes, ports: list[int], timeout: float) -> None:
    """Make a cluster of servers that are none yet; return when all of them say that it works."""
    for number, client in enumerate(nodes.clients):
        first, end = (SLOTS * place // len(ports) for place in (number, number + 1))
        client.cluster("SET-CONFIG-EPOCH", number + 1)
        client.cluster("ADDSLOTSRANGE", first, end - 1)
    for port in ports[1:]:
        nodes.clients[0].cluster("MEET", "127.0.0.1", port)
    deadline = time.monotonic() + timeout
    while True:
        said = [client.cluster("INFO") for client in nodes.clients]
        texts = [
            "\n".join(f"{key}:{value}" for key, value in one.items()) if isinstance(one, dict) else one.decode()
            for one in said
        ]
        if all("cluster_state:ok" in text and f"cluster_known_nodes:{len(ports)}" in text for text in texts):
            return
        if time.monotonic() > deadline:
            raise RuntimeError("the cluster does not come up:\n" + "\n".join(texts))
        time.sleep(0.05)


# Workers: this same script, told by the parent what to do


def rss() -> int:
    """Return the bytes of this process that are in memory."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status does not say VmRSS")


def say(**report: Any) -> None:
    """Tell the parent."""
    print(json.dumps(report), flush=True)


async def told() -> bool:
    """Wait until the parent says go; ``False`` when it is done with this process, or gone."""
    return bool(await anyio.to_thread.run_sync(sys.stdin.readline, abandon_on_cancel=True))


async def work(plan: dict[str, Any]) -> None:
    """Do the part of one worker."""
    async with LAYERS[plan["layer"]](**plan["options"]) as layer:
        say(rss=rss())
        if await told():
            await (hold_members if plan["workload"] == "broadcasts" else hold_channels)(layer, plan)
            await told()


async def hold_members(layer: Any, plan: dict[str, Any]) -> None:
    """Hold members of the group; report when all of them have received a broadcast."""
    members = [await layer.new_channel() for _ in range(plan["share"])]
    for member in members:
        await layer.group_add(GROUP, member)
    say(rss=rss())
    for number in range(-WARM_UP, plan["broadcasts"]):
        with anyio.fail_after(plan["timeout"]):
            for member in members:
                message = await layer.receive(member)
                if message["number"] != number:
                    raise RuntimeError(f"broadcast {message['number']} came in the place of {number}")
        say(at=time.monotonic(), cpu=time.process_time())
    say(rss=rss())


def draw(plan: dict[str, Any]) -> list[int]:
    """Return the channels to which messages are sent, by number, in that order; the same in every process."""
    numbers = random.Random(plan["seed"])  # noqa: S311 - no secret
    return numbers.choices(range(plan["channels"]), k=plan["senders"] * WARM_UP + plan["messages"])


async def hold_channels(layer: Any, plan: dict[str, Any]) -> None:
    """Hold open inboxes; receive in a task for each of those to which something will be sent; report the latencies."""
    async with AsyncExitStack() as stack:
        inboxes = {
            number: await stack.enter_async_context(layer.subscribe())
            for number in range(plan["number"], plan["channels"], plan["processes"])
        }
        say(rss=rss())
        if not await told():
            return
        awaited = Counter(number for number in draw(plan) if number in inboxes)
        latencies: list[float] = []
        last = cpu = 0.0

        async def read(number: int) -> None:
            nonlocal last, cpu
            for _ in range(awaited[number]):
                message = await inboxes[number].receive()
                if message["counts"]:
                    last = time.monotonic()
                    latencies.append(last - message["at"])
                else:
                    cpu = time.process_time()

        with anyio.fail_after(plan["timeout"]):
            async with anyio.create_task_group() as tg:
                for number in awaited:
                    tg.start_soon(read, number)
                await anyio.wait_all_tasks_blocked()
                say(names={number: inboxes[number].channel for number in awaited}, rss=rss())
        say(latencies=latencies, last=last, cpu=time.process_time() - cpu, rss=rss())


class Worker:
    """A worker process as the parent sees it."""

    def __init__(self, process: anyio.abc.Process) -> None:
        """``process`` has its standard input and output piped."""
        if process.stdin is None or process.stdout is None:
            raise RuntimeError("a worker needs pipes")
        self._process = process
        self._input = process.stdin
        self._lines = BufferedByteReceiveStream(process.stdout)

    async def go(self) -> None:
        """Let it do the next thing."""
        await self._input.send(b"\n")

    async def hear(self) -> dict[str, Any]:
        """Wait for its next report."""
        try:
            line = await self._lines.receive_until(b"\n", LONGEST)
        except (anyio.EndOfStream, anyio.IncompleteRead):
            raise RuntimeError("a worker process ended early") from None
        report: dict[str, Any] = json.loads(line)
        return report


class Crew:
    """All worker processes."""

    def __init__(self, workers: list[Worker], timeout: float) -> None:
        """``timeout``: seconds in which all of them report."""
        self.workers = workers
        self.timeout = timeout

    async def go(self) -> None:
        """Let all of them do the next thing."""
        for worker in self.workers:
            await worker.go()

    async def hear(self) -> list[dict[str, Any]]:
        """Wait for the next report of each."""
        with anyio.fail_after(self.timeout):
            return [await worker.hear() for worker in self.workers]


@asynccontextmanager
async def hired(plan: dict[str, Any]) -> AsyncGenerator[Crew]:
    """Start the worker processes; end them on the way out."""
    processes: list[anyio.abc.Process] = []
    try:
        for number in range(plan["processes"]):
            # As evenly as can be, the first some one more.
            share = len(range(number, plan["members"], plan["processes"])) if "members" in plan else 0
            own = json.dumps({**plan, "number": number, "share": share})
            command = [sys.executable, __file__, "--worker", own]
            processes.append(await anyio.open_process(command, stderr=None, start_new_session=True))
        yield Crew([Worker(process) for process in processes], plan["timeout"])
    except BaseException:
        for process in processes:
            with suppress(ProcessLookupError):
                process.kill()
        raise
    finally:
        with anyio.CancelScope(shield=True):
            for process in processes:
                await process.aclose()


# Measuring


def percentile(values: Sequence[float], share: float) -> float:
    """Return the smallest of ``values`` that ``share`` of them do not exceed."""
    return sorted(values)[math.ceil(share * len(values)) - 1]


def mean(values: Sequence[float]) -> float:
    """Return the arithmetic mean."""
    return sum(values) / len(values)


def progress(*parts: object) -> None:
    """Say on standard error what is going on."""
    print(*parts, file=sys.stderr, flush=True)


async def measure_broadcasts(nodes: Nodes, layer: str, members: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Send to a group of that many members, spread over the processes."""
    plan = {
        "workload": "broadcasts",
        "layer": layer,
        "options": nodes.options,
        "members": members,
        "processes": min(arguments.processes, members),
        "broadcasts": arguments.broadcasts,
        "timeout": arguments.timeout,
    }
    nodes.clear()
    empty = nodes.memory()
    async with LAYERS[layer](**nodes.options) as sender, hired(plan) as crew:
        before = [report["rss"] for report in await crew.hear()]
        connected = nodes.memory()
        start = time.monotonic()
        await crew.go()
        after = [report["rss"] for report in await crew.hear()]
        joining = time.monotonic() - start
        joined = nodes.memory()
        latencies = []
        reports: list[dict[str, Any]] = []
        for number in range(-WARM_UP, arguments.broadcasts):
            if number == 0:
                sender_cpu, worker_cpu, redis_cpu = time.process_time(), cpu_of(reports), nodes.cpu()
                start = time.monotonic()
            sent = time.monotonic()
            await sender.group_send(GROUP, {**MESSAGE, "number": number})
            reports = await crew.hear()
            if number >= 0:
                latencies.append(max(report["at"] for report in reports) - sent)
        seconds = time.monotonic() - start
        last = [report["rss"] for report in await crew.hear()]
        sender_cpu, worker_cpu = time.process_time() - sender_cpu, cpu_of(reports) - worker_cpu
        redis_cpu = [now - then for now, then in zip(nodes.cpu(), redis_cpu, strict=True)]
    deliveries = members * arguments.broadcasts
    return {
        "layer": layer,
        "members": members,
        "p50 ms": percentile(latencies, 0.5) * 1e3,
        "p99 ms": percentile(latencies, 0.99) * 1e3,
        "deliveries a second": deliveries / seconds,
        "us a delivery": percentile(latencies, 0.5) / members * 1e6,
        "cpu us a delivery": (sender_cpu + worker_cpu + sum(redis_cpu)) / deliveries * 1e6,
        "cpu us a delivery, sender": sender_cpu / deliveries * 1e6,
        "cpu us a delivery, workers": worker_cpu / deliveries * 1e6,
        "cpu us a delivery, each Redis": [cpu / deliveries * 1e6 for cpu in redis_cpu],
        "seconds to join": joining,
        "redis bytes, layers open": connected - empty,
        "redis bytes, members joined": joined - empty,
        "process bytes, layer open": mean(before),
        "process bytes, members joined": mean(after),
        "process bytes, after the broadcasts": mean(last),
    }


def cpu_of(reports: list[dict[str, Any]]) -> float:
    """Return the seconds of CPU time that the workers took until they reported."""
    return sum(float(report["cpu"]) for report in reports)


async def measure_channels(nodes: Nodes, channels: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Send to channels drawn from that many, which the processes hold."""
    plan = {
        "workload": "channels",
        "layer": "queue",
        "options": {**nodes.options, "capacity": arguments.capacity},
        "channels": channels,
        "processes": arguments.processes,
        "senders": arguments.senders,
        "messages": arguments.messages,
        "seed": arguments.seed,
        "timeout": arguments.timeout,
    }
    nodes.clear()
    empty = nodes.memory()
    async with RedisChannelLayer(**nodes.options, capacity=arguments.capacity) as sender, hired(plan) as crew:
        before = [report["rss"] for report in await crew.hear()]
        connected = nodes.memory()
        start = time.monotonic()
        await crew.go()
        after = [report["rss"] for report in await crew.hear()]
        opening = time.monotonic() - start
        held = nodes.memory()
        await crew.go()
        reports = await crew.hear()
        names = {int(number): name for report in reports for number, name in report["names"].items()}
        targets = iter([names[number] for number in draw(plan)])

        async def send(count: int | None) -> None:
            for sent, name in enumerate(targets, 1):
                message = {**MESSAGE, "counts": count is None, "at": time.monotonic()}
                await sender.send(name, message)
                if sent == count:
                    return

        async def send_from_all(count: int | None) -> None:
            async with anyio.create_task_group() as tg:
                for _ in range(arguments.senders):
                    tg.start_soon(send, count)

        with anyio.fail_after(arguments.timeout):
            await send_from_all(WARM_UP)
            sender_cpu, redis_cpu, start = time.process_time(), nodes.cpu(), time.monotonic()
            await send_from_all(None)
        sending = time.monotonic() - start
        sender_cpu = time.process_time() - sender_cpu
        reports = await crew.hear()
        redis_cpu = [now - then for now, then in zip(nodes.cpu(), redis_cpu, strict=True)]
        await crew.go()
    latencies = [latency for report in reports for latency in report["latencies"]]
    if len(latencies) != arguments.messages:
        raise RuntimeError(f"{arguments.messages} messages were sent, {len(latencies)} received")
    seconds = max(report["last"] for report in reports) - start
    return {
        "channels": channels,
        "channels sent to": len(names),
        "messages a second": arguments.messages / seconds,
        "messages a second, sent": arguments.messages / sending,
        "p50 ms": percentile(latencies, 0.5) * 1e3,
        "p99 ms": percentile(latencies, 0.99) * 1e3,
        "cpu us a message, sender": sender_cpu / arguments.messages * 1e6,
        "cpu us a message, workers": cpu_of(reports) / arguments.messages * 1e6,
        "cpu us a message, each Redis": [cpu / arguments.messages * 1e6 for cpu in redis_cpu],
        "seconds to open": opening,
        "redis bytes, layers open": connected - empty,
        "redis bytes, channels open": held - empty,
        "process bytes, layer open": mean(before),
        "process bytes, channels open": mean(after),
        "process bytes, after the messages": mean([report["rss"] for report in reports]),
    }


def measure(topology: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return all figures of one topology; an error ends it, and those that were taken before stay."""
    broadcasts: list[dict[str, Any]] = []
    channels: list[dict[str, Any]] = []
    found: dict[str, Any] = {"broadcasts": broadcasts, "channels": channels}
    try:
        with opened(topology, arguments.timeout) as nodes:
            found["Redis"] = nodes.version
            for layer in arguments.layer if "broadcasts" in arguments.workload else ():
                for members in arguments.members:
                    progress(f"{topology}: group_send to {members:,} members, {layer}")
                    broadcasts.append(anyio.run(measure_broadcasts, nodes, layer, members, arguments))
            for number in arguments.channels if "channels" in arguments.workload else ():
                progress(f"{topology}: {arguments.messages:,} messages to {number:,} channels")
                channels.append(anyio.run(measure_channels, nodes, number, arguments))
    except Exception as error:  # noqa: BLE001 - it is reported, and the other topologies are measured
        cause: BaseException = error
        while isinstance(cause, BaseExceptionGroup):
            cause = cause.exceptions[0]
        found["error"] = f"{type(cause).__name__}: {cause}"
        progress(f"{topology}: skipped, {found['error']}")
    return found


# Reporting


def print_table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print columns as wide as their widest cell, all but the first two aligned to the right."""
    if not rows:
        return
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if place < 2 else cell.rjust(width)  # noqa: PLR2004 - the first two
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in (head, *rows)
    ]
    print(f"\n{title}", lines[0], "-" * len(lines[0]), *lines[1:], sep="\n")


def kib(one: dict[str, Any], then: str, now: str) -> str:
    """Return how many KiB more ``now`` is than ``then``."""
    return f"{(one[now] - one[then]) / 1024:,.0f}"


def mib(one: dict[str, Any], *keys: str) -> str:
    """Return MiB, from the first to the last."""
    return " > ".join(f"{one[key] / 1024 / 1024:.1f}" for key in keys)


def cpu_us(one: dict[str, Any]) -> tuple[float, float, float]:
    """Return what a message took in the sender, in all processes, and in all servers."""
    start = "cpu us a message, "
    return one[start + "sender"], one[start + "workers"], sum(one[start + "each Redis"])


def print_tables(found: dict[str, dict[str, Any]], arguments: argparse.Namespace) -> None:
    """Print what was measured."""
    print(f"Python {platform.python_version()}, {platform.system()} {platform.machine()}, {os.cpu_count()} cores")
    print_table(
        f"group_send to members in {arguments.processes} processes, {arguments.broadcasts} broadcasts, one after the other",
        ("servers", "layer", "members", "p50 ms", "p99 ms", "deliveries/s", "Redis KiB", "process MiB", "join s"),
        [
            (
                topology,
                one["layer"],
                f"{one['members']:,}",
                f"{one['p50 ms']:.2f}",
                f"{one['p99 ms']:.2f}",
                f"{one['deliveries a second']:,.0f}",
                f"{one['redis bytes, layers open'] / 1024:,.0f} + "
                + kib(one, "redis bytes, layers open", "redis bytes, members joined"),
                mib(one, "process bytes, layer open", "process bytes, members joined"),
                f"{one['seconds to join']:.2f}",
            )
            for topology, all_of_it in found.items()
            for one in all_of_it["broadcasts"]
        ],
    )
    print_growth(found)
    print_table(
        f"queue: {arguments.messages:,} messages from {arguments.senders} senders to channels in {arguments.processes} processes",
        (
            "servers",
            "channels",
            "messages/s",
            "p50 ms",
            "p99 ms",
            "CPU us a message",
            "Redis KiB",
            "process MiB",
            "open s",
        ),
        [
            (
                topology,
                f"{one['channels']:,}",
                f"{one['messages a second']:,.0f}",
                f"{one['p50 ms']:.2f}",
                f"{one['p99 ms']:.2f}",
                " + ".join(f"{cpu:.0f}" for cpu in cpu_us(one)),
                f"{one['redis bytes, layers open'] / 1024:,.0f} + "
                + kib(one, "redis bytes, layers open", "redis bytes, channels open"),
                mib(one, "process bytes, layer open", "process bytes, channels open"),
                f"{one['seconds to open']:.2f}",
            )
            for topology, all_of_it in found.items()
            for one in all_of_it["channels"]
        ],
    )
    print(
        "\nRedis KiB: with the layers open, above the empty servers, + with all members or channels (and the queue's blocking"
        "\nconnections, which begin with the first channel). Process MiB: the mean of the processes, with the layer open > with"
        "\nall members or channels. CPU: of the sender + all processes + all servers."
    )
    for topology, all_of_it in found.items():
        if "error" in all_of_it:
            print(f"\n{topology}: skipped, {all_of_it['error']}")


def print_growth(found: dict[str, dict[str, Any]]) -> None:
    """Print what a delivery costs in small and in large groups."""
    rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for topology, all_of_it in found.items():
        for one in all_of_it["broadcasts"]:
            rows.setdefault((topology, one["layer"]), []).append(one)
    sizes = sorted({one["members"] for ones in rows.values() for one in ones})
    for key, title in (
        ("us a delivery", "Microseconds a delivery: the median latency by the number of members"),
        ("cpu us a delivery", "CPU microseconds a delivery: of the sender, all processes and all servers"),
    ):
        table = []
        for (topology, layer), ones in rows.items():
            cost = {one["members"]: float(one[key]) for one in ones}
            cells = [f"{cost[size]:.2f}" if size in cost else "" for size in sizes]
            table.append((topology, layer, *cells, f"{cost[max(cost)] / cost[min(cost)]:.2f}x"))
        print_table(title, ("servers", "layer", *(f"{size:,}" for size in sizes), "growth"), table)


def report(found: dict[str, dict[str, Any]], arguments: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """Return all figures with what they depend on."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "from source"
    hidden = ("json", "worker")
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "versions": versions,
        "message": MESSAGE,
        "options": {name: value for name, value in vars(arguments).items() if name not in hidden},
        "seconds": round(seconds, 1),
        "topologies": found,
    }


def rounded(value: Any) -> Any:
    """Return ``value`` with all fractions in it shortened."""
    if isinstance(value, float):
        return round(value, 3)
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    return [rounded(one) for one in value] if isinstance(value, list) else value


def count(text: str) -> int:
    """Return a positive number that was given as an argument."""
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


def parse_arguments() -> argparse.Namespace:
    """Return what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    workloads = ["broadcasts", "channels"]
    add("--topology", nargs="+", choices=TOPOLOGIES, default=list(TOPOLOGIES), help="the servers (default: all three)")
    add("--workload", nargs="+", choices=workloads, default=workloads, help="what to measure (default: both)")
    add("--layer", nargs="+", choices=LAYERS, default=list(LAYERS), help="the layers that broadcast (default: both)")
    add("--processes", type=count, default=8, help="worker processes (default %(default)s)")
    add("--members", nargs="+", type=count, default=[100, 1000, 10_000], help="of the group (default: 100 1000 10000)")
    add("--broadcasts", type=count, default=100, help="to each group (default %(default)s)")
    add("--channels", nargs="+", type=count, default=[1000, 100_000], help="all in all (default: 1000 100000)")
    add("--messages", type=count, default=20_000, help="to channels drawn at random (default %(default)s)")
    add("--senders", type=count, default=50, help="tasks that send those (default %(default)s)")
    add("--capacity", type=count, default=100_000, help="of the queue of a process, for those (default %(default)s)")
    add("--seed", type=int, default=1, help="of the drawing (default %(default)s)")
    add("--timeout", type=float, default=60, help="seconds that one step may take (default %(default)s)")
    add("--json", metavar="FILE", help="also write the figures to FILE")
    add("--worker", type=json.loads, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Run the benchmark, or one worker of it."""
    if sys.platform != "linux":
        sys.exit("this benchmark compares clocks between processes and reads /proc, so it needs Linux")
    arguments = parse_arguments()
    if arguments.worker is not None:
        anyio.run(work, arguments.worker)
        return
    # Both end the workers and the servers on the way out.
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    start = time.monotonic()
    try:
        found = {topology: measure(topology, arguments) for topology in arguments.topology}
    except KeyboardInterrupt:
        sys.exit("interrupted")
    print_tables(found, arguments)
    if arguments.json:
        result = rounded(report(found, arguments, time.monotonic() - start))
        Path(arguments.json).write_text(json.dumps(result, indent=2) + "\n")
    if any("error" in one for one in found.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
