"""Messages that a cluster says twice, or too late, are heard once, in order."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from anyio_channels.layers.redis import twice
from anyio_channels.layers.redis.twice import MARK_LENGTH, Heard, Marks


@given(st.lists(st.integers(0, 300)), st.integers(0, 2**32 - 1))
def test_what_does_not_come_after_the_last_is_dropped(order: list[int], start: int) -> None:
    """In whatever order they come, and whatever number the sender began with."""
    heard = Heard()
    highest = -1
    for number in order:
        payload = b"sender__" + ((start + number) % 2**32).to_bytes(4, "big") + b"body"
        assert heard.is_new("room", payload) is (number > highest)
        highest = max(highest, number)


def test_senders_and_channels_are_told_apart() -> None:
    """Another sender, and another channel, have numbers of their own."""
    one, other, heard = Marks(), Marks(), Heard()
    first = one.next()
    assert len(first) == MARK_LENGTH
    assert [heard.is_new("a", mark) for mark in (first, first, one.next(), other.next())] == [True, False, True, True]
    assert heard.is_new("b", first)


def test_what_is_remembered_is_bounded() -> None:
    """Of many senders the one heard least lately is forgotten."""
    heard = Heard()
    marks = [Marks().next() for _ in range(twice._MOST + 1)]
    assert all(heard.is_new("a", mark) for mark in marks)
    assert len(heard._last) == twice._MOST
    assert [heard.is_new("a", mark) for mark in (marks[-1], marks[0])] == [False, True]
    assert next(itertools.islice(heard._last, 1))[1] == marks[2][:8]
