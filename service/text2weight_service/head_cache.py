"""Finished heads that need not be computed again: in this process, and in Redis for all workers.

A cache may only save time. What Redis holds under a key is served only if it is whole.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Protocol

from cachetools import LRUCache

from text2weight_service.metrics import Metrics

_DIGEST_BYTES = 32
_MB = 1_000_000


class Store(Protocol):
    """What is needed of `redis_store.RedisStore`."""

    async def get_many(self, keys: Sequence[str]) -> dict[str, bytes]:
        """The values there are, by key."""
        ...

    async def set_many(self, values: Mapping[str, bytes], ttl_s: int) -> bool:
        """Store values for a time."""
        ...


class HeadCache:
    """Heads as safetensors bytes, by the key of their work. Belongs to one event loop."""

    def __init__(self, size_mb: int, store: Store | None, ttl_s: int, metrics: Metrics) -> None:
        """Make an empty cache.

        Args:
            size_mb: most bytes in this process, in millions; 0 keeps none, and asks no store either.
            store: shared by workers, or None.
            ttl_s: life of a head there, seconds.
            metrics: where lookups are counted.
        """
        self._most = size_mb * _MB
        self._heads: LRUCache[str, bytes] = LRUCache(max(self._most, 1), getsizeof=len)
        self._store = store if self._most else None
        self._ttl_s = ttl_s
        self._metrics = metrics
        metrics.head_cache_bytes.set_function(lambda: self._heads.currsize)

    def get(self, key: str) -> bytes | None:
        """A head that this process holds."""
        head = self._heads.get(key)
        if self._most:
            self._metrics.head_lookups.labels("memory", "miss" if head is None else "hit").inc()
        return head

    async def fetch(self, key: str) -> bytes | None:
        """A head that another worker has stored."""
        if self._store is None:
            return None
        value = (await self._store.get_many([_name(key)])).get(_name(key))
        head = None if value is None else _open(key, value)
        result = "miss" if value is None else ("invalid" if head is None else "hit")
        self._metrics.head_lookups.labels("redis", result).inc()
        if head is not None:
            self.keep(key, head)
        return head

    def keep(self, key: str, head: bytes) -> None:
        """Keep a finished head in this process."""
        if len(head) <= self._most:
            self._heads[key] = head

    async def share(self, key: str, head: bytes) -> None:
        """Offer a finished head to the other workers."""
        if self._store is not None:
            await self._store.set_many({_name(key): _digest(key, head) + head}, self._ttl_s)


def _name(key: str) -> str:
    return f"t2w:head:{key}"


def _digest(key: str, head: bytes) -> bytes:
    """Tells a whole head under its own key from anything else."""
    return hashlib.sha256(key.encode() + head).digest()


def _open(key: str, value: bytes) -> bytes | None:
    """The head in a stored value, or None unless it is whole and belongs to the key."""
    digest, head = value[:_DIGEST_BYTES], value[_DIGEST_BYTES:]
    return head if _digest(key, head) == digest else None
