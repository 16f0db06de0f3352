"""Where a Redis server is and how to get in: hosts, URLs, TLS, logging in. What is wrong is refused, and says no password."""

from __future__ import annotations

import errno
import pickle
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
from channels_redis.utils import _consistent_hash
from cryptography import x509
from redis.credentials import CredentialProvider, UsernamePasswordCredentialProvider
from redis_server import Certificates, RedisServer, Script, TLSProxy, free_port, make_certificates
from scripted_stream import NAME, PATIENCE, ScriptedStream, serving

from anyio_channels.layers.redis.connection import Connection, ConnectionLost
from anyio_channels.layers.redis.endpoint import Endpoint, _reasons, parse_host
from anyio_channels.layers.redis.topology import Topology

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
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """One with a password, a user with another, and a user without."""
    users = [
        *("--requirepass", SECRET),
        *("--user", "alice", "on", ">wonder/land", "~*", "&*", "+@all"),
        *("--user", "bob", "on", "nopass", "~*", "&*", "+@all"),
        *("--user", "carol", "on", "nopass", "~*", "&*", "+@all", "-select"),
    ]
    with RedisServer(tmp_path_factory.mktemp("redis"), *users) as server:
        yield server


# Hosts and URLs


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("redis://", Endpoint()),
        ("redis://example", Endpoint(host="example")),
        ("redis://example/", Endpoint(host="example")),
        ("redis://example:6380/3", Endpoint(host="example", port=6380, db=3)),
        ("redis://example/3?db=4", Endpoint(host="example", db=4)),
        ("redis://:pw@example", Endpoint(host="example", password="pw")),
        ("redis://me:pw@example", Endpoint(host="example", username="me", password="pw")),
        ("redis://me@example", Endpoint(host="example", username="me")),
        ("redis://m%40e:p%2Fw%3A@example", Endpoint(host="example", username="m@e", password="p/w:")),
        ("redis://:@example", Endpoint(host="example")),
        ("redis://[::1]:6380", Endpoint(host="::1", port=6380)),
        ("redis://example?client_name=me", Endpoint(host="example", client_name="me")),
        (
            "redis://example?socket_timeout=2.5&socket_connect_timeout=7",
            Endpoint(host="example", timeout=2.5, connect_timeout=7),
        ),
        ("redis://example?ssl=false", Endpoint(host="example")),
        ("unix:///run/redis.sock", Endpoint(path="/run/redis.sock")),
        ("unix://me:pw@/run/redis.sock?db=2", Endpoint(path="/run/redis.sock", username="me", password="pw", db=2)),
        (("example", 6380), Endpoint(host="example", port=6380)),
        (["example", "6380"], Endpoint(host="example", port=6380)),
        ({"host": "example", "port": 6380, "db": 1}, Endpoint(host="example", port=6380, db=1)),
        ({"path": "/run/redis.sock"}, Endpoint(path="/run/redis.sock")),
        ({"unix_socket_path": "/run/redis.sock"}, Endpoint(path="/run/redis.sock")),
        ({"address": "redis://:pw@example:6380/3"}, Endpoint(host="example", port=6380, db=3, password="pw")),
        (
            {"address": "redis://:pw@example/3", "db": 4, "username": "me"},
            Endpoint(host="example", db=4, username="me", password="pw"),
        ),
        ({"address": "unix:///run/redis.sock", "password": "pw"}, Endpoint(path="/run/redis.sock", password="pw")),
        ({"host": "example", "username": "", "password": ""}, Endpoint(host="example")),
        ({}, Endpoint()),
    ],
)
def test_hosts(host: Any, expected: Endpoint) -> None:
    """URLs, pairs and dicts say where the server is, the URL's parts in percent-encoding, and options beat the URL."""
    given = pickle.dumps(host)
    assert parse_host(host) == expected
    assert pickle.dumps(host) == given


def test_a_credential_provider() -> None:
    """The redis package's providers of credentials are taken as they are."""
    provider = UsernamePasswordCredentialProvider("me", SECRET)
    assert parse_host({"host": "example", "credential_provider": provider}).credential_provider is provider


