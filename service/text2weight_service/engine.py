"""The engine: admits requests, runs the model on a thread of its own, and drains on shutdown."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from enum import Enum

import structlog

from text2weight_service.batch_runner import BatchRunner
from text2weight_service.embedding_cache import EmbeddingCache, MemoryCache, SharedEmbeddings
from text2weight_service.job import Job, plan_work
from text2weight_service.metrics import Metrics
from text2weight_service.model import Model, load_model
from text2weight_service.redis_store import RedisStore
from text2weight_service.settings import Settings
from text2weight_service.work_queue import (
    DeadlineError,
    Generated,
    Progress,
    QueueFullError,
    StoppedError,
    WorkItem,
    WorkQueue,
)

log = structlog.get_logger(__name__)

_LONGEST_RETRY_AFTER_S = 60


class Phase(Enum):
    """Where a worker is in its life."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"


class NotReadyError(Exception):
    """The worker takes no requests in its present phase."""

    def __init__(self, phase: Phase) -> None:
        super().__init__(phase.value)
        self.phase = phase


class BusyError(Exception):
    """The queue is full; `retry_after_s` estimates when it will not be."""

    def __init__(self, waiting: int, retry_after_s: int) -> None:
        super().__init__(f"{waiting} requests are waiting")
        self.waiting = waiting
        self.retry_after_s = retry_after_s


@dataclass(frozen=True)
class _Loaded:
    model: Model
    cache: EmbeddingCache
    runner: BatchRunner


