"""Any layer with OpenTelemetry: spans for what is sent and received, traces that cross processes, metrics.

Rules:
- a layer around a layer: who does not use it pays nothing. What it does beyond the wrapped layer is here; the contract is the
  wrapped layer's.
- the trace's context travels in the message, under ``CONTEXT_KEY``, and is taken out before the receiver gets the message.
- nothing here waits, so what a cancelled call leaves behind is what the wrapped layer says. A message that was taken is
  handed over, whatever OpenTelemetry does: its errors are logged and go no further.
- names are those of OpenTelemetry's semantic conventions for messaging, as of version 1.44 of them, which call themselves
  "development": https://opentelemetry.io/docs/specs/semconv/messaging/messaging-spans/
- no contents of a message are in a span, nor in the text of an error there.
"""

from __future__ import annotations

import reprlib
import threading
from collections.abc import Callable, Collection, Iterable
from contextvars import ContextVar, Token
from dataclasses import fields
from time import monotonic
from types import TracebackType
from typing import Any, Final, Self, TypeAlias
from weakref import WeakKeyDictionary, WeakSet

from anyio import ClosedResourceError

try:
    from opentelemetry import context as otel_context
    from opentelemetry import metrics, propagate, trace
    from opentelemetry.context import Context
    from opentelemetry.metrics import CallbackOptions, MeterProvider, Observation
    from opentelemetry.trace import INVALID_SPAN, Link, Span, SpanKind, Status, StatusCode, TracerProvider
    from opentelemetry.util.types import AttributeValue
except ImportError as _error:
    raise ImportError("anyio_channels.otel needs an extra: pip install 'anyio_channels[otel]'") from _error

from . import __version__
from .contract.layer import MESSAGE_VARIABLES, BaseChannelLayer, ChannelLayerStatistics, Message, OnGap, Overflow
from .exceptions import MessageTooLarge
from .log import TELEMETRY_FAILED, Troubles

__all__ = ["CONTEXT_KEY", "OpenTelemetryChannelLayer", "message_context"]

CONTEXT_KEY: Final = "__asgi_trace__"
"""The key of a message under which the context of its trace travels: a ``dict`` as the API's propagator makes it."""

_SYSTEM: Final = "anyio_channels"
_PUBLIC: Final = frozenset({"anyio", "anyio_channels", "redis"})
"""Whose errors say nothing out of a message; but for ``TypeError``, which is nobody's."""
_QUIET: Final = 60.0
_message_context: ContextVar[Context | None] = ContextVar("anyio_channels_message_context", default=None)
MESSAGE_VARIABLES.append(_message_context)


def message_context() -> Context:
    """Return the context in which the trace of the message goes on that this task received last.

    To be given to whatever begins a span about it: ``tracer.start_as_current_span("handle", context=message_context())``. It
    has the producer's baggage. If the task received no message, or not through an ``OpenTelemetryChannelLayer``, it is the
    current context. A task that is started later inherits it, as it does every context variable.
    """
    context = _message_context.get()
    return otel_context.get_current() if context is None else context