@pytest.mark.parametrize(
    ("host", "name"),
    [
        ("redis://me:s3cret@example:6380/3", "Redis at example:6380"),
        ("rediss://:s3cret@[2001:db8::1]", "Redis at [2001:db8::1]:6379"),
        ("unix://:s3cret@/run/redis.sock", "Redis at /run/redis.sock"),
    ],
)
def test_names(host: str, name: str) -> None:
    """A server is called by its address; who logs in how is neither there nor in the repr."""
    provider = UsernamePasswordCredentialProvider("me", SECRET)
    for endpoint in (parse_host(host), parse_host({"address": host, "credential_provider": provider})):
        assert endpoint.name == name
        assert SECRET not in repr(endpoint)
        assert "me" not in repr(endpoint).replace("client_name", "").replace("timeout", "")
        assert "provider" not in repr(endpoint)


@pytest.mark.parametrize(
    ("host", "error", "words"),
    [
        (None, TypeError, r"must be a URL, a \(host, port\) pair or a dict of options"),
        (("example",), TypeError, r"must be a URL, a \(host, port\) pair"),
        (("example", 6379, SECRET), TypeError, r"must be a URL, a \(host, port\) pair"),
        ({"address": ("example", 6379)}, TypeError, r"the address of a Redis host must be a URL \(str\)"),
        ({"address": None}, TypeError, r"the address of a Redis host must be a URL"),
        (
            {"host": "example", "pasword": SECRET},
            TypeError,
            "unknown option 'pasword' of a Redis host; there are: client_name, credential_provider, .*ssl_ca_certs, .*username",
        ),
        ("redis://:s3cret@example?max_connections=5", TypeError, "unknown option 'max_connections' of a Redis host"),
        ({1: SECRET}, TypeError, "unknown option 1 of a Redis host"),
        ("example:6379", ValueError, "a Redis URL begins with redis://, rediss:// or unix://"),
        ("", ValueError, "a Redis URL begins with redis://"),
        ("http://me:s3cret@example", ValueError, "a Redis URL begins with redis://"),
        ("s3cret://example", ValueError, "a Redis URL begins with redis://"),
        ("redis://:s3cret/2@example", ValueError, "must be percent-encoded"),
        ("redis://:s3cret?2@example", ValueError, "must be percent-encoded"),
        ("redis://:s3cret#2@example", ValueError, "must be percent-encoded"),
        ("redis://:s3cret[2@example", ValueError, "must be percent-encoded"),
        ("redis://:s3cret@exam\u2100ple", ValueError, "must be percent-encoded"),
        ("redis://s3cret:2/3@example", ValueError, "must be percent-encoded"),
        ("redis://example/1/2", ValueError, r"a Redis URL is redis://\[user\[:password\]@\]host"),
        ("redis://example/one", ValueError, "a Redis URL is"),
        ("redis://example:0", ValueError, "a Redis URL is"),
        ("redis://example:70000", ValueError, "a Redis URL is"),
        ("redis://:s3cret@example?db=one", ValueError, "Invalid value for 'db'"),
        ("unix://:s3cret@", ValueError, "must have the path of the socket"),
        ("unix://", ValueError, "must have the path of the socket"),
        ({"host": 5}, TypeError, "the host of a Redis server must be a str, not 5"),
        ({"host": ""}, TypeError, "the host of a Redis server must be a str, not ''"),
        (b"ab", TypeError, "the host of a Redis server must be a str, not 97"),
        (("example", "http"), ValueError, "port of a Redis host must be a whole number from 1 to 65535, not 'http'"),
        (("example", 0), ValueError, "port of a Redis host must be a whole number"),
        (("example", 6379.0), ValueError, "port of a Redis host must be a whole number"),
        (("example", None), ValueError, "port of a Redis host must be a whole number"),
        ({"db": -1}, ValueError, "db of a Redis host must be a whole number from 0"),
        ({"password": SECRET.encode()}, TypeError, "password of a Redis host must be a str"),
        ({"username": 1}, TypeError, "username of a Redis host must be a str"),
        ({"client_name": 1}, TypeError, "client_name of a Redis host must be a str"),
        ({"credential_provider": ("me", SECRET)}, TypeError, "credential_provider must be a redis.CredentialProvider"),
        (
            {"socket_timeout": 0},
            ValueError,
            "socket_timeout of a Redis host must be a positive number of seconds, not 0",
        ),
        ({"socket_timeout": float("nan")}, ValueError, "socket_timeout of a Redis host must be a positive number"),
        (
            {"socket_connect_timeout": float("inf")},
            ValueError,
            "socket_connect_timeout of a Redis host must be a positive",
        ),
        (
            {"socket_connect_timeout": "soon"},
            ValueError,
            "socket_connect_timeout of a Redis host must be .*, not 'soon'",
        ),
        ({"socket_connect_timeout": [1]}, ValueError, "socket_connect_timeout of a Redis host must be a positive"),
        ({"ssl": "perhaps"}, ValueError, "ssl of a Redis host must be True or False, not 'perhaps'"),
        ({"ssl": None}, ValueError, "ssl of a Redis host must be True or False, not None"),
        (
            {"ssl": True, "ssl_check_hostname": "off"},
            ValueError,
            "ssl_check_hostname of a Redis host must be True or False",
        ),
        (
            {"ssl": True, "ssl_cert_reqs": "maybe"},
            ValueError,
            "ssl_cert_reqs must be one of 'required', .*, not 'maybe'",
        ),
        ({"ssl": True, "ssl_cert_reqs": None}, ValueError, "ssl_cert_reqs must be one of .*, not None"),
        ({"ssl": True, "ssl_context": "default"}, TypeError, "ssl_context of a Redis host must be an ssl.SSLContext"),
        ({"ssl": True, "ssl_min_version": 5}, ValueError, "5 is not a valid TLSVersion"),
        ({"ssl": True, "path": "/run/redis.sock"}, ValueError, "on a unix socket has no TLS"),
        ("unix:///run/redis.sock?ssl=true", ValueError, "on a unix socket has no TLS"),
        (
            "redis://example?ssl_cert_reqs=none&ssl_ca_certs=ca.pem",
            ValueError,
            "ssl_ca_certs, ssl_cert_reqs of a Redis host have no effect without TLS: use rediss:// or ssl=True",
        ),
    ],
)
def test_refused_hosts(host: Any, error: type[Exception], words: str) -> None:
    """What is no host, no option or no value for one is refused in words that say so, and no password is among them."""
    with pytest.raises(error, match=words) as info:
        parse_host(host)
    told: BaseException | None = info.value
    while told is not None:
        assert SECRET not in str(told)
        told = told.__cause__ or (None if told.__suppress_context__ else told.__context__)


