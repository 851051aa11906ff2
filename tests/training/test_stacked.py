"""A stack of heads learns exactly what its members would alone."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
import torch.nn.functional as F

from tests.training.conftest import Toy
from text2weight.head import HeadSpec, apply_heads, class_logits
from text2weight_training.loss_watch import READ_TOGETHER, DivergedError
from text2weight_training.stacked import (
    HeadRecipe,
    cosine_decay,
    heads_accuracy,
    initial_head,
    sampled_loss,
    stacked_logits,
    train_stack,
)
from text2weight_training.tasks import PADDING, ClassFeatures, pad_tasks, task_embeddings

RECIPE = HeadRecipe(steps=12, batch_size=16, learning_rate=1e-2, weight_decay=0.5)
TASKS = [(0, 1, 2), (3, 4, 5, 6, 7), (8, 9), (0, 4, 8, 10)]


class DrawsByTask(ClassFeatures):
    """Draws that depend on the task alone and not on its neighbours in the stack."""

    def sample(self, tasks: torch.Tensor, count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        step = int(torch.randint(2**31, (), generator=generator))
        drawn = [
            super(DrawsByTask, self).sample(
                task[task != PADDING][None], count, torch.Generator().manual_seed(step + int(task[0]) * 1000)
            )
            for task in tasks
        ]
        return torch.cat([features for features, _ in drawn]), torch.cat([targets for _, targets in drawn])


def by_task(features: ClassFeatures) -> DrawsByTask:
    return DrawsByTask(features.features, features.starts)


def stack(toy: Toy, tasks: list[tuple[int, ...]], features: ClassFeatures, start: torch.Tensor) -> torch.Tensor:
    return train_stack(toy.preset.head, start, tasks, features, toy.data.embeddings, 10.0, RECIPE, seed=4)


@pytest.mark.parametrize("own_starts", [False, True])
def test_stack_equals_one_at_a_time(toy: Toy, own_starts: bool) -> None:
    """With equal draws; padding to the widest task and the neighbours must not matter."""
    starts = torch.stack([initial_head(toy.preset.head, seed if own_starts else 0) for seed in range(len(TASKS))])
    features = by_task(toy.data.train)
    together = stack(toy, TASKS, features, starts if own_starts else starts[0])
    alone = torch.cat([stack(toy, [task], features, start) for task, start in zip(TASKS, starts, strict=True)])
    moved = (together - starts).abs().mean()
    assert float((together - alone).abs().max()) < 1e-4 < 0.1 * float(moved)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ["gelu", "none"])
def test_stacked_logits_are_those_of_the_outputs(bias: bool, activation: Literal["gelu", "none"]) -> None:
    spec = HeadSpec(input_dim=6, hidden_dim=4, output_dim=10, bias=bias, activation=activation)
    source = torch.Generator().manual_seed(0)
    flat = torch.randn(3, spec.num_parameters, generator=source, requires_grad=True)
    features = torch.randn(3, 5, 6, generator=source)
    text = F.normalize(torch.randn(3, 7, 10, generator=source), dim=-1)
    mask = torch.arange(7) < torch.tensor([[7], [2], [4]])
    logits = stacked_logits(spec, flat, features, text, 20.0, mask)
    expected = class_logits(apply_heads(spec, flat, features), text, 20.0, mask)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    slopes = [torch.autograd.grad(values.softmax(-1)[..., 0].sum(), flat)[0] for values in (logits, expected)]
    torch.testing.assert_close(slopes[0], slopes[1], atol=1e-4, rtol=1e-3)


def test_a_heads_training_does_not_depend_on_its_neighbours_data(toy: Toy) -> None:
    """Replacing the features of one task leaves every disjoint task's head as it was, to the last bit."""
    start = initial_head(toy.preset.head, 0)
    before = stack(toy, TASKS[:3], toy.data.train, start)
    changed = toy.data.train.features.clone()
    first, last = int(toy.data.train.starts[3]), int(toy.data.train.starts[4])
    changed[first:last] = 50.0
    after = stack(toy, TASKS[:3], ClassFeatures(changed, toy.data.train.starts), start)
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[2], after[2])
    assert not torch.equal(before[1], after[1])


