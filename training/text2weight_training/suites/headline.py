"""The one number: how much of the gap to a tuned oracle the generator closes on fresh class combinations.

The combinations are in neither the zoo nor its evaluation tasks, so nothing was chosen on them. The oracle's recipe is
tuned on yet other fresh combinations, once as it is and once with label smoothing and feature dropout.

What does not depend on the checkpoint, the trained heads' accuracies, is kept under `out`/headline: an interrupted
measurement goes on where it was, and another checkpoint of the same zoo is measured without training them anew.
Letters: M tasks, S seeds, P numbers in one head.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress

from text2weight_training.bootstrap import PairedBootstrap
from text2weight_training.evaluate import default_method, generate_heads
from text2weight_training.files import TrainingDataError, read_kept, write_kept
from text2weight_training.splits import draw_fresh_tasks
from text2weight_training.stacked import HeadRecipe
from text2weight_training.suites.base import (
    SuiteRun,
    Task,
    method_name,
    own_accuracy,
    plain,
    regularised,
    train_heads,
)
from text2weight_training.suites.figures import new_figure, plot_interval, save_figure
from text2weight_training.suites.tables import markdown_table, name_edges, percent
from text2weight_training.zoo import universal_head

# The fresh combinations' own random stream, apart from the zoo's tasks and the fit's.
FRESH_STREAM = 987_654
TUNING_SEED = 5
ORACLE_SEED = 100
# Between generation seeds: task i uses its seed + i.
SEED_STRIDE = 10_000
STARTS = ("universal", "base")
PLAIN, REGULARISED = "oracle", "oracle, regularised"
UNIVERSAL, REGULARISED_UNIVERSAL = "universal", "universal, regularised"


@dataclass(frozen=True)
class Training:
    """How an oracle is trained: the zoo's head that it starts from, "base" or "universal", and its recipe."""

    start: str
    recipe: HeadRecipe

    def description(self) -> dict[str, Any]:
        """What JSON can hold."""
        return {"start": self.start, "recipe": self.recipe.model_dump(mode="json")}

    def changed(self, setting: str, value: Any) -> Training:
        """The same with another value of "start" or of one of the recipe's fields."""
        if setting == "start":
            return replace(self, start=value)
        return replace(self, recipe=self.recipe.model_copy(update={setting: value}))


class Ledger:
    """Accuracies by what they are of, in a file, so that nothing is trained twice."""

    def __init__(self, path: Path, origin: dict[str, Any]) -> None:
        """Read what is there of the same origin; anything else is begun anew.

        Args:
            path: a JSON file.
            origin: what all entries depend on.
        """
        there = read_kept(path)
        self._path, self._origin = path, origin
        self._scores: dict[str, list[float]] = there["scores"] if there.get("origin") == origin else {}

    def of(self, key: dict[str, Any], measure: Callable[[], np.ndarray]) -> np.ndarray:
        """The accuracies (M,) noted for a key, measured and noted if there are none."""
        name = json.dumps(key, sort_keys=True)
        if name not in self._scores:
            self._scores[name] = [float(value) for value in measure()]
            write_kept(self._path, {"origin": self._origin, "scores": self._scores})
        return np.array(self._scores[name])


