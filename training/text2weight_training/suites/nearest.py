"""Distances between heads whatever the order of their hidden units.

Letters: M queries, n known heads, h hidden units, u numbers of a unit, P numbers in one head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from text2weight.head import HeadSpec
from text2weight.merging import assign_units
from text2weight.weight_tokens import UnitTokens

# Bounds the known heads that are held in double precision at once.
CHUNK = 1024


@dataclass(frozen=True)
class Nearest:
    """For M queries the nearest known head (M,) and its root mean square distance (M,), float64."""

    indices: Tensor
    distances: Tensor


def aligned_distances(spec: HeadSpec, queries: Tensor, known: Tensor) -> Tensor:
    """Root mean square distances of heads (M, P) to others (n, P), each pair in its closest unit order.

    |q - z|^2 = |q|^2 + |z|^2 - 2 q.z, and only q.z depends on the order: the assignment of greatest similarity.

    Returns:
        (M, n) float64.
    """
    tokens = UnitTokens(spec)
    units, bias = tokens.split(queries.double())  # (M, h, u), (M, o)
    lengths = queries.double().square().sum(-1)  # (M,)
    columns = []
    for chunk in known.split(CHUNK):
        heads = chunk.double()  # (n, P)
        others, other_bias = tokens.split(heads)  # (n, h, u), (n, o)
        products = torch.stack([_best_products(query, others) for query in units])  # (M, n)
        if bias is not None and other_bias is not None:
            products = products + bias @ other_bias.T
        columns.append(lengths[:, None] + heads.square().sum(-1) - 2 * products)  # (M, n)
    squared = torch.cat(columns, dim=1).clamp(min=0)  # (M, n)
    return (squared / spec.num_parameters).sqrt()


def _best_products(query: Tensor, others: Tensor) -> Tensor:
    """Inner products of units (h, u) with those of n heads (n, h, u) in the order where it is greatest: (n,)."""
    similarity = torch.einsum("iu,nju->nij", query, others)  # (n, h, h)
    partners = torch.stack([assign_units(matrix) for matrix in similarity])  # (n, h)
    return similarity.gather(2, partners.unsqueeze(-1)).sum((1, 2))  # (n,)


def nearest_heads(spec: HeadSpec, queries: Tensor, known: Tensor, leave_out: Sequence[int] | None = None) -> Nearest:
    """The nearest known head of every query, modulo permutations of hidden units.

    Args:
        spec: the heads' specification.
        queries: (M, P).
        known: (n, P).
        leave_out: for each query the index of a known head that does not count, such as the query itself.

    Returns:
        indices into `known`, and distances.
    """
    table = aligned_distances(spec, queries, known)  # (M, n)
    if leave_out is not None:
        table[torch.arange(len(queries)), torch.tensor(leave_out)] = float("inf")
    distances, indices = table.min(1)
    return Nearest(indices, distances)
