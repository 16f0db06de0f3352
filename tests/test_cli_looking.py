"""groups, stats, doctor and bench: what they print, for people and for programs, and how they end."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

import pytest
from click.testing import CliRunner
from command_line import Running, Terminal, environment, run
from layers_on_redis import QUEUE, Kind, both, new_prefix
from redis_server import RedisServer, free_port, new_directory, wait_until
from test_cli_messages import backends, one_of_each, url_of

from anyio_channels import create_channel_layer
from anyio_channels.cli.commands import cli
from anyio_channels.sync import SyncChannelLayer


def opened(url: str) -> SyncChannelLayer:
    return SyncChannelLayer(create_channel_layer(url))


@one_of_each
def test_groups(kind: Kind, backend: str, redis_server: RedisServer) -> None:
    """groups lists the groups with their members or processes; with a group, its members where they are known."""
    options = ("groups", "--layer", url_of(redis_server, kind), "--backend", backend)
    empty = run(*options)
    assert (empty.returncode, empty.stdout, empty.stderr) == (0, "", "no groups\n")
    assert run(*options, "--json").stdout == ""
    with opened(options[2]) as layer, layer.subscribe("room") as inbox:
        table = run(*options)
        assert (table.returncode, table.stderr) == (0, "")
        assert re.search(r"room +1 +-\n" if kind is QUEUE else r"room +- +1\n", table.stdout)
        members = run(*options, "room", "--json")
        row = json.loads(members.stdout)
        if kind is QUEUE:
            assert row["channel"] == inbox.channel
            assert row["seconds"] >= 0
            assert inbox.channel in run(*options, "room").stdout
        else:
            assert row == {"group": "room", "members": None, "processes": 1}
            assert "only their processes know" in run(*options, "room").stderr
    nobody = run(*options, "nobody")
    assert (nobody.returncode, nobody.stdout) == (0, "")
    assert "nobody" in nobody.stderr


def test_groups_with_a_server_that_is_down(tmp_path: Path) -> None:
    """Where a server cannot be asked, that is said, and the exit code is 1."""
    with RedisServer(new_directory(tmp_path, "redis")) as server:
        users = f"redis://{server.host}:{server.port}/0"
        with server.client() as client:
            client.execute_command("ACL", "SETUSER", "ann", "on", ">s3cret", "~*", "&*", "+@all", "-scan")
        result = run("groups", "--layer", users.replace("//", "//ann:s3cret@"))
        assert (result.returncode, result.stdout) == (1, "")
        assert "warning: not asked: " in result.stderr
        assert "s3cret" not in result.stderr


@both
def test_several_servers(kind: Kind, tmp_path: Path) -> None:
    """A URL may name several servers: all of them are asked, and one that is down is named, with exit code 1."""
    with RedisServer(new_directory(tmp_path, "one")) as one, RedisServer(new_directory(tmp_path, "two")) as two:
        url = url_of(one, kind).replace("/0?", f",{two.host}:{two.port}/0?")
        names = {f"group{number}" for number in range(10)}
        with opened(url) as layer, layer.subscribe(*names):
            found = run("groups", "--json", "--layer", url)
            assert {json.loads(line)["group"] for line in found.stdout.splitlines()} == names
            assert (found.returncode, found.stderr) == (0, "")
            doctor = run("doctor", url)
            assert doctor.returncode == 0
            for server in (one, two):
                assert re.search(f"role +ok +Redis at {server.host}:{server.port}: a primary", doctor.stdout)
            two.kill()
            rest = run("groups", "--json", "--layer", url + "&connect_timeout=1")
        assert rest.returncode == 1
        assert {json.loads(line)["group"] for line in rest.stdout.splitlines()} < names
        assert re.fullmatch(rf"warning: not asked: Redis at {two.host}:{two.port} .*\n", rest.stderr)


@one_of_each
def test_stats_once(kind: Kind, backend: str, redis_server: RedisServer) -> None:
    """stats --once prints one table, or one document, and what nobody can know is "-" or null."""
    options = ("stats", "--once", "--interval", "0.1", "--layer", url_of(redis_server, kind), "--backend", backend)
    with opened(options[5]) as layer, layer.subscribe("room", "hall"):
        for _ in range(3):
            layer.send("jobs", {})
        result = run(*options, "--json", "--top", "1")
        assert (result.returncode, result.stderr) == (0, "")
        found = json.loads(result.stdout)
        assert found["groups"] == 2
        assert found["drops"] is None
        assert len(found["top_groups"]) == 1
        if kind is QUEUE:
            assert (found["channels"], found["depth"], found["members"], found["full"]) == (1, 3, 2, 0)
            jobs = {"channel": "jobs", "depth": 3, "change_per_second": 0.0, "full": False, "listeners": None}
            assert found["top_channels"] == [jobs]
        else:
            assert (found["depth"], found["members"], found["full"]) == (None, None, None)
        table = run(*options)
    assert table.returncode == 0
    head, *_ = table.stdout.splitlines()
    assert head.startswith(options[5].partition("?")[0])
    assert "a second, all clients" in table.stdout
    assert ("jobs" in table.stdout) == (kind is QUEUE)


@backends
def test_stats_go_on(backend: str, tmp_path: Path) -> None:
    """stats prints again and again, through an outage, marks what is full or not ours, and ends by Ctrl-C with 0."""
    with RedisServer(new_directory(tmp_path, "redis")) as server:
        url = url_of(server, QUEUE, capacity=1, timeout=1)
        options = ("stats", "--interval", "0.1", "--layer", url, "--backend", backend)
        with opened(url) as layer, server.client() as client:
            layer.send("jobs", {})
            client.set(url.rpartition("prefix=")[2].partition("&")[0] + "other", 1)
            with Running(*options) as script:
                seen = "".join(script.output.readline() for _ in range(60))
                assert script.end()[0] == 0
            assert seen.count("prefix 'test") > 1
            assert re.search(r"jobs +1 +0\.0 +full\n", seen)
            assert "1 keys under the prefix are not the layer's: see doctor" in seen
        with Running(*options, "--json") as script:
            assert json.loads(script.output.readline())["servers"][0]["error"] is None
            server.kill()
            while (found := json.loads(script.output.readline()))["servers"][0]["error"] is None:
                pass
            assert str(server.port) in found["servers"][0]["error"]
            server.start()
            while json.loads(script.output.readline())["servers"][0]["error"] is not None:
                pass
            assert script.end(signal.SIGTERM)[0] == 0


@pytest.mark.parametrize("columns", [100, 20])
def test_stats_live(columns: int, tmp_path: Path) -> None:
    """On a terminal, however narrow, the table refreshes in place, says when Redis is away, and gives the cursor back."""
    with RedisServer(new_directory(tmp_path, "redis")) as server, Terminal(columns, 60) as terminal:
        url = url_of(server, QUEUE, timeout=1)
        env = environment(TERM="xterm")
        options = ("stats", "--interval", "0.1", "--layer", url)
        with opened(url) as layer, Running(*options, stdout=terminal.inside, env=env) as script:
            assert "\x1b[?25l" in terminal.read_until("queue")  # the cursor is hidden
            layer.send("jobs", {})
            terminal.read_until("jobs")
            server.kill()
            terminal.read_until("cannot" if columns == 100 else "reached")
            assert script.end()[0] == 0
            terminal.read_until("\x1b[?25h")


def test_a_dumb_terminal(redis_server: RedisServer) -> None:
    """A terminal that cannot move its cursor gets one table after the other."""
    with Terminal() as terminal:
        env = environment(TERM="dumb")
        options = ("stats", "--interval", "0.1", "--layer", url_of(redis_server, QUEUE))
        with Running(*options, stdout=terminal.inside, env=env) as script:
            seen = terminal.read_until("drops") + terminal.read_until("drops")
            assert script.end()[0] == 0
    assert "\x1b[" not in seen


@one_of_each
def test_doctor(kind: Kind, backend: str, redis_server: RedisServer) -> None:
    """doctor exits with 0 where nothing is wrong, in JSON and as a table."""
    url = url_of(redis_server, kind)
    result = run("doctor", url, "--json", "--backend", backend)
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert result.stderr == ""
    assert [row["check"] for row in rows if row["verdict"] == "wrong"] == []
    assert result.returncode == 0
    assert rows[0] == {
        "check": "reached",
        "server": f"Redis at {redis_server.host}:{redis_server.port}",
        "verdict": "ok",
        "found": "connected and logged in",
        "advice": "",
    }
    table = run("doctor", "--backend", backend, env=environment(ANYIO_CHANNELS_URL=url))
    assert table.returncode == 0
    assert re.search(r"reached +ok +connected and logged in", table.stdout)


def test_doctor_finds_something(tmp_path: Path) -> None:
    """doctor exits with 1 where something is wrong, and says what to do; where there are several servers, at which."""
    with RedisServer(
        new_directory(tmp_path, "redis"), "--maxmemory", "1gb", "--maxmemory-policy", "allkeys-lru"
    ) as server:
        result = run("doctor", server.url)
        assert result.returncode == 1
        assert "-> CONFIG SET maxmemory-policy noeviction" in result.stdout
        with Terminal(40) as terminal:
            env = environment(TERM="xterm-256color")
            with Running("doctor", server.url, stdout=terminal.inside, env=env) as script:
                assert script.wait()[0] == 1
            assert "\x1b[1;31mwrong" in terminal.read_until("messages")
    gone = run("doctor", f"redis://ann:s3cret@{server.host}:{server.port}?connect_timeout=0.3")
    assert gone.returncode == 1
    assert "cannot be reached" in gone.stdout
    assert "s3cret" not in gone.stdout + gone.stderr


@one_of_each
def test_bench(kind: Kind, backend: str, tmp_path: Path) -> None:
    """bench measures memory and Redis, whatever the URL says of capacity and prefix, and leaves nothing there."""
    with RedisServer(new_directory(tmp_path, "redis")) as server:
        url = url_of(server, kind, capacity=1)
        result = run("bench", url, "--seconds", "0.2", "--json", "--backend", backend)
        assert (result.returncode, result.stderr) == (0, "")
        rows = [json.loads(line) for line in result.stdout.splitlines()]
        scheme = url.partition(":")[0]
        assert [(row["layer"], row["what"]) for row in rows] == [
            ("memory", "send + receive"),
            ("memory", "group_send to 100"),
            (scheme, "send + receive"),
            (scheme, "50 at once"),
            (scheme, "group_send to 100"),
        ]
        assert all(0 < row["p50"] <= row["p99"] for row in rows)
        assert all(row["count"] > 0 and row["backend"] == backend for row in rows)
        # One after the other, a second has as many as the time of one says; up to the rounding of both.
        for row in rows:
            if row["what"] != "50 at once":
                assert row["per_second"] * row["mean"] / 1e6 == pytest.approx(1, rel=0.2)
        with server.client() as client:
            assert client.keys("*") == []


def test_bench_on_a_terminal() -> None:
    """On a terminal bench shows its progress, and then a table."""
    with Terminal() as terminal:
        env = environment(TERM="xterm")
        streams = {"stdout": terminal.inside, "stderr": terminal.inside}
        with Running("bench", "--seconds", "0.6", env=env, **streams) as script:
            assert "%" in terminal.read_until("op/s")
            assert script.wait()[0] == 0


@backends
def test_bench_interrupted(backend: str, tmp_path: Path) -> None:
    """bench ends by Ctrl-C with 130, and leaves nothing in Redis."""
    with RedisServer(new_directory(tmp_path, "redis")) as server, server.client() as client:
        with Running("bench", url_of(server, QUEUE), "--seconds", "5", "--backend", backend) as script:
            wait_until(lambda: client.keys("*-bench-*"))
            code, out, err = script.end()
        assert (code, out, err) == (130, "", "")
        assert client.keys("*") == []


def test_bench_of_a_redis_that_goes_away(tmp_path: Path) -> None:
    """Where Redis is lost, bench says that it could not be tidied up, and prints what it measured before."""
    with RedisServer(new_directory(tmp_path, "redis")) as server, server.client() as client:
        url = url_of(server, QUEUE, timeout=0.5, connect_timeout=0.5)
        with Running("bench", url, "--seconds", "2", "--json") as script:
            wait_until(lambda: client.keys("*-bench-*"))
            server.kill()
            code, out, err = script.wait()
    assert code == 1
    assert [json.loads(line)["layer"] for line in out.splitlines()] == ["memory", "memory"]
    assert "could not be tidied up" in err
    assert "Error: " in err
    assert "Traceback" not in err


@one_of_each
def test_bench_of_a_redis_that_is_not_there(kind: Kind, backend: str) -> None:
    """bench asks Redis before it measures for an hour, and has nothing to tidy up where it never came in."""
    scheme = "redis" if kind is QUEUE else "redis+pubsub"
    url = f"{scheme}://127.0.0.1:{free_port()}/0?connect_timeout=0.2"
    result = run("bench", url, "--seconds", "3600", "--backend", backend)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("Error: cannot open the layer")
    assert result.stderr.count("\n") == 1


def test_bench_of_a_layer_that_loses_a_message() -> None:
    """Where a message never comes back, bench does not wait for it for ever."""
    before = """
