"""Calls that fail: whom that may hurt, memory that runs out, devices that are lost, hang or compute nonsense."""

import asyncio
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import structlog
import torch

from tests.patience import HELD_S, PATIENCE_S
from tests.service.engines import job, large_calls_pay, metric, running, until
from tests.service.fakes import FakeModel
from text2weight.artifact import read_head
from text2weight.sampling import Sample
from text2weight_service import engine as engine_module
from text2weight_service.batch_runner import BatchRunner, SelfCheckError
from text2weight_service.engine import Engine, NotReadyError, Phase
from text2weight_service.ladder import CALLS_TO_RECOVER
from text2weight_service.metrics import Metrics
from text2weight_service.settings import Settings
from text2weight_service.text_stage import GenerationFailedError
from text2weight_service.work_queue import Generated, Progress


@pytest.fixture(autouse=True)
def _logs() -> Iterator[None]:
    """Tracebacks are not rendered: that takes seconds."""
    with structlog.testing.capture_logs():
        yield


async def together(engine: Engine, model: FakeModel, count: int, **special: int) -> list[Generated | BaseException]:
    """Results of requests that are ready at the same time; `special` puts a class name at a position."""
    large_calls_pay(engine)
    names = {position: name for name, position in special.items()}
    model.gate.clear()
    model.entered.clear()
    first = asyncio.create_task(engine.generate(job("first", "bus", seed=10_000 + model.steps_made)))
    await until(model.entered.is_set, "a call")
    tasks = [
        asyncio.create_task(engine.generate(job(names.get(i, f"class {i}"), "bus", seed=i, steps=4)))
        for i in range(count)
    ]
    await until(lambda: metric(engine, "t2w_queue_waiting") == count, "waiting")
    model.gate.set()
    await first
    return await asyncio.gather(*tasks, return_exceptions=True)


async def test_only_the_broken_fail_and_the_others_lose_no_step(model: FakeModel) -> None:
    def trouble(samples: Sequence[Sample], rows: int) -> None:
        if any(sample.request.classes[0] == "weak" and sample.calls == 2 for sample in samples):
            raise RuntimeError("illegal instruction")

    model.trouble = trouble
    async with running(model) as engine:
        results = await together(engine, model, 9, weak=4)
        assert [isinstance(result, GenerationFailedError) for result in results] == [i == 4 for i in range(9)]
        assert metric(engine, "t2w_batch_failures_total") > 0
        assert engine.alive
    for i, result in enumerate(results):
        if i != 4:
            assert isinstance(result, Generated)
            assert read_head(result.data).metadata["seed"] == str(i)
    for i in range(9):
        made = sum((f"class {i}", "bus") in batch for batch in model.batches)
        assert i == 4 or 4 <= made <= 4 + 5, "a call that failed was made again, and no other"


async def test_a_call_that_fails_once_hurts_nobody(model: FakeModel) -> None:
    failures = iter([RuntimeError("hiccup")])

    def trouble(samples: Sequence[Sample], rows: int) -> None:
        if len(samples) > 1 and (error := next(failures, None)) is not None:
            raise error

    model.trouble = trouble
    async with running(model) as engine:
        results = await together(engine, model, 8)
        assert all(isinstance(result, Generated) for result in results)
        assert metric(engine, "t2w_batch_failures_total") == 1


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
async def test_out_of_memory_makes_calls_smaller_for_a_while(model: FakeModel, error: Exception) -> None:
    short_of_memory = True

    def trouble(samples: Sequence[Sample], rows: int) -> None:
        if short_of_memory and rows > 2:
            raise error

    async with running(model, max_batch_size=8) as engine:
        model.trouble = trouble
        results = await together(engine, model, 8)
        assert all(isinstance(result, Generated) for result in results), results
        assert metric(engine, "t2w_largest_call_rows") == 2
        short_of_memory = False
        for i in range(2 * CALLS_TO_RECOVER):
            await engine.generate(job("later", "bus", seed=i))
        assert metric(engine, "t2w_largest_call_rows") == 8
        assert engine.alive


