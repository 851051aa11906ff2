"""The frame of the evaluation suites: registry, files, commands, and what is refused."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner, Result

from tests.training.conftest import Toy, ToyRun, ToySuites
from tests.training.toy import preset_dict, toy_preset, write_preset
from text2weight.checkpoint import read_config
from text2weight_training.files import TrainingDataError, read_kept, write_kept
from text2weight_training.model_cli import evaluate_app
from text2weight_training.presets import Preset, load_preset
from text2weight_training.suites import SUITES, choose_suites, load_suite
from text2weight_training.suites.runner import run_suites, with_paraphrases, with_pictures
from text2weight_training.zoo import Zoo

# The toy problem has no pictures, so the suite `gradcam` measures nothing on it.
MEASURED = [name for name in SUITES if name != "gradcam"]


def test_names_are_chosen_in_the_registrys_order_each_once() -> None:
    assert choose_suites(["fuse", "reading", "fuse"]) == ["reading", "fuse"]
    assert choose_suites(["fuse", "all"]) == list(SUITES)
    with pytest.raises(
        TrainingDataError, match=r"no suite 'fus': choose accuracy, headline, reading, .*fuse.*, or all"
    ):
        choose_suites(["fuse", "fus"])


def test_every_suite_has_settings() -> None:
    assert set(SUITES) == set(type(toy_preset().suites).model_fields)


@pytest.mark.parametrize("name", SUITES)
def test_files_are_laid_out_as_other_programs_expect(toy_suites: ToySuites, toy_run: ToyRun, name: str) -> None:
    written = json.loads((toy_suites.out / f"{name}.json").read_text())
    assert written == json.loads(json.dumps(toy_suites.written[name]))
    assert written["format"] == "text2weight.suite/1"
    assert written["suite"] == name
    assert written["checkpoint"] == read_config(toy_run.out / "checkpoint").sha256
    assert written["settings"] == json.loads(json.dumps(toy_run.preset.suites.model_dump(mode="json")[name]))
    assert written["created_by"].startswith("text2weight")
    assert written["backbone"] == "toy backbone"
    if name in MEASURED:
        assert (toy_suites.out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (toy_suites.out / f"{name}.svg").read_text()


@pytest.mark.parametrize("name", MEASURED)
def test_values_lie_in_their_intervals(toy_suites: ToySuites, name: str) -> None:
    entries = list(_entries(toy_suites.result(name)))
    assert entries
    for entry in entries:
        low, high = entry["interval"]
        assert low - 1e-9 <= entry["value"] <= high + 1e-9


def _entries(value: object) -> list[dict[str, object]]:
    if isinstance(value, dict):
        if {"value", "interval"} <= set(value):
            return [value]
        return [entry for part in value.values() for entry in _entries(part)]
    if isinstance(value, list):
        return [entry for part in value for entry in _entries(part)]
    return []


def test_a_suite_measures_the_same_twice(toy: Toy, toy_run: ToyRun, toy_suites: ToySuites, tmp_path: Path) -> None:
    (again,) = run_suites(["fuse"], toy.data, toy.zoo, toy_run.out / "checkpoint", toy_run.preset, tmp_path)
    assert json.dumps(again["result"]) == json.dumps(toy_suites.result("fuse"))
    assert (tmp_path / "fuse.svg").read_bytes() == (toy_suites.out / "fuse.svg").read_bytes()


def test_a_finished_suite_is_kept_until_something_differs(
    toy: Toy, toy_run: ToyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []
    for name in ("reading", "denoising"):
        monkeypatch.setattr(load_suite(name), "run", lambda run, name=name: ran.append(name) or {"number": len(ran)})

    def measure(preset: Preset = toy_run.preset, zoo: Zoo = toy.zoo) -> list[int]:
        every = run_suites(["reading", "denoising"], toy.data, zoo, toy_run.out / "checkpoint", preset, tmp_path)
        return [written["result"]["number"] for written in every]

    assert measure() == [1, 2]
    assert measure() == [1, 2]
    # An interrupted run: one result is missing, one is damaged.
    (tmp_path / "denoising.json").unlink()
    assert measure() == [1, 3]
    (tmp_path / "reading.json").write_text("{")
    assert measure() == [4, 3]
    assert ran == ["reading", "denoising", "denoising", "reading"]
    # A setting of one suite, then what all of them depend on.
    assert measure(toy_preset(fit__steps=100, fit__save_every=50, fit__learning_rate=1e-2)) == [4, 3]
    changed = toy_run.preset.suites.model_copy(
        update={"reading": toy_run.preset.suites.reading.model_copy(update={"tasks": 7})}
    )
    assert measure(toy_run.preset.model_copy(update={"suites": changed})) == [5, 3]
    assert measure(toy_run.preset.model_copy(update={"steps": 2, "sampler": "ddim"})) == [6, 7]
    assert measure(zoo=replace(toy.zoo, manifest={**toy.zoo.manifest, "note": 1})) == [8, 9]


def test_a_suite_is_measured_anew_when_a_file_that_it_reads_has_changed(
    toy: Toy, toy_run: ToyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []
    for name in ("reading", "gradcam"):
        monkeypatch.setattr(load_suite(name), "run", lambda run, name=name: ran.append(name) or {})
    table, only_table = tmp_path / "table.safetensors", tmp_path / "only.safetensors"
    pictures, backbone = tmp_path / "pictures", tmp_path / "backbone"
    for folder in (pictures / "test", backbone):
        folder.mkdir(parents=True)
    for file in (table, only_table, backbone / "model.safetensors"):
        file.write_bytes(b"1")
    tables = [f"{table}#other", str(only_table)]
    preset = with_pictures(with_paraphrases(toy_run.preset, tables), pictures, f"dir:{backbone}")

    def measure() -> list[str]:
        ran.clear()
        every = ["reading", "gradcam"]
        list(run_suites(every, toy.data, toy.zoo, toy_run.out / "checkpoint", preset, tmp_path / "out"))
        return list(ran)

    assert measure() == ["reading", "gradcam"]
    assert measure() == []
    for file in (table, only_table):
        file.write_bytes(b"22")
        assert measure() == ["reading"]
    (backbone / "model.safetensors").write_bytes(b"22")
    assert measure() == ["gradcam"]
    (pictures / "test" / "new.png").write_bytes(b"3")
    assert measure() == ["gradcam"]


def test_a_zoo_that_does_not_fit_is_refused(toy: Toy, toy_run: ToyRun, tmp_path: Path) -> None:
    other = replace(toy.zoo, manifest={**toy.zoo.manifest, "data_sha256": "00"})
    with pytest.raises(TrainingDataError, match="built for another data_sha256"):
        list(run_suites(["reading"], toy.data, other, toy_run.out / "checkpoint", toy_run.preset, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_result_that_is_not_finite_is_not_written(
    toy: Toy, toy_run: ToyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load_suite("reading"), "run", lambda run: {"accuracy": float("nan")})
    with pytest.raises(ValueError, match="not JSON compliant"):
        list(run_suites(["reading"], toy.data, toy.zoo, toy_run.out / "checkpoint", toy_run.preset, tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_presets_refuse_what_a_suite_could_not_do(tmp_path: Path) -> None:
    def refused(message: str, **changes: object) -> None:
        with pytest.raises(TrainingDataError, match=message):
            load_preset(str(write_preset(tmp_path / "p.yaml", **changes)))

    refused("suites.fuse.pair: Extra inputs are not permitted", suites__fuse__pair=3)
    refused("suites.accurcy: Extra inputs", suites__accurcy={})
    refused("suites.fuse.density: Input should be less than or equal to 1", suites__fuse__density=2)
    refused("suites.reading.tasks is 13, but the zoo keeps only 12 unseen", suites__reading__tasks=13)
    refused("unknown sampler|Input should be", suites__fuse__samplers=[["euler", 3]])
    refused("steps is 41: allowed are 1 to 40", suites__denoising__samplers=[["ddim", 41]])
    refused("at least 1 item", suites__denoising__samplers=[])


def test_a_preset_without_suites_has_their_defaults(tmp_path: Path) -> None:
    content = {key: value for key, value in preset_dict().items() if key != "suites"}
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(content))
    preset = load_preset(str(tmp_path / "p.yaml"))
    assert (preset.suites.fuse.pairs, preset.suites.fuse.task_size) == (100, 8)


def test_results_name_tables_without_this_machines_folders() -> None:
    preset = with_paraphrases(toy_preset(), ["/some/where/a.safetensors#the", "b.safetensors"])
    assert preset.suites.reading.paraphrases == ("/some/where/a.safetensors#the", "b.safetensors")
    assert preset.suites.reading.model_dump(mode="json")["paraphrases"] == ["a.safetensors#the", "b.safetensors"]


def test_suites_do_not_belong_to_what_a_training_run_is_made_of() -> None:
    assert toy_preset(suites__fuse__pairs=3).run_description() == toy_preset().run_description()
    assert toy_preset(fit__steps=3).run_description() != toy_preset().run_description()


def test_the_small_preset_is_a_reduced_measurement() -> None:
    small, full = load_preset("small").suites, load_preset("reference").suites
    assert small.fuse.pairs < full.fuse.pairs
    for name in ("denoising", "reading", "landscape", "enhance", "init", "memorisation", "ablation", "gradcam"):
        assert getattr(small, name).tasks < getattr(full, name).tasks


@pytest.fixture
def inputs(toy: Toy, toy_run: ToyRun, tmp_path: Path) -> list[str]:
    preset = write_preset(tmp_path / "toy.yaml")
    zoo, checkpoint = str(toy.zoo_folder), str(toy_run.out / "checkpoint")
    files = ["--features", str(toy.features), "--text", toy.text, "--preset", str(preset)]
    return [*files, "--zoo", zoo, "--checkpoint", checkpoint]


def evaluate(*arguments: object) -> Result:
    return CliRunner().invoke(evaluate_app, [str(argument) for argument in arguments])


def test_the_command_writes_and_shows_what_it_was_asked_for(inputs: list[str], tmp_path: Path) -> None:
    out = tmp_path / "suites"
    result = evaluate(*inputs, "--suite", "denoising", "--suite", "reading", "--out", out)
    assert result.exit_code == 0, result.output
    assert {path.name for path in out.iterdir()} == {
        f"{name}.{kind}" for name in ("denoising", "reading") for kind in ("json", "png", "svg")
    }
    assert "| ddpm/4 |" in result.output
    assert "written to" in result.output
    again = evaluate(*inputs, "--suite", "denoising", "--out", out)
    assert "denoising: kept from an earlier run" in again.output
    assert "| ddpm/4 |" in again.output


def test_bad_input_is_one_line_and_status_2(inputs: list[str], tmp_path: Path) -> None:
    def refused(message: str, *arguments: object) -> None:
        result = evaluate(*inputs, *arguments, "--out", tmp_path / "out")
        assert result.exit_code == 2
        assert re.search(message, result.stderr), result.stderr

    refused("error: no suite 'speed': choose accuracy, headline, reading, ", "--suite", "speed")
    refused("error: embedding table .* cannot be read", "--suite", "reading", "--paraphrase", tmp_path / "absent")
    refused("--record keeps the evaluation", "--suite", "reading", "--record")
    refused("--paraphrase belongs to", "--paraphrase", "x")
    assert not list(tmp_path.glob("out/*"))


def test_too_few_tasks_or_classes_name_the_setting(toy: Toy, toy_run: ToyRun, tmp_path: Path) -> None:
    def refused(message: str, name: str, **changes: object) -> None:
        settings = getattr(toy_run.preset.suites, name).model_copy(update=changes)
        preset = toy_run.preset.model_copy(update={"suites": toy_run.preset.suites.model_copy(update={name: settings})})
        with pytest.raises(TrainingDataError, match=message):
            list(run_suites([name], toy.data, toy.zoo, toy_run.out / "checkpoint", preset, tmp_path))

    refused(r"suites\.denoising\.tasks is 13: the zoo has only 12 unseen tasks", "denoising", tasks=13)
    refused("suites.reading.tasks is 1: at least 2", "reading", tasks=1)
    refused("two disjoint tasks need 14 classes, the data has 12", "fuse", task_size=7)
    refused("only .* pairs of disjoint tasks of 6 of 12 classes", "fuse", task_size=6, pairs=5000)
    refused("suites.memorisation.tasks is 13: .* 12 unseen", "memorisation", tasks=13)
    refused("neighbours asks for 37 of 36 zoo heads", "memorisation", neighbours=(37,))
    assert not list(tmp_path.glob("*.json"))
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("content", [None, "{", "[1]", "3"])
def test_a_kept_file_that_holds_no_object_is_no_reason_to_stop(tmp_path: Path, content: str | None) -> None:
    kept = tmp_path / "kept.json"
    if content is not None:
        kept.write_text(content)
    assert read_kept(kept) == {}
    write_kept(kept, {"a": 1})
    assert read_kept(kept) == {"a": 1}
