"""An MLP hypernetwork, the plain alternative to the denoiser: a task's text in, standardised weights out.

It learns from the zoo by mean squared error, as in the hypernetwork baselines of T2W (arXiv 2508.13633), and has at
most as many parameters as the denoiser; how many is chosen with its learning rate and weight decay.
Letters: M tasks, n zoo heads, K classes of a task, D embedding size, P numbers in one head, w hidden width.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from text2weight.condition import prior_attention
from text2weight.weight_space import WeightSpace
from text2weight_training.files import TrainingDataError
from text2weight_training.splits import training_center
from text2weight_training.stacked import Recipe, cosine_decay
from text2weight_training.suites.settings import HypernetworkSettings
from text2weight_training.tasks import TaskData, pad_tasks, task_embeddings
from text2weight_training.zoo import Zoo

# How often in a run the error on heads that are not trained on is looked at, to keep the best network.
LOOKS = 50


class Hypernetwork(nn.Module):
    """Two hidden layers of one width, 2D -> w -> w -> P."""

    def __init__(self, input_dim: int, width: int, output_dim: int) -> None:
        super().__init__()
        last = nn.Linear(width, output_dim)
        # Starts at the mean of the zoo, which is zero in standardised weights.
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.layers = nn.Sequential(nn.Linear(input_dim, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), last)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map descriptions (M, 2D) to standardised weights (M, P)."""
        outputs: Tensor = self.layers(inputs)
        return outputs


def matching_width(input_dim: int, output_dim: int, parameters: int) -> int:
    """The w whose network has as many parameters as can be without more than `parameters`, at least 1.

    The count is w^2 + (input_dim + output_dim + 2) w + output_dim; this solves it for w.
    """
    linear = input_dim + output_dim + 2
    room = max(0, parameters - output_dim)
    return max(1, (math.isqrt(linear * linear + 4 * room) - linear) // 2)


def describe_tasks(data: TaskData, tasks: Sequence[tuple[int, ...]], center: Tensor) -> Tensor:
    """Pooled and mean text of the condition, both less a centre (D,): (M, 2D)."""
    text, mask = task_embeddings(data.condition_embeddings, pad_tasks(tasks))  # (M, K, D), (M, K)
    mean = text.sum(1) / mask.sum(1, keepdim=True)  # (M, D)
    return torch.cat([prior_attention(text, mask) - center, mean - center], dim=1)


@dataclass(frozen=True)
class TrainedHypernetwork:
    """The network with the least error on heads that it was not trained on.

    Attributes:
        heads: from M tasks to heads (M, P).
        chosen: `learning_rate`, `weight_decay`, `width` and `error` of the network that was kept; `steps`, of every
            training; `tried`, by name the values that each of the first three was chosen from.
    """

    heads: Callable[[Sequence[tuple[int, ...]]], Tensor]
    chosen: dict[str, Any]


def train_hypernetwork(
    data: TaskData,
    zoo: Zoo,
    space: WeightSpace,
    parameters: int,
    settings: HypernetworkSettings,
    seed: int,
    on_step: Callable[[], None] | None = None,
) -> TrainedHypernetwork:
    """Train on the zoo by mean squared error, with every combination of the settings' values.

    What is kept, of all combinations and of the states along each training, is the state with the least error on the
    zoo's last tenth.

    Args:
        data: features and embeddings.
        zoo: the heads.
        space: standardises them.
        parameters: how many the widest network may have, such as the denoiser has.
        settings: steps, batch size and the values to choose from.
        seed: of the initial network and the batches.
        on_step: called after every step.

    Raises:
        TrainingDataError: the zoo has a single head, or the error is no longer finite.
    """
    if len(zoo.weights) < 2:
        raise TrainingDataError("a hypernetwork needs at least 2 zoo heads: raise zoo.tasks")
    center = training_center(data.condition_embeddings, zoo.split)
    inputs = describe_tasks(data, zoo.split.seen, center)  # (n, 2D)
    scale = inputs.std().clamp(min=1e-8)
    inputs, targets = inputs / scale, space.standardise(zoo.weights)  # (n, 2D), (n, P)
    widest = matching_width(inputs.shape[1], targets.shape[1], parameters)
    widths = [max(1, round(share * widest)) for share in settings.widths]
    rates, decays = settings.learning_rates, settings.weight_decays
    best, best_error = None, math.inf
    chosen: dict[str, Any] = {
        "steps": settings.steps,
        "tried": {"learning_rate": list(rates), "weight_decay": list(decays), "width": widths},
    }
    for width, rate, decay in product(widths, rates, decays):
        recipe = Recipe(steps=settings.steps, batch_size=settings.batch_size, learning_rate=rate, weight_decay=decay)
        network, error = _train(inputs, targets, width, recipe, seed, on_step)
        if error < best_error:
            best, best_error = network, error
            chosen |= {"learning_rate": rate, "weight_decay": decay, "width": width, "error": error}
    assert best is not None  # `_train` raises where an error is not finite
    network = best

    @torch.no_grad()
    def heads(tasks: Sequence[tuple[int, ...]]) -> Tensor:
        return space.restore(network(describe_tasks(data, tasks, center) / scale))  # (M, P)

    return TrainedHypernetwork(heads, chosen)


def _train(
    inputs: Tensor, targets: Tensor, width: int, recipe: Recipe, seed: int, on_step: Callable[[], None] | None
) -> tuple[Hypernetwork, float]:
    """The state with the least error on the last tenth of inputs (n, 2D) and targets (n, P), and that error."""
    kept = len(inputs) - max(1, len(inputs) // 10)  # heads before this row are trained on
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Hypernetwork(inputs.shape[1], width, targets.shape[1])
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True
    )
    generator = torch.Generator().manual_seed(seed)
    best, best_error = copy.deepcopy(network), math.inf
    for step in range(recipe.steps):
        optimizer.param_groups[0]["lr"] = recipe.learning_rate * cosine_decay(step / recipe.steps)
        rows = torch.randint(kept, (recipe.batch_size,), generator=generator)
        loss = F.mse_loss(network(inputs[rows]), targets[rows])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if (step + 1) % max(1, recipe.steps // LOOKS) == 0 or step + 1 == recipe.steps:
            with torch.no_grad():
                error = float(F.mse_loss(network(inputs[kept:]), targets[kept:]))
            if not math.isfinite(error):
                raise TrainingDataError(
                    f"the hypernetwork's error is not finite at step {step + 1} with learning rate "
                    f"{recipe.learning_rate:g}: take it out of suites.accuracy.hypernetwork.learning_rates"
                )
            if error < best_error:
                best, best_error = copy.deepcopy(network), error
        if on_step is not None:
            on_step()
    return best, best_error
