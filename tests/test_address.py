"""Where a Redis server is and how to get in: hosts, URLs, TLS options. What is wrong is refused, and says no password."""

from __future__ import annotations

import pickle
import ssl
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from redis.credentials import UsernamePasswordCredentialProvider
from redis_server import Certificates, make_certificates

from anyio_channels.redis.client.address import Address, options_of, parse_host, parse_hosts, split_url

SECRET = "s3cret"


def address_of(host: Any) -> Address:
    """The address of one server."""
    address = parse_host(host)
    assert isinstance(address, Address)
    return address


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("certificates"))


# Hosts and URLs


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("redis://", Address()),
        ("redis://example", Address(host="example")),
        ("redis://example/", Address(host="example")),
        ("redis://example:6380/3", Address(host="example", port=6380, db=3)),
        ("redis://example/3?db=4", Address(host="example", db=4)),
        ("redis://:pw@example", Address(host="example", password="pw")),
        ("redis://me:pw@example", Address(host="example", username="me", password="pw")),
        ("redis://me@example", Address(host="example", username="me")),
        ("redis://m%40e:p%2Fw%3A@example", Address(host="example", username="m@e", password="p/w:")),
        ("redis://:@example", Address(host="example")),
        ("redis://[::1]:6380", Address(host="::1", port=6380)),
        ("redis://example?client_name=me", Address(host="example", client_name="me")),
        (
            "redis://example?socket_timeout=2.5&socket_connect_timeout=7",
            Address(host="example", timeout=2.5, connect_timeout=7),
        ),
        ("redis://example?ssl=false", Address(host="example")),
        ("unix:///run/redis.sock", Address(path="/run/redis.sock")),
        ("unix://me:pw@/run/redis.sock?db=2", Address(path="/run/redis.sock", username="me", password="pw", db=2)),
        (("example", 6380), Address(host="example", port=6380)),
        (["example", "6380"], Address(host="example", port=6380)),
        ({"host": "example", "port": 6380, "db": 1}, Address(host="example", port=6380, db=1)),
        ({"path": "/run/redis.sock"}, Address(path="/run/redis.sock")),
        ({"unix_socket_path": "/run/redis.sock"}, Address(path="/run/redis.sock")),
        ({"address": "redis://:pw@example:6380/3"}, Address(host="example", port=6380, db=3, password="pw")),
        (
            {"address": "redis://:pw@example/3", "db": 4, "username": "me"},
            Address(host="example", db=4, username="me", password="pw"),
        ),
        ({"address": "unix:///run/redis.sock", "password": "pw"}, Address(path="/run/redis.sock", password="pw")),
        ({"host": "example", "username": "", "password": ""}, Address(host="example")),
        ({"host": "example", "socket_timeout": None, "client_name": None}, Address(host="example")),
        ({"host": "example", "health_check_interval": 10}, Address(host="example", keep_alive=10)),
        ({"host": "example", "health_check_interval": 0}, Address(host="example")),
        ("redis://example?health_check_interval=10", Address(host="example", keep_alive=10)),
        ("redis://example?max_connections=50&retry_on_timeout=yes", Address(host="example")),
        ({}, Address()),
    ],
)
def test_hosts(host: Any, expected: Address) -> None:
    """URLs, pairs and dicts say where the server is, the URL's parts in percent-encoding, and options beat the URL."""
    given = pickle.dumps(host)
    assert parse_host(host) == expected
    assert pickle.dumps(host) == given


