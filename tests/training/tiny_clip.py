"""A tiny open_clip model with random weights that is had by name, as published ones are, but from the cache."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor, nn

SIDE, DIM = 32, 8
SOURCE = "open_clip:tiny-clip/random"
CONFIG: dict[str, Any] = {
    "embed_dim": DIM,
    "vision_cfg": {"image_size": SIDE, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
# Channels that differ, so that a model with its own values is told from one with the usual ones.
PREPARED = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4), "interpolation": "bicubic", "resize_mode": "shortest"}


@contextmanager
def published_tiny_clip(folder: Path) -> Iterator[open_clip.CLIP]:
    """Register `SOURCE`, and "open_clip:tiny-clip/squashed" beside it; gives the model itself."""
    torch.manual_seed(3)
    # Like OpenAI's weights, these want another activation than the architecture of the name has.
    model = open_clip.CLIP(**CONFIG, quick_gelu=True).eval()
    cache = folder / ".cache" / "clip"
    cache.mkdir(parents=True)
    torch.save(model.state_dict(), cache / "tiny-clip.pt")
    published = {"url": "https://example.org/tiny-clip.pt", "hf_hub": "", "quick_gelu": True, **PREPARED}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(folder))
        patch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny-clip", CONFIG)
        tags = {"random": published, "squashed": {**published, "resize_mode": "squash"}}
        patch.setitem(open_clip.pretrained._PRETRAINED, "tiny-clip", tags)
        yield model


def image_features(model: nn.Module, pictures: list[Any]) -> Tensor:
    """What open_clip itself makes of pictures, (N, D): its own preprocessing, its own call."""
    prepare = open_clip.image_transform(SIDE, is_train=False, **PREPARED)
    with torch.inference_mode():
        features: Tensor = model.encode_image(torch.stack([prepare(picture) for picture in pictures]))  # type: ignore[operator]
    return features


def text_embeddings(model: nn.Module, texts: list[str]) -> Tensor:
    """What open_clip itself makes of texts, (n, D) of length 1."""
    with torch.inference_mode():
        tokens = open_clip.get_tokenizer("tiny-clip")(texts)
        embeddings: Tensor = model.encode_text(tokens, normalize=True)  # type: ignore[operator]
    return embeddings
