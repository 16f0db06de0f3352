"""``anyio-channels bench``: how fast this machine is, and this Redis.

Rules:
- what is measured has a prefix of its own. All of it is removed, also after Ctrl-C; if this process is killed, Redis forgets
  it within two minutes by itself.
- Redis is opened first: where it is away, nobody waits for the other figures to hear of it. What was measured before an error
  is printed all the same.
- figures of different machines, or of a busy machine, cannot be compared: it says which Python and backend it ran on.
"""

from __future__ import annotations

import platform
import secrets
import time
from array import array
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import click
from anyio import CancelScope, create_task_group, current_time, get_cancelled_exc_class, move_on_after
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from anyio_channels.contract.layer import BaseChannelLayer, Inbox
from anyio_channels.memory import InMemoryChannelLayer

from .options import Choice, Seconds, layer_options
from .output import console, note, render, to_json, write
from .running import TROUBLES, Quiet, opened, run

__all__ = ["bench"]

_MEMBERS: Final = 100
_AT_ONCE: Final = 50
_REFRESH: Final = 0.1
_LIFE: Final = 60.0
_CLEANING: Final = 10.0
_NEVER: Final = float("inf")
_MESSAGE: Final = {"type": "chat.message", "text": "hello", "id": 12345}


@dataclass(frozen=True, slots=True)
class _Result:
    """What one measurement said: operations a second, and microseconds of each."""

    layer: str
    what: str
    count: int
    per_second: float
    mean: float
    p50: float
    p99: float


@click.command()
@click.option(
    "--seconds",
    type=Seconds(min=0, min_open=True),
    default=60.0,
    show_default=True,
    help="How long all measurements take together.",
)
@click.option("--json", "as_json", is_flag=True, help="Print each measurement as one line of JSON.")
@layer_options(default="memory://")
def bench(choice: Choice, seconds: float, *, as_json: bool) -> None:
    """Measure this machine and its Redis.

    The in-memory layer, and the layer at URL if one is given.

    \b
    What is measured, with a message of three short values, in one process:
      send + receive     a task sends to its inbox and receives, again and again
      50 at once         50 such tasks, in Redis only; us is what each waits
      group_send to 100  a broadcast, until all of 100 inboxes have received it;
                         op/s counts broadcasts

    op/s is operations a second, us the microseconds of one: mean, median (p50), and what 99 of 100 stay below (p99).
    The URL may be in the environment variable ANYIO_CHANNELS_URL instead.

    In Redis it uses a prefix of its own, the layer's with "-bench-" and a number behind it, and leaves nothing there.
    It keeps one core, and Redis, busy: not for a Redis that is in use.

    \b
    Examples:
      anyio-channels bench
      anyio-channels bench redis://localhost:6379/0 --seconds 10
      anyio-channels bench redis+pubsub://localhost:6379/0 --backend trio --json

    Exit codes: 0 measured, 1 the layer could not be reached, 2 called wrongly, 130 stopped by Ctrl-C.
    """
    run(choice, partial(_bench, choice, choice.make_layer(), seconds, as_json))


async def _bench(choice: Choice, layer: BaseChannelLayer, seconds: float, as_json: bool) -> int:  # noqa: FBT001
    in_memory = isinstance(layer, InMemoryChannelLayer)
    share = seconds / (len(_IN_MEMORY) + (0 if in_memory else len(_IN_REDIS)))
    results: list[_Result] = []
    memory = layer if in_memory else InMemoryChannelLayer()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeRemainingColumn(),
    )
    bars = Console(stderr=True)
    bars.quiet = not bars.is_terminal
    try:
        with Progress(*columns, console=bars, auto_refresh=False, transient=True, disable=bars.quiet) as progress:
            async with nullcontext() if in_memory else _apart(choice, layer) as redis:
                async with opened(memory, choice):
                    await _measure_all(results, "memory", memory, _IN_MEMORY, share, progress)
                if redis is not None:
                    scheme = choice.shown.partition("://")[0]
                    await _measure_all(results, scheme, redis, _IN_REDIS, share, progress)
    except Exception:
        await _print(choice, results, as_json)
        raise
    await _print(choice, results, as_json)
    return 0


async def _print(choice: Choice, results: list[_Result], as_json: bool) -> None:  # noqa: FBT001
    if as_json:
        for one in results:
            values = {field: getattr(one, field) for field in _Result.__slots__}
            await write(to_json({**values, "backend": choice.backend, "python": platform.python_version()}))
    elif results:
        await write(render(console(), _table(choice, results)))


@asynccontextmanager
async def _apart(choice: Choice, layer: Any) -> AsyncGenerator[BaseChannelLayer]:
    """Have a layer like ``layer`` open, with a prefix that nobody has; nothing of it is there afterwards."""
    make = partial(choice.make_layer_apart, f"{layer.options.prefix}-bench-{secrets.token_hex(6)}", _LIFE)
    is_refused = True
    try:
        async with opened(make(), choice) as own:
            is_refused = False
            yield own
    except get_cancelled_exc_class():
        is_refused = False  # it may have written already
        raise
    finally:
        if not is_refused:
            with move_on_after(_CLEANING, shield=True):
                await _tidy_up(make())


