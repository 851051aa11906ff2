"""Measure a checkpoint on unseen tasks against baselines and the oracle, paired task by task.

Letters: M tasks, P numbers in one head.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from text2weight.artifact import created_by
from text2weight.descriptions import ConditionText
from text2weight.generator import GenerationRequest, Generator
from text2weight.text_encoder import load_text_encoder
from text2weight_training.baselines import (
    accuracies,
    class_indicators,
    nearest_heads,
    oracle_heads,
    pooled_text,
    ridge_heads,
)
from text2weight_training.bootstrap import PairedBootstrap
from text2weight_training.files import TrainingDataError, atomic_path
from text2weight_training.presets import Preset
from text2weight_training.splits import training_center, training_class_names
from text2weight_training.suites.figures import new_figure, save_figure
from text2weight_training.tasks import TaskData
from text2weight_training.zoo import Zoo, check_zoo_fits

FORMAT = "text2weight.evaluation/1"
GENERATION_BATCH = 32
SPLIT = "unseen"


def evaluate(data: TaskData, zoo: Zoo, checkpoint: Path, preset: Preset, out: Path) -> dict[str, Any]:
    """Run the whole comparison, write `evaluation.json` and the plot beside it.

    Args:
        data: features and embeddings, the zoo's own.
        zoo: source of tasks and baselines.
        checkpoint: folder of the checkpoint to measure.
        preset: its `evaluation` part says how many tasks, samplers, and how the oracle is trained.
        out: path of `evaluation.json`; `accuracy.png` and `accuracy.svg` go beside it.

    Returns:
        what was written.

    Raises:
        TrainingDataError: zoo or checkpoint do not fit the data, or fewer unseen tasks exist than asked for.
    """
    check_zoo_fits(zoo, data, preset)
    settings = preset.evaluation
    if settings.tasks > len(zoo.split.unseen):
        raise TrainingDataError(
            f"evaluation.tasks is {settings.tasks}: the zoo has only {len(zoo.split.unseen)} unseen tasks"
        )
    tasks = list(zoo.split.unseen[: settings.tasks])
    generator = load_generator(checkpoint, data, zoo, preset)
    heads = baseline_heads(data, zoo, tasks)
    seconds: dict[str, float] = {}
    with Progress() as progress:
        bar = progress.add_task("generating", total=len(settings.samplers))
        for sampler, steps in settings.samplers:
            started = time.perf_counter()
            heads[f"generated/{sampler}/{steps}"] = generate_heads(generator, data, tasks, sampler, steps)
            seconds[f"generated/{sampler}/{steps}"] = (time.perf_counter() - started) / len(tasks)
            progress.advance(bar)
        bar = progress.add_task("oracle heads", total=2 * len(tasks))
        oracles = oracle_heads(
            data,
            zoo,
            tasks,
            preset.head,
            preset.logit_scale,
            settings.oracle,
            preset.zoo.stack,
            preset.seed + 77,
            lambda count: progress.advance(bar, count),
        )
    heads |= {f"oracle from {name}": trained for name, trained in oracles.items()}
    scores = accuracies(data, preset.head, tasks, heads)
    starts = [scores.pop(f"oracle from {name}") for name in oracles]
    scores["oracle"] = max(starts, key=lambda values: float(values.mean()))
    result = summarise(scores, default_method(preset), settings.bootstrap, preset.seed)
    result |= {
        "format": FORMAT,
        "created_by": created_by(),
        "checkpoint": generator.checkpoint_hash,
        "backbone": data.backbone["name"],
        "classes": len(data.classes),
        "tasks": len(tasks),
        "task_size": list(preset.zoo.task_size),
        "seconds_per_head": seconds,
        "sample_diversity": sample_diversity(generator, data, zoo, tasks[:GENERATION_BATCH], preset),
    }
    with atomic_path(out) as temporary:
        temporary.write_text(json.dumps(result, indent=2) + "\n")
    plot_accuracy(result, out.with_name("accuracy"))
    print_table(result)
    return result


def default_method(preset: Preset) -> str:
    """Name of the method that the checkpoint's default sampler stands for."""
    return f"generated/{preset.sampler}/{preset.steps}"


