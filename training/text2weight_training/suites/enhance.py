"""What improves a head whose training was stopped early? After T2W's Fig. 6 (arXiv 2508.13633).

Heads of unseen tasks are trained up to a share of the recipe `evaluation.oracle`, then enhanced at every strength by
both ways of enhancement.py: interpolated with a generated head, or noised and denoised. Beside them: the stopped head,
a head generated from the text alone, and the stopped head trained on for the wall time that enhancing it took.
Letters: M tasks, J heads of a task, P numbers in one head.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from text2weight.enhancement import interpolate
from text2weight_training.bootstrap import PairedBootstrap
from text2weight_training.evaluate import generate_from_requests, task_requests
from text2weight_training.stacked import Moments, cosine_decay, initial_head
from text2weight_training.suites.base import SuiteRun, Task, method_name, own_accuracy, take_tasks, train_heads
from text2weight_training.suites.figures import new_figure, plot_band, save_figure
from text2weight_training.suites.tables import markdown_table, percent, points

START_NAMES = {"base": "the base head", "universal": "the universal head", "default": "PyTorch's initialisation"}
OTHERS = ("input", "generated", "noised", "continued")


@dataclass(frozen=True)
class Stopped:
    """One training of M heads.

    Attributes:
        heads: by the step they were stopped after (M, P); the last one is trained to the end.
        moments: likewise, what the optimiser had come to.
        seconds: wall time of one step of one head.
    """

    heads: dict[int, Tensor]
    moments: dict[int, Moments]
    seconds: float


@dataclass(frozen=True)
class Generated:
    """Heads of plain generation.

    Attributes:
        heads: (M, P).
        seconds: wall time of one.
    """

    heads: Tensor
    seconds: float


def run(run: SuiteRun) -> dict[str, Any]:
    """Measure what improves stopped heads of unseen tasks, paired by task.

    Returns:
        `tasks`; `steps`, of the whole training; `generated`: accuracy of plain generation per sampler; per start in
        `starts`: `trained`, accuracy after all steps, `step_seconds`, wall time of one training step per head, and
        `stopped`: per share its `steps`, the accuracy of the `input`, and per sampler in `samplers` what `measure`
        returns.

    Raises:
        TrainingDataError: the zoo has too few unseen tasks, or a training diverges.
    """
    settings, preset = run.preset.suites.enhance, run.preset
    tasks = take_tasks(run.zoo.split.unseen, settings.tasks, "suites.enhance.tasks", "unseen")
    bootstrap = PairedBootstrap(len(tasks), settings.bootstrap, preset.seed)
    generated = {sampler: generate_all(run, tasks, sampler) for sampler in settings.samplers}
    whole = preset.evaluation.oracle.steps
    stops = {f"{share:g}": max(1, round(share * whole)) for share in settings.shares}
    starts = {}
    for name in settings.starts:
        stopped = train_and_stop(run, starting_heads(run, name, len(tasks)), tasks, {*stops.values(), whole})
        starts[name] = {
            "trained": bootstrap.summary(own_accuracy(run, tasks, stopped.heads[whole])),
            "step_seconds": stopped.seconds,
            "stopped": {
                share: {
                    "steps": stop,
                    "input": bootstrap.summary(own_accuracy(run, tasks, stopped.heads[stop])),
                    "samplers": {
                        method_name(*sampler): measure(run, tasks, stopped, stop, sampler, plain, bootstrap)
                        for sampler, plain in generated.items()
                    },
                }
                for share, stop in stops.items()
            },
        }
    result = {
        "tasks": len(tasks),
        "steps": whole,
        "generated": {
            method_name(*sampler): bootstrap.summary(own_accuracy(run, tasks, plain.heads))
            for sampler, plain in generated.items()
        },
        "starts": starts,
    }
    _plot(run, result)
    return result


def starting_heads(run: SuiteRun, name: str, tasks: int) -> Tensor:
    """Where the training of each task's head starts, (M, P)."""
    if name != "default":
        head = run.zoo.base if name == "base" else run.zoo.universal  # (P,)
        return head.expand(tasks, -1)
    # The zoo's own heads start from the preset's seed: these are to be heads that know nothing of them.
    return torch.stack([initial_head(run.preset.head, run.preset.seed + 1 + i) for i in range(tasks)])


