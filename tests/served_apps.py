"""The applications that ``test_wsgi_servers.py`` has served: four frameworks, all with the same addresses.

- what an application does unseen, it tells through a pipe in the directory that ``$SERVED`` names.
- an event stream goes on when somebody has acknowledged the last event, which may be through another process: another pipe.
- run as a script, one is served by waitress: ``served_apps.py 'starlette_app("trio")' FD [URL_PREFIX]``; with ``wsgiref`` at
  the end, by that.
"""

from __future__ import annotations

import hashlib
import os
import random
import signal
import socket
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

import anyio
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from anyio_channels.wsgi import AsgiToWsgi, WsgiToAsgi

PIECE = 64 * 1024
BLOB = random.Random(7).randbytes(3_000_000)  # more than any buffer on the way
EVENTS = 5


def pipe(name: str) -> Path:
    return Path(os.environ["SERVED"], name)


def write(path: Path, data: bytes) -> None:
    """Short enough that nothing of another process comes in between."""
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.write(descriptor, data)
    finally:
        os.close(descriptor)


def tell(what: str) -> None:
    write(pipe("told"), f"{what}\n".encode())


@contextmanager
def bell(name: str) -> Iterator[int]:
    """A pipe that acknowledgements come through."""
    path = pipe(f"bell-{name}")
    os.mkfifo(path)
    descriptor = os.open(path, os.O_RDWR)  # so that it does not end when who rang it closes it
    try:
        yield descriptor
    finally:
        os.close(descriptor)
        path.unlink()


def acknowledge(name: str) -> str:
    write(pipe(f"bell-{name}"), b".")
    return "acknowledged"


def pieces() -> Iterator[bytes]:
    for start in range(0, len(BLOB), PIECE):
        yield BLOB[start : start + PIECE]


def event(number: int) -> bytes:
    return b"data: event %d\n\n" % number


# Synchronous streams


def endless(name: str) -> Iterator[bytes]:
    tell(f"began {name}")
    try:
        while True:
            yield bytes(PIECE)
    finally:
        tell(f"closed {name}")


def fail_late(name: str) -> Iterator[bytes]:
    yield b"the beginning"
    raise RuntimeError(f"broken {name}")


def events(name: str) -> Iterator[bytes]:
    with bell(name) as descriptor:
        for number in range(EVENTS):
            yield event(number)
            os.read(descriptor, 1)


def digest(read: Callable[[int], bytes], name: str) -> dict[str, Any]:
    """Read a request body to its end."""
    digested, length = hashlib.sha256(), 0
    try:
        while data := read(PIECE):
            if not length:
                tell(f"reading {name}")
            digested.update(data)
            length += len(data)
    except BaseException:
        tell(f"interrupted {name}")
        raise
    return {"length": length, "sha256": digested.hexdigest()}


EDGES: dict[str, tuple[int, list[tuple[str, str]]]] = {
    "interim": (101, []),
    "split": (200, [("X-A", "a\r\nSet-Cookie: evil=1\r\n\r\nevil")]),
    "nul": (200, [("X-A", "a\0")]),
    "nameless": (200, [("", "a")]),
    "lengths": (200, [("Content-Length", "2"), ("Content-Length", "3")]),
    "chunked": (200, [("Transfer-Encoding", "chunked"), ("X-A", "1")]),
    "long": (200, [("Content-Length", "2")]),
}
"""The heads of responses that a server must not see, or not so. The body is ``b"hello"``."""


class Fragile:
    """Raises where no framework catches it; everything else is ``app``'s, which is told the path as it came."""

    def __init__(self, app: Callable[..., Iterable[bytes]]) -> None:
        self.app = app

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        path: str = environ["PATH_INFO"]
        if path.startswith("/outside/"):
            raise RuntimeError(f"broken {path.rpartition('/')[2]}")
        if path.startswith("/exit/"):
            sys.exit(path[6:])
        if path.startswith("/edge/"):
            status, headers = EDGES[path[6:]]
            start_response(f"{status} Phrase", headers)
            return iter([b"hello"])
        environ["served.bytes"] = path.encode("latin-1").hex()  # Django puts something else into PATH_INFO
        return self.app(environ, start_response)


