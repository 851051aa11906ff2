"""The bounded line of requests between the event loop and the model's thread."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor

from text2weight_service.job import Work


class QueueFullError(Exception):
    """As many requests wait as are allowed."""


class DeadlineError(Exception):
    """The request's time was over before its result was there."""


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
        queue_s: time the request waited for the model, seconds.
        encode_s: time of its batch in the text encoder, seconds.
        sample_s: time of its batch in the reverse diffusion, seconds.
        encoded: embeddings (D,) by text that were computed for it, for the shared cache.
    """

    data: bytes
    key: str
    queue_s: float
    encode_s: float
    sample_s: float
    encoded: Mapping[str, Tensor]


@dataclass(eq=False)
class WorkItem:
    """One request on its way through the model.

    Attributes:
        work: what is computed.
        known: embeddings (D,) by text that the caches already held.
        future: receives the result or an error, exactly once.
        abandoned: set when nobody waits any more; a running batch stops when all of its items are abandoned.
    """

    work: Work
    known: Mapping[str, Tensor]
    future: Future[Generated] = field(default_factory=Future)
    abandoned: bool = False
    queued_at: float = field(default_factory=time.monotonic)

    @property
    def deadline(self) -> float:
        """`time.monotonic()` after which nobody wants the result."""
        return self.work.job.deadline

    def start(self) -> bool:
        """Claim the item for the model; False when it was cancelled or, with an error, when it is too late."""
        if not self.future.set_running_or_notify_cancel():
            return False
        if time.monotonic() >= self.deadline:
            self.future.set_exception(DeadlineError())
            return False
        return True


class Place:
    """A reserved place in the queue; `WorkQueue.place` hands it out and takes it back."""

    def __init__(self, queue: WorkQueue) -> None:
        self._queue = queue
        self.item: WorkItem | None = None

    def submit(self, item: WorkItem) -> None:
        """Fill the place with an item, which the model's thread may take from now on.

        Raises:
            StoppedError: the queue was closed in the meantime.
        """
        self._queue._append(item)
        self.item = item


class WorkQueue:
    """First in, first out; never holds more than `size` reserved and waiting requests. Thread-safe."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._reserved = 0
        self._items: deque[WorkItem] = deque()
        self._closed = False
        self._last_batch = 0
        self._changed = threading.Condition()

    @property
    def waiting(self) -> int:
        """Number of requests that were admitted and not yet taken by the model."""
        return self._reserved + len(self._items)

    @contextmanager
    def place(self) -> Iterator[Place]:
        """Hold a place from admission to the result; leaving early gives it up, whatever the reason.

        Raises:
            QueueFullError: no place is free.
            StoppedError: the queue is closed.
        """
        with self._changed:
            if self._closed:
                raise StoppedError
            if self.waiting >= self._size:
                raise QueueFullError
            self._reserved += 1
        place = Place(self)
        try:
            yield place
        finally:
            self._give_up(place)

    def take(self, most: int, window_s: float) -> list[WorkItem]:
        """Wait for requests and take up to `most`; an empty list once the queue is closed and empty.

        Args:
            most: largest number of items.
            window_s: longest wait for as many items as last time. A lone caller therefore never waits, and
                many callers that ask again and again stay together.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._items or self._closed)
            expected = min(most, self._last_batch)
            self._changed.wait_for(lambda: len(self._items) >= expected or self._closed, timeout=window_s)
            batch = [self._items.popleft() for _ in range(min(most, len(self._items)))]
            self._last_batch = len(batch)
            return batch

    def close(self) -> None:
        """Admit nothing any more; what waits can still be taken."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def fail_waiting(self) -> int:
        """Close, and resolve everything that waits with StoppedError; returns how many items that were."""
        self.close()
        with self._changed:
            left = list(self._items)
            self._items.clear()
        started = [item for item in left if item.future.set_running_or_notify_cancel()]
        for item in started:
            item.future.set_exception(StoppedError())
        return len(started)

    def _append(self, item: WorkItem) -> None:
        with self._changed:
            if self._closed:
                raise StoppedError
            self._reserved -= 1
            self._items.append(item)
            self._changed.notify_all()

    def _give_up(self, place: Place) -> None:
        with self._changed:
            if place.item is None:
                self._reserved -= 1
            else:
                place.item.abandoned = True
                if place.item in self._items:
                    self._items.remove(place.item)
