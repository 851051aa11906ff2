"""How many requests a client may make, over time and at once; all workers count together, in Redis."""

from __future__ import annotations

import asyncio
import math
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field

from limits import RateLimitItem, parse
from limits.aio.storage import MemoryStorage, RedisStorage
from limits.aio.strategies import SlidingWindowCounterRateLimiter

from text2weight_service.metrics import Metrics
from text2weight_service.redis_budget import task_without_budget
from text2weight_service.redis_store import CircuitBreaker, connect, disconnect

_RELEASE_AGAIN_S = 1.0
# Takes a place: KEYS[1] the client's leases, by token with the time at which each ends; ARGV token, most, lease in ms.
# The time is that of Redis alone, for the clocks of workers differ.
_TAKE = """
local time = redis.call('TIME')
local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now_ms)
if redis.call('ZCARD', KEYS[1]) >= tonumber(ARGV[2]) then
    return 0
end
redis.call('ZADD', KEYS[1], now_ms + ARGV[3], ARGV[1])
redis.call('PEXPIRE', KEYS[1], ARGV[3])
return 1
"""


class SharedCounts:
    """The Redis in which workers count together. Belongs to one event loop."""

    def __init__(self, url: str, timeout_s: float, metrics: Metrics) -> None:
        """Prepare it; the first call connects.

        Args:
            url: `redis://`, `rediss://` or `unix://` address.
            timeout_s: longest that one call may take.
            metrics: where state and failures are counted.
        """
        self.redis = connect(url)
        self.take = self.redis.register_script(_TAKE)
        self.counts = CircuitBreaker("limit", timeout_s, metrics)
        # Apart, because a full Redis that refuses to count still takes places back.
        self.releases = CircuitBreaker("release", timeout_s, metrics)
        self.timeout_s = timeout_s

    async def close(self) -> None:
        """Close the connections."""
        await disconnect(self.redis, self.timeout_s)


class RateLimiter:
    """A sliding window of requests per client. Belongs to one event loop.

    Redis counts for all workers. While it cannot, each worker counts for itself, beginning with zero.
    """

    def __init__(self, limit: str, counts: SharedCounts | None) -> None:
        """Prepare a limiter.

        Args:
            limit: as the library `limits` reads it, such as "600/minute".
            counts: where workers count together; None counts here.
        """
        self.limit = limit
        self._limit: RateLimitItem = parse(limit)
        self._here = SlidingWindowCounterRateLimiter(MemoryStorage())
        self._shared: SlidingWindowCounterRateLimiter | None = None
        if counts is not None:
            self._breaker = counts.counts
            storage = RedisStorage(
                "async+redis://",
                implementation="redispy",
                key_prefix="t2w:limit",
                connection_pool=counts.redis.connection_pool,  # type: ignore[arg-type]
            )
            self._shared = SlidingWindowCounterRateLimiter(storage)

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


@dataclass(eq=False)
class _Lease:
    """A request's place in Redis, which ends by itself where its worker crashed.

    Attributes:
        key: of the client's leases.
        token: tells it from the others.
        held: whether Redis may hold it.
        over: whether the request has ended.
    """

    key: str
    token: str = field(default_factory=lambda: secrets.token_hex(8))
    held: bool = False
    over: bool = False


class ConcurrencyLimiter:
    """How many requests of one client are handled at once. Belongs to one event loop.

    Each worker always counts its own; Redis, while it can, counts those of all workers.
    """

    def __init__(self, most: int, counts: SharedCounts | None, lease_s: float) -> None:
        """Start with no requests.

        Args:
            most: requests of one client at once.
            counts: where workers count together; None counts here.
            lease_s: longest that a request may take; after that Redis counts it no more.
        """
        self.most = most
        self._running: Counter[str] = Counter()
        self._counts = counts
        self._lease_s = lease_s
        self._background: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def place(self, client: str) -> AsyncIterator[bool]:
        """Hold a place for one request; yields False where the client has none left."""
        with ExitStack() as held:
            taken = await self._take(client, held)
            if not taken:
                held.close()
            yield taken

    async def close(self) -> None:
        """Give the last places back, within the time of one call of Redis."""
        if self._counts is not None and self._background:
            _, late = await asyncio.wait(self._background, timeout=self._counts.timeout_s)
            for task in late:
                task.cancel()

    async def _take(self, client: str, held: ExitStack) -> bool:
        """Take a place here and in Redis; `held` gives it back, also where this is cancelled."""
        if self._running[client] >= self.most:
            return False
        self._running[client] += 1
        held.callback(self._leave, client)
        if self._counts is None:
            return True
        counts, lease = self._counts, _Lease(f"t2w:running:{client}")
        held.callback(self._end, counts, lease)
        return await counts.counts.call(lambda: self._lease(counts, lease), True)

    async def _lease(self, counts: SharedCounts, lease: _Lease) -> bool:
        if lease.over:  # the call waited for its turn longer than the request ran
            return True
        lease.held = True  # until Redis says otherwise: its answer may be lost
        try:
            arguments: list[str | int] = [lease.token, self.most, round(1000 * self._lease_s)]
            lease.held = await counts.take(keys=[lease.key], args=arguments) != 0
            return lease.held
        finally:
            self._settle(counts, lease)

    def _leave(self, client: str) -> None:
        self._running[client] -= 1
        if not self._running[client]:
            del self._running[client]

    def _end(self, counts: SharedCounts, lease: _Lease) -> None:
        lease.over = True
        self._settle(counts, lease)

    def _settle(self, counts: SharedCounts, lease: _Lease) -> None:
        """Have the lease of a request that ended given back; the request does not wait, nor can it cancel that."""
        if lease.over and lease.held:
            task = task_without_budget(self._release(counts, lease))
            self._background.add(task)
            task.add_done_callback(self._background.discard)

    async def _release(self, counts: SharedCounts, lease: _Lease) -> None:
        """Give a lease back, however often it takes: until it ends, the client lacks a place."""

        async def remove() -> bool:
            await counts.redis.zrem(lease.key, lease.token)
            return True

        for _ in range(math.ceil(self._lease_s / _RELEASE_AGAIN_S)):
            if await counts.releases.call(remove, False):
                return
            await asyncio.sleep(_RELEASE_AGAIN_S)
