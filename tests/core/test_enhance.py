"""Enhancing a given head: what strength 0 and 1 must return, and that the order of hidden units does not matter."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.tiny import TINY_NAMES, TINY_SPEC, pad_embeddings, save_tiny_checkpoint, tiny_space
from text2weight import GenerationRequest, Generator, HeadArtifact, read_head
from text2weight.checkpoint import load_checkpoint
from text2weight.condition import condition_on_classes
from text2weight.diffusion import NoiseSchedule
from text2weight.enhancement import EnhanceMethod, choose_start, interpolate, scale_last_layer
from text2weight.errors import InvalidInputError
from text2weight.head import apply_heads
from text2weight.samplers import SAMPLERS, make_plan, take_steps
from text2weight.weight_tokens import permute_units

CLASSES = ("apple", "bus", "lizard", "maple tree")
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
METHODS: tuple[EnhanceMethod, ...] = ("interpolate", "noise")
P = TINY_SPEC.num_parameters
ORDER = torch.tensor([2, 0, 1])


@pytest.fixture(scope="module")
def generator(tiny_checkpoint: Path) -> Generator:
    return Generator.load(tiny_checkpoint)


def trained_head(seed: int = 11, order: Tensor = ORDER) -> Tensor:
    """A head about as far from the anchor as the zoo's, with its units in an order of its own."""
    noise = torch.randn(P, generator=torch.Generator().manual_seed(seed))
    return permute_units(TINY_SPEC, tiny_space().anchor + 0.05 * noise, order)


def artifact_of(weights: Tensor) -> HeadArtifact:
    tensors = {name: tensor.clone() for name, tensor in TINY_SPEC.unflatten(weights).items()}
    return HeadArtifact(tensors, torch.eye(8)[:3], {"activation": "gelu"})


def flat(artifact: HeadArtifact) -> Tensor:
    return TINY_SPEC.flatten(artifact.tensors)


def last_layer(head: Tensor) -> Tensor:
    """W2 and b2, which stand last in a flat head."""
    return head[TINY_SPEC.hidden_dim * (TINY_SPEC.input_dim + 1) :]


def steps_of(sampler: str) -> int:
    return 1 if sampler == "mean" else 5


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_strength_zero_returns_the_head_bit_for_bit(generator: Generator, sampler: str, method: EnhanceMethod) -> None:
    head, steps = trained_head(), steps_of(sampler)
    enhanced = generator.enhance(
        artifact_of(head), CLASSES, strength=0.0, method=method, seed=4, sampler=sampler, steps=steps
    )
    assert torch.equal(flat(enhanced), head)
    assert enhanced.classes == CLASSES


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_strength_one_is_plain_generation_bit_for_bit(
    generator: Generator, sampler: str, method: EnhanceMethod
) -> None:
    options = {"seed": 4, "sampler": sampler, "steps": steps_of(sampler)}
    enhanced = generator.enhance(artifact_of(trained_head()), CLASSES, strength=1.0, method=method, **options)  # type: ignore[arg-type]
    plain = generator.generate(CLASSES, **options)  # type: ignore[arg-type]
    assert torch.equal(flat(enhanced), flat(plain))
    assert {**plain.metadata, "strength": "1.0", "method": method} == enhanced.metadata


@pytest.mark.parametrize("strength", [0.01, 0.3, 0.99])
def test_interpolation_goes_a_share_of_the_way_to_the_generated_head(generator: Generator, strength: float) -> None:
    options = {"seed": 3, "sampler": "ddpm", "steps": 5}
    plain, head = flat(generator.generate(CLASSES, **options)), trained_head()  # type: ignore[arg-type]
    # This checkpoint's heads stay near the anchor, so that units are paired as with the anchor's.
    in_order = permute_units(TINY_SPEC, head, ORDER.argsort())
    length = float(last_layer(plain).norm() / last_layer(head).norm())
    mixed = (1 - strength) * scale_last_layer(TINY_SPEC, in_order, length) + strength * plain
    expected = permute_units(TINY_SPEC, scale_last_layer(TINY_SPEC, mixed, 1 / length), ORDER)
    enhanced = generator.enhance(artifact_of(head), CLASSES, strength=strength, **options)  # type: ignore[arg-type]
    torch.testing.assert_close(flat(enhanced), expected, **CLOSE)


