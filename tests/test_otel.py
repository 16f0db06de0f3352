"""OpenTelemetry around a layer: spans, the context that travels with a message, and metrics, with the real SDK."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import json
import re
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest
import redis.exceptions
from anyio import create_task_group
from conftest import Clock
from layers_on_redis import PUBSUB, QUEUE, Kind, both, new_prefix, until
from opentelemetry import baggage, metrics, trace
from opentelemetry import context as otel_context
from opentelemetry.metrics import NoOpMeterProvider
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.semconv._incubating.attributes import messaging_attributes
from opentelemetry.semconv.attributes import error_attributes, server_attributes
from opentelemetry.trace import NoOpTracerProvider, SpanKind, StatusCode
from redis_server import RedisServer, free_port
from traced import Telemetry

from anyio_channels import (
    BaseChannelLayer,
    ChannelFull,
    InMemoryChannelLayer,
    MessagesLost,
    MessageTooLarge,
    RedisChannelLayer,
    RedisPubSubChannelLayer,
)
from anyio_channels.otel import _GROWING, _METRICS, CONTEXT_KEY, OpenTelemetryChannelLayer, message_context
from anyio_channels.sync import SyncChannelLayer

pytestmark = [pytest.mark.anyio, pytest.mark.two_loops]


@pytest.fixture
def telemetry() -> Telemetry:
    return Telemetry()


@pytest.fixture
def traced_layer(telemetry: Telemetry, layer: InMemoryChannelLayer) -> OpenTelemetryChannelLayer:
    return telemetry.wrap(layer)


def ids(span: ReadableSpan) -> tuple[int, int]:
    assert span.context is not None
    return span.context.trace_id, span.context.span_id


def parent(span: ReadableSpan) -> tuple[int, int] | None:
    return None if span.parent is None else (span.parent.trace_id, span.parent.span_id)


def links(span: ReadableSpan) -> list[tuple[int, int]]:
    return [(link.context.trace_id, link.context.span_id) for link in span.links]


def attributes(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


# Spans


async def test_a_message_is_two_spans_of_one_trace(
    telemetry: Telemetry, traced_layer: OpenTelemetryChannelLayer
) -> None:
    """The receiver's span is in the trace of the sender's, with the names of the conventions; the message is as it was sent."""
    await traced_layer.send("jobs", {"type": "job"})
    assert await traced_layer.receive("jobs") == {"type": "job"}
    sent, received = telemetry.spans()
    assert (sent.name, sent.kind, sent.status.status_code) == ("send jobs", SpanKind.PRODUCER, StatusCode.UNSET)
    assert attributes(sent) == {
        "messaging.system": "anyio_channels",
        "anyio_channels.layer": "InMemoryChannelLayer",
        "messaging.operation.name": "send",
        "messaging.operation.type": "send",
        "messaging.destination.name": "jobs",
    }
    assert (received.name, received.kind) == ("receive jobs", SpanKind.CONSUMER)
    assert (
        attributes(received)["messaging.operation.name"]
        == attributes(received)["messaging.operation.type"]
        == "receive"
    )
    assert attributes(received)["messaging.destination.name"] == "jobs"
    assert parent(received) == ids(sent)
    assert links(received) == [ids(sent)]


async def test_names_are_those_of_the_conventions(telemetry: Telemetry) -> None:
    """Every attribute that is not called after this package is one that OpenTelemetry's own list of names has."""
    layer = telemetry.wrap(RedisChannelLayer([("localhost", 1)]))
    with pytest.raises(RuntimeError):
        await layer.send("specific.a!b", {})
    (span,) = telemetry.spans()
    known = {
        value
        for module in (messaging_attributes, server_attributes, error_attributes)
        for name, value in vars(module).items()
        if name.isupper() and isinstance(value, str)
    }
    names = {name for name in attributes(span) if not name.startswith("anyio_channels.")}
    assert len(names) == 9
    assert names <= known


async def test_a_broadcast(telemetry: Telemetry, traced_layer: OpenTelemetryChannelLayer) -> None:
    """One span for the sender, one for each receiver; the names of inboxes, which are made up, name no span."""
    async with traced_layer, traced_layer.subscribe("room") as one, traced_layer.subscribe("room") as two:
        await traced_layer.group_send("room", {"n": 1}, exclude=["other"])
        assert [await one.receive(), await two.receive()] == [{"n": 1}] * 2
        sent, first, second = telemetry.spans()
        assert sent.name == "group_send room"
        assert sent.kind is SpanKind.PRODUCER
        assert attributes(sent)["messaging.operation.name"] == "group_send"
        assert attributes(sent)["messaging.operation.type"] == "send"
        for span, inbox in ((first, one), (second, two)):
            assert span.name == "receive"
            assert attributes(span)["messaging.destination.name"] == inbox.channel
            assert attributes(span)["messaging.destination.temporary"] is True
            assert attributes(span)["messaging.destination.anonymous"] is True
            assert parent(span) == ids(sent)


