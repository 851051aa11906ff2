"""One batch: embeddings of the prompts, one reverse diffusion, bytes. A batch can fail; the runner cannot.

Letters: K classes, D embedding size.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import structlog
import torch
from torch import Tensor

from text2weight.descriptions import ConditionText
from text2weight.errors import InvalidInputError
from text2weight.generator import GenerationRequest
from text2weight_service.embedding_cache import MemoryCache
from text2weight_service.metrics import Metrics
from text2weight_service.model import Model
from text2weight_service.work_queue import DeadlineError, Generated, StoppedError, WorkItem

log = structlog.get_logger(__name__)


class GenerationFailedError(Exception):
    """The model failed on this request; the cause is in the log."""


class _AbandonedError(Exception):
    """Nobody waits for any result of the running batch."""


class BatchRunner:
    """Computes batches of work items on the model's thread and resolves each item's future exactly once."""

    def __init__(self, model: Model, memory: MemoryCache, metrics: Metrics) -> None:
        self._model = model
        self._memory = memory
        self._metrics = metrics
        self.recent_batch_s = 0.0
        self.stop = False

    def warm_up(self) -> None:
        """Run every stage once, so that the first request does not pay for lazy initialisation.

        Also tells a broken model from a broken request. Whatever the model raises passes through.
        """
        classes = ("cat", "dog")
        sampler, steps = self._model.resolve_sampling(None, None)
        try:
            embeddings = self._model.text_encoder.encode(self._model.prompts(classes))  # (K, D)
        except InvalidInputError:  # a table of embeddings need not hold these names
            embeddings = torch.eye(len(classes), self._model.text_encoder.embedding_dim)  # (K, D)
        text = ConditionText(embeddings, "warm-up")  # nor need a checkpoint's own condition texts
        request = GenerationRequest(classes, embeddings, 0, steps, sampler, condition_text=text)
        self._model.generate_batch([request])[0].to_bytes()

    def run(self, batch: Sequence[WorkItem]) -> bool:
        """Compute a batch; where that fails, compute its items one by one, so that a broken one fails alone.

        Returns:
            False when no item could be computed for a reason that is not the request's own input.
        """
        started_at = time.monotonic()
        items = [item for item in batch if item.start()]
        if not items:
            return True
        try:
            self._compute(items)
            failures = 0
        except Exception as error:  # the model may raise anything, and the thread must survive it
            failures = self._recover(items, error)
        spent = time.monotonic() - started_at
        self.recent_batch_s = spent if self.recent_batch_s == 0 else 0.7 * self.recent_batch_s + 0.3 * spent
        return failures < len(items)

    def _recover(self, items: Sequence[WorkItem], error: Exception) -> int:
        """Resolve the items of a failed batch; returns how many failed through the model's fault."""
        if isinstance(error, _AbandonedError):
            return sum(self._fail(item, error) for item in items)
        if len(items) == 1:
            return int(self._fail(items[0], error))
        if not isinstance(error, InvalidInputError):
            self._metrics.batch_failures.inc()
            log.warning("batch failed, retrying item by item", items=len(items), error=repr(error))
        failures = 0
        for item in items:
            try:
                if time.monotonic() >= item.deadline:
                    raise DeadlineError
                self._compute([item])
            except Exception as own_error:
                failures += int(self._fail(item, own_error))
        return failures

    def _fail(self, item: WorkItem, error: Exception) -> bool:
        """Resolve one item with its error; returns whether the model is to blame."""
        if isinstance(error, _AbandonedError):
            item.future.set_exception(StoppedError())
            return False
        if isinstance(error, InvalidInputError | DeadlineError):
            item.future.set_exception(error)
            return False
        log.error("generation failed", request_id=item.work.job.request_id, exc_info=error)
        item.future.set_exception(GenerationFailedError())
        return True

    def _compute(self, items: Sequence[WorkItem]) -> None:
        """Compute all items together and resolve them; on an error none of them is resolved."""
        taken_at = time.monotonic()
        requests, encoded = self._embed(items)
        encoded_at = time.monotonic()
        artifacts = self._model.generate_batch(requests, on_step=self._stop_if_unwanted(items))
        sampled_at = time.monotonic()
        results = [
            Generated(
                data=artifact.to_bytes(),
                key=item.work.key,
                queue_s=taken_at - item.queued_at,
                encode_s=encoded_at - taken_at,
                sample_s=sampled_at - encoded_at,
                encoded={text: encoded[text] for text in item.work.texts if text in encoded},
            )
            for item, artifact in zip(items, artifacts, strict=True)
        ]
        for item, result in zip(items, results, strict=True):
            item.future.set_result(result)
            self._metrics.queue_seconds.observe(result.queue_s)
        self._metrics.stage_seconds.labels("encode").observe(encoded_at - taken_at)
        self._metrics.stage_seconds.labels("sample").observe(sampled_at - encoded_at)
        self._metrics.batch_size.observe(len(items))
        self._metrics.heads.inc(len(items))

    def _embed(self, items: Sequence[WorkItem]) -> tuple[list[GenerationRequest], dict[str, Tensor]]:
        """Embed the texts of all items, each distinct unknown text once.

        Returns:
            one request per item, and the rows (D,) that had to be computed, by text.
        """
        known: dict[str, Tensor] = {}
        for item in items:
            known.update(item.known)
        unknown = dict.fromkeys(text for item in items for text in item.work.texts if text not in known)
        known.update(self._memory.get(unknown))  # an earlier batch may have computed some since admission
        missing = [text for text in unknown if text not in known]
        encoded: dict[str, Tensor] = {}
        if missing:
            rows = self._model.text_encoder.encode(missing)  # (n, D)
            # Copies, because a row of the result would keep the whole result alive in the cache.
            encoded = {text: row.clone() for text, row in zip(missing, rows, strict=True)}
            self._memory.put(encoded)
            known.update(encoded)
        return [item.work.fill_in(known) for item in items], encoded

    def _stop_if_unwanted(self, items: Sequence[WorkItem]) -> Callable[[int], None]:
        def on_step(_: int) -> None:
            if self.stop or all(item.abandoned for item in items):
                raise _AbandonedError

        return on_step
