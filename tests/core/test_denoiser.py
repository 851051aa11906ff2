from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor

from tests.tiny import TINY_DIM, TINY_SPEC, pad_embeddings, randomise, tiny_condition, tiny_denoiser, tiny_space
from text2weight.condition import Condition, condition_on_classes
from text2weight.denoiser import ClassPath, DenoiserConfig, sinusoid
from text2weight.head import HeadSpec
from text2weight.weight_tokens import permute_units

VARIANTS = [
    pytest.param({"tokens": "unit", "unit_identity": True}, id="unit-identity"),
    pytest.param({"tokens": "unit", "unit_identity": False}, id="unit"),
    pytest.param({"tokens": "unit", "class_tokens": False}, id="unit-pooled"),
    pytest.param({"tokens": "unit", "class_path": 0}, id="unit-blocks-alone"),
    pytest.param({"pooled": False}, id="unit-class-tokens-alone"),
    pytest.param({"null_condition": True}, id="unit-null"),
    pytest.param({"tokens": "chunk"}, id="chunk"),
    pytest.param({"tokens": "chunk", "class_tokens": False}, id="chunk-pooled"),
]
ORDER = torch.tensor([2, 0, 1])
TIMESTEPS = torch.tensor([1, 20, 40])
CLOSE = {"atol": 1e-5, "rtol": 1e-4}


@pytest.fixture
def noisy() -> Tensor:
    return torch.randn(3, TINY_SPEC.num_parameters, generator=torch.Generator().manual_seed(5))


@pytest.fixture
def condition() -> Condition:
    return tiny_condition((2, 5, 3))


def permute(flat: Tensor) -> Tensor:
    return permute_units(TINY_SPEC, flat, ORDER)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_fresh_denoiser_outputs_zero(variant: dict[str, object], noisy: Tensor, condition: Condition) -> None:
    output = tiny_denoiser(seed=None, **variant)(noisy, TIMESTEPS, condition)
    assert output.shape == noisy.shape
    assert bool((output == 0).all())


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_start_is_added_to_the_output(variant: dict[str, object], noisy: Tensor, condition: Condition) -> None:
    start = torch.arange(float(TINY_SPEC.num_parameters))
    fresh, used = tiny_denoiser(seed=None, start=start, **variant), tiny_denoiser(start=start, **variant)
    assert torch.equal(fresh(noisy, TIMESTEPS, condition), start.expand_as(noisy))
    plain = tiny_denoiser(**variant)(noisy, TIMESTEPS, condition)
    torch.testing.assert_close(used(noisy, TIMESTEPS, condition), plain + start, **CLOSE)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("bias", [True, False])
def test_every_input_matters(variant: dict[str, object], bias: bool, condition: Condition) -> None:
    spec = HeadSpec(input_dim=6, hidden_dim=3, output_dim=8, bias=bias)
    denoiser = tiny_denoiser(spec, **variant)
    noisy = torch.randn(3, spec.num_parameters)
    output = denoiser(noisy, TIMESTEPS, condition)
    assert output.shape == noisy.shape
    assert output.dtype == torch.float32
    for other in (
        denoiser(noisy + 0.5, TIMESTEPS, condition),
        denoiser(noisy, TIMESTEPS + 7, condition),
        denoiser(noisy, TIMESTEPS, tiny_condition((2, 5, 3), seed=9)),
    ):
        assert float((other - output).detach().abs().amax(1).min()) > 1e-3


def test_without_identities_permuted_units_give_permuted_outputs(noisy: Tensor, condition: Condition) -> None:
    denoiser = tiny_denoiser(unit_identity=False)
    output = denoiser(noisy, TIMESTEPS, condition)
    permuted = denoiser(permute(noisy), TIMESTEPS, condition)
    assert not torch.allclose(permute(output), output, **CLOSE)
    torch.testing.assert_close(permuted, permute(output), **CLOSE)


