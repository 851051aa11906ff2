"""The harder splits: class pairs that no training task holds together, and classes that no training sees.

Held-out pairs. A task of 32 classes contains 496 of the 4,950 pairs of 100 classes, so tasks that avoid many pairs
hardly exist; `HeldOut.pick` says how training tasks avoid a moderate number. Evaluation tasks are made of held-out
pairs as far as they go. The base and the universal head are trained on all classes at once, so they do tell the two
classes of a held-out pair apart; what nothing is trained on is a task with both of them.

Held-out classes. Their features and embeddings enter no training: not the base head, the universal head, the zoo,
the fresh tasks of the fit, the centre of the embeddings or the weight space.

Letters: C classes in all, K classes of a task (padded), M tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from difflib import get_close_matches
from itertools import combinations

import torch
from torch import Tensor

from text2weight.condition import plain_name
from text2weight_training.files import TrainingDataError
from text2weight_training.presets import ZooSettings
from text2weight_training.tasks import HeldOut, TaskData, TaskSplit, draw_tasks, pad_tasks

# What is held out, and the tasks of it, have random streams of their own, apart from the tasks' one.
HELD_OUT_STREAM = 1_000_003
EVALUATION_STREAM = 2_000_003


def draw_split(names: Sequence[str], settings: ZooSettings, seed: int) -> TaskSplit:
    """Draw a zoo's tasks: seen, unseen, and those of the harder splits that the settings ask for.

    A harder split has as many tasks as the unseen one, or as many as exist.

    Args:
        names: of the C classes.
        settings: numbers of tasks and classes, and what is held out.
        seed: of all draws.

    Raises:
        TrainingDataError: a split is empty, too many classes or pairs are held out to draw training tasks,
            too few classes to draw evaluation tasks of them, or a class that there is not.
    """
    num_classes, held_out = len(names), choose_held_out(names, settings, seed)
    split = draw_tasks(num_classes, settings.tasks, settings.task_size, settings.unseen_fraction, seed, held_out)
    least, greatest = settings.task_size
    count = settings.unseen_tasks
    generator = torch.Generator().manual_seed(seed + EVALUATION_STREAM)
    if held_out.pairs:
        tasks = _distinct(
            lambda size: _pair_task(num_classes, held_out, size, generator), least, greatest, count, generator
        )
        split = replace(split, held_out_pairs=tasks)
    if held_out.classes:
        new = len(held_out.classes)
        only = _distinct(
            lambda size: _shuffled(held_out.classes, generator)[:size], least, min(greatest, new), count, generator
        )
        mixed = _distinct(
            lambda size: _mixed_task(num_classes, held_out, size, generator),
            least,
            min(greatest, 2 * new),
            count,
            generator,
        )
        split = replace(split, held_out_classes=only, mixed_classes=mixed)
    return split


def choose_held_out(names: Sequence[str], settings: ZooSettings, seed: int) -> HeldOut:
    """Choose the classes, of those with these names, and the pairs of other classes that no training sees.

    Raises:
        TrainingDataError: the settings hold out nothing though they should, more pairs than there are, fewer
            classes than the least evaluation task has, or a class that there is not.
    """
    generator = torch.Generator().manual_seed(seed + HELD_OUT_STREAM)
    num_classes, asked, least = len(names), settings.held_out_classes, settings.task_size[0]
    # Drawn where classes are named, too: a list of what a fraction drew leaves the pairs as they are.
    order = torch.randperm(num_classes, generator=generator).tolist()
    labels = order[: round(asked * num_classes)] if isinstance(asked, float) else _find_labels(asked, names)
    if asked and len(labels) < least:
        shown = f" {asked}" if isinstance(asked, float) else ""
        raise TrainingDataError(
            f"zoo.held_out_classes{shown} holds out {len(labels)} of {num_classes} classes, but tasks of them "
            f"have at least {least}: hold out more, or lower zoo.task_size"
        )
    classes = tuple(sorted(labels))
    pairs = list(combinations(HeldOut(classes).training_classes(num_classes), 2))
    wanted = settings.held_out_pairs
    number = wanted if isinstance(wanted, int) else round(wanted * len(pairs))
    if wanted and not 1 <= number <= len(pairs):
        raise TrainingDataError(
            f"zoo.held_out_pairs {wanted} holds out {number} of {len(pairs)} pairs of training classes: "
            f"allowed are 1 to {len(pairs)}"
        )
    chosen = sorted(torch.randperm(len(pairs), generator=generator)[:number].tolist())
    return HeldOut(classes, tuple(pairs[i] for i in chosen))


def _find_labels(asked: Sequence[str], names: Sequence[str]) -> list[int]:
    """Labels of the classes that `zoo.held_out_classes` names; letter case and underscores do not matter.

    Raises:
        TrainingDataError: there is no class of a name, or one is named twice.
    """
    labels = {plain_name(name).casefold(): label for label, name in enumerate(names)}
    found: list[int] = []
    for name in asked:
        label = labels.get(plain_name(name).casefold())
        if label is None:
            nearest = get_close_matches(plain_name(name).casefold(), labels, n=3, cutoff=0.0)
            raise TrainingDataError(
                f"zoo.held_out_classes names {name!r}, which is none of the {len(names)} classes; the nearest are "
                f"{', '.join(nearest)}"
            )
        if label in found:
            raise TrainingDataError(f"zoo.held_out_classes names {name!r} twice: name each class once")
        found.append(label)
    return found


def fresh_task_sizes(split: TaskSplit, num_classes: int, sizes: tuple[int, int]) -> tuple[int, int]:
    """Sizes (least, greatest) that fresh tasks are drawn of: no larger than there are training classes."""
    available = len(split.held_out.training_classes(num_classes))
    return min(sizes[0], available), min(sizes[1], available)


def draw_fresh_tasks(
    split: TaskSplit, num_classes: int, count: int, sizes: tuple[int, int], generator: torch.Generator
) -> Tensor:
    """Draw class combinations that training may use: (count, K), padded with -1.

    None is an unseen task or has a held-out class or pair. Sizes are those of `fresh_task_sizes`.

    Raises:
        TrainingDataError: hardly any combination of these sizes is allowed.
    """
    available = len(split.held_out.training_classes(num_classes))
    least, greatest = fresh_task_sizes(split, num_classes, sizes)
    tasks: list[tuple[int, ...]] = []
    for _ in range(100 * count):
        if len(tasks) == count:
            return pad_tasks(tasks)
        size = int(torch.randint(least, greatest + 1, (), generator=generator))
        task = split.held_out.pick(num_classes, size, generator)
        if task is None:
            raise TrainingDataError(
                f"hardly a task of {size} of {available} classes is without one of the "
                f"{len(split.held_out.pairs)} held-out pairs: lower fit.fresh_task_size or zoo.held_out_pairs"
            )
        if split.allows(task):
            tasks.append(task)
    raise TrainingDataError(
        f"nearly all tasks of {least} to {greatest} of {available} classes are unseen: widen fit.fresh_task_size"
    )


def training_center(embeddings: Tensor, split: TaskSplit) -> Tensor:
    """Mean (D,) of the training classes' rows of embeddings (C, D)."""
    return embeddings[list(split.held_out.training_classes(len(embeddings)))].mean(0)


