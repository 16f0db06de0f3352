"""The contract kit: it passes on our layer, and catches every layer that is broken on purpose."""

from __future__ import annotations

import contextlib
from typing import Any

import anyio
import pytest
from broken import (
    BROKEN,
    NOT_FOR_THE_MACHINE,
    ClosesWithAMessage,
    DeliversTwice,
    FailsInSend,
    ForgetsToWake,
    HangsInSend,
    RefusesAlways,
    WorksClosed,
)
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from anyio_channels import InMemoryChannelLayer
from anyio_channels.layers.base import BaseChannelLayer
from anyio_channels.testing import CHECKS, Check, Clock, ContractViolation, Features, contract_machine, run_checks

SOON_FOUND = {ClosesWithAMessage, DeliversTwice, FailsInSend, ForgetsToWake, HangsInSend, RefusesAlways, WorksClosed}


def make_memory(clock: Clock, **options: Any) -> InMemoryChannelLayer:
    return InMemoryChannelLayer(clock=clock, **options)


MEANT = [check for check in CHECKS if check.applies(Features())]


@pytest.mark.anyio
@pytest.mark.parametrize("check", MEANT, ids=lambda check: check.name)
async def test_in_memory_layer_passes(check: Check) -> None:
    """The in-memory layer keeps every clause of the contract, on every backend."""
    await check(make_memory)


@pytest.mark.anyio
async def test_run_checks_passes() -> None:
    """All checks at once, as an author of a layer runs them."""
    await run_checks(make_memory)


@pytest.mark.parametrize("part", [0.15, pytest.param(1, marks=pytest.mark.slow)])
def test_in_memory_layer_matches_the_model(part: float, anyio_backend: tuple[str, dict[str, Any]]) -> None:
    """The in-memory layer does what the plain-dict model does, on every backend."""
    profile = settings()
    run_state_machine_as_test(
        contract_machine(make_memory, *anyio_backend),
        settings=settings(profile, max_examples=round(part * profile.max_examples)),
    )


