"""The doctor's checks, each on a Redis that is as it should be, and on one that is not."""

from __future__ import annotations

import asyncio
import itertools
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from anyio import CancelScope
from layers_on_redis import PUBSUB, QUEUE, Kind, both, new_prefix
from redis_server import RedisCluster, RedisServer, TLSProxy, make_certificates, new_directory, wait_until

from anyio_channels import RedisChannelLayer, RedisPubSubChannelLayer
from anyio_channels.doctor.checkup import check_up
from anyio_channels.doctor.findings import Finding
from anyio_channels.redis.client import Link

pytestmark = [pytest.mark.anyio, pytest.mark.two_loops]


@contextmanager
def server_with(directory: Path, *config: str) -> Iterator[RedisServer]:
    with RedisServer(new_directory(directory, "redis"), *config) as server:
        yield server


async def findings(kind: Kind, *urls: str, clock: Any = time.time, **options: Any) -> dict[str, Finding]:
    """What is found, by the name of the check; the last one, where there are several servers."""

    def make() -> Any:
        return kind.layer_class(list(urls), **options)

    return {finding.check: finding for finding in await check_up(make(), make(), clock)}


def wrong(found: dict[str, Finding]) -> set[str]:
    return {name for name, finding in found.items() if finding.verdict == "wrong"}


@both
async def test_all_is_well(kind: Kind, tmp_path: Path) -> None:
    """On a Redis as it should be everything is ok, nothing is to be done, and nothing stays behind."""
    with server_with(tmp_path) as server:
        found = await findings(kind, server.url)
        assert {finding.verdict for finding in found.values()} == {"ok"}
        assert {finding.advice for finding in found.values()} == {""}
        names = {
            "reached",
            "version",
            "role",
            "latency",
            "maxmemory-policy",
            "persistence",
            "clock",
            "commands",
            "prefix",
        }
        assert found.keys() == names | {"messages"} | ({"keys"} if kind is QUEUE else set())
        with server.client() as client:
            assert client.keys("*") == []


async def test_the_mark_of_an_open_layer_stays(tmp_path: Path) -> None:
    """What an open layer has in Redis is left alone."""
    with server_with(tmp_path) as server, server.client() as client:
        async with RedisChannelLayer([server.url]) as layer, layer.subscribe("room") as inbox:
            await layer.send("jobs", {})
            before = set(client.keys("*"))
            assert b"asgi:prefix" in before
            assert wrong(await findings(QUEUE, server.url)) == set()
            process = inbox.channel.removeprefix("specific.").partition("!")[0]
            assert set(client.keys("*")) - {b"asgi:wake:" + process.encode()} == before
            await layer.group_send("room", {"type": "still.here"})
            assert await inbox.receive() == {"type": "still.here"}


async def interrupt_at_each_command(
    kind: Kind, directory: Path, monkeypatch: pytest.MonkeyPatch, run: Callable[..., Any]
) -> None:
    """Have ``run`` cancel a check at its first command, then one at its second, and so on; nothing may be left by any."""
    execute = Link.execute
    cancel: Callable[[], object] = int
    countdown = itertools.count()

    async def counted(link: Link, *command: Any, **options: Any) -> Any:
        if next(countdown) == number:
            cancel()
        return await execute(link, *command, **options)

    def on_cancel(call: Callable[[], object]) -> None:
        nonlocal cancel
        cancel = call

    monkeypatch.setattr(Link, "execute", counted)
    with server_with(directory) as server, server.client() as client:
        for number in itertools.count():
            countdown = itertools.count()
            was_cancelled = await run(on_cancel, partial(findings, kind, server.url))
            assert client.keys("*") == [], f"interrupted at command {number}"
            if next(countdown) <= number:  # it does not send so many
                break
    assert not was_cancelled
    assert number > 10