def test_training_learns_the_task_and_repeats_itself(toy: Toy) -> None:
    start = initial_head(toy.preset.head, 0)
    recipe = HeadRecipe(steps=80, batch_size=32, learning_rate=3e-2, weight_decay=0.0)
    steps: list[int] = []
    args = (toy.preset.head, start, TASKS, toy.data.train, toy.data.embeddings, 10.0, recipe, 1)
    trained = train_stack(*args, on_step=lambda: steps.append(1))
    assert len(steps) == 80
    assert torch.equal(trained, train_stack(*args))
    for head, task in zip(trained, TASKS, strict=True):
        untrained, learnt = heads_accuracy(
            toy.preset.head, torch.stack([start, head]), task, toy.data.test, toy.data.embeddings
        )
        assert learnt > 0.85
        assert learnt > untrained


def test_the_sampled_loss_smooths_and_drops_as_its_recipe_says(toy: Toy) -> None:
    """Against torch's smoothed cross-entropy of each task, on the same draws with the same numbers dropped."""
    spec, labels = toy.preset.head, pad_tasks(TASKS)
    heads = torch.stack([initial_head(spec, seed) for seed in range(len(TASKS))])
    recipe = HeadRecipe(steps=1, batch_size=100, label_smoothing=0.2, feature_dropout=0.5)

    def loss(settings: HeadRecipe) -> float:
        text = task_embeddings(toy.data.embeddings, labels)
        source = torch.Generator().manual_seed(7)
        return float(sampled_loss(spec, heads, labels, text, toy.data.train, 10.0, settings, source))

    source = torch.Generator().manual_seed(7)
    features, targets = toy.data.train.sample(labels, 100, source)
    # Dropout masks are drawn after the samples, one for each 64 of a task.
    masks = [torch.rand(len(TASKS), 1, 16, generator=source) >= 0.5 for _ in range(2)]
    kept = torch.cat([masks[0].expand(-1, 64, -1), masks[1].expand(-1, 36, -1)], dim=1)
    for settings, shown in (
        (recipe, features.float() * kept * 2),
        (recipe.model_copy(update={"feature_dropout": 0.0}), features.float()),
        (recipe.model_copy(update={"label_smoothing": 0.0}), features.float() * kept * 2),
    ):
        expected = [
            F.cross_entropy(
                class_logits(apply_heads(spec, head[None], rows), toy.data.embeddings[list(task)], 10.0)[0],
                target,
                label_smoothing=settings.label_smoothing,
            )
            for head, rows, target, task in zip(heads, shown, targets, TASKS, strict=True)
        ]
        assert loss(settings) == pytest.approx(float(torch.stack(expected).mean()), rel=1e-4)


def test_divergence_is_reported(toy: Toy) -> None:
    spec, recipe = toy.preset.head, HeadRecipe(steps=3, batch_size=8, learning_rate=1e38, weight_decay=0.0)
    with pytest.raises(
        DivergedError, match=r"^head training diverged at step 2 \(.* not finite\): lower the learning rate$"
    ):
        train_stack(spec, initial_head(spec, 0), TASKS, toy.data.train, toy.data.embeddings, 10.0, recipe, 0)


def test_divergence_ends_a_training_long_before_its_last_step(toy: Toy) -> None:
    spec, steps = toy.preset.head, []
    recipe = HeadRecipe(steps=10 * READ_TOGETHER, batch_size=8, learning_rate=1e38, weight_decay=0.0)
    args = (toy.data.train, toy.data.embeddings, 10.0, recipe, 0)
    with pytest.raises(DivergedError):
        train_stack(spec, initial_head(spec, 0), TASKS, *args, on_step=lambda: steps.append(1))
    assert len(steps) < READ_TOGETHER


def test_accuracy_counts_only_the_tasks_classes(toy: Toy) -> None:
    """A head that always answers with one class is right for its share of the task, and never outside it."""
    spec = toy.preset.head
    tensors = spec.unflatten(torch.zeros(spec.num_parameters))
    constant = spec.flatten({**tensors, "linear2.bias": toy.data.embeddings[4]})
    with_it = heads_accuracy(spec, constant[None], (1, 4, 7, 9), toy.data.test, toy.data.embeddings)
    assert with_it.tolist() == [0.25]


def test_initial_head_is_fixed_by_its_seed_and_leaves_the_global_generator_alone(toy: Toy) -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    first = initial_head(toy.preset.head, 1)
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(first, initial_head(toy.preset.head, 1))
    assert not torch.equal(first, initial_head(toy.preset.head, 2))
    assert first.shape == (toy.preset.head.num_parameters,)


def test_cosine_decay() -> None:
    assert [cosine_decay(progress) for progress in (0.0, 0.5, 1.0, 2.0)] == pytest.approx([1, 0.5, 0, 0])
