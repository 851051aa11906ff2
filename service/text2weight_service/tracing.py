"""OpenTelemetry traces: one span for each request, and one below it for each stage of the model.

On where the environment names a collector, as every OpenTelemetry program understands it, and the extra
`tracing` is installed. FastAPI itself makes the spans of requests; without a provider it makes none.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping, MutableMapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import structlog
from fastapi import FastAPI
from fastapi.telemetry import TelemetryConfig
from opentelemetry import trace
from opentelemetry.trace import TracerProvider

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider as ExportingProvider

log = structlog.get_logger(__name__)

ENDPOINT_VARIABLES = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PACKAGES = ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http")
_LAST_SPANS_S = 2.0
# Probes and scrapes come every few seconds and tell nothing.
_UNTRACED_PATHS = frozenset({"/health/live", "/health/ready", "/metrics"})


def exporting_provider(version: str) -> ExportingProvider | None:
    """Make a provider that sends spans to the collector of the environment, in batches, on a thread of its own.

    Returns:
        None where no collector is named, and, with a warning, where the extra is not installed.
    """
    if os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return None
    variable = next((name for name in ENDPOINT_VARIABLES if os.environ.get(name)), None)
    if variable is None:
        return None
    if missing := [package for package in _PACKAGES if not _installed(package)]:
        log.warning(
            "no traces are sent: the extra is not installed; pip install 'text2weight[tracing]', or unset the variable",
            variable=variable,
            missing=missing,
        )
        return None
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource
    from opentelemetry.sdk.trace import TracerProvider as ExportingProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    # What the environment says in OTEL_SERVICE_NAME or OTEL_RESOURCE_ATTRIBUTES wins.
    named = Resource({"service.name": "text2weight", "service.version": version})
    provider = ExportingProvider(resource=named.merge(OTELResourceDetector().detect()), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    log.info("traces are sent", variable=variable)
    return provider


def end_traces(provider: ExportingProvider) -> None:
    """Send the spans that wait; a collector that does not answer may hold the exit up for 2 s."""
    # The provider's own limit is that of the exporter, 10 s.
    sending = threading.Thread(target=provider.shutdown, name="t2w-traces", daemon=True)
    sending.start()
    sending.join(_LAST_SPANS_S)
    if sending.is_alive():
        log.warning("the last traces are lost: the collector does not answer")


def telemetry(provider: TracerProvider | None) -> TelemetryConfig:
    """FastAPI's own configuration: spans of requests only, and none without a provider.

    Metrics go to Prometheus and log lines to stderr, so neither is exported a second time.
    """
    return {
        "tracing": provider is not None,
        "tracer_provider": provider,
        "metrics": False,
        "logs": False,
        "operation_spans": False,
        "auto_configure": False,
        "exclude": _is_untraced,
    }


def install_tracer(app: FastAPI, provider: TracerProvider | None) -> None:
    """Give the application the tracer that `record_stages` uses; without a provider it has none."""
    app.state.tracer = None if provider is None else provider.get_tracer("text2weight_service")


def record_stages(app: FastAPI, stages: Mapping[str, float], end: float | None = None) -> None:
    """Add a span for each stage to the span of the current request.

    The model computes many requests at once on its own thread, so a stage becomes a span afterwards, from its
    measured time.

    Args:
        app: the application that serves the request.
        stages: seconds spent in each stage, in the order in which they happened, one right after the other.
        end: `time.time()` at which the last one ended; now where not given.
    """
    if app.state.tracer is None:
        return
    at = (time.time() if end is None else end) - sum(stages.values())
    for name, seconds in stages.items():
        span = app.state.tracer.start_span(name, start_time=int(at * 1e9))
        at += seconds
        span.end(int(at * 1e9))


def server_timing(app: FastAPI, stages: Mapping[str, float]) -> dict[str, str]:
    """The header that tells a client the seconds in each stage, which become spans, too; see `record_stages`."""
    record_stages(app, stages)
    return {"Server-Timing": ", ".join(f"{name};dur={seconds * 1000:.2f}" for name, seconds in stages.items())}


def add_trace_id(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Log processor: `trace_id` on every line that is written within a traced request."""
    context = trace.get_current_span().get_span_context()
    if context.is_valid:
        event["trace_id"] = trace.format_trace_id(context.trace_id)
    return event


def _installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:  # a parent of it is missing
        return False


def _is_untraced(scope: MutableMapping[str, Any]) -> bool:
    return scope.get("path") in _UNTRACED_PATHS
