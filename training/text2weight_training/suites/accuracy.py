"""The suite `accuracy`, Table 1 of T2W (arXiv 2508.13633): every baseline on every split the zoo has.

Letters: M tasks, S oracle seeds, P numbers in one head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress
from torch import Tensor

from text2weight.weight_space import WeightSpace
from text2weight_training.baselines import (
    Predictor,
    accuracies,
    neighbour_average_heads,
    oracle_heads,
    overlapping_heads,
    restricted_universal_head,
    weight_error,
)
from text2weight_training.bootstrap import PairedBootstrap
from text2weight_training.evaluate import baseline_heads, default_method, generate_heads
from text2weight_training.feature_classifiers import (
    prototype_scores,
    ridge_scores,
    zero_shot_obstacle,
    zero_shot_scores,
)
from text2weight_training.files import TrainingDataError
from text2weight_training.hypernetwork import TrainedHypernetwork, train_hypernetwork
from text2weight_training.suites.base import SuiteRun, plain, regularised, train_heads
from text2weight_training.suites.figures import new_figure, save_figure
from text2weight_training.suites.tables import markdown_table, name_edges
from text2weight_training.tasks import TaskSplit
from text2weight_training.zoo import universal_head

Tasks = list[tuple[int, ...]]

# Attributes of a TaskSplit, and how a reader knows them.
SPLITS = {
    "seen": "seen combinations",
    "unseen": "unseen combinations",
    "held_out_pairs": "held-out pairs",
    "mixed_classes": "half held-out classes",
    "held_out_classes": "held-out classes",
}
REGULARISED = "universal, regularised"
RESTRICTED = "universal, trained on tasks"
RESTRICTED_REGULARISED = "universal, trained on tasks, regularised"
UNIVERSALS = ("universal", RESTRICTED, REGULARISED, RESTRICTED_REGULARISED)
# By start and recipe.
PLAIN_ORACLES = ("base", "universal")
ORACLES = (*PLAIN_ORACLES, REGULARISED)
ZERO_SHOT = "CLIP zero-shot"


@dataclass(frozen=True)
class Trained:
    """Baselines that are trained once and serve every split.

    Attributes:
        space: standardises weights for their errors.
        universals: the `UNIVERSALS`, (P,) each.
        hypernetwork: see `TrainedHypernetwork`.
    """

    space: WeightSpace
    universals: dict[str, Tensor]
    hypernetwork: TrainedHypernetwork


def run(run: SuiteRun) -> dict[str, Any]:
    """Measure every method on the tasks of every split.

    Args:
        run: what to measure; `preset.suites.accuracy` and `preset.evaluation` hold the settings.

    Returns:
        a JSON-serialisable dict: `splits`, one entry for each with `methods` (accuracy, its interval, share of the
        gap closed, weight error), and what `report` needs beside it.

    Raises:
        TrainingDataError: a baseline's training diverges, or a task needs more classes than there are.
    """
    settings = run.preset.suites.accuracy
    tasks = {name: list(getattr(run.zoo.split, name)[: settings.tasks]) for name in SPLITS}
    tasks = {name: chosen for name, chosen in tasks.items() if chosen}
    _check_tasks(run, tasks)
    with Progress() as progress:
        trained = _train_baselines(run, progress)
        splits = {name: _measure_split(run, trained, name, chosen, progress) for name, chosen in tasks.items()}
    obstacle, outside = zero_shot_obstacle(run.data), run.generator.config.outside
    result = {
        "backbone": run.data.backbone["name"],
        "classes": len(run.data.classes),
        "held_out": {"classes": len(run.zoo.split.held_out.classes), "pairs": len(run.zoo.split.held_out.pairs)},
        "headline": default_method(run.preset),
        "oracle_seeds": settings.oracle_seeds,
        "hypernetwork": trained.hypernetwork.chosen,
        "outside": None if outside is None else outside.model_dump(),
        "not_applicable": {} if obstacle is None else {ZERO_SHOT: obstacle},
        "splits": splits,
    }
    plot_splits(result, run.out / "accuracy")
    return result


def _check_tasks(run: SuiteRun, tasks: dict[str, Tasks]) -> None:
    for name in ("seen", "unseen"):
        if name not in tasks:
            raise TrainingDataError(f"the zoo has no {name} tasks: build one with more zoo.tasks")
    known = len(run.data.classes)
    for name, chosen in tasks.items():
        beyond = [task for task in chosen if max(task) >= known or len(task) > known]
        if beyond:
            raise TrainingDataError(
                f"{name} task {list(beyond[0])} does not fit the data's {known} classes: give the zoo's own features"
            )


def _train_baselines(run: SuiteRun, progress: Progress) -> Trained:
    settings, preset = run.preset.suites.accuracy, run.preset
    space = WeightSpace.fit(preset.head, run.zoo.universal, run.zoo.weights)
    bar = progress.add_task("hypernetwork", total=settings.hypernetwork.total_steps)
    hypernetwork = train_hypernetwork(
        run.data,
        run.zoo,
        space,
        run.generator.denoiser_parameters,
        settings.hypernetwork,
        preset.seed,
        partial(progress.advance, bar),
    )
    return Trained(space, _universal_heads(run, progress), hypernetwork)


def _universal_heads(run: SuiteRun, progress: Progress) -> dict[str, Tensor]:
    """The `UNIVERSALS`: as the zoo has it and regularised, each also with further steps on tasks."""
    preset, split = run.preset, run.zoo.split
    recipe, further = preset.zoo.universal, preset.suites.accuracy.restricted_universal
    smoothed, further_smoothed = regularised(preset, recipe), regularised(preset, further)
    bar = progress.add_task("universal heads", total=smoothed.steps + 2 * further.steps)
    on_step = partial(progress.advance, bar)
    given, smooth = run.zoo.universal, universal_head(run.data, split, preset, smoothed, on_step)
    return {
        "universal": given,
        RESTRICTED: restricted_universal_head(run.data, split, preset, given, further, on_step),
        REGULARISED: smooth,
        RESTRICTED_REGULARISED: restricted_universal_head(run.data, split, preset, smooth, further_smoothed, on_step),
    }


def _measure_split(run: SuiteRun, trained: Trained, name: str, tasks: Tasks, progress: Progress) -> dict[str, Any]:
    data, preset = run.data, run.preset
    neighbours, k = neighbour_average_heads(data, run.zoo, tasks, preset.head)
    heads = baseline_heads(data, run.zoo, tasks) | {
        "nearest zoo head by classes": overlapping_heads(data, run.zoo, tasks),
        "average of nearest zoo heads": neighbours,
        **trained.universals,
        "MLP hypernetwork": trained.hypernetwork.heads(tasks),
    }
    bar = progress.add_task(f"{name}: generating", total=len(preset.evaluation.samplers))
    for sampler, steps in preset.evaluation.samplers:
        heads[f"generated/{sampler}/{steps}"] = generate_heads(run.generator, data, tasks, sampler, steps)
        progress.advance(bar)
    oracles = _oracles(run, name, tasks, progress)
    by_seed = {_oracle_name(start, s): made for start, seeds in oracles.items() for s, made in enumerate(seeds)}
    every = accuracies(data, preset.head, tasks, {**heads, **predictors(run), **by_seed})
    seeds = preset.suites.accuracy.oracle_seeds
    oracle = _best_oracle(every, seeds, ORACLES)
    unregularised = _best_oracle(every, seeds, PLAIN_ORACLES)
    scores = {method: values for method, values in every.items() if method not in by_seed}
    scores |= {"chance": np.array([1 / len(task) for task in tasks]), "oracle": oracle.pop("scores")}
    scores["oracle without regularising"] = unregularised["scores"]
    targets = oracles["universal"][0]  # (M, P)
    errors: dict[str, float | None] = {
        method: weight_error(trained.space, weights, targets) for method, weights in heads.items()
    }
    errors |= {
        "oracle": _oracle_error(trained.space, oracles, oracle["start"]),
        "oracle without regularising": _oracle_error(trained.space, oracles, unregularised["start"]),
    }
    if len(oracles["universal"]) > 1:
        oracle["weight_error_of_another_seed"] = weight_error(trained.space, oracles["universal"][1], targets)
    return {
        "tasks": len(tasks),
        "classes_per_task": [min(map(len, tasks)), max(map(len, tasks))],
        "held_out_pairs_per_task": _held_out_pairs_per_task(run.zoo.split, tasks),
        "neighbours": k,
        "oracle": oracle,
        **summarise_split(scores, errors, preset.suites.accuracy.bootstrap, preset.seed),
    }


def predictors(run: SuiteRun) -> dict[str, Predictor]:
    """The classifiers that are no heads and apply to these features."""
    made: dict[str, Predictor] = {
        "class prototypes (uses data)": partial(prototype_scores, run.data),
        "ridge classifier (uses data)": partial(ridge_scores, run.data),
    }
    if zero_shot_obstacle(run.data) is None:
        made[ZERO_SHOT] = partial(zero_shot_scores, run.data)
    return made


def _oracles(run: SuiteRun, name: str, tasks: Tasks, progress: Progress) -> dict[str, list[Tensor]]:
    """For each of `ORACLES` S tensors (M, P), one for each seed."""
    preset, seeds = run.preset, run.preset.suites.accuracy.oracle_seeds
    bar = progress.add_task(f"{name}: oracle heads", total=seeds * len(ORACLES) * len(tasks))
    by_seed = []
    for seed in range(preset.seed + 77, preset.seed + 77 + 1_000_003 * seeds, 1_000_003):
        heads = oracle_heads(
            run.data,
            run.zoo,
            tasks,
            preset.head,
            preset.logit_scale,
            plain(preset.evaluation.oracle),
            preset.zoo.stack,
            seed,
            partial(progress.advance, bar),
        )
        heads[REGULARISED] = train_heads(run, tasks, regularised(preset, preset.evaluation.oracle), seed)
        progress.advance(bar, len(tasks))
        by_seed.append(heads)
    return {start: [heads[start] for heads in by_seed] for start in ORACLES}


def _oracle_name(start: str, seed: int) -> str:
    return f"oracle from {start}, seed {seed}"


def _best_oracle(scores: dict[str, np.ndarray], seeds: int, oracles: Sequence[str]) -> dict[str, Any]:
    """The one of `oracles` with the best mean accuracy over tasks and seeds, and how far its seeds differ."""
    by_start = {
        start: np.stack([scores[_oracle_name(start, seed)] for seed in range(seeds)]) for start in oracles
    }  # (S, M)
    start = max(by_start, key=lambda name: float(by_start[name].mean()))
    values = by_start[start]
    return {
        "scores": values.mean(0),  # (M,)
        "start": start,
        "accuracy_of_seeds": [float(value) for value in values.mean(1)],
        # Within a task, averaged over tasks; one seed has no spread.
        "spread_within_task": float(values.std(0, ddof=1).mean()) if seeds > 1 else None,
    }


def _oracle_error(space: WeightSpace, oracles: dict[str, list[Tensor]], start: str) -> float | None:
    """Mean over seeds of the weight error of one of `ORACLES`; none where its heads are those that errors are to."""
    targets = oracles["universal"][0]  # (M, P)
    errors = [weight_error(space, heads, targets) for heads in oracles[start] if heads is not targets]
    return float(np.mean(errors)) if errors else None


def _held_out_pairs_per_task(split: TaskSplit, tasks: Tasks) -> float:
    counts = [sum(one in task and other in task for one, other in split.held_out.pairs) for task in map(set, tasks)]
    return float(np.mean(counts))


def summarise_split(
    scores: dict[str, np.ndarray], errors: dict[str, float | None], resamples: int, seed: int
) -> dict[str, Any]:
    """Means, intervals and shares of the gap between the best universal head and the oracle.

    Args:
        scores: per method the accuracy on each of M tasks, among them the `UNIVERSALS` and "oracle".
        errors: per method that makes weights, the standardised squared error to the oracle's.
        resamples: bootstrap resamples; the same tasks are drawn for all methods.
        seed: of the resampling.

    Returns:
        `universal` (name of the best one) and `methods`.
    """
    bootstrap = PairedBootstrap(len(scores["oracle"]), resamples, seed)
    universal = max(UNIVERSALS, key=lambda name: float(scores[name].mean()))
    methods: dict[str, Any] = {}
    for name, values in scores.items():
        summary = bootstrap.summary(values)
        methods[name] = {
            "accuracy": summary["value"],
            "interval": summary["interval"],
            "gap_closed": bootstrap.gap_closed(values, scores[universal], scores["oracle"]),
            "weight_error": errors.get(name),
        }
    return {"universal": universal, "methods": methods}


def report(result: dict[str, Any]) -> str:
    """Markdown: one table of all splits, then one of each with intervals, gap closed and weight error."""
    splits = {SPLITS[name]: entry for name, entry in result["splits"].items()}
    first = next(iter(splits.values()))["methods"]
    order = sorted(first, key=lambda name: float(splits[SPLITS["unseen"]]["methods"][name]["accuracy"]))
    rows = [
        [_emphasised(name, result), *(_percent(entry["methods"][name]["accuracy"]) for entry in splits.values())]
        for name in order
    ]
    parts = [
        f"{result['classes']} classes, features of {result['backbone']}; {result['held_out']['classes']} classes and "
        f"{result['held_out']['pairs']} class pairs held out. Accuracy in %; {result['oracle_seeds']} oracle seeds.",
        markdown_table(["head", *splits], rows),
    ]
    parts.append(_describe_hypernetwork(result["hypernetwork"]))
    if result.get("outside"):
        parts.append(
            "For names that training never saw, generated heads read mixtures of known names (temperature "
            f"{result['outside']['temperature']:g}) and go {result['outside']['reach']:g} of the way from the zoo's "
            "universal head."
        )
    parts += [f"{name} does not apply: {reason}." for name, reason in result["not_applicable"].items()]
    for title, entry in splits.items():
        parts += [f"### {title.capitalize()}", _describe_split(entry), _split_table(entry, result)]
    parts.append(
        "Gap closed is (method - best universal head) / (oracle - best universal head); both ends count with label "
        "smoothing and feature dropout where these help. Weight error is the mean "
        "squared difference, in standardised numbers, to a head trained on the task's data from the universal head, "
        "without regularisers, the first seed; an oracle's own is the mean over its seeds but for that one. "
        "Intervals are 95 % bootstrap intervals over tasks, paired."
    )
    return "\n\n".join(parts) + "\n"


def _describe_hypernetwork(chosen: dict[str, Any]) -> str:
    # Older result files hold neither its steps nor what was tried.
    steps = f"{chosen['steps']} steps, " if "steps" in chosen else ""
    return (
        f"The MLP hypernetwork, of a grid and by its error on a tenth of the zoo: width {chosen['width']}, {steps}"
        f"learning rate {chosen['learning_rate']:g}, weight decay {chosen['weight_decay']:g}."
        + name_edges(chosen, chosen.get("tried", {}))
    )


def _describe_split(entry: dict[str, Any]) -> str:
    least, greatest = entry["classes_per_task"]
    oracle = entry["oracle"]
    text = f"{entry['tasks']} tasks of {least} to {greatest} classes"
    if entry["held_out_pairs_per_task"]:
        text += f", {entry['held_out_pairs_per_task']:.1f} held-out pairs each on average"
    text += f". Best universal head: {entry['universal']}. Best oracle: from {oracle['start']}"
    if oracle["spread_within_task"] is not None:
        low, high = min(oracle["accuracy_of_seeds"]), max(oracle["accuracy_of_seeds"])
        text += (
            f", {_percent(low)} to {_percent(high)} over seeds, standard deviation within a task "
            f"{_percent(oracle['spread_within_task'])}; weight error of another seed "
            f"{oracle['weight_error_of_another_seed']:.3f}"
        )
    return f"{text}. Nearest zoo heads averaged: {entry['neighbours']}."


def _split_table(entry: dict[str, Any], result: dict[str, Any]) -> str:
    rows = []
    for name, row in sorted(entry["methods"].items(), key=lambda item: float(item[1]["accuracy"])):
        closed, error = row["gap_closed"], row["weight_error"]
        rows.append(
            [
                _emphasised(name, result),
                _percent(row["accuracy"]),
                _range(row["interval"]),
                "" if closed["value"] is None else f"{100 * closed['value']:.1f}",
                "" if closed["interval"] is None else _range(closed["interval"], 1),
                "" if error is None else f"{error:.3f}",
            ]
        )
    return markdown_table(
        ["head", "accuracy %", "95 % interval", "gap closed %", "95 % interval", "weight error"], rows
    )


def _emphasised(name: str, result: dict[str, Any]) -> str:
    return f"**{name}**" if name == result["headline"] else name


def _percent(value: float) -> str:
    return f"{100 * value:.2f}"


def _range(bounds: list[float], digits: int = 2) -> str:
    return f"{100 * bounds[0]:.{digits}f} to {100 * bounds[1]:.{digits}f}"


def plot_splits(result: dict[str, Any], stem: Path) -> None:
    """Draw the main methods' accuracies with intervals, split by split, to `stem`.png and `stem`.svg."""
    shown = ("universal", REGULARISED, "MLP hypernetwork", result["headline"], "oracle")
    names = list(result["splits"])
    figure, (axes,) = new_figure()
    for i, method in enumerate(shown):
        entries = [result["splits"][name]["methods"][method] for name in names]
        centres = np.array([100 * entry["accuracy"] for entry in entries])
        bounds = np.array([[100 * bound for bound in entry["interval"]] for entry in entries])  # (splits, 2)
        places = np.arange(len(names)) + 0.12 * (i - (len(shown) - 1) / 2)
        errors = np.abs(bounds.T - centres)  # (2, splits)
        axes.errorbar(places, centres, yerr=errors, fmt="o", capsize=2, label=method)
    axes.set_xticks(range(len(names)), [SPLITS[name] for name in names], rotation=15)
    axes.set(ylabel="top-1 accuracy, %")
    axes.legend(fontsize="small")
    save_figure(figure, stem)
