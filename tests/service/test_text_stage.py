"""Requests with many new texts take turns in the text encoder with those that have few."""

import asyncio
import threading
from collections.abc import Sequence

import pytest
import torch

from tests.patience import HELD_S, PATIENCE_S
from tests.service.engines import job, metric, running, until
from tests.service.fakes import FakeModel
from text2weight_service.text_stage import TEXTS_PER_CALL
from text2weight_service.work_queue import DeadlineError

MANY = tuple(f"name {i}" for i in range(256))
FEW = ("apple", "lizard")


class SteppedEncoder:
    """Makes a model's text encoder wait before each call until it may."""

    def __init__(self, model: FakeModel) -> None:
        self.calls: list[list[str]] = []
        self._may = threading.Semaphore(0)
        self._encode = model.text_encoder.encode
        model.text_encoder.encode = self.encode  # type: ignore[method-assign]

    def encode(self, texts: Sequence[str]) -> torch.Tensor:
        self.calls.append(list(texts))
        assert self._may.acquire(timeout=HELD_S)
        return self._encode(texts)

    def let(self, calls: int) -> None:
        self._may.release(calls)


async def test_few_texts_do_not_wait_for_the_many_of_another(model: FakeModel) -> None:
    async with running(model) as engine:
        encoder = SteppedEncoder(model)
        large = asyncio.create_task(engine.generate(job(*MANY)))
        await until(lambda: len(encoder.calls) == 1, "the first texts of the large one")
        small = asyncio.create_task(engine.generate(job(*FEW)))
        await until(lambda: len(engine._queue._without_texts) == 1, "the small one in line")
        encoder.let(5)  # two of the large one's turn; then, side by side, one turn of each
        await asyncio.wait_for(small, PATIENCE_S)
        assert not large.done()
        encoder.let(len(MANY))
        await asyncio.wait_for(large, PATIENCE_S)
        seen = [text for call in encoder.calls for text in call]
        assert set(seen) == {f"a {name}" for name in MANY + FEW}
        assert metric(engine, "t2w_batch_duration_seconds_count", stage="encode") == len(encoder.calls)


async def test_texts_of_who_left_are_not_encoded(model: FakeModel) -> None:
    async with running(model) as engine:
        encoder = SteppedEncoder(model)
        large = asyncio.create_task(engine.generate(job(*MANY)))
        await until(lambda: len(encoder.calls) == 1, "the first texts")
        large.cancel()
        await until(lambda: not engine._queue._accepted, "leaving")
        encoder.let(len(MANY))
        await asyncio.wait_for(engine.generate(job(*FEW)), PATIENCE_S)
        assert len(encoder.calls) < len(MANY) // TEXTS_PER_CALL


async def test_texts_of_who_is_late_are_not_encoded(model: FakeModel) -> None:
    async with running(model) as engine:
        encoder = SteppedEncoder(model)
        large = asyncio.create_task(engine.generate(job(*MANY, within_s=0.5)))
        with pytest.raises(DeadlineError):
            await large
        encoder.let(len(MANY))
        await asyncio.wait_for(engine.generate(job(*FEW)), PATIENCE_S)
        assert len(encoder.calls) < len(MANY) // TEXTS_PER_CALL
