"""A denoiser that reads the head it is to improve."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from tests.tiny import TINY_SPEC, save_tiny_checkpoint, tiny_condition, tiny_denoiser, tiny_space
from text2weight import GenerationRequest, Generator, HeadArtifact
from text2weight.condition import Condition, GivenHeads, stack_conditions
from text2weight.denoiser import Denoiser, DenoiserConfig
from text2weight.diffusion import NoiseSchedule
from text2weight.enhancement import interpolate
from text2weight.head import HeadSpec
from text2weight.samplers import SAMPLERS
from text2weight.weight_tokens import permute_units

P = TINY_SPEC.num_parameters
CLASSES = ("apple", "bus", "lizard")
ORDER = torch.tensor([2, 0, 1])
TIMESTEPS = torch.tensor([1, 20, 39])
CLOSE = {"atol": 1e-5, "rtol": 1e-4}


def heads(seed: int, count: int = 3, spec: HeadSpec = TINY_SPEC) -> Tensor:
    return torch.randn(count, spec.num_parameters, generator=torch.Generator().manual_seed(seed))


def with_given(condition: Condition, weights: Tensor, *present: bool) -> Condition:
    flags = torch.tensor(present) if present else torch.ones(len(weights), dtype=torch.bool)
    return replace(condition, given=GivenHeads(weights, flags))


def run(denoiser: Denoiser, condition: Condition, noisy: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        output: Tensor = denoiser(heads(5) if noisy is None else noisy, TIMESTEPS, condition)
    return output


@pytest.mark.parametrize("bias", [True, False])
def test_only_the_items_that_have_a_head_are_changed_by_it(bias: bool) -> None:
    spec = TINY_SPEC.model_copy(update={"bias": bias})
    denoiser, condition, noisy = tiny_denoiser(spec, reads_given=True), tiny_condition(), heads(5, spec=spec)
    without = run(denoiser, condition, noisy)
    some = run(denoiser, with_given(condition, heads(6, spec=spec), True, False, True), noisy)
    torch.testing.assert_close(some[1], without[1], **CLOSE)
    assert float((some - without).abs().amax(1)[[0, 2]].min()) > 1e-2
    other = run(denoiser, with_given(condition, heads(7, spec=spec), True, False, True), noisy)
    assert float((other - some).abs().amax(1)[[0, 2]].min()) > 1e-2
    # Even a head of zeros is one: that it is there is told by itself.
    zeros = run(denoiser, with_given(condition, torch.zeros_like(noisy)), noisy)
    assert float((zeros - without).abs().amax(1).min()) > 1e-2


def test_a_new_path_adds_nothing_and_leaves_the_other_layers_as_they_are() -> None:
    torch.manual_seed(3)
    plain = tiny_denoiser(seed=None)
    torch.manual_seed(3)
    reads = tiny_denoiser(seed=None, reads_given=True)
    shared = plain.state_dict()
    assert all(torch.equal(tensor, shared[name]) for name, tensor in reads.state_dict().items() if name in shared)
    added = [tensor for name, tensor in reads.state_dict().items() if name not in shared]
    assert added
    assert not any(bool(tensor.any()) for tensor in added)
    trained = tiny_denoiser(seed=2)
    reads.load_state_dict(trained.state_dict(), strict=False)
    assert torch.equal(run(reads, with_given(tiny_condition(), heads(6))), run(trained, tiny_condition()))


def test_all_of_a_head_can_be_kept() -> None:
    """With a share of 1 and no other readout the answer is the given head, number by number."""
    denoiser = tiny_denoiser(seed=None, reads_given=True)
    path = denoiser.weights.given_path
    torch.nn.init.ones_(path.kept.bias)  # type: ignore[union-attr,arg-type]
    weights = heads(6)
    assert torch.equal(run(denoiser, with_given(tiny_condition(), weights)), weights)
    none = run(denoiser, with_given(tiny_condition(), weights, False, True, False))
    assert torch.equal(none[[0, 2]], torch.zeros(2, P))


def test_sample_and_given_head_permute_together() -> None:
    def permute(flat: Tensor) -> Tensor:
        return permute_units(TINY_SPEC, flat, ORDER)

    denoiser, condition = tiny_denoiser(unit_identity=False, reads_given=True), tiny_condition()
    noisy, weights = heads(5), heads(6)
    output = run(denoiser, with_given(condition, weights), noisy)
    both = run(denoiser, with_given(condition, permute(weights)), permute(noisy))
    torch.testing.assert_close(both, permute(output), **CLOSE)
    alone = run(denoiser, with_given(condition, weights), permute(noisy))
    assert not torch.allclose(alone, permute(output), **CLOSE)
    anchor = tiny_space().anchor
    plain, moved = (tiny_denoiser(anchor=x, reads_given=True) for x in (anchor, permute(anchor)))
    torch.testing.assert_close(
        run(moved, with_given(condition, permute(weights)), permute(noisy)),
        permute(run(plain, with_given(condition, weights), noisy)),
        **CLOSE,
    )


def test_given_heads_stay_with_their_items() -> None:
    condition = with_given(tiny_condition(), heads(6), True, False, True)
    chosen = condition.select(torch.tensor([2, 1]))
    joined = stack_conditions([condition.to("cpu"), condition.drop(torch.tensor([True, True, True]))])
    assert chosen.given is not None
    assert joined.given is not None
    assert torch.equal(chosen.given.weights, heads(6)[[2, 1]])
    assert chosen.given.present.tolist() == [True, False]
    assert joined.given.present.tolist() == [True, False, True] * 2
    assert torch.equal(joined.given.weights[3:], heads(6))  # the text is hidden, the head is not
    assert joined.count.tolist() == [2, 5, 3, 0, 0, 0]


def test_older_configs_keep_their_hash_and_chunks_are_refused() -> None:
    assert "reads_given" not in DenoiserConfig().model_dump()
    assert DenoiserConfig(reads_given=True).model_dump()["reads_given"] is True
    with pytest.raises(ValidationError, match="a given head is read unit by unit"):
        DenoiserConfig(reads_given=True, tokens="chunk")


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> Generator:
    size = {"width": 16, "depth": 2, "heads": 2, "embedding_dim": 8, "class_path": 8}
    denoiser = DenoiserConfig(**size, null_condition=True, reads_given=True)  # type: ignore[arg-type]
    folder = tmp_path_factory.mktemp("reads") / "checkpoint"
    save_tiny_checkpoint(folder, denoiser=denoiser)
    return Generator.load(folder)


def request_for(
    generator: Generator, strength: float | None, scale: float = 1.0, sampler: str = "ddim"
) -> GenerationRequest:
    embeddings = generator.text_encoder.encode(generator.prompts(CLASSES))
    request = GenerationRequest(CLASSES, embeddings, 4, 1 if sampler == "mean" else 3, sampler, scale)
    return request if strength is None else replace(request, given=given_head(), strength=strength, method="noise")


def given_head() -> Tensor:
    return tiny_space().anchor + 0.05 * heads(6)[0]


def flat(artifact: HeadArtifact) -> Tensor:
    return TINY_SPEC.flatten(artifact.tensors)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_ends_stay_the_head_itself_and_plain_generation(generator: Generator, sampler: str) -> None:
    def only(strength: float | None) -> Tensor:
        return flat(generator.generate_batch([request_for(generator, strength, sampler=sampler)])[0])

    assert torch.equal(only(0.0), given_head())
    assert torch.equal(only(1.0), only(None))


def test_the_generator_shows_the_aligned_head_at_every_call(
    generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[GivenHeads | None] = []
    call = generator._call

    def watch(noisy: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        shown.append(condition.given)
        return call(noisy, timesteps, condition)

    monkeypatch.setattr(generator, "_call", watch)
    reordered = permute_units(TINY_SPEC, given_head(), ORDER)
    generator.generate_batch(
        [replace(request_for(generator, 0.5), given=reordered), request_for(generator, None), request_for(generator, 1)]
    )
    assert len(shown) == 3
    for seen in shown:
        assert seen is not None
        assert seen.present.tolist() == [True, False, False]
        # The first layer has no length to be aligned: it is the head's own, in the anchor's order.
        hidden = TINY_SPEC.hidden_dim * (TINY_SPEC.input_dim + 1)
        expected = generator._space_on_cpu.standardise(given_head())
        torch.testing.assert_close(seen.weights[0, :hidden], expected[:hidden], **CLOSE)


def test_interpolation_is_with_the_head_that_plain_generation_makes(generator: Generator) -> None:
    """The network is not shown the head: it would answer something between the two already."""
    asked = replace(request_for(generator, 0.3), method="interpolate")
    enhanced, plain = (flat(generator.generate_batch([each])[0]) for each in (asked, request_for(generator, None)))
    torch.testing.assert_close(enhanced, interpolate(TINY_SPEC, given_head(), plain, 0.3))


@given(
    st.lists(
        st.tuples(st.sampled_from([None, 0.0, 0.3, 1.0]), st.sampled_from([1.0, 0.0, 2.0])), min_size=1, max_size=5
    )
)
def test_no_request_changes_anothers_result(generator: Generator, mix: list[tuple[float | None, float]]) -> None:
    requests = [request_for(generator, strength, scale) for strength, scale in mix]
    for request, together in zip(requests, generator.generate_batch(requests), strict=True):
        (alone,) = generator.generate_batch([request])
        torch.testing.assert_close(flat(together), flat(alone), atol=1e-4, rtol=1e-4)


def test_the_estimate_under_guidance_reads_the_head_in_both_halves() -> None:
    denoiser = tiny_denoiser(reads_given=True, null_condition=True)
    condition, schedule = with_given(tiny_condition(), heads(6)), NoiseSchedule(num_timesteps=40)
    everyone = torch.ones(3, dtype=torch.bool)

    def estimate(condition: Condition, scale: float | None = None) -> Tensor:
        scales = None if scale is None else torch.full((3,), scale)
        with torch.no_grad():
            return schedule.run_denoiser(denoiser, "x0", heads(5), TIMESTEPS, condition, scales)[1]

    guided, text, null = estimate(condition, 2.0), estimate(condition), estimate(condition.drop(everyone))
    torch.testing.assert_close(guided, null + 2 * (text - null), atol=1e-4, rtol=1e-4)
