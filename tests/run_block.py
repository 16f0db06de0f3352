"""Runs the code on standard input as a script: ``run_block.py PAGE LINE WAY``; for ``doc_pages``.

Where the code does not name a backend, it gets the one that ``WAY`` names. Tracebacks name the page and its line.
"""

from __future__ import annotations

import logging
import sys

import anyio

from anyio_channels.sync import SyncChannelLayer
from anyio_channels.wsgi import AsgiToWsgi


def main(page: str, line: str, way: str) -> None:
    if way in {"asyncio", "trio"}:
        anyio.run.__kwdefaults__ = {**(anyio.run.__kwdefaults__ or {}), "backend": way}
        for edge in (SyncChannelLayer, AsgiToWsgi):
            edge.__init__.__defaults__ = (way,)
    logging.getLogger().addHandler(logging.NullHandler())  # what is logged is no complaint
    code = compile("\n" * (int(line) - 1) + sys.stdin.read(), page, "exec", dont_inherit=True)
    exec(code, vars(sys.modules["__main__"]))


if __name__ == "__main__":
    main(*sys.argv[1:])
