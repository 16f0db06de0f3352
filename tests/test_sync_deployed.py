"""``SyncChannelLayer`` where it is used: under gunicorn and Celery, in forks, in scripts; each on a real Redis.

- what runs is in processes of their own, which are told by the environment what ``deployed_apps`` is to be.
- nothing here sleeps or measures time: each step waits for what it is about, and fails when that does not come.
- what the processes said is a note of what fails.
"""

from __future__ import annotations

import http.client
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from textwrap import dedent
from typing import Self

import anyio
import pytest
from anyio import fail_after, to_thread
from celery import Celery
from layers_on_redis import KINDS, PUBSUB, QUEUE, Kind, new_prefix
from redis_server import HOST, RedisServer, wait_until
from websockets.sync.client import ClientConnection, connect

from anyio_channels import create_channel_layer
from anyio_channels.sync import SyncChannelLayer

pytestmark = pytest.mark.usefixtures("unmeasured_processes")

PATIENCE = 30.0
ROOM = "room"
HERE = Path(__file__).parent
BACKENDS = ["asyncio", "asyncio+uvloop", "trio"]

both = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
queue = pytest.mark.parametrize("kind", [QUEUE], ids=lambda kind: kind.name)
all_backends = pytest.mark.parametrize("backend", BACKENDS)

# Configurations of gunicorn. By itself it has a socket for commands, at one place for all that a user runs.
PLAIN = "control_socket_disable = True"
OPENED_IN_WORKERS = f"""
{PLAIN}

def post_fork(server, worker):
    from deployed_apps import layer
    layer.open()
"""
CLOSED_IN_WORKERS = f"""
{OPENED_IN_WORKERS}

def worker_exit(server, worker):
    from deployed_apps import layer
    layer.close()
"""


class Process:
    """A process and its children, for the length of a block. What they say goes to files."""

    def __init__(self, directory: Path, command: list[str], environment: dict[str, str], *fds: int) -> None:
        name = f"process-{len(list(directory.iterdir()))}"
        self.out = directory / f"{name}.out"
        self.err = directory / f"{name}.err"
        with self.out.open("wb") as out, self.err.open("wb") as err:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                cwd=directory,
                env=environment,
                pass_fds=fds,
                start_new_session=True,  # a process group, to be ended as a whole
            )
        self.pid = self.process.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.process.wait()
        if error is not None:
            out, err = (path.read_text(errors="replace")[-5000:] for path in (self.out, self.err))
            error.add_note(f"{self.process.args!r}\nsaid:\n{out}\nand as errors:\n{err}")

    def is_gone(self) -> bool:
        """Whether it has ended, and all its children."""
        try:
            os.killpg(self.pid, 0)
        except ProcessLookupError:
            return True
        return False

    def end(self, code: int = 0) -> tuple[str, str]:
        """Wait for its end, which must have that code and leave nobody behind, and return what it said, and said wrong."""
        assert self.process.wait(PATIENCE) == code
        wait_until(self.is_gone)
        return self.out.read_text(), self.err.read_text()

    def stop(self, tracebacks: int = 0) -> str:
        """End it by SIGTERM, in order, and return its log, in which so many tracebacks are expected."""
        self.process.send_signal(signal.SIGTERM)
        _, log = self.end()
        assert log.count("Traceback") == tracebacks
        assert not re.search("Exception ignored|Fatal|unclosed", log)
        return log

    def await_lines(self, count: int) -> list[str]:
        """Wait until it has said so much, and return it."""

        def lines() -> list[str]:
            return self.out.read_text().split("\n")[:-1]

        wait_until(lambda: len(lines()) >= count or self.process.poll() is not None)
        assert len(lines()) == count
        return lines()


