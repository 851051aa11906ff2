"""Limits per client: in one worker, over several workers through Redis, and without a Redis that should be there."""

import asyncio
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path

import httpx
import pytest

from tests.patience import HELD_S, PATIENCE_S
from tests.service.fakes import FakeModel
from tests.service.live import Live, serve, wait_for
from tests.service.redis_server import HeldRedis, RedisServer, needs_redis, redis_server
from tests.service.test_auth import ALICE, ALICE_ENTRY, BOB, BOB_ENTRY, bearer
from tests.service.test_bad_input import assert_problem
from text2weight_service import access, redis_store
from text2weight_service.access import _network
from text2weight_service.metrics import Metrics
from text2weight_service.rate_limits import RateLimiter, SharedCounts
from text2weight_service.redis_budget import request_budget
from text2weight_service.redis_store import BreakerState

# So long that no window can end within a test, and so that 5 requests never fill it by chance.
LIMIT = "5/day"
# Limits that no test of Redis reaches.
LIMITED = {"rate_limit": "1000/minute", "max_concurrent_per_key": 1000}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    with redis_server(tmp_path) as running:
        yield running


def statuses(live: Live, count: int, **headers: str) -> list[int]:
    return [live.client.get("/info", headers=headers).status_code for _ in range(count)]


def test_each_key_has_a_limit_of_its_own() -> None:
    with serve(lambda _: FakeModel(), api_keys=f"{ALICE_ENTRY} {BOB_ENTRY}", rate_limit=LIMIT) as live:
        assert statuses(live, 8, **bearer(ALICE)) == [200] * 5 + [429] * 3
        response = live.client.get("/info", headers=bearer(ALICE))
        assert "more requests than 5/day allows" in assert_problem(response, 429, "rate-limited")
        assert 1 <= int(response.headers["retry-after"]) <= 86_400
        assert statuses(live, 1, **bearer(BOB)) == [200]
        assert statuses(live, 8, **bearer("nobody")) == [401] * 8
        assert live.metric("t2w_client_requests_total", client="alice", result="rate-limited") == 4
        assert live.client.get("/health/live").status_code == 200
        refused = {"method": "GET", "route": "/info"}
        assert live.metric("t2w_http_requests_total", **refused, status="429") == 4
        assert live.metric("t2w_http_requests_total", **refused, status="401") == 8


def test_without_keys_addresses_are_counted() -> None:
    """A proxy on this machine says whom it speaks for; what it says does not become a label."""
    with serve(lambda _: FakeModel(), rate_limit=LIMIT) as live:
        assert statuses(live, 6) == [200] * 5 + [429]
        assert statuses(live, 6, **{"X-Forwarded-For": "192.0.2.1"}) == [200] * 5 + [429]
        assert statuses(live, 6, **{"X-Forwarded-For": "2001:db8::1"}) == [200] * 5 + [429]
        assert statuses(live, 1, **{"X-Forwarded-For": "2001:db8::2"}) == [429]
        assert statuses(live, 1, **{"X-Forwarded-For": "nonsense"}) == [200]
        assert live.metric("t2w_client_requests_total", client="(anonymous)", result="accepted") == 16


@pytest.mark.parametrize(
    ("client", "expected"),
    [
        (("192.0.2.7", 1), "192.0.2.7"),
        (("2001:db8:0:1::5", 1), "2001:db8:0:1::/64"),
        (("evil\n", 1), "unknown"),
        (None, "unknown"),
    ],
)
def test_networks(client: object, expected: str) -> None:
    assert _network({"type": "http", "client": client}) == expected


def test_places_are_given_back(model: FakeModel) -> None:
    with serve(lambda _: model, api_keys=f"{ALICE_ENTRY} {BOB_ENTRY}", max_concurrent_per_key=2) as live:

        def generate(key: str) -> httpx.Response:
            return live.client.post("/generate", json={"classes": ["apple", "bus"]}, headers=bearer(key))

        model.gate.clear()
        with ThreadPoolExecutor(3) as pool:
            running = [pool.submit(generate, ALICE) for _ in range(2)]
            accepted = {"client": "alice", "result": "accepted"}
            wait_for(lambda: live.metric("t2w_client_requests_total", **accepted) == 2, "two requests")
            response = generate(ALICE)
            assert_problem(response, 429, "rate-limited")
            assert response.headers["retry-after"] == "1"
            bobs = pool.submit(generate, BOB)
            model.gate.set()
            assert [future.result().status_code for future in (*running, bobs)] == [200, 200, 200]
        assert live.metric("t2w_client_requests_total", client="alice", result="busy") == 1
        assert [generate(ALICE).status_code for _ in range(5)] == [200] * 5


async def test_concurrent_hits_in_memory() -> None:
    limiter = RateLimiter(LIMIT, None)
    results = await asyncio.gather(*(limiter.hit("key:alice") for _ in range(200)))
    assert results.count(None) == 5


async def test_retry_after_is_long_enough() -> None:
    limiter = RateLimiter("2/second", None)
    while (wait_s := await limiter.hit("a")) is None:
        pass
    assert wait_s == 1
    await asyncio.sleep(wait_s)
    assert await limiter.hit("a") is None


