"""One server: connecting by TCP, TLS and unix socket, and logging in. No error says a password."""

from __future__ import annotations

import errno
import ssl
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from time import time as clock
from typing import Any

import hiredis
import pytest
import redis.exceptions
from anyio import create_task_group, create_unix_listener, fail_after, move_on_after, sleep
from anyio.abc import SocketStream
from redis.credentials import CredentialProvider, UsernamePasswordCredentialProvider
from redis_server import Certificates, RedisServer, Script, TLSProxy, free_port, make_certificates
from scripted_stream import NAME, PATIENCE, ScriptedStream, serving

from anyio_channels.redis.client import Connection, ConnectionLost, Server
from anyio_channels.redis.client.address import Address, parse_host
from anyio_channels.redis.client.server import reasons

SECRET = "s3cret"
HELLO = b"%2\r\n$5\r\nproto\r\n:3\r\n$7\r\nversion\r\n$11\r\n7.0.15-rc.2\r\n"
TIME = b"*2\r\n$10\r\n1700000000\r\n$6\r\n500000\r\n"


class Given(CredentialProvider):
    def __init__(self, *credentials: str) -> None:
        self.credentials = credentials

    def get_credentials(self) -> Any:
        return self.credentials


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def redis_at(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """One with a password, a user with another, and a user without."""
    users = [
        *("--requirepass", SECRET),
        *("--user", "alice", "on", ">wonder/land", "~*", "&*", "+@all"),
        *("--user", "bob", "on", "nopass", "~*", "&*", "+@all"),
        *("--user", "carol", "on", "nopass", "~*", "&*", "+@all", "-select"),
    ]
    with RedisServer(tmp_path_factory.mktemp("redis"), *users) as server:
        yield server


def server_of(host: Any) -> Server:
    """The server that an entry of hosts names."""
    address = parse_host(host)
    assert isinstance(address, Address)
    return Server(address)


def server_at(**options: Any) -> Server:
    return Server(Address(**options))


# Connecting


@asynccontextmanager
async def connected(server: Server) -> AsyncIterator[Any]:
    with fail_after(PATIENCE):
        async with await server.connect() as stream:
            yield stream


@pytest.mark.anyio
async def test_connect_tcp() -> None:
    """(host, port) is connected by TCP."""
    async with Script(b"hello") as script, connected(server_of((script.host, script.port))) as stream:
        assert await stream.receive() == b"hello"


@pytest.mark.anyio
async def test_connect_unix(tmp_path: Path) -> None:
    """unix:// is connected by its socket."""

    async def greet(client: SocketStream) -> None:
        async with client:
            await client.send(b"hello")

    path = tmp_path / "redis.sock"
    async with await create_unix_listener(path) as listener, create_task_group() as tasks:
        tasks.start_soon(listener.serve, greet)
        async with connected(server_of(f"unix://{path}")) as stream:
            assert await stream.receive() == b"hello"
        tasks.cancel_scope.cancel()


@pytest.mark.anyio
async def test_connect_tls(certificates: Certificates) -> None:
    """rediss:// is TLS with the certificate that was trusted, and with the client's own if the server wants one."""
    ca = f"ssl_ca_certs={certificates.ca_file}"
    mine = f"ssl_certfile={certificates.client_cert_file}&ssl_keyfile={certificates.client_key_file}"
    async with Script(b"hello") as script:
        async with (
            TLSProxy(script.host, script.port, certificates) as proxy,
            connected(server_of(f"{proxy.url}?{ca}")) as stream,
        ):
            assert await stream.receive() == b"hello"
        async with (
            TLSProxy(script.host, script.port, certificates, require_client=True) as proxy,
            connected(server_of(f"{proxy.url}?{ca}&{mine}")) as stream,
        ):
            assert await stream.receive() == b"hello"


@pytest.mark.anyio
async def test_tls_refuses_a_stranger(certificates: Certificates) -> None:
    """A certificate that nobody vouches for, or for another name, is an ssl.SSLError; told not to look, it connects."""
    async with Script(b"hello") as script, TLSProxy(script.host, script.port, certificates) as proxy:
        with pytest.raises(ssl.SSLCertVerificationError, match="self.signed|unable to get local issuer"):
            async with connected(server_of(proxy.url)):
                pass
        ca = f"ssl_ca_certs={certificates.ca_file}"
        other_name = f"rediss://127.1:{proxy.port}?{ca}"  # the same address, but not what the certificate says
        with pytest.raises(ssl.SSLCertVerificationError, match=r"is not valid for '127\.1'|name mismatch|127\.1"):
            async with connected(server_of(other_name)):
                pass
        for url in (f"{proxy.url}?ssl_cert_reqs=none", f"{other_name}&ssl_check_hostname=false"):
            async with connected(server_of(url)) as stream:
                assert await stream.receive() == b"hello"


@pytest.mark.anyio
@pytest.mark.parametrize("answer", [b"", b"-ERR this is Redis without TLS\r\n"], ids=["hangs up", "speaks otherwise"])
async def test_tls_where_there_is_none(answer: bytes) -> None:
    """A server that ends the handshake, or answers in clear, is an OSError as any that cannot be reached."""
    async with Script(answer, hang_up=True) as script:
        with pytest.raises(OSError, match="TLS|SSL|reset"):
            async with connected(server_of(f"rediss://{script.host}:{script.port}")):
                pass


@pytest.mark.anyio
async def test_tls_is_cancelled() -> None:
    """A server that is silent in the handshake does not keep who gives up, and is let go."""
    async with Script() as script:
        with move_on_after(0.05) as scope:  # nothing but time ends such a handshake
            await server_of(f"rediss://{script.host}:{script.port}").connect()
        assert scope.cancelled_caught
        with fail_after(PATIENCE):
            while script.open_connections:
                await sleep(0.005)


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("host", "words"),
    [
        ({"host": "\u00fc..example"}, "its name cannot be used: "),
        ({"path": "/nowhere/redis.sock"}, "No such file"),
        ({"path": "/" + "x" * 500}, "too long"),
    ],
)
async def test_where_nobody_is(host: Any, words: str) -> None:
    """Whatever is wrong with an address is an OSError."""
    with pytest.raises(OSError, match=words):
        await server_of(host).connect()