@pytest.mark.parametrize("where", ["begin", "preview", "finish"])
@pytest.mark.parametrize("times", [1, 2])
async def test_out_of_memory_between_calls_is_tried_once_more_and_makes_them_smaller_if_that_helps(
    model: FakeModel, monkeypatch: pytest.MonkeyPatch, where: str, times: int
) -> None:
    async with running(model, max_batch_size=8) as engine:
        call, errors = getattr(model, where), [MemoryError() for _ in range(times)]

        def short_of_memory(*args: Any) -> Any:
            if errors:
                raise errors.pop()
            return call(*args)

        monkeypatch.setattr(model, where, short_of_memory)
        if times == 1:
            assert len(await watch(engine)) == 2
        else:
            with pytest.raises(GenerationFailedError):
                await watch(engine)
        assert metric(engine, "t2w_largest_call_rows") == (4 if times == 1 else 8)
        assert (await engine.generate(job("next", "bus"))).data
        assert engine.alive


async def test_a_request_too_large_for_the_memory_fails_alone(model: FakeModel) -> None:
    def trouble(samples: Sequence[Sample], rows: int) -> None:
        if any(sample.request.classes[0] == "huge" for sample in samples):
            raise MemoryError

    model.trouble = trouble
    async with running(model) as engine:
        results = await together(engine, model, 4, huge=1)
        assert [isinstance(result, GenerationFailedError) for result in results] == [False, True, False, False]
        assert engine.alive


async def test_a_device_lost_between_steps_fails_what_runs_and_waits(model: FakeModel) -> None:
    async with running(model) as engine:
        model.gate.clear()
        tasks = [asyncio.create_task(engine.generate(job("apple", "bus", seed=i, steps=9))) for i in range(3)]
        await until(model.entered.is_set, "a call")
        await until(lambda: metric(engine, "t2w_queue_waiting") + metric(engine, "t2w_running") == 3, "all")
        model.lost = True
        model.gate.set()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(result, GenerationFailedError | NotReadyError) for result in results)
        await until(lambda: not engine.alive, "noticing")
        assert engine.phase is Phase.FAILED
        with pytest.raises(NotReadyError):
            await engine.generate(job("apple", "bus"))


