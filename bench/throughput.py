"""What batching gives: requests per second with 32 requests under way over one at a time.

Every request has its own class list and seed. One `t2w serve` process answers; the client, on the same
machine, takes part of the processor in both cases. The order of the two changes from round to round.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

from bench.timing import significant
from bench.workload import draw_classes, known_names, warm_service
from text2weight.checkpoint import read_config
from text2weight_client import AsyncClient

CONCURRENCY = 32


@dataclass(frozen=True)
class Sizes:
    """Rounds that count, after one that does not, and requests per round."""

    rounds: int
    requests_alone: int
    requests_together: int


FULL = Sizes(rounds=7, requests_alone=64, requests_together=512)
QUICK = Sizes(rounds=1, requests_alone=4, requests_together=64)


def run(checkpoint: Path, sizes: Sizes) -> dict[str, object]:
    """Measure the default sampler."""
    config = read_config(checkpoint)
    names = known_names(config)
    with warm_service(checkpoint, names) as url:
        alone, together = asyncio.run(_rounds(url, names, sizes))
    return {
        "checkpoint": config.sha256[:12],
        "sampler": f"{config.sampler}/{config.steps}",
        "rounds": sizes.rounds,
        "requests_per_round": {"1": sizes.requests_alone, str(CONCURRENCY): sizes.requests_together},
        "requests_per_s": {"1": significant(alone), str(CONCURRENCY): significant(together)},
        "concurrency": CONCURRENCY,
        "ratio": significant(together / alone),
    }


async def _rounds(url: str, names: tuple[str, ...], sizes: Sizes) -> tuple[float, float]:
    """Median requests per second alone and together."""
    source = random.Random(0)
    rates: dict[int, list[float]] = {1: [], CONCURRENCY: []}
    counts = {1: sizes.requests_alone, CONCURRENCY: sizes.requests_together}
    async with AsyncClient(url, max_retries=0) as client:
        for turn in range(1 + sizes.rounds):
            for concurrency in counts if turn % 2 else reversed(counts):
                jobs = [(draw_classes(names, source), source.getrandbits(32)) for _ in range(counts[concurrency])]
                rate = await _requests_per_second(client, concurrency, jobs)
                if turn > 0:
                    rates[concurrency].append(rate)
    return statistics.median(rates[1]), statistics.median(rates[CONCURRENCY])


async def _requests_per_second(client: AsyncClient, concurrency: int, jobs: list[tuple[tuple[str, ...], int]]) -> float:
    waiting = iter(jobs)

    async def work() -> None:
        for classes, seed in waiting:
            await client.generate(classes, seed=seed)

    started = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(concurrency)))
    return len(jobs) / (time.perf_counter() - started)
