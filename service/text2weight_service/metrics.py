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
            "Time of one call of a stage: encode (text encoder) or sample (denoiser).",
            ["stage"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.batch_size = Histogram(
            "t2w_batch_size", "Requests in one denoiser call.", buckets=_BATCH_SIZES, registry=registry
        )
        self.batch_failures = Counter(
            "t2w_batch_failures_total", "Calls that failed and were made again in parts.", registry=registry
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
        self.redis_breaker = Gauge(
            "t2w_redis_breaker_state",
            "Whether Redis is called, by operation (read, write, limit, release): 0 yes, 1 a single probe, 2 no.",
            ["operation"],
            registry=registry,
        )
        self.client_requests = Counter(
            "t2w_client_requests_total",
            "Requests by name of the key and result (accepted, unauthorized, rate-limited, busy).",
            ["client", "result"],
            registry=registry,
        )
        self.connections_cut = Counter(
            "t2w_connections_cut_total",
            "Connections ended by the worker: slow headers, unread answers, pipelined requests, too-many connections.",
            ["reason"],
            registry=registry,
        )
        self.padding_rows = Counter(
            "t2w_padding_rows_total", "Rows of denoiser calls that no request needed.", registry=registry
        )
        self.ladder_rows = Gauge(
            "t2w_largest_call_rows",
            "Most rows of a denoiser call; fewer after running out of memory.",
            registry=registry,
        )
        self.dropped = Counter(
            "t2w_dropped_total",
            "Requests dropped between two denoiser calls, by reason (left, deadline).",
            ["reason"],
            registry=registry,
        )
        self.refused = Counter(
            "t2w_refused_total",
            "Requests refused at once, by reason (full, deadline: too short even alone, load: too short now).",
            ["reason"],
            registry=registry,
        )
        self.joined = Counter(
            "t2w_joined_total", "Heads taken from the computation of an equal one under way.", registry=registry
        )
        self.head_lookups = Counter(
            "t2w_head_cache_lookups_total",
            "Finished heads looked up, by tier (memory, redis) and result (hit, miss, invalid).",
            ["tier", "result"],
            registry=registry,
        )
        self.head_cache_bytes = Gauge("t2w_head_cache_bytes", "Bytes of finished heads kept.", registry=registry)
        self._running = Gauge("t2w_running", "Requests between their first and last denoiser call.", registry=registry)
        self._waiting = Gauge("t2w_queue_waiting", "Requests waiting for the model now.", registry=registry)
        self._ready = Gauge("t2w_ready", "1 when the worker takes requests.", registry=registry)
        self._worker = _WorkerCollector()
        registry.register(self._worker)

    def watch(self, waiting: Callable[[], float], running: Callable[[], float], ready: Callable[[], float]) -> None:
        """Read these gauges from the engine whenever they are scraped."""
        self._waiting.set_function(waiting)
        self._running.set_function(running)
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
