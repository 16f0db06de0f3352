"""The messages of ASGI and the environment of WSGI, one as the other: pure functions.

Rules:
- WSGI spells bytes as ``str`` of latin-1 (PEP 3333, "Unicode Issues"); ASGI has the path as text, and beside it as it came.
- header fields that came several times are one for WSGI, joined as RFC 9110 (5.3) and RFC 6265 allow. Responses keep them apart.
- what would be ambiguous or dangerous is left out or refused here, and nowhere else.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping
from http import HTTPStatus
from types import TracebackType
from typing import IO, Any, Final, TypeAlias
from urllib.parse import quote, unquote, unquote_to_bytes
from wsgiref.util import FileWrapper, is_hop_by_hop

__all__ = [
    "AsgiApplication",
    "ExcInfo",
    "Message",
    "Receive",
    "Scope",
    "Send",
    "StartResponse",
    "Write",
    "WsgiApplication",
    "body_length_of",
    "environ_of",
    "request_length_of",
    "response_head",
    "scope_of",
    "set_content_length",
    "start_of",
]

Message: TypeAlias = MutableMapping[str, Any]
Scope: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
AsgiApplication: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]

ExcInfo: TypeAlias = tuple[type[BaseException], BaseException, TracebackType | None]
Write: TypeAlias = Callable[[bytes], object]
StartResponse: TypeAlias = Callable[..., Write]
WsgiApplication: TypeAlias = Callable[[dict[str, Any], StartResponse], Iterable[bytes]]

_STATUS: Final = re.compile(r"([0-9]{3})( [^\x00-\x08\x0a-\x1f\x7f]*)?")
_NUMBER: Final = re.compile(r"[0-9]{1,18}")
_TOKEN: Final = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_CONTROL: Final = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")
_FINAL: Final = range(200, 600)
_PAIR: Final = 2
_PORTS: Final = {"http": "80", "https": "443"}
_NOT_PREFIXED: Final = ("CONTENT_TYPE", "CONTENT_LENGTH")
_DOUBLES: Final = frozenset(f"HTTP_{name}" for name in _NOT_PREFIXED)
_VERSIONS: Final = {"2.0": "2", "3.0": "3"}
_WITHOUT_BODY: Final = frozenset({204, 304})
_CONTENT_LENGTH: Final[tuple[str | bytes, ...]] = ("content-length", b"content-length")


# What both directions check


def _check_status(status: int) -> None:
    """Raise ``ValueError`` for an interim status, which does not end a response, and for an invalid one (RFC 9110, 15)."""
    if status not in _FINAL:
        raise ValueError(f"status must be from 200 to 599, the final ones of HTTP, not {status}")


def _fields(headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Return the header fields of a response without those of the connection, which are the server's own (PEP 3333).

    Raises ``ValueError`` for what would break the response apart (RFC 9110, 5.1 and 5.5), or say twice where it ends (8.6).
    """
    fields: list[tuple[bytes, bytes]] = []
    length: int | None = None
    for name, value in headers:
        if not _TOKEN.fullmatch(name):
            raise ValueError(f"{name.decode('latin-1')!r:.100} is not a valid name of an HTTP header")
        if _CONTROL.search(value):
            raise ValueError(
                f"the value of header {name.decode()!r:.100} holds a control character: {value.decode('latin-1')!r:.100}"
            )
        stripped = value.strip(b" \t")  # RFC 9110, 5.5: space around it is not part of the value
        if name.lower() == b"content-length":
            text = stripped.decode("latin-1")
            if _number(text) is None:
                raise ValueError(f"Content-Length must be a number of bytes, not {text!r:.100}")
            if length is not None and length != int(text):
                raise ValueError(f"Content-Length is given twice, as {length} and as {int(text)}")
            if length is not None:
                continue
            length = int(text)
        if not is_hop_by_hop(name.decode()):
            fields.append((name, stripped))
    return fields


def body_length_of(status: int, headers: Iterable[tuple[str | bytes, str | bytes]]) -> int | None:
    """Return how long the body of a response to GET must be, ``None`` if its head does not say; it has been checked."""
    if status in _WITHOUT_BODY:
        return None
    return next((int(value) for name, value in headers if name.lower() in _CONTENT_LENGTH), None)


# WSGI as ASGI