async def test_within_a_span(telemetry: Telemetry, traced_layer: OpenTelemetryChannelLayer) -> None:
    """The current span is the parent of both; then the receiver's is linked to the sender's, and can go on in that trace."""
    with telemetry.tracer.start_as_current_span("sender"):
        await traced_layer.send("jobs", {})
    with telemetry.tracer.start_as_current_span("connection"):
        await traced_layer.receive("jobs")
        with telemetry.tracer.start_as_current_span("handle", message_context()):
            pass
    sent, sender, received, handle, connection = telemetry.spans()
    assert parent(sent) == ids(sender)
    assert parent(received) == ids(connection)
    assert links(received) == [ids(sent)]
    assert parent(handle) == ids(sent)


async def test_the_context_of_a_message(telemetry: Telemetry, traced_layer: OpenTelemetryChannelLayer) -> None:
    """Without a span around it, what handles the message is below the span of receiving it; with the sender's baggage."""
    token = otel_context.attach(baggage.set_baggage("tenant", "blue"))
    await traced_layer.send("jobs", {})
    otel_context.detach(token)
    await traced_layer.receive("jobs")
    assert baggage.get_baggage("tenant", message_context()) == "blue"
    assert baggage.get_baggage("tenant") is None
    with telemetry.tracer.start_as_current_span("handle", message_context()):
        pass
    sent, received, handle = telemetry.spans()
    assert ids(sent)[0] == ids(handle)[0]
    assert parent(handle) == ids(received)


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_synchronous_code(backend: str, telemetry: Telemetry) -> None:
    """A thread's current span is the parent of what it sends, and message_context() is that of what it received."""
    with SyncChannelLayer(telemetry.wrap(InMemoryChannelLayer()), backend=backend) as layer:
        with layer.subscribe("room") as inbox, telemetry.tracer.start_as_current_span("request"):
            layer.send("jobs", {"n": 1})
            layer.group_send("room", {"n": 2})
            for receive in (partial(layer.receive, "jobs"), inbox.receive):
                receive()
                with telemetry.tracer.start_as_current_span("handle", message_context()):
                    pass
    sent, broadcast, _, first, _, second, request = telemetry.spans()
    assert parent(sent) == parent(broadcast) == ids(request)
    assert parent(first) == ids(sent)
    assert parent(second) == ids(broadcast)


async def test_the_context_of_no_message(telemetry: Telemetry, traced_layer: OpenTelemetryChannelLayer) -> None:
    """Who received nothing goes on in the current context; a task has that of the message it received itself."""

    async def another() -> None:
        await traced_layer.receive("jobs")

    def nothing() -> None:
        with telemetry.tracer.start_as_current_span("alone") as span:
            assert trace.get_current_span(message_context()) is span

    contextvars.Context().run(nothing)
    await traced_layer.send("jobs", {"n": 1})
    await traced_layer.send("jobs", {"n": 2})
    await traced_layer.receive("jobs")
    before = message_context()
    async with create_task_group() as tg:
        tg.start_soon(another)
    assert message_context() is before


async def test_a_message_from_a_sender_without(telemetry: Telemetry, traced_layer: OpenTelemetryChannelLayer) -> None:
    """It is received in a trace of its own."""
    await traced_layer.layer.send("jobs", {"n": 1})
    assert await traced_layer.receive("jobs") == {"n": 1}
    with telemetry.tracer.start_as_current_span("handle", message_context()):
        pass
    received, handle = telemetry.spans()
    assert (parent(received), links(received)) == (None, [])
    assert parent(handle) == ids(received)


@pytest.mark.parametrize(
    "value",
    [
        None,
        5,
        "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
        [],
        {},
        {"traceparent": None},
        {"traceparent": 5, "tracestate": {"a": []}, "baggage": b"\xff"},
        {"traceparent": "00-00000000000000000000000000000000-0000000000000000-00"},
        {"traceparent": "é" * 1000, "tracestate": ",,=,=", "baggage": "%%%;=;,==,\x00"},
        {"traceparent": ["00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"]},
    ],
)
async def test_a_foreign_value_under_the_key(
    value: Any, telemetry: Telemetry, traced_layer: OpenTelemetryChannelLayer
) -> None:
    """Whatever somebody else put there stops no reader, and is gone from the message."""
    await traced_layer.layer.send("jobs", {"n": 1, CONTEXT_KEY: value})
    assert await traced_layer.receive("jobs") == {"n": 1}
    (received,) = telemetry.spans()
    assert (parent(received), links(received)) == (None, [])


