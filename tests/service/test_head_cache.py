"""Equal requests are computed once, at the same time and later."""

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.patience import PATIENCE_S
from tests.service.engines import job, metric, running, until
from tests.service.fakes import SPEC, FakeModel
from tests.service.redis_server import RedisServer, needs_redis, redis_server
from text2weight_service.head_cache import HeadCache
from text2weight_service.job import Job, plan_work
from text2weight_service.metrics import Metrics
from text2weight_service.text_stage import GenerationFailedError
from text2weight_service.work_queue import DeadlineError

KEY, HEAD = "0" * 64, b"a head" * 100


class FakeStore:
    """A store in a dictionary."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}

    async def get_many(self, keys: Any) -> dict[str, bytes]:
        return {key: self.values[key] for key in keys if key in self.values}

    async def set_many(self, values: Any, ttl_s: int) -> bool:
        self.values.update(values)
        return True


async def test_equal_requests_under_way_are_computed_once(model: FakeModel) -> None:
    async with running(model) as engine:
        model.gate.clear()
        equal = [asyncio.create_task(engine.generate(job("apple", "bus", seed=1))) for _ in range(10)]
        await until(lambda: metric(engine, "t2w_joined_total") == 9, "joining")
        model.gate.set()
        results = await asyncio.gather(*equal)
    assert model.batches == [[("apple", "bus")]]
    assert len({result.data for result in results}) == 1


async def test_each_of_the_equal_keeps_its_own_deadline(model: FakeModel) -> None:
    async with running(model) as engine:
        model.gate.clear()
        patient = asyncio.create_task(engine.generate(job("apple", "bus", within_s=3.0)))
        await until(lambda: model.entered.is_set(), "the call")
        more_patient = asyncio.create_task(engine.generate(job("apple", "bus")))
        with pytest.raises(DeadlineError):
            await patient
        model.gate.set()
        assert (await more_patient).data
    assert model.steps_made == 1


async def test_the_computation_ends_only_when_all_who_wait_are_gone(model: FakeModel) -> None:
    async with running(model) as engine:
        model.gate.clear()
        tasks = [asyncio.create_task(engine.generate(job("apple", "bus", steps=500))) for _ in range(3)]
        await until(lambda: metric(engine, "t2w_joined_total") == 2, "joining")
        for task in tasks[:2]:
            task.cancel()
        await asyncio.wait(tasks[:2])
        item = next(iter(engine._queue._accepted))
        assert not item.abandoned
        tasks[2].cancel()
        await asyncio.wait(tasks)
        await until(lambda: item.abandoned, "giving up")
        model.gate.set()
        # And who comes then gets a computation of its own.
        assert (await engine.generate(job("apple", "bus", steps=500))).data
    assert model.steps_made < 510


async def test_a_failure_reaches_all_who_wait_and_is_not_kept(model: FakeModel) -> None:
    async with running(model) as engine:
        model.gate.clear()
        tasks = [asyncio.create_task(engine.generate(job("broken", "bus"))) for _ in range(3)]
        await until(lambda: metric(engine, "t2w_joined_total") == 2, "joining")
        model.gate.set()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(result, GenerationFailedError)
        with pytest.raises(GenerationFailedError):
            await engine.generate(job("broken", "bus"))
    assert len(model.batches) == 2


async def test_a_finished_head_is_served_again(model: FakeModel) -> None:
    async with running(model) as engine:
        first = await engine.generate(job("apple", "bus", seed=1))
        again = await engine.generate(job("apple", "bus", seed=1))
        await engine.generate(job("apple", "bus", seed=2))
        assert metric(engine, "t2w_head_cache_lookups_total", tier="memory", result="hit") == 1
        assert metric(engine, "t2w_head_cache_bytes") == 2 * len(first.data)
    assert (again.data, again.key) == (first.data, first.key)
    assert again.sample_s == again.queue_s == 0.0
    assert model.steps_made == 2


@pytest.mark.parametrize(("fields", "settings"), [({"reusable": False}, {}), ({}, {"head_cache_mb": 0})])
async def test_what_is_not_worth_keeping_is_not_kept(
    model: FakeModel, fields: dict[str, Any], settings: dict[str, Any]
) -> None:
    async with running(model, **settings) as engine:
        for _ in range(2):
            await engine.generate(job("apple", "bus", **fields))
        assert metric(engine, "t2w_head_cache_bytes") == 0
    assert model.steps_made == 2


CHANGES: dict[str, Any] = {
    "classes": ("bus", "apple"),
    "seed": 2,
    "steps": 3,
    "sampler": "ddim",
    "template": "the {}",
    "guidance_scale": 2.0,
    "descriptions": {"apple": "round", "bus": "long"},
    "describe_classifier": True,
    "emphasis": torch.tensor([1.0, 2.0]),
    "given": torch.zeros(SPEC.num_parameters),
}


def test_whatever_changes_the_head_changes_its_key(model: FakeModel) -> None:
    plain = job("apple", "bus", seed=1, steps=1, sampler="ddim")
    keys = {"plain": plan_work(model, plain).key}
    for name, value in CHANGES.items():
        if name != "sampler":
            keys[name] = plan_work(model, replace(plain, **{name: value})).key
    keys["sampler"] = plan_work(model, replace(plain, sampler="ddpm")).key
    given = replace(plain, given=torch.ones(SPEC.num_parameters))
    keys["other head"] = plan_work(model, given).key
    keys["strength"] = plan_work(model, replace(given, strength=0.5)).key
    keys["method"] = plan_work(model, replace(given, strength=0.5, method="noise")).key
    model.checkpoint_hash = "another"
    keys["checkpoint"] = plan_work(model, plain).key
    assert len(set(keys.values())) == len(keys)
    others = {"request_id", "deadline", "reusable", "strength", "method"}
    assert set(CHANGES) >= set(Job.__dataclass_fields__) - others


def test_what_does_not_change_the_head_does_not_change_its_key(model: FakeModel) -> None:
    plain = job("apple", "bus", steps=1)
    key = plan_work(model, plain).key
    assert plan_work(model, replace(plain, request_id="other", deadline=0.0, reusable=False)).key == key
    assert plan_work(model, replace(plain, steps=None, sampler=None, template="a {}")).key == key


async def test_the_cache_is_bounded_by_bytes() -> None:
    cache = HeadCache(1, None, 60, Metrics())
    for i in range(30):
        cache.keep(str(i), bytes(100_000))
    assert [cache.get(str(i)) is not None for i in (19, 20, 29)] == [False, True, True]
    cache.keep("too large", bytes(1_000_001))
    assert cache.get("too large") is None


async def test_workers_share_heads_through_a_store() -> None:
    store = FakeStore()
    one, other = (HeadCache(1, store, 60, Metrics()) for _ in range(2))
    assert await other.fetch(KEY) is None
    await one.share(KEY, HEAD)
    assert await other.fetch(KEY) == HEAD
    assert other.get(KEY) == HEAD


@pytest.mark.parametrize("where", ["memory", "store"])
async def test_a_head_that_is_there_is_served_however_long_it_would_take_to_compute(
    model: FakeModel, where: str
) -> None:
    async with running(model) as engine:
        held = job("apple", "bus", seed=1, steps=9)
        if where == "memory":
            engine._heads.keep(plan_work(model, held).key, HEAD)
        else:
            engine._heads._store = store = FakeStore()
            await HeadCache(1, store, 60, Metrics()).share(plan_work(model, held).key, HEAD)
        engine._loaded.runner.times.seconds = lambda shape, rows: 1000.0  # type: ignore[union-attr, method-assign]
        with pytest.raises(DeadlineError, match="9 steps take about"):
            await engine.generate(replace(held, seed=2))
        assert (await engine.generate(held)).data == HEAD
    assert model.steps_made == 0


async def test_what_is_not_whole_is_not_served() -> None:
    store, metrics = FakeStore(), Metrics()
    cache = HeadCache(1, store, 60, metrics)
    await cache.share(KEY, HEAD)
    (name, value), *_ = store.values.items()
    for damaged in (value[:-1], value[:40], value[:10], b"", value[:50] + b"!" + value[51:], value + b"0"):
        store.values[name] = damaged
        assert await cache.fetch(KEY) is None
    store.values["t2w:head:" + "1" * 64] = value
    assert await cache.fetch("1" * 64) is None, "another head's value"
    found = metrics.registry.get_sample_value("t2w_head_cache_lookups_total", {"tier": "redis", "result": "invalid"})
    assert found == 7


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with redis_server(tmp_path_factory.mktemp("redis")) as server:
        yield server


@needs_redis
async def test_a_second_worker_finds_what_the_first_has_computed(redis: RedisServer, tmp_path: Path) -> None:
    first, second = FakeModel(), FakeModel()
    async with running(first, redis_url=redis.url, redis_timeout_s=PATIENCE_S) as engine:
        computed = await engine.generate(job("apple", "bus", seed=1))
        await until(lambda: redis.keys() == 3, "two embeddings and a head in Redis")
    async with running(second, redis_url=redis.url, redis_timeout_s=PATIENCE_S) as engine:
        found = await engine.generate(job("apple", "bus", seed=1))
        assert metric(engine, "t2w_head_cache_lookups_total", tier="redis", result="hit") == 1
    assert found.data == computed.data
    assert (first.steps_made, second.steps_made) == (1, 0)