class OpenTelemetryChannelLayer(BaseChannelLayer):
    """A channel layer that makes spans and metrics of what another layer does.

    It opens and closes ``layer`` with itself, and keeps the contract that ``layer`` keeps. ``send`` and ``group_send`` are
    spans, and put the context of the trace into the message; ``receive`` takes it out again and is a span that begins when
    the message is there. While the layer is open, its ``statistics()`` are metrics; the thread that collects them calls it.

    Layers without this one around them would give their readers the key ``CONTEXT_KEY`` with the message, and so would other
    packages on the same Redis: put it around the readers before the senders.
    """

    layer: BaseChannelLayer
    """The layer that does the work."""
    name: str
    """What spans and metrics call the layer, so that several can be told apart."""

    def __init__(
        self,
        layer: BaseChannelLayer,
        *,
        name: str | None = None,
        tracer_provider: TracerProvider | None = None,
        meter_provider: MeterProvider | None = None,
    ) -> None:
        """Put spans and metrics around ``layer``, which is not open yet.

        ``name``: the attribute ``anyio_channels.layer``; the name of the layer's class, if not given. Metrics of layers with
        one name are added up. ``tracer_provider``, ``meter_provider``: those that were set for the process, if not given.
        """
        if not isinstance(layer, BaseChannelLayer):
            raise TypeError(f"layer must be a BaseChannelLayer, not {layer!r}")
        if isinstance(layer, OpenTelemetryChannelLayer):
            raise TypeError(
                f"{layer!r} has OpenTelemetry already; around it twice, the trace of a message would be lost"
            )
        if not isinstance(name, str | None):
            raise TypeError(f"name must be a str, not {name!r}")
        super().__init__(
            layer.expiry,
            layer.capacity,
            dict(layer.channel_capacity),
            max_message_size=layer.max_message_size,
            default=layer.default,
        )
        vars(self)["extensions"] = layer.extensions  # the specification has it on the class
        self.layer = layer
        self.name = type(layer).__name__ if name is None else name
        self.meter_provider: MeterProvider | None = meter_provider
        self._tracer = trace.get_tracer(__name__, __version__, tracer_provider)
        self._attributes: dict[str, AttributeValue] = {"messaging.system": _SYSTEM, "anyio_channels.layer": self.name}
        if layer.server is not None:
            self._attributes["server.address"], port = layer.server
            if port is not None:
                self._attributes["server.port"] = port
        self._troubles = Troubles(monotonic, _QUIET, self)

    def __repr__(self) -> str:
        """Say which layer it is around."""
        return f"<{type(self).__name__} of {self.layer!r}>"

    # Opening and closing

    async def open(self) -> None:
        """Open the wrapped layer; its metrics begin."""
        await self.layer.__aenter__()
        try:
            _watch(self)
        except Exception as error:  # noqa: BLE001 - the layer works without
            self._failed(error)

    async def close(self) -> None:
        """Close the wrapped layer; of its metrics the counters stay, and the others end."""
        await super().close()
        try:
            await self.layer.close()
        finally:
            _forget(self)
            self._troubles.close()

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close both layers, also when cancelled."""
        await super().__aexit__(exc_type, exc, traceback)
        await self.layer.__aexit__(exc_type, exc, traceback)

    # Messages

    async def send(self, channel: str, message: Message, *, wait: bool = False) -> None:
        """Send ``message`` to ``channel`` within a span, as the wrapped layer does.

        What would only be too large with the context of the trace is sent without it.
        """
        with _Sending(self, "send", channel, message) as sending:
            try:
                await self.layer.send(channel, sending.message, wait=wait)
            except MessageTooLarge:
                await self.layer.send(channel, sending.without_context(), wait=wait)

    async def group_send(self, group: str, message: Message, *, exclude: Collection[str] = ()) -> None:
        """Send ``message`` to every member of ``group`` within a span, as the wrapped layer does; see ``send``."""
        with _Sending(self, "group_send", group, message) as sending:
            try:
                await self.layer.group_send(group, sending.message, exclude=exclude)
            except MessageTooLarge:
                await self.layer.group_send(group, sending.without_context(), exclude=exclude)

    async def receive(self, channel: str) -> Message:
        """Wait for the next message on ``channel`` and return it, as the wrapped layer does.

        The span begins when the message is there: a wait, and one that is cancelled, is none. An error is a span, except that
        the layer was closed. The current span is its parent, and it is linked to the producer's; without a current span the
        producer's is its parent. Afterwards ``message_context()`` is that of this message.
        """
        try:
            message = await self.layer.receive(channel)
        except ClosedResourceError:
            raise
        except Exception as error:
            self._receive_failed(channel, error)
            raise
        return self._received(channel, message)

    def send_nowait(self, channel: str, message: Message) -> None:
        """Do what the wrapped layer's ``send_nowait`` does, within a span; ``NotImplementedError`` if it has none."""
        send_nowait = self._nowait("send_nowait")
        with _Sending(self, "send", channel, message) as sending:
            try:
                send_nowait(channel, sending.message)
            except MessageTooLarge:
                send_nowait(channel, sending.without_context())

    def group_send_nowait(self, group: str, message: Message, *, exclude: Collection[str] = ()) -> None:
        """Do what the wrapped layer's ``group_send_nowait`` does, within a span; ``NotImplementedError`` if it has none."""
        group_send_nowait = self._nowait("group_send_nowait")
        with _Sending(self, "group_send", group, message) as sending:
            try:
                group_send_nowait(group, sending.message, exclude=exclude)
            except MessageTooLarge:
                group_send_nowait(group, sending.without_context(), exclude=exclude)

    def receive_nowait(self, channel: str) -> Message:
        """Do what the wrapped layer's ``receive_nowait`` does; ``NotImplementedError`` if it has none.

        A message is a span, as in ``receive``; that there is none is not, and neither is an error.
        """
        message: Message = self._nowait("receive_nowait")(channel)
        return self._received(channel, message)

    async def new_channel(self, prefix: str = "specific.") -> str:
        """Return a process-specific channel name that nobody has."""
        return await self.layer.new_channel(prefix)

    async def _arrived(self, channel: str) -> None:
        await self.layer._arrived(channel)  # noqa: SLF001 - this is the layer's own, handed on

    async def flush(self) -> None:
        """Throw away all messages and memberships."""
        await self.layer.flush()

    # Groups, statistics, inboxes

    async def group_add(self, group: str, channel: str) -> None:
        """Make ``channel`` a member of ``group``."""
        await self.layer.group_add(group, channel)

    async def group_discard(self, group: str, channel: str) -> None:
        """End the membership of ``channel`` in ``group``."""
        await self.layer.group_discard(group, channel)

    async def group_channels(self, group: str) -> set[str]:
        """Return the members of ``group`` as they are now."""
        return await self.layer.group_channels(group)

    def statistics(self) -> ChannelLayerStatistics:
        """Return the snapshot of the wrapped layer."""
        return self.layer.statistics()

    @property
    def server(self) -> tuple[str, int | None] | None:
        """The server of the wrapped layer."""
        return self.layer.server

    async def inbox_open(self, prefix: str, capacity: int | None, overflow: Overflow, on_gap: OnGap) -> str:
        """Make the channel of an inbox."""
        return await self.layer.inbox_open(prefix, capacity, overflow, on_gap)

    async def inbox_close(self, channel: str, groups: Collection[str]) -> None:
        """Leave all groups and forget the channel."""
        await self.layer.inbox_close(channel, groups)

    async def inbox_join(self, channel: str, group: str) -> None:
        """Make the inbox a member of ``group`` until it leaves."""
        await self.layer.inbox_join(channel, group)

    async def inbox_leave(self, channel: str, group: str) -> None:
        """End the membership of the inbox in ``group``."""
        await self.layer.inbox_leave(channel, group)

    # The inside

    def _nowait(self, method: str) -> Callable[..., Any]:
        found: Callable[..., Any] | None = getattr(self.layer, method, None)
        if found is None:
            raise NotImplementedError(f"{type(self.layer).__name__} has no {method}()")
        return found

    def _failed(self, error: Exception) -> None:
        """OpenTelemetry raised, which is not the application's affair."""
        self._troubles.note(TELEMETRY_FAILED, error=repr(error))

    def _received(self, channel: str, message: Message) -> Message:
        carrier = message.pop(CONTEXT_KEY, None)
        try:
            _message_context.set(self._trace_received(channel, carrier))
        except Exception as error:  # noqa: BLE001 - the message was taken: it must be handed over
            self._failed(error)
        return message

    def _trace_received(self, channel: str, carrier: object) -> Context:
        """Make the span of a message that came; return the context in which its trace goes on."""
        sent_in = _extract(carrier)
        links = _links(sent_in)
        in_trace = trace.get_current_span().get_span_context().is_valid
        parent = sent_in if links and not in_trace else None
        span = self._start(SpanKind.CONSUMER, "receive", "receive", channel, parent, links)
        span.end()
        if (
            links and in_trace
        ) or not span.get_span_context().is_valid:  # some tracers that do nothing forget the parent
            return sent_in
        return trace.set_span_in_context(span, sent_in)

    def _receive_failed(self, channel: str, error: Exception) -> None:
        try:
            span = self._start(SpanKind.CONSUMER, "receive", "receive", channel, None, [])
            _mark(span, error)
            span.end()
        except Exception as failure:  # noqa: BLE001 - the caller is to get the error
            self._failed(failure)

    def _start(
        self,
        kind: SpanKind,
        operation: str,
        operation_type: str,
        destination: object,
        parent: Context | None,
        links: list[Link],
    ) -> Span:
        # What is no valid name is refused by the wrapped layer, and the span says so.
        name = destination[: self.MAX_NAME_LENGTH] if isinstance(destination, str) else reprlib.repr(destination)
        attributes = {
            **self._attributes,
            "messaging.operation.name": operation,
            "messaging.operation.type": operation_type,
            "messaging.destination.name": name,
        }
        span_name = f"{operation} {name}"
        if "!" in name:  # process-specific: one of very many, with a name that was made up
            attributes["messaging.destination.temporary"] = attributes["messaging.destination.anonymous"] = True
            span_name = operation
        return self._tracer.start_span(span_name, parent, kind, attributes, links)

    # Metrics

    def counts(self) -> dict[str, int]:
        """Return ``statistics()`` by field. For the metrics."""
        statistics = self.layer.statistics()
        return {field.name: getattr(statistics, field.name) for field in fields(statistics)}

    def note_failure(self, error: Exception) -> None:
        """Its statistics could not be read. For the metrics."""
        self._failed(error)