def response_head(status: str, headers: list[tuple[str, str]]) -> dict[str, Any]:
    """Return the ASGI message for what ``start_response()`` was given."""
    match = _STATUS.fullmatch(status) if isinstance(status, str) else None
    if match is None:
        raise ValueError(f"status must be a str such as '200 OK', not {status!r:.100}")
    code = int(match[1])
    _check_status(code)
    if not isinstance(headers, list):
        raise TypeError(f"headers must be a list of (name, value) pairs of str, not {headers!r:.100}")
    raw: list[tuple[bytes, bytes]] = []
    for pair in headers:
        if not isinstance(pair, tuple) or len(pair) != _PAIR or not all(isinstance(one, str) for one in pair):
            raise TypeError(f"headers must be a list of (name, value) pairs of str; got {pair!r:.100} in it")
        name, value = pair
        try:
            encoded = value.encode("latin-1")
        except UnicodeEncodeError:
            raise ValueError(f"the value of header {name!r:.100} must be in latin-1, not {value!r:.100}") from None
        raw.append((name.encode("latin-1", "backslashreplace"), encoded))
    fields = [(name.lower(), value) for name, value in _fields(raw)]
    return {"type": "http.response.start", "status": code, "headers": fields}


def set_content_length(head: dict[str, Any], length: int) -> None:
    """Say how long the body is, unless that was said, or there is none."""
    if not any(name == b"content-length" for name, _ in head["headers"]) and head["status"] not in _WITHOUT_BODY:
        head["headers"].append((b"content-length", b"%d" % length))


def environ_of(scope: Scope, body: IO[bytes], length: int | None) -> dict[str, Any]:
    """Return the environment of PEP 3333 for an ASGI scope."""
    scheme = scope.get("scheme", "http")
    script, path = _paths(scope)
    server = scope.get("server") or ("localhost", None)
    environ: dict[str, Any] = {
        "REQUEST_METHOD": scope["method"],
        "SCRIPT_NAME": script,
        "PATH_INFO": path,
        "QUERY_STRING": scope.get("query_string", b"").decode("latin-1"),
        "SERVER_PROTOCOL": f"HTTP/{scope.get('http_version', '1.1')}",
        "SERVER_NAME": server[0],
        "SERVER_PORT": str(server[1] or _PORTS.get(scheme, "80")),
        "wsgi.version": (1, 0),
        "wsgi.url_scheme": scheme,
        "wsgi.input": body,
        "wsgi.input_terminated": True,  # it ends where the body does, whatever its length
        "wsgi.errors": sys.stderr,
        "wsgi.multithread": True,
        "wsgi.multiprocess": True,
        "wsgi.run_once": False,
        "wsgi.file_wrapper": FileWrapper,
        "asgi.scope": scope,
    }
    client = scope.get("client")
    if client:
        environ["REMOTE_ADDR"] = client[0]
        environ["REMOTE_PORT"] = str(client[1])
    is_decoded = False
    for raw_name, raw_value in scope.get("headers", ()):
        name = raw_name.decode("latin-1")
        if "_" in name:
            continue  # it would pass for the header with a hyphen, which a proxy in front may have checked
        key = name.upper().replace("-", "_")
        if key == "TRANSFER_ENCODING":
            is_decoded = True
            continue  # it is decoded already, and some would do it again
        if key not in _NOT_PREFIXED:
            key = f"HTTP_{key}"
        value = raw_value.decode("latin-1")
        if key in environ:
            value = f"{environ[key]}{'; ' if key == 'HTTP_COOKIE' else ','}{value}"
        environ[key] = value
    # The length of what was received, whatever the client said: RFC 3875, 4.1.2; with Transfer-Encoding, RFC 9112, 6.3.
    if length is None:
        if is_decoded or _number(environ.get("CONTENT_LENGTH")) is None:
            environ.pop("CONTENT_LENGTH", None)
    elif length or "CONTENT_LENGTH" in environ:
        environ["CONTENT_LENGTH"] = str(length)
    return environ


def _number(value: object) -> int | None:
    """Return a length or a port as a number, ``None`` if it is not one. Some servers give an ``int`` or ``None``."""
    return int(str(value)) if _NUMBER.fullmatch(str(value)) else None


