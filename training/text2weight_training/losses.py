"""The losses of the denoiser.

Letters: B items, K classes of a task (padded), n samples per task, P numbers in one head, d feature size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from text2weight.condition import Condition, condition_on_classes
from text2weight.diffusion import NoiseSchedule, Prediction
from text2weight.head import HeadSpec
from text2weight.weight_space import WeightSpace
from text2weight_training.stacked import stacked_logits
from text2weight_training.tasks import ClassFeatures, task_embeddings


@dataclass(frozen=True)
class TaskBatch:
    """Tasks with what their losses need.

    Attributes:
        condition: B conditions.
        text: (B, K, D) class embeddings, zero at padding.
        mask: (B, K) bool.
        features: (B, n, d) samples of the tasks' classes.
        targets: (B, n) their class, as a position within the task.
    """

    condition: Condition
    text: Tensor
    mask: Tensor
    features: Tensor
    targets: Tensor

    def select(self, index: Tensor) -> TaskBatch:
        """The items at `index` (b,)."""
        return TaskBatch(
            self.condition.select(index), self.text[index], self.mask[index], self.features[index], self.targets[index]
        )


def make_task_batch(
    tasks: Tensor,
    embeddings: Tensor,
    features: ClassFeatures,
    samples: int,
    generator: torch.Generator,
) -> TaskBatch:
    """Gather embeddings (C, D) and draw feature samples for tasks (B, K)."""
    text, mask = task_embeddings(embeddings, tasks)
    drawn, targets = features.sample(tasks, samples, generator)  # (B, n, d), (B, n)
    return TaskBatch(condition_on_classes(text, mask), text, mask, drawn, targets)


@dataclass(frozen=True)
class DenoisingLosses:
    """Evaluates a denoiser's losses; holds what does not change during a fit."""

    spec: HeadSpec
    space: WeightSpace
    schedule: NoiseSchedule
    prediction: Prediction
    logit_scale: float

    def task(self, clean: Tensor, batch: TaskBatch) -> Tensor:
        """L_task: cross-entropy of the heads decoded from estimates of x_0 (B, P), on real features."""
        weights = self.space.restore(clean)  # (B, P)
        logits = stacked_logits(
            self.spec, weights, batch.features, batch.text, self.logit_scale, batch.mask
        )  # (B, n, K)
        return F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())

    def denoise(
        self, denoiser: nn.Module, clean: Tensor, timesteps: Tensor, noise: Tensor, condition: Condition, only: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Noise clean weights (B, P) to timesteps (B,) and run the denoiser on them.

        Args:
            denoiser: the network.
            clean: (B, P).
            timesteps: (B,) in 1..N.
            noise: (B, P) standard normal.
            condition: B items.
            only: (B,) bool, items whose clean weights are real heads and count in the diffusion loss.

        Returns:
            the diffusion loss (L_diff, mean squared error of the network's output), and the estimate of x_0 (B, P).
        """
        noisy = self.schedule.add_noise(clean, timesteps, noise)  # (B, P)
        output, estimate = self.schedule.run_denoiser(denoiser, self.prediction, noisy, timesteps, condition)
        target = self.schedule.target(self.prediction, clean, timesteps, noise)
        return F.mse_loss(output[only], target[only]), estimate
