"""Train a ResNet-18 image backbone from scratch.

Letters: N images, B batch, R side in pixels, C classes over all datasets.
The recipe is the usual short-budget one: SGD with Nesterov momentum under a one-cycle learning rate
(Smith & Topin, arXiv 1708.07120), random resized crops, and images that grow during training
(progressive resizing), because the early epochs gain little from detail.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from safetensors.torch import save
from torch import Tensor, nn

from text2weight.backbone import (
    ARCHITECTURE,
    BACKBONE_FORMAT,
    FEATURE_DIM,
    IMAGENET_MEAN,
    IMAGENET_STD,
    normalise_pixels,
    small_image_resnet18,
)
from text2weight_training.files import TrainingDataError, atomic_path
from text2weight_training.image_data import LabelledImages, batches, concatenate_labels


@dataclass(frozen=True)
class BackboneConfig:
    """How a backbone is trained; stored beside its weights.

    Attributes:
        sides: R of the training crops, one per epoch.
        input_side: R at which features are extracted.
        crop_scale: smallest share of the image's area that a training crop covers.
    """

    sides: tuple[int, ...] = (32, 32, 32, 32, 32, 32, 48, 48)
    input_side: int = 64
    batch_size: int = 128
    learning_rate: float = 0.1
    weight_decay: float = 5e-4
    label_smoothing: float = 0.1
    crop_scale: float = 0.4
    seed: int = 0


@dataclass
class Trainer:
    """What one run moves forward; the schedule's position and the weights are its whole state.

    Attributes:
        penalty: (C, C), row = an image's class: 0 for the classes of its own dataset, -inf for others.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.OneCycleLR
    penalty: Tensor
    config: BackboneConfig
    device: torch.device

    def step(self, pixels: Tensor, target: Tensor, side: int, generator: torch.Generator) -> float:
        """Take one optimiser step.

        Args:
            pixels: (B, 3, R0, R0) uint8.
            target: (B,) labels.
            side: R of the random crops.
            generator: source of randomness.

        Returns:
            The batch's loss.
        """
        raw = normalise_pixels(pixels.to(self.device))  # (B, 3, R0, R0)
        images = random_resized_crop(raw, side, self.config.crop_scale, generator)  # (B, 3, R, R)
        target = target.to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16):
            logits = self.model(images.contiguous(memory_format=torch.channels_last))  # (B, C)
        loss = smoothed_cross_entropy(logits.float() + self.penalty[target], target, self.config.label_smoothing)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        return loss.item()

    def save(self, path: Path, epoch: int) -> None:
        """Write everything that `load` needs, in one step."""
        state = {"epoch": epoch, "config": asdict(self.config), "model": self.model.state_dict()}
        state |= {"optimizer": self.optimizer.state_dict(), "schedule": self.schedule.state_dict()}
        with atomic_path(path) as temporary:
            torch.save(state, temporary)

    def load(self, path: Path) -> int:
        """Go on from an interrupted run, if there is one; returns the number of its finished epochs."""
        if not path.is_file():
            return 0
        state = torch.load(path, weights_only=True, map_location=self.device)
        classes = len(self.penalty)
        if state["config"] != asdict(self.config) or len(state["model"]["fc.weight"]) != classes:
            raise TrainingDataError(f"{path} belongs to a run with other settings: remove it or use its settings")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        return int(state["epoch"])


def train_backbone(
    pixels: Tensor, datasets: list[LabelledImages], config: BackboneConfig, out: Path, device: str = "cpu"
) -> Path:
    """Train on every dataset at once; each image is only asked to choose among its own dataset's classes.

    Progress is saved after every epoch under `out`, and a second call goes on from there with the
    same result as an undisturbed run.

    Args:
        pixels: (N, 3, R0, R0) uint8, the datasets' images one after another.
        datasets: where those images came from.
        config: the recipe.
        out: folder that receives `config.json` and `model.safetensors`.
        device: torch device.

    Returns:
        `out`.

    Raises:
        TrainingDataError: fewer images than one batch, an interrupted run with other settings, or a
            loss that is no longer finite (the last epoch's state is kept).
    """
    labels, ranges = concatenate_labels(datasets)  # (N,)
    steps = len(labels) // config.batch_size
    if steps == 0:
        raise TrainingDataError(f"{len(labels)} images are fewer than one batch of {config.batch_size}: give more")
    trainer = _new_trainer(ranges, steps, config, torch.device(device))
    state_file = out / "training-state.pt"
    first = trainer.load(state_file)
    with Progress(TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()) as progress:
        bar = progress.add_task("backbone", total=steps * len(config.sides), completed=steps * first)
        for epoch in range(first, len(config.sides)):
            started = time.monotonic()
            loss = _run_epoch(trainer, pixels, labels, epoch, progress, bar)
            progress.console.print(
                f"epoch {epoch + 1}/{len(config.sides)}: side {config.sides[epoch]}, loss {loss:.3f}, "
                f"{time.monotonic() - started:.0f} s"
            )
            trainer.save(state_file, epoch + 1)
    save_backbone(trainer.model, out, config, [dataset.name for dataset in datasets])
    state_file.unlink()
    return out


