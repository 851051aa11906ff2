"""The suite `fuse`: one head for two tasks."""

from __future__ import annotations

from dataclasses import fields, replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from tests.training.conftest import Toy, ToySuites
from text2weight.head import apply_heads, class_logits
from text2weight.weight_tokens import permute_units
from text2weight_training.stacked import HeadRecipe
from text2weight_training.suites import fuse
from text2weight_training.suites.base import SuiteRun, Task, task_accuracy
from text2weight_training.suites.fuse import Pair, draw_pairs
from text2weight_training.tasks import TaskSplit

MERGED = {"first alone", "second alone", "average", "git re-basin", "regmean", "task arithmetic", "ties"}
PAIRS = [Pair((0, 3, 5), (7, 1, 2)), Pair((4, 6, 8), (9, 10, 11))]


def test_every_way_is_measured(toy_suites: ToySuites) -> None:
    result = toy_suites.result("fuse")
    ways = MERGED | {"logit ensemble"}
    expected = {f"{source}/{way}" for source in ("generated", "trained") for way in ways}
    expected |= {"universal", "trained/union", "generated/union (mean/1)", "generated/union (ddim/3)"}
    assert set(result["methods"]) == expected
    assert result["headline"] == "generated/union (mean/1)"
    joint = [entry["joint"]["value"] for entry in result["methods"].values()]
    assert all(worse <= better for worse, better in pairwise(joint))


def test_gains_are_against_the_generated_union(toy_suites: ToySuites) -> None:
    result = toy_suites.result("fuse")
    methods = result["methods"]
    assert methods[result["headline"]]["gain"] == {"value": 0.0, "interval": [0.0, 0.0]}
    for entry in methods.values():
        expected = methods[result["headline"]]["joint"]["value"] - entry["joint"]["value"]
        assert entry["gain"]["value"] == pytest.approx(expected, abs=1e-6)


def test_what_must_be_better_is(toy_suites: ToySuites) -> None:
    methods = toy_suites.result("fuse")["methods"]
    joint = {name: entry["joint"]["value"] for name, entry in methods.items()}
    assert joint["trained/union"] > joint["trained/average"] > joint["trained/first alone"]
    assert methods["trained/first alone"]["first"]["value"] > methods["trained/first alone"]["second"]["value"] + 0.05
    assert methods["trained/second alone"]["second"]["value"] > methods["trained/second alone"]["first"]["value"] + 0.05


def test_trained_heads_are_regularised(suite_run: SuiteRun, monkeypatch: pytest.MonkeyPatch) -> None:
    recipes = []

    def train(run: SuiteRun, tasks: list[Task], recipe: HeadRecipe, seed: int) -> torch.Tensor:
        recipes.append(recipe)
        return run.zoo.universal.expand(len(tasks), -1)

    monkeypatch.setattr(fuse, "train_heads", train)
    fuse.run(suite_run)
    plain = suite_run.preset.evaluation.oracle
    assert recipes == [plain.model_copy(update={"label_smoothing": 0.1, "feature_dropout": 0.1})] * 3


def test_pairs_are_disjoint_distinct_and_new(toy: Toy, suite_run: SuiteRun) -> None:
    pairs = draw_pairs(suite_run, 40, 3)
    assert pairs == draw_pairs(suite_run, 40, 3)
    assert len({frozenset((frozenset(pair.first), frozenset(pair.second))) for pair in pairs}) == 40
    taken = {frozenset(task) for task in (*toy.zoo.split.seen, *toy.zoo.split.unseen)}
    for pair in pairs:
        assert len(set(pair.joint)) == 6
        assert not taken & {frozenset(pair.first), frozenset(pair.second), frozenset(pair.joint)}


@pytest.mark.parametrize("name", [field.name for field in fields(TaskSplit) if field.name != "held_out"])
def test_a_pair_that_the_zoo_knows_is_not_drawn(toy: Toy, suite_run: SuiteRun, name: str) -> None:
    first = draw_pairs(suite_run, 1, 3)[0]
    for known in (first.first, first.second[::-1], first.joint):
        split = replace(toy.zoo.split, **{name: (*getattr(toy.zoo.split, name), known)})
        other = replace(suite_run, zoo=replace(toy.zoo, split=split))
        assert draw_pairs(other, 1, 3)[0] != first


