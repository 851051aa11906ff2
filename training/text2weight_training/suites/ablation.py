"""What each part of the method is worth, after T2W's Table 2 (arXiv 2508.13633).

Every variant of variants.py is fitted on the run's own zoo for the same wall time, from several seeds, and measured on
seen and unseen tasks and, where the zoo has them, on the harder splits. Equal time means unequal numbers of steps,
which are reported: a part that slows the steps has to be worth it.

A fit lives under `out`/ablation/VARIANT-SEED and is made once: an interrupted one goes on, a finished one is only read.
Letters: M tasks, S seeds.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from text2weight.checkpoint import load_checkpoint
from text2weight.condition import condition_on_classes
from text2weight.generator import Generator
from text2weight_training.bootstrap import PairedBootstrap
from text2weight_training.evaluate import generate_heads
from text2weight_training.files import TrainingDataError, claim, read_kept, write_kept
from text2weight_training.fit import Fit
from text2weight_training.loss_watch import DivergedError
from text2weight_training.presets import Preset
from text2weight_training.suites.accuracy import SPLITS
from text2weight_training.suites.base import SuiteRun, Task, method_name, task_accuracy
from text2weight_training.suites.figures import new_figure, plot_interval, save_figure
from text2weight_training.suites.settings import SamplerSteps, VariantName
from text2weight_training.suites.tables import markdown_table, percent, points
from text2weight_training.suites.variants import Variant, make_variant
from text2weight_training.symmetry import equivariance_error
from text2weight_training.tasks import pad_tasks, task_embeddings

FULL: VariantName = "full"
# Zoo heads that the equivariance error is measured on.
EQUIVARIANCE_HEADS = 16
Scores = dict[str, dict[str, list[float]]]  # split, then method, then one accuracy per task


@dataclass(frozen=True)
class FinishedFit:
    """What is kept of one fit.

    Attributes:
        steps: optimiser steps that fitted into the time.
        parameters: of the denoiser.
        equivariance_error: see `symmetry.equivariance_error`.
        scores: per split and method, the accuracy on each task.
    """

    steps: int
    parameters: int
    equivariance_error: float
    scores: Scores


def run(run: SuiteRun) -> dict[str, Any]:
    """Fit and measure every variant.

    Returns:
        `minutes`, `seeds`, `methods` (samplers that all are measured with); per variant in `variants` its title, the
        steps and the equivariance error of each seed, the parameters and its own `default` method; `not_applicable`,
        the reasons of those left out; per split in `splits` the number of tasks, the universal head's accuracy, and
        per variant and method the `accuracy` (mean over seeds), the accuracy of each seed, and `change`, the
        difference to the same method of the variant `full`, task by task.

    Raises:
        TrainingDataError: a fit's folder belongs to another fit, or the fit of `full` diverges.
    """
    settings = run.preset.suites.ablation
    seeds = [run.preset.seed + number for number in range(settings.seeds)]
    variants, not_applicable = _choose_variants(run.preset, seeds)
    tasks = _choose_tasks(run)
    fits: dict[str, list[FinishedFit]] = {}
    for name, of_seeds in variants.items():
        try:
            fits[name] = [_finish(run, name, variant, tasks) for variant in of_seeds]
        except DivergedError as error:  # it would do so again, and the others can be compared
            if name == FULL:
                raise
            not_applicable[name] = str(error)
    result = {
        "minutes": settings.minutes,
        "seeds": len(seeds),
        "methods": [method_name(*pair) for pair in settings.samplers],
        "not_applicable": not_applicable,
        "variants": {
            name: {
                "title": variants[name][0].title,
                "steps": [fit.steps for fit in of_seeds],
                "parameters": of_seeds[0].parameters,
                "equivariance_error": [fit.equivariance_error for fit in of_seeds],
                "default": _default(variants[name][0].preset),
            }
            for name, of_seeds in fits.items()
        },
        "splits": {split: _summarise(run, split, chosen, fits) for split, chosen in tasks.items()},
    }
    _plot(run, result)
    return result


def _choose_variants(preset: Preset, seeds: list[int]) -> tuple[dict[str, list[Variant]], dict[str, str]]:
    """All variants for all seeds, before anything is fitted, and why some are left out."""
    variants: dict[str, list[Variant]] = {}
    reasons: dict[str, str] = {}
    for name in preset.suites.ablation.variants:
        try:
            variants[name] = [make_variant(name, preset, seed) for seed in seeds]
        except TrainingDataError as error:
            reasons[name] = str(error)
    return variants, reasons


def _choose_tasks(run: SuiteRun) -> dict[str, list[Task]]:
    """The first tasks of every split that the zoo has."""
    count = run.preset.suites.ablation.tasks
    tasks = {name: list(getattr(run.zoo.split, name)[:count]) for name in SPLITS}
    return {name: chosen for name, chosen in tasks.items() if chosen}


def _default(preset: Preset) -> str:
    return method_name(preset.sampler, preset.steps)


def _finish(run: SuiteRun, name: str, variant: Variant, tasks: dict[str, list[Task]]) -> FinishedFit:
    """One fit with its scores: read where it is finished, gone on with where it is not."""
    settings, preset = run.preset.suites.ablation, variant.preset
    folder = run.out / "ablation" / f"{name}-{preset.seed}"
    origin = {
        "preset": preset.run_description(),
        "data": run.data.fingerprint,
        "zoo": hashlib.sha256(json.dumps(run.zoo.manifest, sort_keys=True).encode()).hexdigest(),
        "minutes": settings.minutes,
    }
    claim(folder / "origin.json", origin, "fit")
    trained = _train(run, preset, folder)
    pairs = list(dict.fromkeys([*settings.samplers, (preset.sampler, preset.steps)]))
    measured = {
        "tasks": {split: len(chosen) for split, chosen in tasks.items()},
        "methods": [method_name(*pair) for pair in pairs],
        "equivariance_heads": EQUIVARIANCE_HEADS,
        "seed": run.preset.seed,
    }
    there = read_kept(folder / "scores.json")
    if there.get("measured") != measured:
        generator = Generator.load(
            folder / "checkpoint", device=run.generator.device, text_encoder=run.generator.text_encoder
        )
        scores = {split: _score(run, generator, chosen, pairs) for split, chosen in tasks.items()}
        error = measure_equivariance(run, folder / "checkpoint")
        there = {"measured": measured, "equivariance_error": error, "scores": scores}
        write_kept(folder / "scores.json", there)
    return FinishedFit(trained["steps"], trained["parameters"], there["equivariance_error"], there["scores"])


def _train(run: SuiteRun, preset: Preset, folder: Path) -> dict[str, Any]:
    """Fit into `folder`/checkpoint unless that is done; returns steps and parameters."""
    finished, state = folder / "finished.json", folder / "state.pt"
    there = read_kept(finished)
    if there and (folder / "checkpoint").exists():
        return there
    fit = Fit(run.data, run.zoo, preset, state, run.generator.device)
    fit.resume()
    fit.run(run.preset.suites.ablation.minutes)
    fit.write_checkpoint(folder / "checkpoint")
    parameters = sum(parameter.numel() for parameter in fit.denoiser.parameters())
    written = {"steps": fit.state.step, "seconds": round(fit.state.seconds, 1), "parameters": parameters}
    write_kept(finished, written)
    # With its averages and its optimiser it is many times as large as the checkpoint.
    state.unlink()
    return written


def _score(run: SuiteRun, generator: Generator, tasks: list[Task], pairs: list[SamplerSteps]) -> dict[str, list[float]]:
    heads = torch.stack(
        [generate_heads(generator, run.data, tasks, sampler, steps, run.preset.seed) for sampler, steps in pairs], dim=1
    )  # (M, methods, P)
    scores = torch.stack([task_accuracy(run, made, task) for made, task in zip(heads, tasks, strict=True)])
    return {method_name(*pair): column.tolist() for pair, column in zip(pairs, scores.T, strict=True)}


def measure_equivariance(run: SuiteRun, checkpoint: Path) -> float:
    """Relative equivariance error of a checkpoint's denoiser on noised heads of the zoo, at timesteps from 1 to N."""
    loaded = load_checkpoint(checkpoint)
    config, tasks = loaded.config, run.zoo.split.seen[:EQUIVARIANCE_HEADS]
    clean = loaded.space.standardise(run.zoo.weights[: len(tasks)])  # (B, P)
    source = torch.Generator().manual_seed(run.preset.seed)
    timesteps = torch.linspace(1, config.schedule.num_timesteps, len(tasks)).round().long()  # (B,)
    noisy = config.schedule.add_noise(clean, timesteps, torch.randn(clean.shape, generator=source))  # (B, P)
    condition = condition_on_classes(*task_embeddings(run.data.condition_embeddings, pad_tasks(tasks)))
    device = run.generator.device
    return equivariance_error(
        loaded.denoiser.to(device),
        config.head,
        config.schedule,
        config.prediction,
        noisy.to(device),
        timesteps.to(device),
        condition.to(device),
        source,
    )


