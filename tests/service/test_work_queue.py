"""Results on their way from the model's thread to who waits for them."""

import asyncio
import threading
from collections.abc import Callable, Sequence
from unittest.mock import Mock

import pytest

from tests.patience import HELD_S, PATIENCE_S
from tests.service.engines import job, running, until
from tests.service.fakes import FakeModel
from text2weight.generator import GenerationRequest
from text2weight.sampling import Sample
from text2weight_service.engine import NotReadyError
from text2weight_service.job import Work
from text2weight_service.work_queue import DeadlineError, Generated, WorkItem, resolve_all


def item() -> WorkItem:
    return WorkItem(Mock(Work, calls=1, texts=(), request=Mock(GenerationRequest)), known={}, deadline=0.0)


async def test_a_loop_is_woken_once_for_many_items(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = asyncio.get_running_loop()
    woken: list[Callable[..., object]] = []
    wake = loop.call_soon_threadsafe

    def counting(callback: Callable[..., object], *args: object) -> object:
        woken.append(callback)
        return wake(callback, *args)

    items = [item() for _ in range(5)]
    monkeypatch.setattr(loop, "call_soon_threadsafe", counting)
    outcomes = [(one, Generated(b"", str(i))) for i, one in enumerate(items)]
    thread = threading.Thread(target=resolve_all, args=(outcomes,))
    thread.start()
    thread.join()
    monkeypatch.undo()
    assert len(woken) == 1
    assert [(await one.future).key for one in items] == ["0", "1", "2", "3", "4"]


async def test_who_left_gets_nothing_and_the_others_get_theirs() -> None:
    left, failed, fine = item(), item(), item()
    left.future.cancel()
    resolve_all([(left, Generated(b"", "a")), (failed, DeadlineError()), (fine, Generated(b"", "b"))])
    assert (await fine.future).key == "b"
    assert left.future.cancelled()
    with pytest.raises(DeadlineError):
        await failed.future


def test_a_closed_loop_is_no_error() -> None:
    async def make() -> WorkItem:
        return item()

    one = asyncio.run(make())
    resolve_all([(one, Generated(b"", "a"))])
    assert not one.future.done()


async def test_what_is_finished_is_answered_during_the_next_call(model: FakeModel) -> None:
    async with running(model, max_batch_size=1) as engine:
        model.gate.clear()
        first = asyncio.create_task(engine.generate(job("cat", "tram", seed=1)))
        await asyncio.to_thread(model.entered.wait)
        second = asyncio.create_task(engine.generate(job("cat", "bus", seed=2)))
        await until(lambda: engine._queue.waiting == 1, "the second in line")
        let_go = threading.Event()
        model.trouble = lambda samples, rows: _hold(samples[0].request.classes, let_go)
        model.gate.set()
        await asyncio.wait_for(first, PATIENCE_S)
        assert not second.done()
        let_go.set()
        await asyncio.wait_for(second, PATIENCE_S)


def _hold(classes: tuple[str, ...], let_go: threading.Event) -> None:
    if "bus" in classes:
        assert let_go.wait(HELD_S)


async def test_what_is_finished_is_answered_though_the_device_is_lost(model: FakeModel) -> None:
    """One request ends with the call after which the self-check fails; the other would go on."""
    async with running(model) as engine:
        calls: list[int] = []

        def break_down(samples: Sequence[Sample], rows: int) -> None:
            if len(samples) < 2:  # before both take part
                return
            calls.append(len(samples))
            model.wrong = True
            engine._in_doubt = True

        model.gate.clear()
        long = asyncio.create_task(engine.generate(job("cat", "tram", steps=500)))
        await asyncio.to_thread(model.entered.wait)
        short = asyncio.create_task(engine.generate(job("cat", "bus")))
        await until(lambda: engine._queue.waiting == 1, "the second in line")
        model.trouble = break_down
        model.gate.set()
        with pytest.raises(NotReadyError):
            await asyncio.wait_for(long, PATIENCE_S)
        assert calls
        assert (await asyncio.wait_for(short, PATIENCE_S)).data
