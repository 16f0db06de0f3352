"""What the pages promise, sentence by sentence, and the tests that hold it; ``test_promises.py`` compares.

Rules:
- a sentence is here as it is on the page, wrapped as you like. A cell of a table is ``row / column: cell``.
- behind ``->`` are the tests, as ``file.py::test_name``, or a check of the contract kit by its name. It fails when the sentence
  is not true: read it before you name it.
- a sentence that promises nothing (a pointer, advice, a limit of somebody else) is in ``NO_PROMISE``.
- to change a sentence, change the page, run ``pytest tests/test_promises.py``, and paste what it prints here.
"""

from __future__ import annotations

from typing import Final

PROMISES: Final[dict[str, str]] = {
    "docs/guarantees.md": """
**delivery** / in memory: at most once; kept until somebody receives or it expires; gone when the process ends
    -> check_order
       check_expiry
       test_memory.py::test_a_hundred_thousand_unread_channels_leave_nothing

**delivery** / queue on Redis: at most once; waits in Redis until it is popped or expires. Lost if the process is
killed, or the connection breaks, between popping and receiving
    -> check_order
       test_redis_queue.py::test_a_popped_message_is_lost_with_the_connection
       check_expiry
       test_redis_faults.py::test_killed_under_load
       test_redis_layers.py::test_expired_on_the_way

**delivery** / pub/sub on Redis: at most once; lost where nobody is subscribed, while a process has no connection,
and when a mailbox is full
    -> check_order
       test_redis_faults.py::test_killed_under_load
       test_redis_faults.py::test_an_inbox_is_told_of_the_outage
       test_hub.py::test_a_full_channel_and_a_full_member

**delivery** / what it costs: memory: an encoding, and a decoding for each receiver. Queue: one script for `send`,
two for `group_send` (more to more than 1,000 keys),
and a pop that may bring many messages; on a normal channel a round trip for each. Pub/sub:
one `PUBLISH` for either
    -> test_memory.py::test_one_broadcast_is_one_copy
       test_redis_layers.py::test_calls_to_redis
       test_redis_queue.py::test_a_refused_piece_of_a_broadcast

**order** / in memory: that of sending, for each channel
    -> check_order

**order** / queue on Redis: that of the server's clock, which no two messages of a channel share; kept when that
clock goes back by less than `expiry`
    -> test_redis_layers.py::test_order_by_the_servers_clock
       test_redis_queue.py::test_order_over_a_step_of_the_clock
       test_redis_layers.py::test_many_messages_at_once_keep_their_order

**order** / pub/sub on Redis: that in which Redis took them, which is that of sending for each sender
    -> check_order
       test_redis_faults.py::test_killed_under_load

**order** / what it costs: nothing in memory; in the queue a look at the newest entry, within the same script
    -> test_redis_layers.py::test_order_by_the_servers_clock
       test_redis_layers.py::test_calls_to_redis

**cancellation** / in memory: a cancelled `receive` has taken nothing, a cancelled `send` has sent nothing
    -> check_cancelled_receive
       check_native_cancellation
       check_every_call_is_cancellable

**cancellation** / queue on Redis: the same for `receive`; a cancelled `send` was sent or was not, and the reply is
swallowed
    -> check_cancelled_receive
       check_native_cancellation
       test_connection.py::test_a_cancelled_caller_is_in_nobodys_way

**cancellation** / pub/sub on Redis: the same as the queue
    -> check_cancelled_receive
       check_native_cancellation
       test_connection.py::test_a_cancelled_caller_is_in_nobodys_way

**cancellation** / what it costs: a check in each call. Queue: what was popped for a cancelled reader of a normal
channel goes back, a command more
    -> check_every_call_is_cancellable
       test_receiving.py::test_a_pop_for_a_reader_who_left

**capacity** / in memory: exact; `ChannelFull` or `wait=True`
    -> check_capacity
       check_waiting_send
       test_threads.py::test_exact_capacity_across_threads

**capacity** / queue on Redis: exact among all processes, for what is in Redis ([what that leaves
out](#the-layers-on-redis)); then the mailbox of each channel, whose overflow is dropped, counted, logged
    -> test_redis_layers.py::test_capacity_is_exact_among_processes
       test_redis_queue.py::test_what_exact_leaves_out
       test_redis_layers.py::test_a_slow_reader_costs_its_neighbours_nothing
       test_log.py::test_full_members_on_redis

**capacity** / pub/sub on Redis: of the mailbox in the reader's process; overflow is dropped, counted, logged, and
never raised
    -> test_redis_layers.py::test_a_burst_fits_a_mailbox_of_pubsub
       test_hub.py::test_a_full_channel_and_a_full_member

**capacity** / what it costs: nothing more: it is looked at where the message is put. `send(..., wait=True)` waits
for a word from whoever pops; on the queue layer only for normal channels
    -> test_redis_layers.py::test_calls_to_redis
       test_redis_queue.py::test_waiting_for_room_in_a_process
       test_redis_layers.py::test_waiting_for_room_made_elsewhere

**expiry** / in memory: never delivered, frees its place at once
    -> check_expiry

**expiry** / queue on Redis: the same, by the server's time
    -> check_expiry
       test_redis_layers.py::test_expired_on_the_way
       test_redis_layers.py::test_order_by_the_servers_clock

**expiry** / pub/sub on Redis: the same from its arrival on, by the clock of the reader's process
    -> check_expiry

**expiry** / what it costs: a heap entry for each channel with messages; up to eight that are due are dropped by
each sending or joining call, nothing runs in between
    -> test_memory.py::test_expired_messages_are_reclaimed_by_the_way
       check_reclaimed

**faults** / in memory: none but the end of the process
    -> check_closing
       test_memory.py::test_never_opened_or_closed_needs_nothing

**faults** / queue on Redis: readers wait through an outage; a `send` fails within `timeout` and says whether it may
have been sent; what Redis kept is delivered
    -> test_redis_faults.py::test_killed_under_load
       test_redis_faults.py::test_paused_under_load
       test_redis_faults.py::test_a_reader_goes_on_by_itself

**faults** / pub/sub on Redis: readers wait through an outage; a `send` fails the same way; what was published
meanwhile is lost, and `on_gap` says so
    -> test_redis_faults.py::test_killed_under_load
       test_redis_faults.py::test_paused_under_load
       test_redis_faults.py::test_an_inbox_is_told_of_the_outage

**faults** / what it costs: a sign of life on an idle connection each `keep_alive` (15 s), which is how soon a dead
one is noticed, and `timeout` (5 s) more
    -> test_redis_faults.py::test_half_open
       test_redis_faults.py::test_an_idle_reader_waits_for_ever

What holds for every layer; the contract kit in `anyio_channels.testing` checks it, on asyncio, uvloop and trio.
    -> test_testing.py::test_in_memory_layer_passes
       test_redis_contract.py::test_layer_passes

names / the rule: `str` shorter than 100 characters: ASCII letters, digits, `-`, `_`, `.`; a channel name may hold
one `!` behind its first character, which makes it process-specific. Anything else is a `TypeError` that names the
value and the rule
    -> check_names
       test_base.py::test_names

messages / the rule: a `dict` with `str` keys; values are `str`, `bytes`, `int` (64 bit), `float`, `bool`, `None`,
lists and dicts of those, at most 255 levels of them in one another, the same for what arrives. Tuples arrive as
lists, `bytearray` and `memoryview` as `bytes`, instances of subclasses as the plain type. Everything else goes
through the layer's `default=`, or is a `TypeError` that says where it is: `message['user']['avatar']`.
`__asgi_channel__` and `__asgi_exclude__` are reserved keys, and [with OpenTelemetry](observability.md)
`__asgi_trace__`
    -> check_message_types
       test_codec.py::test_the_depth_of_what_arrives
       test_log.py::test_too_large_or_too_deep
       check_refused_messages
       check_default
       test_codec.py::test_nesting_has_one_bound
       test_codec.py::test_subclasses_arrive_as_the_plain_type

size / the rule: over `max_message_size` encoded bytes is a `MessageTooLarge`. The default, 4 MiB, lets through all
that is 1 MB as JSON. What arrives from Redis above it is not decoded or kept: it is counted as unreadable, and
logged
    -> check_message_size
       test_codec.py::test_the_size_of_what_arrives
       test_log.py::test_too_large_or_too_deep
       test_codec.py::test_a_megabyte_of_json_fits_by_default

refused calls / the rule: leave nothing behind
    -> check_refused_messages
       check_names
       check_every_call_is_cancellable

isolation / the rule: the sender and each receiver have their own copy. A broadcast is encoded once; its bytes are
shared until they are received
    -> check_isolation
       test_memory.py::test_one_broadcast_is_one_copy

delivery / the rule: at most once, never twice; on the queue layer under [the condition](#the-layers-on-redis) that
Redis does not go back in time
    -> check_order
       test_redis_queue.py::test_what_a_snapshot_brings_back
       check_groups

order / the rule: one writer and one reader see the order of sending. Of several readers of one channel each message
reaches one; those who wait are called in the order in which they came
    -> check_order
       check_readers_in_turn

cancellation / the rule: a cancelled `receive` has taken nothing. A cancelled `send` or `group_send` happened whole
or not at all (in memory: not at all; a broadcast of the queue layer: see below). Both hold
for anyio's and trio's cancel scopes and for asyncio's own
`Task.cancel()`, `wait_for()` and `timeout()`
    -> check_cancelled_receive
       check_native_cancellation
       check_every_call_is_cancellable
       test_memory.py::test_time_outs_of_asyncio

yielding / the rule: every async call checks for cancellation. A call that need not wait does not always let other
tasks run, but of 48 calls in a row in one thread (`YIELD_EVERY`) at least one does; a broadcast counts as one call
more for every 8 members
    -> check_yielding
       check_every_call_is_cancellable
       test_memory.py::test_every_call_gives_way_in_time

expiry / the rule: a message unread for `expiry` seconds is never delivered and frees its place at once. That ends
no membership: its reader may only be slow
    -> check_expiry
       check_expiry_keeps_members

capacity / the rule: exact: of 100 concurrent sends to a channel of capacity 5, five succeed and 95 raise
`ChannelFull`. With `send(..., wait=True)` they wait for room, in turn with each other; a sender that does not wait
may take room that was made for one that does
    -> check_capacity
       check_waiting_send
       test_memory.py::test_waiting_senders_and_those_who_do_not_wait

broadcasts / the rule: reach every member once, never raise `ChannelFull`; a member that is full misses the message.
Misses are counted in `statistics()`, and [logged](observability.md) once per group and `expiry` seconds
    -> check_groups
       check_full_member
       test_memory.py::test_a_full_member_is_logged_once

groups / the rule: a membership ends by `group_discard`, and with its channel. That of a normal channel, or of
another process's, ends `group_expiry` seconds after the last `group_add` too. An empty group leaves no trace
    -> check_groups
       check_group_expiry
       test_memory.py::test_a_group_of_someone_else_is_no_trace

ownership / the rule: a process-specific channel belongs to the process that made it. One made by `new_channel()`
ends `group_expiry` seconds after its last use, and `expiry` seconds after it if its last `receive` was cancelled or
the name that `new_channel()` returned was garbage-collected. A use is `new_channel`, `group_add` of it, and a
`receive` that begins, waits or returns; nothing ends while somebody waits. One that has ended is out of its groups,
its messages are discarded, and its next `receive` raises `anyio.ClosedResourceError`. `flush` ends messages and
memberships, not channels
    -> check_channel_in_use
       check_channel_of_cancelled_reader
       check_channel_of_forgotten_name
       check_channel_somebody_waits_at
       check_foreign_channel
       test_ownership.py::test_flush_ends_no_channel

inboxes / the rule: leaving the `async with` block, also by an error or by cancellation, leaves all groups, frees
the channel, and ends the waits of its readers with `anyio.ClosedResourceError`
    -> check_subscribe
       test_memory.py::test_leaving_a_closed_layer

closing / the rule: waiting readers and senders, and all later calls, get `anyio.ClosedResourceError`; messages are
thrown away. A closed layer may be opened again, and is blank. A layer that was opened and never closed is a
`ResourceWarning`
    -> check_closing
       test_base.py::test_a_layer_left_open_warns
       test_redis_layers.py::test_reopened_layer_is_blank

books / the rule: each message sent to a channel ends under exactly one heading: `sent == received + expired +
dropped_full + dropped_unreadable + discarded + buffered_messages`. A send that was cancelled and happened all the
same is in `sent`, as soon as Redis has answered. One that failed on Redis with `may_have_run` is not: nobody knows,
and it may be received
    -> check_statistics
       test_redis_queue.py::test_a_cancelled_send_that_happened_is_counted
       test_testing.py::test_in_memory_layer_matches_the_model

reaches: one process: all its threads and event loops, asyncio and trio at once
    -> test_threads.py::test_many_threads_one_channel
       test_threads.py::test_ping_pong

a message that nobody reads: is kept until it expires; also one sent to the channel of an inbox that was left
    -> check_expiry
       check_reclaimed

a send that is cancelled: sent nothing
    -> check_every_call_is_cancellable
       check_waiting_send

a reader whose event loop has ended: swallows nothing: what it was called for goes to the next reader. A loop that
merely stands still is called, but nothing is kept for it
    -> test_threads.py::test_a_receiver_whose_asyncio_loop_died_swallows_nothing
       test_threads.py::test_a_receiver_whose_trio_run_ended_swallows_nothing
       test_threads.py::test_a_loop_that_goes_on_takes_what_is_there

cost of an operation: does not grow with the number of other channels and groups; `group_send` and `group_channels`
grow with the members of their group, `flush` and closing with all that is there
    -> test_memory.py::test_no_call_looks_at_other_channels

reclaiming: what expired is dropped a few at a time by whatever sends or joins next, and all at once by
`statistics()`. Nothing runs in the background. Channels that were read empty are kept for re-use, at most as many
as are in use and a thousand
    -> test_memory.py::test_expired_messages_are_reclaimed_by_the_way
       test_memory.py::test_channels_that_come_and_go_leave_nothing

memory: members of a group share the bytes of a broadcast until they receive it: 1 MB to 1,000 members takes 1 MB
    -> test_memory.py::test_one_broadcast_is_one_copy

a fork: the child has an empty layer, whatever threads of its parent were doing; a closed one stays closed. The
channels and inboxes that the parent made have ended there. The parent keeps what it has
    -> test_forks.py::test_a_fork_while_threads_use_the_layer

Ctrl-C / the rule: on trio, `KeyboardInterrupt` is raised within a call only where it waits in the main task, and is a
cancellation there. On asyncio, under `asyncio.run()` or `anyio.run()`, the first Ctrl-C cancels the main task. Either
way no lock stays held, what is said of cancelled calls holds, and the layer closes in order. Not covered: a second
Ctrl-C on asyncio, asyncio without such a runner, and calls in a main thread that runs no event loop. There Python
raises it between any two instructions, and a layer that was interrupted in a call may hang. One instant is not
covered on trio either: between two steps of a layer's own task on Redis. Then that layer ends as by a bug of ours, and
calls get a `redis.ConnectionError`
    -> test_interrupts.py::test_interrupted_in_memory
       test_interrupts.py::test_interrupted_on_redis
       test_interrupts.py::test_interrupted_while_busy
       test_forks.py::test_the_first_call_on_trio

without `async with`: works; there is nothing to open
    -> test_memory.py::test_never_opened_or_closed_needs_nothing

`"drop_new"` / when a broadcast finds the inbox full: it misses that broadcast
    -> check_overflow_and_gaps

`"drop_new"` / `send` to a full inbox: `ChannelFull`
    -> check_overflow_and_gaps

`"drop_old"` / when a broadcast finds the inbox full: the oldest message goes
    -> check_overflow_and_gaps

`"drop_old"` / `send` to a full inbox: the oldest message goes
    -> check_overflow_and_gaps
       test_memory.py::test_a_lone_message_makes_way_for_a_newer_one

`"ignore"` / in the place of messages that were dropped, or expired: nothing
    -> check_overflow_and_gaps

`"event"` / in the place of messages that were dropped, or expired: `{"type": "channel_layer.gap", "missed": n}`
    -> check_overflow_and_gaps
       test_memory.py::test_expiry_is_a_gap_too

`"raise"` / in the place of messages that were dropped, or expired: `receive` raises `MessagesLost` once; the next
call goes on
    -> check_overflow_and_gaps

reaches / queue: all processes on the same Redis, servers or cluster; channels_redis and fast-channels among them,
but for a cluster
    -> test_interop.py::test_groups
       test_interop.py::test_normal_channels
       test_interop.py::test_process_specific_channels
       test_redis_cluster.py::test_names_are_spread_and_all_arrive
       test_redis_servers.py::test_names_are_spread_and_all_arrive

reaches / pub/sub: the same
    -> test_interop.py::test_groups
       test_interop.py::test_normal_channels_of_pubsub
       test_redis_cluster.py::test_names_are_spread_and_all_arrive
       test_redis_servers.py::test_names_are_spread_and_all_arrive

a message that nobody reads yet / queue: waits in Redis until it expires
    -> test_redis_layers.py::test_expired_on_the_way
       test_interop.py::test_normal_channels

a message that nobody reads yet / pub/sub: is lost; a normal channel that was received from is kept `expiry` seconds
after a cancelled `receive`, else `group_expiry`, and as long as it is in a group or holds a message
    -> test_ownership.py::test_a_normal_channel_on_pubsub
       test_redis_layers.py::test_a_normal_channel_of_pubsub_gives_each_process_a_copy

order / queue: that of the server's clock, which no two messages of a channel share: a client's clock plays no part.
A message comes after the newest one there, so a server's clock that goes back by less than `expiry` changes
nothing; a score later than now and `expiry` is foreign, and is not followed
    -> test_redis_layers.py::test_order_by_the_servers_clock
       test_redis_queue.py::test_order_over_a_step_of_the_clock
       test_redis_queue.py::test_waiting_for_room_behind_foreign_scores

order / pub/sub: that of the connection
    -> check_order

delivery / queue: at most once. What is popped for a reader is given back if the reader is cancelled; it is lost if
the process is killed in that moment, or if the connection breaks while it is on its way to the reader or back
(`on_gap` tells an inbox). Never twice, as long as Redis does not go back in time. One that comes back with less
than it had (killed and restarted from an RDB snapshot, or from an AOF that lacks its last second; a failover to a
replica that lags) still holds what was received since: the process that received it drops it, if it is among its
last 16,384 pops; another process, or a layer opened anew, receives it again
    -> test_receiving.py::test_a_pop_for_a_reader_who_left
       test_redis_queue.py::test_a_popped_message_is_lost_with_the_connection
       test_redis_queue.py::test_what_a_snapshot_brings_back
       test_duplicates.py::test_a_replica_that_knows_of_no_pop_takes_over
       test_redis_layers.py::test_readers_in_several_layers_share

delivery / pub/sub: at most once; what is sent while the reader's process has no connection is lost
    -> test_redis_faults.py::test_an_inbox_is_told_of_the_outage
       test_redis_faults.py::test_killed_under_load

capacity / queue: exact for what is in Redis: a send is accepted while fewer than `capacity` unexpired messages are
there. A message popped for a reader is not there any more. If the reader is cancelled before it has it, and its
room was taken meanwhile, it goes back all the same, so that nothing is lost: the channel then holds more than its
capacity, by as many as were on their way, and accepts nothing until it holds fewer. To keep the place, Redis would
have to hear of each message that it was received, a request more for each, and would refuse sends to a channel just
read empty until then. A process-specific channel shares that of its process there, and then has a mailbox of its
own, whose overflow is dropped, counted, logged
    -> test_redis_layers.py::test_capacity_is_exact_among_processes
       test_redis_queue.py::test_what_exact_leaves_out
       test_redis_layers.py::test_a_slow_reader_costs_its_neighbours_nothing

capacity / pub/sub: of the mailbox
    -> test_redis_layers.py::test_a_burst_fits_a_mailbox_of_pubsub

`receive` of another process's channel / queue: is a `RuntimeError`: it would take that process's messages
    -> test_ownership.py::test_another_process_s_channel

`receive` of another process's channel / pub/sub: the same
    -> test_ownership.py::test_another_process_s_channel

memberships of this process's channels / queue: are renewed every `group_expiry / 3`, and joined again after a
reconnect, so `group_expiry` can be short to be rid of dead processes' members soon
    -> test_redis_layers.py::test_renewed_are_memberships_of_our_channels
       test_ownership.py::test_redis_comes_back_empty
       test_redis_faults.py::test_memberships_are_renewed

memberships of this process's channels / pub/sub: are of this process
    -> test_redis_layers.py::test_pubsub_groups_are_local

a process that was killed / queue: a broadcast that finds messages past `expiry` in its key takes its members out of
that group, if it ran this package; all others go after `group_expiry`. A process that only stood still for longer
than `expiry` joins its groups again
    -> test_ownership.py::test_a_process_that_was_killed
       test_ownership.py::test_a_process_that_stood_still

a process that was killed / pub/sub: is gone with its connection
    -> test_redis_layers.py::test_nothing_is_left_in_redis

a call that is cancelled / queue: a `send` happened whole or not at all, and so did what a `group_send` had for one
server (in a cluster: for one key); a cancelled wait took nothing
    -> check_every_call_is_cancellable
       check_cancelled_receive
       test_redis_queue.py::test_a_cancelled_broadcast_in_pieces
       test_redis_queue.py::test_a_cancelled_broadcast_in_a_cluster_that_happened_is_counted

a broadcast to many / queue: goes to each server in calls of at most 1,000 keys and 8 MiB of entries, one after the
other. The message is in each call once; with encryption keys, and in a cluster, it is in each entry, and no more than
those of one call are held at a time. Once the first call has run the others follow, also if Redis refuses one of them,
or (not in a cluster) the caller is cancelled; if the connection breaks, the rest is not sent
    -> test_redis_queue.py::test_a_broadcast_goes_out_once
       test_redis_queue.py::test_an_encrypted_broadcast_is_held_in_pieces
       test_redis_queue.py::test_a_broadcast_in_a_cluster_is_held_in_pieces
       test_redis_queue.py::test_a_refused_piece_of_a_broadcast
       test_redis_queue.py::test_a_cancelled_broadcast_in_pieces

a broadcast to many / pub/sub: is one `PUBLISH`
    -> test_redis_layers.py::test_calls_to_redis

a call that is cancelled / pub/sub: a `send` or `group_send` happened or did not; a cancelled wait took nothing
    -> check_every_call_is_cancellable
       check_cancelled_receive

an inbox and an outage / queue: with `on_gap`, one gap of unknown size (`None`) after each reconnect, of each of its
two connections, and when its server has become a replica
    -> test_redis_faults.py::test_an_inbox_is_told_of_the_outage
       test_redis_refusals.py::test_an_inbox_is_told_of_a_demotion
       test_redis_faults.py::test_a_pop_that_is_cut_off

an inbox and an outage / pub/sub: the same; `on_disconnect` and `on_reconnect` besides
    -> test_redis_faults.py::test_an_inbox_is_told_of_the_outage
       test_redis_faults.py::test_on_disconnect_and_on_reconnect

`group_send(exclude=...)` / pub/sub: the names travel with the message under `__asgi_exclude__`; a member in a
process that runs channels_redis receives it all the same, with that key
    -> test_interop.py::test_exclude_is_visible_to_peers_of_pubsub

several servers, one down / queue: a broadcast reaches the members on the others, and raises; an inbox is told of a
gap if it, or a group of its, lives there
    -> test_redis_servers.py::test_a_broadcast_with_one_server_down
       test_redis_servers.py::test_only_who_may_have_missed_something_is_told

several servers, one down / pub/sub: what lives on the others goes on
    -> test_redis_servers.py::test_one_server_down

a failover (Sentinel, cluster) / queue: as an outage; what was not replicated yet is lost. What a process has
received does not come to it again, though the new primary may not know that it was popped; of a normal channel that
several processes read, it may come to another one of them
    -> test_redis_cluster.py::test_failover_under_load
       test_redis_sentinel.py::test_failover_under_load
       test_duplicates.py::test_a_replica_that_knows_of_no_pop_takes_over
       test_duplicates.py::test_a_normal_channel_whose_pops_were_lost

a failover (Sentinel, cluster) / pub/sub: as an outage; nothing comes twice. A planned one in a cluster may lose what
is published at the moment of the change, or overtaken on its way by a later message of its sender; an inbox is told of
a gap as soon as its subscription is confirmed again, also if the slot has gone back by then
    -> test_redis_cluster.py::test_failover_under_load
       test_redis_cluster.py::test_a_planned_failover_is_told_at_once
       test_redis_cluster.py::test_what_comes_too_late_to_be_in_order_is_told
       test_redis_sentinel.py::test_failover_under_load
       test_redis_cluster.py::test_what_a_cluster_says_twice_is_delivered_once

a slot that moves (cluster) / queue: nothing is lost, no caller sees it
    -> test_redis_cluster.py::test_slot_migrated_under_load
       test_redis_cluster.py::test_in_the_middle_of_a_migration

a slot that moves (cluster) / pub/sub: what is published while the subscription moves may be missed; an inbox is
told of a gap once it is confirmed at the new node, also if the slot has gone back by then
    -> test_redis_cluster.py::test_slot_migrated_under_load
       test_redis_cluster.py::test_who_may_have_missed_something_is_told
       test_redis_cluster.py::test_a_slot_that_goes_back_at_once

`statistics()` / queue: counts what this process does, and what it holds
    -> check_statistics
       test_redis_layers.py::test_statistics

`statistics()` / pub/sub: the same; `sent` counts calls
    -> test_redis_layers.py::test_statistics

what an operation costs / queue: does not grow with other channels and groups, except that one blocking pop names
all *normal* channels that this process waits at
    -> test_redis_layers.py::test_calls_to_redis
       test_redis_faults.py::test_a_thousand_readers

what an operation costs / pub/sub: does not grow with them
    -> test_redis_layers.py::test_calls_to_redis
""",
    "docs/redis.md": """
Options of the `redis` package that mean nothing here (`max_connections`, `retry_on_timeout`, `decode_responses`,
...) are ignored and named once in the log, at INFO.
    -> test_address.py::test_options_that_mean_nothing_here

Redis refuses for a while: out of memory, read-only replica, it cannot save (`MISCONF`), too few replicas, a script
that runs long (`BUSY`), an administrator's `CLIENT UNBLOCK`, or anything else / what readers see: they go on
waiting; it is logged once and tried again. While Redis is out of memory they still receive what is there, and what
was popped for a cancelled reader goes back. Pub/sub works, and can be opened, while Redis cannot save
    -> test_redis_refusals.py::test_readers_wait_through_a_refusal
       test_redis_refusals.py::test_readers_wait_through_an_unblock
       test_redis_refusals.py::test_fetching_waits_through_a_script
       test_redis_refusals.py::test_opened_while_redis_cannot_save
       test_redis_queue.py::test_a_cancelled_receive_out_of_memory

A Redis that is restarted from a snapshot hands out again what was received since, but not to the process that
received it ([under which conditions](guarantees.md#the-layers-on-redis)).
    -> test_redis_queue.py::test_what_a_snapshot_brings_back

Their bytes in Redis are those of channels_redis 4.3 and fast-channels 1.1, so processes that run either can share
one Redis with ours, in both directions.
    -> test_interop.py::test_groups
       test_interop.py::test_normal_channels
       test_interop.py::test_normal_channels_of_pubsub
       test_interop.py::test_process_specific_channels
       test_interop.py::test_keys_are_theirs

A layer is opened once, in the lifespan of the application, and serves the event loop that opened it.
    -> test_redis_layers.py::test_another_event_loop

It owns a task group there; nothing runs outside of it, and after the block no connection is left.
    -> test_redis_layers.py::test_nothing_is_left_in_redis
       test_redis_faults.py::test_a_bug_of_ours_is_told

A process that is forked meanwhile opens a layer of its own; each call on its parent's is a `RuntimeError` that says so.
    -> test_open_in_a_fork.py::test_a_fork_is_told_and_harms_nobody

a message that nobody reads yet / queue: `RedisChannelLayer`, `redis://`: waits in Redis until `expiry`
    -> test_interop.py::test_normal_channels
       test_redis_layers.py::test_expired_on_the_way

a message that nobody reads yet / pub/sub: `RedisPubSubChannelLayer`, `redis+pubsub://`: is lost
    -> test_redis_layers.py::test_a_normal_channel_of_pubsub_gives_each_process_a_copy

a normal channel read by several processes / queue: `RedisChannelLayer`, `redis://`: each message goes to one of
them: share out work
    -> test_redis_layers.py::test_readers_in_several_layers_share

a normal channel read by several processes / pub/sub: `RedisPubSubChannelLayer`, `redis+pubsub://`: each process
gets a copy
    -> test_redis_layers.py::test_a_normal_channel_of_pubsub_gives_each_process_a_copy

`ChannelFull` from `send` / queue: `RedisChannelLayer`, `redis://`: yes, exact among all processes for what is in
Redis
    -> test_redis_layers.py::test_capacity_is_exact_among_processes
       test_redis_queue.py::test_what_exact_leaves_out

`ChannelFull` from `send` / pub/sub: `RedisPubSubChannelLayer`, `redis+pubsub://`: never: the reader's mailbox is
bounded; what does not fit is dropped, counted, logged
    -> test_redis_layers.py::test_a_burst_fits_a_mailbox_of_pubsub
       test_hub.py::test_a_full_channel_and_a_full_member

members of a group / queue: `RedisChannelLayer`, `redis://`: any channel, in any process
    -> test_interop.py::test_groups
       test_redis_servers.py::test_a_broadcast_to_members_on_both

members of a group / pub/sub: `RedisPubSubChannelLayer`, `redis+pubsub://`: channels of the process that calls
`group_add`; another one is a `RuntimeError`
    -> test_redis_layers.py::test_pubsub_groups_are_local

`group_channels` / queue: `RedisChannelLayer`, `redis://`: all members
    -> test_interop.py::test_groups
       check_groups

`group_channels` / pub/sub: `RedisPubSubChannelLayer`, `redis+pubsub://`: those of this process
    -> test_redis_layers.py::test_pubsub_groups_are_local

calls to Redis for a `send` / a broadcast / queue: `RedisChannelLayer`, `redis://`: 1 / 2, and more
to more than 1,000 keys or of more than 8 MiB
    -> test_redis_layers.py::test_calls_to_redis
       test_redis_queue.py::test_a_broadcast_goes_out_once

calls to Redis for a `send` / a broadcast / pub/sub: `RedisPubSubChannelLayer`, `redis+pubsub://`: 1 / 1
    -> test_redis_layers.py::test_calls_to_redis

connections to each server / queue: `RedisChannelLayer`, `redis://`: 2: commands, and one blocking pop for all
readers; 1 in a cluster
    -> test_redis_faults.py::test_a_thousand_readers
       test_redis_cluster.py::test_names_are_spread_and_all_arrive

connections to each server / pub/sub: `RedisPubSubChannelLayer`, `redis+pubsub://`: 1
    -> test_redis_faults.py::test_a_thousand_readers

during an outage / queue: `RedisChannelLayer`, `redis://`: what is in Redis stays there, if Redis keeps its data
    -> test_redis_faults.py::test_killed_under_load

during an outage / pub/sub: `RedisPubSubChannelLayer`, `redis+pubsub://`: what is sent is lost
    -> test_redis_faults.py::test_killed_under_load
       test_redis_faults.py::test_an_inbox_is_told_of_the_outage

Those of channels_redis: `hosts`, `prefix`, `expiry`, `group_expiry`, `capacity`, `channel_capacity`,
`symmetric_encryption_keys`, `random_prefix_length` (queue), `serializer_format`; `on_disconnect`, `on_reconnect`
(pub/sub).
    -> test_interop.py::test_capacity_and_expiry_are_shared
       test_redis_faults.py::test_on_disconnect_and_on_reconnect
       test_promises.py::test_defaults_are_those_of_the_page

`timeout` / default: 5
    -> test_promises.py::test_defaults_are_those_of_the_page

`timeout`: seconds in which a call succeeds or fails, also while Redis is away
    -> test_redis_faults.py::test_paused_under_load
       test_redis_faults.py::test_killed_under_load

`connect_timeout` / default: 5
    -> test_promises.py::test_defaults_are_those_of_the_page

`connect_timeout`: seconds in which a connection is made, the first one among them
    -> test_redis_faults.py::test_a_server_that_is_no_redis
       test_redis_faults.py::test_errors_at_opening

`keep_alive` / default: 15
    -> test_promises.py::test_defaults_are_those_of_the_page

`keep_alive`: seconds between signs of life on an idle connection. One that is dead, though nobody says so, is
noticed within `keep_alive + timeout`
    -> test_redis_faults.py::test_half_open

`max_message_size` / default: 4 MiB
    -> test_promises.py::test_defaults_are_those_of_the_page

`max_message_size`: of a message as MessagePack or JSON, before it is encrypted
    -> test_codec.py::test_too_large_as_json
       test_codec.py::test_too_large_says_both_sizes

`default` / default: none
    -> test_promises.py::test_defaults_are_those_of_the_page

`default`: turns a value that no message may hold into one that it may
    -> check_default

All durations are seconds, up to 10^9 (31 years), and fractions count.
    -> test_memory.py::test_time_may_be_fractions
       test_base.py::test_the_largest_options

A misspelt option is a `TypeError`.
    -> test_base.py::test_bad_options
       test_redis_layers.py::test_bad_options

`hosts` is a list; each entry is a server: a URL (`redis://user:password@host:6379/0`, `rediss://` for TLS,
`unix:///run/redis.sock?db=0`), a `(host, port)` pair, or a `dict` of options as the `redis` package calls them
(`host`, `port`, `db`, `username`, `password`, `credential_provider`, `client_name`, `socket_timeout`,
`socket_connect_timeout`, `ssl`, `health_check_interval`, `ssl_ca_certs`, `ssl_certfile`, `ssl_keyfile`,
`ssl_cert_reqs`, ...), or a URL under `"address"` with such options beside it.
    -> test_address.py::test_hosts
       test_redis_layers.py::test_health_check_interval_is_keep_alive
       test_address.py::test_tls_options
       test_address.py::test_a_credential_provider
       test_address.py::test_refused_hosts

TLS verifies certificate and name unless told not to.
    -> test_address.py::test_tls_verifies_by_default
       test_address.py::test_how_much_tls_verifies
       test_redis_faults.py::test_tls

Passwords are in no `repr`, log or error.
    -> test_redis_faults.py::test_errors_at_opening
       test_redis_layers.py::test_repr_has_no_password
       test_address.py::test_names
       test_address.py::test_refused_hosts
       test_server.py::test_log_in
       test_redis_sentinel.py::test_passwords

As channels_redis takes it; other options beside these are those of the primary.
    -> test_redis_sentinel.py::test_hosts_that_cannot_be
       test_redis_sentinel.py::test_layer_passes_behind_sentinels

In the URL, `sentinel_username` and `sentinel_password` are the sentinels', and `rediss+sentinel://` is TLS to both.
    -> test_redis_sentinel.py::test_urls
       test_howto.py::test_rights_suffice_with_sentinel

All sentinels are asked for the primary at each connection, and it must say itself that it is one.
    -> test_redis_sentinel.py::test_sentinels_down
       test_redis_sentinel.py::test_what_sentinels_may_say

One more connection, to one of them, listens for `+switch-master`, so that nobody waits for a time-out.
    -> test_redis_sentinel.py::test_failover_of_a_primary_that_stands_still
       test_redis_sentinel.py::test_the_sentinel_that_is_listened_to_dies

After a failover all goes on as after any reconnect; what the old primary had not yet replicated is lost.
    -> test_redis_sentinel.py::test_failover_under_load

That goes for pops too: the new primary may still hold a message that was received just before.
    -> test_duplicates.py::test_a_replica_that_knows_of_no_pop_takes_over

The process that received it knows it and drops it; in a normal channel that several processes read, another one may
receive it again.
    -> test_duplicates.py::test_a_replica_that_knows_of_no_pop_takes_over
       test_duplicates.py::test_a_normal_channel_whose_pops_were_lost

`hosts=["redis://a", "redis://b"]`, or in a URL `redis://user:password@a:6379,b:6379/0`, spreads names over
independent servers, plain or behind Sentinel: each channel, the channels of a process together, and each group live
on one of them, by the CRC-32 of the name as channels_redis has it.
    -> test_redis_servers.py::test_names_are_spread_and_all_arrive
       test_redis_sentinel.py::test_mixed_with_a_plain_host
       test_urls.py::test_several_servers_in_a_url

When one is down, what lives on the others goes on, and errors name the one that is down; a broadcast still reaches
the members on the others.
    -> test_redis_servers.py::test_one_server_down
       test_redis_servers.py::test_a_broadcast_with_one_server_down

A layer opens when one of its servers is there.
    -> test_redis_servers.py::test_opening_with_one_server_down

channels_redis over several servers sends process-specific channels' messages to a server where their process does
not look, and normal channels' to each in turn; that is its own affair.
    -> test_interop.py::test_two_servers

Its broadcasts, what is sent to its channels, and its pub/sub layer work with ours in both directions.
    -> test_interop.py::test_two_servers

`cluster=True`, with some of the nodes as `hosts`; or `redis+cluster://user:password@a:6379,b:6379`.
    -> test_redis_cluster.py::test_urls
       test_redis_cluster.py::test_opening

`MOVED` and `ASK` are followed and `TRYAGAIN` and `CLUSTERDOWN` waited for, up to `timeout`, so slots may move and
nodes come and go while messages flow.
    -> test_redis_cluster.py::test_in_the_middle_of_a_migration
       test_redis_cluster.py::test_clusterdown
       test_redis_cluster.py::test_slot_migrated_under_load
       test_redis_cluster.py::test_node_added

Who owns what is asked for again when a node is lost, names another or ends a subscription, as in a planned failover,
and at each `keep_alive`.
    -> test_redis_cluster.py::test_node_added
       test_redis_cluster.py::test_a_map_that_is_out_of_date
       test_redis_cluster.py::test_asking_who_owns_what

Without `cluster=True`, the queue layer refuses to open at a node of a cluster, and says which URL to use.
    -> test_opening.py::test_a_node_of_a_cluster

Pub/sub works at any node, for the nodes hand on to each other what is published.
    -> test_opening.py::test_pubsub_over_the_nodes_of_a_cluster

A proxy between a layer and Redis must speak RESP3 (`HELLO 3`); opening the layer says so if it does not.
    -> test_opening.py::test_a_server_without_resp3

Channels and groups lie in the slots of their keys, so a process with a thousand process-specific channels reads one
key.
    -> test_redis_cluster.py::test_slots_of_what_belongs_together
       test_interop.py::test_keys_are_theirs

A prefix with a tag, `{chat}`, keeps all on one node.
    -> test_redis_cluster.py::test_a_prefix_with_a_tag

The queue layer waits without a blocking pop, which cannot wait in several slots: senders say on the sharded channel
`PREFIX:sent:{KEY}` that there is something, and readers pop.
    -> test_redis_cluster.py::test_slots_of_what_belongs_together
       test_redis_cluster.py::test_no_permission_to_listen

That costs a round trip more, and one connection less.
    -> test_redis_cluster.py::test_names_are_spread_and_all_arrive
       test_redis_cluster.py::test_what_is_heard_while_a_key_is_drained

Pub/sub is sharded (`SPUBLISH`), so traffic spreads over the nodes.
    -> test_redis_cluster.py::test_what_a_cluster_says_twice_is_delivered_once
       test_redis_cluster.py::test_names_are_spread_and_all_arrive

Each pub/sub message begins with twelve bytes that say who sent it and its number: while a node takes over from
another, both hand on what is published; what came twice, or too late to be in order, is dropped, and an inbox is
told of a gap.
    -> test_redis_cluster.py::test_what_a_cluster_says_twice_is_delivered_once
       test_duplicates.py::test_what_does_not_come_after_the_last_is_dropped
       test_redis_cluster.py::test_what_comes_too_late_to_be_in_order_is_told

`create_channel_layer(url)` takes the same URLs with the layer's options in the query:
`redis://localhost/0?capacity=500&expiry=30`.
    -> test_redis_layers.py::test_layers_from_urls

An ACL user needs the keys and the Redis channels that begin with the prefix, and for pub/sub those that begin with
what `new_channel` and `subscribe` put in front (`specific.`).
    -> test_checkup.py::test_the_permissions_that_the_page_about_redis_asks_for
       test_howto.py::test_rights_suffice

Commands: `EVAL`, `EVALSHA`, and what the scripts call; `BZMPOP` (from Redis 7 on), `BZPOPMIN`, `ZADD`, `PEXPIRE`,
`ZREM`, `UNLINK`, `SCAN` (only `flush`), `SUBSCRIBE`, `UNSUBSCRIBE`, `PUBLISH`, `PING`, `TIME`, `HELLO`, `CLIENT`.
    -> test_howto.py::test_rights_suffice
       test_checkup.py::test_each_right_that_is_missing_is_named

None of them is in the category `@dangerous`, but for `CLIENT UNBLOCK`, which is used only when Redis is out of
memory and can be missing.
    -> test_checkup.py::test_the_permissions_that_the_page_about_redis_asks_for
       test_redis_faults.py::test_out_of_memory

The whole line for `ACL SETUSER` is on the page
[Deploying](howto/deploying.md#a-user-with-no-more-rights-than-needed).
    -> test_howto.py::test_rights_suffice

`anyio-channels doctor URL` tries all that, and more: see [The command line](command-line.md#doctor).
    -> test_checkup.py::test_permissions
       test_checkup.py::test_each_right_that_is_missing_is_named

`PREFIX` + channel name up to its `!` / what it is: the messages of a channel, or of all channels of a process: a
sorted set by time
    -> test_interop.py::test_keys_are_theirs

`PREFIX:group:NAME` / what it is: the members of a group: a sorted set by the time they joined
    -> test_interop.py::test_keys_are_theirs

`PREFIX:prefix` / what it is: says that the prefix is used, so that flushing a shorter prefix spares it
    -> test_redis_layers.py::test_nothing_is_left_in_redis
       test_redis_layers.py::test_flush_keeps_to_its_prefix

`PREFIX:wake:...`, `PREFIX:waiting:...` / what it is: to end a blocking pop, and while a sender waits for room; they
go by themselves, the latter ten seconds after `expiry`
    -> test_redis_layers.py::test_nothing_is_left_in_redis
       test_redis_layers.py::test_what_says_that_a_sender_waits_goes_by_itself

Pub/sub uses no keys; a Redis channel for each channel name, and `PREFIX__group__NAME` for groups.
    -> test_redis_layers.py::test_a_channel_that_is_called_as_a_group_is_in_redis
       test_interop.py::test_normal_channels_of_pubsub

Redis is killed, restarted, or the network breaks / what callers see: sends fail within `timeout` with a
`redis.ConnectionError` whose attribute `may_have_run` says whether the message may have been sent; they work again
when Redis is back
    -> test_redis_faults.py::test_killed_under_load
       test_connection.py::test_everyone_is_told_of_the_end

Redis is killed, restarted, or the network breaks / what readers see: nothing: they go on waiting, and receive
again. With `on_gap`, an inbox is told that it may have missed something
    -> test_redis_faults.py::test_killed_under_load
       test_redis_faults.py::test_a_reader_goes_on_by_itself
       test_redis_faults.py::test_an_inbox_is_told_of_the_outage

Redis stands still / what callers see: a `redis.ConnectionError` after `timeout`; for the calls that were under way
it is a `redis.TimeoutError` too
    -> test_redis_faults.py::test_paused_under_load
       test_connection.py::test_a_silent_server

Redis stands still / what readers see: nothing
    -> test_redis_faults.py::test_paused_under_load

Redis comes back empty, or is flushed / what callers see: nothing
    -> test_redis_faults.py::test_script_flush

Redis comes back empty, or is flushed / what readers see: inboxes are members again, at once after a reconnect,
otherwise within `keep_alive`
    -> test_redis_faults.py::test_memberships_survive_a_redis_that_lost_them
       test_ownership.py::test_redis_comes_back_empty

Redis refuses for a while: out of memory, read-only replica, it cannot save (`MISCONF`), too few replicas, a script
that runs long (`BUSY`), an administrator's `CLIENT UNBLOCK`, or anything else / what callers see: what Redis says,
as an error of the `redis` package
    -> test_redis_faults.py::test_out_of_memory
       test_redis_refusals.py::test_readers_wait_through_a_refusal
       test_redis_refusals.py::test_readers_wait_through_an_unblock
       test_redis_refusals.py::test_opened_while_redis_cannot_save
       test_redis_refusals.py::test_fetching_waits_through_a_script
       test_redis_faults.py::test_a_replica_refuses

To a process-specific channel it is a `RuntimeError`: only the process that reads it knows the room in its mailbox.
    -> test_redis_faults.py::test_out_of_memory
       test_redis_queue.py::test_waiting_for_room_in_a_process
       test_redis_faults.py::test_a_replica_refuses

no permission for a channel (`NOPERM`), or its key holds something else (`WRONGTYPE`) / what callers see: what Redis
says
    -> test_redis_faults.py::test_no_permission
       test_redis_refusals.py::test_one_key_that_is_refused
       test_redis_faults.py::test_no_permission_for_a_subscription
       test_redis_faults.py::test_a_key_of_another_type

no permission for a channel (`NOPERM`), or its key holds something else (`WRONGTYPE`) / what readers see: what Redis
says; readers of other channels go on
    -> test_redis_faults.py::test_no_permission
       test_redis_refusals.py::test_one_key_that_is_refused
       test_redis_faults.py::test_no_permission_for_a_subscription
       test_redis_faults.py::test_a_key_of_another_type

foreign or damaged entries, undecryptable or expired tokens / what readers see: skipped, counted in
`dropped_unreadable`, logged once for each channel
    -> test_redis_faults.py::test_damaged_entries_in_queues
       test_redis_faults.py::test_damaged_messages_in_pubsub
       test_redis_faults.py::test_tokens_that_cannot_be_read

wrong password, unknown host, refused port, untrusted certificate, a port for TLS without TLS or the other way round,
no RESP3 / what callers see: an error when the layer is opened, within `connect_timeout`, that names the server, and
says what to do where that is known; its `__cause__` is what the system said
    -> test_redis_faults.py::test_errors_at_opening
       test_opening.py::test_a_port_for_tls
       test_opening.py::test_a_port_without_tls
       test_opening.py::test_a_server_without_resp3
       test_redis_faults.py::test_tls

Reconnecting waits with exponential backoff and jitter, half a second at most.
    -> test_link.py::test_success_sets_the_backoff_back
       test_link.py::test_a_pause_is_short

After each reconnect subscriptions are confirmed and memberships joined before the connection is used.
    -> test_subscriptions.py::test_many_are_restored_by_a_few_commands
       test_redis_faults.py::test_memberships_survive_a_redis_that_lost_them

A process-specific channel (with a `!` in its name) is read by the process that made it; `receive` elsewhere is a
`RuntimeError`.
    -> test_ownership.py::test_another_process_s_channel

All channels of a process share one key, and its capacity, as the specification asks.
    -> test_interop.py::test_keys_are_theirs
       test_redis_layers.py::test_a_slow_reader_costs_its_neighbours_nothing

The process empties that key as messages come, into a mailbox for each channel: a reader that is slow fills its own
mailbox, misses messages (counted, logged, told by `on_gap`), and costs its neighbours nothing.
    -> test_redis_layers.py::test_a_slow_reader_costs_its_neighbours_nothing

A normal channel's messages stay in Redis until a reader waits.
    -> test_receiving.py::test_what_nobody_reads_goes_back
       test_redis_layers.py::test_closing_gives_back

A message that was popped for a reader who was cancelled goes back to where it was, also when Redis is out of
memory.
    -> test_receiving.py::test_a_pop_for_a_reader_who_left
       test_redis_queue.py::test_a_cancelled_receive_out_of_memory
       test_receiving.py::test_what_nobody_reads_goes_back

`send(..., wait=True)` to a normal channel waits until whoever pops says that there is room. channels_redis does not
say so: room that it made is noticed after a second at most.
    -> test_redis_layers.py::test_waiting_for_room_made_elsewhere
""",
    "docs/security.md": """
**Passwords and keys** of URLs, options and credential providers appear in no `repr`, log record or error message.
    -> test_redis_faults.py::test_errors_at_opening
       test_redis_faults.py::test_a_credential_provider
       test_redis_layers.py::test_repr_has_no_password
       test_address.py::test_names
       test_address.py::test_refused_hosts
       test_redis_sentinel.py::test_passwords
       test_codec.py::test_refused_options
       test_log.py::test_an_outage_is_two_lines

**TLS** verifies certificates and host names unless the URL says otherwise.
    -> test_address.py::test_tls_verifies_by_default
       test_address.py::test_how_much_tls_verifies
       test_server.py::test_tls_refuses_a_stranger

**Bytes that came through Redis** are data: MessagePack or JSON with strict limits, never pickle.
    -> test_codec.py::test_any_bytes
       test_codec.py::test_unreadable
       test_codec.py::test_refused_options

What cannot be read is skipped, counted and logged once.
    -> test_redis_faults.py::test_damaged_entries_in_queues
       test_redis_faults.py::test_damaged_messages_in_pubsub
       test_redis_faults.py::test_tokens_that_cannot_be_read

With `symmetric_encryption_keys`, what was not encrypted with one of the keys is not read.
    -> test_codec.py::test_the_wrong_key
       test_redis_faults.py::test_tokens_that_cannot_be_read

**Memory is bounded**: by capacity, by `max_message_size` of what is sent and of what arrives, and by expiry.
    -> check_capacity
       test_codec.py::test_the_size_of_what_arrives
       check_message_size
       check_expiry
       check_reclaimed
       test_protocol.py::test_an_announcement_that_is_too_large

A peer that sends what is no RESP3 loses its connection.
    -> test_protocol.py::test_everyone_is_told_of_the_end
       test_protocol.py::test_a_reply_of_a_wrong_type
       test_redis_faults.py::test_a_server_that_is_no_redis

They check what would break the protocol on the other side, in both directions alike (header names and values,
statuses, lengths of bodies), but do not replace a server's own limits.
    -> test_wsgi_to_asgi.py::test_start_response_refuses
       test_wsgi_to_asgi.py::test_no_more_goes_out_than_its_length
       test_asgi_to_wsgi.py::test_what_would_break_the_response_is_refused
       test_asgi_to_wsgi.py::test_a_body_that_is_not_what_was_said
       test_wsgi_servers.py::test_a_head_that_would_break_the_response
       test_wsgi_servers.py::test_a_response_longer_than_its_length

Encryption hides contents and makes forgery evident.
    -> test_codec.py::test_the_wrong_key
       test_codec.py::test_tokens_expire
""",
    "docs/wsgi.md": """
On asyncio and on trio.
    -> test_wsgi_to_asgi.py::test_a_request_and_its_response
       test_wsgi_servers.py::test_thousand_requests

Each request runs in one worker thread, from the call to the iterable's `close()`.
    -> test_wsgi_to_asgi.py::test_one_thread_for_all_of_a_request

`threads` / default: 40
    -> test_promises.py::test_defaults_of_the_adapters

`threads`: requests in the application at the same time; others wait. These threads are not anyio's default ones,
which only write the files of `spool`
    -> test_wsgi_to_asgi.py::test_threads_are_limited
       test_wsgi_to_asgi.py::test_a_small_response_to_a_slow_client_holds_no_thread

`buffer_size` / default: 256 KiB
    -> test_promises.py::test_defaults_of_the_adapters

`buffer_size`: of a body, and of a response, kept in memory
    -> test_wsgi_to_asgi.py::test_a_slow_client_slows_the_application
       test_wsgi_to_asgi.py::test_a_large_body_flows_at_the_pace_of_the_application

`spool` / default: `False`
    -> test_promises.py::test_defaults_of_the_adapters

`spool`: take in a large body, in a temporary file, before the application is called
    -> test_wsgi_to_asgi.py::test_bodies_of_any_size
       test_wsgi_to_asgi.py::test_the_client_goes_away_while_its_body_is_spooled

A body that fits the buffer is complete before a thread is taken; a response that fits it frees its thread before
the client has it.
    -> test_wsgi_to_asgi.py::test_a_small_body_is_there_before_the_application
       test_wsgi_to_asgi.py::test_a_small_response_to_a_slow_client_holds_no_thread

So clients that are slow with little cost no thread.
    -> test_wsgi_servers.py::test_many_slow_clients
       test_wsgi_servers.py::test_many_slow_uploads

A larger body is read by the application while it comes, a larger response goes out while it is made, both at the
pace of the slower side; with `spool=True` a slow upload costs disk space in the place of a thread.
    -> test_wsgi_to_asgi.py::test_what_has_come_of_a_large_body_is_read_at_once
       test_wsgi_to_asgi.py::test_a_large_body_flows_at_the_pace_of_the_application
       test_wsgi_to_asgi.py::test_a_slow_client_slows_the_application
       test_wsgi_to_asgi.py::test_the_client_goes_away_while_its_body_is_spooled

`wsgi.input` ends where the body does.
    -> test_wsgi_to_asgi.py::test_bodies_of_any_size

`CONTENT_LENGTH` is the length of what was received, where that is known before the application is called; with
`Transfer-Encoding`, which is decoded and left out, the client's own `Content-Length` does not count.
    -> test_wsgi_to_asgi.py::test_the_length_is_that_of_what_was_received
       test_wsgi_servers.py::test_two_lengths_of_a_body
       test_wsgi_servers.py::test_two_lengths_of_a_body_under_other_servers

**Django reads nothing of a body without `CONTENT_LENGTH`** ([ticket
35838](https://code.djangoproject.com/ticket/35838)): a chunked upload larger than `buffer_size` is an empty body
there, without an error.
    -> test_wsgi_servers.py::test_a_large_chunked_body_in_django

**Give Django `spool=True`**: then the length is always known.
    -> test_wsgi_servers.py::test_a_large_chunked_body_in_django

Each chunk goes out at once.
    -> test_wsgi_to_asgi.py::test_a_chunk_is_sent_before_the_next_is_made
       test_wsgi_servers.py::test_events

`write()`, a late `start_response`, `exc_info` and `wsgi.file_wrapper` do what PEP 3333 says.
    -> test_wsgi_to_asgi.py::test_write
       test_wsgi_to_asgi.py::test_write_and_a_list
       test_wsgi_to_asgi.py::test_start_response_is_called_late
       test_wsgi_to_asgi.py::test_an_error_page_replaces_what_was_not_sent
       test_wsgi_to_asgi.py::test_an_error_page_comes_too_late
       test_wsgi_to_asgi.py::test_file_wrapper

No more of a body goes out than its `Content-Length` says; a body that is shorter, or `write()` of more, is a
`RuntimeError`.
    -> test_wsgi_to_asgi.py::test_no_more_goes_out_than_its_length
       test_wsgi_to_asgi.py::test_a_stream_that_is_too_short
       test_wsgi_to_asgi.py::test_write_beyond_the_length_is_refused
       test_wsgi_servers.py::test_a_response_longer_than_its_length

Refused by `start_response`: a status outside 200 to 599, an invalid header name, a control character in a value,
and a `Content-Length` that is not a number or contradicts another.
    -> test_wsgi_to_asgi.py::test_start_response_refuses
       test_wsgi_servers.py::test_a_head_that_would_break_the_response

Fields of the connection, such as `Transfer-Encoding`, are left out.
    -> test_wsgi_to_asgi.py::test_fields_of_the_connection_are_left_out
       test_wsgi_servers.py::test_a_response_that_says_how_its_connection_is_used

A client that goes away cancels the request: the next read or write in the thread raises the exception of a
cancelled call, which is no `Exception`; `close()` is called.
    -> test_wsgi_to_asgi.py::test_the_client_goes_away_in_the_middle_of_its_body
       test_wsgi_to_asgi.py::test_the_client_goes_away_while_chunks_are_sent
       test_wsgi_servers.py::test_client_goes_while_the_response_comes

A view that computes for long can ask by `anyio.from_thread.check_cancelled()`.
    -> test_wsgi_to_asgi.py::test_an_application_asks_whether_the_client_is_gone

What the application raises goes to the server: its log, and a 500 if nothing was sent.
    -> test_wsgi_to_asgi.py::test_an_error_before_anything
       test_wsgi_servers.py::test_error_before_the_response

That holds for `SystemExit` and `KeyboardInterrupt` too: they arrive in a `BaseExceptionGroup` and end no server.
    -> test_wsgi_servers.py::test_an_application_that_exits

What the server's `send` raises is raised to the server, but for an `OSError` after it has told of the disconnect.
    -> test_wsgi_to_asgi.py::test_what_sending_raises
       test_wsgi_to_asgi.py::test_a_server_that_says_twice_that_the_client_is_gone

Header fields with an underscore in their name are left out: WSGI cannot tell them from those with a hyphen.
    -> test_wsgi_to_asgi.py::test_headers_that_come_twice_and_ambiguous_ones

WebSockets are refused with 403; `lifespan` is answered.
    -> test_wsgi_servers.py::test_websocket_is_refused
       test_wsgi_to_asgi.py::test_lifespan_is_answered

`environ["asgi.scope"]` is the scope.
    -> test_wsgi_to_asgi.py::test_environ

One event loop for the whole process runs all requests and the application's lifespan, on asyncio, uvloop or trio
(`AsgiToWsgi(app, "trio")`).
    -> test_asgi_to_wsgi.py::test_all_requests_of_a_process_share_one_loop
       test_asgi_to_wsgi.py::test_requests_and_responses

It starts with the first request, or with `application.open()`, and ends with `close()` or when the interpreter
exits; a forked worker starts its own.
    -> test_asgi_to_wsgi.py::test_lifespan
       test_asgi_to_wsgi.py::test_a_fork_has_an_event_loop_of_its_own
       test_wsgi_servers.py::test_lifespan_of_a_process_without_requests

A startup that fails is raised by each request.
    -> test_asgi_to_wsgi.py::test_a_startup_that_fails
       test_wsgi_servers.py::test_lifespan_that_fails_at_the_first_request

The server's thread reads a body of up to 64 KiB before the application is called, a larger one when the application
asks for it, and yields each chunk as it is sent, so server-sent events arrive one by one.
    -> test_asgi_to_wsgi.py::test_a_cancelled_receive_loses_nothing
       test_asgi_to_wsgi.py::test_chunks_come_as_they_are_sent
       test_wsgi_servers.py::test_events

The application is ahead by `buffer_size` (64 KiB) at most.
    -> test_asgi_to_wsgi.py::test_the_application_waits_for_a_slow_server
       test_promises.py::test_defaults_of_the_adapters

A body is never spooled: it is read piece by piece, and what a server keeps of it in front of that is its own.
    -> test_asgi_to_wsgi.py::test_a_cancelled_receive_loses_nothing
       test_wsgi_servers.py::test_large_body

The server closing the iterable cancels the application.
    -> test_asgi_to_wsgi.py::test_the_server_closes_the_response

Background tasks after a complete response go on without the thread.
    -> test_asgi_to_wsgi.py::test_background_tasks_go_on_after_the_response

While that thread waits for a piece of the body it can send nothing: a client that sends slowly delays an answer in
the middle.
    -> test_asgi_to_wsgi.py::test_nothing_is_sent_while_the_body_is_read

`send` checks the head of a response as `start_response` does in the other direction, and that the body is as long
as its `Content-Length`: what is wrong is raised to the application there.
    -> test_asgi_to_wsgi.py::test_what_would_break_the_response_is_refused
       test_asgi_to_wsgi.py::test_a_body_that_is_not_what_was_said

What the application raises before its response starts is raised to the server.
    -> test_asgi_to_wsgi.py::test_an_error_before_the_response

`SystemExit` and `KeyboardInterrupt` do what they do in any WSGI application: wsgiref logs them and answers 500,
waitress logs them and leaves the client without an answer, gunicorn's worker exits (with the exit codes 3 and 4,
gunicorn as a whole).
    -> test_asgi_to_wsgi.py::test_what_is_no_exception
       test_wsgi_servers.py::test_an_application_that_exits

WSGI has no WebSockets; a request for one is answered with 501.
    -> test_asgi_to_wsgi.py::test_websockets_are_refused

`scope["wsgi.environ"]` is the environment.
    -> test_asgi_to_wsgi.py::test_scope
""",
}