@pytest.mark.parametrize(("share", "method"), [(1.0, "interpolate"), (0.7, "interpolate"), (-1.0, "noise")])
@pytest.mark.parametrize("strength", [0.0, 0.4, 1.0])
def test_heads_of_another_family_are_noised_unless_told_otherwise(
    generator: Generator, share: float, method: EnhanceMethod, strength: float
) -> None:
    """By the cosine with the anchor, once the order of the units is the anchor's."""
    deviation = torch.randn(P, generator=torch.Generator().manual_seed(1))
    given = permute_units(TINY_SPEC, share * tiny_space().anchor + 0.3 * deviation, ORDER)
    options = {"strength": strength, "seed": 3, "steps": 4, "sampler": "ddim"}
    enhanced = generator.enhance(artifact_of(given), CLASSES, **options)  # type: ignore[arg-type]
    assert enhanced.metadata["method"] == method
    told = generator.enhance(artifact_of(given), CLASSES, method=method, **options)  # type: ignore[arg-type]
    assert enhanced.to_bytes() == told.to_bytes()


def test_units_are_paired_with_the_generated_heads() -> None:
    """With those of the head that is averaged, not with the anchor's, which may be far from both."""
    made = torch.randn(P, generator=torch.Generator().manual_seed(5))
    rewritten = scale_last_layer(TINY_SPEC, permute_units(TINY_SPEC, made, ORDER), 3.0)
    torch.testing.assert_close(interpolate(TINY_SPEC, rewritten, made, 0.4), rewritten, **CLOSE)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("strength", [0.3, 0.75])
def test_the_head_is_that_of_the_stages_called_one_by_one(generator: Generator, sampler: str, strength: float) -> None:
    checkpoint, steps, head = load_checkpoint(generator.path), steps_of(sampler), trained_head()
    schedule, start = checkpoint.config.schedule, round(40 * strength)
    condition = condition_on_classes(*pad_embeddings([generator.text_encoder.encode(generator.prompts(CLASSES))]))
    source = torch.Generator().manual_seed(3)
    in_order = permute_units(TINY_SPEC, head, ORDER.argsort())
    length = last_layer(checkpoint.space.anchor).norm() / last_layer(head).norm()
    aligned = checkpoint.space.standardise(scale_last_layer(TINY_SPEC, in_order, float(length)))
    signal, sigma = (math.sqrt(share) for share in (schedule.alphas_bar[start], 1 - schedule.alphas_bar[start]))
    noisy, previous = (signal * aligned + sigma * torch.randn(P, generator=source))[None], torch.zeros(1, P)
    for step in make_plan(sampler, steps, schedule, start):
        timesteps = torch.tensor([step.timestep])
        with torch.no_grad():
            clean = checkpoint.denoiser(schedule.alphas_bar[timesteps].sqrt().float() * noisy, timesteps, condition)
        noise = torch.randn(1, P, generator=source) if step.noise else torch.zeros(1, P)
        noisy, previous = take_steps([step], noisy, clean, previous, noise), clean
    answer = scale_last_layer(TINY_SPEC, checkpoint.space.restore(noisy)[0], 1 / float(length))
    expected = permute_units(TINY_SPEC, answer, ORDER)
    enhanced = generator.enhance(
        artifact_of(head), CLASSES, strength=strength, method="noise", seed=3, sampler=sampler, steps=steps
    )
    torch.testing.assert_close(flat(enhanced), expected, **CLOSE)


