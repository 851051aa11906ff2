"""A denoiser on a CUDA device: bf16 matrix products, and one CUDA graph for each shape of a call.

A small network's call is hundreds of short kernels, and launching them takes longer than running them. A graph
launches all of them at once. Letters: R rows of a call, K class tokens, P numbers in one head.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from text2weight.condition import Condition
from text2weight.traced import flatten_call, unflatten_call

# Each keeps its own inputs and output; intermediate results share one pool of memory.
MOST_GRAPHS = 64
_WARM_UP_CALLS = 3


@dataclass(frozen=True)
class _Recorded:
    """A graph with the tensors it reads and the one it writes, (R, P) fp32."""

    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    output: Tensor


class GraphedDenoiser:
    """Calls a denoiser through graphs that are recorded when a shape is first seen. Any thread may call.

    Parameters, the sampler's state and the output are fp32; matrix products are bf16 (autocast).
    """

    def __init__(self, denoiser: nn.Module) -> None:
        """Wrap a denoiser that is on a CUDA device and whose parameters stay as they are."""
        self._denoiser = denoiser
        self._recorded: OrderedDict[tuple[object, ...], _Recorded] = OrderedDict()
        self._pool = torch.cuda.graph_pool_handle()
        self._lock = threading.Lock()

    def __call__(self, noisy: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """The denoiser's output (R, P) for noisy (R, P), timesteps (R,) and R conditions."""
        inputs = flatten_call(noisy, timesteps, condition)
        # Streams are made on the thread's current device, which need not be the denoiser's.
        with self._lock, torch.cuda.device(noisy.device):
            return self._replay(inputs)

    def _replay(self, inputs: tuple[Tensor, ...]) -> Tensor:
        shape = tuple((tuple(tensor.shape), tensor.dtype) for tensor in inputs)
        recorded = self._recorded.get(shape)
        if recorded is None:
            recorded = self._recorded[shape] = self._record(inputs)
            if len(self._recorded) > MOST_GRAPHS:
                self._recorded.popitem(last=False)
        self._recorded.move_to_end(shape)
        for static, tensor in zip(recorded.inputs, inputs, strict=True):
            static.copy_(tensor)
        recorded.graph.replay()
        return recorded.output.clone()  # (R, P) the next replay writes over the original

    def _record(self, inputs: tuple[Tensor, ...]) -> _Recorded:
        static = tuple(tensor.clone() for tensor in inputs)
        # Recording must not be the first use of anything that allocates or chooses kernels.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP_CALLS):
                self._run(static)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Another thread may use the device meanwhile: only this one's calls are restricted.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            output = self._run(static)
        return _Recorded(graph, static, output)

    def _run(self, inputs: tuple[Tensor, ...]) -> Tensor:
        # The cache of cast parameters must not outlive a recording, nor begin before it.
        with torch.autocast("cuda", dtype=torch.bfloat16, cache_enabled=False):
            output: Tensor = self._denoiser(*unflatten_call(inputs))
        return output
