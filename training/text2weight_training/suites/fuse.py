"""One head for two tasks, after T2W's Table 3 (arXiv 2508.13633).

A head generated for the classes of both tasks against heads merged from one head per task. Merged are heads
trained on the tasks ("trained") and heads generated for them ("generated"); both start at the universal head, which
is what task arithmetic and TIES measure deviations from. Letters: M pairs, J heads, K classes of a pair, N features,
n heads to merge (2), P numbers in one head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from text2weight.merging import average, git_rebasin, task_arithmetic, ties
from text2weight_training.bootstrap import PairedBootstrap
from text2weight_training.evaluate import generate_heads
from text2weight_training.files import TrainingDataError
from text2weight_training.suites.base import (
    SuiteRun,
    Task,
    method_name,
    regularised,
    task_accuracy,
    task_logits,
    train_heads,
)
from text2weight_training.suites.figures import new_figure, plot_interval, save_figure
from text2weight_training.suites.regmean import layer_grams, regmean
from text2weight_training.suites.tables import mark_edge, markdown_table, percent, points

SCORES = ("joint", "first", "second")
ENSEMBLE = "logit ensemble"


@dataclass(frozen=True)
class Pair:
    """Two disjoint tasks; all their classes together are the joint task."""

    first: Task
    second: Task

    @property
    def joint(self) -> Task:
        """All classes, the first task's before the second's."""
        return self.first + self.second


def run(run: SuiteRun) -> dict[str, Any]:
    """Measure every way of making one head for two tasks, paired by pair of tasks.

    Returns:
        `pairs`, `task_size`; `scales`, the factors that task arithmetic and TIES chose, and `tried`, those they chose
        from; per method in `methods` the accuracy on the `joint` label set and on each part among its own labels
        (`first`, `second`), and `gain`, the joint accuracy of the generated union's head (first sampler) less the
        method's.

    Raises:
        TrainingDataError: too few classes for disjoint tasks, or fewer pairs of new tasks than asked for.
    """
    settings, preset = run.preset.suites.fuse, run.preset
    pairs = draw_pairs(run, settings.pairs, settings.task_size)
    recipe = regularised(preset, preset.evaluation.oracle)
    trained = {part: train_heads(run, [getattr(pair, part) for pair in pairs], recipe, preset.seed) for part in SCORES}
    sampler, steps = settings.samplers[0]
    made = {part: _generate(run, [getattr(pair, part) for pair in pairs], sampler, steps) for part in SCORES}
    union = _union_name(sampler, steps)
    heads = {"universal": run.zoo.universal.expand(len(pairs), -1), union: made["joint"]}
    for other, calls in settings.samplers[1:]:
        heads[_union_name(other, calls)] = _generate(run, [pair.joint for pair in pairs], other, calls)
    heads["trained/union"] = trained["joint"]
    scales: dict[str, dict[str, float]] = {}
    scores: dict[str, np.ndarray] = {}
    for source, parts in (("generated", made), ("trained", trained)):
        two = torch.stack([parts["first"], parts["second"]], dim=1)  # (M, 2, P)
        merged, scales[source] = merge_all(run, pairs, two)
        heads |= {f"{source}/{name}": rows for name, rows in merged.items()}
        scores[f"{source}/{ENSEMBLE}"] = np.stack(
            [_score_ensemble(run, pair, row) for pair, row in zip(pairs, two, strict=True)]
        )  # (M, 3)
    scores |= _score(run, pairs, heads)
    bootstrap = PairedBootstrap(len(pairs), settings.bootstrap, preset.seed)
    methods = {
        name: {score: bootstrap.summary(values[:, i]) for i, score in enumerate(SCORES)}
        | {"gain": bootstrap.summary(scores[union][:, 0] - values[:, 0])}
        for name, values in scores.items()
    }
    result = {
        "pairs": len(pairs),
        "task_size": settings.task_size,
        "headline": union,
        "scales": scales,
        "tried": list(settings.scales),
        "methods": dict(sorted(methods.items(), key=lambda item: float(item[1]["joint"]["value"]))),
    }
    _plot(run, result)
    return result


def draw_pairs(run: SuiteRun, count: int, size: int) -> list[Pair]:
    """Draw pairs of disjoint tasks; neither they nor their unions are tasks of the zoo, to train on or to evaluate.

    Raises:
        TrainingDataError: too few classes, or too few such pairs.
    """
    classes = len(run.data.classes)
    if 2 * size > classes:
        raise TrainingDataError(
            f"suites.fuse.task_size is {size}: two disjoint tasks need {2 * size} classes, the data has {classes}"
        )
    generator = torch.Generator().manual_seed(run.preset.seed)
    taken = run.zoo.split.combinations
    pairs: dict[frozenset[frozenset[int]], Pair] = {}
    for _ in range(20 * count):
        if len(pairs) == count:
            break
        order = torch.randperm(classes, generator=generator).tolist()
        pair = Pair(tuple(order[:size]), tuple(order[size : 2 * size]))
        parts = [frozenset(pair.first), frozenset(pair.second)]
        if not taken & {*parts, frozenset(pair.joint)}:
            pairs.setdefault(frozenset(parts), pair)
    if len(pairs) < count:
        raise TrainingDataError(
            f"suites.fuse.pairs is {count}: only {len(pairs)} pairs of disjoint tasks of {size} of {classes} classes "
            f"were found that are no tasks of the zoo; ask for fewer"
        )
    return list(pairs.values())


def _union_name(sampler: str, steps: int) -> str:
    return f"generated/union ({method_name(sampler, steps)})"


def _generate(run: SuiteRun, tasks: list[Task], sampler: str, steps: int) -> Tensor:
    return generate_heads(run.generator, run.data, tasks, sampler, steps, run.preset.seed)  # (M, P)


def merge_all(run: SuiteRun, pairs: list[Pair], two: Tensor) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Merge the two heads of each pair by every rule.

    Args:
        run: the measurement.
        pairs: M pairs.
        two: (M, 2, P) a head for each part.

    Returns:
        per rule (M, P), and the factors that task arithmetic and TIES chose on training features.
    """
    spec, base, settings = run.preset.head, run.zoo.universal, run.preset.suites.fuse
    merged = {
        "first alone": two[:, 0],
        "second alone": two[:, 1],
        "average": torch.stack([average(heads) for heads in two]),
        "git re-basin": torch.stack([git_rebasin(spec, heads) for heads in two]),
        "regmean": torch.stack([_regmean(run, pair, heads) for pair, heads in zip(pairs, two, strict=True)]),
    }
    rules: dict[str, Callable[[Tensor, float], Tensor]] = {
        "task arithmetic": lambda heads, scale: task_arithmetic(base, heads, scale),
        "ties": lambda heads, scale: ties(base, heads, settings.density, scale),
    }
    chosen = {}
    for name, rule in rules.items():
        by_scale = torch.stack(
            [torch.stack([rule(heads, scale) for heads in two]) for scale in settings.scales]
        )  # (J, M, P)
        best = _best_scale(run, pairs, by_scale)
        merged[name], chosen[name] = by_scale[best], settings.scales[best]
    return merged, chosen


