"""Looking from outside at a cluster and behind Sentinel: survey, check-up and doctor on one deployment each."""

from __future__ import annotations

from typing import Any

import pytest
from command_line import run
from layers_on_redis import QUEUE, Kind, both, new_prefix
from redis_server import RedisCluster, Sentinels
from test_survey import look_at

from anyio_channels.doctor.checkup import check_up
from anyio_channels.doctor.survey import Survey

pytestmark = [pytest.mark.anyio, pytest.mark.two_loops]


@both
async def test_survey_of_sentinel(kind: Kind, quiet_sentinels: Sentinels) -> None:
    """Behind Sentinel, the primary is looked at."""
    hosts: list[Any] = [quiet_sentinels.host]
    async with kind.layer_class(hosts) as layer, layer.subscribe("room"):
        look = await look_at(kind.layer_class(hosts))
    assert [group.name for group in look.groups] == ["room"]


@both
async def test_survey_of_cluster(kind: Kind, quiet_cluster: RedisCluster) -> None:
    """In a cluster every node is asked, and all that they hold is one list."""
    options: dict[str, Any] = {"cluster": True, "prefix": new_prefix()}
    groups = [f"group{number}" for number in range(10)]
    async with kind.layer_class(quiet_cluster.hosts, **options) as layer, layer.subscribe(*groups) as inbox:
        look = await look_at(kind.layer_class(quiet_cluster.hosts, **options))
        async with Survey(kind.layer_class(quiet_cluster.hosts, **options)) as survey:
            await survey.require()
            members = await survey.members("group1")
    assert [group.name for group in look.groups] == groups
    assert len(look.servers) == 3
    assert (None if members is None else set(members)) == ({inbox.channel} if kind is QUEUE else None)


@both
async def test_checkup_of_cluster(kind: Kind, quiet_cluster: RedisCluster) -> None:
    """Every node of a cluster is checked, and nothing stays behind."""
    layers = [kind.layer_class(quiet_cluster.hosts, cluster=True, prefix="doctor") for _ in range(2)]
    found = await check_up(layers[0], layers[1])
    assert {finding.verdict for finding in found} == {"ok"}
    assert len({finding.server for finding in found if finding.check == "commands"}) == 3
    for node in quiet_cluster.nodes[:3]:
        with node.client() as client:
            assert client.keys("doctor*") == []


@both
async def test_checkup_of_cluster_with_a_tag(kind: Kind, quiet_cluster: RedisCluster) -> None:
    """A prefix with a tag has keys on one node only, and the others are not blamed for it."""
    layers = [kind.layer_class(quiet_cluster.hosts, cluster=True, prefix="{doctor}") for _ in range(2)]
    found = await check_up(layers[0], layers[1])
    assert {finding.verdict for finding in found} == {"ok"}


@both
async def test_checkup_of_sentinel(kind: Kind, quiet_sentinels: Sentinels) -> None:
    """Behind Sentinel, the primary is checked."""
    layers = [kind.layer_class([quiet_sentinels.host], prefix="doctor") for _ in range(2)]
    found = await check_up(layers[0], layers[1])
    assert {finding.verdict for finding in found} == {"ok"}


def test_doctor_of_a_cluster(quiet_cluster: RedisCluster) -> None:
    """Where there are several servers, each line says of which it is."""
    nodes = ",".join(f"{node.host}:{node.port}" for node in quiet_cluster.nodes[:2])
    result = run("doctor", f"redis+cluster://{nodes}")
    assert result.returncode == 0
    for node in quiet_cluster.nodes[:3]:
        assert f"Redis at {node.host}:{node.port}: a primary" in result.stdout
    sent = run("group-send", "room", "{}", "--layer", f"redis+cluster://{nodes}")
    assert sent.stdout == "sent 1 message to group room: 0 copies to members\n"
