"""The unattended reproduction: a tiny archive in place of the download, a random backbone, a text model of letters."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

from tests.training.test_embed import LetterEncoder
from tests.training.toy import write_preset
from text2weight.backbone import small_image_resnet18
from text2weight.checkpoint import read_config
from text2weight.text_encoder import read_embedding_table
from text2weight_training import datasets, reproduce
from text2weight_training import train as train_module
from text2weight_training.backbone import BackboneConfig, save_backbone
from text2weight_training.datasets import download_tiny_imagenet
from text2weight_training.feature_file import read_feature_file
from text2weight_training.files import TrainingDataError
from text2weight_training.presets import Preset, load_preset
from text2weight_training.reproduce import BACKBONES, CLIP, REPRODUCTIONS, RESNET18, Reproduction, make_plan
from text2weight_training.reproduce_cli import BackboneChoice, Reproduced, reproduce_app

WORDS = {f"n{i:02d}": name for i, name in enumerate(("apple, fruit", "bus", "lizard", "rocket", "owl", "lamp"))}


def write_archive(folder: Path) -> str:
    """Tiny-ImageNet's archive with a few pictures; returns its MD5."""
    root, source = folder / "unpacked" / "tiny-imagenet-200", np.random.default_rng(0)

    def save(path: Path, number: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        colour = np.array([30 * number, 180 - 30 * number, 60 * (number % 3)])
        pixels = source.integers(0, 60, (16, 16, 3)) + colour
        Image.fromarray(pixels.astype(np.uint8)).save(path)

    annotations = []
    for number, wnid in enumerate(WORDS):
        for i in range(8):
            save(root / "train" / wnid / "images" / f"{wnid}_{i}.JPEG", number)
        for i in range(2):
            save(root / "val" / "images" / f"val_{number}_{i}.JPEG", number)
            annotations.append(f"val_{number}_{i}.JPEG\t{wnid}\t0\t0\t9\t9\n")
    (root / "words.txt").write_text("".join(f"{wnid}\t{names}\n" for wnid, names in WORDS.items()))
    (root / "val" / "val_annotations.txt").write_text("".join(annotations))
    made = shutil.make_archive(str(folder / "tiny-imagenet-200"), "zip", folder / "unpacked", "tiny-imagenet-200")
    return hashlib.md5(Path(made).read_bytes()).hexdigest()


@dataclass(frozen=True)
class Site:
    """Stand-ins for what the network would bring."""

    archive: Path
    what: Reproduction
    preset_file: Path

    @property
    def preset(self) -> Preset:
        return load_preset(str(self.preset_file))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    md5 = write_archive(folder)
    torch.manual_seed(0)
    save_backbone(small_image_resnet18(3), folder / "backbone", BackboneConfig(input_side=16), ["nothing"])
    recipe = {"steps": 10, "batch_size": 16, "learning_rate": 1e-2, "weight_decay": 0.0}
    preset = write_preset(
        folder / "preset.yaml",
        head={"input_dim": 512, "hidden_dim": 4, "output_dim": 26},
        denoiser__embedding_dim=26,
        zoo={"tasks": 12, "task_size": [2, 4], "unseen_fraction": 0.25, "stack": 4}
        | dict.fromkeys(("base", "universal", "heads"), recipe),
        fit__fresh_task_size=[2, 4],
        evaluation={"tasks": 3, "samplers": [["mean", 1]], "oracle": recipe, "bootstrap": 50},
        suites={"reading": {"tasks": 3}, "denoising": {"tasks": 3, "samplers": [["ddim", 4]]}}
        | {"memorisation": {"tasks": 3}},
    )
    backbone = replace(RESNET18, source=f"dir:{folder / 'backbone'}")
    what = replace(REPRODUCTIONS["tiny-imagenet"], backbone=backbone, text_model="dir:letters")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "TINY_IMAGENET_MD5", md5)
        patch.setattr(reproduce, "load_text_encoder", lambda source, device: LetterEncoder())
        patch.setitem(REPRODUCTIONS, "tiny-imagenet", what)
        patch.setitem(BACKBONES, RESNET18.source, backbone)
        yield Site(folder / "tiny-imagenet-200.zip", what, preset)


