"""Notices that a training run's losses explode: finite still, but past anything that learning does to them.

Letters: w losses remembered.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from statistics import median

from text2weight_training.files import TrainingDataError

# How far above the median of the steps before a loss may lie. In sound fits with and without warm-up, noise as the
# target, a teacher, mixed classes and a strong adversary it was at most 2.4 times; what diverges passes ten times
# within a few steps, as the diffusion loss grows with the square of the output. Until the window is full it may be the
# square of that: a network that starts at the mean head can be 7 times off it in its first steps.
EXPLODED = 10.0
# Steps the median is taken over: enough to even out batches, few enough to follow a loss that falls.
WINDOW = 50


class DivergedError(TrainingDataError):
    """A training whose losses are no longer sound."""


class LossWatch:
    """The last w losses, and whether another one is of their kind."""

    def __init__(self, losses: Iterable[float] = ()) -> None:
        """Go on from `losses`, the oldest first."""
        self._recent = deque(losses, maxlen=WINDOW)

    @property
    def losses(self) -> list[float]:
        """What a resumed run needs."""
        return list(self._recent)

    def complaint(self, loss: float) -> str | None:
        """What is wrong with a loss, in words; None where nothing is. The first loss needs only be finite."""
        if not math.isfinite(loss):
            return "the loss is not finite"
        usual = median(self._recent) if self._recent else loss
        allowed = EXPLODED if len(self._recent) == WINDOW else EXPLODED**2
        if loss > allowed * usual:
            return f"the loss exploded from a median of {usual:.4g} to {loss:.4g}"
        return None

    def add(self, loss: float) -> None:
        """Remember the loss of a step."""
        self._recent.append(loss)
