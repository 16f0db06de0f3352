"""RESP3 as tables of bytes, without an event loop: each case whole, at every split, byte by byte, with more behind it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import hiredis
import pytest
import redis.exceptions
from hypothesis import given
from hypothesis import strategies as st

from anyio_channels.redis.client.errors import (
    ConnectionLost,
    ConnectionTimeout,
    WrongTypeError,
    to_error,
)
from anyio_channels.redis.client.protocol import MOST_ELEMENTS, PIECE, Request, RespProtocol

NAME = "Redis at there:1"
KINDS = {
    "simple string": (b"+OK\r\n", b"OK"),
    "integer": (b":-42\r\n", -42),
    "bulk": (b"$8\r\n+a\r\n-b\r\n\r\n", b"+a\r\n-b\r\n"),
    "empty bulk": (b"$0\r\n\r\n", b""),
    "null": (b"_\r\n", None),
    "null bulk": (b"$-1\r\n", None),
    "null array": (b"*-1\r\n", None),
    "double": (b",1.5\r\n", 1.5),
    "infinity": (b",-inf\r\n", float("-inf")),
    "not a number": (b",nan\r\n", float("nan")),
    "true": (b"#t\r\n", True),
    "false": (b"#f\r\n", False),
    "big number": (b"(3492890328409238509324850943850943825024385\r\n", b"3492890328409238509324850943850943825024385"),
    "verbatim": (b"=7\r\ntxt:abc\r\n", b"abc"),
    "array": (b"*2\r\n:1\r\n$1\r\nx\r\n", [1, b"x"]),
    "empty array": (b"*0\r\n", []),
    "map": (b"%2\r\n+a\r\n:1\r\n:2\r\n_\r\n", {b"a": 1, 2: None}),
    "set": (b"~2\r\n:1\r\n:2\r\n", [1, 2]),
    "nested": (b"*2\r\n%1\r\n+k\r\n*1\r\n~1\r\n:7\r\n*1\r\n*0\r\n", [{b"k": [[7]]}, [[]]]),
    "error in an array": (b"*1\r\n-ERR in it\r\n", [hiredis.ReplyError("ERR in it")]),
    "what looks like a header, in a string": (b"$18\r\n\n*99999999\r\n%1\r\n\r\n\r\n", b"\n*99999999\r\n%1\r\n\r\n"),
    "what begins with a header": (b"$11\r\n*99999999\r\n\r\n", b"*99999999\r\n"),
    "what ends like a header": (b"*2\r\n$5\r\nabc\n*\r\n=8\r\ntxt:\n%12\r\n", [b"abc\n*", b"\n%12"]),
}
ENDS = {
    "HTTP": (b"HTTP/1.1 400 Bad Request\r\n", '"H"'),
    "an empty line": (b"\r\n", ""),
    "half a number": (b":12a\r\n", ""),
    "a list as a key": (b"%1\r\n*0\r\n:1\r\n", "unhashable"),
    "too deep": (b"*1\r\n" * 5000, ""),
    "a streamed array": (b"*?\r\n", ""),
    "leading zeros": (b"*000000000000000000001\r\n", ""),
}


def same(one: object, other: object) -> bool:
    """Equal in value and type, all the way down, and not-a-number too."""
    return repr(one) == repr(other)


def splits(wire: bytes) -> Iterator[list[bytes]]:
    """``wire`` whole, in two at every place, and byte by byte."""
    yield [wire]
    for cut in range(1, len(wire)):
        yield [wire[:cut], wire[cut:]]
    yield [wire[at : at + 1] for at in range(len(wire))]


def add(protocol: RespProtocol, request: Request) -> None:
    """Queue a request, as the driver does."""
    request.queue = protocol.queue
    protocol.queue[request] = None


def waiting(*requests: Request, queued: Sequence[Request] = ()) -> RespProtocol:
    """A protocol on which ``requests`` are in flight, and ``queued`` are not."""
    protocol = RespProtocol(NAME)
    for request in requests:
        add(protocol, request)
    protocol.data_to_send()
    for request in queued:
        add(protocol, request)
    return protocol


def echo(number: int = 0) -> Request:
    return Request(("ECHO", number))


def feed(protocol: RespProtocol, chunks: Sequence[bytes]) -> list[Any]:
    return [event for chunk in chunks for event in protocol.receive(chunk)]


def check_lost(request: Request, words: str, *, may_have_run: bool) -> None:
    with pytest.raises(ConnectionLost, match=words) as info:
        request.result()
    assert not isinstance(info.value, ConnectionTimeout)
    assert info.value.may_have_run == may_have_run
    assert str(info.value).startswith(f"{NAME}: the connection ended: ")
    assert str(info.value).endswith("; the command may have run" if may_have_run else "; the command was not sent")


# Replies


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_reply(kind: str) -> None:
    """A reply arrives as it is, however it is split, also with others in front and behind in one chunk."""
    wire, value = KINDS[kind]
    for chunks in splits(wire):
        request = echo()
        assert feed(waiting(request), chunks) == [request]
        assert same(request.result(), value)
    for chunks in splits(wire * 2 + b"+last\r\n"):
        requests = [echo(number) for number in range(3)]
        protocol = waiting(*requests)
        assert feed(protocol, chunks) == requests
        assert same([request.result() for request in requests], [value, value, b"last"])
        assert not protocol.ended


@pytest.mark.parametrize(
    "push",
    [
        (b">3\r\n+message\r\n+a\r\n$2\r\n\r\n\r\n", [b"message", b"a", b"\r\n"]),
        (b">3\r\n+smessage\r\n+a\r\n+b\r\n", [b"smessage", b"a", b"b"]),
        (b">4\r\n+pmessage\r\n+*\r\n+a\r\n+b\r\n", [b"pmessage", b"*", b"a", b"b"]),
        (b">3\r\n+sunsubscribe\r\n+a\r\n:0\r\n", [b"sunsubscribe", b"a", 0]),
        (b">2\r\n+invalidate\r\n%1\r\n+a\r\n*0\r\n", [b"invalidate", {b"a": []}]),
        (b">0\r\n", []),
        (b">1\r\n_\r\n", [None]),
        (b">1\r\n*1\r\n:1\r\n", [[1]]),
    ],
    ids=repr,
)
def test_a_push_is_not_a_reply(push: tuple[bytes, Any]) -> None:
    """A push comes out as it is, in its place, whether a request waits or not, and answers none."""
    wire, value = push
    for chunks in splits(wire):
        assert feed(RespProtocol(NAME), chunks) == [value]
    for chunks in splits(wire + b"+here\r\n" + wire):
        request = echo()
        assert feed(waiting(request), chunks) == [value, request, value]
        assert request.result() == b"here"


@pytest.mark.parametrize(
    "wire",
    [
        b">1\r\n+message\r\n",
        b">2\r\n+message\r\n+a\r\n",
        b">3\r\n+message\r\n+a\r\n:1\r\n",
        b">3\r\n+message\r\n*0\r\n+b\r\n",
        b">4\r\n+message\r\n+a\r\n+b\r\n+c\r\n",
        b">3\r\n+smessage\r\n_\r\n+b\r\n",
        b">3\r\n+pmessage\r\n+a\r\n+b\r\n",
        b">4\r\n+pmessage\r\n+a\r\n:1\r\n+b\r\n",
        b">1\r\n+subscribe\r\n",
        b">3\r\n+subscribe\r\n:1\r\n:1\r\n",
        b">3\r\n+sunsubscribe\r\n+a\r\n_\r\n",
        b">3\r\n+unsubscribe\r\n+a\r\n+b\r\n",
    ],
    ids=repr,
)
def test_a_push_of_the_wrong_shape(wire: bytes) -> None:
    """A push that is known and not whole reaches nobody: the protocol ends."""
    for chunks in splits(wire + b"+late\r\n"):
        request, queued = Request(("SUBSCRIBE", "a")), echo()
        protocol = waiting(request, queued=[queued])
        assert feed(protocol, chunks) == [request, queued]
        check_lost(request, "it does not answer as Redis would: a push with ", may_have_run=True)
        check_lost(queued, "it does not answer as Redis would: a push with ", may_have_run=False)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("NOSCRIPT No matching script.", redis.exceptions.NoScriptError),
        ("OOM command not allowed when used memory > 'maxmemory'.", redis.exceptions.OutOfMemoryError),
        ("READONLY You can't write against a read only replica.", redis.exceptions.ReadOnlyError),
        ("NOPERM this user has no permissions", redis.exceptions.NoPermissionError),
        ("NOAUTH Authentication required.", redis.exceptions.AuthenticationError),
        ("WRONGPASS invalid username-password pair", redis.exceptions.AuthenticationError),
        ("LOADING Redis is loading the dataset in memory", redis.exceptions.BusyLoadingError),
        ("CLUSTERDOWN Hash slot not served", redis.exceptions.ClusterDownError),
        ("CROSSSLOT Keys in request don't hash to the same slot", redis.exceptions.ClusterCrossSlotError),
        ("MASTERDOWN Link with MASTER is down", redis.exceptions.MasterDownError),
        ("TRYAGAIN Multiple keys request during rehashing of slot", redis.exceptions.TryAgainError),
        ("ERR max number of clients reached", redis.exceptions.ConnectionError),
        ("ERR unknown command 'HELLO'", redis.exceptions.ResponseError),
        ("WRONGTYPE Operation against a key", WrongTypeError),
        ("ERR ACL failure in script: No permissions to access a key", redis.exceptions.NoPermissionError),
        ("ERR Error running script: @user_script:1: WRONGTYPE Operation against a key", WrongTypeError),
        ("ERR Error running script: @user_script: 1: -NOPERM no", redis.exceptions.NoPermissionError),
        ("ERR The user executing the script can't run this command", redis.exceptions.NoPermissionError),
        ("MOVED nowhere", redis.exceptions.ResponseError),
        ("ASK 1 2 3", redis.exceptions.ResponseError),
        ("MOVED", redis.exceptions.ResponseError),
        ("", redis.exceptions.ResponseError),
    ],
)
def test_error_replies(text: str, kind: type[Exception]) -> None:
    """What the server refuses is the error of the redis package for it, with the server's name and words; others go on."""
    for chunks in splits(f"-{text}\r\n".encode() + b"+OK\r\n"):
        refused, good = Request(("EVALSHA", "abc", 0), parse=int), echo()
        assert feed(waiting(refused, good), chunks) == [refused, good]
        assert isinstance(refused.error, kind)
        assert type(refused.error).__name__ in (kind.__name__, "Unreachable")
        assert text in repr(refused.error) or repr(text)[1:-1] in repr(refused.error)
        assert str(refused.error) == f"{NAME}: {text}"
        assert good.result() == b"OK"


