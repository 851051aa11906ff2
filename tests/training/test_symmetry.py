"""Permutation symmetry: the loss, the measurement, and the three ways to it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from tests.tiny import TINY_SPEC, tiny_condition, tiny_denoiser, tiny_space
from text2weight.condition import Condition
from text2weight.diffusion import NoiseSchedule
from text2weight.head import HeadSpec
from text2weight.weight_space import WeightSpace
from text2weight.weight_tokens import permute_units
from text2weight_training.losses import Denoised, DenoisingLosses
from text2weight_training.symmetry import draw_orders, equivariance_error, equivariance_loss, permute_each

# One number in, two hidden units, one number out: flat weights are (W1 of unit 0, of unit 1, W2 of 0, of 1).
SPEC = HeadSpec(input_dim=1, hidden_dim=2, output_dim=1, bias=False)
SWAP = torch.tensor([[1, 0]])
SCHEDULE = NoiseSchedule(num_timesteps=40)


class Linear(nn.Module):
    """x_n -> x_n A^T, whatever the timestep and the condition."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.matrix = matrix

    def forward(self, noisy: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        return noisy @ self.matrix.T


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_each_item_is_permuted_by_its_own_order() -> None:
    flat = torch.randn(5, TINY_SPEC.num_parameters)
    orders = draw_orders(TINY_SPEC, 5, generator())
    assert orders.sort(1).values.tolist() == [[0, 1, 2]] * 5
    assert len({tuple(order) for order in orders.tolist()}) > 1
    moved = permute_each(TINY_SPEC, flat, orders)
    for i in range(5):
        assert torch.equal(moved[i], permute_units(TINY_SPEC, flat[i], orders[i]))
    assert torch.equal(permute_each(TINY_SPEC, moved, orders.argsort(1)), flat)
    assert permute_each(TINY_SPEC, flat[:0], orders[:0]).shape == (0, TINY_SPEC.num_parameters)


def test_all_orders_are_equally_likely() -> None:
    orders = draw_orders(TINY_SPEC, 6000, generator()).tolist()
    counts = [sum(order == found for found in orders) for order in ([0, 1, 2], [2, 0, 1], [1, 0, 2])]
    assert all(850 < count < 1150 for count in counts)


def symmetry_loss(network: nn.Module, noisy: Tensor, orders: Tensor) -> Tensor:
    """L_sym as a fit computes it, of items at x_n = noisy."""
    anchor = torch.zeros(SPEC.num_parameters)
    losses = DenoisingLosses(SPEC, WeightSpace(anchor, anchor, anchor + 1), SCHEDULE, "epsilon", 30.0)
    timesteps, condition = torch.full((len(noisy),), 20), tiny_condition((2,) * len(noisy))
    output, estimate = SCHEDULE.run_denoiser(network, "epsilon", noisy, timesteps, condition)
    return losses.symmetry(network, Denoised(noisy, timesteps, condition, output, estimate), orders)


def test_the_loss_of_a_linear_denoiser_by_hand() -> None:
    """D doubles unit 0's input weight. Of x = (1, 5, 2, 7):

    g x = (5, 1, 7, 2), D(g x) = (10, 1, 7, 2); D(x) = (2, 5, 2, 7), g D(x) = (5, 2, 7, 2);
    the difference is (5, -1, 0, 0), its mean square 26 / 4.
    """
    network = Linear(torch.diag(torch.tensor([2.0, 1.0, 1.0, 1.0])))
    noisy = torch.tensor([[1.0, 5.0, 2.0, 7.0]])
    assert float(symmetry_loss(network, noisy, SWAP)) == pytest.approx(26 / 4)
    assert float(symmetry_loss(network, noisy, torch.tensor([[0, 1]]))) == 0
    # Items with orders of their own: the mean over both.
    both = symmetry_loss(network, noisy.expand(2, -1), torch.tensor([[1, 0], [0, 1]]))
    assert float(both) == pytest.approx(26 / 8)


def test_an_equivariant_linear_denoiser_has_no_loss() -> None:
    """Equal treatment of both units, and each sees the other the same way."""
    block = torch.tensor([[3.0, -1.0], [-1.0, 3.0]])
    network = Linear(torch.block_diag(block, 2 * block))
    noisy = torch.randn(4, 4)
    assert float(symmetry_loss(network, noisy, SWAP.expand(4, -1))) == pytest.approx(0, abs=1e-10)


def test_the_gradient_of_the_loss_pulls_towards_equivariance() -> None:
    network = Linear(nn.Parameter(torch.diag(torch.tensor([2.0, 1.0, 1.0, 1.0]))))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.3)
    source, losses = generator(), []
    for _ in range(40):
        noisy = torch.randn(16, 4, generator=source)
        loss = symmetry_loss(network, noisy, draw_orders(SPEC, 16, source))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 1e-3 * losses[0]
    doubled, single = network.matrix.detach().diagonal()[:2].tolist()
    assert doubled == pytest.approx(single, abs=0.1)


def test_the_loss_compares_with_the_permuted_output() -> None:
    output, permuted = torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.tensor([[2.0, 1.0, 4.0, 6.0]])
    assert float(equivariance_loss(SPEC, output, permuted, SWAP)) == pytest.approx((6 - 3) ** 2 / 4)


def measure(network: nn.Module, spec: HeadSpec = TINY_SPEC, permutations: int = 8) -> float:
    noisy = torch.randn(3, spec.num_parameters, generator=generator(1))
    timesteps, condition = torch.tensor([1, 20, 40]), tiny_condition((2, 5, 3))
    return equivariance_error(
        network, spec, SCHEDULE, "epsilon", noisy, timesteps, condition, generator(2), permutations
    )


def test_exact_equivariance_leaves_rounding_only() -> None:
    assert 0 < measure(tiny_denoiser(unit_identity=False)) < 1e-5


@pytest.mark.parametrize("config", [{"tokens": "chunk"}, {"tokens": "unit", "unit_identity": True}])
def test_networks_that_know_the_order_have_an_error(config: dict[str, object]) -> None:
    assert measure(tiny_denoiser(**config)) > 1e-2


def test_the_error_of_a_network_that_ignores_its_input() -> None:
    """E = (1, -1, 0, 0) always; swapped it is (-1, 1, 0, 0): |(2, -2)| / |(1, -1)| = 2, or 0 for the identity."""

    class Constant(nn.Module):
        def forward(self, noisy: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
            return torch.tensor([1.0, -1.0, 0.0, 0.0]).expand(len(noisy), -1)

    noisy, timesteps = torch.randn(400, 4, generator=generator()), torch.full((400,), 20)
    error = equivariance_error(
        Constant(), SPEC, SCHEDULE, "x0", noisy, timesteps, tiny_condition((2,) * 400), generator(3), 2
    )
    assert error == pytest.approx(math.sqrt(4 / 2), rel=0.05)  # half of the draws are swaps


def test_a_network_that_outputs_zero_has_no_error() -> None:
    noisy, timesteps, condition = torch.randn(3, TINY_SPEC.num_parameters), torch.tensor([1, 20, 40]), tiny_condition()
    fresh = tiny_denoiser(seed=None)
    assert equivariance_error(fresh, TINY_SPEC, SCHEDULE, "x0", noisy, timesteps, condition, generator()) == 0


def test_the_measurement_repeats() -> None:
    denoiser = tiny_denoiser(tokens="chunk", anchor=tiny_space().anchor)
    assert measure(denoiser) == measure(denoiser)
