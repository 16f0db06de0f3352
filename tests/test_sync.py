"""Any layer from synchronous code; deployments are in test_sync_deployed.py."""

from __future__ import annotations

import functools
import inspect
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import CancelledError
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch as patched

import anyio
import pytest
import redis.exceptions
from anyio import ClosedResourceError, create_task_group, to_thread
from layers_on_redis import new_prefix
from redis_server import RedisServer

from anyio_channels import (
    BaseChannelLayer,
    ChannelFull,
    InMemoryChannelLayer,
    MessagesLost,
    MessageTooLarge,
    RedisChannelLayer,
    RedisPubSubChannelLayer,
)
from anyio_channels import portal as portal_module
from anyio_channels.contract.layer import Message
from anyio_channels.otel import OpenTelemetryChannelLayer
from anyio_channels.portal import Portal
from anyio_channels.sync import SyncChannelLayer

PATIENCE = 60.0
BACKENDS = [
    pytest.param(("asyncio", {"use_uvloop": False}), id="asyncio"),
    pytest.param(("asyncio", {"use_uvloop": True}), id="uvloop"),
    pytest.param(("trio", {}), id="trio"),
]
SUBJECTS = [
    pytest.param((InMemoryChannelLayer, "asyncio", {"use_uvloop": False}), id="memory-asyncio"),
    pytest.param((InMemoryChannelLayer, "asyncio", {"use_uvloop": True}), id="memory-uvloop"),
    pytest.param((InMemoryChannelLayer, "trio", {}), id="memory-trio"),
    pytest.param((RedisChannelLayer, "asyncio", {"use_uvloop": True}), id="queue-uvloop"),
    pytest.param((RedisPubSubChannelLayer, "trio", {}), id="pubsub-trio"),
    pytest.param((RedisPubSubChannelLayer, "asyncio", {"use_uvloop": False}), id="pubsub-asyncio"),
]
"""Each layer, with each event loop somewhere; what crosses into a loop is the same whatever the layer does there."""


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    found: tuple[str, dict[str, Any]] = request.param
    return found


@pytest.fixture(params=SUBJECTS)
def sync(request: pytest.FixtureRequest) -> SyncChannelLayer:
    """A layer that is not open yet."""
    layer_class, backend, backend_options = request.param
    options: dict[str, Any] = {"capacity": 1000, "channel_capacity": {"small": 5}}
    if layer_class is not InMemoryChannelLayer:
        server: RedisServer = request.getfixturevalue("redis_server")
        options |= {"hosts": [server.url], "prefix": new_prefix()}
    return SyncChannelLayer(layer_class(**options), backend, backend_options=backend_options)


def keeps_messages(layer: SyncChannelLayer) -> bool:
    """Whether a message that nobody reads yet waits for its reader."""
    return not isinstance(layer.layer, RedisPubSubChannelLayer)


class TimeIsUp(BaseException):
    """What a signal handler raises, as Ctrl-C does, in the middle of anything."""


def unmeasured(test: Callable[..., None]) -> Callable[..., None]:
    """Run a test that interrupts everything in a process of its own: measuring coverage takes locks too."""

    @functools.wraps(test)
    def run(**arguments: Any) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("COV")}
        environment["PYTHONPATH"] = os.pathsep.join(sys.path)
        call = f"import test_sync; test_sync.{test.__name__}.__wrapped__(**{arguments!r})"
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", call],
            capture_output=True,
            text=True,
            timeout=3 * PATIENCE,
            check=False,
            env=environment,
        )
        assert (done.returncode, done.stderr) == (0, "")

    return run


