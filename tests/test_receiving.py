"""How messages of the queue layer come, without a server: the test plays Redis, and every order of events is possible."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import redis.exceptions
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from ormsgpack import packb

from anyio_channels import RedisChannelLayer
from anyio_channels.local.waiting import Mailroom, Waiter
from anyio_channels.redis.client import ConnectionLost
from anyio_channels.redis.client.errors import WrongTypeError
from anyio_channels.redis.queue.channels import QueueChannel, QueueDirectory, State
from anyio_channels.redis.queue.delivery import Delivery, Failure, Popped
from anyio_channels.redis.queue.receiving import Receiving, Source

NAMES = ["left.a", "left.b", "right.a"]
LOST = ConnectionLost("gone", may_have_run=False)
MAYBE = ConnectionLost("gone", may_have_run=True)


class Bell:
    """Rung without an event loop."""

    def __init__(self) -> None:
        self.rung = False

    def set(self) -> None:
        self.rung = True

    @property
    def waiting(self) -> Any:
        raise NotImplementedError


class Reader:
    """A task that receives once, as far as a mailbox can see."""

    def __init__(self, channel: QueueChannel) -> None:
        self.channel = channel
        self.got: Any = None
        self.left = False
        self._join(in_front=False)

    def _join(self, *, in_front: bool) -> None:
        self.waiter = Waiter(self.channel, Bell(), None)
        self.got = self.channel._take_or_join(self.waiter, in_front=in_front)
        if self.got is None:
            self.channel.reader_waits()

    def run(self) -> None:
        """Go on, if it was woken."""
        if self.got is None and not self.left and self.waiter.bell.rung:  # type: ignore[attr-defined]
            self.got = self.channel._take_promised(self.waiter)
            if self.got is None:
                self._join(in_front=True)

    def cancel(self) -> None:
        """Leave, with nothing."""
        if self.got is None and not self.left:
            self.left = True
            self.channel.directory.mailroom.abandon(self.waiter)
            self.channel.reader_left()


class PlayedSource(Source):
    """A source that says what the test has it say."""

    def __init__(self, redis_: PlayedRedis, side: str, *, is_cluster: bool) -> None:
        super().__init__()
        self.redis = redis_
        self.side = side
        self.must_stop = is_cluster
        self.is_refused = False

    def wait_for(self, channel: QueueChannel) -> None:
        assert self.blocked[channel.key] is channel
        assert channel.state is State.BLOCKED

    def stop_waiting(self, channel: QueueChannel) -> None:
        if self.must_stop and channel.key in self.blocked:
            self.redis.receiving.released(self, channel)

    def wait_for_own(self, key: str) -> None:
        raise NotImplementedError

    def try_again(self) -> None:
        self.is_refused = False

    async def until_ended(self) -> None:
        raise NotImplementedError

    def release_idle(self) -> None:
        """The blocking pop has ended: it goes on without the channels that nobody reads."""
        for channel in tuple(self.blocked.values()):
            if not channel.demand:
                self.redis.receiving.released(self, channel)


class PlayedRedis:
    """Two servers, what is in them, and what was asked of them and is not answered yet."""

    def __init__(self, *, is_cluster: bool = False) -> None:
        self.queues: dict[str, dict[bytes, float]] = {name: {} for name in NAMES}
        self.sources = {side: PlayedSource(self, side, is_cluster=is_cluster) for side in ("left", "right")}
        self.is_up = {"left": True, "right": True}
        self.in_flight: dict[str, deque[Callable[[Exception | None], None]]] = {"left": deque(), "right": deque()}
        self.wanted: dict[Callable[[], object], None] = {}
        self.later: list[Callable[[], object]] = []
        self.told: list[str] = []
        self.popping: dict[str, tuple[str, bytes, float]] = {}
        layer = RedisChannelLayer(prefix="", clock=lambda: 0.0)
        self.here = QueueDirectory(
            Mailroom(lambda: 0.0),
            lambda _: 100,
            lambda name: name,
            lambda _: None,
            mark="mine!",
            expiry=60,
            group_expiry=60,
            on_end=lambda *_: None,
        )
        self.delivery = Delivery(layer._setup, self.here)
        self.receiving = Receiving(self, self.delivery, layer._setup.troubles)
        self.here.receiving = self.receiving
        self.numbers = itertools.count(1)
        self.lost: set[int] = set()

    # What the machine asks for

    def side(self, key: str) -> str:
        return key.partition(".")[0]

    def can_ask(self, channel: QueueChannel) -> bool:
        return self.is_up[self.side(channel.key)]

    def source_of(self, channel: QueueChannel) -> Source:
        return self.sources[self.side(channel.key)]

    def fetch(self, channel: QueueChannel, count: int, *, tell: bool) -> None:
        assert channel.state is State.FETCHING
        if tell:
            self.told.append(channel.key)

        def answer(error: Exception | None) -> None:
            if error is None:
                self.receiving.fetched(channel, [(e, str(s).encode()) for e, s in self.take(channel.key, count)], 0.0)
            else:
                if error is MAYBE:  # it ran, and what it popped is lost with the reply
                    self.lost |= {number(entry) for entry, _ in self.take(channel.key, count)}
                self.receiving.refused(channel, error)

        self._ask(self.side(channel.key), answer)

    def give_back(self, channel: QueueChannel, items: Sequence[Popped]) -> None:
        self.delivery.forget(channel, items)

        def answer(error: Exception | None) -> None:
            if error is None or error is MAYBE:
                self.queues[channel.key] |= {item.entry: float(item.score) for item in items}
            elif not isinstance(error, redis.exceptions.ConnectionError):
                self.lost |= {number(item.entry) for item in items}
            self.receiving.gave_back(channel, items, 0.0, error)

        self._ask(self.side(channel.key), answer)

    def soon(self, act: Callable[[], object]) -> None:
        self.wanted[act] = None

    def after(self, seconds: float, act: Callable[[], object]) -> None:
        assert seconds > 0
        self.later.append(act)

    def _ask(self, side: str, answer: Callable[[Exception | None], None]) -> None:
        if self.is_up[side]:
            self.in_flight[side].append(answer)
        else:
            answer(LOST)

    # What the test does

    def channel(self, name: str) -> QueueChannel:
        found = self.here.find(name)
        assert isinstance(found, QueueChannel)
        return found

    def put(self, name: str) -> int:
        one = next(self.numbers)
        self.queues[name][b"%12d" % one + packb({"n": one})] = float(one)
        return one

    def take(self, name: str, count: int) -> list[tuple[bytes, float]]:
        taken = sorted(self.queues[name].items(), key=lambda pair: pair[1])[:count]
        for entry, _ in taken:
            del self.queues[name][entry]
        return taken

    def answer(self, side: str, error: Exception | None = None) -> None:
        self.in_flight[side].popleft()(error)

    def tidy(self) -> None:
        """Let the event loop go round."""
        wanted, self.wanted = self.wanted, {}
        for act in wanted:
            act()

    def pass_time(self) -> None:
        later, self.later = self.later, []
        for act in later:
            act()

    def begin_pop(self, name: str) -> None:
        """The blocking pop hands out a message."""
        ((entry, score),) = self.take(name, 1)
        self.popping[self.side(name)] = (name, entry, score)

    def end_pop(self, side: str) -> None:
        """What the blocking pop handed out arrives, if there is something on its way."""
        if (popped := self.popping.pop(side, None)) is not None:
            self.receiving.popped(self.sources[side], *popped, 0.0)
            self.sources[side].release_idle()

    def pop(self, name: str) -> None:
        self.begin_pop(name)
        self.end_pop(self.side(name))

    def cut(self, side: str, error: Exception) -> None:
        self.is_up[side] = False
        while self.in_flight[side]:
            self.answer(side, error)

    def mend(self, side: str) -> None:
        self.is_up[side] = True
        self.receiving.unpark()

    def settle(self, readers: Sequence[Reader] = ()) -> None:
        """Let everything happen that is going to, with all servers there."""
        for side in self.is_up:
            self.mend(side)
        for _ in range(50):
            self.tidy()
            self.pass_time()
            for side, source in self.sources.items():
                self.end_pop(side)
                while self.in_flight[side]:
                    self.answer(side)
                source.is_refused = False
                source.release_idle()
                for key in list(source.blocked):
                    if key in source.blocked and self.queues[key]:
                        if source.must_stop:
                            self.receiving.announced(source, key)
                        else:
                            self.pop(key)
            for reader in readers:
                reader.run()

    def here_now(self) -> list[int]:
        """The messages in mailboxes."""
        return [
            number(item.entry)
            for channel in self.here.channels.values()
            for _, item in channel.entries
            if isinstance(item, Popped)
        ]


def number(entry: bytes) -> int:
    return int(entry[:12])


# A table of moments: what is between a message's leaving Redis and its reader's having it


@pytest.fixture(params=[False, True], ids=["blocking", "notified"])
def played(request: pytest.FixtureRequest) -> PlayedRedis:
    return PlayedRedis(is_cluster=request.param)


def gone_before(played: PlayedRedis, reader: Reader) -> None:
    reader.cancel()
    played.answer("left")


def gone_after(played: PlayedRedis, reader: Reader) -> None:
    played.answer("left")
    reader.cancel()


def gone_with_the_connection(played: PlayedRedis, reader: Reader) -> None:
    reader.cancel()
    played.cut("left", LOST)
    played.mend("left")


@pytest.mark.parametrize("leaving", [gone_before, gone_after, gone_with_the_connection])
@pytest.mark.parametrize("tidied", [False, True])
def test_a_reader_that_comes_again_is_in_time(
    played: PlayedRedis, leaving: Callable[[PlayedRedis, Reader], None], tidied: bool
) -> None:
    """The only reader is cancelled while a message is on its way, and comes again: it sees the order of sending."""
    sent = [played.put("left.a"), played.put("left.a")]
    channel = played.channel("left.a")
    leaving(played, Reader(channel))
    if tidied:
        played.tidy()
    readers = []
    for _ in sent:
        readers.append(Reader(channel))
        played.settle(readers)
    assert [number(reader.got.entry) for reader in readers] == sent


@pytest.mark.parametrize("leaving", [gone_before, gone_after])
def test_what_nobody_reads_goes_back(played: PlayedRedis, leaving: Callable[[PlayedRedis, Reader], None]) -> None:
    """A message that was popped for a reader who left is in Redis again, at its place."""
    sent = [played.put("left.a"), played.put("left.a")]
    leaving(played, Reader(played.channel("left.a")))
    played.settle()
    assert sorted(played.queues["left.a"].values()) == sent
    assert played.here_now() == []


@pytest.mark.parametrize("was_promised", [False, True])
def test_what_one_of_two_readers_does_not_take(played: PlayedRedis, was_promised: bool) -> None:
    """Two messages come for two readers, one of whom leaves: the other gets the first, and the second goes back."""
    sent = [played.put("left.a"), played.put("left.a")]
    played.cut("left", LOST)
    readers = [Reader(played.channel("left.a")) for _ in sent]
    played.mend("left")
    played.sources["left"].blocked.clear()
    readers[0].channel.state = State.IDLE
    played.receiving.begin(readers[0].channel)
    if was_promised:
        played.answer("left")
        readers[1].cancel()
        played.tidy()
        assert played.here_now() == sent[:1]
    else:
        readers[1].cancel()
        played.answer("left")
    readers[0].run()
    played.settle()
    assert number(readers[0].got.entry) == sent[0]
    assert list(played.queues["left.a"].values()) == [sent[1]]


@pytest.mark.parametrize("tidied", [False, True])
def test_a_pop_for_a_reader_who_left(played: PlayedRedis, tidied: bool) -> None:
    """The blocking pop has taken a message when its reader leaves: it goes back."""
    channel = played.channel("left.a")
    reader = Reader(channel)
    played.answer("left")
    assert channel.state is State.BLOCKED
    sent = played.put("left.a")
    ((entry, score),) = played.take("left.a", 1)
    reader.cancel()
    if tidied:
        played.tidy()
    if played.sources["left"].blocked:
        played.receiving.popped(played.sources["left"], "left.a", entry, score, 0.0)
    else:  # where messages are announced, nothing is popped for a channel that was released
        played.queues["left.a"][entry] = score
    played.settle()
    assert list(played.queues["left.a"].values()) == [sent]


def test_whoever_waits_for_room_is_told(played: PlayedRedis) -> None:
    """A source that finds a sender's marker has the next pop tell, whatever is in the channel."""
    reader = Reader(played.channel("left.a"))
    played.answer("left")
    sent = played.put("left.a")
    played.receiving.senders_wait(played.sources["left"], "left.a")
    assert played.told == ["left.a"]
    played.settle([reader])
    assert number(reader.got.entry) == sent


