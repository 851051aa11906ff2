"""A data set from its download to `evaluation.json`: the stages of this package in order, resumable.

Nothing here computes; every stage is the one that its own command runs, and leaves the same files. What is there
already is not made again. Time, disk and memory of a plan are rough: rates of two CPU cores, sizes of what is written.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from text2weight.checkpoint import read_config
from text2weight.condition import plain_name
from text2weight.denoiser import Denoiser
from text2weight.errors import CheckpointError
from text2weight.text_encoder import load_text_encoder, read_embedding_table
from text2weight_training.datasets import CALTECH, TINY_IMAGENET, Splits, download_tiny_imagenet, open_dataset
from text2weight_training.embed import embed, save_table
from text2weight_training.feature_file import read_feature_file
from text2weight_training.features import ExtractConfig, extract
from text2weight_training.files import TrainingDataError, claim
from text2weight_training.image_data import DECODE_BLOCK
from text2weight_training.image_encoders import load_image_encoder
from text2weight_training.presets import Preset
from text2weight_training.tasks import load_task_data
from text2weight_training.train import train

# Rates of two CPU cores: optimiser steps of zoo heads in stacks of 64; evaluation with the oracle's two starts. Seconds
# are scaled from these and the backbone's. A download is taken to bring 10 MB a second.
HEAD_STEPS_PER_SECOND = 1790.0
EVALUATION_SECONDS_PER_TASK = 1.2
DOWNLOAD_BYTES_PER_SECOND = 10e6
# The published weights, downloaded into the library's own cache.
TEXT_MODEL_BYTES = 605e6
# Python with torch and its libraries.
PROCESS_BYTES = 1e9
# A saved fit: network, its average, and two moments of the optimiser, fp32.
STATE_BYTES_PER_PARAMETER = 16


@dataclass(frozen=True)
class PublishedBackbone:
    """A feature extractor, and how much it asks for.

    Attributes:
        source: as `load_image_encoder` takes it.
        weight_bytes: of its published weights, downloaded into the library's own cache.
        images_per_second: what two CPU cores extract in bf16.
        side: picture side in pixels that it works on.
    """

    source: str
    weight_bytes: float
    images_per_second: float
    side: int = 224


RESNET18 = PublishedBackbone("torchvision:resnet18", 47e6, 70.0)
CLIP = PublishedBackbone("open_clip:ViT-B-32/openai", TEXT_MODEL_BYTES, 10.0)
BACKBONES = {each.source: each for each in (RESNET18, CLIP)}


@dataclass(frozen=True)
class Reproduction:
    """What is reproduced, and how large it is.

    Attributes:
        dataset: as `open_dataset` knows it.
        images: pictures of both splits.
        download_bytes: what comes over the network.
        disk_bytes: pictures on disk, with the archive that they are unpacked from.
        folder: where they lie, below the data folder.
        backbone: what turns them into features.
        text_model: as `load_text_encoder` takes it.
        template: prompt for the class names.
    """

    dataset: str
    images: int
    download_bytes: float
    disk_bytes: float
    folder: str
    backbone: PublishedBackbone = RESNET18
    text_model: str = "open_clip:ViT-B-32/openai"
    template: str = "a {}"


REPRODUCTIONS = {
    "cifar100": Reproduction("cifar100", 60_000, 169e6, 355e6, "cifar-100-python"),
    "tiny-imagenet": Reproduction("tiny-imagenet", 110_000, 248e6, 490e6, TINY_IMAGENET),
    "caltech256": Reproduction("caltech256", 29_780, 1.19e9, 2.4e9, f"caltech256/{CALTECH}"),
}


@dataclass(frozen=True)
class Stage:
    """One line of a plan.

    Attributes:
        name: what happens.
        makes: file or folder below the run directory.
        done: whether it is there.
        seconds: how long it takes.
        disk_bytes: what it writes.
        memory_bytes: what it needs.
    """

    name: str
    makes: str
    done: bool
    seconds: float
    disk_bytes: float
    memory_bytes: float


def make_plan(what: Reproduction, preset: Preset, out: Path, minutes: float) -> list[Stage]:
    """List the stages, which of them are done, and what the others will take."""
    checkpoint, zoo = out / "checkpoint", preset.zoo
    heads, size = zoo.tasks - zoo.unseen_tasks, preset.head.num_parameters
    feature_bytes = 2.0 * what.images * preset.head.input_dim
    zoo_bytes = 4.0 * heads * size
    # Its raw heads, the standardised ones, and a copy on the way from one to the other.
    training_memory = PROCESS_BYTES + 3 * zoo_bytes + 4 * feature_bytes
    parameters = _count_parameters(preset)
    shared = zoo.universal.steps * zoo.universal.batch_size + zoo.base.steps * zoo.base.batch_size
    head_steps = heads * zoo.heads.steps + shared / zoo.heads.batch_size
    features_done = (out / "features.safetensors").exists()
    backbone, pixel_bytes = what.backbone, 3.0 * what.backbone.side**2 * DECODE_BLOCK
    # CLIP's one file holds both towers, and is downloaded with the first.
    text_download = 0.0 if what.text_model == backbone.source else TEXT_MODEL_BYTES
    return [
        Stage(
            f"download {what.dataset}",
            f"data/{what.folder}",
            features_done or (out / "data" / what.folder).is_dir(),
            (what.download_bytes + backbone.weight_bytes) / DOWNLOAD_BYTES_PER_SECOND,
            what.disk_bytes + backbone.weight_bytes,
            PROCESS_BYTES,
        ),
        Stage(
            f"features by {backbone.source}",
            "features.safetensors",
            features_done,
            what.images / backbone.images_per_second,
            2 * feature_bytes,  # finished blocks lie beside the file until it is written
            2 * PROCESS_BYTES + 2 * pixel_bytes + 2 * backbone.weight_bytes,
        ),
        Stage(
            f"class embeddings by {what.text_model}",
            "text.safetensors",
            _has_table(what, out),
            60 + text_download / DOWNLOAD_BYTES_PER_SECOND,
            text_download,
            PROCESS_BYTES + 2 * TEXT_MODEL_BYTES,
        ),
        Stage(
            f"zoo of {heads:,} heads",
            "zoo",
            len(list((out / "zoo").glob("heads-*.safetensors"))) == -(-heads // zoo.stack),
            head_steps / HEAD_STEPS_PER_SECOND,
            zoo_bytes,
            training_memory,
        ),
        Stage(
            f"fit of {parameters / 1e6:.1f} million parameters",
            "checkpoint",
            (checkpoint / "config.json").exists(),
            60 * minutes,
            (STATE_BYTES_PER_PARAMETER + 2) * parameters,
            training_memory + 2 * STATE_BYTES_PER_PARAMETER * parameters,
        ),
        Stage(
            f"evaluation on {preset.evaluation.tasks} unseen tasks",
            "evaluation.json",
            (out / "evaluation.json").exists() and _is_evaluated(checkpoint),
            preset.evaluation.tasks * EVALUATION_SECONDS_PER_TASK,
            1e6,
            training_memory,
        ),
    ]


def _count_parameters(preset: Preset) -> int:
    """Of the denoiser that the fit will build."""
    anchor, center = torch.zeros(preset.head.num_parameters), torch.zeros(preset.denoiser.embedding_dim)
    return sum(each.numel() for each in Denoiser(preset.head, preset.denoiser, anchor, center).parameters())


def _has_table(what: Reproduction, out: Path) -> bool:
    path = out / "text.safetensors"
    if not path.exists():
        return False
    try:
        return read_embedding_table(f"{path}#{what.dataset}").template == what.template
    except CheckpointError:
        return False


def _is_evaluated(checkpoint: Path) -> bool:
    return (checkpoint / "config.json").exists() and bool(read_config(checkpoint).evaluation)


def print_plan(stages: list[Stage], out: Path) -> None:
    """Show a plan on standard output."""
    table = Table(title=f"plan for {out}, by the rates of two CPU cores")
    for heading in ("stage", "makes", "minutes", "disk, GB", "memory, GB"):
        table.add_column(heading, justify="left" if heading in ("stage", "makes") else "right", overflow="fold")
    for stage in stages:
        minutes = "done" if stage.done else f"{stage.seconds / 60:.0f}"
        table.add_row(stage.name, stage.makes, minutes, _gigabytes(stage.disk_bytes), _gigabytes(stage.memory_bytes))
    left = [stage for stage in stages if not stage.done]
    table.add_section()
    memory = max((stage.memory_bytes for stage in left), default=0.0)
    minutes = f"{sum(stage.seconds for stage in left) / 60:.0f}"
    table.add_row("what is left", "", minutes, _gigabytes(sum(s.disk_bytes for s in left)), _gigabytes(memory))
    Console().print(table)


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:.1f}"


def reproduce(what: Reproduction, preset: Preset, out: Path, minutes: float, device: str = "cpu") -> dict[str, Any]:
    """Run every stage that is not done.

    Args:
        what: data set, backbone and text model.
        preset: zoo, fit and evaluation.
        out: run directory; an interrupted run in it is continued.
        minutes: time limit of the fit.
        device: torch device.

    Returns:
        the evaluation.

    Raises:
        TrainingDataError: `out` holds another run, the disk is too small, a download fails, or a stage cannot go on.
    """
    left = sum(stage.disk_bytes for stage in make_plan(what, preset, out, minutes) if not stage.done)
    out.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out).free
    if left > free:
        raise TrainingDataError(
            f"{out} has {_gigabytes(free)} GB of free disk, what is left of the plan needs {_gigabytes(left)} GB: "
            "make room, or choose another --out"
        )
    origin = {name: getattr(what, name) for name in ("dataset", "text_model", "template")}
    origin["backbone"] = what.backbone.source
    claim(out / "reproduction.json", origin, "reproduction")
    features, text = out / "features.safetensors", out / "text.safetensors"
    if not features.exists():
        images = _open_pictures(what, out / "data")
        extract(*images, load_image_encoder(what.backbone.source, device), ExtractConfig(), features, device)
    if not _has_table(what, out):
        names = [plain_name(name) for name in read_feature_file(features).classes]
        save_table(text, what.dataset, embed(names, what.template, load_text_encoder(what.text_model, device)))
    data = load_task_data([features], f"{text}#{what.dataset}")
    return train(data, preset, out, minutes, device)


def _open_pictures(what: Reproduction, folder: Path) -> Splits:
    folder.mkdir(parents=True, exist_ok=True)
    return open_dataset(what.dataset, download_tiny_imagenet(folder) if what.dataset == "tiny-imagenet" else folder)
