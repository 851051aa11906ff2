"""Permutation symmetry of the hidden units: permuting them, the loss L_sym, and measuring what it leaves.

A head computes the same function in whichever order its hidden units stand, so a denoiser D should obey
D(g x_n, n, c) = g D(x_n, n, c) for every permutation g. Three ways to that are compared (docs/method.md):
a loss on the difference (L_sym, T2W's, arXiv 2508.13633), permuted training heads, and a network that
cannot do otherwise.

Letters: B items, P numbers in one head, h hidden units.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from text2weight.condition import Condition
from text2weight.diffusion import NoiseSchedule, Prediction
from text2weight.head import HeadSpec
from text2weight.weight_tokens import permute_units


def draw_orders(spec: HeadSpec, count: int, generator: torch.Generator) -> Tensor:
    """Draw uniformly random orders of the hidden units: (count, h), on the CPU."""
    return torch.rand(count, spec.hidden_dim, generator=generator).argsort(1)  # (count, h)


def permute_each(spec: HeadSpec, flat: Tensor, orders: Tensor) -> Tensor:
    """Reorder the hidden units of flat weights (B, P), each item by its own row of orders (B, h)."""
    rows = [permute_units(spec, row, order) for row, order in zip(flat, orders, strict=True)]
    return torch.stack(rows) if rows else flat  # (B, P)


def equivariance_loss(spec: HeadSpec, output: Tensor, permuted_output: Tensor, orders: Tensor) -> Tensor:
    """L_sym: mean of (D(g x_n, n, c) - g D(x_n, n, c))^2 over items and numbers.

    Args:
        spec: the heads' specification.
        output: (B, P) D(x_n, n, c).
        permuted_output: (B, P) D(g x_n, n, c).
        orders: (B, h) each item's g.
    """
    return F.mse_loss(permuted_output, permute_each(spec, output, orders))


@torch.no_grad()
def equivariance_error(
    denoiser: nn.Module,
    spec: HeadSpec,
    schedule: NoiseSchedule,
    prediction: Prediction,
    noisy: Tensor,
    timesteps: Tensor,
    condition: Condition,
    generator: torch.Generator,
    permutations: int = 8,
) -> float:
    """Relative error of a denoiser's estimate of x_0 under random permutations of the hidden units.

    Root of the summed squares of E(g x_n) - g E(x_n), over that of g E(x_n), with E the estimate of x_0. An exactly
    equivariant network leaves rounding, about 1e-6; one that takes no notice of the order of its input has about
    the root of 2 where units differ by much.

    Args:
        denoiser: the network.
        spec: the heads' specification.
        schedule: noise schedule.
        prediction: what the network outputs.
        noisy: (B, P) x_n.
        timesteps: (B,) in 1..N.
        condition: B items.
        generator: a CPU generator, for the permutations.
        permutations: drawn for each item.

    Returns:
        the error; 0 is exact equivariance, also that of a network that estimates zero.
    """
    _, estimate = schedule.run_denoiser(denoiser, prediction, noisy, timesteps, condition)  # (B, P)
    difference, size = 0.0, 0.0
    for _ in range(permutations):
        orders = draw_orders(spec, len(noisy), generator).to(noisy.device)  # (B, h)
        moved = permute_each(spec, noisy, orders)  # (B, P)
        _, answer = schedule.run_denoiser(denoiser, prediction, moved, timesteps, condition)  # (B, P)
        expected = permute_each(spec, estimate, orders)  # (B, P)
        difference += float((answer - expected).double().square().sum())
        size += float(expected.double().square().sum())
    if not difference:
        return 0.0
    return math.sqrt(difference / size) if size else math.inf