async def test_a_context_of_ones_own(telemetry: Telemetry, traced_layer: OpenTelemetryChannelLayer) -> None:
    """A message that has a context already keeps it, and the sender's span is linked to it."""
    carrier = {"traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"}
    there = (0x4BF92F3577B34DA6A3CE929D0E0E4736, 0x00F067AA0BA902B7)
    await traced_layer.send("jobs", {CONTEXT_KEY: carrier})
    assert await traced_layer.receive("jobs") == {}
    sent, received = telemetry.spans()
    assert links(sent) == links(received) == [there]
    assert parent(received) == there


async def test_a_trace_that_is_not_sampled(layer: InMemoryChannelLayer) -> None:
    """The sender's decision travels too: the receiver's spans are not recorded, though it samples all by itself."""
    off = OpenTelemetryChannelLayer(
        layer, tracer_provider=TracerProvider(ALWAYS_OFF, shutdown_on_exit=False), meter_provider=NoOpMeterProvider()
    )
    telemetry = Telemetry()
    on = telemetry.wrap(layer)
    await off.send("jobs", {"n": 1})
    assert await on.receive("jobs") == {"n": 1}
    assert not trace.get_current_span(message_context()).is_recording()
    assert telemetry.spans() == []


async def test_the_api_alone(layer: InMemoryChannelLayer) -> None:
    """Without an SDK nothing is added to a message, and what comes from elsewhere passes through."""
    carrier = {"traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"}
    plain = OpenTelemetryChannelLayer(layer, tracer_provider=NoOpTracerProvider(), meter_provider=NoOpMeterProvider())
    async with plain:
        await plain.send("jobs", {"n": 1})
        assert layer.receive_nowait("jobs") == {"n": 1}
        await layer.send("jobs", {CONTEXT_KEY: carrier})
        assert await plain.receive("jobs") == {}
        token = otel_context.attach(message_context())
        await plain.send("next", {})
        otel_context.detach(token)
        assert layer.receive_nowait("next") == {CONTEXT_KEY: carrier}
        token = otel_context.attach(otel_context.set_value("something", "of this process"))
        await plain.send("last", {"n": 2})
        otel_context.detach(token)
        assert layer.receive_nowait("last") == {"n": 2}


async def test_without_an_event_loop_s_help(telemetry: Telemetry, traced_layer: OpenTelemetryChannelLayer) -> None:
    """The plain functions of the in-memory layer are traced too."""
    async with traced_layer.subscribe("room") as inbox:
        traced_layer.send_nowait("jobs", {"n": 1})
        traced_layer.group_send_nowait("room", {"n": 2}, exclude=["other"])
        assert traced_layer.receive_nowait("jobs") == {"n": 1}
        assert traced_layer.receive_nowait(inbox.channel) == {"n": 2}
        with pytest.raises(anyio.WouldBlock):
            traced_layer.receive_nowait("jobs")
    assert [span.name for span in telemetry.spans()] == ["send jobs", "group_send room", "receive jobs", "receive"]
    elsewhere = telemetry.wrap(RedisChannelLayer())
    for call in (elsewhere.send_nowait, elsewhere.group_send_nowait):
        with pytest.raises(NotImplementedError, match=f"RedisChannelLayer has no {call.__name__}"):
            call("a", {})
    with pytest.raises(NotImplementedError, match="RedisChannelLayer has no receive_nowait"):
        elsewhere.receive_nowait("a")


# What goes wrong


