"""The denoiser on a CUDA device. These tests need one; without it they are skipped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.tiny import TINY_SPEC
from text2weight import GenerationRequest, Generator
from text2weight.cuda_graphs import MOST_GRAPHS, GraphedDenoiser

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

NAMES = ("apple", "bus", "lizard", "maple tree")


@pytest.fixture(scope="module")
def on_gpu(tiny_checkpoint: Path) -> Generator:
    return Generator.load(tiny_checkpoint, device="cuda")


def request_for(generator: Generator, seed: int, steps: int = 5, classes: int = 4) -> GenerationRequest:
    names = NAMES[:classes]
    return GenerationRequest(names, generator.text_encoder.encode(generator.prompts(names)), seed, steps, "ddim")


def head(generator: Generator, seed: int, rows: int, neighbours: int = 0) -> torch.Tensor:
    """Flat weights (P,) of a request that shares its calls with others."""
    sample = generator.begin(request_for(generator, seed))
    others = [generator.begin(request_for(generator, 100 + i, classes=2 + i % 3)) for i in range(neighbours)]
    while not sample.done:
        generator.advance([*[other for other in others if not other.done], sample], rows)
    return TINY_SPEC.flatten(generator.finish(sample).tensors)


def test_graphs_and_bf16_stay_close_to_fp32_on_the_processor(on_gpu: Generator, tiny_checkpoint: Path) -> None:
    on_cpu = Generator.load(tiny_checkpoint)
    for rows in (1, 2, 8):
        torch.testing.assert_close(head(on_gpu, 3, rows), head(on_cpu, 3, rows), atol=2e-2, rtol=2e-2)


def test_graphs_compute_what_the_network_does_without_them(on_gpu: Generator) -> None:
    with_graphs = head(on_gpu, 5, 4)
    graphed = on_gpu._call
    assert isinstance(graphed, GraphedDenoiser)

    def plain(*inputs: object) -> torch.Tensor:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            output: torch.Tensor = on_gpu._denoiser(*inputs)
        return output

    try:
        on_gpu._call = plain
        torch.testing.assert_close(head(on_gpu, 5, 4), with_graphs, atol=1e-4, rtol=1e-4)
    finally:
        on_gpu._call = graphed


def test_no_bit_depends_on_the_neighbours(on_gpu: Generator) -> None:
    assert torch.equal(head(on_gpu, 3, 4), head(on_gpu, 3, 4, neighbours=3))


def test_a_shape_is_recorded_once_and_few_are_kept(on_gpu: Generator) -> None:
    graphed = on_gpu._call
    assert isinstance(graphed, GraphedDenoiser)
    head(on_gpu, 1, 2)
    before = len(graphed._recorded)
    head(on_gpu, 2, 2)
    assert len(graphed._recorded) == before
    for rows in range(1, MOST_GRAPHS + 3):
        head(on_gpu, 1, rows)
    assert len(graphed._recorded) == MOST_GRAPHS
