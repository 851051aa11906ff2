"""Load a worker at 80 % of what it can do for an hour, and see whether anything grows.

One `t2w serve` of this machine, on the loopback address, gets mixed requests (80 % with one step, 15 % with 20, 5 %
with 200; 2 to 32 classes; one in five a repetition). First its capacity is measured with many callers at once, then
requests arrive at random (Poisson) moments at 80 % of that rate, each counted from the moment it was due. Prints one
JSON line per minute and one with the verdict; the exit code is 0 when the verdict is passed, else 1.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
from scipy.stats import theilslopes

from bench.timing import significant
from bench.traffic import KINDS, Ask, Callers, Mix, Tally, documented_statuses, open_client, send
from bench.workload import known_names
from demo.service_process import ServiceError, running_service
from text2weight.checkpoint import bundled_checkpoint, read_config
from text2weight.errors import Text2WeightError
from text2weight_client import Client, Text2WeightClientError

LOAD = 0.8
CAPACITY_CALLERS = 32
CAPACITY_GIVE_UP_S = 60.0
CAPACITY_S = 30.0  # after as long a warm-up; a tenth of the soak where that is less
LINE_S = 60.0  # a twelfth of the soak where that is less
SAMPLES_PER_LINE = 12
# Beside 80 % of what the worker can do a request with 200 steps takes 15 to 30 s, and how long it takes is measured,
# not what the usual limit of 30 s makes of it.
WORKER_TIMEOUT_S = 120.0
SOAK_TIMEOUT_S = WORKER_TIMEOUT_S + 10.0  # a client that waits longer was forgotten
WARM_UP = 0.1  # share of the soak that the verdict leaves out: caches and allocators fill
HOUR_S = 3600.0
MEGABYTE = 2**20
EXIT_FAILED = 1

# What the verdict allows: growth per hour as a share of the memory, and p99 of the last quarter over the first.
MOST_GROWTH_PER_HOUR = 0.01
MOST_P99_DRIFT = 1.5


@dataclass(frozen=True)
class Sample:
    """The worker's process at one moment after the start."""

    at_s: float
    rss_mb: float
    files: int
    threads: int


@dataclass(frozen=True)
class Fate:
    """One finished request: the moment it was due, its latency (None if it failed) and its kind."""

    due_s: float
    latency_s: float | None
    kind: str


@dataclass
class Record:
    """What a soak gathers; the tally names the failures."""

    tally: Tally = field(default_factory=Tally)
    fates: list[Fate] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    under_way: int = 0


def main(arguments: list[str] | None = None) -> int:
    """Soak as the command line asks; returns the exit code."""
    options = _parse(arguments)
    try:
        record, verdict = asyncio.run(soak(options.checkpoint or bundled_checkpoint(), 60 * options.minutes))
    except (ServiceError, Text2WeightError, Text2WeightClientError, psutil.Error) as error:
        print(f"soak: {error}", file=sys.stderr)
        return EXIT_FAILED
    print(json.dumps(verdict), flush=True)
    if options.figure is not None:
        draw(record, 60 * options.minutes, options.figure)
    return 0 if verdict["passed"] else EXIT_FAILED


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, epilog="Example: python -m bench.soak --minutes 10")
    parser.add_argument("--minutes", type=float, default=60.0, help="length of the load (default: 60)")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="draw memory and latency into this picture")
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="instead of the bundled model")
    options = parser.parse_args(arguments)
    if not options.minutes > 0:
        parser.error(f"--minutes is {options.minutes}: it must be above 0")
    return options


