"""Feature extraction: right values, once per image, resumable, and every kind of backbone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from text2weight.backbone import load_backbone, small_image_resnet18
from text2weight_training.backbone import BackboneConfig, save_backbone
from text2weight_training.feature_file import read_feature_file
from text2weight_training.features import ExtractConfig, extract
from text2weight_training.files import TrainingDataError
from text2weight_training.image_data import LabelledImages
from text2weight_training.image_encoders import load_image_encoder


def pictures(count: int, split: str) -> LabelledImages:
    """Pictures whose mean red value is 10 times their number."""

    def open_it(key: str) -> Image.Image:
        red = 10 * int(key.rpartition("/")[2])
        rng = np.random.default_rng(red)
        return Image.fromarray(np.stack([np.full((9, 9), red), *rng.integers(0, 255, (2, 9, 9))], -1).astype(np.uint8))

    keys = tuple(f"{split}/{i}" for i in range(count))
    return LabelledImages("toy", keys, tuple(i % 2 for i in range(count)), ("even", "odd"), open_it)


class RedMean:
    """An encoder whose single feature is the mean red value; it counts the pictures it saw."""

    side = 8
    description = "red mean"
    preprocess = "8 px"

    def __init__(self, fail_after: int = 10**9) -> None:
        self.seen = 0
        self.fail_after = fail_after

    def features_from_pixels(self, pixels: Tensor) -> Tensor:
        if self.seen >= self.fail_after:
            raise KeyboardInterrupt
        self.seen += len(pixels)
        return pixels[:, :1].float().mean(dim=(2, 3))


CONFIG = ExtractConfig(batch_size=2, precision="fp32", block=4)


def test_each_image_once_in_order(tmp_path: Path) -> None:
    encoder, out = RedMean(), tmp_path / "features.safetensors"
    extract(pictures(11, "train"), pictures(5, "test"), encoder, CONFIG, out)
    content = read_feature_file(out)
    assert encoder.seen == 16
    assert content.train_features.flatten().tolist() == [10.0 * i for i in range(11)]
    assert content.test_labels.tolist() == [0, 1, 0, 1, 0]
    assert (content.backbone, content.preprocess, content.classes) == ("red mean", "8 px", ("even", "odd"))
    assert [entry.name for entry in tmp_path.iterdir()] == ["features.safetensors"]


def test_killed_run_goes_on_with_the_same_result(tmp_path: Path) -> None:
    out, whole = tmp_path / "features.safetensors", tmp_path / "whole.safetensors"
    extract(pictures(11, "train"), pictures(5, "test"), RedMean(), CONFIG, whole)
    with pytest.raises(KeyboardInterrupt):
        extract(pictures(11, "train"), pictures(5, "test"), RedMean(fail_after=6), CONFIG, out)
    # A block that a full disk cut short counts as not there.
    (tmp_path / "features.safetensors.partial" / "train" / "00001.safetensors").write_bytes(b"short")
    second = RedMean()
    extract(pictures(11, "train"), pictures(5, "test"), second, CONFIG, out)
    assert second.seen == 12
    # Values, not bytes: safetensors orders metadata keys anew in each file.
    for ours, expected in zip(
        vars(read_feature_file(out)).values(), vars(read_feature_file(whole)).values(), strict=True
    ):
        assert torch.equal(ours, expected) if isinstance(ours, Tensor) else ours == expected


def test_blocks_of_other_settings_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "features.safetensors"
    with pytest.raises(KeyboardInterrupt):
        extract(pictures(11, "train"), pictures(5, "test"), RedMean(fail_after=6), CONFIG, out)
    with pytest.raises(TrainingDataError, match="other images or settings: remove that folder"):
        extract(pictures(10, "train"), pictures(5, "test"), RedMean(), CONFIG, out)


def test_nan_features_are_refused(tmp_path: Path) -> None:
    class Broken(RedMean):
        def features_from_pixels(self, pixels: Tensor) -> Tensor:
            return super().features_from_pixels(pixels) / 0

    with pytest.raises(TrainingDataError, match="NaN or beyond fp16"):
        extract(pictures(4, "train"), pictures(2, "test"), Broken(), CONFIG, tmp_path / "f.safetensors")


@pytest.fixture(scope="module")
def backbone_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("backbone")
    torch.manual_seed(0)
    save_backbone(small_image_resnet18(3), folder, BackboneConfig(input_side=32), ["nothing"])
    return folder


def test_own_backbone_in_both_precisions(backbone_folder: Path, tmp_path: Path) -> None:
    encoder = load_image_encoder(f"dir:{backbone_folder}")
    train, test = pictures(8, "train"), pictures(4, "test")
    full = extract(train, test, encoder, ExtractConfig(precision="fp32"), tmp_path / "full.safetensors")
    fast = extract(train, test, encoder, ExtractConfig(precision="bf16"), tmp_path / "fast.safetensors")
    direct = load_backbone(backbone_folder).features([test.open(key) for key in test.keys])
    torch.testing.assert_close(full.test_features.float(), direct, rtol=2e-3, atol=1e-4)
    assert full.backbone == load_backbone(backbone_folder).description
    assert torch.cosine_similarity(full.train_features.float(), fast.train_features.float()).min() > 0.999


def test_bf16_differs_from_fp32_by_rounding_only(backbone_folder: Path) -> None:
    encoder = load_image_encoder(f"dir:{backbone_folder}")
    pixels = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    full = encoder.features_from_pixels(pixels)
    with torch.autocast("cpu", torch.bfloat16):
        fast = encoder.features_from_pixels(pixels)
    assert (fast - full).norm() / full.norm() < 0.02


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Torch's download cache with ResNet-18 weights of our own in place of the published ones."""
    from torchvision.models import ResNet18_Weights, resnet18

    cache = tmp_path / "hub"
    (cache / "checkpoints").mkdir(parents=True)
    torch.manual_seed(1)
    torch.save(resnet18().state_dict(), cache / "checkpoints" / Path(ResNet18_Weights.DEFAULT.url).name)
    previous = torch.hub.get_dir()
    torch.hub.set_dir(str(cache))
    yield cache
    torch.hub.set_dir(previous)


