"""The console script, run as users run it: in a process of its own."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from command_line import Running, environment, refused, run
from redis_server import RedisServer, free_port, wait_until

from anyio_channels import __version__


def test_version() -> None:
    result = run("--version")
    assert (result.returncode, result.stderr) == (0, "")
    assert __version__ in result.stdout


def test_help_names_every_option() -> None:
    result = run("demo", "--help")
    assert (result.returncode, result.stderr) == (0, "")
    for option in ("--backend", "--layer", "--host", "--port", "memory://", "8000"):
        assert option in result.stdout


@pytest.mark.parametrize(
    ("url", "trouble"),
    [
        ("nosuch://ann:s3cret@localhost", "nosuch://"),
        ("memory://?nosuch=1", "nosuch"),
        ("memory://?capacity=many", "capacity"),
        ("memory://?capacity=0", "capacity"),
        ("memory://?max_message_size=100", "max_message_size"),
        ("nosuch://ann:s3cret@loc\u2100lhost", "NFKC"),
        ("lobby", "memory://"),
        ("redis://ann:s3cret@localhost?nosuch=1", "nosuch"),
        ("redis://ann:s3cret/x@localhost", "percent-encoded"),
        ("redis+pubsub://ann:s3cret@localhost?capacity=0", "capacity"),
    ],
)
def test_bad_layer_url(url: str, trouble: str) -> None:
    result = refused("demo", "--port", "0", "--layer", url)
    assert result.returncode == 2
    assert result.stdout == ""
    assert "--layer" in result.stderr
    assert trouble in result.stderr
    assert "Traceback" not in result.stderr
    assert "s3cret" not in result.stderr


def test_layer_from_the_environment() -> None:
    """The demo's layer may be named by the environment."""
    result = run("demo", "--port", "0", env=environment(ANYIO_CHANNELS_URL="nosuch://"))
    assert result.returncode == 2
    assert "nosuch://" in result.stderr


def test_layer_that_cannot_be_opened() -> None:
    before = """
from anyio_channels import InMemoryChannelLayer
from anyio_channels.urls import register_scheme

class Broken(InMemoryChannelLayer):
    async def open(self):
        raise ConnectionError("no answer from ann:s3cret@db:1234")

register_scheme("broken", lambda url: Broken())
"""
    result = run("demo", "--port", "0", "--layer", "broken://ann:s3cret@db:1234/chat?password=s3cret", before=before)
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr == "Error: cannot open the layer broken://db:1234/chat: no answer from ***@db:1234\n"


@pytest.mark.parametrize(("scheme", "backend"), [("redis", "asyncio"), ("redis+pubsub", "trio")])
def test_redis_that_is_not_there(scheme: str, backend: str) -> None:
    server = f"127.0.0.1:{free_port()}"
    url = f"{scheme}://ann:s3cret@{server}/0?connect_timeout=0.2"
    result = run("demo", "--port", "0", "--backend", backend, "--layer", url)
    assert (result.returncode, result.stdout) == (1, "")
    start = f"Error: cannot open the layer {scheme}://{server}/0: Redis at {server} cannot be reached: "
    assert re.fullmatch(re.escape(start) + r".*\n", result.stderr)
    assert "s3cret" not in result.stderr


@pytest.mark.parametrize(
    ("user", "trouble", "backend"),
    [("ann:s3cret@", "WRONGPASS", "asyncio"), (":s3cret@", "WRONGPASS", "trio"), ("", "NOAUTH", "trio")],
)
def test_redis_that_wants_another_password(tmp_path: Path, user: str, trouble: str, backend: str) -> None:
    with RedisServer(tmp_path, "--requirepass", "another") as server:
        address = f"{server.host}:{server.port}"
        result = run("demo", "--port", "0", "--backend", backend, "--layer", f"redis://{user}{address}/0")
    assert (result.returncode, result.stdout) == (1, "")
    start = f"Error: cannot open the layer redis://{address}/0: Redis at {address}: {trouble} "
    assert re.fullmatch(re.escape(start) + r".*\n", result.stderr)
    assert "s3cret" not in result.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_signal_while_redis_does_not_answer(backend: str, number: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(30)
        url = f"redis://127.0.0.1:{silent.getsockname()[1]}/0?connect_timeout=60"
        options = ["--port", "0", "--backend", backend, "--layer", url]
        with (
            subprocess.Popen(
                [sys.executable, "-P", "-W", "error", "-m", "anyio_channels.cli", "demo", *options],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                encoding="utf-8",
            ) as process,
            silent.accept()[0],
        ):
            process.send_signal(number)
            assert process.communicate(timeout=30)[0] == ""
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("option", "value"), [("--port", "70000"), ("--port", "http"), ("--backend", "curio"), ("--nosuch", "1")]
)
def test_bad_option(option: str, value: str) -> None:
    result = refused("demo", option, value)
    assert result.returncode == 2
    assert option in result.stderr
    assert "Traceback" not in result.stderr