async def test_errors_are_in_the_spans(telemetry: Telemetry, traced_layer: OpenTelemetryChannelLayer) -> None:
    """A call that raised says with what; the text only where it can say nothing of the message."""

    def refuse(_: object) -> Any:
        raise LookupError("secret")

    for _ in range(5):
        await traced_layer.send("jobs", {})
    telemetry.spans()
    calls: list[tuple[Callable[[], Any], type[Exception]]] = [
        (lambda: traced_layer.send("jobs", {}), ChannelFull),
        (lambda: traced_layer.send("a", {"secret": {1}}), TypeError),
        (lambda: traced_layer.send("a" * 1000, {}), TypeError),
        (lambda: traced_layer.send(5, {}), TypeError),  # type: ignore[arg-type]
        (lambda: traced_layer.send("a", "secret"), TypeError),  # type: ignore[arg-type]
        (lambda: traced_layer.group_send("é", {}), TypeError),
        (lambda: traced_layer.receive("a b"), TypeError),
    ]
    for call, kind in calls:
        with pytest.raises(kind):
            await call()
        (span,) = telemetry.spans()
        assert span.status.status_code is StatusCode.ERROR
        name = kind.__name__ if kind is TypeError else "anyio_channels.exceptions.ChannelFull"
        assert attributes(span)["error.type"] == name
        assert span.status.description == (
            "channel 'jobs' holds 5 unexpired messages, its capacity" if kind is ChannelFull else None
        )
        assert len(span.name) < 150
        assert "secret" not in span.to_json()
    picky = telemetry.wrap(InMemoryChannelLayer(default=refuse))
    with pytest.raises(LookupError):
        await picky.send("a", {"a": {1}})
    (span,) = telemetry.spans()
    assert (attributes(span)["error.type"], span.status.description) == ("LookupError", None)


async def test_a_gap_is_in_the_spans(telemetry: Telemetry, traced_layer: OpenTelemetryChannelLayer) -> None:
    """What a reader gets in the place of lost messages is a span: an event without a sender, or an error."""
    async with (
        traced_layer.subscribe("room", capacity=1, on_gap="raise") as raises,
        traced_layer.subscribe("room", capacity=1, on_gap="event") as tells,
    ):
        await traced_layer.group_send("room", {"n": 1})
        await traced_layer.group_send("room", {"n": 2})
        for inbox in (raises, tells):
            assert await inbox.receive() == {"n": 1}
        telemetry.spans()
        with pytest.raises(MessagesLost):
            await raises.receive()
        assert await tells.receive() == {"type": "channel_layer.gap", "missed": 1}
        lost, event = telemetry.spans()
    assert attributes(lost)["error.type"] == "anyio_channels.exceptions.MessagesLost"
    assert lost.status.description == "1 message was missed here"
    assert (event.status.status_code, links(event)) == (StatusCode.UNSET, [])


async def test_a_cancelled_receive_leaves_no_span(
    telemetry: Telemetry, traced_layer: OpenTelemetryChannelLayer
) -> None:
    """It took nothing and is no span, and neither is a reader whose layer is closed."""
    async with traced_layer, create_task_group() as tg:
        tg.start_soon(traced_layer.receive, "jobs")
        await anyio.wait_all_tasks_blocked()
        tg.cancel_scope.cancel()
    async with traced_layer:
        assert telemetry.spans() == []
        await traced_layer.send("jobs", {"n": 1})
        assert await traced_layer.receive("jobs") == {"n": 1}
        telemetry.spans()
    with pytest.raises(anyio.ClosedResourceError):
        await traced_layer.receive("jobs")
    assert telemetry.spans() == []


async def test_a_cancelled_send_ends_its_span(telemetry: Telemetry, traced_layer: OpenTelemetryChannelLayer) -> None:
    """It is marked as cancelled, in the same words on every backend, and nothing was sent."""
    for _ in range(5):
        await traced_layer.send("jobs", {})
    telemetry.spans()
    async with create_task_group() as tg:
        tg.start_soon(lambda: traced_layer.send("jobs", {}, wait=True))
        await anyio.wait_all_tasks_blocked()
        assert telemetry.spans() == []
        tg.cancel_scope.cancel()
    (span,) = telemetry.spans()
    assert (span.status.status_code, span.status.description) == (StatusCode.ERROR, "cancelled")
    assert attributes(span)["error.type"] == "cancelled"
    assert traced_layer.statistics().sent == 5
    assert trace.get_current_span() is trace.INVALID_SPAN


@pytest.mark.parametrize("anyio_backend", [("asyncio", {"use_uvloop": use}) for use in (False, True)])
async def test_asyncio_s_own_cancellation(telemetry: Telemetry, traced_layer: OpenTelemetryChannelLayer) -> None:
    """Task.cancel() between the message's coming and the reader's waking takes nothing; a sender's span is ended."""
    reader = asyncio.create_task(traced_layer.receive("jobs"))
    await anyio.wait_all_tasks_blocked()
    await traced_layer.send("jobs", {"n": 1})
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    assert [span.name for span in telemetry.spans()] == ["send jobs"]
    assert await asyncio.wait_for(traced_layer.receive("jobs"), 10) == {"n": 1}
    for _ in range(5):
        await traced_layer.send("jobs", {})
    telemetry.spans()
    sender = asyncio.create_task(traced_layer.send("jobs", {}, wait=True))
    await anyio.wait_all_tasks_blocked()
    sender.cancel()
    with pytest.raises(asyncio.CancelledError):
        await sender
    (span,) = telemetry.spans()
    assert attributes(span)["error.type"] == "cancelled"