@pytest.mark.parametrize("method", METHODS)
def test_the_given_heads_order_of_units_changes_nothing_but_the_answers_order(
    generator: Generator, method: EnhanceMethod
) -> None:
    in_order, reordered = trained_head(order=torch.arange(3)), trained_head(order=ORDER)
    options = {"strength": 0.5, "method": method, "seed": 2, "steps": 4, "sampler": "ddpm"}
    one, other = (
        flat(generator.enhance(artifact_of(head), CLASSES, **options))  # type: ignore[arg-type]
        for head in (in_order, reordered)
    )
    assert torch.equal(other, permute_units(TINY_SPEC, one, ORDER))
    assert not torch.equal(other, one)


def test_units_are_paired_with_the_anchors() -> None:
    space = tiny_space()
    start = choose_start(TINY_SPEC, space, NoiseSchedule(num_timesteps=40), trained_head(), 0.5, "noise")
    assert start.timestep == 20
    assert start.alignment is not None
    assert start.alignment.order.tolist() == ORDER.argsort().tolist()
    # Without noise the sample is the head itself, in the space, in the anchor's order and of its length.
    without = start.sample(NoiseSchedule(num_timesteps=40), torch.zeros(P))
    sample = space.restore(without / math.sqrt(NoiseSchedule(num_timesteps=40).alphas_bar[20]))
    in_order = trained_head(order=torch.arange(3))
    hidden = len(sample) - len(last_layer(sample))
    torch.testing.assert_close(sample[:hidden], in_order[:hidden], **CLOSE)
    torch.testing.assert_close(last_layer(sample).norm(), last_layer(space.anchor).norm(), **CLOSE)
    torch.testing.assert_close(
        F.normalize(last_layer(sample), dim=0), F.normalize(last_layer(in_order), dim=0), **CLOSE
    )


@pytest.mark.parametrize("method", METHODS)
def test_the_length_of_the_last_layer_changes_nothing_but_the_answers(
    generator: Generator, method: EnhanceMethod
) -> None:
    """Cosine logits do not see it. Powers of two leave no rounding."""
    options = {"strength": 0.5, "method": method, "seed": 2, "steps": 4, "sampler": "ddpm"}
    once = flat(generator.enhance(artifact_of(trained_head()), CLASSES, **options))  # type: ignore[arg-type]
    for factor in (8.0, 1 / 1024):
        longer = scale_last_layer(TINY_SPEC, trained_head(), factor)
        enhanced = flat(generator.enhance(artifact_of(longer), CLASSES, **options))  # type: ignore[arg-type]
        assert torch.equal(enhanced, scale_last_layer(TINY_SPEC, once, factor))
        features = torch.randn(5, TINY_SPEC.input_dim)
        outputs = [F.normalize(apply_heads(TINY_SPEC, head[None], features), dim=-1) for head in (once, enhanced)]
        torch.testing.assert_close(*outputs)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scale", [0.0, 1e-44, 1e-9])
def test_a_last_layer_of_next_to_nothing_still_gives_numbers(
    generator: Generator, scale: float, method: EnhanceMethod
) -> None:
    head = scale_last_layer(TINY_SPEC, trained_head(), scale)
    enhanced = generator.enhance(artifact_of(head), CLASSES, strength=0.5, method=method, steps=2, sampler="ddim")
    assert bool(torch.isfinite(flat(enhanced)).all())


def test_noise_at_full_strength_is_not_mixed_with_the_head() -> None:
    noise = torch.randn(P)
    for strength in (0.99, 1.0):  # as many of 40 timesteps
        start = choose_start(
            TINY_SPEC, tiny_space(), NoiseSchedule(num_timesteps=40), trained_head(), strength, "noise"
        )
        assert start.timestep == 40
        assert start.sample(NoiseSchedule(num_timesteps=40), noise) is noise


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_given_head_is_read_between_the_ends(generator: Generator, sampler: str, method: EnhanceMethod) -> None:
    options = {"strength": 0.4, "method": method, "steps": steps_of(sampler), "sampler": sampler}
    one, other = (
        flat(generator.enhance(artifact_of(trained_head(seed)), CLASSES, **options))  # type: ignore[arg-type]
        for seed in (11, 12)
    )
    assert float((one - other).abs().max()) > 1e-3


