"""listen, send and group-send, between processes and beside channels_redis."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from anyio import fail_after, to_thread
from command_line import SCRIPT, Running, Terminal, environment, refused, run
from layers_on_redis import PUBSUB, QUEUE, Kind, both, new_prefix
from redis_server import RedisServer, wait_until
from test_interop import side_by_side

from anyio_channels import create_channel_layer
from anyio_channels.cli import main
from anyio_channels.cli.output import from_json, printable, to_json, to_text
from anyio_channels.sync import SyncChannelLayer

backends = pytest.mark.parametrize("backend", ["asyncio", "trio"])
one_of_each = pytest.mark.parametrize(
    ("kind", "backend"), [(QUEUE, "asyncio"), (PUBSUB, "trio")], ids=["queue-asyncio", "pubsub-trio"]
)


def url_of(server: RedisServer, kind: Kind, **options: object) -> str:
    """The URL of a layer with a prefix of its own, and options."""
    scheme = "redis" if kind is QUEUE else "redis+pubsub"
    query = "&".join(f"{name}={value}" for name, value in {"prefix": new_prefix(), **options}.items())
    return f"{scheme}://{server.host}:{server.port}/0?{query}"


@contextmanager
def listening(*arguments: str, **options: Any) -> Iterator[Running]:
    """The command listen, from when it says so."""
    with Running("listen", "--timeout", "60", *arguments, **options) as script:
        assert script.errors.readline().startswith("Listening to ")
        yield script


@one_of_each
def test_what_is_sent_to_a_group_is_heard(kind: Kind, backend: str, redis_server: RedisServer) -> None:
    """listen prints what group-send sends to any of its groups, and ends after --count messages."""
    url = url_of(redis_server, kind)
    with listening("-g", "one", "-g", "two", "--count", "2", "--json", "--layer", url, "--backend", backend) as script:
        sent = run("group-send", "one", '{"type": "a", "n": 1}', "--layer", url, "--backend", backend)
        assert (sent.returncode, sent.stderr) == (0, "")
        copies = ": 1 copy to members" if kind is QUEUE else ""
        assert sent.stdout == f"sent 1 message to group one{copies}\n"
        again = run("group-send", "two", "-", "--json", "--layer", url, input='\n{"type": "b"}\n')
        assert again.returncode == 0
        known = (1, 0) if kind is QUEUE else (None, None)
        assert json.loads(again.stdout) == {"group": "two", "sent": 1, "members": known[0], "missed": known[1]}
        code, out, err = script.wait()
    assert [json.loads(line) for line in out.splitlines()] == [{"type": "a", "n": 1}, {"type": "b"}]
    assert (code, err) == (0, "")


@one_of_each
def test_what_is_sent_to_a_channel_is_heard(kind: Kind, backend: str, redis_server: RedisServer) -> None:
    """listen reads a normal channel; on the queue layer it says that this takes the messages."""
    url = url_of(redis_server, kind)
    with Running(
        "listen", f"jobs.{kind.name}", "-n", "1", "--timeout", "60", "--layer", url, "--backend", backend
    ) as script:
        assert ("taking its messages" in script.errors.readline()) == (kind is QUEUE)
        sent = run("send", f"jobs.{kind.name}", '{"type": "job", "text": "h\u00e9"}', "--layer", url)
        assert (sent.returncode, sent.stdout) == (0, f"sent 1 message to channel jobs.{kind.name}\n")
        code, out, _ = script.wait()
    assert code == 0
    assert out.partition(" ")[2] == '{"type": "job", "text": "h\u00e9"}\n'


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@both
async def test_beside_channels_redis(kind: Kind, redis_server: RedisServer) -> None:
    """listen hears what channels_redis sends, channels_redis receives what send sends, and groups lists what it made."""
    async with side_by_side("channels_redis", kind, redis_server) as (_, peer):
        scheme = "redis" if kind is QUEUE else "redis+pubsub"
        url = f"{scheme}://{redis_server.host}:{redis_server.port}/0?prefix={peer.layer.prefix}"
        mine = await peer.call("new_channel")
        await peer.call("group_add", "theirs", mine)
        listed = await to_thread.run_sync(lambda: run("groups", "--json", "--layer", url))
        known = {"members": 1, "processes": None} if kind is QUEUE else {"members": None, "processes": 1}
        assert json.loads(listed.stdout) == {"group": "theirs", **known}

        sent = await to_thread.run_sync(lambda: run("send", mine, '{"type": "to.them"}', "--layer", url))
        assert sent.returncode == 0
        assert await peer.call("receive", mine) == {"type": "to.them"}
        sent = await to_thread.run_sync(lambda: run("group-send", "theirs", '{"type": "to.all"}', "--layer", url))
        assert sent.returncode == 0
        assert await peer.call("receive", mine) == {"type": "to.all"}

        with fail_after(60):
            script = await to_thread.run_sync(
                lambda: Running("listen", "-g", "theirs", "-n", "1", "--timeout", "60", "--json", "--layer", url)
            )
            with script:
                await to_thread.run_sync(script.errors.readline)
                await peer.call("group_send", "theirs", {"type": "from.them"})
                assert json.loads(await to_thread.run_sync(script.output.readline)) == {"type": "from.them"}
                await to_thread.run_sync(script.wait)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
@backends
def test_listening_ends_by_a_signal(backend: str, number: int, redis_server: RedisServer) -> None:
    """A signal ends listen in order, with exit code 0, and its membership with it."""
    url = url_of(redis_server, QUEUE)
    with listening("-g", "room", "--layer", url, "--backend", backend) as script:
        assert script.end(number) == (0, "", "")
    with SyncChannelLayer(create_channel_layer(url)) as layer:
        assert layer.group_channels("room") == set()
    with listening("-g", "room", "--layer", url, "--backend", backend, "--count", "1") as script:
        assert script.end(number) == (128 + number, "", "")  # what it waited for did not come


def test_timeout(redis_server: RedisServer) -> None:
    """Without a message for --timeout seconds, listen ends: with 1 if it was to --count some."""
    options = ("listen", "-g", "room", "--timeout", "0.05", "--layer", url_of(redis_server, QUEUE))
    assert run(*options).returncode == 0
    result = run(*options, "--count", "1")
    assert result.returncode == 1
    assert result.stderr.endswith("\nno message came for 0.05 s; 0 of 1 did before\n")


def test_encrypted(redis_server: RedisServer, tmp_path: Path) -> None:
    """Keys are taken from the command line, a file and the environment, and need not be on the command line."""
    url = url_of(redis_server, QUEUE)
    path = tmp_path / "keys"
    path.write_text("first\n\nsecond\n")
    assert run("send", "jobs", '{"n": 1}', "--layer", url, "--key", "second").returncode == 0
    assert run("send", "jobs", '{"n": 2}', "--layer", url, env=environment(ANYIO_CHANNELS_KEY="first")).returncode == 0
    for number in (3, 4):
        assert run("send", "jobs", json.dumps({"n": number}), "--layer", url).returncode == 0
    result = run("listen", "jobs", "--json", "--count", "3", "--timeout", "60", "--layer", url, "--key-file", str(path))
    assert result.returncode == 1
    assert [json.loads(line) for line in result.stdout.splitlines()] == [{"n": 1}, {"n": 2}]
    assert "warning: skipped what is no message of ours on " in result.stderr
    assert "Error: what came on channel jobs was taken and cannot be read: give the key" in result.stderr
    with SyncChannelLayer(create_channel_layer(url)) as layer:
        assert layer.receive("jobs", timeout=60) == {"n": 4}  # it stopped at the first, and took no more


def test_what_cannot_be_read_on_groups_ends_nothing(redis_server: RedisServer) -> None:
    """A broadcast that this process cannot read is everybody else's too: it is said, and listening goes on."""
    url = url_of(redis_server, QUEUE)
    with listening("-g", "room", "--json", "--layer", url) as script:
        assert run("group-send", "room", '{"n": 1}', "--layer", url, "--key", "secret").returncode == 0
        assert run("group-send", "room", '{"n": 2}', "--layer", url).returncode == 0
        assert json.loads(script.output.readline()) == {"n": 2}
        assert "skipped what is no message of ours" in script.errors.readline()