class Caller(threading.Thread):
    """Calls a function in another thread, and has what became of it."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        super().__init__(daemon=True)
        self._call: Callable[[], Any] = lambda: function(*args)
        self._outcome: Any = None
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._outcome = self._call()
        except BaseException as error:  # noqa: BLE001 - raised by result()
            self._error = error

    def result(self) -> Any:
        self.join(PATIENCE)
        assert not self.is_alive(), "it still waits"
        if self._error is not None:
            raise self._error
        return self._outcome


def portal_of(layer: SyncChannelLayer) -> Portal:
    """Return the event loop that ``layer`` lives in."""
    return layer._portal


def life_of(portal: Portal) -> Any:
    """Return the opening of ``portal`` that is under way."""
    life = portal._life
    assert life is not None
    return life


def wait_for_readers(layer: SyncChannelLayer, count: int) -> None:
    """Return when so many calls wait for a message, in whatever threads."""
    while layer.statistics().waiting_receivers < count:
        time.sleep(0.001)  # spinning would take the interpreter from the threads that are to get there


def test_messages(sync: SyncChannelLayer) -> None:
    with sync as layer:
        channel = layer.new_channel("mine.")
        assert channel.startswith("mine.")
        reader = Caller(layer.receive, channel)
        wait_for_readers(layer, 1)
        layer.send(channel, {"type": "x", "n": (1, b"\0")})
        assert reader.result() == {"type": "x", "n": [1, b"\0"]}
        with pytest.raises(TimeoutError, match=r"no message came on channel 'empty' within 0\.01 s"):
            layer.receive("empty", timeout=0.01)


def test_groups(sync: SyncChannelLayer) -> None:
    with sync as layer:
        one, other = layer.new_channel(), layer.new_channel()
        for channel in (one, other, other):
            layer.group_add("room", channel)
        assert layer.group_channels("room") == {one, other}
        readers = [Caller(layer.receive, channel, PATIENCE) for channel in (one, other)]
        wait_for_readers(layer, 2)
        layer.group_send("room", {"type": "hello"}, exclude=[one])
        assert readers[1].result() == {"type": "hello"}
        layer.group_discard("room", other)
        layer.group_send("room", {"type": "again"})
        assert readers[0].result() == {"type": "again"}
        layer.flush()
        assert layer.group_channels("room") == set()


def test_an_inbox(sync: SyncChannelLayer) -> None:
    """A with block is a subscription, and iterating over it receives."""
    with sync as layer:
        with layer.subscribe("room", capacity=2, on_gap="raise") as inbox:
            inbox.join("other")
            assert layer.group_channels("other") == {inbox.channel}
            inbox.leave("other")
            assert layer.group_channels("other") == set()
            layer.group_send("room", {"n": 1})
            assert inbox.receive() == {"n": 1}
            for number in range(3):
                layer.group_send("room", {"n": number})
            got: list[Any] = []
            with pytest.raises(MessagesLost):
                got.extend(iter(inbox))  # an iterator without end
            assert got == [{"n": 0}, {"n": 1}]
            with pytest.raises(TimeoutError, match=rf"no message came on channel '{inbox.channel}' within 0\.01 s"):
                inbox.receive(timeout=0.01)
            assert repr(inbox) == f"<SyncInbox {inbox.channel} of {layer.layer!r}>"
        assert layer.group_channels("room") == set()
        with pytest.raises(ClosedResourceError):
            inbox.receive()


def test_errors_are_those_of_the_layer(sync: SyncChannelLayer) -> None:
    with sync as layer:
        with pytest.raises(TypeError, match="Channel name must be"):
            layer.send("no name", {})
        with pytest.raises(MessageTooLarge) as caught:
            layer.send("a", {"x": b"\0" * (layer.layer.max_message_size + 1)})
        assert isinstance(caught.value, layer.MessageTooLarge)
        with pytest.raises(TypeError, match="Group name must be"), layer.subscribe("no name"):
            pass
        for timeout in (-1, float("nan")):
            with pytest.raises(ValueError, match="timeout must be a positive, finite number of seconds"):
                layer.receive("a", timeout=timeout)
        with pytest.raises(ValueError, match="timeout=5 has no effect without wait=True"):
            layer.send("a", {}, timeout=5)


def test_what_is_there_is_taken_without_waiting(sync: SyncChannelLayer) -> None:
    """With ``timeout=0`` a message that is there is received, on a channel and in an inbox; without one it is a TimeoutError."""
    with sync as layer, layer.subscribe("room") as inbox:
        for number in range(100):  # more than may be received without giving way to others
            with pytest.raises(TimeoutError, match="there is no message on channel 'jobs'"):
                layer.receive("jobs", timeout=0)
            layer.send("jobs", {"n": number})
            assert layer.receive("jobs", timeout=0) == {"n": number}
        with pytest.raises(TimeoutError, match=f"there is no message on channel '{inbox.channel}'"):
            inbox.receive(timeout=0)
        layer.group_send("room", {"n": 1})
        while layer.statistics().buffered_messages == 0:
            time.sleep(0.001)  # it may still travel
        assert inbox.receive(timeout=0.0) == {"n": 1}
        assert layer.statistics().waiting_receivers == 0
        with pytest.raises(TypeError, match="Channel name must be"):
            layer.receive("no name", timeout=0)
        with pytest.raises(TypeError, match="must be a number of seconds"):
            layer.receive("jobs", timeout=False)
    with pytest.raises(ClosedResourceError):
        layer.receive("jobs", timeout=0)


def test_what_is_there_in_a_layer_of_ones_own() -> None:
    """``timeout=0`` needs nothing of a layer but that a reader who is cancelled has taken nothing."""

    class Own(BaseChannelLayer):
        def __init__(self) -> None:
            super().__init__()
            self.inner = InMemoryChannelLayer()

        async def send(self, channel: str, message: Message, *, wait: bool = False) -> None:
            await self.inner.send(channel, message)

        async def receive(self, channel: str) -> Message:
            return await self.inner.receive(channel)

    with SyncChannelLayer(Own()) as layer:
        with pytest.raises(TimeoutError):
            layer.receive("jobs", timeout=0)
        layer.send("jobs", {"n": 1})
        assert layer.receive("jobs", timeout=0) == {"n": 1}


def test_not_waiting_takes_nothing_from_those_who_wait(sync: SyncChannelLayer) -> None:
    """``receive(timeout=0)`` is behind a reader who waits already, who gets the next message."""
    with sync as layer:
        channel = layer.new_channel()
        reader = Caller(layer.receive, channel)
        wait_for_readers(layer, 1)
        with pytest.raises(TimeoutError):
            layer.receive(channel, timeout=0)
        layer.send(channel, {"n": 1})
        assert reader.result() == {"n": 1}


@pytest.mark.parametrize("traced", [False, True])
def test_what_waits_in_redis_is_there(redis_server: RedisServer, traced: bool) -> None:
    """``receive(timeout=0)`` asks Redis, also where Redis has forgotten the scripts, and below OpenTelemetry."""
    plain = RedisChannelLayer(hosts=[redis_server.url], prefix=new_prefix())
    with (
        SyncChannelLayer(OpenTelemetryChannelLayer(plain) if traced else plain) as layer,
        redis_server.client() as client,
    ):
        for number in range(3):
            layer.send("jobs", {"n": number})
        for number in range(3):
            assert layer.receive("jobs", timeout=0) == {"n": number}
            client.script_flush()
        with pytest.raises(TimeoutError):
            layer.receive("jobs", timeout=0)


def test_redis_takes_its_time_to_say_what_is_there(tmp_path: Path) -> None:
    """``receive(timeout=0)`` waits for what Redis answers, also if that comes late."""
    with (
        RedisServer(tmp_path) as server,
        SyncChannelLayer(RedisChannelLayer(hosts=[server.url], timeout=PATIENCE)) as layer,
    ):
        layer.send("jobs", {"n": 1})
        server.pause()
        reader = Caller(layer.receive, "jobs", 0)
        wait_for_readers(layer, 1)
        layer.statistics()  # the reader's call has gone on meanwhile
        server.resume()
        assert reader.result() == {"n": 1}


@pytest.mark.parametrize("layer_class", [RedisChannelLayer, RedisPubSubChannelLayer])
def test_nothing_is_there_while_redis_is_away(
    layer_class: type[RedisChannelLayer | RedisPubSubChannelLayer], tmp_path: Path
) -> None:
    """``receive(timeout=0)`` does not wait through an outage."""
    with RedisServer(tmp_path) as server, SyncChannelLayer(layer_class(hosts=[server.url], timeout=1)) as layer:
        server.kill()
        while layer.statistics().connections:  # type: ignore[attr-defined] # on Redis
            time.sleep(0.001)  # until it has noticed
        with pytest.raises(TimeoutError, match="there is no message"):
            layer.receive("jobs", timeout=0)


@pytest.mark.parametrize("sync", SUBJECTS[:4], indirect=True)
def test_capacity(sync: SyncChannelLayer) -> None:
    """A full channel refuses, or is waited for."""
    with sync as layer:
        for number in range(5):
            layer.send("small", {"n": number})
        with pytest.raises(ChannelFull) as caught:
            layer.send("small", {"n": 5})
        assert isinstance(caught.value, layer.ChannelFull)
        with pytest.raises(TimeoutError, match=r"there was no room in channel 'small' within 0\.01 s"):
            layer.send("small", {"n": 5}, wait=True, timeout=0.01)
        with pytest.raises(TimeoutError, match="there was no room in channel 'small'$"):
            layer.send("small", {"n": 5}, wait=True, timeout=0)
        sender = Caller(lambda: layer.send("small", {"n": 5}, wait=True))
        assert [layer.receive("small", PATIENCE)["n"] for _ in range(6)] == list(range(6))
        sender.result()
        layer.send("small", {"n": 6}, wait=True, timeout=0)
        assert layer.receive("small", timeout=0) == {"n": 6}


def test_many_threads(sync: SyncChannelLayer) -> None:
    """Every message of 20 threads arrives once, in the order of its thread."""
    with sync as layer, layer.subscribe("room", capacity=1000) as inbox:

        def send(sender: int) -> None:
            for number in range(20):
                layer.group_send("room", {"sender": sender, "number": number})

        senders = [Caller(send, number) for number in range(20)]
        got = [inbox.receive(PATIENCE) for _ in range(400)]
        for sender in senders:
            sender.result()
        for number in range(20):
            assert [one["number"] for one in got if one["sender"] == number] == list(range(20))


def test_closing_ends_the_waits(sync: SyncChannelLayer) -> None:
    """Readers in other threads are told; afterwards every call says that the layer is closed; it can be opened again."""
    layer = sync.open()
    inbox = layer.subscribe("room")
    inbox.__enter__()
    readers = [Caller(layer.receive, "a"), Caller(next, inbox)]
    wait_for_readers(layer, 2)
    layer.close()
    layer.close()
    for reader in readers:
        with pytest.raises(ClosedResourceError):
            reader.result()
    inbox.__exit__(None, None, None)
    with pytest.raises(ClosedResourceError, match=r"SyncChannelLayer\(.*\) is closed"):
        layer.send("a", {})
    with layer:
        assert layer.group_channels("room") == set()


def test_not_open() -> None:
    layer = SyncChannelLayer(InMemoryChannelLayer())
    with pytest.raises(RuntimeError, match="is not open: use it in a 'with' block, or call open"):
        layer.send("a", {})
    layer.close()
    with layer, pytest.raises(RuntimeError, match="is already open"):
        layer.open()


def test_a_layer_that_cannot_be_opened() -> None:
    """Its error is raised by open(), and opening may be tried again."""
    layer = SyncChannelLayer(RedisChannelLayer(hosts=[("127.0.0.1", 1)], connect_timeout=0.2))
    for _ in range(2):
        with pytest.raises(redis.exceptions.ConnectionError, match=r"127\.0\.0\.1:1"):
            layer.open()
    layer.close()


@pytest.mark.parametrize("call", ["open", "send", "receive", "close"])
def test_in_the_thread_of_an_event_loop(call: str, backend: tuple[str, dict[str, Any]]) -> None:
    """It would block the loop: it says so, and what to do instead. In a worker thread of that loop all is well."""
    layer = SyncChannelLayer(InMemoryChannelLayer())
    calls: dict[str, Callable[[], object]] = {
        "open": layer.open,
        "send": lambda: layer.send("a", {}),
        "receive": lambda: layer.receive("a"),
        "close": layer.close,
    }

    async def main() -> None:
        with pytest.raises(RuntimeError, match=r"would block the event loop .*anyio\.to_thread\.run_sync"):
            calls[call]()
        await to_thread.run_sync(layer.statistics if call != "open" else layer.open)

    if call != "open":
        layer.open()
    anyio.run(main, backend=backend[0], backend_options=backend[1])
    layer.close()


def test_shared_with_an_event_loop(backend: tuple[str, dict[str, Any]]) -> None:
    """An in-memory layer is one for threads with and without an event loop."""
    memory = InMemoryChannelLayer()

    async def main() -> Any:
        await to_thread.run_sync(layer.send, "to-loop", {"n": 1})
        message = await memory.receive("to-loop")
        await memory.send("to-thread", message)

    with SyncChannelLayer(memory) as layer:
        anyio.run(main, backend=backend[0], backend_options=backend[1])
        assert layer.receive("to-thread", PATIENCE) == {"n": 1}


@unmeasured
def test_an_interrupted_wait_takes_nothing(backend: tuple[str, dict[str, Any]]) -> None:
    """An exception out of a signal handler (Ctrl-C, a time limit) cancels the call; the next reader gets the message."""

    raised = threading.Event()

    def on_signal(*_: object) -> None:
        if not raised.is_set():
            raised.set()
            raise TimeIsUp

    def interrupt() -> None:
        wait_for_readers(layer, 1)
        raised.clear()
        while not raised.wait(0.02):  # one that comes just before Python waits for a lock is seen only after that wait
            signal.pthread_kill(main, signal.SIGUSR1)

    raised.set()
    main = threading.get_ident()
    before = signal.signal(signal.SIGUSR1, on_signal)
    try:
        with SyncChannelLayer(InMemoryChannelLayer(), backend[0], backend_options=backend[1]) as layer:
            for _ in range(20):
                helper = Caller(interrupt)
                with pytest.raises(TimeIsUp):
                    layer.receive("a")
                helper.result()
                layer.send("a", {"n": 1})
                assert layer.receive("a", PATIENCE) == {"n": 1}
            assert layer.statistics().waiting_receivers == 0
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_the_same_names_and_arguments() -> None:
    """Every public method and attribute of a layer is there, and takes what the asynchronous one takes."""
    not_for_users = {"open", "inbox_open", "inbox_close", "inbox_join", "inbox_leave"}
    internal = {"YIELD_EVERY", "invalid_name_error", "compile_capacities", "default", "max_message_size"}
    names = {name for name in vars(BaseChannelLayer) if not name.startswith("_")}
    assert names - not_for_users - internal <= set(vars(SyncChannelLayer))
    added = {"send": {"timeout"}, "receive": {"timeout"}}
    for name in names - not_for_users - internal:
        theirs = getattr(BaseChannelLayer, name)
        if callable(theirs) and not isinstance(theirs, type):
            ours = inspect.signature(getattr(SyncChannelLayer, name)).parameters
            expected = inspect.signature(theirs).parameters
            assert [one for one in ours if one not in added.get(name, ())] == list(expected), name
            assert all(ours[one].default == expected[one].default for one in expected), name


def test_what_needs_no_loop() -> None:
    layer = SyncChannelLayer(InMemoryChannelLayer(expiry=7, capacity=3, channel_capacity={"b*": 9}))
    assert (layer.expiry, layer.capacity, layer.get_capacity("a"), layer.get_capacity("bc")) == (7, 3, 3, 9)
    assert layer.channel_capacity == layer.layer.channel_capacity
    assert layer.extensions == ["groups", "flush"]
    assert layer.match_type_and_length("a")
    assert layer.require_valid_channel_name("a")
    assert layer.require_valid_group_name("a")
    assert layer.non_local_name("a!b") == "a!"


def test_wrong_options() -> None:
    wrong: Any = 5
    with pytest.raises(TypeError, match="layer must be a channel layer, not 5"):
        SyncChannelLayer(wrong)
    with pytest.raises(ValueError, match="backend must be one of 'asyncio', 'trio', not 'curio'"):
        SyncChannelLayer(InMemoryChannelLayer(), "curio")


def test_left_open() -> None:
    """A script that never closes its layer ends by itself, with nothing to say; its layer is closed at exit."""
    script = """
