"""What a generated head is compared with: heads that need no denoiser, and the oracle that needs the data.

Letters: M tasks, n zoo heads, P numbers in one head, D embedding size, C classes, K classes of a task,
N features of a task, d feature size, s samples per task.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import Ridge
from torch import Tensor

from text2weight.condition import prior_attention
from text2weight.head import HeadSpec
from text2weight.weight_space import WeightSpace
from text2weight_training.loss_watch import StepWatch
from text2weight_training.presets import Preset
from text2weight_training.splits import draw_fresh_tasks, training_center
from text2weight_training.stacked import (
    HeadRecipe,
    heads_accuracy,
    minimise,
    sampled_loss,
    stacked_logits,
    train_in_stacks,
)
from text2weight_training.tasks import TaskData, TaskSplit, pad_tasks, task_embeddings
from text2weight_training.zoo import Zoo

RIDGE_STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
Tasks = Sequence[tuple[int, ...]]
# A classifier that is no head: (task's labels, features (N, d)) -> scores (N, K).
Predictor = Callable[[tuple[int, ...], Tensor], Tensor]


def pooled_text(data: TaskData, tasks: Tasks, center: Tensor) -> Tensor:
    """Prior-attention vector of every task's condition, (M, D), less a centre (D,) that all of them share."""
    embeddings, mask = task_embeddings(data.condition_embeddings, pad_tasks(tasks))
    return prior_attention(embeddings, mask) - center


def class_indicators(data: TaskData, tasks: Tasks) -> Tensor:
    """One number per class, 1 where the task has it, (M, C)."""
    indicators = torch.zeros(len(tasks), len(data.classes))
    for row, task in enumerate(tasks):
        indicators[row, list(task)] = 1
    return indicators


def text_similarity(data: TaskData, zoo: Zoo, tasks: Tasks) -> Tensor:
    """Cosine between the pooled texts of tasks and of the zoo's tasks, (M, n)."""
    center = training_center(data.condition_embeddings, zoo.split)
    here = F.normalize(pooled_text(data, tasks, center), dim=-1)  # (M, D)
    there = F.normalize(pooled_text(data, zoo.split.seen, center), dim=-1)  # (n, D)
    return here @ there.T


def nearest_heads(data: TaskData, zoo: Zoo, tasks: Tasks) -> Tensor:
    """For every task the zoo head whose pooled text is closest by cosine, (M, P)."""
    return zoo.weights[text_similarity(data, zoo, tasks).argmax(1)]


def overlapping_heads(data: TaskData, zoo: Zoo, tasks: Tasks) -> Tensor:
    """For every task the zoo head with the largest class overlap, shared classes over all classes of both: (M, P).

    A task that shares no class with any zoo task gets the universal head.
    """
    here, there = class_indicators(data, tasks), class_indicators(data, zoo.split.seen)  # (M, C), (n, C)
    shared = here @ there.T  # (M, n)
    overlap = shared / (here.sum(1, keepdim=True) + there.sum(1) - shared)  # (M, n)
    best, index = overlap.max(1)
    return torch.where(best[:, None] > 0, zoo.weights[index], zoo.universal)


