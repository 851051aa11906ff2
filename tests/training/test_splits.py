"""The harder splits: what is held out stays out of training, and is what evaluation tasks are made of."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.conftest import Toy
from tests.training.toy import NAMES, hard_preset, toy_preset
from text2weight.checkpoint import read_config
from text2weight.weight_space import WeightSpace
from text2weight_training import fit as fit_module
from text2weight_training.baselines import (
    neighbour_average_heads,
    pooled_text,
    restricted_universal_head,
    ridge_heads,
)
from text2weight_training.evaluate import evaluate
from text2weight_training.files import TrainingDataError
from text2weight_training.fit import Fit
from text2weight_training.hypernetwork import train_hypernetwork
from text2weight_training.presets import ZooSettings
from text2weight_training.splits import choose_held_out, draw_fresh_tasks, draw_split, training_center
from text2weight_training.tasks import PADDING, HeldOut, TaskData, TaskSplit, draw_tasks
from text2weight_training.teacher import TeacherSettings, train_teacher
from text2weight_training.zoo import build_zoo, load_zoo, universal_head


def settings(**changes: Any) -> ZooSettings:
    return toy_preset(**{f"zoo__{name}": value for name, value in changes.items()}).zoo


def holds_a_pair(task: tuple[int, ...], held_out: HeldOut) -> bool:
    return any(one in task and other in task for one, other in held_out.pairs)


def test_with_nothing_held_out_the_draws_are_plain_ones() -> None:
    split = draw_split(NAMES, settings(), seed=3)
    assert split == draw_tasks(12, 48, (3, 6), 0.25, 3)
    assert split.held_out == HeldOut()
    source, twin = torch.Generator().manual_seed(8), torch.Generator().manual_seed(8)
    drawn = draw_fresh_tasks(TaskSplit((), ()), 12, 20, (2, 6), source)
    for row in drawn.tolist():
        size = int(torch.randint(2, 7, (), generator=twin))
        assert [label for label in row if label != PADDING] == torch.randperm(12, generator=twin)[:size].tolist()


def test_a_pick_replaces_the_later_class_of_a_held_out_pair() -> None:
    held_out = HeldOut(classes=(5,), pairs=((0, 1), (1, 2)))
    source, twin = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
    order = torch.randperm(5, generator=twin).tolist()
    task = held_out.pick(6, 3, source)
    assert task is not None
    expected: list[int] = []
    for label in order:
        if not any({label, other} in ({0, 1}, {1, 2}) for other in expected):
            expected.append(label)
    assert list(task) == expected[:3]
    # 0, 2, 3 and 4 are the only four classes that get along.
    assert {frozenset(held_out.pick(6, 4, source) or ()) for _ in range(20)} == {frozenset({0, 2, 3, 4})}
    assert held_out.pick(6, 5, source) is None


def test_allows_refuses_held_out_classes_and_pairs() -> None:
    split = TaskSplit(((0, 1),), ((0, 2),), held_out=HeldOut((5,), ((1, 3),)))
    assert split.allows((0, 1))
    assert split.allows((3, 2, 0))
    assert not split.allows((2, 0))
    assert not split.allows((0, 5))
    assert not split.allows((3, 0, 1))


def test_training_tasks_hold_no_held_out_pair_and_evaluation_tasks_do() -> None:
    split = draw_split(NAMES, settings(held_out_pairs=8), seed=1)
    assert len(set(split.held_out.pairs)) == 8
    assert split.held_out.classes == split.held_out_classes == split.mixed_classes == ()
    assert (len(split.seen), len(split.unseen), len(split.held_out_pairs)) == (36, 12, 12)
    training = [*split.seen, *split.unseen]
    assert not any(holds_a_pair(task, split.held_out) for task in training)
    assert {len(task) for task in training} == {3, 4, 5, 6}
    assert {label for task in training for label in task} == set(range(12))
    assert all(holds_a_pair(task, split.held_out) for task in split.held_out_pairs)
    assert all(3 <= len(task) <= 6 and len(set(task)) == len(task) for task in split.held_out_pairs)
    assert len({frozenset(task) for task in split.held_out_pairs}) == 12


def test_tasks_of_pairs_hold_as_many_as_fit() -> None:
    held_out = choose_held_out(NAMES, settings(held_out_pairs=66), seed=1)
    assert set(held_out.pairs) == set(combinations(range(12), 2))
    # Two disjoint pairs fill a task of four; with one pair the rest are other classes.
    zoo = settings(held_out_pairs=2, task_size=[4, 4])
    for seed in range(20):
        split = draw_split(NAMES, zoo, seed)
        joint = frozenset(label for pair in split.held_out.pairs for label in pair)
        if len(joint) == 4:
            assert {frozenset(task) for task in split.held_out_pairs} == {joint}
        else:  # the pairs share a class: all three fit, and one more
            assert all(joint < set(task) for task in split.held_out_pairs)


def test_held_out_classes_are_in_no_training_task() -> None:
    split = draw_split(NAMES, settings(held_out_classes=0.33, task_size=[2, 6]), seed=1)
    held_out = set(split.held_out.classes)
    assert len(held_out) == 4
    assert not held_out & {label for task in (*split.seen, *split.unseen) for label in task}
    assert all(set(task) <= held_out for task in split.held_out_classes)
    assert {len(task) for task in split.held_out_classes} <= {2, 3, 4}
    # All eleven combinations of two to four of four classes, although twelve were asked for.
    assert len({frozenset(task) for task in split.held_out_classes}) == len(split.held_out_classes) <= 11
    assert all(len(held_out & set(task)) == len(task) // 2 for task in split.mixed_classes)
    assert len({len(task) for task in split.mixed_classes}) > 2
    assert all(2 <= len(task) <= 6 for task in split.mixed_classes)
    assert len(split.mixed_classes) == 12


def test_classes_held_out_by_name_are_those_and_draw_what_a_fraction_of_them_draws() -> None:
    pairs = {"held_out_pairs": 4, "task_size": [2, 4]}
    drawn = draw_split(NAMES, settings(held_out_classes=0.25, **pairs), seed=3)
    named = [NAMES[label] for label in reversed(drawn.held_out.classes)]
    assert draw_split(NAMES, settings(held_out_classes=named, **pairs), seed=3) == drawn
    # Letter case and underscores do not matter, and another seed leaves them alone.
    spelled = settings(held_out_classes=["maple tree", "COFFEE_CUP", "Bus"], task_size=[2, 4])
    expected = tuple(sorted(NAMES.index(name) for name in ("maple_tree", "coffee cup", "Bus")))
    assert {choose_held_out(NAMES, spelled, seed).classes for seed in range(5)} == {expected}


def test_splits_made_by_a_fraction_stay_what_they_were() -> None:
    """A checkpoint names its split by this hash: zoos of finished runs must be drawn the same for ever."""
    split = draw_split(NAMES, hard_preset().zoo, hard_preset().seed)
    assert split.fingerprint.startswith("c0d0cdf04e51")


def test_both_at_once_hold_out_pairs_of_training_classes() -> None:
    split = draw_split(NAMES, settings(held_out_classes=0.25, held_out_pairs=0.12, task_size=[2, 5]), seed=2)
    held_out = set(split.held_out.classes)
    assert len(split.held_out.pairs) == round(0.12 * 36)
    assert not held_out & {label for pair in split.held_out.pairs for label in pair}
    assert not held_out & {label for task in split.held_out_pairs for label in task}
    assert not any(holds_a_pair(task, split.held_out) for task in split.mixed_classes)


def test_no_fresh_task_holds_what_is_held_out() -> None:
    split = draw_split(NAMES, settings(held_out_classes=0.25, held_out_pairs=5, task_size=[3, 5]), seed=4)
    drawn = draw_fresh_tasks(split, 12, 3000, (2, 5), torch.Generator().manual_seed(0))
    tasks = [tuple(label for label in row if label != PADDING) for row in drawn.tolist()]
    assert not any(set(task) & set(split.held_out.classes) or holds_a_pair(task, split.held_out) for task in tasks)
    assert {label for task in tasks for label in task} == set(split.held_out.training_classes(12))
    # Sizes stay uniform: a replaced class is no lost class.
    counts = torch.bincount((drawn != PADDING).sum(1), minlength=6)[2:]
    assert bool((counts - 750).abs().max() < 150)
    # Every pair that is not held out is met.
    met = {frozenset(pair) for task in tasks for pair in combinations(task, 2)}
    assert len(met) == 36 - 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"held_out_classes": 0.1}, r"0.1 holds out 1 of 12 classes, but tasks of them have at least 3: hold out more"),
        ({"held_out_classes": 0.75}, r"3 to 6 classes need .* <= 3 \(9 of 12 classes are held out\)"),
        (
            {"held_out_classes": ["bus", "sea"]},
            r"zoo.held_out_classes holds out 2 of 12 classes, but tasks of them have at least 3: hold out more",
        ),
        (
            {"held_out_classes": ["bus", "sea", "Lizzard"]},
            r"zoo.held_out_classes names 'Lizzard', which is none of the 12 classes; the nearest are lizard, ",
        ),
        ({"held_out_classes": ["bus", "sea", "Bus"]}, r"zoo.held_out_classes names 'Bus' twice: name each class once"),
        ({"held_out_pairs": 67}, "67 holds out 67 of 66 pairs .*: allowed are 1 to 66"),
        ({"held_out_pairs": 0.001}, "0.001 holds out 0 of 66 pairs .*: allowed are 1 to 66"),
        ({"held_out_pairs": 60}, "60 held-out pairs leave hardly a task of .* of 12 classes without one: lower"),
        ({"task_size": [8, 13]}, "2 <= least <= greatest <= 12"),
    ],
)
def test_what_cannot_be_drawn_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainingDataError, match=message):
        draw_split(NAMES, settings(**changes), seed=0)


def test_fresh_tasks_that_are_too_large_for_the_pairs_are_refused() -> None:
    split = TaskSplit(((0, 2),), (), held_out=HeldOut(pairs=((0, 1), (2, 3))))
    with pytest.raises(TrainingDataError, match=r"hardly a task of [34] of 4 classes .* lower fit.fresh_task_size"):
        draw_fresh_tasks(split, 4, 50, (3, 4), torch.Generator().manual_seed(0))


def test_the_zoo_directory_carries_the_splits(hard_toy: Toy) -> None:
    split = load_zoo(hard_toy.zoo_folder).split
    assert split == draw_split(NAMES, hard_toy.preset.zoo, hard_toy.preset.seed)
    assert len(split.held_out.classes) == 3
    assert len(split.held_out.pairs) == 4
    assert min(len(split.held_out_pairs), len(split.held_out_classes), len(split.mixed_classes)) > 0
    assert torch.equal(build_zoo(hard_toy.data, hard_toy.preset, hard_toy.zoo_folder).weights, hard_toy.zoo.weights)


def test_a_zoo_with_nothing_held_out_says_nothing_of_it(toy: Toy) -> None:
    manifest = json.loads((toy.zoo_folder / "manifest.json").read_text())
    assert not [key for key in (*manifest, *manifest["settings"]) if "held_out" in key or "mixed" in key]


def test_a_zoo_of_another_hold_out_is_not_continued(hard_toy: Toy) -> None:
    for changes in ({"zoo__held_out_pairs": 5}, {"zoo__held_out_pairs": 0}):
        with pytest.raises(TrainingDataError, match=r"holds a zoo with another .*settings"):
            build_zoo(hard_toy.data, hard_preset(**changes), hard_toy.zoo_folder)


def with_garbage(data: TaskData, classes: tuple[int, ...]) -> TaskData:
    """Other features and embeddings for some classes."""
    source = torch.Generator().manual_seed(9)
    embeddings, splits = data.embeddings.clone(), []
    for part in (data.train, data.test):
        features = part.features.clone()
        for label in classes:
            rows = slice(int(part.starts[label]), int(part.starts[label + 1]))
            features[rows] = 50 * torch.randn(features[rows].shape, generator=source).half()
        splits.append(replace(part, features=features))
    for label in classes:
        embeddings[label] = torch.nn.functional.normalize(torch.randn(embeddings.shape[1], generator=source), dim=0)
    return replace(data, train=splits[0], test=splits[1], embeddings=embeddings)


def test_held_out_classes_leak_into_no_training(hard_toy: Toy, tmp_path: Path) -> None:
    zoo, preset = hard_toy.zoo, hard_toy.preset
    data = with_garbage(hard_toy.data, zoo.split.held_out.classes)
    other = build_zoo(data, preset, tmp_path / "zoo")
    for name in ("base", "universal", "weights", "accuracy"):
        assert torch.equal(getattr(other, name), getattr(zoo, name)), name
    assert torch.equal(
        training_center(data.embeddings, zoo.split), training_center(hard_toy.data.embeddings, zoo.split)
    )
    fits = [
        Fit(each, replace(zoo, manifest=zoo.manifest | {"data_sha256": each.fingerprint}), preset, path, "cpu")
        for each, path in ((hard_toy.data, tmp_path / "a.pt"), (data, tmp_path / "b.pt"))
    ]
    for fit in fits:
        fit.run()
    states = [fit.average.state_dict() for fit in fits]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert torch.equal(fits[0].average.embedding_center, fits[1].average.embedding_center)  # type: ignore[arg-type]
    # The garbage is seen where it may be: by a training class of the same kind.
    swapped = with_garbage(hard_toy.data, (zoo.split.seen[0][0],))
    assert not torch.equal(build_zoo(swapped, preset, tmp_path / "swapped").universal, zoo.universal)


def baselines(toy: Toy, data: TaskData) -> dict[str, torch.Tensor]:
    """Everything else that is trained on the data or the zoo, on tasks and training features that are not held out."""
    zoo, preset = toy.zoo, toy.preset
    split, tasks = zoo.split, list(zoo.split.unseen)
    center = training_center(data.condition_embeddings, split)
    recipe = preset.zoo.universal.model_copy(update={"label_smoothing": 0.1, "feature_dropout": 0.1})
    space = WeightSpace.fit(preset.head, zoo.universal, zoo.weights)
    hypernetwork = train_hypernetwork(data, zoo, space, 3000, preset.suites.accuracy.hypernetwork, 0)
    described, asked = (pooled_text(data, of, center) for of in (split.seen, tasks))
    answers = train_teacher(data, split, TeacherSettings(width=16, epochs=2, batch_size=64), 0)
    rows = [slice(int(data.train.starts[label]), int(data.train.starts[label + 1])) for label in range(12)]
    return {
        "universal, trained on tasks": restricted_universal_head(
            data, split, preset, zoo.universal, preset.suites.accuracy.restricted_universal
        ),
        "universal, regularised": universal_head(data, split, preset, recipe, lambda: None),
        "hypernetwork": hypernetwork.heads(tasks),
        "ridge": ridge_heads(described, zoo, asked),
        "neighbours": neighbour_average_heads(data, zoo, tasks, preset.head)[0],
        "teacher": torch.cat([answers[rows[label]] for label in split.held_out.training_classes(12)]),
    }


def test_held_out_classes_leak_into_no_baseline(hard_toy: Toy) -> None:
    split = hard_toy.zoo.split
    expected = baselines(hard_toy, hard_toy.data)
    for name, result in baselines(hard_toy, with_garbage(hard_toy.data, split.held_out.classes)).items():
        assert torch.equal(result, expected[name]), name
    # Garbage in the training classes is seen by all of them.
    swapped = baselines(hard_toy, with_garbage(hard_toy.data, split.held_out.training_classes(12)))
    for name, result in swapped.items():
        assert not torch.equal(result, expected[name]), name


def test_the_fit_never_trains_on_what_is_held_out(
    hard_toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    met: list[tuple[int, ...]] = []
    make_batch = fit_module.make_task_batch

    def watch(tasks: torch.Tensor, *rest: Any) -> Any:
        met.extend(tuple(label for label in row if label != PADDING) for row in tasks.tolist())
        return make_batch(tasks, *rest)

    monkeypatch.setattr(fit_module, "make_task_batch", watch)
    Fit(hard_toy.data, hard_toy.zoo, hard_toy.preset, tmp_path / "s.pt", "cpu").run()
    split = hard_toy.zoo.split
    assert len(met) == (12 + 4) * 16  # the steps, and what is looked at before each saved state
    assert all(split.allows(task) for task in met)


def test_a_checkpoint_names_the_classes_it_was_trained_on(hard_toy: Toy, tmp_path: Path) -> None:
    fit = Fit(hard_toy.data, hard_toy.zoo, hard_toy.preset, tmp_path / "s.pt", "cpu")
    fit.write_checkpoint(tmp_path / "checkpoint")
    held_out = hard_toy.zoo.split.held_out
    expected = tuple(name for label, name in enumerate(hard_toy.data.classes) if label not in held_out.classes)
    assert read_config(tmp_path / "checkpoint").classes == expected
    result = evaluate(hard_toy.data, hard_toy.zoo, tmp_path / "checkpoint", hard_toy.preset, tmp_path / "e.json")
    assert result["tasks"] == 8
