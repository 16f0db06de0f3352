"""The checks of one server by what it reports: its version, its role, its memory, its clock, and how fast it answers.

Rules:
- what this user may not ask is reported as unknown, not as a fault.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from statistics import median
from typing import Final

from anyio_channels.redis.client import Link, replies

from .findings import Report, Verdict
from .seen import ServerSeen

__all__ = [
    "check_clock",
    "check_latency",
    "check_memory",
    "check_persistence",
    "check_policy",
    "check_role",
    "check_version",
    "compare_clocks",
]

_OLDEST: Final = (6, 2)
_OLDEST_CLUSTER: Final = (7, 0)
_PINGS: Final = 20
_FAR: Final = 0.010
"""Seconds of a round trip from which on a warning is due."""
_SKEW: Final = 1.0
"""Seconds by which clocks may differ."""
_NEARLY_FULL: Final = 0.9
"""The share of maxmemory from which on a warning is due."""


def check_version(report: Report, link: Link, server: ServerSeen, *, in_cluster: bool) -> None:
    """Compare the version with the oldest one that has what the layers use; a cluster needs sharded pub/sub."""
    version = (0,) if link.connection is None else link.connection.version
    oldest = _OLDEST_CLUSTER if in_cluster else _OLDEST
    text = ".".join(map(str, version)) + (" (Valkey)" if "valkey_version" in server.info else "")
    advice = f"use Redis {'.'.join(map(str, oldest))} or newer, or Valkey"
    report.add("version", server.name, "ok" if version >= oldest else "wrong", text, advice)


def check_role(report: Report, link: Link, server: ServerSeen, *, in_cluster: bool, keeps_messages: bool) -> None:
    """See that it is a primary, and for the queue layer, a node of a cluster only if the layer knows that it is one."""
    role = server.info.get("role")
    if role is None:
        report.add("role", server.name, "unknown", "this user must not ask INFO", "allow INFO to have this checked")
    elif role != "master":
        advice = "give the address of the primary, or use redis+sentinel:// to follow it"
        report.add("role", server.name, "wrong", "a replica, which takes no writes", advice)
    elif server.number("cluster_enabled") and not in_cluster:
        if keeps_messages:
            report.add("role", server.name, "wrong", "a node of a cluster", link.server.cluster_advice)
        else:
            report.add("role", server.name, "ok", "a node of a cluster, which hands pub/sub on to all others")
    else:
        report.add("role", server.name, "ok", "a primary")


async def check_latency(report: Report, link: Link) -> None:
    """Time some round trips."""
    seconds: list[float] = []
    for _ in range(_PINGS):
        before = time.perf_counter()
        await link.execute("PING")
        seconds.append(time.perf_counter() - before)
    found = f"{median(seconds) * 1000:.2f} ms a round trip (the slowest of {_PINGS}: {max(seconds) * 1000:.2f} ms)"
    verdict: Verdict = "ok" if median(seconds) < _FAR else "warning"
    report.add("latency", link.name, verdict, found, "a send takes one round trip: run the processes nearer to Redis")


def check_policy(report: Report, server: ServerSeen, *, keeps_messages: bool) -> None:
    """See that a full server refuses messages rather than evicts those that it has."""
    policy, limit = server.info.get("maxmemory_policy"), server.number("maxmemory")
    if policy is None or limit is None:
        advice = "see by hand that maxmemory-policy is noeviction"
        report.add("maxmemory-policy", server.name, "unknown", "not told by INFO", advice)
        return
    verdict: Verdict = "ok"
    found = policy
    if not keeps_messages:
        found += "; pub/sub has no keys to evict"
    elif policy != "noeviction" and not limit:
        found, verdict = f"{policy}, without effect as long as maxmemory is 0", "warning"
    elif policy != "noeviction":
        found, verdict = f"{policy}: a full Redis throws away messages and memberships silently", "wrong"
    evicted = server.number("evicted_keys")
    if evicted and verdict != "ok":
        found += f"; it evicted {evicted} keys since it started"
    report.add("maxmemory-policy", server.name, verdict, found, "CONFIG SET maxmemory-policy noeviction")


def check_memory(report: Report, server: ServerSeen) -> None:
    """See how much of its memory is used, if it has a limit and reports it."""
    limit, used = server.number("maxmemory"), server.number("used_memory")
    if limit and used is not None:
        share = used / limit
        verdict: Verdict = "warning" if share > _NEARLY_FULL else "ok"
        advice = "raise maxmemory, or find out who fills it: a full Redis refuses to take messages"
        report.add("memory", server.name, verdict, f"{share:.0%} of maxmemory", advice)


def check_persistence(report: Report, server: ServerSeen) -> None:
    """See that no snapshot failed; layers need none, but Redis may refuse writes then."""
    aof = server.info.get("aof_enabled")
    if aof is None:
        return  # this user may not ask INFO, which the role says already
    found = "append-only file on: not needed by the layers, and costs disk writes" if aof == "1" else "not needed"
    failed = server.info.get("rdb_last_bgsave_status") == "err"
    if failed:
        found = "the last snapshot failed: Redis may refuse writes"
    advice = "free disk space, or turn snapshots off: CONFIG SET save ''"
    report.add("persistence", server.name, "warning" if failed else "ok", found, advice)


async def check_clock(report: Report, link: Link, clock: Callable[[], float], expiry: float) -> float:
    """Compare the server's clock with ``clock``, and return how far it is ahead, in seconds.

    ``expiry``: of the layer. A message that is encrypted lives that long by this machine's clock.
    """
    before = clock()
    seconds: float = await link.execute("TIME", parse=replies.seconds)
    offset = seconds - (before + clock()) / 2
    found = f"{abs(offset):.3f} s {'ahead of' if offset > 0 else 'behind'} this machine"
    verdict: Verdict = "ok" if abs(offset) <= _SKEW else "warning" if abs(offset) < expiry else "wrong"
    advice = "synchronise the clocks (NTP): encrypted messages, and channels_redis beside, go by this machine's"
    report.add("clock", link.name, verdict, found, advice)
    return offset


def compare_clocks(report: Report, offsets: Collection[float]) -> None:
    """Compare the clocks of several servers, each given by how far it is ahead."""
    apart = max(offsets) - min(offsets)
    advice = "synchronise the clocks of the servers (NTP): what moves from one to another expires too early or late"
    report.add("clocks of the servers", None, "ok" if apart <= _SKEW else "warning", f"{apart:.3f} s apart", advice)