def train_and_stop(run: SuiteRun, start: Tensor, tasks: list[Task], stops: set[int]) -> Stopped:
    """Train heads (M, P) by `evaluation.oracle` and keep what they and their moments are after each of some steps.

    Raises:
        TrainingDataError: the weights are no longer finite.
    """
    recipe = run.preset.evaluation.oracle
    parts: dict[int, list[Tensor]] = {stop: [] for stop in sorted(stops)}

    def keep(step: int, weights: Tensor, moments: Moments) -> None:
        if step in parts:
            parts[step].append(torch.stack([weights, moments.mean, moments.square]))  # (3, m, P), of one stack

    began = time.perf_counter()
    train_heads(run, tasks, recipe, run.preset.seed, start, keep)
    seconds = (time.perf_counter() - began) / (len(tasks) * recipe.steps)
    heads, moments = {}, {}
    for stop, stacks in parts.items():
        heads[stop], mean, square = torch.cat(stacks, dim=1)  # (M, P) each
        moments[stop] = Moments(mean, square, stop)
    return Stopped(heads, moments, seconds)


def measure(
    run: SuiteRun,
    tasks: list[Task],
    stopped: Stopped,
    stop: int,
    sampler: tuple[str, int],
    generated: Generated,
    bootstrap: PairedBootstrap,
) -> dict[str, Any]:
    """Everything about one stopping point and one sampler.

    Args:
        run: the measurement.
        tasks: M tasks.
        stopped: their heads.
        stop: after how many steps.
        sampler: name and number of denoiser calls.
        generated: what plain generation by it makes.
        bootstrap: of the M tasks.

    Returns:
        accuracies: `interpolated` and `noised` by strength, `continued`; `seconds`, wall time of interpolating one
        head, and `continued_steps`, the training steps that fit into it; `chosen`, the accuracy of either way where the
        strength between 0 and 1 was chosen on other tasks (see `cross`), and `gain`, that of the interpolated heads
        less each other method's.
    """
    given, strengths = stopped.heads[stop], run.preset.suites.enhance.strengths
    noised = {each: own_accuracy(run, tasks, noise_all(run, tasks, given, sampler, each)) for each in strengths}
    began = time.perf_counter()
    mixed = {each: interpolate_all(run, given, generated.heads, each) for each in strengths}
    seconds = generated.seconds + (time.perf_counter() - began) / (len(strengths) * len(tasks))
    steps = round(seconds / stopped.seconds)
    interpolated = {each: own_accuracy(run, tasks, heads) for each, heads in mixed.items()}
    best = cross(between(interpolated))
    scores = {
        "input": own_accuracy(run, tasks, given),
        "generated": own_accuracy(run, tasks, generated.heads),
        "noised": cross(between(noised)),
        "continued": own_accuracy(run, tasks, train_on(run, tasks, stopped, stop, steps)),
    }
    return {
        "interpolated": {f"{strength:g}": bootstrap.summary(values) for strength, values in interpolated.items()},
        "noised": {f"{strength:g}": bootstrap.summary(values) for strength, values in noised.items()},
        "continued": bootstrap.summary(scores["continued"]),
        "seconds": seconds,
        "continued_steps": steps,
        "chosen": {"interpolated": bootstrap.summary(best), "noised": bootstrap.summary(scores["noised"])},
        "gain": {name: bootstrap.summary(best - scores[name]) for name in OTHERS},
    }


def between(scores: dict[float, np.ndarray]) -> list[np.ndarray]:
    """What strengths between 0 and 1 give."""
    return [values for strength, values in scores.items() if 0 < strength < 1]


def generate_all(run: SuiteRun, tasks: list[Task], sampler: tuple[str, int]) -> Generated:
    """A head for each task from its text alone."""
    began = time.perf_counter()
    heads = generate_from_requests(run.generator, task_requests(run.data, tasks, *sampler, run.preset.seed))
    return Generated(heads, (time.perf_counter() - began) / len(tasks))


def noise_all(run: SuiteRun, tasks: list[Task], given: Tensor, sampler: tuple[str, int], strength: float) -> Tensor:
    """Given heads (M, P), noised and denoised: (M, P)."""
    plain = task_requests(run.data, tasks, *sampler, run.preset.seed)
    requests = [
        replace(request, given=head, strength=strength, method="noise")
        for request, head in zip(plain, given, strict=True)
    ]
    return generate_from_requests(run.generator, requests)


def interpolate_all(run: SuiteRun, given: Tensor, generated: Tensor, share: float) -> Tensor:
    """Given heads (M, P) with a share of the generated ones (M, P): (M, P)."""
    pairs = zip(given, generated, strict=True)
    return torch.stack([interpolate(run.preset.head, head, made, share) for head, made in pairs])


def train_on(run: SuiteRun, tasks: list[Task], stopped: Stopped, stop: int, steps: int) -> Tensor:
    """Heads (M, P) that were stopped after `stop` steps, trained for `steps` more: (M, P).

    The learning rate falls to zero within them, from where the whole training's had come to: so few steps at the
    rate of the middle of a training would end worse. AdamW goes on with its moments, as a training does that is
    resumed: begun anew, it moves every number by the learning rate at once.
    """
    given = stopped.heads[stop]
    if steps == 0:
        return given
    whole = run.preset.evaluation.oracle
    rate = whole.learning_rate * cosine_decay(stop / whole.steps)
    recipe = whole.model_copy(update={"steps": steps, "learning_rate": rate})
    # Not the samples again that the head was trained on first.
    return train_heads(run, tasks, recipe, run.preset.seed + 1_000_003, given, moments=stopped.moments[stop])


