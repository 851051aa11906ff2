from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from tests.tiny import TINY_SPEC
from text2weight.head import AdapterHead, HeadSpec, apply_heads, class_logits
from text2weight.weight_tokens import permute_units

PLAIN_SPEC = HeadSpec(input_dim=6, hidden_dim=3, output_dim=8, bias=False, activation="none")


@pytest.fixture(params=[TINY_SPEC, PLAIN_SPEC], ids=["bias-gelu", "plain"])
def spec(request: pytest.FixtureRequest) -> HeadSpec:
    return request.param


def random_heads(spec: HeadSpec, count: int = 4) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(0)
    flat = torch.randn(count, spec.num_parameters, generator=source)
    return flat, torch.randn(count, 5, spec.input_dim, generator=source)


def test_the_papers_heads_have_their_sizes() -> None:
    assert HeadSpec().num_parameters == 16_912
    assert HeadSpec(bias=False, activation="none").num_parameters == 16_384
    assert HeadSpec().shapes == {
        "linear1.weight": (16, 512),
        "linear1.bias": (16,),
        "linear2.weight": (512, 16),
        "linear2.bias": (512,),
    }
    assert list(HeadSpec(bias=False).shapes) == ["linear1.weight", "linear2.weight"]


def test_stacked_heads_equal_one_module_each(spec: HeadSpec) -> None:
    flat, features = random_heads(spec)
    outputs = apply_heads(spec, flat, features)
    assert outputs.shape == (4, 5, spec.output_dim)
    for i in range(4):
        head = AdapterHead(spec)
        head.load_state_dict(spec.unflatten(flat[i]))
        torch.testing.assert_close(outputs[i], head(features[i]))


def test_features_can_be_shared_by_all_heads(spec: HeadSpec) -> None:
    flat, features = random_heads(spec)
    shared = apply_heads(spec, flat, features[0])
    torch.testing.assert_close(shared, apply_heads(spec, flat, features[:1].expand(4, -1, -1)))


def test_flatten_undoes_unflatten(spec: HeadSpec) -> None:
    flat = torch.randn(2, 3, spec.num_parameters)
    tensors = spec.unflatten(flat)
    assert {name: tuple(tensor.shape[2:]) for name, tensor in tensors.items()} == spec.shapes
    assert torch.equal(spec.flatten(tensors), flat)
    assert torch.equal(spec.flatten(spec.unflatten(flat[0, 0])), flat[0, 0])


def test_flat_order_is_that_of_the_state_dict(spec: HeadSpec) -> None:
    head = AdapterHead(spec)
    state = dict(head.state_dict())
    assert list(state) == list(spec.shapes)
    assert torch.equal(spec.flatten(state), torch.cat([tensor.flatten() for tensor in state.values()]))


def test_flatten_needs_every_tensor() -> None:
    tensors = TINY_SPEC.unflatten(torch.zeros(TINY_SPEC.num_parameters))
    del tensors["linear1.bias"]
    with pytest.raises(KeyError):
        TINY_SPEC.flatten(tensors)


def test_hidden_units_can_stand_in_any_order(spec: HeadSpec) -> None:
    flat, features = random_heads(spec)
    permuted = permute_units(spec, flat, torch.tensor([2, 0, 1]))
    assert not torch.allclose(permuted, flat)
    torch.testing.assert_close(apply_heads(spec, permuted, features), apply_heads(spec, flat, features))
    assert torch.equal(permute_units(spec, permuted, torch.tensor([1, 2, 0])), flat)


def test_logits_are_scaled_cosines_and_padding_is_minus_infinity() -> None:
    outputs = torch.tensor([[[3.0, 4.0], [0.0, -2.0]]])  # (M=1, N=2, o=2)
    classes = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]])  # (M=1, K=3, o=2)
    logits = class_logits(outputs, classes, 10.0, torch.tensor([[True, True, False]]))
    expected = torch.tensor([[[6.0, 8.0, -torch.inf], [0.0, -10.0, -torch.inf]]])
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(class_logits(outputs, classes[0, :2], 10.0), expected[..., :2])


def test_gradients_reach_every_weight(spec: HeadSpec) -> None:
    flat, features = random_heads(spec)
    flat.requires_grad_()
    apply_heads(spec, flat, features).square().sum().backward()
    assert flat.grad is not None
    assert bool((flat.grad != 0).all())


@pytest.mark.parametrize("bad", [{"hidden_dim": 0}, {"input_dim": -1}, {"activation": "relu"}, {"units": 3}])
def test_a_spec_refuses_what_it_cannot_describe(bad: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        HeadSpec(**bad)
