"""The classifier head: its specification, one head as a module, and many heads at once.

Letters: M heads, N features per head, K classes, d input size, h hidden units, o output size,
P numbers in one head.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, PositiveInt
from torch import Tensor, nn


class HeadSpec(BaseModel):
    """A network with one hidden layer, as DESIGN's head: features -> W1, b1 -> activation -> W2, b2.

    The defaults are the T2W paper's Listing 1 (16,912 numbers, arXiv 2508.13633); its equation 15 is
    `HeadSpec(bias=False, activation="none")` (16,384 numbers).

    Attributes:
        input_dim: d, size of a backbone feature.
        hidden_dim: h, number of hidden units.
        output_dim: o, size of a text embedding for cosine logits, number of classes for plain ones.
        bias: whether both layers have a bias.
        activation: between the layers; "gelu" is the exact (erf) form.
        logits: "cosine" scores outputs against class embeddings, "plain" uses the outputs themselves.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    input_dim: PositiveInt = 512
    hidden_dim: PositiveInt = 16
    output_dim: PositiveInt = 512
    bias: bool = True
    activation: Literal["gelu", "none"] = "gelu"
    logits: Literal["cosine", "plain"] = "cosine"

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor names and shapes, in the order in which they stand in a flat vector."""
        weights: dict[str, tuple[int, ...]] = {"linear1.weight": (self.hidden_dim, self.input_dim)}
        if self.bias:
            weights["linear1.bias"] = (self.hidden_dim,)
        weights["linear2.weight"] = (self.output_dim, self.hidden_dim)
        if self.bias:
            weights["linear2.bias"] = (self.output_dim,)
        return weights

    @property
    def num_parameters(self) -> int:
        """P, the length of a flat vector."""
        return sum(prod(shape) for shape in self.shapes.values())

    def flatten(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Concatenate named tensors, each with equal leading dimensions, into (..., P).

        Raises:
            KeyError: a tensor of the spec is missing.
        """
        blocks = [tensors[name].flatten(-len(shape)) for name, shape in self.shapes.items()]
        return torch.cat(blocks, dim=-1)  # (..., P)

    def unflatten(self, flat: Tensor) -> dict[str, Tensor]:
        """Cut a flat vector (..., P) into named tensors (..., *shape); views, not copies."""
        sizes = [prod(shape) for shape in self.shapes.values()]
        blocks = torch.split(flat, sizes, dim=-1)
        return {
            name: block.unflatten(-1, shape) for (name, shape), block in zip(self.shapes.items(), blocks, strict=True)
        }


class AdapterHead(nn.Module):
    """One head as a module whose state dict has the artifact's tensor names."""

    def __init__(self, spec: HeadSpec) -> None:
        super().__init__()
        self.linear1 = nn.Linear(spec.input_dim, spec.hidden_dim, bias=spec.bias)
        self.activation = nn.GELU() if spec.activation == "gelu" else nn.Identity()
        self.linear2 = nn.Linear(spec.hidden_dim, spec.output_dim, bias=spec.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Map features (N, d) to outputs (N, o)."""
        outputs: Tensor = self.linear2(self.activation(self.linear1(features)))  # (N, o)
        return outputs


def apply_heads(spec: HeadSpec, flat: Tensor, features: Tensor) -> Tensor:
    """Run M heads at once, each on its own features.

    Args:
        spec: the heads' common specification.
        flat: (M, P) weights.
        features: (M, N, d), or (N, d) shared by all heads.

    Returns:
        (M, N, o).
    """
    weights = spec.unflatten(flat)
    hidden = features @ weights["linear1.weight"].transpose(-1, -2)  # (M, N, h)
    if spec.bias:
        hidden = hidden + weights["linear1.bias"].unsqueeze(-2)
    if spec.activation == "gelu":
        hidden = F.gelu(hidden)
    outputs = hidden @ weights["linear2.weight"].transpose(-1, -2)  # (M, N, o)
    if spec.bias:
        outputs = outputs + weights["linear2.bias"].unsqueeze(-2)
    return outputs


def class_logits(
    outputs: Tensor, class_embeddings: Tensor, logit_scale: float, class_mask: Tensor | None = None
) -> Tensor:
    """Score outputs against class embeddings: s * cos(output, e_i).

    Args:
        outputs: (M, N, o).
        class_embeddings: (M, K, o) or (K, o), L2-normalised.
        logit_scale: s.
        class_mask: (M, K) bool; False marks padding, whose logits become -inf.

    Returns:
        (M, N, K).
    """
    logits = logit_scale * F.normalize(outputs, dim=-1) @ class_embeddings.transpose(-1, -2)  # (M, N, K)
    if class_mask is not None:
        logits = logits.masked_fill(~class_mask.unsqueeze(-2), float("-inf"))
    return logits