from anyio_channels import InMemoryChannelLayer
from anyio_channels.sync import SyncChannelLayer

class Layer(InMemoryChannelLayer):
    async def close(self):
        await super().close()
        print("closed")

layer = SyncChannelLayer(Layer()).open()
layer.send("a", {})
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], capture_output=True, timeout=PATIENCE, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"closed\n", b"")


def test_in_a_fork() -> None:
    """Every call says so, and leaving is silent. (Real forks are in test_sync_deployed.py; this one can be measured.)"""
    layer = SyncChannelLayer(InMemoryChannelLayer()).open()
    inbox = layer.subscribe("room").__enter__()
    life = life_of(portal_of(layer))
    life.pid += 1
    for call in (lambda: layer.send("a", {}), layer.open, inbox.receive):
        with pytest.raises(RuntimeError, match=r"was opened in process \d+, and this is a fork of it, process \d+"):
            call()
    inbox.__exit__(None, None, None)
    layer.close()
    life.pid -= 1
    portal_of(layer)._lock_pid += 1  # which a fork may have inherited taken: the child makes another one
    assert layer.group_channels("room") == {inbox.channel}
    layer.close()
    with layer:
        assert layer.group_channels("room") == set()


def test_an_inbox_that_cannot_be_entered(backend: tuple[str, dict[str, Any]]) -> None:
    class Refusing(InMemoryChannelLayer):
        async def inbox_open(self, *args: Any) -> str:
            raise KeyError("no inbox")

    with SyncChannelLayer(Refusing(), backend[0], backend_options=backend[1]) as layer:
        with pytest.raises(KeyError, match="no inbox"), layer.subscribe("room"):
            pass
        assert layer.group_channels("room") == set()