class Server(Process):
    """One that listens on a port, from the beginning on: who connects too early waits."""

    def __init__(self, directory: Path, command: list[str], environment: dict[str, str]) -> None:
        with socket.create_server((HOST, 0)) as listener:
            self.port: int = listener.getsockname()[1]
            fd = listener.fileno()
            super().__init__(directory, [word.format(fd=fd) for word in command], environment, fd)

    def say(self, number: int) -> tuple[int, str]:
        """Have a view broadcast; return the status and the text of the response."""
        with closing(http.client.HTTPConnection(HOST, self.port, timeout=PATIENCE)) as connection:
            connection.request("GET", f"/say/{number}")
            response = connection.getresponse()
            return response.status, response.read().decode()

    def say_much(self, processes: int) -> int:
        """Have many numbers said at once, until so many processes have said some; return the last, said when all others were."""
        last = 200
        who: set[str] = set()
        deadline = time.monotonic() + PATIENCE
        with ThreadPoolExecutor(16) as pool:
            for number in itertools.count(step=50):
                for response in pool.map(self.say, range(number, number + 50)):
                    assert response[0] == 200, response
                    who.add(response[1])
                last = number + 50
                if last >= 200 and len(who) >= processes:
                    break
                assert time.monotonic() < deadline, f"only {who} answer"
        assert len(who) == processes
        assert str(self.pid) not in who
        assert self.say(last)[0] == 200
        return last

    @contextmanager
    def listen(self) -> Iterator[ClientConnection]:
        with connect(f"ws://{HOST}:{self.port}/", open_timeout=PATIENCE, max_queue=None) as websocket:
            assert json.loads(websocket.recv(PATIENCE)) == {"type": "ready"}
            yield websocket


class Place:
    """Where a test deploys: a Redis, a prefix, a kind of layer, an event loop for it, and a directory."""

    def __init__(self, server: RedisServer, kind: Kind, backend: str, directory: Path) -> None:
        self.server = server
        self.kind = kind
        self.backend = backend
        self.directory = directory
        self.prefix = new_prefix()

    def url(self, name: str) -> str:
        """The URL of the layer; Redis then knows its connections by the name."""
        scheme = "redis+pubsub" if self.kind is PUBSUB else "redis"
        options = f"prefix={self.prefix}&capacity=10000&client_name={self.prefix}{name}"
        return f"{scheme}://{self.server.host}:{self.server.port}/0?{options}"

    def layer(self, name: str) -> SyncChannelLayer:
        backend, _, loop = self.backend.partition("+")
        return SyncChannelLayer(
            create_channel_layer(self.url(name)), backend, backend_options={"use_uvloop": True} if loop else None
        )

    @property
    def broker(self) -> str:
        return f"redis://{self.server.host}:{self.server.port}/9"

    def environment(self, name: str) -> dict[str, str]:
        return {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "PYTHONUNBUFFERED": "1",
            "LAYER": self.url(name),
            "BACKEND": self.backend,
        }

    def clients(self, name: str) -> list[dict[str, str]]:
        """What Redis says of its connections of that name."""
        with self.server.client() as client:
            return [one for one in client.client_list() if one["name"] == self.prefix + name]

    def connections(self, name: str) -> int:
        return len(self.clients(name))

    def waits_in_redis(self, name: str) -> bool:
        """Whether one of them waits for a message."""
        return any("b" in one["flags"] for one in self.clients(name))

    def await_nothing_left(self, name: str) -> None:
        """Redis has no connection of that name any more, once it has noticed, and no membership or message of anyone."""
        wait_until(lambda: not self.connections(name))
        with self.server.client() as client:
            if self.kind is QUEUE:  # which notes for flush() that the prefix is in use
                assert set(client.keys(f"{self.prefix}*")) <= {f"{self.prefix}:prefix".encode()}
            else:
                assert client.pubsub_channels(f"*{self.prefix}*") == []

    # What is deployed

    def gunicorn(self, app: str, config: str, *options: str) -> Server:
        path = self.directory / "config.py"
        path.write_text(config)
        command = [sys.executable, "-m", "gunicorn", "--bind", "fd://{fd}", "--config", str(path), "--workers", "2"]
        command += ["--threads", "4", *options, f"deployed_apps:{app}()"]
        return Server(self.directory, command, self.environment("gunicorn"))

    def sockets(self) -> Server:
        command = [sys.executable, "-m", "uvicorn", "--fd", "{fd}", "--factory", "deployed_apps:make_starlette_app"]
        return Server(self.directory, command, self.environment("sockets"))

    def worker(self, pool: str, *signals: str) -> Process:
        command = [sys.executable, "-m", "celery", "-A", "deployed_apps:celery_app", "worker"]
        command += ["--pool", pool, "--concurrency", "2", "--without-gossip", "--without-mingle", "--without-heartbeat"]
        variables = {"BROKER": self.broker, "QUEUE": self.prefix, "SIGNALS": " ".join(signals)}
        return Process(self.directory, command, self.environment("worker") | variables)

    @contextmanager
    def tasks(self) -> Iterator[Celery]:
        """What sends tasks to the worker."""
        app = Celery(broker=self.broker, backend=self.broker, set_as_current=False)
        app.conf.task_default_queue = self.prefix
        try:
            yield app
        finally:
            app.backend.result_consumer.stop()
            app.backend.client.close()
            app.close()

    def script(self, text: str) -> Process:
        path = self.directory / "script.py"
        path.write_text("import os, sys\nfrom deployed_apps import layer, make_layer\n" + dedent(text))
        # From 3.12 on a fork of a process with threads is warned about, whatever the fork does.
        command = [sys.executable, "-W", "error", "-W", "ignore:This process:DeprecationWarning", str(path)]
        return Process(self.directory, command, self.environment("script"))


