"""What HTTP costs: answers per second of `/generate` with 64 requests under way, over those of the bare engine.

The bare engine runs in this process, with 64 requests under way, too. Then `t2w serve` answers the same requests, each
with its own classes and seed, so that no head is known; and then again, when every head is. The client is on the same
machine and takes part of its processors.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from structlog.testing import capture_logs

from bench.http_load import OK, Connections, request_bytes
from bench.timing import significant
from bench.workload import draw_classes, known_names, warm_service
from demo.service_process import ServiceError
from text2weight.checkpoint import read_config
from text2weight_service.engine import Engine, Phase
from text2weight_service.job import Job
from text2weight_service.settings import Settings

CONCURRENCY = 64
PATIENCE_S = 30.0


@dataclass(frozen=True)
class Sizes:
    """Rounds that count, after one that does not, and requests in each."""

    rounds: int
    requests: int


FULL = Sizes(rounds=5, requests=600)
QUICK = Sizes(rounds=1, requests=128)

Asked = tuple[tuple[str, ...], int]


def run(checkpoint: Path, sizes: Sizes) -> dict[str, object]:
    """Measure the default sampler."""
    config = read_config(checkpoint)
    names = known_names(config)
    source = random.Random(0)
    rounds = [
        [(draw_classes(names, source), source.getrandbits(32)) for _ in range(sizes.requests)]
        for _ in range(1 + sizes.rounds)
    ]
    with capture_logs():  # this process prints results and nothing else
        engine = asyncio.run(_bare_engine(checkpoint, names, rounds))
    with warm_service(checkpoint, names) as url:
        uncached, cached = asyncio.run(_over_http(url, rounds))
    return {
        "checkpoint": config.sha256[:12],
        "sampler": f"{config.sampler}/{config.steps}",
        "concurrency": CONCURRENCY,
        "rounds": sizes.rounds,
        "requests_per_round": sizes.requests,
        "answers_per_s": {
            "engine": significant(engine),
            "http_uncached": significant(uncached),
            "http_cached": significant(cached),
        },
        "ratio": significant(uncached / engine),
        "ratio_cached": significant(cached / engine),
    }


async def _bare_engine(checkpoint: Path, names: tuple[str, ...], rounds: Sequence[Sequence[Asked]]) -> float:
    engine = Engine(Settings(checkpoint=str(checkpoint)))
    engine.start()
    while engine.phase is Phase.STARTING:  # noqa: ASYNC110  the model's thread knows no event of this loop
        await asyncio.sleep(0.01)

    async def generate(asked: Asked) -> None:
        await engine.generate(Job("bench", asked[0], asked[1], None, None, time.monotonic() + PATIENCE_S))

    try:
        await generate((names, 0))  # all embeddings are known from here on, as they are to the service
        return await _median_rate(generate, rounds)
    finally:
        await engine.stop()


async def _over_http(url: str, rounds: Sequence[Sequence[Asked]]) -> tuple[float, float]:
    """Answers per second when no head is known, and when every head is."""
    connections = Connections(url)

    async def post(asked: Asked) -> None:
        status = await connections.ask(request_bytes("/generate", {"classes": asked[0], "seed": asked[1]}))
        if status != OK:
            raise ServiceError(f"the service answered {status} under load")

    uncached = await _median_rate(post, rounds)
    # The last round's heads are the ones that the cache surely still holds.
    cached = await _median_rate(post, [rounds[-1]] * len(rounds))
    await connections.close()
    return uncached, cached


async def _median_rate(ask: Callable[[Asked], Awaitable[None]], rounds: Sequence[Sequence[Asked]]) -> float:
    rates = [await _rate(ask, asked) for asked in rounds]
    return statistics.median(rates[1:])


async def _rate(ask: Callable[[Asked], Awaitable[None]], requests: Sequence[Asked]) -> float:
    left = iter(requests)

    async def keep_asking() -> None:
        for asked in left:
            await ask(asked)

    started = time.perf_counter()
    await asyncio.gather(*(keep_asking() for _ in range(CONCURRENCY)))
    return len(requests) / (time.perf_counter() - started)