@pytest.mark.parametrize("stays", [True, False])
def test_whoever_waits_for_room_is_told_by_the_next_fetch(played: PlayedRedis, stays: bool) -> None:
    """The marker is gone from Redis: if the fetch that was to tell fails, the next does, for nobody if nobody reads."""
    reader = Reader(played.channel("left.a"))
    played.answer("left")
    played.receiving.senders_wait(played.sources["left"], "left.a")
    played.answer("left", LOST)
    played.told.clear()
    if not stays:
        reader.cancel()
    played.put("left.a")
    played.pop("left.a")
    assert played.told == ["left.a"]
    played.settle([reader] if stays else [])


def test_one_server_that_refuses_delays_nothing_at_another(played: PlayedRedis) -> None:
    """What is to be given back at one server is, while another one refuses, or is away."""
    left, right = played.put("left.a"), played.put("right.a")
    readers = [Reader(played.channel(name)) for name in ("left.a", "right.a")]
    played.answer("left")
    played.answer("right")
    played.cut("left", LOST)
    played.receiving.source_refused(played.sources["left"], redis.exceptions.ReadOnlyError("READONLY"))
    for reader in readers:
        reader.cancel()
    played.tidy()
    played.answer("right")
    assert list(played.queues["right.a"].values()) == [right]
    assert played.here_now() == [left]
    played.mend("left")
    played.tidy()
    played.answer("left")
    assert list(played.queues["left.a"].values()) == [left]