@pytest.fixture
def backend() -> str:
    """Where a test does not say it."""
    return "asyncio"


@pytest.fixture
def place(redis_server: RedisServer, kind: Kind, backend: str, tmp_path: Path) -> Place:
    return Place(redis_server, kind, backend, tmp_path)


# gunicorn


@both
@pytest.mark.parametrize(
    ("app", "backend", "config"),
    [("make_flask_app", "asyncio", CLOSED_IN_WORKERS), ("make_django_app", "trio", OPENED_IN_WORKERS)],
    ids=["flask", "django"],
)
def test_views_broadcast_to_websockets(place: Place, app: str, config: str) -> None:
    """Of what many requests say at once, to two processes of four threads, each WebSocket hears each exactly once."""
    with place.sockets() as sockets, place.gunicorn(app, config) as server, ExitStack() as stack:
        websockets = [stack.enter_context(sockets.listen()) for _ in range(5)]
        last = server.say_much(processes=2)
        for websocket in websockets:
            heard: list[int] = []
            while last not in heard:
                heard.append(json.loads(websocket.recv(PATIENCE))["number"])
            assert sorted(heard) == list(range(last + 1))
        server.stop()
        wait_until(lambda: not place.connections("gunicorn"))


@both
def test_a_preloaded_layer_is_opened_in_the_workers(place: Place) -> None:
    """A layer that is made in the master, and opened in ``post_fork``, is one of each worker."""
    with place.layer("test") as layer, layer.subscribe(ROOM) as inbox:
        with place.gunicorn("make_flask_app", OPENED_IN_WORKERS, "--preload") as server:
            last = server.say_much(processes=2)
            heard: list[int] = []
            while last not in heard:
                heard.append(inbox.receive(PATIENCE)["number"])
            assert sorted(heard) == list(range(last + 1))
            assert place.connections("gunicorn") == 2
            server.stop()
            wait_until(lambda: not place.connections("gunicorn"))


@queue
@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_layer_opened_before_the_workers_says_so(place: Place) -> None:
    """Opened in the master, it gives each request an error that names both processes; all ends in order."""
    # One worker, which has answered: what SIGTERM does to one that is just being forked is gunicorn's affair.
    with place.gunicorn("make_eager_flask_app", PLAIN, "--preload", "--workers", "1") as server:
        with ThreadPoolExecutor(8) as pool:
            assert [status for status, _ in pool.map(server.say, range(20))] == [500] * 20
        assert place.connections("gunicorn") == 1
        told = re.findall(
            r"RuntimeError: .* was opened in process (\d+), and this is a fork of it, process (\d+)",
            server.stop(tracebacks=20),
        )
        assert len(told) == 20
        assert {int(opener) for opener, _ in told} == {server.pid}
        assert server.pid not in {int(fork) for _, fork in told}
        place.await_nothing_left("gunicorn")


# Celery


@queue
@pytest.mark.parametrize(
    ("pool", "signals", "processes"),
    [
        ("prefork", ("worker_process_init", "worker_process_shutdown"), 2),
        ("threads", ("worker_init", "worker_shutdown"), 1),
    ],
)
@pytest.mark.slow
def test_tasks_broadcast_and_receive(place: Place, pool: str, signals: tuple[str, str], processes: int) -> None:
    """What tasks say is heard exactly once; and they receive, side by side."""
    with place.layer("test") as layer, layer.subscribe(ROOM) as inbox:
        with place.worker(pool, *signals) as worker, place.tasks() as tasks:
            results = [tasks.send_task("say", (number,)) for number in range(50)]
            assert sorted(inbox.receive(PATIENCE)["number"] for _ in range(50)) == list(range(50))
            for result in results:
                result.get(PATIENCE)
            tasks.send_task("say", (50,))
            assert inbox.receive(PATIENCE)["number"] == 50

            takes = {channel: tasks.send_task("take", (channel, PATIENCE)) for channel in ("one", "other")}
            waiting = [inbox.receive(PATIENCE) for _ in takes]
            assert {message["channel"] for message in waiting} == {"one", "other"}
            assert len({message["process"] for message in waiting}) == processes
            for message in waiting:
                layer.send(message["channel"], {"for": message["process"]})
            for message in waiting:
                got = takes[message["channel"]].get(PATIENCE)
                assert got == [message["process"], {"for": message["process"]}]

            with pytest.raises(TimeoutError, match="no message came on channel 'nothing' within 0.1 s"):
                tasks.send_task("take", ("nothing", 0.1)).get(PATIENCE)
            assert worker.stop(tracebacks=1).count("closed in process") == processes
            wait_until(lambda: not place.connections("worker"))


