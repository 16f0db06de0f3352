"""Ctrl-C in the middle of anything: no lock stays held, nothing is half changed, and the layer closes in order."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from layers_on_redis import Kind, both, new_prefix
from redis_server import RedisServer

TESTS = Path(__file__).parent
PATIENCE = 120
loops = pytest.mark.parametrize("loop", ["asyncio", "uvloop", "trio"])
unmeasured = pytest.mark.usefixtures("unmeasured_processes")  # they set a trace function of their own


def run_script(*command: str | Path, patience: float = PATIENCE) -> str:
    """Run a script that must print nothing to standard error; one that hangs is killed, and fails the test."""
    path = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(TESTS))))
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, *command],
        check=False,
        capture_output=True,
        text=True,
        timeout=patience,
        env=environment,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    return done.stdout


def interrupt(loop: str, unit: str, most: int, *where: str) -> None:
    """Interrupt the scenario at so many moments, one in each run, each of which ends in time."""
    command: list[str | Path] = [TESTS / "interrupted.py", loop, unit, str(most), *where]
    result: dict[str, Any] = json.loads(run_script(*command, patience=10 * PATIENCE))
    interrupts = result.pop("interrupts")
    assert result == {"runs": most, "wrong": []}
    # asyncio cancels the main task, which may end in that moment, and then nobody hears of it.
    assert interrupts == most if loop == "trio" else interrupts > most * 0.8


def url_of(kind: Kind, server: RedisServer) -> str:
    return server.url if kind.name == "queue" else server.url.replace("redis:", "redis+pubsub:")


@unmeasured
@loops
@pytest.mark.parametrize(
    ("unit", "most"), [("line", 200), pytest.param("opcode", 1000, marks=pytest.mark.slow)], ids=["lines", "opcodes"]
)
def test_interrupted_in_memory(loop: str, unit: str, most: int) -> None:
    """Wherever Ctrl-C comes, the run ends, no lock is held, what was taken was returned, and what is left can be received."""
    interrupt(loop, unit, most)


@unmeasured
@both
@loops
@pytest.mark.parametrize("most", [20, pytest.param(100, marks=pytest.mark.slow)])
def test_interrupted_on_redis(kind: Kind, loop: str, most: int, redis_server: RedisServer) -> None:
    """Wherever Ctrl-C comes, also while the layer opens or closes, the layer closes in order and nothing but Ctrl-C is raised."""
    interrupt(loop, "line", most, url_of(kind, redis_server), new_prefix())


@unmeasured
@pytest.mark.slow
@pytest.mark.parametrize("where", ["memory", "redis", "redis+pubsub"])
def test_interrupted_while_busy(where: str, redis_server: RedisServer) -> None:
    """On trio a busy layer ends at every one of many Ctrl-C at random moments."""
    if where == "memory":
        interrupt("trio", "timer", 300)
    else:
        interrupt("trio", "timer", 100, redis_server.url.replace("redis:", f"{where}:"), new_prefix())
