"""Real features and real CLIP embeddings, where they are at hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from text2weight_training.presets import load_preset
from text2weight_training.stacked import HeadRecipe, heads_accuracy, initial_head, train_stack
from text2weight_training.tasks import draw_tasks, load_task_data

DATA = Path(__file__).parents[3] / "shared" / "data"
FEATURES = DATA / "cifar100_squeezenet11_features.safetensors"
TEXT = DATA / "clip_vitb32_text.safetensors"


@pytest.mark.skipif(not (FEATURES.is_file() and TEXT.is_file()), reason=f"needs the real data in {DATA}")
def test_a_stack_of_heads_learns_cifar100_tasks() -> None:
    data = load_task_data([FEATURES], f"{TEXT}#cifar100.a")
    assert (len(data.classes), data.feature_dim, data.embeddings.shape) == (100, 512, (100, 512))
    assert data.train.features.shape == (50_000, 512)
    spec = load_preset("small").head
    tasks = list(draw_tasks(100, 5, (8, 10), 0.2, 0).seen)
    recipe = HeadRecipe(steps=25, batch_size=64, learning_rate=3e-3)
    heads = train_stack(spec, initial_head(spec, 0), tasks, data.train, data.embeddings, 30.0, recipe, 0)
    for head, task in zip(heads, tasks, strict=True):
        accuracy = float(heads_accuracy(spec, head[None], task, data.test, data.embeddings))
        assert accuracy > 3 / len(task), f"task of {len(task)} classes: {accuracy:.3f}, thrice chance expected"