def test_a_pipe_is_sent_line_by_line(redis_server: RedisServer, tmp_path: Path) -> None:
    """send - sends lines as they come, from a pipe or a file, however they are cut; with --wait it waits for room."""
    url = url_of(redis_server, QUEUE, capacity=2)
    with Running("send", "jobs", "-", "--wait", "--json", "--layer", url, stdin=subprocess.PIPE) as script:
        given = script.process.stdin
        assert given is not None
        given.write('{"n": 1}\n{"n"')
        given.flush()
        with SyncChannelLayer(create_channel_layer(url)) as layer:
            assert layer.receive("jobs", timeout=60) == {"n": 1}
            given.write(': 2}\n\n{"n": 3}\n{"n": 4}\n{"n": 5}')
            given.close()
            script.process.stdin = None
            assert [layer.receive("jobs", timeout=60)["n"] for _ in range(4)] == [2, 3, 4, 5]
        assert script.wait()[:2] == (0, '{"channel": "jobs", "sent": 5}\n')
    path = tmp_path / "jobs"
    path.write_text('{"n": 1}\n{"n": 2}\n{"n": 3}\n')
    with path.open() as file:
        result = run("send", "jobs", "-", "--layer", url, stdin=file)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == (
        "2 messages sent before that\n"
        "Error: line 3 of standard input: channel 'jobs' holds 2 unexpired messages, its capacity; --wait waits for room\n"
    )
    result = run("send", "jobs", "{}", "--layer", url)
    assert result.stderr == "Error: channel 'jobs' holds 2 unexpired messages, its capacity; --wait waits for room\n"


