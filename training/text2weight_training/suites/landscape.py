"""The loss around heads trained from a generated and from a random start, after T2W's Fig. 5 (arXiv 2508.13633).

Three cuts through the landscape: the line between the two trained heads; steps in random filter-normalised directions
(arXiv 1712.09913); and the plane of the T2W authors' published code (github.com/TianSuya/T2W, vis-cifar.py), which
leaves a start in the direction that training on the task takes and in the one that training on another task takes.
Letters: M tasks, G places along a line, R radii, n directions, a and b places on a surface, P numbers in one head.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from text2weight.merging import match_units
from text2weight.weight_tokens import permute_units
from text2weight_training.bootstrap import PairedBootstrap
from text2weight_training.evaluate import generate_heads
from text2weight_training.initialisation import XAVIER, random_heads
from text2weight_training.suites.base import (
    SuiteRun,
    Task,
    method_name,
    own_accuracy,
    take_tasks,
    task_loss,
    train_heads,
    training_sample,
)
from text2weight_training.suites.directions import between, equally_long, filter_normalised
from text2weight_training.suites.figures import new_figure, plot_band, save_figure
from text2weight_training.suites.tables import markdown_table, number, percent

DATA = ("train", "test")
AS_TRAINED, ALIGNED = "as trained", "units aligned"
RANDOM, TASKS = "random", "tasks"
AXES = {
    RANDOM: ("first random direction, filter lengths", "second random direction"),
    TASKS: ("training on the task", "training on another task"),
}
# A logarithmic scale has no place for a loss of zero.
LEAST_LOSS = 1e-6


def run(run: SuiteRun) -> dict[str, Any]:
    """Train unseen tasks' heads from both starts by one recipe, and measure the loss around and between them.

    Losses are in nats, on a sample of training features ("train") and on all test features ("test").

    Returns:
        `tasks`, `generated` and `xavier` (names of the starts); per start in `starts` the accuracy before and after
        training, the `loss` of the trained heads and `rise`, by data the mean rise of the loss at each of `radii`;
        `rise_difference`, by data the rise from Xavier less the one from the generated start; per version in `line`
        the loss at each of `places` and the `barrier`, the most by which the line lies above the straight one between
        its ends; `surfaces`, see `_surfaces`.

    Raises:
        TrainingDataError: the zoo has too few unseen tasks, or a training diverges.
    """
    settings, preset = run.preset.suites.landscape, run.preset
    tasks = take_tasks(run.zoo.split.unseen, settings.tasks, "suites.landscape.tasks", "unseen")
    sampler, steps = settings.sampler
    generated = f"generated ({method_name(sampler, steps)})"
    starts = {
        generated: generate_heads(run.generator, run.data, tasks, sampler, steps, preset.seed),  # (M, P)
        XAVIER: random_heads(preset.head, XAVIER, range(preset.seed, preset.seed + len(tasks))),  # (M, P)
    }
    trained = {name: _train(run, tasks, heads) for name, heads in starts.items()}  # (M, P) each
    bootstrap = PairedBootstrap(len(tasks), settings.bootstrap, preset.seed)
    rises = {name: loss_rises(run, tasks, heads) for name, heads in trained.items()}
    result = {
        "tasks": len(tasks),
        "generated": generated,
        "xavier": XAVIER,
        "directions": settings.directions,
        "radii": list(settings.radii),
        "starts": {
            name: {
                "before": bootstrap.summary(own_accuracy(run, tasks, starts[name])),
                "after": bootstrap.summary(own_accuracy(run, tasks, heads)),
                "loss": {
                    data: bootstrap.summary(values)
                    for data, values in zip(DATA, _losses(run, tasks, heads[:, None])[..., 0], strict=True)
                },
                "rise": _by_data(bootstrap, rises[name]),
            }
            for name, heads in trained.items()
        },
        "rise_difference": _by_data(bootstrap, rises[XAVIER] - rises[generated]),
        "line": _lines(run, tasks, trained[generated], trained[XAVIER], bootstrap),
        "surfaces": _surfaces(run, tasks, starts, trained),
    }
    _plot(run, result)
    return result


def _train(run: SuiteRun, tasks: list[Task], starts: Tensor) -> Tensor:
    """Heads (M, P) trained from starts (M, P) by `evaluation.oracle`."""
    return train_heads(run, tasks, run.preset.evaluation.oracle, run.preset.seed, starts)


def _losses(run: SuiteRun, tasks: list[Task], heads: Tensor) -> np.ndarray:
    """Loss of G heads per task (M, G, P) on training and test features: (2, M, G)."""
    rows = [_both_losses(run, task, row) for task, row in zip(tasks, heads, strict=True)]  # (2, G) each
    return np.stack(rows, axis=1)


def _both_losses(run: SuiteRun, task: Task, heads: Tensor) -> np.ndarray:
    """Loss of heads (J, P) on training and on test features of a task: (2, J)."""
    samples = (training_sample(run, task, run.preset.suites.landscape.samples), run.data.test.of_task(task))
    return torch.stack([task_loss(run, heads, task, *sample) for sample in samples]).double().numpy()


def _by_data(bootstrap: PairedBootstrap, values: np.ndarray) -> dict[str, list[dict[str, Any]]]:
    """Summaries over tasks of values (2, M, G): per data a list of G."""
    return {name: [bootstrap.summary(column) for column in rows.T] for name, rows in zip(DATA, values, strict=True)}


def loss_rises(run: SuiteRun, tasks: list[Task], heads: Tensor) -> np.ndarray:
    """Mean rise of the loss over random directions, at each radius: a number for how sharp a minimum is.

    Args:
        run: the measurement.
        tasks: M class lists.
        heads: (M, P) trained.

    Returns:
        (2, M, R), on training and test features.
    """
    settings = run.preset.suites.landscape
    # The same draws for every start: what differs is the scale of the filters alone.
    generator = torch.Generator().manual_seed(run.preset.seed)
    radii = torch.tensor(settings.radii)  # (R,)
    rows = []
    for task, head in zip(tasks, heads, strict=True):
        directions = filter_normalised(run.preset.head, head, settings.directions, generator)  # (n, P)
        moved = head + radii[:, None, None] * directions  # (R, n, P)
        losses = _both_losses(run, task, torch.cat([head[None], moved.flatten(0, 1)]))  # (2, 1 + R n)
        rows.append(losses[:, 1:].reshape(2, len(radii), -1).mean(-1) - losses[:, :1])  # (2, R)
    return np.stack(rows, axis=1)


def barrier(losses: np.ndarray, places: np.ndarray) -> np.ndarray:
    """The most by which losses (..., G) at places (G,) from 0 to 1 lie above the straight line of their ends: (...).

    After Git Re-Basin (arXiv 2209.04836) and arXiv 2110.06296. Never negative, as the ends lie on that line.
    """
    straight = losses[..., :1] * (1 - places) + losses[..., -1:] * places  # (..., G)
    highest: np.ndarray = (losses - straight).max(-1)
    return highest


def _lines(
    run: SuiteRun, tasks: list[Task], first: Tensor, second: Tensor, bootstrap: PairedBootstrap
) -> dict[str, Any]:
    """Loss on the lines between two heads of each task, both (M, P), with units in both orders."""
    spec = run.preset.head
    places = torch.linspace(0, 1, run.preset.suites.landscape.line_points)  # (G,)
    aligned = torch.stack(
        [permute_units(spec, b, match_units(spec, a, b)) for a, b in zip(first, second, strict=True)]
    )  # (M, P)
    line: dict[str, Any] = {"places": places.tolist()}
    for version, ends in ((AS_TRAINED, second), (ALIGNED, aligned)):
        heads = torch.stack([between(a, b, places) for a, b in zip(first, ends, strict=True)])  # (M, G, P)
        losses = _losses(run, tasks, heads)  # (2, M, G)
        barriers = barrier(losses, np.array(line["places"]))  # (2, M)
        line[version] = {
            "loss": _by_data(bootstrap, losses),
            "barrier": {data: bootstrap.summary(values) for data, values in zip(DATA, barriers, strict=True)},
        }
    return line


def _surfaces(
    run: SuiteRun, tasks: list[Task], starts: dict[str, Tensor], trained: dict[str, Tensor]
) -> dict[str, dict[str, Any]]:
    """The first task's loss on training features, on two planes for each start.

    Returns:
        by kind and start `extent` and `loss`, (b, a) rows from the least b up. "random": around the trained head, in
        two filter-normalised directions. "tasks": around the start; a is the change that training on the task makes
        (so the trained head lies at a = 1, b = 0), b the one that training on the next task makes, as long as a's.
    """
    settings, spec = run.preset.suites.landscape, run.preset.head
    surfaces: dict[str, dict[str, Any]] = {RANDOM: {}, TASKS: {}}
    for name in starts:
        start, head = starts[name][0], trained[name][0]  # (P,) each
        generator = torch.Generator().manual_seed(run.preset.seed)
        here, there = filter_normalised(spec, head, 2, generator)  # (P,) each
        surfaces[RANDOM][name] = _surface(run, tasks[0], head, here, there, settings.random_extent)
        change = head - start  # (P,)
        other = _train(run, [tasks[1]], start)[0] - start  # (P,)
        surfaces[TASKS][name] = _surface(
            run, tasks[0], start, change, equally_long(change, other), settings.task_extent
        )
    return surfaces


def _surface(run: SuiteRun, task: Task, origin: Tensor, across: Tensor, up: Tensor, extent: float) -> dict[str, Any]:
    """Loss of origin + a across + b up, all (P,), for a and b from -extent to extent."""
    settings = run.preset.suites.landscape
    features, targets = training_sample(run, task, settings.samples)
    places = torch.linspace(-extent, extent, settings.surface_points)  # (a,)
    rows = [
        task_loss(run, origin + b * up + places[:, None] * across, task, features, targets).tolist() for b in places
    ]
    return {"extent": extent, "loss": rows}


def _plot(run: SuiteRun, result: dict[str, Any]) -> None:
    figure, (line, rise) = new_figure(2)
    for data, style in zip(DATA, ("-", "--"), strict=True):
        for i, version in enumerate((AS_TRAINED, ALIGNED)):
            entries = result["line"][version]["loss"][data]
            look = {"linestyle": style, "color": f"C{i}", "label": f"{version}, {data}"}
            plot_band(line, result["line"]["places"], entries, 1, **look)
        for i, (name, entry) in enumerate(result["starts"].items()):
            look = {"linestyle": style, "color": f"C{i + 2}", "label": f"{name}, {data}", "marker": "."}
            plot_band(rise, result["radii"], entry["rise"][data], 1, **look)
    line.set(xlabel=f"from {result['generated']} (0) to {result['xavier']} (1)", ylabel="loss, nats")
    rise.set(xlabel="length of a random step, in filter lengths", ylabel="rise of the loss, nats")
    for axes in (line, rise):
        axes.legend(fontsize="x-small", handlelength=4)
    save_figure(figure, run.out / "landscape")
    for kind in result["surfaces"]:
        _draw_surfaces(run, result["surfaces"][kind], kind)


def _draw_surfaces(run: SuiteRun, surfaces: dict[str, Any], kind: str) -> None:
    """Contours of every start's surface of a kind, on one logarithmic scale of the loss."""
    figure, panels = new_figure(len(surfaces), sharey=True)
    every = np.clip([surface["loss"] for surface in surfaces.values()], LEAST_LOSS, None)  # (starts, b, a)
    # A little wider than the losses, so that rounding leaves no hole at either end.
    least, greatest = 0.99 * every.min(), 1.01 * every.max()
    levels = np.geomspace(least, greatest, 25)
    for axes, (name, surface), losses in zip(panels, surfaces.items(), every, strict=True):
        places = np.linspace(-surface["extent"], surface["extent"], len(losses))
        contours = axes.contourf(places, places, losses, levels=levels, norm="log", cmap="viridis")
        if kind == TASKS:
            axes.plot([0], [0], "wo", markersize=4)
        axes.plot([int(kind == TASKS)], [0], "wx")
        axes.set(title=name, xlabel=AXES[kind][0])
    panels[0].set_ylabel(AXES[kind][1])
    ticks = np.geomspace(least, greatest, 5)
    bar = figure.colorbar(contours, ax=panels, label="loss on training features, nats", ticks=ticks)
    bar.set_ticklabels([f"{tick:.2g}" for tick in ticks])
    save_figure(figure, run.out / f"landscape-{kind}")


