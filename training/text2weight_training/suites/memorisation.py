"""Are zoo heads recalled or new heads made? After Zeng et al. (arXiv 2506.07998).

A generated head is held against its nearest zoo head: how far apart their weights are, whatever the order of hidden
units, and whether they make the same mistakes. Letters: M tasks, n zoo heads, S seeds, N test features of a task,
P numbers in one head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from text2weight_training.baselines import text_similarity
from text2weight_training.bootstrap import PairedBootstrap
from text2weight_training.evaluate import generate_heads
from text2weight_training.files import TrainingDataError
from text2weight_training.suites.base import (
    SuiteRun,
    Task,
    method_name,
    take_tasks,
    task_accuracy,
    task_hits,
    train_heads,
)
from text2weight_training.suites.figures import new_figure, save_figure
from text2weight_training.suites.nearest import Nearest, aligned_distances, nearest_heads
from text2weight_training.suites.tables import markdown_table, number, percent

TRAINED = "trained"
ZOO = "zoo head, nearest other"


def run(run: SuiteRun) -> dict[str, Any]:
    """Measure distances, shared mistakes and the diversity of samples.

    Distances are root mean squares over a head's numbers after the best permutation of hidden units, divided by the
    zoo heads' own spread; shared mistakes are the intersection over union of two heads' wrong test predictions.

    Returns:
        `tasks`; `zoo_spread`; `unseen`: per method on unseen tasks its accuracy, the distance to its nearest zoo head
        and the share of mistakes it has in common with that head; `seen`: on tasks of the zoo, distance to and shared
        mistakes with the zoo's own head of the task; `diversity`: per method the spread of heads of one task over
        seeds and the mistakes that two of them share.

    Raises:
        TrainingDataError: too few unseen or zoo tasks, or zoo heads.
    """
    settings, zoo = run.preset.suites.memorisation, run.zoo
    unseen = take_tasks(zoo.split.unseen, settings.tasks, "suites.memorisation.tasks", "unseen")
    seen = take_tasks(zoo.split.seen, settings.tasks, "suites.memorisation.tasks", "seen")
    most = max(settings.neighbours, default=1)
    if most > len(zoo.weights):
        raise TrainingDataError(f"suites.memorisation.neighbours asks for {most} of {len(zoo.weights)} zoo heads")
    spread = zoo.spread
    bootstrap = PairedBootstrap(settings.tasks, settings.bootstrap, run.preset.seed)
    by_seed = _heads_by_seed(run, unseen)
    heads = {name: samples[0] for name, samples in by_seed.items()} | zoo_baselines(run, unseen)
    result = {
        "tasks": settings.tasks,
        "zoo_heads": len(zoo.weights),
        "seeds": settings.seeds,
        "zoo_spread": spread,
        "unseen": {name: _against_zoo(run, unseen, rows, spread, bootstrap) for name, rows in heads.items()}
        | {ZOO: _zoo_against_itself(run, seen, spread, bootstrap)},
        "seen": _against_own(run, seen, spread, bootstrap),
        "diversity": {name: _diversity(run, unseen, samples, spread, bootstrap) for name, samples in by_seed.items()},
    }
    _plot(run, result)
    return result


def _heads_by_seed(run: SuiteRun, tasks: list[Task]) -> dict[str, Tensor]:
    """Generated and trained heads of the tasks from several seeds: per method (S, M, P)."""
    settings = run.preset.suites.memorisation
    heads = {
        method_name(sampler, steps): torch.stack(
            [_generate(run, tasks, sampler, steps, repeat) for repeat in range(settings.seeds)]
        )
        for sampler, steps in settings.samplers
    }
    return heads | {TRAINED: torch.stack([_train(run, tasks, s) for s in range(settings.seeds)])}


def _generate(run: SuiteRun, tasks: list[Task], sampler: str, steps: int, repeat: int) -> Tensor:
    """Generated heads (M, P), the ones of another `repeat` from other seeds."""
    return generate_heads(run.generator, run.data, tasks, sampler, steps, run.preset.seed + 100_000 * repeat)


def _train(run: SuiteRun, tasks: list[Task], repeat: int) -> Tensor:
    """Heads trained as the zoo's were, on other draws of samples: (M, P)."""
    # Far from the seeds that the zoo itself counts up from.
    return train_heads(run, tasks, run.preset.zoo.heads, run.preset.seed + 1_000_000 * (repeat + 1))