class Troubled:
    """What lives in a portal, and has its own troubles."""

    def __init__(self, *, at: str) -> None:
        self.at = at

    async def __aenter__(self) -> None:
        if self.at == "enter":
            raise KeyError(self.at)

    async def __aexit__(self, *_: object) -> None:
        if self.at == "exit":
            raise KeyError(self.at)


def test_troubles_of_what_lives_there(backend: tuple[str, dict[str, Any]]) -> None:
    portal = Portal("it", lambda: Troubled(at="enter"), *backend)
    with pytest.raises(KeyError, match="enter"):
        portal.open()
    portal = Portal("it", lambda: Troubled(at="exit"), *backend)
    portal.open()
    with pytest.raises(KeyError, match="exit"):
        portal.close()
    portal.close()


@pytest.mark.parametrize("at", ["enter", "exit", "never"])
def test_troubles_at_exit(at: str, backend: tuple[str, dict[str, Any]]) -> None:
    """What fails as the interpreter exits is told as when closing; nothing is, where nothing is open."""
    at_exit: list[Callable[[], object]] = []
    portal = Portal("it", lambda: Troubled(at=at), *backend)
    with patched("atexit.register", at_exit.append):
        if at == "enter":
            with pytest.raises(KeyError, match="enter"):
                portal.open()
        else:
            portal.open()
    (close,) = at_exit
    if at == "exit":
        with pytest.raises(KeyError, match="exit"):
            close()
    close()


