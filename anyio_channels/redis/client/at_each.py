"""Do it at each of several servers, at the same time, and collect what came of it.

Rules:
- what fails at one does not stop it at the others: errors are collected, and raised when all have ended.
- what is collected: ``OSError``, errors of the ``redis`` package, and ``ClosedResourceError``. All else is a mistake of ours.
- if cancelled, all are cancelled.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

import redis.exceptions
from anyio import ClosedResourceError, create_task_group

T = TypeVar("T")
R = TypeVar("R")


async def try_each(
    call: Callable[[T], Awaitable[R]],
    targets: Sequence[T],
    *,
    enough: Callable[[R | Exception], bool] = lambda _: False,
) -> list[tuple[T, R | Exception]]:
    """Await ``call`` for each of ``targets``; return what it returned or raised, in the order in which they ended.

    When ``enough`` says so of what came of one, the rest are cancelled and not in the list.
    """
    ended: list[tuple[T, R | Exception]] = []

    async def run(target: T) -> None:
        outcome: R | Exception
        try:
            outcome = await call(target)
        except (OSError, redis.exceptions.RedisError, ClosedResourceError) as error:
            outcome = error
        ended.append((target, outcome))
        if enough(outcome):
            tasks.cancel_scope.cancel()

    async with create_task_group() as tasks:
        for target in targets:
            tasks.start_soon(run, target)
    return ended


async def at_each(call: Callable[[T], Awaitable[R]], targets: Sequence[T]) -> list[R]:
    """Await ``call`` for each of ``targets``; return the results in their order.

    When all have ended, raises the error that came first.
    """
    if len(targets) == 1:
        return [await call(targets[0])]
    ended = await try_each(lambda numbered: call(numbered[1]), list(enumerate(targets)))
    results = {number: outcome for (number, _), outcome in ended if not isinstance(outcome, Exception)}
    if errors := [outcome for _, outcome in ended if isinstance(outcome, Exception)]:
        raise errors[0]
    return [results[number] for number in sorted(results)]
