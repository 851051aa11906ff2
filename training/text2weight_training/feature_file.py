"""The feature file: one backbone's features of one dataset, with labels.

safetensors with `train.features` (N, d) fp16, `train.labels`, `test.features` (M, d) fp16,
`test.labels`; metadata `classes` (JSON list in label order), `backbone`, `preprocess`.

Letters: N training images, M test images, d feature size.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from text2weight_training.files import TrainingDataError, atomic_path

TENSORS = ("train.features", "train.labels", "test.features", "test.labels")
REBUILD = "build the file again with `t2w features`"


@dataclass(frozen=True)
class FeatureFile:
    """Features and labels of a dataset's two splits.

    Attributes:
        train_features: (N, d) fp16.
        train_labels: (N,) int64, each an index into `classes`.
        test_features: (M, d) fp16.
        test_labels: (M,) int64.
        classes: class names in label order.
        backbone: description of the feature extractor.
        preprocess: description of how pictures were prepared for it.
    """

    train_features: Tensor
    train_labels: Tensor
    test_features: Tensor
    test_labels: Tensor
    classes: tuple[str, ...]
    backbone: str
    preprocess: str

    @property
    def dim(self) -> int:
        """d, the feature size."""
        return self.train_features.shape[1]


def write_feature_file(path: Path, content: FeatureFile) -> None:
    """Write `path` in one step, after the checks that `read_feature_file` makes.

    Raises:
        TrainingDataError: the content breaks the format.
    """
    _check(content, str(path))
    label_type = torch.int16 if len(content.classes) < 2**15 else torch.int64
    # Copies, because safetensors refuses tensors that share memory, as two parts of one tensor do.
    tensors = {
        "train.features": content.train_features.to(torch.float16, copy=True).contiguous(),
        "train.labels": content.train_labels.to(label_type, copy=True).contiguous(),
        "test.features": content.test_features.to(torch.float16, copy=True).contiguous(),
        "test.labels": content.test_labels.to(label_type, copy=True).contiguous(),
    }
    metadata = {
        "classes": json.dumps(list(content.classes), ensure_ascii=False),
        "backbone": content.backbone,
        "preprocess": content.preprocess,
    }
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)


def read_feature_file(path: str | Path) -> FeatureFile:
    """Read and check a feature file.

    Raises:
        TrainingDataError: missing or truncated file, missing tensor or class list, shapes that
            disagree, features that are NaN or infinite, labels outside the class list.
    """
    if not Path(path).is_file():
        raise TrainingDataError(f"there is no feature file {path}: check the path or {REBUILD}")
    try:
        with safe_open(path, "pt") as opened:
            metadata = opened.metadata() or {}
            absent = sorted(set(TENSORS) - set(opened.keys()))
            if absent:
                raise TrainingDataError(f"{path} is not a feature file: it lacks {', '.join(absent)}")
            train_features, train_labels, test_features, test_labels = map(opened.get_tensor, TENSORS)
    except (OSError, SafetensorError) as error:
        raise TrainingDataError(f"{path} is damaged or not safetensors ({error}): {REBUILD}") from error
    for name, labels in (("train.labels", train_labels), ("test.labels", test_labels)):
        if labels.is_floating_point() or labels.dtype == torch.bool:
            raise TrainingDataError(f"{path}: {name} must be integers, got {labels.dtype}: {REBUILD}")
    content = FeatureFile(
        train_features.half(),  # (N, d)
        train_labels.long(),  # (N,)
        test_features.half(),  # (M, d)
        test_labels.long(),  # (M,)
        _read_classes(path, metadata.get("classes")),
        metadata.get("backbone", ""),
        metadata.get("preprocess", ""),
    )
    _check(content, str(path))
    return content


def _read_classes(path: str | Path, text: str | None) -> tuple[str, ...]:
    if text is None:
        raise TrainingDataError(f"{path} has no 'classes' metadata, a JSON list of names in label order: {REBUILD}")
    try:
        classes = json.loads(text)
    except ValueError as error:
        raise TrainingDataError(f"{path}: the 'classes' metadata is not JSON ({error}): {REBUILD}") from error
    if not isinstance(classes, list) or not all(isinstance(name, str) and name.strip() for name in classes):
        raise TrainingDataError(f"{path}: the 'classes' metadata must be a list of non-empty names: {REBUILD}")
    return tuple(classes)


def _check(content: FeatureFile, path: str) -> None:
    if len(content.classes) < 2:
        raise TrainingDataError(f"{path} has {len(content.classes)} classes: at least 2 are needed")
    spelled = [name.casefold() for name in content.classes]
    repeated = sorted({name for name in spelled if spelled.count(name) > 1})
    if repeated:
        raise TrainingDataError(
            f"{path}: class names occur twice, so they cannot be told apart: {repeated}; rename them"
        )
    if not content.backbone:
        raise TrainingDataError(f"{path} does not name its backbone: {REBUILD}")
    _check_split(path, "train", content.train_features, content.train_labels, content.classes)
    _check_split(path, "test", content.test_features, content.test_labels, content.classes)
    if content.train_features.shape[1] != content.test_features.shape[1]:
        raise TrainingDataError(
            f"{path}: train.features have {content.train_features.shape[1]} numbers per image, "
            f"test.features {content.test_features.shape[1]}: {REBUILD}"
        )


def _check_split(path: str, split: str, features: Tensor, labels: Tensor, classes: Sequence[str]) -> None:
    if features.ndim != 2 or labels.ndim != 1 or len(features) != len(labels):
        raise TrainingDataError(
            f"{path}: {split}.features {tuple(features.shape)} and {split}.labels {tuple(labels.shape)} "
            f"must be (N, d) and (N,): {REBUILD}"
        )
    if features.numel() == 0:
        raise TrainingDataError(f"{path}: {split}.features {tuple(features.shape)} is empty: {REBUILD}")
    bad_rows = (~torch.isfinite(features)).any(dim=1).nonzero().flatten()  # (bad,)
    if len(bad_rows):
        raise TrainingDataError(
            f"{path}: {len(bad_rows)} rows of {split}.features hold NaN or infinity, the first is row "
            f"{bad_rows[0].item()}: {REBUILD}"
        )
    lowest, highest = int(labels.min()), int(labels.max())
    if lowest < 0 or highest >= len(classes):
        wrong = lowest if lowest < 0 else highest
        raise TrainingDataError(
            f"{path}: {split}.labels holds {wrong}, but there are {len(classes)} classes, "
            f"so labels go from 0 to {len(classes) - 1}: {REBUILD}"
        )


def merge_feature_files(files: Sequence[FeatureFile]) -> FeatureFile:
    """Join several datasets over one backbone into one label space.

    A class name that occurs in several files (letter case aside) keeps one label and its first spelling.

    Raises:
        TrainingDataError: no file, or files of different backbones, preprocessing or feature size.
    """
    if not files:
        raise TrainingDataError("no feature file to merge: give at least one")
    first = files[0]
    for other in files[1:]:
        for field in ("backbone", "preprocess", "dim"):
            ours, theirs = getattr(first, field), getattr(other, field)
            if ours != theirs:
                raise TrainingDataError(
                    f"feature files differ in {field}: {ours!r} and {theirs!r}; "
                    "heads need features of one backbone, so build them with equal settings"
                )
    classes: dict[str, str] = {}
    for name in (name for file in files for name in file.classes):
        classes.setdefault(name.casefold(), name)
    index = {key: label for label, key in enumerate(classes)}
    maps = [torch.tensor([index[name.casefold()] for name in file.classes]) for file in files]
    return FeatureFile(
        torch.cat([file.train_features for file in files]),  # (sum N, d)
        torch.cat([labels[file.train_labels] for labels, file in zip(maps, files, strict=True)]),
        torch.cat([file.test_features for file in files]),  # (sum M, d)
        torch.cat([labels[file.test_labels] for labels, file in zip(maps, files, strict=True)]),
        tuple(classes.values()),
        first.backbone,
        first.preprocess,
    )