def run(run: SuiteRun) -> dict[str, Any]:
    """Measure generated heads against both universal heads and both tuned oracles.

    Returns:
        `tasks`, `tuning_tasks`, `classes_per_task`, `generation_seeds`; `floors`, the head that closes nothing, for
        each oracle; in `oracles`, for each, its tuned `start` and `recipe`, and what was `tried`; per method in
        `methods` its accuracy, that of each seed and their spread, the share of both gaps that it closes, and the
        share of tasks on which it is no worse than each oracle.

    Raises:
        TrainingDataError: too few fresh combinations, or a training diverges.
    """
    settings, preset = run.preset.suites.headline, run.preset
    tuning, tasks = draw_tasks(run)
    ledger = Ledger(run.out / "headline" / "scores.json", _origin(run, tuning, tasks))
    wanted = {
        PLAIN: (plain(preset.evaluation.oracle), settings.oracle_seeds),
        REGULARISED: (regularised(preset, preset.evaluation.oracle), settings.regularised_seeds),
    }
    oracles, scores = {}, {}
    with Progress() as progress:
        for name, (first, seeds) in wanted.items():
            bar = progress.add_task(f"{name}: trainings to tune it", total=None)
            tuned, tried = tune(run, ledger, tuning, first, partial(progress.advance, bar))
            oracles[name] = {**tuned.description(), "tried": tried}
            bar = progress.add_task(f"{name}: heads", total=seeds * len(tasks))
            scores[name] = np.stack(
                [
                    _trained(run, ledger, tasks, tuned, ORACLE_SEED + seed, partial(progress.advance, bar))
                    for seed in range(seeds)
                ]
            )
        scores |= _universals(run, ledger, tasks, progress)
        scores |= _generated(run, tasks, progress)
    result = {
        "backbone": run.data.backbone["name"],
        "classes": len(run.data.classes),
        "tasks": len(tasks),
        "tuning_tasks": len(tuning),
        "classes_per_task": [min(map(len, tasks)), max(map(len, tasks))],
        "generation_seeds": settings.generation_seeds,
        "headline": default_method(preset),
        "oracles": oracles,
        **summarise(scores, settings.bootstrap, preset.seed),
    }
    _plot(run, result)
    return result


def draw_tasks(run: SuiteRun) -> tuple[list[Task], list[Task]]:
    """Class combinations that the zoo has in none of its lists: those to tune on, and those to measure on.

    Raises:
        TrainingDataError: hardly any are left.
    """
    settings, zoo = run.preset.suites.headline, run.preset.zoo
    wanted = settings.tuning_tasks + settings.tasks
    generator = torch.Generator().manual_seed(run.preset.seed + FRESH_STREAM)
    taken = run.zoo.split.combinations
    drawn: dict[frozenset[int], Task] = {}
    for _ in range(20):
        rows = draw_fresh_tasks(run.zoo.split, len(run.data.classes), wanted, zoo.task_size, generator)
        for row in rows.tolist():
            task = tuple(label for label in row if label >= 0)
            if frozenset(task) not in taken:
                drawn.setdefault(frozenset(task), task)
        if len(drawn) >= wanted:
            tasks = list(drawn.values())[:wanted]
            return tasks[: settings.tuning_tasks], tasks[settings.tuning_tasks :]
    raise TrainingDataError(
        f"suites.headline.tasks + tuning_tasks is {wanted}: only {len(drawn)} class combinations were found that are "
        "no tasks of the zoo; lower one of them"
    )


def _origin(run: SuiteRun, tuning: list[Task], tasks: list[Task]) -> dict[str, Any]:
    """What the trained heads' accuracies depend on, but for their recipes."""
    zoo, drawn = (
        hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        for content in (run.zoo.manifest, [tuning, tasks])
    )
    preset = run.preset
    return {"data": run.data.fingerprint, "zoo": zoo, "tasks": drawn, "seed": preset.seed, "stack": preset.zoo.stack}


def tune(
    run: SuiteRun, ledger: Ledger, tasks: list[Task], first: HeadRecipe, on_trained: Callable[[], None]
) -> tuple[Training, list[dict[str, Any]]]:
    """Search for the training with the best mean test accuracy on the tuning tasks.

    One setting after another takes the best of all its values, until changing any single one is no gain.

    Args:
        run: the measurement; `suites.headline` has the values.
        ledger: keeps what was measured.
        tasks: M tuning tasks.
        first: recipe to begin with, from the universal head.
        on_trained: called after each training.

    Returns:
        the best training, and all that were tried with their accuracy.
    """
    settings = run.preset.suites.headline
    grid = {
        "start": STARTS,
        "learning_rate": settings.learning_rates,
        "weight_decay": settings.weight_decays,
        "steps": settings.steps,
    }
    tried: dict[str, dict[str, Any]] = {}

    def score(training: Training) -> float:
        described = training.description()
        name = json.dumps(described)
        if name not in tried:
            accuracy = float(_trained(run, ledger, tasks, training, TUNING_SEED).mean())
            tried[name] = {**described, "accuracy": accuracy}
            on_trained()
        return float(tried[name]["accuracy"])

    best, before = Training("universal", first), None
    while best != before:
        before = best
        for setting, values in grid.items():
            # The first of equals, so that a change has to be a gain.
            best = max([best, *(best.changed(setting, value) for value in values)], key=score)
    return best, list(tried.values())


