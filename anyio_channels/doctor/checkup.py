"""Whether Redis is as the layers need it, found out by trying: what was found, and what to do.

Rules:
- what can be tried is tried, with names of its own under the layer's prefix; nothing of it stays.
- a server that cannot be reached does not keep the others from being looked at.
- what a user must not ask is said to be unknown, and is no fault.
"""

from __future__ import annotations

import ssl
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from secrets import token_hex
from statistics import median
from typing import Any, Final, Literal

import redis.exceptions
from anyio import CancelScope, fail_after

from anyio_channels.redis.client import Link, replies, try_each

from .keys import glob_escaped, keys_of, odd_keys, prefixes_of_groups, shown_prefixes
from .layer import RedisLayer
from .pop import POPS_MANY
from .queue import RedisChannelLayer
from .scripts import CLUSTERED, GIVE_BACK, GROUP_ADD, GROUP_MEMBERS, GROUP_SEND, POP, SEND, TICK
from .survey import ServerSeen, Survey, ask_all, ask_server

__all__ = ["Finding", "Verdict", "check_up"]

Verdict = Literal["ok", "warning", "wrong", "unknown"]

_OLDEST: Final = (6, 2)
_OLDEST_CLUSTER: Final = (7, 0)
_PINGS: Final = 20
_FAR: Final = 0.010
"""Seconds of a round trip from which on it is worth saying."""
_SKEW: Final = 1.0
_NEARLY_FULL: Final = 0.9
_EXAMPLES: Final = 3
_TRIES: Final = 1000
"""Of so many names, one is owned by each node of a cluster."""
_SECONDS: Final = 10
"""How long what is tried would stay if this process were killed."""
_BRIEFLY: Final = 0.01
"""So many seconds a blocking pop that is tried out may wait."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One check and what came of it."""

    check: str
    server: str | None
    """Which server; ``None`` for what concerns the whole."""
    verdict: Verdict
    found: str
    advice: str = ""
    """What to do; empty if nothing is to be done."""


async def check_up(layer: RedisLayer, trial: RedisLayer, clock: Callable[[], float] = time.time) -> list[Finding]:
    """Check all servers of ``layer``, then send messages through ``trial``; two layers alike, neither of them open.

    ``clock``: what tells the time of this machine, in seconds since 1970.

    Takes as long as the layer's time-outs when something does not answer.
    """
    findings: list[Finding] = []
    try:
        async with Survey(layer) as view:
            await _Checkup(layer, trial, view, findings, clock).run()
    except redis.exceptions.RedisError as error:
        findings.append(_unreached(None, error))
    return findings


def _unreached(server: str | None, error: Exception) -> Finding:
    return Finding("reached", server, "wrong", str(error).partition("; the command ")[0], _what_to_do(error))


_ADVICE: Final[tuple[tuple[type[Exception], str, str], ...]] = (
    (
        redis.exceptions.AuthenticationError,
        "",
        "check user and password in the URL; characters like / ? # [ ] @ in them are percent-encoded",
    ),
    (
        redis.exceptions.NoPermissionError,
        "",
        "allow it (ACL SETUSER): the page about Redis lists the keys, Redis channels and commands that layers need",
    ),
    (
        redis.exceptions.ResponseError,
        "user executing the script",
        "allow the command that is refused besides (ACL SETUSER); the page about Redis lists them",
    ),
    (redis.exceptions.OutOfMemoryError, "", "raise maxmemory, or find out who fills it"),
    (
        redis.exceptions.ReadOnlyError,
        "",
        "give the address of the primary, or use redis+sentinel:// to follow it",
    ),
    (Exception, "cluster support disabled", "it is no cluster: use redis:// instead of redis+cluster://"),
    (redis.exceptions.ResponseError, "", "see what the server means by that; its log may say more"),
    (Exception, "HELLO", "use Redis 6.2 or newer, or Valkey"),
    (
        Exception,
        "TLS",
        "check that the port is for TLS and its certificate is trusted (?ssl_ca_certs=/path/ca.pem), or use redis://",
    ),
    (
        Exception,
        "",
        "check that Redis runs there, host and port are right (with rediss://, a port for TLS), and no firewall is between",
    ),
)
"""What to do about an error: the first line that fits its class and its text."""


def _what_to_do(error: Exception) -> str:
    text = str(error) + (" TLS" if isinstance(error.__cause__, ssl.SSLError) else "")
    return next(advice for kind, part, advice in _ADVICE if isinstance(error, kind) and part in text)