@pytest.mark.parametrize("kind", [PUBSUB], ids=lambda kind: kind.name)
@pytest.mark.slow
def test_tasks_broadcast_to_an_event_loop(place: Place) -> None:
    """What tasks say is heard exactly once by an asynchronous subscriber."""

    async def hear() -> None:
        heard: list[int] = []
        with fail_after(2 * PATIENCE):
            async with create_channel_layer(place.url("test")) as layer, layer.subscribe(ROOM) as inbox:
                results = [tasks.send_task("say", (number,)) for number in range(50)]
                while len(heard) < 50:
                    heard.append((await inbox.receive())["number"])
                for result in results:
                    await to_thread.run_sync(result.get, PATIENCE)
                tasks.send_task("say", (50,))
                assert (await inbox.receive())["number"] == 50
        assert sorted(heard) == list(range(50))

    with place.worker("prefork", "worker_process_init", "worker_process_shutdown") as worker, place.tasks() as tasks:
        anyio.run(hear)
        worker.stop()
        place.await_nothing_left("worker")


@queue
@pytest.mark.slow
def test_a_layer_opened_before_the_pool_says_so(place: Place) -> None:
    """Opened in Celery's main process, it gives a task in the pool an error that names both processes."""
    with place.worker("prefork", "worker_init", "worker_shutdown") as worker, place.tasks() as tasks:
        told = rf"was opened in process {worker.pid}, and this is a fork of it, process (?!{worker.pid}:)\d+:"
        for result in [tasks.send_task("say", (number,)) for number in range(4)]:
            with pytest.raises(RuntimeError, match=told):
                result.get(PATIENCE)
        worker.stop(tracebacks=4)
        place.await_nothing_left("worker")


@queue
@pytest.mark.slow
def test_a_soft_time_limit_takes_nothing(place: Place) -> None:
    """A task that waits for a message when its time is over has not taken the message that comes then."""
    with place.layer("test") as layer, layer.subscribe(ROOM) as inbox:
        with (
            place.worker("prefork", "worker_process_init", "worker_process_shutdown") as worker,
            place.tasks() as tasks,
        ):
            late = tasks.send_task("take", ("channel",))
            process = inbox.receive(PATIENCE)["process"]
            wait_until(lambda: place.waits_in_redis("worker"))
            os.kill(process, signal.SIGUSR1)  # as Celery's main process does when the time is over
            with pytest.raises(Exception, match="SoftTimeLimitExceeded"):
                late.get(PATIENCE)
            layer.send("channel", {"n": 1})
            assert tasks.send_task("take", ("channel", PATIENCE)).get(PATIENCE)[1] == {"n": 1}
            worker.stop(tracebacks=1)


# Forks


@both
@all_backends
def test_a_fork_is_told_and_harms_nobody(place: Place) -> None:
    """Calls in a fork raise errors that name both processes; leaving its blocks leaves the parent all it has."""
    text = """
        parent = os.getpid()
        with layer, layer.subscribe("room") as inbox:
            child = os.fork()
            if not child:
                for call in (
                    lambda: layer.group_send("room", {"from": "child"}),
                    lambda: layer.send("channel", {"from": "child"}),
                    lambda: layer.receive("channel", 20),
                    lambda: layer.subscribe("room").__enter__(),
                    lambda: inbox.receive(20),
                    lambda: inbox.join("other"),
                    layer.new_channel,
                    layer.statistics,
                    layer.flush,
                    layer.open,
                ):
                    try:
                        call()
                    except RuntimeError as error:
                        assert f"was opened in process {parent}, " in str(error)
                        assert f"a fork of it, process {os.getpid()}: " in str(error)
                    else:
                        raise AssertionError(call)
                layer.close()
                sys.exit()
            assert os.waitpid(child, 0)[1] == 0
            for number in range(100):
                layer.group_send("room", {"number": number})
                layer.send(inbox.channel, {"sent": number})
                assert inbox.receive(20) == {"number": number}
                assert inbox.receive(20) == {"sent": number}
            assert layer.statistics().reconnects == 0
    """
    with place.script(text) as script:
        assert script.end() == ("", "")
    place.await_nothing_left("script")