def _trained(
    run: SuiteRun,
    ledger: Ledger,
    tasks: list[Task],
    training: Training,
    seed: int,
    on_stack: Callable[[int], None] | None = None,
) -> np.ndarray:
    """Accuracies (M,) of heads trained on the tasks' own data."""

    def measure() -> np.ndarray:
        start = run.zoo.base if training.start == "base" else run.zoo.universal
        heads = train_heads(run, tasks, training.recipe, run.preset.seed + seed, start, on_stack=on_stack)
        return own_accuracy(run, tasks, heads)

    return ledger.of({**training.description(), "seed": seed, "tasks": len(tasks)}, measure)


def _universals(run: SuiteRun, ledger: Ledger, tasks: list[Task], progress: Progress) -> dict[str, np.ndarray]:
    """Accuracies (1, M) of the zoo's universal head, and of one trained with the regularisers."""
    recipe = regularised(run.preset, run.preset.zoo.universal)
    bar = progress.add_task(REGULARISED_UNIVERSAL, total=recipe.steps)

    def measure() -> np.ndarray:
        head = universal_head(run.data, run.zoo.split, run.preset, recipe, partial(progress.advance, bar))
        return own_accuracy(run, tasks, head.expand(len(tasks), -1))

    return {
        UNIVERSAL: own_accuracy(run, tasks, run.zoo.universal.expand(len(tasks), -1))[None],
        REGULARISED_UNIVERSAL: ledger.of({"universal": recipe.model_dump(mode="json")}, measure)[None],
    }


def _generated(run: SuiteRun, tasks: list[Task], progress: Progress) -> dict[str, np.ndarray]:
    """Accuracies (S, M) by sampler."""
    settings, preset = run.preset.suites.headline, run.preset
    seeds = [preset.seed + SEED_STRIDE * number for number in range(settings.generation_seeds)]
    pairs = list(dict.fromkeys([(preset.sampler, preset.steps), *settings.samplers]))
    bar = progress.add_task("generating", total=len(pairs) * len(seeds))
    made: dict[str, np.ndarray] = {}
    for sampler, steps in pairs:
        rows = []
        for seed in seeds:
            heads = generate_heads(run.generator, run.data, tasks, sampler, steps, seed)  # (M, P)
            rows.append(own_accuracy(run, tasks, heads))
            progress.advance(bar)
        made[f"generated/{method_name(sampler, steps)}"] = np.stack(rows)
    return made


def summarise(scores: dict[str, np.ndarray], resamples: int, seed: int) -> dict[str, Any]:
    """Means and intervals over tasks, shares of both gaps, and spreads over seeds.

    Args:
        scores: per method accuracies (S, M), among them both oracles and both universal heads.
        resamples: bootstrap resamples; the same tasks are drawn for all methods.
        seed: of the resampling.

    Returns:
        `floors`, by oracle the head that closes nothing of its gap: for the regularised one the better universal head;
        and `methods`.
    """
    means = {name: values.mean(0) for name, values in scores.items()}  # (M,) each
    bootstrap = PairedBootstrap(len(means[PLAIN]), resamples, seed)
    best = max((UNIVERSAL, REGULARISED_UNIVERSAL), key=lambda name: float(means[name].mean()))
    floors = {PLAIN: UNIVERSAL, REGULARISED: best}
    methods = {
        name: {
            "accuracy": bootstrap.summary(means[name]),
            "accuracy_of_seeds": values.mean(1).tolist(),
            # Within a task, averaged over tasks; one seed has no spread.
            "spread_within_task": float(values.std(0, ddof=1).mean()) if len(values) > 1 else None,
            "gap_closed": {
                oracle: bootstrap.gap_closed(means[name], means[floor], means[oracle])
                for oracle, floor in floors.items()
            },
            "no_worse_than": {oracle: float((means[name] >= means[oracle]).mean()) for oracle in floors},
        }
        for name, values in scores.items()
    }
    return {"floors": floors, "methods": methods}