def test_a_loop_that_ends_before_its_time(backend: tuple[str, dict[str, Any]]) -> None:
    """Who waits for a call is told that the portal is closed, and closing says why."""
    may_fail: list[anyio.Event] = []

    @asynccontextmanager
    async def resident() -> AsyncGenerator[None]:
        async def fail() -> None:
            await may_fail[0].wait()
            raise KeyError("of its own")

        async with create_task_group() as tasks:
            may_fail.append(anyio.Event())
            tasks.start_soon(fail)
            yield

    portal = Portal("it", resident, *backend)
    portal.open()
    waiting = portal.start("waiting", anyio.sleep_forever)
    asking = Caller(lambda: [portal.call("asking", anyio.sleep, 0) for _ in iter(int, 1)])
    portal.call_soon(may_fail[0].set)
    with pytest.raises(ClosedResourceError, match="it (is|was) closed"):
        asking.result()
    with pytest.raises(CancelledError):
        waiting.result(PATIENCE)
    with pytest.raises(ExceptionGroup) as caught:
        portal.close()
    assert caught.group_contains(KeyError, match="of its own")
    portal.call_soon(print)  # to nobody
    portal.close()


def test_exit_is_for_the_thread_that_called(backend: tuple[str, dict[str, Any]]) -> None:
    """SystemExit does not end the loop, which is for others too."""

    async def leave() -> None:
        raise SystemExit(5)

    portal = Portal("it", lambda: Troubled(at=""), *backend)
    portal.open()
    with pytest.raises(SystemExit):
        portal.call("leaving", leave)
    portal.call("asking", anyio.sleep, 0)
    portal.close()