def test_redis_goes_away_in_the_middle_of_a_pipe(tmp_path: Path) -> None:
    """Where Redis is lost, send says how many it sent, and at which line it was."""
    with RedisServer(tmp_path) as server:
        url = url_of(server, QUEUE, timeout=0.5, connect_timeout=0.5)
        with Running("send", "jobs", "-", "--layer", url, stdin=subprocess.PIPE) as script:
            given = script.process.stdin
            assert given is not None
            given.write('{"n": 1}\n')
            given.flush()
            with SyncChannelLayer(create_channel_layer(url)) as layer:
                assert layer.receive("jobs", timeout=60) == {"n": 1}
            server.kill()
            given.write('\n{"n": 2}\n')
            given.flush()
            code, out, err = script.wait()
    assert (code, out) == (1, "")
    assert "1 message sent before that" in err
    assert "Error: line 3 of standard input: Redis at" in err
    assert "Traceback" not in err


def test_members_who_are_full_are_counted(redis_server: RedisServer) -> None:
    """group-send says how many members missed the message."""
    url = url_of(redis_server, QUEUE, capacity=1)
    with SyncChannelLayer(create_channel_layer(url)) as layer:
        layer.group_add("room", "full")
        layer.group_add("room", "free")
        layer.send("full", {})
        result = run("group-send", "room", "{}", "--layer", url, "--exclude", "nobody")
    assert result.returncode == 0
    assert result.stdout == "sent 1 message to group room: 1 copy to members, 1 missed by members who were full\n"
    assert "missed a message" in result.stderr


@pytest.mark.parametrize(
    ("line", "trouble"),
    [
        ("[1]", "it must be an object"),
        ('{"a": ', "it is no JSON"),
        ("\udcff", "it is no JSON"),
        ("[" * 100_000, "too deep"),
        ('{"__asgi_channel__": 1}', "__asgi_channel__"),
        ('{"n": 36893488147419103232}', "64 bit"),
        ('{"b": {"__bytes__": "!"}}', "base64"),
    ],
)
def test_a_line_that_is_no_message(line: str, trouble: str, redis_server: RedisServer) -> None:
    """A line that is no message stops send with its number and the rule, never a traceback."""
    text = f'{{"n": 1}}\n{line}\n'
    result = run("send", "jobs", "-", "--layer", url_of(redis_server, QUEUE), input=text, errors="surrogateescape")
    assert (result.returncode, result.stdout) == (2, "")
    assert "1 message sent before that" in result.stderr
    assert "line 2 of standard input" in result.stderr
    assert trouble in result.stderr
    assert "Traceback" not in result.stderr