def request_for(
    generator: Generator,
    classes: tuple[str, ...],
    sampler: str,
    seed: int,
    strength: float | None,
    method: EnhanceMethod = "noise",
) -> GenerationRequest:
    embeddings = generator.text_encoder.encode(generator.prompts(classes))
    request = GenerationRequest(classes, embeddings, seed, steps_of(sampler), sampler)
    if strength is None:
        return request
    return replace(request, given=trained_head(seed), strength=strength, method=method)


ITEMS = st.tuples(
    st.lists(st.sampled_from(TINY_NAMES), min_size=2, max_size=6, unique=True).map(tuple),
    st.sampled_from(SAMPLERS),
    st.integers(0, 99),
    st.sampled_from([None, 0.0, 0.01, 0.1, 0.5, 0.9, 1.0]),
    st.sampled_from(METHODS),
)


@given(mix=st.lists(ITEMS, min_size=1, max_size=5))
def test_plain_and_enhancing_requests_share_a_batch(generator: Generator, mix: list[tuple]) -> None:
    requests = [request_for(generator, *item) for item in mix]
    for request, together in zip(requests, generator.generate_batch(requests), strict=True):
        (alone,) = generator.generate_batch([request])
        torch.testing.assert_close(flat(together), flat(alone), **CLOSE)
        assert together.metadata == alone.metadata
        if request.given is not None and request.strength <= (0.01 if request.method == "noise" else 0):
            assert torch.equal(flat(together), request.given)


def test_calls_start_at_the_share_of_the_schedule_and_never_outnumber_its_timesteps(generator: Generator) -> None:
    def calls(strength: float, steps: int, method: EnhanceMethod = "noise") -> list[int]:
        seen: list[int] = []
        request = replace(request_for(generator, CLASSES, "ddim", 1, strength, method), steps=steps)
        generator.generate_batch([request], on_call=lambda call: seen.append(int(call.timesteps[0])))
        return seen

    assert calls(0.5, 4) == [20, 15, 10, 5]
    assert calls(0.05, 20) == [2, 1]
    assert calls(0.01, 20) == []
    assert calls(1.0, 2) == [40, 20]
    # Interpolation is with a whole head, however little of it is taken.
    assert calls(0.01, 2, "interpolate") == calls(1.0, 2, "interpolate") == [40, 20]
    assert calls(0.0, 2, "interpolate") == []


def test_the_artifact_tells_how_it_was_made(generator: Generator) -> None:
    enhanced = generator.enhance(artifact_of(trained_head()), CLASSES, strength=0.25, seed=9, steps=3, sampler="ddpm")
    facts = {name: enhanced.metadata[name] for name in ("strength", "method", "seed", "steps", "sampler")}
    assert facts == {"strength": "0.25", "method": "interpolate", "seed": "9", "steps": "3", "sampler": "ddpm"}
    assert read_head(enhanced.to_bytes()).metadata == enhanced.metadata
    assert "strength" not in generator.generate(CLASSES).metadata
    # An artifact of the checkpoint itself can be enhanced for other classes.
    again = generator.enhance(enhanced, CLASSES[:2], strength=0.5)
    assert again.classes == CLASSES[:2]


def test_a_result_can_be_changed_without_touching_the_given_head(generator: Generator) -> None:
    head = trained_head()
    (enhanced,) = generator.generate_batch([replace(request_for(generator, CLASSES, "mean", 0, 0.0), given=head)])
    enhanced.tensors["linear1.weight"].zero_()
    assert torch.equal(head, trained_head())