def flask_app() -> WsgiToAsgi:  # noqa: C901 - a list of views
    import flask

    app = flask.Flask(__name__)

    @app.get("/hello/<int:number>")
    def hello(number: int) -> str:
        return f"hello {number}"

    @app.get("/echo/<path:rest>")
    def echo(rest: str) -> dict[str, Any]:
        request = flask.request
        spelt = request.environ["served.bytes"]
        values = request.args.getlist("q")
        return {"path": request.path, "bytes": spelt, "root": request.script_root, "q": values, "url": request.base_url}

    @app.post("/digest/<name>")
    def digest_body(name: str) -> dict[str, Any]:
        return digest(flask.request.stream.read, name)

    @app.get("/whole")
    def whole() -> bytes:
        return BLOB

    @app.get("/pieces")
    def in_pieces() -> flask.Response:
        return flask.Response(pieces())

    @app.get("/cookies")
    def cookies() -> flask.Response:
        response = flask.make_response("two")
        response.set_cookie("one", "1")
        response.set_cookie("two", "2")
        return response

    @app.get("/inside/<name>")
    def inside(name: str) -> str:
        raise RuntimeError(f"broken {name}")

    @app.get("/late/<name>")
    def late(name: str) -> flask.Response:
        return flask.Response(fail_late(name))

    @app.get("/endless/<name>")
    def without_end(name: str) -> flask.Response:
        return flask.Response(endless(name))

    @app.get("/events/<name>")
    def event_stream(name: str) -> flask.Response:
        return flask.Response(events(name), mimetype="text/event-stream")

    @app.post("/acknowledge/<name>")
    def acknowledgement(name: str) -> str:
        return acknowledge(name)

    @app.get("/lump/<name>/<int:size>")
    def lump(name: str, size: int) -> bytes:
        tell(f"lump {name}")
        return bytes(size)

    return WsgiToAsgi(Fragile(app))


def spooling_django_app() -> WsgiToAsgi:
    return WsgiToAsgi(django_app().app, spool=True)


def django_app() -> WsgiToAsgi:  # noqa: C901 - a list of views
    from django.conf import settings
    from django.core.wsgi import get_wsgi_application
    from django.http import HttpResponse, JsonResponse, StreamingHttpResponse
    from django.urls import path

    def hello(request: Any, number: int) -> Any:
        return HttpResponse(f"hello {number}")

    def echo(request: Any, rest: str) -> Any:
        spelt = request.META["served.bytes"]
        root = request.META["SCRIPT_NAME"]
        values = request.GET.getlist("q")
        url = request.build_absolute_uri(request.path)
        return JsonResponse({"path": request.path_info, "bytes": spelt, "root": root, "q": values, "url": url})

    def digest_body(request: Any, name: str) -> Any:
        return JsonResponse(digest(request.read, name))

    def whole(request: Any) -> Any:
        return HttpResponse(BLOB)

    def in_pieces(request: Any) -> Any:
        return StreamingHttpResponse(pieces())

    def cookies(request: Any) -> Any:
        response = HttpResponse("two")
        response.set_cookie("one", "1")
        response.set_cookie("two", "2")
        return response

    def inside(request: Any, name: str) -> Any:
        raise RuntimeError(f"broken {name}")

    def late(request: Any, name: str) -> Any:
        return StreamingHttpResponse(fail_late(name))

    def without_end(request: Any, name: str) -> Any:
        return StreamingHttpResponse(endless(name))

    def event_stream(request: Any, name: str) -> Any:
        return StreamingHttpResponse(events(name), content_type="text/event-stream")

    def acknowledgement(request: Any, name: str) -> Any:
        return HttpResponse(acknowledge(name))

    def lump(request: Any, name: str, size: int) -> Any:
        tell(f"lump {name}")
        return HttpResponse(bytes(size))

    urls: Any = ModuleType("urls")
    urls.urlpatterns = [
        path("hello/<int:number>", hello),
        path("echo/<path:rest>", echo),
        path("digest/<name>", digest_body),
        path("whole", whole),
        path("pieces", in_pieces),
        path("cookies", cookies),
        path("inside/<name>", inside),
        path("late/<name>", late),
        path("endless/<name>", without_end),
        path("events/<name>", event_stream),
        path("acknowledge/<name>", acknowledgement),
        path("lump/<name>/<int:size>", lump),
    ]
    settings.configure(
        ALLOWED_HOSTS=["*"],
        LOGGING_CONFIG=None,  # Django's own would mail errors to the administrators
        MIDDLEWARE=["django.middleware.common.CommonMiddleware"],
        ROOT_URLCONF=urls,
        SECRET_KEY="none",
    )
    return WsgiToAsgi(Fragile(get_wsgi_application()))


# Asynchronous ones: the same views for Starlette and FastAPI


async def hello(request: Request) -> Response:
    return PlainTextResponse(f"hello {request.path_params['number']}")


async def echo(request: Request) -> Response:
    scope = request.scope
    return JSONResponse(
        {
            "path": scope["path"].removeprefix(scope["root_path"]),
            "raw": scope["raw_path"].decode("ascii"),
            "root": scope["root_path"],
            "q": request.query_params.getlist("q"),
            "url": str(request.url.replace(query="")),
            "started": request.state.started,
        }
    )


async def digest_body(request: Request) -> Response:
    digested, length, name = hashlib.sha256(), 0, request.path_params["name"]
    try:
        async for data in request.stream():
            if data and not length:
                tell(f"reading {name}")
            digested.update(data)
            length += len(data)
    except BaseException:
        tell(f"interrupted {name}")
        raise
    return JSONResponse({"length": length, "sha256": digested.hexdigest()})


async def whole(request: Request) -> Response:
    return Response(BLOB)


async def in_pieces(request: Request) -> Response:
    return StreamingResponse(pieces())


async def cookies(request: Request) -> Response:
    response = PlainTextResponse("two")
    response.set_cookie("one", "1")
    response.set_cookie("two", "2")
    return response


