"""Both layers on Redis keep the contract: the kit's checks and its state machine, against a real server."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test
from layers_on_redis import CASES, KINDS, Kind
from redis_server import RedisServer

from anyio_channels.testing import Check, contract_machine, run_checks


@pytest.mark.anyio
@pytest.mark.parametrize(("kind", "check"), CASES)
async def test_layer_passes(kind: Kind, check: Check, redis_server: RedisServer) -> None:
    """Each layer on Redis keeps every clause that applies to it, on every backend."""
    await check(kind.factory(redis_server), kind.features)


@pytest.mark.anyio
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
async def test_run_checks_leaves_out_what_does_not_apply(kind: Kind, redis_server: RedisServer) -> None:
    """All checks at once, as an author of a layer with fewer features runs them."""
    await run_checks(kind.factory(redis_server), kind.features)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.slow
def test_layer_matches_the_model(
    kind: Kind, redis_server: RedisServer, anyio_backend: tuple[str, dict[str, Any]]
) -> None:
    """Each layer on Redis does what the plain-dict model does, on every backend."""
    profile = settings()
    run_state_machine_as_test(
        contract_machine(kind.factory(redis_server), *anyio_backend, features=kind.features),
        # Each step goes to Redis and back several times, so there are fewer of them.
        settings=settings(
            profile,
            max_examples=max(10, profile.max_examples // 5),
            stateful_step_count=30,
            suppress_health_check=list(HealthCheck),
        ),
    )
