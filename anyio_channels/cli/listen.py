"""``anyio-channels listen``: messages as they come.

Rules:
- a group is heard through an inbox and costs nobody a message. A normal channel of the queue layer is read, which takes the
  messages from whoever should have had them.
- it says that it listens when a message sent from then on will be shown.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import datetime
from functools import partial
from typing import Any, Final

import click
from anyio import create_task_group, move_on_after
from rich.text import Text

from anyio_channels.contract.layer import BaseChannelLayer, Message
from anyio_channels.local.hub import Hub

from .options import Choice, Seconds, keeps_messages, layer_options
from .output import console, note, render, to_json, to_text, watch_reader, write
from .running import on_event, opened, run

__all__ = ["listen"]

_INBOX: Final = 10_000


@click.command()
@click.option("-g", "--group", "groups", multiple=True, metavar="GROUP", help="Listen to this group; may be repeated.")
@click.option("-n", "--count", type=click.IntRange(min=1), help="Stop after so many messages.")
@click.option(
    "--timeout",
    type=Seconds(min=0, min_open=True),
    metavar="SECONDS",
    help="Stop when no message came for so long.",
)
@click.option("--json", "as_json", is_flag=True, help="Print each message as one line of JSON.")
@layer_options("[CHANNEL]")
def listen(
    choice: Choice,
    channel: str | None,
    groups: tuple[str, ...],
    count: int | None,
    timeout: float | None,
    *,
    as_json: bool,
) -> None:
    """Print messages as they come.

    Those of CHANNEL, or of groups.

    Listening to groups joins them with a channel of its own: everybody else receives as before.

    Listening to a CHANNEL is reading it. On the queue layer (redis://) that TAKES its messages: whoever should have
    had them, a worker for instance, does not get them. On the pub/sub layer (redis+pubsub://) every reader gets a copy. A
    channel with a "!" in its name belongs to the process that made it; on the queue layer no other can read it.

    A message is printed as JSON. Bytes are {"__bytes__": "BASE64"}, which send takes as well. Where messages were
    missed (this command did not keep up, or Redis was away) there is {"type": "channel_layer.gap", "missed": N}.

    \b
    Examples:
      anyio-channels listen redis://localhost:6379/0 --group room --group news
      anyio-channels listen jobs --count 1 --timeout 5 --json
      anyio-channels listen -g room --json | jq .text

    With a wrong key or format (--key-file, ?serializer_format=) it cannot read what it takes: it stops at the first such message.

    Exit codes: 0 when --count messages came, or without --count it was stopped by Ctrl-C or --timeout; 1 when --timeout
    ended it before --count messages came, or the layer failed; 130 when Ctrl-C did, 143 when SIGTERM did; 2 when called
    wrongly.
    """
    if (channel is None) == (not groups):
        raise click.UsageError("name a CHANNEL to read, or groups with --group, and not both")
    layer = choice.make_shared_layer()
    _require_names(layer, channel, groups)
    run(choice, partial(_listen, choice, layer, channel, groups, count, timeout, as_json), endless=count is None)


def _require_names(layer: Any, channel: str | None, groups: tuple[str, ...]) -> None:
    try:
        for group in groups:
            layer.require_valid_group_name(group)
        if channel is not None:
            layer.require_valid_channel_name(channel)
    except TypeError as error:
        raise click.BadParameter(str(error), param_hint="--group" if groups else "CHANNEL") from error
    if channel is not None and "!" in channel and keeps_messages(layer):
        raise click.BadParameter(
            f"{channel!r} belongs to the process that made it, as all channels with a '!' do: on the queue layer no other "
            "process can read it. Listen to a group that it is in",
            param_hint="CHANNEL",
        )


async def _listen(
    choice: Choice,
    layer: BaseChannelLayer,
    channel: str | None,
    groups: tuple[str, ...],
    count: int | None,
    timeout: float | None,  # noqa: ASYNC109 - for each message
    as_json: bool,  # noqa: FBT001
) -> int:
    async with opened(layer, choice), _source(layer, channel, groups) as receive, create_task_group() as tasks:
        what = ", ".join(f"group {group}" for group in groups) or f"channel {channel}"
        takes = channel is not None and keeps_messages(layer)
        taking = ", taking its messages from whoever else reads it" if takes else ""
        note(f"Listening to {what} on {choice.shown}{taking} - Ctrl-C stops")
        tasks.start_soon(watch_reader)
        cannot_read = False

        def stop() -> None:
            nonlocal cannot_read
            if takes:  # each more would be lost as well
                cannot_read = True
                tasks.cancel_scope.cancel()

        with on_event("message.unreadable", stop):
            code = await _show(receive, count, timeout, as_json)
        tasks.cancel_scope.cancel()
    if cannot_read:
        raise click.ClickException(
            f"what came on channel {channel} was taken and cannot be read: give the key (--key-file) and the serializer_format "
            "of those who send"
        )
    return code


async def _show(
    receive: Callable[[], Awaitable[Message]],
    count: int | None,
    timeout: float | None,  # noqa: ASYNC109 - for each message
    as_json: bool,  # noqa: FBT001
) -> int:
    """Print messages until there were enough, or none came in time; return the exit code."""
    screen = console()
    seen = 0
    while count is None or seen < count:
        message: Message | None = None
        with move_on_after(timeout):
            message = await receive()
        if message is None:
            if count is None:
                return 0
            note(f"no message came for {timeout} s; {seen} of {count} did before")
            return 1
        seen += 1
        if as_json:
            await write(to_json(message))
        else:
            at = datetime.now().astimezone().strftime("%H:%M:%S.%f")[:-3]
            line = Text.assemble((f"{at} ", "dim"), to_text(message))
            await write(render(screen, line, soft_wrap=True))
    return 0


@asynccontextmanager
async def _source(
    layer: Any, channel: str | None, groups: tuple[str, ...]
) -> AsyncGenerator[Callable[[], Awaitable[Message]]]:
    if channel is None:
        async with layer.subscribe(*groups, capacity=_INBOX, on_gap="event") as inbox:
            yield inbox.receive
    else:
        if isinstance(layer, Hub):
            await layer._listen(channel)  # noqa: SLF001 - what receive() begins with; pub/sub keeps nothing until then
        yield partial(layer.receive, channel)