@pytest.mark.diagonal(("kind",), [pytest.param(QUEUE, id="queue"), pytest.param(PUBSUB, id="pubsub")], start=1)
async def test_interrupted_at_any_point(kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever of its commands a cancelled scope meets, nothing stays in Redis."""

    async def run(on_cancel: Callable[..., None], check: Callable[[], Any]) -> bool:
        with CancelScope() as scope:
            on_cancel(scope.cancel)
            await check()
        return scope.cancelled_caught

    await interrupt_at_each_command(kind, tmp_path, monkeypatch, run)


@pytest.mark.parametrize(
    "kind", [pytest.param(QUEUE, id="queue"), pytest.param(PUBSUB, id="pubsub", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_interrupted_by_asyncio_s_own_cancellation(
    kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same for ``task.cancel()``."""

    async def run(on_cancel: Callable[..., None], check: Callable[[], Any]) -> bool:
        task = asyncio.create_task(check())
        on_cancel(task.cancel)
        await asyncio.wait([task])
        return task.cancelled()

    await interrupt_at_each_command(kind, tmp_path, monkeypatch, run)


@both
async def test_not_reached(kind: Kind, tmp_path: Path) -> None:
    """A server that is down, refuses the password, or is no cluster is said to be so, with what to do."""
    with server_with(tmp_path, "--requirepass", "right") as server:
        found = await findings(kind, server.url.replace("//", "//:wrong@"))
        assert found.keys() == {"reached"}
        assert "WRONGPASS" in found["reached"].found
        assert "percent-encoded" in found["reached"].advice
    with server_with(tmp_path) as server:
        found = await findings(kind, server.url, cluster=True)
        assert "use redis:// instead" in found["reached"].advice
        certificates = make_certificates(tmp_path)
        async with TLSProxy(server.host, server.port, certificates) as proxy:
            found = await findings(kind, proxy.url)
        assert "its certificate is trusted" in found["reached"].advice
    found = await findings(kind, server.url, connect_timeout=0.2)
    assert found["reached"].verdict == "wrong"
    assert "check that Redis runs there" in found["reached"].advice
    assert "command" not in found["reached"].found


async def test_one_of_several(tmp_path: Path) -> None:
    """One server that is down does not keep the other from being checked."""
    with server_with(tmp_path) as one, server_with(tmp_path) as two:
        layers = [RedisPubSubChannelLayer([one.url, two.url], connect_timeout=0.5, timeout=1) for _ in range(2)]
        two.kill()
        found = await check_up(layers[0], layers[1])
        reached = {finding.server: finding.verdict for finding in found if finding.check == "reached"}
        assert reached == {f"Redis at {one.host}:{one.port}": "ok", f"Redis at {two.host}:{two.port}": "wrong"}
        assert [finding.server for finding in found if finding.check == "version"] == [
            f"Redis at {one.host}:{one.port}"
        ]


async def test_one_that_goes_away(tmp_path: Path) -> None:
    """A server that dies while it is looked at does not keep the other from being checked."""
    with server_with(tmp_path) as one, server_with(tmp_path) as two:
        layers = [RedisChannelLayer([one.url, two.url], connect_timeout=0.5) for _ in range(2)]

        def clock() -> float:
            one.kill()  # it is the first whose clock is looked at
            return time.time()

        found = await check_up(layers[0], layers[1], clock)
    verdicts = {(finding.check, finding.server): finding.verdict for finding in found}
    first, second = (f"Redis at {server.host}:{server.port}" for server in (one, two))
    assert verdicts["reached", first] == "wrong"
    assert verdicts["commands", second] == "ok"
    assert ("messages", None) in verdicts  # well or not, as the dead one owns a name or not


@both
async def test_a_replica(kind: Kind, tmp_path: Path) -> None:
    """A replica takes no writes; that is said, and how to find the primary."""
    with server_with(tmp_path) as primary, server_with(tmp_path) as replica:
        with replica.client() as client:
            client.replicaof(primary.host, primary.port)
        found = await findings(kind, replica.url)
        assert found["role"].verdict == "wrong"
        assert "redis+sentinel://" in found["role"].advice
        assert (found["commands"].verdict == "wrong") == (kind is QUEUE)


async def test_a_cluster_that_the_url_does_not_name(tmp_path: Path) -> None:
    """A node of a cluster, taken for a single server, is told apart."""
    with server_with(tmp_path, "--cluster-enabled", "yes") as node:
        found = await findings(QUEUE, node.url)
        assert (found["role"].verdict, found["role"].found) == ("wrong", "a node of a cluster")
        assert found["messages"].verdict == "unknown"


async def test_memory(tmp_path: Path) -> None:
    """A policy that evicts is wrong where there is a limit, worth a look where there is none, and nothing to pub/sub."""
    with server_with(tmp_path, "--maxmemory-policy", "allkeys-lru") as server, server.client() as client:
        found = await findings(QUEUE, server.url)
        assert found["maxmemory-policy"].verdict == "warning"
        assert "memory" not in found
        client.config_set("maxmemory", "100mb")
        found = await findings(QUEUE, server.url)
        assert found["maxmemory-policy"].verdict == "wrong"
        assert "noeviction" in found["maxmemory-policy"].advice
        assert found["memory"].verdict == "ok"
        assert (await findings(PUBSUB, server.url))["maxmemory-policy"].verdict == "ok"
        client.config_set("maxmemory", "3mb")
        for number in range(200):
            client.set(f"x{number}", "x" * 20_000)
        assert "evicted" in (await findings(QUEUE, server.url))["maxmemory-policy"].found


async def test_out_of_memory(tmp_path: Path) -> None:
    """A Redis that is full refuses what the layer sends; messages are not tried then."""
    with server_with(tmp_path) as server, server.client() as client:
        client.config_set("maxmemory", "1")
        found = await findings(QUEUE, server.url)
        assert found["memory"].verdict == "warning"
        assert "OOM" in found["commands"].found
        assert "raise maxmemory" in found["commands"].advice
        assert found["messages"].verdict == "unknown"


async def test_snapshots_that_fail(tmp_path: Path) -> None:
    """A snapshot that failed is worth a look, for Redis may refuse writes then; an append-only file is said to cost."""
    with server_with(tmp_path, "--dbfilename", "dump") as server, server.client() as client:
        (server.directory / "dump").mkdir()
        client.bgsave()
        wait_until(lambda: client.info("persistence")["rdb_last_bgsave_status"] == "err")
        client.config_set("stop-writes-on-bgsave-error", "no")
        found = await findings(QUEUE, server.url)
        assert found["persistence"].verdict == "warning"
        assert "free disk space" in found["persistence"].advice
        client.config_set("save", "1 1")
        client.config_set("stop-writes-on-bgsave-error", "yes")
        found = await findings(QUEUE, server.url)
        assert "MISCONF" in found["reached"].found
        assert "its log" in found["reached"].advice
    with server_with(tmp_path, "--appendonly", "yes") as server:
        assert "costs disk writes" in (await findings(QUEUE, server.url))["persistence"].found


@pytest.mark.parametrize(("skew", "verdict"), [(-0.5, "ok"), (5.0, "warning"), (-5.0, "warning"), (61.0, "wrong")])
async def test_clock(skew: float, verdict: str, redis_server: RedisServer) -> None:
    """The server's clock is compared with this machine's."""
    found = await findings(QUEUE, redis_server.url, prefix=new_prefix(), clock=lambda: time.time() - skew)
    assert found["clock"].verdict == verdict
    assert ("ahead of" in found["clock"].found) == (skew > 0)


async def test_clocks_of_several_servers(tmp_path: Path) -> None:
    """Servers whose clocks differ are told from those that agree."""
    with server_with(tmp_path) as one, server_with(tmp_path) as two:
        found = await findings(PUBSUB, one.url, two.url)
        assert found["clocks of the servers"].verdict == "ok"
        turns = itertools.count()
        found = await findings(PUBSUB, one.url, two.url, clock=lambda: time.time() + 10 * (next(turns) // 2))
        assert found["clocks of the servers"].verdict == "warning"


@pytest.mark.parametrize(
    ("kind", "command", "culprit"),
    [
        (QUEUE, "-bzpopmin", "bzpopmin"),
        (QUEUE, "-evalsha", "evalsha"),
        (QUEUE, "-subscribe", "subscribe"),
        (QUEUE, "-zremrangebyscore -zrange", "zrange"),
        (PUBSUB, "-subscribe", "subscribe"),
        (PUBSUB, "-publish", "publish"),
    ],
)
async def test_permissions(kind: Kind, command: str, culprit: str, tmp_path: Path) -> None:
    """A command that the user must not use is found by trying, and named."""
    with server_with(tmp_path) as server:
        with server.client() as client:
            client.execute_command("ACL", "SETUSER", "ann", "on", ">pw", "~*", "&*", "+@all", *command.split())
        found = await findings(kind, server.url.replace("//", "//ann:pw@"))
        assert found["commands"].verdict == "wrong"
        assert culprit in found["commands"].found.lower()
        assert found["messages"].verdict == "unknown"


@both
async def test_the_permissions_that_the_page_about_redis_asks_for(kind: Kind, tmp_path: Path) -> None:
    """What docs/redis.md says is enough; what it does not ask for is said to be unknown where it is needed to look."""
    with server_with(tmp_path) as server:
        with server.client() as client:
            client.execute_command(
                "ACL",
                "SETUSER",
                "ann",
                "on",
                ">pw",
                "~asgi*",
                "&asgi*",
                "&specific.*",
                "+@all",
                "-@dangerous",
                "-@admin",
            )
        found = await findings(kind, server.url.replace("//", "//ann:pw@"))
        assert wrong(found) == set()
        unknown = {name for name, finding in found.items() if finding.verdict == "unknown"}
        assert unknown == {"role", "maxmemory-policy"}
        assert found["messages"].verdict == "ok"


async def test_permissions_of_keys(tmp_path: Path) -> None:
    """Where all commands are allowed but not all keys, sending messages shows it."""
    with server_with(tmp_path) as server:
        with server.client() as client:
            client.execute_command("ACL", "SETUSER", "ann", "on", ">pw", "~asgidoctor.*", "~asgi:*", "&*", "+@all")
        found = await findings(QUEUE, server.url.replace("//", "//ann:pw@"), timeout=3, connect_timeout=1)
        assert found["commands"].verdict == "ok"
        assert found["messages"].verdict == "wrong"


async def test_keys_that_must_not_be_scanned(tmp_path: Path) -> None:
    """Where SCAN is forbidden the prefix cannot be checked, which is said."""
    with server_with(tmp_path) as server:
        with server.client() as client:
            client.execute_command("ACL", "SETUSER", "ann", "on", ">pw", "~*", "&*", "+@all", "-scan")
        found = await findings(QUEUE, server.url.replace("//", "//ann:pw@"))
        assert found["prefix"].verdict == "unknown"


async def test_prefixes_that_clash(tmp_path: Path) -> None:
    """A prefix that begins with another is wrong; one beside it is not; others' keys under it are found."""
    with server_with(tmp_path) as server, server.client() as client:
        client.zadd("other:group:room", {"a": 1})
        found = await findings(QUEUE, server.url)
        assert found["prefix"].found == "'asgi', beside 'other'"
        client.zadd("asgi2:group:room", {"a": 1})
        client.set("asgi2:prefix", 1)
        client.zadd("as:group:room", {"a": 1})
        found = await findings(QUEUE, server.url)
        assert wrong(found) == {"prefix"}
        assert "'as', 'asgi2'" in found["prefix"].found
        assert found["keys"].verdict == "ok"
        for number in range(5):
            client.set(f"asgi:cache:{number}", 1)
        found = await findings(QUEUE, server.url)
        assert found["keys"].verdict == "warning"
        assert found["keys"].found.endswith("and 2 more")
        client.delete(*client.keys("asgi:cache:*"))
        client.set("asgijobs", "a string")
        found = await findings(QUEUE, server.url)
        assert found["keys"].verdict == "wrong"
        assert "'asgijobs'" in found["keys"].found


async def test_pubsub_beside_another_prefix(tmp_path: Path) -> None:
    """Pub/sub channels carry no prefix, so another application there is worth a look."""
    with server_with(tmp_path) as server:
        async with RedisPubSubChannelLayer([server.url], prefix="other") as other, other.subscribe("room"):
            found = await findings(PUBSUB, server.url)
        assert found["prefix"].verdict == "warning"
        assert "'other'" in found["prefix"].found


RULES = {
    rule.partition(" ")[0]: rule
    for rule in re.findall(
        r"^ACL SETUSER (.+)$",
        (Path(__file__).parent.parent / "docs/howto/deploying.md").read_text("utf-8"),
        re.MULTILINE,
    )
}


async def look_for_each_missing_right(user: str, servers: Sequence[RedisServer], make: Callable[[str], Any]) -> None:
    """With the rights that the documentation gives, all is well; without any one of them, the check-up says which it is."""
    words = RULES[user].split()[1:]
    rights = [word for word in words if word.startswith("+") and word != "+hello"]  # Redis lets everybody say HELLO
    assert len(rights) >= 5

    async def find_wrong(missing: str = "") -> str:
        for server in servers:
            with server.client() as client:
                client.acl_deluser(user)
                client.execute_command("ACL", "SETUSER", user, *(word for word in words if word != missing))
        found = await check_up(make(f"{user}:secret@"), make(f"{user}:secret@"))
        return " ".join(finding.found.lower() for finding in found if finding.verdict == "wrong")

    assert await find_wrong() == ""
    silent = [right for right in rights if right[1:].partition("|")[0] not in await find_wrong(right)]
    assert silent == []


@pytest.mark.slow
@both
async def test_each_right_that_is_missing_is_named(kind: Kind, tmp_path: Path) -> None:
    """On one server."""
    with RedisServer(tmp_path) as server:

        def make(login: str) -> Any:
            return kind.layer_class([server.url.replace("//", f"//{login}")], prefix="shop")

        await look_for_each_missing_right("shop" if kind is QUEUE else "shop-live", [server], make)


@pytest.mark.slow
@both
async def test_each_right_that_is_missing_on_a_cluster_is_named(kind: Kind, cluster: RedisCluster) -> None:
    """On the nodes of a cluster."""

    def make(login: str) -> Any:
        hosts = [url.replace("//", f"//{login}") for url in cluster.hosts]
        return kind.layer_class(hosts, prefix="shop", cluster=True, connect_timeout=1.0, timeout=1.0)

    await look_for_each_missing_right("shop-nodes" if kind is QUEUE else "shop-live-nodes", cluster.nodes, make)


@pytest.mark.parametrize(
    ("missing", "left"), [("-unlink", 0), ("-pexpire -unlink", 0), ("-pexpire -unlink -del -zpopmin", 2)]
)
async def test_what_is_tried_is_removed_by_whatever_way_there_is(missing: str, left: int, tmp_path: Path) -> None:
    """What a user must not do is no reason to leave keys behind; those that cannot be removed are named."""
    with RedisServer(tmp_path) as server, server.client() as client:
        client.execute_command("ACL", "SETUSER", "ann", "on", ">pw", "~*", "&*", "+@all", *missing.split())
        url = server.url.replace("//", "//ann:pw@")
        found = await check_up(RedisChannelLayer([url]), RedisChannelLayer([url]))
        behind = [finding.found for finding in found if "left behind" in finding.found]
        assert len(behind) == left + (left > 0)  # the mark cannot be popped from either
        assert len([key for key in client.scan_iter("*doctor*") if client.ttl(key) == -1]) <= left
        assert [finding.verdict for finding in found if finding.check == "keys" and not finding.server] == ["ok"]
