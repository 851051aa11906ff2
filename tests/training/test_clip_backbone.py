"""CLIP's image tower as a backbone, by open_clip: its features, and the zero-shot classifier on them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from typer.testing import CliRunner

from tests.training.test_reproduce import WORDS, write_archive
from tests.training.tiny_clip import DIM, SOURCE, image_features, published_tiny_clip, text_embeddings
from tests.training.toy import write_preset
from text2weight.backbone import pixels_of
from text2weight.checkpoint import read_config
from text2weight.text_encoder import load_text_encoder, read_embedding_table
from text2weight_training import datasets
from text2weight_training.datasets import open_dataset
from text2weight_training.feature_classifiers import zero_shot_obstacle
from text2weight_training.feature_file import read_feature_file
from text2weight_training.files import TrainingDataError
from text2weight_training.image_encoders import load_image_encoder
from text2weight_training.presets import load_preset
from text2weight_training.reproduce import BACKBONES, CLIP, REPRODUCTIONS
from text2weight_training.reproduce_cli import reproduce_app
from text2weight_training.suites.runner import run_suites
from text2weight_training.tasks import TaskData, load_task_data
from text2weight_training.zoo import Zoo, load_zoo

NAMES = [words.split(",")[0] for words in WORDS.values()]
ZERO_SHOT = "CLIP zero-shot"


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Iterator[open_clip.CLIP]:
    with published_tiny_clip(tmp_path_factory.mktemp("home")) as model:
        yield model


def pictures() -> list[Image.Image]:
    source = np.random.default_rng(0)
    return [Image.fromarray(source.integers(0, 256, (h, w, 3), np.uint8)) for h, w in ((32, 32), (64, 64), (40, 60))]


def test_features_are_open_clips_own(clip: open_clip.CLIP) -> None:
    encoder = load_image_encoder(SOURCE)
    assert (encoder.side, encoder.description) == (32, SOURCE)
    assert encoder.preprocess.endswith("mean 0.5, 0.4, 0.3, std 0.2, 0.3, 0.4")
    features = encoder.features_from_pixels(pixels_of(pictures(), encoder.side))
    assert features.shape == (3, DIM)  # projected into the space of the texts, not the tower's width of 32
    torch.testing.assert_close(features, image_features(clip, pictures()), rtol=1e-3, atol=1e-4)


def test_texts_share_the_models_activation(clip: open_clip.CLIP) -> None:
    texts = ["a bus", "a lizard"]
    torch.testing.assert_close(load_text_encoder(SOURCE).encode(texts), text_embeddings(clip, texts))


@pytest.mark.parametrize(
    ("source", "side", "message"),
    [
        ("open_clip:tiny-clip", None, "unknown backbone 'open_clip:tiny-clip': give torchvision:NAME"),
        ("open_clip:tiny-clip/other", None, "open_clip:tiny-clip/other cannot be loaded: .*not a known tag"),
        ("open_clip:no-such-model/random", None, "cannot be loaded: Model config for 'no-such-model' not found"),
        ("open_clip:tiny-clip/squashed", None, "'squash'.*: only squares by .*'shortest'.* choose another model"),
        (SOURCE, 64, f"--side does not go with {SOURCE}: its own config fixes it"),
    ],
)
def test_models_that_cannot_serve_are_refused(
    clip: open_clip.CLIP, source: str, side: int | None, message: str
) -> None:
    with pytest.raises(TrainingDataError, match=message):
        load_image_encoder(source, side=side)


@dataclass(frozen=True)
class Measured:
    """A reproduction with the tiny CLIP in the published one's place, and the suite `accuracy` on it."""

    out: Path
    output: str
    data: TaskData
    zoo: Zoo
    result: dict[str, Any]


