"""RegMean: the merged layers answer each head's own inputs as that head does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from text2weight.head import HeadSpec, apply_heads
from text2weight_training.suites.regmean import layer_grams, regmean

CLOSE = {"atol": 1e-4, "rtol": 1e-4}
SPECS = [
    HeadSpec(input_dim=6, hidden_dim=3, output_dim=8),
    HeadSpec(input_dim=6, hidden_dim=3, output_dim=8, bias=False, activation="none"),
]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("spec", SPECS)
def test_grams_are_those_of_the_layers_inputs(spec: HeadSpec) -> None:
    head, features = draw(spec.num_parameters), draw(5, 6, seed=1)
    weights = spec.unflatten(head)
    hidden = features @ weights["linear1.weight"].T
    if spec.bias:
        hidden = torch.nn.functional.gelu(hidden + weights["linear1.bias"])
    first, second = layer_grams(spec, head, features)
    inner = slice(0, 6), slice(0, 3)
    torch.testing.assert_close(first[inner[0], inner[0]], (features.T @ features).double(), **CLOSE)
    torch.testing.assert_close(second[inner[1], inner[1]], (hidden.T @ hidden).double(), **CLOSE)
    if spec.bias:
        torch.testing.assert_close(first[-1], torch.cat([features.sum(0), torch.tensor([5.0])]).double(), **CLOSE)


@pytest.mark.parametrize("spec", SPECS)
def test_equal_heads_merge_to_themselves(spec: HeadSpec) -> None:
    head = 0.5 * draw(spec.num_parameters)
    grams = [layer_grams(spec, head, draw(200, 6, seed=seed)) for seed in (1, 2)]
    merged = regmean(spec, torch.stack([head, head]), grams)
    torch.testing.assert_close(merged, head, **CLOSE)


def test_a_shared_linear_map_is_recovered_where_each_head_knows_half_of_it() -> None:
    """Each first layer is right on the inputs of its own task and wrong on the other's; the merged one is right on all.

    The activation is the identity, and the second layer is common, so that every number can be told in advance.
    """
    spec = HeadSpec(input_dim=6, hidden_dim=3, output_dim=8, bias=False, activation="none")
    true = spec.unflatten(draw(spec.num_parameters))
    features = [torch.zeros(50, 6), torch.zeros(50, 6)]
    features[0][:, :3], features[1][:, 3:] = draw(50, 3, seed=1), draw(50, 3, seed=2)
    heads = []
    for known in (slice(0, 3), slice(3, 6)):
        first = draw(3, 6, seed=known.start + 5)
        first[:, known] = true["linear1.weight"][:, known]
        heads.append(spec.flatten({"linear1.weight": first, "linear2.weight": true["linear2.weight"]}))
    grams = [layer_grams(spec, head, inputs) for head, inputs in zip(heads, features, strict=True)]
    merged = regmean(spec, torch.stack(heads), grams, decay=1.0)
    torch.testing.assert_close(merged, spec.flatten(true), **CLOSE)
    everything = torch.cat(features)
    expected = apply_heads(spec, spec.flatten(true)[None], everything)
    assert float((apply_heads(spec, torch.stack(heads).mean(0)[None], everything) - expected).abs().max()) > 0.5


def test_without_off_diagonals_every_input_is_a_weighted_mean() -> None:
    spec = HeadSpec(input_dim=2, hidden_dim=1, output_dim=1, bias=False, activation="none")
    heads = torch.tensor([[1.0, 2.0, 1.0], [5.0, 6.0, 3.0]])  # W1 (1, 2), W2 (1, 1)
    grams = [
        [torch.tensor([[3.0, 9.0], [9.0, 1.0]]).double(), torch.eye(1).double()],
        [torch.tensor([[1.0, 7.0], [7.0, 1.0]]).double(), torch.eye(1).double()],
    ]
    # Diagonals weigh: (3 * 1 + 1 * 5) / 4, (2 + 6) / 2, (1 + 3) / 2.
    assert regmean(spec, heads, grams, decay=1e-9).tolist() == pytest.approx([2.0, 4.0, 2.0], abs=1e-6)
