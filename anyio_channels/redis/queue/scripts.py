"""The Lua scripts of the queue layer, one for each thing that must happen at once.

Rules:
- every script declares its keys: managed and serverless Redis refuse others, and a cluster routes by them.
- the time is the server's.
- a channel's key is a sorted set of entries by the time they were sent; a group's, of channel names by the time they joined.
- what each returns is checked beside it, by a function that its replies go through.
- two entries of a channel never have the same score: Redis would order them by their bytes, which begin at random.
- a new entry comes after the newest one, even if that is ahead of the clock: the server's clock was set back, or a client
  (channels_redis takes its own time) runs ahead. A score later than now + expiry is foreign and is not followed.
- a number returned to the client becomes an integer of 64 bits, so what is computed from a score is bounded first.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

from anyio_channels.redis.client import Script, replies

__all__ = [
    "CLUSTERED",
    "GIVE_BACK",
    "GROUP_ADD",
    "GROUP_MEMBERS",
    "GROUP_REMOVE",
    "GROUP_SEND",
    "POP",
    "SEND",
    "SEND_WAITING",
    "TICK",
    "BroadcastReply",
    "PoppedReply",
]

_NOW: Final = """
local time = redis.call('TIME')
local now = time[1] + time[2] / 1000000
"""

_EXPIRE: Final = """
local function expire(key, expiry)
  -- Only where there is something: after any call of a writing command Redis would not refuse the next for lack of memory.
  if redis.call('ZCOUNT', key, '-inf', now - expiry) == 0 then return 0 end
  return redis.call('ZREMRANGEBYSCORE', key, '-inf', now - expiry)
end
"""

_ADD: Final = """
local function add(key, entry, expiry)
  local last = tonumber(redis.call('ZRANGE', key, now + expiry, now, 'BYSCORE', 'REV', 'LIMIT', 0, 1, 'WITHSCORES')[2])
  local score = now
  if last then score = last + 0.000001 end
  redis.call('ZADD', key, score, entry)
  redis.call('PEXPIRE', key, math.ceil(expiry * 1000))
end
"""

_SEND: Final = (
    _NOW
    + _EXPIRE
    + _ADD
    + """
local expired = expire(KEYS[1], ARGV[3])
local is_full = redis.call('ZCARD', KEYS[1]) >= tonumber(ARGV[2])
if not is_full then add(KEYS[1], ARGV[1], ARGV[3]) end
"""
)
_TELL_READERS: Final = """
if not is_full then redis.pcall('SPUBLISH', ARGV[4], '') end
"""
_SAY: Final = """
if is_full then return -1 - expired end
return expired
"""
_MARK: Final = """
if is_full then
  redis.call('ZADD', KEYS[2], 0, '')
  redis.call('PEXPIRE', KEYS[2], math.ceil(ARGV[3] * 1000) + 10000)
end
"""
_SAY_HOW_LONG: Final = """
if not is_full then return {expired, -1} end
local oldest = tonumber(redis.call('ZRANGE', KEYS[1], 0, 0, 'WITHSCORES')[2])
return {expired, math.min(math.max(0, math.ceil((oldest + ARGV[3] - now) * 1000)), 1000000)}
"""
_POP: Final = (
    _NOW
    + _EXPIRE
    + """
local expired = expire(KEYS[1], ARGV[2])
local popped = redis.call('ZPOPMIN', KEYS[1], ARGV[1])
"""
)
_SAY_POPPED: Final = """
return {expired, string.format('%.6f', now), popped}
"""


class PoppedReply(NamedTuple):
    """What ``POP`` returns."""

    expired: int
    now: float
    entries: list[tuple[bytes, bytes]]
    """Entries with their scores, as Redis writes them."""


def _popped(reply: Any) -> PoppedReply:
    expired, now, flat = replies.items(reply, 3)
    parts = replies.bytes_list(flat)
    entries = list(zip(parts[::2], parts[1::2], strict=True))
    for _, score in entries:
        float(score)
    return PoppedReply(replies.whole(expired), float(now), entries)


def _sent_or_wait(reply: Any) -> tuple[int, int]:
    expired, milliseconds = replies.items(reply, 2)
    return replies.whole(expired), replies.whole(milliseconds)


class BroadcastReply(NamedTuple):
    """What ``GROUP_SEND`` returns; keys by their numbers, from 1."""

    expired: int
    full: list[int]
    stale: list[int]
    """The keys in which messages had expired."""


def _broadcast(reply: Any) -> BroadcastReply:
    expired, full, stale = replies.items(reply, 3)
    return BroadcastReply(
        replies.whole(expired),
        [replies.whole(one) for one in replies.items(full)],
        [replies.whole(one) for one in replies.items(stale)],
    )


def _ticked(reply: Any) -> tuple[bool, float]:
    there, now = replies.items(reply, 2)
    return bool(replies.whole(there)), replies.seconds(now)


SEND: Final = Script.of(
    # KEYS: channel. ARGV: entry, capacity, expiry (seconds).
    # Returns how many messages had expired; if the channel is full, -1 minus that.
    _SEND + _SAY,
    int,
)

SEND_WAITING: Final = Script.of(
    # KEYS: channel, its room marker. ARGV: entry, capacity, expiry (seconds).
    # Returns how many messages had expired, and -1 when sent; if the channel is full, milliseconds until its oldest message
    # expires (at most 1,000,000), and pops will tell.
    _SEND + _MARK + _SAY_HOW_LONG,
    _sent_or_wait,
)

POP: Final = Script.of(
    # KEYS: channel, its room marker. ARGV: how many, expiry (seconds), whether somebody waits for room (1) who took the
    # marker away.
    # Returns how many messages had expired, the time, and entry, score, entry, score, ... Tells senders who wait for room.
    # What may be refused comes before the messages are taken.
    "local waiting = #redis.call('ZPOPMIN', KEYS[2]) > 0\n"
    + _POP
    + """
