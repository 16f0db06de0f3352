"""The console script in a process of its own, as users run it."""

from __future__ import annotations

import fcntl
import io
import os
import select
import signal
import struct
import subprocess
import sys
import termios
from contextlib import redirect_stderr, redirect_stdout
from types import TracebackType
from typing import IO, Any, Self
from unittest.mock import patch

import pytest

from anyio_channels.cli import main

PATIENCE = 60
START = [sys.executable, "-P", "-W", "error"]
SCRIPT = [*START, "-m", "anyio_channels.cli"]


def environment(**variables: str) -> dict[str, str]:
    """The environment of a script: that of the tests, but for what changes its output."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("ANYIO_CHANNELS_")}
    for name in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "TERM", "PYTHONUNBUFFERED"):
        kept.pop(name, None)
    return kept | variables


def run(*arguments: str, before: str = "", **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the script to its end; ``before`` is Python that runs first in its process."""
    start = SCRIPT
    if before:
        start = [*START, "-c", f"import sys\n{before}\nfrom anyio_channels.cli import main\nmain()"]
    return subprocess.run(
        [*start, *arguments],
        check=False,
        **{
            "capture_output": True,
            "encoding": "utf-8",
            "timeout": PATIENCE,
            "env": environment(),
            "stdin": None if "input" in options else subprocess.DEVNULL,
            **options,
        },
    )


def refused(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the script in this process, which is enough for a call that ends before anything is opened."""
    output, errors = io.StringIO(), io.StringIO()
    with (
        patch.dict(os.environ, environment(**variables), clear=True),
        patch.object(sys, "argv", ["anyio-channels", *arguments]),
        redirect_stdout(output),
        redirect_stderr(errors),
        pytest.raises(SystemExit) as ended,
    ):
        main()
    assert isinstance(ended.value.code, int)
    return subprocess.CompletedProcess(arguments, ended.value.code, output.getvalue(), errors.getvalue())


class Running:
    """The script while it runs; it ends with the block."""

    def __init__(self, *arguments: str, **options: Any) -> None:
        self.process = subprocess.Popen(
            [*SCRIPT, *arguments],
            **{
                "stdin": subprocess.DEVNULL,
                "stdout": subprocess.PIPE,
                "stderr": subprocess.PIPE,
                "encoding": "utf-8",
                "env": environment(),
                **options,
            },
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self.process:  # closes its pipes
            if error is not None:
                self.process.kill()

    @property
    def output(self) -> IO[str]:
        assert self.process.stdout is not None
        return self.process.stdout

    @property
    def errors(self) -> IO[str]:
        assert self.process.stderr is not None
        return self.process.stderr

    def end(self, number: int = signal.SIGINT) -> tuple[int, str, str]:
        """Send a signal; return the exit code and what was still written."""
        self.process.send_signal(number)
        return self.wait()

    def wait(self) -> tuple[int, str, str]:
        """Wait for its end; return the exit code and what was still written."""
        out, err = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, out, err


class Terminal:
    """A pseudo-terminal, as seen by whoever sits there; closed with the block."""

    def __init__(self, columns: int = 80, rows: int = 24) -> None:
        self.outside, self.inside = os.openpty()
        fcntl.ioctl(self.inside, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.inside)
        os.close(self.outside)

    def read_until(self, text: str) -> str:
        """Read what is written there, until it has ``text``."""
        seen = b""
        while text.encode() not in seen:
            assert select.select([self.outside], [], [], PATIENCE)[0], f"{text!r} never came; there was: {seen!r}"
            seen += os.read(self.outside, 65536)
        return seen.decode(errors="replace")
