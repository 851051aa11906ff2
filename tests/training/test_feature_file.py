"""The feature file: what is written is read back, what is broken is refused with its reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from text2weight_training.feature_file import (
    FeatureFile,
    merge_feature_files,
    read_feature_file,
    write_feature_file,
)
from text2weight_training.files import TrainingDataError

SHARED = Path("../shared/data/cifar100_squeezenet11_features.safetensors")


def sample(classes: tuple[str, ...] = ("cat", "dog", "owl"), seed: int = 0) -> FeatureFile:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(9) % len(classes)
    features = torch.randn(9, 4, generator=generator).half()
    return FeatureFile(features, labels, features[:3] + 1, labels[:3], classes, "net", "resize")


def raw_file(path: Path, **changes: object) -> Path:
    """Write a feature file with some tensors or metadata replaced, or dropped where None."""
    content = sample()
    tensors: dict[str, object] = {
        "train.features": content.train_features,
        "train.labels": content.train_labels,
        "test.features": content.test_features,
        "test.labels": content.test_labels.clone(),
    }
    metadata: dict[str, object] = {"classes": json.dumps(content.classes), "backbone": "net", "preprocess": "resize"}
    for name, value in changes.items():
        group, key = (metadata, name) if name in metadata else (tensors, name.replace("_", "."))
        group[key] = value
        if value is None:
            del group[key]
    save_file(tensors, path, metadata=metadata)  # type: ignore[arg-type]
    return path


def test_round_trip(tmp_path: Path) -> None:
    content = sample()
    write_feature_file(tmp_path / "f.safetensors", content)
    read = read_feature_file(tmp_path / "f.safetensors")
    assert (read.classes, read.backbone, read.preprocess, read.dim) == (content.classes, "net", "resize", 4)
    for name in ("train_features", "train_labels", "test_features", "test_labels"):
        assert torch.equal(getattr(read, name), getattr(content, name))
    assert read.train_features.dtype == torch.float16
    assert read.train_labels.dtype == torch.int64


@pytest.mark.skipif(not SHARED.is_file(), reason="the shared CIFAR-100 features are not beside this checkout")
def test_reads_the_shared_cifar100_features() -> None:
    content = read_feature_file(SHARED)
    assert content.dim == 512
    assert len(content.classes) == 100
    assert len(content.train_labels) == 50_000


def broken(index: tuple[int, int], value: float) -> torch.Tensor:
    features = sample().train_features.clone()
    features[index] = value
    return features


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_features": broken((7, 2), float("nan"))}, "1 rows of train.features hold NaN .* row 7"),
        ({"train_features": broken((2, 0), float("inf"))}, "row 2"),
        ({"train_labels": torch.tensor([0, 1, 2, 3, 0, 0, 0, 0, 0])}, "train.labels holds 3"),
        ({"test_labels": torch.tensor([0, -1, 0])}, "test.labels holds -1"),
        ({"train_labels": torch.zeros(8, dtype=torch.int16)}, r"\(9, 4\) and train.labels \(8,\)"),
        ({"train_labels": torch.zeros(9)}, "must be integers"),
        ({"test_features": torch.zeros(3, 5)}, "have 4 numbers per image, test.features 5"),
        ({"test_features": torch.zeros(0, 4), "test_labels": torch.zeros(0, dtype=torch.int16)}, "is empty"),
        ({"test_features": None}, "lacks test.features"),
        ({"classes": None}, "has no 'classes' metadata"),
        ({"classes": "cat, dog"}, "is not JSON"),
        ({"classes": "[1, 2, 3]"}, "list of non-empty names"),
        ({"classes": '["cat", "dog", "Cat"]'}, r"occur twice.*\['cat'\]"),
        ({"backbone": None}, "does not name its backbone"),
    ],
)
def test_broken_content_is_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(TrainingDataError, match=message):
        read_feature_file(raw_file(tmp_path / "f.safetensors", **changes))


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-40], lambda data: data[:5], lambda data: b"", lambda data: b"x" * 99]
)
def test_damaged_file_is_refused(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    path = raw_file(tmp_path / "f.safetensors")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(TrainingDataError, match="damaged or not safetensors"):
        read_feature_file(path)


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingDataError, match="there is no feature file"):
        read_feature_file(tmp_path / "absent.safetensors")


def test_writing_checks_too_and_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "f.safetensors"
    write_feature_file(path, sample())
    before = path.read_bytes()
    with pytest.raises(TrainingDataError, match="holds 5"):
        write_feature_file(path, replace(sample(), test_labels=torch.tensor([5, 0, 0])))
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["f.safetensors"]


def test_merge_keeps_one_label_for_a_shared_name() -> None:
    one, two = sample(("cat", "dog", "owl")), sample(("bus", "Dog"), seed=1)
    merged = merge_feature_files([one, two])
    assert merged.classes == ("cat", "dog", "owl", "bus")
    assert torch.equal(merged.train_features, torch.cat([one.train_features, two.train_features]))
    assert merged.train_labels.tolist() == [*one.train_labels.tolist(), *[(3, 1)[int(i)] for i in two.train_labels]]
    assert merged.test_labels.tolist() == [0, 1, 2, 3, 1, 3]
    # Merging one file changes nothing.
    assert torch.equal(merge_feature_files([one]).train_labels, one.train_labels)


@pytest.mark.parametrize("field", ["backbone", "preprocess"])
def test_merge_refuses_another_backbone(field: str) -> None:
    with pytest.raises(TrainingDataError, match=f"differ in {field}: .*'other'"):
        merge_feature_files([sample(), replace(sample(), **{field: "other"})])


def test_merge_refuses_nothing_and_other_sizes() -> None:
    with pytest.raises(TrainingDataError, match="at least one"):
        merge_feature_files([])
    wide = replace(sample(), train_features=torch.zeros(9, 6), test_features=torch.zeros(3, 6))
    with pytest.raises(TrainingDataError, match="differ in dim: 4 and 6"):
        merge_feature_files([sample(), wide])
