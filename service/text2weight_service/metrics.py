"""Prometheus metrics of one worker. Every label takes its values from a short fixed list."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
PHASES = ("starting", "ready", "draining", "failed")
BUILD_LABELS = ("version", "checkpoint", "text_encoder", "device")


class Metrics:
    """The metrics of one app, in a registry of their own so that several apps fit in one process."""

    def __init__(self) -> None:
        registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.registry = registry
        self.http_requests = Counter(
            "t2w_http_requests_total", "Answered HTTP requests.", ["method", "route", "status"], registry=registry
        )
        self.http_seconds = Histogram(
            "t2w_http_request_duration_seconds",
            "From first byte of a request to the end of its answer.",
            ["route"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.queue_seconds = Histogram(
            "t2w_queue_wait_seconds", "Time a request waited for the model.", buckets=_SECONDS, registry=registry
        )
        self.stage_seconds = Histogram(
            "t2w_batch_duration_seconds",
            "Time of one batch in a stage: encode (text encoder) or sample (reverse diffusion).",
            ["stage"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.batch_size = Histogram(
            "t2w_batch_size", "Requests in one reverse diffusion.", buckets=_BATCH_SIZES, registry=registry
        )
        self.batch_failures = Counter(
            "t2w_batch_failures_total", "Batches that failed and were retried item by item.", registry=registry
        )
        self.heads = Counter("t2w_heads_generated_total", "Heads generated.", registry=registry)
        self.cache_lookups = Counter(
            "t2w_embedding_cache_lookups_total",
            "Text embeddings looked up, by tier (memory, redis) and result (hit, miss, invalid).",
            ["tier", "result"],
            registry=registry,
        )
        self.redis_failures = Counter(
            "t2w_redis_failures_total",
            "Redis calls that failed or timed out; each counts as misses.",
            registry=registry,
        )
        self._waiting = Gauge("t2w_queue_waiting", "Requests waiting for the model now.", registry=registry)
        self._ready = Gauge("t2w_ready", "1 when the worker takes requests.", registry=registry)
        self._worker = _WorkerCollector()
        registry.register(self._worker)

    def watch(self, waiting: Callable[[], float], ready: Callable[[], float]) -> None:
        """Read the two gauges from the engine whenever they are scraped."""
        self._waiting.set_function(waiting)
        self._ready.set_function(ready)

    def watch_worker(self, phase: Callable[[], str], build: Callable[[], Mapping[str, str] | None]) -> None:
        """Read the worker's phase and what it runs whenever they are scraped.

        Args:
            phase: one of PHASES.
            build: a value for each of BUILD_LABELS, or None while no model is loaded.
        """
        self._worker.phase = phase
        self._worker.build = build

    def render(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)


class _WorkerCollector(Collector):
    """Facts about the worker that its engine knows; each is a gauge that is 1 beside what is true now."""

    def __init__(self) -> None:
        self.phase: Callable[[], str] = lambda: PHASES[0]
        self.build: Callable[[], Mapping[str, str] | None] = lambda: None

    def collect(self) -> Iterator[GaugeMetricFamily]:
        now = self.phase()
        phases = GaugeMetricFamily("t2w_phase", "1 beside the phase the worker is in.", labels=["phase"])
        for phase in PHASES:
            phases.add_metric([phase], float(phase == now))
        yield phases
        info = GaugeMetricFamily("t2w_build_info", "Always 1; the labels tell what runs.", labels=BUILD_LABELS)
        if (build := self.build()) is not None:
            info.add_metric([build[label] for label in BUILD_LABELS], 1)
        yield info
