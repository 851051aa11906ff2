"""A denoiser on a CPU, called through a trace of it: its operations follow one another without the interpreter.

A small network's call is hundreds of short operations. Begun from Python, each gives the interpreter's lock away and
takes it back, and where another thread runs Python, such as a server's event loop, each waits for that thread: up to
5 ms, a call in all more than ten times as long as alone. A trace takes the lock once. It is the same operations, so the
same bits, and a call of one row takes two thirds of the time (docs/architecture.md).

torch calls its traces deprecated and does not support them from Python 3.14 on; what it offers in their place needs a
compiler on the machine (torch.compile), or runs in the interpreter (torch.export).
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from text2weight.condition import Condition, GivenHeads


class TracedDenoiser:
    """Calls a denoiser through a trace that the first call records. Belongs to one thread at a time."""

    def __init__(self, denoiser: nn.Module) -> None:
        """Wrap a denoiser whose parameters stay as they are."""
        self._call = _Call(denoiser)
        self._traces: dict[int, torch.jit.ScriptModule] = {}  # by number of inputs: with given heads or without

    def __call__(self, noisy: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """The denoiser's output (R, P) for noisy (R, P), timesteps (R,) and R conditions."""
        inputs = flatten_call(noisy, timesteps, condition)
        trace = self._traces.get(len(inputs))
        if trace is None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # that traces are deprecated
                # Without the check, which runs the network twice more; the tests compare.
                trace = self._traces[len(inputs)] = torch.jit.trace(self._call, inputs, check_trace=False)
        output: Tensor = trace(*inputs)
        return output


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