def neighbour_average_heads(
    data: TaskData, zoo: Zoo, tasks: Tasks, spec: HeadSpec, samples: int = 512
) -> tuple[Tensor, int]:
    """Average of the k zoo heads whose pooled text is closest by cosine.

    k is the power of two with the best accuracy on training features of a tenth of the zoo's tasks, which are no
    neighbours of anything while it is chosen.

    Args:
        data: features and embeddings.
        zoo: the heads.
        tasks: M class lists.
        spec: the heads' specification.
        samples: training features per task on which k is chosen.

    Returns:
        (M, P) and k.
    """
    count = len(zoo.weights)
    held_out = max(1, count // 10)
    known = zoo.weights[held_out:] if count > held_out else zoo.weights  # (n', P)
    asked = list(zoo.split.seen[:held_out])
    similarity = text_similarity(data, zoo, asked)[:, count - len(known) :]  # (m, n')
    labels = pad_tasks(asked)  # (m, K)
    features, targets = data.train.sample(labels, samples, torch.Generator().manual_seed(0))  # (m, s, d), (m, s)
    text, mask = task_embeddings(data.embeddings, labels)

    def accuracy(k: int) -> float:
        heads = _average_of_nearest(known, similarity, k)  # (m, P)
        logits = stacked_logits(spec, heads, features, text, 1.0, mask)  # (m, s, K)
        return float((logits.argmax(-1) == targets).float().mean())

    best = max((2**power for power in range(len(known).bit_length())), key=accuracy)
    return _average_of_nearest(zoo.weights, text_similarity(data, zoo, tasks), best), best


def _average_of_nearest(weights: Tensor, similarity: Tensor, k: int) -> Tensor:
    """Mean of the k rows of weights (n, P) with the greatest similarity (M, n): (M, P)."""
    nearest = torch.zeros_like(similarity).scatter(1, similarity.topk(k, dim=1).indices, 1 / k)  # (M, n)
    return nearest @ weights


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
    # In double precision: the smallest strength leaves a matrix that single precision cannot solve well.
    known, asked = (inputs / scale).double().numpy(), (queries / scale).double().numpy()
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
    return {
        name: train_in_stacks(
            spec, head, tasks, data.train, data.embeddings, logit_scale, recipe, seed, stack, on_stack
        ).cpu()
        for name, head in (("base", zoo.base), ("universal", zoo.universal))
    }


def restricted_universal_head(
    data: TaskData,
    split: TaskSplit,
    preset: Preset,
    start: Tensor,
    recipe: HeadRecipe,
    on_step: Callable[[], None] | None = None,
) -> Tensor:
    """One head for all tasks, trained on the softmax over a task's classes by which it is judged: (P,).

    Each step draws fresh tasks that training may use and samples of each.

    Args:
        data: features and embeddings.
        split: says what is kept from training.
        preset: `suites.accuracy.restricted_tasks` says how many tasks a step has, `fit.fresh_task_size` of what size.
        start: (P,) a universal head.
        recipe: optimiser settings; `batch_size` counts samples per task.
        on_step: called after every step.

    Raises:
        TrainingDataError: tasks cannot be drawn; as `DivergedError`, a loss or the weights are not finite, or the loss
            exploded.
    """

    def loss(flat: Tensor, generator: torch.Generator) -> Tensor:
        tasks = draw_fresh_tasks(
            split, len(data.classes), preset.suites.accuracy.restricted_tasks, preset.fit.fresh_task_size, generator
        )  # (M, K)
        text = task_embeddings(data.embeddings, tasks)  # (M, K, D), (M, K)
        heads = flat.expand(len(tasks), -1)  # (M, P)
        return sampled_loss(preset.head, heads, tasks, text, data.train, preset.logit_scale, recipe, generator)

    watch = StepWatch(
        "the universal head trained on tasks",
        "lower suites.accuracy.restricted_universal.learning_rate",
        guess=math.log(preset.fit.fresh_task_size[1]),
    )
    return minimise(start.clone(), loss, recipe, preset.seed, watch, on_step)  # (P,)


def weight_error(space: WeightSpace, heads: Tensor, targets: Tensor) -> float:
    """Mean squared error of heads (P,) or (M, P) to other heads (M, P), in standardised numbers."""
    return float(((heads - targets) / space.scale).square().mean())


def accuracies(
    data: TaskData, spec: HeadSpec, tasks: Tasks, methods: Mapping[str, Tensor | Predictor]
) -> dict[str, np.ndarray]:
    """Accuracy of every method on every task's test features.

    Args:
        data: features and embeddings.
        spec: the heads' specification.
        tasks: M class lists.
        methods: per method the weights of a head, (P,) for one head for all tasks or (M, P), or a predictor.

    Returns:
        per method (M,), 0..1.
    """
    heads = {name: method for name, method in methods.items() if isinstance(method, Tensor)}
    predictors = {name: method for name, method in methods.items() if not isinstance(method, Tensor)}
    columns: dict[str, list[float]] = {name: [] for name in methods}
    for i, task in enumerate(tasks):
        if heads:
            stack = torch.stack([head if head.ndim == 1 else head[i] for head in heads.values()])  # (J, P)
            scores = heads_accuracy(spec, stack, task, data.test, data.embeddings).numpy()
            for name, score in zip(heads, scores, strict=True):
                columns[name].append(score)
        if predictors:
            features, targets = data.test.of_task(task)  # (N, d), (N,)
            for name, predictor in predictors.items():
                columns[name].append((predictor(task, features).argmax(-1) == targets).float().mean().item())
    return {name: np.array(column, dtype=np.float32) for name, column in columns.items()}