@pytest.mark.parametrize(
    ("command", "names"),
    [
        (("SUBSCRIBE", "a", "b"), " ('a', 'b')"),
        (("SSUBSCRIBE", b"\xff"), " ('\ufffd')"),
        (("UNLINK", "a", "b", "c", "d", "e"), " ('a', 'b', 'c' and 2 more)"),
        (("PUBLISH", "a", b"secret"), " ('a')"),
        (("BZPOPMIN", "a", "b", 15.0), " ('a', 'b')"),
        (("BZMPOP", 15.0, 1, "a", "MIN", "COUNT", 10), " ('a')"),
        (("EVALSHA", "0123", 2, "a", "b", b"secret"), " ('a', 'b')"),
        (("HELLO", "3", "AUTH", "me", "secret"), ""),
        ((), ""),
    ],
)
def test_a_refusal_names_what_was_asked_for(command: tuple[bytes | str | float, ...], names: str) -> None:
    """Redis says that it is one of the keys or Redis channels; which were asked for stands behind, and nothing else does."""
    for text in (
        "NOPERM No permissions to access a key",
        "WRONGTYPE Operation against a key",
        "ERR in a script: -NOPERM odd",
    ):
        assert str(to_error(text, NAME, command)) == f"{NAME}: {text}{names}"
    for text in ("NOPERM User ann has no permissions to run the 'x' command", "OOM command not allowed"):
        assert str(to_error(text, NAME, command)) == f"{NAME}: {text}"


