"""Is the text read? Heads generated from right and wrong texts, all scored on the right task with its own texts.

Letters: M tasks, K classes of a task, N test features of a task, D embedding size, P numbers in one head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from text2weight.descriptions import ConditionText
from text2weight.generator import GenerationRequest
from text2weight.text_encoder import read_embedding_table
from text2weight_training.bootstrap import PairedBootstrap
from text2weight_training.evaluate import generate_from_requests, task_requests
from text2weight_training.files import TrainingDataError
from text2weight_training.suites.base import SuiteRun, Task, method_name, own_accuracy, take_tasks, task_hits
from text2weight_training.suites.figures import new_figure, plot_interval, save_figure
from text2weight_training.suites.settings import table_name
from text2weight_training.suites.tables import markdown_table, percent, points

RIGHT = "right names"
REORDERED = "right names in another order"
OTHER_TASK = "another task's names"
OTHER_NAMES = "names of other classes"


def run(run: SuiteRun) -> dict[str, Any]:
    """Measure how accuracy depends on the text that a head is generated from.

    Returns:
        `tasks`; `universal`; per sampler in `samplers`: `texts` (accuracy of each kind of text and its difference
        from the right names), `dropped` (a class left out of the text: accuracy on it and on the others), or None
        where no task has three classes, and `paraphrases` (per table: on the classes it has, accuracy from its
        texts, from the right ones, and the difference); `shared_classes`, the mean share of a task's classes that
        each wrong text names.

    Raises:
        TrainingDataError: too few unseen tasks, or a paraphrase table that does not fit.
        CheckpointError: a paraphrase table cannot be read.
    """
    settings = run.preset.suites.reading
    if settings.tasks < 2:
        raise TrainingDataError("suites.reading.tasks is 1: at least 2 are needed, to give a task another one's text")
    tasks = take_tasks(run.zoo.split.unseen, settings.tasks, "suites.reading.tasks", "unseen")
    tables = {table_name(source): read_paraphrases(run, source) for source in settings.paraphrases}
    if len(tables) < len(settings.paraphrases):
        raise TrainingDataError(
            f"a paraphrase table is named twice in {', '.join(settings.paraphrases)}: name each once"
        )
    bootstrap = PairedBootstrap(len(tasks), settings.bootstrap, run.preset.seed)
    texts = wrong_texts(tasks, len(run.data.classes), run.preset.seed)
    result: dict[str, Any] = {
        "tasks": len(tasks),
        "universal": bootstrap.summary(own_accuracy(run, tasks, run.zoo.universal.expand(len(tasks), -1))),
        "shared_classes": {name: _shared(tasks, named) for name, named in texts.items() if name != REORDERED},
        "samplers": {
            method_name(sampler, steps): _measure(run, tasks, texts, tables, bootstrap, sampler, steps)
            for sampler, steps in settings.samplers
        },
    }
    _plot(run, result)
    return result


def wrong_texts(tasks: Sequence[Task], num_classes: int, seed: int) -> dict[str, list[Task]]:
    """For every task the classes whose names stand in the text in place of its own.

    Names of other classes are as many as the task has; a task of more than half of all classes has to keep some.
    """
    generator = torch.Generator().manual_seed(seed)
    reordered, others = [], []
    for task in tasks:
        order = torch.randperm(len(task), generator=generator).tolist()
        reordered.append(tuple(task[i] for i in order))
        drawn = torch.randperm(num_classes, generator=generator).tolist()
        outside = [label for label in drawn if label not in task]
        inside = [label for label in drawn if label in task]
        others.append(tuple([*outside, *inside][: len(task)]))
    return {REORDERED: reordered, OTHER_TASK: [*tasks[1:], tasks[0]], OTHER_NAMES: others}


def read_paraphrases(run: SuiteRun, source: str) -> dict[int, Tensor]:
    """Another table's embeddings (D,) of the data's classes, by label; classes it lacks are left out.

    Raises:
        CheckpointError: the table cannot be read.
        TrainingDataError: its vectors are of another size, it has the template of the data, or none of its names.
    """
    table = read_embedding_table(source)
    size = run.data.embeddings.shape[1]
    if table.embeddings.shape[1] != size:
        raise TrainingDataError(
            f"paraphrase table {source} has {table.embeddings.shape[1]} numbers per text, the checkpoint takes {size}"
        )
    if table.template == run.data.template:
        raise TrainingDataError(
            f"paraphrase table {source} has the template {table.template!r} that the data already has: name another"
        )
    rows = table.rows
    labels = [label for label, name in enumerate(run.data.classes) if name.casefold() in rows]
    if not labels:
        raise TrainingDataError(f"paraphrase table {source} has none of the {len(run.data.classes)} class names")
    return {label: table.embeddings[rows[run.data.classes[label].casefold()]] for label in labels}


def _measure(
    run: SuiteRun,
    tasks: list[Task],
    texts: dict[str, list[Task]],
    tables: dict[str, dict[int, Tensor]],
    bootstrap: PairedBootstrap,
    sampler: str,
    steps: int,
) -> dict[str, Any]:
    requests = task_requests(run.data, tasks, sampler, steps, run.preset.seed)
    heads = generate_from_requests(run.generator, requests)  # (M, P)
    right = own_accuracy(run, tasks, heads)
    measured = {RIGHT: {"accuracy": bootstrap.summary(right)}}
    for name, named in texts.items():
        wrong = generate_from_requests(run.generator, task_requests(run.data, named, sampler, steps, run.preset.seed))
        values = own_accuracy(run, tasks, wrong)
        measured[name] = {"accuracy": bootstrap.summary(values), "difference": bootstrap.summary(values - right)}
    return {
        "texts": measured,
        "dropped": _measure_dropped(run, tasks, requests, heads),
        "paraphrases": {
            name: _measure_paraphrase(run, tasks, table, name, sampler, steps) for name, table in tables.items()
        },
    }


def _measure_dropped(
    run: SuiteRun, tasks: list[Task], requests: list[GenerationRequest], heads: Tensor
) -> dict[str, Any] | None:
    """Leave one class of each task out of the text; the classifier still has all of them."""
    generator = torch.Generator().manual_seed(run.preset.seed + 1)
    kept = [i for i, task in enumerate(tasks) if len(task) > 2]
    if not kept:
        return None
    places = {i: int(torch.randint(len(tasks[i]), (), generator=generator)) for i in kept}
    shortened = [_without(requests[i], places[i]) for i in kept]
    fewer = generate_from_requests(run.generator, shortened)  # (m, P)
    rows = []
    for i, head in zip(kept, fewer, strict=True):
        hits, targets = task_hits(run, torch.stack([heads[i], head]), tasks[i])  # (2, N), (N,)
        own = targets == places[i]  # (N,)
        rows.append([float(hits[j][part].float().mean()) for part in (own, ~own) for j in (0, 1)])
    named, left_out, others_named, others = np.array(rows).T
    bootstrap = PairedBootstrap(len(kept), run.preset.suites.reading.bootstrap, run.preset.seed)
    return {
        "tasks": len(kept),
        "class": _compared(bootstrap, named, left_out),
        "other_classes": _compared(bootstrap, others_named, others),
    }


def _compared(bootstrap: PairedBootstrap, named: np.ndarray, left_out: np.ndarray) -> dict[str, Any]:
    return {
        "named": bootstrap.summary(named),
        "left_out": bootstrap.summary(left_out),
        "difference": bootstrap.summary(left_out - named),
    }


def _without(request: GenerationRequest, place: int) -> GenerationRequest:
    rest = [i for i in range(len(request.classes)) if i != place]
    text = request.condition_text
    return replace(
        request,
        classes=tuple(request.classes[i] for i in rest),
        embeddings=request.embeddings[torch.tensor(rest)],
        condition_text=text and replace(text, embeddings=text.embeddings[torch.tensor(rest)]),
    )


def _measure_paraphrase(
    run: SuiteRun, tasks: list[Task], table: dict[int, Tensor], name: str, sampler: str, steps: int
) -> dict[str, Any]:
    """Another prompt's embeddings in the text; the classifier keeps the data's own.

    Classes that the table lacks are left out of the tasks, and tasks with fewer than two others altogether.
    """
    covered = [tuple(label for label in task if label in table) for task in tasks]
    covered = [task for task in covered if len(task) >= 2]
    if not covered:
        raise TrainingDataError(f"paraphrase table {name} has two names of none of the {len(tasks)} tasks")
    requests = task_requests(run.data, covered, sampler, steps, run.preset.seed)
    changed = [
        replace(request, condition_text=ConditionText(torch.stack([table[label] for label in task]), name))  # (K, D)
        for request, task in zip(requests, covered, strict=True)
    ]
    right, values = (
        own_accuracy(run, covered, generate_from_requests(run.generator, asked)) for asked in (requests, changed)
    )
    bootstrap = PairedBootstrap(len(covered), run.preset.suites.reading.bootstrap, run.preset.seed)
    return {
        "tasks": len(covered),
        "classes": len(table),
        "right": bootstrap.summary(right),
        "accuracy": bootstrap.summary(values),
        "difference": bootstrap.summary(values - right),
    }


def _shared(tasks: Sequence[Task], named: Sequence[Task]) -> float:
    return float(np.mean([len({*task} & {*other}) / len(task) for task, other in zip(tasks, named, strict=True)]))


def _plot(run: SuiteRun, result: dict[str, Any]) -> None:
    figure, (axes,) = new_figure()
    count = len(result["samplers"])
    for place, (sampler, measured) in enumerate(result["samplers"].items()):
        for row, entry in enumerate(measured["texts"].values()):
            height = row + (place - (count - 1) / 2) * 0.5 / count
            plot_interval(axes, height, entry["accuracy"], color=f"C{place}", label=None if row else sampler)
        axes.set_yticks(range(len(measured["texts"])), list(measured["texts"]))
    axes.axvline(100 * result["universal"]["value"], color="grey", linestyle="--", label="universal")
    axes.invert_yaxis()
    axes.set(xlabel="top-1 accuracy on unseen tasks, %")
    axes.legend(fontsize="small")
    save_figure(figure, run.out / "reading")


def report(result: dict[str, Any]) -> str:
    """Markdown section: accuracy under every kind of text, and with one class left out of it."""
    shared = ", ".join(f"{name} {100 * share:.0f} %" for name, share in result["shared_classes"].items())
    text = (
        f"Accuracy in % on {result['tasks']} unseen tasks of heads generated from right and wrong texts; the "
        f"classifier always has the task's own class texts. Classes of the task that the wrong texts name by chance: "
        f"{shared}. Universal head: {percent(result['universal'])}.\n\n"
    )
    rows, dropped, paraphrased = [], [], []
    for sampler, measured in result["samplers"].items():
        for name, entry in measured["texts"].items():
            difference = points(entry["difference"]) if "difference" in entry else ""
            rows.append([name, sampler, percent(entry["accuracy"]), difference])
        for name, entry in measured["paraphrases"].items():
            label = f"{name} ({entry['classes']} classes, {entry['tasks']} tasks)"
            paraphrased.append([label, sampler, *_three(entry, "right", "accuracy")])
        if measured["dropped"] is not None:
            for name, key in (("the class left out", "class"), ("the other classes", "other_classes")):
                entry = measured["dropped"][key]
                dropped.append([name, sampler, *_three(entry, "named", "left_out")])
    text += markdown_table(["text", "sampler/steps", "accuracy", "difference"], rows)
    if dropped:
        headings = ["accuracy on", "sampler/steps", "all classes named", "one left out", "difference"]
        text += "\nOne class of each task left out of the text, but not out of the classifier:\n\n"
        text += markdown_table(headings, dropped)
    if not paraphrased:
        return text + "\nNo paraphrases were measured: no embedding table with another prompt was given.\n"
    headings = ["table", "sampler/steps", "right names", "paraphrased", "difference"]
    text += "\nOther prompts for the same names, on the classes that the table has:\n\n"
    return text + markdown_table(headings, paraphrased)


def _three(entry: dict[str, Any], before: str, after: str) -> list[str]:
    return [percent(entry[before]), percent(entry[after]), points(entry["difference"])]
