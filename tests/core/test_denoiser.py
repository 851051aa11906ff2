from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor

from tests.tiny import TINY_DIM, TINY_SPEC, randomise, tiny_condition, tiny_denoiser, tiny_space
from text2weight.condition import Condition, condition_on_classes, pad_embeddings
from text2weight.denoiser import ClassPath, DenoiserConfig, sinusoid
from text2weight.head import HeadSpec
from text2weight.weight_tokens import permute_units

VARIANTS = [
    pytest.param({"tokens": "unit", "unit_identity": True}, id="unit-identity"),
    pytest.param({"tokens": "unit", "unit_identity": False}, id="unit"),
    pytest.param({"tokens": "unit", "class_tokens": False}, id="unit-pooled"),
    pytest.param({"tokens": "unit", "class_path": 0}, id="unit-blocks-alone"),
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
    for i, count in enumerate(condition.count.tolist()):
        alone = Condition(
            condition.pooled[i : i + 1], condition.tokens[i : i + 1, :count], condition.mask[i : i + 1, :count]
        )
        output = denoiser(noisy[i : i + 1], TIMESTEPS[i : i + 1], alone)
        torch.testing.assert_close(together[i : i + 1], output, **CLOSE)


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


def test_gradients_reach_every_parameter(noisy: Tensor, condition: Condition) -> None:
    for variant in ({}, {"tokens": "chunk"}):
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
    [{"width": 10, "heads": 3}, {"depth": 0}, {"class_path": -1}, {"kind": "mlp"}, {"layers": 2}],
)
def test_a_config_refuses_what_cannot_be_built(bad: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        DenoiserConfig(**bad)
