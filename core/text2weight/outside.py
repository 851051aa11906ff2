"""Class names that training never saw: what the denoiser reads in their place, and how far its answer is trusted.

A denoiser learns what a few hundred names look like; what any other text means for a head it has not learnt. So it
reads such a name as a mixture of those it knows, and the head stops on the way from the weight space's anchor, the
universal head, to what the denoiser answers. docs/method.md says why, docs/results.md what it gains.

Letters: K classes of a task, C classes of training, D embedding size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from text2weight.text_encoder import Vocabulary


class OutsideSettings(BaseModel):
    """How names outside of training are treated.

    Attributes:
        reach: 0..1, how far a head for such names alone goes from the anchor, 0, to what the denoiser answers, 1. With
            a share u of such names it goes 1 - u (1 - reach) of the way.
        temperature: of the softmax over cosines that weighs the known names in a mixture; the lower, the more a name
            is read as the closest known one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    reach: float = Field(ge=0, le=1)
    temperature: float = Field(gt=0, le=10)


class OutsideNames:
    """Tells names that training never saw from the others, and treats them by the settings. Immutable."""

    def __init__(self, settings: OutsideSettings, names: Sequence[str], embeddings: Tensor) -> None:
        """Remember what training saw.

        Args:
            settings: how the others are treated.
            names: C class names.
            embeddings: (C, D) what the denoiser read for them.
        """
        self._settings = settings
        self._known = Vocabulary((), tuple(names))
        self._embeddings = embeddings

    def among(self, classes: Sequence[str]) -> list[str]:
        """The names that training never saw. Letter case does not count, and the first of several synonyms will do."""
        return [name for name in classes if name not in self._known]

    def reach(self, classes: Sequence[str]) -> float:
        """How far the head of a task goes from the anchor to what the denoiser answers; 1 for known names alone."""
        share = len(self.among(classes)) / len(classes)
        return 1 - share * (1 - self._settings.reach)

    def read(self, classes: Sequence[str], rows: Tensor) -> Tensor:
        """What the denoiser reads, (K, D), from the embeddings (K, D) of K names; rows of known names stay."""
        outside = set(self.among(classes))
        if not outside:
            return rows
        chosen = torch.tensor([name in outside for name in classes])[:, None]  # (K, 1)
        return torch.where(chosen, mix_known(self._embeddings, rows, self._settings.temperature), rows)


def mix_known(known: Tensor, rows: Tensor, temperature: float) -> Tensor:
    """Mixtures of known embeddings (C, D) in place of other ones (n, D): (n, D), each of length 1.

    Weights are the softmax of cosine / temperature, the cosine taken from the known ones' mean: text embeddings all
    point much the same way, and what they share says nothing.
    """
    center = known.mean(0)  # (D,)
    cosines = F.normalize(rows - center, dim=-1) @ F.normalize(known - center, dim=-1).T  # (n, C)
    return F.normalize((cosines / temperature).softmax(-1) @ known, dim=-1)