@pytest.mark.anyio
async def test_a_port_where_nobody_listens() -> None:
    """A refused connection is an OSError that says so, once, however many addresses the name has."""
    for host in ("127.0.0.1", "localhost"):
        with pytest.raises(OSError, match="^Connection refused$"):
            await server_of((host, free_port())).connect()


def test_reasons_of_several_addresses() -> None:
    """Each is said once."""
    unreachable = OSError(errno.ENETUNREACH, "no route to ('::1', 6379)")
    refused = [ConnectionRefusedError(errno.ECONNREFUSED, f"Connect call failed ('{host}', 1)") for host in "ab"]
    found = reasons(ExceptionGroup("several", [unreachable, *refused, OSError("odd"), ValueError("odder")]))
    assert found == "Network is unreachable; Connection refused; odd; odder"


# Logging in, by the script


def commands(stream: ScriptedStream) -> list[list[bytes]]:
    reader = hiredis.Reader()
    reader.feed(b"".join(stream.written))
    return [*iter(reader.gets, False)]


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("server", "hello"),
    [
        (server_at(), ["HELLO", "3"]),
        (server_at(password=SECRET), ["HELLO", "3", "AUTH", "default", SECRET]),
        (server_at(username="me", password=SECRET), ["HELLO", "3", "AUTH", "me", SECRET]),
        (server_at(username="me"), ["HELLO", "3", "AUTH", "me", ""]),
        (server_at(client_name="worker"), ["HELLO", "3", "SETNAME", "worker"]),
        (
            server_at(password=SECRET, client_name="worker"),
            ["HELLO", "3", "AUTH", "default", SECRET, "SETNAME", "worker"],
        ),
        (server_at(password="other", credential_provider=Given(SECRET)), ["HELLO", "3", "AUTH", "default", SECRET]),
        (server_at(username="other", credential_provider=Given("me", SECRET)), ["HELLO", "3", "AUTH", "me", SECRET]),
    ],
)
async def test_hello(server: Server, hello: list[str]) -> None:
    """The login is part of HELLO, all goes out in one write, and the server's time comes back."""
    stream = ScriptedStream()
    async with serving(stream) as connection:
        stream.answer(HELLO + b"-ERR unknown subcommand 'SETINFO'\r\n+PONG\r\n" + TIME)
        assert await server.shake_hands(connection) == 1_700_000_000.5
        assert connection.version == (7, 0, 15)
        assert len(stream.written) == 1
        assert commands(stream) == [
            [part.encode() for part in hello],
            [b"CLIENT", b"SETINFO", b"LIB-NAME", b"anyio_channels"],
            [b"PING"],
            [b"TIME"],
        ]


@pytest.mark.anyio
async def test_the_database_is_chosen() -> None:
    """db is selected, unless it is the first one, where everyone is anyway."""
    stream = ScriptedStream()
    async with serving(stream) as connection:
        stream.answer(HELLO + b"+OK\r\n+OK\r\n+PONG\r\n" + TIME)
        await server_at(db=3).shake_hands(connection)
        assert [b"SELECT", b"3"] in commands(stream)


