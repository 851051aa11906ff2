"""What waits between the event loop and the model: items, their results, and a bounded line for them."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor

from text2weight_service.job import Work

# Texts in one turn of the text encoder, of all items, after which no further one is taken, and of one: an item waits
# neither for those of a hundred others nor for the thousands that another one may have.
_TEXTS_TOGETHER = 64
_TEXTS_OF_ONE = 16


class QueueFullError(Exception):
    """As many requests are under way as are allowed."""


class DeadlineError(Exception):
    """The request's time was over before its result was there, or cannot suffice."""


class HopelessError(DeadlineError):
    """The request's time cannot suffice; nothing was computed."""


class StoppedError(Exception):
    """The worker stopped before the request was computed."""


@dataclass(frozen=True)
class Progress:
    """One denoiser call of a request that is under way.

    Attributes:
        step: calls made, from 1.
        steps: calls in all.
        timestep: at which this call was made.
        head: safetensors bytes of the estimated head after this call, where it was asked for.
    """

    step: int
    steps: int
    timestep: int
    head: bytes | None


@dataclass(frozen=True)
class Generated:
    """A finished head.

    Attributes:
        data: safetensors bytes, fp32.
        key: hash of all that the head follows from; equal keys have equal heads.
        queue_s: time the request waited for the model, seconds; 0 for a head that was there already.
        encode_s: time its texts spent in the text encoder, together with others', seconds; likewise.
        sample_s: time from its first to its last denoiser call, others' in between, seconds; likewise.
    """

    data: bytes
    key: str
    queue_s: float = 0.0
    encode_s: float = 0.0
    sample_s: float = 0.0


@dataclass(eq=False)
class WorkItem:
    """One computation on its way through the model; several equal requests may wait for it. Made on an event loop.

    Attributes:
        work: what is computed.
        known: embeddings (D,) by text that the caches already held; `learn` adds the text encoder's.
        deadline: `time.monotonic()` after which nobody wants the result.
        report: called on the model's thread after each of the item's denoiser calls, or None.
        heads_every: report a head after every so many calls; 0 for never.
        future: receives the result or an error, through `resolve_all`.
        abandoned: set when nobody waits any more; the model drops the item before its next call.
        queued_at: `time.monotonic()` of its making.
        encoded: embeddings (D,) by text that were computed for it, for the shared cache.
        encode_s: time of that, seconds.
        missing: texts that are yet to be embedded.
        calls_left: denoiser calls that are still to be made.
    """

    work: Work
    known: dict[str, Tensor]
    deadline: float
    report: Callable[[Progress], None] | None = None
    heads_every: int = 0
    future: asyncio.Future[Generated] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    abandoned: bool = False
    queued_at: float = field(default_factory=time.monotonic)
    encoded: dict[str, Tensor] = field(default_factory=dict)
    encode_s: float = 0.0
    missing: list[str] = field(init=False)
    calls_left: int = field(init=False)

    def __post_init__(self) -> None:
        self.missing = [text for text in self.work.texts if text not in self.known]
        self.calls_left = self.work.calls

    @cached_property  # asked for often: of all items under way for each new one
    def guided(self) -> bool:
        """Whether each of its calls takes two rows of the network."""
        return self.work.request.guidance_scale != 1

    @property
    def next_texts(self) -> list[str]:
        """The missing texts of its next turn in the text encoder."""
        return self.missing[:_TEXTS_OF_ONE]

    def learn(self, rows: Mapping[str, Tensor], encoded: Mapping[str, Tensor], seconds: float) -> None:
        """Take the embeddings of `next_texts`.

        Args:
            rows: embeddings (D,) by text, among them those of `next_texts`.
            encoded: those of them that were not there already.
            seconds: time of the turn.
        """
        own = self.next_texts
        self.known |= {text: rows[text] for text in own}
        self.encoded |= {text: encoded[text] for text in own if text in encoded}
        self.encode_s += seconds
        del self.missing[: len(own)]

    def start(self) -> bool:
        """Claim the item for a thread; False when nobody waits for it or, with an error, when it is too late."""
        if self.abandoned:
            return False
        if time.monotonic() >= self.deadline:
            self.fail(DeadlineError())
            return False
        return True

    def fail(self, error: Exception) -> None:
        """Resolve the item with an error; on any thread."""
        resolve_all([(self, error)])


def resolve_all(outcomes: Iterable[tuple[WorkItem, Generated | Exception]]) -> None:
    """Give items their results or errors; on any thread.

    A loop is woken once for all its items: whenever it wakes, it takes the interpreter from the thread that computes,
    for some milliseconds.
    """
    by_loop = defaultdict(list)
    for item, outcome in outcomes:
        by_loop[item.future.get_loop()].append((item.future, outcome))
    for loop, own in by_loop.items():
        with suppress(RuntimeError):  # the loop has closed: nobody waits any more
            loop.call_soon_threadsafe(_hand_over, own)


def _hand_over(outcomes: Sequence[tuple[asyncio.Future[Generated], Generated | Exception]]) -> None:
    for future, outcome in outcomes:
        if future.done():  # cancelled by who waited
            continue
        if isinstance(outcome, Exception):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)


class Place:
    """A reserved place in the queue; `WorkQueue.place` hands it out and takes it back."""

    def __init__(self, queue: WorkQueue) -> None:
        self._queue = queue
        self.item: WorkItem | None = None

    def submit(self, item: WorkItem) -> None:
        """Fill the place with an item, which the model's threads may take from now on.

        Raises:
            StoppedError: the worker has stopped in the meantime.
        """
        self._queue._submit(item)
        self.item = item