def zoo_baselines(run: SuiteRun, tasks: list[Task]) -> dict[str, Tensor]:
    """Cheap ways to a "new" head: the zoo head of the closest text plus noise, and averages of close ones, (M, P)."""
    settings, zoo = run.preset.suites.memorisation, run.zoo
    similarity = text_similarity(run.data, zoo, tasks)  # (M, n)
    order = similarity.topk(max((1, *settings.neighbours)), dim=1).indices  # (M, most), closest first
    closest = zoo.weights[order[:, 0]]  # (M, P)
    deviation = (zoo.weights - zoo.weights.mean(0)).square().mean().sqrt()
    generator = torch.Generator().manual_seed(run.preset.seed)
    heads = {"zoo head of the closest text": closest}
    for level in settings.noise:
        noise = torch.randn(closest.shape, generator=generator)  # (M, P)
        heads[f"the same, noise {level:g}"] = closest + level * deviation * noise
    for count in settings.neighbours:
        heads[f"average of the {count} closest"] = zoo.weights[order[:, :count]].mean(1)
    return heads


def shared_mistakes(run: SuiteRun, task: Task, first: Tensor, second: Tensor) -> float:
    """Intersection over union of two heads' (P,) wrong test predictions; 1 where neither makes a mistake."""
    hits, _ = task_hits(run, torch.stack([first, second]), task)  # (2, N)
    wrong = ~hits
    either = int((wrong[0] | wrong[1]).sum())
    return int((wrong[0] & wrong[1]).sum()) / either if either else 1.0


def _against_zoo(
    run: SuiteRun, tasks: list[Task], heads: Tensor, spread: float, bootstrap: PairedBootstrap
) -> dict[str, Any]:
    """Accuracy of heads (M, P) on their tasks, and what each has in common with its nearest zoo head."""
    nearest = nearest_heads(run.preset.head, heads, run.zoo.weights)
    return _describe(run, tasks, heads, nearest, spread, bootstrap)


def _zoo_against_itself(run: SuiteRun, tasks: list[Task], spread: float, bootstrap: PairedBootstrap) -> dict[str, Any]:
    """The same for the first zoo heads, each on its own task and against all other zoo heads."""
    heads = run.zoo.weights[: len(tasks)]  # (M, P)
    nearest = nearest_heads(run.preset.head, heads, run.zoo.weights, leave_out=list(range(len(tasks))))
    return _describe(run, tasks, heads, nearest, spread, bootstrap)


def _describe(
    run: SuiteRun, tasks: list[Task], heads: Tensor, nearest: Nearest, spread: float, bootstrap: PairedBootstrap
) -> dict[str, Any]:
    accuracy = [float(task_accuracy(run, head[None], task)) for head, task in zip(heads, tasks, strict=True)]
    shared = [
        shared_mistakes(run, task, head, run.zoo.weights[index])
        for head, task, index in zip(heads, tasks, nearest.indices.tolist(), strict=True)
    ]
    return {
        "accuracy": bootstrap.summary(np.array(accuracy)),
        "distance": bootstrap.summary(nearest.distances.numpy() / spread),
        "shared_mistakes": bootstrap.summary(np.array(shared)),
    }