def training_class_names(data: TaskData, split: TaskSplit) -> tuple[str, ...]:
    """Names of the classes that training may use, in the data's order."""
    return tuple(data.classes[label] for label in split.held_out.training_classes(len(data.classes)))


def _distinct(
    draw: Callable[[int], tuple[int, ...]], least: int, greatest: int, count: int, generator: torch.Generator
) -> tuple[tuple[int, ...], ...]:
    """Up to `count` distinct class combinations of sizes drawn uniformly from least..greatest."""
    tasks: dict[frozenset[int], tuple[int, ...]] = {}
    for _ in range(20 * count):
        if len(tasks) == count:
            break
        task = draw(int(torch.randint(least, greatest + 1, (), generator=generator)))
        tasks.setdefault(frozenset(task), task)
    return tuple(tasks.values())


def _pair_task(num_classes: int, held_out: HeldOut, size: int, generator: torch.Generator) -> tuple[int, ...]:
    """Held-out pairs in random order as long as they fit, then any training classes; at least one whole pair."""
    task: dict[int, None] = {}
    for position in torch.randperm(len(held_out.pairs), generator=generator).tolist():
        joined = task | dict.fromkeys(held_out.pairs[position])
        if len(joined) <= size:
            task = joined
    for label in _shuffled(held_out.training_classes(num_classes), generator):
        if len(task) < size:
            task[label] = None
    return _shuffled(tuple(task), generator)


def _mixed_task(num_classes: int, held_out: HeldOut, size: int, generator: torch.Generator) -> tuple[int, ...]:
    """Half of the classes, rounded down, are held-out ones; the other half is a task that training allows."""
    new = _shuffled(held_out.classes, generator)[: size // 2]
    known = held_out.pick(num_classes, size - len(new), generator)
    if known is None:  # draw_tasks has drawn larger ones before
        raise TrainingDataError(
            f"{len(held_out.pairs)} held-out pairs leave hardly a task of {size - len(new)} classes without one: "
            "lower zoo.held_out_pairs"
        )
    return _shuffled((*new, *known), generator)


def _shuffled(labels: tuple[int, ...], generator: torch.Generator) -> tuple[int, ...]:
    return tuple(labels[i] for i in torch.randperm(len(labels), generator=generator).tolist())
