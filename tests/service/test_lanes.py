"""Calls of the denoiser on threads of their own: two at once, each on its share of torch's threads."""

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch

from tests.patience import HELD_S, PATIENCE_S
from tests.service.engines import job, large_calls_pay, running, until
from tests.service.fakes import FakeModel, held
from text2weight.artifact import read_head
from text2weight.sampling import Sample
from text2weight_service.call_watch import CallWatch
from text2weight_service.engine import NotReadyError
from text2weight_service.lanes import Lanes
from text2weight_service.text_stage import GenerationFailedError


@pytest.fixture
def open_lanes() -> Iterator[Callable[[int], Lanes]]:
    opened: list[Lanes] = []

    def open_one(count: int) -> Lanes:
        opened.append(Lanes(count, CallWatch(), lambda: None))
        return opened[-1]

    yield open_one
    for lanes in opened:
        lanes.close()


@pytest.mark.usefixtures("four_threads")
@pytest.mark.parametrize(("count", "share"), [(1, 4), (2, 2), (3, 1), (8, 1)])
def test_each_lane_has_an_equal_share_of_the_threads_and_others_keep_theirs(
    open_lanes: Callable[[int], Lanes], count: int, share: int
) -> None:
    lanes = open_lanes(count)
    together = threading.Barrier(count)
    seen: list[int] = []

    def call() -> None:
        together.wait(PATIENCE_S)  # which only calls that are made at once can pass
        seen.append(torch.get_num_threads())

    for ended in [lanes.submit(call) for _ in range(count)]:
        assert ended.result(PATIENCE_S) >= 0
    assert seen == [share] * count
    assert torch.get_num_threads() == 4
    others: list[int] = []
    thread = threading.Thread(target=lambda: others.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert others == [4]


@pytest.mark.parametrize("error", [ValueError("of a call"), SystemExit("of a thread")])
def test_a_lane_survives_whatever_a_call_raises(open_lanes: Callable[[int], Lanes], error: BaseException) -> None:
    lanes = open_lanes(1)

    def fail() -> None:
        raise error

    assert lanes.submit(fail).exception(PATIENCE_S) is error
    assert lanes.submit(lambda: None).result(PATIENCE_S) >= 0


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
    assert not [thread for thread in threading.enumerate() if thread in engine._loaded.runner._lanes._threads]  # type: ignore[union-attr]