class _Sending:
    """A call that sends: a span, which is the current one while it runs, and the message with its context."""

    __slots__ = ("_layer", "_original", "_span", "_token", "message")

    def __init__(self, layer: OpenTelemetryChannelLayer, operation: str, destination: str, message: Message) -> None:
        self._layer = layer
        self._original = message
        self._span: Span = INVALID_SPAN
        self._token: Token[Context] | None = None
        self.message: Message = message
        try:
            self._begin(operation, destination)
        except Exception as error:  # noqa: BLE001 - it is sent all the same
            layer._failed(error)  # noqa: SLF001 - a part of the layer

    def _begin(self, operation: str, destination: str) -> None:
        is_message = isinstance(self._original, dict)
        custom = self._original.get(CONTEXT_KEY) if is_message else None
        links = [] if custom is None else _links(_extract(custom))
        self._span = self._layer._start(SpanKind.PRODUCER, operation, "send", destination, None, links)  # noqa: SLF001
        context = otel_context.get_current()
        if self._span.get_span_context().is_valid:
            context = trace.set_span_in_context(self._span, context)
            self._token = otel_context.attach(context)
        if context and is_message and custom is None:
            carrier: dict[str, str] = {}
            propagate.inject(carrier, context)
            if carrier:
                self.message = {**self._original, CONTEXT_KEY: carrier}

    def without_context(self) -> Message:
        """Return the message as it was given, or raise the error that is being handled if that was sent already."""
        if self.message is self._original:
            raise  # noqa: PLE0704 - called where it was caught
        self._span.set_attribute("anyio_channels.context_left_out", True)  # noqa: FBT003 - its value
        return self._original

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if self._token is not None:
                otel_context.detach(self._token)
            if exc is not None:
                _mark(self._span, exc)
            self._span.end()
        except Exception as error:  # noqa: BLE001 - whatever became of the message, this does not change it
            self._layer._failed(error)  # noqa: SLF001