@pytest.mark.parametrize(("code", "kind"), [("MOVED", redis.exceptions.MovedError), ("ASK", redis.exceptions.AskError)])
def test_redirections(code: str, kind: type[redis.exceptions.AskError]) -> None:
    """A redirection says where to, as in the redis package."""
    error = to_error(f"{code} 3999 127.0.0.1:6381", NAME)
    assert isinstance(error, kind)
    assert (error.slot_id, error.node_addr) == (3999, ("127.0.0.1", 6381))


# Subscribing


@pytest.mark.parametrize(
    "command", ["SUBSCRIBE", "UNSUBSCRIBE", "PSUBSCRIBE", "PUNSUBSCRIBE", "SSUBSCRIBE", "SUNSUBSCRIBE"]
)
def test_subscribe_is_confirmed_by_pushes(command: str) -> None:
    """SUBSCRIBE and its kin are done with the push for their last name; other pushes and replies stay what they are."""
    word = command.lower().encode()
    message = b">3\r\n+message\r\n+a\r\n+hello\r\n"
    confirm = b">3\r\n$%d\r\n%s\r\n+%s\r\n:1\r\n"
    confirms = [confirm % (len(word), word, name) for name in (b"a", b"b", b"late")]
    wire = b":1\r\n" + message + confirms[0] + message + confirms[1] + b":2\r\n" + confirms[2]
    heard = [b"message", b"a", b"hello"]
    for chunks in splits(wire):
        before, subscribe, after = echo(), Request((command, "a", "b")), echo()
        late = [word, b"late", 1]
        assert feed(waiting(before, subscribe, after), chunks) == [before, heard, heard, subscribe, after, late]
        assert [before.reply, subscribe.reply, after.reply] == [1, [word, b"b", 1], 2]


