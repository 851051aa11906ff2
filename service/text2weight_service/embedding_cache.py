"""Text embeddings that need not be computed again: in this process, and in Redis for all workers.

A cache may only save time. Redis that is down, slow or holds nonsense is a miss, never an error.
Letter: D embedding size.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import structlog
import torch
from cachetools import LRUCache
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from torch import Tensor

from text2weight_service.metrics import Metrics

log = structlog.get_logger(__name__)

# After a failure Redis is left alone this long, so that a hanging one costs one timeout and not one per request.
_PAUSE_AFTER_FAILURE_S = 1.0
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


class RedisCache:
    """Raw fp32 embeddings in Redis under `t2w:embedding:FINGERPRINT:PROMPT`. Belongs to one event loop.

    The fingerprint of the text encoder in the key keeps workers with different models apart.
    """

    def __init__(self, url: str, timeout_s: float, ttl_s: int, metrics: Metrics) -> None:
        self._redis = Redis.from_url(
            url, socket_timeout=timeout_s, socket_connect_timeout=timeout_s, retry=Retry(NoBackoff(), 0)
        )
        self._timeout_s = timeout_s
        self._ttl_s = ttl_s
        self._metrics = metrics
        self._paused_until = 0.0

    async def get(self, fingerprint: str, prompts: list[str], dim: int) -> dict[str, Tensor]:
        """The known ones among the prompts, each (D,); nothing after a failure."""
        if not prompts or time.monotonic() < self._paused_until:
            return {}
        try:
            async with asyncio.timeout(self._timeout_s):
                values = await self._redis.mget([_key(fingerprint, prompt) for prompt in prompts])
        except Exception as error:  # any failure of a cache is a miss
            self._failed("read", error)
            return {}
        rows = {prompt: _decode(value, dim) for prompt, value in zip(prompts, values, strict=True) if value is not None}
        found = {prompt: row for prompt, row in rows.items() if row is not None}
        for result, count in (
            ("hit", len(found)),
            ("invalid", len(rows) - len(found)),
            ("miss", len(prompts) - len(rows)),
        ):
            self._metrics.cache_lookups.labels("redis", result).inc(count)
        return found

    async def put(self, fingerprint: str, rows: Mapping[str, Tensor]) -> None:
        """Store embeddings (D,) by prompt; a failure is only logged."""
        if not rows or time.monotonic() < self._paused_until:
            return
        try:
            async with asyncio.timeout(self._timeout_s), self._redis.pipeline(transaction=False) as pipeline:
                for prompt, row in rows.items():
                    pipeline.set(_key(fingerprint, prompt), row.numpy().astype("<f4").tobytes(), ex=self._ttl_s)
                await pipeline.execute()
        except Exception as error:
            self._failed("write", error)

    async def close(self) -> None:
        """Close the connections."""
        try:
            await self._redis.aclose()
        except Exception as error:
            self._failed("close", error)

    def _failed(self, action: str, error: Exception) -> None:
        self._paused_until = time.monotonic() + _PAUSE_AFTER_FAILURE_S
        self._metrics.redis_failures.inc()
        log.warning("redis failed, continuing without it", action=action, error=type(error).__name__)


def _key(fingerprint: str, prompt: str) -> str:
    return f"t2w:embedding:{fingerprint}:{prompt}"


def _decode(value: bytes | str, dim: int) -> Tensor | None:
    """An embedding (D,) from Redis bytes, or None unless they are D finite numbers of length 1."""
    if not isinstance(value, bytes) or len(value) != 4 * dim:
        return None
    row = torch.from_numpy(np.frombuffer(value, "<f4").astype(np.float32))  # (D,) a copy, so writable
    # A comparison with NaN is false, so this refuses values that are not finite as well.
    return row if abs(float(row.norm()) - 1) < _NORM_TOLERANCE else None


class EmbeddingCache:
    """Both tiers for one text encoder: memory first, then Redis."""

    def __init__(self, memory: MemoryCache, redis: RedisCache | None, fingerprint: str, dim: int, metrics: Metrics):
        self._memory = memory
        self._redis = redis
        self._fingerprint = fingerprint
        self._dim = dim
        self._metrics = metrics

    async def lookup(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """The known ones among the prompts, each (D,)."""
        found = self._memory.get(prompts)
        unknown = [prompt for prompt in prompts if prompt not in found]
        self._metrics.cache_lookups.labels("memory", "hit").inc(len(found))
        self._metrics.cache_lookups.labels("memory", "miss").inc(len(unknown))
        if self._redis is None or not unknown:
            return found
        shared = await self._redis.get(self._fingerprint, unknown, self._dim)
        self._memory.put(shared)
        return found | shared

    async def share(self, rows: Mapping[str, Tensor]) -> None:
        """Offer embeddings (D,) that were computed here to the other workers."""
        if self._redis is not None:
            await self._redis.put(self._fingerprint, rows)