import anyio
from anyio_channels import InMemoryChannelLayer
from anyio_channels.contract.layer import Inbox
InMemoryChannelLayer.timeout = 0.1
Inbox.receive = lambda self: anyio.sleep_forever()
"""
    result = run("bench", before=before)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == "Error: nothing came back from memory for 0.2 seconds; is Redis away?\n"


@pytest.mark.parametrize("command", [None, *cli.commands])
def test_help_teaches(command: str | None) -> None:
    """Every command's help has examples, and says what its exit codes are."""
    result = CliRunner().invoke(cli, [*([command] if command else []), "--help"])
    assert result.exit_code == 0
    assert "Examples:" in result.output
    assert "anyio-channels " + (command or "listen") in result.output
    assert "xit codes" in result.output
    assert max(map(len, result.output.splitlines())) <= 80


def test_help_of_listen_warns() -> None:
    """Whoever reads the help of listen learns that reading a channel takes its messages."""
    assert "TAKES its messages" in " ".join(CliRunner().invoke(cli, ["listen", "--help"]).output.split())


def test_missing_trio_of_the_other_commands() -> None:
    """A backend that is not installed is named with its extra."""
    result = run("groups", "--backend", "trio", "--layer", "redis://localhost", before="sys.modules['trio'] = None")
    assert result.returncode == 2
    assert "trio is not installed: pip install 'anyio_channels[trio]'" in result.stderr


