"""The zoo: thousands of heads trained on tasks, what the denoiser learns from.

A zoo directory is written shard by shard, each whole or absent, so an interrupted run goes on where it
stopped and ends with the same files. Letters: n heads in a shard, P numbers in one head, C classes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import Progress
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from text2weight_training.files import TrainingDataError, atomic_path
from text2weight_training.presets import Preset
from text2weight_training.splits import draw_split
from text2weight_training.stacked import heads_accuracy, initial_head, train_stack
from text2weight_training.tasks import PADDING, HeldOut, TaskData, TaskSplit, pad_tasks

FORMAT = "text2weight.zoo/1"
# Lists of evaluation tasks that a split has only where something is held out; see splits.py.
HARDER_SPLITS = ("held_out_pairs", "held_out_classes", "mixed_classes")


@dataclass(frozen=True)
class Zoo:
    """A finished zoo.

    Attributes:
        split: its tasks; heads exist for the seen ones.
        base: (P,) head after a short training on all training classes.
        universal: (P,) head after a long one; the task heads' start.
        weights: (n, P) heads of the seen tasks, in the split's order.
        accuracy: (n,) their accuracy on the test features of their classes, 0..1.
        manifest: what `manifest.json` says.
    """

    split: TaskSplit
    base: Tensor
    universal: Tensor
    weights: Tensor
    accuracy: Tensor
    manifest: dict[str, Any]


def build_zoo(data: TaskData, preset: Preset, out: Path, device: str = "cpu") -> Zoo:
    """Build a zoo, or finish one that was interrupted.

    Args:
        data: features and embeddings.
        preset: its `head`, `logit_scale`, `seed` and `zoo` parts count.
        out: the zoo directory.
        device: torch device.

    Raises:
        TrainingDataError: features or embeddings are not of the head's size, the tasks cannot be drawn, `out`
            holds a zoo of other data or settings, or a training diverges.
        OSError: a file cannot be written, as on a full disk; the whole ones stay.
    """
    _check_sizes(data, preset)
    manifest = _manifest(data, preset)
    _claim(out, manifest)
    split = _split(manifest)
    here = data.to(device)
    shared = _shared_heads(here, split, preset, out)
    size = preset.zoo.stack
    starts = range(0, len(split.seen), size)
    with Progress() as progress:
        bar = progress.add_task("zoo heads", total=len(split.seen))
        for shard, start in enumerate(starts):
            path = out / f"heads-{shard:05d}.safetensors"
            tasks = list(split.seen[start : start + size])
            if not _is_whole(path, _padded_classes(tasks, preset), preset.head.num_parameters):
                _train_shard(here, preset, shared["universal"], tasks, path, preset.seed + 1 + shard)
            progress.update(bar, advance=len(tasks))
    return load_zoo(out)


def _check_sizes(data: TaskData, preset: Preset) -> None:
    for name, expected, there, source in (
        ("input_dim", preset.head.input_dim, data.feature_dim, "features"),
        ("output_dim", preset.head.output_dim, data.embeddings.shape[1], "class embeddings"),
    ):
        if there != expected:
            raise TrainingDataError(
                f"the {source} have {there} numbers each, but the preset's head.{name} is {expected}: "
                f"set it to {there}, or use other {source}"
            )


def _manifest(data: TaskData, preset: Preset) -> dict[str, Any]:
    zoo = preset.zoo
    split = draw_split(len(data.classes), zoo, preset.seed)
    manifest = {
        "format": FORMAT,
        "head": preset.head.model_dump(mode="json"),
        "logit_scale": preset.logit_scale,
        "settings": zoo.model_dump(mode="json"),
        "seed": preset.seed,
        "classes": list(data.classes),
        "template": data.template,
        "backbone": data.backbone,
        "data_sha256": data.fingerprint,
        "seen": [list(task) for task in split.seen],
        "unseen": [list(task) for task in split.unseen],
    }
    if split.held_out != HeldOut():
        manifest["held_out"] = {
            "classes": list(split.held_out.classes),
            "pairs": [list(pair) for pair in split.held_out.pairs],
        }
        manifest |= {name: [list(task) for task in getattr(split, name)] for name in HARDER_SPLITS}
    return manifest


def _claim(out: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest into a new zoo directory, or check that an old one is of the same making."""
    path = out / "manifest.json"
    if not path.exists():
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(manifest) + "\n")
        return
    there = _read_manifest(out)
    differing = [key for key in manifest if there.get(key) != json.loads(json.dumps(manifest[key]))]
    if differing:
        raise TrainingDataError(
            f"{out} holds a zoo with another {', '.join(differing)}: choose another --out or remove the folder"
        )


def _shared_heads(data: TaskData, split: TaskSplit, preset: Preset, out: Path) -> dict[str, Tensor]:
    path = out / "shared.safetensors"
    if not _holds(path, {"base": (preset.head.num_parameters,), "universal": (preset.head.num_parameters,)}):
        everything = [split.held_out.training_classes(len(data.classes))]
        start = initial_head(preset.head, preset.seed)
        recipes = {"base": preset.zoo.base, "universal": preset.zoo.universal}
        heads = {}
        with Progress() as progress:
            for name, recipe in recipes.items():
                bar = progress.add_task(f"{name} head", total=recipe.steps)
                heads[name] = train_stack(
                    preset.head,
                    start,
                    everything,
                    data.train,
                    data.embeddings,
                    preset.logit_scale,
                    recipe,
                    preset.seed,
                    partial(progress.advance, bar),
                )[0].cpu()
        _save_tensors(heads, path)
    return load_file(path)