def test_with_identities_anchor_and_sample_permute_together(noisy: Tensor, condition: Condition) -> None:
    anchor = tiny_space().anchor
    plain, moved = tiny_denoiser(anchor=anchor), tiny_denoiser(anchor=permute(anchor))
    expected = permute(plain(noisy, TIMESTEPS, condition))
    torch.testing.assert_close(moved(permute(noisy), TIMESTEPS, condition), expected, **CLOSE)
    # The identities are not idle: permuting the sample alone is another question.
    assert not torch.allclose(plain(permute(noisy), TIMESTEPS, condition), expected, atol=1e-3)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_order_of_classes_does_not_matter(variant: dict[str, object], noisy: Tensor) -> None:
    rows = F.normalize(torch.randn(5, TINY_DIM), dim=-1)
    denoiser = tiny_denoiser(**variant)
    outputs = [
        denoiser(noisy[:1], TIMESTEPS[:1], condition_on_classes(*pad_embeddings([rows[order]])))
        for order in ([0, 1, 2, 3, 4], [3, 1, 4, 0, 2])
    ]
    torch.testing.assert_close(outputs[0], outputs[1], **CLOSE)


@pytest.mark.parametrize("variant", VARIANTS)
def test_batched_equals_alone(variant: dict[str, object], noisy: Tensor, condition: Condition) -> None:
    denoiser = tiny_denoiser(**variant)
    together = denoiser(noisy, TIMESTEPS, condition)
    # Numbers that nearly cancel keep the rounding of what they are the difference of, more on some processors.
    rounding = {"atol": 1e-5 * float(together.detach().abs().max()), "rtol": 0}
    for i, count in enumerate(condition.count.tolist()):
        alone = Condition(
            condition.pooled[i : i + 1], condition.tokens[i : i + 1, :count], condition.mask[i : i + 1, :count]
        )
        output = denoiser(noisy[i : i + 1], TIMESTEPS[i : i + 1], alone)
        torch.testing.assert_close(together[i : i + 1], output, **rounding)


def test_the_class_path_multiplies_what_names_a_token_with_the_class_set() -> None:
    path = randomise(ClassPath(5, 4, 7), scale=1.0)
    identity, classes = torch.randn(3, 5), torch.randn(2, 4)
    numbers = path(identity, classes)
    assert numbers.shape == (2, 3, 7)
    gates = identity @ path.gate.weight.T + path.gate.bias  # (T, M)
    for item in range(2):
        for token in range(3):
            expected = 0.3 * path.out.weight @ (gates[token] * classes[item]) + path.out.bias
            torch.testing.assert_close(numbers[item, token], expected)


def test_the_number_of_classes_is_known_even_without_class_tokens(noisy: Tensor) -> None:
    denoiser = tiny_denoiser(class_tokens=False)
    one = F.normalize(torch.randn(1, TINY_DIM), dim=-1)
    # Copies of one class pool to the same vector: only the count differs.
    outputs = [
        denoiser(noisy[:1], TIMESTEPS[:1], condition_on_classes(*pad_embeddings([one.expand(count, -1)])))
        for count in (2, 8)
    ]
    assert not torch.allclose(outputs[0], outputs[1], atol=1e-3)


def test_without_the_pooled_vector_it_is_not_read(noisy: Tensor, condition: Condition) -> None:
    denoiser = tiny_denoiser(pooled=False)
    other = replace(condition, pooled=torch.randn_like(condition.pooled))
    assert torch.equal(denoiser(noisy, TIMESTEPS, condition), denoiser(noisy, TIMESTEPS, other))
    assert not torch.allclose(*(tiny_denoiser()(noisy, TIMESTEPS, each) for each in (condition, other)), atol=1e-3)


NULL_VARIANTS = [{}, {"pooled": False}, {"class_tokens": False}, {"tokens": "chunk"}]


