"""Requests of one client at once: over several workers through Redis, and where a worker or Redis fails."""

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager, suppress

import httpx
import pytest

from tests.patience import HELD_S, PATIENCE_S
from tests.service.engines import until
from tests.service.fakes import FakeModel
from tests.service.live import Live, serve, wait_for
from tests.service.redis_server import RedisServer, needs_redis
from tests.service.test_bad_input import assert_problem
from text2weight_service import rate_limits, redis_store
from text2weight_service.metrics import Metrics
from text2weight_service.rate_limits import ConcurrencyLimiter, SharedCounts
from text2weight_service.redis_budget import request_budget
from text2weight_service.redis_store import BreakerState

pytestmark = needs_redis

KEY = "t2w:running:key:alice"


@asynccontextmanager
async def worker(server: RedisServer, most: int = 2, lease_s: float = HELD_S) -> AsyncIterator[ConcurrencyLimiter]:
    counts = SharedCounts(server.url, PATIENCE_S, Metrics())
    limiter = ConcurrencyLimiter(most, counts, lease_s)
    try:
        yield limiter
    finally:
        await limiter.close()
        await counts.close()


async def taken(limiter: ConcurrencyLimiter, held: AsyncExitStack, times: int = 1) -> list[bool]:
    """Ask for places, one after another, and keep those that were there until `held` ends."""
    return [await held.enter_async_context(limiter.place("key:alice")) for _ in range(times)]


async def free(limiter: ConcurrencyLimiter) -> bool:
    async with limiter.place("key:alice") as place:
        return place


def leases(server: RedisServer) -> int:
    with server.connected() as client:
        return int(client.zcard(KEY))


async def test_workers_count_together(server: RedisServer) -> None:
    async with worker(server) as one, worker(server) as other:
        async with AsyncExitStack() as ones, AsyncExitStack() as others:
            assert await taken(one, ones) == [True]
            assert await taken(other, others, 3) == [True, False, False]
            assert await taken(one, ones, 2) == [False, False]
            async with one.place("key:bob") as bobs:
                assert bobs
            assert leases(server) == 2
            await others.aclose()
            await until(lambda: leases(server) == 1, "the other worker's place to be given back")
            assert await free(one)
        await until(lambda: leases(server) == 0, "the places to be given back")
        assert not one._running
        assert not other._running


async def test_places_are_taken_at_once(server: RedisServer) -> None:
    """However many ask at the same moment, only so many get a place."""
    async with worker(server, most=5) as one, worker(server, most=5) as other, AsyncExitStack() as held:
        results = await asyncio.gather(*(taken(limiter, held) for _ in range(20) for limiter in (one, other)))
        assert results.count([True]) == 5


async def test_leases_are_as_long_as_asked_for(server: RedisServer) -> None:
    async with worker(server, lease_s=100) as limiter, AsyncExitStack() as held:
        assert await taken(limiter, held) == [True]
        with server.connected() as client:
            ((_, ends_ms),) = client.zrange(KEY, 0, -1, withscores=True)
            assert 0 < ends_ms / 1000 - client.time()[0] <= 101
            assert 0 < client.ttl(KEY) <= 100


async def test_a_crashed_worker(server: RedisServer) -> None:
    """Its leases end by themselves, by Redis's clock, also where others keep the client's key alive."""
    async with worker(server, most=1) as limiter, AsyncExitStack() as held:
        assert limiter._counts is not None
        assert await limiter._counts.take(keys=[KEY], args=["token of the crashed one", 1, 1000]) == 1
        with server.connected() as client:
            ((_, ends_ms),) = client.zrange(KEY, 0, -1, withscores=True)
            client.persist(KEY)  # so that it is the lease that ends
            await until(lambda: 1000 * client.time()[0] > ends_ms, "the end of the lease")
        assert await taken(limiter, held, 2) == [True, False]


async def test_cancelled_requests_give_their_places_back(server: RedisServer) -> None:
    """One that runs, and one whose answer from Redis is still on its way."""
    async with worker(server) as limiter:

        async def request(running: asyncio.Event) -> None:
            with request_budget(PATIENCE_S):
                async with limiter.place("key:alice"):
                    running.set()
                    await asyncio.sleep(HELD_S)

        running = asyncio.Event()
        first = asyncio.create_task(request(running))
        await running.wait()
        server.pause()
        second = asyncio.create_task(request(asyncio.Event()))
        try:
            await until(lambda: limiter._running["key:alice"] == 2, "the second request")
            for task in (first, second):
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task
            assert not limiter._running
        finally:
            server.resume()
        await until(lambda: not limiter._background and leases(server) == 0, "the places to be given back")


async def test_a_place_that_was_given_up_while_redis_hung(server: RedisServer) -> None:
    """A request leaves at the end of its budget; its place, which Redis takes too late, is given back all the same."""
    async with worker(server) as limiter:
        assert await free(limiter)  # connects
        await until(lambda: not limiter._background, "the place to be given back")
        server.pause()
        try:
            with request_budget(0.1):
                async with limiter.place("key:alice") as place:
                    assert place
            with request_budget(0.0):
                assert await free(limiter)  # no call, so nothing to give back
            assert len(limiter._background) == 1
        finally:
            server.resume()
        await until(lambda: not limiter._background and leases(server) == 0, "the place to be given back")
        assert limiter._counts is not None
        assert limiter._counts.counts.state is BreakerState.CLOSED


@pytest.mark.parametrize("fault", ["stop", "pause"])
async def test_without_redis_each_worker_counts(
    server: RedisServer, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One request finds out that Redis fails; what ran before is counted here, and given back when Redis is well."""
    monkeypatch.setattr(redis_store, "FIRST_PAUSE_S", HELD_S)  # no probe within the test
    monkeypatch.setattr(rate_limits, "_RELEASE_AGAIN_S", 0.05)
    async with worker(server) as limiter, AsyncExitStack() as held:
        counts = limiter._counts
        assert counts is not None
        assert await taken(limiter, held) == [True]
        getattr(server, fault)()
        counts.counts._timeout_s = counts.releases._timeout_s = 0.2
        try:
            assert await taken(limiter, held, 2) == [True, False]
            assert counts.counts.state is BreakerState.OPEN
            await held.aclose()
            assert await taken(limiter, held, 3) == [True, True, False]
            await until(lambda: counts.releases.state is BreakerState.OPEN, "the release to fail")
        finally:
            server.resume() if fault == "pause" else server.start()
        counts.releases._timeout_s = PATIENCE_S
        counts.releases._probe_at = 0.0
        await until(lambda: not limiter._background and leases(server) == 0, "the places to be given back")


def test_over_http(server: RedisServer) -> None:
    """Two workers, one place: the second request gets 429 wherever it goes, until the first has ended."""
    model = FakeModel()
    settings = {"redis_url": server.url, "redis_timeout_s": PATIENCE_S, "max_concurrent_per_key": 1}
    with serve(lambda _: model, **settings) as one, serve(lambda _: FakeModel(), **settings) as other:
        model.gate.clear()
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(one.generate, "apple", "bus")
            assert model.entered.wait(PATIENCE_S)
            for live in (one, other):
                response = live.client.get("/info")
                assert_problem(response, 429, "rate-limited")
                assert response.headers["retry-after"] == "1"
            model.gate.set()
            assert running.result().status_code == 200
        wait_for(lambda: answers(other), "the place to be given back")
        assert other.metric("t2w_client_requests_total", client="(anonymous)", result="busy") >= 1


def answers(live: Live) -> bool:
    response: httpx.Response = live.client.get("/info")
    return response.status_code == 200
