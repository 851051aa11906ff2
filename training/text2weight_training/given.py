"""Given heads to train on: what partly trained heads look like, made from heads that are at hand.

For a denoiser that reads the head it is to improve (`denoiser.reads_given`). Training every one of them a little would
cost more than the fit. A partly trained head has gone some of the way from a start to where it will end, and is off
that way by the noise of its few samples; so a given head is

    start + a (clean - start) + s e

with the start the zoo's universal or base head, clean the zoo item's head or a fresh item's own first estimate,
a and s uniform in 0..1 and e standard normal in the sampler's space. Letters: B items, P numbers in one head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from text2weight.condition import GivenHeads


@dataclass(frozen=True)
class GivenDraws:
    """What is random in the given heads of B items.

    Attributes:
        present: (B,) bool, the items that are given a head.
        start: (B,) index into the starts.
        progress: (B, 1) a.
        noise: (B, P) s e.
    """

    present: Tensor
    start: Tensor
    progress: Tensor
    noise: Tensor

    def to(self, device: torch.device) -> GivenDraws:
        """Copy to a device."""
        return GivenDraws(*(part.to(device) for part in (self.present, self.start, self.progress, self.noise)))


def draw_given(items: int, size: int, starts: int, share: float, generator: torch.Generator) -> GivenDraws:
    """Draw for B = `items` heads of P = `size` numbers, of which `share` are given.

    Args:
        items: B.
        size: P.
        starts: number of starts to choose from.
        share: 0..1.
        generator: a CPU generator.
    """
    present = torch.rand(items, generator=generator) < share  # (B,)
    start = torch.randint(starts, (items,), generator=generator)  # (B,)
    progress, level = torch.rand(2, items, 1, generator=generator)  # (B, 1) each
    return GivenDraws(present, start, progress, level * torch.randn(items, size, generator=generator))


def partly_trained(draws: GivenDraws, starts: Tensor, clean: Tensor) -> GivenHeads:
    """Given heads on the way from starts (S, P) to clean heads (B, P), all in the sampler's space."""
    return GivenHeads(torch.lerp(starts[draws.start], clean, draws.progress) + draws.noise, draws.present)