def test_a_cancelled_call_that_fails(backend: tuple[str, dict[str, Any]]) -> None:
    """An error while it cleans up has nobody to go to; an exit ends the loop, and closing raises it."""
    begun = threading.Event()

    async def clean_up(error: BaseException) -> None:
        try:
            begun.set()
            await anyio.sleep_forever()
        finally:
            raise error

    portal = Portal("it", lambda: Troubled(at=""), *backend)
    portal.open()
    for error in (KeyError("x"), SystemExit(5)):
        begun.clear()
        future = portal.start("cleaning up", clean_up, error)
        assert begun.wait(PATIENCE)
        portal.cancel(future)
    with pytest.raises(BaseException) as caught:
        portal.close()
    assert isinstance(caught.value, SystemExit) or caught.group_contains(SystemExit)


def test_a_cancelled_call_that_returns(backend: tuple[str, dict[str, Any]]) -> None:
    """What is shielded goes on; nobody waits for what it returns."""
    begun = threading.Event()
    ended = threading.Event()
    may_end: list[anyio.Event] = []

    async def insist() -> None:
        with anyio.CancelScope(shield=True):
            may_end.append(anyio.Event())
            begun.set()
            await may_end[0].wait()
        ended.set()

    portal = Portal("it", lambda: Troubled(at=""), *backend)
    portal.open()
    future = portal.start("insisting", insist)
    assert begun.wait(PATIENCE)
    portal.cancel(future)
    portal.call_soon(may_end[0].set)
    assert ended.wait(PATIENCE)
    portal.close()


def hold_loop(portal: Portal) -> threading.Event:
    """Have the loop stand still, and return what lets it go on."""
    is_held = threading.Event()
    may_go_on = threading.Event()

    def hold() -> None:
        is_held.set()
        assert may_go_on.wait(PATIENCE)

    portal.call_soon(hold)
    assert is_held.wait(PATIENCE)
    return may_go_on


def test_a_call_that_crosses_closing(backend: tuple[str, dict[str, Any]]) -> None:
    """What was handed over too late to begin is cancelled: nobody waits for ever."""
    portal = Portal("it", lambda: Troubled(at=""), *backend)
    portal.open()
    may_go_on = hold_loop(portal)
    future = portal.start("coming late", anyio.sleep_forever)
    closing = Caller(portal.close)
    while life_of(portal).state == "open":
        time.sleep(0.001)  # until the other thread has begun to close it
    may_go_on.set()
    with pytest.raises(CancelledError):
        future.result(PATIENCE)
    closing.result()


def test_a_call_that_is_cancelled_before_it_begins(backend: tuple[str, dict[str, Any]]) -> None:
    begun: list[int] = []

    async def begin() -> None:
        begun.append(1)

    portal = Portal("it", lambda: Troubled(at=""), *backend)
    portal.open()
    may_go_on = hold_loop(portal)
    future = portal.start("beginning", begin)
    portal.cancel(future)
    may_go_on.set()
    with pytest.raises(CancelledError):
        future.result(PATIENCE)
    portal.call("asking", anyio.sleep, 0)
    assert not begun
    portal.close()


class Slow(Troubled):
    """What takes until it is told, to be entered and to be left."""

    def __init__(self) -> None:
        super().__init__(at="")
        self.may_enter = threading.Event()
        self.may_leave = threading.Event()
        self.entering = threading.Event()
        self.leaving = threading.Event()

    async def __aenter__(self) -> None:
        self.entering.set()
        await to_thread.run_sync(self.may_enter.wait, abandon_on_cancel=True)

    async def __aexit__(self, *_: object) -> None:
        self.leaving.set()
        with anyio.CancelScope(shield=True):
            await to_thread.run_sync(self.may_leave.wait)