@pytest.mark.parametrize("nowait", [False, True])
async def test_the_context_makes_no_message_too_large(nowait: bool, telemetry: Telemetry) -> None:
    """What fits without the context of the trace is sent without it, and the span says so; what does not fit is refused."""
    layer = telemetry.wrap(InMemoryChannelLayer(max_message_size=200))

    async def send(message: dict[str, Any], group: bool) -> None:
        if nowait:
            (layer.group_send_nowait if group else layer.send_nowait)("a", message)
        else:
            await (layer.group_send if group else layer.send)("a", message)

    await layer.group_add("a", "a")
    for group in (False, True):
        for size in (10, 190):
            await send({"text": "x" * size}, group)
            assert await layer.receive("a") == {"text": "x" * size}
            sent, received = telemetry.spans()
            assert len(links(received)) == (size == 10)
            assert attributes(sent).get("anyio_channels.context_left_out") is (True if size == 190 else None)
            assert sent.status.status_code is StatusCode.UNSET
        for message in ({"text": "x" * 200}, {"text": "x" * 200, CONTEXT_KEY: {}}):
            with pytest.raises(MessageTooLarge):
                await send(message, group)
            (span,) = telemetry.spans()
            assert attributes(span)["error.type"] == "anyio_channels.exceptions.MessageTooLarge"


class Breaks(SpanProcessor):
    """A part of somebody's set-up that raises where it must not."""

    def __init__(self) -> None:
        self.where = ""

    def on_start(self, span: Span, parent_context: Any = None) -> None:
        if self.where == "start":
            raise ValueError("broken at the start")

    def on_end(self, span: ReadableSpan) -> None:
        if self.where == "end":
            raise ValueError("broken at the end")


@pytest.mark.parametrize("where", ["start", "end"])
async def test_what_breaks_in_opentelemetry_loses_nothing(
    where: str, layer: InMemoryChannelLayer, caplog: pytest.LogCaptureFixture
) -> None:
    """Messages are sent and received, errors are the caller's own, and it is logged once."""
    breaks = Breaks()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(breaks)
    traced = OpenTelemetryChannelLayer(layer, tracer_provider=provider, meter_provider=NoOpMeterProvider())
    breaks.where = where
    async with traced:
        for number in range(3):
            await traced.send("jobs", {"n": number})
            assert await traced.receive("jobs") == {"n": number}
        with pytest.raises(TypeError, match="Channel name must be"):
            await traced.receive("a b")
    assert trace.get_current_span() is trace.INVALID_SPAN
    records = [record.__dict__ for record in caplog.records]
    assert [record["anyio_channels_event"] for record in records] == ["telemetry.failed"] * 2
    assert [record["anyio_channels_count"] for record in records] == [1, 6]
    assert f"ValueError('broken at the {where}')" in records[0]["anyio_channels_error"]


# Metrics


def named(metrics: dict[str, dict[str, int]], layer: str) -> dict[str, int]:
    """The metrics of one layer; those with a reason by it."""
    found: dict[str, int] = {}
    for name, values in metrics.items():
        for key, value in values.items():
            who, _, reason = key.partition(" ")
            if who == layer:
                found[f"{name.removeprefix('anyio_channels.')}{' ' * bool(reason)}{reason}"] = value
    return found


async def test_metrics_are_the_statistics(telemetry: Telemetry, layer: InMemoryChannelLayer, clock: Clock) -> None:
    """While the layer is open each number of its statistics is a metric; afterwards what it counted still is."""
    traced = telemetry.wrap(layer, name="chat")
    assert telemetry.metrics() == {}
    async with traced, create_task_group() as tg:
        async with traced.subscribe("room", capacity=2), traced.subscribe("room", capacity=1):
            tg.start_soon(traced.receive, "idle")
            for number in range(2):
                await traced.group_send("room", {"n": number})
            await traced.send("jobs", {})
            await traced.receive("jobs")
            await anyio.wait_all_tasks_blocked()
            assert named(telemetry.metrics(), "chat") == {
                "channels": 2,
                "buffered.messages": 3,
                "groups": 1,
                "members": 2,
                "waiting.receivers": 1,
                "sent.messages": 5,
                "received.messages": 1,
                "expired.messages": 0,
                "dropped.messages full": 1,
                "dropped.messages unreadable": 0,
                "discarded.messages": 0,
            }
            clock.advance(10)
            assert named(telemetry.metrics(), "chat")["expired.messages"] == 3
        tg.cancel_scope.cancel()
    left = named(telemetry.metrics(), "chat")
    assert (left["sent.messages"], left["expired.messages"]) == (5, 3)
    assert not {"channels", "groups", "members", "buffered.messages", "waiting.receivers"} & left.keys()
    async with traced:  # the layer counts from zero again; a counter does not
        await traced.send("jobs", {})
        assert named(telemetry.metrics(), "chat")["sent.messages"] == 6
        assert traced.statistics().sent == 1


