"""What a layer says when it is opened at a server of another kind: in words, the same as the check-up's, and in the log."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import redis.exceptions
from anyio import fail_after
from layers_on_redis import PATIENCE, PUBSUB, QUEUE, Kind, both, new_prefix
from redis_server import (
    Certificates,
    RedisCluster,
    RedisServer,
    Script,
    Sentinel,
    TLSProxy,
    free_port,
    make_certificates,
    new_directory,
)

from anyio_channels import log
from anyio_channels.doctor.checkup import check_up
from anyio_channels.doctor.survey import Survey
from anyio_channels.redis.client import IF_NOT_TLS, IF_TLS, IF_UNTRUSTED, NO_CLUSTER, RESP3_NEEDED

pytestmark = [pytest.mark.anyio, pytest.mark.two_loops]


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("certificates"))


def make(kind: Kind, host: Any, **options: Any) -> Any:
    return kind.layer_class([host], **{"prefix": new_prefix(), "timeout": 5.0, "connect_timeout": 0.3, **options})


async def refusal(layer: Any) -> Exception:
    """Return what opening ``layer`` raises."""
    with fail_after(PATIENCE), pytest.raises(redis.exceptions.RedisError) as info:
        await layer.__aenter__()
    return info.value


async def opening_says(kind: Kind, host: Any, words: str, **options: Any) -> str:
    """See that opening a layer says ``words``, and the check-up advises them; return what opening says."""
    said = str(await refusal(make(kind, host, **options)))
    assert words in said
    with fail_after(PATIENCE):
        findings = await check_up(make(kind, host, **options), make(kind, host, **options))
    assert [(one.check, one.advice, words in one.found) for one in findings] == [("reached", words, False)]
    return said


def logged(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    """The names of events of connections, and their texts."""
    events = [(getattr(one, log.PREFIX + "event", ""), one.getMessage()) for one in caplog.records]
    return [event for event in events if event[0].startswith("connection.")]


@pytest.mark.diagonal(
    ("kind", "cluster"),
    [
        pytest.param(kind, cluster, id=f"{kind.name}-{'cluster' if cluster else 'server'}")
        for kind in (QUEUE, PUBSUB)
        for cluster in (False, True)
    ],
    start=0,
)
async def test_a_port_for_tls(kind: Kind, cluster: bool, redis_server: RedisServer, certificates: Certificates) -> None:
    """A plain URL at a port for TLS."""
    async with TLSProxy(redis_server.host, redis_server.port, certificates) as proxy:
        said = await opening_says(kind, proxy.url.replace("rediss", "redis"), IF_TLS, cluster=cluster)
        assert str(proxy.port) in said
    async with Script(b"\x15\x03\x01\x00\x02\x02\x46") as server:  # an alert, as other servers send it
        await opening_says(kind, f"redis://{server.host}:{server.port}", IF_TLS, cluster=cluster)


@pytest.mark.parametrize("answer", [None, b"-ERR unknown command\r\n", b""])
@both
async def test_a_port_without_tls(kind: Kind, answer: bytes | None, redis_server: RedisServer) -> None:
    """A URL with TLS at a plain port, which is silent, answers in clear, or hangs up."""
    if answer is None:
        host = f"rediss://{redis_server.host}:{redis_server.port}"
        await opening_says(kind, host, IF_NOT_TLS, cluster=kind is PUBSUB)
        return
    async with Script(answer, hang_up=True) as server:
        await opening_says(kind, f"rediss://{server.host}:{server.port}", IF_NOT_TLS)


@both
async def test_an_untrusted_certificate(
    kind: Kind, redis_server: RedisServer, certificates: Certificates, caplog: pytest.LogCaptureFixture
) -> None:
    """It is told at once, with what to do; the log does not say that it is tried again."""
    async with TLSProxy(redis_server.host, redis_server.port, certificates) as proxy:
        await opening_says(kind, proxy.url, IF_UNTRUSTED, connect_timeout=PATIENCE)
    assert {event for event, _ in logged(caplog)} == {"connection.refused"}
    assert not [text for _, text in logged(caplog) if "again" in text]


async def test_what_has_nothing_to_do_with_tls(redis_server: RedisServer) -> None:
    """A port where nobody listens, with TLS or without, is only that."""
    for scheme in ("redis", "rediss"):
        said = str(await refusal(make(PUBSUB, f"{scheme}://127.0.0.1:{free_port()}")))
        assert said.endswith("Connection refused; the command was not sent")


@pytest.mark.parametrize(
    "answer",
    [
        b"-ERR unknown command `HELLO`, with args beginning with: `3`\r\n",
        b"-ERR unknown command 'HELLO'\r\n" * 9,
        b"-unsupported command 'HELLO'\r\n",
        b"-NOPROTO unsupported protocol version\r\n",
    ],
)
@pytest.mark.parametrize("cluster", [False, True])
@both
async def test_a_server_without_resp3(
    kind: Kind, cluster: bool, answer: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """A server or proxy that refuses HELLO is told at once, with what is needed."""
    async with Script(answer) as server:
        host = f"redis://{server.host}:{server.port}"
        said = await opening_says(kind, host, RESP3_NEEDED, cluster=cluster, connect_timeout=PATIENCE)
        assert said.startswith(f"Redis at {server.host}:{server.port} ")
    assert [event for event, _ in logged(caplog)] == ([] if cluster else ["connection.refused"] * 2)


async def test_a_server_that_answers_in_resp2() -> None:
    """One that takes HELLO for something else needs the same."""
    async with Script(b"*2\r\n+server\r\n+redis\r\n") as server:
        await opening_says(QUEUE, f"redis://{server.host}:{server.port}", RESP3_NEEDED)


@both
async def test_no_cluster(kind: Kind, redis_server: RedisServer) -> None:
    """A server that stands alone, where a cluster was meant to be."""
    said = await opening_says(kind, redis_server.url, NO_CLUSTER, cluster=True)
    assert f"{redis_server.port}: ERR This instance has cluster support disabled; {NO_CLUSTER}" in said


async def test_a_node_of_a_cluster(cluster: RedisCluster, caplog: pytest.LogCaptureFixture) -> None:
    """The queue layer is not opened at one; it says which URL to use, at once, and so does whoever looks from outside."""
    node = cluster.nodes[0]
    where = f"{node.host}:{node.port}"
    words = f"Redis at {where} is a node of a cluster: use redis+cluster://{where} or cluster=True"
    assert str(await refusal(make(QUEUE, node.url, connect_timeout=PATIENCE))) == words
    assert logged(caplog) == [
        ("connection.refused", f"Redis at {where} cannot be used: it{words[8 + len(where) + 1 :]}")
    ]
    unix = f"Redis at {node.unix_socket} is a node of a cluster: use redis+cluster://host:port or cluster=True"
    assert str(await refusal(make(QUEUE, node.unix_url))) == unix
    async with Survey(make(QUEUE, node.url)) as survey:
        with pytest.raises(redis.exceptions.ResponseError, match="use redis[+]cluster://"):
            await survey.require()
    found = await check_up(make(QUEUE, node.url), make(QUEUE, node.url))
    role = next(one for one in found if one.check == "role")
    assert (role.verdict, role.advice) == ("wrong", words.partition(": ")[2])


async def test_pubsub_over_the_nodes_of_a_cluster(cluster: RedisCluster) -> None:
    """Plain pub/sub is handed on by all nodes to all others, so it may be opened at any of them."""
    first, second = (make(PUBSUB, node.url, prefix="over", connect_timeout=5.0) for node in cluster.nodes[:2])
    async with first, second, first.subscribe("room") as inbox:
        with fail_after(PATIENCE):
            await second.group_send("room", {"n": 1})
            assert await inbox.receive() == {"n": 1}
            await second.send(inbox.channel, {"n": 2})
            assert await inbox.receive() == {"n": 2}
    node = cluster.nodes[0]
    found = await check_up(*(make(PUBSUB, node.url, connect_timeout=5.0) for _ in range(2)))
    assert {one.check for one in found if one.verdict == "wrong"} == set()


async def test_a_node_behind_sentinels(tmp_path: Path) -> None:
    """Sentinels and a cluster do not go together."""
    with (
        RedisServer(new_directory(tmp_path, "node"), "--cluster-enabled", "yes") as node,
        Sentinel(new_directory(tmp_path, "sentinel"), node) as sentinel,
    ):
        host = {"sentinels": [(sentinel.host, sentinel.port)], "master_name": "mymaster"}
        assert "needs no sentinels" in str(await refusal(make(QUEUE, host, connect_timeout=PATIENCE)))


async def test_a_refused_password(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Opening fails at once, and the log does not say that it is tried again; where it is, it says so."""
    with RedisServer(tmp_path, "--requirepass", "right") as server:
        url = server.url.replace("//", "//:wrong@")
        assert "WRONGPASS" in str(await refusal(make(QUEUE, url, connect_timeout=PATIENCE)))
    ((event, text),) = logged(caplog)
    assert event == "connection.refused"
    assert text.startswith(f"Redis at {server.host}:{server.port} cannot be used: WRONGPASS")
    assert "again" not in text
    caplog.clear()
    await refusal(make(QUEUE, server.url))
    ((event, text),) = logged(caplog)
    assert (event, text.endswith("Connection refused; trying again")) == ("connection.failed", True)