def test_what_is_refused_for_a_while_waits(played: PlayedRedis) -> None:
    """A give-back that Redis refuses for a while is here for the next reader, and is tried again after a pause."""
    played.put("left.a")
    gone_after(played, Reader(played.channel("left.a")))
    played.tidy()
    played.answer("left", redis.exceptions.ReadOnlyError("READONLY"))
    assert played.here_now() == [1]
    assert played.later
    played.settle()
    assert list(played.queues["left.a"].values()) == [1]


def test_what_redis_does_not_take_is_lost_and_counted(played: PlayedRedis) -> None:
    """A give-back that Redis refuses for good is counted as discarded."""
    played.put("left.a")
    gone_after(played, Reader(played.channel("left.a")))
    played.tidy()
    played.answer("left", redis.exceptions.NoPermissionError("NOPERM"))
    assert played.here.figures()["discarded"] == 1


def test_what_redis_may_have_taken_is_not_given_back_again(played: PlayedRedis) -> None:
    """A give-back whose answer was lost is counted as discarded: another process may have the message by now."""
    played.put("left.a")
    gone_after(played, Reader(played.channel("left.a")))
    played.tidy()
    played.cut("left", MAYBE)
    assert played.here_now() == []
    assert played.here.figures()["discarded"] == 1


def test_a_refusal_is_for_the_readers_of_that_channel(played: PlayedRedis) -> None:
    """A key that holds something else is told to those who read it, and to nobody else."""
    reader, other = Reader(played.channel("left.a")), Reader(played.channel("left.b"))
    played.answer("left", WrongTypeError("WRONGTYPE"))
    played.answer("left")
    for one in (reader, other):
        one.run()
    assert isinstance(reader.got, Failure)
    assert other.got is None


