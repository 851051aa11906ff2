"""What stacking gives: heads per second of zoo training in a stack over one head at a time.

Same tasks, same recipe (the small preset's, with fewer steps, as `steps` says), random features of CIFAR-100's
size. One turn trains every head once: in one stack, or one after the other.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.timing import interleave, significant, summary_ms
from text2weight_training.presets import Preset, load_preset
from text2weight_training.stacked import HeadRecipe, initial_head, train_stack
from text2weight_training.tasks import ClassFeatures, draw_tasks

NUM_CLASSES = 100
FEATURE_NOISE = 2.0  # spread within a class over that between classes: neither trivial nor hopeless


@dataclass(frozen=True)
class Sizes:
    """Heads in the stack, optimiser steps per head, features per class, and turns."""

    heads: int
    steps: int
    features_per_class: int
    repeats: int
    warmup: int


FULL = Sizes(heads=64, steps=40, features_per_class=500, repeats=5, warmup=1)
QUICK = Sizes(heads=64, steps=3, features_per_class=50, repeats=2, warmup=1)


def run(sizes: Sizes) -> dict[str, object]:
    """Measure heads per second."""
    preset = load_preset("small")
    zoo = preset.zoo
    recipe = zoo.heads.model_copy(update={"steps": sizes.steps})
    features = _features(preset, sizes.features_per_class)
    embeddings = F.normalize(_noise(NUM_CLASSES, preset.head.output_dim, seed=1), dim=-1)  # (C, D)
    tasks = list(draw_tasks(NUM_CLASSES, 2 * sizes.heads, zoo.task_size, 0.5, preset.seed).seen)
    start = initial_head(preset.head, preset.seed)  # (P,)

    def train(members: list[tuple[int, ...]], seed: int, settings: HeadRecipe = recipe) -> None:
        train_stack(preset.head, start, members, features, embeddings, preset.logit_scale, settings, seed)

    def one_at_a_time(turn: int) -> None:
        for task in tasks:
            train([task], turn)

    times = interleave(
        {"stack": lambda turn: train(tasks, turn), "single": one_at_a_time},
        repeats=sizes.repeats,
        warmup=sizes.warmup,
    )
    seconds = {name: summary_ms(spent)["median"] / 1000 for name, spent in times.items()}
    return {
        "heads": len(tasks),
        "repeats": sizes.repeats,
        "recipe": recipe.model_dump(),
        "preset_steps": zoo.heads.steps,
        "feature_dim": preset.head.input_dim,
        "features": len(features.features),
        "classes": NUM_CLASSES,
        "heads_per_s": {name: significant(len(tasks) / spent) for name, spent in seconds.items()},
        "ratio": significant(seconds["single"] / seconds["stack"]),
    }


def _features(preset: Preset, per_class: int) -> ClassFeatures:
    """Features scattered around one centre per class, fp16 as in a feature file."""
    dim = preset.head.input_dim
    labels = torch.arange(NUM_CLASSES).repeat_interleave(per_class)  # (N,)
    centres = _noise(NUM_CLASSES, dim, seed=2)  # (C, d)
    features = centres[labels] + FEATURE_NOISE * _noise(len(labels), dim, seed=3)  # (N, d)
    return ClassFeatures.from_labels(features.half(), labels, NUM_CLASSES)


def _noise(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
