"""The suite `accuracy` from a zoo with every split to its tables."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.training.conftest import Toy
from tests.training.toy import toy_preset
from text2weight.checkpoint import load_checkpoint, save_checkpoint
from text2weight.generator import Generator
from text2weight.outside import OutsideSettings
from text2weight.text_encoder import load_text_encoder
from text2weight.weight_space import WeightSpace
from text2weight_training.files import TrainingDataError
from text2weight_training.fit import Fit
from text2weight_training.suites import accuracy
from text2weight_training.suites.accuracy import report, summarise_split
from text2weight_training.suites.base import SuiteRun

HEADS = {
    "base",
    "nearest zoo head",
    "nearest zoo head by classes",
    "average of nearest zoo heads",
    "mean head",
    "ridge from pooled text",
    "ridge from classes",
    "universal",
    "universal, trained on tasks",
    "universal, regularised",
    "universal, trained on tasks, regularised",
    "MLP hypernetwork",
    "generated/mean/1",
    "generated/ddim/3",
    "oracle",
    "oracle without regularising",
}
NO_HEADS = {"chance", "class prototypes (uses data)", "ridge classifier (uses data)"}


@dataclass(frozen=True)
class Measured:
    """A finished suite."""

    run: SuiteRun
    result: dict[str, Any]


@pytest.fixture(scope="module")
def measured(hard_toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> Measured:
    folder = tmp_path_factory.mktemp("suite")
    fit = Fit(hard_toy.data, hard_toy.zoo, hard_toy.preset, folder / "s.pt", "cpu")
    fit.run()
    fit.write_checkpoint(folder / "checkpoint")
    generator = Generator.load(folder / "checkpoint", text_encoder=load_text_encoder(hard_toy.data.text_source))
    (folder / "figures").mkdir()
    run = SuiteRun(hard_toy.data, hard_toy.zoo, generator, hard_toy.preset, folder / "figures")
    return Measured(run, accuracy.run(run))


def test_every_split_has_every_method(measured: Measured) -> None:
    splits = measured.result["splits"]
    assert list(splits) == ["seen", "unseen", "held_out_pairs", "mixed_classes", "held_out_classes"]
    assert measured.result["held_out"] == {"classes": 3, "pairs": 4}
    for name, entry in splits.items():
        assert set(entry["methods"]) == HEADS | NO_HEADS
        assert entry["tasks"] == min(5, len(getattr(measured.run.zoo.split, name)))
        for method, row in entry["methods"].items():
            low, high = row["interval"]
            assert 0 <= low <= row["accuracy"] <= high <= 1
            assert (row["weight_error"] is None) == (method in NO_HEADS)
    assert splits["held_out_pairs"]["held_out_pairs_per_task"] >= 1
    assert splits["unseen"]["held_out_pairs_per_task"] == splits["seen"]["held_out_pairs_per_task"] == 0
    assert splits["held_out_classes"]["classes_per_task"][1] <= 3


def test_ends_of_the_scales(measured: Measured) -> None:
    for name, entry in measured.result["splits"].items():
        methods, tasks = entry["methods"], getattr(measured.run.zoo.split, name)[:5]
        # Of the heads that the row is about, not of those that errors are measured to.
        assert methods["oracle"]["weight_error"] > 0
        if entry["oracle"]["start"] == "universal":
            assert methods["oracle"]["weight_error"] == entry["oracle"]["weight_error_of_another_seed"]
        assert methods["chance"]["accuracy"] == pytest.approx(np.mean([1 / len(task) for task in tasks]))
        universals = ("universal", "universal, trained on tasks", "universal, regularised")
        universals += ("universal, trained on tasks, regularised",)
        assert len({methods[name]["weight_error"] for name in universals}) == 4
        assert entry["universal"] in universals
        others = [methods[name]["accuracy"] for name in universals]
        assert methods[entry["universal"]]["accuracy"] == max(others)
        if methods["oracle"]["accuracy"] > max(others):
            assert methods["oracle"]["gap_closed"]["value"] == pytest.approx(1)
            assert methods[entry["universal"]]["gap_closed"]["value"] == 0
        assert methods["oracle"]["accuracy"] >= methods["oracle without regularising"]["accuracy"]
        oracle = entry["oracle"]
        assert methods["oracle"]["accuracy"] == pytest.approx(np.mean(oracle["accuracy_of_seeds"]))
        assert len(oracle["accuracy_of_seeds"]) == 2
        assert oracle["weight_error_of_another_seed"] > 0
        assert oracle["spread_within_task"] >= 0


def test_training_classes_are_told_apart_and_held_out_ones_worse(measured: Measured) -> None:
    splits = measured.result["splits"]
    known, new = (splits[name]["methods"] for name in ("unseen", "held_out_classes"))
    assert known["universal"]["accuracy"] > known["chance"]["accuracy"] + 0.3
    for method in ("oracle", "class prototypes (uses data)", "ridge classifier (uses data)"):
        assert new[method]["accuracy"] > new["universal"]["accuracy"]


def test_the_report_needs_nothing_but_the_result(measured: Measured) -> None:
    text = report(json.loads(json.dumps(measured.result, allow_nan=False)))
    for title in ("Seen combinations", "Held-out pairs", "Half held-out classes", "Held-out classes"):
        assert f"### {title}" in text
    tables = [line for line in text.splitlines() if line.startswith("|")]
    # One table of all splits and one of each, with heading and rule.
    assert len(tables) == 6 * (len(HEADS | NO_HEADS) + 2)
    assert "| head | seen combinations | unseen combinations | held-out pairs |" in text
    assert "**generated/mean/1**" in text
    assert "CLIP zero-shot does not apply: the features are of toy backbone, not of CLIP's image tower." in text
    shown = measured.result["splits"]["unseen"]["methods"]["oracle"]["accuracy"]
    assert f"| oracle | {100 * shown:.2f} |" in text


def test_the_report_says_how_long_the_hypernetwork_was_trained_and_what_lies_at_the_edge(measured: Measured) -> None:
    opening = "of a grid and by its error on a tenth of the zoo: "
    # Of two weight decays and two widths either is at the edge; there is one learning rate.
    edges = r"At the edge of what was tried: weight decay, width\."
    assert re.search(
        rf"{opening}width \d+, 20 steps, learning rate 0\.01, weight decay 0(\.1)?\. {edges}\n", report(measured.result)
    )

    def described(chosen: dict[str, Any]) -> str:
        return report(measured.result | {"hypernetwork": chosen})

    chosen = {"learning_rate": 1e-3, "weight_decay": 0.3, "width": 379, "error": 0.5}
    tried = {"learning_rate": [3e-4, 1e-3, 3e-3], "weight_decay": [0.01, 0.3, 1.0], "width": [95, 379, 758]}
    text = f"{opening}width 379, 200 steps, learning rate 0.001, weight decay 0.3.\n"
    assert text in described(chosen | {"steps": 200, "tried": tried})
    tried["learning_rate"] = [1e-3, 3e-3, 1e-2]
    assert f"{text[:-1]} At the edge of what was tried: learning rate.\n" in described(
        chosen | {"steps": 200, "tried": tried}
    )
    # A result file without them.
    assert f"{opening}width 379, learning rate 0.001, weight decay 0.3.\n" in described(chosen)


def test_figures_lie_in_the_suites_folder(measured: Measured) -> None:
    assert (measured.run.out / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (measured.run.out / "accuracy.svg").read_text()


def test_the_report_says_how_outside_names_were_treated(measured: Measured) -> None:
    assert measured.result["outside"] is None
    assert "training never saw" not in report(measured.result)
    text = report(measured.result | {"outside": {"reach": 0.5, "temperature": 0.1}})
    assert "mixtures of known names (temperature 0.1) and go 0.5 of the way from the zoo's universal head." in text


def test_outside_names_alone_are_scored_otherwise(measured: Measured, tmp_path: Path) -> None:
    """At reach 0 they get the zoo's universal head, and known ones the heads they had."""
    made = load_checkpoint(measured.run.generator.path)
    config = made.config.model_copy(update={"outside": OutsideSettings(reach=0.0, temperature=0.1)})
    save_checkpoint(tmp_path / "checkpoint", config, made.denoiser, made.space)
    generator = Generator.load(tmp_path / "checkpoint", text_encoder=measured.run.generator.text_encoder)
    result = accuracy.run(replace(measured.run, generator=generator, out=tmp_path))
    for name, entry in result["splits"].items():
        methods, before = entry["methods"], measured.result["splits"][name]["methods"]
        if name == "held_out_classes":
            assert methods["generated/mean/1"]["accuracy"] == methods["universal"]["accuracy"]
        elif name != "mixed_classes":
            assert methods["generated/mean/1"] == before["generated/mean/1"]


