"""The model commands as a user runs them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from tests.training.conftest import Toy
from tests.training.toy import toy_features, write_preset
from text2weight.checkpoint import read_config
from text2weight_training.feature_file import write_feature_file
from text2weight_training.model_cli import evaluate_app, fit_app, results_app, train_app, zoo_app

APPS = {"zoo": zoo_app, "fit": fit_app, "evaluate": evaluate_app, "train": train_app, "results": results_app}


def run(app: typer.Typer, *arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def assert_one_line_error(result: Result, message: str) -> None:
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert re.search(message, result.stderr), result.stderr


@pytest.fixture
def inputs(toy: Toy, tmp_path: Path) -> list[str]:
    preset = write_preset(tmp_path / "toy.yaml", fit__steps=4, evaluation__tasks=4)
    return ["--features", str(toy.features), "--text", toy.text, "--preset", str(preset)]


@pytest.mark.parametrize("name", APPS)
def test_help_has_an_example(name: str) -> None:
    result = run(APPS[name], "--help")
    assert result.exit_code == 0
    assert f"Example: t2w {name} --" in " ".join(result.output.split())


def test_zoo_fit_and_evaluate_one_after_the_other(toy: Toy, inputs: list[str], tmp_path: Path) -> None:
    # The zoo exists: the command finds nothing left to do.
    made = run(zoo_app, *inputs, "--preset", write_preset(tmp_path / "p.yaml"), "--out", toy.zoo_folder)
    assert made.exit_code == 0, made.output
    assert "36 heads in" in made.output
    assert re.search(r"heads per second with 1 worker\(s\); at this rate 1,000,000 heads would take", made.output)
    checkpoint, zoo = tmp_path / "checkpoint", toy.zoo_folder
    fitted = run(fit_app, "--zoo", zoo, *inputs, "--out", checkpoint)
    assert fitted.exit_code == 0, fitted.output
    assert "after 4 steps" in fitted.output
    assert (tmp_path / "checkpoint-state.pt").is_file()
    again = run(fit_app, "--zoo", zoo, *inputs, "--out", checkpoint)
    assert_one_line_error(again, "checkpoint-state.pt holds a fit: add --resume to go on from it, or remove it")
    resumed = run(fit_app, "--zoo", zoo, *inputs, "--out", checkpoint, "--resume")
    assert resumed.exit_code == 0, resumed.output
    out = tmp_path / "evaluation.json"
    measured = run(evaluate_app, "--checkpoint", checkpoint, "--zoo", zoo, *inputs, "--out", out, "--record")
    assert measured.exit_code == 0, measured.output
    assert "generated/mean/1" in measured.output
    recorded = read_config(checkpoint).evaluation
    assert recorded["results"] == json.loads(out.read_text())["results"]


def test_resume_without_a_state_says_so(toy: Toy, inputs: list[str], tmp_path: Path) -> None:
    result = run(fit_app, "--zoo", toy.zoo_folder, *inputs, "--out", tmp_path / "c", "--resume")
    assert result.exit_code == 0, result.output
    assert "no saved state for" in result.output


def test_bad_input_is_one_line_and_status_2(toy: Toy, inputs: list[str], tmp_path: Path) -> None:
    features, text, preset = inputs[1::2]
    wide = tmp_path / "wide.safetensors"
    write_feature_file(wide, toy_features(dim=20))
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(toy.features.read_bytes()[:1000])
    out = ["--out", tmp_path / "out"]

    def zoo(features: object, text: str, preset: str, *more: object) -> Result:
        return run(zoo_app, "--features", features, "--text", text, "--preset", preset, *out, *more)

    assert_one_line_error(zoo(tmp_path / "absent", text, preset), "there is no feature file")
    assert_one_line_error(zoo(broken, text, preset), "broken.safetensors is damaged")
    assert_one_line_error(zoo(wide, text, preset), "features have 20 numbers each")
    assert_one_line_error(zoo(features, f"{broken}#toy", preset), "embedding table .* cannot be read")
    assert_one_line_error(zoo(features, "dir:/nowhere", preset), "text encoder folder /nowhere has no")
    assert_one_line_error(zoo(features, text, "smal"), "no preset 'smal'")
    assert_one_line_error(zoo(features, text, preset, "--device", "nonsense"), "unknown device 'nonsense'")
    assert_one_line_error(run(fit_app, "--zoo", tmp_path, *inputs, *out), "is not a zoo")
    assert_one_line_error(
        run(evaluate_app, "--checkpoint", tmp_path, "--zoo", toy.zoo_folder, *inputs, *out), "is not a checkpoint"
    )
    foreign = ["--backbone", "open_clip:ViT-B-32/openai"]
    for command in (
        run(fit_app, "--zoo", toy.zoo_folder, *inputs, *out, *foreign),
        run(train_app, *inputs, *out, *foreign),
    ):
        assert_one_line_error(command, "checkpoint and service hold only what `t2w backbone` wrote")
    (tmp_path / "taken").touch()
    taken = ["--out", tmp_path / "taken" / "out"]
    assert_one_line_error(run(train_app, *inputs, *taken), r"taken")
    assert not (tmp_path / "out").exists()


def test_a_missing_option_is_a_usage_error() -> None:
    result = run(train_app, "--features", "f")
    assert result.exit_code == 2
    assert "Missing option" in result.stderr
