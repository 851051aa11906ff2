"""What every evaluation suite is given, and the measurements they share.

Letters: M tasks, J heads, N test features of a task, K its classes, P numbers in one head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from text2weight.generator import Generator
from text2weight_training.files import TrainingDataError
from text2weight_training.presets import Preset
from text2weight_training.stacked import HeadRecipe, Moments, OnWeights, stacked_logits, train_in_stacks
from text2weight_training.tasks import TaskData
from text2weight_training.zoo import Zoo

Task = tuple[int, ...]
# Heads whose logits are held at once.
HEADS_AT_ONCE = 128


@dataclass(frozen=True)
class SuiteRun:
    """One checkpoint under measurement.

    Attributes:
        data: features and embeddings, the zoo's own.
        zoo: source of tasks and of heads to compare with.
        generator: the checkpoint.
        preset: its `suites` section holds each suite's settings.
        out: folder that figures are written into.
    """

    data: TaskData
    zoo: Zoo
    generator: Generator
    preset: Preset
    out: Path


Suite = Callable[[SuiteRun], dict[str, Any]]


def take_tasks(tasks: Sequence[Task], count: int, setting: str, kind: str) -> list[Task]:
    """The first `count` tasks.

    Args:
        tasks: the zoo's unseen or seen ones.
        count: how many the suite wants.
        setting: full name of the setting that says so, for the error.
        kind: "unseen" or "seen", likewise.

    Raises:
        TrainingDataError: there are fewer.
    """
    if count > len(tasks):
        raise TrainingDataError(
            f"{setting} is {count}: the zoo has only {len(tasks)} {kind} tasks, lower it or build a larger zoo"
        )
    return list(tasks[:count])


def method_name(sampler: str, steps: int) -> str:
    """How results call generated heads: "SAMPLER/STEPS"."""
    return f"{sampler}/{steps}"


def regularised(preset: Preset, recipe: HeadRecipe) -> HeadRecipe:
    """A recipe with the label smoothing and feature dropout that `suites.accuracy` names."""
    settings = preset.suites.accuracy
    return recipe.model_copy(
        update={"label_smoothing": settings.label_smoothing, "feature_dropout": settings.feature_dropout}
    )


def plain(recipe: HeadRecipe) -> HeadRecipe:
    """A recipe without label smoothing and feature dropout, which some presets' own recipes have."""
    return recipe.model_copy(update={"label_smoothing": 0.0, "feature_dropout": 0.0})


def train_heads(
    run: SuiteRun,
    tasks: list[Task],
    recipe: HeadRecipe,
    seed: int,
    start: Tensor | None = None,
    on_weights: OnWeights | None = None,
    on_stack: Callable[[int], None] | None = None,
    moments: Moments | None = None,
) -> Tensor:
    """Heads trained on tasks' own data, in the preset's stacks.

    Args:
        run: the measurement.
        tasks: M class lists.
        recipe: optimiser settings.
        seed: of the samples drawn.
        start: (P,) or (M, P) initial weights; without them the universal head.
        on_weights: called as by `train_in_stacks`.
        on_stack: likewise.
        moments: likewise, of an earlier training that ended at `start`.

    Returns:
        (M, P).
    """
    data, preset = run.data, run.preset
    return train_in_stacks(
        preset.head,
        run.zoo.universal if start is None else start,
        tasks,
        data.train,
        data.embeddings,
        preset.logit_scale,
        recipe,
        seed,
        preset.zoo.stack,
        on_stack,
        on_weights,
        moments,
    )


@torch.no_grad()
def task_logits(run: SuiteRun, heads: Tensor, task: Task, features: Tensor) -> Tensor:
    """Logits of heads (J, P) on features (N, d) for a task's K classes: (J, N, K)."""
    texts = run.data.embeddings[list(task)]  # (K, D)
    mask = torch.ones(1, len(task), dtype=torch.bool)  # (1, K)
    return stacked_logits(run.preset.head, heads, features, texts, run.preset.logit_scale, mask)


def task_hits(run: SuiteRun, heads: Tensor, task: Task) -> tuple[Tensor, Tensor]:
    """Which test features of a task's classes each head classifies right.

    Args:
        run: the measurement.
        heads: (J, P).
        task: K class labels.

    Returns:
        (J, N) bool and the targets (N,), positions within the task.
    """
    features, targets = run.data.test.of_task(task)  # (N, d), (N,)
    return task_logits(run, heads, task, features).argmax(-1) == targets, targets


def task_accuracy(run: SuiteRun, heads: Tensor, task: Task) -> Tensor:
    """Top-1 accuracy of heads (J, P) on a task's test features: (J,), 0..1."""
    return task_hits(run, heads, task)[0].float().mean(-1)


def own_accuracy(run: SuiteRun, tasks: list[Task], heads: Tensor) -> np.ndarray:
    """Top-1 accuracy of heads (M, P), each on its own task's test features: (M,), 0..1."""
    return np.array([float(task_accuracy(run, head[None], task)) for head, task in zip(heads, tasks, strict=True)])


def training_sample(run: SuiteRun, task: Task, count: int) -> tuple[Tensor, Tensor]:
    """Training features of a task that every head is judged on alike: (count, d) fp32 and targets (count,)."""
    generator = torch.Generator().manual_seed(run.preset.seed)
    features, targets = run.data.train.sample(torch.tensor([task]), count, generator)  # (1, n, d), (1, n)
    return features[0].float(), targets[0]


def task_loss(run: SuiteRun, heads: Tensor, task: Task, features: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of heads (J, P) on features (N, d) of a task with targets (N,): (J,), in nats."""
    losses = []
    for chunk in heads.split(HEADS_AT_ONCE):
        logits = task_logits(run, chunk, task, features)  # (j, N, K)
        expected = targets.expand(len(chunk), -1)  # (j, N)
        losses.append(F.cross_entropy(logits.transpose(1, 2), expected, reduction="none").mean(-1))
    return torch.cat(losses)
