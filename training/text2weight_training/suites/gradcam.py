"""Where generated classifiers look, along the denoising steps, after T2W's Fig. 4 (arXiv 2508.13633).

Grad-CAM maps of pictures of unseen tasks, for the head that the sampler's first, middle and last call estimate, for the
universal head, and for heads trained on the task's own data. A heat map can be judged by eye only; as numbers there are
the probability of the right class, and how far a map agrees with the trained head's, beside the agreement of two
trained heads. Where no pictures are given, nothing is measured.

Letters: M tasks, N pictures of a task, R their side in pixels, a x b the last feature map, P numbers in one head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from text2weight.backbone import pixels_of
from text2weight.condition import plain_name
from text2weight.generator import DenoiserCall
from text2weight_training.bootstrap import PairedBootstrap
from text2weight_training.evaluate import GENERATION_BATCH, task_requests
from text2weight_training.files import TrainingDataError
from text2weight_training.heatmaps import Tail, correlation, grad_cam, last_feature_maps
from text2weight_training.image_data import LabelledImages, find_images
from text2weight_training.image_encoders import ImageEncoder, load_image_encoder
from text2weight_training.suites.base import SuiteRun, Task, method_name, train_heads
from text2weight_training.suites.figures import new_grid, save_figure
from text2weight_training.suites.tables import markdown_table, number, percent

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The folder of a checkpoint that `t2w fit --backbone` copies the backbone into.
CHECKPOINT_BACKBONE = "backbone"
TRAINED = "trained"
ESTIMATES = ("first estimate", "middle estimate", "last estimate")
# In the order of the figure's columns; the last is a reference for the agreement and not drawn.
COLUMNS = (*ESTIMATES, "universal", TRAINED)
ANOTHER_SEED = "trained, another seed"


@dataclass(frozen=True)
class Seen:
    """The pictures of one task, and what every head made of them.

    Attributes:
        pixels: (N, 3, R, R) uint8.
        names: N names of the right classes.
        heat: per column (N, a, b).
        probability: per column (N,), of the right class.
    """

    pixels: Tensor
    names: tuple[str, ...]
    heat: dict[str, Tensor]
    probability: dict[str, Tensor]


def run(run: SuiteRun) -> dict[str, Any]:
    """Make the maps, and measure what can be measured on them.

    Returns:
        `not_measured`, the reason, where pictures or backbone are missing; else `images` (the folder's name),
        `sampler`, `tasks`, `pictures`, `map` (a and b), and per column in `columns` the `probability` of the right
        class, the `agreement` (correlation with the trained head's map; None for that head) and `empty`, the share
        of maps without contrast.

    Raises:
        TrainingDataError: the folder has no pictures of any unseen task, or the backbone is not the features' own.
    """
    settings = run.preset.suites.gradcam
    if settings.images is None:
        return {"not_measured": "no pictures are given: name a folder with test/CLASS/*.png by --images"}
    source = settings.backbone
    if source is None:
        bundled = run.generator.path / CHECKPOINT_BACKBONE
        if not bundled.is_dir():
            return {"not_measured": "the checkpoint holds no backbone: name the features' own by --backbone"}
        source = f"dir:{bundled}"
    encoder = _load_encoder(run, source, settings.side)
    images = find_images(settings.images, "test")
    pictures = _pictures_of(run, images)
    tasks = [task for task in run.zoo.split.unseen if any(label in pictures for label in task)][: settings.tasks]
    if not tasks:
        raise TrainingDataError(
            f"{settings.images} has no picture of any class of the unseen tasks: its class folders are "
            f"{', '.join(images.classes[:5])}, the data's classes {', '.join(run.data.classes[:5])}"
        )
    heads = _heads(run, tasks)
    seen = [
        _look(run, encoder, images, pictures, task, {name: rows[i] for name, rows in heads.items()}, i)
        for i, task in enumerate(tasks)
    ]
    save_figure(_figure(seen[: settings.rows], over_pictures=False), run.out / "gradcam")
    # Of another name, so that no page takes it: the pictures are their data set's.
    save_figure(_figure(seen[: settings.rows], over_pictures=True), run.out / "pictures-gradcam")
    bootstrap = PairedBootstrap(len(tasks), settings.bootstrap, run.preset.seed)
    return {
        "images": images.name,
        "sampler": method_name(*settings.sampler),
        "tasks": len(tasks),
        "pictures": sum(len(one.names) for one in seen),
        "map": list(seen[0].heat[TRAINED].shape[1:]),
        "columns": {name: _summarise(seen, name, bootstrap) for name in heads},
    }


def _load_encoder(run: SuiteRun, source: str, side: int | None) -> ImageEncoder:
    encoder = load_image_encoder(source, side=side)
    made, expected = (
        (encoder.description, encoder.preprocess),
        tuple(run.data.backbone[key] for key in ("name", "preprocess")),
    )
    if made != expected:
        raise TrainingDataError(
            f"backbone {source} is {' with '.join(made)}, but the features were made with {' with '.join(expected)}"
        )
    return encoder


def _pictures_of(run: SuiteRun, images: LabelledImages) -> dict[int, list[int]]:
    """Which pictures show each of the data's classes that the folder has."""
    labels = {plain_name(name).casefold(): label for label, name in enumerate(run.data.classes)}
    found: dict[int, list[int]] = {}
    for i, label in enumerate(images.labels):
        name = plain_name(images.classes[label]).casefold()
        if name in labels:
            found.setdefault(labels[name], []).append(i)
    return found


def _heads(run: SuiteRun, tasks: list[Task]) -> dict[str, Tensor]:
    """Per column one head for each task, (M, P)."""
    settings, recipe = run.preset.suites.gradcam, run.preset.evaluation.oracle
    requests = task_requests(run.data, tasks, *settings.sampler, run.preset.seed)
    kept: list[list[Tensor]] = []
    for start in range(0, len(requests), GENERATION_BATCH):
        calls: list[DenoiserCall] = []
        run.generator.generate_batch(requests[start : start + GENERATION_BATCH], on_call=calls.append)
        kept.append([calls[call].estimates for call in (0, len(calls) // 2, -1)])
    # Made in inference mode; copies can take part in a gradient.
    heads = {name: torch.cat(parts).clone() for name, parts in zip(ESTIMATES, zip(*kept, strict=True), strict=True)}
    heads["universal"] = run.zoo.universal.expand(len(tasks), -1)
    for number_of_seed, name in enumerate((TRAINED, ANOTHER_SEED)):
        heads[name] = train_heads(run, tasks, recipe, run.preset.seed + 77 + 1_000_003 * number_of_seed)
    return heads


def _look(
    run: SuiteRun,
    encoder: ImageEncoder,
    images: LabelledImages,
    pictures: dict[int, list[int]],
    task: Task,
    heads: dict[str, Tensor],
    number_of_task: int,
) -> Seen:
    """Show one task's pictures to every head (P,)."""
    available = [(i, place) for place, label in enumerate(task) for i in pictures.get(label, [])]
    generator = torch.Generator().manual_seed(run.preset.seed + number_of_task)
    order = torch.randperm(len(available), generator=generator)[: run.preset.suites.gradcam.pictures]
    chosen = [available[i] for i in order.tolist()]
    pixels = pixels_of([images.open(images.keys[i]) for i, _ in chosen], encoder.side)  # (N, 3, R, R)
    targets = torch.tensor([place for _, place in chosen])  # (N,)
    maps = last_feature_maps(encoder, pixels)  # (N, d, a, b)
    embeddings = run.data.embeddings[list(task)]  # (K, D)
    heat, probability = {}, {}
    for name, head in heads.items():
        tail = Tail(run.preset.head, head, embeddings, run.preset.logit_scale)
        heat[name], probability[name] = grad_cam(tail, maps, targets)  # (N, a, b), (N,)
    return Seen(pixels, tuple(run.data.classes[task[place]] for place in targets.tolist()), heat, probability)


def _summarise(seen: list[Seen], name: str, bootstrap: PairedBootstrap) -> dict[str, Any]:
    agreement = [correlation(one.heat[name], one.heat[TRAINED]).mean() for one in seen]
    empty = torch.cat([one.heat[name].flatten(1).amax(1) == 0 for one in seen])  # (all pictures,)
    return {
        "probability": bootstrap.summary(np.array([float(one.probability[name].mean()) for one in seen])),
        "agreement": None if name == TRAINED else bootstrap.summary(np.array([float(value) for value in agreement])),
        "empty": float(empty.float().mean()),
    }


def _figure(seen: list[Seen], over_pictures: bool) -> Figure:
    """The maps of one picture of each task, a column for every head: over the picture, which comes first, or alone."""
    titles = ("picture", *COLUMNS) if over_pictures else COLUMNS
    figure, panels = new_grid(len(seen), len(titles), 1.6)
    for row, one in zip(panels, seen, strict=True):
        picture = one.pixels[0].permute(1, 2, 0).numpy()  # (R, R, 3)
        side = picture.shape[0]
        if over_pictures:
            row[0].imshow(picture)
        row[0].set_ylabel(one.names[0], fontsize="small")
        for axes, name in zip(row[-len(COLUMNS) :], COLUMNS, strict=True):
            if over_pictures:
                axes.imshow(picture.mean(-1), cmap="gray", vmin=0, vmax=255)
            axes.imshow(
                one.heat[name][0].numpy(),
                cmap="jet",
                alpha=0.45 if over_pictures else 1,
                vmin=0,
                vmax=1,
                interpolation="bilinear",
                extent=(-0.5, side - 0.5, side - 0.5, -0.5),
            )
            axes.set_xlabel(f"p = {float(one.probability[name][0]):.2f}", fontsize="small")
    for axes, title in zip(panels[0], titles, strict=True):
        axes.set_title(title, fontsize="small")
    return figure


def report(result: dict[str, Any]) -> str:
    """Markdown section: a row per head."""
    if "not_measured" in result:
        return f"Not measured: {result['not_measured']}.\n"
    rows = [
        [
            name,
            percent(entry["probability"]),
            "" if entry["agreement"] is None else number(entry["agreement"], 2),
            f"{100 * entry['empty']:.1f}",
        ]
        for name, entry in result["columns"].items()
    ]
    height, width = result["map"]
    return (
        f"Grad-CAM of the right class on {result['pictures']} test pictures of {result['images']}, {result['tasks']} "
        f"unseen tasks, maps of {height} x {width} points; estimates of {result['sampler']}. Agreement is the "
        "correlation with the map of the head trained on the task's data, 0 for a map without contrast. It says that "
        "two heads look at the same places, not that these are the right ones. The figure shows the maps of "
        "one picture of some tasks; the pictures are in `pictures-gradcam.png`, beside the results.\n\n"
        + markdown_table(["head", "probability of the right class, %", "agreement", "maps without contrast, %"], rows)
    )