@pytest.mark.parametrize("variant", NULL_VARIANTS)
def test_the_null_condition_says_nothing_about_the_text(variant: dict[str, object], noisy: Tensor) -> None:
    denoiser = tiny_denoiser(null_condition=True, **variant)
    everything = torch.ones(3, dtype=torch.bool)
    outputs = [
        denoiser(noisy, TIMESTEPS, tiny_condition(counts, seed).drop(everything))
        for counts, seed in (((2, 5, 3), 3), ((4, 2, 7), 9))
    ]
    assert bool(torch.isfinite(outputs[0]).all())
    torch.testing.assert_close(outputs[0], outputs[1], **CLOSE)
    # That no class is present decides, whatever the vectors hold.
    text = tiny_condition()
    unread = replace(text, mask=torch.zeros_like(text.mask))
    torch.testing.assert_close(denoiser(noisy, TIMESTEPS, unread), outputs[0], **CLOSE)


@pytest.mark.parametrize("variant", NULL_VARIANTS)
def test_a_null_condition_leaves_the_other_items_alone(
    variant: dict[str, object], noisy: Tensor, condition: Condition
) -> None:
    denoiser = tiny_denoiser(null_condition=True, **variant)
    full = denoiser(noisy, TIMESTEPS, condition)
    mixed = denoiser(noisy, TIMESTEPS, condition.drop(torch.tensor([False, True, False])))
    torch.testing.assert_close(mixed[[0, 2]], full[[0, 2]], **CLOSE)
    assert float((mixed[1] - full[1]).detach().abs().max()) > 1e-3


def test_what_is_answered_without_a_condition_is_learned(noisy: Tensor, condition: Condition) -> None:
    denoiser = tiny_denoiser(null_condition=True)
    denoiser(noisy, TIMESTEPS, condition.drop(torch.tensor([True, False, False]))).square().sum().backward()
    assert denoiser.null_context is not None
    assert float(denoiser.null_context.grad.abs().max()) > 0


def test_the_null_condition_costs_the_other_weights_nothing() -> None:
    """A switch draws no random numbers: all other parameters start as they do without it."""
    torch.manual_seed(0)
    plain = tiny_denoiser(seed=None).state_dict()
    torch.manual_seed(0)
    switched = tiny_denoiser(seed=None, null_condition=True).state_dict()
    assert set(switched) - set(plain) == {"null_context"}
    assert all(torch.equal(switched[name], tensor) for name, tensor in plain.items())


def test_added_fields_are_written_only_where_they_are_used() -> None:
    """Hashes of checkpoints from before these fields cover a config without them."""
    assert not {"pooled", "null_condition"} & set(DenoiserConfig().model_dump(mode="json"))
    for changes in ({"pooled": False}, {"null_condition": True}):
        config = DenoiserConfig(**changes)
        written = config.model_dump(mode="json")
        assert changes.items() <= written.items()
        assert DenoiserConfig.model_validate(written) == config


def test_gradients_reach_every_parameter(noisy: Tensor, condition: Condition) -> None:
    for variant in ({}, {"tokens": "chunk"}, {"pooled": False}, {"null_condition": True}):
        denoiser = tiny_denoiser(**variant)
        denoiser(noisy, TIMESTEPS, condition).square().mean().backward()
        assert not [name for name, parameter in denoiser.named_parameters() if parameter.grad is None]


def test_sinusoid_features() -> None:
    features = sinusoid(torch.tensor([0, 3]), 7)
    assert features.shape == (2, 7)
    assert features[0].tolist() == [1, 1, 1, 0, 0, 0, 0]
    frequencies = 10_000 ** (-torch.arange(3) / 3)
    torch.testing.assert_close(features[1, :3], (3 * frequencies).cos())
    torch.testing.assert_close(features[1, 3:6], (3 * frequencies).sin())


@pytest.mark.parametrize(
    "bad",
    [
        {"width": 10, "heads": 3},
        {"depth": 0},
        {"class_path": -1},
        {"kind": "mlp"},
        {"layers": 2},
        {"pooled": False, "class_tokens": False},
    ],
)
def test_a_config_refuses_what_cannot_be_built(bad: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        DenoiserConfig(**bad)
