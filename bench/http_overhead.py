"""What HTTP costs: answers per second of `/generate` with 64 requests under way, over those of the bare engine.

In each round the bare engine computes the round's requests in this process, with 64 of them under way, too. Then
`t2w serve` answers the same requests, each with its own classes and seed, so that no head is known; and then again,
when every head is. The client is on the same machine and takes part of its processors.
"""

from __future__ import annotations

import asyncio
import gc
import random
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import uvloop
from structlog.testing import capture_logs

from bench.http_load import OK, Connections, request_bytes
from bench.timing import significant
from bench.workload import draw_classes, known_names, warm_service
from demo.service_process import ServiceError
from text2weight.checkpoint import read_config
from text2weight_service.engine import Engine, Phase
from text2weight_service.job import Job
from text2weight_service.server import load_to_stay
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
    with capture_logs(), warm_service(checkpoint, names) as url:  # this process prints results and nothing else
        # The service's event loop, for the engine, too; and the callers take less of the machine with it.
        rates = uvloop.run(_measure(checkpoint, names, url, rounds))[1:]
    engine, uncached, cached = (statistics.median(column) for column in zip(*rates, strict=True))
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
        # Of each round, then the median: a machine that is slow for a while is slow for both.
        "ratio": significant(statistics.median(uncached / engine for engine, uncached, _ in rates)),
        "ratio_cached": significant(statistics.median(cached / engine for engine, _, cached in rates)),
    }


async def _measure(
    checkpoint: Path, names: tuple[str, ...], url: str, rounds: Sequence[Sequence[Asked]]
) -> list[tuple[float, float, float]]:
    """Answers per second in each round: of the engine, over HTTP when no head is known, and when every head is."""
    engine = Engine(Settings(checkpoint=str(checkpoint)), load_to_stay)
    engine.start()
    while engine.phase is Phase.STARTING:  # noqa: ASYNC110  the model's thread knows no event of this loop
        await asyncio.sleep(0.01)
    connections = Connections(url)

    async def generate(asked: Asked) -> None:
        await engine.generate(Job("bench", asked[0], asked[1], None, None, time.monotonic() + PATIENCE_S))

    async def post(asked: Asked) -> None:
        status = await connections.ask(request_bytes("/generate", {"classes": asked[0], "seed": asked[1]}))
        if status != OK:
            raise ServiceError(f"the service answered {status} under load")

    try:
        await generate((names, 0))  # all embeddings are known from here on, as they are to the service
        return [(await _rate(generate, asked), await _rate(post, asked), await _rate(post, asked)) for asked in rounds]
    finally:
        await connections.close()
        await engine.stop()
        gc.unfreeze()  # as the server does at its end


async def _rate(ask: Callable[[Asked], Awaitable[None]], requests: Sequence[Asked]) -> float:
    left = iter(requests)

    async def keep_asking() -> None:
        for asked in left:
            await ask(asked)

    started = time.perf_counter()
    await asyncio.gather(*(keep_asking() for _ in range(CONCURRENCY)))
    return len(requests) / (time.perf_counter() - started)