def _paths(scope: Scope) -> tuple[str, str]:
    """Return SCRIPT_NAME and PATH_INFO: bytes, spelt as latin-1."""
    text: str = scope["path"]
    raw: bytes | None = scope.get("raw_path")
    # The raw path has the bytes that are no UTF-8; but a server or a router may have changed only the other one.
    is_same = raw is not None and unquote(raw) == text
    path = unquote_to_bytes(raw or b"") if is_same else text.encode("utf-8", "surrogateescape")
    root = scope.get("root_path", "").encode("utf-8", "surrogateescape").rstrip(b"/")
    if root and (path == root or path.startswith(root + b"/")):
        path = path[len(root) :]
    return root.decode("latin-1"), path.decode("latin-1")


# ASGI as WSGI


def request_length_of(environ: Mapping[str, Any]) -> int | None:
    """Return how long a request body is, ``None`` if it ends by itself (``wsgi.input_terminated``)."""
    is_terminated = bool(environ.get("wsgi.input_terminated"))
    if is_terminated and environ.get("HTTP_TRANSFER_ENCODING"):
        return None  # whatever CONTENT_LENGTH says (RFC 9112, 6.3)
    length = _number(environ.get("CONTENT_LENGTH"))
    return 0 if length is None and not is_terminated else length


def scope_of(environ: Mapping[str, Any], length: int | None) -> dict[str, Any]:
    """Return the ASGI scope for an environment of PEP 3333, with a body of ``length``, if that is known."""
    root = environ.get("SCRIPT_NAME", "").encode("latin-1")
    path = root + environ.get("PATH_INFO", "").encode("latin-1")
    version = environ.get("SERVER_PROTOCOL", "HTTP/1.1").removeprefix("HTTP/")
    headers = [
        (key[5:].replace("_", "-").lower().encode("latin-1"), value.encode("latin-1"))
        for key, value in environ.items()
        if key.startswith("HTTP_") and key not in _DOUBLES
    ]
    if environ.get("CONTENT_TYPE"):
        headers.append((b"content-type", environ["CONTENT_TYPE"].encode("latin-1")))
    if environ.get("CONTENT_LENGTH") not in ("", None) and length is not None:
        headers.append((b"content-length", b"%d" % length))
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": _VERSIONS.get(version, version),
        "method": environ["REQUEST_METHOD"].upper(),
        "scheme": environ.get("wsgi.url_scheme", "http"),
        "path": path.decode("utf-8", "replace"),
        "raw_path": _raw_path(environ, path),
        "query_string": environ.get("QUERY_STRING", "").encode("latin-1"),
        "root_path": root.decode("utf-8", "replace"),
        "headers": headers,
        "server": (environ["SERVER_NAME"], _number(environ.get("SERVER_PORT"))),
        "client": _client(environ),
        "extensions": {},
        "wsgi.environ": environ,
    }


def _raw_path(environ: Mapping[str, Any], path: bytes) -> bytes:
    """Return the path as it came, if the server tells and it is the same path; otherwise quoted anew."""
    uri = environ.get("RAW_URI") or environ.get("REQUEST_URI") or ""
    raw: bytes = uri.partition("?")[0].encode("latin-1")
    if unquote_to_bytes(raw) == path:
        return raw
    return quote(path, safe="/!$&'()*+,;=:@~").encode("ascii")


def _client(environ: Mapping[str, Any]) -> tuple[str, int] | None:
    address = environ.get("REMOTE_ADDR")
    return (address, _number(environ.get("REMOTE_PORT")) or 0) if address else None


def start_of(message: MutableMapping[str, Any]) -> tuple[str, list[tuple[str, str]]]:
    """Return what ``start_response()`` takes for an ASGI message."""
    status = message["status"]
    if isinstance(status, bool) or not isinstance(status, int):
        raise TypeError(f"status must be an int such as 200, not {status!r:.100}")
    _check_status(status)
    headers = [tuple(pair) for pair in message.get("headers", ())]
    for pair in headers:
        if len(pair) != _PAIR or not all(isinstance(one, bytes) for one in pair):
            raise TypeError(f"headers must be (name, value) pairs of bytes; got {pair!r:.100} among them")
    try:
        phrase = HTTPStatus(status).phrase
    except ValueError:
        phrase = "Unknown"
    fields = _fields(headers)
    return f"{status:d} {phrase}", [(name.decode("latin-1"), value.decode("latin-1")) for name, value in fields]
