"""Classes that do not exist, between two that do, so that the denoiser meets names it has never seen.

Mixup (arXiv 1710.09412) of whole classes: a mixed class has the text a e_i + (1 - a) e_j, brought back to length 1, and
its features are a f_i + (1 - a) f_j of features drawn from both, a uniform in 1/2..1. A denoiser that only ever meets
its training classes learns their names by heart, and for others writes worse heads than the universal one.
Letters: B tasks, K classes of a task (padded), n samples per task, C classes in all, D embedding size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from text2weight_training.tasks import PADDING, ClassFeatures, HeldOut

MIXED_CLASSES = 0.5  # share of the classes of a mixed task that are mixed


@dataclass(frozen=True)
class ClassMixing:
    """Which classes of B tasks are mixed with which others.

    Attributes:
        partners: (B, K) class labels.
        shares: (B, K) of the class's own text and features, 1/2..1; 1 where it is not mixed.
    """

    partners: Tensor
    shares: Tensor

    @property
    def mixed_tasks(self) -> Tensor:
        """(B,) bool, the tasks with a mixed class."""
        return (self.shares < 1).any(1)

    def mix_text(self, embeddings: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        """Text of the tasks' classes (B, K, D), (B, K) from all classes' embeddings (C, D): (B, K, D)."""
        shares = self.shares.unsqueeze(-1)  # (B, K, 1)
        mixed = F.normalize(shares * text + (1 - shares) * embeddings[self.partners], dim=-1)  # (B, K, D)
        return torch.where(shares < 1, mixed, text) * mask.unsqueeze(-1)

    def mix_features(
        self, drawn: Tensor, targets: Tensor, features: ClassFeatures, generator: torch.Generator
    ) -> Tensor:
        """Samples (B, n, d) of the classes at `targets` (B, n), mixed with samples of their partners: (B, n, d)."""
        shares = self.shares.gather(1, targets).unsqueeze(-1).to(drawn)  # (B, n, 1)
        rows = features.draw_rows(self.partners.gather(1, targets), generator)  # (B, n)
        return torch.where(shares < 1, shares * drawn + (1 - shares) * features.features[rows], drawn)


def draw_class_mixing(
    tasks: Tensor, fresh: Tensor, num_classes: int, held_out: HeldOut, share: float, generator: torch.Generator
) -> ClassMixing:
    """Choose the classes of tasks (B, K) that are mixed, and their partners among the training classes.

    Args:
        tasks: class labels, padded with -1.
        fresh: (B,) bool; the other tasks have heads, trained on their classes as they are, and stay so.
        num_classes: C.
        held_out: no partner is a held-out class, and none completes a held-out pair in its task.
        share: of the fresh tasks that have mixed classes.
        generator: a CPU generator.
    """
    pool = torch.tensor(held_out.training_classes(num_classes))
    size = tuple(tasks.shape)
    draws = torch.rand(3, *size, generator=generator).to(tasks.device)  # (3, B, K)
    partners = pool.to(tasks.device)[(draws[0] * len(pool)).long()]  # (B, K)
    mixed = (draws[1] < MIXED_CLASSES) & (tasks != PADDING)  # (B, K)
    mixed &= ((torch.rand(len(tasks), generator=generator) < share).to(tasks.device) & fresh).unsqueeze(1)
    if held_out.pairs:
        barred = torch.zeros(num_classes, num_classes, dtype=torch.bool, device=tasks.device)
        one, other = torch.tensor(held_out.pairs, device=tasks.device).T
        barred[one, other] = barred[other, one] = True
        present = torch.cat([tasks.clamp(min=0), partners], dim=1)  # (B, 2 K)
        mixed &= ~barred[partners.unsqueeze(-1), present.unsqueeze(1)].any(-1)
    return ClassMixing(partners, torch.where(mixed, 0.5 + 0.5 * draws[2], torch.ones_like(draws[2])))
