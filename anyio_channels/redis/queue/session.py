"""One opening of the queue layer: everything that exists only while the layer is open, and is blank at the next opening.

Rules:
- it is told by the client what happens to links, and asked by the receiving machine for what Redis is to do. It passes
  both on, and decides nothing that one of its parts can decide.
- the end is in order: readers are told, the last pops are awaited and given back, memberships end, and our keys are
  removed.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import redis.exceptions
from anyio import create_task_group, move_on_after
from anyio.abc import TaskStatus
from redis.crc import key_slot

from anyio_channels.contract.names import new_process
from anyio_channels.local.directory import Channel
from anyio_channels.local.later import Later
from anyio_channels.local.waiting import Mailroom
from anyio_channels.log import CHANNEL_ENDED, CLOSE_UNFINISHED, SUBSCRIPTION_REFUSED, said
from anyio_channels.redis.client import Connection, Link, LinkEvents, Request, Subscriptions, at_each, replies
from anyio_channels.redis.servers import every, log_keep_alive, when_late
from anyio_channels.redis.wire import glob_escaped, keys_of

from .blocking import BlockingPop
from .channels import QueueChannel, QueueDirectory
from .delivery import Delivery, Popped
from .memberships import Memberships
from .notified import Notices
from .receiving import Receiving, Source
from .room import WaitingSenders
from .scripts import CLUSTERED, GIVE_BACK, POP, TICK
from .setup import Setup

__all__ = ["Session"]


class Session(LinkEvents):
    """What one layer holds and does while it is open."""

    def __init__(self, setup: Setup) -> None:
        """Become blank: nothing is connected yet."""
        self.client: str = new_process()
        """This process, in the names of its channels."""
        self._setup = setup
        self._router = setup.router
        self._names = setup.names
        mailroom = Mailroom(setup.clock)
        self.here: QueueDirectory = QueueDirectory(
            mailroom,
            setup.get_capacity,
            setup.names.channel,
            self._leave,
            mark=f"{self.client}!",
            expiry=setup.expiry,
            group_expiry=setup.group_expiry,
            on_end=self._log_end,
        )
        self.later: Later = Later()
        self.delivery: Delivery = Delivery(setup, self.here)
        self.senders: WaitingSenders = WaitingSenders(setup)
        self.memberships: Memberships = Memberships(setup, self.here, self.later.soon)
        self.receiving: Receiving = Receiving(self, self.delivery, setup.troubles)
        self.here.receiving = self.receiving
        self.subscriptions: Subscriptions = Subscriptions(setup.router, self._log_forbidden, self._confirmed)
        self.notices: Notices = Notices(setup, self.receiving, self.delivery, self.subscriptions, self._pop)
        self.sources: dict[Link, Source] = {}
        self._fetches: Counter[Link] = Counter()

    # The life of an open layer

    async def run(self, *, task_status: TaskStatus[None]) -> None:
        """Connect, say so, and serve until cancelled. Raises as ``RedisOptions.run``."""
        await self._setup.options.run(self, self._serve, task_status=task_status)

    async def _serve(self) -> None:
        async with create_task_group() as tasks:
            tasks.start_soon(self.later.run)
            tasks.start_soon(every, min(self._setup.options.keep_alive, self._setup.group_expiry / 3), self._tick)
            tasks.start_soon(when_late, self._setup.expiry / 2, self.memberships.renew_all)

    def _tick(self) -> None:
        """Keep connections alive and memberships fresh, and drop what has expired."""
        self.here.sweep(float("inf"))
        self._setup.troubles.look()
        self.memberships.leave_now()  # what was refused
        for link in tuple(self._router.links):
            if link.connection is not None:
                before = time.monotonic()
                key = self._router.key_at(link, self._names.mark)
                if key is None:
                    link.submit("TIME", parse=_time_alone, done=partial(self._ticked, link, before))
                else:
                    link.call_soon(TICK, [key], self._mark_life, done=partial(self._ticked, link, before))

    def _ticked(self, link: Link, before: float, request: Request) -> None:
        if request.error is not None:
            log_keep_alive(self._setup.layer, link, request)
            return
        is_marked, now = request.reply
        link.set_clock(now, before)
        if not is_marked or self.memberships.is_due(link, before):
            self.memberships.renew(link)  # Redis was emptied, or it is time

    @property
    def _mark_life(self) -> float:
        return 2 * max(self._setup.group_expiry, self._setup.expiry)

    def begin_closing(self) -> None:
        """End all waits of readers and senders; what was popped for them is given back by ``wind_up``."""
        self.receiving.close()
        self.memberships.close()
        self.here.close()
        self.senders.look_again()

    async def wind_up(self) -> None:
        """Give back and leave, at each server that is there, for at most ``timeout`` seconds."""
        self.memberships.leave_now()
        with move_on_after(self._setup.options.timeout):
            await at_each(self._take_leave, self._router.links)

    async def _take_leave(self, link: Link) -> None:
        if link.connection is None:
            return
        source = self.sources[link]
        try:
            if isinstance(source, BlockingPop):
                await source.until_ended()
            while self._fetches[link]:
                await link.caught_up()
            await link.ready()
            for channel, popped in [late for late in self.receiving.late if self.link_of(late[0].key) is link]:
                self.give_back(channel, [popped])
            if isinstance(source, BlockingPop):
                await source.forget_keys()
            else:
                for key in self.notices.own:
                    link.submit("UNLINK", key)
                await link.caught_up()
        except redis.exceptions.RedisError as error:
            CLOSE_UNFINISHED.write(layer=repr(self._setup.layer), server=link.name, error=said(error))

    # What the client tells

    def on_new(self, link: Link) -> None:
        """Use a server."""
        self.sources[link] = (
            self.notices
            if self._router.clustered
            else BlockingPop(
                self._setup, self.receiving, self.delivery, link, self.client, partial(self._mark_outage, link)
            )
        )

    async def restore(self, link: Link, connection: Connection) -> None:
        """Make a new connection what the last one was. Raises ``ClusterNodeError`` for a server that should stand alone."""
        if not self._router.clustered:
            link.server.require_alone(connection)
        self.senders.restore(link, connection)
        await self.subscriptions.restore(link, connection)

    def on_up(self, link: Link) -> None:
        """A connection for commands is up: say what this process holds, and what it owes."""
        if link.connects > 1:
            self._mark_outage(link)
        key = self._router.key_at(link, self._names.mark)
        if key is not None:
            link.call_soon(TICK, [key], self._mark_life, done=self.memberships.log_refusal)
        self.memberships.up(link)
        self.senders.look_again()
        source = self.sources[link]
        if isinstance(source, BlockingPop):
            source.commands_up()
        self.subscriptions.restored(link)
        self.receiving.unpark()

    def on_down(self, link: Link) -> None:
        """A connection for commands was lost."""
        self.subscriptions.lost(link)

    def on_push(self, link: Link, push: list[Any]) -> None:  # noqa: ARG002 - it says itself what it is
        """Somebody made room, or in a cluster, sent something."""
        kind = push[0] if push else None
        if kind in (b"message", b"smessage"):
            name = push[1].decode("utf-8", "replace")
            if (key := self._names.key_of_room(name)) is not None:
                self.senders.heard(key)
            else:
                self._confirmed(name)
        elif kind == b"sunsubscribe":
            self.subscriptions.dropped(push[1].decode("utf-8", "replace"))

    def on_moved(self, moved: set[int], lost: set[int]) -> None:  # noqa: ARG002 - what moves takes its messages along
        """Slots of a cluster have other owners."""
        if lost:
            self.here.mark_outage(lambda channel: any(key_slot(key.encode()) in lost for key in self._keys_of(channel)))
        self.subscriptions.move()
        self.memberships.servers_changed()
        self.receiving.unpark()

    def _confirmed(self, name: str) -> None:
        """Redis confirmed that this process listens to a note, or sent one: what was sent before is fetched."""
        if (key := self._names.key_of_sent(name)) is not None:
            self.notices.heard(key)

    def _log_forbidden(self, name: str, error: Exception) -> None:
        self._setup.troubles.note(SUBSCRIPTION_REFUSED, name, error=said(error))

    def _mark_outage(self, link: Link) -> None:
        """What the server of ``link`` owns may have missed something."""
        self.here.mark_outage(lambda channel: any(self.link_of(key) is link for key in self._keys_of(channel)))

    def _keys_of(self, channel: Channel) -> list[str]:
        """Return the keys that what ``channel`` receives comes from."""
        return [self._names.channel(channel.name), *(self._names.group(group.name) for group in channel.groups or ())]

    # What the receiving machine asks for

    def link_of(self, key: str) -> Link:
        """Return the link to the server that owns ``key``, of a channel or a group."""
        return self._router.owner(self._names.routed_by(key), key)

    def can_ask(self, channel: QueueChannel) -> bool:
        """Whether the server of ``channel`` is there now."""
        return self.link_of(channel.key).connection is not None

    async def popped(self, name: str) -> None:
        """Wait for what a fetch from the channel ``name`` brings, if one is under way."""
        key = self._names.channel(name)
        with suppress(redis.exceptions.RedisError):
            while self.receiving.is_fetching(key):
                await self.link_of(key).execute("PING")  # answered behind the pop, unless that is sent again

    def source_of(self, channel: QueueChannel) -> Source:
        """Return the source that waits for ``channel``."""
        return self.sources[self.link_of(channel.key)]

    def fetch(self, channel: QueueChannel, count: int, *, tell: bool) -> None:
        """Pop so many messages, and tell those who wait for room; ``tell``: there are some, whatever Redis says."""
        link = self.link_of(channel.key)
        self._fetches[link] += 1
        self._pop(channel.key, count, partial(self._fetched, channel, link), tell=tell)

    def _fetched(self, channel: QueueChannel, link: Link, request: Request) -> None:
        self._fetches[link] -= 1
        if request.error is None:
            self.delivery.expired_elsewhere += request.reply.expired
            self.receiving.fetched(channel, request.reply.entries, request.reply.now)
        else:
            self.receiving.refused(channel, request.error)

    def _pop(self, key: str, count: int, done: Callable[[Request], object], *, tell: bool = False) -> None:
        link = self.link_of(key)
        if self._router.clustered:
            link.call_soon(CLUSTERED[POP], [key], count, self._setup.expiry, self._names.room(key), done=done)
        else:
            link.call_soon(POP, [key, self._names.room(key)], count, self._setup.expiry, int(tell), done=done)

    def give_back(self, channel: QueueChannel, items: Sequence[Popped]) -> None:
        """Put ``items`` back to where they were."""
        link = self.link_of(channel.key)
        self.delivery.forget(channel, items)
        parts = [part for item in items for part in (item.score, item.entry)]

        def done(request: Request) -> None:
            self.receiving.gave_back(channel, items, link.server_time, request.error)

        # Whole: were it refused because Redis does not know it, the next pop would overtake it.
        link.submit("EVAL", GIVE_BACK.text, 1, channel.key, self._setup.expiry, *parts, done=done)

    def soon(self, act: Callable[[], object]) -> None:
        """Call ``act`` when no lock is held."""
        self.later.soon(act)

    def after(self, seconds: float, act: Callable[[], object]) -> None:
        """Call ``act`` after so many seconds."""
        self.later.after(seconds, act)

    def _log_end(self, channel: str, discarded: int) -> None:
        CHANNEL_ENDED.write(layer=repr(self._setup.layer), channel=channel, discarded=discarded)

    def _leave(self, memberships: list[tuple[str, str]]) -> None:
        self.memberships.leave_soon(memberships)

    # What the layer asks for

    def own(self, name: str) -> None:
        """See that what is sent to the process of ``name``, a process-specific channel, comes here."""
        key = self._names.channel(name)
        source = self.sources[self.link_of(key)]
        if key not in source.own:
            source.own[key] = self._names.routed_by(key)
            source.wait_for_own(key)

    async def flush_server(self, link: Link) -> None:
        """Remove what one server holds under the prefix, and wait for what was popped before."""
        found = await link.scan(glob_escaped(self._names.prefix) + "*")
        for key in keys_of(self._names.prefix.encode(), found):
            link.submit("UNLINK", key)
        await link.caught_up()
        with move_on_after(self._setup.options.timeout):
            await self.sources[link].until_ended()


def _time_alone(reply: Any) -> tuple[bool, float]:
    """TIME where no key can mark the prefix, as TICK answers."""
    return True, replies.seconds(reply)
