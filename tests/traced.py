"""Layers within OpenTelemetry's real SDK, whose spans and metrics stay in memory."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader, NumberDataPoint
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from anyio_channels.layers.base import BaseChannelLayer
from anyio_channels.otel import OpenTelemetryChannelLayer
from anyio_channels.testing import Clock, LayerFactory


class Telemetry:
    """Providers of its own, and what they were told."""

    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        self.tracer_provider = TracerProvider(shutdown_on_exit=False)
        self.tracer_provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.tracer = self.tracer_provider.get_tracer("tests")
        self.reader = InMemoryMetricReader()
        self.meter_provider = MeterProvider([self.reader], shutdown_on_exit=False)

    def wrap(self, layer: BaseChannelLayer, **options: Any) -> OpenTelemetryChannelLayer:
        return OpenTelemetryChannelLayer(
            layer, tracer_provider=self.tracer_provider, meter_provider=self.meter_provider, **options
        )

    def spans(self) -> list[ReadableSpan]:
        """The spans that have ended since the last call, in that order."""
        spans = list(self.exporter.get_finished_spans())
        self.exporter.clear()
        return spans

    def metrics(self) -> dict[str, dict[str, int]]:
        """What each instrument says now: by the name of the layer, with the reason where there is one."""
        found: dict[str, dict[str, int]] = {}
        data = self.reader.get_metrics_data()
        for resource in data.resource_metrics if data is not None else ():
            for scope in resource.scope_metrics:
                assert scope.scope.name == "anyio_channels.otel"
                for metric in scope.metrics:
                    for point in metric.data.data_points:
                        assert isinstance(point, NumberDataPoint)
                        attributes = dict(point.attributes or {})
                        assert attributes.pop("messaging.system") == "anyio_channels"
                        found.setdefault(metric.name, {})[" ".join(map(str, attributes.values()))] = int(point.value)
        return found


def traced(factory: LayerFactory) -> LayerFactory:
    """Put OpenTelemetry around the layers of ``factory``."""

    def make(clock: Clock, **options: Any) -> BaseChannelLayer:
        # Each layer has its own: Hypothesis remembers the factory, which would keep all spans until the session ends.
        layer = Telemetry().wrap(factory(clock, **options))
        clock.move, clock.settle = _inside(clock.move), _inside(clock.settle)
        return layer

    return make


def _inside(function: Callable[..., Awaitable[None]] | None) -> Callable[..., Awaitable[None]] | None:
    """Have what knows the wrapped layer get that."""
    if function is None:
        return None

    async def call(layer: BaseChannelLayer, *args: Any) -> None:
        assert isinstance(layer, OpenTelemetryChannelLayer)
        await function(layer.layer, *args)

    return call