@backends
def test_interrupted_while_it_waits(backend: str, redis_server: RedisServer) -> None:
    """send ends by Ctrl-C with 130, while it waits for room as well as for its next line, and says what was sent."""
    prefix = new_prefix()
    url = url_of(redis_server, QUEUE, capacity=1, prefix=prefix)
    with SyncChannelLayer(create_channel_layer(url)) as layer:
        layer.send("jobs", {})
        with Running(
            "send", "jobs", "-", "--wait", "--layer", url, "--backend", backend, stdin=subprocess.PIPE
        ) as script:
            given = script.process.stdin
            assert given is not None
            given.write('{"n": 1}\n')
            given.flush()
            with redis_server.client() as client:
                wait_until(lambda: client.keys(f"{prefix}:waiting:*"))
            code, _, errors = script.end()
            assert code == 130
            assert errors == "0 messages sent before that; line 1 of standard input may have been sent too\n"
    url = url_of(redis_server, QUEUE)
    with Running("send", "jobs", "-", "--layer", url, "--backend", backend, stdin=subprocess.PIPE) as script:
        given = script.process.stdin
        assert given is not None
        given.write('{"n": 2}\n')
        given.flush()
        with SyncChannelLayer(create_channel_layer(url)) as layer:
            assert layer.receive("jobs", timeout=60) == {"n": 2}
        script.process.send_signal(signal.SIGTERM)
        assert script.process.wait(60) == 143  # with its input open
        # The message was received; whether its sender had heard of it by then is open.
        assert script.errors.read() in {
            "1 message sent before that\n",
            "0 messages sent before that; line 1 of standard input may have been sent too\n",
        }


@backends
def test_broken_pipe(backend: str, redis_server: RedisServer) -> None:
    """Whoever stops reading ends listen quietly."""
    url = url_of(redis_server, QUEUE)
    with listening("-g", "room", "--json", "--layer", url, "--backend", backend) as script:
        with SyncChannelLayer(create_channel_layer(url)) as layer:
            layer.group_send("room", {"n": 1})
            assert json.loads(script.output.readline()) == {"n": 1}
            script.output.close()
            script.process.stdout = None
        assert script.process.wait(60) == 0
        assert script.errors.read() == ""


@backends
def test_who_stops_reading_a_channel_takes_no_more(backend: str, redis_server: RedisServer) -> None:
    """It ends when its reader is gone, not with the next message, which is for others then."""
    url = url_of(redis_server, QUEUE)
    with SyncChannelLayer(create_channel_layer(url)) as layer:
        with listening("jobs", "--json", "--layer", url, "--backend", backend) as script:
            layer.send("jobs", {"n": 1})
            assert json.loads(script.output.readline()) == {"n": 1}
            script.output.close()
            script.process.stdout = None
            assert script.process.wait(60) == 0
        layer.send("jobs", {"n": 2})
        assert layer.receive("jobs", timeout=60) == {"n": 2}


def test_a_reader_that_stands_still(redis_server: RedisServer) -> None:
    """While nobody reads what listen prints, Ctrl-C still ends it."""
    url = url_of(redis_server, QUEUE)
    with listening("-g", "room", "--json", "--layer", url) as script:
        with SyncChannelLayer(create_channel_layer(url)) as layer:
            for _ in range(5):
                layer.group_send("room", {"text": "x" * 100_000})
            assert script.output.read(1) == "{"
        script.process.send_signal(signal.SIGINT)
        assert script.process.wait(60) == 0


def test_an_output_that_nobody_reads(redis_server: RedisServer) -> None:
    """A command whose reader went away before it began does its work, and ends quietly."""
    url = url_of(redis_server, QUEUE)
    reading, writing = os.pipe()
    os.close(reading)
    options: dict[str, Any] = {"capture_output": False, "stdout": writing, "stderr": subprocess.PIPE}
    result = run("send", "jobs", '{"n": 1}', "--layer", url, **options)
    os.close(writing)
    assert (result.returncode, result.stderr) == (0, "")
    with SyncChannelLayer(create_channel_layer(url)) as layer:
        assert layer.receive("jobs", timeout=60) == {"n": 1}


