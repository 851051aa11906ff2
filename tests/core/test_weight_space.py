from __future__ import annotations

import pytest
import torch

from tests.tiny import TINY_SPEC, tiny_space
from text2weight.head import HeadSpec
from text2weight.weight_space import WeightSpace
from text2weight.weight_tokens import permute_units

P = TINY_SPEC.num_parameters


def zoo(count: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    source = torch.Generator().manual_seed(0)
    anchor = torch.randn(P, generator=source)
    spread = TINY_SPEC.flatten(
        {name: torch.full(shape, 0.01 * (i + 1)) for i, (name, shape) in enumerate(TINY_SPEC.shapes.items())}
    )
    return anchor, anchor + 0.02 + spread * torch.randn(count, P, generator=source)


def test_restore_undoes_standardise() -> None:
    space = tiny_space()
    weights = torch.randn(5, P)
    torch.testing.assert_close(space.restore(space.standardise(weights)), weights, atol=1e-5, rtol=1e-5)


def test_every_block_of_the_zoo_has_unit_spread_around_zero() -> None:
    anchor, weights = zoo()
    standardised = WeightSpace.fit(TINY_SPEC, anchor, weights).standardise(weights)
    torch.testing.assert_close(standardised.mean(0), torch.zeros(P), atol=1e-3, rtol=0)
    for block in TINY_SPEC.unflatten(standardised).values():
        torch.testing.assert_close(block.square().mean().sqrt(), torch.tensor(1.0), atol=1e-3, rtol=0)


def test_the_scale_is_one_number_per_tensor_of_the_head() -> None:
    anchor, weights = zoo()
    scales = TINY_SPEC.unflatten(WeightSpace.fit(TINY_SPEC, anchor, weights).scale)
    assert all(len(scale.unique()) == 1 for scale in scales.values())
    assert len({float(scale.flatten()[0]) for scale in scales.values()}) == len(scales)


def test_the_order_of_hidden_units_does_not_matter() -> None:
    anchor, weights = zoo()
    order = torch.tensor([2, 0, 1])
    permuted = WeightSpace.fit(
        TINY_SPEC, permute_units(TINY_SPEC, anchor, order), permute_units(TINY_SPEC, weights, order)
    )
    expected = permute_units(TINY_SPEC, WeightSpace.fit(TINY_SPEC, anchor, weights).standardise(weights), order)
    torch.testing.assert_close(
        permuted.standardise(permute_units(TINY_SPEC, weights, order)), expected, atol=1e-4, rtol=1e-4
    )


def test_equal_heads_do_not_divide_by_zero() -> None:
    spec = HeadSpec(input_dim=2, hidden_dim=1, output_dim=2, bias=False)
    weights = torch.ones(3, spec.num_parameters)
    space = WeightSpace.fit(spec, torch.zeros(spec.num_parameters), weights)
    assert bool(torch.isfinite(space.standardise(weights)).all())
    torch.testing.assert_close(space.restore(torch.zeros(1, spec.num_parameters)), weights[:1])


def test_copying_to_a_device_keeps_all_values() -> None:
    space = tiny_space()
    copy = space.to("cpu")
    assert all(torch.equal(copy.tensors()[name], tensor) for name, tensor in space.tensors().items())
    assert list(space.tensors()) == ["anchor", "offset", "scale"]


class TestMinMax:
    def test_each_block_of_the_raw_heads_spans_minus_one_to_one(self) -> None:
        """By hand: a block of numbers from 2 to 6 has middle 4 and half range 2, whatever the anchor."""
        spec = HeadSpec(input_dim=2, hidden_dim=1, output_dim=2, bias=False)
        weights = torch.tensor([[2.0, 3.0, -1.0, 0.0], [6.0, 4.0, 0.5, -3.0]])
        space = WeightSpace.fit(spec, torch.tensor([10.0, 20.0, 30.0, 40.0]), weights, "min_max")
        torch.testing.assert_close(
            space.standardise(weights),
            torch.tensor([[-1.0, -0.5, 1 / 7, 5 / 7], [1.0, 0.0, 1.0, -1.0]]),
        )
        torch.testing.assert_close(space.anchor + space.offset, torch.tensor([4.0, 4.0, -1.25, -1.25]))
        torch.testing.assert_close(space.scale, torch.tensor([2.0, 2.0, 1.75, 1.75]))

    def test_the_ends_of_a_zoo_go_to_the_ends_of_the_range(self) -> None:
        anchor, weights = zoo()
        standardised = WeightSpace.fit(TINY_SPEC, anchor, weights, "min_max").standardise(weights)
        for block in TINY_SPEC.unflatten(standardised).values():
            assert float(block.min()) == pytest.approx(-1, abs=1e-5)
            assert float(block.max()) == pytest.approx(1, abs=1e-5)

    def test_restore_undoes_it(self) -> None:
        anchor, weights = zoo()
        space = WeightSpace.fit(TINY_SPEC, anchor, weights, "min_max")
        torch.testing.assert_close(space.restore(space.standardise(weights)), weights, atol=1e-5, rtol=1e-5)

    def test_permuting_the_units_of_a_head_permutes_its_variable(self) -> None:
        """Not so with standardised deviations: their mean head has an order."""
        anchor, weights = zoo()
        order = torch.tensor([2, 0, 1])
        moved = permute_units(TINY_SPEC, weights, order)
        for scaling, holds in (("min_max", True), ("standardise", False)):
            space = WeightSpace.fit(TINY_SPEC, anchor, weights, scaling)
            expected = permute_units(TINY_SPEC, space.standardise(weights), order)
            assert torch.allclose(space.standardise(moved), expected, atol=1e-5) == holds

    @pytest.mark.parametrize("value", [0.0, 0.1, -3000.0])
    @pytest.mark.parametrize("jitter", [0.0, 1e-7])
    def test_a_constant_block_goes_to_the_middle(self, value: float, jitter: float) -> None:
        """Rounding must not be blown up to the whole range."""
        weights = torch.randn(5, P)
        first = slice(0, TINY_SPEC.hidden_dim * TINY_SPEC.input_dim)
        weights[:, first] = value * (1 + jitter * torch.randn(5, first.stop))
        space = WeightSpace.fit(TINY_SPEC, torch.randn(P), weights, "min_max")
        standardised = space.standardise(weights)
        assert float(standardised[:, first].abs().max()) <= 0.5
        torch.testing.assert_close(space.restore(standardised), weights, atol=1e-6, rtol=1e-6)
