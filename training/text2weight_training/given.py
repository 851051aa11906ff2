"""Given heads to train on: what partly trained heads look like, made from heads that are at hand.

For a denoiser that reads the head it is to improve (`denoiser.reads_given`). A partly trained head has gone some of the
way from a start to where it will end, and is off that way by the noise of its few samples; so a given head is

    start + a (clean - start) + s e

with the start the zoo's universal or base head, clean the trained head of a zoo item, a and s uniform in 0..1 and e
standard normal in the sampler's space. Fresh items have no trained head, and one on the way to the denoiser's own
estimate would tell it nothing that the text does not: they are given none. Letters: B items, z of the zoo before fresh
ones, P numbers in one head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from text2weight.condition import GivenHeads


@dataclass(frozen=True)
class GivenDraws:
    """What is random in the given heads of z zoo items.

    Attributes:
        present: (z,) bool, the items that are given a head.
        start: (z,) index into the starts.
        progress: (z, 1) a.
        noise: (z, P) s e.
    """

    present: Tensor
    start: Tensor
    progress: Tensor
    noise: Tensor

    def to(self, device: torch.device) -> GivenDraws:
        """Copy to a device."""
        return GivenDraws(*(part.to(device) for part in (self.present, self.start, self.progress, self.noise)))


def draw_given(items: int, size: int, starts: int, share: float, generator: torch.Generator) -> GivenDraws:
    """Draw for z = `items` heads of P = `size` numbers, of which `share` are given.

    Args:
        items: z.
        size: P.
        starts: number of starts to choose from.
        share: 0..1.
        generator: a CPU generator.
    """
    present = torch.rand(items, generator=generator) < share  # (z,)
    start = torch.randint(starts, (items,), generator=generator)  # (z,)
    progress, level = torch.rand(2, items, 1, generator=generator)  # (z, 1) each
    return GivenDraws(present, start, progress, level * torch.randn(items, size, generator=generator))


def partly_trained(draws: GivenDraws, starts: Tensor, clean: Tensor, fresh: int) -> GivenHeads:
    """Given heads on the way from starts (S, P) to trained heads (z, P), all in the sampler's space.

    Returns:
        B = z + `fresh` items, of which the fresh ones have none.
    """
    weights = torch.lerp(starts[draws.start], clean, draws.progress) + draws.noise  # (z, P)
    return GivenHeads(F.pad(weights, (0, 0, 0, fresh)), F.pad(draws.present, (0, fresh)))