def test_standard_streams_that_are_no_pipes(redis_server: RedisServer, tmp_path: Path) -> None:
    """Output goes to files, an output that is closed does no harm, and one that is full is an error."""
    url = url_of(redis_server, QUEUE)
    with (tmp_path / "out").open("w+") as file:
        assert run("send", "jobs", "{}", "--layer", url, capture_output=False, stdout=file).returncode == 0
        file.seek(0)
        assert file.read() == "sent 1 message to channel jobs\n"
    command = f"{' '.join(SCRIPT)} send jobs"
    closed = subprocess.run(
        ["sh", "-c", f"{command} - --layer '{url}' >&- <&-"],
        check=False,
        env=environment(),
        capture_output=True,
        timeout=60,
    )
    assert (closed.returncode, closed.stderr) == (0, b"")
    full = subprocess.run(
        ["sh", "-c", f"{command} '{{}}' --layer '{url}' >/dev/full"],
        check=False,
        env=environment(),
        capture_output=True,
    )
    assert (full.returncode, full.stderr) == (1, b"Error: cannot write the output: No space left on device\n")


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["send", "--help"]])
def test_help_that_cannot_be_written(arguments: list[str]) -> None:
    """Help and version that cannot be written are one line on standard error; those that nobody reads are none."""
    command = f"{' '.join(SCRIPT)} {' '.join(arguments)}"
    options: dict[str, Any] = {"env": environment(), "capture_output": True, "timeout": 60}
    full = subprocess.run(["sh", "-c", f"{command} >/dev/full"], check=False, **options)
    assert (full.returncode, full.stderr) == (1, b"Error: cannot write the output: No space left on device\n")
    unread = subprocess.run(["sh", "-c", f"{command} | true"], check=False, **options)
    assert (unread.returncode, unread.stderr) == (0, b"")


def test_an_error_that_is_not_of_the_output() -> None:
    """A mistake of ours that is an OSError is not taken for a full disk."""
    before = """
import anyio_channels.cli.stats
def create(*_, **options):
    raise OSError(5, "ours")
anyio_channels.cli.stats.run = create
"""
    result = run("stats", "redis://localhost", before=before)
    assert result.returncode == 1
    assert "OSError: [Errno 5] ours" in result.stderr


def test_a_terminal_is_told_text_only(redis_server: RedisServer) -> None:
    """On a terminal, messages are coloured, and what they bring along cannot move the cursor; NO_COLOR is obeyed."""
    url = url_of(redis_server, QUEUE)
    message = r'{"text": "\u001b[2J\u202e\u009b1m"}'
    for variables, colours in (({}, True), ({"NO_COLOR": "1"}, False)):
        assert run("send", "jobs", message, "--layer", url).returncode == 0
        with Terminal() as terminal:
            env = environment(TERM="xterm-256color", **variables)
            with Running("listen", "jobs", "-n", "1", "--layer", url, stdout=terminal.inside, env=env) as script:
                assert script.wait()[0] == 0
            seen = terminal.read_until("}")
        assert r"\u001b[2J\u202e\x9b1m" in seen
        assert "\x1b[2J" not in seen
        assert bool(re.search(r"\x1b\[[0-9;]*3[0-7]m", seen)) == colours


