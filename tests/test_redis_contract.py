"""Both layers on Redis keep the contract: the kit's checks and its state machine, against a real server."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test
from layers_on_redis import CASES, KINDS, PUBSUB, QUEUE, Kind
from redis_server import RedisServer

from anyio_channels.testing import Check, contract_machine, run_checks


@pytest.mark.anyio
@pytest.mark.parametrize(("kind", "check"), CASES)
async def test_layer_passes(kind: Kind, check: Check, redis_server: RedisServer) -> None:
    """Each layer on Redis keeps every clause that applies to it, on every backend."""
    await check(kind.factory(redis_server), kind.features)


@pytest.mark.anyio
@pytest.mark.diagonal(("kind",), [pytest.param(kind, id=kind.name) for kind in KINDS], start=1)
async def test_run_checks_leaves_out_what_does_not_apply(kind: Kind, redis_server: RedisServer) -> None:
    """All checks at once, as an author of a layer with fewer features runs them."""
    await run_checks(kind.factory(redis_server), kind.features)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("part", [0.05, pytest.param(0.2, marks=pytest.mark.slow)])
def test_layer_matches_the_model(
    kind: Kind, part: float, redis_server: RedisServer, anyio_backend: tuple[str, dict[str, Any]]
) -> None:
    """Each layer on Redis does what the plain-dict model does, on every backend."""
    profile = settings()
    run_state_machine_as_test(
        contract_machine(kind.factory(redis_server), *anyio_backend, features=kind.features),
        # Each step goes to Redis and back several times, so there are fewer of them.
        settings=settings(
            profile,
            max_examples=round(part * profile.max_examples),
            stateful_step_count=30,
            suppress_health_check=list(HealthCheck),
        ),
    )


class Chosen:
    """Draws what the test says."""

    def __init__(self, name: str) -> None:
        self._name = name

    def draw(self, _strategy: object) -> str:
        return self._name


def test_the_model_of_a_layer_that_drops_what_no_reader_takes(redis_server: RedisServer) -> None:
    """A channel whose message expired loses the next, until it joins a group; a full inbox misses what comes."""
    machine: Any = contract_machine(PUBSUB.factory(redis_server), features=PUBSUB.features)()
    name = machine.fixed[0]
    machine._send(name)
    machine.let_time_pass(seconds=10.0)
    machine.statistics_add_up()
    machine._send(name)
    assert machine.channels[name].entries == []
    machine.open_or_close_inbox(inbox="first", groups=["red"], capacity=1, overflow="drop_new", on_gap="event")
    inbox = machine.inboxes["first"][1].channel
    for _ in range(2):
        machine._send(inbox)
    assert [entry.number is None for entry in machine.channels[inbox].entries] == [False, True]
    machine.group_add(data=Chosen(name), group="red")
    assert machine.channels[name].kept
    machine.statistics_add_up()
    machine.teardown()


def test_the_model_of_concurrent_sends_behind_a_message(redis_server: RedisServer) -> None:
    """What was there before comes first, whichever of several senders at once comes next."""
    machine: Any = contract_machine(QUEUE.factory(redis_server), features=QUEUE.features)()
    name = machine.fixed[0]
    machine._send(name)
    machine.send_concurrently(data=Chosen(name), count=2)
    assert machine.channels[name].entries == []
    machine.statistics_add_up()
    machine.teardown()