def test_port_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = run("demo", "--port", str(port))
    assert result.returncode == 1
    assert result.stdout == ""
    assert f"127.0.0.1:{port} is taken" in result.stderr
    assert "--port" in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("host", "shown"),
    [
        ("192.0.2.1", "192.0.2.1:0"),  # for documentation: nobody has it
        ("2001:db8::1", "[2001:db8::1]:0"),
        ("x" * 300, f"{'x' * 300}:0"),
    ],
)
def test_address_that_cannot_be_had(host: str, shown: str) -> None:
    result = run("demo", "--host", host, "--port", "0")
    assert result.returncode == 1
    assert f"cannot listen on {shown}: " in result.stderr
    assert "--host" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_an_address_that_cannot_be_written(backend: str) -> None:
    """Where the output is full the demo ends with one line; where nobody reads it, with none."""
    with Path("/dev/full").open("w") as full:
        options: dict[str, Any] = {"capture_output": False, "stderr": subprocess.PIPE}
        result = run("demo", "--port", "0", "--backend", backend, stdout=full, **options)
        assert (result.returncode, result.stderr) == (1, "Error: cannot write the output: No space left on device\n")
        reading, writing = os.pipe()
        os.close(reading)
        result = run("demo", "--port", "0", "--backend", backend, stdout=writing, **options)
        os.close(writing)
        assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_an_address_that_nobody_takes(backend: str) -> None:
    """While the reader of its output stands still the demo serves, and Ctrl-C ends it."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with suppress(BlockingIOError):
        while True:
            os.write(writing, b"x" * 65536)
    os.set_blocking(writing, True)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with Running("demo", "--port", str(port), "--backend", backend, stdout=writing) as script:
        wait_until(partial(answers, port))
        assert script.end()[::2] == (0, "")
    os.close(reading)
    os.close(writing)


def answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=60) as response:
            return bool(response.status == 200)
    except OSError:
        return False


@pytest.mark.parametrize(
    ("options", "trouble"),
    [
        (["--host", ""], "it is empty; is a variable of the shell not set?"),
        (["--host", " "], "it is empty"),
        (["--allow-host", ""], "it is empty"),
        (
            ["--allow-host", "http://chat.example"],
            "'http://chat.example' must be a host name or an IP address, without",
        ),
        (["--allow-host", "chat.example:80"], "without scheme and port"),
        (["--allow-host", "ch\u00e4t.example"], "is not a host name: it has ASCII letters"),
        (["--allow-host", "[::1"], "must be a host name or an IP address"),
    ],
)
def test_a_host_that_is_none(options: list[str], trouble: str) -> None:
    """A host that is empty, which would be every address, or is no name, is a wrong call."""
    result = refused("demo", "--port", "0", *options)
    assert (result.returncode, result.stdout) == (2, "")
    assert options[0] in result.stderr
    assert trouble in " ".join(result.stderr.split())


def test_completion(tmp_path: Path) -> None:
    """A shell completes the commands and their options, as the page says."""
    script = run(env=environment(_ANYIO_CHANNELS_COMPLETE="bash_source"))
    assert script.returncode == 0
    assert "complete -o nosort -F _anyio_channels_completion anyio-channels" in script.stdout
    for words, found in (
        ("anyio-channels gr", {"groups", "group-send"}),
        ("anyio-channels bench --sec", {"--seconds"}),
    ):
        number = str(len(words.split()) - 1)
        env = environment(_ANYIO_CHANNELS_COMPLETE="bash_complete", COMP_WORDS=words, COMP_CWORD=number)
        assert {line.partition(",")[2] for line in run(env=env).stdout.splitlines()} == found


@pytest.mark.parametrize("module", ["click", "rich", "starlette", "anycorn"])
def test_missing_extra(module: str) -> None:
    result = run("demo", before=f"sys.modules[{module!r}] = None")
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith(f"anyio-channels needs {module}")
    assert result.stderr.endswith(": pip install 'anyio_channels[demo]'\n")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("module", ["click", "rich"])
def test_missing_extra_of_the_other_commands(module: str) -> None:
    """Where the extra is missing, the line that says so names the one that this command needs."""
    result = run("groups", before=f"sys.modules[{module!r}] = None")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(f"anyio-channels needs {module}")
    assert result.stderr.endswith(": pip install 'anyio_channels[cli]'\n")


def test_the_other_commands_need_no_demo() -> None:
    """All but the demo run without its extra, and so does the help."""
    before = "sys.modules['starlette'] = sys.modules['anycorn'] = None"
    assert run("--help", before=before).returncode == 0
    result = run("bench", "--seconds", "0.01", before=before)
    assert (result.returncode, result.stderr) == (0, "")


def test_missing_trio() -> None:
    result = run("demo", "--backend", "trio", "--port", "0", before="sys.modules['trio'] = None")
    assert result.returncode == 2
    assert "trio is not installed: pip install 'anyio_channels[demo]'" in result.stderr
    assert "Traceback" not in result.stderr


def test_missing_redis() -> None:
    before = "sys.modules['redis'] = sys.modules['redis.exceptions'] = None"
    result = run("demo", "--layer", "redis://localhost", before=before)
    assert result.returncode == 2
    assert "pip install 'anyio_channels[redis]'" in result.stderr
    assert "Traceback" not in result.stderr


def test_other_missing_modules_are_not_blamed_on_the_extra() -> None:
    result = run("demo", before="sys.modules['anyio_channels.demo.server'] = None")
    assert result.returncode == 1
    assert "ModuleNotFoundError" in result.stderr
    assert "pip install" not in result.stderr


def test_the_package_imports_nothing_of_the_extra() -> None:
    code = (
        "import sys, anyio_channels, anyio_channels.cli\n"
        "print({name.partition('.')[0] for name in sys.modules} & {'click', 'rich', 'starlette', 'anycorn', 'trio'})"
    )
    result = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, check=True, encoding="utf-8", timeout=30
    )
    assert result.stdout == "set()\n"
