"""A server that answers with a wrong type, once: the application's block goes on, and errors name the server."""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import hiredis
import pytest
import redis.exceptions
from anyio import CancelScope, Event, connect_tcp, create_task_group, fail_after
from anyio.abc import ByteStream
from layers_on_redis import PATIENCE, PUBSUB, QUEUE, Kind, both, new_prefix
from redis_server import LOST, Listener, RedisServer

from anyio_channels.doctor.survey import Survey
from anyio_channels.redis.queue.scripts import (
    CLUSTERED,
    GROUP_ADD,
    GROUP_MEMBERS,
    GROUP_SEND,
    POP,
    SEND,
    SEND_WAITING,
    TICK,
)

pytestmark = pytest.mark.anyio

WRONG = {
    "an integer": b":7\r\n",
    "a string": b"$3\r\nodd\r\n",
    "null": b"_\r\n",
    "a double": b",1.5\r\n",
    "an array": b"*1\r\n:1\r\n",
    "strings": b"*2\r\n+odd\r\n+odder\r\n",
    "a map": b"%1\r\n+a\r\n:1\r\n",
    "deep": b"*3\r\n*1\r\n_\r\n*1\r\n*0\r\n*2\r\n_\r\n-ERR in it\r\n",
}
NAMES = {
    script.digest: name
    for name, script in {
        "SEND": SEND, "SEND_WAITING": SEND_WAITING, "POP": POP, "GROUP_ADD": GROUP_ADD, "GROUP_MEMBERS": GROUP_MEMBERS,
        "GROUP_SEND": GROUP_SEND, "TICK": TICK,
    }.items()
}  # fmt: skip
TEXTS = {
    script.text: NAMES[script.digest]
    for script in (SEND, SEND_WAITING, POP, GROUP_ADD, GROUP_MEMBERS, GROUP_SEND, TICK)
}
SUBSCRIBING = ("SUBSCRIBE", "UNSUBSCRIBE")


def encode(value: Any) -> bytes:  # noqa: PLR0911 - a case for each type
    """What hiredis parsed, as it was."""
    match value:
        case None:
            return b"_\r\n"
        case hiredis.ReplyError():
            return b"-%s\r\n" % str(value).encode()
        case bool():
            return b"#t\r\n" if value else b"#f\r\n"
        case int():
            return b":%d\r\n" % value
        case float():
            return b",%s\r\n" % repr(value).encode()
        case bytes():
            return b"$%d\r\n%s\r\n" % (len(value), value)
        case dict():
            return b"%%%d\r\n" % len(value) + b"".join(encode(one) for pair in value.items() for one in pair)
        case _:
            sign = b">" if isinstance(value, hiredis.PushNotification) else b"*"
            return b"%s%d\r\n" % (sign, len(value)) + b"".join(map(encode, value))