class WorkQueue:
    """A bounded number of accepted items: those whose texts wait, those that wait for the model, those it works on.

    Items with missing texts pass the text encoder first; the others overtake them. Thread-safe.
    """

    def __init__(self, size: int) -> None:
        """Make an empty queue with `size` places."""
        self._size = size
        self._places = 0
        self._submitting = 0  # places whose items are still to come
        self._encoding = 0  # items in the text encoder's hands
        self._without_texts: deque[WorkItem] = deque()
        self._ready: deque[WorkItem] = deque()
        self._accepted: set[WorkItem] = set()
        self._closed = False
        self._stopped = False
        self._woken = False
        self._lock = threading.RLock()
        # One for each of the two threads that take: waking one that has nothing to do takes the processor from the
        # other.
        self._texts_came = threading.Condition(self._lock)
        self._ready_came = threading.Condition(self._lock)

    @property
    def waiting(self) -> int:
        """Number of requests that were accepted and that the model has not begun."""
        return self._submitting + self._encoding + len(self._without_texts) + len(self._ready)

    def rows_ahead(self, calls: int) -> int:
        """Rows of denoiser calls that come before a new item with so many calls, or together with it."""
        with self._lock:
            return sum(min(item.calls_left, calls) * (1 + item.guided) for item in self._accepted)

    @contextmanager
    def place(self) -> Iterator[Place]:
        """Hold a place from admission to the result; leaving early gives it up, whatever the reason.

        Raises:
            QueueFullError: no place is free.
            StoppedError: the queue is closed.
        """
        with self._lock:
            if self._closed:
                raise StoppedError
            if self._places >= self._size:
                raise QueueFullError
            self._places += 1
            self._submitting += 1
        place = Place(self)
        try:
            yield place
        finally:
            self._give_up(place)

    def take_texts(self) -> list[WorkItem]:
        """Wait for items with missing texts, and take some for a turn; an empty list once no more can come.

        Each of them has to come back through `put_back`, or have its future resolved and be counted off there.
        """
        with self._lock:
            self._texts_came.wait_for(lambda: self._without_texts or self._over())
            items: list[WorkItem] = []
            texts: set[str] = set()
            while self._without_texts and len(texts) < _TEXTS_TOGETHER:
                items.append(self._without_texts.popleft())
                texts.update(items[-1].next_texts)
            self._encoding += len(items)
            return items

    def put_back(self, taken: int, items: Sequence[WorkItem]) -> None:
        """Take back those of `taken` items that go on: to the model, or for another turn where texts are missing."""
        with self._lock:
            self._encoding -= taken
            for item in items:
                if not item.abandoned:
                    (self._without_texts if item.missing else self._ready).append(item)
            self._ready_came.notify()
            self._tell_if_over()
            stopped = self._stopped
        if stopped:
            self.fail_waiting()

    def wait(self, seconds: float) -> bool:
        """Wait until an item is ready, `wake` was called or nothing can come any more; False when the time is over."""
        with self._lock:
            came = self._ready_came.wait_for(lambda: self._ready or self._woken or self._over(), timeout=seconds)
            self._woken = False
            return bool(came)

    def take_ready(self) -> list[WorkItem]:
        """Take all items that are ready."""
        with self._lock:
            items = list(self._ready)
            self._ready.clear()
            return items

    def wake(self) -> None:
        """End the wait for ready items, though there may be none; where nobody waits, the next one."""
        with self._lock:
            self._woken = True
            self._ready_came.notify()

    @property
    def over(self) -> bool:
        """Whether the queue is closed and nothing can come any more."""
        with self._lock:
            return self._over()

    def close(self) -> None:
        """Admit nothing any more; what was accepted can still be taken."""
        with self._lock:
            self._closed = True
            self._tell_if_over()

    def fail_waiting(self) -> int:
        """Close, and resolve everything that waits with StoppedError; returns how many items that were."""
        with self._lock:
            self._closed = self._stopped = True
            left = [*self._without_texts, *self._ready]
            self._without_texts.clear()
            self._ready.clear()
            self._tell_if_over()
        unanswered = [item for item in left if not item.abandoned]
        resolve_all((item, StoppedError()) for item in unanswered)
        return len(unanswered)

    def _over(self) -> bool:
        return self._stopped or (self._closed and self.waiting == 0)

    def _tell_if_over(self) -> None:
        """End the waits of both threads once nothing can come any more; the lock is held."""
        if self._over():
            self._texts_came.notify_all()
            self._ready_came.notify_all()

    def _submit(self, item: WorkItem) -> None:
        with self._lock:
            if self._stopped:
                raise StoppedError
            self._submitting -= 1
            self._accepted.add(item)
            if item.missing:
                self._without_texts.append(item)
                self._texts_came.notify()
            else:
                self._ready.append(item)
                self._ready_came.notify()

    def _give_up(self, place: Place) -> None:
        with self._lock:
            self._places -= 1
            if place.item is None:
                self._submitting -= 1
            else:
                place.item.abandoned = True
                self._accepted.discard(place.item)
                for line in (self._without_texts, self._ready):
                    if place.item in line:
                        line.remove(place.item)
            self._tell_if_over()
