"""The console script ``anyio-channels``.

Rules:
- what only the command line needs is an optional extra, imported when the script runs. Where it is missing, the script
  says how to get it.
- a command is a module; ``commands`` puts them together, ``running`` starts and ends them, ``options`` makes the layer,
  ``output`` writes.
- of Redis it knows nothing: ``doctor.survey`` and ``doctor.checkup`` look into it.
"""

from __future__ import annotations

import os
import sys
from typing import TextIO

__all__ = ["main"]

_EXTRA = frozenset({"anycorn", "click", "rich", "starlette"})


def main() -> None:
    """Run the command line and exit: 0 when all went well, 1 when it could not be done, 2 when called wrongly."""
    try:
        from anyio_channels.cli.commands import cli  # noqa: PLC0415 - an optional extra

        cli(prog_name="anyio-channels")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _EXTRA:
            raise
        extra = "demo" if sys.argv[1:2] == ["demo"] else "cli"
        sys.stderr.write(f"anyio-channels needs {error.name}: pip install 'anyio_channels[{extra}]'\n")
        sys.exit(2)
    except OSError as error:
        if _forget_unwritten(sys.stdout):  # the help, for instance
            sys.stderr.write(f"Error: cannot write the output: {error.strerror}\n")
            sys.exit(1)
        raise
    finally:
        _forget_unwritten(sys.stderr)


def _forget_unwritten(stream: TextIO | None) -> bool:
    """Give up what a standard stream could not take, and return whether there was something.

    Python would try it once more as it ends, and exit with 120 for it.
    """
    if stream is not None:
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            return True
    return False
