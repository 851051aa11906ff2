"""Image backbone: pictures in, features for a generated head out.

A backbone folder holds `config.json` (architecture, preprocessing, `model_sha256`) and
`model.safetensors` (fp16 weights without a classifier layer).

Letters: N images, R side in pixels, D=512 features.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import Tensor, nn
from torchvision.models import resnet18

from text2weight.errors import CheckpointError

BACKBONE_FORMAT = "text2weight.backbone/1"
ARCHITECTURE = "resnet18-no-maxpool"
FEATURE_DIM = 512
ONLY_OURS = (
    "checkpoint and service hold only what `t2w backbone` wrote: run pictures through any other backbone, such as one "
    "of torchvision, timm or open_clip, outside the service"
)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def small_image_resnet18(num_classes: int) -> nn.Module:
    """Torchvision's ResNet-18 without its first max-pool, which small images cannot afford.

    Args:
        num_classes: outputs of the last layer; 0 leaves that layer out, so that the model returns
            its (N, 512) features.
    """
    model: nn.Module = resnet18(num_classes=max(num_classes, 1))
    model.maxpool = nn.Identity()
    if num_classes == 0:
        model.fc = nn.Identity()
    else:
        nn.init.zeros_(model.fc.bias)  # type: ignore[union-attr, arg-type]
    return model


def resize_and_crop(picture: Image.Image, side: int) -> Image.Image:
    """Resize the shorter side to `side` (bicubic, antialiased) and cut the centre square."""
    scale = side / min(picture.size)
    width, height = (max(side, round(length * scale)) for length in picture.size)
    picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - side) // 2, (height - side) // 2
    return picture.crop((left, top, left + side, top + side))


def pixels_of(pictures: Sequence[Image.Image], side: int) -> Tensor:
    """Resize and crop pictures of any size and mode into one (N, 3, R, R) uint8 RGB tensor."""
    pixels = np.empty((len(pictures), side, side, 3), dtype=np.uint8)  # (N, R, R, 3)
    for row, picture in enumerate(pictures):
        pixels[row] = np.asarray(resize_and_crop(picture.convert("RGB"), side))
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)  # (N, 3, R, R)


def normalise_pixels(
    pixels: Tensor, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD
) -> Tensor:
    """Turn (N, 3, R, R) uint8 RGB into float input: scaled to 0..1, minus `mean`, over `std`."""
    centre = torch.tensor(mean, device=pixels.device).view(3, 1, 1)
    scale = torch.tensor(std, device=pixels.device).view(3, 1, 1)
    return (pixels.float() / 255 - centre) / scale  # (N, 3, R, R)


def describe_preprocessing(side: int, mean: Sequence[float], std: Sequence[float]) -> str:
    """One line that tells how pictures become network input; equal lines mean equal preprocessing."""
    return (
        f"RGB, shorter side to {side} px (bicubic, antialiased), centre square, "
        f"0..1, mean {', '.join(f'{value:.4g}' for value in mean)}, std {', '.join(f'{value:.4g}' for value in std)}"
    )


@dataclass(frozen=True)
class Backbone:
    """A frozen feature extractor with its preprocessing.

    Attributes:
        model: maps normalised (N, 3, R, R) float images to (N, D) features; in eval mode.
        config: the folder's `config.json`, with `model_sha256`.
        device: where the model lies.
    """

    model: nn.Module
    config: dict[str, Any]
    device: torch.device

    @property
    def side(self) -> int:
        """R, the side in pixels that pictures are resized to."""
        return int(self.config["preprocess"]["side"])

    @property
    def description(self) -> str:
        """Architecture and the start of the weights' SHA-256; equal for equal backbones."""
        return f"{self.config['architecture']} {self.config['model_sha256'][:12]}"

    @property
    def preprocess(self) -> str:
        """How pictures are prepared, in words."""
        values = self.config["preprocess"]
        return describe_preprocessing(self.side, values["mean"], values["std"])

    def normalise(self, pixels: Tensor) -> Tensor:
        """(N, 3, R, R) uint8 -> what `model` takes, on its device."""
        values = self.config["preprocess"]
        images = normalise_pixels(pixels.to(self.device), values["mean"], values["std"])  # (N, 3, R, R)
        return images.contiguous(memory_format=torch.channels_last)

    def features(self, images: Sequence[Image.Image]) -> Tensor:
        """Extract features of pictures of any size.

        Args:
            images: N pictures.

        Returns:
            (N, D) fp32 on the CPU.
        """
        return self.features_from_pixels(pixels_of(images, self.side))

    def features_from_pixels(self, pixels: Tensor) -> Tensor:
        """Extract features of pictures that are already RGB squares of `side` pixels.

        Args:
            pixels: (N, 3, R, R) uint8.

        Returns:
            (N, D) fp32 on the CPU.
        """
        with torch.inference_mode():
            features: Tensor = self.model(self.normalise(pixels))  # (N, D)
        # A tensor made in inference mode cannot take part in training; its clone can.
        return features.float().cpu().clone()


def load_backbone(folder: str | Path, device: str | torch.device = "cpu") -> Backbone:
    """Load a backbone folder.

    Args:
        folder: holds `config.json` and `model.safetensors`.
        device: torch device.

    Raises:
        CheckpointError: a file is missing, damaged, of another format, or its weights do not fit.
    """
    folder = Path(folder)
    config = _read_config(folder / "config.json")
    weights_file = folder / "model.safetensors"
    try:
        data = weights_file.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{folder} is not a backbone folder: {error}") from error
    digest = hashlib.sha256(data).hexdigest()
    if config.setdefault("model_sha256", digest) != digest:
        raise CheckpointError(
            f"{weights_file} is damaged: its SHA-256 is {digest}, but config.json says "
            f"{config['model_sha256']}; copy the folder again"
        )
    model = small_image_resnet18(0)
    try:
        tensors = load_tensors(data)
        model.load_state_dict(tensors)  # copies fp16 into the model's fp32
    except (SafetensorError, RuntimeError) as error:
        raise CheckpointError(f"{weights_file} does not hold the weights of a {ARCHITECTURE}: {error}") from error
    placed = torch.device(device)
    model = model.eval().requires_grad_(False).to(placed, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Backbone(model, config, placed)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text())
    except OSError as error:
        raise CheckpointError(f"{path.parent} is not a backbone folder: {error}; {ONLY_OURS}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict) or config.get("format") != BACKBONE_FORMAT:
        found = config.get("format") if isinstance(config, dict) else config
        raise CheckpointError(f"{path} has format {found!r}, expected {BACKBONE_FORMAT!r}")
    if config.get("architecture") != ARCHITECTURE:
        found = config.get("architecture")
        raise CheckpointError(f"{path}: architecture is {found!r}, expected {ARCHITECTURE!r}; {ONLY_OURS}")
    _check_preprocess(path, config.get("preprocess"))
    return config


def _check_preprocess(path: Path, values: object) -> None:
    if not isinstance(values, dict) or not isinstance(values.get("side"), int) or not 8 <= values["side"] <= 1024:
        raise CheckpointError(f"{path}: preprocess.side must be a whole number from 8 to 1024, got {values!r}")
    for name in ("mean", "std"):
        triple = values.get(name)
        if not isinstance(triple, list) or len(triple) != 3 or not all(isinstance(v, int | float) for v in triple):
            raise CheckpointError(f"{path}: preprocess.{name} must be three numbers, got {triple!r}")
