"""Classifier-free guidance: null + s (cond - null), item by item, in one call."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.tiny import TINY_SPEC, save_tiny_checkpoint, tiny_condition, tiny_denoiser
from text2weight import GenerationRequest, Generator, HeadArtifact, read_head
from text2weight.condition import Condition, stack_conditions
from text2weight.denoiser import DenoiserConfig
from text2weight.diffusion import NoiseSchedule, Prediction
from text2weight.errors import InvalidInputError
from text2weight.samplers import SAMPLERS

CLASSES = ("apple", "bus", "lizard", "maple tree")
CLOSE = {"atol": 1e-4, "rtol": 1e-4}
SCHEDULE = NoiseSchedule(num_timesteps=40)
NOBODY = torch.zeros(3, dtype=torch.bool)


@pytest.fixture(scope="module")
def guided(tmp_path_factory: pytest.TempPathFactory) -> Generator:
    denoiser = DenoiserConfig(
        width=16, depth=2, heads=2, embedding_dim=8, chunk_size=16, class_path=8, null_condition=True
    )
    folder = tmp_path_factory.mktemp("guided") / "checkpoint"
    save_tiny_checkpoint(folder, denoiser=denoiser)
    return Generator.load(folder)


def request_for(generator: Generator, scale: float, *, steps: int = 3, sampler: str = "ddim") -> GenerationRequest:
    embeddings = generator.text_encoder.encode(generator.prompts(CLASSES))
    return GenerationRequest(CLASSES, embeddings, 5, steps, sampler, scale)


def flat(artifact: HeadArtifact) -> Tensor:
    return TINY_SPEC.flatten(artifact.tensors)


def test_dropping_and_joining_conditions() -> None:
    condition = tiny_condition((2, 5, 3))
    dropped = condition.drop(torch.tensor([True, False, True]))
    assert dropped.count.tolist() == [0, 5, 0]
    assert not bool(dropped.pooled[[0, 2]].any() or dropped.tokens[[0, 2]].any())
    assert torch.equal(dropped.pooled[1], condition.pooled[1])
    assert torch.equal(dropped.tokens[1], condition.tokens[1])
    joined = stack_conditions([condition, dropped])
    assert joined.count.tolist() == [2, 5, 3, 0, 5, 0]
    assert torch.equal(joined.select(torch.arange(3)).tokens, condition.tokens)


@pytest.mark.parametrize(
    ("prediction", "to_clean"),
    # At abar = 1/4 and x_n = 3: what an output of y says about x_0.
    [
        ("x0", lambda y: y),
        ("epsilon", lambda y: (3 - math.sqrt(0.75) * y) / 0.5),
        ("v", lambda y: 0.5 * 3 - math.sqrt(0.75) * y),
    ],
)
def test_the_estimate_is_an_affine_combination(
    monkeypatch: pytest.MonkeyPatch, prediction: Prediction, to_clean: object
) -> None:
    """A network that outputs 7 with a condition and 4 without one."""
    monkeypatch.setattr("text2weight.diffusion._alphas_bar", lambda *_: torch.full((41,), 0.25, dtype=torch.float64))
    calls: list[int] = []

    def network(noisy: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        calls.append(len(noisy))
        return torch.where(condition.count == 0, 4.0, 7.0)[:, None].expand(-1, 2)

    scales = torch.tensor([2.5, 1.0, 0.0])
    _, estimate = SCHEDULE.run_denoiser(
        network, prediction, torch.full((3, 2), 3.0), torch.tensor([9, 9, 9]), tiny_condition((2, 5, 3)), scales
    )
    assert callable(to_clean)
    cond, null = to_clean(7.0), to_clean(4.0)
    expected = torch.tensor([null + scale * (cond - null) for scale in scales.tolist()])
    torch.testing.assert_close(estimate, expected[:, None].expand(-1, 2))
    assert calls == [5]  # one call: three items with the condition, two of them also without


@pytest.mark.parametrize("prediction", ["x0", "epsilon", "v"])
def test_the_ends_are_the_condition_alone_and_no_condition(prediction: Prediction) -> None:
    denoiser, condition = tiny_denoiser(null_condition=True), tiny_condition((2, 5, 3))
    noisy, timesteps = torch.randn(3, TINY_SPEC.num_parameters), torch.tensor([1, 10, 20])

    def estimate(condition: Condition, scale: float | None = None) -> Tensor:
        scales = None if scale is None else torch.full((3,), scale)
        return SCHEDULE.run_denoiser(denoiser, prediction, noisy, timesteps, condition, scales)[1]

    cond, null = estimate(condition), estimate(condition.drop(~NOBODY))
    torch.testing.assert_close(estimate(condition, 1.0), cond, **CLOSE)
    torch.testing.assert_close(estimate(condition, 0.0), null, **CLOSE)
    torch.testing.assert_close(estimate(condition, 3.0), 3 * cond - 2 * null, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_scale_changes_the_head_and_is_recorded(guided: Generator, sampler: str) -> None:
    steps = 1 if sampler == "mean" else 3
    plain, *others = (
        guided.generate(CLASSES, steps=steps, sampler=sampler, guidance_scale=scale) for scale in (1.0, 0.0, 2.5)
    )
    assert "guidance_scale" not in plain.metadata
    assert [other.metadata["guidance_scale"] for other in others] == ["0.0", "2.5"]
    for other in others:
        assert float((flat(other) - flat(plain)).abs().max()) > 1e-4
        assert read_head(other.to_bytes()).metadata == other.metadata


def test_no_text_is_left_at_scale_zero(guided: Generator) -> None:
    one, two = (
        guided.generate(classes, steps=3, sampler="ddim", guidance_scale=0.0)
        for classes in (CLASSES, ("rocket", "clock"))
    )
    torch.testing.assert_close(flat(one), flat(two), **CLOSE)


@given(st.lists(st.sampled_from([0.0, 0.5, 1.0, 1.7, 4.0]), min_size=1, max_size=5))
def test_no_request_changes_anothers_result(guided: Generator, scales: list[float]) -> None:
    requests = [request_for(guided, scale, steps=1 + i) for i, scale in enumerate(scales)]
    for request, together in zip(requests, guided.generate_batch(requests), strict=True):
        (alone,) = guided.generate_batch([request])
        torch.testing.assert_close(flat(together), flat(alone), **CLOSE)


def test_scale_one_makes_no_second_call(guided: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    call = guided._call

    def count(noisy: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        sizes.append(len(noisy))
        return call(noisy, timesteps, condition)

    monkeypatch.setattr(guided, "_call", count)
    guided.generate_batch([request_for(guided, 1.0), request_for(guided, 1.0)])
    guided.generate_batch([request_for(guided, 1.0, steps=2), request_for(guided, 2.0, steps=1)])
    assert sizes == [2, 2, 2, 3, 1]


@pytest.mark.parametrize("scale", [-0.1, 20.5, math.nan, math.inf])
def test_scales_out_of_range_are_refused(guided: Generator, scale: float) -> None:
    with pytest.raises(InvalidInputError, match="allowed are 0 to 20") as caught:
        guided.generate(CLASSES, guidance_scale=scale)
    assert caught.value.field == "guidance_scale"


def test_a_checkpoint_without_a_null_condition_refuses_guidance(tiny_checkpoint: Path) -> None:
    generator = Generator.load(tiny_checkpoint)
    with pytest.raises(InvalidInputError, match="trained without condition dropout, only 1 is allowed") as caught:
        generator.generate(CLASSES, guidance_scale=1.5)
    assert caught.value.field == "guidance_scale"
    generator.generate(CLASSES, guidance_scale=1.0)
