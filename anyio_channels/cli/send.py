"""``anyio-channels send`` and ``group-send``: messages from the command line, or line by line from a pipe.

Rules:
- a message is a JSON object. One that is wrong stops it, says which line it was, and how many were sent before.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from functools import partial
from typing import Any

import click
from anyio import get_cancelled_exc_class

from anyio_channels.contract.layer import BaseChannelLayer, Message
from anyio_channels.exceptions import ChannelFull, MessageTooLarge

from .options import Choice, keeps_messages, layer_options
from .output import from_json, note, printable, read_chunk, to_json, write
from .running import TROUBLES, opened, run

__all__ = ["group_send", "send"]

_as_json = click.option("--json", "as_json", is_flag=True, help="Print what was done as JSON.")


@click.command()
@click.option("--wait", is_flag=True, help="Wait for room in a full channel (queue layer) instead of failing.")
@_as_json
@layer_options("CHANNEL MESSAGE")
def send(choice: Choice, channel: str, message: str, *, wait: bool, as_json: bool) -> None:
    """Send MESSAGE to CHANNEL.

    MESSAGE is a JSON object, by custom with a "type"; or "-" to send each line of standard input as one. In quotes,
    for the shell: '{"type": "chat.message"}'. Bytes are written as {"__bytes__": "BASE64"}.

    On the queue layer the message waits for its reader until it expires, and a full channel is an error, unless --wait is
    given. On the pub/sub layer nobody may be reading, which cannot be seen from here: the message is lost then.

    \b
    Examples:
      anyio-channels send redis://localhost jobs '{"type": "resize", "id": 7}'
      cat jobs.jsonl | anyio-channels send jobs - --wait
      anyio-channels send "specific.0a1b!2c3d" '{"type": "chat.message"}'

    Exit codes: 0 sent, 1 not sent (or not all lines), 2 called wrongly or a message that is none, 130 stopped by Ctrl-C.
    """
    layer = choice.make_shared_layer()
    _require(layer.require_valid_channel_name, channel, "CHANNEL")
    first = None if message == "-" else _parse(message, "MESSAGE")

    async def send_one(one: Message) -> None:
        await layer.send(channel, one, wait=wait)

    run(choice, partial(_send, choice, layer, "channel", channel, first, send_one, as_json))


@click.command("group-send")
@click.option("--exclude", multiple=True, metavar="CHANNEL", help="A member that is not to get it; may be repeated.")
@_as_json
@layer_options("GROUP MESSAGE")
def group_send(choice: Choice, group: str, message: str, exclude: tuple[str, ...], *, as_json: bool) -> None:
    """Send MESSAGE to every member of GROUP.

    MESSAGE is a JSON object, or "-" for one in each line of standard input, as for send. A member that is full misses it;
    on the queue layer that is counted here. On the pub/sub layer only the members' processes know who they are.

    \b
    Examples:
      anyio-channels group-send room '{"type": "chat.message", "text": "hi"}'
      anyio-channels group-send room '{"type": "x"}' --exclude "a.0a1b!2c3d"

    Exit codes: 0 sent (to however many members), 1 not sent (or not all lines), 2 called wrongly or a message that is none,
    130 stopped by Ctrl-C.
    """
    layer = choice.make_shared_layer()
    _require(layer.require_valid_group_name, group, "GROUP")
    for name in exclude:
        _require(layer.require_valid_channel_name, name, "--exclude")
    first = None if message == "-" else _parse(message, "MESSAGE")

    async def send_one(one: Message) -> None:
        await layer.group_send(group, one, exclude=exclude)

    run(choice, partial(_send, choice, layer, "group", group, first, send_one, as_json))


def _require(check: Callable[[str], object], name: str, where: str) -> None:
    try:
        check(name)
    except TypeError as error:
        raise click.BadParameter(str(error), param_hint=where) from error


def _parse(text: str, where: str) -> Message:
    try:
        message = from_json(text)
        if not isinstance(message, dict):
            raise ValueError(f'it must be an object, as {{"type": "chat.message"}}, not {text!r:.60}')  # noqa: TRY004, TRY301
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint=where) from error
    return message


async def _send(
    choice: Choice,
    layer: BaseChannelLayer,
    kind: str,
    name: str,
    first: Message | None,
    send_one: Callable[[Message], Awaitable[None]],
    as_json: bool,  # noqa: FBT001
) -> int:
    sent = 0
    where = under_way = ""
    async with opened(layer, choice):
        if first is not None:
            await _send_checked(send_one, first, "MESSAGE")
            sent = 1
        else:
            try:
                async with aclosing(_lines()) as lines:
                    async for number, line in lines:
                        where = f"line {number} of standard input"
                        message = _parse(line, where)
                        under_way = f"; {where} may have been sent too"
                        await _send_checked(send_one, message, where)
                        sent += 1
                        under_way = ""
            except get_cancelled_exc_class():
                note(f"{_counted(sent, 'message')} sent before that{under_way}")
                raise
            except click.ClickException:
                note(f"{_counted(sent, 'message')} sent before that")
                raise
            except TROUBLES as error:
                may = under_way if getattr(error, "may_have_run", False) else ""
                note(f"{_counted(sent, 'message')} sent before that{may}")
                raise click.ClickException(
                    printable(f"{where}: {choice.censor(error)}" if under_way else choice.censor(error))
                ) from error
        done = _account(layer, kind, name, sent)
    await write(to_json(done) if as_json else _sentence(done, f"{kind} {name}"))
    return 0


async def _send_checked(send_one: Callable[[Message], Awaitable[None]], message: Message, where: str) -> None:
    try:
        await send_one(message)
    except (TypeError, MessageTooLarge) as error:
        raise click.BadParameter(str(error), param_hint=where) from error
    except ChannelFull as error:
        line = "" if where == "MESSAGE" else f"{where}: "
        raise click.ClickException(f"{line}{error}; --wait waits for room") from error


async def _lines() -> AsyncGenerator[tuple[int, str]]:
    """Yield the lines of standard input that are not blank, as they come, with their numbers."""
    number = 0
    rest: list[bytes] = []
    while True:
        chunk = await read_chunk()
        *whole, last = chunk.split(b"\n") if chunk else (b"", b"")
        for line in whole:
            number += 1
            text = b"".join([*rest, line]).strip()
            rest = []
            if text:
                yield number, text.decode("utf-8", "surrogateescape")
        if not chunk:
            return
        rest.append(last)


def _account(layer: Any, kind: str, name: str, sent: int) -> dict[str, Any]:
    """Return what was done; members are known on the queue layer only."""
    done: dict[str, Any] = {kind: name, "sent": sent}
    if kind == "group":
        statistics = layer.statistics() if keeps_messages(layer) else None
        done["members"] = None if statistics is None else statistics.sent
        done["missed"] = None if statistics is None else statistics.dropped_full
    return done


def _sentence(done: dict[str, Any], to: str) -> str:
    text = f"sent {_counted(done['sent'], 'message')} to {to}"
    if done.get("members") is not None:
        text += f": {_counted(done['members'] - done['missed'], 'copy', 'copies')} to members"
        text += f", {done['missed']} missed by members who were full" if done["missed"] else ""
    return text


def _counted(number: int, what: str, many: str = "") -> str:
    return f"{number} {what if number == 1 else many or what + 's'}"