def _against_own(run: SuiteRun, tasks: list[Task], spread: float, bootstrap: PairedBootstrap) -> dict[str, Any]:
    """On zoo tasks: how close generated heads come to the zoo's own head, against heads trained from another seed."""
    settings, zoo = run.preset.suites.memorisation, run.zoo
    own = zoo.weights[: len(tasks)]  # (M, P)
    heads = {
        method_name(sampler, steps): _generate(run, tasks, sampler, steps, 0) for sampler, steps in settings.samplers
    } | {TRAINED: _train(run, tasks, settings.seeds)}
    described = {}
    for name, rows in heads.items():
        distances = [
            float(aligned_distances(run.preset.head, row[None], target[None]))
            for row, target in zip(rows, own, strict=True)
        ]
        shared = [shared_mistakes(run, task, row, head) for task, row, head in zip(tasks, rows, own, strict=True)]
        described[name] = {
            "distance": bootstrap.summary(np.array(distances) / spread),
            "shared_mistakes": bootstrap.summary(np.array(shared)),
        }
    return described


def _diversity(
    run: SuiteRun, tasks: Sequence[Task], samples: Tensor, spread: float, bootstrap: PairedBootstrap
) -> dict[str, Any]:
    """Spread over seeds of heads (S, M, P), and the mistakes that the first two share."""
    variances = samples.var(0).mean(-1).numpy() / spread**2  # (M,)
    shared = [shared_mistakes(run, task, samples[0, i], samples[1, i]) for i, task in enumerate(tasks)]
    return {"spread": bootstrap.root_mean(variances), "shared_mistakes": bootstrap.summary(np.array(shared))}


def _plot(run: SuiteRun, result: dict[str, Any]) -> None:
    figure, panels = new_figure(2)
    for axes, kind, title in (
        (panels[0], "distance", "distance to the nearest zoo head, in zoo spreads"),
        (panels[1], "shared_mistakes", "mistakes shared with the nearest zoo head (IoU)"),
    ):
        for name, entry in result["unseen"].items():
            value, accuracy = entry[kind], 100 * entry["accuracy"]["value"]
            spread = [[abs(value["value"] - value["interval"][side])] for side in (0, 1)]
            marker = "s" if name in (TRAINED, ZOO) else ("o" if "/" in name else "^")
            axes.errorbar([value["value"]], [accuracy], xerr=spread, marker=marker, linestyle="none", label=name)
        axes.set(xlabel=title)
    panels[0].set_ylabel("top-1 accuracy on the task, %")
    panels[1].legend(fontsize="x-small")
    save_figure(figure, run.out / "memorisation")


def report(result: dict[str, Any]) -> str:
    """Markdown section: unseen tasks, zoo tasks, diversity over seeds."""
    unseen = [
        [name, percent(entry["accuracy"]), number(entry["distance"]), number(entry["shared_mistakes"])]
        for name, entry in result["unseen"].items()
    ]
    seen = [
        [name, number(entry["distance"]), number(entry["shared_mistakes"])] for name, entry in result["seen"].items()
    ]
    diversity = [
        [name, number(entry["spread"]), number(entry["shared_mistakes"])] for name, entry in result["diversity"].items()
    ]
    return (
        f"Distances are root mean squares after the best permutation of hidden units, in units of the spread of the "
        f"{result['zoo_heads']} zoo heads ({result['zoo_spread']:.4f}); shared mistakes are the intersection over "
        f'union of wrong test predictions. "{TRAINED}" heads are trained as the zoo\'s were, from other seeds.\n\n'
        f"{result['tasks']} unseen tasks, against the nearest zoo head (last row: zoo heads on their own tasks, "
        f"against the nearest other one):\n\n"
        + markdown_table(["head", "accuracy %", "distance", "shared mistakes"], unseen)
        + f"\n{result['tasks']} tasks of the zoo, against the zoo's own head of the task:\n\n"
        + markdown_table(["head", "distance", "shared mistakes"], seen)
        + f"\nHeads of one unseen task over {result['seeds']} seeds:\n\n"
        + markdown_table(["head", "spread", "shared mistakes of two"], diversity)
    )
