"""The text encoder's thread: embeds what waiting items lack, so that running ones never wait for a text encoder.

Letter: D embedding size.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import structlog
from torch import Tensor

from text2weight.errors import InvalidInputError
from text2weight.text_encoder import TextEncoder
from text2weight_service.call_watch import CallWatch
from text2weight_service.embedding_cache import MemoryCache
from text2weight_service.metrics import Metrics
from text2weight_service.work_queue import WorkItem, WorkQueue

log = structlog.get_logger(__name__)

TEXTS_PER_CALL = 8


class GenerationFailedError(Exception):
    """The model failed on this request; the cause is in the log."""


def fail_item(item: WorkItem, error: Exception) -> bool:
    """Resolve a claimed item with its error; returns whether the model is to blame, and not the request's input."""
    if isinstance(error, InvalidInputError):
        item.fail(error)
        return False
    log.error("generation failed", request_id=item.work.job.request_id, exc_info=error)
    item.fail(GenerationFailedError())
    return True


def encode_texts(
    encoder: TextEncoder, texts: Sequence[str], around: Callable[[], AbstractContextManager[None]] = nullcontext
) -> dict[str, Tensor]:
    """Embeddings (D,) by text, from calls of one size: no bit of one depends on what is encoded with it.

    Args:
        encoder: makes the embeddings.
        texts: any number.
        around: made anew for each call, which happens in it.

    Raises:
        Whatever the encoder raises.
    """
    rows = {}
    for start in range(0, len(texts), TEXTS_PER_CALL):
        part = list(texts[start : start + TEXTS_PER_CALL])
        padded = part + part[:1] * (TEXTS_PER_CALL - len(part))
        with around():
            encoded = encoder.encode(padded)  # (TEXTS_PER_CALL, D)
        # Copies, because a row of the result would keep the whole result alive in the cache.
        rows.update({text: row.clone() for text, row in zip(part, encoded, strict=False)})
    return rows


class TextStage:
    """Takes items with missing texts from the queue and gives them back with embeddings, some texts at a time."""

    def __init__(
        self,
        encoder: TextEncoder,
        memory: MemoryCache,
        queue: WorkQueue,
        metrics: Metrics,
        on_failure: Callable[[], None],
    ) -> None:
        """Encode for a queue; `memory` keeps what was encoded, `on_failure` is told when the encoder failed."""
        self.watch = CallWatch()
        self._encoder = encoder
        self._memory = memory
        self._queue = queue
        self._metrics = metrics
        self._on_failure = on_failure

    def run(self) -> None:
        """Work until the queue is over."""
        while taken := self._queue.take_texts():
            self._queue.put_back(len(taken), self._embed(taken))

    def _embed(self, taken: Sequence[WorkItem]) -> list[WorkItem]:
        """Embed the next texts of all items; where that fails, item by item, so that a broken one fails alone.

        Returns:
            the items that go on.
        """
        items = [item for item in taken if item.start()]
        try:
            self._encode(items)
            return items
        except Exception as error:  # a text encoder may raise anything, and the thread must survive it
            if len(items) > 1 and not isinstance(error, InvalidInputError):
                self._metrics.batch_failures.inc()
                log.warning("text encoder failed, retrying item by item", items=len(items), error=repr(error))
        done = []
        failed = False
        for item in items:
            try:
                self._encode([item])
                done.append(item)
            except Exception as error:
                if not item.abandoned:
                    failed |= fail_item(item, error)
        if failed:
            self._on_failure()
        return done

    def _encode(self, items: Sequence[WorkItem]) -> None:
        started_at = time.monotonic()
        wanted = list(dict.fromkeys(text for item in items for text in item.next_texts))
        rows = self._memory.get(wanted)  # an earlier turn may have computed some since they were asked for
        unknown = [text for text in wanted if text not in rows]
        encoded = encode_texts(self._encoder, unknown, self._call)
        self._memory.put(encoded)
        rows |= encoded
        spent = time.monotonic() - started_at
        for item in items:
            item.learn(rows, encoded, spent)

    @contextmanager
    def _call(self) -> Iterator[None]:
        started_at = time.monotonic()
        with self.watch:
            yield
        self._metrics.stage_seconds.labels("encode").observe(time.monotonic() - started_at)
