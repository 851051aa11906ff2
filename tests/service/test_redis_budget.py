"""The time one request may wait for Redis: shared by its calls, and no failure of Redis where it ends."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest
import torch

from tests.patience import HELD_S, PATIENCE_S
from text2weight_service.embedding_cache import EmbeddingCache, MemoryCache, SharedEmbeddings
from text2weight_service.flights import Flight, Flights
from text2weight_service.metrics import Metrics
from text2weight_service.redis_budget import (
    budget_is_over,
    current_budget,
    request_budget,
    task_without_budget,
)
from text2weight_service.redis_store import BreakerState, CircuitBreaker
from text2weight_service.work_queue import Generated

SHORT_S = 0.1


class Redis:
    """Answers when it is let."""

    def __init__(self) -> None:
        self.calls = 0
        self.called = asyncio.Event()
        self.answered = asyncio.Event()

    async def work(self) -> str:
        self.calls += 1
        self.called.set()
        await self.answered.wait()
        return "answer"


@pytest.fixture
def breaker() -> CircuitBreaker:
    return CircuitBreaker("read", PATIENCE_S, Metrics())


async def test_calls_share_the_budget(breaker: CircuitBreaker) -> None:
    """The first call takes all of it; the next is not made. The first goes on, and its answer shows a healthy Redis."""
    redis = Redis()
    with request_budget(SHORT_S):
        assert await breaker.call(redis.work, "otherwise") == "otherwise"
        assert budget_is_over()
        assert await breaker.call(redis.work, "otherwise") == "otherwise"
    assert redis.calls == 1
    assert breaker.state is BreakerState.CLOSED
    with request_budget(PATIENCE_S):  # that of another request
        redis.answered.set()
        assert await breaker.call(redis.work, "otherwise") == "answer"
        assert not budget_is_over()
    assert current_budget() is None


async def test_a_call_that_a_request_left_still_opens_the_breaker() -> None:
    """Else a Redis that hangs for one kind of calls would cost every request all that is left of its budget."""
    breaker = CircuitBreaker("read", 20 * SHORT_S, Metrics())
    with request_budget(SHORT_S):
        assert await breaker.call(Redis().work, "otherwise") == "otherwise"
    assert breaker.state is BreakerState.CLOSED
    await asyncio.gather(*breaker._calls)
    assert breaker.state is BreakerState.OPEN


async def test_a_probe_that_a_request_left_goes_on(breaker: CircuitBreaker) -> None:
    redis = Redis()
    breaker.state = BreakerState.OPEN
    with request_budget(SHORT_S):
        assert await breaker.call(redis.work, "otherwise") == "otherwise"
    assert breaker.state is BreakerState.HALF_OPEN
    redis.answered.set()
    await asyncio.gather(*breaker._calls)
    assert breaker.state is BreakerState.CLOSED


async def test_a_cancelled_request_cancels_its_call(breaker: CircuitBreaker) -> None:
    redis = Redis()
    with request_budget(PATIENCE_S):
        task = asyncio.create_task(breaker.call(redis.work, "otherwise"))
    await redis.called.wait()
    (call,) = breaker._calls
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.wait((call,))
    assert call.cancelled()
    assert breaker.state is BreakerState.CLOSED


async def test_waits_at_the_same_time_count_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: now)
    with request_budget(10.0):
        budget = current_budget()
        assert budget is not None
        async with budget.wait():
            now += 1
            async with budget.wait():
                now += 2
                assert budget.left_s == pytest.approx(7)
            assert budget.left_s == pytest.approx(7)
            now += 1
        now += 100  # nobody waits for Redis
        assert budget.left_s == pytest.approx(6)
        async with budget.wait():
            now += 1
        assert budget.left_s == pytest.approx(5)


async def test_work_that_nobody_waits_for_has_its_own_time(breaker: CircuitBreaker) -> None:
    redis = Redis()
    redis.answered.set()
    with request_budget(0.0):
        assert await breaker.call(redis.work, "otherwise") == "otherwise"
        assert await task_without_budget(breaker.call(redis.work, "otherwise")) == "answer"
        assert budget_is_over()


async def waiting(flights: Flights, compute: Callable[[Flight], Awaitable[Generated]], budget_s: float) -> Generated:
    with request_budget(budget_s):
        return await flights.wait("key", asyncio.get_running_loop().time() + HELD_S, compute)  # type: ignore[arg-type]


async def test_who_joins_a_flight_shortens_its_budget(breaker: CircuitBreaker) -> None:
    """It would wait for the whole budget of another request otherwise, after having spent its own."""
    redis = Redis()

    async def compute(_: Flight) -> Generated:
        return Generated((await breaker.call(redis.work, "otherwise")).encode(), "key")

    flights = Flights(Metrics())
    first = asyncio.create_task(waiting(flights, compute, HELD_S))
    await redis.called.wait()
    async with asyncio.timeout(PATIENCE_S):
        assert (await waiting(flights, compute, SHORT_S)).data == b"otherwise"
        assert (await first).data == b"otherwise"
    assert redis.calls == 1
    assert breaker.state is BreakerState.CLOSED


class SlowStore:
    """Knows every embedding, and gives them when it is let."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []
        self.called = asyncio.Event()
        self.answered = asyncio.Event()
        self.budgets: list[object] = []

    async def get_many(self, keys: list[str]) -> dict[str, bytes]:
        self.asked.append(list(keys))
        self.called.set()
        self.budgets.append(current_budget())
        await self.answered.wait()
        return {key: torch.eye(4)[0].numpy().tobytes() for key in keys}


async def test_each_waits_for_shared_embeddings_as_long_as_it_may() -> None:
    """The request that asked first has no time left; the other one gets what was asked."""
    store, metrics = SlowStore(), Metrics()
    memory = MemoryCache(10)
    cache = EmbeddingCache(memory, SharedEmbeddings(store, "f00d", 4, 60, metrics), metrics)  # type: ignore[arg-type]
    with request_budget(PATIENCE_S):
        patient = asyncio.create_task(cache.lookup(["a", "b"]))
    await store.called.wait()
    with request_budget(SHORT_S):
        assert await cache.lookup(["a"]) == {}
        assert await cache.lookup(["c"]) == {}  # not even asked for
    store.answered.set()
    assert (await patient).keys() == {"a", "b"}
    assert memory.get(["a", "b"]).keys() == {"a", "b"}
    assert len(store.asked) == 1
    assert store.budgets == [None]