class Liar(Listener):
    """Forwards commands and replies, but for the next reply to one command."""

    def __init__(self, server: RedisServer) -> None:
        super().__init__()
        self.target = (server.host, server.port)
        self.told = Event()
        self._about: str | None = None
        self._lie = b""

    def lie(self, about: str, lie: bytes) -> None:
        """Say this in the place of the next reply to a command or script, or of the next push of that kind."""
        self._about = about
        self._lie = lie
        self.told = Event()

    async def serve(self, client: ByteStream, scope: CancelScope) -> None:
        asked: deque[str] = deque()
        async with await connect_tcp(*self.target) as server, create_task_group() as tasks:
            tasks.start_soon(self._ask, client, server, asked, scope)
            tasks.start_soon(self._answer, client, server, asked, scope)

    async def _ask(self, client: ByteStream, server: ByteStream, asked: deque[str], scope: CancelScope) -> None:
        reader = hiredis.Reader()
        with suppress(*LOST):
            async for chunk in client:
                reader.feed(chunk)
                while command := reader.gets():
                    name = command[0].decode()
                    if name in ("EVAL", "EVALSHA"):
                        script = command[1].decode()
                        name = TEXTS.get(script) or NAMES.get(script, name)
                    elif name in ("CLIENT", "CLUSTER", "SENTINEL", "PUBSUB"):
                        name = f"{name} {command[1].decode()}"
                    if name not in SUBSCRIBING:
                        asked.append(name)
                await server.send(chunk)
        scope.cancel()

    async def _answer(self, client: ByteStream, server: ByteStream, asked: deque[str], scope: CancelScope) -> None:
        reader = hiredis.Reader(notEnoughData=self)
        with suppress(*LOST):
            async for chunk in server:
                reader.feed(chunk)
                while (reply := reader.gets()) is not self:
                    is_push = isinstance(reply, hiredis.PushNotification)
                    name = reply[0].decode() if is_push else asked.popleft()
                    if name == self._about:
                        self._about = None
                        self.told.set()
                        await client.send(b">3\r\n+message\r\n" + self._lie * 2 if is_push else self._lie)
                    else:
                        await client.send(encode(reply))
        scope.cancel()


def make(kind: Kind, liar: Liar, **options: Any) -> Any:
    options = {"timeout": 2.0, "connect_timeout": 2.0, "keep_alive": 0.05, "prefix": new_prefix(), **options}
    return kind.layer_class([liar.url], **options)


class Application:
    """Calls everything that a layer has, over and over, and reads in the background."""

    def __init__(self, layer: Any, liar: Liar) -> None:
        self.layer = layer
        self.liar = liar
        self.received = 0

    async def read(self, receive: Callable[[], Awaitable[Any]]) -> None:
        while True:
            await receive()  # no error reaches whoever waits
            self.received += 1

    async def call(self, function: Callable[..., Awaitable[Any]], *args: Any, **options: Any) -> None:
        try:
            await function(*args, **options)
        except redis.exceptions.ConnectionError as error:
            if str(self.liar.port) not in str(error):
                raise

    async def work(self, inbox: Any) -> None:
        layer = self.layer
        await self.call(layer.send, "work", {"n": 1})
        await self.call(layer.send, inbox.channel, {"n": 1}, wait=layer.__class__ is PUBSUB.layer_class)
        await self.call(layer.send, "waiting", {"n": 1}, wait=True)
        await self.call(inbox.join, "room")
        await self.call(layer.group_send, "room", {"n": 2})
        await self.call(layer.group_channels, "room")
        await self.call(layer.new_channel)


async def check(kind: Kind, server: RedisServer, about: str) -> None:
    """Each wrong type in the place of a reply: errors name the server, readers go on, and so does all else after it."""
    async with Liar(server) as liar, make(kind, liar) as layer:
        application = Application(layer, liar)
        async with layer.subscribe("room") as inbox, create_task_group() as tasks:
            for receive in (inbox.receive, lambda: layer.receive("work"), lambda: layer.receive("waiting")):
                tasks.start_soon(application.read, receive)
            for lie in WRONG.values():
                liar.lie(about, lie)
                if about in ("HELLO", "TIME", "CLIENT ID", "PING"):  # said in a handshake
                    liar.cut_all()
                with fail_after(PATIENCE):
                    while not liar.told.is_set():
                        await application.work(inbox)
                        if about == "SCAN":
                            await application.call(layer.flush)
                    before = application.received
                    while application.received < before + 3:
                        await application.work(inbox)
            tasks.cancel_scope.cancel()


def each(*names: str) -> list[Any]:
    """Cases for ``diagonal``: what is wrong with a reply does not depend on the event loop."""
    return [pytest.param(name, id=name) for name in names]