def test_heads_without_biases_are_enhanced_too(tmp_path: Path) -> None:
    spec = TINY_SPEC.model_copy(update={"bias": False, "activation": "none"})
    save_tiny_checkpoint(tmp_path / "checkpoint", head=spec)
    generator = Generator.load(tmp_path / "checkpoint")
    start = generator.generate(CLASSES)
    assert generator.enhance(start, CLASSES, strength=0.5, steps=3, sampler="ddim").spec == spec


class TestRefusals:
    def test_methods_that_do_not_exist_or_have_no_head(self, generator: Generator) -> None:
        with pytest.raises(InvalidInputError, match="'average': allowed are interpolate and noise, or none") as caught:
            generator.enhance(artifact_of(trained_head()), CLASSES, strength=0.5, method="average")  # type: ignore[arg-type]
        assert caught.value.field == "method"
        with pytest.raises(InvalidInputError, match="'noise' without a head") as caught:
            generator.generate_batch([replace(request_for(generator, CLASSES, "mean", 0, None), method="noise")])
        assert caught.value.field == "method"

    @pytest.mark.parametrize("strength", [-0.01, 1.01, math.nan, math.inf, -math.inf])
    def test_strength_out_of_range(self, generator: Generator, strength: float) -> None:
        with pytest.raises(InvalidInputError, match="allowed are 0 to 1") as caught:
            generator.enhance(artifact_of(trained_head()), CLASSES, strength=strength)
        assert caught.value.field == "strength"

    def test_strength_without_a_head(self, generator: Generator) -> None:
        request = replace(request_for(generator, CLASSES, "mean", 0, None), strength=0.5)
        with pytest.raises(InvalidInputError, match="without a head") as caught:
            generator.generate_batch([request])
        assert caught.value.field == "strength"

    @pytest.mark.parametrize(
        ("weights", "message"),
        [
            (torch.zeros(P - 1), rf"\({P - 1},\) torch.float32: expected \({P},\)"),
            (torch.zeros(1, P), rf"\(1, {P}\)"),
            (torch.zeros(P, dtype=torch.float64), "torch.float64"),
            (torch.full((P,), math.nan), "not finite"),
            (torch.full((P,), math.inf), "not finite"),
            (torch.full((P,), 1e30), "more than 1e\\+06 standard deviations"),
        ],
    )
    def test_weights_that_are_no_head_of_this_checkpoint(
        self, generator: Generator, weights: Tensor, message: str
    ) -> None:
        good = request_for(generator, CLASSES, "ddim", 0, 0.5)
        with pytest.raises(InvalidInputError, match=message) as caught:
            generator.generate_batch([good, replace(good, given=weights)])
        assert caught.value.field == "head"

    def test_the_furthest_head_allowed_still_gives_numbers(self, generator: Generator) -> None:
        space = tiny_space()
        furthest = space.restore(9e5 * torch.randn(P).sign())
        for sampler in SAMPLERS:
            request = replace(request_for(generator, CLASSES, sampler, 0, 0.1), given=furthest)
            assert bool(torch.isfinite(flat(generator.generate_batch([request])[0])).all())

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"hidden_dim": 4}, "4 hidden units, 8 outputs, .* enhances heads with 6 inputs, 3 hidden units"),
            ({"bias": False}, "no biases"),
            ({"activation": "none"}, "activation none: "),
        ],
    )
    def test_heads_of_another_kind(self, generator: Generator, change: dict[str, object], message: str) -> None:
        spec = TINY_SPEC.model_copy(update=change)
        tensors = spec.unflatten(torch.zeros(spec.num_parameters))
        other = HeadArtifact(tensors, torch.eye(8)[:2], {"activation": spec.activation})
        with pytest.raises(InvalidInputError, match=message) as caught:
            generator.enhance(other, CLASSES, strength=0.5)
        assert caught.value.field == "head"