def test_many_names_in_one_command() -> None:
    """One command may subscribe to any number of names."""
    names = [f"name{number}" for number in range(1000)]
    request = Request(("SUBSCRIBE", *names))
    protocol = waiting(request)
    wires = [b">3\r\n+subscribe\r\n+%s\r\n:1\r\n" % name.encode() for name in names]
    assert feed(protocol, wires[:-1]) == []
    assert feed(protocol, wires[-1:]) == [request]


def test_unsubscribe_from_nothing() -> None:
    """UNSUBSCRIBE without names, when there are no subscriptions, is confirmed by one push."""
    for chunks in splits(b">3\r\n+unsubscribe\r\n_\r\n:0\r\n+OK\r\n"):
        request, after = Request(("UNSUBSCRIBE",)), echo()
        assert feed(waiting(request, after), chunks) == [request, after]
        assert request.result() == [b"unsubscribe", None, 0]


def test_a_subscription_that_both_sides_end() -> None:
    """A cluster ends a subscription at the moment when we do: its push does not answer the next, nor does its late refusal."""
    ended = b">3\r\n+sunsubscribe\r\n+%s\r\n:0\r\n"
    for chunks in splits(ended % b"other" + ended % b"a" + b"-MOVED 1 127.0.0.1:1\r\n+PONG\r\n:1\r\n"):
        unsubscribe, fence, after = Request(("SUNSUBSCRIBE", "a")), Request(("PING",)), echo()
        fence.is_fence = True
        assert feed(waiting(unsubscribe, fence, after), chunks) == [
            [b"sunsubscribe", b"other", 0],
            unsubscribe,
            fence,
            after,
        ]
        assert [unsubscribe.reply, after.reply] == [[b"sunsubscribe", b"a", 0], 1]


