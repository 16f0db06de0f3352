"""A small Redis client on anyio. It has never heard of a channel layer.

From the bottom: ``protocol`` (no I/O), ``connection`` drives it, ``server`` logs in, ``link`` comes back, ``router`` and
``cluster`` know who owns a key, ``subscriptions`` are kept on all of them. ``address`` parses hosts and URLs.

What is imported here is for others; within the client, each file offers the names that do not begin with an underscore.
"""

from __future__ import annotations

from . import replies
from .address import Host, options_of, split_url
from .at_each import at_each, try_each
from .cluster import make_router
from .connection import Connection
from .errors import ABOUT_ONE_NAME, IF_NOT_TLS, IF_TLS, IF_UNTRUSTED, NO_CLUSTER, RESP3_NEEDED, ConnectionLost
from .link import Link, LinkEvents, Script, Timeouts
from .protocol import Argument, Done, Request
from .router import Router
from .sentinel import Sentinels
from .server import Server
from .subscriptions import Subscriptions

__all__ = [
    "ABOUT_ONE_NAME",
    "IF_NOT_TLS",
    "IF_TLS",
    "IF_UNTRUSTED",
    "NO_CLUSTER",
    "RESP3_NEEDED",
    "Argument",
    "Connection",
    "ConnectionLost",
    "Done",
    "Host",
    "Link",
    "LinkEvents",
    "Request",
    "Router",
    "Script",
    "Sentinels",
    "Server",
    "Subscriptions",
    "Timeouts",
    "at_each",
    "make_router",
    "options_of",
    "replies",
    "split_url",
    "try_each",
]
