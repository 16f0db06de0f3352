"""Whether Redis is as the layers need it, found out by trying: each check, what it found, and what to do.

Rules:
- what can be tried is tried, with names of its own under the layer's prefix. Nothing of it stays.
- a server that cannot be reached, or goes away, does not keep the others from being checked.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from secrets import token_hex
from typing import Final

import redis.exceptions
from anyio import CancelScope, fail_after

from anyio_channels.redis.client import Link, try_each
from anyio_channels.redis.queue.layer import RedisChannelLayer

from .asking import ask_server
from .figures import (
    check_clock,
    check_latency,
    check_memory,
    check_persistence,
    check_policy,
    check_role,
    check_version,
    compare_clocks,
)
from .findings import Finding, Report
from .prefixes import check_prefix
from .survey import RedisLayer, Survey
from .trials import Trials

__all__ = ["check_up"]

_ROUNDS: Final = 20


async def check_up(layer: RedisLayer, trial: RedisLayer, clock: Callable[[], float] = time.time) -> list[Finding]:
    """Check all servers of ``layer``, then send messages through ``trial``; two layers alike, neither of them open.

    ``clock``: tells the time of this machine, in seconds since 1970.

    Takes as long as the layer's time-outs when something does not answer. If cancelled, nothing of what was tried is left,
    as far as the servers still answer.
    """
    report = Report()
    try:
        async with Survey(layer) as survey:
            await _Checkup(report, survey, trial, clock).run()
    except redis.exceptions.RedisError as error:
        report.add_unreached(None, error)
    return report.findings


class _Checkup:
    """One run over all servers."""

    def __init__(self, report: Report, survey: Survey, trial: RedisLayer, clock: Callable[[], float]) -> None:
        self._report = report
        self._survey = survey
        self._trial = trial
        self._clock = clock
        self._name = f"doctor.{token_hex(8)}"
        self._offsets: list[float] = []
        self._refused = False

    async def run(self) -> None:
        reached = await self._reach()
        for link in tuple(reached):
            try:
                await self._check_server(link)
            except redis.exceptions.RedisError as error:  # it went away; the others are checked
                self._report.add_unreached(link.name, error)
                reached.remove(link)
        if len(self._offsets) > 1:
            compare_clocks(self._report, self._offsets)
        if reached:
            await check_prefix(self._report, self._survey, reached, self._name)
            await self._try_messages(reached)

    async def _reach(self) -> list[Link]:
        """Connect to all servers at the same time; return the links that are up."""
        links = self._survey.links
        errors = dict(await try_each(Link.opened, links))
        for link in links:
            error = errors[link]
            if error is None:
                self._report.add("reached", link.name, "ok", "connected and logged in")
            else:
                self._report.add_unreached(link.name, error)
        return [link for link in links if errors[link] is None]

    async def _check_server(self, link: Link) -> None:
        report, layer, in_cluster = self._report, self._survey.layer, self._survey.router.clustered
        server = await ask_server(link)
        check_version(report, link, server, in_cluster=in_cluster)
        keeps_messages = isinstance(layer, RedisChannelLayer)
        check_role(report, link, server, in_cluster=in_cluster, keeps_messages=keeps_messages)
        await check_latency(report, link)
        check_policy(report, server, keeps_messages=keeps_messages)
        check_memory(report, server)
        check_persistence(report, server)
        self._offsets.append(await check_clock(report, link, self._clock, layer.expiry))
        self._refused |= not await Trials(report, self._survey, link, self._name).run()

    async def _try_messages(self, links: list[Link]) -> None:
        """Send messages through an open layer, as an application does."""
        report, options = self._report, self._trial.options
        if self._refused:
            report.add("messages", None, "unknown", "not tried, for a server refuses what it takes", "mend that first")
            return
        marks = [(link, await self._mark_at(link)) for link in links]
        try:
            with fail_after(options.connect_timeout + 2 * options.timeout):
                async with self._trial:
                    seconds = await self._go_round()
        except (OSError, redis.exceptions.RedisError) as error:
            report.add("messages", None, "wrong", str(error) or "no message came in time", "see what is wrong above")
        else:
            found = f"sent to a channel, and to a group, and received: {seconds * 1000:.2f} ms each"
            report.add("messages", None, "ok", found)
        finally:
            with CancelScope(shield=True):
                for link, key in marks:
                    if key is not None:
                        with suppress(redis.exceptions.RedisError):  # which was reported above
                            await link.execute("UNLINK", key)

    async def _go_round(self) -> float:
        """Return the seconds that a message takes."""
        async with self._trial.subscribe(self._name) as inbox:
            before = time.perf_counter()
            for _ in range(_ROUNDS):
                await self._trial.send(inbox.channel, {"type": "doctor"})
                await inbox.receive()
                await self._trial.group_send(self._name, {"type": "doctor"})
                await inbox.receive()
            return (time.perf_counter() - before) / (2 * _ROUNDS)

    async def _mark_at(self, link: Link) -> str | None:
        """Return the key that opening the queue layer leaves behind, if it is not there yet."""
        if not isinstance(self._trial, RedisChannelLayer):
            return None
        key = self._survey.router.key_at(link, self._survey.names.mark)
        return None if key is None or await link.execute("EXISTS", key) else key
