"""OpenTelemetry's spans of requests and operations, made when these have ended from the times that were noted anyway.
Imported only where the manifest wants traces: the packages come with the extra `tracing`."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any

from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Span, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.id_generator import IdGenerator, RandomIdGenerator
from opentelemetry.sdk.trace.sampling import ALWAYS_ON
from opentelemetry.trace import (
    NonRecordingSpan,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    TraceState,
    set_span_in_context,
)

from isotherm.cluster.api.request_book import RequestRecord
from isotherm.cluster.api.trace_context import TraceContext
from isotherm.cluster.errors import IsothermError
from isotherm.cluster.messages.operations import Operation, Phase

log = logging.getLogger(__name__)


class TracingError(IsothermError, RuntimeError):
    """Traces are wanted, and cannot be sent; the message says what to do."""


def otlp(endpoint: str) -> SpanProcessor:
    """What sends spans to a collector, in a thread of its own. Raises TracingError."""
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError:
        raise TracingError(
            f'tracing.endpoint is "{endpoint}", and the package that sends traces is not installed; '
            "install it with: pip install 'isotherm[tracing]'"
        ) from None
    return BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint))


class _Ids(IdGenerator):
    """Random ids, but for the next span's where they are given: its own was told to the client before it was made."""

    def __init__(self) -> None:
        self._random = RandomIdGenerator()
        self.next_trace: int | None = None
        self.next_span: int | None = None

    def generate_span_id(self) -> int:
        given, self.next_span = self.next_span, None
        return self._random.generate_span_id() if given is None else given

    def generate_trace_id(self) -> int:
        given, self.next_trace = self.next_trace, None
        return self._random.generate_trace_id() if given is None else given


class Traces:
    """`who` is the process that observed it. Used from one thread."""

    def __init__(self, who: str, model: str, processor: SpanProcessor) -> None:
        self._ids = _Ids()
        resource = Resource.create({"service.name": "isotherm", "service.instance.id": who, "isotherm.model": model})
        self._provider = TracerProvider(ALWAYS_ON, resource, id_generator=self._ids, shutdown_on_exit=True)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("isotherm")
        self._told: set[tuple[str, float]] = set()  # operations

    # --- requests ---------------------------------------------------------------------------------

    def request(self, record: RequestRecord) -> None:
        """A sink of the request book: HTTP → prepare, queue, prefill with its chunks, decode; moves as events."""
        own = record.trace
        if own is None or not own.sampled:
            return
        self._ids.next_trace, self._ids.next_span = int(own.trace, 16), int(own.span, 16)
        http = self._span(f"POST {record.route}", record.started, _parent(own), _of_request(record), SpanKind.SERVER)
        for at, word in record.moves:
            http.add_event(word, timestamp=_ns(record.started + at))
        inside, at = set_span_in_context(http), record.started
        for name in ("prepare", "queue", "prefill", "decode"):
            seconds: float = getattr(record, name)
            if seconds > 0:
                part = self._span(name, at, inside)
                if name == "prefill":
                    self._chunks(record, at, at + seconds, set_span_in_context(part))
                part.end(_ns(at + seconds))
            at += seconds
        if record.error:
            http.set_attribute("error.type", record.error)
            if record.status >= 500 or record.status == 200:  # as HTTP's conventions have it: ours, not the client's
                http.set_status(Status(StatusCode.ERROR, record.error))
        http.end(_ns(record.started + record.seconds))

    def _chunks(self, record: RequestRecord, begin: float, end: float, inside: Context) -> None:
        """The parts of the prompt; the shard's clock began when the request came there, so they are fitted in."""
        for after, tokens in record.chunks:
            until = min(max(begin, record.started + after), end)
            self._span("prefill chunk", begin, inside, {"isotherm.tokens": tokens}).end(_ns(until))
            begin = until

    # --- operations -------------------------------------------------------------------------------

    def operations(self, operations: Iterable[Operation]) -> None:
        """Each that has ended, once, with its phases; dry runs have none."""
        ended = {(o.id, o.created): o for o in operations if o.phase.is_final and not o.dry_run}
        for key, operation in ended.items():
            if key not in self._told:
                self._operation(operation)
        self._told = set(ended)

    def _operation(self, operation: Operation) -> None:
        times = sorted(operation.entered.items(), key=lambda item: item[1])
        attributes = {
            "isotherm.operation.id": operation.id,
            "isotherm.operation.origin": operation.origin,
            "isotherm.operation.target": str(operation.target),
            "isotherm.operation.outcome": operation.phase.value,
        }
        whole = self._span("operation", operation.created, Context(), attributes)
        for (name, begin), (_, end) in pairwise(times):
            self._span(name, begin, set_span_in_context(whole)).end(_ns(end))
        if operation.phase is not Phase.DONE:
            whole.set_status(Status(StatusCode.ERROR, "; ".join(operation.reasons[-2:])))
        whole.end(_ns(times[-1][1] if times else operation.created))

    def known(self, operations: Iterable[Operation]) -> None:
        """These have ended before, and were told by the controller before this one."""
        self._told = {(o.id, o.created) for o in operations if o.phase.is_final and not o.dry_run}

    # ----------------------------------------------------------------------------------------------

    def _span(
        self,
        name: str,
        begin: float,
        inside: Context,
        attributes: Mapping[str, Any] | None = None,
        kind: SpanKind = SpanKind.INTERNAL,
    ) -> Span:
        span = self._tracer.start_span(name, inside, kind, attributes, start_time=_ns(begin))
        assert isinstance(span, Span)
        return span

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)


def _parent(own: TraceContext) -> Context:
    if not own.parent:
        return Context()
    state = TraceState.from_header([own.state]) if own.state else None
    sender = SpanContext(int(own.trace, 16), int(own.parent, 16), True, TraceFlags(TraceFlags.SAMPLED), state)
    return set_span_in_context(NonRecordingSpan(sender), Context())


def _of_request(record: RequestRecord) -> dict[str, Any]:
    """In the words of OpenTelemetry's conventions, where they have one."""
    return {
        "http.request.method": "POST",
        "http.route": record.route,
        "http.response.status_code": record.status,
        "gen_ai.operation.name": "text_completion" if record.route == "/v1/completions" else "chat",
        "gen_ai.request.model": record.model,
        "gen_ai.response.id": record.reply,
        "gen_ai.response.finish_reasons": list(record.finish_reasons),
        "gen_ai.usage.input_tokens": record.prompt_tokens,
        "gen_ai.usage.output_tokens": record.output_tokens,
        "isotherm.usage.cached_tokens": record.cached_tokens,
        "isotherm.request.id": record.id,
        "isotherm.key": record.key,
        "isotherm.preempted": record.preempted,
        "isotherm.group_wait_seconds": record.group_wait,
    }