def bring_archive(site: Site, out: Path) -> None:
    """What the download leaves: torchvision takes a whole archive that is there for a finished one."""
    (out / "data").mkdir(parents=True)
    shutil.copy(site.archive, out / "data")


def command(site: Site, out: Path, *arguments: str) -> Result:
    options = ["--out", str(out), "--preset", str(site.preset_file), "--minutes", "0.01", *arguments]
    return CliRunner().invoke(reproduce_app, ["tiny-imagenet", *options], env={"COLUMNS": "160"})


class Finished(NamedTuple):
    out: Path
    result: Result


@pytest.fixture(scope="module")
def finished(site: Site, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    out = tmp_path_factory.mktemp("reproduced") / "run"
    bring_archive(site, out)
    return Finished(out, command(site, out))


def test_one_command_from_the_archive_to_the_evaluation(finished: Finished) -> None:
    assert finished.result.exit_code == 0, finished.result.output
    features = read_feature_file(finished.out / "features.safetensors")
    assert features.classes == ("apple", "bus", "lizard", "rocket", "owl", "lamp")
    assert (len(features.train_labels), len(features.test_labels)) == (48, 12)
    table = read_embedding_table(f"{finished.out / 'text.safetensors'}#tiny-imagenet")
    assert (table.template, table.names) == ("a {}", features.classes)
    torch.testing.assert_close(table.embeddings[1], LetterEncoder().encode(["a bus"])[0])
    evaluation = json.loads((finished.out / "evaluation.json").read_text())
    assert evaluation["tasks"] == 3
    assert read_config(finished.out / "checkpoint").evaluation["results"] == evaluation["results"]
    assert not (finished.out / "data" / "tiny-imagenet-200.zip").exists()


def test_the_plan_comes_first_and_knows_what_is_done(site: Site, finished: Finished, tmp_path: Path) -> None:
    assert finished.result.output.index("plan for") < finished.result.output.index("checkpoint in")
    assert all(stage.done for stage in make_plan(site.what, site.preset, finished.out, 0.01))
    fresh = command(site, tmp_path / "new", "--plan")
    assert fresh.exit_code == 0, fresh.output
    for part in ("download tiny-imagenet", "zoo of 9 heads", "evaluation on 3 unseen tasks", "what is left"):
        assert part in fresh.output
    assert "done" not in fresh.output
    assert not (tmp_path / "new").exists()  # it only prints


def test_a_second_call_makes_nothing_again(site: Site, finished: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.out.rglob("*") if path.is_file()}
    for place, name in (
        (reproduce, "extract"),
        (reproduce, "embed"),
        (train_module, "Fit"),
        (train_module, "evaluate"),
    ):
        monkeypatch.setattr(place, name, lambda *_: pytest.fail("made again"))
    again = command(site, finished.out)
    assert again.exit_code == 0, again.output
    assert again.output.count("done") >= 6
    assert {path: path.stat().st_mtime_ns for path in finished.out.rglob("*") if path.is_file()} == before


def test_an_interrupted_run_goes_on_where_it_stopped(
    site: Site, finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished.out, out)
    shutil.rmtree(out / "data")  # the features are there, so the pictures are not needed
    for made in ("text.safetensors", "zoo/heads-00001.safetensors", "evaluation.json"):
        (out / made).unlink()
    left = [stage.makes for stage in make_plan(site.what, site.preset, out, 0.01) if not stage.done]
    assert left == ["text.safetensors", "zoo", "evaluation.json"]
    monkeypatch.setattr(reproduce, "extract", lambda *_: pytest.fail("extracted again"))
    monkeypatch.setattr(train_module, "Fit", lambda *_: pytest.fail("fitted again"))
    result = command(site, out)
    assert result.exit_code == 0, result.output
    ours, expected = (json.loads((each / "evaluation.json").read_text())["results"] for each in (out, finished.out))
    assert ours == expected


def test_other_sources_in_the_same_folder_are_refused(site: Site, finished: Finished) -> None:
    other = replace(site.what, template="a photo of a {}")
    with pytest.raises(TrainingDataError, match="holds a reproduction with another template: choose another --out"):
        reproduce.reproduce(other, site.preset, finished.out, 0.01)


def test_a_disk_that_is_too_small_is_refused_before_anything_starts(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage(NamedTuple):
        free: int

    monkeypatch.setattr(reproduce.shutil, "disk_usage", lambda path: Usage(10**8))
    result = command(site, tmp_path / "run")
    assert result.exit_code == 2
    assert "has 0.1 GB of free disk, what is left of the plan needs 1." in result.stderr
    assert not list((tmp_path / "run").iterdir())


def test_a_download_that_fails_is_one_line(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any) -> None:
        raise OSError("network is unreachable")

    monkeypatch.setattr("torchvision.datasets.utils.download_url", unreachable)
    result = command(site, tmp_path / "run")
    assert result.exit_code == 2
    assert "error: Tiny-ImageNet is not there and cannot be downloaded: network is unreachable" in result.stderr


def test_an_unfinished_unpacking_is_not_taken_for_the_data(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bring_archive(site, tmp_path)

    def killed(archive: str, place: str) -> None:
        (Path(place) / "tiny-imagenet-200").mkdir()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("torchvision.datasets.utils.extract_archive", killed)
        with pytest.raises(KeyboardInterrupt):
            download_tiny_imagenet(tmp_path / "data")
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["tiny-imagenet-200.zip"]
    assert (download_tiny_imagenet(tmp_path / "data") / "words.txt").is_file()


def test_plans_grow_with_what_they_are_of() -> None:
    small, large = load_preset("small"), load_preset("large")
    what = REPRODUCTIONS["cifar100"]

    def stage(preset: Preset, makes: str, minutes: float = 60, what: Reproduction = what) -> Any:
        (found,) = [stage for stage in make_plan(what, preset, Path("absent"), minutes) if stage.makes == makes]
        return found

    assert stage(large, "zoo").disk_bytes == 9600 * 16_912 * 4
    assert 10 < stage(large, "zoo").seconds / stage(small, "zoo").seconds < 12000 / 1024
    assert stage(large, "checkpoint", 90).seconds == 5400
    assert stage(large, "features.safetensors").disk_bytes == 2 * 60_000 * 512 * 2
    twice = replace(what, images=120_000)
    assert stage(large, "features.safetensors", what=twice).seconds == 2 * stage(large, "features.safetensors").seconds


def test_the_command_knows_every_reproduction() -> None:
    assert {each.value for each in Reproduced} == set(REPRODUCTIONS)
    for name, what in REPRODUCTIONS.items():
        assert name == what.dataset in datasets.DATASETS
        published = Reproduction(name, what.images, what.download_bytes, what.disk_bytes, what.folder)
        assert (published.backbone.source, published.text_model) == (
            "torchvision:resnet18",
            "open_clip:ViT-B-32/openai",
        )
    assert {each.value for each in BackboneChoice} == set(BACKBONES) == {RESNET18.source, CLIP.source}


def test_clip_as_a_backbone_is_in_the_plan() -> None:
    preset, resnet = load_preset("large"), REPRODUCTIONS["cifar100"]
    plain, clip = (make_plan(what, preset, Path("absent"), 60) for what in (resnet, replace(resnet, backbone=CLIP)))
    assert clip[1].name == "features by open_clip:ViT-B-32/openai"
    assert clip[1].seconds > plain[1].seconds
    assert clip[1].memory_bytes - plain[1].memory_bytes == 2 * (CLIP.weight_bytes - RESNET18.weight_bytes)
    # One file holds both towers: what the download stage brings more, the text stage brings less.
    assert clip[0].disk_bytes - plain[0].disk_bytes == CLIP.weight_bytes - RESNET18.weight_bytes
    assert (clip[2].disk_bytes, clip[2].seconds) == (0, 60)
