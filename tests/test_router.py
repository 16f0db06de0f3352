"""Which server owns a name; and doing something at each of several."""

from __future__ import annotations

from typing import Any

import pytest
import redis.exceptions
from anyio import Event, create_task_group, fail_after, sleep_forever, wait_all_tasks_blocked
from channels_redis.utils import _consistent_hash

from anyio_channels.redis.client import at_each, make_router, try_each

PATIENCE = 20.0


def test_servers_share_the_names_as_those_of_channels_redis_do() -> None:
    """Each name is owned by the server that channels_redis takes for it, also on the edge between two."""
    names = [f"name{number}" for number in range(10_000)]
    for count in (1, 2, 3, 10, 186):
        router = make_router([("example", 6380 + number) for number in range(count)], cluster=False)
        router.links = router.servers  # type: ignore[assignment]
        theirs = [_consistent_hash(name, count) for name in names]
        owners: list[Any] = [router.owner(name, "") for name in names]
        assert [router.servers.index(owner) for owner in owners] == theirs
    assert make_router([("a", 1), ("b", 2)], cluster=False).name == "Redis at a:1, Redis at b:2"
    with pytest.raises(ValueError, match="hosts names 4097 Redis servers; 4096 is the most"):
        make_router(["redis://a"] * 4097, cluster=False)


@pytest.mark.anyio
async def test_results_are_in_order() -> None:
    """All run at the same time; the results are in the order of what was asked, not of who was first."""
    gates: list[Event] = []

    async def call(number: int) -> int:
        if number < 2:
            await gates[number + 1].wait()
        gates[number].set()
        return number * 10

    with fail_after(PATIENCE):
        gates[:] = [Event() for _ in range(3)]
        assert await at_each(call, [0, 1, 2]) == [0, 10, 20]
        gates[:] = [Event() for _ in range(3)]
        assert await try_each(call, [0, 1, 2]) == [(2, 20), (1, 10), (0, 0)]
    assert await at_each(call, [2]) == [20]
    assert await at_each(call, []) == []


@pytest.mark.anyio
@pytest.mark.parametrize("kind", [OSError, redis.exceptions.ResponseError])
async def test_one_that_fails_does_not_stop_the_others(kind: type[Exception]) -> None:
    """The first error is raised when all have ended."""
    done: list[int] = []
    failed = Event()

    async def call(number: int) -> None:
        if number == 1:
            failed.set()
            raise kind("one")
        await failed.wait()
        if number == 2:
            raise ConnectionError("two")
        done.append(number)

    with fail_after(PATIENCE), pytest.raises(kind, match="one"):
        await at_each(call, [0, 1, 2, 3])
    assert sorted(done) == [0, 3]


@pytest.mark.anyio
async def test_enough() -> None:
    """When one said what was wanted, the others are cancelled; what failed before is in the list."""

    failed = Event()

    async def call(number: int) -> int:
        if number == 0:
            failed.set()
            raise OSError("zero")
        await failed.wait()
        if number == 2:
            await sleep_forever()
        return number

    with fail_after(PATIENCE):
        (zero, error), one = await try_each(call, [0, 1, 2], enough=lambda told: not isinstance(told, Exception))
    assert (zero, type(error), one) == (0, OSError, (1, 1))


@pytest.mark.anyio
async def test_a_mistake_is_not_collected() -> None:
    """Errors that no server causes come out at once."""

    async def call(number: int) -> None:
        if number:
            raise ZeroDivisionError
        await sleep_forever()

    with fail_after(PATIENCE), pytest.raises(ExceptionGroup) as info:
        await try_each(call, [0, 1])
    assert info.group_contains(ZeroDivisionError)


@pytest.mark.anyio
async def test_cancelled_at_each() -> None:
    """Whoever cancels the call cancels all of it."""
    ended: list[Any] = []

    async def call(number: int) -> None:
        try:
            await sleep_forever()
        finally:
            ended.append(number)

    async with create_task_group() as tasks:
        tasks.start_soon(at_each, call, [0, 1])
        await wait_all_tasks_blocked()
        tasks.cancel_scope.cancel()
    assert sorted(ended) == [0, 1]
