"""Feature extractors: our own backbone folders, torchvision's models and timm's.

Letters: N images, R side in pixels, d feature size.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from text2weight.backbone import describe_preprocessing, load_backbone, normalise_pixels
from text2weight_training.files import TrainingDataError


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
    """A model of torchvision or timm without its classifier layer, with ImageNet-style preprocessing.

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
        source: "torchvision:NAME" (published weights), "timm:NAME" or "dir:PATH" (our own folder).
        device: torch device.
        side: R, where it should differ from the model's own; not for "dir:", whose heads rely on it.

    Raises:
        TrainingDataError: another form, an unknown model, or weights that cannot be had.
        CheckpointError: PATH is not a sound backbone folder.
    """
    kind, _, name = source.partition(":")
    if kind == "dir" and name:
        if side is not None:
            raise TrainingDataError(f"--side does not go with {source}: the folder's config.json fixes it")
        return load_backbone(Path(name), device)
    if kind == "torchvision" and name:
        return _torchvision(name, torch.device(device), side)
    if kind == "timm" and name:
        return _timm(name, torch.device(device), side)
    raise TrainingDataError(f"unknown backbone {source!r}: give torchvision:NAME, timm:NAME or dir:PATH")


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


def _frozen(model: nn.Module, device: torch.device) -> nn.Module:
    return model.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]