def load_generator(checkpoint: Path, data: TaskData, zoo: Zoo, preset: Preset) -> Generator:
    """Load a checkpoint, with the text encoder that the data's embeddings were made with.

    Notes on standard error what could make its accuracies worthless and cannot be decided here: a backbone of another
    name, and a split that the checkpoint does not record.

    Raises:
        TrainingDataError: it was trained on other classes, another template, another zoo's tasks or other condition
            texts, or makes heads of another kind.
        CheckpointError: it is missing, damaged or of another text encoder.
    """
    generator = Generator.load(checkpoint, text_encoder=load_text_encoder(data.text_source))
    if generator.config.classes != training_class_names(data, zoo.split) or generator.config.template != data.template:
        raise TrainingDataError(f"checkpoint {checkpoint} was trained on other class names or another template")
    _check_split(checkpoint, generator.config.task_split_sha256, zoo)
    described = generator.config.condition_text
    if (described.fingerprint if described else "") != data.condition_fingerprint:
        trained = f"the texts of {described.name}" if described else "the class embeddings"
        raise TrainingDataError(
            f"the condition of checkpoint {checkpoint} was made from {trained}: give the same --condition-text, or none"
        )
    made, wanted = generator.config.head.model_dump(), preset.head.model_dump()
    differing = [f"{key} {made[key]} instead of {wanted[key]}" for key in made if made[key] != wanted[key]]
    if differing:
        raise TrainingDataError(f"checkpoint {checkpoint} makes other heads than the zoo's: {', '.join(differing)}")
    _check_backbone(checkpoint, generator.config.backbone.get("name"), data)
    return generator


def _check_backbone(checkpoint: Path, trained: str | None, data: TaskData) -> None:
    """Say where features may be another backbone's; no refusal, as one network may have two names."""
    name = data.backbone["name"]
    if trained not in (None, name):
        _note(
            f"checkpoint {checkpoint} was trained on features of backbone {trained!r}, and these features are of "
            f"{name!r}: unless both are names of one network, its accuracies mean nothing; then give features of the "
            "checkpoint's own backbone"
        )


def _check_split(checkpoint: Path, trained: str | None, zoo: Zoo) -> None:
    """Refuse a zoo of another split, whose unseen tasks training may have seen; say where that cannot be known."""
    if trained is None:
        _note(
            f"checkpoint {checkpoint} does not say which tasks it was trained on, so it could not be checked "
            "that the zoo's unseen tasks were left out: give the zoo that it was trained on"
        )
    elif trained != zoo.split.fingerprint:
        raise TrainingDataError(
            f"checkpoint {checkpoint} was trained on the tasks of another zoo (split {trained[:12]}, this zoo's is "
            f"{zoo.split.fingerprint[:12]}), so this one's unseen tasks may have been trained on: give the zoo that it "
            "was trained on"
        )


def _note(text: str) -> None:
    Console(stderr=True).print(f"note: {text}", soft_wrap=True, markup=False, highlight=False)


def baseline_heads(data: TaskData, zoo: Zoo, tasks: list[tuple[int, ...]]) -> dict[str, Tensor]:
    """Heads that need no denoiser and no training beyond the zoo: per method (P,) for all tasks, or (M, P)."""
    seen, center = zoo.split.seen, training_center(data.condition_embeddings, zoo.split)
    return {
        "base": zoo.base,
        "nearest zoo head": nearest_heads(data, zoo, tasks),
        "mean head": zoo.weights.mean(0),
        "ridge from pooled text": ridge_heads(pooled_text(data, seen, center), zoo, pooled_text(data, tasks, center)),
        "ridge from classes": ridge_heads(class_indicators(data, seen), zoo, class_indicators(data, tasks)),
        "universal": zoo.universal,
    }


def generate_heads(
    generator: Generator, data: TaskData, tasks: list[tuple[int, ...]], sampler: str, steps: int, seed: int = 0
) -> Tensor:
    """Generate one head per task, flat (M, P); task i uses seed + i."""
    return generate_from_requests(generator, task_requests(data, tasks, sampler, steps, seed))


def task_requests(
    data: TaskData, tasks: Sequence[tuple[int, ...]], sampler: str, steps: int, seed: int = 0
) -> list[GenerationRequest]:
    """One request per task, of its classes' own names or condition texts; task i uses seed + i."""
    requests = [
        GenerationRequest(
            tuple(data.classes[label] for label in task), data.embeddings[list(task)], seed + i, steps, sampler
        )
        for i, task in enumerate(tasks)
    ]
    if data.condition_texts is None:
        return requests
    rows, source = data.condition_embeddings, data.condition_texts.name
    return [
        replace(request, condition_text=ConditionText(rows[list(task)], source))
        for request, task in zip(requests, tasks, strict=True)
    ]


