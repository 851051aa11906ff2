"""Classification tasks: which classes, which features, which embeddings.

Letters: C classes in all, K classes of a task (padded), M tasks, N features, n samples per task, d feature
size, D embedding size.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from text2weight.condition import plain_name
from text2weight.text_encoder import (
    TEMPLATE_PATTERN,
    EmbeddingTable,
    load_text_encoder,
    read_embedding_table,
)
from text2weight_training.feature_file import merge_feature_files, read_feature_file
from text2weight_training.files import TrainingDataError

PADDING = -1
# Random orders of the classes that a draw under held-out pairs goes through before it gives up.
PICK_TRIES = 20


@dataclass(frozen=True)
class ClassFeatures:
    """Features sorted by class, so that a class is a range of rows.

    Attributes:
        features: (N, d) fp16, bf16 or fp32.
        starts: (C + 1,) row where each class begins.
    """

    features: Tensor
    starts: Tensor

    @staticmethod
    def from_labels(features: Tensor, labels: Tensor, num_classes: int) -> ClassFeatures:
        """Sort features (N, d) by labels (N,)."""
        order = labels.argsort(stable=True)
        counts = torch.bincount(labels, minlength=num_classes)
        return ClassFeatures(features[order].contiguous(), torch.cat([counts.new_zeros(1), counts.cumsum(0)]))

    def to(self, device: torch.device | str) -> ClassFeatures:
        """Copy to a device."""
        return ClassFeatures(self.features.to(device), self.starts.to(device))

    def sample(self, tasks: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw samples of each task, every class equally likely.

        Args:
            tasks: (M, K) class labels, padded with -1.
            count: n, samples per task.
            generator: a CPU generator.

        Returns:
            features (M, n, d), of the stored type, and targets (M, n), positions within the task.
        """
        rows, targets = self.draw(tasks, count, generator)  # (M, n)
        return self.features[rows], targets

    def draw(self, tasks: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """As `sample`, but the samples' rows (M, n) in place of their features."""
        device = self.features.device
        sizes = (tasks != PADDING).sum(1, keepdim=True)  # (M, 1)
        draws = torch.rand(2, len(tasks), count, generator=generator).to(device)  # (2, M, n)
        targets = (draws[0] * sizes).long()  # (M, n)
        return self._rows(tasks.gather(1, targets), draws[1]), targets

    def draw_rows(self, labels: Tensor, generator: torch.Generator) -> Tensor:
        """A row of each of the classes `labels` (M, n), drawn by a CPU generator: (M, n)."""
        return self._rows(labels, torch.rand(labels.shape, generator=generator).to(labels.device))

    def _rows(self, labels: Tensor, draws: Tensor) -> Tensor:
        first, last = self.starts[labels], self.starts[labels + 1]  # (M, n)
        return first + (draws * (last - first)).long()

    def of_task(self, labels: Sequence[int]) -> tuple[Tensor, Tensor]:
        """All features of a task's classes: (N', d) fp32 and targets (N',), positions within the task."""
        spans = [slice(int(self.starts[label]), int(self.starts[label + 1])) for label in labels]
        features = torch.cat([self.features[span] for span in spans]).float()
        sizes = torch.tensor([span.stop - span.start for span in spans])
        return features, torch.repeat_interleave(torch.arange(len(labels)), sizes)


@dataclass(frozen=True)
class ConditionTexts:
    """Texts that the denoiser's condition is made from in place of the class embeddings.

    Attributes:
        embeddings: (C, D) L2-normalised, one row for each class.
        source: the embedding table they come from, "FILE#TABLE".
        name: what a person calls it.
        fingerprint: of the table.
    """

    embeddings: Tensor
    source: str
    name: str
    fingerprint: str


@dataclass(frozen=True)
class TaskData:
    """Everything tasks are made of.

    Attributes:
        classes: C names.
        embeddings: (C, D) L2-normalised text embeddings of the classes' prompts, which heads are scored against.
        template: the prompt template they were made with.
        text_source: what `load_text_encoder` takes to make more of them.
        train: features that heads and the denoiser may learn from.
        test: features that only evaluation sees.
        backbone: name and preprocessing of the features.
        fingerprint: hash of all of the above.
        condition_texts: what the denoiser reads in place of `embeddings`, if anything. No part of the fingerprint:
            heads, and so zoos, do not depend on it.
        text_model: name of the text encoder that made `embeddings`; "" where that is not recorded. No part of the
            fingerprint: the embeddings themselves are.
    """

    classes: tuple[str, ...]
    embeddings: Tensor
    template: str
    text_source: str
    train: ClassFeatures
    test: ClassFeatures
    backbone: dict[str, str]
    fingerprint: str
    condition_texts: ConditionTexts | None = None
    text_model: str = ""

    @property
    def condition_embeddings(self) -> Tensor:
        """(C, D) what the denoiser's condition is made from; the class embeddings themselves by default."""
        return self.embeddings if self.condition_texts is None else self.condition_texts.embeddings

    @property
    def condition_fingerprint(self) -> str:
        """Identifies the condition's texts; "" where they are the class embeddings."""
        return "" if self.condition_texts is None else self.condition_texts.fingerprint

    @property
    def feature_dim(self) -> int:
        """d."""
        return int(self.train.features.shape[1])

    def to(self, device: torch.device | str) -> TaskData:
        """Copy the tensors to a device."""
        texts = self.condition_texts
        return replace(
            self,
            embeddings=self.embeddings.to(device),
            train=self.train.to(device),
            test=self.test.to(device),
            condition_texts=texts and replace(texts, embeddings=texts.embeddings.to(device)),
        )


def load_task_data(
    features: Sequence[Path], text: str, template: str = "a {}", condition_text: str | None = None
) -> TaskData:
    """Join feature files and text embeddings by class name.

    Args:
        features: one or more feature files of the same backbone.
        text: "FILE#TABLE", or a text encoder as `load_text_encoder` takes it.
        template: prompt for a text encoder; a table brings its own.
        condition_text: "FILE#TABLE" of what the denoiser reads in place of the class embeddings, such as a table of
            descriptions; None for the class embeddings.

    Warns:
        UserWarning: classes that a table of names has no embedding for are left out; classes share an embedding.

    Raises:
        TrainingDataError: a file cannot be used, names repeat, fewer than two classes have an embedding, a table of
            descriptions lacks a class, or the condition's table lacks one of those that have an embedding.
        CheckpointError: the table or text encoder cannot be read.
    """
    file = merge_feature_files([read_feature_file(path) for path in features])
    names = [plain_name(name) for name in file.classes]
    _check_distinct(names)
    if text.startswith(("dir:", "open_clip:")):
        if not re.fullmatch(TEMPLATE_PATTERN, template):
            raise TrainingDataError(f"template {template!r}: one {{}} must stand for the class name")
        encoder = load_text_encoder(text)
        embeddings = encoder.encode([template.format(name) for name in names])  # (C, D)
        kept, source, text_model = list(range(len(names))), text, encoder.name
    else:
        table = read_embedding_table(text.removeprefix("table:"))
        kept = _match_names(names, table, text)
        embeddings = table.embeddings[[table.rows[names[i].casefold()] for i in kept]]  # (C, D)
        template, text_model, source = table.template, table.encoder, f"table:{text.removeprefix('table:')}"
    classes = tuple(names[i] for i in kept)
    _warn_of_equal_embeddings(classes, embeddings)
    train = _relabel(file.train_features, file.train_labels, kept)
    test = _relabel(file.test_features, file.test_labels, kept)
    digest = hashlib.sha256(repr((classes, template, file.backbone, file.preprocess)).encode())
    for tensor in (embeddings, train.features, train.starts, test.features, test.starts):
        digest.update(tensor.contiguous().numpy().tobytes())
    backbone = {"name": file.backbone, "preprocess": file.preprocess, "feature_dim": str(file.dim)}
    texts = None if condition_text is None else _read_condition_texts(condition_text, classes, embeddings.shape[1])
    return TaskData(classes, embeddings, template, source, train, test, backbone, digest.hexdigest(), texts, text_model)


def _read_condition_texts(source: str, classes: Sequence[str], size: int) -> ConditionTexts:
    source = source.removeprefix("table:")
    if source.startswith(("dir:", "open_clip:")):
        raise TrainingDataError(
            f"condition text {source}: give a table, FILE#TABLE; `t2w embed --descriptions` makes one"
        )
    table = read_embedding_table(source)
    rows = table.rows
    missing = [name for name in classes if name.casefold() not in rows]
    if missing:
        raise TrainingDataError(
            f"condition text {source} has nothing for {len(missing)} of {len(classes)} classes: {_shown(missing)}; "
            "add them and run `t2w embed` again"
        )
    if table.embeddings.shape[1] != size:
        raise TrainingDataError(
            f"condition text {source} has {table.embeddings.shape[1]} numbers per text, the class embeddings {size}: "
            "embed both with one text encoder"
        )
    embeddings = table.embeddings[[rows[name.casefold()] for name in classes]]  # (C, D)
    _warn_of_equal_embeddings(classes, embeddings)
    file, _, name = source.partition("#")
    return ConditionTexts(embeddings, source, f"table:{name or Path(file).stem}", table.fingerprint)


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (" …" if len(names) > 8 else "")


def _check_distinct(names: Sequence[str]) -> None:
    first_seen: dict[str, str] = {}
    for name in names:
        if name.casefold() in first_seen:
            raise TrainingDataError(f"the feature files spell class {name!r} in two ways: write it in one")
        first_seen[name.casefold()] = name


def _match_names(names: Sequence[str], table: EmbeddingTable, source: str) -> list[int]:
    rows = table.rows
    kept = [i for i, name in enumerate(names) if name.casefold() in rows]
    missing = [name for name in names if name.casefold() not in rows]
    if missing and table.descriptions:
        raise TrainingDataError(
            f"text {source} is a table of descriptions and has none of {len(missing)} of {len(names)} classes: "
            f"{_shown(missing)}; describe them and run `t2w embed --descriptions` again, or name another table"
        )
    if len(kept) < 2:
        raise TrainingDataError(
            f"only {len(kept)} of {len(names)} class names have an embedding in {source}: "
            f"name another table, or make one with `t2w embed`"
        )
    if missing:
        warnings.warn(f"{len(missing)} classes have no embedding and are left out: {_shown(missing)}", stacklevel=3)
    return kept


def _warn_of_equal_embeddings(classes: Sequence[str], embeddings: Tensor) -> None:
    first_seen: dict[bytes, str] = {}
    for name, row in zip(classes, embeddings, strict=True):
        twin = first_seen.setdefault(row.numpy().tobytes(), name)
        if twin != name:
            warnings.warn(f"{twin!r} and {name!r} have the same embedding: no head can tell them apart", stacklevel=3)


def _relabel(features: Tensor, labels: Tensor, kept: Sequence[int]) -> ClassFeatures:
    lookup = torch.full((max(int(labels.max()), *kept) + 1,), PADDING)
    lookup[torch.tensor(kept)] = torch.arange(len(kept))
    new = lookup[labels]  # (N,)
    present = new != PADDING
    data = ClassFeatures.from_labels(features[present], new[present], len(kept))
    empty = [i for i in range(len(kept)) if data.starts[i] == data.starts[i + 1]]
    if empty:
        raise TrainingDataError(f"classes with labels {[kept[i] for i in empty][:8]} have no features in one split")
    return data


@dataclass(frozen=True)
class HeldOut:
    """What no training may see.

    Attributes:
        classes: labels of classes that no training sees at all.
        pairs: two labels each that no training task holds together; each class alone is trained on.
    """

    classes: tuple[int, ...] = ()
    pairs: tuple[tuple[int, int], ...] = ()

    def training_classes(self, num_classes: int) -> tuple[int, ...]:
        """The labels that training may use, ascending."""
        return tuple(label for label in range(num_classes) if label not in self._class_set)

    def allows(self, task: Sequence[int]) -> bool:
        """Whether a task is free of held-out classes and pairs."""
        chosen = frozenset(task)
        return chosen.isdisjoint(self._class_set) and all(chosen.isdisjoint(self._partners(label)) for label in chosen)

    def pick(self, num_classes: int, size: int, generator: torch.Generator) -> tuple[int, ...] | None:
        """Draw one task that is allowed.

        The training classes are taken in a random order, and a class that would complete a held-out pair is
        left out. So of each held-out pair that a plain draw would contain, the one that comes later is
        replaced by the next class in the order. Without held-out pairs this is a plain draw.

        Returns:
            `size` labels; None where several orders left too few, so that such tasks are rare or do not exist.
        """
        pool = self.training_classes(num_classes)
        for _ in range(PICK_TRIES):
            task: list[int] = []
            barred: set[int] = set()
            for position in torch.randperm(len(pool), generator=generator).tolist():
                label = pool[position]
                if len(task) == size:
                    break
                if label not in barred:
                    task.append(label)
                    barred |= self._partners(label)
            if len(task) == size:
                return tuple(task)
        return None

    def _partners(self, label: int) -> frozenset[int]:
        return self._partner_sets.get(label, frozenset())

    @cached_property
    def _class_set(self) -> frozenset[int]:
        return frozenset(self.classes)

    @cached_property
    def _partner_sets(self) -> dict[int, frozenset[int]]:
        partners: dict[int, set[int]] = {}
        for one, other in self.pairs:
            partners.setdefault(one, set()).add(other)
            partners.setdefault(other, set()).add(one)
        return {label: frozenset(others) for label, others in partners.items()}


@dataclass(frozen=True)
class TaskSplit:
    """Tasks by their class labels, in disjoint lists; no class combination stands in two of them.

    Attributes:
        seen: tasks to train on.
        unseen: other combinations of the same classes, without held-out pairs.
        held_out_pairs: tasks of training classes with held-out pairs.
        held_out_classes: tasks of held-out classes only.
        mixed_classes: tasks of held-out classes and training classes, half and half.
        held_out: the classes and pairs that no training sees.
    """

    seen: tuple[tuple[int, ...], ...]
    unseen: tuple[tuple[int, ...], ...]
    held_out_pairs: tuple[tuple[int, ...], ...] = ()
    held_out_classes: tuple[tuple[int, ...], ...] = ()
    mixed_classes: tuple[tuple[int, ...], ...] = ()
    held_out: HeldOut = HeldOut()

    def allows(self, task: Sequence[int]) -> bool:
        """Whether training may use this combination of classes."""
        return frozenset(task) not in self._unseen_sets and self.held_out.allows(task)

    @property
    def combinations(self) -> frozenset[frozenset[int]]:
        """The class combinations of all lists."""
        lists = (self.seen, self.unseen, self.held_out_pairs, self.held_out_classes, self.mixed_classes)
        return frozenset(frozenset(task) for tasks in lists for task in tasks)

    @property
    def fingerprint(self) -> str:
        """Hash of all lists and of what is held out: equal where they are the same, in the same order."""
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()

    @cached_property
    def _unseen_sets(self) -> frozenset[frozenset[int]]:
        return frozenset(frozenset(task) for task in self.unseen)


def draw_tasks(
    num_classes: int,
    count: int,
    sizes: tuple[int, int],
    unseen_fraction: float,
    seed: int,
    held_out: HeldOut | None = None,
) -> TaskSplit:
    """Draw distinct class combinations with k ~ U{least..greatest} and split them once and for all.

    Args:
        num_classes: C, held-out ones included.
        count: tasks, seen and unseen together.
        sizes: least and greatest number of classes of a task.
        unseen_fraction: share of the tasks kept for evaluation.
        seed: of the draws.
        held_out: classes and pairs that no task may contain.

    Raises:
        TrainingDataError: fewer classes than the largest task, or fewer combinations than tasks.
    """
    held_out = held_out or HeldOut()
    least, greatest = sizes
    available = len(held_out.training_classes(num_classes))
    if not 2 <= least <= greatest <= available:
        kept_out = f" ({len(held_out.classes)} of {num_classes} classes are held out)" if held_out.classes else ""
        raise TrainingDataError(
            f"tasks of {least} to {greatest} classes need 2 <= least <= greatest <= {available}{kept_out}"
        )
    generator = torch.Generator().manual_seed(seed)
    tasks: dict[frozenset[int], tuple[int, ...]] = {}
    for _ in range(20 * count):
        if len(tasks) == count:
            break
        size = int(torch.randint(least, greatest + 1, (), generator=generator))
        task = held_out.pick(num_classes, size, generator)
        if task is None:
            raise TrainingDataError(
                f"{len(held_out.pairs)} held-out pairs leave hardly a task of {size} of {available} classes without "
                "one: lower zoo.held_out_pairs or the greatest zoo.task_size"
            )
        tasks.setdefault(frozenset(task), task)
    if len(tasks) < count:
        raise TrainingDataError(f"{count} distinct tasks of {least} to {greatest} classes do not exist: ask for fewer")
    ordered = list(tasks.values())
    first_unseen = count - round(count * unseen_fraction)
    return TaskSplit(tuple(ordered[:first_unseen]), tuple(ordered[first_unseen:]), held_out=held_out)


def pad_tasks(tasks: Sequence[Sequence[int]]) -> Tensor:
    """Stack tasks' labels into (M, K) int64, padded with -1."""
    longest = max(len(task) for task in tasks)
    return torch.tensor([[*task, *[PADDING] * (longest - len(task))] for task in tasks])


def task_embeddings(embeddings: Tensor, tasks: Tensor) -> tuple[Tensor, Tensor]:
    """Gather class embeddings (C, D) for tasks (M, K): (M, K, D), zero at padding, and the mask (M, K)."""
    mask = tasks != PADDING  # (M, K)
    return embeddings[tasks.clamp(min=0)] * mask.unsqueeze(-1), mask
