"""Denoiser calls on threads of their own, two at once."""

import asyncio
import threading
import time
from collections.abc import Sequence

import pytest

from tests.patience import HELD_S, PATIENCE_S
from tests.service.engines import job, large_calls_pay, metric, running, until
from tests.service.fakes import FakeModel, held
from text2weight.artifact import read_head
from text2weight.sampling import Sample
from text2weight_service.engine import NotReadyError
from text2weight_service.text_stage import GenerationFailedError


@pytest.fixture
def model(model: FakeModel) -> FakeModel:
    model.calls_at_once = 2
    return model


async def test_short_requests_do_not_wait_for_a_call_under_way(model: FakeModel) -> None:
    go_on, entered = threading.Event(), threading.Event()

    def hold(samples: Sequence[Sample], rows: int) -> None:
        if any("long" in sample.request.classes for sample in samples):
            entered.set()
            assert go_on.wait(HELD_S)

    async with running(model) as engine:
        model.trouble = hold
        long = asyncio.create_task(engine.generate(job("long", "bus", steps=3)))
        await until(entered.is_set, "the call of the long request")
        for seed in range(5):
            assert (await engine.generate(job("short", "bus", seed=seed, steps=2))).data
        assert not long.done()
        go_on.set()
        assert (await long).data


@pytest.mark.parametrize("broken", [0, 3, 9])
async def test_a_broken_request_fails_alone(model: FakeModel, broken: int) -> None:
    async with running(model) as engine:
        large_calls_pay(engine)
        names = [("broken" if i == broken else f"name{i}", "bus") for i in range(10)]
        with held(model):
            tasks = [asyncio.create_task(engine.generate(job(*classes, seed=i))) for i, classes in enumerate(names)]
            await until(lambda: len(model.batches) == 2, "two calls")
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert engine.alive
    for i, result in enumerate(results):
        if i == broken:
            assert isinstance(result, GenerationFailedError)
        else:
            assert not isinstance(result, BaseException)
            assert read_head(result.data).classes == names[i]


@pytest.mark.parametrize("broken", [3, 4])
async def test_the_model_is_checked_only_when_all_of_a_call_have_failed(
    model: FakeModel, monkeypatch: pytest.MonkeyPatch, broken: int
) -> None:
    model.calls_at_once = 1
    async with running(model) as engine:
        large_calls_pay(engine)
        checks: list[float] = []
        check = engine._loaded.runner.check  # type: ignore[union-attr]
        monkeypatch.setattr(engine._loaded.runner, "check", lambda: checks.append(0) or check())  # type: ignore[union-attr]
        names = [("broken" if i < broken else "fine", f"name{i}") for i in range(4)]
        await asyncio.gather(*(engine.generate(job("first", *pair[1:], seed=1)) for pair in names))
        with held(model):
            first = asyncio.create_task(engine.generate(job("first", "name0")))
            await until(lambda: model.batches[-1] == [("first", "name0")], "a call")
            tasks = [asyncio.create_task(engine.generate(job(*pair))) for pair in names]
            await until(lambda: metric(engine, "t2w_queue_waiting") == 4, "all that share the next call")
        results = await asyncio.gather(first, *tasks, return_exceptions=True)
        assert [isinstance(result, GenerationFailedError) for result in results] == [False] + [
            i < broken for i in range(4)
        ]
        assert (await engine.generate(job("next", "bus"))).data  # a check comes before anything else is computed
        assert len(checks) == (broken == 4)
        assert engine.alive


async def test_memory_that_a_neighbour_has_fails_nobody(model: FakeModel) -> None:
    """A call that memory does not suffice for, beside another, is made again when it is alone."""
    under_way: list[int] = []
    started = threading.Event()

    def run_out(samples: Sequence[Sample], rows: int) -> None:
        if under_way:
            started.set()
            raise MemoryError
        under_way.append(rows)
        if "large" in samples[0].request.classes and not started.is_set():
            assert started.wait(HELD_S)
        under_way.clear()

    async with running(model) as engine:
        await engine.generate(job("small", "large"))  # texts are known from here on
        model.trouble = run_out
        large = asyncio.create_task(engine.generate(job("large", "bus", steps=3)))
        small = asyncio.create_task(engine.generate(job("small", "bus", steps=2)))
        assert (await large).data
        assert (await small).data
        assert engine.alive


async def test_who_left_is_not_in_the_parts_of_a_call_that_failed(model: FakeModel) -> None:
    model.calls_at_once = 1
    async with running(model) as engine:
        large_calls_pay(engine)
        await asyncio.gather(*(engine.generate(job("known", f"name{i}")) for i in range(4)))
        with held(model):
            first = asyncio.create_task(engine.generate(job("first", "bus")))
            await until(lambda: ("first", "bus") in model.batches[-1], "a call")
            tasks = [asyncio.create_task(engine.generate(job("later", f"name{i}"))) for i in range(4)]
            await until(lambda: metric(engine, "t2w_queue_waiting") == 4, "all that share the next call")

            loop, runner = asyncio.get_running_loop(), engine._loaded.runner  # type: ignore[union-attr]

            def leave(samples: Sequence[Sample], rows: int) -> None:
                if len(samples) == 4:
                    loop.call_soon_threadsafe(tasks[3].cancel)
                    end = time.monotonic() + PATIENCE_S
                    while not any(one.item.abandoned for one in list(runner.running)):
                        assert time.monotonic() < end
                        time.sleep(0.001)
                    raise RuntimeError("once")

            model.trouble = leave
        await asyncio.gather(first, *tasks, return_exceptions=True)
    assert all(task.done() and not task.cancelled() for task in tasks[:3])
    asked = [classes for batch in model.batches for classes in batch]
    # In the call that failed, and then in its half; who left is in the first alone.
    assert [asked.count(("later", f"name{i}")) for i in range(4)] == [2, 2, 2, 1]


async def test_what_is_on_both_lanes_is_told_when_the_drain_is_over(model: FakeModel) -> None:
    async with running(model, drain_timeout_s=0.2) as engine:
        with held(model):
            tasks = [asyncio.create_task(engine.generate(job("apple", "bus", seed=i, steps=9))) for i in range(3)]
            await until(lambda: len(model.batches) == 2, "two calls")
            stop = asyncio.create_task(engine.stop())
            await until(lambda: engine._loaded is not None and engine._loaded.runner.stop, "the end of the drain")
        results = await asyncio.gather(*tasks, return_exceptions=True)
        await stop
    assert all(isinstance(result, NotReadyError) for result in results)
    assert model.steps_made == 2
    assert not [thread for thread in threading.enumerate() if thread in engine._loaded.runner._lanes._team._threads]  # type: ignore[union-attr]
