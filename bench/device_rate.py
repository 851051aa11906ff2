"""What the device makes of the network: heads per second with 1, 4, 20 and 1,000 steps, and one request's latency.

On a CUDA device where there is one, else on the CPU. `share_of_peak` is the network's arithmetic per second over that
of one large matrix product in the same run, bf16 on CUDA and fp32 on the CPU: how far from what the chip can do.
`ratio` is a call of one row begun operation by operation over one through the CUDA graph or the trace that serves
requests, in turns.
"""

from __future__ import annotations

import random
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.timing import significant
from bench.traced_call import network_inputs, time_calls
from bench.workload import draw_classes, known_names
from text2weight.checkpoint import Checkpoint, load_checkpoint
from text2weight.cuda_graphs import GraphedDenoiser
from text2weight.generator import GenerationRequest, Generator
from text2weight.traced import TracedDenoiser

WAYS = (("mean", 1), ("ddim", 4), ("ddim", 20), ("ddpm", 1000))
_MANY_STEPS = 100  # more are timed once
_PEAK_RUNS = 5


@dataclass(frozen=True)
class Sizes:
    """Rows of a call on either kind of device, timings after the first, and the side of the large matrix product."""

    rows_cpu: int
    rows_cuda: int
    repeats: int
    side_cpu: int
    side_cuda: int
    ways: tuple[tuple[str, int], ...] = WAYS


FULL = Sizes(rows_cpu=32, rows_cuda=256, repeats=10, side_cpu=2048, side_cuda=8192)
QUICK = Sizes(rows_cpu=2, rows_cuda=2, repeats=1, side_cpu=64, side_cuda=1024, ways=(("mean", 1), ("ddim", 4)))


def run(checkpoint: Path, sizes: Sizes) -> dict[str, object]:
    """Measure the library on the device, with nothing of the service around it."""
    on_cuda = torch.cuda.is_available()
    device = torch.device("cuda" if on_cuda else "cpu")
    rows, side = (sizes.rows_cuda, sizes.side_cuda) if on_cuda else (sizes.rows_cpu, sizes.side_cpu)
    generator = Generator.load(checkpoint, device=str(device))
    peak = _peak_flops(device, side)
    loaded = load_checkpoint(checkpoint)
    flops = _flops_per_row(loaded)
    rates = {}
    for sampler, steps in sizes.ways:
        repeats = sizes.repeats if steps <= _MANY_STEPS else 1
        together = _heads_per_s(generator, sampler, steps, rows, repeats)
        rates[f"{sampler}/{steps}"] = {
            "heads_per_s": significant(together),
            "latency_ms": significant(1000 / _heads_per_s(generator, sampler, steps, 1, repeats)),
            "share_of_peak": significant(together * steps * flops / peak),
        }
    calls = _compare_calls(loaded, device, sizes.repeats)
    return {
        "checkpoint": generator.checkpoint_hash[:12],
        "device": torch.cuda.get_device_name() if on_cuda else "cpu",
        "rows": rows,
        "peak_tflops": significant(peak / 1e12),
        "gflops_per_row": significant(flops / 1e9),
        "rates": rates,
        "call_ms": calls,
        "ratio": significant(calls["plain"]["median"] / calls["served"]["median"]),
        "memory_mb": significant(_memory_bytes(on_cuda) / 1e6),
    }


def _heads_per_s(generator: Generator, sampler: str, steps: int, rows: int, repeats: int) -> float:
    names, source = known_names(generator.config), random.Random(0)
    requests = []
    for seed in range(rows):
        classes = draw_classes(names, source)
        embeddings = generator.text_encoder.encode(generator.prompts(classes))  # (K, D)
        requests.append(GenerationRequest(classes, embeddings, seed, steps, sampler))
    times = []
    for _ in range(1 + repeats):  # the first records, allocates and chooses kernels
        started = time.perf_counter()
        samples = [generator.begin(request) for request in requests]
        while not all(sample.done for sample in samples):
            generator.advance(samples, rows)
        for sample in samples:
            generator.finish(sample)  # on the CPU, so the device is done
        times.append(time.perf_counter() - started)
    return rows * repeats / sum(times[1:])


def _peak_flops(device: torch.device, side: int) -> float:
    """Operations per second of the best of several products of two square matrices."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    matrix = torch.randn(side, side, device=device, dtype=dtype)  # (side, side)
    times = []
    for _ in range(1 + _PEAK_RUNS):
        started = time.perf_counter()
        matrix @ matrix
        _finish(device)
        times.append(time.perf_counter() - started)
    return float(2 * side**3 / min(times[1:]))


def _flops_per_row(checkpoint: Checkpoint) -> int:
    """Operations of the network's matrix products and attention for one row of a call."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        checkpoint.denoiser(*network_inputs(checkpoint, 1))
    return int(counter.get_total_flops())


def _compare_calls(checkpoint: Checkpoint, device: torch.device, repeats: int) -> dict[str, dict[str, float]]:
    network = checkpoint.denoiser.to(device).requires_grad_(False)
    served = GraphedDenoiser(network) if device.type == "cuda" else TracedDenoiser(network)
    noisy, timesteps, condition = network_inputs(checkpoint, 1)
    inputs = (noisy.to(device), timesteps.to(device), condition.to(device))

    def plain(*inputs: object) -> None:
        with torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda"):
            network(*inputs)

    def finished(call: Callable[..., object], *inputs: object) -> None:
        call(*inputs)
        _finish(device)

    return time_calls({"plain": partial(finished, plain), "served": partial(finished, served)}, inputs, repeats)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _memory_bytes(on_cuda: bool) -> int:
    """Most that was taken at a time: of the device's memory, or of this process's."""
    if on_cuda:
        return int(torch.cuda.max_memory_reserved())
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
