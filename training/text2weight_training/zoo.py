"""The zoo: thousands of heads trained on tasks, what the denoiser learns from.

A zoo directory is written shard by shard, each whole or absent, so an interrupted run goes on where it
stopped and ends with the same files. A shard is seeded by its index: who trains it, and when, makes no difference.
Letters: n heads in a shard, P numbers in one head, C classes.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import Progress
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from text2weight_training.distributed import run_jobs
from text2weight_training.files import TrainingDataError, atomic_path
from text2weight_training.loss_watch import DivergedError
from text2weight_training.presets import Preset
from text2weight_training.splits import draw_split
from text2weight_training.stacked import HeadRecipe, heads_accuracy, initial_head, train_stack
from text2weight_training.tasks import PADDING, HeldOut, TaskData, TaskSplit, pad_tasks

FORMAT = "text2weight.zoo/1"
SPEED_FILE = "speed.json"
CHECKSUM = "sha256"
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

    @property
    def spread(self) -> float:
        """How far the task heads lie around their mean: the standard deviation of a number."""
        return float((self.weights - self.weights.mean(0)).square().mean().sqrt())


@dataclass(frozen=True)
class ZooSpeed:
    """How fast the task heads of a zoo were trained, in the last run that trained any.

    Attributes:
        heads: how many were counted: of that run, all but the first shard of each worker, before which it has to
            start; all where there were no more.
        seconds: wall time that these took.
        workers: processes that trained them.
        device: torch device.
    """

    heads: int
    seconds: float
    workers: int
    device: str

    @property
    def heads_per_second(self) -> float:
        """Of all workers together."""
        return self.heads / self.seconds

    def cost(self, heads: int, num_parameters: int) -> str:
        """What so many heads of P numbers would take at this rate, in words."""
        hours, gigabytes = heads / self.heads_per_second / 3600, heads * num_parameters * 4 / 1e9
        return f"{heads:,} heads would take {hours:,.1f} hours and {gigabytes:,.1f} GB"


@dataclass(frozen=True)
class _Shard:
    """One shard to train: where it goes, its tasks and its seed."""

    path: Path
    tasks: tuple[tuple[int, ...], ...]
    seed: int


@dataclass(frozen=True)
class _ShardWork:
    """What all shards are trained from."""

    data: TaskData
    preset: Preset
    start: Tensor


def build_zoo(data: TaskData, preset: Preset, out: Path, device: str = "cpu", workers: int = 1) -> Zoo:
    """Build a zoo, or finish one that was interrupted.

    Args:
        data: features and embeddings.
        preset: its `head`, `logit_scale`, `seed` and `zoo` parts count.
        out: the zoo directory.
        device: torch device; "cpu" where there is more than one worker.
        workers: shards trained at a time, see `run_jobs`; the zoo is the same, bit for bit.

    Raises:
        TrainingDataError: features or embeddings are not of the head's size, the tasks cannot be drawn, `out`
            holds a zoo of other data or settings, a training diverges, or workers cannot be had.
        OSError: a file cannot be written, as on a full disk; the whole ones stay.
    """
    if workers > 1 and device != "cpu":
        raise TrainingDataError(f"{workers} workers train on cpu, not {device}: on a GPU, raise zoo.stack instead")
    _check_sizes(data, preset)
    manifest = _manifest(data, preset)
    _claim(out, manifest)
    split = _split(manifest)
    here = data.to(device)
    shared = _shared_heads(here, split, preset, out)
    size = preset.zoo.stack
    shards = [
        _Shard(out / f"heads-{index:05d}.safetensors", split.seen[start : start + size], preset.seed + 1 + index)
        for index, start in enumerate(range(0, len(split.seen), size))
    ]
    missing = [shard for shard in shards if not _is_whole(shard, preset)]
    heads = sum(len(shard.tasks) for shard in missing)
    counted, started = heads, time.perf_counter()
    with Progress() as progress:
        bar = progress.add_task("zoo heads", total=len(split.seen), completed=len(split.seen) - heads)
        work = _ShardWork(here, preset, shared["universal"])
        for done, (shard, tensors) in enumerate(run_jobs(_train_shard, work, missing, workers), start=1):
            _save_tensors(tensors, shard.path)
            progress.update(bar, advance=len(shard.tasks))
            heads -= len(shard.tasks)
            if done == workers and heads:
                counted, started = heads, time.perf_counter()
    if missing:
        speed = ZooSpeed(counted, round(time.perf_counter() - started, 3), workers, device)
        with atomic_path(out / SPEED_FILE) as temporary:
            temporary.write_text(json.dumps(asdict(speed)) + "\n")
    return load_zoo(out)


def load_speed(folder: Path) -> ZooSpeed | None:
    """How fast a zoo was built; None where its folder does not say."""
    try:
        return ZooSpeed(**json.loads((folder / SPEED_FILE).read_text()))
    except (OSError, ValueError, TypeError):
        return None


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
    split = draw_split(data.classes, zoo, preset.seed)
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
        recipes = {"base": preset.zoo.base, "universal": preset.zoo.universal}
        heads = {}
        with Progress() as progress:
            for name, recipe in recipes.items():
                bar = progress.add_task(f"{name} head", total=recipe.steps)
                try:
                    heads[name] = universal_head(data, split, preset, recipe, partial(progress.advance, bar))
                except DivergedError as error:
                    raise DivergedError(f"{name} head: {error} (zoo.{name}.learning_rate)") from error
        _save_tensors(heads, path)
    return _read_tensors(path)


def universal_head(
    data: TaskData, split: TaskSplit, preset: Preset, recipe: HeadRecipe, on_step: Callable[[], None]
) -> Tensor:
    """One head trained on all training classes from PyTorch's initialisation, (P,) on the CPU.

    Args:
        data: features and embeddings.
        split: says which classes are kept from training.
        preset: head, logit scale and seed.
        recipe: optimiser settings; a short one makes the base head.
        on_step: called after every step.

    Raises:
        DivergedError: a loss or the weights are not finite, or the loss exploded.
    """
    everything = [split.held_out.training_classes(len(data.classes))]
    start = initial_head(preset.head, preset.seed)  # (P,)
    return train_stack(
        preset.head,
        start,
        everything,
        data.train,
        data.embeddings,
        preset.logit_scale,
        recipe,
        preset.seed,
        on_step,
    )[0].cpu()


def _holds(path: Path, shapes: dict[str, tuple[int, ...]]) -> bool:
    """Whether a file is there, whole, and has tensors of these shapes."""
    if not path.exists():
        return False
    try:
        return {name: tuple(tensor.shape) for name, tensor in _read_tensors(path).items()} == shapes
    except TrainingDataError:
        return False


def _is_whole(shard: _Shard, preset: Preset) -> bool:
    """Whether a shard is there, whole, and holds the heads of its tasks."""
    classes, count = _padded_classes(shard.tasks, preset), len(shard.tasks)  # (n, widest)
    shapes = {"weights": (count, preset.head.num_parameters), "classes": tuple(classes.shape), "accuracy": (count,)}
    return _holds(shard.path, shapes) and torch.equal(load_file(shard.path)["classes"], classes)


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tuple(tensors[name].shape)} {tensors[name].dtype}\n".encode())
        digest.update(tensors[name].contiguous().numpy().data)
    return digest.hexdigest()


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a file of the zoo and compare it with the checksum in it; files of older zoos have none.

    Raises:
        TrainingDataError: it is missing or damaged.
    """
    try:
        tensors = load_file(path)
        with safe_open(path, "pt") as file:
            stated = (file.metadata() or {}).get(CHECKSUM)
    except (OSError, SafetensorError) as error:
        raise TrainingDataError(f"{path} is missing or damaged ({error}): run `t2w zoo` on the folder again") from error
    if stated is not None and stated != _checksum(tensors):
        raise TrainingDataError(f"{path} is damaged, its checksum differs: run `t2w zoo` on the folder again")
    return tensors


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        with atomic_path(path) as temporary:
            save_file(tensors, temporary, metadata={CHECKSUM: _checksum(tensors)})
    except SafetensorError as error:  # what safetensors makes of the operating system's errors
        raise OSError(f"{path} cannot be written: {error}") from error


