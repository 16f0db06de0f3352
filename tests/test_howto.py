"""The pages whose blocks are files: each page's files in a folder, run as the page says, with the real other side."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import anyio
import anyio.lowlevel
import pytest
from doc_pages import ROOT, Block, read_blocks
from redis_server import RedisCluster, RedisServer, Sentinels, wait_until
from websockets.sync.client import ClientConnection, connect

from anyio_channels import BaseChannelLayer, ChannelFull, RedisChannelLayer, create_channel_layer

pytestmark = pytest.mark.usefixtures("unmeasured_processes")

PATIENCE = 60.0
DOCS = ROOT / "docs"
PYTHON = [sys.executable, "-P", "-W", "error"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A Redis for the prefix that the pages use."""
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


def write_files(page: str, directory: Path, server: RedisServer | None = None) -> list[Block]:
    """Put a page's files into ``directory``; ``redis://localhost:6379`` is that blank server."""
    blocks = read_blocks(DOCS / page)
    for block in blocks:
        if block.file is not None:
            text = block.text
            if server is not None:
                text = text.replace("redis://localhost:6379", f"redis://{server.host}:{server.port}")
            (directory / block.file).write_text(text, encoding="utf-8")
    if server is not None:
        with server.client() as client:
            client.flushall()
    return blocks


