"""Flat weights to tokens and back.

Letters: B batch, P numbers in one head, T tokens, h hidden units, d input size, o output size, c chunk size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from text2weight.head import HeadSpec


@dataclass(frozen=True)
class UnitTokens:
    """One token per hidden unit, [W1 row, b1, W2 column], and one for b2.

    A head computes the same function whichever order its hidden units stand in; so does a set of
    such tokens, and a denoiser without token positions inherits the symmetry exactly.
    """

    spec: HeadSpec

    @property
    def unit_dim(self) -> int:
        """Numbers in one unit's token."""
        return self.spec.input_dim + self.spec.output_dim + int(self.spec.bias)

    def split(self, flat: Tensor) -> tuple[Tensor, Tensor | None]:
        """Turn flat weights (B, P) into unit tokens (B, h, unit_dim) and the output bias (B, o) or None."""
        blocks = self.spec.unflatten(flat)
        parts = [blocks["linear1.weight"]]
        if self.spec.bias:
            parts.append(blocks["linear1.bias"].unsqueeze(-1))
        parts.append(blocks["linear2.weight"].transpose(-1, -2))
        return torch.cat(parts, dim=-1), blocks.get("linear2.bias")  # (B, h, unit_dim), (B, o)

    def join(self, units: Tensor, output_bias: Tensor | None) -> Tensor:
        """Undo `split`: unit tokens (B, h, unit_dim) and output bias (B, o) or None -> flat (B, P)."""
        inner = self.spec.input_dim
        blocks = {
            "linear1.weight": units[..., :inner],
            "linear2.weight": units[..., -self.spec.output_dim :].transpose(-1, -2),
        }
        if self.spec.bias:
            assert output_bias is not None
            blocks |= {"linear1.bias": units[..., inner], "linear2.bias": output_bias}
        return self.spec.flatten(blocks)  # (B, P)


@dataclass(frozen=True)
class ChunkTokens:
    """Runs of `size` consecutive numbers of the flat vector; the last is padded with zeros."""

    spec: HeadSpec
    size: int = 576

    @property
    def count(self) -> int:
        """T, the number of chunks."""
        return math.ceil(self.spec.num_parameters / self.size)

    def split(self, flat: Tensor) -> Tensor:
        """Turn flat weights (B, P) into chunks (B, T, c)."""
        padding = self.count * self.size - self.spec.num_parameters
        return F.pad(flat, (0, padding)).reshape(*flat.shape[:-1], self.count, self.size)  # (B, T, c)

    def join(self, chunks: Tensor) -> Tensor:
        """Undo `split`: chunks (B, T, c) -> flat (B, P)."""
        return chunks.flatten(-2)[..., : self.spec.num_parameters]  # (B, P)


def permute_units(spec: HeadSpec, flat: Tensor, order: Tensor) -> Tensor:
    """Reorder the hidden units of flat weights (..., P); the head's function does not change.

    Args:
        spec: the head's specification.
        flat: (..., P).
        order: (h,) a permutation of the units.
    """
    blocks = spec.unflatten(flat)
    blocks["linear1.weight"] = blocks["linear1.weight"][..., order, :]
    blocks["linear2.weight"] = blocks["linear2.weight"][..., order]
    if spec.bias:
        blocks["linear1.bias"] = blocks["linear1.bias"][..., order]
    return spec.flatten(blocks)
