"""Requests join and leave between denoiser calls; what nobody waits for is dropped there; progress is reported."""

import asyncio
import contextlib
import threading
import time
from collections.abc import Sequence

import pytest

from tests.patience import HELD_S, PATIENCE_S
from tests.service.engines import job, metric, running, until
from tests.service.fakes import FakeModel
from text2weight.artifact import read_head
from text2weight.sampling import Sample
from text2weight_service import engine as engine_module
from text2weight_service.engine import BusyError, Engine, NotReadyError
from text2weight_service.ladder import Shape
from text2weight_service.work_queue import DeadlineError, Generated, Progress


def slow(model: FakeModel, call_s: float = 0.01) -> None:
    """Make each call of a model take its time."""

    def pause(samples: Sequence[Sample], rows: int) -> None:
        time.sleep(call_s)

    model.trouble = pause


def under_way(engine: Engine) -> float:
    return metric(engine, "t2w_running")


async def test_short_requests_never_wait_for_long_ones(model: FakeModel) -> None:
    async with running(model) as engine:
        slow(model)
        longs = [asyncio.create_task(engine.generate(job("long", "bus", seed=i, steps=400))) for i in range(40)]
        await until(lambda: under_way(engine) == 40, "forty long requests")
        await engine.generate(job("short", "bus", seed=10))  # its texts are known from here on
        for i in range(10):
            model.gate.clear()
            model.entered.clear()
            await until(model.entered.is_set, "a call that is held")
            made = len(model.batches)
            short = asyncio.create_task(engine.generate(job("short", "bus", seed=i)))
            await until(lambda: metric(engine, "t2w_queue_waiting") == 1, "the short request")
            model.gate.set()
            await short
            # After the call that was held, at most one comes first: that for those that waited longest.
            assert any(("short", "bus") in batch for batch in model.batches[made : made + 2])
        assert not any(task.done() for task in longs)
        for task in longs:
            task.cancel()
        await asyncio.wait(longs)


async def test_long_requests_are_finished_while_short_ones_keep_coming(model: FakeModel) -> None:
    async with running(model, max_batch_size=2, head_cache_mb=0) as engine:
        slow(model, 0.0005)
        long = asyncio.create_task(engine.generate(job("long", "bus", steps=20)))
        seeds = iter(range(100_000))

        async def keep_asking() -> None:
            while not long.done():
                await engine.generate(job("short", "bus", seed=next(seeds)))

        await asyncio.wait_for(asyncio.gather(*(keep_asking() for _ in range(6))), PATIENCE_S)
        assert read_head((await long).data).classes == ("long", "bus")


@pytest.mark.parametrize("how", ["leaves", "deadline"])
async def test_a_request_that_nobody_waits_for_is_dropped_between_steps(model: FakeModel, how: str) -> None:
    async with running(model) as engine:
        slow(model)
        within_s = 3.0 if how == "deadline" else PATIENCE_S
        # As if calls took no time, so that the short deadline is not refused at once.
        engine._loaded.runner.times.seconds = lambda shape, rows: 0.0  # type: ignore[union-attr, method-assign]
        task = asyncio.create_task(engine.generate(job("gone", "bus", steps=1000, within_s=within_s)))
        await until(lambda: model.steps_made > 3, "some steps")
        if how == "leaves":
            task.cancel()
            await asyncio.wait((task,))
        else:
            with pytest.raises(DeadlineError):
                await task
        await until(lambda: under_way(engine) == 0, "dropping")
        made = model.steps_made
        await engine.generate(job("next", "bus"))
        assert model.steps_made == made + 1 < 900
        reasons = {reason: metric(engine, "t2w_dropped_total", reason=reason) for reason in ("left", "deadline")}
        # A deadline ends the wait of the caller, too: which of the two the model's thread sees first is open.
        assert sum(reasons.values()) == 1
        assert how == "deadline" or reasons["left"] == 1


async def test_a_request_that_cannot_be_finished_in_time_is_refused_at_once(model: FakeModel) -> None:
    # Slow from the start: warmed up at no cost, the estimate would have to climb by four orders of magnitude first.
    slow(model, 0.02)
    async with running(model) as engine:
        made = model.steps_made
        with pytest.raises(DeadlineError, match=r"1000 steps take about \d+\.\d s"):
            await engine.generate(job("too", "long", steps=1000, within_s=4.0))
        assert metric(engine, "t2w_refused_total", reason="deadline") == 1
        assert model.steps_made == made
        await engine.generate(job("short", "enough", steps=3, within_s=4.0))


async def refused_for_its_time(engine: Engine, seed: int) -> bool:
    try:
        await engine.generate(job("apple", "bus", seed=seed, steps=10, within_s=10.0))
    except DeadlineError:
        return True
    return False


def remember_slow_calls(engine: Engine) -> None:
    for _ in range(200):
        engine._loaded.runner.times.add(Shape(8, guided=False), 1, 2.0)  # type: ignore[union-attr]