def _new_trainer(ranges: list[range], steps: int, config: BackboneConfig, device: torch.device) -> Trainer:
    classes = ranges[-1].stop
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = small_image_resnet18(classes)
    model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(
        model.parameters(), lr=config.learning_rate, momentum=0.9, nesterov=True, weight_decay=config.weight_decay
    )
    # OneCycleLR divides by zero on schedules of four steps.
    total = max(steps * len(config.sides) + 1, 8)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.learning_rate, total_steps=total, pct_start=0.25)
    penalty = torch.full((classes, classes), float("-inf"), device=device)  # (C, C)
    for span in ranges:
        penalty[span.start : span.stop, span.start : span.stop] = 0
    return Trainer(model, optimizer, schedule, penalty, config, device)


def _run_epoch(trainer: Trainer, pixels: Tensor, labels: Tensor, epoch: int, progress: Progress, bar: TaskID) -> float:
    """Train on every image once; returns the running mean of the loss."""
    config = trainer.config
    generator = torch.Generator().manual_seed(config.seed * 1000 + epoch)
    trainer.model.train()
    running = math.nan
    for index in batches(len(labels), config.batch_size, generator):
        loss = trainer.step(pixels[index], labels[index], config.sides[epoch], generator)
        running = loss if math.isnan(running) else 0.98 * running + 0.02 * loss
        if not math.isfinite(loss):
            raise TrainingDataError(f"the loss became {loss} in epoch {epoch + 1}: lower the learning rate")
        progress.update(bar, advance=1, description=f"epoch {epoch + 1} loss {running:.3f}")
    return running


def random_resized_crop(pixels: Tensor, side: int, smallest: float, generator: torch.Generator) -> Tensor:
    """Crop and flip every image of a batch at random, in one interpolation.

    Args:
        pixels: (B, 3, R0, R0) float.
        side: R of the result.
        smallest: least share of the area a crop covers; aspect ratios lie in 3/4 to 4/3.
        generator: source of randomness.

    Returns:
        (B, 3, R, R).
    """
    count = len(pixels)
    draw = torch.rand(5, count, generator=generator)  # (5, B)
    area = smallest + (1 - smallest) * draw[0]  # (B,)
    ratio = torch.exp((draw[1] * 2 - 1) * math.log(4 / 3) / 2)  # (B,)
    width = (area.sqrt() * ratio).clamp(max=1)  # (B,) in units of the whole image
    height = (area.sqrt() / ratio).clamp(max=1)  # (B,)
    flip = torch.where(draw[4] < 0.5, -1.0, 1.0)  # (B,)
    affine = torch.zeros(count, 2, 3)  # (B, 2, 3)
    affine[:, 0, 0] = width * flip
    affine[:, 1, 1] = height
    affine[:, 0, 2] = (draw[2] * 2 - 1) * (1 - width)
    affine[:, 1, 2] = (draw[3] * 2 - 1) * (1 - height)
    grid = F.affine_grid(affine.to(pixels.device), [count, 3, side, side], align_corners=False)  # (B, R, R, 2)
    return F.grid_sample(pixels, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def smoothed_cross_entropy(logits: Tensor, target: Tensor, smoothing: float) -> Tensor:
    """Label-smoothed cross-entropy over the classes whose logit is finite; logits (B, C), target (B,)."""
    log_probability = F.log_softmax(logits, dim=1)  # (B, C)
    allowed = logits != float("-inf")  # (B, C)
    uniform = log_probability.masked_fill(~allowed, 0).sum(1) / allowed.sum(1)  # (B,)
    chosen = log_probability.gather(1, target[:, None]).squeeze(1)  # (B,)
    return -((1 - smoothing) * chosen + smoothing * uniform).mean()


def save_backbone(model: nn.Module, out: Path, config: BackboneConfig, trained_on: list[str]) -> None:
    """Write `config.json` and `model.safetensors` (fp16, no classifier layer) into `out`."""
    tensors = {
        # Running variances of a badly scaled network exceed what fp16 can hold; they are small tensors anyway.
        name: (tensor.half() if tensor.is_floating_point() and "running_" not in name else tensor).cpu().contiguous()
        for name, tensor in model.state_dict().items()
        if not name.startswith("fc.")
    }
    data = save(tensors, metadata={"format": BACKBONE_FORMAT})
    description: dict[str, Any] = {
        "format": BACKBONE_FORMAT,
        "architecture": ARCHITECTURE,
        "feature_dim": FEATURE_DIM,
        "preprocess": {"side": config.input_side, "mean": IMAGENET_MEAN, "std": IMAGENET_STD},
        "trained_on": trained_on,
        "recipe": asdict(config),
        "model_sha256": hashlib.sha256(data).hexdigest(),
    }
    with atomic_path(out / "model.safetensors") as temporary:
        temporary.write_bytes(data)
    with atomic_path(out / "config.json") as temporary:
        temporary.write_text(json.dumps(description, indent=2) + "\n")
