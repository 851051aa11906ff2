"""Zoo, fit and evaluation in one go, and again."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.training.conftest import Toy, ToyRun
from tests.training.toy import toy_preset
from text2weight.generator import Generator
from text2weight_training import train as train_module
from text2weight_training import zoo as zoo_module
from text2weight_training.files import TrainingDataError
from text2weight_training.fit import Fit
from text2weight_training.train import evaluation_summary, train


def forbid_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zoo_module, "train_stack", lambda *_: pytest.fail("trained heads again"))
    monkeypatch.setattr(Fit, "run", lambda *_: pytest.fail("fitted again"))


def test_a_run_leaves_zoo_checkpoint_and_evaluation(toy_run: ToyRun) -> None:
    assert (toy_run.out / "zoo" / "manifest.json").is_file()
    assert (toy_run.out / "checkpoint" / "config.json").is_file()
    assert (toy_run.out / "evaluation.json").is_file()


def test_the_checkpoint_carries_its_evaluation_and_generates(toy: Toy, toy_run: ToyRun) -> None:
    generator = Generator.load(toy_run.out / "checkpoint")
    assert generator.config.evaluation == evaluation_summary(toy_run.result)
    assert generator.config.evaluation["results"]["unseen"]["oracle"]["accuracy"] > 0.5
    assert generator.config.task_size == (2, 6)
    head = generator.generate(["Lizard", "maple_tree", "clock"], seed=7, sampler="ddim", steps=4)
    assert head.classes == ("Lizard", "maple tree", "clock")
    assert head.spec == toy.preset.head


def test_the_same_call_again_does_nothing_twice(toy: Toy, toy_run: ToyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path: path.stat().st_mtime_ns for path in toy_run.out.rglob("*") if path.is_file()}
    forbid_training(monkeypatch)
    monkeypatch.setattr(train_module, "evaluate", lambda *_: pytest.fail("evaluated again"))
    assert train(toy.data, toy_run.preset, toy_run.out) == toy_run.result
    assert {path: path.stat().st_mtime_ns for path in toy_run.out.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("damage", ["missing", "truncated", "of another run"])
def test_only_a_missing_evaluation_is_made_again(
    toy: Toy, toy_run: ToyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    out = tmp_path / "run"
    shutil.copytree(toy_run.out, out)
    evaluation = out / "evaluation.json"
    if damage == "missing":
        evaluation.unlink()
    elif damage == "truncated":
        evaluation.write_text(evaluation.read_text()[:500])
    else:
        evaluation.write_text(json.dumps({**toy_run.result, "tasks": 7}))
    forbid_training(monkeypatch)
    called: list[Path] = []

    def measured(*args: Any) -> dict[str, Any]:
        called.append(args[-1])
        return toy_run.result

    monkeypatch.setattr(train_module, "evaluate", measured)
    train(toy.data, toy_run.preset, out)
    assert called == [evaluation]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"preset": toy_preset()}, "preset"),
        ({"minutes": 1.0}, "minutes"),
        ({"backbone": Path("net")}, "backbone"),
        ({"data": None}, "data"),
    ],
)
def test_a_call_with_other_arguments_is_refused(
    toy: Toy, toy_run: ToyRun, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], named: str
) -> None:
    forbid_training(monkeypatch)
    arguments: dict[str, Any] = {"data": toy.data, "preset": toy_run.preset, "out": toy_run.out, **changes}
    if arguments["data"] is None:
        arguments["data"] = replace(toy.data, fingerprint="0")
    with pytest.raises(TrainingDataError, match=f"holds a run with another {named}: choose another --out"):
        train(**arguments)


def test_an_unfinished_fit_may_go_on_with_another_learning_rate(
    toy: Toy, toy_run: ToyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    shutil.copytree(toy_run.out, out)
    fit = toy_run.preset.fit
    lower = toy_run.preset.model_copy(update={"fit": fit.model_copy(update={"learning_rate": 1e-3})})
    with pytest.raises(TrainingDataError, match="holds a run with another preset"):  # its checkpoint is made already
        train(toy.data, lower, out)
    shutil.rmtree(out / "checkpoint")
    other = toy_run.preset.model_copy(update={"fit": fit.model_copy(update={"samples": 31})})
    with pytest.raises(TrainingDataError, match="holds a run with another preset"):
        train(toy.data, other, out)
    monkeypatch.setattr(train_module, "evaluate", lambda *_: toy_run.result)
    train(toy.data, lower, out)
    assert json.loads((out / "run.json").read_text())["preset"] == lower.run_description()


def test_folders_of_another_origin_are_left_alone(toy: Toy, toy_run: ToyRun, tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    with pytest.raises(TrainingDataError, match="holds a checkpoint of another origin"):
        train(toy.data, toy_run.preset, tmp_path)
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "run.json").write_text("{")
    with pytest.raises(TrainingDataError, match=r"run.json is damaged .* remove it"):
        train(toy.data, toy_run.preset, damaged)