def test_lists_of_hosts() -> None:
    """hosts is a list; left out, it is the server on this machine."""
    assert Topology(None).endpoints == [Endpoint(host="localhost", port=6379)]
    assert Topology(["redis://a", ("b", 1)]).endpoints == [Endpoint(host="a"), Endpoint(host="b", port=1)]
    assert Topology(({"host": "a"},)).endpoints == [Endpoint(host="a")]
    with pytest.raises(ValueError, match="hosts must name at least one Redis host; leave it out for redis://localhost"):
        Topology([])
    for hosts in ("redis://:s3cret@a", b"redis://a", {"address": "redis://a"}, 5, {"redis://a"}):
        with pytest.raises(TypeError, match="hosts must be a list of Redis hosts, even if there is only one") as info:
            Topology(hosts)  # type: ignore[arg-type]
        assert SECRET not in str(info.value)


def test_servers_share_the_names_as_those_of_channels_redis_do() -> None:
    """Each name is owned by the server that channels_redis takes for it, also on the edge between two."""
    names = [f"name{number}" for number in range(10_000)]
    for count in (1, 2, 3, 10, 186):
        topology = Topology([("example", 6380 + number) for number in range(count)])
        topology.links = topology.endpoints  # type: ignore[assignment]
        theirs = [_consistent_hash(name, count) for name in names]
        owners: list[Any] = [topology.owner(name, "") for name in names]
        assert [topology.endpoints.index(owner) for owner in owners] == theirs
    assert Topology([("a", 1), ("b", 2)]).name == "Redis at a:1, Redis at b:2"
    with pytest.raises(ValueError, match="hosts names 4097 Redis servers; 4096 is the most"):
        Topology(["redis://a"] * 4097)


# TLS


def tls_of(host: Any) -> ssl.SSLContext:
    context = parse_host(host).tls
    assert context is not None
    return context


