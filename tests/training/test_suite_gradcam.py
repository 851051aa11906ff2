"""The suite `gradcam`: maps of generated heads on generated pictures, through a tiny random backbone."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from tests.training.toy import NAMES, TEXT_DIM, toy_preset, toy_table, write_preset
from text2weight.backbone import load_backbone, pixels_of, small_image_resnet18
from text2weight.text_encoder import write_embedding_tables
from text2weight_training.backbone import BackboneConfig, save_backbone
from text2weight_training.datasets import open_dataset
from text2weight_training.evaluate import generate_heads, load_generator
from text2weight_training.features import ExtractConfig, extract
from text2weight_training.files import TrainingDataError
from text2weight_training.fit import Fit
from text2weight_training.heatmaps import Tail, correlation, grad_cam, last_feature_maps
from text2weight_training.model_cli import evaluate_app
from text2weight_training.presets import Preset
from text2weight_training.suites import gradcam
from text2weight_training.suites.base import SuiteRun
from text2weight_training.suites.figures import save_figure
from text2weight_training.suites.runner import run_suites, with_pictures
from text2weight_training.tasks import load_task_data
from text2weight_training.zoo import build_zoo

CLASSES = NAMES[:8]
SIDE = 48  # a last map of 3 x 3
CHANGES: dict[str, Any] = {
    "head": {"input_dim": 512, "hidden_dim": 4, "output_dim": TEXT_DIM},
    "zoo__task_size": [2, 4],
    "zoo__universal": {"steps": 30, "batch_size": 32, "learning_rate": 1e-2, "weight_decay": 0.0},
    "zoo__heads": {"steps": 20, "batch_size": 16, "learning_rate": 1e-2, "weight_decay": 0.0},
    "fit__fresh_task_size": [2, 4],
    "evaluation__oracle": {"steps": 150, "batch_size": 32, "learning_rate": 1e-2, "weight_decay": 0.0},
    "suites__gradcam__tasks": 2,
}


def write_pictures(root: Path) -> None:
    """A coloured square somewhere on noise; its colour is the class."""
    source = np.random.default_rng(0)
    for split, count in (("train", 8), ("test", 3)):
        for number, name in enumerate(CLASSES):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = source.integers(90, 160, (SIDE, SIDE, 3)).astype(np.uint8)
                top, left = source.integers(0, SIDE - 16, 2)
                pixels[top : top + 16, left : left + 16] = [30 * number, 250 - 30 * number, 120 * (number % 3)]
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")


class Pictured:
    """A run on pictures: files, and what a suite is given."""

    def __init__(self, folder: Path) -> None:
        self.images = folder / "pictures"
        write_pictures(self.images)
        torch.manual_seed(0)
        self.backbone = folder / "backbone"
        save_backbone(small_image_resnet18(3), self.backbone, BackboneConfig(input_side=SIDE), ["nothing"])
        self.features = folder / "features.safetensors"
        encoder = load_backbone(self.backbone)
        extract(*open_dataset("folder", self.images), encoder, ExtractConfig(precision="fp32"), self.features)
        write_embedding_tables(folder / "text.safetensors", {"toy": toy_table(names=CLASSES)})
        self.text = f"{folder / 'text.safetensors'}#toy"
        self.data = load_task_data([self.features], self.text)
        self.preset: Preset = toy_preset(**CHANGES)
        self.zoo = build_zoo(self.data, self.preset, folder / "zoo")
        fit = Fit(self.data, self.zoo, self.preset, folder / "state.pt", "cpu")
        fit.run()
        self.folder, self.checkpoint = folder, folder / "checkpoint"
        fit.write_checkpoint(self.checkpoint, self.backbone)

    def run(self, out: Path, images: Path | None = None, backbone: str | None = None) -> SuiteRun:
        generator = load_generator(self.checkpoint, self.data, self.zoo, self.preset)
        return SuiteRun(self.data, self.zoo, generator, with_pictures(self.preset, images, backbone), out)


@pytest.fixture(scope="module")
def pictured(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Pictured:
    return Pictured(tmp_path_factory.mktemp("pictured"))


@pytest.fixture(scope="module")
def measured(pictured: Pictured, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    out = tmp_path_factory.mktemp("gradcam")
    return gradcam.run(pictured.run(out, pictured.images)), out


def test_the_map_is_grad_cam_of_the_whole_network(pictured: Pictured) -> None:
    """Gradients of the whole network's logit at its last layer, written out, give the same map."""
    encoder, task = load_backbone(pictured.backbone), pictured.zoo.split.unseen[0]
    test = open_dataset("folder", pictured.images)[1]
    pictures = [test.open(key) for key in test.keys[:4]]
    pixels = pixels_of(pictures, SIDE)
    maps = last_feature_maps(encoder, pixels)
    assert maps.shape == (4, 512, 3, 3)
    torch.testing.assert_close(maps.mean((2, 3)), encoder.features(pictures), rtol=1e-4, atol=1e-5)
    tail = Tail(pictured.preset.head, pictured.zoo.universal, pictured.data.embeddings[list(task)], 10.0)
    targets = torch.tensor([0, 1, 0, 1])
    heat, probability = grad_cam(tail, maps, targets)

    kept: list[torch.Tensor] = []
    hook = encoder.model.layer4.register_forward_hook(lambda *args: kept.append(args[2]))  # type: ignore[union-attr]
    features = encoder.model(encoder.normalise(pixels).requires_grad_(True))
    hook.remove()
    logits = tail(features[:, :, None, None])
    (gradient,) = torch.autograd.grad(logits.gather(1, targets[:, None]).sum(), kept)
    expected = (gradient.mean((2, 3), keepdim=True) * kept[0]).sum(1).clamp(min=0).detach()  # (N, a, b)
    low, high = expected.amin((1, 2), keepdim=True), expected.amax((1, 2), keepdim=True)
    torch.testing.assert_close(heat, (expected - low) / (high - low + 1e-7), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(probability, logits.detach().softmax(-1)[range(4), targets], rtol=1e-3, atol=1e-4)


def test_correlation_by_hand() -> None:
    one = torch.tensor([[[0.0, 1.0], [0.0, 1.0]]]).expand(3, -1, -1)
    other = torch.stack([one[0], 1 - one[0], torch.zeros(2, 2)])
    assert correlation(one, other).tolist() == pytest.approx([1.0, -1.0, 0.0])
    assert correlation(one[:1], torch.tensor([[[0.0, 1.0], [1.0, 0.0]]])).tolist() == [0.0]


def test_a_backbone_that_is_more_than_the_mean_of_a_map_is_refused(pictured: Pictured) -> None:
    encoder = load_backbone(pictured.backbone)
    pixels = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)  # at 16 px the last map is one point
    with pytest.raises(TrainingDataError, match="are not the mean of its last feature map"):
        last_feature_maps(encoder, pixels)


