"""The suite `headline`: which tasks, how the oracle is tuned, what is kept, and the gap by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.training.conftest import Toy
from tests.training.toy import hard_preset
from text2weight_training.files import TrainingDataError
from text2weight_training.presets import load_preset
from text2weight_training.stacked import HeadRecipe
from text2weight_training.suites import headline
from text2weight_training.suites.base import SuiteRun, own_accuracy
from text2weight_training.suites.headline import PLAIN, REGULARISED, Ledger, Training, draw_tasks, report, summarise


@pytest.fixture(scope="module")
def measured(suite_run: SuiteRun, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return headline.run(replace(suite_run, out=tmp_path_factory.mktemp("headline")))


def with_settings(run: SuiteRun, **changes: object) -> SuiteRun:
    settings = run.preset.suites.headline.model_copy(update=changes)
    suites = run.preset.suites.model_copy(update={"headline": settings})
    return replace(run, preset=run.preset.model_copy(update={"suites": suites}))


def test_combinations_are_no_tasks_of_the_zoo_and_not_tuned_on(suite_run: SuiteRun) -> None:
    # So many that those of the zoo would be among them.
    run = with_settings(suite_run, tasks=900, tuning_tasks=100)
    tuning, tasks = draw_tasks(run)
    assert (len(tuning), len(tasks)) == (100, 900)
    drawn = {frozenset(task) for task in tuning + tasks}
    assert len(drawn) == 1000
    split = run.zoo.split
    assert not drawn & {frozenset(task) for task in (*split.seen, *split.unseen)}
    assert {len(task) for task in drawn} == {3, 4, 5, 6}
    assert draw_tasks(run) == (tuning, tasks)


def test_what_is_held_out_stays_held_out(suite_run: SuiteRun, hard_toy: Toy) -> None:
    run = with_settings(replace(suite_run, zoo=hard_toy.zoo, preset=hard_preset()), tasks=20, tuning_tasks=5)
    tuning, tasks = draw_tasks(run)
    assert all(hard_toy.zoo.split.held_out.allows(task) for task in tuning + tasks)


def test_too_many_combinations_are_refused(suite_run: SuiteRun) -> None:
    with pytest.raises(TrainingDataError, match=r"headline.tasks \+ tuning_tasks is 5003: only \d+ class combinations"):
        draw_tasks(with_settings(suite_run, tasks=5000))


def test_full_size_is_the_default() -> None:
    full, small = load_preset("reference").suites.headline, load_preset("small").suites.headline
    assert (full.tasks, full.generation_seeds, full.oracle_seeds) == (500, 3, 3)
    assert small.tasks < full.tasks


def test_tuning_climbs_setting_by_setting_until_nothing_is_better(
    suite_run: SuiteRun, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = []

    def accuracy(*arguments: Any) -> np.ndarray:
        training = arguments[3]
        recipe = training.recipe
        asked.append(training)
        # Only with 80 steps is the other decay better, so that a single round is not enough.
        return np.array(
            [0.5 * (training.start == "base") + 0.2 * (recipe.steps == 80) * (1 + (recipe.weight_decay == 0.1))]
        )

    monkeypatch.setattr(headline, "_trained", accuracy)
    ledger, steps = Ledger(tmp_path / "s.json", {}), []
    first = HeadRecipe(steps=40, learning_rate=3e-2, weight_decay=0.0)
    best, tried = headline.tune(suite_run, ledger, [], first, lambda: steps.append(1))
    # The learning rate makes no difference, so the first one stays.
    assert best == Training("base", first.model_copy(update={"steps": 80, "weight_decay": 0.1}))
    assert max(tried, key=lambda entry: entry["accuracy"]) == {**best.description(), "accuracy": pytest.approx(0.9)}
    assert len(asked) == len(set(map(str, asked))) == len(tried) == len(steps) < 2 * 2 * 2 * 2


def test_shares_and_spreads_by_hand() -> None:
    scores = {
        PLAIN: np.array([[0.8, 0.8], [0.8, 1.0]]),
        REGULARISED: np.array([[1.0, 1.0]]),
        "universal": np.array([[0.5, 0.5]]),
        "universal, regularised": np.array([[0.6, 0.6]]),
        "generated/mean/1": np.array([[0.7, 0.9], [0.7, 0.9]]),
    }
    result = summarise(scores, 200, seed=0)
    assert result["floors"] == {PLAIN: "universal", REGULARISED: "universal, regularised"}
    generated = result["methods"]["generated/mean/1"]
    assert generated["accuracy"]["value"] == pytest.approx(0.8)
    assert generated["gap_closed"][PLAIN]["value"] == pytest.approx(0.3 / 0.35)
    assert generated["gap_closed"][REGULARISED]["value"] == pytest.approx(0.5)
    assert generated["no_worse_than"] == {PLAIN: 0.5, REGULARISED: 0.0}
    assert generated["spread_within_task"] == 0
    assert result["methods"][PLAIN]["accuracy_of_seeds"] == pytest.approx([0.8, 0.9])
    assert result["methods"][PLAIN]["spread_within_task"] == pytest.approx((0 + 0.2 / 2**0.5) / 2)
    assert result["methods"][REGULARISED]["spread_within_task"] is None
    # Without regularisers the universal head is the better one.
    swapped = scores | {"universal": np.array([[0.7, 0.7]])}
    assert summarise(swapped, 200, seed=0)["floors"][REGULARISED] == "universal"


def test_accuracies_are_of_the_tasks_own_heads(suite_run: SuiteRun, measured: dict[str, Any]) -> None:
    methods = measured["methods"]
    _, tasks = draw_tasks(suite_run)
    universal = own_accuracy(suite_run, tasks, suite_run.zoo.universal.expand(len(tasks), -1))
    assert methods["universal"]["accuracy"]["value"] == pytest.approx(universal.mean())
    # The preset's own sampler is measured though the suite's setting does not name it.
    assert set(methods) == {
        "universal", "universal, regularised", PLAIN, REGULARISED, "generated/mean/1", "generated/ddim/3",
    }  # fmt: skip
    assert len(methods["generated/mean/1"]["accuracy_of_seeds"]) == 2
    assert methods[PLAIN]["accuracy"]["value"] > methods["universal"]["accuracy"]["value"]


def test_the_regularised_oracle_is_regularised(measured: dict[str, Any]) -> None:
    oracles = measured["oracles"]
    assert all("label_smoothing" not in entry["recipe"] for entry in oracles[PLAIN]["tried"])
    for entry in [oracles[REGULARISED], *oracles[REGULARISED]["tried"]]:
        assert (entry["recipe"]["label_smoothing"], entry["recipe"]["feature_dropout"]) == (0.1, 0.1)


def counted(monkeypatch: pytest.MonkeyPatch, stop_after: int | None = None) -> list[int]:
    trained: list[int] = []
    train: Callable[..., torch.Tensor] = headline.train_heads

    def count(*arguments: Any, **options: Any) -> torch.Tensor:
        if stop_after is not None and len(trained) == stop_after:
            raise KeyboardInterrupt
        trained.append(1)
        return train(*arguments, **options)

    monkeypatch.setattr(headline, "train_heads", count)
    return trained


def test_an_interrupted_measurement_goes_on(
    suite_run: SuiteRun, measured: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = replace(suite_run, out=tmp_path)
    with monkeypatch.context() as patch:
        counted(patch, stop_after=4)
        with pytest.raises(KeyboardInterrupt):
            headline.run(run)
    with monkeypatch.context() as patch:
        after = counted(patch)
        result = headline.run(run)
    assert json.dumps(result) == json.dumps(measured)
    with monkeypatch.context() as patch:
        again = counted(patch)
        assert headline.run(run) == result
    assert not again
    tried = sum(len(entry["tried"]) for entry in result["oracles"].values())
    assert len(after) == tried + 2 + 1 - 4


def test_kept_accuracies_of_other_tasks_are_not_used(tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    assert Ledger(path, {"tasks": 1}).of({"seed": 1}, lambda: np.array([0.5])) == [0.5]
    assert Ledger(path, {"tasks": 1}).of({"seed": 1}, lambda: np.array([0.7])) == [0.5]
    assert Ledger(path, {"tasks": 2}).of({"seed": 1}, lambda: np.array([0.7])) == [0.7]
    path.write_text("{")
    assert Ledger(path, {"tasks": 2}).of({"seed": 1}, lambda: np.array([0.9])) == [0.9]


def test_the_report_shows_both_gaps_and_the_tuned_settings(measured: dict[str, Any]) -> None:
    result = json.loads(json.dumps(measured))
    text = report(result)
    assert "6 fresh combinations" in text
    assert "| **generated/mean/1** |" in text
    entry = result["methods"]["generated/mean/1"]["gap_closed"]
    for oracle in (PLAIN, REGULARISED):
        assert f"gap to {oracle} closed %" in text
        assert f"{100 * entry[oracle]['value']:.1f} (" in text
        assert f"from the {result['oracles'][oracle]['start']} head" in text
    assert "by test accuracy on 3 other fresh combinations" in text
    # Of two values either one is at the edge.
    assert text.count("At the edge of what was tried: learning rate, weight decay, steps.") == 2
