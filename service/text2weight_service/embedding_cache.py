"""Text embeddings that need not be computed again: in this process, and in Redis for all workers.

Letter: D embedding size.
"""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from cachetools import LRUCache
from torch import Tensor

from text2weight_service.metrics import Metrics
from text2weight_service.redis_budget import budget_is_over, task_without_budget, wait_within_budget
from text2weight_service.redis_store import RedisStore

_NORM_TOLERANCE = 1e-3


class MemoryCache:
    """The most recently used embeddings, in this process. Thread-safe."""

    def __init__(self, size: int) -> None:
        self._rows: LRUCache[str, Tensor] = LRUCache(size)
        self._lock = threading.Lock()

    def get(self, prompts: Iterable[str]) -> dict[str, Tensor]:
        """The known ones among the prompts, each (D,)."""
        with self._lock:
            return {prompt: self._rows[prompt] for prompt in prompts if prompt in self._rows}

    def put(self, rows: Mapping[str, Tensor]) -> None:
        """Remember embeddings (D,) by prompt."""
        with self._lock:
            self._rows.update(rows)


class SharedEmbeddings:
    """Embeddings of one text encoder in Redis, as raw fp32 numbers.

    The key is `t2w:embedding:FINGERPRINT:SHA256`, of the encoder and of the prompt, which is the template with the
    text put in. The fingerprint keeps workers with different encoders apart, and the hash bounds the length of keys.
    It hides no text from who can guess it; finished heads in the same Redis state their class names.
    """

    def __init__(self, store: RedisStore, fingerprint: str, dim: int, ttl_s: int, metrics: Metrics) -> None:
        """Embeddings in a store.

        Args:
            store: where.
            fingerprint: of the text encoder.
            dim: D.
            ttl_s: their life in Redis.
            metrics: where lookups are counted.
        """
        self._store = store
        self._prefix = f"t2w:embedding:{fingerprint}:"
        self._dim = dim
        self._ttl_s = ttl_s
        self._lookups = metrics.cache_lookups

    async def get(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """The known ones among the prompts, each (D,); a value that is no embedding counts as unknown."""
        keys = {self._key(prompt): prompt for prompt in prompts}
        values = await self._store.get_many(list(keys))
        rows = {keys[key]: row for key, value in values.items() if (row := _decode(value, self._dim)) is not None}
        self._lookups.labels("redis", "hit").inc(len(rows))
        self._lookups.labels("redis", "invalid").inc(len(values) - len(rows))
        self._lookups.labels("redis", "miss").inc(len(keys) - len(values))
        return rows

    async def put(self, rows: Mapping[str, Tensor]) -> bool:
        """Store embeddings (D,) by prompt; returns whether Redis took all of them."""
        values = {self._key(prompt): row.numpy().astype("<f4").tobytes() for prompt, row in rows.items()}
        return await self._store.set_many(values, self._ttl_s)

    def _key(self, prompt: str) -> str:
        return self._prefix + hashlib.sha256(prompt.encode()).hexdigest()


def _decode(value: bytes, dim: int) -> Tensor | None:
    """An embedding (D,) from Redis bytes, or None unless they are D finite numbers of length 1."""
    if len(value) != 4 * dim:
        return None
    row = torch.from_numpy(np.frombuffer(value, "<f4").astype(np.float32))  # (D,) a copy, so writable
    # A comparison with NaN is false, so this refuses values that are not finite as well.
    return row if abs(float(row.norm()) - 1) < _NORM_TOLERANCE else None


class EmbeddingCache:
    """Both tiers for one text encoder: memory first, then Redis. Belongs to one event loop."""

    def __init__(self, memory: MemoryCache, shared: SharedEmbeddings | None, metrics: Metrics) -> None:
        self._memory = memory
        self._shared = shared
        self._hits, self._misses = (metrics.cache_lookups.labels("memory", result) for result in ("hit", "miss"))
        self._in_flight: dict[str, asyncio.Task[dict[str, Tensor]]] = {}

    async def lookup(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """The known ones among the prompts, each (D,).

        Requests that ask for the same prompt at the same time share one question to Redis; each of them waits for the
        answer as long as its own budget allows.
        """
        found = self._memory.get(prompts)
        unknown = [prompt for prompt in dict.fromkeys(prompts) if prompt not in found]
        self._hits.inc(len(found))
        self._misses.inc(len(unknown))
        if self._shared is None or not unknown or budget_is_over():
            return found
        nobody_asked = [prompt for prompt in unknown if prompt not in self._in_flight]
        if nobody_asked:
            # A task of its own: the others still want the answer when the request that asked first is gone.
            task = task_without_budget(self._fetch(self._shared, nobody_asked))
            self._in_flight.update(dict.fromkeys(nobody_asked, task))
        tasks = {self._in_flight[prompt] for prompt in unknown}
        await wait_within_budget(tasks)
        answers = {prompt: row for task in tasks if task.done() for prompt, row in task.result().items()}
        return found | {prompt: answers[prompt] for prompt in unknown if prompt in answers}

    async def _fetch(self, shared: SharedEmbeddings, prompts: Sequence[str]) -> dict[str, Tensor]:
        try:
            rows = await shared.get(prompts)
            self._memory.put(rows)
            return rows
        finally:
            for prompt in prompts:
                del self._in_flight[prompt]

    async def share(self, rows: Mapping[str, Tensor]) -> None:
        """Offer embeddings (D,) that were computed here to the other workers."""
        if self._shared is not None:
            await self._shared.put(rows)