def test_subscribe_may_be_refused() -> None:
    """An error in the place of the pushes answers SUBSCRIBE, and what is behind gets its own reply."""
    for chunks in splits(b"-NOPERM no permissions to access one of the channels\r\n+OK\r\n"):
        request, after = Request(("SUBSCRIBE", "a", "b")), echo()
        assert feed(waiting(request, after), chunks) == [request, after]
        assert isinstance(request.error, redis.exceptions.NoPermissionError)
        assert after.result() == b"OK"


def test_subscribe_wants_pushes() -> None:
    """A confirmation as in RESP2, by an array, is not taken for anything else."""
    for chunks in splits(b"*3\r\n+subscribe\r\n+a\r\n:1\r\n"):
        request = Request(("SUBSCRIBE", "a"))
        assert feed(waiting(request), chunks) == [request]
        check_lost(request, "a reply that nobody asked for: .b'subscribe', b'a', 1.", may_have_run=True)


# Requests


def test_commands_as_bytes() -> None:
    """A command is an array of bulk strings; numbers are written as text, and bytes as they are."""
    protocol = RespProtocol(NAME)
    add(protocol, Request((b"SET", "é", b"\r\n\xff", 12, 1.5)))
    assert (
        protocol.data_to_send() == b"*5\r\n$3\r\nSET\r\n$2\r\n\xc3\xa9\r\n$3\r\n\r\n\xff\r\n$2\r\n12\r\n$3\r\n1.5\r\n"
    )
    assert protocol.data_to_send() == b""


@pytest.mark.parametrize("argument", [None, True, ["a"], "\ud800"])
def test_what_cannot_be_written(argument: Any) -> None:
    """An argument that is not text, bytes or a number is refused before there is a request."""
    with pytest.raises((TypeError, UnicodeEncodeError)):
        Request(("GET", argument))


def test_what_is_queued_goes_out_at_once() -> None:
    """All requests of a moment come out together, in order, and are written from then on."""
    protocol = RespProtocol(NAME)
    requests = [echo(number) for number in range(3)]
    assert not protocol.queue
    for request in requests:
        add(protocol, request)
    assert protocol.queue
    assert not any(request.written for request in requests)
    assert protocol.data_to_send() == b"".join(request.data for request in requests)
    assert all(request.written for request in requests)
    assert list(protocol.pending) == requests
    requests[0].abandon()
    assert list(protocol.pending) == requests