async def test_estimates_of_a_slow_spell_do_not_outlive_it(model: FakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused requests teach nothing, so the idle device is measured for them."""
    monkeypatch.setattr(engine_module, "_STALE_S", 0.05)
    async with running(model) as engine:
        remember_slow_calls(engine)
        assert await refused_for_its_time(engine, 0)
        assert model.steps_made == 0
        end = time.monotonic() + PATIENCE_S
        while await refused_for_its_time(engine, 1):
            assert time.monotonic() < end, "the device is fast, and everything is refused"
            await asyncio.sleep(0.02)


async def test_a_device_whose_requests_are_all_refused_is_checked(model: FakeModel) -> None:
    async with running(model, self_check_s=0.1) as engine:
        model.lost = True
        remember_slow_calls(engine)
        end = time.monotonic() + PATIENCE_S
        with contextlib.suppress(NotReadyError):
            while engine.alive:
                assert time.monotonic() < end, "nobody noticed that the device is lost"
                assert await refused_for_its_time(engine, 0)
                await asyncio.sleep(0.01)


async def test_a_request_that_the_others_leave_no_time_for_is_refused_at_once(model: FakeModel) -> None:
    async with running(model, max_batch_size=1) as engine:
        slow(model)
        engine._loaded.runner.times.seconds = lambda shape, rows: 0.1  # type: ignore[union-attr, method-assign]
        others = [
            asyncio.create_task(engine.generate(job("long", "bus", seed=i, steps=300, within_s=1000.0)))
            for i in range(5)
        ]
        await until(lambda: under_way(engine) == 5, "five long requests")
        with pytest.raises(BusyError) as refused:
            await engine.generate(job("long", "too", steps=300, within_s=60.0))
        assert refused.value.retry_after_s > 1
        assert metric(engine, "t2w_refused_total", reason="load") == 1
        # One that goes first all the same is taken.
        await engine.generate(job("short", "enough", steps=2, within_s=60.0))
        for task in others:
            task.cancel()
        await asyncio.wait(others)


async def test_texts_are_encoded_while_others_run(model: FakeModel) -> None:
    encode = model.text_encoder.encode
    async with running(model) as engine:
        await engine.generate(job("known", "bus"))
        slow(model)
        long = asyncio.create_task(engine.generate(job("known", "bus", steps=1000, seed=1)))
        await until(lambda: model.steps_made > 3, "some steps")
        encoding, go_on = threading.Event(), threading.Event()

        def slowly(texts: Sequence[str]) -> object:
            encoding.set()
            assert go_on.wait(HELD_S)
            time.sleep(0.1)
            return encode(texts)

        model.text_encoder.encode = slowly  # type: ignore[method-assign, assignment]
        new = asyncio.create_task(engine.generate(job("new", "bus")))
        await until(encoding.is_set, "encoding")
        made = model.steps_made
        # Requests whose texts are known overtake it.
        await engine.generate(job("known", "bus", seed=2))
        await until(lambda: model.steps_made > made + 5, "more steps")
        assert not new.done()
        go_on.set()
        assert (await new).encode_s >= 0.1
        long.cancel()
        await asyncio.wait((long,))


async def test_a_stream_reports_each_call_and_ends_with_the_head(model: FakeModel) -> None:
    async with running(model) as engine:
        events = [event async for event in engine.stream(job("apple", "bus", steps=6, seed=3), heads_every=2)]
        *progress, last = events
        assert isinstance(last, Generated)
        assert last.data == (await engine.generate(job("apple", "bus", steps=6, seed=3))).data
    seen = [event for event in progress if isinstance(event, Progress)]
    assert [event.step for event in seen] == [1, 2, 3, 4, 5, 6]
    assert {event.steps for event in seen} == {6}
    assert [event.timestep for event in seen] == [1000, 833, 667, 500, 333, 167]
    assert [event.head is not None for event in seen] == [False, True] * 3
    heads = [read_head(event.head) for event in seen if event.head is not None]
    assert all(head.classes == ("apple", "bus") for head in heads)
    assert not heads[0].tensors["linear1.bias"].equal(heads[1].tensors["linear1.bias"])


async def test_a_slow_reader_misses_progress_and_holds_nobody_up(model: FakeModel) -> None:
    async with running(model) as engine:
        events = engine.stream(job("slow", "reader", steps=900), heads_every=0)
        first = await anext(events)
        await engine.generate(job("other", "bus"))
        await until(lambda: under_way(engine) == 0, "the end of the computation")
        rest = [event async for event in events]
    assert isinstance(first, Progress)
    assert len(rest) < 200, "all progress was kept for the reader"
    assert isinstance(rest[-2], Progress)
    assert rest[-2].step == 900, "the newest progress is kept"
    assert isinstance(rest[-1], Generated)


async def test_a_reader_that_leaves_ends_the_computation(model: FakeModel) -> None:
    async with running(model) as engine:
        slow(model)
        events = engine.stream(job("left", "alone", steps=1000), heads_every=1)
        assert isinstance(await anext(events), Progress)
        await events.aclose()
        await until(lambda: under_way(engine) == 0, "dropping")
    assert model.steps_made < 500


async def test_a_stream_has_a_deadline(model: FakeModel) -> None:
    async with running(model) as engine:
        model.gate.clear()
        with pytest.raises(DeadlineError):
            async for _ in engine.stream(job("too", "late", within_s=0.1), heads_every=0):
                pass
        model.gate.set()
