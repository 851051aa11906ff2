"""Downloadable datasets, read from small copies of their own layouts."""

from __future__ import annotations

import hashlib
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import CIFAR100

from text2weight_training import datasets
from text2weight_training.datasets import open_dataset
from text2weight_training.files import TrainingDataError


@pytest.fixture
def cifar_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """CIFAR-100's pickle layout with 12 + 4 pictures of 3 classes; torchvision is told their checksums."""
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    rng = np.random.default_rng(0)

    def write(name: str, content: object) -> str:
        data = pickle.dumps(content)
        (folder / name).write_bytes(data)
        return hashlib.md5(data).hexdigest()

    def split(count: int) -> dict[str, object]:
        data = rng.integers(0, 255, (count, 3 * 32 * 32), dtype=np.uint8)
        return {"data": data, "fine_labels": [i % 3 for i in range(count)]}

    monkeypatch.setattr(CIFAR100, "train_list", [["train", write("train", split(12))]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", write("test", split(4))]])
    names = {"fine_label_names": ["apple", "maple_tree", "bus"]}
    monkeypatch.setattr(CIFAR100, "meta", {"filename": "meta", "key": "fine_label_names", "md5": write("meta", names)})
    return tmp_path


def test_cifar100(cifar_root: Path) -> None:
    train, test = open_dataset("cifar100", cifar_root)
    assert train.classes == test.classes == ("apple", "maple tree", "bus")
    assert (len(train.keys), len(test.keys)) == (12, 4)
    assert train.labels[:4] == (0, 1, 2, 0)
    stored = pickle.loads((cifar_root / "cifar-100-python" / "test").read_bytes())["data"]
    assert np.array_equal(np.asarray(test.open(test.keys[3])).transpose(2, 0, 1).reshape(-1), stored[3])
    assert not set(train.half("first").keys) & set(train.half("second").keys)


def test_damaged_cifar100_that_cannot_be_downloaded(cifar_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(self: CIFAR100) -> None:
        raise OSError("network is unreachable")

    (cifar_root / "cifar-100-python" / "train").write_bytes(b"damaged")
    monkeypatch.setattr(CIFAR100, "download", no_network)
    with pytest.raises(TrainingDataError, match="CIFAR-100 is not there and cannot be downloaded: network"):
        open_dataset("cifar100", cifar_root)


@pytest.fixture
def caltech_root(tmp_path: Path) -> Path:
    for folder, count in (("001.ak47", 10), ("145.motorbikes-101", 5), ("024.butterfly", 6), ("257.clutter", 3)):
        for number in range(1, count + 1):
            path = tmp_path / "caltech256" / "256_ObjectCategories" / folder / f"{folder[:3]}_{number:04d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (10, 10), (number * 20, 0, 0)).save(path)
    return tmp_path


def test_caltech256_has_a_fixed_split_of_each_class(caltech_root: Path) -> None:
    train, test = open_dataset("caltech256", caltech_root)
    assert train.classes == test.classes == ("ak47", "butterfly", "motorbikes")
    assert not set(train.keys) & set(test.keys)
    assert [test.labels.count(label) for label in range(3)] == [2, 1, 1]
    assert [train.labels.count(label) for label in range(3)] == [8, 5, 4]
    again = open_dataset("caltech256", caltech_root)
    assert (again[0].keys, again[1].keys) == (train.keys, test.keys)
    assert train.open(train.keys[0]).size == (10, 10)


def test_caltech256_that_cannot_be_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_: object) -> None:
        raise OSError("network is unreachable")

    monkeypatch.setattr("torchvision.datasets.utils.download_url", no_network)
    with pytest.raises(TrainingDataError, match="Caltech-256 is not there and cannot be downloaded: network"):
        open_dataset("caltech256", tmp_path)


def test_an_unfinished_unpacking_of_caltech256_is_not_taken_for_the_data(
    caltech_root: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path_factory.mktemp("data")
    place, name = root / "caltech256", "256_ObjectCategories"
    place.mkdir()
    # torchvision takes a whole archive that is there for a finished download.
    archive = Path(shutil.make_archive(str(place / name), "tar", caltech_root / "caltech256", name))
    monkeypatch.setattr(datasets, "CALTECH_MD5", hashlib.md5(archive.read_bytes()).hexdigest())

    def killed(_: str, into: str) -> None:
        (Path(into) / name / "001.ak47").mkdir(parents=True)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("torchvision.datasets.utils.extract_archive", killed)
        with pytest.raises(KeyboardInterrupt):
            open_dataset("caltech256", root)
    assert [path.name for path in place.iterdir()] == [archive.name]
    train, test = open_dataset("caltech256", root)
    assert (len(train.keys), len(test.keys)) == (17, 4)
    assert [path.name for path in place.iterdir()] == [name]


def test_splits_with_other_classes_are_refused(tmp_path: Path) -> None:
    for path in ("train/cat/0.png", "train/dog/0.png", "test/cat/0.png"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / path)
    with pytest.raises(TrainingDataError, match=r"\['dog'\] are in only one of the splits"):
        open_dataset("folder", tmp_path)


def test_unknown_and_mistaken_datasets_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingDataError, match="unknown dataset 'mnist': give one of folder"):
        open_dataset("mnist", tmp_path)
    with pytest.raises(TrainingDataError, match="is not Tiny-ImageNet"):
        open_dataset("tiny-imagenet", tmp_path)