def test_a_refusal_that_names_no_key(played: PlayedRedis) -> None:
    """Where a pop over many keys is refused, they are fetched one by one: then it shows whose it is."""
    readers = [Reader(played.channel(name)) for name in ("left.a", "left.b")]
    played.answer("left")
    played.answer("left")
    played.receiving.source_refused(played.sources["left"], WrongTypeError("WRONGTYPE"))
    played.answer("left", WrongTypeError("WRONGTYPE"))
    played.answer("left")
    for reader in readers:
        reader.run()
    assert [isinstance(reader.got, Failure) for reader in readers] == [True, False]


def test_what_is_announced_while_fetching_is_fetched(played: PlayedRedis) -> None:
    """Something was sent behind the back of a fetch: another one follows."""
    reader = Reader(played.channel("left.a"))
    played.receiving.announced(played.sources["left"], "left.a")
    played.answer("left")
    sent = played.put("left.a")
    assert reader.channel.state is State.FETCHING
    played.answer("left")
    reader.run()
    assert number(reader.got.entry) == sent


def test_an_unknown_key_is_announced(played: PlayedRedis) -> None:
    """Nobody reads it: nothing is asked for."""
    played.receiving.announced(played.sources["left"], "left.a")
    assert not played.in_flight["left"]


def test_while_redis_is_away_readers_block(played: PlayedRedis) -> None:
    """A reader that comes during an outage waits for the source, which is there again before the connection for commands."""
    played.cut("left", LOST)
    reader = Reader(played.channel("left.a"))
    assert reader.channel.state is State.BLOCKED
    sent = played.put("left.a")
    played.pop("left.a")
    reader.run()
    assert number(reader.got.entry) == sent
    assert played.channel("left.a").state is State.IDLE


