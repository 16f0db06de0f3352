"""``python -m anyio_channels.cli``."""

from __future__ import annotations

from anyio_channels.cli import main

main()
