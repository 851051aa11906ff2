"""An engine without HTTP around it."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from tests.patience import HELD_S, PATIENCE_S
from text2weight_service.engine import Engine, Phase
from text2weight_service.job import Job
from text2weight_service.model import Model
from text2weight_service.settings import Settings


async def until(condition: Callable[[], object], what: str, timeout_s: float = PATIENCE_S) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, f"{what} did not happen within {timeout_s} s"
        await asyncio.sleep(0.002)


@asynccontextmanager
async def running(model: Model | Callable[[Settings], Model], **settings: Any) -> AsyncIterator[Engine]:
    """A started engine around a model, or around what a function loads."""
    load = model if callable(model) else lambda _: model
    engine = Engine(Settings(**settings), load=load)
    engine.start()
    try:
        await until(lambda: engine.phase is not Phase.STARTING, "warm-up")
        yield engine
    finally:
        await engine.stop()


def job(*classes: str, seed: int = 0, steps: int = 1, within_s: float = HELD_S, **fields: Any) -> Job:
    """A job that gives up after `within_s` seconds; with more than one step it takes ddim."""
    sampler = fields.pop("sampler", "mean" if steps == 1 else "ddim")
    return Job("test", classes, seed, steps, sampler, time.monotonic() + within_s, **fields)


def large_calls_pay(engine: Engine) -> None:
    """From now on a denoiser call takes the same time whatever its rows, however noisy this machine is."""
    engine._loaded.runner.times.seconds = lambda shape, rows: 0.001  # type: ignore[union-attr, method-assign]


def metric(engine: Engine, name: str, **labels: str) -> float:
    return engine.metrics.registry.get_sample_value(name, labels) or 0.0