def _summarise(run: SuiteRun, split: str, tasks: list[Task], fits: dict[str, list[FinishedFit]]) -> dict[str, Any]:
    bootstrap = PairedBootstrap(len(tasks), run.preset.suites.ablation.bootstrap, run.preset.seed)
    universal: Tensor = torch.stack([task_accuracy(run, run.zoo.universal[None], task)[0] for task in tasks])  # (M,)
    by_variant = {
        name: {
            method: np.array([fit.scores[split][method] for fit in of_seeds])  # (S, M)
            for method in of_seeds[0].scores[split]
        }
        for name, of_seeds in fits.items()
    }
    full = {method: values.mean(0) for method, values in by_variant[FULL].items()}  # (M,) each
    return {
        "tasks": len(tasks),
        "universal": bootstrap.summary(universal.numpy()),
        "variants": {
            name: {
                method: {
                    "accuracy": bootstrap.summary(values.mean(0)),
                    "accuracy_of_seeds": values.mean(1).tolist(),
                    # A sampler that only this variant has is held against the default of `full`.
                    "change": bootstrap.summary(values.mean(0) - full.get(method, full[_default(run.preset)])),
                }
                for method, values in methods.items()
            }
            for name, methods in by_variant.items()
        },
    }


def _plot(run: SuiteRun, result: dict[str, Any]) -> None:
    figure, (axes,) = new_figure()
    unseen = result["splits"]["unseen"]
    names = list(result["variants"])
    for i, method in enumerate(result["methods"]):
        for row, name in enumerate(names):
            entry = unseen["variants"][name][method]["accuracy"]
            height = len(names) - row - 0.15 * i
            plot_interval(axes, height, entry, color=f"C{i}", label=method if row == 0 else None)
    axes.axvline(100 * unseen["universal"]["value"], color="grey", linestyle="--", label="universal")
    axes.set_yticks(range(len(names), 0, -1), [result["variants"][name]["title"] for name in names], fontsize="small")
    axes.set(xlabel="top-1 accuracy on unseen tasks, %")
    axes.legend(fontsize="small")
    save_figure(figure, run.out / "ablation")