def call(directory: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run Python in ``directory``, whose modules it finds."""
    environment = {**os.environ, "PYTHONPATH": str(directory)}
    return subprocess.run(
        [*PYTHON, *words],
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )


@contextmanager
def started(directory: Path, name: str, *words: str, fd: int | None = None, **variables: str) -> Iterator[Path]:
    """A process for the length of the block, which ends it by SIGTERM, in order; yields where what it says goes."""
    log = directory / f"{name}.log"
    environment = {**os.environ, "PYTHONPATH": str(directory), **variables}
    with log.open("wb") as file:
        process = subprocess.Popen(
            [*PYTHON, *words],
            cwd=directory,
            env=environment,
            stdout=file,
            stderr=file,
            pass_fds=() if fd is None else (fd,),
            start_new_session=True,  # a process group, to be ended as a whole: hypercorn has a child
        )
    try:
        yield log
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) in {0, -signal.SIGTERM}  # uvicorn ends, in order, by the signal it got
        assert "Traceback" not in log.read_text()
    except BaseException as error:
        error.add_note(f"{words!r} said:\n{log.read_text()}")
        raise
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


# Starlette and FastAPI

SERVERS = {
    "uvicorn": "uvicorn --fd {fd} app:app",
    "hypercorn": "hypercorn -b fd://{fd} app:app",
    "hypercorn-trio": "hypercorn -k trio -b fd://{fd} app:app",
}


def visit(address: str) -> ClientConnection:
    """Connect; a server on a busy machine takes its time to start."""
    return connect(address, open_timeout=PATIENCE)


def hear(client: ClientConnection) -> dict[str, str]:
    message: dict[str, str] = json.loads(client.recv(PATIENCE))
    return message


def post(address: str, text: str) -> None:
    with urllib.request.urlopen(f"http://{address}/notify", text.encode(), PATIENCE) as response:
        assert response.status == 202


@pytest.mark.parametrize("command", SERVERS.values(), ids=SERVERS)
@pytest.mark.parametrize("processes", [1, 2])
def test_rooms_and_notices(command: str, processes: int, server: RedisServer, tmp_path: Path) -> None:
    """The application of the page: members hear each other and the notices, in one process and across two over Redis."""
    write_files("howto/starlette-fastapi.md", tmp_path, server)
    layer = "memory://" if processes == 1 else server.url
    with (
        socket.create_server(("127.0.0.1", 0)) as first,
        socket.create_server(("127.0.0.1", 0)) as second,
    ):
        listeners = [first, second][:processes]
        addresses = [f"127.0.0.1:{listener.getsockname()[1]}" for listener in listeners]
        words = [["-m", *command.format(fd=listener.fileno()).split()] for listener in listeners]
        with ExitStack() as stack:
            for name, listener, command_line in zip("ab", listeners, words, strict=False):
                stack.enter_context(started(tmp_path, name, *command_line, fd=listener.fileno(), LAYER=layer))
            with visit(f"ws://{addresses[0]}/ws") as ada, visit(f"ws://{addresses[-1]}/ws") as grace:
                ada.send("hi")
                assert hear(grace) == {"type": "said", "text": "hi"}
                post(addresses[0], "the kettle is on")
                assert hear(ada) == hear(grace) == {"type": "notice", "text": "the kettle is on"}
                gone = visit(f"ws://{addresses[0]}/ws")
                with gone:
                    gone.socket.shutdown(socket.SHUT_RDWR)  # a client that vanishes
                post(addresses[-1], "again")
                assert hear(ada) == hear(grace) == {"type": "notice", "text": "again"}


@pytest.mark.parametrize("command", list(SERVERS.values())[::2], ids=list(SERVERS)[::2])
def test_rooms_of_fastapi(command: str, tmp_path: Path) -> None:
    """Notices come from asynchronous endpoints and from those that run in a thread."""
    write_files("howto/starlette-fastapi.md", tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        words = command.format(fd=listener.fileno()).replace("app:app", "shop:app").split()
        with (
            started(tmp_path, "shop", "-m", *words, fd=listener.fileno()),
            visit(f"ws://{address}/ws/tea") as ada,
            visit(f"ws://{address}/ws/tea") as grace,
        ):
            ada.send("hi")
            assert hear(grace) == {"type": "said", "text": "hi"}
            for path in ("notify", "notify-from-thread"):
                request = urllib.request.Request(
                    f"http://{address}/{path}/tea",
                    json.dumps({"text": path}).encode(),
                    {"Content-Type": "application/json"},
                )
                with urllib.request.urlopen(request, timeout=PATIENCE) as response:
                    assert response.status == 202
                assert hear(ada) == hear(grace) == {"type": "notice", "text": path}


# Django Channels


def test_consumers_of_django_channels(server: RedisServer, tmp_path: Path) -> None:
    """Channels' consumers run on a layer of ours, which the page opens; asynchronous and synchronous views reach them."""
    write_files("moving/django-channels.md", tmp_path, server)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        words = ["-m", "uvicorn", "--fd", str(listener.fileno()), "asgi:application"]
        with (
            started(tmp_path, "django", *words, fd=listener.fileno(), LAYER=server.url),
            visit(f"ws://{address}/ws") as ada,
            visit(f"ws://{address}/ws") as grace,
        ):
            ada.send(json.dumps({"text": "hi"}))
            assert hear(ada) == hear(grace) == {"type": "chat.message", "text": "hi"}
            for path, text in (("notify", "from a view"), ("notify-from-thread", "from a thread")):
                urllib.request.urlopen(f"http://{address}/{path}", timeout=PATIENCE).close()
                assert hear(ada) == hear(grace) == {"type": "chat.message", "text": text}


# Workers


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_workers_in_several_processes(backend: str, server: RedisServer, tmp_path: Path) -> None:
    """Every job is done once, also when one of two processes is stopped amid the work."""
    write_files("howto/workers.md", tmp_path, server)
    worker = tmp_path / "worker.py"
    worker.write_text(worker.read_text().replace("anyio.run(main)", f"anyio.run(main, backend={backend!r})"))

    def done(log: Path) -> list[int]:
        return [int(number) for number in re.findall(r"^did (\d+)\n", log.read_text(), re.MULTILINE)]

    with started(tmp_path, "stays", "worker.py") as stays, server.client() as client:
        with started(tmp_path, "stops", "worker.py") as stops:
            wait_until(lambda: "ready" in stays.read_text() and "ready" in stops.read_text())
            submitting = subprocess.Popen([*PYTHON, "submit.py"], cwd=tmp_path)
            wait_until(lambda: len(done(stops)) >= 20)
        assert submitting.wait(PATIENCE) == 0
        wait_until(lambda: len(done(stays)) + len(done(stops)) >= 200)
        assert client.zcard("asgijobs") == 0
    assert sorted(done(stays) + done(stops)) == list(range(200))


# A layer of one's own


def run_files(directory: Path, *names: str) -> None:
    """Run these files of the page: each prints what the page says."""
    files = {block.file: block.output for block in write_files("howto/own-layer.md", directory)}
    for name in names:
        result = call(directory, name)
        assert result.returncode == 0, result.stderr
        assert result.stdout == files[name]


def test_the_layer_over_a_relay(tmp_path: Path) -> None:
    """The layer of the page connects processes, comes back after an outage, and tells of it, as the page shows."""
    run_files(tmp_path, "outage.py", "talker.py")


@pytest.mark.slow
def test_the_kit_finds_nothing_wrong_with_the_layer_over_a_relay(tmp_path: Path) -> None:
    """The layer of the page keeps the contract on both backends, as the page shows."""
    run_files(tmp_path, "kit.py")


# Testing


def pytest_asyncio(directory: Path, name: str) -> tuple[int, str]:
    options = "-m pytest -q -p no:cacheprovider -p no:xdist -o asyncio_default_fixture_loop_scope=function"
    result = call(directory, *options.split(), name)
    return result.returncode, result.stdout + result.stderr


def test_examples_for_pytest_asyncio(server: RedisServer, tmp_path: Path) -> None:
    """What the page says that works under pytest-asyncio does."""
    write_files("howto/testing.md", tmp_path, server)
    code, said = pytest_asyncio(tmp_path, "test_with_pytest_asyncio.py")
    assert code == 0, said
    assert "3 passed" in said


CANNOT_HOLD = """
import anyio, pytest, pytest_asyncio
from anyio_channels import RedisChannelLayer, RedisPubSubChannelLayer

@pytest_asyncio.fixture(params=[RedisChannelLayer, RedisPubSubChannelLayer, anyio.create_task_group])
async def held(request):
    async with request.param(*[] if request.param is anyio.create_task_group else [["redis://ADDRESS"]]):
        yield

@pytest.mark.asyncio
async def test_it(held):
    pass
"""


def test_what_a_fixture_of_pytest_asyncio_cannot_hold(server: RedisServer, tmp_path: Path) -> None:
    """The page names the error that comes when a fixture holds a task group across its yield."""
    error = "Attempted to exit cancel scope in a different task than it was entered in"
    assert error in (DOCS / "howto" / "testing.md").read_text("utf-8")
    (tmp_path / "test_it.py").write_text(CANNOT_HOLD.replace("ADDRESS", f"{server.host}:{server.port}"))
    code, said = pytest_asyncio(tmp_path, "test_it.py")
    assert code == 1
    assert "3 passed, 3 errors" in said
    assert len(re.findall(rf"^E +RuntimeError: {error}$", said, re.MULTILINE)) == 3


# Deploying

RULES = {
    rule.partition(" ")[0]: rule
    for rule in re.findall(r"^ACL SETUSER (.+)$", (DOCS / "howto" / "deploying.md").read_text("utf-8"), re.MULTILINE)
}


async def use_all(layer: BaseChannelLayer) -> None:
    """Every method, also the rare ways through it."""
    async with layer:
        async with layer.subscribe("room") as inbox, layer.subscribe("room") as other:
            await layer.group_send("room", {"n": 1})
            await layer.send(inbox.channel, {"n": 2})
            with anyio.fail_after(PATIENCE):
                assert [(await inbox.receive())["n"] for _ in range(2)] == [1, 2]
                assert await other.receive() == {"n": 1}
            assert inbox.channel in await layer.group_channels("room")
        channel = await layer.new_channel()
        await layer.group_add("room", channel)
        await layer.group_discard("room", channel)
        if isinstance(layer, RedisChannelLayer):
            await layer.send("shop.jobs", {"n": 1})
            with pytest.raises(ChannelFull):
                await layer.send("shop.jobs", {"n": 2})
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(layer.receive, "shop.jobs")
            await anyio.wait_all_tasks_blocked()
            if isinstance(layer, RedisChannelLayer):
                with anyio.fail_after(PATIENCE):
                    await layer.send("shop.jobs", {"n": 2}, wait=True)
            else:
                while layer.statistics().received < 4:  # a subscription takes its time
                    await layer.send("shop.jobs", {"n": 2})
                    await anyio.lowlevel.checkpoint()
        await layer.flush()


@contextmanager
def nothing_is_refused(servers: Sequence[RedisServer], *names: str) -> Iterator[None]:
    """Give the users ``names`` the rights that the page gives them; at the end no server has refused anything."""
    with ExitStack() as stack:
        clients = [stack.enter_context(server.client()) for server in servers]
        for client in clients:
            for name in names:
                client.execute_command("ACL", "SETUSER", *RULES[name].split())
            client.execute_command("ACL", "LOG", "RESET")
        yield
        refused = [entry for client in clients for entry in client.execute_command("ACL", "LOG")]
        # From Redis 7.2 on, the library's name is offered, and may be refused.
        assert [entry for entry in refused if "client|setinfo" not in str(entry)] == []


def use_on_both(url: str) -> None:
    for backend in ("asyncio", "trio"):
        layer = create_channel_layer(url, prefix="shop", channel_capacity={"shop.jobs": 1}, keep_alive=0.1)
        anyio.run(use_all, layer, backend=backend)


def test_rights_suffice(server: RedisServer) -> None:
    """With the rights that the page gives to a user, every method works and nothing is refused."""
    assert RULES.keys() == {"shop", "shop-live", "shop-nodes", "shop-live-nodes", "shop-watch"}
    with server.client() as client:
        client.flushall()
    with nothing_is_refused([server], "shop", "shop-live"):
        use_on_both(f"redis://shop:secret@{server.host}:{server.port}/0")
        use_on_both(f"redis+pubsub://shop-live:secret@{server.host}:{server.port}/0")


def test_rights_suffice_on_a_cluster(cluster: RedisCluster) -> None:
    """The same on a cluster."""
    with nothing_is_refused(cluster.nodes, "shop-nodes", "shop-live-nodes"):
        nodes = ",".join(f"{node.host}:{node.port}" for node in cluster.nodes[:2])
        use_on_both(f"redis+cluster://shop-nodes:secret@{nodes}")
        use_on_both(f"redis+cluster+pubsub://shop-live-nodes:secret@{nodes}")


def test_rights_suffice_with_sentinel(sentinels: Sentinels) -> None:
    """The same behind Sentinel, which is asked and listened to by a user of its own."""
    with (
        nothing_is_refused(sentinels.servers, "shop", "shop-live"),
        nothing_is_refused(sentinels.sentinels, "shop-watch"),
    ):
        where = ",".join(f"{host}:{port}" for host, port in sentinels.addresses)
        rest = f"secret@{where}/mymaster/0?sentinel_username=shop-watch&sentinel_password=secret"
        use_on_both(f"redis+sentinel://shop:{rest}")
        use_on_both(f"redis+sentinel+pubsub://shop-live:{rest}")