@needs_redis
async def test_workers_count_together(server: RedisServer) -> None:
    metrics = Metrics()
    workers = [SharedCounts(server.url, PATIENCE_S, metrics) for _ in range(3)]
    limiters = [RateLimiter(LIMIT, counts) for counts in workers]
    results = await asyncio.gather(*(limiter.hit("key:alice") for limiter in limiters for _ in range(20)))
    assert results.count(None) == 5
    assert all(result is None or 1 <= result <= 86_400 for result in results)
    assert await limiters[0].hit("key:bob") is None
    for counts in workers:
        await counts.close()
    with server.connected() as client:
        assert all(key.startswith(b"t2w:limit:") and client.ttl(key) > 0 for key in client.scan_iter())


@needs_redis
async def test_without_redis_each_worker_counts(server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed, paused and full: one hit costs the budget, and the limit still holds in this worker."""
    monkeypatch.setattr(redis_store, "FIRST_PAUSE_S", HELD_S)  # no probe within the test
    for broken in (server.stop, server.pause, server.fill):
        metrics = Metrics()
        counts = SharedCounts(server.url, PATIENCE_S, metrics)
        limiter = RateLimiter(LIMIT, counts)
        assert await limiter.hit("key:warm") is None
        counts.counts._timeout_s = 0.2
        broken()
        try:
            results = [await limiter.hit("key:alice") for _ in range(20)]
            assert metrics.registry.get_sample_value("t2w_redis_failures_total") == 1
            assert results.count(None) == 5
            assert metrics.registry.get_sample_value("t2w_redis_breaker_state", {"operation": "limit"}) == 2
        finally:
            server.resume() if broken == server.pause else server.stop()
            if broken == server.stop:
                server.start()
            await counts.close()


@needs_redis
@pytest.mark.parametrize("fault", ["stop", "pause", "fill"])
def test_requests_with_a_broken_redis(
    server: RedisServer,
    model: FakeModel,
    fault: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Limits, embeddings and heads together: no request fails, and few of them find out that Redis does."""
    monkeypatch.setattr(redis_store, "FIRST_PAUSE_S", HELD_S)  # no probe within the test
    settings = LIMITED | {"redis_url": server.url, "redis_timeout_s": 1.0}
    with serve(lambda _: model, **settings) as live:
        assert live.generate("apple", "bus").status_code == 200
        getattr(server, fault)()
        try:
            for i in range(10):
                assert live.generate(f"apple {i}", "bus").status_code == 200
            assert live.metric("t2w_redis_breaker_state", operation="limit") == BreakerState.OPEN.value
        finally:
            if fault == "pause":
                server.resume()
    # Requests wait for these two: each failed one has cost its budget.
    opened = re.findall(r"redis breaker.*operation=(limit|read) .*state=open", capsys.readouterr().out)
    assert len(opened) == len(set(opened))


@pytest.fixture
def held(server: RedisServer) -> Iterator[HeldRedis]:
    between = HeldRedis(server.port)
    with closing(between.listener):
        yield between
        between.let_go()


def asked(server: RedisServer) -> dict[str, int]:
    """What Redis was asked since its statistics were reset: scripts of the limits, heads and embeddings."""
    with server.connected() as client:
        statistics = client.info("commandstats")
    names = ("evalsha", "mget")
    return {name: stat["calls"] for name in names if (stat := statistics.get(f"cmdstat_{name}"))}


@needs_redis
def test_a_request_waits_for_four_answers(server: RedisServer, held: HeldRedis, model: FakeModel) -> None:
    """For its place, its rate, its head and its embeddings, one after the other, and for nothing that it writes."""
    settings = LIMITED | {"redis_url": held.url, "redis_timeout_s": PATIENCE_S}
    with serve(lambda _: model, **settings) as live, ThreadPoolExecutor(1) as thread:
        assert live.generate("apple", "bus", seed=1).status_code == 200  # connects
        wait_for(lambda: server.keys() == 4 and held.is_quiet(), "the head, its embeddings and the count, and no place")
        held.hold()
        answer = thread.submit(live.generate, "tram", "pear", seed=1)
        for number in range(4):
            wait_for(partial(held.holds, number), f"answer {number}")
            time.sleep(0.1)  # in which a request that does not wait would end
            assert not answer.done()
            held.let_through(1)
        assert answer.result(PATIENCE_S).status_code == 200
        assert held.passed == 4
        held.let_go()
        assert breakers(live) == [BreakerState.CLOSED] * 4


@needs_redis
def test_a_request_has_one_budget(
    server: RedisServer, held: HeldRedis, model: FakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the first call takes all of it, the request makes no other; and that is no failure of Redis."""
    settings = LIMITED | {"redis_url": held.url, "redis_timeout_s": PATIENCE_S}
    with serve(lambda _: model, **settings) as live:
        assert live.generate("apple", "bus", seed=1).status_code == 200  # connects
        wait_for(lambda: server.keys() == 4 and held.is_quiet(), "the head, its embeddings and the count, and no place")
        # Of the request alone: its calls go on, and a breaker would open only after the patient time.
        monkeypatch.setattr(access, "request_budget", lambda _: request_budget(0.2))
        with server.connected() as client:
            client.config_resetstat()
        held.hold()
        try:
            assert live.generate("tram", "pear", seed=1).status_code == 200
            assert asked(server) == {"evalsha": 1}
            assert breakers(live) == [BreakerState.CLOSED] * 4
        finally:
            held.let_go()


def breakers(live: Live) -> list[BreakerState]:
    operations = ("limit", "release", "read", "write")
    return [BreakerState(live.metric("t2w_redis_breaker_state", operation=name)) for name in operations]