async def test_metrics_of_several_layers(telemetry: Telemetry) -> None:
    """Layers of one name are added up, others told apart; a layer that cannot say is left out, and does not hide the others."""

    class Silent(InMemoryChannelLayer):
        def statistics(self) -> Any:
            raise LookupError("no statistics here")

    one, two = telemetry.wrap(InMemoryChannelLayer()), telemetry.wrap(InMemoryChannelLayer())
    other, silent = telemetry.wrap(InMemoryChannelLayer(), name="other"), telemetry.wrap(Silent())
    elsewhere = Telemetry().wrap(InMemoryChannelLayer(), name="elsewhere")
    async with one, two, other, elsewhere, silent:
        for layer in (one, two, other, elsewhere):
            await layer.send("a", {})
        assert telemetry.metrics()["anyio_channels.sent.messages"] == {"InMemoryChannelLayer": 2, "other": 1}
        await one.close()
        assert telemetry.metrics()["anyio_channels.sent.messages"] == {"InMemoryChannelLayer": 2, "other": 1}
    assert telemetry.metrics()["anyio_channels.sent.messages"] == {"InMemoryChannelLayer": 2, "other": 1}


async def test_metrics_of_the_process(telemetry: Telemetry, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer without a provider of its own goes to that of the process, also if it is set when the layer is open."""
    monkeypatch.setattr("anyio_channels.otel._OF_THE_PROCESS", threading.Event())
    early = OpenTelemetryChannelLayer(InMemoryChannelLayer(), name="early")
    explicit = OpenTelemetryChannelLayer(
        InMemoryChannelLayer(), name="explicit", meter_provider=telemetry.meter_provider
    )
    async with early, explicit:
        monkeypatch.setattr(metrics, "get_meter_provider", lambda: telemetry.meter_provider)
        late = OpenTelemetryChannelLayer(InMemoryChannelLayer(), name="late")
        async with late:
            assert set(telemetry.metrics()["anyio_channels.channels"]) == {"early", "explicit", "late"}


async def test_instruments_that_cannot_be_made(caplog: pytest.LogCaptureFixture) -> None:
    """The layer opens without metrics, and it is logged."""

    class Refuses(NoOpMeterProvider):
        def get_meter(self, *args: Any, **options: Any) -> Any:
            raise LookupError("no meters today")

    layer = OpenTelemetryChannelLayer(InMemoryChannelLayer(), meter_provider=Refuses())
    async with layer:
        await layer.send("a", {})
    assert [record.__dict__["anyio_channels_error"] for record in caplog.records] == ["LookupError('no meters today')"]


async def test_a_layer_left_open(telemetry: Telemetry) -> None:
    """Metrics keep no layer alive: one that is forgotten open is collected, with the warning that tells it."""
    layer = telemetry.wrap(InMemoryChannelLayer())
    await layer.__aenter__()
    gone = weakref.ref(layer)
    del layer
    with pytest.warns(ResourceWarning, match="unclosed channel layer"):
        gc.collect()
    assert gone() is None
    assert telemetry.metrics() == {}


def test_the_table_of_metrics_is_the_code() -> None:
    """The page lists each metric with its instrument, its unit and the statistics that it shows."""
    page = (Path(__file__).parent.parent / "docs" / "observability.md").read_text()
    rows = re.findall(r"^\| `(anyio_channels\.[a-z.]+)` \| ([a-z -]+) \| `([^`]+)` \| (.+) \|$", page, re.MULTILINE)
    documented = {
        name: (unit, instrument, tuple(re.findall(r"`(\w+)`", source.partition(", as")[0])))
        for name, instrument, unit, source in rows
    }
    assert documented == {
        name: (unit, "counter" if fields[0] in _GROWING else "up-down counter", fields)
        for name, unit, _, fields in _METRICS
    }


# Opening and closing, and what it says of itself


async def test_it_opens_and_closes_with_the_layer(telemetry: Telemetry, layer: InMemoryChannelLayer) -> None:
    """It can be opened once at a time, closed twice, and opened again; the wrapped layer is open and closed with it."""
    traced = telemetry.wrap(layer)
    for _ in range(2):
        async with traced:
            with pytest.raises(RuntimeError, match="already open"):
                await traced.__aenter__()
            with pytest.raises(RuntimeError, match="already open"):
                await layer.__aenter__()
            await traced.close()
        with pytest.raises(anyio.ClosedResourceError):
            await layer.send("a", {})
        await traced.close()
    async with layer:
        with pytest.raises(RuntimeError, match="already open"):
            await traced.__aenter__()
    assert repr(traced) == f"<OpenTelemetryChannelLayer of {layer!r}>"


async def test_it_has_what_the_layer_has(telemetry: Telemetry) -> None:
    """Options, names and capacities are those of the wrapped layer."""

    class Bare(InMemoryChannelLayer):
        extensions = ["groups"]  # noqa: RUF012 - as the specification has it

    traced = telemetry.wrap(Bare(5, 50, 7, {"big.*": 9}, max_message_size=1000, default=str))
    assert (traced.expiry, traced.capacity, traced.max_message_size, traced.default) == (5, 7, 1000, str)
    assert (traced.get_capacity("big.one"), traced.get_capacity("a")) == (9, 7)
    assert traced.extensions == ["groups"]
    assert traced.server is None
    async with traced:
        assert "!" in await traced.new_channel("mine.")
        await traced.group_add("room", "a")
        assert await traced.group_channels("room") == {"a"}
        await traced.group_discard("room", "a")
        async with traced.subscribe("room") as inbox:
            await inbox.leave("room")
            assert await traced.group_channels("room") == set()
        await traced.send("a", {})
        await traced.flush()
        assert traced.statistics().buffered_messages == 0


def test_what_cannot_be_wrapped() -> None:
    """A value that is no layer, or no name, is refused by name."""
    with pytest.raises(TypeError, match="has OpenTelemetry already; around it twice"):
        OpenTelemetryChannelLayer(OpenTelemetryChannelLayer(InMemoryChannelLayer()))
    with pytest.raises(TypeError, match="layer must be a BaseChannelLayer, not 'memory://'"):
        OpenTelemetryChannelLayer("memory://")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="name must be a str, not 5"):
        OpenTelemetryChannelLayer(InMemoryChannelLayer(), name=5)  # type: ignore[arg-type]


# Redis


@both
async def test_on_redis(kind: Kind, redis_server: RedisServer, telemetry: Telemetry) -> None:
    """Spans name the server; connections, reconnects and commands are metrics too, also for a thread that collects them."""
    layer = telemetry.wrap(kind.layer_class([redis_server.url], prefix=new_prefix()))
    async with layer, layer.subscribe("room") as inbox:
        telemetry.metrics()
        await layer.group_send("room", {"n": 1})
        assert await inbox.receive() == {"n": 1}
        sent, received = telemetry.spans()
        assert parent(received) == ids(sent)
        assert attributes(sent)["server.address"] == redis_server.host
        assert attributes(sent)["server.port"] == redis_server.port
        here = named(telemetry.metrics(), kind.layer_class.__name__)
        there = named(await anyio.to_thread.run_sync(telemetry.metrics), kind.layer_class.__name__)
        assert here["connections"] >= 1
        assert here["reconnects"] == 0
        assert here["commands"] > 0
        assert there.keys() == here.keys()
        assert there["received.messages"] == 1
    left = named(telemetry.metrics(), kind.layer_class.__name__)
    assert left["received.messages"] == 1
    assert left["commands"] >= here["commands"]
    assert "connections" not in left


def test_which_server() -> None:
    """The one server, by host and port or unix socket; none where there are several."""
    assert RedisChannelLayer([("example.org", 6380)]).server == ("example.org", 6380)
    assert RedisChannelLayer(["unix:///run/redis.sock"]).server == ("/run/redis.sock", None)
    assert RedisPubSubChannelLayer([("one", 1), ("two", 2)]).server is None
    assert RedisChannelLayer(["redis://one:1"], cluster=True).server is None
    assert RedisChannelLayer([{"sentinels": [("one", 1)], "master_name": "main"}]).server is None
    assert BaseChannelLayer().server is None
    assert SyncChannelLayer(RedisChannelLayer([("one", 1)])).server == ("one", 1)
    span = Telemetry()
    layer = span.wrap(RedisChannelLayer(["unix:///run/redis.sock"]))
    assert layer.server == ("/run/redis.sock", None)
    assert "server.port" not in layer._attributes


@both
async def test_a_redis_that_is_away(kind: Kind, telemetry: Telemetry) -> None:
    """An error of Redis is in the span, with its text; it names the server, and no password."""
    port = free_port()
    layer = telemetry.wrap(kind.layer_class([f"redis://:s3cret@127.0.0.1:{port}"], connect_timeout=0.2))
    with pytest.raises(redis.exceptions.ConnectionError):
        await layer.__aenter__()
    assert telemetry.metrics() == {}
    with pytest.raises(RuntimeError, match="is not open"):
        await layer.send("a", {})
    (span,) = telemetry.spans()
    assert (attributes(span)["error.type"], span.status.description) == ("RuntimeError", None)


@both
async def test_a_lost_connection_is_in_the_span(kind: Kind, redis_server: RedisServer, telemetry: Telemetry) -> None:
    """A call that Redis did not answer says so in its span."""
    layer = telemetry.wrap(kind.layer_class([redis_server.url], prefix=new_prefix(), timeout=0.2))
    async with layer:
        redis_server.pause()
        try:
            with pytest.raises(redis.exceptions.ConnectionError):
                await layer.send("a", {})
        finally:
            redis_server.resume()
        (span,) = telemetry.spans()
        assert attributes(span)["error.type"].startswith("anyio_channels.redis.client.errors.Connection")
        assert f"{redis_server.host}:{redis_server.port}" in str(span.status.description)
        await until(lambda: layer.statistics().waiting_receivers == 0)


@pytest.mark.parametrize(
    ("kind", "worker_backend"), [(QUEUE, "asyncio"), (PUBSUB, "trio")], ids=["queue-asyncio", "pubsub-trio"]
)
async def test_a_trace_crosses_processes(
    kind: Kind, worker_backend: str, redis_server: RedisServer, telemetry: Telemetry
) -> None:
    """What another process does with a message is in the sender's trace, below the sender's span; baggage comes along."""
    prefix, url = new_prefix(), redis_server.url
    worker_url = url if kind is QUEUE else url.replace("redis://", "redis+pubsub://")
    layer = telemetry.wrap(kind.layer_class([url], prefix=prefix))
    command = [
        sys.executable,
        str(Path(__file__).with_name("otel_worker.py")),
        worker_backend,
        worker_url,
        prefix,
        "room",
    ]
    async with layer, await anyio.open_process(command, stderr=None) as process:
        assert process.stdout is not None
        output = b""
        while b"\n" not in output:
            output += await process.stdout.receive()
        token = otel_context.attach(baggage.set_baggage("tenant", "blue"))
        with telemetry.tracer.start_as_current_span("request"):
            await layer.group_send("room", {"n": 1})
        otel_context.detach(token)
        output += b"".join([chunk async for chunk in process.stdout])
    sent, request = telemetry.spans()
    told = json.loads(output.partition(b"\n")[2])
    received, handle = told["spans"]
    assert told["message"] == {"n": 1}
    assert told["baggage"] == {"tenant": "blue"}
    assert [sent.name, received["name"], handle["name"]] == ["group_send room", "receive", "handle"]
    assert ids(request)[0] == ids(sent)[0] == received["trace_id"] == handle["trace_id"]
    assert (received["parent"], received["links"]) == (ids(sent)[1], [list(ids(sent))])
    assert handle["parent"] == received["span_id"]


async def test_one_that_is_not_instrumented_sees_the_key(redis_server: RedisServer, telemetry: Telemetry) -> None:
    """A layer without OpenTelemetry gives its reader the message with the context in it."""
    prefix = new_prefix()
    plain = PUBSUB.layer_class([redis_server.url], prefix=prefix)
    layer = telemetry.wrap(PUBSUB.layer_class([redis_server.url], prefix=prefix))
    async with plain, layer, plain.subscribe("room") as inbox:
        await layer.group_send("room", {"n": 1})
        message = await inbox.receive()
        assert list(message) == ["n", CONTEXT_KEY]
        assert list(message[CONTEXT_KEY]) == ["traceparent"]


def test_without_the_extra() -> None:
    """Importing the module without OpenTelemetry is an error that names the extra; the rest of the package needs none."""
    code = (
        "import sys; sys.modules['opentelemetry'] = None\n"
        "import anyio_channels\n"
        "try: import anyio_channels.otel\n"
        "except ImportError as error: print(error)"
    )
    result = subprocess.run([sys.executable, "-P", "-c", code], check=True, capture_output=True, text=True)
    assert result.stdout.strip() == "anyio_channels.otel needs an extra: pip install 'anyio_channels[otel]'"
