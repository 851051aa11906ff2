"""What the trace of the network is worth on a CPU: a denoiser call through it, and begun from Python, in turns.

Alone, and beside a thread that runs Python without rest, as a server's event loop does while many requests come.
`ratio` is that of calls with 32 rows beside such a thread.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.timing import interleave, significant, summary_ms
from bench.workload import CLASSES_PER_REQUEST
from text2weight.checkpoint import Checkpoint, load_checkpoint
from text2weight.condition import Condition, condition_of_task, stack_conditions
from text2weight.traced import TracedDenoiser

ROWS = (1, 8, 32)


@dataclass(frozen=True)
class Sizes:
    """Rounds that count, alone and beside a busy thread, which makes calls long; each after three that do not."""

    alone: int
    beside: int


FULL = Sizes(alone=30, beside=5)
QUICK = Sizes(alone=2, beside=1)


def run(checkpoint: Path, sizes: Sizes) -> dict[str, object]:
    """Measure calls of 1, 8 and 32 rows."""
    loaded = load_checkpoint(checkpoint)
    network = loaded.denoiser.requires_grad_(False)
    networks = {"plain": network, "traced": TracedDenoiser(network)}
    cases: dict[str, dict[str, object]] = {}
    for rows in ROWS:
        inputs = network_inputs(loaded, rows)
        cases[f"{rows} alone"] = _compare(networks, inputs, sizes.alone)
        with _busy_thread():
            cases[f"{rows} beside"] = _compare(networks, inputs, sizes.beside)
    return {
        "checkpoint": loaded.config.sha256[:12],
        "rounds": {"alone": sizes.alone, "beside": sizes.beside},
        "ratio": cases[f"{ROWS[-1]} beside"]["ratio"],
        "cases": cases,
    }


def network_inputs(checkpoint: Checkpoint, rows: int) -> tuple[Tensor, Tensor, Condition]:
    """What a checkpoint's network takes, for a call of so many rows, on the CPU: noise, last timesteps, conditions."""
    config = checkpoint.config
    source = torch.Generator().manual_seed(rows)
    texts = torch.randn(rows, CLASSES_PER_REQUEST, config.denoiser.embedding_dim, generator=source)  # (R, K, D)
    condition = stack_conditions([condition_of_task(F.normalize(text, dim=-1)) for text in texts])
    noisy = torch.randn(rows, config.head.num_parameters, generator=source)  # (R, P)
    return noisy, torch.full((rows,), config.schedule.num_timesteps), condition


def time_calls(
    networks: Mapping[str, Callable[..., object]], inputs: tuple[Tensor, Tensor, Condition], rounds: int
) -> dict[str, dict[str, float]]:
    """Milliseconds of a call of each network with the same inputs, in turns, after three rounds that do not count."""

    def call(network: Callable[..., object], _: int) -> None:
        with torch.inference_mode():
            network(*inputs)

    actions = {name: partial(call, network) for name, network in networks.items()}
    return {name: summary_ms(spent) for name, spent in interleave(actions, repeats=rounds, warmup=3).items()}


def _compare(
    networks: dict[str, Callable[..., Tensor]], inputs: tuple[Tensor, Tensor, Condition], rounds: int
) -> dict[str, object]:
    figures = time_calls(networks, inputs, rounds)
    ratio = significant(figures["plain"]["median"] / figures["traced"]["median"])
    return {"ratio": ratio, **{f"{name}_ms": figure for name, figure in figures.items()}}


@contextmanager
def _busy_thread() -> Iterator[None]:
    over = threading.Event()

    def never_rest() -> None:
        while not over.is_set():
            sum(range(100))

    thread = threading.Thread(target=never_rest, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
