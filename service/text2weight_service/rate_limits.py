"""How many requests a client may make: over time, counted by all workers together in Redis, and at once."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from limits import RateLimitItem, parse
from limits.aio.storage import MemoryStorage, RedisStorage
from limits.aio.strategies import SlidingWindowCounterRateLimiter

from text2weight_service.metrics import Metrics
from text2weight_service.redis_store import CircuitBreaker, connect, disconnect


class RateLimiter:
    """A sliding window of requests per client. Belongs to one event loop.

    Redis counts for all workers. While it cannot, each worker counts for itself, beginning with zero.
    """

    def __init__(self, limit: str, redis_url: str | None, timeout_s: float, metrics: Metrics) -> None:
        """Prepare a limiter.

        Args:
            limit: as the library `limits` reads it, such as "600/minute".
            redis_url: of the Redis that workers share; None counts here.
            timeout_s: longest wait for Redis.
            metrics: where the state of Redis is counted.
        """
        self._limit: RateLimitItem = parse(limit)
        self._here = SlidingWindowCounterRateLimiter(MemoryStorage())
        self._shared: SlidingWindowCounterRateLimiter | None = None
        if redis_url is not None:
            self._redis = connect(redis_url)
            self._timeout_s = timeout_s
            storage = RedisStorage(
                "async+redis://",
                implementation="redispy",
                key_prefix="t2w:limit",
                connection_pool=self._redis.connection_pool,  # type: ignore[arg-type]
            )
            self._shared = SlidingWindowCounterRateLimiter(storage)
            self._breaker = CircuitBreaker("limit", timeout_s, metrics)

    async def hit(self, client: str) -> int | None:
        """Count one request.

        Returns:
            None where it is allowed, otherwise the seconds after which another try makes sense.
        """
        if self._shared is not None:
            shared = self._shared
            wait_s = await self._breaker.call(lambda: self._count(shared, client), -1)
            if wait_s != -1:
                return wait_s or None
        return await self._count(self._here, client) or None

    async def _count(self, limiter: SlidingWindowCounterRateLimiter, client: str) -> int:
        """Seconds to wait, or 0 where the request is allowed."""
        if await limiter.hit(self._limit, client):
            return 0
        reset_at = (await limiter.get_window_stats(self._limit, client)).reset_time
        return min(max(math.ceil(reset_at - time.time()), 1), self._limit.get_expiry())

    async def close(self) -> None:
        """Close the connections to Redis."""
        if self._shared is not None:
            await disconnect(self._redis, self._timeout_s)


class ConcurrencyLimiter:
    """How many requests of one client this worker handles at once."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._running: Counter[str] = Counter()

    @contextmanager
    def place(self, client: str) -> Iterator[bool]:
        """Hold a place for one request; yields False where the client has none left."""
        if self._running[client] >= self._most:
            yield False
            return
        self._running[client] += 1
        try:
            yield True
        finally:
            self._running[client] -= 1
            if not self._running[client]:
                del self._running[client]