def test_a_credential_provider() -> None:
    """The redis package's providers of credentials are taken as they are."""
    provider = UsernamePasswordCredentialProvider("me", SECRET)
    assert address_of({"host": "example", "credential_provider": provider}).credential_provider is provider


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
    for address in (address_of(host), address_of({"address": host, "credential_provider": provider})):
        assert address.name == name
        assert SECRET not in repr(address)
        assert "me" not in repr(address).replace("client_name", "").replace("timeout", "")
        assert "provider" not in repr(address)


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
        ("redis://:s3cret@example?max_conections=5", TypeError, "unknown option 'max_conections' of a Redis host"),
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
        ("redis:///run/x.sock?db=1", ValueError, "write unix:///run/x.sock, and the database as [?]db="),
        ("rediss:///run/x.sock", ValueError, "begins with unix://: write unix:///run/x.sock"),
        ("redis://example/run/x.sock", ValueError, "or unix:///run/redis.sock for a unix socket"),
        ("redis:///s3cret@example", ValueError, "a Redis URL is"),
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
        (
            {"credential_provider": ("me", SECRET)},
            TypeError,
            "credential_provider of a Redis host must be a CredentialProvider",
        ),
        (
            {"socket_timeout": 0},
            ValueError,
            "socket_timeout of a Redis host must be a positive number of seconds, .*, not 0",
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
        ({"socket_timeout": 10**400}, ValueError, "socket_timeout .* at most 1000000000, not an int of 1329 bits"),
        ({"socket_connect_timeout": 1e16}, ValueError, "socket_connect_timeout .* at most 1000000000, not 1e[+]16"),
        ({"port": 10**5000}, ValueError, "port of a Redis host must be .* from 1 to 65535, not an int of 16610 bits"),
        ({"health_check_interval": -1}, ValueError, "health_check_interval of a Redis host must be a positive"),
        ({"max_conections": 10}, TypeError, "unknown option 'max_conections' of a Redis host"),
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
        ({"ssl": True, "ssl_cert_reqs": 0}, ValueError, "ssl_cert_reqs must be one of .*, not 0"),
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


def test_options_that_mean_nothing_here(caplog: pytest.LogCaptureFixture) -> None:
    """What channels_redis hands on to its client, and no connection here has, is accepted and named once in the log."""
    caplog.set_level("INFO", logger="anyio_channels")
    plain = {"host": "a", "retry_on_timeout": True, "socket_keepalive": True, "max_connections": 100}
    behind = {"sentinels": [("b", 1)], "master_name": "m", "sentinel_kwargs": {"decode_responses": True}, "protocol": 2}
    assert parse_hosts([plain, {**plain, "encoding": "utf-8"}])[0] == Address(host="a")
    assert parse_hosts([behind])[0] == parse_host({"sentinels": [("b", 1)], "master_name": "m"})
    assert {getattr(record, "anyio_channels_event", None) for record in caplog.records} == {"hosts.options_ignored"}
    assert [record.getMessage().rpartition(": ")[2] for record in caplog.records] == [
        "encoding, max_connections, retry_on_timeout, socket_keepalive",
        "decode_responses, protocol",
    ]


def test_lists_of_hosts() -> None:
    """hosts is a list; left out, it is the server on this machine."""
    assert parse_hosts(None) == [Address(host="localhost", port=6379)]
    assert parse_hosts(["redis://a", ("b", 1)]) == [Address(host="a"), Address(host="b", port=1)]
    assert parse_hosts(({"host": "a"},)) == [Address(host="a")]
    with pytest.raises(ValueError, match="hosts must name at least one Redis host; leave it out for redis://localhost"):
        parse_hosts([])
    for hosts in ("redis://:s3cret@a", b"redis://a", {"address": "redis://a"}, 5, {"redis://a"}):
        with pytest.raises(TypeError, match="hosts must be a list of Redis hosts, even if there is only one") as info:
            parse_hosts(hosts)  # type: ignore[arg-type]
        assert SECRET not in str(info.value)


# TLS


def tls_of(host: Any) -> ssl.SSLContext:
    context = address_of(host).tls
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
    assert address_of(host).tls is None


@pytest.mark.parametrize(
    ("options", "mode", "check_name"),
    [
        ("ssl_cert_reqs=required", ssl.CERT_REQUIRED, True),
        ("ssl_cert_reqs=optional", ssl.CERT_OPTIONAL, True),
        ("ssl_cert_reqs=none", ssl.CERT_NONE, False),
        ("ssl_cert_reqs=CERT_NONE", ssl.CERT_NONE, False),
        ("ssl_cert_reqs=None", ssl.CERT_NONE, False),
        ({"ssl_cert_reqs": None}, ssl.CERT_NONE, False),
        ({"ssl_cert_reqs": "CERT_REQUIRED"}, ssl.CERT_REQUIRED, True),
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


@pytest.mark.parametrize("option", ["ssl_ca_certs", "ssl_ca_path", "ssl_certfile", "ssl_keyfile"])
def test_tls_files_that_are_not_there(option: str, certificates: Certificates) -> None:
    """A file that cannot be read is told when the layer is made, with its name and that of the option."""
    options = {"ssl": True, "ssl_certfile": str(certificates.cert_file), option: "/nowhere.pem"}
    with pytest.raises(
        FileNotFoundError, match=rf"{option} of a Redis host cannot be read: No such file .*'/nowhere\.pem'"
    ):
        parse_host(options)
    for path in (5, "a\0b"):
        with pytest.raises(TypeError, match=f"{option} of a Redis host must be a path, not "):
            parse_host({**options, option: path})


def test_tls_files_of_a_wrong_kind(certificates: Certificates, tmp_path: Path) -> None:
    """What is not PEM, and a certificate without its key, is told with the option and the file; no password is."""
    text = tmp_path / "text.pem"
    text.write_text("not PEM")
    locked = tmp_path / "locked.pem"
    key = serialization.load_pem_private_key(certificates.client_key_file.read_bytes(), None)
    locked.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(SECRET.encode()),
        )
    )
    mine, its_key = str(certificates.client_cert_file), str(certificates.client_key_file)
    pair = "of a Redis host must hold a certificate and its private key in PEM"
    cases: list[tuple[dict[str, Any], str]] = [
        ({"ssl_ca_certs": str(text)}, rf"ssl_ca_certs \('{text}'\) of a Redis host holds no certificates in PEM"),
        ({"ssl_ca_data": "not PEM"}, "ssl_ca_data of a Redis host holds no certificates in PEM"),
        ({"ssl_certfile": mine}, rf"ssl_certfile \('{mine}'\) {pair} \(ssl_keyfile if the key is elsewhere"),
        ({"ssl_certfile": str(text), "ssl_keyfile": its_key}, rf"ssl_certfile \('{text}'\) and ssl_keyfile .* {pair}"),
        ({"ssl_certfile": mine, "ssl_keyfile": str(text)}, rf"ssl_keyfile \('{text}'\) {pair}"),
        ({"ssl_certfile": mine, "ssl_keyfile": str(certificates.key_file)}, f"{pair}.*mismatch"),
        ({"ssl_certfile": mine, "ssl_keyfile": str(locked)}, rf"ssl_keyfile \('{locked}'\) {pair}"),
        ({"ssl_certfile": mine, "ssl_keyfile": str(locked), "ssl_password": f"not {SECRET}"}, pair),
        ({"ssl_keyfile": its_key}, "ssl_keyfile of a Redis host needs ssl_certfile too"),
        ({"ssl_password": SECRET}, "ssl_password of a Redis host needs ssl_certfile too"),
        ({"ssl_ciphers": "none-such"}, "ssl_ciphers of a Redis host names no cipher that there is: 'none-such'"),
    ]
    for options, words in cases:
        with pytest.raises(ValueError, match=words) as info:
            parse_host({"ssl": True, **options})
        assert SECRET not in str(info.value)
    unlocked = {"ssl_certfile": mine, "ssl_keyfile": str(locked), "ssl_password": SECRET}
    assert tls_of({"ssl": True, **unlocked}).verify_mode is ssl.CERT_REQUIRED


# URLs with options for somebody else


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("redis://", (["redis://"], False, [])),
        ("redis://me:pw@a:1/2?x=1&db=3&y=", (["redis://me:pw@a:1/2?db=3"], False, [("x", "1"), ("y", "")])),
        ("rediss://me:pw@a:1,b/2?x=1", (["rediss://me:pw@a:1/2", "rediss://me:pw@b/2"], False, [("x", "1")])),
        ("unix:///run/a,b.sock?x=1", (["unix:///run/a,b.sock"], False, [("x", "1")])),
        ("redis+sentinel://a,b/m?db=1", (["redis+sentinel://a,b/m?db=1"], False, [])),
        ("redis+cluster://a,b:1?db=0", (["redis://a?db=0", "redis://b:1?db=0"], True, [])),
        ("rediss+cluster://a", (["rediss://a"], True, [])),
    ],
)
def test_split_urls(url: str, expected: tuple[Any, ...]) -> None:
    """A URL names its servers, each with the options that are for them, and the rest is for others."""
    assert split_url(url, {"x", "y"}) == expected


def test_options_of_urls() -> None:
    """What a URL may say about its servers depends on what they are."""
    assert "db" in options_of("redis")
    assert set(options_of("redis+sentinel")) - set(options_of("redis")) == {"sentinel_password", "sentinel_username"}