NO_PROMISE: Final[dict[str, str]] = {
    "docs/guarantees.md": """
First what each layer promises, and what the promise costs; then [the rules that hold for every
layer](#every-layer), and what is particular [in memory](#the-in-memory-layer) and [on Redis](#the-layers-on-redis).

In pictures: [How a message travels](how-it-travels.md).

What a `send` and a `receive` cost in microseconds is on the page [Benchmarks](benchmarks.md), for broadcasts to
many processes on the page [Scaling](scaling.md).

The same sentences stand in the docstrings of `BaseChannelLayer`.

What a slow reader of an inbox gets, in every layer:

Where the rules above leave a choice, or Redis sets a limit.

How to set them up, and what happens when Redis fails, is on the [page about them](redis.md).

Point by point, with the reasons, on the page [Deviations](deviations.md).
""",
    "docs/redis.md": """
Two layers connect processes, and hosts, through Redis (6.2 or newer; Valkey too): one server, one behind
[Sentinel](#sentinel), [several](#several-servers), or a [cluster](#cluster).

When to take which is on the page [Scaling](scaling.md).

Choose the queue layer where work is shared out or a message must wait for its reader; pub/sub for chat and
notifications.

And:

All processes must name the same servers in the same order.

Redis 7 or newer.

Nothing else shares a cluster with these layers, so three things differ:

`maxmemory-policy noeviction` is the right one: an evicting Redis throws away messages and memberships silently.

What is popped and not yet received is lost if the process is killed at that moment, or if the connection breaks
while it is on its way: delivery is at most once.
""",
    "docs/security.md": """
How to report a vulnerability, and what to expect of the package.

Please do not open a public issue.

Report privately to the maintainers, through the private security report of the site that hosts the repository.

Say which version, which layer and server, and how to reproduce it; a failing test is best.

You will get an answer within a week, and a fix or a plan within thirty days.

A fix is released with a changelog entry that names the vulnerability and whoever found it, if they want that.

Fixes go into the newest release.

Before 1.0 there are no others.

**The adapters** (`anyio_channels.wsgi`) pass on what servers give them.

**Channel and group names are no secret and no permission.**

Whoever can send to the layer can send to any channel, and whoever can reach the Redis can read, forge and delete
messages (forge and read: not with encryption keys).

Keep Redis on a private network, use an ACL user and TLS; [Layers on Redis](redis.md) has the permissions that it
needs.

It does not hide names, sizes and times, and whoever can write to Redis can send an encrypted message a second time
until it expires.

The demo is a demo: it authenticates nobody.
""",
    "docs/wsgi.md": """
Two adapters, for moving one application at a time.

Neither knows of channel layers; both are here because the parts that talk to each other rarely all speak the same
protocol.

`wsgi.input` is to be read in the request's own thread.

At the exit of the interpreter executors are closed already (`asyncio.to_thread` no longer works) and a shutdown
that never answers holds it up: an application whose shutdown does much is closed explicitly, in gunicorn's
`worker_exit` for example.

`gevent` and `eventlet` workers are not supported: they replace the threads that this is made of.
""",
}