def test_every_head_is_measured_on_every_picture(measured: tuple[dict[str, Any], Path]) -> None:
    result, _ = measured
    assert list(result["columns"]) == [*gradcam.COLUMNS, gradcam.ANOTHER_SEED]
    assert (result["tasks"], result["pictures"], result["map"]) == (2, 8, [3, 3])
    assert (result["sampler"], result["images"]) == ("ddim/5", "pictures")
    for name, entry in result["columns"].items():
        assert 0 <= entry["probability"]["value"] <= 1
        assert 0 <= entry["empty"] <= 1
        assert (entry["agreement"] is None) == (name == "trained")
        if entry["agreement"]:
            low, high = entry["agreement"]["interval"]
            assert -1 <= low - 1e-6 <= entry["agreement"]["value"] <= high + 1e-6 <= 1 + 2e-6


def test_the_last_estimate_is_the_generated_head_and_training_helps(
    pictured: Pictured, measured: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    run = pictured.run(tmp_path, pictured.images)
    tasks = list(pictured.zoo.split.unseen[:2])
    heads = gradcam._heads(run, tasks)
    made = generate_heads(run.generator, run.data, tasks, "ddim", 5, run.preset.seed)
    torch.testing.assert_close(heads["last estimate"], made, rtol=1e-4, atol=1e-5)
    assert not torch.equal(heads["first estimate"], heads["last estimate"])
    columns = measured[0]["columns"]
    assert columns["trained"]["probability"]["value"] > columns["universal"]["probability"]["value"] + 0.05, {
        name: entry["probability"]["value"] for name, entry in columns.items()
    }
    assert columns["trained, another seed"]["agreement"]["value"] > 0


def test_it_is_the_same_twice_and_draws_a_figure(
    pictured: Pictured, measured: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    assert json.dumps(gradcam.run(pictured.run(tmp_path, pictured.images))) == json.dumps(measured[0])
    for stem in ("gradcam", "pictures-gradcam"):
        assert (tmp_path / f"{stem}.svg").read_bytes() == (measured[1] / f"{stem}.svg").read_bytes()
        assert (tmp_path / f"{stem}.png").read_bytes().startswith(b"\x89PNG")


def test_only_the_second_figure_shows_the_pictures(tmp_path: Path) -> None:
    heat = {name: torch.rand(1, 3, 3) for name in gradcam.COLUMNS}
    probability = {name: torch.rand(1) for name in gradcam.COLUMNS}

    def drawn(colour: int, over_pictures: bool) -> bytes:
        pixels = torch.full((1, 3, 8, 8), colour, dtype=torch.uint8)
        figure = gradcam._figure([gradcam.Seen(pixels, ("apple",), heat, probability)], over_pictures)
        save_figure(figure, tmp_path / "figure")
        return (tmp_path / "figure.png").read_bytes()

    assert drawn(10, over_pictures=False) == drawn(200, over_pictures=False)
    assert drawn(10, over_pictures=True) != drawn(200, over_pictures=True)


def test_the_report_has_a_row_per_head(measured: tuple[dict[str, Any], Path]) -> None:
    text = gradcam.report(measured[0])
    assert text.count("\n| last estimate |") == text.count("\n| trained |") == 1
    assert "8 test pictures of pictures, 2 unseen tasks, maps of 3 x 3 points" in text


def test_classes_without_pictures_are_passed_over(pictured: Pictured, tmp_path: Path) -> None:
    some = tmp_path / "some"
    shutil.copytree(pictured.images / "test" / CLASSES[0], some / "val" / CLASSES[0].upper())
    result = gradcam.run(pictured.run(tmp_path, some))
    assert result["tasks"] == 2
    assert result["pictures"] == 3 * result["tasks"]
    shutil.move(some / "val" / CLASSES[0].upper(), some / "val" / "zebra")
    with pytest.raises(TrainingDataError, match=r"no picture of any class .* folders are zebra"):
        gradcam.run(pictured.run(tmp_path, some))


def test_without_pictures_or_backbone_it_says_so(pictured: Pictured, suite_run: SuiteRun, tmp_path: Path) -> None:
    """The toy run's features are of no backbone."""
    bare = replace(suite_run, out=tmp_path)
    text = gradcam.report(gradcam.run(bare))
    assert "Not measured: no pictures are given: name a folder with test/CLASS/*.png by --images." in text
    shown = replace(bare, preset=with_pictures(bare.preset, pictured.images, None))
    assert "the checkpoint holds no backbone" in gradcam.report(gradcam.run(shown))
    other = replace(bare, preset=with_pictures(bare.preset, pictured.images, f"dir:{pictured.backbone}"))
    with pytest.raises(TrainingDataError, match=r"is resnet18-no-maxpool .*, but the features were made with toy back"):
        gradcam.run(other)
    sized = replace(bare, preset=with_pictures(bare.preset, pictured.images, f"dir:{pictured.backbone}", 64))
    with pytest.raises(TrainingDataError, match="--side does not go with dir:"):
        gradcam.run(sized)
    assert not list(tmp_path.iterdir())


def test_results_name_folders_without_their_place(pictured: Pictured) -> None:
    preset = with_pictures(pictured.preset, Path("/some/where/pets"), "dir:/some/where/net")
    written = preset.suites.model_dump(mode="json")["gradcam"]
    assert (written["images"], written["backbone"]) == ("pets", "dir:net")
    assert with_pictures(preset, None, "timm:resnet10t").suites.gradcam.images == Path("/some/where/pets")
    with pytest.raises(ValueError, match="first, middle and last need at least 3"):
        toy_preset(suites__gradcam__sampler=["mean", 1])


def test_the_command_takes_pictures(pictured: Pictured, tmp_path: Path) -> None:
    preset = write_preset(tmp_path / "toy.yaml", **CHANGES)
    arguments = ["--checkpoint", pictured.checkpoint, "--zoo", pictured.folder / "zoo", "--features", pictured.features]
    arguments += ["--text", pictured.text, "--preset", preset, "--out", tmp_path / "out", "--images", pictured.images]
    result = CliRunner().invoke(evaluate_app, [*map(str, arguments), "--suite", "gradcam"])
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "out" / "gradcam.json").read_text())["result"]["pictures"] == 8
    refused = CliRunner().invoke(evaluate_app, [*map(str, arguments), "--suite", "reading"])
    assert refused.exit_code == 2
    assert "--images and --backbone belong to" in refused.stderr
    sized = CliRunner().invoke(evaluate_app, [*map(str, arguments), "--suite", "gradcam", "--side", "64"])
    assert sized.exit_code == 2
    assert "--side belongs to --backbone" in sized.stderr


def test_settings_in_the_preset_do_the_same(
    pictured: Pictured, measured: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    preset = toy_preset(**CHANGES, suites__gradcam__images=str(pictured.images))
    (written,) = run_suites(["gradcam"], pictured.data, pictured.zoo, pictured.checkpoint, preset, tmp_path)
    assert json.dumps(written["result"]) == json.dumps(measured[0])
