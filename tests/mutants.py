"""Break the package on purpose, one small mistake at a time, and see that the tests notice each.

Rules:
- a mutant is a mistake that somebody could make: a wrong order, a forgotten wake-up, a missing shield. It breaks a promise
  that users can see; a change that nobody could ever notice is not a mutant.
- what it replaces must occur exactly once in its place, so that the table breaks loudly when the code moves on.
- it is caught when a test fails. A package that cannot be imported, or a test run that does not start, proves nothing.
- the files of tests are those where a reader would look for that promise; not the whole suite.

Run ``python tests/mutants.py`` for all, which takes half an hour on two cores; ``python tests/mutants.py 3 17
mailbox`` for the third, the seventeenth and those whose place or promise has the word *mailbox*; ``--list`` to see what
there is; ``--intact`` to run the same tests on the package as it is, which all must pass.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent
PATIENCE: Final = 300.0
"""Seconds after which tests that hang count as tests that fail."""
_FAILED: Final = (1, 2)
"""What pytest exits with when tests failed, and when it stopped after the first."""


@dataclass(frozen=True, slots=True)
class Mutant:
    """One mistake, and who should notice it."""

    place: str
    """A file of the package, or a folder of it."""
    old: str
    new: str
    promise: str
    """What it breaks, in a few words."""
    tests: str
    """Arguments for pytest."""


_OWNERSHIP: Final = "tests/test_ownership.py tests/test_testing.py"
_MEMORY: Final = "tests/test_memory.py"
_CHECKS: Final = "tests/test_testing.py"
_THREADS: Final = "tests/test_threads.py"
_CODEC: Final = "tests/test_codec.py"
_FAULTS: Final = "tests/test_redis_faults.py"
_LAYERS: Final = "tests/test_redis_layers.py"
_QUEUE: Final = "tests/test_redis_queue.py"
_MOMENTS: Final = "tests/test_redis_moments.py"
_CLUSTER: Final = "tests/test_redis_cluster.py"
_SENTINEL: Final = "tests/test_redis_sentinel.py"
_LINK: Final = "tests/test_link.py"
_CONNECTION: Final = "tests/test_connection.py"
_PROTOCOL: Final = "tests/test_protocol.py"
_RECEIVING: Final = "tests/test_receiving.py"
_SUBSCRIPTIONS: Final = "tests/test_subscriptions.py"

MUTANTS: Final = (
    Mutant(
        "wakeup.py",
        "                    enable(SimpleNamespace(__code__=code))\n",
        "                    code.replace()\n",
        "Ctrl-C on trio leaves no lock held",
        "tests/test_forks.py -k first_call",
    ),
    Mutant(
        "wakeup.py",
        "            yield from _with_inner(value.__code__)\n",
        "            yield value.__code__.replace()\n",
        "Ctrl-C on trio is held back in the very code that runs",
        "tests/test_forks.py -k first_call",
    ),
    Mutant(
        "memory.py",
        "hold_interrupts()\n        self._put(",
        "pass\n        self._put(",
        "Ctrl-C is held back in the first call, also a plain one",
        "tests/test_forks.py -k first_call",
    ),
    Mutant(
        "wakeup.py",
        "                if not self.waiting.cancelled():",
        "                if self.waiting is not None:",
        "Ctrl-C on asyncio may cancel a task that is being rung",
        "tests/test_forks.py -k bell",
    ),
    Mutant(
        "local/home.py",
        "        finally:\n            await self._home.leave",
        "        except GeneratorExit:\n            await self._home.leave",
        "a layer interrupted while it closes leaves no task group behind",
        "tests/test_interrupts.py -k on_redis",
    ),
    Mutant(
        "local/hub.py",
        "            in_each_child(self, Hub._begin_anew)\n",
        "            pass\n",
        "a fork has an empty layer in memory",
        "tests/test_forks.py",
    ),
    Mutant(
        "local/waiting.py",
        "        in_each_child(self, Mailroom._renew_lock)\n",
        "",
        "a fork may look at a layer whose lock a thread held",
        "tests/test_forks.py -k redis",
    ),
    Mutant(
        "contract/message.py",
        "        if len(body) > self._max_size:\n            self._require_size(body)\n",
        "",
        "max_message_size bounds what arrives",
        _CODEC,
    ),
    Mutant(
        "contract/message.py",
        '        if self._is_json and body.count(b"[") + body.count(b"{") > MAX_DEPTH:\n            _require_depth(body)\n',
        "",
        "JSON that arrives is nested as deep as what is sent",
        _CODEC,
    ),
    # Logs and options
    Mutant(
        "log.py",
        "        except Exception:  # noqa: BLE001 - whatever a handler or filter raises",
        "        except OSError:",
        "a log handler or filter that raises costs its line and nothing else",
        "tests/test_log.py",
    ),
    Mutant(
        "contract/options.py",
        "    if value > MOST_SECONDS:",
        "    if value > MOST_SECONDS * 10**9:",
        "durations have an upper bound that every layer keeps",
        "tests/test_base.py",
    ),
    Mutant(
        "redis/client/address.py",
        "if requirement is None or isinstance(requirement, str):",
        "if isinstance(requirement, str):",
        "ssl_cert_reqs=None is none, as for channels_redis",
        "tests/test_address.py",
    ),
    # What a name, a message and a capacity are
    Mutant(
        "contract/names.py",
        "self.channel_name_regex.fullmatch(str(name))",
        "self.channel_name_regex.match(str(name))",
        "a name matches as a whole: 'abc\\n' is refused",
        "tests/test_base.py",
    ),
    Mutant(
        "contract/names.py",
        "for pattern, capacity in self.channel_capacity:",
        "for pattern, capacity in reversed(self.channel_capacity):",
        "the first pattern that matches decides the capacity",
        "tests/test_base.py",
    ),
    Mutant(
        "contract/message.py",
        "if len(data) > self._max_size:",
        "if len(data) >= self._max_size:",
        "a message of exactly max_message_size bytes is let through",
        _CODEC,
    ),
    Mutant(
        "contract/message.py",
        "    if sentinel != _END:",
        "    if not sentinel:",
        "bytes behind a message make it unreadable",
        _CODEC,
    ),
    # Mailboxes, and waiting at them
    Mutant(
        "local/mailbox.py",
        "            if entries[0][0] <= now:\n                self.expire(now, rung)",
        "            if entries[0][0] <= now - 1:\n                self.expire(now, rung)",
        "a full channel of expired messages accepts at once",
        _MEMORY,
    ),
    Mutant(
        "local/mailbox.py",
        "            if len(entries) >= self._limit:\n",
        "            if len(entries) > self._limit:\n",
        "capacity is exact",
        f"{_MEMORY} {_CHECKS}",
    ),
    Mutant(
        "local/mailbox.py",
        "in_turn = called is not None or not anyone(self._senders)",
        "in_turn = True",
        "send(wait=True) does not overtake those who wait for room",
        _MEMORY,
    ),
    Mutant(
        "local/mailbox.py",
        "                self.reader_gave_up()\n            self._call_readers(rung)\n",
        "                self.reader_gave_up()\n",
        "what a cancelled reader was promised goes to the next",
        _MEMORY,
    ),
    Mutant(
        "local/mailbox.py",
        "                self.reader_gave_up()\n            self._call_readers(rung)\n            self._call_senders(rung)\n",
        "                self.reader_gave_up()\n            self._call_readers(rung)\n",
        "the room a cancelled sender was promised goes to the next",
        _MEMORY,
    ),
    Mutant(
        "local/mailbox.py",
        "(readers is not None and len(entries) <= readers.promised)",
        "(readers is not None and len(entries) < readers.promised)",
        "a reader that need not wait takes nothing that was promised",
        _MEMORY,
    ),
    Mutant(
        "local/mailbox.py",
        "        self.ends_at = now + self.life\n        if self._senders:\n            self._call_senders(rung)\n",
        "        self.ends_at = now + self.life\n",
        "a message that is taken makes room for a sender who waits",
        _MEMORY,
    ),
    Mutant(
        "local/mailbox.py",
        "        for line in (self._readers, self._senders):",
        "        for line in (self._readers,):",
        "closing ends the waits of senders too",
        _MEMORY,
    ),
    Mutant(
        "local/waiting.py",
        "            elif not waiter.ring_from_elsewhere():\n                self.abandoned.append(waiter)",
        "            else:\n                waiter.ring_from_elsewhere()",
        "a reader whose event loop has ended swallows nothing",
        _THREADS,
    ),
    Mutant(
        "local/waiting.py",
        "        self.lock.release()\n        if self.abandoned:\n            self._give_back()\n\n    def wake",
        "        self.lock.release()\n\n    def wake",
        "whoever gave up while the lock was held is looked after when it is released",
        _MEMORY,
    ),
    Mutant(
        "local/waiting.py",
        "self.move_to_end(waiter, last=False)",
        "self.move_to_end(waiter, last=True)",
        "a waiter whose promise came to nothing keeps its place",
        _MEMORY,
    ),
    Mutant(
        "local/expiry.py",
        "            if entry[2].dead:\n                entry[2].listed = False",
        "            if entry[2].dead:\n                entry[2].listed = True",
        "a group that the heap forgot expires again when somebody joins it",
        _MEMORY,
    ),
    Mutant(
        "local/directory.py",
        "        self.expiries.pop(name, None)\n        if expires_at is not None:",
        "        if expires_at is not None:",
        "a membership that is renewed gets a new place among the expiries",
        _MEMORY,
    ),
    # Ownership
    Mutant(
        "local/mailbox.py",
        "        self.ends_at = now + self.life\n",
        "",
        "a channel that is read lasts for group_expiry from then on",
        _OWNERSHIP,
    ),
    Mutant(
        "local/mailbox.py",
        "        if self.ends_at <= (now := self._mailroom.clock()) and",
        "        if (now := self._mailroom.clock()) < 0 and",
        "a channel whose time is over hands out nothing, though nobody has looked after it",
        _OWNERSHIP,
    ),
    Mutant(
        "local/mailbox.py",
        "            self.ends_at = inf  # another reader",
        "            # another reader",
        "a reader that has waited for long gets its message",
        _OWNERSHIP,
    ),
    Mutant(
        "local/mailbox.py",
        "            if waiter.line is self._readers:\n                self.reader_gave_up()",
        "            if False:\n                self.reader_gave_up()",
        "the channel of a reader who was cancelled ends after expiry",
        _OWNERSHIP,
    ),
    Mutant(
        "local/directory.py",
        "if self.ends_at > now or anyone(self._readers):",
        "if self.ends_at > now:",
        "nothing ends while somebody waits, though another reader took something",
        _OWNERSHIP,
    ),
    Mutant(
        "local/directory.py",
        "        self.life = self.grace\n        self.directory.mailroom.index.hasten(self)",
        "        self.life = self.grace",
        "a channel whose name was collected after expiry ends at once",
        _OWNERSHIP,
    ),
    Mutant(
        "local/directory.py",
        "channel.watch = _Watch(returned, _name_is_gone)",
        "channel.watch = _Watch(returned)",
        "a channel whose name was collected ends after expiry",
        _OWNERSHIP,
    ),
    Mutant(
        "local/directory.py",
        "        if self.directory.mailroom.index.next_due <= now:",
        "        if False:",
        "a broadcast reaches nobody whose time is over, though many are",
        _OWNERSHIP,
    ),
    Mutant(
        "local/directory.py",
        "        if self.is_timed and not self.groups:\n",
        "        if False:\n",
        "a normal channel on pub/sub that was kept by a group alone ends with the membership",
        _OWNERSHIP,
    ),
    Mutant(
        "local/directory.py",
        "            channel.life = channel.grace = channel.ends_at = -inf",
        "            pass",
        "nobody reads what was sent to a channel that has ended",
        _OWNERSHIP,
    ),
    Mutant(
        "local/expiry.py",
        "        if self._hastened:  # looked",
        "        if False:  # looked",
        "what the garbage collector hastens during a sweep is looked at by the next",
        _OWNERSHIP,
    ),
    Mutant(
        "local/joins.py",
        "if under_way.is_new and under_way.count == 1:",
        "if under_way.count == 1:",
        "a further join that is cancelled does not end the membership that there was",
        _OWNERSHIP,
    ),
    Mutant(
        "local/joins.py",
        "if under_way.is_new and under_way.count == 1:",
        "if under_way.is_new:",
        "a join that is cancelled does not undo what another does at the same time",
        _OWNERSHIP,
    ),
    Mutant(
        "redis/queue/channels.py",
        "        if channel.groups:\n",
        "        if False:\n",
        "a channel that ends leaves its groups in Redis",
        _OWNERSHIP,
    ),
    Mutant(
        "redis/queue/memberships.py",
        "if is_of_this_package(name) and not self._here.is_ours(name)",
        "if not self._here.is_ours(name)",
        "a peer's process is not taken for dead",
        _OWNERSHIP,
    ),
    Mutant(
        "redis/queue/scripts.py",
        "  if joined and joined <= now - ARGV[1] then",
        "  if joined then",
        "a process that joined again is not taken for dead",
        _OWNERSHIP,
    ),
    Mutant(
        "redis/servers.py",
        "        if time.monotonic() - due > seconds:",
        "        if False:",
        "a process that stood still joins its groups again",
        _OWNERSHIP,
    ),
    # A layer on a directory and a transport, and its life
    Mutant(
        "local/hub.py",
        "            try:\n                await self._told(self.transport.subscribe(name))\n            except BaseException:\n"
        "                await self.inbox_close(name, ())",
        "            try:\n                await self._told(self.transport.subscribe(name))\n            except Exception:\n"
        "                await self.inbox_close(name, ())",
        "an inbox that is cancelled while it is opened leaves no channel",
        f"{_FAULTS} -k 'making or away'",
    ),
    Mutant(
        "local/hub.py",
        "            except BaseException:\n                self._here.drop(channel)",
        "            except Exception:\n                self._here.drop(channel)",
        "new_channel(), if cancelled, leaves no channel",
        f"{_FAULTS} -k 'making or away'",
    ),
    Mutant(
        "local/deliveries.py",
        "return message, self._codec.encode_again(message), frozenset(excluded)",
        "return message, body, frozenset(excluded)",
        "receivers do not see whom a broadcast was not for",
        "tests/test_redis_contract.py -k pubsub",
    ),
    Mutant(
        "local/home.py",
        "        self._scope.shield = True",
        "        self._scope.shield = False",
        "a layer whose surroundings are cancelled is closed in order",
        _MOMENTS,
    ),
    Mutant(
        "local/home.py",
        "            if life in (Life.CLOSING, Life.CLOSED):",
        "            if life is Life.CLOSED:",
        "whoever uses a layer that is being closed is told that it is closed",
        f"{_FAULTS} -k clos",
    ),
    Mutant(
        "local/later.py",
        "        self._wanted[act] = None\n        self._bell.set()",
        "        self._wanted[act] = None",
        "what is wanted soon is done soon",
        f"{_FAULTS} -k given_back",
    ),
    Mutant(
        "wakeup.py",
        "return self.left < 0 or self.deadline() == CANCELLED",
        "return self.left < 0",
        "every call checks for cancellation",
        f"{_CHECKS} tests/test_redis_contract.py",
    ),
    Mutant(
        "wakeup.py",
        "        self.left = YIELD_EVERY - 1\n",
        "        self.left = 2 * YIELD_EVERY\n",
        "others run at least once in YIELD_EVERY calls",
        f"{_MEMORY} {_CHECKS}",
    ),
    Mutant(
        "wakeup.py",
        "        if backend_class is None or get_cancelled_exc_class() is not self._cancelled_class:",
        "        if backend_class is None:",
        "a thread may run one backend after the other",
        _THREADS,
    ),
    # A small Redis client
    Mutant(
        "redis/client/protocol.py",
        "            self.queue.pop(self, None)\n",
        "            pass\n",
        "a request that is given up before it is written is never written, and is dropped at once",
        f"{_PROTOCOL} {_CONNECTION}",
    ),
    Mutant(
        "redis/client/connection.py",
        "                request.drop()\n",
        "                request.abandoned = True\n",
        "a request that timed out before it was written is dropped at once",
        _CONNECTION,
    ),
    Mutant(
        "redis/queue/memberships.py",
        "        for group, channel in self._to_leave.pop(None, ()):\n",
        "        for group, channel in [one for link in list(self._to_leave) for one in self._to_leave.pop(link)]:\n",
        "leaving during an outage costs the same however many wait to leave",
        f"{_FAULTS} -k closing_many",
    ),
    Mutant(
        "redis/queue/layer.py",
        " or total + here > _PIECE_BYTES):",
        "):",
        "a broadcast of large messages is held in pieces",
        f"{_QUEUE} -k held_in_pieces",
    ),
    Mutant(
        "redis/queue/layer.py",
        "(len(piece) == _PIECE_KEYS or total",
        "(total",
        "one call of a broadcast sends to 1,000 keys at most",
        f"{_QUEUE} -k refused_piece",
    ),
    Mutant(
        "redis/queue/layer.py",
        "late=partial(answered, piece))",
        "late=lambda request: self._count(group, piece, request.reply))",
        "a broadcast that is cancelled between two pieces is sent whole",
        f"{_QUEUE} -k cancelled_broadcast_in_pieces",
    ),
    Mutant(
        "redis/queue/layer.py",
        "        except redis.exceptions.ResponseError as error:\n            errors.append(error)\n        if len(piece)",
        "        except ZeroDivisionError as error:\n            errors.append(error)\n        if len(piece)",
        "a piece of a broadcast that is refused does not keep the others from being sent",
        f"{_QUEUE} -k refused_piece",
    ),
    Mutant(
        "redis/wire.py",
        "[(os.urandom(self._prefix_length), ",
        "[(bytes(self._prefix_length), ",
        "each entry of a broadcast begins with random bytes of its own",
        f"{_QUEUE} -k goes_out_once",
    ),
    Mutant(
        "redis/client/protocol.py",
        "            if size >= PIECE:\n                break\n",
        "",
        "what is queued is written piece by piece, so that it can still be dropped",
        _PROTOCOL,
    ),
    Mutant(
        "redis/client/protocol.py",
        "self.lost(may_have_run=request.written)",
        "self.lost(may_have_run=not request.written)",
        "an error says whether the command may have run",
        f"{_PROTOCOL} {_CONNECTION}",
    ),
    Mutant(
        "redis/client/protocol.py",
        "        first.confirmations -= 1\n        if first.confirmations > 0:\n            return None",
        "        first.confirmations -= 1",
        "a subscription to many names is answered when all are confirmed",
        f"{_PROTOCOL} {_SUBSCRIPTIONS}",
    ),
    Mutant(
        "redis/client/connection.py",
        "if request.due < self._watch_until and self._watch_bell is not None:",
        "if request.due > self._watch_until and self._watch_bell is not None:",
        "a request with a shorter time-out ends the connection in its own time",
        _CONNECTION,
    ),
    Mutant(
        "redis/client/connection.py",
        "            with CancelScope(shield=True):\n                await aclose_forcefully(self._stream)",
        "            with CancelScope(shield=False):\n                await aclose_forcefully(self._stream)",
        "a connection that is cancelled closes its stream",
        _CONNECTION,
    ),
    Mutant(
        "redis/client/link.py",
        "            while self.connection is None and not self.refused:",
        "            while self.connection is None:",
        "a wrong password is told at once, not after connect_timeout",
        _LINK,
    ),
    Mutant(
        "redis/client/link.py",
        "min(failures + 1, _MOST_FAILURES) if self.connects == connects else 1",
        "min(failures + 1, _MOST_FAILURES)",
        "after a success the backoff begins anew",
        _LINK,
    ),
    Mutant(
        "redis/client/link.py",
        "        call.begin_again()\n        self.send(call, max(0.0, call.due - time.monotonic()))",
        "        call.begin_again()\n        self.send(call)",
        "a script that is sent again has the time that was left, not all of it again",
        _LINK,
    ),
    Mutant(
        "redis/client/cluster.py",
        "range(first, last + 1)",
        "range(first, last)",
        "the last slot of each range has an owner",
        f"{_CLUSTER} -k 'asking or options or urls or slots or odd or astray or date'",
    ),
    Mutant(
        "redis/client/cluster.py",
        "        call.asking = not isinstance(error, redis.exceptions.MovedError)",
        "        call.asking = False",
        "ASK is followed with ASKING in front",
        f"{_CLUSTER} -k migration",
    ),
    Mutant(
        "redis/client/cluster.py",
        "        self._apply(link.server.address.host, table, only_from=link)",
        "        pass",
        "who hears that a slot has moved goes where it is now",
        f"{_CLUSTER} -k 'astray or goes_back or at_once'",
    ),
    Mutant(
        "redis/client/subscriptions.py",
        "Subscription(subscription.link, lapsed=True)",
        "Subscription(subscription.link)",
        "a subscription that a node ends by itself is a gap for who listens there, as in a planned failover",
        f"{_CLUSTER} -k 'goes_back or at_once'",
    ),
    Mutant(
        "redis/client/subscriptions.py",
        "lapsed=before.lapsed or before.confirmed",
        "lapsed=False",
        "a subscription that moves is a gap for who listens there",
        f"{_CLUSTER} -k 'missed_something or at_once'",
    ),
    Mutant(
        "redis/client/subscriptions.py",
        "            self.wanted[name] = Subscription(subscription.link, lapsed=True)",
        "            subscription.confirmed = False",
        "a confirmation that was on its way when a node ended the subscription does not count",
        "tests/test_subscriptions.py -k on_its_way",
    ),
    Mutant(
        "redis/pubsub.py",
        "                self._missing(name)  # it came",
        "                # it came",
        "a message that comes too late to be in order, and is dropped, is a gap",
        f"{_CLUSTER} -k too_late",
    ),
    Mutant(
        "redis/client/sentinel.py",
        "not isinstance(told, Exception) and told != self.doubted",
        "not isinstance(told, Exception)",
        "a sentinel that lags behind is not believed twice",
        f"{_SENTINEL} -k lags",
    ),
    Mutant(
        "redis/client/sentinel.py",
        "        if not connection.is_primary:\n",
        "        if False:\n",
        "a server found through Sentinel must say that it is a primary",
        f"{_SENTINEL} -k 'say or said'",
    ),
    Mutant(
        "redis/client/address.py",
        'requirement = options.get("ssl_cert_reqs", "required")',
        'requirement = options.get("ssl_cert_reqs", "none")',
        "TLS verifies the certificate unless it is told not to",
        f"tests/test_address.py {_FAULTS} -k 'tls or address'",
    ),
    Mutant(
        "redis/client/server.py",
        "        if connection.in_cluster:\n",
        "        if False:\n",
        "a node of a cluster is told when the queue layer is opened",
        "tests/test_opening.py -k a_node_of_a_cluster",
    ),
    Mutant(
        "redis/client/link.py",
        "event = CONNECTION_REFUSED if is_refusal(error) else CONNECTION_FAILED",
        "event = CONNECTION_FAILED",
        "the log does not say that it is tried again where opening fails at once",
        "tests/test_opening.py -k 'password or untrusted'",
    ),
    Mutant(
        "redis/client/errors.py",
        "ssl.SSLError | NotRESP3) or (",
        "ssl.SSLError) or (",
        "a server without RESP3 is told at once",
        "tests/test_opening.py -k without_resp3",
    ),
    Mutant(
        "redis/client/errors.py",
        "        text += _asked_for(command)\n",
        '        text += ""\n',
        "NOPERM names the key or the Redis channel",
        "tests/test_protocol.py tests/test_opening.py -k asked_for",
    ),
    Mutant(
        "redis/client/address.py",
        'options.get("ssl_password") or ""',
        'options.get("ssl_password")',
        "a key with a password does not make OpenSSL ask at the terminal",
        "tests/test_address.py -k wrong_kind",
    ),
    Mutant(
        "local/home.py",
        "        self.token = _NO_LOOP\n",
        "        pass\n",
        "the copy of an event loop in a fork does not use its parent's connections",
        "tests/test_open_in_a_fork.py",
    ),
    Mutant(
        "local/home.py",
        "            if self._layer._is_foreign:",
        "            if False:",
        "a fork is told that it is one",
        "tests/test_open_in_a_fork.py",
    ),
    Mutant(
        "redis/client/address.py",
        'if name.startswith("ssl")}',
        'if name.startswith("tls")}',
        "rediss+sentinel:// speaks TLS to the sentinels too",
        f"tests/test_address.py {_SENTINEL} -k 'urls or address'",
    ),
    Mutant(
        "redis/client/subscriptions.py",
        "                    connection.submit(self._unsubscribe, name)  # given up meanwhile",
        "                    pass",
        "a subscription given up while a connection is restored is ended",
        _SUBSCRIPTIONS,
    ),
    Mutant(
        "redis/client/subscriptions.py",
        "                self.ask(name)  # wanted while others were being restored",
        "                pass",
        "what is wanted while others are being restored is subscribed to as well",
        _SUBSCRIPTIONS,
    ),
    # The bytes in Redis
    Mutant(
        "redis/wire.py",
        "for key in found if not key.startswith(others)}",
        "for key in found}",
        "flush spares the keys of a longer prefix",
        f"{_LAYERS} -k flush",
    ),
    Mutant(
        "redis/wire.py",
        "math.ceil(expiry) + 10",
        "math.ceil(expiry)",
        "an encrypted message may be ten seconds older than expiry, for clocks differ",
        _CODEC,
    ),
    Mutant(
        "redis/duplicates.py",
        "0 < (number - last) % _NUMBERS < _NUMBERS // 2",
        "0 <= (number - last) % _NUMBERS < _NUMBERS // 2",
        "what a cluster says twice is delivered once",
        f"tests/test_duplicates.py {_CLUSTER} -k 'duplicates or twice'",
    ),
    Mutant(
        "redis/duplicates.py",
        "self._old, self._young = self._young, set()",
        "self._old, self._young = set(), set()",
        "at least the last 16384 pops are remembered",
        "tests/test_duplicates.py",
    ),
    Mutant(
        "redis/pubsub.py",
        "        if not topics:\n            del self._topics[name]",
        "        if True:\n            del self._topics[name]",
        "a Redis channel that a channel and a group share is subscribed to as long as either is wanted",
        f"{_LAYERS} -k 'pubsub or called'",
    ),
    Mutant(
        "redis/client/link.py",
        "_MOST_FAILURES: Final = 5",
        "_MOST_FAILURES: Final = 16",
        "after a long outage processes do not all connect at the same time",
        _LINK,
    ),
    Mutant(
        "redis/pubsub.py",
        "capacity: int = 1000",
        "capacity: int = 100",
        "a mailbox of the pub/sub layer holds 1,000 messages by default",
        f"{_LAYERS} -k burst",
    ),
    Mutant(
        "redis/pubsub.py",
        "        self.subscriptions.restored(link)",
        "        self.subscriptions.restored(link)\n        self._deliveries.missing()",
        "only those whose server was away are told of a gap",
        "tests/test_redis_servers.py",
    ),
    # The queue layer
    Mutant(
        "redis/queue/receiving.py",
        "        elif channel.announced:\n            self.begin(channel)\n        else:\n            self._block(channel)",
        "        else:\n            self._block(channel)",
        "what is announced while a channel is fetching is fetched",
        _RECEIVING,
    ),
    Mutant(
        "redis/queue/receiving.py",
        "is_about_one_key = isinstance(error, ABOUT_ONE_NAME)",
        "is_about_one_key = True",
        "a refusal that is not about a key ends no reader's wait",
        "tests/test_redis_refusals.py",
    ),
    Mutant(
        "redis/client/connection.py",
        "if oldest is not None and oldest.written_at + oldest.patience <= now:",
        "if any(one.due <= now for one in self._protocol.pending):",
        "a caller without any time left does not end the connection",
        "tests/test_connection.py",
    ),
    Mutant(
        "redis/client/connection.py",
        "                await sleep(max(_LOOK, min(now - until, self.timeout)))\n",
        "",
        "a loop that stood still reads what has come before anything is late",
        "tests/test_connection.py",
    ),
    Mutant(
        "redis/client/server.py",
        "if isinstance(ping.error, NOT_READY):",
        "if ping.error is not None:",
        "a layer opens where only PING is refused",
        "tests/test_redis_refusals.py",
    ),
    Mutant(
        "redis/queue/receiving.py",
        'if self.is_closing or isinstance(error, ABOUT_ONE_NAME) or getattr(error, "may_have_run", False):',
        "if self.is_closing or isinstance(error, ABOUT_ONE_NAME):",
        "what may have been given back is not given back again",
        _RECEIVING,
    ),
    Mutant(
        "redis/queue/receiving.py",
        "        elif channel.unclaimed:\n            self.look_after(channel)  # its last reader left",
        "        elif False:\n            self.look_after(channel)  # its last reader left",
        "a message popped for a reader who left meanwhile is given back",
        _RECEIVING,
    ),
    Mutant(
        "redis/queue/blocking.py",
        "self._to_drain.update(self.own)",
        "self._to_drain.update(())",
        "inboxes do not wait behind busy normal channels",
        _LAYERS,
    ),
    Mutant(
        "redis/queue/blocking.py",
        "        if link.connects > 1:\n            self._on_gap()",
        "        if link.connects > 2:\n            self._on_gap()",
        "a reader is told when a pop may have been lost with its connection",
        f"{_FAULTS} -k 'pop or outage'",
    ),
    Mutant(
        "redis/queue/notified.py",
        "        more = key in self._again\n",
        "        more = False\n",
        "what is heard while a key is drained makes it be drained again",
        f"{_CLUSTER} -k heard",
    ),
    Mutant(
        "redis/queue/delivery.py",
        "expires_at = now + self._expiry - max(0.0, server_time - score)",
        "expires_at = now + self._expiry",
        "expiry counts from the sending of a message, not from its arrival",
        f"{_LAYERS} tests/test_redis_contract.py",
    ),
    Mutant(
        "redis/queue/delivery.py",
        "are_ours = are_ours and isinstance(name, str) and name.startswith(start)",
        "are_ours = are_ours and isinstance(name, str)",
        "a message that names another process's channel is unreadable here",
        f"{_FAULTS} -k damaged",
    ),
    Mutant(
        "redis/queue/delivery.py",
        "            self._recent.forget(channel.key, item.entry, float(item.score))",
        "            pass",
        "a message that was given back may come again",
        f"{_MOMENTS} {_LAYERS} -k 'in_time or gives_back'",
    ),
    Mutant(
        "redis/queue/room.py",
        "min(wait / 1000, _RECHECK)",
        "wait / 1000",
        "room that channels_redis makes, which tells nobody, is found within a second",
        "tests/test_interop.py tests/test_redis_layers.py -k 'room or wait'",
    ),
    Mutant(
        "redis/queue/room.py",
        "                queue.link.submit(self._unsubscribe, marker)",
        "                pass",
        "a sender who need not wait any more does not listen any more",
        f"{_LAYERS} -k room",
    ),
    Mutant(
        "redis/queue/memberships.py",
        "        if isinstance(error, ConnectionLost):\n            self.leave_soon(",
        "        if isinstance(error, ConnectionLost):\n            tuple(",
        "leaving a group is told again when the connection was lost with it",
        f"{_FAULTS} -k 'leaving or while_away'",
    ),
    Mutant(
        "redis/queue/memberships.py",
        "            names = [name for name in group.members if name not in group.expiries]",
        "            names = list(group.members)",
        "a membership of group_add ends group_expiry after the last group_add",
        f"{_LAYERS} -k memberships",
    ),
    Mutant(
        "redis/queue/session.py",
        "        if not is_marked or self.memberships.is_due(link, before):",
        "        if self.memberships.is_due(link, before):",
        "inboxes join again when Redis was emptied",
        f"{_FAULTS} -k memberships",
    ),
    Mutant(
        "redis/queue/session.py",
        "            while self._fetches[link]:\n                await link.caught_up()\n",
        "",
        "closing waits for fetches under way, and gives back what they bring",
        f"{_MOMENTS} {_LAYERS} -k 'closing'",
    ),
    Mutant(
        "local/joins.py",
        "        except BaseException:\n            if under_way",
        "        except Exception:\n            if under_way",
        "joining a group, if cancelled, leaves no membership in Redis",
        f"{_FAULTS} -k joining",
    ),
    Mutant(
        "redis/queue/layer.py",
        "for number, names in enumerate(members, 1) if number in reply.full",
        "for number, names in enumerate(members) if number in reply.full",
        "the members that missed a broadcast are counted",
        f"{_LAYERS} tests/test_log.py",
    ),
    Mutant(
        "redis/queue/scripts.py",
        "redis.call('ZRANGE', key, now + expiry, now, 'BYSCORE', 'REV', 'LIMIT', 0, 1, 'WITHSCORES')[2])",
        "redis.call('ZRANGE', key, now + 1, now, 'BYSCORE', 'REV', 'LIMIT', 0, 1, 'WITHSCORES')[2])",
        "messages keep their order when the server's clock goes back by less than expiry",
        f"{_QUEUE} -k clock",
    ),
    Mutant(
        "redis/queue/scripts.py",
        "redis.call('ZRANGE', key, now + expiry, now, 'BYSCORE', 'REV', 'LIMIT', 0, 1, 'WITHSCORES')[2])",
        "redis.call('ZRANGE', key, '+inf', now, 'BYSCORE', 'REV', 'LIMIT', 0, 1, 'WITHSCORES')[2])",
        "an entry with a foreign score is not followed",
        f"{_QUEUE} -k clock",
    ),
    Mutant(
        "redis/queue/scripts.py",
        "math.min(math.max(0, math.ceil((oldest + ARGV[3] - now) * 1000)), 1000000)",
        "math.max(0, math.ceil((oldest + ARGV[3] - now) * 1000))",
        "send(wait=True) does not take a score far ahead for room",
        f"{_QUEUE} -k foreign",
    ),
    Mutant(
        "redis/queue/scripts.py",
        "redis.call('ZREM', KEYS[1], ARGV[3])\nfor i",
        "for i",
        "a cancelled receive loses nothing while Redis is out of memory",
        f"{_QUEUE} -k memory",
    ),
    Mutant(
        "redis/queue/layer.py",
        'if wait and "!" in channel:',
        "if False:",
        "send(wait=True) to a process-specific channel is refused",
        f"{_QUEUE} -k process",
    ),
    Mutant(
        "redis/queue/layer.py",
        "self._sent += request.reply >= 0",
        "self._sent += 1",
        "a cancelled send to a full channel is not counted",
        f"{_QUEUE} -k counted",
    ),
    Mutant(
        "redis/client/protocol.py",
        "        if self.reply is not None or self.error is not None:\n            self.settle()",
        "        if self.error is not None:\n            self.settle()",
        "a call that is cancelled when its reply is there counts",
        f"{_QUEUE} -k native",
    ),
    Mutant(
        "redis/queue/scripts.py",
        "local is_full = redis.call('ZCARD', KEYS[1]) >= tonumber(ARGV[2])",
        "local is_full = redis.call('ZCARD', KEYS[1]) > tonumber(ARGV[2])",
        "capacity is exact in Redis",
        f"{_LAYERS} tests/test_redis_contract.py",
    ),
    Mutant(
        "redis/queue/scripts.py",
        "if waiting or ARGV[3] == '1' then",
        "if waiting then",
        "a sender whose marker the blocking pop took is told of the room",
        f"{_LAYERS} -k room",
    ),
    Mutant(
        "redis/queue/memberships.py",
        "        self.leave_now()  # what ended before must not end this one\n",
        "",
        "a leave that is still to be told does not overtake a join",
        f"{_LAYERS} -k joined_again",
    ),
    Mutant(
        "redis/queue/memberships.py",
        "if not isinstance(error, ABOUT_ONE_NAME):",
        "if error is None:",
        "a leave that is refused for a while is told later",
        "tests/test_redis_refusals.py -k leaving",
    ),
    Mutant(
        "redis/client/cluster.py",
        "            await sleep(pause)  # what it said may be refused at once, and asked again\n",
        "",
        "a slot that nobody serves does not have the cluster asked without a pause",
        "tests/test_redis_cluster.py -k odd_moments",
    ),
    Mutant(
        "local/later.py",
        "if self._tasks is not None and act not in self._waiting:",
        "if self._tasks is not None:",
        "many refusals are one pause",
        "tests/test_later.py",
    ),
    Mutant(
        "redis/queue/receiving.py",
        "self._requests.fetch(channel, channel.demand, tell=channel.senders_wait)",
        "self._requests.fetch(channel, channel.demand, tell=channel.senders_wait)\n        channel.senders_wait = False",
        "a sender whose marker was taken is told by a later fetch if the first fails",
        _RECEIVING,
    ),
    Mutant(
        "redis/queue/receiving.py",
        "if channel.demand or channel.senders_wait:",
        "if channel.demand:",
        "a sender whose marker was taken is told though nobody reads any more",
        _RECEIVING,
    ),
    Mutant(
        "redis/client/link.py",
        "            self._over = True\n            self._tell()",
        "            self._over = True",
        "a reader that began in an outage hears of closing at once",
        f"{_FAULTS} -k hears_of_closing",
    ),
    Mutant(
        "local/hub.py",
        "if source is None or (self.transport is not None and get_ident() != self._home.thread):",
        "if source is None:",
        "receive() from another event loop is refused, for a channel that is there too",
        f"{_LAYERS} -k another_event_loop",
    ),
    Mutant(
        "local/home.py",
        '        if self._life is not Life.OPEN:\n            raise ClosedResourceError(f"{self!r} was closed") from error',
        '        if False:\n            raise ClosedResourceError(f"{self!r} was closed") from error',
        "a call that fails because the layer is closed says that",
        f"{_FAULTS} -k closed",
    ),
    Mutant(
        "redis/queue/scripts.py",
        '    "local waiting = #redis.call(\'ZPOPMIN\', KEYS[2]) > 0\\n"\n    + _POP\n    + """\n',
        '    _POP\n    + """\nlocal waiting = #redis.call(\'ZPOPMIN\', KEYS[2]) > 0\n',
        "a pop that is refused has taken nothing",
        f"{_LAYERS} -k marker",
    ),
    # Around the layers
    Mutant(
        "log.py",
        "quiet.count, quiet.since = 0, now",
        "quiet.since = now",
        "the counts of all lines add up",
        "tests/test_log.py",
    ),
    Mutant(
        "sync.py",
        "            self._portal.see_to(self._leave)  # the interrupt may have come when it was in already\n",
        "",
        "an interrupted 'with subscribe()' leaves no inbox behind",
        "tests/test_sync.py",
    ),
    Mutant(
        "portal.py",
        "            if cancels:\n                self.cancel(future)",
        "            if False:\n                self.cancel(future)",
        "an interrupted call is cancelled: it takes nothing",
        "tests/test_sync.py",
    ),
    Mutant(
        "portal.py",
        "        for future in tuple(self._pending):  # handed over too late to begin\n            future.cancel()\n",
        "",
        "a call that crosses closing is answered",
        "tests/test_sync.py",
    ),
    Mutant(
        "portal.py",
        "if life is not None and not life.has_left:",
        "if life is not None:",
        "exiting with an open layer prints nothing, though asyncio may start no thread by then",
        "tests/test_sync_deployed.py -k exiting",
    ),
    Mutant(
        "sync.py",
        "            await arrived()\n",
        "",
        "receive(timeout=0) takes what waits in Redis",
        "tests/test_sync.py -k there",
    ),
    Mutant(
        "wsgi/translate.py",
        '        if "_" in name:\n            continue',
        '        if "_" in name:\n            pass',
        "a header with an underscore cannot pass for one with a hyphen",
        "tests/test_wsgi_to_asgi.py",
    ),
    Mutant(
        "wsgi/translate.py",
        r'rb"[\x00-\x08\x0a-\x1f\x7f]',
        r'rb"[\x00-\x08\x0e-\x1f\x7f]',
        "a line break in the value of a header is refused",
        "tests/test_wsgi_to_asgi.py",
    ),
    Mutant(
        "wsgi/translate.py",
        '    elif length or "CONTENT_LENGTH" in environ:',
        '    elif length and "CONTENT_LENGTH" not in environ:',
        "CONTENT_LENGTH is the length of what was received",
        "tests/test_wsgi_to_asgi.py",
    ),
    Mutant(
        "wsgi/translate.py",
        "_FINAL: Final = range(200, 600)",
        "_FINAL: Final = range(100, 600)",
        "an interim status is refused, in both directions",
        "tests/test_asgi_to_wsgi.py",
    ),
    Mutant(
        "wsgi/to_asgi.py",
        "            chunk = chunk[: self._left]\n",
        "",
        "no more of a body goes out than its Content-Length says",
        "tests/test_wsgi_to_asgi.py",
    ),
    Mutant(
        "wsgi/to_asgi.py",
        "if not (self._is_gone and isinstance(error, OSError)):",
        "if not isinstance(error, OSError):",
        "an OSError of the server's side does not vanish",
        "tests/test_wsgi_to_asgi.py",
    ),
    Mutant(
        "otel.py",
        "carrier = message.pop(CONTEXT_KEY, None)",
        "carrier = message.get(CONTEXT_KEY)",
        "receivers do not see the key of the trace",
        "tests/test_otel.py",
    ),
    Mutant(
        "",
        "for layer in {id(layer): layer for layer in self._layers.values()}.values():",
        "for layer in self._layers.values():",
        "a layer known by two aliases is opened once",
        "tests/test_lifespan.py",
    ),
    Mutant(
        "",
        '    for name in first.keys() & second.keys():\n        raise TypeError(f"option {name!r}',
        '    for name in first.keys() - second.keys() - first.keys():\n        raise TypeError(f"option {name!r}',
        "an option given in a URL and as an argument is refused",
        "tests/test_registry.py tests/test_redis_layers.py -k 'url'",
    ),
    Mutant(
        "cli/__init__.py",
        "if _forget_unwritten(sys.stdout):",
        "if False:",
        "help that cannot be written is one line on standard error",
        "tests/test_cli_messages.py -k cannot_be_written",
    ),
    Mutant(
        "cli/options.py",
        "for part in text.split(_FORM)",
        "for part in [text]",
        "help that looks like a URL with a password is not hidden",
        "tests/test_cli_messages.py -k wrong_calls",
    ),
    Mutant(
        "cli/send.py",
        'line = "" if where == "MESSAGE" else',
        'line = "" if where else',
        "send names the line at which a channel was full",
        "tests/test_cli_messages.py -k pipe",
    ),
    Mutant(
        "cli/bench.py",
        "    except Exception:\n        await _print(choice, results, as_json)\n        raise\n",
        "    except ZeroDivisionError:\n        raise\n",
        "bench prints what it measured before Redis went away",
        "tests/test_cli_looking.py -k bench",
    ),
    Mutant(
        "demo/server.py",
        "            serving.cancel_scope.cancel()  # the reader of the announcement may stand still\n",
        "",
        "a signal ends the demo while nobody takes its address",
        "tests/test_cli.py -k takes",
    ),
    Mutant(
        "cli",
        "code = 0 if endless else 128 + number",
        "code = 0 if endless else number",
        "a command that a signal ends exits as the shell says",
        "tests/test_cli_messages.py -k interrupted",
    ),
    Mutant(
        "cli",
        '            note(f"no message came for {timeout} s; {seen} of {count} did before")\n            return 1',
        '            note(f"no message came for {timeout} s; {seen} of {count} did before")\n            return 0',
        "listen --count exits with 1 when too few messages came",
        "tests/test_cli_messages.py -k timeout",
    ),
)