def report(result: dict[str, Any]) -> str:
    """Markdown section: the trained heads, how the loss rises around them, and the line between them."""
    starts = [
        [name, percent(entry["before"]), percent(entry["after"]), *(number(entry["loss"][data]) for data in DATA)]
        for name, entry in result["starts"].items()
    ]
    rises = [
        [f"{radius:g}", data]
        + [number(entry["rise"][data][i]) for entry in result["starts"].values()]
        + [number(result["rise_difference"][data][i])]
        for i, radius in enumerate(result["radii"])
        for data in DATA
    ]
    lines = [
        [version, *(number(result["line"][version]["barrier"][data]) for data in DATA)]
        for version in (AS_TRAINED, ALIGNED)
    ]
    return (
        f"Heads of {result['tasks']} unseen tasks, trained from both starts by the oracle's recipe. Accuracy in %, "
        f"losses in nats.\n\n"
        + markdown_table(["start", "accuracy before", "after training", "training loss", "test loss"], starts)
        + f"\nRise of the loss when every filter moves by a share of its length in a random direction, mean over "
        f"{result['directions']} directions; the difference is Xavier less generated, above zero where heads trained "
        f"from the generated start lie flatter.\n\n"
        + markdown_table(["share", "features", *result["starts"], "difference"], rises)
        + "\nThe line between the two heads of a task: the most by which the loss on it exceeds a straight line "
        "between the ends. Aligned: the second head's hidden units in the order closest to the first's.\n\n"
        + markdown_table(["units", "training features", "test features"], lines)
        + f"\nThe surfaces show the first task's training loss on one logarithmic scale for both starts. `{RANDOM}`: "
        f"around the trained head (cross). `{TASKS}`: around the start (dot), in the direction that training on the "
        "task takes (the cross is the trained head) and in the one that training on another task takes.\n"
    )