async def soak(checkpoint: Path, seconds: float) -> tuple[Record, dict[str, object]]:
    """Measure the capacity, then load for `seconds`; prints the lines on the way.

    Returns:
        what was gathered, and the verdict.

    Raises:
        ServiceError: the service did not come up.
        psutil.Error: its process ended.
    """
    config = read_config(checkpoint)
    mix = Mix(known_names(config))
    limits = {"T2W_REQUEST_TIMEOUT_S": str(WORKER_TIMEOUT_S)}
    with (
        tempfile.TemporaryDirectory() as folder,
        running_service(checkpoint, Path(folder) / "service.log", variables=limits) as service,
    ):
        with Client(service.url) as client:
            service.wait_until_ready(client)
        documented = documented_statuses(service.url)
        capacity = await _capacity(service.url, mix, documented, min(CAPACITY_S, seconds / 10))
        print(f"soak: capacity {capacity:.1f} requests/s", file=sys.stderr, flush=True)
        record = Record()
        await asyncio.gather(
            _load(service.url, mix, documented, LOAD * capacity, seconds, record),
            _watch(psutil.Process(service.process.pid), record, seconds),
        )
    setting = {"benchmark": "soak", "checkpoint": config.sha256[:12], "minutes": significant(seconds / 60)}
    rates = {"capacity_per_s": significant(capacity), "load_per_s": significant(LOAD * capacity)}
    return record, setting | rates | judge(record, seconds)


async def _capacity(url: str, mix: Mix, documented: frozenset[int], seconds: float) -> float:
    """Answers per second to callers that never rest: for `seconds`, and to twice as many requests as callers."""
    callers = Callers(url, mix, documented, callers=CAPACITY_CALLERS, max_retries=0, pause_s=0.0)
    await _answers(callers.tally, CAPACITY_CALLERS, seconds)
    before, started = callers.tally.answered, time.perf_counter()
    await _answers(callers.tally, before + 2 * CAPACITY_CALLERS, seconds)
    rate = (callers.tally.answered - before) / (time.perf_counter() - started)
    await callers.stop()
    return rate


async def _answers(tally: Tally, count: int, seconds: float) -> None:
    """Return when `seconds` have passed and `count` answers have come.

    Raises:
        ServiceError: they do not come.
    """
    started = time.perf_counter()
    while time.perf_counter() - started < seconds or tally.answered < count:
        if time.perf_counter() - started > seconds + CAPACITY_GIVE_UP_S:
            raise ServiceError(f"the capacity cannot be measured: {tally.summary()}")
        await asyncio.sleep(0.01)


async def _load(url: str, mix: Mix, documented: frozenset[int], rate: float, seconds: float, record: Record) -> None:
    """Send requests at Poisson moments; a request that is late does not hold up the next."""
    gaps = random.Random(1)
    start, due = time.perf_counter(), 0.0
    async with open_client(url, record.tally, 0, SOAK_TIMEOUT_S) as client, asyncio.TaskGroup() as group:

        async def one(ask: Ask, due_s: float) -> None:
            record.under_way += 1
            answered = await send(client, ask, record.tally, documented, start + due_s)
            latency_s = record.tally.seconds[-1] if answered else None
            record.under_way -= 1
            record.fates.append(Fate(due_s, latency_s, ask.kind.name))

        while (due := due + gaps.expovariate(rate)) < seconds:
            await asyncio.sleep(max(0.0, start + due - time.perf_counter()))
            group.create_task(one(mix.draw(), due))


async def _watch(worker: psutil.Process, record: Record, seconds: float) -> None:
    """Sample the worker's process and print a line for each stretch of the load."""
    line_s = min(LINE_S, seconds / 12)
    start, printed = time.perf_counter(), 0
    for step in range(1, round(seconds / line_s * SAMPLES_PER_LINE) + 1):
        await asyncio.sleep(max(0.0, start + step * line_s / SAMPLES_PER_LINE - time.perf_counter()))
        with worker.oneshot():
            memory = worker.memory_info().rss / MEGABYTE
            files, threads = worker.num_fds(), worker.num_threads()
        record.samples.append(Sample(time.perf_counter() - start, round(memory, 1), files, threads))
        if step % SAMPLES_PER_LINE == 0:
            print(json.dumps(_line(record, record.fates[printed:])), flush=True)
            printed = len(record.fates)


def _line(record: Record, finished: list[Fate]) -> dict[str, object]:
    """One line of output: the requests that finished since the last one, and the process now."""
    now = record.samples[-1]
    kinds = {kind.name: _percentiles_ms([fate for fate in finished if fate.kind == kind.name]) for kind in KINDS}
    return {
        "minute": round(now.at_s / 60, 2),
        "requests": len(finished),
        "failures": sum(fate.latency_s is None for fate in finished),
        **_percentiles_ms(finished),
        "kinds": {name: figures for name, figures in kinds.items() if figures["p50_ms"] is not None},
        "under_way": record.under_way,
        "rss_mb": now.rss_mb,
        "files": now.files,
        "threads": now.threads,
    }


