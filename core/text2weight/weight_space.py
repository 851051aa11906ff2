"""The space the sampler works in: standardised deviations from an anchor head.

Heads trained from a common start differ by about 0.01 RMS, far below the noise of any schedule.
Left unscaled, every sampler collapses to the conditional mean; so x = (weights - anchor - offset) / scale.
The T2W paper's scaling (arXiv 2508.13633) is the same map with other numbers: min-max of the raw heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Literal

import torch
from torch import Tensor

from text2weight.head import HeadSpec

Scaling = Literal["standardise", "min_max"]


@dataclass(frozen=True)
class WeightSpace:
    """An affine map between flat weights and the sampler's variable.

    Attributes:
        anchor: (P,) the shared head that deviations are measured from; also names the hidden units.
        offset: (P,) mean deviation of the zoo's heads; with min-max scaling, the middle of the block's range
            minus the anchor.
        scale: (P,) standard deviation, or half the block's range; equal within each tensor of the head.
    """

    anchor: Tensor
    offset: Tensor
    scale: Tensor

    @staticmethod
    def fit(spec: HeadSpec, anchor: Tensor, weights: Tensor, scaling: Scaling = "standardise") -> WeightSpace:
        """Measure offset and scale on a zoo's heads.

        The scale is shared within each tensor of the head (a block), so that the noise stays isotropic there
        and the order of hidden units carries no information.

        Args:
            spec: the heads' specification.
            anchor: (P,).
            weights: (n, P) heads of the seen tasks.
            scaling: "standardise" gives deviations from the zoo's mean head unit variance in each block;
                "min_max" maps each block's raw range, least to greatest number, onto [-1, 1].
        """
        if scaling == "min_max":
            return WeightSpace(anchor, *_min_max(spec, anchor, weights))
        deviation = weights - anchor  # (n, P)
        offset = deviation.mean(0)  # (P,)
        variance = (deviation - offset).square().mean(0)  # (P,)
        sizes = [prod(shape) for shape in spec.shapes.values()]
        blocks = [block.mean().sqrt().clamp(min=1e-8).expand(len(block)) for block in torch.split(variance, sizes)]
        return WeightSpace(anchor, offset, torch.cat(blocks))

    def standardise(self, weights: Tensor) -> Tensor:
        """Flat weights (B, P) -> the sampler's variable (B, P)."""
        return (weights - self.anchor - self.offset) / self.scale

    def restore(self, standardised: Tensor, reach: float = 1.0) -> Tensor:
        """The sampler's variable (..., P) -> flat weights (..., P).

        Args:
            standardised: (..., P).
            reach: 0..1, how far on the straight line from the anchor to those weights to go. A straight line is one
                under any scaling, as the map is affine.
        """
        if reach == 1:
            return self.anchor + self.offset + self.scale * standardised
        return self.anchor + reach * (self.offset + self.scale * standardised)

    def to(self, device: torch.device | str) -> WeightSpace:
        """Copy to a device."""
        return WeightSpace(self.anchor.to(device), self.offset.to(device), self.scale.to(device))

    def tensors(self) -> dict[str, Tensor]:
        """Named tensors for a checkpoint."""
        return {"anchor": self.anchor, "offset": self.offset, "scale": self.scale}


def _min_max(spec: HeadSpec, anchor: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Offset and scale, both (P,), that map each block of heads (n, P) onto [-1, 1]; a constant block onto 0."""
    middles, halves = [], []
    sizes = [prod(shape) for shape in spec.shapes.values()]
    for block, start in zip(torch.split(weights, sizes, dim=-1), torch.split(anchor, sizes), strict=True):
        least, greatest = block.min(), block.max()
        # Below this the rounding of weights - anchor would fill the range.
        floor = (1e-6 * torch.maximum(block.abs().max(), start.abs().max())).clamp(min=1e-8)
        middles.append(((least + greatest) / 2).expand(block.shape[-1]))
        halves.append(((greatest - least) / 2).clamp(min=floor).expand(block.shape[-1]))
    return torch.cat(middles) - anchor, torch.cat(halves)
