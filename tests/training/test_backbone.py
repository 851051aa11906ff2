"""Backbone training: it learns, it resumes to the same weights, and what it writes loads again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from text2weight.backbone import load_backbone, pixels_of
from text2weight.errors import CheckpointError
from text2weight_training import backbone
from text2weight_training.backbone import BackboneConfig, smoothed_cross_entropy, train_backbone
from text2weight_training.files import TrainingDataError
from text2weight_training.image_data import LabelledImages

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 210)}
TOY = BackboneConfig(sides=(12, 12, 16), input_side=16, batch_size=16, learning_rate=0.05)


def square(colour: tuple[int, int, int], rng: np.random.Generator) -> Image.Image:
    """A noisy picture with a coloured square somewhere."""
    picture = rng.integers(90, 160, (16, 16, 3), dtype=np.uint8)
    top, left = rng.integers(0, 8, 2)
    picture[top : top + 8, left : left + 8] = colour
    return Image.fromarray(picture)


def squares(count: int, seed: int) -> tuple[torch.Tensor, LabelledImages]:
    rng = np.random.default_rng(seed)
    labels = tuple(i % len(COLOURS) for i in range(count))
    pictures = [square(list(COLOURS.values())[label], rng) for label in labels]
    keys = tuple(str(i) for i in range(count))
    return pixels_of(pictures, 16), LabelledImages("squares", keys, labels, tuple(COLOURS), lambda k: pictures[int(k)])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pixels, images = squares(96, seed=0)
    return train_backbone(pixels, [images], TOY, tmp_path_factory.mktemp("backbone"))


def test_learns_coloured_squares(trained: Path) -> None:
    loaded = load_backbone(trained)
    pixels, images = squares(48, seed=0)
    unseen, truth = squares(60, seed=1)
    features = loaded.features_from_pixels(pixels)
    centres = torch.stack([features[torch.tensor(images.labels) == label].mean(0) for label in range(3)])
    predicted = torch.cdist(loaded.features_from_pixels(unseen), centres).argmin(1)
    assert (predicted == torch.tensor(truth.labels)).float().mean() > 0.9


def test_written_folder_describes_itself(trained: Path) -> None:
    loaded = load_backbone(trained)
    assert loaded.side == 16
    assert loaded.config["trained_on"] == ["squares"]
    assert loaded.config["model_sha256"].startswith(loaded.description.split()[-1])
    assert "16 px" in loaded.preprocess
    assert {entry.name for entry in trained.iterdir()} == {"config.json", "model.safetensors"}


def test_features_do_not_depend_on_the_rest_of_the_batch(trained: Path) -> None:
    loaded = load_backbone(trained)
    rng = np.random.default_rng(3)
    pictures = [square((1, 2, 3), rng), Image.new("L", (40, 20), 77), Image.new("RGBA", (5, 9), (1, 2, 3, 4))]
    together = loaded.features(pictures)
    assert together.shape == (3, 512)
    assert together.dtype == torch.float32
    alone = torch.cat([loaded.features([picture]) for picture in pictures])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def test_a_killed_run_ends_with_the_same_weights(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels, images = squares(96, seed=0)
    steps = 0
    real_step = backbone.Trainer.step

    def dying_step(*arguments: object) -> float:
        nonlocal steps
        steps += 1
        if steps == 9:  # in the middle of the second epoch
            raise KeyboardInterrupt
        return real_step(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(backbone.Trainer, "step", dying_step)
        with pytest.raises(KeyboardInterrupt):
            train_backbone(pixels, [images], TOY, tmp_path)
    assert {entry.name for entry in tmp_path.iterdir()} == {"training-state.pt"}
    torch.manual_seed(99)  # the result does not hang on the process's own random state
    train_backbone(pixels, [images], TOY, tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == (trained / "model.safetensors").read_bytes()


def test_a_killed_run_of_other_settings_is_refused(tmp_path: Path) -> None:
    pixels, images = squares(16, seed=0)
    one_epoch = replace(TOY, sides=(12,))
    trainer = backbone._new_trainer([range(3)], 1, one_epoch, torch.device("cpu"))
    trainer.save(tmp_path / "training-state.pt", 1)
    with pytest.raises(TrainingDataError, match="other settings: remove it"):
        train_backbone(pixels, [images], TOY, tmp_path)


def test_too_few_images_is_an_error(tmp_path: Path) -> None:
    pixels, images = squares(9, seed=0)
    with pytest.raises(TrainingDataError, match="9 images are fewer than one batch of 16"):
        train_backbone(pixels, [images], TOY, tmp_path)


def test_diverging_loss_is_an_error(tmp_path: Path) -> None:
    pixels, images = squares(32, seed=0)
    with pytest.raises(TrainingDataError, match="lower the learning rate"):
        train_backbone(pixels, [images], replace(TOY, learning_rate=float("nan"), sides=(12,)), tmp_path)


def test_loss_equals_torchs_where_every_class_is_allowed() -> None:
    logits, target = torch.randn(5, 4), torch.tensor([0, 3, 2, 1, 1])
    expected = torch.nn.functional.cross_entropy(logits, target, label_smoothing=0.1)
    torch.testing.assert_close(smoothed_cross_entropy(logits, target, 0.1), expected)
    # Classes of other datasets take no part: the loss is that of the allowed ones alone.
    padded = torch.cat([logits, torch.full((5, 3), float("-inf"))], dim=1)
    torch.testing.assert_close(smoothed_cross_entropy(padded, target, 0.1), expected)


@pytest.fixture
def copy(trained: Path, tmp_path: Path) -> Path:
    for file in trained.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def test_one_flipped_byte_is_noticed(copy: Path) -> None:
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[len(data) // 2] ^= 1
    (copy / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match="is damaged: its SHA-256"):
        load_backbone(copy)


def test_a_folder_without_hash_loads(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    digest = config.pop("model_sha256")
    (copy / "config.json").write_text(json.dumps(config))
    assert load_backbone(copy).config["model_sha256"] == digest


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other/9"}, "has format 'other/9'"),
        ({"architecture": "vit"}, "architecture is 'vit'.*checkpoint and service hold only what `t2w backbone` wrote"),
        ({"preprocess": {"side": 0}}, "preprocess.side"),
        ({"preprocess": {"side": 16, "mean": [1, 2], "std": [1, 1, 1]}}, "preprocess.mean"),
    ],
)
def test_wrong_config_is_refused(copy: Path, change: dict[str, object], message: str) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(CheckpointError, match=message):
        load_backbone(copy)


def test_missing_files_are_refused(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="is not a backbone folder"):
        load_backbone(copy)
    (copy / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="is not JSON"):
        load_backbone(copy)
    with pytest.raises(CheckpointError, match="is not a backbone folder"):
        load_backbone(copy / "absent")
    with pytest.raises(CheckpointError, match=r"run pictures through any other backbone.*outside the service"):
        load_backbone("open_clip:ViT-B-32/openai")
