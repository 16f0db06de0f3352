"""What replies must look like: each parser takes what Redis says, and refuses all else in a way that the protocol knows."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from inspect import isfunction
from typing import Any

import hiredis
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anyio_channels.redis.client import Script, replies
from anyio_channels.redis.queue.scripts import CLUSTERED, GROUP_MEMBERS, GROUP_SEND, POP, SEND, SEND_WAITING, TICK

WRONG = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError)
ERROR = hiredis.ReplyError("ERR in it")
NOW = [b"1700000000", b"500000"]
SCRIPTS = {"send": SEND, "send waiting": SEND_WAITING, "pop": POP, "members": GROUP_MEMBERS, "broadcast": GROUP_SEND,
           "tick": TICK}  # fmt: skip


def of_script(script: Script) -> Callable[[Any], Any]:
    assert script.parse is not None
    return replies.whole if script.parse is int else script.parse  # the protocol checks for an int as that does


PARSERS: dict[str, Callable[[Any], Any]] = {
    **{name: found for name, found in vars(replies).items() if isfunction(found) and name[0] != "_"},
    **{name: of_script(script) for name, script in SCRIPTS.items()},
}

GOOD = [
    ("whole", -3, -3),
    ("text", b"zset", "zset"),
    ("text", b"\xff", "\ufffd"),
    ("bytes_list", [b"a", b"\xff"], [b"a", b"\xff"]),
    ("items", [1, b"a"], [1, b"a"]),
    ("seconds", NOW, 1_700_000_000.5),
    ("greeting", {b"proto": 3, b"version": b"7.0.15-rc.2", b"role": b"master"}, ((7, 0, 15), True, False)),
    ("greeting", {b"proto": 3, b"version": b"6.2", b"mode": b"cluster"}, ((6, 2), False, True)),
    ("slot_ranges", [], []),
    (
        "slot_ranges",
        [[0, 5, [b"a", 1, b"id", []], [b"b", 2, b"id"]], [6, 16383, [None, 3]]],
        [(0, 5, "a", 1), (6, 16383, "", 3)],
    ),
    ("scanned", [b"17", [b"a"]], (17, [b"a"])),
    ("address", None, None),
    ("address", [b"::1", b"6379"], ("::1", 6379)),
    ("info", b"# Server\r\nredis_version:7.0.15\r\nodd\r\nfile:/a:b\r\n", {"redis_version": "7.0.15", "file": "/a:b"}),
    ("counts", [b"a", 1, b"b", 0], {b"a": 1, b"b": 0}),
    ("scored", [[b"a", 1.5], [b"b", float("inf")]], [(b"a", 1.5), (b"b", float("inf"))]),
    ("popped_one", None, None),
    ("popped_one", [b"key", b"entry", 1.5], ("key", [(b"entry", 1.5)])),
    ("popped_many", None, None),
    ("popped_many", [b"key", [[b"a", 1.0], [b"b", 2.0]]], ("key", [(b"a", 1.0), (b"b", 2.0)])),
    ("send", -1, -1),
    ("send waiting", [1, 20], (1, 20)),
    ("pop", [2, b"1700000000.500000", [b"entry", b"1.5"]], (2, 1_700_000_000.5, [(b"entry", b"1.5")])),
    ("pop", [0, b"1", []], (0, 1.0, [])),
    ("members", [b"a"], [b"a"]),
    ("broadcast", [3, [], []], (3, [], [])),
    ("broadcast", [3, [1, 2], [2]], (3, [1, 2], [2])),
    ("tick", [1, NOW], (True, 1_700_000_000.5)),
]  # fmt: skip

BAD: dict[str, list[Any]] = {
    "whole": [None, True, 1.0, b"1", [], {}, ERROR],
    "text": [None, 1, [b"a"], ERROR],
    "bytes_list": [None, b"a", 1, {b"a": b"b"}, [1], [None], [[b"a"]], [ERROR]],
    "items": [None, 1, b"ab", {}, ERROR],
    "seconds": [None, 1, b"12", [], [b"1"], [b"1", b"2", b"3"], [1, 2], [b"now", b"then"], [b"1", ERROR]],
    "greeting": [None, 1, b"OK", [b"proto", 3], {}, {b"proto": 2, b"version": b"7"}, {b"proto": 3},
                 {b"proto": 3, b"version": 7}],
    "slot_ranges": [None, 1, b"OK", [1], [b"abcd"], [[0, 5]], [[0, 5, []]], [[0, 5, [b"a"]]], [[0, 5, [1, 2]]],
                    [[0, 16384, [b"a", 1]]], [[-1, 5, [b"a", 1]]], [[6, 5, [b"a", 1]]], [[0, b"5", [b"a", 1]]],
                    [[0, 5, [b"a", b"1"]]], {0: [5, [b"a", 1]]}],
    "scanned": [None, 1, [], [b"0"], [0, []], [b"x", []], [b"0", None], [b"0", [1]], [b"0", b"keys"]],
    "address": [1, b"a:1", [], [b"a"], [None, b"1"], [b"a", 1], [b"\xff", b"1"], [b"a", b"x"]],
    "info": [None, 1, [b"a:1"], {b"a": 1}],
    "counts": [None, 1, b"a", [b"a"], [1, 1], [b"a", b"1"]],
    "scored": [None, 1, b"ab", [b"a", 1.0], [[b"a"]], [[b"a", 1]], [[b"a", b"1"]], [[1, 1.0]], [[b"a", float("nan")]]],
    "popped_one": [1, b"OK", [], [b"key", [[b"a", 1.0]]], [b"key", b"entry", b"1"], [1, b"entry", 1.0], [b"\xff", b"e", 1.0]],
    "popped_many": [1, b"OK", [], [b"key", b"entry", 1.0], [b"key", None], [b"key", [b"a", 1.0]], [None, []]],
    "send": [None, b"1", [], [1]],
    "send waiting": [None, 1, [1], [1, b"2"], [b"1", 2], [1, 2, 3]],
    "pop": [None, 1, [], [0, b"1"], [0, [], []], [0, b"x", []], [b"0", b"1", []], [0, b"1", [b"a"]], [0, b"1", [b"a", b"x"]],
            [0, b"1", [b"a", 1]], [0, b"1", None]],
    "members": [None, 1, b"a", [1]],
    "broadcast": [None, 1, [], [b"1"], [0, [], [b"1"]], [0, [b"1"], []], [0, 1, []], [0, []], [b"0", [], []]],
    "tick": [None, 1, [1], [b"1", NOW], [1, b"12"], [None, NOW]],
}  # fmt: skip


@pytest.mark.parametrize(("parser", "reply", "expected"), GOOD, ids=repr)
def test_what_redis_says(parser: str, reply: Any, expected: Any) -> None:
    """A reply as Redis gives it is returned in the form that callers use."""
    assert PARSERS[parser](reply) == expected


@pytest.mark.parametrize(("parser", "reply"), [(name, reply) for name, bad in BAD.items() for reply in bad], ids=repr)
def test_what_redis_does_not_say(parser: str, reply: Any) -> None:
    """Whatever else comes is refused."""
    with pytest.raises(WRONG):
        PARSERS[parser](reply)


def test_every_parser_is_in_the_tables() -> None:
    """No parser is left out, and those of a cluster's scripts are the same."""
    assert {name for name, _, _ in GOOD} == set(BAD) == set(PARSERS)
    assert all(CLUSTERED[script].parse is script.parse for script in (SEND, SEND_WAITING, POP))


hashable = st.none() | st.booleans() | st.integers() | st.floats() | st.binary() | st.just(ERROR)
anything = st.recursive(
    hashable, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(hashable, inner, max_size=3), max_leaves=12
)


@given(st.sampled_from(sorted(PARSERS)), anything)
def test_nothing_else_is_raised(parser: str, reply: Any) -> None:
    """Whatever a server says, a parser returns something or raises what the protocol takes for a wrong type."""
    with suppress(*WRONG):
        PARSERS[parser](reply)