def _extract(carrier: object) -> Context:
    """Return the context that came with a message: an empty one, if what came is none."""
    if not isinstance(carrier, dict):
        return Context()
    pairs = {key: value for key, value in carrier.items() if isinstance(key, str) and isinstance(value, str)}
    return propagate.extract(pairs, Context())


def _links(context: Context) -> list[Link]:
    """Return a link to the span that a message was sent in, if there was one."""
    producer = trace.get_current_span(context).get_span_context() if context else trace.INVALID_SPAN_CONTEXT
    return [Link(producer)] if producer.is_valid else []


def _mark(span: Span, error: BaseException) -> None:
    """Say how a call ended (https://opentelemetry.io/docs/specs/semconv/general/recording-errors/)."""
    if not isinstance(error, Exception):
        span.set_attribute(
            "error.type", "cancelled"
        )  # whatever ends a call from outside; the classes are the backends'
        span.set_status(Status(StatusCode.ERROR, "cancelled"))
        return
    kind = type(error)
    span.set_attribute("error.type", f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins."))
    # The texts of TypeError, and of what default= raises, quote the message.
    is_public = kind.__module__.partition(".")[0] in _PUBLIC
    span.set_status(Status(StatusCode.ERROR, str(error) if is_public else None))


# Metrics: OpenTelemetry cannot take an instrument back, so there is one set for each provider, which asks the layers that
# are open. A layer that is left open and forgotten is not kept alive by it. What closed layers counted is kept, by their names:
# counters never go back, and the last collection comes when all is closed.

_GROWING: Final = frozenset(
    {
        "sent", "received", "expired", "dropped_full", "dropped_unreadable", "discarded", "reconnects", "commands",
    }
)  # fmt: skip
_METRICS: Final[tuple[tuple[str, str, str, tuple[str, ...]], ...]] = (
    ("anyio_channels.channels", "{channel}", "Channels that hold a message or belong to an open inbox.", ("channels",)),
    ("anyio_channels.buffered.messages", "{message}", "Messages that wait to be received.", ("buffered_messages",)),
    ("anyio_channels.groups", "{group}", "Groups with at least one member.", ("groups",)),
    ("anyio_channels.members", "{member}", "Memberships, over all groups.", ("members",)),
    ("anyio_channels.waiting.receivers", "{receiver}", "Calls that wait for a message.", ("waiting_receivers",)),
    ("anyio_channels.connections", "{connection}", "Connections to Redis that are up.", ("connections",)),
    ("anyio_channels.sent.messages", "{message}", "Messages sent, for a broadcast one for each member.", ("sent",)),
    ("anyio_channels.received.messages", "{message}", "Messages handed to a receiver.", ("received",)),
    ("anyio_channels.expired.messages", "{message}", "Messages that nobody received in time.", ("expired",)),
    (
        "anyio_channels.dropped.messages",
        "{message}",
        "Messages that a full channel missed, and bytes that were no message.",
        ("dropped_full", "dropped_unreadable"),
    ),
    ("anyio_channels.discarded.messages", "{message}", "Messages thrown away unread.", ("discarded",)),
    ("anyio_channels.reconnects", "{reconnect}", "Connections to Redis that came back.", ("reconnects",)),
    ("anyio_channels.commands", "{command}", "Commands sent to Redis.", ("commands",)),
)
_lock: Final = threading.Lock()
_open_layers: Final[WeakSet[OpenTelemetryChannelLayer]] = WeakSet()
_Counts: TypeAlias = dict[tuple[str, str], int]
_providers: Final[WeakKeyDictionary[object, _Counts]] = WeakKeyDictionary()
"""The providers that were given, with what closed layers counted, by name and field."""
_closed_in_process: Final[_Counts] = {}
"""The same of layers to which none was given."""
_OF_THE_PROCESS: Final = threading.Event()  # set when the process's provider has its instruments


def _watch(layer: OpenTelemetryChannelLayer) -> None:
    """Have the instruments see ``layer``, which was opened."""
    provider = layer.meter_provider
    with _lock:
        _open_layers.add(layer)
        if provider is None:
            is_new = not _OF_THE_PROCESS.is_set()
            _OF_THE_PROCESS.set()
        else:
            is_new = provider not in _providers
            _providers.setdefault(provider, {})
    if is_new:
        _make_instruments(provider)


def _forget(layer: OpenTelemetryChannelLayer) -> None:
    """``layer`` was closed: what it counted is kept."""
    try:
        with _lock:
            if layer in _open_layers:
                _open_layers.discard(layer)
                provider = layer.meter_provider
                kept = _closed_in_process if provider is None else _providers.setdefault(provider, {})
                _add(kept, layer, tuple(_GROWING))
    except Exception as error:  # noqa: BLE001 - the layer must be closed
        layer.note_failure(error)


def _add(sums: _Counts, layer: OpenTelemetryChannelLayer, names: tuple[str, ...]) -> None:
    counts = layer.counts()
    for name in names:
        if name in counts:
            sums[layer.name, name] = sums.get((layer.name, name), 0) + counts[name]


def _make_instruments(provider: MeterProvider | None) -> None:
    meter = metrics.get_meter(__name__, __version__, provider)
    for name, unit, description, names in _METRICS:
        make = meter.create_observable_counter if names[0] in _GROWING else meter.create_observable_up_down_counter
        make(name, [_observer(provider, names)], unit, description)


def _observer(
    provider: MeterProvider | None, names: tuple[str, ...]
) -> Callable[[CallbackOptions], Iterable[Observation]]:
    """Return what an instrument calls: the sums over the layers, by their names."""

    def observe(_: CallbackOptions) -> list[Observation]:
        here = metrics.get_meter_provider() if provider is None else provider
        failures: list[tuple[OpenTelemetryChannelLayer, Exception]] = []
        sums: _Counts = {}
        with _lock:  # a layer that is being closed counts once
            for owner, kept in ((None, _closed_in_process), *_providers.items()):
                if (owner or metrics.get_meter_provider()) is here:
                    for key, count in kept.items():
                        if key[1] in names:
                            sums[key] = sums.get(key, 0) + count
            for layer in _open_layers:
                if (layer.meter_provider or metrics.get_meter_provider()) is here:
                    try:
                        _add(sums, layer, names)
                    except Exception as error:  # noqa: BLE001 - the other layers are to be seen
                        failures.append((layer, error))
        for layer, failure in failures:
            layer.note_failure(failure)
        return [Observation(value, _attributes_of(*key)) for key, value in sums.items()]

    return observe


def _attributes_of(layer: str, field: str) -> dict[str, AttributeValue]:
    attributes: dict[str, AttributeValue] = {"messaging.system": _SYSTEM, "anyio_channels.layer": layer}
    if field.startswith("dropped_"):
        attributes["anyio_channels.drop.reason"] = field.removeprefix("dropped_")
    return attributes