def _plot(run: SuiteRun, result: dict[str, Any]) -> None:
    figure, (axes,) = new_figure()
    names = _worst_to_best(result)
    for row, name in enumerate(names):
        colour = "tab:orange" if name.startswith("generated/") else "tab:blue"
        plot_interval(axes, row, result["methods"][name]["accuracy"], color=colour)
    axes.set_yticks(range(len(names)), names, fontsize="small")
    axes.set(xlabel="top-1 accuracy on fresh class combinations, %")
    save_figure(figure, run.out / "headline")


def _worst_to_best(result: dict[str, Any]) -> list[str]:
    methods = result["methods"]
    return sorted(methods, key=lambda name: float(methods[name]["accuracy"]["value"]))


def report(result: dict[str, Any]) -> str:
    """Markdown section: accuracies and both gaps, then how the oracles were tuned."""
    rows = []
    for name in _worst_to_best(result):
        entry = result["methods"][name]
        rows.append(
            [
                f"**{name}**" if name == result["headline"] else name,
                percent(entry["accuracy"]),
                ", ".join(f"{100 * value:.2f}" for value in entry["accuracy_of_seeds"]),
                "" if entry["spread_within_task"] is None else f"{100 * entry['spread_within_task']:.2f}",
                *(_share(entry["gap_closed"][oracle]) for oracle in result["floors"]),
                *(f"{100 * entry['no_worse_than'][oracle]:.0f}" for oracle in result["floors"]),
            ]
        )
    gaps = "; ".join(f"from {floor} to {oracle}" for oracle, floor in result["floors"].items())
    least, greatest = result["classes_per_task"]
    headings = ["head", "accuracy %", "of each seed %", "spread within a task"]
    headings += [f"gap to {name} closed %" for name in result["floors"]]
    headings += [f"no worse than {name}, % of tasks" for name in result["floors"]]
    tuned = [_describe_oracle(name, entry, result["tuning_tasks"]) for name, entry in result["oracles"].items()]
    return (
        "\n\n".join(
            [
                f"{result['tasks']} fresh combinations of {least} to {greatest} of {result['classes']} classes, "
                "tasks of neither the zoo nor its evaluation; "
                f"{result['generation_seeds']} generation seed(s). Gaps: {gaps}.",
                markdown_table(headings, rows),
                *tuned,
            ]
        )
        + "\n"
    )


def _share(entry: dict[str, Any]) -> str:
    if entry["value"] is None:
        return ""
    if entry["interval"] is None:
        return f"{100 * entry['value']:.1f}"
    low, high = entry["interval"]
    return f"{100 * entry['value']:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def _describe_oracle(name: str, entry: dict[str, Any], tuning_tasks: int) -> str:
    recipe, tried = entry["recipe"], entry["tried"]
    best = max(attempt["accuracy"] for attempt in tried)
    grid = {key: [attempt["recipe"][key] for attempt in tried] for key in ("learning_rate", "weight_decay", "steps")}
    return (
        f"{name}, the best of {len(tried)} settings by test accuracy on {tuning_tasks} other fresh combinations "
        f"({100 * best:.2f} % there): from the {entry['start']} head, {recipe['steps']} steps, learning rate "
        f"{recipe['learning_rate']:g}, weight decay {recipe['weight_decay']:g}, label smoothing "
        f"{recipe.get('label_smoothing', 0):g}, feature dropout {recipe.get('feature_dropout', 0):g}."
        + name_edges(recipe, grid)
    )
