"""The checks of the prefix: whether another one clashes with it, and what else is under it.

Rules:
- a prefix shows itself by some of its keys, or by its groups in pub/sub (``redis.wire``); one that shows nothing is not seen.
- what this user may not ask is reported as unknown, not as a fault.
"""

from __future__ import annotations

from collections.abc import Sequence

import redis.exceptions

from anyio_channels.redis.client import Link, replies
from anyio_channels.redis.queue.layer import RedisChannelLayer
from anyio_channels.redis.wire import glob_escaped, keys_of, odd_keys, prefixes_of_groups, shown_prefixes

from .asking import ask_all
from .findings import Report, some
from .survey import Survey

__all__ = ["check_prefix"]


async def check_prefix(report: Report, survey: Survey, links: Sequence[Link], own: str) -> None:
    """Check the prefix of the layer on all servers. Keys with ``own`` in their names are those of the check-up itself."""
    try:
        if isinstance(survey.layer, RedisChannelLayer):
            await _check_keys(report, survey.names.prefix, links, own.encode())
        else:
            await _check_redis_channels(report, survey, links)
    except redis.exceptions.RedisError as error:
        report.add("prefix", None, "unknown", str(error), "allow SCAN, TYPE and PUBSUB to have this checked")


async def _check_keys(report: Report, prefix: str, links: Sequence[Link], own: bytes) -> None:
    ours = prefix.encode()
    shown: set[bytes] = set()
    odd: set[bytes] = set()
    wrong: set[bytes] = set()
    for link in links:
        for pattern in ("*:prefix*", "*:group:*"):
            shown |= shown_prefixes(await link.scan(pattern))
        under = {key for key in await link.scan(glob_escaped(prefix) + "*") if own not in key}
        strange = odd_keys(ours, under)
        odd |= strange
        ordinary = sorted(set(keys_of(ours, under)) - strange)
        kinds = await ask_all(link, [("TYPE", key) for key in ordinary], parse=replies.text)
        wrong |= {key for key, kind in zip(ordinary, kinds, strict=True) if kind != "zset"}
    _compare(report, prefix, shown - {ours})
    if wrong:
        advice = "delete them, or choose another prefix (?prefix=...): a channel or group of that name cannot work"
        report.add("keys", None, "wrong", f"not sorted sets: {some(wrong)}", advice)
    if odd:
        advice = "choose another prefix (?prefix=...), so that nobody takes others' keys for messages"
        report.add("keys", None, "warning", f"under the prefix, but no layer's: {some(odd)}", advice)
    if not (wrong or odd):
        report.add("keys", None, "ok", "nobody else's keys are under the prefix")


def _compare(report: Report, prefix: str, others: set[bytes]) -> None:
    ours = prefix.encode()
    clashing = {other for other in others if other.startswith(ours) or ours.startswith(other)}
    if clashing:
        report.add(
            "prefix",
            None,
            "wrong",
            f"{prefix!r} and {some(clashing)}: one begins with the other, so keys may coincide, and a flush of "
            "channels_redis takes both",
            "choose prefixes of which none begins with another (?prefix=...); delete the keys of one that is not used",
        )
    else:
        report.add("prefix", None, "ok", f"{prefix!r}, beside {some(others)}")


async def _check_redis_channels(report: Report, survey: Survey, links: Sequence[Link]) -> None:
    prefix = survey.names.prefix
    kind = "SHARDCHANNELS" if survey.router.clustered else "CHANNELS"
    others: set[bytes] = set()
    for link in links:
        others |= prefixes_of_groups(await link.execute("PUBSUB", kind, "*__group__*", parse=replies.bytes_list))
    others.discard(prefix.encode())
    report.add(
        "prefix",
        None,
        "warning" if others else "ok",
        f"{prefix!r}, beside {some(others)}",
        "channels carry no prefix in pub/sub: see that the applications name their normal channels differently",
    )
