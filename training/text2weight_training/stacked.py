"""Train many small heads at once: one batched matmul serves a whole stack.

AdamW acts on each number by itself, so a stack of heads learns exactly what its members would alone.
Letters: M heads, K classes of a task (padded), n samples per head and step, P numbers in one head.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from text2weight.head import AdapterHead, HeadSpec, apply_heads, class_logits
from text2weight_training.loss_watch import StepWatch
from text2weight_training.tasks import ClassFeatures, pad_tasks, task_embeddings

# Feature samples of a task that share one dropout mask.
DROPOUT_RUN = 64
RegularisingShare = Annotated[float, Field(ge=0, lt=1, exclude_if=lambda share: not share)]


class Recipe(BaseModel):
    """How weights are trained.

    Attributes:
        steps: optimiser steps.
        batch_size: n, samples per step, for each head.
        learning_rate: AdamW's peak; it falls to zero on a cosine.
        weight_decay: AdamW's decoupled decay.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: PositiveInt
    batch_size: PositiveInt = 128
    learning_rate: PositiveFloat = 1e-3
    weight_decay: NonNegativeFloat = 1.0


class HeadRecipe(Recipe):
    """How a head is trained on features.

    Attributes:
        label_smoothing: of the targets.
        feature_dropout: share of each sample's numbers that are dropped.
    """

    label_smoothing: RegularisingShare = 0.0
    feature_dropout: RegularisingShare = 0.0


@dataclass(frozen=True)
class Moments:
    """What AdamW remembers of M heads.

    Attributes:
        mean: decaying mean of their gradients, (M, P).
        square: that of the gradients' squares, (M, P).
        steps: how many steps they have had.
    """

    mean: Tensor
    square: Tensor
    steps: int

    def rows(self, first: int, last: int) -> Moments:
        """Those of the heads from `first` to before `last`."""
        return Moments(self.mean[first:last], self.square[first:last], self.steps)


# Called after every step: the number of steps done, the weights (M, P) and their moments; the next step changes both.
OnWeights = Callable[[int, Tensor, Moments], None]


