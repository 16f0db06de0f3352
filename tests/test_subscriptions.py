"""Subscriptions of the client, without a layer: many names in one command, and one that is forbidden among them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
import redis.exceptions
from anyio import create_task_group, fail_after
from anyio.lowlevel import checkpoint
from layers_on_redis import PATIENCE, new_prefix, until
from redis_server import RedisServer, busy
from scripted_stream import ScriptedStream, serving

from anyio_channels.redis.client import Connection, Link, LinkEvents, Router, Subscriptions, Timeouts, make_router

pytestmark = pytest.mark.anyio


class User(LinkEvents):
    """Wants to hear Redis channels, whatever happens to the connection."""

    def __init__(self, router: Router) -> None:
        self.refused: dict[str, Exception] = {}
        self.confirmed: list[str] = []
        self.resumed: list[str] = []
        self.subscriptions = Subscriptions(router, self.refused.__setitem__, self.confirmed.append, self.resumed.append)
        self.meanwhile: Callable[[Subscriptions], object] | None = None

    async def restore(self, link: Link, connection: Connection) -> None:
        if self.meanwhile is None:
            await self.subscriptions.restore(link, connection)
            return
        async with create_task_group() as tasks:
            tasks.start_soon(self.subscriptions.restore, link, connection)
            while not connection.pending:
                await checkpoint()
            self.meanwhile(self.subscriptions)

    def on_up(self, link: Link) -> None:
        self.subscriptions.restored(link)

    def on_down(self, link: Link) -> None:
        self.subscriptions.lost(link)


@asynccontextmanager
async def using(
    url: str, names: list[str], meanwhile: Callable[[Subscriptions], object] | None = None
) -> AsyncIterator[tuple[User, Link]]:
    """The subscriptions to ``names`` as they are when the first connection was made.

    ``meanwhile`` is called while they are being restored there.
    """
    router = make_router([url], cluster=False)
    user = User(router)
    await router.open(user, Timeouts(timeout=PATIENCE, connect_timeout=PATIENCE, keep_alive=PATIENCE))
    for name in names:
        user.subscriptions.want(name)
    user.meanwhile = meanwhile
    async with create_task_group() as tasks:
        tasks.start_soon(router.run)
        with fail_after(PATIENCE):
            await router.reached()
            yield user, router.links[0]
        tasks.cancel_scope.cancel()


async def test_many_are_restored_by_a_few_commands(redis_server: RedisServer) -> None:
    """A connection that comes back with thousands of subscriptions asks for hundreds with each command."""
    names = [f"{new_prefix()}{number}" for number in range(5000)]
    async with using(redis_server.url, names) as (user, link):
        assert link.commands < 40
        for _ in range(2):
            assert all(one.confirmed for one in user.subscriptions.wanted.values())
            assert user.confirmed == names
            with redis_server.client() as client:
                assert {count for _, count in client.pubsub_numsub(*names)} == {1}
            user.confirmed.clear()
            link.reconnect("the test said so")
            await until(lambda: user.confirmed)


async def test_one_that_is_forbidden(redis_server: RedisServer) -> None:
    """One name that this user may not listen to keeps none of the others away, and is told."""
    prefix = new_prefix()
    names = [f"{prefix}{number}" for number in range(450)]
    names[230] = f"forbidden.{prefix}"
    with redis_server.client() as client:
        client.execute_command(
            "ACL", "SETUSER", f"user.{prefix}", "on", ">pass", "~*", "+@all", "resetchannels", f"&{prefix}*"
        )
    url = redis_server.url.replace("redis://", f"redis://user.{prefix}:pass@")
    async with using(url, names) as (user, _):
        assert list(user.refused) == [names[230]]
        assert isinstance(user.refused[names[230]], redis.exceptions.NoPermissionError)
        confirmed = [name for name, one in user.subscriptions.wanted.items() if one.confirmed]
        assert confirmed == [name for name in names if name != names[230]]


async def test_one_that_is_given_up_meanwhile(redis_server: RedisServer) -> None:
    """A subscription that nobody wants any more when it is restored is ended."""
    prefix = new_prefix()
    names = [f"{prefix}{number}" for number in range(3)]
    async with using(redis_server.url, names, lambda subscriptions: subscriptions.unwant(names[1])):
        with redis_server.client() as client:
            await until(lambda: {name for name, count in client.pubsub_numsub(*names) if count} == {
                names[0].encode(), names[2].encode()
            })  # fmt: skip


async def test_one_that_is_wanted_meanwhile(redis_server: RedisServer) -> None:
    """A subscription that is wanted while others are being restored, and that nobody waits for, is made as well."""
    one, other = new_prefix(), new_prefix()

    def want(subscriptions: Subscriptions) -> None:
        subscriptions.want(other)
        subscriptions.ask(other)

    async with using(redis_server.url, [one], want) as (user, _):
        await until(lambda: user.confirmed == [one, other])
        with redis_server.client() as client:
            assert {count for _, count in client.pubsub_numsub(one, other)} == {1}


async def test_wanted_twice(redis_server: RedisServer) -> None:
    """Whoever asks for what is wanted or confirmed already asks nothing of Redis; what nobody wants cannot be given up."""
    name = new_prefix()
    async with using(redis_server.url, [name]) as (user, link):
        before = link.commands
        assert user.subscriptions.want(name) is user.subscriptions.wanted[name]
        await user.subscriptions.confirm(name)
        user.subscriptions.ask(name)
        user.subscriptions.unwant("unknown")
        user.subscriptions.dropped("unknown")
        assert link.commands == before


async def test_a_refusal_that_is_about_no_name() -> None:
    """A connection on which nothing can be subscribed to is not used, and no reader is told that its name is refused."""
    stream = ScriptedStream()
    for _ in range(2):  # many names with one command, and then each by itself
        stream.answer(b"-ERR not now\r\n+PONG\r\n")
    router = make_router(["redis://localhost"], cluster=False)
    user = User(router)
    await router.open(user, Timeouts(timeout=PATIENCE, connect_timeout=PATIENCE, keep_alive=PATIENCE))
    user.subscriptions.want("a")
    async with serving(stream) as connection:
        with pytest.raises(redis.exceptions.ResponseError, match="not now"):
            await user.subscriptions.restore(router.links[0], connection)
    assert not user.refused


async def test_asking_again_while_redis_is_busy(server: RedisServer) -> None:
    """What is asked for without waiting, and refused for a while, is subscribed to on a new connection."""
    async with using(server.url, []) as (user, link):
        with busy(server):
            user.subscriptions.want("a")
            user.subscriptions.ask("a")
            await until(lambda: link.connection is None)
        await until(lambda: user.confirmed == ["a"])
    assert not user.refused


async def test_what_lapsed_is_told_when_it_is_confirmed_again(redis_server: RedisServer) -> None:
    """Not the first confirmation, but each that follows a loss, whether it is restored or waited for."""
    one, other = new_prefix(), new_prefix()
    async with using(redis_server.url, [one]) as (user, link):
        user.subscriptions.want(other)
        await user.subscriptions.confirm(other)
        assert user.resumed == []
        link.reconnect("the test said so")
        await until(lambda: user.resumed == [one, other])
        user.subscriptions.dropped(other)
        assert not user.subscriptions.wanted[other].confirmed
        await user.subscriptions.confirm(other)
        assert user.resumed == [one, other, other]


async def test_who_waited_in_vain(redis_server: RedisServer) -> None:
    """A subscription that could not be confirmed in time, though it stays wanted, has lapsed: whoever wants it is told."""
    name = new_prefix()
    async with using(redis_server.url, []) as (user, link):
        user.subscriptions.want(name)
        link.reconnect("the test said so")
        redis_server.pause()
        link.timeout = 0.05
        try:
            with pytest.raises(redis.exceptions.ConnectionError):
                await user.subscriptions.confirm(name)
        finally:
            redis_server.resume()
        await until(lambda: user.resumed == [name])


async def test_a_confirmation_that_is_on_its_way(redis_server: RedisServer) -> None:
    """It does not count when the server says that it ended the subscription: who waits for it asks again."""
    name = new_prefix()
    async with using(redis_server.url, []) as (user, link), create_task_group() as tasks:
        before = link.commands
        user.subscriptions.want(name)
        tasks.start_soon(user.subscriptions.confirm, name)
        while link.commands == before:
            await checkpoint()
        user.subscriptions.dropped(name)
        await until(lambda: user.subscriptions.wanted[name].confirmed)
        assert link.commands == before + 2