def report(result: dict[str, Any]) -> str:
    """Markdown section: one table per split, a row per variant, two columns per sampler."""
    parts = [
        f"Every variant was fitted for {result['minutes']:g} minutes of wall time on the same zoo, from "
        f"{result['seeds']} seed(s). Accuracy in % (mean over seeds, intervals over tasks), and the change against the "
        "preset as it is, in points, task by task. The equivariance error is that of the estimated head when the "
        "hidden units of the noisy one are permuted, relative to its size: about 1e-6 where units are exchangeable by "
        "construction; a network that tells units apart on purpose has a large one."
    ]
    for split, entry in result["splits"].items():
        parts += [
            f"### {SPLITS[split].capitalize()}",
            f"{entry['tasks']} tasks. Universal head: {percent(entry['universal'])}.",
            _table(result, entry),
        ]
        parts += _own_samplers(result, entry)
    parts += [f"`{name}` is left out: {reason}." for name, reason in result["not_applicable"].items()]
    return "\n\n".join(parts) + "\n"


def _table(result: dict[str, Any], entry: dict[str, Any]) -> str:
    several = result["seeds"] > 1
    headings = ["variant", "steps", "parameters, M", "equivariance error"]
    for method in result["methods"]:
        headings += [f"{method} %", *(["seeds %"] if several else []), "change"]
    rows = []
    for name, about in result["variants"].items():
        steps, parameters = _extent(about["steps"], "{:.0f}"), f"{about['parameters'] / 1e6:.1f}"
        row = [about["title"], steps, parameters, _extent(about["equivariance_error"], "{:.2g}")]
        for method in result["methods"]:
            cell = entry["variants"][name][method]
            seeds = _extent([100 * value for value in cell["accuracy_of_seeds"]], "{:.2f}")
            row += [percent(cell["accuracy"]), *([seeds] if several else [])]
            row.append("" if name == FULL else points(cell["change"]))
        rows.append(row)
    return markdown_table(headings, rows)


def _extent(values: list[float], form: str) -> str:
    """One number, or the least and the greatest of several."""
    low, high = form.format(min(values)), form.format(max(values))
    return low if low == high else f"{low} to {high}"


def _own_samplers(result: dict[str, Any], entry: dict[str, Any]) -> list[str]:
    """A line for each variant whose own default sampler the table has no column for."""
    lines = []
    for name, about in result["variants"].items():
        method = about["default"]
        if method not in result["methods"]:
            cell = entry["variants"][name][method]
            change = f"; change {points(cell['change'])} against the default of the preset as it is"
            lines.append(
                f"{about['title']}, with its own sampler {method}: {percent(cell['accuracy'])} %"
                f"{'' if name == FULL else change}."
            )
    return lines