async def test_a_device_that_fails_at_the_end_of_requests_is_noticed_while_others_go_on(
    model: FakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(model) as engine:
        model.trouble = lambda samples, rows: time.sleep(0.01)
        long = asyncio.create_task(engine.generate(job("long", "bus", steps=1000)))
        await until(model.entered.is_set, "a call")

        def fail(*_: object) -> None:
            raise RuntimeError("device lost")

        monkeypatch.setattr(model, "finish", fail)
        # One call moves both, so it is none in which nothing could be computed.
        engine._loaded.runner.ladder.choose = lambda count, seconds: 8  # type: ignore[union-attr, method-assign]
        with pytest.raises(GenerationFailedError):
            await engine.generate(job("short", "bus"))
        await until(lambda: not engine.alive, "noticing")
        with pytest.raises(NotReadyError):
            await long
    assert model.steps_made < 1000


@pytest.mark.parametrize("how", ["lost", "wrong"])
async def test_an_idle_device_is_checked(model: FakeModel, how: str) -> None:
    async with running(model, self_check_s=0.05) as engine:
        await asyncio.sleep(0.2)
        assert engine.alive
        setattr(model, how, True)
        await until(lambda: not engine.alive, "noticing")
        if how == "wrong":
            assert isinstance(engine.failure, SelfCheckError)


async def test_a_text_encoder_that_is_lost_is_noticed(model: FakeModel) -> None:
    async with running(model) as engine:

        def fail(texts: Sequence[str]) -> torch.Tensor:
            raise RuntimeError("device lost")

        model.text_encoder.encode = fail  # type: ignore[method-assign]
        with pytest.raises(GenerationFailedError):
            await engine.generate(job("new", "names"))
        await until(lambda: not engine.alive, "noticing")


@pytest.mark.parametrize("where", ["encode", "begin", "advance", "preview", "finish"])
async def test_a_call_that_hangs_is_a_failed_worker_until_it_returns(
    model: FakeModel, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    monkeypatch.setattr(engine_module, "LONGEST_CALL_S", 0.1)
    owner = model.text_encoder if where == "encode" else model
    call, gate, entered = getattr(owner, where), threading.Event(), threading.Event()

    def hang(*args: Any) -> Any:
        entered.set()
        assert gate.wait(HELD_S)
        return call(*args)

    async with running(model) as engine:
        monkeypatch.setattr(owner, where, hang)
        task = asyncio.create_task(watch(engine))
        await until(entered.is_set, "a call")
        await until(lambda: engine.phase is Phase.FAILED, "noticing")
        assert not engine.alive
        with pytest.raises(NotReadyError):
            await engine.generate(job("other", "bus"))
        gate.set()
        await task
        await until(lambda: engine.alive and engine.phase is Phase.READY, "recovery")
        assert (await engine.generate(job("other", "bus"))).data


async def watch(engine: Engine) -> list[Progress | Generated]:
    return [event async for event in engine.stream(job("apple", "bus"), heads_every=1)]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("thread", ["model", "text"])
async def test_a_thread_that_died_is_a_failed_worker(
    model: FakeModel, monkeypatch: pytest.MonkeyPatch, thread: str
) -> None:
    async with running(model, drain_timeout_s=0.1) as engine:
        assert engine._loaded is not None

        def die(*_: object) -> None:
            raise SystemError("a mistake of ours")

        if thread == "model":
            monkeypatch.setattr(engine._loaded.runner, "turn", die)
        else:
            monkeypatch.setattr(engine._loaded.texts, "_embed", die)
        task = asyncio.create_task(engine.generate(job("apple", "bus")))
        await until(lambda: engine.phase is Phase.FAILED, "noticing")
        with pytest.raises(NotReadyError):
            await engine.generate(job("other", "bus"))
        task.cancel()
        await asyncio.wait((task,))


@pytest.mark.parametrize("what", ["load", "call"])
async def test_what_hangs_holds_a_stop_up_for_one_drain_timeout_and_no_longer(model: FakeModel, what: str) -> None:
    gate = threading.Event()

    def load(_: Settings) -> FakeModel:
        if what == "load":
            assert gate.wait(HELD_S)
        return model

    engine = Engine(Settings(drain_timeout_s=0.5), load=load)
    engine.start()
    task = None
    try:
        if what == "call":
            await until(lambda: engine.phase is Phase.READY, "warm-up")
            model.gate.clear()
            task = asyncio.create_task(engine.generate(job("apple", "bus", steps=9)))
            await until(model.entered.is_set, "a call")
        engine.begin_drain()
        ends_at = engine._drain_ends_at
        engine.begin_drain()
        assert engine._drain_ends_at == ends_at, "a second signal gave a second timeout"
        await asyncio.wait_for(engine.stop(), PATIENCE_S)  # what hangs would last longer
    finally:
        gate.set()
        model.gate.set()
    if task is not None:
        with pytest.raises(NotReadyError):
            await task
    await until(lambda: not engine._thread.is_alive(), "the end of the thread")


@pytest.mark.parametrize(("fits", "largest"), [(32, 32), (9, 8), (1, 1)])
def test_the_largest_usual_call_is_made_at_start_and_shrinks_until_it_fits(
    model: FakeModel, fits: int, largest: int
) -> None:
    made: list[tuple[int, int]] = []

    def remember(samples: Sequence[Sample], rows: int) -> None:
        made.append((rows, len(samples[0].request.classes)))
        if rows > fits and made[-1][1] > 2:
            raise torch.OutOfMemoryError

    model.trouble = remember
    runner = BatchRunner(model, Metrics(), 32)
    runner.warm_up()
    assert max(rows for rows, classes in made if classes == 32 and rows <= fits) == largest
    assert runner.ladder.most == largest


@pytest.mark.parametrize("error", [torch.OutOfMemoryError(), RuntimeError("device lost")])
def test_a_machine_that_cannot_make_the_smallest_usual_call_is_not_started(model: FakeModel, error: Exception) -> None:
    def fail(samples: Sequence[Sample], rows: int) -> None:
        if len(samples[0].request.classes) > 2:
            raise error

    model.trouble = fail
    with pytest.raises(type(error)):
        BatchRunner(model, Metrics(), 32).warm_up()


def test_the_self_check_knows_its_head_again(model: FakeModel) -> None:
    runner = BatchRunner(model, Metrics(), 4)
    runner.warm_up()
    runner.check()
    model.wrong = True
    with pytest.raises(SelfCheckError):
        runner.check()
    assert runner.times.seconds is not None


@pytest.mark.parametrize(("known", "asked"), [((), ["a cat", "a dog"]), (("ant", "bee", "fox"), ["a ant", "a bee"])])
def test_the_self_check_asks_for_names_of_the_checkpoint(
    model: FakeModel, known: tuple[str, ...], asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model.config.classes = known
    texts: list[list[str]] = []
    encode = model.text_encoder.encode
    monkeypatch.setattr(model.text_encoder, "encode", lambda names: texts.append(list(names)) or encode(names))
    runner = BatchRunner(model, Metrics(), 4)
    runner.warm_up()
    runner.check()
    assert texts
    assert all(names == asked for names in texts)