def _holds(path: Path, shapes: dict[str, tuple[int, ...]]) -> bool:
    """Whether a file is there, whole, and has tensors of these shapes."""
    if not path.exists():
        return False
    try:
        with safe_open(path, "pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()} == shapes  # noqa: SIM118
    except SafetensorError:
        return False


def _is_whole(path: Path, classes: Tensor, num_parameters: int) -> bool:
    """Whether a shard is there, whole, and holds the heads of these tasks (n, widest)."""
    count = len(classes)
    shapes = {"weights": (count, num_parameters), "classes": tuple(classes.shape), "accuracy": (count,)}
    return _holds(path, shapes) and torch.equal(load_file(path)["classes"], classes)


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        with atomic_path(path) as temporary:
            save_file(tensors, temporary)
    except SafetensorError as error:  # what safetensors makes of the operating system's errors
        raise OSError(f"{path} cannot be written: {error}") from error


def _padded_classes(tasks: list[tuple[int, ...]], preset: Preset) -> Tensor:
    """Class labels as a shard holds them: (n, greatest task size) int16, padded with -1."""
    padded = pad_tasks(tasks)
    room = preset.zoo.task_size[1] - padded.shape[1]
    return F.pad(padded, (0, room), value=PADDING).to(torch.int16)


def _train_shard(
    data: TaskData, preset: Preset, start: Tensor, tasks: list[tuple[int, ...]], path: Path, seed: int
) -> None:
    weights = train_stack(
        preset.head, start, tasks, data.train, data.embeddings, preset.logit_scale, preset.zoo.heads, seed
    )  # (n, P)
    accuracy = [
        heads_accuracy(preset.head, head[None], task, data.test, data.embeddings)[0]
        for head, task in zip(weights, tasks, strict=True)
    ]
    classes = _padded_classes(tasks, preset)  # (n, widest)
    _save_tensors({"weights": weights.cpu(), "classes": classes, "accuracy": torch.stack(accuracy).cpu()}, path)


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    except (OSError, ValueError) as error:
        raise TrainingDataError(f"{folder} is not a zoo: {error}") from error
    if manifest.get("format") != FORMAT:
        raise TrainingDataError(f"{folder}/manifest.json has format {manifest.get('format')!r}, expected {FORMAT!r}")
    return manifest


def _split(manifest: dict[str, Any]) -> TaskSplit:
    def tasks(name: str) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(task) for task in manifest.get(name, []))

    held_out = manifest.get("held_out", {"classes": [], "pairs": []})
    return TaskSplit(
        seen=tuple(tuple(task) for task in manifest["seen"]),
        unseen=tuple(tuple(task) for task in manifest["unseen"]),
        held_out_pairs=tasks("held_out_pairs"),
        held_out_classes=tasks("held_out_classes"),
        mixed_classes=tasks("mixed_classes"),
        held_out=HeldOut(tuple(held_out["classes"]), tuple((one, other) for one, other in held_out["pairs"])),
    )


def load_zoo(folder: Path) -> Zoo:
    """Read a finished zoo directory.

    Raises:
        TrainingDataError: it is not one, is unfinished, or a shard is damaged.
    """
    manifest = _read_manifest(folder)
    shards = sorted(folder.glob("heads-*.safetensors"))
    try:
        split = _split(manifest)
        shared = load_file(folder / "shared.safetensors")
        base, universal = shared["base"], shared["universal"]
        parts = [load_file(path) for path in shards]
        weights = torch.cat([part["weights"] for part in parts])
        accuracy = torch.cat([part["accuracy"] for part in parts])
    except (OSError, SafetensorError, KeyError, RuntimeError) as error:
        raise TrainingDataError(f"{folder} is unfinished or damaged ({error}): run `t2w zoo` on it again") from error
    if len(weights) != len(split.seen):
        raise TrainingDataError(f"{folder} holds {len(weights)} of {len(split.seen)} heads: run `t2w zoo` again")
    return Zoo(split, base, universal, weights, accuracy, manifest)


def check_zoo_fits(zoo: Zoo, data: TaskData, preset: Preset) -> None:
    """Refuse to combine a zoo with other data or another head than it was built for.

    Raises:
        TrainingDataError: says what differs.
    """
    expected = {
        "head": preset.head.model_dump(mode="json"),
        "logit_scale": preset.logit_scale,
        "template": data.template,
        "classes": list(data.classes),
        "data_sha256": data.fingerprint,
    }
    for key, value in expected.items():
        there = zoo.manifest.get(key)
        if there != value:
            raise TrainingDataError(
                f"the zoo was built for another {key} ({str(there)[:80]} instead of {str(value)[:80]})"
            )
