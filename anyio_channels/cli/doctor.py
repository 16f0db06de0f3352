"""``anyio-channels doctor``: whether Redis is as the layer needs it, and what to do if not."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Final

import click
from rich import box
from rich.table import Table
from rich.text import Text

from .options import Choice, layer_options
from .output import console, printable, render, to_json, write
from .running import Quiet, run

if TYPE_CHECKING:
    from anyio_channels.doctor.survey import RedisLayer

__all__ = ["doctor"]

_STYLES: Final = {"ok": "green", "warning": "yellow", "wrong": "bold red", "unknown": "cyan"}


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print each check as one line of JSON.")
@layer_options()
def doctor(choice: Choice, *, as_json: bool) -> None:
    """Check a Redis, and say what to do.

    It is that of the layer at URL.

    \b
    Each server:
      reached           connection, TLS, user and password
      version           6.2 or newer; in a cluster 7, for sharded pub/sub
      role              a primary, and a cluster only if the URL says so
      latency           the time of a round trip
      maxmemory-policy  one that evicts throws messages and members away
      memory            how much of maxmemory is used
      persistence       not needed; where it fails Redis may refuse writes
      clock             beside the clock of this machine
      commands          every call that the layer makes, tried for real:
                        permissions, scripts, memory

    \b
    The whole:
      clocks of the servers
                        beside each other
      prefix            another one that begins with it, or it with another
      keys              under the prefix that are not the layer's
      messages          sent to a channel and to a group, and received

    The URL may be in the environment variable ANYIO_CHANNELS_URL instead.

    What is tried has names of its own under the prefix, and is removed. "warning" is worth a look; "unknown" is what this user
    must not ask; "wrong" keeps the layer from working, or loses messages.

    \b
    Examples:
      anyio-channels doctor redis://localhost:6379/0
      anyio-channels doctor redis+pubsub://localhost:6379/0 --json | jq .advice

    Exit codes: 0 nothing is wrong (there may be warnings), 1 something is, 2 called wrongly, 130 stopped by Ctrl-C.
    """
    run(choice, partial(_doctor, choice, choice.make_shared_layer(), choice.make_shared_layer(), as_json))


async def _doctor(choice: Choice, layer: RedisLayer, trial: RedisLayer, as_json: bool) -> int:  # noqa: FBT001
    from anyio_channels.doctor.checkup import check_up  # noqa: PLC0415 - an optional extra

    async with Quiet():
        findings = await check_up(layer, trial)
    if as_json:
        for finding in findings:
            row = {
                name: choice.censor(value) if isinstance(value, str) else value
                for name, value in asdict(finding).items()
            }
            await write(to_json(row))
    else:
        several = len({finding.server for finding in findings} - {None}) > 1
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
        table.add_column("check")
        table.add_column("result")
        table.add_column("found", overflow="fold")
        for finding in findings:
            found = Text(printable(choice.censor(finding.found)))
            if several and finding.server is not None:
                found = Text(f"{finding.server}: ", style="dim").append_text(Text(found.plain, style=""))
            if finding.advice:
                found.append(f"\n-> {printable(finding.advice)}", style=_STYLES[finding.verdict])
            table.add_row(finding.check, Text(finding.verdict, style=_STYLES[finding.verdict]), found)
        await write(render(console(), table))
    return 1 if any(finding.verdict == "wrong" for finding in findings) else 0
