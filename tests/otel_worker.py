"""One process of a traced application: receives a message, handles it in its trace, and prints its spans as JSON."""

from __future__ import annotations

import json
import sys

import anyio
from opentelemetry import baggage
from traced import Telemetry

from anyio_channels import create_channel_layer
from anyio_channels.otel import message_context


async def main(url: str, prefix: str, group: str) -> None:
    telemetry = Telemetry()
    layer = telemetry.wrap(create_channel_layer(url, prefix=prefix))
    async with layer, layer.subscribe(group) as inbox:
        say("ready")
        message = await inbox.receive()
        with telemetry.tracer.start_as_current_span("handle", message_context()):
            bag = dict(baggage.get_all(message_context()))
    spans = [
        {
            "name": span.name,
            "kind": span.kind.name,
            "trace_id": span.context.trace_id if span.context else None,
            "span_id": span.context.span_id if span.context else None,
            "parent": span.parent.span_id if span.parent else None,
            "links": [[link.context.trace_id, link.context.span_id] for link in span.links],
        }
        for span in telemetry.spans()
    ]
    say(json.dumps({"message": message, "spans": spans, "baggage": bag}))


def say(line: str) -> None:
    """To the process that started this one."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


backend, url, prefix, group = sys.argv[1:]
anyio.run(main, url, prefix, group, backend=backend)