def test_prefix_option(redis_server: RedisServer) -> None:
    """--prefix says which prefix, where the URL does not."""
    prefix = new_prefix()
    url = f"redis://{redis_server.host}:{redis_server.port}/0"
    with opened(f"{url}?prefix={prefix}") as layer, layer.subscribe("room"):
        assert json.loads(run("groups", "--json", "--layer", url, "--prefix", prefix).stdout)["group"] == "room"


def test_redis_is_not_installed() -> None:
    """Where the redis package is missing, its extra is named."""
    before = "sys.modules['redis'] = sys.modules['redis.exceptions'] = None"
    result = run("groups", "--layer", "redis://localhost", before=before)
    assert result.returncode == 2
    assert "pip install 'anyio_channels[redis]'" in result.stderr


def test_an_error_of_one_of_several_tasks() -> None:
    """What fails in a task group is one line, as anywhere else."""
    before = """
from anyio_channels.doctor import survey
async def require(self):
    raise ExceptionGroup("tasks", [ExceptionGroup("more", [OSError("it is gone")])])
survey.Survey.require = require
"""
    result = run("groups", "--layer", "redis://127.0.0.1:1", before=before)
    assert (result.returncode, result.stdout, result.stderr) == (1, "", "Error: it is gone\n")


def test_a_mistake_of_ours_has_a_traceback() -> None:
    """What is nobody's fault but ours is not hidden."""
    before = """
from anyio_channels.doctor import survey
survey.Survey.require = None
"""
    result = run("groups", "--layer", "redis://127.0.0.1:1", before=before)
    assert result.returncode == 1
    assert "TypeError" in result.stderr