@pytest.mark.parametrize(
    ("layer", "clauses"),
    # The one that hangs takes a time-out for each check.
    [pytest.param(*one, marks=pytest.mark.slow if one[0] is HangsInSend else ()) for one in BROKEN],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_checks_catch(layer: Any, clauses: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks name the clause that a broken layer breaks."""
    monkeypatch.setattr("anyio_channels.testing.checks._TIME_LIMIT", 0.5)

    def make(clock: Clock, **options: Any) -> BaseChannelLayer:
        made: BaseChannelLayer = layer(clock=clock, **options)
        return made

    with pytest.raises(ExceptionGroup) as caught:
        anyio.run(run_checks, make)
    named = {str(violation).split(":")[0] for violation in caught.value.exceptions}
    assert clauses <= named


@pytest.mark.parametrize(
    "layer",
    # These take a few steps to find, the others hundreds.
    [
        pytest.param(layer, marks=() if layer in SOON_FOUND else pytest.mark.slow)
        for layer, _ in BROKEN
        if layer not in NOT_FOR_THE_MACHINE
    ],
)
def test_machine_catches(layer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The state machine finds a broken layer too, within the examples of the fast profile."""
    monkeypatch.setattr("anyio_channels.testing.machine._WAIT", 1.0)

    def make(clock: Clock, **options: Any) -> BaseChannelLayer:
        made: BaseChannelLayer = layer(clock=clock, **options)
        return made

    with pytest.raises(ContractViolation):
        run_state_machine_as_test(
            contract_machine(make, "asyncio"),
            settings=settings(
                max_examples=300,
                stateful_step_count=50,
                deadline=None,
                database=None,
                derandomize=True,
                phases=[Phase.generate],  # found is enough: the shortest example is for people
                report_multiple_bugs=False,
                suppress_health_check=list(HealthCheck),
            ),
        )


@pytest.mark.anyio
async def test_a_check_that_hangs_is_a_violation(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer whose calls never come back is caught, and the clause is named."""
    monkeypatch.setattr("anyio_channels.testing.checks._TIME_LIMIT", 0.05)

    class Hangs(InMemoryChannelLayer):
        async def receive(self, channel: str) -> dict[str, Any]:
            await anyio.sleep_forever()
            raise AssertionError

    check = next(check for check in CHECKS if check.name == "message_types")
    with pytest.raises(ContractViolation, match=r"Messages: message_types ended with TimeoutError"):
        await check(lambda clock, **options: Hangs(clock=clock, **options))


@pytest.mark.anyio
async def test_a_layer_with_a_time_of_its_own() -> None:
    """A factory can tell the kit's clock how to make a layer's own store older."""

    class OwnTime(InMemoryChannelLayer):
        time = 5.0

    def make(clock: Clock, **options: Any) -> BaseChannelLayer:
        layer = OwnTime(clock=lambda: layer.time, **options)

        async def move(layer: BaseChannelLayer, seconds: float) -> None:
            assert isinstance(layer, OwnTime)
            layer.time += seconds

        clock.move = move
        return layer

    await run_checks(make)


def script(layer: type[InMemoryChannelLayer] = InMemoryChannelLayer) -> Any:
    """A machine whose steps are told by hand."""
    machine = contract_machine(lambda clock, **options: layer(clock=clock, **options))
    return machine()


def test_the_model_of_gaps_that_meet() -> None:
    """When the messages between two gaps expire, the gaps are one; the layer and the model agree on it."""
    machine = script()
    machine.open_or_close_inbox(inbox="first", groups=["red"], capacity=2, overflow="drop_new", on_gap="event")
    inbox = machine.inboxes["first"][1].channel
    machine.broadcast_many(group="red", count=3)
    machine._receive(inbox)
    machine.broadcast_many(group="red", count=2)
    assert [entry.number is None for entry in machine.channels[inbox].entries] == [False, True, False, True]
    machine.let_time_pass(seconds=10.0)
    assert [entry.missed for entry in machine.channels[inbox].entries] == [4]
    machine.statistics_add_up()
    machine._receive(inbox)
    machine.teardown()


def test_steps_that_find_nothing_to_do() -> None:
    """Where every channel has a reader, the steps that need an idle one do nothing, and those that take it away do."""
    machine = script()
    machine.open_or_close_inbox(inbox="first", groups=["red", "blue"], capacity=1, overflow="drop_old", on_gap="event")
    machine.broadcast_many(group="red", count=3)
    assert machine.layer.statistics().dropped_full == 2
    machine.flush(often=0)
    for name in list(machine.channels):
        machine._start_reader(name)
    machine.flush(often=1)
    machine.send_concurrently(data=None, count=2)
    machine.cancel_reader_as_message_comes(data=None, late=False)
    machine.hog(data=None)
    machine.statistics_add_up()
    machine.open_or_close_inbox(inbox="first", groups=[], capacity=1, overflow="drop_old", on_gap="event")
    machine.teardown()


@pytest.mark.parametrize(
    ("layer", "steps", "words"),
    [
        (ForgetsToWake, ["_start_reader", "_send"], "Delivery: a reader of 'normal' still waits"),
        (HangsInSend, ["_send"], "send did not come back"),
        (FailsInSend, ["_send"], r"send raised RuntimeError\('no'\)"),
        (RefusesAlways, ["_send"], "Capacity: 'normal' refused a message, accepting it: should be True, is False"),
    ],
)
def test_what_the_machine_says(layer: Any, steps: list[str], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A violation names the clause, the channel, and both sides."""
    monkeypatch.setattr("anyio_channels.testing.machine._WAIT", 0.5)
    machine = script(layer)
    with pytest.raises(ContractViolation, match=words):
        for step in steps:
            getattr(machine, step)("normal")
    with contextlib.suppress(ContractViolation):
        machine.teardown()