def _percentiles_ms(fates: list[Fate]) -> dict[str, float | None]:
    latencies = [1000 * fate.latency_s for fate in fates if fate.latency_s is not None]
    if not latencies:
        return {"p50_ms": None, "p99_ms": None}
    p50, p99 = np.percentile(latencies, [50, 99])
    return {"p50_ms": round(float(p50), 1), "p99_ms": round(float(p99), 1)}


def judge(record: Record, seconds: float) -> dict[str, object]:
    """The verdict on what came after the warm-up.

    The memory slope is Theil-Sen's, the median of the slopes of all pairs of samples, with its 95 % interval:
    single steps, up or down, do not bend it. Memory counts as flat when the interval's lower end is below
    `MOST_GROWTH_PER_HOUR`. The drift is that of all requests, and of those with one step alone.
    """
    start = WARM_UP * seconds
    samples = [sample for sample in record.samples if sample.at_s >= start]
    memory = [sample.rss_mb for sample in samples]
    slope, _, low, high = theilslopes(memory, [sample.at_s / HOUR_S for sample in samples])
    drift = _drift([fate for fate in record.fates if fate.due_s >= start], start, seconds)
    drift_short = _drift([f for f in record.fates if f.due_s >= start and f.kind == KINDS[0].name], start, seconds)
    failed = sum(fate.latency_s is None for fate in record.fates)
    flat = bool(low <= MOST_GROWTH_PER_HOUR * float(np.median(memory)))
    return {
        "requests": len(record.fates),
        "failed": failed,
        "failures": {
            **record.tally.errors,
            **record.tally.undocumented,
            **record.tally.broken,
            **({f"no answer in {SOAK_TIMEOUT_S:g} s": record.tally.lost} if record.tally.lost else {}),
        },
        "rss_mb": {"first": memory[0], "last": memory[-1], "most": max(memory)},
        "memory_mb_per_hour": {"slope": significant(slope), "low": significant(low), "high": significant(high)},
        "files": {"first": samples[0].files, "last": samples[-1].files},
        "threads": {"first": samples[0].threads, "last": samples[-1].threads},
        "p99_last_quarter_over_first": {"all": drift, KINDS[0].name: drift_short},
        "memory_flat": flat,
        "passed": failed == 0 and flat and drift is not None and drift <= MOST_P99_DRIFT,
    }


def _drift(fates: list[Fate], start: float, end: float) -> float | None:
    """p99 of the requests due in the last quarter over p99 of those due in the first; None where one has none."""
    quarter = (end - start) / 4
    first = _percentiles_ms([fate for fate in fates if fate.due_s < start + quarter])["p99_ms"]
    last = _percentiles_ms([fate for fate in fates if fate.due_s >= end - quarter])["p99_ms"]
    return significant(last / first, 3) if first and last else None


def draw(record: Record, seconds: float, path: Path) -> None:
    """Write a picture of the memory and of the latency percentiles over time."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (memory, latency) = plt.subplots(2, 1, sharex=True, figsize=(7, 5), layout="constrained")
    memory.plot([sample.at_s / 60 for sample in record.samples], [sample.rss_mb for sample in record.samples])
    memory.set(ylabel="memory of the worker, MB", ylim=(0, 1.2 * max(sample.rss_mb for sample in record.samples)))
    width = min(LINE_S, seconds / 12)
    for kind in KINDS:
        fates = [fate for fate in record.fates if fate.kind == kind.name]
        starts = np.arange(0, seconds, width)
        slots = [[fate for fate in fates if start <= fate.due_s < start + width] for start in starts]
        latency.plot((starts + width / 2) / 60, [_percentiles_ms(slot)["p99_ms"] for slot in slots], label=kind.name)
    latency.set(ylabel="p99, ms", xlabel="minutes", yscale="log")
    latency.legend()
    temporary = path.with_name(f".{path.name}.part")
    figure.savefig(temporary, format=path.suffix.lstrip(".") or "png", dpi=120)
    temporary.replace(path)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
