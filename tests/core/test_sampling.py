from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.tiny import TINY_SPEC
from text2weight import GenerationRequest, Generator
from text2weight.sampling import Sample

NAMES = ("apple", "bus", "lizard", "maple tree")
WORK = [("mean", 1), ("ddim", 2), ("ddpm", 3), ("dpmpp_2m", 4), ("ddim", 7)]
ROWS = 4


@pytest.fixture(scope="module")
def generator(tiny_checkpoint: Path) -> Generator:
    return Generator.load(tiny_checkpoint)


def request_for(generator: Generator, which: int, seed: int, classes: int = 3) -> GenerationRequest:
    names = NAMES[:classes]
    sampler, steps = WORK[which]
    return GenerationRequest(names, generator.text_encoder.encode(generator.prompts(names)), seed, steps, sampler)


def run(generator: Generator, samples: Sequence[Sample], rows: int | None = None) -> None:
    while active := [sample for sample in samples if not sample.done]:
        generator.advance(active[:rows], rows)


@given(
    others=st.lists(
        st.tuples(st.integers(0, 4), st.integers(0, 99), st.integers(2, 4), st.integers(0, 6)), min_size=1, max_size=6
    ),
    which=st.integers(0, 4),
)
def test_what_comes_and_goes_beside_a_request_changes_no_bit_of_it(
    generator: Generator, others: list[tuple[int, int, int, int]], which: int
) -> None:
    alone = generator.begin(request_for(generator, which, 7))
    run(generator, [alone], ROWS)
    sample = generator.begin(request_for(generator, which, 7))
    waiting = [(call, request_for(generator, *other)) for *other, call in others]
    running: list[Sample] = []
    for call in range(len(sample.plan)):
        running += [generator.begin(request) for at, request in waiting if at == call]
        neighbours = [other for other in running if not other.done][: ROWS - 1]
        generator.advance([*neighbours, sample], ROWS)
    assert sample.done
    assert generator.finish(sample).to_bytes() == generator.finish(alone).to_bytes()


@pytest.mark.parametrize("which", range(len(WORK)))
def test_the_size_of_the_call_changes_the_last_bits_at_most(generator: Generator, which: int) -> None:
    heads = []
    for rows in (1, 2, 8, 32):
        sample = generator.begin(request_for(generator, which, 3))
        run(generator, [sample], rows)
        heads.append(TINY_SPEC.flatten(generator.finish(sample).tensors))
    for head in heads[1:]:
        torch.testing.assert_close(head, heads[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("which", range(len(WORK)))
def test_a_call_that_fails_moves_nothing_and_can_be_made_again(
    generator: Generator, which: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed, sample = (generator.begin(request_for(generator, which, 3)) for _ in range(2))
    run(generator, [undisturbed])

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    for place in ("text2weight.sampling.stack_conditions", "text2weight.sampling.take_steps"):
        with monkeypatch.context() as patch:
            patch.setattr(place, fail)
            with pytest.raises(RuntimeError, match="out of memory"):
                generator.advance([sample])
        assert sample.calls == 0
    run(generator, [sample])
    assert generator.finish(sample).to_bytes() == generator.finish(undisturbed).to_bytes()


def test_a_preview_is_what_the_last_call_estimated(generator: Generator) -> None:
    sample = generator.begin(request_for(generator, WORK.index(("ddim", 7)), 3))
    previews = []
    while not sample.done:
        generator.advance([sample])
        previews.append(generator.preview(sample).to_bytes())
    assert len(set(previews)) == 7
    # At timestep 0 the estimate is the sample.
    assert previews[-1] == generator.finish(sample).to_bytes()


def test_emphasis_moves_the_pooled_condition_towards_its_classes(generator: Generator) -> None:
    request = request_for(generator, 0, 0)
    even = generator.begin(request).condition.pooled[0]
    for i in range(3):
        factors = torch.ones(3)
        factors[i] = 5.0
        pooled = generator.begin(replace(request, emphasis=factors)).condition.pooled[0]
        assert float(pooled @ request.embeddings[i]) > float(even @ request.embeddings[i])
    equal = generator.begin(replace(request, emphasis=torch.full((3,), 2.0))).condition.pooled[0]
    torch.testing.assert_close(equal, even)