@pytest.mark.diagonal(
    ("about",),
    each(
        "HELLO", "TIME", "CLIENT ID", "PING", "SEND", "SEND_WAITING", "POP", "GROUP_ADD", "GROUP_MEMBERS", "GROUP_SEND", "TICK",
        "BZPOPMIN", "SCAN",
    ),
    start=0,
)  # fmt: skip
async def test_the_queue_layer(about: str, redis_server: RedisServer) -> None:
    """Whatever command or script of the queue layer is answered so."""
    await check(QUEUE, redis_server, about)


@pytest.mark.diagonal(("about",), each("HELLO", "TIME", "PING", "PUBLISH", "message"), start=1)
async def test_the_pubsub_layer(about: str, redis_server: RedisServer) -> None:
    """Whatever command of the pub/sub layer is answered so, or a message."""
    await check(PUBSUB, redis_server, about)


async def test_the_pop_of_many(redis_server: RedisServer) -> None:
    """The pop that takes many at once, while no normal channel is waited for."""
    async with Liar(redis_server) as liar, make(QUEUE, liar) as layer, layer.subscribe() as inbox:
        application = Application(layer, liar)
        for lie in WRONG.values():
            liar.lie("BZMPOP", lie)
            with fail_after(PATIENCE):
                while not liar.told.is_set():
                    await application.call(layer.send, inbox.channel, {"n": 1})
                await application.call(layer.send, inbox.channel, {"n": 2})
                while await inbox.receive() != {"n": 2}:
                    pass


@both
async def test_a_survey(kind: Kind, redis_server: RedisServer) -> None:
    """Whoever looks from outside sees what is wrong with the server, or something else, and no exception of ours."""
    async with Liar(redis_server) as liar, make(kind, liar) as layer, layer.subscribe("room") as inbox:
        await layer.send(inbox.channel, {"n": 1})
        async with Survey(make(kind, liar, prefix=layer.prefix)) as survey:
            await survey.require()
            abouts = (
                ["INFO", "TIME", "SCAN", "ZCOUNT"] if kind is QUEUE else ["INFO", "PUBSUB CHANNELS", "PUBSUB NUMSUB"]
            )
            for about in abouts:
                for lie in WRONG.values():
                    liar.lie(about, lie)
                    with fail_after(PATIENCE):
                        while not liar.told.is_set():
                            await survey.links[0].ready()
                            (seen,) = (await survey.look()).servers
                            assert seen.error is None or str(liar.port) in seen.error


@pytest.mark.diagonal(("lie",), each(*WRONG), start=2)
async def test_who_owns_what(lie: str, redis_server: RedisServer) -> None:
    """A cluster asked who owns what, and sentinels asked for the primary: opening fails, and the error names the server."""
    async with Liar(redis_server) as liar:
        liar.lie("CLUSTER SLOTS", WRONG[lie])
        with fail_after(PATIENCE), pytest.raises(redis.exceptions.RedisError, match=str(liar.port)):
            await make(QUEUE, liar, cluster=True, connect_timeout=0.5).open()
        assert liar.told.is_set()
        liar.lie("SENTINEL GET-MASTER-ADDR-BY-NAME", WRONG[lie])
        hosts = [{"sentinels": [(liar.host, liar.port)], "master_name": "mymaster"}]
        with fail_after(PATIENCE), pytest.raises(redis.exceptions.RedisError, match=str(liar.port)):
            await QUEUE.layer_class(hosts, connect_timeout=0.5).open()
        assert liar.told.is_set()


async def test_numbers_of_members_that_are_not(redis_server: RedisServer) -> None:
    """A broadcast that is answered with members who were not asked for counts none of them."""
    async with Liar(redis_server) as liar, make(QUEUE, liar) as layer:
        await layer.group_add("room", "work")
        liar.lie("GROUP_SEND", b"*3\r\n:0\r\n*2\r\n:0\r\n:99\r\n*2\r\n:0\r\n:99\r\n")
        await layer.group_send("room", {"n": 1})
        assert liar.told.is_set()
        assert layer.statistics().dropped_full == 0
        assert CLUSTERED[SEND].parse is SEND.parse