@pytest.mark.parametrize(
    ("arguments", "trouble"),
    [
        (["listen"], "name a CHANNEL to read, or groups with --group, and not both"),
        (["listen", "jobs", "-g", "room"], "and not both"),
        (["listen", "a b"], "Channel name"),
        (["listen", "-g", "a!b"], "Group name"),
        (["listen", "specific.a!b"], "belongs to the process that made it"),
        (["listen", "jobs", "--count", "0"], "--count"),
        (["listen", "jobs", "--timeout", "0"], "--timeout"),
        (["listen", "jobs", "--timeout", "nan"], "not a number of seconds"),
        (["listen", "jobs", "--timeout", "1e17"], "'1e17' is not a number of seconds up to 1000000000"),
        (["stats", "--interval", "inf"], "not a number of seconds"),
        (["stats", "redis://host", "redis://ann:s3cret@host"], "extra argument (redis://***@host)"),
        (["stats", "redis://host", "redis://ann:my s3cret@host"], "extra argument (redis://***@host)"),
        (["listen", "jobs", "news", "more"], "extra arguments (news more)"),
        (["stats", "redis://host", "--layer", "redis://other"], "the layer is given twice"),
        (["stats", ""], "it is empty; is a variable of the shell not set?"),
        (["bench", " "], "it is empty"),
        (["stats", "--layer", ""], "it is empty"),
        (["demo", "--layer", ""], "it is empty"),
        (["send", "jobs", "{}", "--key", ""], "it is empty"),
        (["groups", "--prefix", ""], "it is empty"),
        (["groups", "redis://127.0.0.1:notaport/0"], "a Redis URL is redis://[user[:password]@]host[:port]"),
        (["groups", "redis://:password@127.0.0.1:notaport/0"], "a Redis URL is redis://[user[:password]@]host[:port]"),
        (["doctor", "redis+sentinel://ann:s3cret@/"], "is redis+sentinel://[user[:password]@]host[:port]"),
        (["send", "redis://host", "jobs"], "Missing argument 'MESSAGE'"),
        (["send"], "Missing argument 'CHANNEL'"),
        (["redis://ann:s3cret@host"], "'redis://***@host'"),
        (["send", "jobs"], "MESSAGE"),
        (["send", "jobs", "[]"], "must be an object"),
        (["send", "a b", "{}"], "CHANNEL"),
        (["group-send", "a!b", "{}"], "GROUP"),
        (["group-send", "room", "{}", "--exclude", "a b"], "--exclude"),
        (["groups", "a!b"], "GROUP"),
        (["stats", "--interval", "0"], "--interval"),
        (["stats", "--prefix", "x", "--key-file", "/nonexistent"], "--key-file"),
        (["listen", "jobs", "--prefix", "other"], "'prefix' of a channel layer is given twice"),
    ],
)
def test_wrong_calls(arguments: list[str], trouble: str) -> None:
    """A wrong call is refused before anything is connected: exit code 2, what was wrong, and no password."""
    url = "redis://ann:s3cret@127.0.0.1:1/0?prefix=mine"
    result = refused(*arguments, ANYIO_CHANNELS_URL=url)
    assert (result.returncode, result.stdout) == (2, "")
    assert trouble in " ".join(result.stderr.split())
    assert "s3cret" not in result.stderr
    assert "Traceback" not in result.stderr


def test_the_layer_is_an_argument(redis_server: RedisServer) -> None:
    """The URL may be an argument of every command, before the others or behind them, and goes before the environment."""
    url = url_of(redis_server, QUEUE)
    env = environment(ANYIO_CHANNELS_URL="redis://127.0.0.1:1/0?connect_timeout=0.1")
    for place, message in ((0, '{"url": "redis://a"}'), (1, "{}"), (2, "{}")):
        words = ["jobs", message]
        words.insert(place, url)
        sent = run("send", *words, env=env)
        assert (sent.returncode, sent.stdout) == (0, "sent 1 message to channel jobs\n")
        heard = run("listen", *([url, "jobs"] if place else ["jobs", url]), "--count", "1", "--json", env=env)
        assert (heard.returncode, heard.stdout) == (0, f"{message}\n")
    assert run("group-send", url, "room", "{}", env=env).returncode == 0
    assert run("groups", url, "room", "--json", env=env).stdout == ""
    assert json.loads(run("stats", url, "--once", "--json", "--interval", "0.1", env=env).stdout)["depth"] == 0


@pytest.mark.parametrize(
    "command", [["listen", "-g", "room"], ["send", "jobs", "{}"], ["groups"], ["stats"], ["doctor"]]
)
def test_without_a_layer(command: list[str]) -> None:
    """Without a URL, or with that of a layer that no other process sees, it says what to give."""
    result = refused(*command)
    assert result.returncode == 2
    assert "ANYIO_CHANNELS_URL" in result.stderr
    memory = refused(*command, ANYIO_CHANNELS_URL="memory://")
    assert memory.returncode == 2
    assert "lives inside one process" in memory.stderr


def test_keys_that_cannot_be_read(tmp_path: Path) -> None:
    """A file without a key, or that is no text, is a wrong call."""
    path = tmp_path / "keys"
    for content, trouble in ((b"\n\n", "there is no key in"), (b"\xff", "cannot read it")):
        path.write_bytes(content)
        result = refused("send", "jobs", "{}", "--layer", "redis://localhost", "--key-file", str(path))
        assert result.returncode == 2
        assert trouble in result.stderr


