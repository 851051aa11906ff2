"""The suite `init`: generated heads as the start of training."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.training.conftest import Toy, ToySuites
from tests.training.toy import toy_preset
from text2weight.head import apply_heads, class_logits
from text2weight_training.bootstrap import PairedBootstrap
from text2weight_training.initialisation import RANDOM_STARTS
from text2weight_training.stacked import HeadRecipe, heads_accuracy
from text2weight_training.suites import init
from text2weight_training.suites.base import SuiteRun, own_accuracy, task_loss, train_heads, training_sample

HEADLINE = "generated (mean/1)"
TASKS = [(0, 3, 5), (7, 1, 2, 4)]


def test_every_start_is_measured(toy_suites: ToySuites) -> None:
    result = toy_suites.result("init")
    assert set(result["starts"]) == {HEADLINE, "universal", "nearest zoo head", "mean head", "base", *RANDOM_STARTS}
    assert result["headline"] == HEADLINE
    for entry in result["starts"].values():
        assert len(entry["loss"]) == len(entry["accuracy"]) == len(result["steps"]) == 5
        assert f"{entry['learning_rate']:g}" in entry["tuning"]
        assert entry["tuning"][f"{entry['learning_rate']:g}"] == max(entry["tuning"].values())


def test_training_helps_and_a_trained_start_leads_at_first(toy_suites: ToySuites) -> None:
    starts = toy_suites.result("init")["starts"]
    for rule in RANDOM_STARTS:
        loss = [entry["value"] for entry in starts[rule]["loss"]]
        assert loss[-1] < loss[0]
        assert starts[rule]["accuracy"][0]["value"] < starts["universal"]["accuracy"][0]["value"]
        assert starts[rule]["gain"]["before"]["value"] > 0.1


def test_gains_are_against_the_headline_at_the_named_steps(toy_suites: ToySuites) -> None:
    result = toy_suites.result("init")
    lead = result["starts"][HEADLINE]
    assert lead["gain"]["end"] == {"value": 0.0, "interval": [0.0, 0.0]}
    few = result["steps"].index(result["few"])
    for entry in result["starts"].values():
        for place, i in (("before", 0), ("few", few), ("end", -1)):
            expected = lead["accuracy"][i]["value"] - entry["accuracy"][i]["value"]
            assert entry["gain"][place]["value"] == pytest.approx(expected, abs=1e-6)


def test_the_oracle_is_the_regularised_one(suite_run: SuiteRun) -> None:
    tasks, recipe = list(suite_run.zoo.split.unseen[:4]), suite_run.preset.evaluation.oracle
    smoothed = recipe.model_copy(update={"label_smoothing": 0.1, "feature_dropout": 0.1})
    heads = train_heads(suite_run, tasks * 2, smoothed, suite_run.preset.seed + 77)
    expected = own_accuracy(suite_run, tasks * 2, heads).reshape(2, 4).mean(0)
    assert init._oracle(suite_run, tasks) == pytest.approx(expected)
    plain = train_heads(suite_run, tasks * 2, recipe, suite_run.preset.seed + 77)
    assert own_accuracy(suite_run, tasks * 2, plain).reshape(2, 4).mean(0) != pytest.approx(expected)


def test_tuning_tasks_are_not_measured(suite_run: SuiteRun, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[tuple[int, ...]]] = []
    rate = suite_run.preset.suites.init.learning_rates[0]

    def tune(run: SuiteRun, tasks: list[tuple[int, ...]], start: init.Start) -> dict[float, float]:
        seen.append(tasks)
        return {rate: 0.5}

    monkeypatch.setattr(init, "tune", tune)
    result = init.run(suite_run)
    unseen = list(suite_run.zoo.split.unseen)
    assert all(tasks == unseen[4:6] for tasks in seen)
    assert result["tasks"] == 4


def test_the_curve_is_the_one_of_plain_training(toy: Toy, suite_run: SuiteRun) -> None:
    """The head after the last step is what training returns; the one at step 0 is the start."""
    recipe = HeadRecipe(steps=6, batch_size=16, learning_rate=1e-2, weight_decay=0.1)
    starts = toy.zoo.weights[:4]
    heads = init.heads_on_the_way(suite_run, TASKS * 2, recipe, starts, (0, 1, 6))
    assert heads.shape == (3, 4, toy.preset.head.num_parameters)
    assert torch.equal(heads[0], starts)
    assert torch.equal(heads[2], train_heads(suite_run, TASKS * 2, recipe, suite_run.preset.seed, starts))
    # AdamW's first step moves every number by the learning rate, after the decay.
    moved = (heads[1] - starts * (1 - 1e-2 * 0.1)).abs()
    assert float(moved.median()) == pytest.approx(1e-2, rel=1e-2)


def test_stacks_are_joined_in_order(toy: Toy, suite_run: SuiteRun) -> None:
    """More heads than one stack (12) holds."""
    recipe = HeadRecipe(steps=2, batch_size=8, learning_rate=1e-2, weight_decay=0.0)
    starts = toy.zoo.weights[:14]
    heads = init.heads_on_the_way(suite_run, TASKS * 7, recipe, starts, (1, 2))
    trained = train_heads(suite_run, TASKS * 7, recipe, suite_run.preset.seed, starts)
    assert torch.equal(heads[1], trained)
    assert float((heads[0] - starts).abs().max()) <= 1.01e-2


def test_curves_are_of_the_right_task_seed_and_step(toy: Toy, suite_run: SuiteRun) -> None:
    def start(tasks: list[tuple[int, ...]], seed: int) -> torch.Tensor:
        first = (seed - suite_run.preset.seed) // init.REPEAT_SEED * 2
        return toy.zoo.weights[first : first + 2]

    curves = init.train_curves(suite_run, TASKS, start, 1e-2, seeds=3, steps=(0, 2))
    assert curves.loss.shape == curves.accuracy.shape == (2, 3, 2)
    for repeat in range(3):
        for i, task in enumerate(TASKS):
            head = toy.zoo.weights[2 * repeat + i]
            expected = heads_accuracy(toy.preset.head, head[None], task, toy.data.test, toy.data.embeddings)
            assert curves.accuracy[0, repeat, i] == pytest.approx(float(expected), abs=0.02)
            features, targets = training_sample(suite_run, task, 64)
            loss = task_loss(suite_run, head[None], task, features, targets)
            assert curves.loss[0, repeat, i] == pytest.approx(float(loss), rel=1e-4)


def test_the_loss_is_the_cross_entropy_of_the_tasks_own_softmax(toy: Toy, suite_run: SuiteRun) -> None:
    task, heads = TASKS[1], toy.zoo.weights[:130]  # more than are evaluated at once
    heads = heads[torch.arange(130) % len(heads)]
    features, targets = training_sample(suite_run, task, 20)
    losses = task_loss(suite_run, heads, task, features, targets)
    outputs = apply_heads(toy.preset.head, heads, features)
    logits = class_logits(outputs, toy.data.embeddings[list(task)], 10.0)
    expected = torch.stack([F.cross_entropy(rows, targets) for rows in logits])
    torch.testing.assert_close(losses, expected, atol=1e-5, rtol=1e-5)


def test_steps_until_a_goal_and_trainings_that_never_get_there() -> None:
    # (T, S, M): one seed, three tasks; the second falls back after it got there, the third never does.
    accuracy = np.array([[[0.1, 0.9, 0.1]], [[0.8, 0.2, 0.2]], [[0.9, 0.3, 0.3]]])
    goal = np.array([0.8, 0.8, 0.8])
    until = init.steps_until(accuracy, goal, (0, 10, 100))
    assert until.tolist() == [[10, 0, math.inf]]
    reaching = init._reaching(accuracy, goal, (0, 10, 100), PairedBootstrap(3, 50, 0))
    assert reaching["median"] == 10
    assert reaching["mean"]["value"] == pytest.approx((10 + 0 + 100) / 3)
    assert reaching["not_reached"]["value"] == pytest.approx(1 / 3)
    hopeless = init._reaching(accuracy[:, :, [2, 2, 0]], goal, (0, 10, 100), PairedBootstrap(3, 50, 0))
    assert hopeless["median"] is None


def test_goals_are_each_tasks_own() -> None:
    accuracy = np.full((1, 2, 2), 0.5)
    assert init.steps_until(accuracy, np.array([0.4, 0.6]), (7,)).tolist() == [[7, math.inf], [7, math.inf]]


def test_the_lower_of_equally_good_rates_is_chosen() -> None:
    assert init.best_rate({0.1: 0.5, 0.01: 0.7, 0.001: 0.7}) == 0.001


def test_the_report_says_what_was_not_reached_and_what_lies_at_the_edge(toy_suites: ToySuites) -> None:
    result = toy_suites.result("init")
    text = init.report(result)
    for name in result["starts"]:
        assert text.count(f"\n| {name} |") + text.count(f"\n| **{name}** |") == 2
    assert "Steps until 95 % of the oracle's accuracy" in text
    entry = {**result["starts"]["base"], "reaching": {**result["starts"]["base"]["reaching"], "median": None}}
    changed = init.report({**result, "starts": {**result["starts"], "base": entry}})
    assert "\n| base | not reached |" in changed
    assert f"| base | {entry['learning_rate']:g} * |" in text  # of two rates either is at the edge


def test_settings_that_make_no_curve_are_refused() -> None:
    def refused(message: str, **changes: object) -> None:
        with pytest.raises(ValueError, match=message):
            toy_preset(**changes)

    refused("must begin with 0, rise", suites__init__steps=[1, 4])
    refused("must begin with 0, rise", suites__init__steps=[0, 4, 4])
    refused("must begin with 0, rise", suites__init__steps=[0])
    refused("few is 5: choose one of steps", suites__init__few=5)
    refused(r"suites\.init\.tasks \+ tuning_tasks is 14, but the zoo keeps only 12", suites__init__tasks=12)