async def inside(request: Request) -> Response:
    raise RuntimeError(f"broken {request.path_params['name']}")


async def late(request: Request) -> Response:
    async def stream() -> AsyncIterator[bytes]:
        for piece in fail_late(request.path_params["name"]):
            yield piece

    return StreamingResponse(stream())


class Endless(Response):
    """Told apart: that its task was cancelled, and any other end."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        tell(f"began {self.name}")
        try:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            while True:
                await send({"type": "http.response.body", "body": bytes(PIECE), "more_body": True})
        except anyio.get_cancelled_exc_class():
            tell(f"closed {self.name}")
            raise


async def without_end(request: Request) -> Response:
    return Endless(request.path_params["name"])


async def event_stream(request: Request) -> Response:
    async def stream() -> AsyncIterator[bytes]:
        with bell(request.path_params["name"]) as descriptor:
            for number in range(EVENTS):
                yield event(number)
                await anyio.wait_readable(descriptor)
                os.read(descriptor, 1)

    return StreamingResponse(stream(), media_type="text/event-stream")


async def acknowledgement(request: Request) -> Response:
    return PlainTextResponse(acknowledge(request.path_params["name"]))


async def lump(request: Request) -> Response:
    tell(f"lump {request.path_params['name']}")
    return Response(bytes(int(request.path_params["size"])))


VIEWS: list[tuple[str, Callable[[Request], Any], list[str]]] = [
    ("/hello/{number}", hello, ["GET", "HEAD"]),
    ("/echo/{rest:path}", echo, ["GET"]),
    ("/digest/{name}", digest_body, ["POST"]),
    ("/whole", whole, ["GET", "HEAD"]),
    ("/pieces", in_pieces, ["GET", "HEAD"]),
    ("/cookies", cookies, ["GET"]),
    ("/inside/{name}", inside, ["GET"]),
    ("/late/{name}", late, ["GET"]),
    ("/endless/{name}", without_end, ["GET"]),
    ("/events/{name}", event_stream, ["GET"]),
    ("/acknowledge/{name}", acknowledgement, ["POST"]),
    ("/lump/{name}/{size}", lump, ["GET"]),
]


class FragileAsync:
    """As ``Fragile``."""

    def __init__(self, app: Callable[..., Any]) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if "/outside/" in scope.get("path", ""):
            raise RuntimeError(f"broken {scope['path'].rpartition('/')[2]}")
        if "/exit/" in scope.get("path", ""):
            sys.exit(scope["path"].rpartition("/")[2])
        if "/edge/" in scope.get("path", ""):
            status, headers = EDGES[scope["path"].rpartition("/")[2]]
            raw = [(name.encode(), value.encode()) for name, value in headers]
            await send({"type": "http.response.start", "status": status, "headers": raw})
            await send({"type": "http.response.body", "body": b"hello"})
            return
        await self.app(scope, receive, send)


@asynccontextmanager
async def lifespan(_: object) -> AsyncIterator[dict[str, Any]]:
    tell(f"startup {os.getpid()}")
    yield {"started": os.getpid()}
    tell(f"shutdown {os.getpid()}")


@asynccontextmanager
async def broken_lifespan(_: object) -> AsyncIterator[None]:
    raise RuntimeError("there is no database")
    yield


def starlette_app(backend: str, broken: bool = False) -> AsgiToWsgi:
    sys.stdout.write("application made\n")
    sys.stdout.flush()
    routes = [Route(path, view, methods=methods) for path, view, methods in VIEWS]
    app = Starlette(routes=routes, lifespan=broken_lifespan if broken else lifespan)
    return AsgiToWsgi(FragileAsync(app), backend)


def fastapi_app(backend: str) -> AsgiToWsgi:
    import fastapi

    app = fastapi.FastAPI(lifespan=lifespan)

    @app.api_route("/hello/{number}", methods=["GET", "HEAD"], response_class=PlainTextResponse)
    def hello_in_thread(number: int) -> str:
        return f"hello {number}"

    for path, view, methods in VIEWS[1:]:
        app.add_api_route(path, view, methods=methods)
    return AsgiToWsgi(FragileAsync(app), backend)


def serve(name: str, descriptor: str, url_prefix: str = "", server: str = "waitress") -> None:
    """Serve until SIGTERM, which both servers leave to whoever calls them."""
    import waitress

    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    with eval(name) as application, socket.socket(fileno=int(descriptor)) as listener:
        if server == "waitress":
            waitress.serve(application, sockets=[listener], threads=8, url_prefix=url_prefix)
        else:
            serve_simply(application, listener)


def serve_simply(application: AsgiToWsgi, listener: socket.socket) -> None:
    with WSGIServer(listener.getsockname(), WSGIRequestHandler, bind_and_activate=False) as server:
        server.socket.close()
        server.socket = listener
        server.server_name, server.server_port = listener.getsockname()
        server.setup_environ()
        server.set_app(application)
        # Its handler of requests swallows a SystemExit; and shutdown() waits for the loop that this thread is in.
        signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start())
        server.serve_forever()


if __name__ == "__main__":
    serve(*sys.argv[1:])