@pytest.mark.parametrize("command", [["listen", "-g", "room"], ["send", "jobs", "{}"], ["groups"], ["stats"]])
def test_a_redis_that_is_not_there(command: list[str]) -> None:
    """Where no Redis answers, one line says which and why, without the password: exit code 1."""
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    url = f"redis://ann:s3cret@127.0.0.1:{port}/0?connect_timeout=0.3"
    result = run(*command, "--layer", url)
    assert (result.returncode, result.stdout) == (1, "")
    assert f"127.0.0.1:{port}" in result.stderr
    assert result.stderr.count("\n") == 1
    assert "s3cret" not in result.stderr


def test_a_mistake_in_the_middle_of_a_pipe(redis_server: RedisServer) -> None:
    """What is nobody's fault but ours is not taken for the user's."""
    before = """
from anyio_channels import RedisChannelLayer
async def send(self, *arguments, **options):
    raise KeyError("ours")
RedisChannelLayer.send = send
"""
    result = run("send", "jobs", "-", "--layer", url_of(redis_server, QUEUE), before=before, input="{}\n")
    assert result.returncode == 1
    assert "KeyError: 'ours'" in result.stderr
    assert "sent before" not in result.stderr


def test_redis_goes_away(tmp_path: Path) -> None:
    """While Redis is away listen says so and goes on; send fails with one line."""
    with RedisServer(tmp_path) as server:
        url = url_of(server, QUEUE)
        with listening("-g", "room", "--json", "--layer", url) as script:
            server.kill()
            assert "warning: Redis at" in script.errors.readline()
            server.start()
            gap = json.dumps({"type": "channel_layer.gap", "missed": None}) + "\n"
            assert script.output.readline() == gap
            assert run("group-send", "room", "{}", "--layer", url).returncode == 0
            while (line := script.output.readline()) == gap:
                pass
            assert line == "{}\n"
            assert script.end()[:2] == (0, "")


def test_nobody_reads_the_warnings(tmp_path: Path) -> None:
    """Where standard error is closed, a warning is lost, and listening goes on."""
    with RedisServer(tmp_path) as server:
        url = url_of(server, QUEUE)
        with listening("-g", "room", "--json", "--layer", url) as script:
            script.errors.close()
            script.process.stderr = None
            server.kill()
            server.start()
            assert "channel_layer.gap" in script.output.readline()
            assert run("group-send", "room", "{}", "--layer", url).returncode == 0
            while "channel_layer.gap" in (line := script.output.readline()):
                pass
            assert line == "{}\n"
            assert script.end()[0] == 0


def test_no_standard_error() -> None:
    """A command works where there is no standard error at all."""
    assert run("--version", before="sys.stderr = None").returncode == 0
    with (
        patch.object(sys, "argv", ["anyio-channels", "--version"]),
        patch.object(sys, "stderr", None),
        pytest.raises(SystemExit) as ended,
    ):
        main()
    assert ended.value.code == 0


def test_a_message_too_deep_for_json() -> None:
    """One that Python cannot write as JSON is shown as such, and ends nothing."""
    value: dict[str, Any] = {}
    for _ in range(5000):
        value = {"a": value}
    assert json.loads(to_json(value)) == json.loads(to_text(value).plain) == {"__too_deep__": True}


@pytest.mark.parametrize(
    "value",
    [{"b": b"\x00\xff", "list": [1.5, float("inf"), None, True]}, {"a": {"__bytes__": 1}, "b": {"__float__": "x"}}],
)
def test_what_json_cannot_say(value: dict[str, Any]) -> None:
    """Every message comes back from its JSON as it was, and the JSON is one line of ASCII that every parser takes."""
    text = to_json(value)
    assert text.isascii()
    assert "\n" not in text
    json.loads(text, parse_constant=pytest.fail)
    assert from_json(text) == value


def test_printable() -> None:
    """Nothing is left that a terminal would obey, or that turns the direction of writing."""
    assert printable("a\x1b[0m\u202eb\u00e9\n") == "a\\x1b[0m\\u202eb\u00e9\\n"
