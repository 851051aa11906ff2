"""Merging several heads into one from their weights alone: the classical rules that `fuse` is compared with.

Letters: n heads, h hidden units, P numbers in one head.
"""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from text2weight.head import HeadSpec
from text2weight.weight_tokens import UnitTokens, permute_units


def average(heads: Tensor) -> Tensor:
    """Mean of heads (n, P): (P,)."""
    _check_heads(heads)
    return heads.mean(0)


def assign_units(similarity: Tensor) -> Tensor:
    """Pair the hidden units of two heads one to one so that the summed similarity is greatest.

    Args:
        similarity: (h, h), row i a unit of the first head, column j one of the second.

    Returns:
        (h,) for each unit of the first head its partner in the second.
    """
    _, partners = linear_sum_assignment(similarity.double().cpu().numpy(), maximize=True)
    return torch.from_numpy(partners).to(similarity.device)


def match_units(spec: HeadSpec, reference: Tensor, head: Tensor) -> Tensor:
    """Order of a head's hidden units that brings it closest to another head.

    Weight matching of Git Re-Basin (arXiv 2209.04836). With one hidden layer it is a single linear assignment, and
    so exact: the squared distance of two heads is least where the inner products of their paired units sum highest.

    Args:
        spec: the heads' specification.
        reference: (P,).
        head: (P,).

    Returns:
        (h,): `permute_units(spec, head, order)` is the head in the reference's order.
    """
    tokens = UnitTokens(spec)
    here, _ = tokens.split(reference)  # (h, unit_dim)
    there, _ = tokens.split(head)  # (h, unit_dim)
    return assign_units(here.double() @ there.double().T)


def git_rebasin(spec: HeadSpec, heads: Tensor) -> Tensor:
    """Mean of heads (n, P) after all but the first took on the unit order closest to the first's: (P,).

    Source: arXiv 2209.04836.
    """
    _check_heads(heads)
    first, *others = heads
    return torch.stack([first, *(permute_units(spec, head, match_units(spec, first, head)) for head in others)]).mean(0)


def task_arithmetic(base: Tensor, heads: Tensor, scale: float = 1.0) -> Tensor:
    """Add the heads' deviations from their common start (arXiv 2212.04089): base + scale * sum(head - base).

    Args:
        base: (P,) the head that all of them were trained from.
        heads: (n, P).
        scale: factor of the sum; 1 / n makes the result the heads' mean.

    Returns:
        (P,).
    """
    _check_heads(heads)
    merged: Tensor = base + scale * (heads - base).sum(0)
    return merged


def ties(base: Tensor, heads: Tensor, density: float = 0.2, scale: float = 1.0) -> Tensor:
    """TIES merging (arXiv 2306.01708) of deviations from a common start: trim, elect signs, mean of those who agree.

    Args:
        base: (P,) the head that all of them were trained from.
        heads: (n, P).
        density: share of each deviation's entries that is kept, those of largest magnitude; 0 < density <= 1.
        scale: factor of the merged deviation.

    Returns:
        (P,).

    Raises:
        ValueError: the density is not allowed.
    """
    _check_heads(heads)
    if not 0 < density <= 1:
        raise ValueError(f"density is {density}: allowed is 0 < density <= 1")
    deviations = heads - base  # (n, P)
    kept = max(1, round(density * deviations.shape[1]))
    largest = deviations.abs().topk(kept, dim=1).indices  # (n, kept)
    trimmed = torch.zeros_like(deviations).scatter(1, largest, deviations.gather(1, largest))  # (n, P)
    sign = trimmed.sum(0).sign()  # (P,)
    agree = (trimmed.sign() == sign) & (trimmed != 0)  # (n, P)
    mean = (trimmed * agree).sum(0) / agree.sum(0).clamp(min=1)  # (P,)
    merged: Tensor = base + scale * mean
    return merged


def _check_heads(heads: Tensor) -> None:
    if heads.ndim != 2 or len(heads) == 0:
        raise ValueError(f"heads of shape {tuple(heads.shape)}: give (n, P) with n at least 1")
