"""The console script ``anyio-channels``.

Rules:
- what only the command line needs is an optional extra, imported when the script runs. Where it is missing, the script
  says how to get it.
"""

from __future__ import annotations

import sys

__all__ = ["main"]

_EXTRA = frozenset({"anycorn", "click", "starlette"})


def main() -> None:
    """Run the command line and exit: 0 when all went well, 1 when it could not be done, 2 when called wrongly."""
    try:
        from anyio_channels.demo.command import cli  # noqa: PLC0415 - an optional extra
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _EXTRA:
            raise
        sys.stderr.write(f"anyio-channels needs {error.name}: pip install 'anyio_channels[demo]'\n")
        sys.exit(2)
    cli(prog_name="anyio-channels")


if __name__ == "__main__":
    main()
