"""Every layer keeps the contract within OpenTelemetry: the kit's checks and its state machine, with the real SDK."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test
from layers_on_redis import CASES, KINDS, Kind
from redis_server import RedisServer
from traced import traced

from anyio_channels import InMemoryChannelLayer
from anyio_channels.testing import CHECKS, Check, Clock, Features, contract_machine


def make_memory(clock: Clock, **options: Any) -> InMemoryChannelLayer:
    return InMemoryChannelLayer(clock=clock, **options)


MEMORY_CASES = [pytest.param(check, id=check.name) for check in CHECKS if check.applies(Features())]


@pytest.mark.anyio
@pytest.mark.diagonal(("check",), MEMORY_CASES, start=0)
async def test_memory_passes(check: Check) -> None:
    """The in-memory layer keeps every clause."""
    await check(traced(make_memory))


@pytest.mark.anyio
@pytest.mark.diagonal(("kind", "check"), CASES, start=0)
async def test_redis_passes(kind: Kind, check: Check, redis_server: RedisServer) -> None:
    """Each layer on Redis keeps every clause that applies to it."""
    await check(traced(kind.factory(redis_server)), kind.features)


@pytest.mark.slow
def test_memory_matches_the_model(anyio_backend: tuple[str, dict[str, Any]]) -> None:
    """The in-memory layer does what the plain-dict model does."""
    run_state_machine_as_test(
        contract_machine(traced(make_memory), *anyio_backend),
        settings=settings(settings(), max_examples=max(20, settings().max_examples // 3)),
    )


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.slow
def test_redis_matches_the_model(
    kind: Kind, redis_server: RedisServer, anyio_backend: tuple[str, dict[str, Any]]
) -> None:
    """Each layer on Redis does what the plain-dict model does."""
    profile = settings()
    run_state_machine_as_test(
        contract_machine(traced(kind.factory(redis_server)), *anyio_backend, features=kind.features),
        settings=settings(
            profile,
            max_examples=max(10, profile.max_examples // 6),
            stateful_step_count=30,
            suppress_health_check=list(HealthCheck),
        ),
    )
