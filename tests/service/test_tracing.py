"""Traces: a span for each request, one for each stage, and none without a collector."""

import threading
import time

import pytest
import structlog
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from tests.patience import HELD_S, PATIENCE_S
from tests.service.fakes import FakeModel
from tests.service.forms import a_head, post
from tests.service.live import serve, wait_for
from text2weight_service import tracing
from text2weight_service.tracing import add_trace_id, end_traces, exporting_provider

COLLECTOR = "http://127.0.0.1:9"  # the port "discard": nothing listens


@pytest.fixture(autouse=True)
def no_collector(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*tracing.ENDPOINT_VARIABLES, "OTEL_SDK_DISABLED", "OTEL_SERVICE_NAME"):
        monkeypatch.delenv(name, raising=False)


def test_spans_of_a_request() -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    with serve(lambda _: FakeModel(), tracer_provider=provider) as live:
        answer = live.client.post("/generate", json={"classes": ["apple", "bus"]}, headers={"traceparent": parent})
        assert answer.status_code == 200
        live.client.get("/health/ready")
        live.client.get("/metrics")
        wait_for(lambda: any(span.parent and span.parent.is_remote for span in exporter.get_finished_spans()), "span")
    spans = {span.name: span for span in exporter.get_finished_spans()}
    assert set(spans) == {"POST /generate", "queue", "encode", "sample"}
    request = spans.pop("POST /generate")
    assert f"{request.context.trace_id:032x}" in parent
    assert request.attributes is not None
    assert request.attributes["http.response.status_code"] == 200
    for stage in spans.values():
        assert stage.parent is not None
        assert stage.parent.span_id == request.context.span_id
        assert stage.start_time <= stage.end_time
    assert spans["queue"].end_time == spans["encode"].start_time
    assert spans["encode"].end_time == spans["sample"].start_time


def test_spans_of_merging() -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    body = {"tasks": [{"classes": ["apple", "bus"]}] * 2, "method": "average"}
    head = a_head("apple", "bus").to_bytes()
    with serve(lambda _: FakeModel(), tracer_provider=provider) as live:
        assert post(live.client, "/fuse", body, head, head).status_code == 200
        wait_for(lambda: "POST /fuse" in {span.name for span in exporter.get_finished_spans()}, "span")
    assert {span.name for span in exporter.get_finished_spans()} == {"POST /fuse", "read", "merge"}


def test_no_spans_without_a_collector() -> None:
    assert exporting_provider("1") is None


def test_provider_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", COLLECTOR)
    provider = exporting_provider("1.2")
    assert provider is not None
    provider.shutdown()
    assert provider.resource.attributes["service.name"] == "text2weight"
    assert provider.resource.attributes["service.version"] == "1.2"
    monkeypatch.setenv("OTEL_SERVICE_NAME", "heads")
    named = exporting_provider("1.2")
    assert named is not None
    named.shutdown()
    assert named.resource.attributes["service.name"] == "heads"
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    assert exporting_provider("1.2") is None


def test_extra_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", COLLECTOR)
    monkeypatch.setattr(tracing, "_PACKAGES", ("opentelemetry.sdk", "no_such_exporter.http"))
    with structlog.testing.capture_logs() as lines:
        assert exporting_provider("1") is None
    assert "text2weight[tracing]" in lines[0]["event"]
    assert lines[0]["missing"] == ["no_such_exporter.http"]


def test_trace_id_in_log_lines() -> None:
    provider = TracerProvider()
    assert add_trace_id(None, "info", {}) == {}
    with provider.get_tracer("test").start_as_current_span("request") as span:
        assert add_trace_id(None, "info", {}) == {"trace_id": f"{span.get_span_context().trace_id:032x}"}


def test_a_dead_collector_does_not_hold_the_exit_up(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tracing, "_LAST_SPANS_S", 0.2)
    hangs = threading.Event()

    class Collector(InMemorySpanExporter):
        def shutdown(self) -> None:
            hangs.wait(HELD_S)

    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(Collector()))
    try:
        started_at = time.monotonic()
        end_traces(provider)
        assert time.monotonic() - started_at < PATIENCE_S
    finally:
        hangs.set()
    assert "the last traces are lost" in capsys.readouterr().out


def test_waiting_spans_are_sent_at_the_end() -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    provider.get_tracer("test").start_span("last").end()
    end_traces(provider)
    assert [span.name for span in exporter.get_finished_spans()] == ["last"]