def initial_head(spec: HeadSpec, seed: int) -> Tensor:
    """A head with PyTorch's default initialisation, flat (P,)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return spec.flatten({name: tensor.detach() for name, tensor in AdapterHead(spec).state_dict().items()})


def stacked_logits(
    spec: HeadSpec, flat: Tensor, features: Tensor, class_embeddings: Tensor, logit_scale: float, mask: Tensor
) -> Tensor:
    """`class_logits(apply_heads(...))` without forming the heads' outputs, at a fraction of the time.

    The last layer is linear in the hidden activations a, so its products with the class embeddings, e.W2 a,
    and its squared length, a.(W2'W2)a, need only matrices of the hidden size.

    Args:
        spec: the heads' specification.
        flat: (M, P) weights.
        features: (M, n, d); their dtype is that of the first, widest product.
        class_embeddings: (M, K, o), L2-normalised.
        logit_scale: s.
        mask: (M, K) bool; False marks padding, whose logits become -inf.

    Returns:
        (M, n, K).
    """
    blocks = spec.unflatten(flat)
    last = blocks["linear2.weight"]  # (M, o, h)
    hidden = (features @ blocks["linear1.weight"].to(features.dtype).transpose(-1, -2)).to(flat.dtype)  # (M, n, h)
    if spec.bias:
        hidden = hidden + blocks["linear1.bias"].unsqueeze(-2)
    if spec.activation == "gelu":
        hidden = F.gelu(hidden)
    if spec.bias:  # the output bias is one more column of the last layer, for an activation that is always 1
        last = torch.cat([last, blocks["linear2.bias"].unsqueeze(-1)], dim=-1)  # (M, o, h + 1)
        hidden = F.pad(hidden, (0, 1), value=1.0)  # (M, n, h + 1)
    products = hidden @ (class_embeddings @ last).transpose(-1, -2)  # (M, n, K)
    squared = ((hidden @ (last.transpose(-1, -2) @ last)) * hidden).sum(-1, keepdim=True)  # (M, n, 1)
    logits = logit_scale * products * squared.clamp(min=1e-12).rsqrt()  # (M, n, K)
    return logits.masked_fill(~mask.unsqueeze(-2), float("-inf"))


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
    on_weights: OnWeights | None = None,
    moments: Moments | None = None,
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
        on_weights: see `OnWeights`.
        moments: of an earlier training that this one goes on from; without them AdamW begins anew.

    Returns:
        (M, P) trained weights.

    Raises:
        DivergedError: a loss or the weights are not finite, or the loss exploded.
    """
    labels = pad_tasks(tasks).to(features.features.device)  # (M, K)
    text = task_embeddings(embeddings, labels)  # (M, K, D), (M, K)

    def loss(flat: Tensor, generator: torch.Generator) -> Tensor:
        # Summed over heads and averaged over samples: each head's gradient is its own mean loss's.
        return len(tasks) * sampled_loss(spec, flat, labels, text, features, logit_scale, recipe, generator)

    flat = start.to(labels.device).expand(len(tasks), -1).clone()  # (M, P)
    watch = StepWatch("head training", "lower the learning rate", guess=len(tasks) * math.log(labels.shape[1]))
    return minimise(flat, loss, recipe, seed, watch, on_step, on_weights, moments)


def drop_features(features: Tensor, share: float, generator: torch.Generator) -> None:
    """Dropout (arXiv 1207.0580) on feature samples (B, n, d), in place.

    Runs of samples of one task share what is dropped: drawn for every sample alone, it would take a CPU longer
    than the denoiser's own step, and helps no more.
    """
    for run in features.split(DROPOUT_RUN, dim=1):
        kept = torch.rand(len(features), 1, features.shape[-1], generator=generator) >= share  # (B, 1, d)
        run.mul_((kept / (1 - share)).to(features))  # (B, 64, d)


def smoothed_cross_entropy(logits: Tensor, targets: Tensor, mask: Tensor, smoothing: float) -> Tensor:
    """Each task's mean cross-entropy against (1 - smoothing) one-hot + smoothing / K, K its own classes: (B,).

    Label smoothing (arXiv 1512.00567), where tasks are padded to one number of classes.

    Args:
        logits: (B, n, K), -inf at padding.
        targets: (B, n).
        mask: (B, K) bool, False at padding.
        smoothing: 0..1.
    """
    likelihood = logits.log_softmax(-1)  # (B, n, K)
    hit = likelihood.gather(-1, targets.unsqueeze(-1)).mean((1, 2))  # (B,)
    if not smoothing:
        return -hit
    present = likelihood.masked_fill(~mask.unsqueeze(1), 0).sum(-1)  # (B, n)
    spread = (present / mask.sum(-1, keepdim=True)).mean(-1)  # (B,)
    return -((1 - smoothing) * hit + smoothing * spread)


def sampled_loss(
    spec: HeadSpec,
    flat: Tensor,
    labels: Tensor,
    text: tuple[Tensor, Tensor],
    features: ClassFeatures,
    logit_scale: float,
    recipe: HeadRecipe,
    generator: torch.Generator,
) -> Tensor:
    """Cross-entropy of heads on a fresh batch of their tasks, as a recipe smooths and drops: the mean over all.

    Args:
        spec: the heads' specification.
        flat: (M, P) weights.
        labels: (M, K) class labels, padded.
        text: class embeddings (M, K, D) and their mask (M, K), from `task_embeddings`.
        features: the training features.
        logit_scale: s of the cosine logits.
        recipe: batch size and regularisers.
        generator: of the samples, and of what is dropped.
    """
    class_embeddings, mask = text
    batch, targets = features.sample(labels, recipe.batch_size, generator)  # (M, n, d), (M, n)
    if recipe.feature_dropout:
        drop_features(batch, recipe.feature_dropout, generator)
    logits = stacked_logits(spec, flat, batch.float(), class_embeddings, logit_scale, mask)  # (M, n, K)
    return smoothed_cross_entropy(logits, targets, mask, recipe.label_smoothing).mean()


def minimise(
    flat: Tensor,
    loss: Callable[[Tensor, torch.Generator], Tensor],
    recipe: Recipe,
    seed: int,
    watch: StepWatch,
    on_step: Callable[[], None] | None = None,
    on_weights: OnWeights | None = None,
    moments: Moments | None = None,
) -> Tensor:
    """Run a recipe's optimiser on weights (..., P).

    Args:
        flat: initial weights; changed in place.
        loss: of the weights; what it draws comes from the generator, one for the whole run.
        recipe: optimiser settings.
        seed: of the generator.
        watch: judges the losses and the final weights.
        on_step: called after every step.
        on_weights: see `OnWeights`.
        moments: of an earlier training of these weights; without them AdamW begins anew.

    Returns:
        the weights.

    Raises:
        DivergedError: a loss or the weights are not finite, or the loss exploded.
    """
    flat.requires_grad_()
    optimizer = torch.optim.AdamW([flat], lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True)
    before = 0
    if moments is not None:
        before = moments.steps
        optimizer.state[flat] = {
            "step": torch.tensor(float(before), device=flat.device),
            "exp_avg": moments.mean.to(flat.device, copy=True),
            "exp_avg_sq": moments.square.to(flat.device, copy=True),
        }
    generator = torch.Generator().manual_seed(seed)
    for step in range(recipe.steps):
        optimizer.param_groups[0]["lr"] = recipe.learning_rate * cosine_decay(step / recipe.steps)
        value = loss(flat, generator)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        optimizer.step()
        watch.add(value)
        if on_step is not None:
            on_step()
        if on_weights is not None:
            state = optimizer.state[flat]
            on_weights(step + 1, flat.detach(), Moments(state["exp_avg"], state["exp_avg_sq"], before + step + 1))
    watch.check_weights(flat.detach())
    return flat.detach()


def train_in_stacks(
    spec: HeadSpec,
    start: Tensor,
    tasks: list[tuple[int, ...]],
    features: ClassFeatures,
    embeddings: Tensor,
    logit_scale: float,
    recipe: HeadRecipe,
    seed: int,
    stack: int,
    on_stack: Callable[[int], None] | None = None,
    on_weights: OnWeights | None = None,
    moments: Moments | None = None,
) -> Tensor:
    """`train_stack` for any number of tasks, `stack` at a time, from one start (P,) or one each (M, P): (M, P).

    The stack that begins with task i draws with seed + i; `on_stack` is called with the number of its heads,
    `on_weights` as by `train_stack` for one stack after the other. `moments` are those of all M heads.
    """
    trained = []
    starts = start.expand(len(tasks), -1)  # (M, P)
    for first in range(0, len(tasks), stack):
        last = first + stack
        part, begin = tasks[first:last], starts[first:last]
        trained.append(
            train_stack(
                spec,
                begin,
                part,
                features,
                embeddings,
                logit_scale,
                recipe,
                seed + first,
                on_weights=on_weights,
                moments=None if moments is None else moments.rows(first, last),
            )
        )
        if on_stack is not None:
            on_stack(len(part))
    return torch.cat(trained)


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
