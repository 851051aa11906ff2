"""Train many small heads at once: one batched matmul serves a whole stack.

AdamW acts on each number by itself, so a stack of heads learns exactly what its members would alone.
Letters: M heads, K classes of a task (padded), n samples per head and step, P numbers in one head.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from text2weight.head import AdapterHead, HeadSpec, apply_heads, class_logits
from text2weight_training.files import TrainingDataError
from text2weight_training.tasks import ClassFeatures, pad_tasks, task_embeddings


class HeadRecipe(BaseModel):
    """How a head is trained.

    Attributes:
        steps: optimiser steps.
        batch_size: n, samples per head and step.
        learning_rate: AdamW's peak; it falls to zero on a cosine.
        weight_decay: AdamW's decoupled decay.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: PositiveInt
    batch_size: PositiveInt = 128
    learning_rate: PositiveFloat = 1e-3
    weight_decay: NonNegativeFloat = 1.0


def initial_head(spec: HeadSpec, seed: int) -> Tensor:
    """A head with PyTorch's default initialisation, flat (P,)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return spec.flatten({name: tensor.detach() for name, tensor in AdapterHead(spec).state_dict().items()})


def train_stack(
    spec: HeadSpec,
    start: Tensor,
    tasks: list[tuple[int, ...]],
    features: ClassFeatures,
    embeddings: Tensor,
    logit_scale: float,
    recipe: HeadRecipe,
    seed: int,
    on_step: Callable[[], None] | None = None,
) -> Tensor:
    """Train one head per task by cross-entropy on cached features.

    Args:
        spec: the heads' specification.
        start: (P,) or (M, P) initial weights.
        tasks: M class lists.
        features: the training features.
        embeddings: (C, D) text embeddings of all classes.
        logit_scale: s of the cosine logits.
        recipe: optimiser settings.
        seed: of the samples drawn.
        on_step: called after every step.

    Returns:
        (M, P) trained weights.

    Raises:
        TrainingDataError: the weights are no longer finite.
    """
    device = features.features.device
    labels = pad_tasks(tasks).to(device)  # (M, K)
    targets_text, mask = task_embeddings(embeddings, labels)  # (M, K, D), (M, K)
    flat = start.to(device).expand(len(tasks), -1).clone().requires_grad_()  # (M, P)
    optimizer = torch.optim.AdamW([flat], lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True)
    generator = torch.Generator().manual_seed(seed)
    for step in range(recipe.steps):
        optimizer.param_groups[0]["lr"] = recipe.learning_rate * cosine_decay(step / recipe.steps)
        batch, target = features.sample(labels, recipe.batch_size, generator)  # (M, n, d), (M, n)
        logits = class_logits(apply_heads(spec, flat, batch), targets_text, logit_scale, mask)  # (M, n, K)
        # Summed over heads and averaged over samples: each head's gradient is its own mean loss's.
        loss = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="sum") / recipe.batch_size
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if on_step is not None:
            on_step()
    trained = flat.detach()
    if not bool(torch.isfinite(trained).all()):
        raise TrainingDataError(f"head training diverged (loss {float(loss.detach())}): lower the learning rate")
    return trained


def cosine_decay(progress: float) -> float:
    """1 at progress 0, 0 at 1."""
    return 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


@torch.no_grad()
def heads_accuracy(
    spec: HeadSpec, heads: Tensor, task: tuple[int, ...], features: ClassFeatures, embeddings: Tensor
) -> Tensor:
    """Top-1 accuracy of several heads (J, P) on all of one task's features: (J,), 0..1."""
    batch, target = features.of_task(task)  # (N, d), (N,)
    outputs = apply_heads(spec, heads, batch)  # (J, N, o)
    logits = class_logits(outputs, embeddings[list(task)], 1.0)  # (J, N, K)
    return (logits.argmax(-1) == target.to(logits.device)).float().mean(-1)