class Engine:
    """Owns the model and its thread. All public methods belong to the event loop, `begin_drain` to any thread."""

    def __init__(
        self, settings: Settings, load: Callable[[Settings], Model] = load_model, metrics: Metrics | None = None
    ) -> None:
        """Prepare an engine; nothing is loaded before `start`.

        Args:
            settings: the service's settings.
            load: makes the model; runs on the model's thread.
            metrics: where to count; its own where not given.
        """
        self.settings = settings
        self.metrics = metrics or Metrics()
        self.metrics.watch(lambda: self._queue.waiting, lambda: self.phase is Phase.READY)
        self.failure: Exception | None = None
        self.on_failure: Callable[[], None] | None = None
        self._load = load
        self._draining = False
        self._queue = WorkQueue(settings.queue_size)
        self._loaded: _Loaded | None = None
        self._redis: RedisStore | None = None
        if settings.redis_url is not None:
            url = settings.redis_url.get_secret_value()
            self._redis = RedisStore(url, settings.redis_timeout_s, self.metrics)
        self._thread = threading.Thread(target=self._run, name="t2w-model", daemon=True)
        self._background: set[asyncio.Task[None]] = set()

    @property
    def phase(self) -> Phase:
        """Where the worker is in its life."""
        if self.failure is not None:
            return Phase.FAILED
        if self._draining:
            return Phase.DRAINING
        return Phase.STARTING if self._loaded is None else Phase.READY

    @property
    def alive(self) -> bool:
        """Whether the model's thread can still answer; False asks the orchestrator for a restart."""
        died = self._thread.ident is not None and not self._thread.is_alive() and not self._draining
        return self.failure is None and not died

    @property
    def model(self) -> Model:
        """The loaded model, for description only.

        Raises:
            NotReadyError: it is not loaded.
        """
        if self._loaded is None:
            raise NotReadyError(self.phase)
        return self._loaded.model

    def start(self) -> None:
        """Start to load and warm up in the background; `phase` tells when that is done."""
        self._thread.start()

    async def generate(self, job: Job) -> Generated:
        """Generate one head, together with whatever other requests wait.

        Raises:
            InvalidInputError: the model refuses the input; `field` says which part.
            NotReadyError: starting, draining or failed.
            BusyError: too many requests wait.
            DeadlineError: not finished in time.
            GenerationFailedError: the model failed on this request.
        """
        loaded = self._require_ready()
        work = plan_work(loaded.model, job)
        try:
            async with asyncio.timeout(job.deadline - time.monotonic()):
                with self._queue.place() as place:
                    item = WorkItem(work, await loaded.cache.lookup(work.texts))
                    place.submit(item)
                    result = await asyncio.wrap_future(item.future)
        except QueueFullError:
            raise BusyError(self._queue.waiting, self._retry_after_s(loaded.runner)) from None
        except StoppedError:
            raise NotReadyError(self.phase) from None
        except TimeoutError:
            raise DeadlineError from None
        self._share(loaded.cache, result)
        return result

    async def stream(self, job: Job, heads_every: int) -> AsyncGenerator[Progress | Generated]:
        """Generate one head and report its denoiser calls; the finished head comes last.

        A reader that is slower than the model misses progress, but never the finished head.

        Args:
            job: what is asked for.
            heads_every: report the estimated head after every so many calls; 0 for never.

        Raises:
            As `generate`.
        """
        yield await self.generate(job)

    def begin_drain(self) -> None:
        """Take no new requests; finish the accepted ones. May be called from any thread and from signal handlers."""
        # A plain flag: a signal handler must not take a lock that the interrupted code may hold.
        self._draining = True

    async def stop(self) -> None:
        """Drain within the drain timeout, then fail what is left and end the model's thread."""
        self.begin_drain()
        self._queue.close()
        if self._thread.ident is not None:
            await asyncio.to_thread(self._thread.join, self.settings.drain_timeout_s)
        if self._thread.is_alive():
            left = self._queue.fail_waiting()
            log.warning("drain timeout is over", unanswered=left, timeout_s=self.settings.drain_timeout_s)
            if self._loaded is not None:
                self._loaded.runner.stop = True
        if self._background:
            await asyncio.wait(self._background)
        if self._redis is not None:
            await self._redis.close()

    def _require_ready(self) -> _Loaded:
        if self._loaded is None or self.phase is not Phase.READY:
            raise NotReadyError(self.phase)
        return self._loaded

    def _retry_after_s(self, runner: BatchRunner) -> int:
        batches = math.ceil(self._queue.waiting / self.settings.max_batch_size)
        return min(max(math.ceil(batches * runner.recent_batch_s), 1), _LONGEST_RETRY_AFTER_S)

    def _share(self, cache: EmbeddingCache, result: Generated) -> None:
        if self._redis is not None and result.encoded:
            task = asyncio.create_task(cache.share(result.encoded))
            self._background.add(task)
            task.add_done_callback(self._background.discard)

    # Below: the model's thread.

    def _run(self) -> None:
        try:
            runner = self._prepare()
        except Exception as error:  # whatever is wrong with a checkpoint, the worker must report it and not hang
            self._fail(error)
            return
        while batch := self._queue.take(self.settings.max_batch_size, self.settings.batch_window_ms / 1000):
            if not runner.run(batch):
                self._check_model(runner)

    def _prepare(self) -> BatchRunner:
        started_at = time.monotonic()
        model = self._load(self.settings)
        memory = MemoryCache(self.settings.embedding_cache_size)
        runner = BatchRunner(model, memory, self.metrics)
        loaded_at = time.monotonic()
        runner.warm_up()
        encoder = model.text_encoder
        shared = None
        if self._redis is not None:
            ttl_s = self.settings.embedding_ttl_s
            shared = SharedEmbeddings(self._redis, encoder.fingerprint, encoder.embedding_dim, ttl_s, self.metrics)
        cache = EmbeddingCache(memory, shared, self.metrics)
        self._loaded = _Loaded(model, cache, runner)
        log.info(
            "model ready",
            checkpoint=model.checkpoint_hash,
            load_s=round(loaded_at - started_at, 3),
            warm_up_s=round(time.monotonic() - loaded_at, 3),
        )
        return runner

    def _check_model(self, runner: BatchRunner) -> None:
        """Tell a broken model from a broken request: a lost device fails on the warm-up request too."""
        try:
            runner.warm_up()
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        self.failure = error
        log.error("the model cannot be used", error=str(error))
        log.debug("cause", exc_info=error)
        self._queue.fail_waiting()
        if self.on_failure is not None:
            self.on_failure()