@both
async def test_no_permission_names_what_was_asked_for(kind: Kind, tmp_path: Path) -> None:
    """NOPERM and WRONGTYPE name the key, or the Redis channel."""
    with RedisServer(tmp_path) as server, server.client() as client:
        client.execute_command("ACL", "SETUSER", "ann", "on", ">pw", "~my:*", "&my:*", "+@all")
        layer = make(kind, server.url.replace("//", "//ann:pw@"), prefix="my", connect_timeout=5.0)
        async with layer:
            name = "'mybad'" if kind is QUEUE else "'bad'"
            calls: list[Callable[[], Any]] = [lambda: layer.send("bad", {}), lambda: layer.receive("bad")]
            for call in calls:
                with fail_after(PATIENCE), pytest.raises(redis.exceptions.NoPermissionError, match=f"NOPERM .*{name}"):
                    await call()
            client.execute_command("ACL", "SETUSER", "ann", "resetchannels", "~*", "&*")
            if kind is QUEUE:
                client.set("myodd", "text")
                calls = [lambda: layer.send("odd", {}), lambda: layer.receive("odd")]
                for call in calls:
                    with (
                        fail_after(PATIENCE),
                        pytest.raises(redis.exceptions.ResponseError, match="WRONGTYPE .*'myodd'"),
                    ):
                        await call()
            client.execute_command("ACL", "SETUSER", "ann", "-evalsha", "-eval", "-publish")
            with fail_after(PATIENCE), pytest.raises(redis.exceptions.NoPermissionError, match="command$"):
                await layer.send("bad", {})