def _padded_classes(tasks: Sequence[tuple[int, ...]], preset: Preset) -> Tensor:
    """Class labels as a shard holds them: (n, greatest task size) int16, padded with -1."""
    padded = pad_tasks(tasks)
    room = preset.zoo.task_size[1] - padded.shape[1]
    return F.pad(padded, (0, room), value=PADDING).to(torch.int16)


def _train_shard(work: _ShardWork, shard: _Shard) -> dict[str, Tensor]:
    data, preset, tasks = work.data, work.preset, list(shard.tasks)
    try:
        weights = train_stack(
            preset.head,
            work.start,
            tasks,
            data.train,
            data.embeddings,
            preset.logit_scale,
            preset.zoo.heads,
            shard.seed,
        )  # (n, P)
    except TrainingDataError as error:
        raise TrainingDataError(f"{shard.path.name}: {error} (zoo.heads.learning_rate)") from error
    accuracy = [
        heads_accuracy(preset.head, head[None], task, data.test, data.embeddings)[0]
        for head, task in zip(weights, tasks, strict=True)
    ]
    classes = _padded_classes(tasks, preset)  # (n, widest)
    return {"weights": weights.cpu(), "classes": classes, "accuracy": torch.stack(accuracy).cpu()}


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
        shared = _read_tensors(folder / "shared.safetensors")
        base, universal = shared["base"], shared["universal"]
        parts = [_read_tensors(path) for path in shards]
        weights = torch.cat([part["weights"] for part in parts])
        accuracy = torch.cat([part["accuracy"] for part in parts])
    except (KeyError, RuntimeError) as error:
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
        "backbone": data.backbone,
        "data_sha256": data.fingerprint,
    }
    for key, value in expected.items():
        there = zoo.manifest.get(key)
        if there != value:
            raise TrainingDataError(
                f"the zoo was built for another {key} ({str(there)[:80]} instead of {str(value)[:80]}): give the "
                "features, text and preset that it was built with, or build another zoo"
            )