@queue
@all_backends
def test_many_forks_of_a_busy_process(place: Place) -> None:
    """Forked while threads use the layer, each child has a layer of its own, and ends by itself; the parent loses nothing."""
    text = """
        import itertools, threading

        over = threading.Event()
        counts = [0] * 4

        def talk(index):
            while not over.is_set():
                layer.send(inbox.channel, {"from": "parent"})
                counts[index] += 1

        with layer, layer.subscribe("room") as inbox:
            threads = [threading.Thread(target=talk, args=(index,)) for index in range(4)]
            for thread in threads:
                thread.start()
            children = set()
            for number in range(8):
                child = os.fork()
                if not child:
                    with make_layer() as own, own.subscribe() as mine:
                        own.send(mine.channel, {"number": number})
                        assert mine.receive(20) == {"number": number}
                        own.group_send("room", {"from": "child", "number": number})
                        sys.exit()
                children.add(child)
            codes = [os.waitpid(child, 0)[1] for child in children]
            over.set()
            for thread in threads:
                thread.join()
            assert codes == [0] * 8, codes
            messages = [inbox.receive(20) for _ in range(sum(counts) + 8)]
            assert sorted(m["number"] for m in messages if m["from"] == "child") == list(range(8))
    """
    with place.script(text) as script:
        assert script.end() == ("", "")
    place.await_nothing_left("script")


@both
def test_multiprocessing(place: Place) -> None:
    """Children that multiprocessing forks are told the same, may open layers of their own, and end by themselves."""
    text = """
        import multiprocessing
        from concurrent.futures import ProcessPoolExecutor

        def use_parents():
            try:
                layer.group_send("room", {})
            except RuntimeError as error:
                assert str(os.getpid()) in str(error) and str(os.getppid()) in str(error)
                sys.exit(5)

        def open_own():
            global own
            own = make_layer().open()

        def use_own(number):
            own.group_send("room", {"number": number})

        with layer, layer.subscribe("room") as inbox:
            context = multiprocessing.get_context("fork")
            child = context.Process(target=use_parents)
            child.start()
            child.join()
            assert child.exitcode == 5
            with ProcessPoolExecutor(2, context, open_own) as pool:
                list(pool.map(use_own, range(20)))
            assert sorted(inbox.receive(20)["number"] for _ in range(20)) == list(range(20))
    """
    with place.script(text) as script:
        assert script.end() == ("", "")
    place.await_nothing_left("script")


@queue
def test_a_layer_closed_before_the_fork(place: Place) -> None:
    """A layer that was closed before the fork may be opened again after it, in each of both processes."""
    text = """
        with layer:
            layer.send("channel", {"n": 0})
        child = os.fork()
        with layer:
            assert layer.receive("channel", 20) == {"n": 0}
            layer.send("channel", {"n": 0})
        if child:
            assert os.waitpid(child, 0)[1] == 0
    """
    with place.script(text) as script:
        assert script.end() == ("", "")


# Scripts


@both
@all_backends
def test_a_script_that_never_closes(place: Place) -> None:
    """It ends by itself, says nothing, and leaves nothing in Redis: no connection, no message."""
    text = """
        layer.open()
        with layer.subscribe("room") as inbox:
            layer.group_send("room", {"n": 1})
            assert inbox.receive(20) == {"n": 1}
            layer.group_send("room", {"n": 2})
    """
    with place.script(text) as script:
        assert script.end() == ("", "")
    place.await_nothing_left("script")


@both
def test_a_script_that_never_leaves_an_inbox(place: Place) -> None:
    """What is left open is closed when the process exits: the membership of its inbox has ended too."""
    text = """
        inbox = layer.open().subscribe("room").__enter__()
        layer.group_send("room", {"n": 1})
        assert inbox.receive(20) == {"n": 1}
        layer.group_send("room", {"n": 2})
    """
    with place.script(text) as script:
        assert script.end() == ("", "")
    place.await_nothing_left("script")