NOAUTH = b"-NOAUTH Authentication required.\r\n"
LOADING = b"-LOADING Redis is loading the dataset in memory\r\n"


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("answers", "error", "words"),
    [
        (
            b"-WRONGPASS invalid username-password pair or user is disabled.\r\n" + NOAUTH * 4,
            redis.exceptions.AuthenticationError,
            f"{NAME}: WRONGPASS invalid username-password pair",
        ),
        (
            b"-NOAUTH HELLO must be called with the client already authenticated\r\n" + NOAUTH * 4,
            redis.exceptions.AuthenticationError,
            f"{NAME}: NOAUTH HELLO must be called",
        ),
        (
            HELLO + b"+OK\r\n" + LOADING * 2 + TIME,
            redis.exceptions.BusyLoadingError,
            f"{NAME}: LOADING Redis is loading",
        ),
        (
            HELLO + b"+OK\r\n" * 2 + LOADING + TIME,
            redis.exceptions.BusyLoadingError,
            f"{NAME}: LOADING Redis is loading",
        ),
        (
            HELLO + b"+OK\r\n-ERR DB index is out of range\r\n+PONG\r\n" + TIME,
            redis.exceptions.ResponseError,
            "DB index",
        ),
        (HELLO + b"+OK\r\n" * 3 + b"-NOPERM no time\r\n", redis.exceptions.NoPermissionError, "NOPERM no time"),
        (
            b"-ERR unknown command `HELLO`, with args beginning with: `3`\r\n" + NOAUTH * 4,
            redis.exceptions.ConnectionError,
            "Redis at localhost:6379 does not know HELLO: Redis 6.2 or newer is needed",
        ),
        (
            b"-unsupported command 'HELLO'\r\n",
            redis.exceptions.ConnectionError,
            "answers HELLO with .unsupported command 'HELLO'.: Redis 6.2 or newer is needed.* must speak RESP3",
        ),
        (
            b"-NOPROTO unsupported protocol version\r\n" + NOAUTH * 4,
            redis.exceptions.ConnectionError,
            "answers HELLO with 'NOPROTO unsupported protocol version': .* must speak RESP3",
        ),
        (
            b"-ERR Client names cannot contain spaces, newlines or special characters.\r\n" + NOAUTH * 4,
            redis.exceptions.ResponseError,
            f"^{NAME}: ERR Client names cannot contain spaces, newlines or special characters.$",
        ),
        (
            b"-DENIED Redis is running in protected mode\r\n",
            redis.exceptions.ResponseError,
            f"^{NAME}: DENIED Redis is running in protected mode$",
        ),
        (
            b"-ERR max number of clients reached\r\n",
            redis.exceptions.ConnectionError,
            f"{NAME}: ERR max number of clients",
        ),
    ],
)
async def test_the_server_refuses(answers: bytes, error: type[Exception], words: str) -> None:
    """The first refusal is the one that is told, not those that follow from it; no password is in it."""
    stream = ScriptedStream()
    async with serving(stream) as connection:
        stream.answer(*([answers] if answers.count(b"\r\n") > 1 else [answers, OSError("and hung up")]))
        with pytest.raises(error, match=words) as info:
            await server_at(password=SECRET, db=1).shake_hands(connection)
        assert isinstance(info.value, error)
        assert str(info.value) in repr(info.value).replace("\\'", "'")
        assert SECRET not in str(info.value)


@pytest.mark.anyio
@pytest.mark.parametrize(
    "answers",
    [
        b"*4\r\n+proto\r\n:3\r\n+version\r\n+7\r\n+OK\r\n+PONG\r\n" + TIME,
        b"%2\r\n+proto\r\n:2\r\n+version\r\n+7\r\n+OK\r\n+PONG\r\n" + TIME,
        b"%1\r\n+proto\r\n:3\r\n+OK\r\n+PONG\r\n" + TIME,
        b"+OK\r\n" * 4,
        HELLO + b"+OK\r\n" * 3,
        HELLO + b"+OK\r\n" * 2 + b"*1\r\n:1\r\n",
        HELLO + b"+OK\r\n" * 2 + b"*2\r\n+now\r\n+then\r\n",
    ],
    ids=["array", "RESP2", "no version", "OK to all", "OK to TIME", "half a time", "no numbers"],
)
async def test_what_is_not_redis(answers: bytes) -> None:
    """Whatever else answers to these commands is not taken for Redis."""
    stream = ScriptedStream()
    async with serving(stream) as connection:
        stream.answer(answers)
        with pytest.raises(
            redis.exceptions.ConnectionError, match=f"{NAME}: the connection ended: it does not answer as Redis would: "
        ):
            await server_at().shake_hands(connection)


