"""Feature extractors: our own backbone folders, torchvision's models, timm's, open_clip's image towers, and a file.

Letters: N images, R side in pixels, d feature size.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from text2weight.backbone import describe_preprocessing, load_backbone, normalise_pixels
from text2weight.checkpoint import file_sha256
from text2weight.text_encoder import create_open_clip
from text2weight_training.files import TrainingDataError

# How the name of an open_clip model begins; of a text tower and its image tower it is the same.
OPEN_CLIP = "open_clip:"
# Of the published SqueezeNet 1.1: it takes blue, green, red from 0 to 255, less these means, and pictures of this side.
CAFFE_BGR_MEANS = (104.0, 117.0, 123.0)
CAFFE_SIDE = 227
# What `text2weight.backbone.resize_and_crop` does, in open_clip's words.
RESIZING = {"interpolation": "bicubic", "resize_mode": "shortest"}


class ImageEncoder(Protocol):
    """A frozen network in eval mode with its preprocessing."""

    @property
    def model(self) -> nn.Module:
        """The network: normalised pictures (N, 3, R, R) to features (N, d)."""
        ...

    @property
    def side(self) -> int:
        """R of the pictures it takes."""
        ...

    @property
    def description(self) -> str:
        """Which network with which weights."""
        ...

    @property
    def preprocess(self) -> str:
        """How pictures are prepared, in words."""
        ...

    def normalise(self, pixels: Tensor) -> Tensor:
        """(N, 3, R, R) uint8 -> what `model` takes, on its device."""
        ...

    def features_from_pixels(self, pixels: Tensor) -> Tensor:
        """(N, 3, R, R) uint8 -> (N, d) fp32 on the CPU."""
        ...


@dataclass(frozen=True)
class PublishedEncoder:
    """A published model without a classifier layer, with ImageNet-style preprocessing.

    Pictures are resized and cropped as `text2weight.backbone.resize_and_crop` does it.
    """

    model: nn.Module
    description: str
    side: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    device: torch.device

    @property
    def preprocess(self) -> str:
        """How pictures are prepared, in words."""
        return describe_preprocessing(self.side, self.mean, self.std)

    def normalise(self, pixels: Tensor) -> Tensor:
        """(N, 3, R, R) uint8 -> what `model` takes, on its device."""
        images = normalise_pixels(pixels.to(self.device), self.mean, self.std)  # (N, 3, R, R)
        return images.contiguous(memory_format=torch.channels_last)

    def features_from_pixels(self, pixels: Tensor) -> Tensor:
        """(N, 3, R, R) uint8 -> (N, d) fp32 on the CPU."""
        with torch.inference_mode():
            features: Tensor = self.model(self.normalise(pixels))  # (N, d)
        return features.float().cpu().clone()


def load_image_encoder(source: str, device: str = "cpu", side: int | None = None) -> ImageEncoder:
    """Load an extractor.

    Args:
        source: "torchvision:NAME" (published weights), "timm:NAME", "open_clip:ARCH/TAG" (CLIP's image tower),
            "squeezenet:FILE" (Caffe's SqueezeNet 1.1 in torchvision's layout) or "dir:PATH" (our own folder).
        device: torch device.
        side: R, where it should differ from the model's own; not for "dir:" and "open_clip:", which fix it.

    Raises:
        TrainingDataError: another form, an unknown model, weights that cannot be had, or pictures prepared otherwise.
        CheckpointError: PATH is not a sound backbone folder.
    """
    kind, _, name = source.partition(":")
    if kind in ("dir", "open_clip") and side is not None:
        raise TrainingDataError(f"--side does not go with {source}: its own config fixes it")
    if kind == "dir" and name:
        return load_backbone(Path(name), device)
    if kind == "torchvision" and name:
        return _torchvision(name, torch.device(device), side)
    if kind == "timm" and name:
        return _timm(name, torch.device(device), side)
    if kind == "open_clip" and "/" in name:
        return _open_clip(name, torch.device(device))
    if kind == "squeezenet" and name:
        return _caffe_squeezenet(Path(name), torch.device(device), side)
    allowed = "torchvision:NAME, timm:NAME, open_clip:ARCH/TAG, squeezenet:FILE or dir:PATH"
    raise TrainingDataError(f"unknown backbone {source!r}: give {allowed}")


def _torchvision(name: str, device: torch.device, side: int | None) -> PublishedEncoder:
    from torchvision import models

    if name not in models.list_models(module=models):
        raise TrainingDataError(f"torchvision has no image classifier {name!r}: try resnet18, resnet50 or vit_b_16")
    weights = models.get_model_weights(name).DEFAULT
    try:
        model = models.get_model(name, weights=weights)
    except (OSError, RuntimeError) as error:
        raise TrainingDataError(f"the weights of torchvision:{name} cannot be loaded: {error}") from error
    _remove_classifier(model, name)
    values = weights.transforms()
    return PublishedEncoder(
        _frozen(model, device),
        f"torchvision {name} {weights.name}",
        side or int(values.crop_size[0]),
        tuple(values.mean),
        tuple(values.std),
        device,
    )


def _remove_classifier(model: nn.Module, name: str) -> None:
    """Replace the last linear layer, torchvision's classifier, by the identity."""
    linear = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not linear or linear[-1].split(".")[0] not in ("fc", "classifier", "head", "heads"):
        raise TrainingDataError(f"torchvision's {name} ends in no linear classifier to remove: choose another model")
    parent, _, leaf = linear[-1].rpartition(".")
    setattr(model.get_submodule(parent), leaf, nn.Identity())


def _timm(name: str, device: torch.device, side: int | None) -> PublishedEncoder:
    import timm
    from timm.data import resolve_model_data_config  # type: ignore[attr-defined]

    if not timm.is_model(name):
        raise TrainingDataError(f"timm has no model {name!r}: see timm.list_models(pretrained=True)")
    try:
        model: Any = timm.create_model(name, pretrained=True, num_classes=0)
    except (OSError, RuntimeError) as error:
        raise TrainingDataError(f"the weights of timm:{name} cannot be loaded: {error}") from error
    values = resolve_model_data_config(model)  # type: ignore[no-untyped-call]
    tag = model.pretrained_cfg.get("tag") or "default"
    return PublishedEncoder(
        _frozen(model, device),
        f"timm {name} {tag}",
        side or int(values["input_size"][-1]),
        tuple(values["mean"]),
        tuple(values["std"]),
        device,
    )


class ImageTower(nn.Module):
    """The image half of an open_clip model: normalised pictures (N, 3, R, R) to (N, D), in the space of its texts."""

    def __init__(self, clip: nn.Module) -> None:
        """Keep the model; its text tower is not used."""
        super().__init__()
        self.clip = clip

    def forward(self, images: Tensor) -> Tensor:
        """Project features; their lengths are the network's own."""
        features: Tensor = self.clip.encode_image(images, normalize=False)  # type: ignore[operator]
        return features


def _open_clip(name: str, device: torch.device) -> PublishedEncoder:
    from open_clip import get_model_preprocess_cfg

    architecture, _, tag = name.rpartition("/")
    try:
        model = create_open_clip(architecture, tag)
    except Exception as error:  # open_clip raises many kinds, from its own to the hub's
        raise TrainingDataError(f"{OPEN_CLIP}{name} cannot be loaded: {error}") from error
    values = get_model_preprocess_cfg(model)
    size = values["size"]
    height, width = (size, size) if isinstance(size, int) else size
    resizing = {key: values[key] for key in RESIZING}
    if height != width or resizing != RESIZING:
        raise TrainingDataError(
            f"{OPEN_CLIP}{name} wants pictures of {width} x {height} px by {resizing}: "
            f"only squares by {RESIZING} are made here, choose another model"
        )
    encoder = _frozen(ImageTower(model), device)
    return PublishedEncoder(
        encoder, f"{OPEN_CLIP}{name}", int(width), tuple(values["mean"]), tuple(values["std"]), device
    )


def _caffe_squeezenet(file: Path, device: torch.device, side: int | None) -> PublishedEncoder:
    from torchvision import models

    model = models.squeezenet1_1()
    try:
        weights = {name: tensor.float() for name, tensor in load_file(file).items()}
        model.load_state_dict(weights)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise TrainingDataError(f"{file} holds no SqueezeNet 1.1 in torchvision's layout: {error}") from error
    # Pictures come as red, green, blue in 0..1: their order goes into the first layer, their scale into the deviations.
    first = model.features[0]
    first.weight.data = first.weight.data.flip(1)  # (64, 3, 3, 3)
    pooled = nn.Sequential(model.features, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    mean = tuple(value / 255 for value in reversed(CAFFE_BGR_MEANS))
    description = f"squeezenet1_1 {file_sha256(file)[:12]}"
    return PublishedEncoder(_frozen(pooled, device), description, side or CAFFE_SIDE, mean, (1 / 255,) * 3, device)


def _frozen(model: nn.Module, device: torch.device) -> nn.Module:
    return model.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]
