"""Classification tasks: which classes, which features, which embeddings.

Letters: C classes in all, K classes of a task (padded), M tasks, N features, n samples per task, d feature
size, D embedding size.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
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
        device = self.features.device
        sizes = (tasks != PADDING).sum(1, keepdim=True)  # (M, 1)
        draws = torch.rand(2, len(tasks), count, generator=generator).to(device)  # (2, M, n)
        targets = (draws[0] * sizes).long()  # (M, n)
        labels = tasks.gather(1, targets)  # (M, n)
        first, last = self.starts[labels], self.starts[labels + 1]
        rows = first + (draws[1] * (last - first)).long()  # (M, n)
        return self.features[rows], targets

    def of_task(self, labels: Sequence[int]) -> tuple[Tensor, Tensor]:
        """All features of a task's classes: (N', d) fp32 and targets (N',), positions within the task."""
        spans = [slice(int(self.starts[label]), int(self.starts[label + 1])) for label in labels]
        features = torch.cat([self.features[span] for span in spans]).float()
        sizes = torch.tensor([span.stop - span.start for span in spans])
        return features, torch.repeat_interleave(torch.arange(len(labels)), sizes)


@dataclass(frozen=True)
class TaskData:
    """Everything tasks are made of.

    Attributes:
        classes: C names.
        embeddings: (C, D) L2-normalised text embeddings of the classes' prompts.
        template: the prompt template they were made with.
        text_source: what `load_text_encoder` takes to make more of them.
        train: features that heads and the denoiser may learn from.
        test: features that only evaluation sees.
        backbone: name and preprocessing of the features.
        fingerprint: hash of all of the above.
    """

    classes: tuple[str, ...]
    embeddings: Tensor
    template: str
    text_source: str
    train: ClassFeatures
    test: ClassFeatures
    backbone: dict[str, str]
    fingerprint: str

    @property
    def feature_dim(self) -> int:
        """d."""
        return int(self.train.features.shape[1])

    def to(self, device: torch.device | str) -> TaskData:
        """Copy the tensors to a device."""
        return replace(
            self, embeddings=self.embeddings.to(device), train=self.train.to(device), test=self.test.to(device)
        )


def load_task_data(features: Sequence[Path], text: str, template: str = "a {}") -> TaskData:
    """Join feature files and text embeddings by class name.

    Args:
        features: one or more feature files of the same backbone.
        text: "FILE#TABLE", or a text encoder as `load_text_encoder` takes it.
        template: prompt for a text encoder; a table brings its own.

    Warns:
        UserWarning: classes that a table has no embedding for are left out; classes share an embedding.

    Raises:
        TrainingDataError: a file cannot be used, names repeat, or fewer than two classes have an embedding.
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
        kept, source = list(range(len(names))), text
    else:
        table = read_embedding_table(text.removeprefix("table:"))
        kept = _match_names(names, table, text)
        embeddings = table.embeddings[[table.rows[names[i].casefold()] for i in kept]]  # (C, D)
        template, source = table.template, f"table:{text.removeprefix('table:')}"
    classes = tuple(names[i] for i in kept)
    _warn_of_equal_embeddings(classes, embeddings)
    train = _relabel(file.train_features, file.train_labels, kept)
    test = _relabel(file.test_features, file.test_labels, kept)
    digest = hashlib.sha256(repr((classes, template, file.backbone, file.preprocess)).encode())
    for tensor in (embeddings, train.features, train.starts, test.features, test.starts):
        digest.update(tensor.contiguous().numpy().tobytes())
    backbone = {"name": file.backbone, "preprocess": file.preprocess, "feature_dim": str(file.dim)}
    return TaskData(classes, embeddings, template, source, train, test, backbone, digest.hexdigest())


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
    if len(kept) < 2:
        raise TrainingDataError(
            f"only {len(kept)} of {len(names)} class names have an embedding in {source}: "
            f"name another table, or make one with `t2w embed`"
        )
    if missing:
        shown = ", ".join(missing[:8]) + (" …" if len(missing) > 8 else "")
        warnings.warn(f"{len(missing)} classes have no embedding and are left out: {shown}", stacklevel=3)
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
class TaskSplit:
    """Tasks by their class labels, in two disjoint lists; no class combination stands in both."""

    seen: tuple[tuple[int, ...], ...]
    unseen: tuple[tuple[int, ...], ...]

    def allows(self, task: Sequence[int]) -> bool:
        """Whether training may use this combination of classes."""
        return frozenset(task) not in self._unseen_sets

    @cached_property
    def _unseen_sets(self) -> frozenset[frozenset[int]]:
        return frozenset(frozenset(task) for task in self.unseen)


def draw_tasks(num_classes: int, count: int, sizes: tuple[int, int], unseen_fraction: float, seed: int) -> TaskSplit:
    """Draw distinct class combinations with k ~ U{least..greatest} and split them once and for all.

    Raises:
        TrainingDataError: fewer classes than the largest task, or fewer combinations than tasks.
    """
    least, greatest = sizes
    if not 2 <= least <= greatest <= num_classes:
        raise TrainingDataError(f"tasks of {least} to {greatest} classes need 2 <= least <= greatest <= {num_classes}")
    generator = torch.Generator().manual_seed(seed)
    tasks: dict[frozenset[int], tuple[int, ...]] = {}
    for _ in range(20 * count):
        if len(tasks) == count:
            break
        size = int(torch.randint(least, greatest + 1, (), generator=generator))
        task = tuple(torch.randperm(num_classes, generator=generator)[:size].tolist())
        tasks.setdefault(frozenset(task), task)
    if len(tasks) < count:
        raise TrainingDataError(f"{count} distinct tasks of {least} to {greatest} classes do not exist: ask for fewer")
    ordered = list(tasks.values())
    first_unseen = count - round(count * unseen_fraction)
    return TaskSplit(tuple(ordered[:first_unseen]), tuple(ordered[first_unseen:]))


def pad_tasks(tasks: Sequence[Sequence[int]]) -> Tensor:
    """Stack tasks' labels into (M, K) int64, padded with -1."""
    longest = max(len(task) for task in tasks)
    return torch.tensor([[*task, *[PADDING] * (longest - len(task))] for task in tasks])


def task_embeddings(embeddings: Tensor, tasks: Tensor) -> tuple[Tensor, Tensor]:
    """Gather class embeddings (C, D) for tasks (M, K): (M, K, D), zero at padding, and the mask (M, K)."""
    mask = tasks != PADDING  # (M, K)
    return embeddings[tasks.clamp(min=0)] * mask.unsqueeze(-1), mask