def test_a_zoo_without_harder_splits_has_two_columns(measured: Measured) -> None:
    easy = measured.result | {"splits": {name: measured.result["splits"][name] for name in ("seen", "unseen")}}
    assert "| head | seen combinations | unseen combinations |\n" in report(easy)


def test_features_of_another_backbone_have_no_zero_shot_classifier(measured: Measured) -> None:
    assert set(accuracy.predictors(measured.run)) == NO_HEADS - {"chance"}


def test_an_oracles_weight_error_is_that_of_its_own_heads() -> None:
    space = WeightSpace(torch.zeros(2), torch.zeros(2), torch.tensor([1.0, 2.0]))
    first, second, third = (torch.tensor([row]) for row in ([0.0, 0.0], [1.0, 0.0], [3.0, 4.0]))
    oracles = {"universal": [first, second], "universal, regularised": [second, third]}
    assert accuracy._oracle_error(space, oracles, "universal") == pytest.approx(0.5)
    assert accuracy._oracle_error(space, oracles, "universal, regularised") == pytest.approx((0.5 + 6.5) / 2)
    assert accuracy._oracle_error(space, {"universal": [first]}, "universal") is None


def test_the_best_universal_head_is_the_floor() -> None:
    scores = {
        "universal": np.array([0.5, 0.5]),
        "universal, trained on tasks": np.array([0.6, 0.6]),
        "universal, regularised": np.array([0.3, 0.8]),
        "universal, trained on tasks, regularised": np.array([0.2, 0.8]),
        "oracle": np.array([0.8, 0.8]),
        "other": np.array([0.6, 0.8]),
    }
    result = summarise_split(scores, {"other": 2.0}, 500, seed=0)
    assert result["universal"] == "universal, trained on tasks"
    assert result["methods"]["other"]["gap_closed"]["value"] == pytest.approx(0.5)
    assert result["methods"]["universal"]["gap_closed"]["value"] == pytest.approx(-0.5)
    assert result["methods"]["other"]["weight_error"] == 2
    assert result["methods"]["oracle"]["weight_error"] is None


def test_tasks_that_do_not_fit_are_refused(measured: Measured, tmp_path: Path) -> None:
    run = replace(measured.run, out=tmp_path)
    few = replace(run.data, classes=run.data.classes[:2])
    with pytest.raises(TrainingDataError, match="does not fit the data's 2 classes: give the zoo's own features"):
        accuracy.run(replace(run, data=few))
    empty = replace(run.zoo, split=replace(run.zoo.split, unseen=()))
    with pytest.raises(TrainingDataError, match="the zoo has no unseen tasks"):
        accuracy.run(replace(run, zoo=empty))
    assert not list(tmp_path.iterdir())


def test_suite_settings_are_no_part_of_a_runs_identity() -> None:
    changed = toy_preset(suites__accuracy={"tasks": 7})
    assert changed.suites.accuracy.tasks == 7
    assert changed.run_description() == toy_preset().run_description()
