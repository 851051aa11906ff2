"""The accuracy suite's baselines, each on a case whose answer is known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import Ridge

from tests.training.conftest import Toy
from tests.training.toy import toy_preset
from text2weight.head import HeadSpec
from text2weight.weight_space import WeightSpace
from text2weight_training import feature_classifiers
from text2weight_training.baselines import (
    accuracies,
    neighbour_average_heads,
    oracle_heads,
    overlapping_heads,
    restricted_universal_head,
    text_similarity,
    weight_error,
)
from text2weight_training.feature_classifiers import (
    prototype_scores,
    ridge_scores,
    zero_shot_obstacle,
    zero_shot_scores,
)
from text2weight_training.files import TrainingDataError
from text2weight_training.hypernetwork import Hypernetwork, describe_tasks, matching_width, train_hypernetwork
from text2weight_training.splits import draw_fresh_tasks
from text2weight_training.stacked import HeadRecipe, stacked_logits
from text2weight_training.suites.base import plain, regularised
from text2weight_training.suites.settings import HypernetworkSettings
from text2weight_training.tasks import ClassFeatures, TaskData, task_embeddings


def separable_data(backbone: str = "open_clip:a/b") -> TaskData:
    """Three classes along three axes, with different lengths and little noise."""
    labels = torch.arange(3).repeat_interleave(20)
    noise = 0.05 * torch.randn(60, 3, generator=torch.Generator().manual_seed(0))
    features = torch.eye(3)[labels] * torch.tensor([1.0, 4.0, 9.0])[labels][:, None] + noise
    data = ClassFeatures.from_labels(features, labels, 3)
    embeddings = torch.eye(3)
    return TaskData(
        ("a", "b", "c"), embeddings, "a {}", "", data, data, {"name": backbone}, "", text_model="open_clip:a/b"
    )


def score(data: TaskData, task: tuple[int, ...], scores: torch.Tensor) -> float:
    return float((scores.argmax(-1) == data.test.of_task(task)[1]).float().mean())


def test_overlap_finds_a_tasks_own_head_in_any_order(toy: Toy) -> None:
    tasks = [task[::-1] for task in toy.zoo.split.seen[:6]]
    assert torch.equal(overlapping_heads(toy.data, toy.zoo, tasks), toy.zoo.weights[:6])


def test_overlap_counts_what_is_not_shared_too(toy: Toy) -> None:
    split = replace(toy.zoo.split, seen=((0, 1, 2, 3, 4, 5), (0, 1, 6), (7, 8)))
    zoo = replace(toy.zoo, split=split, weights=toy.zoo.weights[:3])
    # (0, 1) shares 2 of 6 classes with the first, 2 of 3 with the second; (10, 11) shares none with any.
    found = overlapping_heads(toy.data, zoo, [(0, 1), (8, 11), (10, 11)])
    assert torch.equal(found, torch.stack([zoo.weights[1], zoo.weights[2], zoo.universal]))


def test_the_average_of_identical_heads_is_that_head(toy: Toy) -> None:
    same = replace(toy.zoo, weights=toy.zoo.weights[:1].expand(36, -1))
    heads, _ = neighbour_average_heads(toy.data, same, list(toy.zoo.split.unseen[:4]), toy.preset.head)
    torch.testing.assert_close(heads, toy.zoo.weights[:1].expand(4, -1))


def test_the_average_is_over_the_nearest_and_k_is_the_best(toy: Toy) -> None:
    tasks = list(toy.zoo.split.unseen[:4])
    heads, k = neighbour_average_heads(toy.data, toy.zoo, tasks, toy.preset.head)
    for row, similarity in zip(heads, text_similarity(toy.data, toy.zoo, tasks), strict=True):
        nearest = similarity.argsort(descending=True)[:k]
        torch.testing.assert_close(row, toy.zoo.weights[nearest].mean(0))
    # Heads that are useless except in the mean of all: the largest power of two comes closest to it.
    sign = torch.tensor([1.0, -1.0]).repeat(18)[:, None]
    noise = 3 * torch.randn(36, toy.preset.head.num_parameters, generator=torch.Generator().manual_seed(0)) * sign
    noisy = replace(toy.zoo, weights=toy.zoo.universal + noise)
    assert neighbour_average_heads(toy.data, noisy, tasks, toy.preset.head)[1] >= 8


def restricted_loss(toy: Toy, head: torch.Tensor) -> float:
    """Mean training loss of one head on tasks of the kind it is judged on."""
    source = torch.Generator().manual_seed(99)
    tasks = draw_fresh_tasks(toy.zoo.split, 12, 64, toy.preset.fit.fresh_task_size, source)
    features, targets = toy.data.train.sample(tasks, 128, source)
    text, mask = task_embeddings(toy.data.embeddings, tasks)
    logits = stacked_logits(toy.preset.head, head.expand(len(tasks), -1), features, text, toy.preset.logit_scale, mask)
    return float(F.cross_entropy(logits.flatten(0, 1), targets.flatten()))


def restricted(toy: Toy, recipe: HeadRecipe, on_step: Callable[[], None] | None = None) -> torch.Tensor:
    return restricted_universal_head(toy.data, toy.zoo.split, toy.preset, toy.zoo.universal, recipe, on_step)


def test_the_universal_head_trained_on_tasks_has_the_lower_loss_on_them(hard_toy: Toy) -> None:
    steps, recipe = [], hard_toy.preset.suites.accuracy.restricted_universal
    head = restricted(hard_toy, recipe, lambda: steps.append(1))
    assert len(steps) == 60
    assert restricted_loss(hard_toy, head) < restricted_loss(hard_toy, hard_toy.zoo.universal) - 0.005
    assert torch.equal(head, restricted(hard_toy, recipe))


def test_a_diverging_universal_head_is_an_error(hard_toy: Toy) -> None:
    with pytest.raises(
        TrainingDataError, match=r"diverged at step 2 .*: lower suites.accuracy.restricted_universal.learning_rate"
    ):
        restricted(hard_toy, HeadRecipe(steps=3, learning_rate=1e38))


def test_the_restricted_universal_head_honours_smoothing_and_dropout(hard_toy: Toy) -> None:
    recipe = HeadRecipe(steps=3, batch_size=32, learning_rate=1e-2)
    heads = [
        restricted(hard_toy, recipe.model_copy(update=changes))
        for changes in ({}, {"label_smoothing": 0.3}, {"feature_dropout": 0.3})
    ]
    assert not torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_regularised_baselines_differ_from_the_plain_ones_by_the_regularisers_alone() -> None:
    preset = toy_preset(suites__accuracy={"label_smoothing": 0.1, "feature_dropout": 0.2})
    recipe = preset.zoo.universal
    assert regularised(preset, recipe) == HeadRecipe(
        **recipe.model_dump() | {"label_smoothing": 0.1, "feature_dropout": 0.2}
    )
    assert plain(regularised(preset, recipe)) == recipe


def test_weight_error_by_hand(toy: Toy) -> None:
    space = WeightSpace(torch.zeros(2), torch.zeros(2), torch.tensor([1.0, 2.0]))
    targets = torch.tensor([[0.0, 0.0], [1.0, 2.0]])
    # Deviations in units of the scale: (1, 1) and (0, 0), then (1, 2) and (0, 1).
    assert weight_error(space, torch.tensor([[1.0, 2.0], [1.0, 2.0]]), targets) == 0.5
    assert weight_error(space, torch.tensor([1.0, 4.0]), targets) == pytest.approx((1 + 4 + 0 + 1) / 4)
    assert weight_error(space, targets, targets) == 0


def test_accuracies_take_predictors_beside_weights(toy: Toy) -> None:
    tasks = list(toy.zoo.split.seen[:3])

    def always_first(task: tuple[int, ...], features: torch.Tensor) -> torch.Tensor:
        return torch.eye(len(task))[0].expand(len(features), -1)

    both = accuracies(toy.data, toy.preset.head, tasks, {"first": always_first, "universal": toy.zoo.universal})
    assert both["first"].tolist() == pytest.approx([1 / len(task) for task in tasks])
    alone = accuracies(toy.data, toy.preset.head, tasks, {"universal": toy.zoo.universal})
    assert both["universal"].tolist() == alone["universal"].tolist()
    assert accuracies(toy.data, toy.preset.head, tasks, {"first": always_first})["first"].shape == (3,)


def test_prototypes_and_ridge_separate_what_is_separable() -> None:
    data = separable_data()
    for task in ((0, 1, 2), (2, 0)):
        features, _ = data.test.of_task(task)
        assert score(data, task, prototype_scores(data, task, features)) == 1
        assert score(data, task, ridge_scores(data, task, features)) == 1


def test_prototypes_are_class_means_by_cosine() -> None:
    labels = torch.tensor([0, 0, 1])
    data = replace(
        separable_data(), train=ClassFeatures.from_labels(torch.tensor([[2.0, 0], [0, 2], [9, 0]]), labels, 2)
    )
    # Means (1, 1) and (9, 0); the point (3, 2) is nearer to the first by angle.
    scores = prototype_scores(data, (1, 0), torch.tensor([[3.0, 2.0]]))
    expected = [3 / 13**0.5, 5 / (13 * 2) ** 0.5]
    assert scores[0].tolist() == pytest.approx(expected)


def test_the_ridge_fit_is_scikit_learns() -> None:
    source = torch.Generator().manual_seed(0)
    features, targets = torch.randn(50, 6, generator=source) + 2, torch.randint(3, (50,), generator=source)
    centred = features - features.mean(0)
    for share in (0.01, 1.0):
        ((weight, bias),) = feature_classifiers._ridge_fits(features, targets, 3, (share,))
        strength = share * float(centred.square().sum()) / 6
        expected = Ridge(alpha=strength).fit(features.numpy(), F.one_hot(targets, 3).float().numpy())
        torch.testing.assert_close(weight.T, torch.from_numpy(expected.coef_).float(), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(bias, torch.from_numpy(expected.intercept_).float(), atol=1e-4, rtol=1e-4)


def test_zero_shot_needs_clips_own_features() -> None:
    clip = separable_data()
    assert zero_shot_obstacle(clip) is None
    features, _ = clip.test.of_task((2, 0))
    assert score(clip, (2, 0), zero_shot_scores(clip, (2, 0), features)) == 1
    assert zero_shot_obstacle(separable_data(backbone="resnet18")) == (
        "the features are of resnet18, not of CLIP's image tower"
    )
    assert zero_shot_obstacle(separable_data(backbone="open_clip:a/c")) == (
        "the features are of open_clip:a/c, the text embeddings of open_clip:a/b; give --text open_clip:a/c"
    )


@pytest.mark.parametrize("parameters", [1, 5_000, 6_000_000])
def test_the_hypernetwork_is_as_large_as_asked(parameters: int) -> None:
    width = matching_width(16, 30, parameters)
    count = sum(parameter.numel() for parameter in Hypernetwork(16, width, 30).parameters())
    larger = sum(parameter.numel() for parameter in Hypernetwork(16, width + 1, 30).parameters())
    assert count <= parameters < larger or (width == 1 and parameters == 1)


def test_descriptions_are_pooled_text_and_mean(toy: Toy) -> None:
    center = torch.full((8,), 0.1)
    described = describe_tasks(toy.data, [(3, 4), (0, 1, 2)], center)
    assert described.shape == (2, 16)
    torch.testing.assert_close(described[0, :8], described[0, 8:])  # two classes: prior attention is an average
    torch.testing.assert_close(described[1, 8:], toy.data.embeddings[:3].mean(0) - center)


def test_the_hypernetwork_learns_heads_that_the_text_decides(toy: Toy) -> None:
    spec = toy.preset.head
    mapping = torch.randn(16, spec.num_parameters, generator=torch.Generator().manual_seed(1))
    center = toy.data.embeddings.mean(0)
    weights = toy.zoo.universal + describe_tasks(toy.data, toy.zoo.split.seen, center) @ mapping
    zoo = replace(toy.zoo, weights=weights)
    space = WeightSpace.fit(spec, zoo.universal, weights)
    # The first rate hardly moves in so few steps, and the first width is a single unit.
    settings = HypernetworkSettings(
        steps=300, batch_size=32, learning_rates=(1e-6, 1e-2), weight_decays=(0.0,), widths=(0.001, 1.0)
    )
    steps: list[int] = []
    trained = train_hypernetwork(toy.data, zoo, space, 20_000, settings, 0, lambda: steps.append(1))
    assert len(steps) == settings.total_steps == 1200
    heads, chosen = trained.heads, trained.chosen
    assert chosen["learning_rate"] == 1e-2
    widest = matching_width(16, spec.num_parameters, 20_000)
    assert chosen["width"] == widest > 1
    assert chosen["steps"] == 300
    assert chosen["tried"] == {"learning_rate": [1e-6, 1e-2], "weight_decay": [0.0], "width": [1, widest]}
    tasks = list(zoo.split.unseen)
    targets = zoo.universal + describe_tasks(toy.data, tasks, center) @ mapping
    assert weight_error(space, heads(tasks), targets) < 0.3 * weight_error(space, weights.mean(0), targets)


def test_a_hypernetwork_that_cannot_learn_is_an_error(toy: Toy) -> None:
    space = WeightSpace.fit(toy.preset.head, toy.zoo.universal, toy.zoo.weights)
    wild = HypernetworkSettings(steps=20, learning_rates=(1e38,))
    with pytest.raises(TrainingDataError, match=r"1e\+38: take it out of suites.accuracy.hypernetwork.learning_rates"):
        train_hypernetwork(toy.data, toy.zoo, space, 5000, wild, seed=0)
    lone = replace(toy.zoo, weights=toy.zoo.weights[:1])
    with pytest.raises(TrainingDataError, match=r"at least 2 zoo heads: raise zoo.tasks"):
        train_hypernetwork(toy.data, lone, space, 5000, wild, seed=0)


def test_the_oracle_from_the_universal_head_is_the_zoos_recipe(toy: Toy) -> None:
    """With the zoo's recipe, seed and tasks, the oracle is the zoo's head: weight error 0."""
    preset = toy_preset()
    tasks = list(toy.zoo.split.seen[:12])
    heads = oracle_heads(
        toy.data, toy.zoo, tasks, preset.head, preset.logit_scale, preset.zoo.heads, 12, preset.seed + 1, lambda _: None
    )
    space = WeightSpace.fit(HeadSpec(**preset.head.model_dump()), toy.zoo.universal, toy.zoo.weights)
    assert weight_error(space, heads["universal"], toy.zoo.weights[:12]) == 0
    assert weight_error(space, heads["base"], toy.zoo.weights[:12]) > 0
