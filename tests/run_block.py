"""Runs blocks of code as scripts, each in a process of its own; for ``doc_pages``.

A request is a line of JSON on standard input, the answer to it the script's exit code. Each script is a fork of this process,
which has imported the package once for all. Where the code does not name a backend, it gets the one that the request names.
Tracebacks name the page and its line.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from types import ModuleType
from typing import Any

import anyio

import anyio_channels.layers.redis  # noqa: F401 - so that no script need import it
from anyio_channels.sync import SyncChannelLayer
from anyio_channels.wsgi import AsgiToWsgi


def serve() -> dict[str, Any]:
    """Fork for each request; return it in the fork."""
    while line := sys.stdin.readline():
        request: dict[str, Any] = json.loads(line)
        if (child := os.fork()) == 0:
            return request
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        sys.stdout.write(f"{code}\n")
        sys.stdout.flush()
    sys.exit()


def become_script(directory: str, output: str, errors: str) -> None:
    """Go where the script is to run; it has no input, and its output goes into files."""
    os.chdir(directory)
    for descriptor, path, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
        (2, errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
    ):
        opened = os.open(path, flags)
        os.dup2(opened, descriptor)
        os.close(opened)


def main(page: str, line: int, way: str, text: str) -> None:
    if way in {"asyncio", "trio"}:
        anyio.run.__kwdefaults__ = {**(anyio.run.__kwdefaults__ or {}), "backend": way}
        for edge in (SyncChannelLayer, AsgiToWsgi):
            edge.__init__.__defaults__ = (way,)
    logging.getLogger().addHandler(logging.NullHandler())  # what is logged is no complaint
    code = compile("\n" * (line - 1) + text, page, "exec", dont_inherit=True)
    script = sys.modules["__main__"] = ModuleType("__main__")
    exec(code, vars(script))


if __name__ == "__main__":
    request = serve()
    become_script(*request["place"])
    main(*request["script"])