@pytest.mark.parametrize("host", ["rediss://example", "redis://example?ssl=true", {"ssl": True}, {"ssl": "1"}])
def test_tls_verifies_by_default(host: Any) -> None:
    """Unless told not to, TLS wants a certificate that the system trusts, in the server's name."""
    context = tls_of(host)
    assert context.verify_mode is ssl.CERT_REQUIRED
    assert context.check_hostname
    assert context.minimum_version >= ssl.TLSVersion.TLSv1_2


@pytest.mark.parametrize("host", ["redis://example", "unix:///run/redis.sock", {"ssl": False}, {"ssl": "no"}, ("a", 1)])
def test_no_tls_unless_asked_for(host: Any) -> None:
    """Nothing but rediss:// and ssl=True means TLS."""
    assert parse_host(host).tls is None


@pytest.mark.parametrize(
    ("options", "mode", "check_name"),
    [
        ("ssl_cert_reqs=required", ssl.CERT_REQUIRED, True),
        ("ssl_cert_reqs=optional", ssl.CERT_OPTIONAL, True),
        ("ssl_cert_reqs=none", ssl.CERT_NONE, False),
        ("ssl_check_hostname=false", ssl.CERT_REQUIRED, False),
        ({"ssl_cert_reqs": ssl.CERT_NONE}, ssl.CERT_NONE, False),
        ({"ssl_cert_reqs": ssl.CERT_REQUIRED}, ssl.CERT_REQUIRED, True),
        ({"ssl_check_hostname": False}, ssl.CERT_REQUIRED, False),
        ({"ssl_check_hostname": "0", "ssl_cert_reqs": "optional"}, ssl.CERT_OPTIONAL, False),
    ],
)
def test_how_much_tls_verifies(options: Any, mode: ssl.VerifyMode, check_name: bool) -> None:
    """Each check is left out only when its own option says so, or when there is no certificate to check."""
    context = tls_of(f"rediss://example?{options}" if isinstance(options, str) else {"ssl": True, **options})
    assert context.verify_mode is mode
    assert context.check_hostname is check_name


def test_tls_options(certificates: Certificates) -> None:
    """Certificates, ciphers and the oldest version are those that were named; a context is taken as it is."""
    data = certificates.ca_file.read_text()
    for authority in ({"ssl_ca_certs": str(certificates.ca_file)}, {"ssl_ca_data": data}):
        (found,) = [one["serialNumber"] for one in tls_of({"ssl": True, **authority}).get_ca_certs()]
        assert int(str(found), 16) == x509.load_pem_x509_certificate(data.encode()).serial_number
    context = tls_of(
        {
            "ssl": True,
            "ssl_ca_path": str(certificates.ca_file.parent),
            "ssl_certfile": str(certificates.client_cert_file),
            "ssl_keyfile": str(certificates.client_key_file),
            "ssl_min_version": ssl.TLSVersion.TLSv1_3,
            "ssl_ciphers": "ECDHE-RSA-AES256-GCM-SHA384",
        }
    )
    assert context.minimum_version is ssl.TLSVersion.TLSv1_3
    assert "ECDHE-RSA-AES256-GCM-SHA384" in {cipher["name"] for cipher in context.get_ciphers()}
    assert "ECDHE-ECDSA-AES256-GCM-SHA384" not in {cipher["name"] for cipher in context.get_ciphers()}
    assert tls_of(f"rediss://example?ssl_min_version={int(ssl.TLSVersion.TLSv1_3)}").minimum_version == (
        ssl.TLSVersion.TLSv1_3
    )
    mine = ssl.create_default_context()
    assert tls_of({"address": "rediss://example", "ssl_context": mine}) is mine


@pytest.mark.parametrize("option", ["ssl_ca_certs", "ssl_certfile"])
def test_tls_files_that_are_not_there(option: str) -> None:
    """A file that cannot be read is told when the layer is made, not when it is opened."""
    with pytest.raises(FileNotFoundError):
        parse_host({"ssl": True, option: "/nowhere.pem"})


# Connecting


@asynccontextmanager
async def connected(endpoint: Endpoint) -> AsyncIterator[Any]:
    with fail_after(PATIENCE):
        async with await endpoint.connect() as stream:
            yield stream