def test_much_goes_out_in_pieces() -> None:
    """Much that is queued goes out piece by piece, whole requests in order; what is in none yet was not written."""
    protocol = RespProtocol(NAME)
    requests = [Request(("ECHO", b"x" * (PIECE // 3))) for _ in range(5)]
    for request in requests:
        add(protocol, request)
    assert protocol.data_to_send() == b"".join(request.data for request in requests[:3])
    assert [request.written for request in requests] == [True] * 3 + [False] * 2
    assert list(protocol.pending) == requests
    requests[3].abandon()
    assert protocol.data_to_send() == requests[4].data
    assert protocol.data_to_send() == b""
    assert list(protocol.pending) == [*requests[:3], requests[4]]
    assert not requests[3].written


def test_a_request_that_was_never_queued() -> None:
    """It can be abandoned too: its caller was cancelled before there was a connection."""
    request = echo()
    request.abandon()
    assert request.abandoned


def test_a_large_request_goes_out_whole() -> None:
    """A request that is larger than a piece is one by itself, or the end of one."""
    for sizes in ([2 * PIECE, 1], [1, 2 * PIECE, 1]):
        protocol = RespProtocol(NAME)
        requests = [Request(("ECHO", b"x" * size)) for size in sizes]
        for request in requests:
            add(protocol, request)
        assert protocol.data_to_send() == b"".join(request.data for request in requests[:-1])
        assert protocol.data_to_send() == requests[-1].data


def test_abandoned_requests() -> None:
    """Abandoned before it goes out, a request never does; after that it keeps its place, and swallows its reply."""
    for chunks in splits(b":0\r\n:1\r\n>3\r\n+subscribe\r\n+a\r\n:1\r\n:3\r\n"):
        early, first, late, subscribe, last = echo(9), echo(0), echo(1), Request(("SUBSCRIBE", "a")), echo(3)
        protocol = RespProtocol(NAME)
        for request in (early, first, late, subscribe, last):
            add(protocol, request)
        early.abandon()
        assert list(protocol.pending) == [first, late, subscribe, last]
        assert protocol.data_to_send() == first.data + late.data + subscribe.data + last.data
        late.abandon()
        subscribe.abandon()
        assert feed(protocol, chunks) == [first, late, subscribe, last]
        assert (first.reply, last.reply) == (0, 3)
        assert not early.written


# Ends


@pytest.mark.parametrize("end", ENDS)
def test_everyone_is_told_of_the_end(end: str) -> None:
    """At the first bytes that are wrong every request that waits is lost, and nothing behind them is parsed, ever."""
    wire, words = ENDS[end]
    for chunks in splits(b"+good\r\n" + wire[:100]) if len(wire) < 100 else [[b"+good\r\n" + wire]]:
        good, in_flight, queued = echo(), echo(), echo()
        protocol = waiting(good, in_flight, queued=[queued])
        assert feed(protocol, [*chunks, b"+late\r\n"]) == [good, in_flight, queued]
        assert good.result() == b"good"
        check_lost(in_flight, f"what the server sent is no RESP3: .*{words}", may_have_run=True)
        check_lost(queued, f"what the server sent is no RESP3: .*{words}", may_have_run=False)
        assert protocol.ended
        with pytest.raises(ConnectionLost, match=f"what the server sent is no RESP3: .*{words}.*was not sent"):
            raise protocol.lost(may_have_run=False)
        assert protocol.data_to_send() == b""
        assert list(protocol.pending) == []
        assert feed(protocol, [b"+late\r\n", b">1\r\n:1\r\n"]) == []


def test_a_reply_nobody_asked_for() -> None:
    """A server that answers unasked is not trusted with the next question; the error shows the beginning of the answer."""
    queued = echo()
    protocol = waiting(queued=[queued])
    assert feed(protocol, [b"+" + b"x" * 1000 + b"\r\n"]) == [queued]
    check_lost(queued, r"a reply that nobody asked for: b'x{98}; ", may_have_run=False)


def test_an_end_by_the_driver() -> None:
    """Whoever ends it gets all that waited, once; what comes afterwards is not looked at."""
    request = echo()
    protocol = waiting(request)
    cause = ValueError("cause")
    assert protocol.end("enough", cause=cause, kind=ConnectionTimeout) == [request]
    assert protocol.end("more than enough") == []
    assert protocol.receive(b">1\r\n:1\r\n+late\r\n") == []
    with pytest.raises(ConnectionTimeout, match="ended: enough; the command may have run") as info:
        request.result()
    assert info.value.__cause__ is cause


# What it announces


AGGREGATES = {"array": b"*", "map": b"%", "set": b"~", "push": b">", "attribute": b"|"}
PLACES = {
    "at first": (b"", []),
    "behind a reply": (b"+OK\r\n", [b"OK"]),
    "behind a string that looks like one": (b"$11\r\n\n*99999999\n\r\n", [b"\n*99999999\n"]),
    "in an array": (b"*3\r\n:1\r\n$3\r\na\r\n\r\n", []),
    "in a map": (b"%1\r\n+a\r\n", []),
    "deep": (b"*1\r\n*1\r\n*1\r\n", []),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize("count", [MOST_ELEMENTS + 1, 9_999_999, 2**31, 10**18, 10**30])
def test_an_announcement_that_is_too_large(aggregate: str, place: str, count: int) -> None:
    """More elements than the bound are refused when they are announced: no list is made for them."""
    before, replies = PLACES[place]
    wire = before + AGGREGATES[aggregate] + b"%d\r\n" % count
    for chunks in splits(wire):
        requests, last = [echo() for _ in replies], echo()
        protocol = waiting(*requests, last)
        assert feed(protocol, [*chunks, b":1\r\n"]) == [*requests, last]
        assert [request.reply for request in requests] == replies
        check_lost(last, "no RESP3: it announces more than 1048576 elements: ", may_have_run=True)


@pytest.mark.parametrize("aggregate", ["array", "set", "push"])
def test_an_announcement_at_the_bound(aggregate: str) -> None:
    """As many elements as the bound allows are waited for."""
    for chunks in splits(AGGREGATES[aggregate] + b"%d\r\n" % MOST_ELEMENTS):
        protocol = waiting(echo())
        assert feed(protocol, [*chunks, b":1\r\n" * 3]) == []
        assert not protocol.ended


@given(st.lists(st.sampled_from([b"\n", b"*", b"%", b"99999999", b"1", b"\r\n", b"x", b"*9999999\r\n"])), st.data())
def test_strings_that_look_like_announcements(parts: list[bytes], data: st.DataObject) -> None:
    """No string is taken for an announcement, however it is split."""
    value = b"".join(parts)
    wire = b"*2\r\n$%d\r\n%s\r\n:1\r\n=%d\r\ntxt:%s\r\n" % (len(value), value, len(value) + 4, value)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(wire)), max_size=6)))
    chunks = [wire[start:end] for start, end in zip([0, *cuts], [*cuts, len(wire)], strict=True) if start < end]
    first, second = echo(), echo()
    assert feed(waiting(first, second), chunks) == [first, second]
    assert [first.reply, second.reply] == [[value, 1], value]


# Replies of the wrong type


@pytest.mark.parametrize("error", [TypeError, ValueError, KeyError, IndexError, AttributeError, OverflowError])
def test_a_reply_of_a_wrong_type(error: type[Exception]) -> None:
    """A reply that its parser refuses ends the protocol: the command may have run, and nothing behind it is trusted."""

    def parse(reply: Any) -> Any:
        raise error("odd")

    for chunks in splits(b"*1\r\n+odd\r\n+late\r\n"):
        request, behind, queued = Request(("TIME",), parse), echo(), echo()
        protocol = waiting(request, behind, queued=[queued])
        assert feed(protocol, chunks) == [request, behind, queued]
        words = r"it does not answer as Redis would: TIME with \[b'odd'\]"
        check_lost(request, words, may_have_run=True)
        check_lost(behind, words, may_have_run=True)
        check_lost(queued, words, may_have_run=False)
        assert isinstance(request.error, ConnectionLost)
        assert isinstance(request.error.__cause__, error)


@pytest.mark.parametrize("reply", [b"+1\r\n", b"#t\r\n", b"_\r\n", b",1\r\n"], ids=repr)
def test_int_takes_integers_only(reply: bytes) -> None:
    """Where an integer is due, nothing that could be read as one is taken for it."""
    for chunks in splits(reply):
        request = Request(("INCR", "k"), int)
        assert feed(waiting(request), chunks) == [request]
        check_lost(request, "it does not answer as Redis would: INCR with ", may_have_run=True)


def test_a_reply_that_is_parsed() -> None:
    """The caller gets what the parser returns."""
    request = Request(("GET", "k"), parse=float)
    feed(waiting(request), [b"+12\r\n"])
    assert request.result() == 12.0


@pytest.mark.parametrize(
    ("wire", "number"), [(b":12\r\n", 12), (b"+12\r\n", None), (b"#t\r\n", None), (b",1.5\r\n", None)]
)
def test_a_reply_that_must_be_an_integer(wire: bytes, number: int | None) -> None:
    """``int`` as a parser converts nothing: what is not an integer is a wrong reply."""
    request = Request(("ZCARD", "k"), parse=int)
    feed(waiting(request), [wire])
    if number is None:
        check_lost(request, "it does not answer as Redis would: ZCARD", may_have_run=True)
    else:
        assert request.result() == number


def test_a_mistake_in_a_parser_is_not_hidden() -> None:
    """Only what a wrong type raises is taken for one."""

    def parse(reply: Any) -> Any:
        raise AssertionError

    with pytest.raises(AssertionError):
        feed(waiting(Request(("TIME",), parse)), [b"+1\r\n"])


# All at once

Wire = tuple[bytes, Any]
hashable: st.SearchStrategy[Wire] = st.one_of(
    st.binary().map(lambda value: (b"$%d\r\n%s\r\n" % (len(value), value), value)),
    st.from_regex(rb"[^\r\n]*", fullmatch=True).map(lambda value: (b"+%s\r\n" % value, value)),
    st.integers(-(2**63), 2**63 - 1).map(lambda value: (b":%d\r\n" % value, value)),
    st.integers().map(lambda value: (b"(%d\r\n" % value, b"%d" % value)),
    st.binary().map(lambda value: (b"=%d\r\ntxt:%s\r\n" % (len(value) + 4, value), value)),
    st.floats(allow_nan=False).map(lambda value: (b",%s\r\n" % repr(value).encode(), value)),
    st.booleans().map(lambda value: (b"#t\r\n" if value else b"#f\r\n", value)),
    st.sampled_from([b"_\r\n", b"$-1\r\n", b"*-1\r\n"]).map(lambda wire: (wire, None)),
)


def aggregate_of(sign: bytes, items: list[Wire]) -> Wire:
    return b"%s%d\r\n" % (sign, len(items)) + b"".join(wire for wire, _ in items), [value for _, value in items]


def map_of(pairs: list[tuple[Wire, Wire]]) -> Wire:
    wire = b"%%%d\r\n" % len(pairs) + b"".join(key + value for (key, _), (value, _) in pairs)
    return wire, {key: value for (_, key), (_, value) in pairs}


replies = st.recursive(
    hashable,
    lambda inner: st.one_of(
        st.lists(inner, max_size=5).map(lambda items: aggregate_of(b"*", items)),
        st.lists(inner, max_size=5).map(lambda items: aggregate_of(b"~", items)),
        st.lists(st.tuples(hashable, inner), max_size=4, unique_by=lambda pair: pair[0][1]).map(map_of),
    ),
    max_leaves=8,
)
pushes_of = st.lists(replies, max_size=4).map(lambda items: aggregate_of(b">", items))


@given(st.lists(st.tuples(st.booleans(), replies, pushes_of), max_size=6), st.lists(st.integers(1, 50), min_size=1))
def test_whatever_the_server_sends(said: list[tuple[bool, Wire, Wire]], sizes: list[int]) -> None:
    """Any values, any nesting, split anywhere, replies and pushes mixed: each arrives whole, where it belongs, in order."""
    requests = [echo(number) for number in range(sum(is_reply for is_reply, _, _ in said))]
    wire = b"".join(reply[0] if is_reply else push[0] for is_reply, reply, push in said)
    chunks: list[bytes] = []
    while wire:
        size = sizes[len(chunks) % len(sizes)]
        chunks.append(wire[:size])
        wire = wire[size:]
    events = feed(waiting(*requests), chunks)
    values = [event.result() if isinstance(event, Request) else list(event) for event in events]
    assert same(values, [reply[1] if is_reply else push[1] for is_reply, reply, push in said])
    assert [event for event in events if isinstance(event, Request)] == requests
