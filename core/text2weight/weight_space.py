"""The space the sampler works in: standardised deviations from an anchor head.

Heads trained from a common start differ by about 0.01 RMS, far below the noise of any schedule.
Left unscaled, every sampler collapses to the conditional mean; so x = (weights - anchor - offset) / scale.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from text2weight.head import HeadSpec


@dataclass(frozen=True)
class WeightSpace:
    """An affine map between flat weights and the sampler's variable.

    Attributes:
        anchor: (P,) the shared head that deviations are measured from; also names the hidden units.
        offset: (P,) mean deviation of the zoo's heads.
        scale: (P,) standard deviation, equal within each tensor of the head.
    """

    anchor: Tensor
    offset: Tensor
    scale: Tensor

    @staticmethod
    def fit(spec: HeadSpec, anchor: Tensor, weights: Tensor) -> WeightSpace:
        """Measure offset and scale on a zoo's heads.

        The scale is shared within each tensor of the head, so that the noise stays isotropic there
        and the order of hidden units carries no information.

        Args:
            spec: the heads' specification.
            anchor: (P,).
            weights: (n, P) heads of the seen tasks.
        """
        deviation = weights - anchor  # (n, P)
        offset = deviation.mean(0)  # (P,)
        variance = (deviation - offset).square().mean(0)  # (P,)
        sizes = [prod(shape) for shape in spec.shapes.values()]
        blocks = [block.mean().sqrt().clamp(min=1e-8).expand(len(block)) for block in torch.split(variance, sizes)]
        return WeightSpace(anchor, offset, torch.cat(blocks))

    def standardise(self, weights: Tensor) -> Tensor:
        """Flat weights (B, P) -> the sampler's variable (B, P)."""
        return (weights - self.anchor - self.offset) / self.scale

    def restore(self, standardised: Tensor) -> Tensor:
        """The sampler's variable (B, P) -> flat weights (B, P)."""
        return self.anchor + self.offset + self.scale * standardised

    def to(self, device: torch.device | str) -> WeightSpace:
        """Copy to a device."""
        return WeightSpace(self.anchor.to(device), self.offset.to(device), self.scale.to(device))

    def tensors(self) -> dict[str, Tensor]:
        """Named tensors for a checkpoint."""
        return {"anchor": self.anchor, "offset": self.offset, "scale": self.scale}
