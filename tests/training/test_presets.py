"""Presets: strict, and refused before a long run rather than at its end."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any, TypeVar

import pytest
from pydantic import BaseModel

from tests.training.toy import toy_preset, write_preset
from text2weight.checkpoint import bundled_checkpoint, read_config
from text2weight.outside import OutsideSettings
from text2weight_training.files import TrainingDataError
from text2weight_training.presets import load_preset, preset_names
from text2weight_training.suites.settings import HypernetworkSettings
from text2weight_training.teacher import TeacherSettings

ROOT = Path(__file__).parents[2]
Settings = TypeVar("Settings", bound=BaseModel)


def test_every_bundled_preset_loads() -> None:
    assert "small" in preset_names()
    for name in preset_names():
        preset = load_preset(name)
        assert preset.evaluation.tasks >= 200
        assert preset.head.num_parameters == 16_912


def test_heldout_is_small_with_classes_and_pairs_held_out_and_what_serves_them() -> None:
    heldout, small = load_preset("heldout"), load_preset("small")
    assert (heldout.zoo.held_out_classes, heldout.zoo.held_out_pairs) == (0.2, 0.05)
    assert heldout.zoo == small.zoo.model_copy(update={"held_out_classes": 0.2, "held_out_pairs": 0.05})
    assert heldout.fit == small.fit.model_copy(update={"class_mixing": 1.0})
    assert heldout.outside == OutsideSettings(reach=0.5, temperature=0.05)
    rest = {"zoo": small.zoo, "fit": small.fit, "outside": None, "suites": small.suites}
    assert heldout.model_copy(update=rest) == small


def test_recorded_tables_train_the_hypernetwork_in_full_and_show_an_edge_of_its_rates() -> None:
    hypernetwork = load_preset("heldout").suites.accuracy.hypernetwork
    assert hypernetwork == HypernetworkSettings()
    assert hypernetwork.steps >= 2000
    assert len(hypernetwork.learning_rates) >= 3


def test_the_bundled_model_is_made_by_its_preset() -> None:
    config, preset = read_config(bundled_checkpoint()), load_preset("reference")
    assert config.head == preset.head
    assert config.denoiser == preset.denoiser
    assert config.outside == preset.outside
    assert (config.sampler, config.steps) == (preset.sampler, preset.steps)
    assert len(config.evaluation["results"]["unseen"]) >= len(preset.evaluation.samplers)


def test_the_results_pages_commands_derive_the_presets_that_they_use(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "results.md").read_text().replace("\\\n", "")  # continued lines
    derived = {}
    for command, name in re.findall(r"^((?:sed|grep) .+ > (\w+\.yaml))$", page, re.MULTILINE):
        command = command.removesuffix(name) + shlex.quote(str(tmp_path / name))
        subprocess.run(["bash", "-c", command], cwd=ROOT, check=True)
        derived[name] = load_preset(str(tmp_path / name))
    assert set(derived) == set(re.findall(r"--preset (\S+\.yaml)", page))
    small, heldout = load_preset("small"), load_preset("heldout")
    teacher = TeacherSettings(width=4096)
    assert derived["taught.yaml"] == changed(small, fit=changed(small.fit, teacher=teacher))
    assert derived["plain.yaml"] == changed(heldout, fit=changed(heldout.fit, class_mixing=0.0), outside=None)
    assert derived["stopped.yaml"] == changed(
        derived["reads.yaml"], denoiser=small.denoiser, fit=derived["taught.yaml"].fit
    )
    assert (derived["reads.yaml"].denoiser.reads_given, derived["reads.yaml"].fit.given_share) == (True, 0.5)
    assert derived["ablation.yaml"].fit == small.fit
    for name, weight in (("equal.yaml", 0.0), ("explicit.yaml", 10.0)):
        fit, denoiser = derived[name].fit, derived[name].denoiser
        assert (fit.symmetry_weight, fit.task_weight, denoiser.tokens, denoiser.class_path) == (weight, 0, "chunk", 0)
        assert (derived[name].scaling, derived[name].zoo) == ("min_max", derived["stopped.yaml"].zoo)
    before = OutsideSettings(reach=0.5, temperature=0.1)
    ablation = changed(heldout.suites.ablation, minutes=15, seeds=1, tasks=100)
    assert derived["scale.yaml"] == changed(
        heldout,
        zoo=changed(heldout.zoo, tasks=12000),
        suites=changed(heldout.suites, ablation=ablation, accuracy=changed(heldout.suites.accuracy, tasks=100)),
        outside=before,
    )
    regularised = {"label_smoothing": 0.1, "feature_dropout": 0.1}
    for recipe in ("universal", "heads"):
        assert getattr(derived["grow.yaml"].zoo, recipe) == changed(getattr(heldout.zoo, recipe), **regularised)
    assert derived["grow.yaml"].outside == heldout.outside
    paper = load_preset("paper")
    assert derived["narrow.yaml"] == changed(
        paper,
        denoiser=changed(paper.denoiser, width=256, depth=3, heads=4),
        evaluation=changed(paper.evaluation, tasks=100),
    )
    zoo = {"tasks": 640, "task_size": (8, 20), "unseen_fraction": 0.3, "held_out_pairs": 0}
    accuracy = changed(heldout.suites.accuracy, tasks=100)
    assert derived["outside.yaml"] == changed(
        heldout,
        zoo=changed(heldout.zoo, **zoo),
        evaluation=changed(heldout.evaluation, tasks=192),
        suites=changed(heldout.suites, accuracy=accuracy),
        outside=before,
    )


def changed(settings: Settings, **changes: Any) -> Settings:
    return settings.model_copy(update=changes)


def test_a_file_is_read_by_its_path(tmp_path: Path) -> None:
    assert load_preset(str(write_preset(tmp_path / "toy.yaml"))) == toy_preset()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"colour": 1}, "colour: Extra inputs are not permitted"),
        ({"fit__stesp": 1}, "fit.stesp: Extra inputs are not permitted"),
        ({"zoo__heads__momentum": 0.9}, "zoo.heads.momentum: Extra inputs"),
        ({"fit__steps": "many"}, "fit.steps: Input should be a valid integer"),
        ({"fit__steps": 0}, "fit.steps: Input should be greater than 0"),
        ({"zoo": 3}, "zoo: Input should be"),
        ({"prediction": "x1"}, "prediction: Input should be 'x0', 'epsilon' or 'v'"),
        ({"zoo__task_size": [6, 3]}, r"zoo.task_size: .*2 <= least <= greatest"),
        ({"fit__fresh_task_size": [1, 3]}, r"fit.fresh_task_size: .*2 <= least <= greatest"),
        ({"zoo__unseen_fraction": 0.001}, "leave one side empty"),
        ({"zoo__held_out_pairs": 1.5}, "zoo.held_out_pairs.*1.5 must be a whole number of pairs, or a fraction"),
        ({"zoo__held_out_pairs": -2}, "zoo.held_out_pairs"),
        (
            {"zoo__held_out_classes": 1.0},
            "zoo.held_out_classes: .*1.0 must be a fraction from 0 to less than 1, or a list",
        ),
        ({"zoo__held_out_classes": ["apple", 3]}, "zoo.held_out_classes.*Input should be a valid string"),
        ({"suites__accuracy": {"task": 5}}, "suites.accuracy.task: Extra inputs are not permitted"),
        ({"evaluation__samplers": [["mean", 1], ["euler", 4]]}, "evaluation.samplers.1.0"),
        ({"evaluation__samplers": [["mean", 1], ["mean", 4]]}, "'mean' makes exactly 1"),
        ({"evaluation__samplers": [["mean", 1], ["ddim", 41]]}, "allowed are 1 to 40"),
        ({"evaluation__samplers": [["ddim", 4]]}, r"lacks the default sampler: add \[mean, 1\]"),
        ({"evaluation__tasks": 13}, "the zoo keeps only 12 unseen tasks"),
        ({"denoiser__embedding_dim": 9}, "must both be the size of a class embedding"),
        ({"head__logits": "plain"}, "head.logits must be cosine"),
        ({"scaling": "max"}, "scaling: Input should be 'standardise' or 'min_max'"),
        ({"fit__symmetry_weight": -0.1}, "fit.symmetry_weight: Input should be greater than or equal to 0"),
        ({"fit__condition_dropout": 1.1}, "fit.condition_dropout: Input should be less than or equal to 1"),
        (
            {"fit__permute_units": True, "scaling": "min_max"},
            "fit.permute_units contradicts denoiser.unit_identity.*set denoiser.unit_identity to false",
        ),
        (
            {"fit__permute_units": True, "denoiser__tokens": "chunk"},
            "fit.permute_units contradicts scaling standardise.*set scaling to min_max",
        ),
        ({"outside": {"reach": 1.1, "temperature": 0.1}}, "outside.reach: Input should be less than or equal to 1"),
        ({"outside": {"reach": -0.1, "temperature": 0.1}}, "outside.reach: Input should be greater than or equal to 0"),
        ({"outside": {"reach": 0.5, "temperature": 0}}, "outside.temperature: Input should be greater than 0"),
        ({"outside": {"reach": 0.5}}, "outside.temperature: Field required"),
        ({"fit__condition_dropout": 0.1}, "denoiser.null_condition is false: set both or neither"),
        ({"denoiser__null_condition": True}, "fit.condition_dropout 0.0 trains .* is true: set both or neither"),
        ({"denoiser__pooled": False, "denoiser__class_tokens": False}, "denoiser: .*pooled and class_tokens are both"),
    ],
)
def test_what_is_not_allowed_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = write_preset(tmp_path / "toy.yaml", **changes)
    with pytest.raises(TrainingDataError, match=f"preset toy.yaml is not valid: .*{message}"):
        load_preset(str(path))


@pytest.mark.parametrize("identity", [{"denoiser__tokens": "chunk"}, {"denoiser__unit_identity": False}])
def test_units_without_names_may_be_permuted(identity: dict[str, Any]) -> None:
    assert toy_preset(fit__permute_units=True, scaling="min_max", **identity).fit.permute_units


def test_the_papers_preset_is_what_the_paper_describes() -> None:
    paper = load_preset("paper")
    assert (paper.denoiser.tokens, paper.denoiser.chunk_size) == ("chunk", 576)
    assert (paper.denoiser.width, paper.denoiser.depth) == (1024, 6)
    assert not paper.denoiser.class_tokens
    assert (paper.prediction, paper.schedule.kind, paper.schedule.num_timesteps) == ("epsilon", "linear", 1000)
    assert paper.scaling == "min_max"
    fit = paper.fit
    weights = (fit.diffusion_weight, fit.symmetry_weight, fit.adversarial_weight, fit.task_weight)
    assert weights == (1.0, 0.1, 0.01, 0.0)
    assert fit.fresh_items == 0
    assert paper.sampler in ("ddpm", "ddim")


def test_the_papers_preset_can_be_fitted_on_the_small_ones_zoo() -> None:
    """Everything a zoo's manifest records of a preset."""
    paper, small = load_preset("paper"), load_preset("small")
    assert (paper.zoo, paper.head, paper.logit_scale, paper.seed) == (
        small.zoo,
        small.head,
        small.logit_scale,
        small.seed,
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"a: [1", "is not YAML"), (b"", "is not valid"), (b"- 1", "is not valid"), (b"\xff\xfe\xfa", "cannot be read")],
)
def test_files_that_are_no_presets(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    with pytest.raises(TrainingDataError, match=message):
        load_preset(str(path))


def test_unknown_names_list_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(TrainingDataError, match=r"no preset 'smal': choose .*small.*or give a .yaml file"):
        load_preset("smal")
    with pytest.raises(TrainingDataError, match="cannot be read"):
        load_preset(str(tmp_path / "absent.yaml"))
