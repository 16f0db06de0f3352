"""Which server owns a name: the one place that decides it.

Rules:
- a name is owned by the server of its non-local part, so that a channel, its process and what is sent to it meet there.
- the layers ask for every name, and do not know how many servers there are.

There is one server so far.
"""

from __future__ import annotations

from collections.abc import Sequence

from .endpoint import Endpoint, Host, parse_hosts

__all__ = ["Topology"]


class Topology:
    """The servers of one layer."""

    def __init__(self, hosts: Sequence[Host] | None) -> None:
        """Take ``hosts`` as a layer does. ``ValueError`` for what is not supported."""
        self.endpoints: list[Endpoint] = parse_hosts(hosts)
        if len(self.endpoints) > 1:
            raise ValueError(
                f"hosts names {len(self.endpoints)} Redis servers; this version of anyio_channels supports one"
            )

    @property
    def name(self) -> str:
        """How errors and ``repr`` call the servers."""
        return ", ".join(endpoint.name for endpoint in self.endpoints)

    def owner(self, name: str) -> Endpoint:  # noqa: ARG002 - with one server, all names are its
        """Return the server that owns ``name``."""
        return self.endpoints[0]