@pytest.mark.anyio
async def test_connect_tcp() -> None:
    """(host, port) is connected by TCP."""
    async with Script(b"hello") as script, connected(parse_host((script.host, script.port))) as stream:
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
        async with connected(parse_host(f"unix://{path}")) as stream:
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
            connected(parse_host(f"{proxy.url}?{ca}")) as stream,
        ):
            assert await stream.receive() == b"hello"
        async with (
            TLSProxy(script.host, script.port, certificates, require_client=True) as proxy,
            connected(parse_host(f"{proxy.url}?{ca}&{mine}")) as stream,
        ):
            assert await stream.receive() == b"hello"


@pytest.mark.anyio
async def test_tls_refuses_a_stranger(certificates: Certificates) -> None:
    """A certificate that nobody vouches for, or for another name, is an ssl.SSLError; told not to look, it connects."""
    async with Script(b"hello") as script, TLSProxy(script.host, script.port, certificates) as proxy:
        with pytest.raises(ssl.SSLCertVerificationError, match="self.signed|unable to get local issuer"):
            async with connected(parse_host(proxy.url)):
                pass
        ca = f"ssl_ca_certs={certificates.ca_file}"
        other_name = f"rediss://127.1:{proxy.port}?{ca}"  # the same address, but not what the certificate says
        with pytest.raises(ssl.SSLCertVerificationError, match=r"is not valid for '127\.1'|name mismatch|127\.1"):
            async with connected(parse_host(other_name)):
                pass
        for url in (f"{proxy.url}?ssl_cert_reqs=none", f"{other_name}&ssl_check_hostname=false"):
            async with connected(parse_host(url)) as stream:
                assert await stream.receive() == b"hello"


@pytest.mark.anyio
@pytest.mark.parametrize("answer", [b"", b"-ERR this is Redis without TLS\r\n"], ids=["hangs up", "speaks otherwise"])
async def test_tls_where_there_is_none(answer: bytes) -> None:
    """A server that ends the handshake, or answers in clear, is an OSError as any that cannot be reached."""
    async with Script(answer, hang_up=True) as script:
        with pytest.raises(OSError, match="TLS|SSL|reset"):
            async with connected(parse_host(f"rediss://{script.host}:{script.port}")):
                pass


@pytest.mark.anyio
async def test_tls_is_cancelled() -> None:
    """A server that is silent in the handshake does not keep who gives up, and is let go."""
    async with Script() as script:
        with move_on_after(0.05) as scope:  # nothing but time ends such a handshake
            await parse_host(f"rediss://{script.host}:{script.port}").connect()
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
        await parse_host(host).connect()


@pytest.mark.anyio
async def test_a_port_where_nobody_listens() -> None:
    """A refused connection is an OSError that says so, once, however many addresses the name has."""
    for host in ("127.0.0.1", "localhost"):
        with pytest.raises(OSError, match="^Connection refused$"):
            await parse_host((host, free_port())).connect()


def test_reasons_of_several_addresses() -> None:
    """Each is said once."""
    unreachable = OSError(errno.ENETUNREACH, "no route to ('::1', 6379)")
    refused = [ConnectionRefusedError(errno.ECONNREFUSED, f"Connect call failed ('{host}', 1)") for host in "ab"]
    found = _reasons(ExceptionGroup("several", [unreachable, *refused, OSError("odd"), ValueError("odder")]))
    assert found == "Network is unreachable; Connection refused; odd; odder"


# Logging in, by the script