def _best_scale(run: SuiteRun, pairs: list[Pair], heads: Tensor) -> int:
    """Which of J variants (J, M, P) classifies training features of the joint tasks best, over all pairs."""
    generator = torch.Generator().manual_seed(run.preset.seed + 1)
    hits = torch.zeros(len(heads))
    for i, pair in enumerate(pairs):
        labels = torch.tensor([pair.joint])  # (1, K)
        features, targets = run.data.train.sample(labels, run.preset.suites.fuse.selection_samples, generator)
        predicted = task_logits(run, heads[:, i], pair.joint, features[0]).argmax(-1)  # (J, N)
        hits += (predicted == targets[0]).float().mean(-1)
    return int(hits.argmax())


def _regmean(run: SuiteRun, pair: Pair, heads: Tensor) -> Tensor:
    spec = run.preset.head
    grams = [
        layer_grams(spec, head, run.data.train.of_task(task)[0])
        for head, task in zip(heads, (pair.first, pair.second), strict=True)
    ]
    return regmean(spec, heads, grams, run.preset.suites.fuse.regmean_decay)


def _score(run: SuiteRun, pairs: list[Pair], heads: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """Accuracy of every method's heads (M, P) on each pair: joint, first, second, (M, 3)."""
    rows = []
    for i, pair in enumerate(pairs):
        stack = torch.stack([methods[i] for methods in heads.values()])  # (J, P)
        rows.append(torch.stack([task_accuracy(run, stack, getattr(pair, score)) for score in SCORES]))  # (3, J)
    table = torch.stack(rows).permute(2, 0, 1).numpy()  # (J, M, 3)
    return dict(zip(heads, table, strict=True))


def _score_ensemble(run: SuiteRun, pair: Pair, heads: Tensor) -> np.ndarray:
    """Accuracy of the mean of two heads' (2, P) logits: joint, first, second, (3,)."""
    scores = []
    for score in SCORES:
        task: Task = getattr(pair, score)
        features, targets = run.data.test.of_task(task)  # (N, d), (N,)
        predicted = task_logits(run, heads, task, features).mean(0).argmax(-1)  # (N,)
        scores.append(float((predicted == targets).float().mean()))
    return np.array(scores)


def _plot(run: SuiteRun, result: dict[str, Any]) -> None:
    figure, (axes,) = new_figure()
    names = list(result["methods"])
    for row, name in enumerate(names):
        entry = result["methods"][name]["joint"]
        colour = "tab:orange" if name == result["headline"] else "tab:blue"
        plot_interval(axes, row, entry, color=colour)
    axes.set_yticks(range(len(names)), names, fontsize="small")
    axes.set(xlabel="top-1 accuracy on the joint label set, %")
    save_figure(figure, run.out / "fuse")


def report(result: dict[str, Any]) -> str:
    """Markdown section: joint accuracy and accuracy on the parts, methods from worst to best."""
    rows = [
        [
            f"**{name}**" if name == result["headline"] else name,
            *(percent(entry[score]) for score in SCORES),
            "" if name == result["headline"] else points(entry["gain"]),
        ]
        for name, entry in result["methods"].items()
    ]
    tried = result.get("tried", [])  # older result files do not hold them
    chosen = "; ".join(
        f"{source} heads: " + ", ".join(f"{name} {mark_edge(scale, tried)}" for name, scale in scales.items())
        for source, scales in result["scales"].items()
    )
    note = f" (of {min(tried):g} to {max(tried):g}; * marks one at the edge)" if tried else ""
    headings = ["head", "joint", "first part", "second part", "gain of the generated union"]
    return (
        f"{result['pairs']} pairs of disjoint tasks of {result['task_size']} classes. Accuracy in % on the joint "
        f"label set, and on each part among its own labels. Merged are heads trained on the two tasks (trained/) and "
        f"heads generated for them (generated/). Factors chosen on training features{note}, {chosen}.\n\n"
        + markdown_table(headings, rows)
    )