if waiting or ARGV[3] == '1' then redis.pcall('PUBLISH', KEYS[2], '') end
"""
    + _SAY_POPPED,
    _popped,
)

CLUSTERED: Final = {
    # What a cluster runs in their place: one key, for two would not be found together while their slot moves. Instead of the
    # marker in the key, and of a blocking pop, who waits is told by sharded pub/sub; its channel is in the slot of the key,
    # and the last of ARGV.
    # ARGV: entry, capacity, expiry (seconds), where readers listen.
    SEND: Script.of(_SEND + _TELL_READERS + _SAY, int, announces=True),
    SEND_WAITING: Script.of(_SEND + _TELL_READERS + _SAY_HOW_LONG, _sent_or_wait, announces=True),
    POP: Script.of(
        # ARGV: how many, expiry (seconds), where senders listen for room.
        _POP
        + """
if expired > 0 or #popped > 0 then redis.pcall('SPUBLISH', ARGV[3], '') end
"""
        + _SAY_POPPED,
        _popped,
        announces=True,
    ),
}

GIVE_BACK: Final = Script.of(
    # KEYS: channel. ARGV: expiry (seconds), then score, entry, score, entry, ...
    # The first call changes nothing, but behind it Redis, out of memory, does not refuse the others: see expire().
    """
redis.call('ZREM', KEYS[1], ARGV[3])
for i = 2, #ARGV, 2 do redis.call('ZADD', KEYS[1], ARGV[i], ARGV[i + 1]) end
redis.call('PEXPIRE', KEYS[1], math.ceil(ARGV[1] * 1000))
"""
)

GROUP_ADD: Final = Script.of(
    # KEYS: group. ARGV: group_expiry (seconds), then channel names.
    _NOW
    + _EXPIRE
    + """
expire(KEYS[1], ARGV[1])
for i = 2, #ARGV do redis.call('ZADD', KEYS[1], now, ARGV[i]) end
redis.call('PEXPIRE', KEYS[1], math.ceil(ARGV[1] * 1000))
"""
)

GROUP_MEMBERS: Final = Script.of(
    # KEYS: group. ARGV: group_expiry (seconds). Returns the channel names.
    _NOW
    + _EXPIRE
    + """
expire(KEYS[1], ARGV[1])
return redis.call('ZRANGE', KEYS[1], 0, -1)
""",
    replies.bytes_list,
)

GROUP_REMOVE: Final = Script.of(
    # KEYS: group. ARGV: seconds, then channel names. Removes those that joined, or were renewed, before so many seconds.
    _NOW
    + """
for i = 2, #ARGV do
  local joined = tonumber(redis.call('ZSCORE', KEYS[1], ARGV[i]))
  if joined and joined <= now - ARGV[1] then redis.call('ZREM', KEYS[1], ARGV[i]) end
end
"""
)

GROUP_SEND: Final = Script.of(
    # KEYS: channels. ARGV: expiry (seconds), the bytes that all entries have in common, then for each key its capacity, and what
    # its entry has before and behind those.
    # Returns how many messages had expired, the numbers of the keys that were full, and of those in which messages had expired.
    _NOW
    + _EXPIRE
    + _ADD
    + """
local expired, full, stale = 0, {}, {}
for i = 1, #KEYS do
  local here = expire(KEYS[i], ARGV[1])
  expired = expired + here
  if here > 0 then stale[#stale + 1] = i end
  if redis.call('ZCARD', KEYS[i]) < tonumber(ARGV[3 * i]) then
    add(KEYS[i], ARGV[3 * i + 1] .. ARGV[2] .. ARGV[3 * i + 2], ARGV[1])
  else
    full[#full + 1] = i
  end
end
return {expired, full, stale}
""",
    _broadcast,
)

TICK: Final = Script.of(
    # KEYS: the prefix marker. ARGV: its life (seconds). Returns whether it was there, and the time.
    """
local there = redis.call('EXISTS', KEYS[1])
redis.call('SET', KEYS[1], 1, 'PX', math.ceil(ARGV[1] * 1000))
return {there, redis.call('TIME')}
""",
    _ticked,
)
