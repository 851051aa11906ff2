"""Notices that a training run's losses break, or explode: finite still, but past anything that learning does to them.

The fit has a `LossWatch` of its own. The trainings of heads and of the teacher have a `StepWatch`, which reads losses
many steps at a time.

Letters: w losses remembered.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from statistics import median

import torch
from torch import Tensor

from text2weight_training.files import TrainingDataError

# How far above the median of the steps before a loss may lie. In sound fits with and without warm-up, noise as the
# target, a teacher, mixed classes and a strong adversary it was at most 2.4 times; what diverges passes ten times
# within a few steps, as the diffusion loss grows with the square of the output. Until the window is full it may be the
# square of that: a network that starts at the mean head can be 7 times off it in its first steps.
EXPLODED = 10.0
# Steps the median is taken over: enough to even out batches, few enough to follow a loss that falls.
WINDOW = 50
# Steps whose losses a `StepWatch` reads together: on a GPU, reading one waits for its step.
READ_TOGETHER = 50


class DivergedError(TrainingDataError):
    """A training whose losses are no longer sound."""


class LossWatch:
    """The last w losses, and whether another one is of their kind."""

    def __init__(self, losses: Iterable[float] = (), least: float = 0.0) -> None:
        """Go on from `losses`, the oldest first.

        Args:
            losses: of the steps before.
            least: stands in for a median below it: losses that fall to nearly nothing lie far above theirs at times.
        """
        self._recent = deque(losses, maxlen=WINDOW)
        self._least = least

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
        if loss > allowed * max(usual, self._least):
            return f"the loss exploded from a median of {usual:.4g} to {loss:.4g}"
        return None

    def add(self, loss: float) -> None:
        """Remember the loss of a step."""
        self._recent.append(loss)


class StepWatch:
    """Stops a training run whose losses, read many steps at a time, are no longer sound."""

    def __init__(self, what: str, advice: str, guess: float) -> None:
        """Watch a run from its first step.

        Args:
            what: is trained, for the error.
            advice: likewise, what to do.
            guess: the loss of guessing; up to ten times that, nothing has exploded.
        """
        self._what, self._advice = what, advice
        self._watch = LossWatch(least=guess)
        self._read = 0
        self._unread: list[Tensor] = []

    def add(self, loss: Tensor) -> None:
        """Take a step's loss, and judge all that are unread where there are enough of them.

        Raises:
            DivergedError: as `check`.
        """
        self._unread.append(loss.detach())
        if len(self._unread) == READ_TOGETHER:
            self.check()

    def check(self) -> None:
        """Judge the losses that are unread.

        Raises:
            DivergedError: one of them is not finite or exploded; names its step, the first being 1.
        """
        if not self._unread:
            return
        losses = torch.stack(self._unread).tolist()
        self._unread.clear()
        for loss in losses:
            self._read += 1
            if complaint := self._watch.complaint(loss):
                raise self.diverged(complaint)
            self._watch.add(loss)

    def check_weights(self, weights: Tensor) -> None:
        """Judge the losses that are unread, and the weights that the last step left.

        Raises:
            DivergedError: as `check`, or the weights are not finite.
        """
        self.check()
        if not bool(torch.isfinite(weights).all()):
            raise self.diverged("the weights are not finite")

    def diverged(self, complaint: str) -> DivergedError:
        """The error for what is wrong at the step that was read last."""
        return DivergedError(f"{self._what} diverged at step {self._read} ({complaint}): {self._advice}")
