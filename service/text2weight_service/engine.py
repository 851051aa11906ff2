"""The engine: admits requests, runs the model on a thread of its own, and drains on shutdown."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import Enum
from functools import partial

import structlog

from text2weight.condition import padded_count
from text2weight_service.batch_runner import BatchRunner
from text2weight_service.embedding_cache import EmbeddingCache, MemoryCache, SharedEmbeddings
from text2weight_service.flights import Flight, Flights
from text2weight_service.head_cache import HeadCache
from text2weight_service.job import Job, Work, plan_work
from text2weight_service.ladder import Shape
from text2weight_service.memory import FreedMemory
from text2weight_service.metrics import Metrics
from text2weight_service.model import Model, load_model
from text2weight_service.redis_budget import task_without_budget
from text2weight_service.redis_store import RedisStore
from text2weight_service.settings import Settings
from text2weight_service.text_stage import TextStage
from text2weight_service.work_queue import (
    DeadlineError,
    Generated,
    HopelessError,
    Progress,
    QueueFullError,
    StoppedError,
    WorkItem,
    WorkQueue,
)

log = structlog.get_logger(__name__)

_LONGEST_RETRY_AFTER_S = 60
# A call of the denoiser or the text encoder that takes longer hangs: the device is lost.
LONGEST_CALL_S = 120.0
# Share of an estimated time that a request must have left to be taken.
_SURE = 0.8
# Where nothing runs, a refusal by estimates older than this has the self-check measure anew.
_STALE_S = 2.0
# An idle thread needs a moment to notice that it is over, and a busy one the rest of its call.
_WAKE_UP_S = 0.1
_LAST_CALL_S = 1.0
# Progress that a stream's slow reader can catch up on.
_MOST_UNREAD = 32
_FEW_CLASSES = Shape(padded_count(1), guided=False)


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
    """Too much is under way to take this request; `retry_after_s` estimates when it will not be."""

    def __init__(self, reason: str, retry_after_s: int) -> None:
        super().__init__(reason)
        self.retry_after_s = retry_after_s


@dataclass(frozen=True)
class _Loaded:
    model: Model
    cache: EmbeddingCache
    runner: BatchRunner
    texts: TextStage


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
        self.metrics.watch(
            lambda: self._queue.waiting,
            lambda: 0 if self._loaded is None else len(self._loaded.runner.running),
            lambda: self.phase is Phase.READY,
        )
        self.failure: Exception | None = None
        self.on_failure: Callable[[], None] | None = None
        self._load = load
        self._in_doubt = False
        self._drain_ends_at: float | None = None
        self._queue = WorkQueue(settings.queue_size)
        self._loaded: _Loaded | None = None
        self._redis: RedisStore | None = None
        if settings.redis_url is not None:
            url = settings.redis_url.get_secret_value()
            self._redis = RedisStore(url, settings.redis_timeout_s, self.metrics)
        self._heads = HeadCache(settings.head_cache_mb, self._redis, settings.head_ttl_s, self.metrics)
        self._flights = Flights(self.metrics)
        self._thread = threading.Thread(target=self._run, name="t2w-model", daemon=True)
        self._text_thread: threading.Thread | None = None
        self._background: set[asyncio.Task[None]] = set()

    @property
    def phase(self) -> Phase:
        """Where the worker is in its life; FAILED while it is not alive."""
        if not self.alive:
            return Phase.FAILED
        if self._drain_ends_at is not None:
            return Phase.DRAINING
        return Phase.STARTING if self._loaded is None else Phase.READY

    @property
    def alive(self) -> bool:
        """Whether the model's threads can still answer; False asks the orchestrator for a restart.

        A call that hangs may return after all, and then it is True again.
        """
        if self.failure is not None:
            return False
        died = any(thread.ident is not None and not thread.is_alive() for thread in self._threads())
        if died and self._drain_ends_at is None:
            return False
        watches = () if self._loaded is None else (self._loaded.runner.watch, self._loaded.texts.watch)
        return all(watch.call_s <= LONGEST_CALL_S for watch in watches)

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
        """Generate one head; its denoiser calls are shared with whatever other requests are under way.

        A head that is known already is returned at once, and equal requests under way are computed once.

        Raises:
            InvalidInputError: the model refuses the input; `field` says which part.
            NotReadyError: starting, draining or failed.
            BusyError: too many requests are under way, or so many that this one cannot be finished in time.
            DeadlineError: not finished in time, or the time is too short for it even without any other request.
            GenerationFailedError: the model failed on this request.
        """
        loaded = self._require_ready()
        work = plan_work(loaded.model, job)
        with self._as_answers():
            while True:
                head = self._heads.get(work.key) if job.reusable else None
                if head is not None:
                    return Generated(head, work.key)
                try:
                    return await self._flights.wait(work.key, job.deadline, partial(self._compute, loaded, work))
                except DeadlineError as error:
                    if isinstance(error, HopelessError) or time.monotonic() >= job.deadline:
                        raise
                    # Joined in the moment in which the others' time was over: compute it anew.

    async def stream(self, job: Job, heads_every: int) -> AsyncGenerator[Progress | Generated]:
        """Generate one head and report its denoiser calls; the finished head comes last.

        It is always computed, for watching is the point. A reader that is slower than the model misses progress, but
        never the finished head.

        Args:
            job: what is asked for.
            heads_every: report the estimated head after every so many calls; 0 for never.

        Raises:
            As `generate`.
        """
        loaded = self._require_ready()
        work = plan_work(loaded.model, job)
        news = _News()
        flight = Flight(job.deadline)
        task = asyncio.create_task(self._compute(loaded, work, flight, (news.put, heads_every)))
        task.add_done_callback(lambda _: news.wake())
        try:
            while not task.done():
                with self._as_answers():
                    async with asyncio.timeout(job.deadline - time.monotonic()):
                        await news.arrived.wait()
                news.arrived.clear()
                while news.unread:
                    yield news.unread.popleft()
            with self._as_answers():
                result = await task
            yield result
        finally:
            task.cancel()
            await asyncio.wait((task,))
            if not task.cancelled():
                task.exception()  # a reader that left does not want to know

    def begin_drain(self) -> None:
        """Take no new requests; finish the accepted ones. May be called from any thread and from signal handlers."""
        # A plain number: a signal handler must not take a lock that the interrupted code may hold.
        if self._drain_ends_at is None:
            self._drain_ends_at = time.monotonic() + self.settings.drain_timeout_s

    @property
    def drain_left_s(self) -> float:
        """Seconds until the drain ends; below 0 when it is over, infinite before it began."""
        return math.inf if self._drain_ends_at is None else self._drain_ends_at - time.monotonic()

    async def stop(self) -> None:
        """Drain within what is left of the drain timeout, then fail what is left and end the model's thread."""
        self.begin_drain()
        self._queue.close()
        if self._thread.ident is not None:
            await asyncio.to_thread(self._thread.join, max(self.drain_left_s, _WAKE_UP_S))
        if self._thread.is_alive():
            left = self._queue.fail_waiting()
            log.warning("drain timeout is over", unanswered=left, timeout_s=self.settings.drain_timeout_s)
            if self._loaded is not None:
                self._loaded.runner.stop = True
            # torch must not be within a call when the interpreter ends, if that can be helped.
            await asyncio.to_thread(self._thread.join, _LAST_CALL_S)
        if self._background:
            await asyncio.wait(self._background)
        if self._redis is not None:
            await self._redis.close()

    def _threads(self) -> list[threading.Thread]:
        return [self._thread] if self._text_thread is None else [self._thread, self._text_thread]

    def _require_ready(self) -> _Loaded:
        if self._loaded is None or self.phase is not Phase.READY:
            raise NotReadyError(self.phase)
        return self._loaded

    async def _compute(
        self,
        loaded: _Loaded,
        work: Work,
        flight: Flight,
        report: tuple[Callable[[Progress], None], int] | None = None,
    ) -> Generated:
        """Have a head computed, unless another worker has it; who watches gets it computed."""
        reusable = work.job.reusable
        with self._queue.place() as place:
            head = await self._heads.fetch(work.key) if reusable and report is None else None
            if head is not None:
                return Generated(head, work.key)
            self._refuse_hopeless(loaded, work, flight.deadline)
            known = await loaded.cache.lookup(work.texts)
            item = WorkItem(work, known, flight.deadline, *(report or ()))
            flight.item = item
            place.submit(item)
            result = await item.future
        if reusable:
            self._heads.keep(work.key, result.data)
        if self._redis is not None:
            if item.encoded:
                self._later(loaded.cache.share(item.encoded))
            if reusable:
                self._later(self._heads.share(work.key, result.data))
        return result

    def _refuse_hopeless(self, loaded: _Loaded, work: Work, deadline: float) -> None:
        """Refuse now what the measured times say cannot be finished before the deadline of who waits for it longest.

        The estimates are of a machine that may have been busier than it will be, so only what lacks a good part of
        its time is refused. And refused requests teach nothing: where no others run, the self-check measures for them.

        Raises:
            HopelessError: too slow even alone.
            BusyError: too slow beside the requests that are under way.
        """
        times, guided = loaded.runner.times, work.job.guidance_scale != 1
        shape = Shape(padded_count(len(work.job.classes)), guided)
        left_s = deadline - time.monotonic()
        alone_s = work.calls * times.seconds(shape, 1)
        if _SURE * alone_s > left_s:
            self.metrics.refused.labels("deadline").inc()
            if not loaded.runner.running and time.monotonic() - times.measured_at > _STALE_S:
                self._doubt()
            raise HopelessError(f"{work.calls} steps take about {alone_s:.1f} s, {max(left_s, 0):.1f} s are left")
        rows = self._queue.rows_ahead(work.calls) + work.calls * (1 + guided)
        if _SURE * rows * self._row_s(loaded) > left_s:
            self.metrics.refused.labels("load").inc()
            raise BusyError("the requests under way leave no time for this one", self._retry_after_s(loaded))

    def _row_s(self, loaded: _Loaded) -> float:
        """Seconds per row of the best size of a call, at few classes."""
        runner = loaded.runner
        return min(runner.times.seconds(_FEW_CLASSES, rows) / rows for rows in runner.ladder.rungs) / runner.lanes

    def _retry_after_s(self, loaded: _Loaded) -> int:
        rows = self._queue.rows_ahead(self.settings.max_steps)
        return min(max(math.ceil(rows * self._row_s(loaded)), 1), _LONGEST_RETRY_AFTER_S)

    @contextmanager
    def _as_answers(self) -> Iterator[None]:
        """Turn what a computation ends with into what callers are told."""
        try:
            yield
        except QueueFullError:
            self.metrics.refused.labels("full").inc()
            retry_after_s = 1 if self._loaded is None else self._retry_after_s(self._loaded)
            places = self.settings.queue_size
            raise BusyError(f"{places} requests are under way, as many as are allowed", retry_after_s) from None
        except StoppedError:
            raise NotReadyError(self.phase) from None
        except TimeoutError:
            raise DeadlineError from None

    def _doubt(self) -> None:
        """Have the model's thread check the model, though it may have nothing else to do; on any thread."""
        self._in_doubt = True
        self._queue.wake()

    def _later(self, work: Coroutine[None, None, None]) -> None:
        task = task_without_budget(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    # Below: the model's thread.

    def _run(self) -> None:
        try:
            loaded = self._prepare()
        except Exception as error:  # whatever is wrong with a checkpoint, the worker must report it and not hang
            self._fail(error)
            return
        try:
            self._serve(loaded.runner)
        finally:
            loaded.runner.close()

    def _serve(self, runner: BatchRunner) -> None:
        """Answer requests until the queue is over or the model fails."""
        freed = FreedMemory()
        while self.failure is None:
            freed.give_back()
            over = self._queue.over
            if over and not runner.running:
                return
            if runner.full or (over and not runner.can_go_on):
                runner.wait()
            quiet = not runner.can_go_on and not self._queue.wait(self.settings.self_check_s)
            fine = runner.turn(self._queue.take_ready())
            if (quiet and not runner.running) or not fine or self._in_doubt:
                self._in_doubt = False
                self._check_model(runner)

    def _prepare(self) -> _Loaded:
        started_at = time.monotonic()
        model = self._load(self.settings)
        memory = MemoryCache(self.settings.embedding_cache_size)
        runner = BatchRunner(model, self.metrics, self.settings.max_batch_size, self._queue.wake)
        loaded_at = time.monotonic()
        runner.warm_up()
        encoder = model.text_encoder
        shared = None
        if self._redis is not None:
            ttl_s = self.settings.embedding_ttl_s
            shared = SharedEmbeddings(self._redis, encoder.fingerprint, encoder.embedding_dim, ttl_s, self.metrics)
        cache = EmbeddingCache(memory, shared, self.metrics)
        texts = TextStage(encoder, memory, self._queue, self.metrics, self._doubt)
        self._text_thread = threading.Thread(target=texts.run, name="t2w-text", daemon=True)
        self._text_thread.start()
        self._loaded = _Loaded(model, cache, runner, texts)
        log.info(
            "model ready",
            checkpoint=model.checkpoint_hash,
            load_s=round(loaded_at - started_at, 3),
            warm_up_s=round(time.monotonic() - loaded_at, 3),
            call_ms={rows: round(1000 * runner.times.seconds(_FEW_CLASSES, rows), 2) for rows in runner.ladder.rungs},
        )
        return self._loaded

    def _check_model(self, runner: BatchRunner) -> None:
        """Tell a broken model from a broken request: a lost device fails on the self-check, too."""
        try:
            runner.check()
        except Exception as error:
            self._fail(error)
            runner.fail_all(StoppedError())

    def _fail(self, error: Exception) -> None:
        self.failure = error
        log.error("the model cannot be used", error=str(error))
        log.debug("cause", exc_info=error)
        self._queue.fail_waiting()
        if self.on_failure is not None:
            self.on_failure()


class _News:
    """What a stream's reader has not read yet. The model's thread puts, the event loop that made it reads.

    Bounded: the oldest progress makes room, so a slow reader holds nobody up.
    """

    def __init__(self) -> None:
        self.unread: deque[Progress] = deque(maxlen=_MOST_UNREAD)
        self.arrived = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    def put(self, progress: Progress) -> None:
        """Add progress, on the model's thread."""
        self.unread.append(progress)
        with suppress(RuntimeError):  # the loop has closed: nobody reads any more
            self._loop.call_soon_threadsafe(self.arrived.set)

    def wake(self) -> None:
        """Let the reader look, on the event loop."""
        self.arrived.set()