def generate_from_requests(generator: Generator, requests: Sequence[GenerationRequest]) -> Tensor:
    """Generate one head per request, in batches, flat (M, P)."""
    rows = []
    for start in range(0, len(requests), GENERATION_BATCH):
        artifacts = generator.generate_batch(requests[start : start + GENERATION_BATCH])
        rows += [generator.config.head.flatten(artifact.tensors) for artifact in artifacts]
    return torch.stack(rows)


def sample_diversity(
    generator: Generator, data: TaskData, zoo: Zoo, tasks: list[tuple[int, ...]], preset: Preset
) -> dict[str, float]:
    """Spread of samples over seeds, as a share of the zoo heads' spread over tasks (both standard deviations)."""
    zoo_spread, shares = zoo.spread, {}
    for sampler, steps in preset.evaluation.samplers:
        samples = torch.stack([generate_heads(generator, data, tasks, sampler, steps, 1000 * s) for s in range(3)])
        shares[f"generated/{sampler}/{steps}"] = float(samples.var(0).mean().sqrt()) / zoo_spread
    return shares


def summarise(scores: dict[str, np.ndarray], headline: str, resamples: int, seed: int) -> dict[str, Any]:
    """Means, bootstrap intervals over tasks, and shares of the universal-to-oracle gap that are closed.

    Args:
        scores: per method the accuracy on each of M tasks, among them "universal" and "oracle".
        headline: the method whose share stands in `gap_closed`.
        resamples: bootstrap resamples; the same tasks are drawn for all methods.
        seed: of the resampling.

    Returns:
        `results` (accuracies in 0..1), `gap_closed` (the headline's share) and `gap_closed_by_method`; a share is
        None where the oracle is no better than the universal head, an interval where that is so in a resample.
    """
    bootstrap = PairedBootstrap(len(scores["universal"]), resamples, seed)
    results: dict[str, Any] = {}
    closed: dict[str, Any] = {}
    for name, values in scores.items():
        summary = bootstrap.summary(values)
        results[name] = {"accuracy": summary["value"], "interval": summary["interval"]}
        if name.startswith("generated/"):
            closed[name] = bootstrap.gap_closed(values, scores["universal"], scores["oracle"])
    return {
        "headline": headline,
        "gap_closed": {SPLIT: closed[headline]["value"]},
        "gap_closed_by_method": {SPLIT: closed},
        "results": {SPLIT: results},
    }


def print_table(result: dict[str, Any]) -> None:
    """Show a result as a table on standard output."""
    table = Table(title=f"{result['tasks']} unseen tasks, {result['classes']} classes, {result['backbone']}")
    for heading in ("head", "accuracy %", "95 % interval", "gap closed %", "ms per head"):
        table.add_column(heading, justify="left" if heading == "head" else "right")
    closed = {name: entry["value"] for name, entry in result["gap_closed_by_method"][SPLIT].items()}
    for name, entry in sorted(result["results"][SPLIT].items(), key=lambda item: float(item[1]["accuracy"])):
        low, high = (100 * bound for bound in entry["interval"])
        share = f"{100 * closed[name]:.1f}" if closed.get(name) is not None else ""
        speed = result["seconds_per_head"].get(name)
        table.add_row(
            name,
            f"{100 * entry['accuracy']:.2f}",
            f"{low:.2f} to {high:.2f}",
            share,
            f"{1000 * speed:.1f}" if speed else "",
        )
    Console().print(table)


def plot_accuracy(result: dict[str, Any], stem: Path) -> None:
    """Draw accuracy against denoiser calls, with the baselines as lines, to `stem`.png and `stem`.svg."""
    results = result["results"][SPLIT]
    figure, (axes,) = new_figure()
    curves: dict[str, list[tuple[int, float]]] = {}
    for name, entry in results.items():
        if name.startswith("generated/"):
            _, sampler, steps = name.split("/")
            curves.setdefault(sampler, []).append((int(steps), 100 * entry["accuracy"]))
    for sampler, points in curves.items():
        calls, values = zip(*sorted(points), strict=True)
        axes.plot(calls, values, marker="o", label=sampler)
    for name, style in (("oracle", "-"), ("universal", "--"), ("ridge from classes", ":")):
        axes.axhline(100 * results[name]["accuracy"], color="grey", linestyle=style, label=name)
    axes.set(xscale="log", xlabel="denoiser calls", ylabel="top-1 accuracy on unseen tasks, %")
    axes.legend(fontsize="small")
    save_figure(figure, stem)
