"""A generated head as the start of training on the task's own data, after T2W's Table 4 (arXiv 2508.13633).

Every start is trained by one recipe but for the learning rate, which is chosen for each start by itself, on tasks that
are not measured. Letters: M tasks, S seeds, T measured steps, R resamples, K classes of a task, P numbers in one head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor

from text2weight_training.baselines import nearest_heads
from text2weight_training.bootstrap import PairedBootstrap
from text2weight_training.evaluate import generate_heads
from text2weight_training.initialisation import RANDOM_STARTS, random_heads
from text2weight_training.stacked import HeadRecipe, Moments
from text2weight_training.suites.base import (
    SuiteRun,
    Task,
    method_name,
    regularised,
    take_tasks,
    task_accuracy,
    task_loss,
    train_heads,
    training_sample,
)
from text2weight_training.suites.figures import new_figure, plot_band, save_figure
from text2weight_training.suites.tables import mark_edge, markdown_table, percent, points

# Far from the seeds that other heads of the measurement are made with.
REPEAT_SEED = 100_000
# (M tasks, seed of the repeat) -> (M, P)
Start = Callable[[list[Task], int], Tensor]


@dataclass(frozen=True)
class Curves:
    """Training loss and test accuracy of M tasks, S seeds, at T steps: both (T, S, M)."""

    loss: np.ndarray
    accuracy: np.ndarray


def run(run: SuiteRun) -> dict[str, Any]:
    """Train unseen tasks' heads from every start and measure the whole way.

    Returns:
        `tasks`, `seeds`, `tuning_tasks`, `steps` (the T measured ones), `few`, `share`; `oracle`, its accuracy;
        `headline`, the first generated start; per start in `starts` the chosen `learning_rate`, `tuning` (accuracy at
        the end by learning rate), the curves `loss` and `accuracy`, `gain` (accuracy of the headline less the
        start's) `before`, after `few` steps and at the `end`, and `reaching`: see `_reaching`.

    Raises:
        TrainingDataError: the zoo has too few unseen tasks, or a training diverges.
    """
    settings = run.preset.suites.init
    count = settings.tasks + settings.tuning_tasks
    unseen = take_tasks(run.zoo.split.unseen, count, "suites.init.tasks + tuning_tasks", "unseen")
    tasks, tuning = unseen[: settings.tasks], unseen[settings.tasks :]
    oracle = _oracle(run, tasks)  # (M,)
    starts = make_starts(run)
    chosen, trained = {}, {}
    with Progress() as progress:
        bar = progress.add_task("starts", total=len(starts))
        for name, start in starts.items():
            chosen[name] = tune(run, tuning, start)
            trained[name] = train_curves(run, tasks, start, best_rate(chosen[name]), settings.seeds)
            progress.advance(bar)
    headline = next(iter(starts))
    result = {
        "tasks": len(tasks),
        "seeds": settings.seeds,
        "tuning_tasks": len(tuning),
        "steps": list(settings.steps),
        "few": settings.few,
        "share": settings.share,
        "oracle": _bootstrap(run).summary(oracle),
        "headline": headline,
        "starts": {
            name: {
                "learning_rate": best_rate(chosen[name]),
                "tuning": {f"{rate:g}": score for rate, score in chosen[name].items()},
            }
            | _describe(run, curves, trained[headline], oracle)
            for name, curves in trained.items()
        },
    }
    _plot(run, result)
    return result


def _bootstrap(run: SuiteRun) -> PairedBootstrap:
    settings = run.preset.suites.init
    return PairedBootstrap(settings.tasks, settings.bootstrap, run.preset.seed)


def _describe(run: SuiteRun, curves: Curves, lead: Curves, oracle: np.ndarray) -> dict[str, Any]:
    """Curves of a start, how far the headline's lead its own, and how soon they come up to the oracle's (M,)."""
    settings, bootstrap = run.preset.suites.init, _bootstrap(run)
    ahead = (lead.accuracy - curves.accuracy).mean(1)  # (T, M)
    places = {"before": 0, "few": settings.steps.index(settings.few), "end": -1}
    return {
        "loss": [bootstrap.summary(values) for values in curves.loss.mean(1)],
        "accuracy": [bootstrap.summary(values) for values in curves.accuracy.mean(1)],
        "gain": {place: bootstrap.summary(ahead[i]) for place, i in places.items()},
        "reaching": _reaching(curves.accuracy, settings.share * oracle, settings.steps, bootstrap),
    }


def _oracle(run: SuiteRun, tasks: list[Task]) -> np.ndarray:
    """Accuracy of heads trained from the universal head by the regularised oracle recipe, mean over seeds: (M,)."""
    seeds, recipe = run.preset.suites.init.seeds, regularised(run.preset, run.preset.evaluation.oracle)
    heads = train_heads(run, tasks * seeds, recipe, run.preset.seed + 77)  # (S M, P)
    by_seed = heads.view(seeds, len(tasks), -1)  # (S, M, P)
    return np.array([float(task_accuracy(run, by_seed[:, i], task).mean()) for i, task in enumerate(tasks)])


def make_starts(run: SuiteRun) -> dict[str, Start]:
    """Every start by name, the generated ones first; those that draw nothing are the same for all seeds."""
    data, zoo, spec = run.data, run.zoo, run.preset.head

    def generated(sampler: str, steps: int, tasks: list[Task], seed: int) -> Tensor:
        return generate_heads(run.generator, data, tasks, sampler, steps, seed)

    def drawn(rule: str, tasks: list[Task], seed: int) -> Tensor:
        return random_heads(spec, rule, range(seed, seed + len(tasks)))

    def shared(head: Tensor, tasks: list[Task], _: int) -> Tensor:
        return head.expand(len(tasks), -1)

    starts: dict[str, Start] = {
        f"generated ({method_name(sampler, steps)})": partial(generated, sampler, steps)
        for sampler, steps in run.preset.suites.init.samplers
    }
    starts |= {
        "universal": partial(shared, zoo.universal),
        "nearest zoo head": lambda tasks, _: nearest_heads(data, zoo, tasks),
        "mean head": partial(shared, zoo.weights.mean(0)),
        "base": partial(shared, zoo.base),
    }
    return starts | {rule: partial(drawn, rule) for rule in RANDOM_STARTS}


def tune(run: SuiteRun, tasks: list[Task], start: Start) -> dict[float, float]:
    """Mean test accuracy at the end of training on the tuning tasks, by learning rate."""
    settings = run.preset.suites.init
    return {
        rate: float(train_curves(run, tasks, start, rate, settings.tuning_seeds, (settings.steps[-1],)).accuracy.mean())
        for rate in settings.learning_rates
    }


def best_rate(scores: dict[float, float]) -> float:
    """The learning rate of the highest score; the lower one of equals."""
    return max(sorted(scores), key=lambda rate: scores[rate])


def train_curves(
    run: SuiteRun, tasks: list[Task], start: Start, rate: float, seeds: int, steps: Sequence[int] | None = None
) -> Curves:
    """Train all tasks from a start, with all seeds at once, and score the heads on the way.

    Every start sees the same samples of a task, seed and step.

    Args:
        run: the measurement.
        tasks: M class lists.
        start: gives each task's initial head.
        rate: learning rate.
        seeds: S.
        steps: where to score, rising, the last where training ends; without them the setting `steps`.
    """
    settings, seed = run.preset.suites.init, run.preset.seed
    steps = settings.steps if steps is None else steps
    recipe = run.preset.evaluation.oracle.model_copy(update={"learning_rate": rate, "steps": steps[-1]})
    starts = torch.cat([start(tasks, seed + REPEAT_SEED * repeat) for repeat in range(seeds)])  # (S M, P)
    heads = heads_on_the_way(run, tasks * seeds, recipe, starts, steps)  # (T, S M, P)
    by_task = heads.view(len(steps), seeds, len(tasks), -1)  # (T, S, M, P)
    loss, accuracy = [], []
    for i, task in enumerate(tasks):
        rows = by_task[:, :, i].flatten(0, 1)  # (T S, P)
        features, targets = training_sample(run, task, settings.loss_samples)
        loss.append(task_loss(run, rows, task, features, targets).view(len(steps), seeds))
        accuracy.append(task_accuracy(run, rows, task).view(len(steps), seeds))
    return Curves(torch.stack(loss, dim=-1).numpy(), torch.stack(accuracy, dim=-1).numpy())


def heads_on_the_way(
    run: SuiteRun, tasks: list[Task], recipe: HeadRecipe, starts: Tensor, steps: Sequence[int]
) -> Tensor:
    """Train heads from starts (J, P), one task each, and keep them as they are after each of T steps: (T, J, P)."""
    kept: dict[int, list[Tensor]] = {step: [] for step in steps}

    def keep(step: int, weights: Tensor, _: Moments) -> None:
        if step in kept:
            kept[step].append(weights.clone())

    train_heads(run, tasks, recipe, run.preset.seed, starts, keep)
    if 0 in kept:
        kept[0].append(starts)
    return torch.stack([torch.cat(kept[step]) for step in steps])


def steps_until(accuracy: np.ndarray, goal: np.ndarray, steps: Sequence[int]) -> np.ndarray:
    """First measured step at which accuracies (T, S, M) reach their task's goal (M,): (S, M), infinite where none."""
    reached = accuracy >= goal  # (T, S, M)
    first = np.asarray(steps, dtype=np.float64)[reached.argmax(0)]  # (S, M)
    return np.where(reached.any(0), first, math.inf)


def _reaching(
    accuracy: np.ndarray, goal: np.ndarray, steps: Sequence[int], bootstrap: PairedBootstrap
) -> dict[str, Any]:
    """How soon trainings come up to the goal.

    Returns:
        `median`, the first measured step by which half of all trainings have reached it, None where fewer than half
        ever do; `mean`, where a training that never does counts with the last step, so a lower bound; `not_reached`,
        the share of such trainings.
    """
    until = steps_until(accuracy, goal, steps)  # (S, M)
    median = float(np.quantile(until, 0.5, method="inverted_cdf"))
    return {
        "median": int(median) if math.isfinite(median) else None,
        "mean": bootstrap.summary(np.minimum(until, steps[-1]).mean(0)),
        "not_reached": bootstrap.summary(np.isinf(until).mean(0)),
    }


def _plot(run: SuiteRun, result: dict[str, Any]) -> None:
    figure, (loss, accuracy) = new_figure(2, sharex=True)
    for i, (name, entry) in enumerate(result["starts"].items()):
        style = {"label": name, "color": f"C{i % 10}", "linestyle": "-" if i < 10 else "--"}
        plot_band(loss, result["steps"], entry["loss"], 1, **style)
        plot_band(accuracy, result["steps"], entry["accuracy"], 100, **style)
    accuracy.axhline(100 * result["oracle"]["value"], color="grey", linestyle=":", label="oracle")
    # Linear from 0 to 1, as a logarithm has no place for the start itself.
    loss.set_xscale("symlog", linthresh=1)
    marks = [step for step in result["steps"] if step == 0 or f"{step}".strip("0") == "1"]
    loss.set_xticks(marks, [f"{step}" for step in marks])
    loss.set_xlim(0, result["steps"][-1])
    loss.set(xlabel="training steps", ylabel="loss on training features, nats", yscale="log")
    accuracy.set(xlabel="training steps", ylabel="top-1 accuracy on unseen tasks, %")
    figure.legend(*accuracy.get_legend_handles_labels(), loc="outside right center", fontsize="x-small")
    save_figure(figure, run.out / "init")


def report(result: dict[str, Any]) -> str:
    """Markdown section: accuracy along the way, then how soon the goal is reached."""
    rates = {float(rate) for entry in result["starts"].values() for rate in entry["tuning"]}
    marks = [0, result["steps"].index(result["few"]), -1]
    ways, goals = [], []
    for name, entry in result["starts"].items():
        headline = name == result["headline"]
        title, rate = f"**{name}**" if headline else name, entry["learning_rate"]
        gains = ["" if headline else points(entry["gain"][place]) for place in ("few", "end")]
        ways.append([title, mark_edge(rate, rates), *(percent(entry["accuracy"][i]) for i in marks), *gains])
        reaching = entry["reaching"]
        mean, (low, high) = reaching["mean"]["value"], reaching["mean"]["interval"]
        median = "not reached" if reaching["median"] is None else str(reaching["median"])
        goals.append([title, median, f"{mean:.0f} ({low:.0f} to {high:.0f})", percent(reaching["not_reached"])])
    few, last = result["few"], result["steps"][-1]
    return (
        f"{result['tasks']} unseen tasks, {result['seeds']} seeds. Accuracy in % before training, after {few} and "
        f"after {last} steps, and how many points {result['headline']} is ahead by. The learning rate of each start is "
        f"the one with the best accuracy at the end on {result['tuning_tasks']} other unseen tasks; * marks one at the "
        f"edge of the grid. Oracle (from the universal head, regularised): {percent(result['oracle'])}.\n\n"
        + markdown_table(
            [
                "start",
                "learning rate",
                *(f"{mark} steps" for mark in (0, few, last)),
                f"ahead at {few}",
                f"ahead at {last}",
            ],
            ways,
        )
        + f"\nSteps until {100 * result['share']:g} % of the oracle's accuracy, among the measured ones. The mean "
        f"counts a training that never gets there with {last}, and so is a lower bound where there are any.\n\n"
        + markdown_table(["start", "median", "mean", "not reached, % of trainings"], goals)
    )