def commands(stream: ScriptedStream) -> list[list[bytes]]:
    reader = hiredis.Reader()
    reader.feed(b"".join(stream.written))
    return [*iter(reader.gets, False)]


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("endpoint", "hello"),
    [
        (Endpoint(), ["HELLO", "3"]),
        (Endpoint(password=SECRET), ["HELLO", "3", "AUTH", "default", SECRET]),
        (Endpoint(username="me", password=SECRET), ["HELLO", "3", "AUTH", "me", SECRET]),
        (Endpoint(username="me"), ["HELLO", "3", "AUTH", "me", ""]),
        (Endpoint(client_name="worker"), ["HELLO", "3", "SETNAME", "worker"]),
        (
            Endpoint(password=SECRET, client_name="worker"),
            ["HELLO", "3", "AUTH", "default", SECRET, "SETNAME", "worker"],
        ),
        (Endpoint(password="other", credential_provider=Given(SECRET)), ["HELLO", "3", "AUTH", "default", SECRET]),
        (Endpoint(username="other", credential_provider=Given("me", SECRET)), ["HELLO", "3", "AUTH", "me", SECRET]),
    ],
)
async def test_hello(endpoint: Endpoint, hello: list[str]) -> None:
    """The login is part of HELLO, all goes out in one write, and the server's time comes back."""
    stream = ScriptedStream()
    async with serving(stream) as connection:
        stream.answer(HELLO + b"-ERR unknown subcommand 'SETINFO'\r\n+PONG\r\n" + TIME)
        assert await endpoint.shake_hands(connection) == 1_700_000_000.5
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
        await Endpoint(db=3).shake_hands(connection)
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
            HELLO + b"+OK\r\n-ERR DB index is out of range\r\n+PONG\r\n" + TIME,
            redis.exceptions.ResponseError,
            "DB index",
        ),
        (HELLO + b"+OK\r\n" * 2 + b"-NOPERM no permissions\r\n" + TIME, redis.exceptions.NoPermissionError, "NOPERM"),
        (HELLO + b"+OK\r\n" * 3 + b"-NOPERM no time\r\n", redis.exceptions.NoPermissionError, "NOPERM no time"),
        (
            b"-ERR unknown command `HELLO`, with args beginning with: `3`\r\n" + NOAUTH * 4,
            redis.exceptions.ConnectionError,
            "Redis at localhost:6379 does not know HELLO: Redis 6.2 or newer is needed",
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
            await Endpoint(password=SECRET, db=1).shake_hands(connection)
        assert type(info.value) is error
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
            redis.exceptions.ConnectionError, match="Redis at localhost:6379 does not answer as Redis would"
        ):
            await Endpoint().shake_hands(connection)


@pytest.mark.anyio
async def test_the_server_hangs_up() -> None:
    """The end of the connection in the handshake is a ConnectionLost as at any other time."""
    stream = ScriptedStream()
    async with serving(stream) as connection:
        stream.answer(OSError("hung up"))
        with pytest.raises(ConnectionLost, match="it broke: .*hung up"):
            await Endpoint().shake_hands(connection)


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
                await Endpoint(credential_provider=Hanging()).shake_hands(connection)
            assert scope.cancelled_caught
            assert not leave.is_set()
            assert stream.written == []
    finally:
        leave.set()


# Logging in, for real


async def log_in(endpoint: Endpoint) -> list[Any]:
    """Who we are there, in which database, and as which client."""
    with fail_after(PATIENCE):
        stream = await endpoint.connect()
        connection = Connection(stream, endpoint.name, timeout=PATIENCE)
        async with create_task_group() as tasks:
            tasks.start_soon(connection.run)
            time = await endpoint.shake_hands(connection)
            about = (await connection.execute("CLIENT", "INFO")).decode()
            user = (await connection.execute("ACL", "WHOAMI")).decode()
            tasks.cancel_scope.cancel()
    assert abs(time - clock()) < PATIENCE
    told = dict(item.split("=", 1) for item in about.split())
    return [user, int(told["db"]), told["name"]]


@pytest.mark.anyio
async def test_log_in(server: RedisServer) -> None:
    """Password, user, user without a password, database and client name, by TCP and by unix socket."""
    place = f"{server.host}:{server.port}"
    assert await log_in(parse_host(f"redis://:{SECRET}@{place}")) == ["default", 0, ""]
    assert await log_in(parse_host(f"redis://alice:wonder%2Fland@{place}/3")) == ["alice", 3, ""]
    assert await log_in(parse_host(f"redis://bob@{place}?client_name=me")) == ["bob", 0, "me"]
    assert await log_in(parse_host(f"unix://:{SECRET}@{server.unix_socket}?db=2")) == ["default", 2, ""]
    provider = UsernamePasswordCredentialProvider("alice", "wonder/land")
    assert await log_in(parse_host({"address": f"redis://{place}", "credential_provider": provider})) == [
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
async def test_not_logged_in(server: RedisServer, options: Any, kind: type[Exception], words: str) -> None:
    """What a real server refuses is told as its first words for it, with its name and without the password."""
    endpoint = parse_host({"host": server.host, "port": server.port, **options})
    with pytest.raises(ExceptionGroup) as info:
        await log_in(endpoint)
    (error,) = info.value.exceptions
    assert type(error) is kind
    assert str(error).startswith(f"Redis at {server.host}:{server.port}: ")
    assert SECRET not in str(error)
    with pytest.raises(kind, match=words):
        raise error
