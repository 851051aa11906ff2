"""Extract features of a dataset with a frozen backbone: each view of each image once, in eval mode, no gradients.

Finished blocks are kept beside the output until it is written, so that a killed run goes on.

Letters: N images, B images per block, d feature size.
"""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from text2weight_training.feature_file import FeatureFile, write_feature_file
from text2weight_training.files import TrainingDataError, atomic_path
from text2weight_training.image_data import DECODE_BLOCK, LabelledImages, decode_blocks
from text2weight_training.image_encoders import ImageEncoder

Precision = Literal["bf16", "fp32"]


@dataclass(frozen=True)
class ExtractConfig:
    """How features are computed.

    Attributes:
        batch_size: images per call of the network.
        precision: "bf16" runs the network under autocast, about 1e-2 from "fp32" relative to a
            feature's size and on recent processors several times as fast; both are stored as fp16.
        block: images per resumable block.
    """

    batch_size: int = 128
    precision: Precision = "bf16"
    block: int = DECODE_BLOCK


def extract(
    train: LabelledImages,
    test: LabelledImages,
    encoder: ImageEncoder,
    config: ExtractConfig,
    out: Path,
    device: str = "cpu",
) -> FeatureFile:
    """Extract both splits and write the feature file `out`.

    Args:
        train: training images, all or half of the dataset's.
        test: test images with the same classes.
        encoder: the backbone.
        config: batch size and precision.
        out: the feature file; `out` + ".partial" holds finished blocks meanwhile.
        device: where the encoder lies, for autocast.

    Returns:
        The file's content.

    Raises:
        TrainingDataError: a broken image, features that are not finite, or finished blocks of other settings.
    """
    partial = out.with_name(out.name + ".partial")
    _check_plan(partial, train, test, encoder, config)
    splits = {"train": train, "test": test}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    features = {}
    with Progress(*columns) as progress:
        for name, images in splits.items():
            features[name] = _extract_split(images, encoder, config, partial / name, device, progress)  # (N, d)
    content = FeatureFile(
        features["train"],
        torch.tensor(train.labels),
        features["test"],
        torch.tensor(test.labels),
        train.classes,
        encoder.description,
        encoder.preprocess,
    )
    write_feature_file(out, content)
    shutil.rmtree(partial)
    return content


def _check_plan(
    partial: Path, train: LabelledImages, test: LabelledImages, encoder: ImageEncoder, config: ExtractConfig
) -> None:
    plan = {
        "images": [train.digest, test.digest],
        "backbone": encoder.description,
        "preprocess": encoder.preprocess,
        "precision": config.precision,
        "block": config.block,
    }
    plan_file = partial / "plan.json"
    if plan_file.is_file():
        if json.loads(plan_file.read_text()) != plan:
            raise TrainingDataError(
                f"{partial} holds blocks of a run with other images or settings: remove that folder"
            )
        return
    with atomic_path(plan_file) as temporary:
        temporary.write_text(json.dumps(plan))


def _extract_split(
    images: LabelledImages, encoder: ImageEncoder, config: ExtractConfig, folder: Path, device: str, progress: Progress
) -> Tensor:
    count = len(images.keys)
    bar = progress.add_task(f"{images.name} {folder.name}", total=count)
    starts = range(0, count, config.block)
    files = [folder / f"{number:05d}.safetensors" for number in range(len(starts))]
    finished = _finished_blocks(files)
    progress.update(bar, completed=min(finished * config.block, count))
    remaining = images.subset(range(finished * config.block, count))
    for file, pixels in zip(files[finished:], decode_blocks(remaining, encoder.side, config.block), strict=True):
        features = _encode(pixels, encoder, config, device)  # (B, d)
        with atomic_path(file) as temporary:
            save_file({"features": features}, temporary)
        progress.update(bar, advance=len(features))
    return torch.cat([load_file(file)["features"] for file in files])  # (N, d)


def _finished_blocks(files: list[Path]) -> int:
    """How many blocks, from the first on, are there and readable."""
    for number, file in enumerate(files):
        try:
            load_file(file)
        except (OSError, SafetensorError):
            return number
    return len(files)


def _encode(pixels: Tensor, encoder: ImageEncoder, config: ExtractConfig, device: str) -> Tensor:
    autocast = torch.autocast(torch.device(device).type, torch.bfloat16)
    with autocast if config.precision == "bf16" else nullcontext():
        features = torch.cat(
            [encoder.features_from_pixels(batch) for batch in pixels.split(config.batch_size)]
        )  # (B, d)
    if features.ndim != 2:
        raise TrainingDataError(f"{encoder.description} returns {tuple(features.shape)}, not one vector per image")
    if not torch.isfinite(features.half()).all():
        raise TrainingDataError(
            f"{encoder.description} returns features that are NaN or beyond fp16: use --precision fp32"
        )
    return features.half()
