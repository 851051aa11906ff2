"""Random heads follow the rules they are named after."""

from __future__ import annotations

import math

import pytest
import torch

from text2weight.head import HeadSpec
from text2weight_training.initialisation import RANDOM_STARTS, random_head, random_heads
from text2weight_training.stacked import initial_head

# Unlike sizes, so that a rule that mixes up inputs and outputs is found.
SPEC = HeadSpec(input_dim=300, hidden_dim=40, output_dim=700)


@pytest.mark.parametrize(
    ("rule", "low", "high"),
    [
        ("Xavier uniform", "-both", "both"),
        ("Kaiming uniform", "-inputs", "inputs"),
        ("uniform U(0, 1)", "zero", "one"),
    ],
)
def test_uniform_rules_fill_their_range(rule: str, low: str, high: str) -> None:
    blocks = SPEC.unflatten(random_head(SPEC, rule, 0))
    for name in ("linear1.weight", "linear2.weight"):
        outputs, inputs = blocks[name].shape
        bounds = {"both": math.sqrt(6 / (inputs + outputs)), "inputs": math.sqrt(6 / inputs), "zero": 0.0, "one": 1.0}
        bounds |= {f"-{key}": -value for key, value in bounds.items()}
        least, greatest = float(blocks[name].min()), float(blocks[name].max())
        width = bounds[high] - bounds[low]
        assert bounds[low] <= least < bounds[low] + 0.01 * width
        assert bounds[high] - 0.01 * width < greatest <= bounds[high]


@pytest.mark.parametrize("rule", ["Kaiming normal", "normal N(0, 1)"])
def test_normal_rules_have_their_spread(rule: str) -> None:
    blocks = SPEC.unflatten(random_head(SPEC, rule, 0))
    for name in ("linear1.weight", "linear2.weight"):
        expected = math.sqrt(2 / blocks[name].shape[1]) if "Kaiming" in rule else 1.0
        assert float(blocks[name].std()) == pytest.approx(expected, rel=0.03)
        assert float(blocks[name].mean()) == pytest.approx(0, abs=0.05 * expected)


def test_biases_are_small_and_equal_except_for_pytorchs_default() -> None:
    for rule in RANDOM_STARTS:
        blocks = SPEC.unflatten(random_head(SPEC, rule, 0))
        biases = torch.cat([blocks["linear1.bias"], blocks["linear2.bias"]])
        if rule == "PyTorch default":
            assert torch.equal(random_head(SPEC, rule, 0), initial_head(SPEC, 0))
            assert float(biases.std()) > 0
        else:
            torch.testing.assert_close(biases, torch.full_like(biases, 0.01))


def test_a_seed_makes_one_head_and_leaves_other_draws_alone() -> None:
    state = torch.get_rng_state()
    for rule in RANDOM_STARTS:
        heads = random_heads(SPEC, rule, [5, 6, 5])
        assert torch.equal(heads[0], heads[2])
        assert not torch.equal(heads[0], heads[1])
    assert torch.equal(torch.get_rng_state(), state)


def test_heads_without_biases_get_none() -> None:
    spec = SPEC.model_copy(update={"bias": False})
    assert len(random_head(spec, "Xavier uniform", 0)) == spec.num_parameters
