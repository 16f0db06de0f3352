"""``anyio-channels stats``: what waits in Redis, in a table that refreshes.

Rules:
- what cannot be known from outside is "-", or ``null`` in JSON; nothing is guessed.
- while a server is away the table says so, and goes on.
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from functools import partial
from typing import Any

import click
from anyio import sleep
from rich import box
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from anyio_channels.contract.layer import BaseChannelLayer

from .options import Choice, Seconds, keeps_messages, layer_options
from .output import console, is_terminal, printable, render, to_json, write
from .running import Quiet, run

__all__ = ["stats"]


@click.command()
@click.option(
    "--interval",
    type=Seconds(min=0.1),
    default=2.0,
    show_default=True,
    metavar="SECONDS",
    help="How often to look.",
)
@click.option("--once", is_flag=True, help="Print one table, after two looks --interval apart, and stop.")
@click.option(
    "--top", type=click.IntRange(min=0), default=10, show_default=True, help="How many channels and groups to list."
)
@click.option("--json", "as_json", is_flag=True, help="Print each look as one line of JSON.")
@layer_options()
def stats(choice: Choice, interval: float, top: int, *, once: bool, as_json: bool) -> None:
    """Show what is in Redis, live.

    Channels, depth, groups, members and rates, again and again.

    It looks at Redis from outside and writes nothing. Where Redis cannot know a figure, it is "-".

    \b
    What is there, now:
      channels   queue: keys with unexpired messages; one key holds those of
                 all channels of a process (its name ends in "!").
                 pub/sub: Redis channels that somebody listens to, of whatever
                 prefix, for they carry none.
      depth      queue: unexpired messages that wait in Redis. What a process
                 has fetched and not yet read is not seen.
      change/s   how fast the depth changes: what came less what went.
      full       the depth has reached the capacity of this layer's URL: who
                 sends there without waiting is refused, or the message missed.
      listeners  pub/sub: connections, one for each layer that listens.
      groups     those of this prefix that have a member.
      members    queue: memberships that have not expired.
      processes  pub/sub: connections that listen to the group; who the members
                 are only their processes know.
      drops      "-": a message that was dropped is counted where it happened,
                 in the statistics() of that process.

    \b
    A second, of whole servers: all clients, prefixes and databases.
      ZADD       messages and memberships of the queue layer, on their way in
      ZPOPMIN, BZPOPMIN
                 the queue layer's reading, in vain too
      PUBLISH    messages of the pub/sub layer; in a cluster, SPUBLISH
      evicted    keys thrown away because maxmemory was reached
      cut off    clients disconnected because they read too slowly (newer Redis)

    Calls are those of INFO commandstats, between two looks. The first look has nothing before it to compare with.

    A look takes time in proportion to all keys of the database (SCAN); choose a long --interval for a large one.

    \b
    Examples:
      anyio-channels stats redis://localhost:6379/0
      anyio-channels stats --once --json | jq .depth

    Exit codes: 0 printed, or stopped by Ctrl-C; 1 Redis could not be asked; 2 called wrongly.
    """
    run(choice, partial(_stats, choice, choice.make_shared_layer(), interval, top, once, as_json), endless=not once)


async def _stats(
    choice: Choice,
    layer: Any,
    interval: float,
    top: int,
    once: bool,  # noqa: FBT001
    as_json: bool,  # noqa: FBT001
) -> int:
    from anyio_channels.doctor.survey import Survey  # noqa: PLC0415 - an optional extra

    screen = console()
    is_live = is_terminal() and not (screen.is_dumb_terminal or once or as_json)
    live = Live(console=screen, auto_refresh=False, vertical_overflow="crop") if is_live else None
    async with Quiet(), Survey(layer) as survey:
        await survey.require()
        before = await survey.look()
        if once:
            await sleep(interval)
        with live or nullcontext():
            while True:
                look = await survey.look()
                values = _values(layer, before, look, top)
                if as_json:
                    await write(to_json(values))
                elif live is not None:
                    live.update(_tables(choice, layer, values), refresh=True)
                else:
                    await write(render(screen, _tables(choice, layer, values)))
                if once:
                    return 1 if all(server.error is not None for server in look.servers) else 0
                before = look
                await sleep(interval)


def _values(layer: BaseChannelLayer, before: Any, look: Any, top: int) -> dict[str, Any]:
    """Return what one look says, as it is printed in JSON."""
    rates = look.rates_since(before)
    seconds = max(server.at for server in look.servers) - max(server.at for server in before.servers)
    depths = {channel.name: channel.depth for channel in before.channels}
    channels = sorted(look.channels, key=lambda one: -(one.depth or one.listeners or 0))
    groups = sorted(look.groups, key=lambda one: -(one.members or one.processes or 0))
    is_queue = keeps_messages(layer)
    return {
        "at": round(time.time(), 3),
        "channels": len(look.channels),
        "depth": look.depth if is_queue else None,
        "full": sum(_is_full(one) for one in look.channels) if is_queue else None,
        "groups": len(look.groups),
        "members": look.members if is_queue else None,
        "drops": None,
        "foreign_keys": look.foreign if is_queue else None,
        "calls_per_second": {name: _rounded(rate) for name, rate in rates.commands.items()},
        "evicted_per_second": _rounded(rates.evicted_keys),
        "cut_off_per_second": _rounded(rates.cut_off),
        "top_channels": [
            {
                "channel": one.name,
                "depth": one.depth,
                "change_per_second": _change(one.depth, depths.get(one.name, 0), seconds),
                "full": _is_full(one) if is_queue else None,
                "listeners": one.listeners,
            }
            for one in channels[:top]
        ],
        "top_groups": [{"group": one.name, "members": one.members, "processes": one.processes} for one in groups[:top]],
        "servers": [
            {"server": one.name, "error": one.error, "used_memory": one.number("used_memory")} for one in look.servers
        ],
    }


def _is_full(channel: Any) -> bool:
    return channel.depth is not None and channel.depth >= channel.capacity


def _rounded(rate: float | None) -> float | None:
    return None if rate is None else round(rate, 1)


def _change(now: int | None, before: int | None, seconds: float) -> float | None:
    return None if now is None or before is None or seconds <= 0 else round((now - before) / seconds, 1)


def _tables(choice: Choice, layer: Any, values: dict[str, Any]) -> Group:
    kind = "queue" if keeps_messages(layer) else "pub/sub"
    at = time.strftime("%H:%M:%S", time.localtime(values["at"]))
    parts: list[Any] = [Text(f"{choice.shown}  {kind} layer, prefix {layer.options.prefix!r}  {at}", style="bold")]
    parts += [
        Text(printable(f"{one['error']}"), style="bold red") for one in values["servers"] if one["error"] is not None
    ]
    parts.append(_row({name: values[name] for name in ("channels", "depth", "groups", "members", "drops")}))
    ours = (
        ("zadd", "zpopmin", "bzpopmin") if kind == "queue" else ("spublish",) if layer.options.cluster else ("publish",)
    )
    calls = {name.upper(): values["calls_per_second"][name] for name in ours}
    parts.append(
        _row(
            {**calls, "evicted": values["evicted_per_second"], "cut off": values["cut_off_per_second"]},
            "a second, all clients",
        )
    )
    if kind == "queue":
        parts.append(
            _list(
                values["top_channels"],
                {"channel": "channel", "depth": "depth", "change_per_second": "change/s", "full": ""},
            )
        )
        parts.append(_list(values["top_groups"], {"group": "group", "members": "members"}))
    else:
        parts.append(_list(values["top_channels"], {"channel": "channel", "listeners": "listeners"}))
        parts.append(_list(values["top_groups"], {"group": "group", "processes": "processes"}))
    if values["foreign_keys"]:
        parts.append(
            Text(f"{values['foreign_keys']} keys under the prefix are not the layer's: see doctor", style="yellow")
        )
    return Group(*[thing for part in parts for thing in (part, "")][:-1])


def _row(values: dict[str, Any], title: str | None = None) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, title=title, title_justify="left", title_style="dim"
    )
    for name in values:
        table.add_column(name, justify="right")
    table.add_row(*(_shown(value) for value in values.values()))
    return table


def _list(rows: list[dict[str, Any]], columns: dict[str, str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for number, title in enumerate(columns.values()):
        table.add_column(title, justify="right" if number else "left", overflow="fold")
    for row in rows:
        table.add_row(*(_shown(row[name]) for name in columns))
    return table


def _shown(value: Any) -> Text:
    match value:
        case None:
            return Text("-", style="dim")
        case True:
            return Text("full", style="bold red")
        case False:
            return Text("")
        case float():
            return Text(f"{value:,.1f}")
        case int():
            return Text(f"{value:,}")
    return Text(printable(str(value)))
