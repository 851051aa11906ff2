"""Accuracy along the denoising steps, after T2W's Fig. 3 (arXiv 2508.13633).

At every denoiser call two heads are scored: the present sample x_n, read as a head, and the denoiser's estimate
of x_0. Letters: M tasks, S denoiser calls, P numbers in one head.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from text2weight.generator import DenoiserCall
from text2weight_training.bootstrap import PairedBootstrap
from text2weight_training.evaluate import GENERATION_BATCH, task_requests
from text2weight_training.suites.base import SuiteRun, Task, method_name, own_accuracy, take_tasks, task_accuracy
from text2weight_training.suites.figures import new_figure, plot_band, save_figure
from text2weight_training.suites.tables import markdown_table, percent, points

# Samples and estimates kept in memory at once, each: 1,000 steps are not to cost gigabytes.
HEADS_HELD = 1024


def run(run: SuiteRun) -> dict[str, Any]:
    """Measure every sampler's curve on unseen tasks.

    Returns:
        `tasks`; `universal`, the accuracy of the universal head; per sampler in `curves` one entry per denoiser
        call: the timestep, and the accuracy of `sample` and `estimate`; `gain`, the accuracy of the last estimate
        less that of the first, task by task.

    Raises:
        TrainingDataError: the zoo has too few unseen tasks.
    """
    settings = run.preset.suites.denoising
    tasks = take_tasks(run.zoo.split.unseen, settings.tasks, "suites.denoising.tasks", "unseen")
    bootstrap = PairedBootstrap(len(tasks), settings.bootstrap, run.preset.seed)
    universal = own_accuracy(run, tasks, run.zoo.universal.expand(len(tasks), -1))
    curves, gains = {}, {}
    for sampler, steps in settings.samplers:
        timesteps, samples, estimates = _trace(run, tasks, sampler, steps)
        name = method_name(sampler, steps)
        curves[name] = [
            {"timestep": n, "sample": bootstrap.summary(sample), "estimate": bootstrap.summary(estimate)}
            for n, sample, estimate in zip(timesteps, samples, estimates, strict=True)
        ]
        gains[name] = bootstrap.summary(estimates[-1] - estimates[0])
    result = {"tasks": len(tasks), "universal": bootstrap.summary(universal), "curves": curves, "gain": gains}
    _plot(run, result)
    return result


def _trace(run: SuiteRun, tasks: list[Task], sampler: str, steps: int) -> tuple[list[int], np.ndarray, np.ndarray]:
    """Timesteps (S,), and the accuracy of samples and of estimates at each of them, both (S, M)."""
    requests = task_requests(run.data, tasks, sampler, steps, run.preset.seed)
    parts = []
    timesteps: list[int] = []
    batch = max(1, min(GENERATION_BATCH, HEADS_HELD // steps))
    for start in range(0, len(tasks), batch):
        calls: list[DenoiserCall] = []
        run.generator.generate_batch(requests[start : start + batch], on_call=calls.append)
        samples = torch.stack([call.samples for call in calls])  # (S, b, P)
        estimates = torch.stack([call.estimates for call in calls])  # (S, b, P)
        timesteps = [int(call.timesteps[0]) for call in calls]
        for i, task in enumerate(tasks[start : start + batch]):
            heads = torch.cat([samples[:, i], estimates[:, i]])  # (2 S, P)
            parts.append(task_accuracy(run, heads, task).view(2, -1))  # (2, S)
    scores = torch.stack(parts, dim=-1).numpy()  # (2, S, M)
    return timesteps, scores[0], scores[1]


def _plot(run: SuiteRun, result: dict[str, Any]) -> None:
    figure, panels = new_figure(2, sharex=True, sharey=True)
    titles = {"estimate": "the denoiser's estimate of the clean head", "sample": "the sample itself"}
    for axes, (kind, title) in zip(panels, titles.items(), strict=True):
        for name, calls in result["curves"].items():
            places = [call["timestep"] for call in calls]
            plot_band(axes, places, [call[kind] for call in calls], 100, marker=".", label=name)
        axes.axhline(100 * result["universal"]["value"], color="grey", linestyle="--", label="universal")
        axes.set(title=title, xlabel="timestep n")
    panels[0].set_ylabel("top-1 accuracy on unseen tasks, %")
    panels[0].invert_xaxis()
    panels[0].legend(fontsize="small")
    save_figure(figure, run.out / "denoising")


def report(result: dict[str, Any]) -> str:
    """Markdown section: a row per sampler, from its first estimate to its last."""
    rows = []
    for name, calls in result["curves"].items():
        middle = calls[len(calls) // 2]
        rows.append(
            [
                name,
                percent(calls[0]["estimate"]),
                percent(middle["estimate"]),
                percent(middle["sample"]),
                percent(calls[-1]["estimate"]),
                points(result["gain"][name]),
            ]
        )
    headings = ["sampler/steps", "first estimate", "estimate half way", "sample half way", "last estimate", "gain"]
    return (
        f"Accuracy in % along the denoising steps, {result['tasks']} unseen tasks; the last estimate is the head that "
        f"is returned, the gain is what the calls after the first add. Universal head: "
        f"{percent(result['universal'])}.\n\n" + markdown_table(headings, rows)
    )
