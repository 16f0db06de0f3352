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
    "environ_of",
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

_STATUS: Final = re.compile(r"[1-9]\d\d( .*)?")
_TOKEN: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_CONTROL: Final = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")
_PAIR: Final = 2
_PORTS: Final = {"http": "80", "https": "443"}
_NOT_PREFIXED: Final = frozenset({"CONTENT_TYPE", "CONTENT_LENGTH"})
_WITHOUT_BODY: Final = frozenset({204, 304})


def response_head(status: str, headers: list[tuple[str, str]]) -> dict[str, Any]:
    """Return the ASGI message for what ``start_response()`` was given."""
    if not isinstance(status, str) or not _STATUS.fullmatch(status):
        raise ValueError(f"status must be a str such as '200 OK', not {status!r:.100}")
    if not isinstance(headers, list):
        raise TypeError(f"headers must be a list of (name, value) pairs of str, not {headers!r:.100}")
    raw: list[tuple[bytes, bytes]] = []
    for pair in headers:
        if not isinstance(pair, tuple) or len(pair) != _PAIR or not all(isinstance(one, str) for one in pair):
            raise TypeError(f"headers must be a list of (name, value) pairs of str; got {pair!r:.100} in it")
        name, value = pair
        if not _TOKEN.fullmatch(name):
            raise ValueError(f"{name!r:.100} is no name of an HTTP header")
        try:
            encoded = value.encode("latin-1")
        except UnicodeEncodeError:
            raise ValueError(f"the value of header {name!r} must be in latin-1, not {value!r:.100}") from None
        if _CONTROL.search(encoded):
            raise ValueError(f"the value of header {name!r} holds a control character: {value!r:.100}")
        raw.append((name.lower().encode(), encoded.strip(b" \t")))  # RFC 9110, 5.5: no part of the value
    return {"type": "http.response.start", "status": int(status[:3]), "headers": raw}


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
    for raw_name, raw_value in scope.get("headers", ()):
        name = raw_name.decode("latin-1")
        if "_" in name:
            continue  # it would pass for the header with a hyphen, which a proxy in front may have checked
        key = name.upper().replace("-", "_")
        if key not in _NOT_PREFIXED:
            key = f"HTTP_{key}"
        value = raw_value.decode("latin-1")
        if key in environ:
            value = f"{environ[key]}{'; ' if key == 'HTTP_COOKIE' else ','}{value}"
        environ[key] = value
    if length:
        environ.setdefault("CONTENT_LENGTH", str(length))
    return environ


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


def scope_of(environ: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ASGI scope for an environment of PEP 3333."""
    root = environ.get("SCRIPT_NAME", "").encode("latin-1")
    path = root + environ.get("PATH_INFO", "").encode("latin-1")
    port = environ.get("SERVER_PORT", "")
    headers = [
        (key[5:].replace("_", "-").lower().encode("latin-1"), value.encode("latin-1"))
        for key, value in environ.items()
        if key.startswith("HTTP_")
    ]
    headers += [
        (key.replace("_", "-").lower().encode("latin-1"), environ[key].encode("latin-1"))
        for key in ("CONTENT_TYPE", "CONTENT_LENGTH")
        if environ.get(key)
    ]
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": environ.get("SERVER_PROTOCOL", "HTTP/1.1").removeprefix("HTTP/"),
        "method": environ["REQUEST_METHOD"].upper(),
        "scheme": environ.get("wsgi.url_scheme", "http"),
        "path": path.decode("utf-8", "replace"),
        "raw_path": _raw_path(environ, path),
        "query_string": environ.get("QUERY_STRING", "").encode("latin-1"),
        "root_path": root.decode("utf-8", "replace"),
        "headers": headers,
        "server": (environ["SERVER_NAME"], int(port) if port.isdigit() else None),
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
    port = environ.get("REMOTE_PORT", "")
    return (address, int(port) if str(port).isdigit() else 0) if address else None


def start_of(message: MutableMapping[str, Any]) -> tuple[str, list[tuple[str, str]]]:
    """Return what ``start_response()`` takes for an ASGI message; header fields that are the server's own are left out."""
    status: int = message["status"]
    try:
        phrase = HTTPStatus(status).phrase
    except ValueError:
        phrase = "Unknown"
    headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in message.get("headers", ())]
    return f"{status} {phrase}", [(name, value) for name, value in headers if not is_hop_by_hop(name)]