@pytest.mark.parametrize("moment", ["fetching", "popping", "here"])
def test_closing_keeps_what_was_popped(played: PlayedRedis, moment: str) -> None:
    """What comes when the layer is being closed, or is here then, is kept to be given back."""
    played.put("left.a")
    reader = Reader(played.channel("left.a"))
    if moment == "fetching":
        played.receiving.close()
        played.answer("left")
    elif moment == "here":
        played.answer("left")
        played.receiving.close()
    else:
        ((entry, score),) = played.take("left.a", 1)
        played.answer("left")
        played.receiving.close()
        played.receiving.popped(played.sources["left"], "left.a", entry, score, 0.0)
    assert [number(popped.entry) for _, popped in played.receiving.late] == [1]
    assert reader.got is None
    played.receiving.begin(reader.channel)
    assert not played.in_flight["left"]


# Every order of events


class ReceivingMachine(RuleBasedStateMachine):
    """Messages, readers, servers that come and go: each message has one fate, and none waits beside a reader."""

    is_cluster = False

    def __init__(self) -> None:
        super().__init__()
        self.redis = PlayedRedis(is_cluster=self.is_cluster)
        self.readers: list[Reader] = []
        self.sent: set[int] = set()

    @rule(name=st.sampled_from(NAMES))
    def send(self, name: str) -> None:
        self.sent.add(self.redis.put(name))

    @rule(name=st.sampled_from(NAMES))
    def read(self, name: str) -> None:
        self.readers.append(Reader(self.redis.channel(name)))

    @precondition(lambda self: self.readers)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        data.draw(st.sampled_from(self.readers)).cancel()

    @rule()
    def go_round(self) -> None:
        self.redis.tidy()
        for reader in self.readers:
            reader.run()

    @rule()
    def pass_time(self) -> None:
        self.redis.pass_time()

    @rule(side=st.sampled_from(["left", "right"]), error=st.sampled_from([None, None, None, "READONLY", "WRONGTYPE"]))
    def answer(self, side: str, error: str | None) -> None:
        errors = {
            "READONLY": redis.exceptions.ReadOnlyError("READONLY"),
            "WRONGTYPE": WrongTypeError("WRONGTYPE"),
        }
        if self.redis.in_flight[side]:
            self.redis.answer(side, None if error is None else errors[error])

    @rule(name=st.sampled_from(NAMES))
    def pop(self, name: str) -> None:
        source = self.redis.sources[self.redis.side(name)]
        is_popping = source.side in self.redis.popping
        if name in source.blocked and self.redis.queues[name] and not source.must_stop and not is_popping:
            self.redis.begin_pop(name)

    @rule(side=st.sampled_from(["left", "right"]))
    def end_pop(self, side: str) -> None:
        self.redis.end_pop(side)

    @rule(name=st.sampled_from(NAMES))
    def announce(self, name: str) -> None:
        if not self.is_cluster:
            return
        self.redis.receiving.announced(self.redis.sources[self.redis.side(name)], name)

    @rule(name=st.sampled_from(NAMES))
    def senders_wait(self, name: str) -> None:
        source = self.redis.sources[self.redis.side(name)]
        if name in source.blocked and source.side not in self.redis.popping:
            self.redis.receiving.senders_wait(source, name)

    @rule(side=st.sampled_from(["left", "right"]), fatal=st.booleans())
    def refuse(self, side: str, fatal: bool) -> None:
        source = self.redis.sources[side]
        if side in self.redis.popping:
            return
        error = WrongTypeError("WRONGTYPE") if fatal else redis.exceptions.ResponseError("UNBLOCKED")
        self.redis.receiving.source_refused(source, error)

    @rule(side=st.sampled_from(["left", "right"]), may_have_run=st.booleans())
    def cut(self, side: str, may_have_run: bool) -> None:
        self.redis.cut(side, MAYBE if may_have_run else LOST)

    @rule(side=st.sampled_from(["left", "right"]))
    def mend(self, side: str) -> None:
        self.redis.mend(side)

    @invariant()
    def one_thing_at_a_time(self) -> None:
        for channel in self.redis.here.channels.values():
            assert isinstance(channel, QueueChannel)
            is_blocked = channel.key in self.redis.sources[self.redis.side(channel.key)].blocked
            assert is_blocked is (channel.state is State.BLOCKED)

    def teardown(self) -> None:
        self.redis.settle(self.readers)
        got = [number(reader.got.entry) for reader in self.readers if isinstance(reader.got, Popped)]
        waiting = [number(entry) for queue in self.redis.queues.values() for entry in queue]
        assert sorted([*got, *waiting, *self.redis.lost]) == sorted(self.sent)
        assert self.redis.here_now() == []
        for name, queue in self.redis.queues.items():
            hungry = [one for one in self.readers if one.channel.key == name and one.got is None and not one.left]
            assert not (queue and hungry), f"{len(hungry)} readers of {name} wait beside {len(queue)} messages"


@pytest.mark.parametrize("is_cluster", [False, True], ids=["blocking", "notified"])
def test_every_order_of_events(is_cluster: bool) -> None:
    """Each message is received once, is in Redis, or is counted as lost; no reader waits beside a message."""

    class Machine(ReceivingMachine):
        pass

    Machine.is_cluster = is_cluster
    run_state_machine_as_test(Machine, settings=settings(max_examples=200, stateful_step_count=40))
