"""A denoiser on a CPU, called through a trace of it: its operations follow one another without the interpreter.

A small network's call is hundreds of short operations. Begun from Python, each gives the interpreter's lock away and
takes it back, and where another thread runs Python, such as a server's event loop, each waits for that thread: up to
5 ms, a call in all more than ten times as long as alone. A trace takes the lock once. It is the same operations, so the
same bits, and a call of one row takes two thirds of the time (docs/architecture.md).

A call of many rows is made in equal parts, each on a thread of its own. Where all threads share each operation, they
wait for one another at its end, hundreds of times in a call, and whoever takes a processor from one of them for a while
holds up all.

torch calls its traces deprecated and does not support them from Python 3.14 on; what it offers in their place needs a
compiler on the machine (torch.compile), or runs in the interpreter (torch.export).
"""

from __future__ import annotations

import threading
import warnings
from concurrent.futures import wait
from functools import partial

import torch
from torch import Tensor, nn

from text2weight.condition import Condition, GivenHeads
from text2weight.thread_team import ThreadTeam

# A part of fewer rows takes nearly as long as one of so many.
ROWS_OF_A_PART = 4


class TracedDenoiser:
    """Calls a denoiser through a trace that the first call records. Any thread may call."""

    def __init__(self, denoiser: nn.Module) -> None:
        """Wrap a denoiser whose parameters stay as they are, and ask for no gradients."""
        self._call = _Call(denoiser)
        self._traces: dict[int, torch.jit.ScriptModule] = {}  # by number of inputs: with given heads or without
        self._recording = threading.Lock()
        self._helpers = _Helpers()

    def __call__(self, noisy: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """The denoiser's output (R, P) for noisy (R, P), timesteps (R,) and R conditions.

        A row's bits depend on how many rows there are and on torch's number of threads, and not on its place.
        """
        inputs = flatten_call(noisy, timesteps, condition)
        trace = self._trace(inputs)
        threads = torch.get_num_threads()
        parts = count_parts(len(noisy), threads)
        if parts == 1:
            output: Tensor = trace(*inputs)
            return output
        return self._in_parts(trace, inputs, parts, threads)

    def _in_parts(self, trace: torch.jit.ScriptModule, inputs: tuple[Tensor, ...], parts: int, threads: int) -> Tensor:
        """Call a trace for equal parts of the rows at once, with equal shares of the threads."""
        share = threads // parts
        team = self._helpers.by_share.get((parts, share))
        if team is None:
            team = self._helpers.by_share[parts, share] = ThreadTeam("t2w-part", parts, share)
        inference = torch.is_inference_mode_enabled()

        def run(part: tuple[Tensor, ...]) -> Tensor:
            with torch.inference_mode(inference):
                output: Tensor = trace(*part)
            return output

        rows = zip(*(tensor.chunk(parts) for tensor in inputs), strict=True)
        outputs = [team.submit(partial(run, part)) for part in rows]
        wait(outputs)
        return torch.cat([output.result() for output in outputs])  # (R, P)

    def _trace(self, inputs: tuple[Tensor, ...]) -> torch.jit.ScriptModule:
        with self._recording:
            trace = self._traces.get(len(inputs))
            if trace is None:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", FutureWarning)  # that traces are deprecated
                    # Without the check, which runs the network twice more; the tests compare.
                    trace = self._traces[len(inputs)] = torch.jit.trace(self._call, inputs, check_trace=False)
            return trace


class _Helpers(threading.local):
    """Threads that each make a part of a call; each calling thread has its own."""

    def __init__(self) -> None:
        self.by_share: dict[tuple[int, int], ThreadTeam] = {}  # by number of parts and each one's threads


def count_parts(rows: int, threads: int) -> int:
    """In how many equal parts a call is made at once: a power of two, no more than there are threads."""
    parts = 1
    while 2 * parts <= threads and rows % (2 * parts) == 0 and rows // (2 * parts) >= ROWS_OF_A_PART:
        parts *= 2
    return parts


class _Call(nn.Module):
    """A denoiser that takes nothing but tensors, as a trace asks."""

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, *inputs: Tensor) -> Tensor:
        output: Tensor = self.denoiser(*unflatten_call(inputs))
        return output


def flatten_call(noisy: Tensor, timesteps: Tensor, condition: Condition) -> tuple[Tensor, ...]:
    """What a denoiser takes, as tensors alone."""
    tensors = (noisy, timesteps, condition.pooled, condition.tokens, condition.mask)
    given = condition.given
    return tensors if given is None else (*tensors, given.weights, given.present)


def unflatten_call(tensors: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Condition]:
    """Undo `flatten_call`."""
    noisy, timesteps, pooled, tokens, mask, *given = tensors
    return noisy, timesteps, Condition(pooled, tokens, mask, GivenHeads(*given) if given else None)