async def _tidy_up(layer: Any) -> None:
    from anyio_channels.doctor.survey import Survey  # noqa: PLC0415 - an optional extra

    try:
        async with Quiet(), Survey(layer) as survey:
            await survey.require()
            await survey.erase()
    except TROUBLES:
        note("warning: Redis could not be tidied up; what is left expires there within two minutes")


async def _measure_all(
    results: list[_Result],
    name: str,
    layer: BaseChannelLayer,
    kinds: dict[str, _Measure],
    seconds: float,
    progress: Progress,
) -> None:
    """Add what is measured to ``results``, one after the other."""
    for what, measure in kinds.items():
        task = progress.add_task(f"{name}: {what}", total=seconds)
        patience = 2 * getattr(layer, "timeout", _NEVER)
        with move_on_after(patience) as scope:
            clock = _Clock(seconds, progress, task, scope, patience)
            await measure(layer, clock)
        if scope.cancelled_caught:
            raise click.ClickException(f"nothing came back from {name} for {patience:g} seconds; is Redis away?")
        results.append(clock.result(name, what))


class _Clock:
    """Takes the times of one measurement, and says when it is over."""

    def __init__(self, seconds: float, progress: Progress, task: TaskID, scope: CancelScope, patience: float) -> None:
        self.times = array("d")
        self._scope = scope
        self._patience = patience
        self._progress = progress
        self._task = task
        self._seconds = seconds
        self.start()

    def start(self) -> float:
        """Begin now, for what is needed is there; return the time."""
        self._began = self._shown = self._ended = time.perf_counter()
        self._ends = self._began + self._seconds
        return self._began

    def took(self, since: float) -> float | None:
        """Note one operation; return the time, or ``None`` when the time is over."""
        now = self._ended = time.perf_counter()
        self.times.append(now - since)
        if now - self._shown > _REFRESH:
            self._shown = now
            self._scope.deadline = current_time() + self._patience
            self._progress.update(self._task, completed=now - self._began, refresh=True)
        return now if now < self._ends else None

    def result(self, layer: str, what: str) -> _Result:
        """Return what was measured."""
        self._progress.update(self._task, completed=self._ends - self._began, refresh=True)
        times = sorted(self.times)
        count = len(times)
        return _Result(
            layer,
            what,
            count,
            round(count / (self._ended - self._began), 1),
            round(sum(times) / count * 1e6, 1),
            round(times[count // 2] * 1e6, 1),
            round(times[count * 99 // 100] * 1e6, 1),
        )


async def _one(layer: BaseChannelLayer, clock: _Clock) -> None:
    async with layer.subscribe() as inbox:
        await _to_and_fro(layer, inbox, clock, clock.start())


async def _to_and_fro(layer: BaseChannelLayer, inbox: Inbox, clock: _Clock, since: float) -> None:
    now: float | None = since
    while now is not None:
        await layer.send(inbox.channel, _MESSAGE)
        await inbox.receive()
        now = clock.took(now)


async def _many(layer: BaseChannelLayer, clock: _Clock) -> None:
    async with _inboxes(layer, _AT_ONCE) as inboxes, create_task_group() as tasks:
        since = clock.start()
        for inbox in inboxes:
            tasks.start_soon(_to_and_fro, layer, inbox, clock, since)


async def _broadcast(layer: BaseChannelLayer, clock: _Clock) -> None:
    async with _inboxes(layer, _MEMBERS, "room") as inboxes:
        now: float | None = clock.start()
        while now is not None:
            await layer.group_send("room", _MESSAGE)
            for inbox in inboxes:
                await inbox.receive()
            now = clock.took(now)


@asynccontextmanager
async def _inboxes(layer: BaseChannelLayer, count: int, *groups: str) -> AsyncGenerator[list[Inbox]]:
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(layer.subscribe(*groups)) for _ in range(count)]


_Measure = Callable[[BaseChannelLayer, _Clock], Awaitable[None]]
_IN_MEMORY: Final[dict[str, _Measure]] = {
    "send + receive": _one,
    f"group_send to {_MEMBERS}": _broadcast,
}
_IN_REDIS: Final[dict[str, _Measure]] = {
    "send + receive": _one,
    f"{_AT_ONCE} at once": _many,
    f"group_send to {_MEMBERS}": _broadcast,
}


def _table(choice: Choice, results: list[_Result]) -> Table:
    title = f"Python {platform.python_version()}, {choice.backend}, {platform.system()} {platform.machine()}"
    table = Table(
        box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, title=title, title_justify="left", title_style="dim"
    )
    for column, justify in (("layer", "left"), ("operation", "left"), ("op/s", "right")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type] # a literal, seen as str
    for column in ("us mean", "us p50", "us p99"):
        table.add_column(column, justify="right")
    for one in results:
        times = (f"{value:,.1f}" for value in (one.mean, one.p50, one.p99))
        table.add_row(one.layer, one.what, f"{one.per_second:,.0f}", *times)
    return table
