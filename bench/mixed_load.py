"""Short requests beside long ones: this service against the same model behind LitServe, in the same run.

80 % of the requests take one denoiser call, 15 % take 20 and 5 % take 200. They come as a Poisson process at 70 % of
the rate that the bare denoiser could answer on this machine, at the same times for both servers, one server after the
other. LitServe batches whole requests (`litserve_app`). `ratio` is its 99th percentile of the short requests' time
over this service's; `throughput_ratio` is this service's answers per second over LitServe's.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.http_load import OK, Connections, request_bytes
from bench.timing import significant
from bench.workload import draw_classes, known_names, warm_service
from demo.service_process import ServiceError
from text2weight.generator import GenerationRequest, Generator

# Share, sampler and denoiser calls.
MIX = ((0.80, "mean", 1), (0.15, "ddim", 20), (0.05, "ddim", 200))
LOAD = 0.7
ROWS = 16
START_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Sizes:
    """Seconds of arrivals, denoiser calls timed for the capacity, most arrivals per second, and the mix."""

    seconds: float
    calls: int
    most_per_s: float = 1000.0
    mix: tuple[tuple[float, str, int], ...] = MIX


FULL = Sizes(seconds=60, calls=40)
QUICK = Sizes(seconds=5, calls=5)


@dataclass(frozen=True)
class Arrival:
    """A request, how many denoiser calls it takes, and when it comes, in seconds from the first."""

    at_s: float
    steps: int
    body: dict[str, object]


def run(checkpoint: Path, sizes: Sizes) -> dict[str, object]:
    """Measure this service, then LitServe where it is installed."""
    generator = Generator.load(checkpoint)
    names = known_names(generator.config)
    rows_per_s = _capacity(generator, names, sizes)
    rate = min(LOAD * rows_per_s / sum(share * steps for share, _, steps in sizes.mix), sizes.most_per_s)
    arrivals = _draw(names, rate, sizes)
    with warm_service(checkpoint, names) as url:
        ours = asyncio.run(_measure(url, "/generate", arrivals))
    result: dict[str, object] = {
        "checkpoint": generator.checkpoint_hash[:12],
        "mix": [[share, steps] for share, _, steps in sizes.mix],
        "capacity_rows_per_s": significant(rows_per_s),
        "arrivals_per_s": significant(rate),
        "requests": len(arrivals),
        "service": ours,
    }
    if importlib.util.find_spec("litserve") is None:
        return {**result, "litserve": "not installed: see the dependency group bench", "ratio": None}
    with _litserve(checkpoint) as url:
        theirs = asyncio.run(_measure(url, "/predict", arrivals))
    return {
        **result,
        "litserve": theirs,
        "ratio": significant(theirs["short_ms"]["p99"] / ours["short_ms"]["p99"]),  # type: ignore[index]
        "ratio_p50": significant(theirs["short_ms"]["p50"] / ours["short_ms"]["p50"]),  # type: ignore[index]
        "throughput_ratio": significant(ours["answers_per_s"] / theirs["answers_per_s"]),  # type: ignore[operator]
    }


def _capacity(generator: Generator, names: tuple[str, ...], sizes: Sizes) -> float:
    """Rows per second of the bare denoiser in full calls."""
    classes = draw_classes(names, random.Random(0))
    embeddings = generator.text_encoder.encode(generator.prompts(classes))  # (K, D)
    requests = [GenerationRequest(classes, embeddings, seed, 2 * sizes.calls, "ddim") for seed in range(ROWS)]
    samples = [generator.begin(request) for request in requests]
    for _ in range(sizes.calls):
        generator.advance(samples)
    started = time.perf_counter()
    for _ in range(sizes.calls):
        generator.advance(samples)
    return ROWS * sizes.calls / (time.perf_counter() - started)


def _draw(names: tuple[str, ...], rate: float, sizes: Sizes) -> list[Arrival]:
    source = random.Random(0)
    arrivals: list[Arrival] = []
    at_s = 0.0
    while at_s < sizes.seconds:
        (kind,) = source.choices(sizes.mix, [share for share, _, _ in sizes.mix])
        body: dict[str, object] = {"classes": draw_classes(names, source), "seed": source.getrandbits(32)}
        arrivals.append(Arrival(at_s, kind[2], {**body, "sampler": kind[1], "steps": kind[2]}))
        at_s += source.expovariate(rate)
    return arrivals


async def _measure(url: str, path: str, arrivals: list[Arrival]) -> dict[str, object]:
    """Times of all answers, by the denoiser calls they took."""
    connections = Connections(url)
    times: dict[int, list[float]] = {}
    failed = 0

    async def ask(arrival: Arrival) -> None:
        nonlocal failed
        request = request_bytes(path, arrival.body)
        await asyncio.sleep(started + arrival.at_s - time.perf_counter())
        due = time.perf_counter()
        if await connections.ask(request) == OK:
            times.setdefault(arrival.steps, []).append(time.perf_counter() - due)
        else:
            failed += 1

    started = time.perf_counter()
    await asyncio.gather(*(ask(arrival) for arrival in arrivals))
    spent = time.perf_counter() - started
    await connections.close()
    answered = sum(len(seconds) for seconds in times.values())
    return {
        "short_ms": _percentiles(times[min(times)]),
        "by_steps_ms": {str(steps): _percentiles(seconds) for steps, seconds in sorted(times.items())},
        "answered": answered,
        "failed": failed,
        "answers_per_s": significant(answered / spent),
    }


def _percentiles(seconds: list[float]) -> dict[str, float]:
    middle, high = np.percentile(np.asarray(seconds) * 1000, [50, 99])
    return {"p50": significant(float(middle)), "p99": significant(float(high)), "count": len(seconds)}


@contextmanager
def _litserve(checkpoint: Path) -> Iterator[str]:
    """LitServe as a process of its own, ready and warm; yields its URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "bench.litserve_app", str(checkpoint), str(port)]
    root = Path(__file__).resolve().parents[1]
    with tempfile.TemporaryDirectory() as folder:
        log_path = Path(folder) / "litserve.log"
        with log_path.open("wb") as log:
            process = subprocess.Popen(
                command, cwd=root, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, env=os.environ
            )
        try:
            url = f"http://127.0.0.1:{port}"
            _wait_until_it_answers(url, process, log_path)
            yield url
        finally:
            # All of its processes, which share a session of their own.
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _wait_until_it_answers(url: str, process: subprocess.Popen[bytes], log_path: Path) -> None:
    body = {"classes": ["apple", "bus"], "seed": 0, "sampler": "mean", "steps": 1}

    async def ask() -> int:
        connections = Connections(url)
        async with asyncio.timeout(START_TIMEOUT_S):
            status = await connections.ask(request_bytes("/predict", body))
        await connections.close()
        return status

    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            if asyncio.run(ask()) == OK:
                return
        except OSError:
            pass
        if process.poll() is not None or time.monotonic() > deadline:
            raise ServiceError(f"LitServe did not come up:\n{log_path.read_text(errors='replace')[-3000:]}")
        time.sleep(0.2)