def test_closing_while_it_is_opened(backend: tuple[str, dict[str, Any]]) -> None:
    """Opening is cancelled, and whoever opens is told."""
    slow = Slow()
    portal = Portal("it", lambda: slow, *backend)
    opening = Caller(portal.open)
    assert slow.entering.wait(PATIENCE)
    Caller(portal.close).result()
    with pytest.raises(ClosedResourceError, match="it was closed while it was being opened"):
        opening.result()
    slow.may_enter.set()


def test_opening_while_it_is_closed(backend: tuple[str, dict[str, Any]]) -> None:
    """It waits until the one before has ended, and is another one."""
    slow = Slow()
    slow.may_enter.set()
    portal = Portal("it", lambda: slow, *backend)
    portal.open()
    closing = Caller(portal.close)
    assert slow.leaving.wait(PATIENCE)
    opening = Caller(portal.open)
    with pytest.raises(ClosedResourceError):
        portal.call("asking", anyio.sleep, 0)
    slow.may_leave.set()
    closing.result()
    opening.result()
    portal.call("asking", anyio.sleep, 0)
    portal.close()


def test_opening_closing_and_calling_at_the_same_time(backend: tuple[str, dict[str, Any]]) -> None:
    """Whoever comes when, each call has an end, and so has the last loop."""
    layer = SyncChannelLayer(InMemoryChannelLayer(), backend[0], backend_options=backend[1])

    def open_and_close() -> None:
        for _ in range(30):
            with suppress(RuntimeError, ClosedResourceError):
                layer.open()
            layer.close()

    def call() -> None:
        for _ in range(300):
            with suppress(RuntimeError, ClosedResourceError):
                layer.new_channel()

    for caller in [Caller(open_and_close) for _ in range(2)] + [Caller(call) for _ in range(4)]:
        caller.result()
    layer.close()
    assert not [thread for thread in threading.enumerate() if "portal of" in thread.name]


def test_closed_before_its_loop_has_begun(backend: tuple[str, dict[str, Any]]) -> None:
    """Who opens is told so, nothing was entered, and what is for the ended loop is for nobody."""
    portal = Portal("it", lambda: Troubled(at="enter"), backend[0], backend[1])
    started, may_begin = threading.Event(), threading.Event()

    def run_later(main: Callable[[], Any]) -> None:
        started.set()
        assert may_begin.wait(PATIENCE)
        run(main)

    run, portal._run = portal._run, run_later  # type: ignore[assignment]
    opening = Caller(portal.open)
    assert started.wait(PATIENCE)
    life = life_of(portal)
    closing = Caller(portal.close)
    deadline = time.monotonic() + PATIENCE
    while life.state != "closing":
        assert time.monotonic() < deadline
        time.sleep(0.001)  # until the other thread has said so
    may_begin.set()
    with pytest.raises(ClosedResourceError, match="it was closed while it was being opened"):
        opening.result()
    closing.result()
    portal.call_soon(pytest.fail, "called")


def test_a_thread_that_cannot_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    portal = Portal("it", lambda: Troubled(at=""), "asyncio", None)

    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            portal.open()
    portal.close()
    portal.open()
    portal.close()


def test_a_call_that_lets_out_what_it_should_not() -> None:
    """The call fails; the loop and the other calls go on."""
    import asyncio

    async def cancel_oneself() -> None:
        raise asyncio.CancelledError

    async def leave() -> None:
        raise GeneratorExit

    portal = Portal("it", lambda: Troubled(at=""), "asyncio", None)
    portal.open()
    waiting = portal.start("waiting", anyio.sleep_forever)
    for function in (cancel_oneself, leave):
        with pytest.raises(RuntimeError, match="which nobody had asked for"):
            portal.call("leaving", function)
    portal.call("asking", anyio.sleep, 0)
    assert not waiting.done()
    portal.close()


def test_a_call_from_the_loop_itself(backend: tuple[str, dict[str, Any]]) -> None:
    """Also in a plain callback, which is no task."""
    errors: list[Any] = []
    portal = Portal("it", lambda: Troubled(at=""), *backend)
    portal.open()

    def callback() -> None:
        try:
            portal.call("calling", anyio.sleep, 0)
        except RuntimeError as error:
            errors.append(str(error))

    portal.call_soon(callback)
    portal.call("asking", anyio.sleep, 0)
    assert "calling would block the event loop" in errors[0]
    portal.close()