def cross(scores: Sequence[np.ndarray]) -> np.ndarray:
    """Scores of the variant that is best on the other half of the tasks: J x (M,) -> (M,).

    The tasks at even places choose for those at odd places, and the other way round. So no task is judged by a
    variant that was chosen on it.
    """
    table = np.stack(scores)  # (J, M)
    chosen = np.empty(table.shape[1])
    for half in (0, 1):
        best = table[:, 1 - half :: 2].mean(1).argmax()
        chosen[half::2] = table[best, half::2]
    return chosen


def _plot(run: SuiteRun, result: dict[str, Any]) -> None:
    panels = [(start, sampler) for start in result["starts"] for sampler in result["generated"]]
    figure, places = new_figure(len(panels), sharex=True, sharey=True)
    for axes, (start, sampler) in zip(places, panels, strict=True):
        entry = result["starts"][start]
        for i, (share, stopped) in enumerate(entry["stopped"].items()):
            part, colour = stopped["samplers"][sampler], f"C{i}"
            label = f"stopped at {100 * float(share):g} %"
            _draw_curve(axes, part["interpolated"], colour, marker="o", label=label)
            _draw_curve(axes, part["noised"], colour, marker="x", linestyle=":")
            axes.axhline(100 * part["continued"]["value"], color=colour, linestyle="--", linewidth=0.8)
        axes.axhline(100 * entry["trained"]["value"], color="grey", label="trained to the end")
        axes.set(title=f"from {START_NAMES[start]}, {sampler}", xlabel="strength; line: interpolated, dotted: noised")
    places[0].set_ylabel("top-1 accuracy, %; dashed: trained on")
    places[0].legend(fontsize="small")
    save_figure(figure, run.out / "enhance")


def _draw_curve(axes: Any, entries: dict[str, Any], colour: str, **style: Any) -> None:
    """Accuracies by strength."""
    ordered = sorted((float(place), entry) for place, entry in entries.items())
    places, values = zip(*ordered, strict=True)
    plot_band(axes, places, values, 100, color=colour, **style)


def report(result: dict[str, Any]) -> str:
    """Markdown section: for each start what improves its stopped heads, and the sweep over strengths."""
    made = ", ".join(f"{name} {percent(entry)}" for name, entry in result["generated"].items())
    text = (
        f"{result['tasks']} unseen tasks, heads stopped before all {result['steps']} steps of their training. Accuracy "
        f"in %. Plain generation: {made}. *Interpolated* and *noised* have the strength between 0 and 1 that is best "
        f"on the other half of the tasks; *trained on* took as long as enhancing. Gains are the interpolated head's "
        f"over each of the others.\n"
    )
    for start, entry in result["starts"].items():
        text += (
            f"\nTrained from {START_NAMES[start]}; to the end: {percent(entry['trained'])}; "
            f"{1e3 * entry['step_seconds']:.2f} ms per step and head.\n\n{_comparison(entry)}"
            f"\nInterpolated at each strength:\n\n{_sweep(entry, 'interpolated')}"
            f"\nNoised at each strength:\n\n{_sweep(entry, 'noised')}"
        )
    return text


def _comparison(entry: dict[str, Any]) -> str:
    headings = ["stopped at", "sampler", "input", "noised", "trained on (steps)", "interpolated (ms)"]
    headings += ["gain over input", "over generated", "over noised", "over trained on"]
    rows = []
    for share, stopped in entry["stopped"].items():
        for sampler, part in stopped["samplers"].items():
            rows.append(
                [
                    f"{100 * float(share):g} %",
                    sampler,
                    percent(stopped["input"]),
                    percent(part["chosen"]["noised"]),
                    f"{percent(part['continued'])} ({part['continued_steps']})",
                    f"{percent(part['chosen']['interpolated'])} ({1e3 * part['seconds']:.1f})",
                    *(points(part["gain"][name]) for name in OTHERS),
                ]
            )
    return markdown_table(headings, rows)


def _sweep(entry: dict[str, Any], way: str) -> str:
    rows = []
    strengths: list[str] = []
    for share, stopped in entry["stopped"].items():
        for sampler, part in stopped["samplers"].items():
            strengths = list(part[way])
            values = [f"{100 * part[way][strength]['value']:.2f}" for strength in strengths]
            rows.append([f"{100 * float(share):g} %", sampler, *values])
    return markdown_table(["stopped at", "sampler", *strengths], rows)
