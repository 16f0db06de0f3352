"""``anyio-channels groups``: who is in which group, looked at from outside."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import click
from rich import box
from rich.table import Table

from .options import Choice, layer_options
from .output import console, note, printable, render, to_json, write
from .running import Quiet, run

if TYPE_CHECKING:
    from anyio_channels.doctor.survey import RedisLayer

__all__ = ["groups"]


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print each group, or each member, as one line of JSON.")
@layer_options("[GROUP]")
def groups(choice: Choice, group: str | None, *, as_json: bool) -> None:
    """List groups, or the members of GROUP.

    The groups are those of the layer's prefix, in whatever process.

    On the queue layer "members" are the channels whose membership has not expired (group_expiry of the layer's URL; 86400
    seconds if it says nothing), in whatever process, of channels_redis too. "Seconds" is how long ago a member joined or was
    renewed: open inboxes renew theirs every third of group_expiry.

    On the pub/sub layer Redis knows only how many connections listen to a group: "processes", one for each layer that has a
    member. The members are known to their processes alone, so they are "-" here.

    It only reads. Finding the groups takes time in proportion to all keys of the database (SCAN).

    \b
    Examples:
      anyio-channels groups redis://localhost:6379/0
      anyio-channels groups room --json | jq -r .channel

    Exit codes: 0 listed (an empty list too), 1 Redis could not be asked, 2 called wrongly.
    """
    layer = choice.make_shared_layer()
    if group is not None:
        try:
            layer.require_valid_group_name(group)
        except TypeError as error:
            raise click.BadParameter(str(error), param_hint="GROUP") from error
    run(choice, partial(_groups, layer, group, as_json))


async def _groups(layer: RedisLayer, group: str | None, as_json: bool) -> int:  # noqa: FBT001
    from anyio_channels.doctor.survey import Survey  # noqa: PLC0415 - an optional extra

    async with Quiet(), Survey(layer) as survey:
        await survey.require()
        members = None if group is None else await survey.members(group)
        look = await survey.look() if members is None else None
    if look is None:
        rows = [{"channel": name, "seconds": round(seconds, 3)} for name, seconds in (members or {}).items()]
        await _print(rows, f"no members in group {group}", as_json)
        return 0
    found = [
        {"group": one.name, "members": one.members, "processes": one.processes}
        for one in look.groups
        if group in {None, one.name}
    ]
    for server in look.servers:
        if server.error is not None:
            note(f"warning: not asked: {server.error}")
    await _print(found, "no groups" if group is None else f"nobody listens to group {group}", as_json)
    if group is not None and not as_json:
        note("Who the members are only their processes know: this is the pub/sub layer.")
    return 1 if any(server.error is not None for server in look.servers) else 0


async def _print(rows: list[dict[str, Any]], nothing: str, as_json: bool) -> None:  # noqa: FBT001
    if as_json:
        for row in rows:
            await write(to_json(row))
    elif rows:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
        for name, value in rows[0].items():
            table.add_column(name, justify="left" if isinstance(value, str) else "right", overflow="fold")
        for row in rows:
            table.add_row(*("-" if value is None else printable(str(value)) for value in row.values()))
        await write(render(console(), table))
    else:
        note(nothing)
