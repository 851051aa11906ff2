"""A tiny checkpoint that holds an image backbone with random weights, and pictures for it."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.tiny import TINY_DIM, save_tiny_checkpoint
from text2weight.backbone import ARCHITECTURE, BACKBONE_FORMAT, FEATURE_DIM, small_image_resnet18
from text2weight.head import HeadSpec

NAME = "tiny backbone"


def write_checkpoint_with_backbone(folder: Path) -> Path:
    """Write both; returns the checkpoint's folder."""
    backbone = folder / "backbone"
    backbone.mkdir(parents=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        state = small_image_resnet18(0).state_dict()
    save_file(state, backbone / "model.safetensors")
    preprocess = {"side": 16, "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
    config = {"format": BACKBONE_FORMAT, "architecture": ARCHITECTURE, "feature_dim": FEATURE_DIM}
    (backbone / "config.json").write_text(json.dumps({**config, "preprocess": preprocess}))
    save_tiny_checkpoint(
        folder / "checkpoint",
        head=HeadSpec(input_dim=FEATURE_DIM, hidden_dim=3, output_dim=TINY_DIM),
        parts={"backbone": backbone},
        backbone={"name": NAME},
    )
    return folder / "checkpoint"


def picture(seed: int = 0, size: tuple[int, int] = (40, 30), mode: str = "RGB") -> Image.Image:
    """Smooth random colours."""
    small = np.random.default_rng(seed).integers(0, 256, size=(3, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).convert(mode)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """The picture as a file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()
