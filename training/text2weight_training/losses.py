"""The denoiser's losses L_diff, L_task and L_sym.

L_adv is in `adversary.py`; docs/method.md has all formulas on one page.
Letters: B items, K classes of a task (padded), n samples per task, P numbers in one head, d feature size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from text2weight.condition import Condition, condition_on_classes
from text2weight.diffusion import NoiseSchedule, Prediction
from text2weight.head import HeadSpec
from text2weight.weight_space import WeightSpace
from text2weight_training.class_mixing import ClassMixing
from text2weight_training.stacked import drop_features, smoothed_cross_entropy, stacked_logits
from text2weight_training.symmetry import equivariance_loss, permute_each
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
        answers: (B, n, K) a teacher's logits for the samples, -inf at padding; None without a teacher.
        taught: (B,) bool, the tasks that the teacher knows the classes of; None without a teacher.
    """

    condition: Condition
    text: Tensor
    mask: Tensor
    features: Tensor
    targets: Tensor
    answers: Tensor | None = None
    taught: Tensor | None = None

    def select(self, index: Tensor) -> TaskBatch:
        """The items at `index` (b,)."""
        return TaskBatch(
            self.condition.select(index),
            self.text[index],
            self.mask[index],
            self.features[index],
            self.targets[index],
            None if self.answers is None else self.answers[index],
            None if self.taught is None else self.taught[index],
        )

    def drop_condition(self, dropped: Tensor) -> TaskBatch:
        """Hide the text from the denoiser where `dropped` (B,) bool is True; the losses still know the task."""
        return replace(self, condition=self.condition.drop(dropped))


def make_task_batch(
    tasks: Tensor,
    embeddings: Tensor,
    condition_embeddings: Tensor,
    features: ClassFeatures,
    samples: int,
    generator: torch.Generator,
    feature_dropout: float = 0.0,
    answers: Tensor | None = None,
    mixing: ClassMixing | None = None,
) -> TaskBatch:
    """Gather what tasks (B, K) are scored against and conditioned on, both (C, D), and draw feature samples.

    `feature_dropout` is the share of the samples' numbers that are dropped; `answers` (N, C) are a teacher's logits
    for all features; `mixing` puts classes between others in the place of some.
    """
    text, mask = task_embeddings(embeddings, tasks)
    read, _ = task_embeddings(condition_embeddings, tasks)
    rows, targets = features.draw(tasks, samples, generator)  # (B, n)
    drawn = features.features[rows]  # (B, n, d)
    if mixing is not None:
        text, read = mixing.mix_text(embeddings, text, mask), mixing.mix_text(condition_embeddings, read, mask)
        drawn = mixing.mix_features(drawn, targets, features, generator)
    if feature_dropout:
        drop_features(drawn, feature_dropout, generator)
    own = taught = None
    if answers is not None:
        columns = tasks.clamp(min=0).unsqueeze(1).expand(-1, samples, -1)  # (B, n, K)
        own = answers[rows.unsqueeze(-1), columns].float().masked_fill(~mask.unsqueeze(1), float("-inf"))
        everyone = torch.ones(len(tasks), dtype=torch.bool, device=tasks.device)
        taught = everyone if mixing is None else ~mixing.mixed_tasks
    return TaskBatch(condition_on_classes(read, mask), text, mask, drawn, targets, own, taught)


def distillation(logits: Tensor, answers: Tensor, mask: Tensor) -> Tensor:
    """Mean cross-entropy of each task's logits (B, n, K) against a teacher's softmax over its own (B, n, K): (B,).

    Both are -inf where the mask (B, K) is False.
    """
    likelihood = logits.log_softmax(-1).masked_fill(~mask.unsqueeze(1), 0)  # (B, n, K)
    return -(answers.softmax(-1) * likelihood).sum(-1).mean(-1)


@dataclass(frozen=True)
class Denoised:
    """What one denoiser call was given and made of it.

    Attributes:
        noisy: (B, P) x_n.
        timesteps: (B,) n.
        condition: B items.
        output: (B, P) the network's output.
        estimate: (B, P) its estimate of x_0.
    """

    noisy: Tensor
    timesteps: Tensor
    condition: Condition
    output: Tensor
    estimate: Tensor


@dataclass(frozen=True)
class DenoisingLosses:
    """Evaluates a denoiser's losses; holds what does not change during a fit."""

    spec: HeadSpec
    space: WeightSpace
    schedule: NoiseSchedule
    prediction: Prediction
    logit_scale: float
    label_smoothing: float = 0.0
    teacher_share: float = 0.0

    def task(self, clean: Tensor, batch: TaskBatch) -> Tensor:
        """L_task: cross-entropy of the heads decoded from estimates of x_0 (B, P), on real features.

        Against the labels, and, for `teacher_share` of it, against a teacher's softmax over the task's classes where
        it knows them.
        """
        weights = self.space.restore(clean)  # (B, P)
        logits = stacked_logits(
            self.spec, weights, batch.features, batch.text, self.logit_scale, batch.mask
        )  # (B, n, K)
        loss = smoothed_cross_entropy(logits, batch.targets, batch.mask, self.label_smoothing)  # (B,)
        if batch.answers is not None and batch.taught is not None:
            share = self.teacher_share * batch.taught  # (B,)
            loss = (1 - share) * loss + share * distillation(logits, batch.answers, batch.mask)
        return loss.mean()

    def denoise(
        self, denoiser: nn.Module, clean: Tensor, timesteps: Tensor, noise: Tensor, condition: Condition
    ) -> Denoised:
        """Noise clean weights (B, P) to timesteps (B,), 1..N, by noise (B, P), and run the denoiser on them."""
        noisy = self.schedule.add_noise(clean, timesteps, noise)  # (B, P)
        output, estimate = self.schedule.run_denoiser(denoiser, self.prediction, noisy, timesteps, condition)
        return Denoised(noisy, timesteps, condition, output, estimate)

    def diffusion(self, denoised: Denoised, clean: Tensor, noise: Tensor, only: Tensor) -> Tensor:
        """L_diff: mean squared error of the network's output over the items where `only` (B,) is True.

        Those are the items whose clean weights (B, P) are real heads.
        """
        target = self.schedule.target(self.prediction, clean, denoised.timesteps, noise)  # (B, P)
        return F.mse_loss(denoised.output[only], target[only])

    def symmetry(self, denoiser: nn.Module, denoised: Denoised, orders: Tensor) -> Tensor:
        """L_sym of the first b items, permuted by orders (b, h); one more call of the denoiser."""
        count = len(orders)
        noisy = permute_each(self.spec, denoised.noisy[:count], orders)  # (b, P)
        first = torch.arange(count, device=noisy.device)
        output, _ = self.schedule.run_denoiser(
            denoiser, self.prediction, noisy, denoised.timesteps[:count], denoised.condition.select(first)
        )  # (b, P)
        return equivariance_loss(self.spec, denoised.output[:count], output, orders)