@both
@pytest.mark.parametrize("refuses", [False, True])
def test_exiting_with_a_layer_that_knows_its_host_by_name(place: Place, refuses: bool) -> None:
    """Exiting prints nothing, whether or not Python starts threads at that time: 3.12 does not, and asyncio wants one."""
    text = """
        import atexit, threading

        def refuse(self):
            raise RuntimeError("can't create new thread at interpreter shutdown")

        os.environ["LAYER"] = os.environ["LAYER"].replace("127.0.0.1", "localhost")
        named = make_layer().open()
        named.group_send("room", {"n": 1})
    """
    if refuses:
        text += """
        atexit.register(setattr, threading.Thread, "start", refuse)  # the last to be registered is called first
    """
    with place.script(text) as script:
        assert script.end() == ("", "")
    place.await_nothing_left("script")


@queue
def test_exiting_with_a_layer_that_cannot_be_closed(place: Place) -> None:
    """What goes wrong in closing as the interpreter exits is shown."""
    text = """
        close = type(layer.layer).__aexit__

        async def leave(*args):
            await close(*args)
            raise KeyError("it")

        type(layer.layer).__aexit__ = leave
        layer.open()
    """
    with place.script(text) as script:
        out, err = script.end()
        assert (out, err.strip().splitlines()[-1]) == ("", "KeyError: 'it'")


@queue
@pytest.mark.parametrize(
    ("last", "code", "said"),
    [("sys.exit(3)", 3, ""), ("raise KeyError('it')", 1, "KeyError: 'it'")],
    ids=["exit", "error"],
)
def test_a_script_that_fails(place: Place, last: str, code: int, said: str) -> None:
    """Its end is its own: the exit code, and its traceback alone."""
    with place.script(f"layer.open()\n{last}\n") as script:
        out, err = script.end(code)
        assert (out, err.strip().splitlines()[-1:]) == ("", [said] if said else [])
        assert err.count("Traceback") == err.count("KeyError: ") == bool(said)
    place.await_nothing_left("script")


@both
@all_backends
def test_ctrl_c_takes_nothing(place: Place) -> None:
    """SIGINT ends a waiting ``receive`` with KeyboardInterrupt; the message after it is for the next ``receive``."""
    text = """
        import signal, threading, time
        from functools import partial

        signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever started the tests may have it ignored

        def announce():
            while not layer.statistics().waiting_receivers:
                time.sleep(0.01)  # nothing else tells
            print("waiting", channel)

        with layer, layer.subscribe() as inbox:
            for channel, receive in (("channel", partial(layer.receive, "channel")), (inbox.channel, inbox.receive)):
                announcer = threading.Thread(target=announce)
                announcer.start()
                try:
                    receive()
                except KeyboardInterrupt:
                    announcer.join()
                    print("interrupted")
                assert receive(timeout=20) == {"n": 1}
                layer.send(channel, {"n": 2})
                assert receive(timeout=20) == {"n": 2}
    """
    # Measuring coverage takes a lock of its own, which an interrupt may leave taken.
    with place.layer("test") as layer, place.script(text) as script:
        said: list[str] = []
        for _ in range(2):
            script.await_lines(len(said) + 1)
            script.process.send_signal(signal.SIGINT)
            said = script.await_lines(len(said) + 2)
            waiting, channel, interrupted = " ".join(said[-2:]).split()
            assert (waiting, interrupted) == ("waiting", "interrupted")
            layer.send(channel, {"n": 1})
        assert script.end()[1] == ""
    place.await_nothing_left("script")


@queue
@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@pytest.mark.slow
def test_a_storm_of_interrupts(place: Place) -> None:
    """Whenever it comes, an interrupt ends a ``receive`` as itself, and leaves the layer whole, and nobody behind who waits."""
    text = """
        import random, signal

        class Interrupt(BaseException):
            pass

        armed = False

        def interrupt(*_):
            global armed
            if armed:
                armed = False
                signal.setitimer(signal.ITIMER_REAL, 0)
                raise Interrupt

        signal.signal(signal.SIGALRM, interrupt)
        with layer:
            for number in range(1000):
                try:
                    armed = True
                    # Again if need be: what comes just before a thread waits for a lock is noticed only after it.
                    signal.setitimer(signal.ITIMER_REAL, 1e-6 + 0.001 * random.random(), 1)
                    layer.receive("channel")
                except Interrupt:
                    pass
                else:
                    raise AssertionError("there was nothing to receive")
                while layer.statistics().waiting_receivers:
                    pass
                if number % 10 == 0:
                    layer.send("channel", {"number": number})
                    assert layer.receive("channel", timeout=20) == {"number": number}
    """
    with place.script(text) as script:
        assert script.end() == ("", "")
    place.await_nothing_left("script")
