"""The evaluation: its arithmetic by hand, its files' layout, and what it refuses."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.training.conftest import Toy, ToyRun
from tests.training.toy import NAMES, toy_preset
from text2weight.checkpoint import load_checkpoint, save_checkpoint
from text2weight.denoiser import Denoiser
from text2weight.errors import CheckpointError
from text2weight.head import HeadSpec
from text2weight.weight_space import WeightSpace
from text2weight_training.baselines import (
    accuracies,
    class_indicators,
    nearest_heads,
    pooled_text,
    ridge_heads,
)
from text2weight_training.evaluate import evaluate, load_generator, summarise
from text2weight_training.files import TrainingDataError
from text2weight_training.splits import draw_split
from text2weight_training.stacked import heads_accuracy
from text2weight_training.tasks import HeldOut
from text2weight_training.zoo import load_zoo

METHODS = {
    "base",
    "mean head",
    "nearest zoo head",
    "ridge from pooled text",
    "ridge from classes",
    "universal",
    "generated/mean/1",
    "generated/ddim/3",
    "oracle",
}


def scores(**generated: list[float]) -> dict[str, np.ndarray]:
    fixed = {"universal": [0.5, 0.6, 0.7], "oracle": [0.7, 0.8, 0.9]}
    return {name: np.array(values) for name, values in {**fixed, **generated}.items()}


def test_summary_of_three_tasks_by_hand() -> None:
    given = scores(**{"generated/mean/1": [0.6, 0.7, 0.8], "generated/ddim/4": [0.5, 0.8, 0.7]})
    result = summarise(given, "generated/mean/1", 4000, seed=0)
    methods = result["results"]["unseen"]
    assert methods["universal"]["accuracy"] == pytest.approx(0.6)
    # The mean of three draws from 0.5, 0.6, 0.7 is lowest in 1 of 27 cases, more than 2.5 % of them.
    assert methods["universal"]["interval"] == pytest.approx([0.5, 0.7])
    assert result["gap_closed"]["unseen"] == pytest.approx(0.5)
    closed = result["gap_closed_by_method"]["unseen"]
    # Paired: tasks differ by 0.1, yet on each of them half of the gap is closed.
    assert closed["generated/mean/1"]["interval"] == pytest.approx([0.5, 0.5])
    # Closed on one task of three: between none (8 of 27 draws) and all of it (1 of 27).
    assert closed["generated/ddim/4"]["value"] == pytest.approx(1 / 3)
    assert closed["generated/ddim/4"]["interval"] == pytest.approx([0.0, 1.0])
    assert set(closed) == {"generated/mean/1", "generated/ddim/4"}
    assert result["headline"] == "generated/mean/1"


def test_without_a_gap_no_share_is_claimed() -> None:
    given = scores(**{"generated/mean/1": [0.6, 0.7, 0.8]})
    given["oracle"] = given["universal"]
    result = summarise(given, "generated/mean/1", 50, seed=0)
    assert result["gap_closed"]["unseen"] is None
    assert result["gap_closed_by_method"]["unseen"]["generated/mean/1"] == {"value": None, "interval": None}
    json.dumps(result, allow_nan=False)


def test_the_file_is_laid_out_as_other_programs_expect(toy_run: ToyRun) -> None:
    result = json.loads((toy_run.out / "evaluation.json").read_text())
    assert result == toy_run.result
    assert set(result["results"]) == set(result["gap_closed"]) == {"unseen"}
    methods = result["results"]["unseen"]
    assert set(methods) == METHODS
    for entry in methods.values():
        low, high = entry["interval"]
        assert 0 <= low <= entry["accuracy"] <= high <= 1
    share = result["gap_closed"]["unseen"]
    assert share == pytest.approx(
        (methods["generated/mean/1"]["accuracy"] - methods["universal"]["accuracy"])
        / (methods["oracle"]["accuracy"] - methods["universal"]["accuracy"])
    )
    assert set(result["sample_diversity"]) == {"generated/mean/1", "generated/ddim/3"}
    assert (result["tasks"], result["classes"], result["backbone"]) == (8, 12, "toy backbone")


def test_plots_lie_beside_it(toy_run: ToyRun) -> None:
    assert (toy_run.out / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (toy_run.out / "accuracy.svg").read_text()


def test_generated_heads_beat_what_needs_no_denoiser(toy_run: ToyRun) -> None:
    methods = {name: entry["accuracy"] for name, entry in toy_run.result["results"]["unseen"].items()}
    assert methods["generated/mean/1"] > methods["base"] + 0.3
    assert methods["generated/mean/1"] > methods["nearest zoo head"]
    assert methods["generated/mean/1"] > methods["mean head"] + 0.01
    assert methods["oracle"] > methods["universal"]
    assert methods["oracle"] > methods["generated/mean/1"]


def test_nearest_head_of_a_zoo_task_is_its_own(toy: Toy) -> None:
    tasks = list(toy.zoo.split.seen[:5])
    assert torch.equal(nearest_heads(toy.data, toy.zoo, tasks), toy.zoo.weights[:5])
    # The order of a task's classes means nothing.
    assert torch.equal(nearest_heads(toy.data, toy.zoo, [task[::-1] for task in tasks]), toy.zoo.weights[:5])


def test_descriptions_of_tasks(toy: Toy) -> None:
    assert class_indicators(toy.data, [(0, 2), (11, 1, 0)]).nonzero().tolist() == [
        [0, 0],
        [0, 2],
        [1, 0],
        [1, 1],
        [1, 11],
    ]
    center = toy.data.embeddings.mean(0)
    pooled = pooled_text(toy.data, [(3, 4)], center)
    # Two unit vectors are equally close to their mean, so prior attention is a plain average.
    torch.testing.assert_close(pooled[0], toy.data.embeddings[[3, 4]].mean(0) - center)


def test_ridge_recovers_a_linear_zoo(toy: Toy) -> None:
    inputs = torch.randn(36, 5, generator=torch.Generator().manual_seed(0))
    mapping = torch.randn(5, toy.preset.head.num_parameters, generator=torch.Generator().manual_seed(1))
    zoo = replace(toy.zoo, weights=toy.zoo.universal + inputs @ mapping)
    queries = torch.randn(3, 5, generator=torch.Generator().manual_seed(2))
    predicted = ridge_heads(inputs, zoo, queries)
    torch.testing.assert_close(predicted, zoo.universal + queries @ mapping, atol=0.02, rtol=0.02)


def test_accuracies_keep_methods_and_tasks_apart(toy: Toy) -> None:
    spec, tasks = toy.preset.head, list(toy.zoo.split.seen[:3])
    table = accuracies(toy.data, spec, tasks, {"shared": toy.zoo.universal, "own": toy.zoo.weights[:3]})
    for i, task in enumerate(tasks):
        expected = heads_accuracy(
            spec, torch.stack([toy.zoo.universal, toy.zoo.weights[i]]), task, toy.data.test, toy.data.embeddings
        )
        assert [table["shared"][i], table["own"][i]] == expected.tolist()


def changed_checkpoint(toy_run: ToyRun, folder: Path, **changes: Any) -> Path:
    """The run's checkpoint with another config; its network is new where the head is another."""
    original = load_checkpoint(toy_run.out / "checkpoint")
    config = original.config.model_copy(update=changes)
    denoiser, space = original.denoiser, original.space
    if "head" in changes:
        anchor = torch.ones(config.head.num_parameters)
        space = WeightSpace(anchor, anchor.clone(), anchor.clone())
        denoiser = Denoiser(config.head, config.denoiser, anchor, torch.zeros(config.denoiser.embedding_dim))
    save_checkpoint(folder, config, denoiser, space)
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": ("apple", "pear")}, "was trained on other class names or another template"),
        ({"template": "the {}"}, "was trained on other class names or another template"),
        ({"head": HeadSpec(input_dim=20, hidden_dim=4, output_dim=8)}, "input_dim 20 instead of 16"),
        ({"head": HeadSpec(input_dim=16, hidden_dim=5, output_dim=8)}, "hidden_dim 5 instead of 4"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(
    toy: Toy, toy_run: ToyRun, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    checkpoint = changed_checkpoint(toy_run, tmp_path / "checkpoint", **changes)
    with pytest.raises(TrainingDataError, match=message):
        evaluate(toy.data, toy.zoo, checkpoint, toy_run.preset, tmp_path / "evaluation.json")
    assert not (tmp_path / "evaluation.json").exists()


def test_a_zoo_of_another_split_is_refused(toy: Toy, toy_run: ToyRun, tmp_path: Path) -> None:
    """The checkpoint may have been trained on what such a zoo calls unseen."""
    assert load_checkpoint(toy_run.out / "checkpoint").config.task_split_sha256 == toy.zoo.split.fingerprint
    assert load_zoo(toy.zoo_folder).split.fingerprint == toy.zoo.split.fingerprint
    for split in (
        draw_split(NAMES, toy.preset.zoo, seed=4),
        replace(toy.zoo.split, seen=toy.zoo.split.unseen, unseen=toy.zoo.split.seen),
        replace(toy.zoo.split, held_out=HeldOut(pairs=((0, 1),))),
    ):
        with pytest.raises(TrainingDataError, match="was trained on the tasks of another zoo"):
            load_generator(toy_run.out / "checkpoint", toy.data, replace(toy.zoo, split=split), toy_run.preset)


def test_an_older_checkpoint_is_measured_with_a_note(
    toy: Toy, toy_run: ToyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    older = changed_checkpoint(toy_run, tmp_path / "older", task_split_sha256=None)
    assert "task_split" not in (older / "config.json").read_text()
    load_generator(toy_run.out / "checkpoint", toy.data, toy.zoo, toy_run.preset)
    assert capsys.readouterr().err == ""
    load_generator(older, toy.data, toy.zoo, toy_run.preset)
    assert "could not be checked that the zoo's unseen tasks were left out" in capsys.readouterr().err


def test_features_of_another_backbones_name_are_measured_with_a_note(
    toy: Toy, toy_run: ToyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    backbone = load_checkpoint(toy_run.out / "checkpoint").config.backbone
    assert backbone["name"] == toy.data.backbone["name"] == "toy backbone"
    load_generator(toy_run.out / "checkpoint", toy.data, toy.zoo, toy_run.preset)
    assert capsys.readouterr().err == ""
    other = changed_checkpoint(toy_run, tmp_path / "other", backbone=backbone | {"name": "resnet [18]"})
    load_generator(other, toy.data, toy.zoo, toy_run.preset)
    note = capsys.readouterr().err
    assert "was trained on features of backbone 'resnet [18]', and these features are of 'toy backbone': " in note
    assert "unless both are names of one network, its accuracies mean nothing" in note


def test_a_checkpoint_of_another_text_encoder_or_with_a_flipped_byte_is_refused(
    toy: Toy, toy_run: ToyRun, tmp_path: Path
) -> None:
    encoder = load_checkpoint(toy_run.out / "checkpoint").config.text_encoder.model_copy(update={"fingerprint": "00"})
    other = changed_checkpoint(toy_run, tmp_path / "other", text_encoder=encoder)
    with pytest.raises(CheckpointError, match=r"is not the .* was trained with"):
        evaluate(toy.data, toy.zoo, other, toy_run.preset, tmp_path / "evaluation.json")
    flipped = tmp_path / "flipped"
    shutil.copytree(toy_run.out / "checkpoint", flipped)
    content = bytearray((flipped / "model.safetensors").read_bytes())
    content[-100] ^= 1
    (flipped / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="is damaged: its hash differs"):
        evaluate(toy.data, toy.zoo, flipped, toy_run.preset, tmp_path / "evaluation.json")


def test_a_zoo_of_another_head_is_refused(toy: Toy, toy_run: ToyRun, tmp_path: Path) -> None:
    preset = toy_preset(head__hidden_dim=5)
    with pytest.raises(TrainingDataError, match="built for another head"):
        evaluate(toy.data, toy.zoo, toy_run.out / "checkpoint", preset, tmp_path / "evaluation.json")
