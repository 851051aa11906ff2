"""Bytes in Redis, shared by all workers. Redis may only save time: whatever is wrong with it, nobody waits for it.

Every call has a time limit, for connecting, sending and reading together, and all calls that one request waits for
have a budget together (`redis_budget`). A call that fails opens a circuit breaker; while that is open, calls return at
once, and after a growing pause a single call probes whether Redis is well again. Reads and writes have breakers of
their own, because a full Redis still answers reads.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from enum import Enum
from typing import TypeVar

import structlog
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.maint_notifications import MaintNotificationsConfig

from text2weight_service.metrics import Metrics
from text2weight_service.redis_budget import budget_is_over, current_budget, wait_within_budget

log = structlog.get_logger(__name__)

T = TypeVar("T")

FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 30.0
_SLOTS = 32


class BreakerState(Enum):
    """State of a circuit breaker; the values are those of its metric."""

    CLOSED = 0
    HALF_OPEN = 1
    OPEN = 2


class CircuitBreaker:
    """Stops calling what fails: closed until a failure, then open for a while, then half open for one probe.

    A failed probe doubles the pause, up to 30 s. Belongs to one event loop.
    """

    def __init__(self, operation: str, timeout_s: float, metrics: Metrics, *, slots: int = _SLOTS) -> None:
        """Start closed.

        Args:
            operation: what is called; label of the metrics and of log lines, from a fixed list.
            timeout_s: limit of one call, its wait for a slot included.
            metrics: where state and failures are counted.
            slots: most calls at a time.
        """
        self.state = BreakerState.CLOSED
        self.reason = ""
        self._operation = operation
        self._timeout_s = timeout_s
        self._failures = metrics.redis_failures
        self._gauge = metrics.redis_breaker.labels(operation)
        self._gauge.set(BreakerState.CLOSED.value)
        self._slots = asyncio.Semaphore(slots)
        self._pause_s = FIRST_PAUSE_S
        self._probe_at = 0.0
        self._calls: set[asyncio.Task[object]] = set()

    async def call(self, work: Callable[[], Awaitable[T]], otherwise: T) -> T:
        """Await `work()` within its time limit and within what is left of the request's budget.

        Where less is left than the limit, the request leaves the call and the call goes on: it is the limit that tells
        whether Redis is too slow, and cutting the call would cost its connection.

        Returns:
            what `work` returns; `otherwise` where it raises, takes too long, or is not called because the
            breaker is open or the budget is spent.
        """
        if self._shut or budget_is_over():
            return otherwise
        if current_budget() is None:
            return await self._call(work, otherwise)
        task = asyncio.create_task(self._call(work, otherwise))
        self._calls.add(task)  # the event loop itself would forget it
        task.add_done_callback(self._calls.discard)
        try:
            await wait_within_budget((task,))
        except asyncio.CancelledError:
            task.cancel()
            raise
        return task.result() if task.done() else otherwise

    @property
    def _shut(self) -> bool:
        return self.state is BreakerState.HALF_OPEN or (
            self.state is BreakerState.OPEN and time.monotonic() < self._probe_at
        )

    async def _call(self, work: Callable[[], Awaitable[T]], otherwise: T) -> T:
        if self._shut:  # since the task began
            return otherwise
        probing = self.state is BreakerState.OPEN
        if probing:
            self._change(BreakerState.HALF_OPEN)
        sent_at = float("inf")
        try:
            async with asyncio.timeout(self._timeout_s), self._slots:
                sent_at = time.monotonic()
                result = await work()
        except asyncio.CancelledError:
            if probing:  # the caller left, so nothing was learnt: the next call probes
                self._change(BreakerState.OPEN)
            raise
        except Exception as error:  # any failure of a cache is a miss
            # A call that spent its budget waiting for a slot says nothing about Redis, only about this worker.
            if probing or not isinstance(error, TimeoutError) or time.monotonic() - sent_at > self._timeout_s / 2:
                self._failed(error, probing)
            return otherwise
        if probing:
            self._pause_s = FIRST_PAUSE_S
            self.reason = ""
            self._change(BreakerState.CLOSED)
        return result

    def _failed(self, error: Exception, probing: bool) -> None:
        self._failures.inc()
        if self.state is not BreakerState.CLOSED and not probing:  # on its way already when another one failed
            return
        if probing:
            self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
        self.reason = type(error).__name__  # its text may hold the address, and with it the password
        self._probe_at = time.monotonic() + self._pause_s
        self._change(BreakerState.OPEN)

    def _change(self, state: BreakerState) -> None:
        self.state = state
        self._gauge.set(state.value)
        write = log.warning if state is BreakerState.OPEN else log.info
        write("redis breaker", operation=self._operation, state=state.name.lower(), error=self.reason)


def connect(url: str) -> Redis:
    """A client without time limits and retries of its own, for use inside a `CircuitBreaker`."""
    # RESP 2 without notifications: nothing to negotiate, and a connection with unread data is never used again.
    pool = BlockingConnectionPool.from_url(
        url,
        max_connections=2 * _SLOTS,  # of both breakers
        timeout=None,
        socket_timeout=None,
        socket_connect_timeout=None,
        retry=Retry(NoBackoff(), 0),
        protocol=2,
        maint_notifications_config=MaintNotificationsConfig(enabled=False),
    )
    return Redis.from_pool(pool)


async def disconnect(client: Redis, timeout_s: float) -> None:
    """Close a client's connections, within a time limit."""
    try:
        async with asyncio.timeout(timeout_s):
            await client.aclose()
    except Exception as error:  # the process is ending, and a dead Redis must not hold it up
        log.warning("redis connections not closed", error=type(error).__name__)


class RedisStore:
    """Values in Redis by key. No method raises for what Redis does. Belongs to one event loop."""

    def __init__(self, url: str, timeout_s: float, metrics: Metrics) -> None:
        """Prepare a store; the first call connects.

        Args:
            url: `redis://`, `rediss://` or `unix://` address.
            timeout_s: longest that one call may take.
            metrics: where state and failures are counted.
        """
        self._redis = connect(url)
        self._timeout_s = timeout_s
        self.reads = CircuitBreaker("read", timeout_s, metrics)
        self.writes = CircuitBreaker("write", timeout_s, metrics)

    async def get_many(self, keys: Sequence[str]) -> dict[str, bytes]:
        """The values there are, by key; none where Redis fails. The caller checks what the bytes hold."""
        if not keys:
            return {}

        async def read() -> dict[str, bytes]:
            values = await self._redis.mget(list(keys))
            # Bytes only: an address may ask the client to decode, and a stranger may answer anything.
            return {key: value for key, value in zip(keys, values, strict=True) if isinstance(value, bytes)}

        return await self.reads.call(read, {})

    async def set_many(self, values: Mapping[str, bytes], ttl_s: int) -> bool:
        """Store values for `ttl_s` seconds.

        Returns:
            whether Redis took all of them.
        """
        if not values:
            return True

        async def write() -> bool:
            async with self._redis.pipeline(transaction=False) as pipeline:
                for key, value in values.items():
                    pipeline.set(key, value, ex=ttl_s)
                return all(await pipeline.execute())

        return await self.writes.call(write, False)

    async def close(self) -> None:
        """Close the connections."""
        await disconnect(self._redis, self._timeout_s)