def test_torchvision_resnet18_with_its_published_weights(hub: Path) -> None:
    from torchvision.models import resnet18

    encoder = load_image_encoder("torchvision:resnet18")
    assert (encoder.side, encoder.description) == (224, "torchvision resnet18 IMAGENET1K_V1")
    encoder = load_image_encoder("torchvision:resnet18", side=64)
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    features = encoder.features_from_pixels(pixels)
    model = resnet18()
    model.load_state_dict(torch.load(next((hub / "checkpoints").iterdir()), weights_only=True))
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    with torch.inference_mode():
        logits = model.eval()((pixels / 255 - mean) / std)
        torch.testing.assert_close(model.fc(features), logits, rtol=1e-3, atol=1e-3)


def test_timm_model(monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    real = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained, **rest: real(name, pretrained=False, **rest))
    encoder = load_image_encoder("timm:resnet10t", side=32)
    features = encoder.features_from_pixels(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))
    assert features.shape == (2, 512)
    assert encoder.side == 32
    assert encoder.description.startswith("timm resnet10t ")


def test_caffes_squeezenet_from_a_file(tmp_path: Path) -> None:
    """Blue, green, red from 0 to 255 less the means go in; the last fire module's average comes out."""
    from torchvision.models import squeezenet1_1

    torch.manual_seed(2)
    model, file = squeezenet1_1().eval(), tmp_path / "squeezenet.safetensors"
    save_file({name: tensor.half() for name, tensor in model.state_dict().items()}, file)
    model.load_state_dict({name: tensor.half().float() for name, tensor in model.state_dict().items()})
    encoder = load_image_encoder(f"squeezenet:{file}", side=48)
    assert (encoder.side, encoder.model.training) == (48, False)
    assert load_image_encoder(f"squeezenet:{file}").side == 227
    pixels = torch.randint(0, 256, (2, 3, 48, 48), dtype=torch.uint8)
    caffes = pixels.flip(1).float() - torch.tensor([104.0, 117.0, 123.0]).view(3, 1, 1)
    with torch.inference_mode():
        expected = model.features(caffes).mean(dim=(2, 3))
    assert expected.shape == (2, 512)
    torch.testing.assert_close(encoder.features_from_pixels(pixels), expected, rtol=1e-3, atol=1e-2)


def test_other_files_are_no_squeezenet(tmp_path: Path) -> None:
    from torchvision.models import squeezenet1_0

    text, other = tmp_path / "text.safetensors", tmp_path / "other.safetensors"
    text.write_text("no tensors")
    save_file(squeezenet1_0().state_dict(), other)
    for file in (tmp_path / "absent.safetensors", text, other):
        with pytest.raises(TrainingDataError, match=rf"{file.name} holds no SqueezeNet 1.1 in torchvision's layout"):
            load_image_encoder(f"squeezenet:{file}")


@pytest.mark.parametrize(
    ("source", "side", "message"),
    [
        ("resnet18", None, "give torchvision:NAME, timm:NAME, open_clip:ARCH/TAG, squeezenet:FILE or dir:PATH"),
        ("torchvision:resnet17", None, "no image classifier 'resnet17'"),
        ("torchvision:fcn_resnet50", None, "no image classifier"),
        ("timm:nothing_at_all", None, "timm has no model"),
        ("dir:somewhere", 64, "--side does not go with"),
    ],
)
def test_unknown_backbones_are_refused(source: str, side: int | None, message: str) -> None:
    with pytest.raises(TrainingDataError, match=message):
        load_image_encoder(source, side=side)


def test_model_without_linear_classifier_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision import models

    monkeypatch.setattr(models, "get_model", lambda name, weights: models.squeezenet1_1())
    with pytest.raises(TrainingDataError, match="no linear classifier"):
        load_image_encoder("torchvision:squeezenet1_1")


def test_plan_names_what_the_blocks_are_for(tmp_path: Path) -> None:
    out = tmp_path / "features.safetensors"
    with pytest.raises(KeyboardInterrupt):
        extract(pictures(11, "train"), pictures(5, "test"), RedMean(fail_after=0), CONFIG, out)
    plan = json.loads((tmp_path / "features.safetensors.partial" / "plan.json").read_text())
    assert plan["images"] == [pictures(11, "train").digest, pictures(5, "test").digest]