@pytest.mark.anyio
@pytest.mark.parametrize("refusal", [b"-MISCONF Errors writing to disk\r\n", b"-NOPERM no permissions\r\n"])
async def test_a_server_that_refuses_only_ping(refusal: bytes) -> None:
    """What the work does not need may be refused: PING is asked only to hear whether the server is loading its data."""
    stream = ScriptedStream()
    async with serving(stream) as connection:
        stream.answer(HELLO + b"+OK\r\n" * 2 + refusal + TIME)
        await server_at(db=1).shake_hands(connection)


@pytest.mark.anyio
async def test_the_server_hangs_up() -> None:
    """The end of the connection in the handshake is a ConnectionLost as at any other time."""
    stream = ScriptedStream()
    async with serving(stream) as connection:
        stream.answer(OSError("hung up"))
        with pytest.raises(ConnectionLost, match="it broke: .*hung up"):
            await server_at().shake_hands(connection)


@pytest.mark.anyio
async def test_a_credential_provider_that_hangs() -> None:
    """Who gives up need not wait for a provider of credentials that does not answer."""
    leave = threading.Event()

    class Hanging(CredentialProvider):
        def get_credentials(self) -> Any:
            leave.wait(PATIENCE)
            return ("me", SECRET)

    stream = ScriptedStream()
    try:
        async with serving(stream) as connection:
            with move_on_after(0.05) as scope:  # a thread is nothing that an event loop can see waiting
                await server_at(credential_provider=Hanging()).shake_hands(connection)
            assert scope.cancelled_caught
            assert not leave.is_set()
            assert stream.written == []
    finally:
        leave.set()


# Logging in, for real


async def log_in(server: Server) -> list[Any]:
    """Who we are there, in which database, and as which client."""
    with fail_after(PATIENCE):
        stream = await server.connect()
        connection = Connection(stream, server.name, timeout=PATIENCE)
        async with create_task_group() as tasks:
            tasks.start_soon(connection.run)
            time = await server.shake_hands(connection)
            about = (await connection.execute("CLIENT", "INFO")).decode()
            user = (await connection.execute("ACL", "WHOAMI")).decode()
            tasks.cancel_scope.cancel()
    assert abs(time - clock()) < PATIENCE
    told = dict(item.split("=", 1) for item in about.split())
    return [user, int(told["db"]), told["name"]]


@pytest.mark.anyio
async def test_log_in(redis_at: RedisServer) -> None:
    """Password, user, user without a password, database and client name, by TCP and by unix socket."""
    place = f"{redis_at.host}:{redis_at.port}"
    assert await log_in(server_of(f"redis://:{SECRET}@{place}")) == ["default", 0, ""]
    assert await log_in(server_of(f"redis://alice:wonder%2Fland@{place}/3")) == ["alice", 3, ""]
    assert await log_in(server_of(f"redis://bob@{place}?client_name=me")) == ["bob", 0, "me"]
    assert await log_in(server_of(f"unix://:{SECRET}@{redis_at.unix_socket}?db=2")) == ["default", 2, ""]
    provider = UsernamePasswordCredentialProvider("alice", "wonder/land")
    assert await log_in(server_of({"address": f"redis://{place}", "credential_provider": provider})) == [
        "alice",
        0,
        "",
    ]


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({}, redis.exceptions.AuthenticationError, "NOAUTH HELLO"),
        ({"password": "wrong" + SECRET}, redis.exceptions.AuthenticationError, "WRONGPASS"),
        ({"username": "nobody", "password": SECRET}, redis.exceptions.AuthenticationError, "WRONGPASS"),
        ({"password": SECRET, "db": 99}, redis.exceptions.ResponseError, "DB index is out of range"),
        ({"username": "carol", "db": 1}, redis.exceptions.NoPermissionError, "NOPERM .*select"),
    ],
)
async def test_not_logged_in(redis_at: RedisServer, options: Any, kind: type[Exception], words: str) -> None:
    """What a real server refuses is told as its first words for it, with its name and without the password."""
    server = server_of({"host": redis_at.host, "port": redis_at.port, **options})
    with pytest.raises(ExceptionGroup) as info:
        await log_in(server)
    (error,) = info.value.exceptions
    assert isinstance(error, kind)
    assert str(error).startswith(f"Redis at {redis_at.host}:{redis_at.port}: ")
    assert SECRET not in str(error)
    with pytest.raises(kind, match=words):
        raise error
