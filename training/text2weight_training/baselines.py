"""What a generated head is compared with: heads that need no denoiser, and the oracle that needs the data.

Letters: M tasks, n zoo heads, P numbers in one head, D embedding size, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import Ridge
from torch import Tensor

from text2weight.condition import prior_attention
from text2weight.head import HeadSpec
from text2weight_training.stacked import HeadRecipe, heads_accuracy, train_stack
from text2weight_training.tasks import TaskData, pad_tasks, task_embeddings
from text2weight_training.zoo import Zoo

RIDGE_STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
Tasks = Sequence[tuple[int, ...]]


def pooled_text(data: TaskData, tasks: Tasks) -> Tensor:
    """Centred prior-attention vector of every task, (M, D)."""
    embeddings, mask = task_embeddings(data.embeddings, pad_tasks(tasks))
    return prior_attention(embeddings, mask) - data.embeddings.mean(0)


def class_indicators(data: TaskData, tasks: Tasks) -> Tensor:
    """One number per class, 1 where the task has it, (M, C)."""
    indicators = torch.zeros(len(tasks), len(data.classes))
    for row, task in enumerate(tasks):
        indicators[row, list(task)] = 1
    return indicators


def nearest_heads(data: TaskData, zoo: Zoo, tasks: Tasks) -> Tensor:
    """For every task the zoo head whose pooled text is closest by cosine, (M, P)."""
    here = F.normalize(pooled_text(data, tasks), dim=-1)  # (M, D)
    there = F.normalize(pooled_text(data, zoo.split.seen), dim=-1)  # (n, D)
    return zoo.weights[(here @ there.T).argmax(1)]


def ridge_heads(inputs: Tensor, zoo: Zoo, queries: Tensor) -> Tensor:
    """Linear hypernetwork: ridge regression from a task's description to its head's weights.

    The strength is the one with the least error on a tenth of the zoo.

    Args:
        inputs: (n, D') descriptions of the zoo's tasks.
        zoo: the heads.
        queries: (M, D') descriptions of other tasks.

    Returns:
        (M, P).
    """
    scale = inputs.std().clamp(min=1e-8)
    known, asked = (inputs / scale).numpy(), (queries / scale).numpy()
    deviations = (zoo.weights - zoo.universal).numpy()  # (n, P)
    held_out = max(1, len(known) // 10)

    def error(strength: float) -> float:
        fitted = Ridge(alpha=strength).fit(known[held_out:], deviations[held_out:])
        return float(np.square(fitted.predict(known[:held_out]) - deviations[:held_out]).mean())

    best = min(RIDGE_STRENGTHS, key=error)
    predicted = Ridge(alpha=best).fit(known, deviations).predict(asked)  # (M, P)
    return zoo.universal + torch.from_numpy(predicted).float()


def oracle_heads(
    data: TaskData,
    zoo: Zoo,
    tasks: list[tuple[int, ...]],
    spec: HeadSpec,
    logit_scale: float,
    recipe: HeadRecipe,
    stack: int,
    seed: int,
    on_stack: Callable[[int], None],
) -> dict[str, Tensor]:
    """Heads trained on each task's own data, from two starts: {"base": (M, P), "universal": (M, P)}.

    `on_stack` is called with the number of heads each finished stack adds.
    """
    trained: dict[str, list[Tensor]] = {"base": [], "universal": []}
    for start in range(0, len(tasks), stack):
        part = tasks[start : start + stack]
        for name, head in (("base", zoo.base), ("universal", zoo.universal)):
            trained[name].append(
                train_stack(spec, head, part, data.train, data.embeddings, logit_scale, recipe, seed + start)
            )
            on_stack(len(part))
    return {name: torch.cat(parts).cpu() for name, parts in trained.items()}


def accuracies(data: TaskData, spec: HeadSpec, tasks: Tasks, heads: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """Accuracy of every method on every task's test features.

    Args:
        data: features and embeddings.
        spec: the heads' specification.
        tasks: M class lists.
        heads: per method (P,) for one head for all tasks, or (M, P).

    Returns:
        per method (M,), 0..1.
    """
    names = list(heads)
    rows = []
    for i, task in enumerate(tasks):
        stack = torch.stack([head if head.ndim == 1 else head[i] for head in heads.values()])  # (J, P)
        rows.append(heads_accuracy(spec, stack, task, data.test, data.embeddings).numpy())
    return dict(zip(names, np.stack(rows, axis=1), strict=True))