class _Checkup:
    """One run over all servers."""

    def __init__(
        self, layer: RedisLayer, trial: RedisLayer, view: Survey, findings: list[Finding], clock: Callable[[], float]
    ) -> None:
        self.layer = layer
        self.trial = trial
        self.view = view
        self.findings = findings
        self.clock = clock
        self.name = f"doctor.{token_hex(8)}"
        self.offsets: dict[str, float] = {}
        self.refused = False
        self.tried: dict[Link, tuple[str, ...]] = {}

    def note(self, check: str, server: str | None, verdict: Verdict, found: str, advice: str = "") -> None:
        self.findings.append(Finding(check, server, verdict, found, advice if verdict != "ok" else ""))

    async def run(self) -> None:
        reached = await self._reach()
        for link in tuple(reached):
            try:
                await self._look_after(link)
            except redis.exceptions.RedisError as error:  # it went away; the others are looked at
                self.findings.append(_unreached(link.name, error))
                reached.remove(link)
        if len(self.offsets) > 1:
            self._compare_clocks()
        if reached:
            await self._check_prefix(reached)
            await self._try_out(reached)

    async def _reach(self) -> list[Link]:
        """Connect to all at the same time; return the links that are up."""
        links = self.view.links
        errors = dict(await try_each(Link.opened, links))
        for link in links:
            error = errors[link]
            if error is not None:
                self.findings.append(_unreached(link.name, error))
            else:
                self.note("reached", link.name, "ok", "connected and logged in")
        return [link for link in links if errors[link] is None]

    async def _look_after(self, link: Link) -> None:
        """Check one server."""
        server = await ask_server(link)
        self._check_version(link, server)
        self._check_role(server)
        await self._check_latency(link)
        self._check_memory(server)
        self._check_persistence(server)
        await self._check_clock(link)
        await self._check_commands(link)

    def _check_version(self, link: Link, server: ServerSeen) -> None:
        version = (0,) if link.connection is None else link.connection.version
        oldest = _OLDEST_CLUSTER if self.layer.cluster else _OLDEST
        text = ".".join(map(str, version)) + (" (Valkey)" if "valkey_version" in server.info else "")
        verdict: Verdict = "ok" if version >= oldest else "wrong"
        self.note("version", server.name, verdict, text, f"use Redis {'.'.join(map(str, oldest))} or newer, or Valkey")

    def _check_role(self, server: ServerSeen) -> None:
        role = server.info.get("role")
        if role is None:
            self.note("role", server.name, "unknown", "this user must not ask INFO", "allow INFO to have this checked")
        elif role != "master":
            advice = "give the address of the primary, or use redis+sentinel:// to follow it"
            self.note("role", server.name, "wrong", "a replica, which takes no writes", advice)
        elif server.number("cluster_enabled") and not self.layer.cluster:
            self.note(
                "role", server.name, "wrong", "a node of a cluster", "use redis+cluster:// and name some of its nodes"
            )
        else:
            self.note("role", server.name, "ok", "a primary")

    async def _check_latency(self, link: Link) -> None:
        seconds: list[float] = []
        for _ in range(_PINGS):
            before = time.perf_counter()
            await link.execute("PING")
            seconds.append(time.perf_counter() - before)
        found = f"{median(seconds) * 1000:.2f} ms a round trip (the slowest of {_PINGS}: {max(seconds) * 1000:.2f} ms)"
        verdict: Verdict = "ok" if median(seconds) < _FAR else "warning"
        self.note(
            "latency", link.name, verdict, found, "a send takes one round trip: run the processes nearer to Redis"
        )

    def _check_memory(self, server: ServerSeen) -> None:
        policy, limit = server.info.get("maxmemory_policy"), server.number("maxmemory")
        used = server.number("used_memory")
        if policy is None or limit is None or used is None:
            advice = "see by hand that maxmemory-policy is noeviction"
            self.note("maxmemory-policy", server.name, "unknown", "not told by INFO", advice)
            return
        verdict: Verdict = "ok"
        found = policy
        if not isinstance(self.layer, RedisChannelLayer):
            found += "; pub/sub has no keys to evict"
        elif policy != "noeviction" and not limit:
            found, verdict = f"{policy}, without effect as long as maxmemory is 0", "warning"
        elif policy != "noeviction":
            found, verdict = f"{policy}: a full Redis throws away messages and memberships silently", "wrong"
        evicted = server.number("evicted_keys")
        if evicted and verdict != "ok":
            found += f"; it evicted {evicted} keys since it started"
        self.note("maxmemory-policy", server.name, verdict, found, "CONFIG SET maxmemory-policy noeviction")
        if limit:
            share = used / limit
            is_full = share > _NEARLY_FULL
            advice = "raise maxmemory, or find out who fills it: a full Redis refuses to take messages"
            self.note("memory", server.name, "warning" if is_full else "ok", f"{share:.0%} of maxmemory", advice)

    def _check_persistence(self, server: ServerSeen) -> None:
        aof = server.info.get("aof_enabled")
        if aof is None:
            return  # INFO is not told, which was said above
        found = "append-only file on: not needed by the layers, and costs disk writes" if aof == "1" else "not needed"
        failed = server.info.get("rdb_last_bgsave_status") == "err"
        if failed:
            found = "the last snapshot failed: Redis may refuse writes"
        advice = "free disk space, or turn snapshots off: CONFIG SET save ''"
        self.note("persistence", server.name, "warning" if failed else "ok", found, advice)

    async def _check_clock(self, link: Link) -> None:
        before = self.clock()
        seconds: float = await link.execute("TIME", parse=replies.seconds)
        offset = seconds - (before + self.clock()) / 2
        self.offsets[link.name] = offset
        found = f"{abs(offset):.3f} s {'ahead of' if offset > 0 else 'behind'} this machine"
        verdict: Verdict = "ok" if abs(offset) <= _SKEW else "warning" if abs(offset) < self.layer.expiry else "wrong"
        advice = "synchronise the clocks (NTP): encrypted messages, and channels_redis beside, go by this machine's"
        self.note("clock", link.name, verdict, found, advice)

    def _compare_clocks(self) -> None:
        apart = max(self.offsets.values()) - min(self.offsets.values())
        advice = "synchronise the clocks of the servers (NTP): what moves from one to another expires too early or late"
        self.note("clocks of the servers", None, "ok" if apart <= _SKEW else "warning", f"{apart:.3f} s apart", advice)

    # Commands and permissions

    async def _check_commands(self, link: Link) -> None:
        trials = (
            self._queue_trials(link, self.layer)
            if isinstance(self.layer, RedisChannelLayer)
            else self._pubsub_trials(link)
        )
        refused: list[redis.exceptions.ResponseError] = []
        try:
            for trial in trials:
                try:
                    await trial()
                except redis.exceptions.ResponseError as error:
                    refused.append(error)
        finally:
            with CancelScope(shield=True):
                await self._clean_up(link)
        if refused:
            self.refused = True
            said = "; ".join(dict.fromkeys(str(error).removeprefix(f"{link.name}: ") for error in refused))
            self.note("commands", link.name, "wrong", said, _what_to_do(refused[0]))
        else:
            found = f"all {len(trials)} calls that the layer makes are allowed and work"
            self.note("commands", link.name, "ok", found if trials else "nothing of this prefix is kept here")

    async def _clean_up(self, link: Link) -> None:
        """Remove what was tried with, by whatever this user may do."""
        for key in self.tried.get(link, ()):
            ways = (("UNLINK", key), ("DEL", key), ("PEXPIRE", key, _SECONDS * 1000), ("ZPOPMIN", key, _TRIES))
            for way in ways:
                try:
                    await link.execute(*way)
                    break
                except redis.exceptions.ResponseError:
                    continue
            else:
                advice = "delete it: this user may make keys, but neither remove them nor have them expire"
                self.note("keys", link.name, "warning", f"may be left behind: {key!r}", advice)

    def _queue_trials(self, link: Link, layer: RedisChannelLayer) -> list[Callable[[], Awaitable[Any]]]:
        """Every command and script of the queue layer, with keys that nobody else has."""
        found = [
            self._name_at(link, make)
            for make in (layer.channel_key, layer.group_key, lambda name: f"{layer.prefix}:prefix:{name}")
        ]
        key, group, mark = (name or "" for name in found)
        if not key:
            return []  # a prefix with a tag keeps all on another node
        self.tried[link] = (key, group, mark)
        room, note = layer.room_key(key), layer.note_key(key)
        entry = token_hex(16)
        # In a cluster nothing waits in a pop.
        pops_many = not layer.cluster and link.connection is not None and link.connection.version >= POPS_MANY

        def run(*command: Any) -> Callable[[], Awaitable[Any]]:
            return lambda: link.execute(*command)

        def call(script: Any, keys: Sequence[str], *args: Any) -> Callable[[], Awaitable[Any]]:
            return lambda: link.call(script, keys, *args)

        if layer.cluster:
            listen, tell = ("SSUBSCRIBE", "SUNSUBSCRIBE"), "SPUBLISH"
            messages = [
                call(CLUSTERED[SEND], [key], entry, 10, _SECONDS, note),
                call(CLUSTERED[POP], [key], 1, _SECONDS, room),
                call(CLUSTERED[POP], [key], 1, _SECONDS, room),  # by its digest now
                run("ASKING"),
            ]
        else:
            listen, tell = ("SUBSCRIBE", "UNSUBSCRIBE"), "PUBLISH"
            messages = [
                call(SEND, [key], entry, 10, _SECONDS),
                call(POP, [key, room], 1, _SECONDS),
                call(POP, [key, room], 1, _SECONDS),  # by its digest now
                call(GROUP_SEND, [key], _SECONDS, 10, entry),
                run("BZPOPMIN", key, _BRIEFLY),
                run("CLIENT", "ID"),
            ]
        return [
            *messages,
            # What the scripts call: where one is forbidden, Redis 7.0 does not say which.
            run("TIME"),
            run("ZADD", key, 0, entry),
            *([run("BZMPOP", _BRIEFLY, 1, key, "MIN")] if pops_many else []),
            run("PEXPIRE", key, _SECONDS * 1000),
            run("ZCOUNT", key, "-inf", 0),
            run("ZREMRANGEBYSCORE", key, "-inf", -1),
            run("ZCARD", key),
            run("ZRANGE", key, 0, -1, "WITHSCORES"),
            run("ZPOPMIN", key, 1),
            run("EXISTS", mark),
            run("SET", mark, 1, "PX", _SECONDS * 1000),
            run("EVAL", GIVE_BACK.text, 1, key, _SECONDS, 0, entry),
            call(GROUP_ADD, [group], _SECONDS, self.name),
            call(GROUP_MEMBERS, [group], _SECONDS),
            run("ZREM", group, self.name),
            call(TICK, [mark], _SECONDS),
            run("UNLINK", mark),
            run("UNLINK", key),
            run("SCAN", 0, "MATCH", glob_escaped(layer.prefix) + "*"),
            run(listen[0], room),
            run(tell, room, ""),
            run(listen[1], room),
        ]

    def _pubsub_trials(self, link: Link) -> list[Callable[[], Awaitable[Any]]]:
        """Every command of the pub/sub layer, on Redis channels that nobody else has."""
        kind = "S" if self.layer.cluster else ""
        ways = (lambda name: f"specific.{name}!", lambda name: f"{self.layer.prefix}__group__{name}")
        names = [name for make in ways if (name := self._name_at(link, make))]

        def run(*command: str) -> Callable[[], Awaitable[Any]]:
            return lambda: link.execute(*command)

        tried = [
            run(f"{kind}{verb}", name, *rest)
            for name in names
            for verb, rest in (("SUBSCRIBE", ()), ("PUBLISH", ("",)), ("UNSUBSCRIBE", ()))
        ]
        return [*tried, run("ASKING")] if self.layer.cluster else tried

    def _name_at(self, link: Link, make: Callable[[str], str]) -> str | None:
        """Return a name made by ``make`` that nobody else has, and that the server of ``link`` owns."""
        router = self.layer._router  # noqa: SLF001 - a part of the layer
        names = (make(f"{self.name}.{number}") for number in range(_TRIES))
        return next((name for name in names if not router.clustered or router.owner(name, name) is link), None)

    def _key_at(self, link: Link, key: str) -> str | None:
        return self.layer._router.key_at(link, key)  # noqa: SLF001 - a part of the layer

    # The prefix

    async def _check_prefix(self, links: list[Link]) -> None:
        ours = self.layer.prefix.encode()
        try:
            if isinstance(self.layer, RedisChannelLayer):
                await self._check_keys(links, ours)
            else:
                await self._check_redis_channels(links, ours)
        except redis.exceptions.RedisError as error:
            self.note("prefix", None, "unknown", str(error), "allow SCAN, TYPE and PUBSUB to have this checked")

    async def _check_keys(self, links: list[Link], ours: bytes) -> None:
        marked: set[bytes] = set()
        odd: set[bytes] = set()
        wrong: set[bytes] = set()
        for link in links:
            for pattern in ("*:prefix*", "*:group:*"):
                marked |= shown_prefixes(await self.view.scan(link, pattern))
            under = await self.view.scan(link, glob_escaped(self.layer.prefix) + "*")
            under = {key for key in under if self.name.encode() not in key}
            strange = odd_keys(ours, under)
            odd |= strange
            ordinary = sorted(set(keys_of(ours, under)) - strange)
            types = await ask_all(link, [("TYPE", key) for key in ordinary], parse=replies.text)
            wrong |= {key for key, kind in zip(ordinary, types, strict=True) if kind != "zset"}
        clashing = {other for other in marked - {ours} if other.startswith(ours) or ours.startswith(other)}
        self.note(
            "prefix",
            None,
            "wrong" if clashing else "ok",
            f"{self.layer.prefix!r} and {_some(clashing)}: one begins with the other, so keys may coincide, and a flush of "
            "channels_redis takes both"
            if clashing
            else f"{self.layer.prefix!r}, beside {_some(marked - {ours})}",
            "choose prefixes of which none begins with another (?prefix=...); delete the keys of one that is not used",
        )
        if wrong:
            advice = "delete them, or choose another prefix (?prefix=...): a channel or group of that name cannot work"
            self.note("keys", None, "wrong", f"not sorted sets: {_some(wrong)}", advice)
        if odd:
            advice = "choose another prefix (?prefix=...), so that nobody takes others' keys for messages"
            self.note("keys", None, "warning", f"under the prefix, but no layer's: {_some(odd)}", advice)
        if not (wrong or odd):
            self.note("keys", None, "ok", "nobody else's keys are under the prefix")

    async def _check_redis_channels(self, links: list[Link], ours: bytes) -> None:
        kind = "SHARDCHANNELS" if self.layer.cluster else "CHANNELS"
        others: set[bytes] = set()
        for link in links:
            others |= prefixes_of_groups(
                await link.execute("PUBSUB", kind, "*__group__*", parse=replies.bytes_list)
            ) - {ours}
        self.note(
            "prefix",
            None,
            "warning" if others else "ok",
            f"{self.layer.prefix!r}, beside {_some(others)}",
            "channels carry no prefix in pub/sub: see that the applications name their normal channels differently",
        )

    # The whole way

    async def _try_out(self, links: list[Link]) -> None:
        """Send messages through an open layer, as an application does."""
        if self.refused:
            self.note("messages", None, "unknown", "not tried, for a server refuses what it takes", "mend that first")
            return
        marks = (
            [(link, await self._marker(link)) for link in links] if isinstance(self.layer, RedisChannelLayer) else []
        )
        try:
            with fail_after(self.layer.connect_timeout + 2 * self.layer.timeout):
                async with self.trial:
                    seconds = await self._go_round()
        except (OSError, redis.exceptions.RedisError) as error:
            text = str(error) or "no message came in time"
            self.note("messages", None, "wrong", text, "see what is wrong above")
        else:
            found = f"sent to a channel, and to a group, and received: {seconds * 1000:.2f} ms each"
            self.note("messages", None, "ok", found)
        finally:
            with CancelScope(shield=True):  # also who interrupts leaves nothing behind
                for link, key in marks:
                    if key is not None:
                        with suppress(redis.exceptions.RedisError):  # which was said above
                            await link.execute("UNLINK", key)

    async def _go_round(self) -> float:
        async with self.trial.subscribe(self.name) as inbox:
            before = time.perf_counter()
            for _ in range(_PINGS):
                await self.trial.send(inbox.channel, {"type": "doctor"})
                await inbox.receive()
                await self.trial.group_send(self.name, {"type": "doctor"})
                await inbox.receive()
            return (time.perf_counter() - before) / (2 * _PINGS)

    async def _marker(self, link: Link) -> str | None:
        """Return the key that opening the layer leaves behind, if it is not there yet."""
        key = self._key_at(link, f"{self.layer.prefix}:prefix")
        return None if key is None or await link.execute("EXISTS", key) else key


def _some(names: set[bytes]) -> str:
    shown = ", ".join(repr(name.decode("utf-8", "backslashreplace")) for name in sorted(names)[:_EXAMPLES])
    more = len(names) - _EXAMPLES
    return (shown or "no other") + (f" and {more} more" if more > 0 else "")