class DoesNotApplyError(Exception):
    """The table is behind the code."""


def find(mutant: Mutant, package: Path) -> Path:
    """Return the file in which the mistake is to be made; it is there once, or ``DoesNotApplyError`` says how often."""
    place = package / mutant.place
    files = [place] if place.is_file() else sorted(place.rglob("*.py"))
    found = [path for path in files for _ in range(path.read_text().count(mutant.old))]
    if len(found) != 1:
        raise DoesNotApplyError(f"what it replaces occurs {len(found)} times in {mutant.place or 'the package'}")
    return found[0]


def apply(mutant: Mutant, package: Path) -> None:
    """Make the mistake in the copy of the package."""
    path = find(mutant, package)
    path.write_text(path.read_text().replace(mutant.old, mutant.new))


@contextmanager
def copied() -> Iterator[Path]:
    """A copy of the project, to be broken."""
    leave = shutil.ignore_patterns(".*", "__pycache__", "build", "*.egg-info")
    with tempfile.TemporaryDirectory(prefix="mutant-") as directory:
        copy = Path(directory, "project")
        shutil.copytree(ROOT, copy, ignore=leave)
        for name in (".ci", ".github"):
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, copy / name)
        yield copy


def run_tests(project: Path, arguments: Sequence[str]) -> tuple[int | None, str]:
    """Return the exit code of pytest, ``None`` if it had to be killed, and what it said."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "2", "-p", "no:cacheprovider", *arguments]
    process = subprocess.Popen(
        command,
        cwd=project,
        env={**os.environ, "PYTHONPATH": str(project), "PYTHONDONTWRITEBYTECODE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        said, _ = process.communicate()
        return None, said
    return process.returncode, said


def split(tests: str) -> list[str]:
    """Return the arguments for pytest that a table entry has; what follows -k is one."""
    files, _, words = tests.partition(" -k ")
    return [*files.split(), *(["-k", words.strip("'")] if words else [])]


def verdict(mutant: Mutant) -> tuple[str, str]:
    """Return what became of the mutant, and what shows it."""
    with copied() as project:
        try:
            apply(mutant, project / "anyio_channels")
        except DoesNotApplyError as error:
            return "DID NOT APPLY", str(error)
        code, said = run_tests(project, split(mutant.tests))
    if code is None:
        return "caught", f"its tests hung for {PATIENCE:.0f} s"
    # An error of a test, in its fixtures, has its name; one in a file that cannot be imported has not.
    failed = [line for line in said.splitlines() if line.startswith(("FAILED ", "ERROR ")) and "::" in line]
    if code in _FAILED and failed:
        return "caught", failed[0].partition(" ")[2].partition(" - ")[0]
    if code == 0:
        return "MISSED", f"by {mutant.tests}"
    return "PROVES NOTHING", "\n".join([f"pytest exited with {code}", *said.splitlines()[-30:]])


def chosen(words: Sequence[str]) -> list[int]:
    """Return the numbers of the mutants that are meant; all if there are no words."""
    numbers: list[int] = []
    for number, mutant in enumerate(MUTANTS, 1):
        texts = (mutant.place, mutant.promise)
        if not words or str(number) in words or any(not w.isdigit() and w in t for w in words for t in texts):
            numbers.append(number)
    return numbers


def say(text: str) -> None:
    """Print a line at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def main(arguments: Sequence[str]) -> int:
    """Try the mutants that are meant; return the exit code."""
    words = [word for word in arguments if not word.startswith("--")]
    numbers = chosen(words)
    if "--list" in arguments:
        for number in numbers:
            say(f"{number:3} {MUTANTS[number - 1].place or '*'}: {MUTANTS[number - 1].promise}")
        return 0
    if "--intact" in arguments:
        wanted = dict.fromkeys(MUTANTS[number - 1].tests for number in numbers)
        with copied() as project:
            bad = [tests for tests in wanted if run_tests(project, split(tests))[0] != 0]
        say("\n".join(f"fails without a mutation: {tests}" for tests in bad) or "all pass without a mutation")
        return 1 if bad else 0
    wrong: list[int] = []
    for number in numbers:
        mutant = MUTANTS[number - 1]
        begun = time.monotonic()
        result, why = verdict(mutant)
        say(
            f"{number:3} {result:14} {time.monotonic() - begun:4.0f} s  {mutant.place or '*'}: {mutant.promise}\n    {why}"
        )
        if result != "caught":
            wrong.append(number)
    say(f"{len(numbers) - len(wrong)} of {len(numbers)} caught" + (f"; look at {wrong}" if wrong else ""))
    return 1 if wrong or not numbers else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