@pytest.fixture(scope="module")
def measured(clip: open_clip.CLIP, tmp_path_factory: pytest.TempPathFactory) -> Measured:
    folder = tmp_path_factory.mktemp("clip")
    out = folder / "run"
    recipe = {"steps": 10, "batch_size": 16, "learning_rate": 1e-2, "weight_decay": 0.0}
    grid = {"steps": 10, "batch_size": 16, "learning_rates": [1e-2], "weight_decays": [0.0], "widths": [1.0]}
    preset = write_preset(
        folder / "preset.yaml",
        head={"input_dim": DIM, "hidden_dim": 4, "output_dim": DIM},
        zoo={"tasks": 12, "task_size": [2, 4], "unseen_fraction": 0.25, "stack": 4}
        | dict.fromkeys(("base", "universal", "heads"), recipe),
        fit__fresh_task_size=[2, 4],
        evaluation={"tasks": 3, "samplers": [["mean", 1]], "oracle": recipe, "bootstrap": 50},
        suites={"accuracy": {"tasks": 3, "oracle_seeds": 1, "restricted_universal": recipe, "hypernetwork": grid}}
        | {"reading": {"tasks": 3}, "denoising": {"tasks": 3, "samplers": [["ddim", 4]]}, "memorisation": {"tasks": 3}},
    )
    (out / "data").mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "TINY_IMAGENET_MD5", write_archive(folder))
        shutil.copy(folder / "tiny-imagenet-200.zip", out / "data")
        patch.setitem(BACKBONES, CLIP.source, replace(CLIP, source=SOURCE))
        what = replace(REPRODUCTIONS["tiny-imagenet"], text_model=SOURCE)
        patch.setitem(REPRODUCTIONS, "tiny-imagenet", what)
        options = ["--backbone", CLIP.source, "--out", str(out), "--preset", str(preset), "--minutes", "0.01"]
        finished = CliRunner().invoke(reproduce_app, ["tiny-imagenet", *options], env={"COLUMNS": "160"})
    assert finished.exit_code == 0, finished.output
    data = load_task_data([out / "features.safetensors"], f"{out / 'text.safetensors'}#tiny-imagenet")
    zoo = load_zoo(out / "zoo")
    (written,) = run_suites(["accuracy"], data, zoo, out / "checkpoint", load_preset(str(preset)), folder / "suites")
    return Measured(out, finished.output, data, zoo, written["result"])


def test_the_reproduction_uses_the_image_tower(measured: Measured, clip: open_clip.CLIP) -> None:
    assert f"features by {SOURCE}" in measured.output
    file = read_feature_file(measured.out / "features.safetensors")
    assert (file.backbone, file.dim) == (SOURCE, DIM)
    _, test = open_dataset("tiny-imagenet", measured.out / "data" / "tiny-imagenet-200")
    expected = image_features(clip, [test.open(key) for key in test.keys])
    # Extracted in bf16.
    assert F.cosine_similarity(file.test_features.float(), expected).min() > 0.999
    assert read_embedding_table(f"{measured.out / 'text.safetensors'}#tiny-imagenet").encoder == SOURCE
    assert read_config(measured.out / "checkpoint").backbone["name"] == SOURCE
    assert (measured.out / "evaluation.json").is_file()


def test_the_zero_shot_row_is_what_a_hand_computes(measured: Measured, clip: open_clip.CLIP) -> None:
    file = read_feature_file(measured.out / "features.safetensors")
    texts = text_embeddings(clip, [f"a {name}" for name in NAMES]).numpy()  # (C, D)
    features = file.test_features.float().numpy()  # (N, D)
    cosines = features @ texts.T / np.linalg.norm(features, axis=1, keepdims=True)  # (N, C)
    labels = file.test_labels.numpy()
    assert measured.data.classes == file.classes == tuple(NAMES)
    assert measured.result["not_applicable"] == {}
    for split, entry in measured.result["splits"].items():
        accuracies = []
        for task in getattr(measured.zoo.split, split)[: entry["tasks"]]:
            rows = np.isin(labels, task)
            answers = np.array(task)[cosines[rows][:, list(task)].argmax(1)]
            accuracies.append(np.mean(answers == labels[rows]))
        assert entry["methods"][ZERO_SHOT]["accuracy"] == pytest.approx(np.mean(accuracies))
        assert entry["methods"][ZERO_SHOT]["weight_error"] is None


def test_zero_shot_goes_by_what_made_features_and_texts(measured: Measured, tmp_path: Path) -> None:
    features = [measured.out / "features.safetensors"]
    assert zero_shot_obstacle(measured.data) is None
    assert zero_shot_obstacle(load_task_data(features, SOURCE)) is None
    # The same numbers, without a word of where they come from.
    unnamed = replace(measured.data, text_model="")
    assert zero_shot_obstacle(unnamed) == (
        f"the features are of {SOURCE}, the text embeddings of a text model that their table does not name; "
        f"give --text {SOURCE}"
    )
    other = replace(measured.data, text_model="open_clip:text_encoder")
    assert "the text embeddings of open_clip:text_encoder; give --text" in str(zero_shot_obstacle(other))