@unmeasured
def test_a_call_in_the_middle_of_a_call(backend: tuple[str, dict[str, Any]]) -> None:
    """A signal handler may use the layer, whatever the thread was doing."""
    answers: list[str] = []

    with SyncChannelLayer(InMemoryChannelLayer(), backend[0], backend_options=backend[1]) as layer:

        def on_signal(*_: object) -> None:
            answers.append(layer.new_channel())
            signal.setitimer(signal.ITIMER_REAL, 0.0005)  # the next one, when this one is through

        before = signal.signal(signal.SIGALRM, on_signal)
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.0005)
            while len(answers) < 200:
                layer.new_channel()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


@unmeasured
def test_interrupted_blocks_leave_no_inbox(backend: tuple[str, dict[str, Any]]) -> None:
    """Whenever the interrupt comes within entering and leaving, the inbox is gone afterwards."""
    armed = False

    def on_signal(*_: object) -> None:
        nonlocal armed
        if armed:
            armed = False
            raise TimeIsUp

    with SyncChannelLayer(InMemoryChannelLayer(), backend[0], backend_options=backend[1]) as layer:
        before = signal.signal(signal.SIGALRM, on_signal)
        interrupted = left_behind = 0
        try:
            for number in range(600):
                inbox = layer.subscribe("room")
                try:
                    armed = True
                    signal.setitimer(signal.ITIMER_REAL, 1e-6 + number * 1e-6)
                    inbox.__enter__()
                    inbox.__exit__(None, None, None)
                    armed = False
                except TimeIsUp:
                    interrupted += 1
                    armed = False
                    signal.setitimer(signal.ITIMER_REAL, 0)
                    # Between the two calls Python itself may be interrupted: the block would have been left.
                    if inbox._is_in:
                        inbox.__exit__(None, None, None)
                signal.setitimer(signal.ITIMER_REAL, 0)
        finally:
            signal.signal(signal.SIGALRM, before)
        # The last one may be on its way out: who is interrupted does not wait for that.
        left_behind = len(layer.group_channels("room"))
        until = time.monotonic() + PATIENCE
        while left_behind and time.monotonic() < until:
            left_behind = len(layer.group_channels("room"))
    assert interrupted
    assert left_behind == 0


@unmeasured
def test_opening_is_interrupted() -> None:
    """It is given up, and can be opened again, when what was begun has ended."""
    slow = Slow()

    def on_alarm(*_: object) -> None:
        raise TimeIsUp

    portal = Portal("it", lambda: slow, "asyncio", None)
    before = signal.signal(signal.SIGALRM, on_alarm)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1, 0.1)
        with pytest.raises(TimeIsUp):
            portal.open()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    slow.may_enter.set()
    slow.may_leave.set()
    portal.open()
    portal.call("asking", anyio.sleep, 0)
    portal.close()


def test_interrupted_at_the_worst_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each place where an interrupt may strike, one after the other; the storms above find them by chance."""

    class Interrupting:
        """A lock that is interrupted when it is waited for."""

        def acquire(self) -> None:
            raise TimeIsUp

        def release(self) -> None:
            pass

    def interrupted_after(*args: Any, **options: Any) -> Any:
        call(*args, **options)
        raise TimeIsUp

    def interrupted_before(*args: Any, **options: Any) -> Any:
        raise TimeIsUp

    with SyncChannelLayer(InMemoryChannelLayer()) as layer:
        with monkeypatch.context() as patch:
            patch.setattr(portal_module, "_taken_lock", Interrupting)
            with pytest.raises(TimeIsUp):
                layer.receive("a")
        layer.send("a", {"n": 1})
        assert layer.receive("a", PATIENCE) == {"n": 1}
        call = portal_of(layer).call
        inbox = layer.subscribe("room")
        with monkeypatch.context() as patch:
            patch.setattr(portal_of(layer), "call", interrupted_after)
            with pytest.raises(TimeIsUp):
                inbox.__enter__()
        while layer.group_channels("room"):
            pass
        inbox = layer.subscribe("room").__enter__()
        with monkeypatch.context() as patch:
            patch.setattr(portal_of(layer), "call", interrupted_before)
            with pytest.raises(TimeIsUp):
                inbox.__exit__(None, None, None)
        while layer.group_channels("room"):
            pass
        with monkeypatch.context() as patch:
            patch.setattr(portal_of(layer), "call", interrupted_before)
            inbox = layer.subscribe("room")
            with pytest.raises(TimeIsUp):
                inbox.__enter__()
        assert layer.group_channels("room") == set()
    slow = Slow()
    slow.may_leave.set()
    portal = Portal("it", lambda: slow, "asyncio", None)
    with monkeypatch.context() as patch:
        patch.setattr(portal_module._Life, "await_begun", interrupted_before)
        with pytest.raises(TimeIsUp):
            portal.open()
    slow.may_enter.set()
    portal.open()
    portal.close()