def test_equal_heads_merge_to_themselves(toy: Toy, suite_run: SuiteRun) -> None:
    two = toy.zoo.weights[:2].unsqueeze(1).expand(-1, 2, -1)  # (M, 2, P)
    merged, scales = fuse.merge_all(suite_run, PAIRS, two)
    assert set(merged) == MERGED
    for name in ("first alone", "second alone", "average", "git re-basin"):
        torch.testing.assert_close(merged[name], two[:, 0])
    torch.testing.assert_close(merged["regmean"], two[:, 0], atol=1e-3, rtol=1e-3)
    assert set(scales) == {"task arithmetic", "ties"}
    for scale in scales.values():
        assert scale in suite_run.preset.suites.fuse.scales
    torch.testing.assert_close(
        merged["task arithmetic"],
        toy.zoo.universal + 2 * scales["task arithmetic"] * (two[:, 0] - toy.zoo.universal),
        atol=1e-5,
        rtol=1e-5,
    )


def test_re_basin_mends_a_permuted_head_and_averaging_does_not(toy: Toy, suite_run: SuiteRun) -> None:
    head, pair = toy.zoo.universal, PAIRS[0]
    moved = permute_units(toy.preset.head, head, torch.tensor([2, 3, 1, 0]))
    merged, _ = fuse.merge_all(suite_run, [pair], torch.stack([head, moved])[None])
    right, mended, broken = (
        float(task_accuracy(suite_run, rows, pair.joint))
        for rows in (head[None], merged["git re-basin"], merged["average"])
    )
    assert mended == right
    assert broken < right - 0.1


def test_the_factor_is_the_one_that_classifies_training_features_best(toy: Toy, suite_run: SuiteRun) -> None:
    good = toy.zoo.universal
    bad = good + 2 * torch.randn(good.shape, generator=torch.Generator().manual_seed(0))
    variants = torch.stack([bad, good, -good])[:, None].expand(-1, 2, -1)  # (J, M, P)
    assert fuse._best_scale(suite_run, PAIRS, variants) == 1


def test_the_ensemble_averages_logits(toy: Toy, suite_run: SuiteRun) -> None:
    pair, heads = PAIRS[0], toy.zoo.weights[:2]
    features, targets = toy.data.test.of_task(pair.joint)
    texts = toy.data.embeddings[list(pair.joint)]
    outputs = apply_heads(toy.preset.head, heads, features)
    predicted = class_logits(outputs, texts, 10.0).mean(0).argmax(-1)
    scores = fuse._score_ensemble(suite_run, pair, heads)
    assert scores[0] == pytest.approx(float((predicted == targets).float().mean()), abs=0.01)
    alone = fuse._score_ensemble(suite_run, pair, torch.stack([heads[0], heads[0]]))
    expected = [float(task_accuracy(suite_run, heads[:1], task)) for task in (pair.joint, pair.first, pair.second)]
    np.testing.assert_allclose(alone, expected)


def test_the_report_has_a_row_per_method(toy_suites: ToySuites) -> None:
    result = toy_suites.result("fuse")
    text = fuse.report(result)
    for name in result["methods"]:
        assert f"\n| {name} |" in text or f"\n| **{name}** |" in text
    assert "5 pairs of disjoint tasks of 3 classes" in text


def test_the_report_marks_factors_at_the_edge_of_what_was_tried(toy_suites: ToySuites) -> None:
    result = toy_suites.result("fuse")
    assert result["tried"] == [0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 1.0]
    chosen = {
        "generated": {"task arithmetic": 0.02, "ties": 0.05},
        "trained": {"task arithmetic": 0.7, "ties": 1.0},
    }
    factors = "generated heads: task arithmetic {}, ties 0.05; trained heads: task arithmetic 0.7, ties {}."
    marks = "(of 0.02 to 1; * marks one at the edge), "
    text = fuse.report({**result, "scales": chosen})
    assert f"Factors chosen on training features {marks}{factors.format('0.02 *', '1 *')}" in text
    # Result files that do not say what was tried.
    text = fuse.report({**{key: value for key, value in result.items() if key != "tried"}, "scales": chosen})
    assert f"Factors chosen on training features, {factors.format('0.02', '1')}" in text
