"""Spans of requests and operations, as OpenTelemetry's SDK has exported them."""

from __future__ import annotations

import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from request_records import record

from isotherm.cluster.api.trace_context import TraceContext
from isotherm.cluster.messages.operations import Operation, Phase
from isotherm.cluster.observe.tracing import Traces, TracingError, otlp

OWN = TraceContext("ab" * 16, "cd" * 8, parent="ef" * 8, state="vendor=1")


@pytest.fixture
def exported():
    return InMemorySpanExporter()


@pytest.fixture
def traces(exported):
    return Traces("one", "tiny", SimpleSpanProcessor(exported))


def by_name(exported):
    return {span.name: span for span in exported.get_finished_spans()}


def seconds(span):
    return round(span.start_time / 1e9 - 1_000_000, 3), round(span.end_time / 1e9 - 1_000_000, 3)


def test_a_request_has_its_phases_one_after_another(traces, exported):
    traces.request(record(trace=OWN, chunks=((0.25, 512), (0.4, 88)), moves=((0.9, "moved"),)))
    spans = by_name(exported)
    http = spans["POST /v1/chat/completions"]
    assert (http.context.trace_id, http.context.span_id) == (int(OWN.trace, 16), int(OWN.span, 16))
    assert http.parent.span_id == int(OWN.parent, 16) and http.context.trace_state.get("vendor") == "1"
    assert seconds(http) == (0, 1.51) and http.status.is_unset
    assert {name: seconds(spans[name]) for name in ("prepare", "queue", "prefill", "decode")} == {
        "prepare": (0, 0.01), "queue": (0.01, 0.21), "prefill": (0.21, 0.51), "decode": (0.51, 1.51),
    }  # fmt: skip
    assert all(spans[name].parent.span_id == http.context.span_id for name in ("queue", "prefill", "decode"))
    chunks = [span for span in exported.get_finished_spans() if span.name == "prefill chunk"]
    assert [(seconds(chunk), chunk.attributes["isotherm.tokens"]) for chunk in chunks] == [
        ((0.21, 0.25), 512), ((0.25, 0.4), 88),
    ]  # fmt: skip
    assert {chunk.parent.span_id for chunk in chunks} == {spans["prefill"].context.span_id}
    assert [(event.name, event.timestamp / 1e9 - 1_000_000) for event in http.events] == [("moved", pytest.approx(0.9))]
    assert http.attributes["gen_ai.usage.output_tokens"] == 11 and http.attributes["isotherm.key"] == "alice"
    assert {span.context.trace_id for span in exported.get_finished_spans()} == {int(OWN.trace, 16)}


@pytest.mark.parametrize(
    ("status", "error", "ours"),
    [(503, "unavailable", True), (200, "generation_failed", True), (429, "overloaded", False)],
)
def test_an_error_is_said_and_ours_marks_the_span(traces, exported, status, error, ours):
    traces.request(record(trace=OWN, status=status, error=error, first_token=None, queue=0.0, prefill=0.0, decode=0.0))
    spans = by_name(exported)
    http = spans["POST /v1/chat/completions"]
    assert (
        http.attributes["error.type"] == error and http.status.is_ok is not ours
    ) or http.status.is_unset is not ours
    assert set(spans) == {"POST /v1/chat/completions", "prepare"}


def test_what_is_not_sampled_has_no_span(traces, exported):
    traces.request(record(trace=TraceContext(OWN.trace, OWN.span, sampled=False)))
    traces.request(record())
    assert not exported.get_finished_spans()


def operation(name="op-1", phase=Phase.DONE, **fields):
    entered = {"planned": 1_000_000.0, "preparing": 1_000_001.0, "committing": 1_000_003.0, phase.value: 1_000_003.5}
    return Operation(name, {"expert_groups": 3}, "api", 1_000_000.0, phase=phase, entered=entered, **fields)


def test_an_operation_has_its_phases_and_is_told_once(traces, exported):
    traces.operations([operation(), operation("op-2", Phase.PREPARING), operation("op-3", dry_run=True)])
    traces.operations([operation()])
    spans = by_name(exported)
    assert len(exported.get_finished_spans()) == len(spans) == 4
    assert {name: seconds(span) for name, span in spans.items()} == {
        "planned": (0, 1), "preparing": (1, 3), "committing": (3, 3.5), "operation": (0, 3.5),
    }  # fmt: skip
    assert spans["operation"].parent is None and spans["preparing"].parent.span_id == spans["operation"].context.span_id
    assert spans["operation"].attributes["isotherm.operation.id"] == "op-1" and spans["operation"].status.is_unset


def test_one_that_failed_says_why_and_those_known_are_not_told_again(traces, exported):
    traces.known([operation("op-1")])
    traces.operations([operation("op-1"), operation("op-2", Phase.ROLLED_BACK, reasons=["no node"])])
    whole = by_name(exported)["operation"]
    assert whole.attributes["isotherm.operation.id"] == "op-2" and whole.status.description == "no node"


def test_where_there_are_no_traces_the_packages_are_not_loaded():
    code = (
        "import sys, isotherm.cluster.front_door, isotherm.cluster.observe.ingress, isotherm.cluster.observe.alone\n"
        "assert not [m for m in sys.modules if m.startswith('opentelemetry')], 'loaded'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/")


def test_spans_reach_a_collector():
    received: list[bytes] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Collector) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        traces = Traces("one", "tiny", otlp(f"http://127.0.0.1:{server.server_port}/v1/traces"))
        traces.request(record(trace=OWN))
        traces.close()
        server.shutdown()
        thread.join()
    sent = ExportTraceServiceRequest.FromString(received[0])
    (of_process,) = sent.resource_spans
    names = {attribute.key: attribute.value.string_value for attribute in of_process.resource.attributes}
    assert (names["service.name"], names["service.instance.id"]) == ("isotherm", "one")
    assert "decode" in {span.name for span in of_process.scope_spans[0].spans}


def test_without_the_package_that_sends_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(TracingError, match=r"pip install 'isotherm\[tracing\]'"):
        otlp("http://127.0.0.1:4318/v1/traces")
