"""The datasets that `t2w features` knows, each as a train and a test `LabelledImages`."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image

from text2weight_training.files import TrainingDataError
from text2weight_training.image_data import LabelledImages, check_same_classes, find_images, open_picture

Splits = tuple[LabelledImages, LabelledImages]
CALTECH_TEST_SHARE = 0.2
CALTECH_CLUTTER = "clutter"
CALTECH = "256_ObjectCategories"
CALTECH_URL = f"https://data.caltech.edu/records/nyy15-4j048/files/{CALTECH}.tar"
CALTECH_MD5 = "67b4f42ca05d46448c6bb8ecd2220f6d"
TINY_IMAGENET = "tiny-imagenet-200"
TINY_IMAGENET_URL = f"http://cs231n.stanford.edu/{TINY_IMAGENET}.zip"
TINY_IMAGENET_MD5 = "90528d7ca1a48142e341f4ef8d21d0de"


def open_dataset(name: str, root: Path) -> Splits:
    """Open a dataset's train and test splits.

    Args:
        name: "folder", "tiny-imagenet", "cifar100" or "caltech256"; the last two are downloaded
            into `root` when they are not there.
        root: where the dataset lies.

    Raises:
        TrainingDataError: unknown name, or data that is missing, damaged or cannot be downloaded.
    """
    if name not in DATASETS:
        raise TrainingDataError(f"unknown dataset {name!r}: give one of {', '.join(DATASETS)}")
    return DATASETS[name](root)


def _folder(root: Path) -> Splits:
    train, test = find_images(root, "train"), find_images(root, "test")
    check_same_classes(train, test)
    return train, test


def _tiny_imagenet(root: Path) -> Splits:
    if not (root / "words.txt").is_file():
        raise TrainingDataError(
            f"{root} is not Tiny-ImageNet: it has no words.txt; for other folders use --dataset folder"
        )
    return _folder(root)


def download_tiny_imagenet(root: Path) -> Path:
    """Download Tiny-ImageNet, which torchvision does not know, unless it is there.

    Args:
        root: the folder that its own folder goes into.

    Returns:
        its own folder, for `open_dataset`.

    Raises:
        TrainingDataError: it cannot be downloaded, or arrives damaged.
    """
    return _unpacked("Tiny-ImageNet", root / TINY_IMAGENET, TINY_IMAGENET_URL, TINY_IMAGENET_MD5)


def _cifar100(root: Path) -> Splits:
    from torchvision.datasets import CIFAR100

    return _cifar_split(root, CIFAR100, "train"), _cifar_split(root, CIFAR100, "test")


def _cifar_split(root: Path, dataset: Callable[..., object], split: str) -> LabelledImages:
    # Only torchvision's documented attributes are read, so pictures are decoded when they are needed.
    opened = _download("CIFAR-100", lambda: dataset(str(root), train=split == "train", download=True))
    data, labels = opened.data, tuple(int(label) for label in opened.targets)  # type: ignore[attr-defined]
    classes = tuple(name.replace("_", " ") for name in opened.classes)  # type: ignore[attr-defined]
    keys = tuple(f"{split}/{i:05d}" for i in range(len(labels)))
    return LabelledImages(
        "cifar100", keys, labels, classes, lambda key: Image.fromarray(data[int(key.rpartition("/")[2])])
    )


def _caltech256(root: Path) -> Splits:
    # torchvision's own class unpacks in place, and takes what an interrupted unpacking left for the data.
    pictures = _unpacked("Caltech-256", root / "caltech256" / CALTECH, CALTECH_URL, CALTECH_MD5)
    # Class 257 is "clutter", pictures of anything, and its name says nothing about them.
    folders = sorted(f for f in pictures.iterdir() if f.is_dir() and not f.name.endswith(CALTECH_CLUTTER))
    classes = tuple(_caltech_name(folder.name) for folder in folders)
    parts: dict[str, tuple[list[str], list[int]]] = {"train": ([], []), "test": ([], [])}
    for label, folder in enumerate(folders):
        files = sorted(path.relative_to(pictures).as_posix() for path in folder.glob("*.jpg"))
        # The dataset has no official split: a fifth of each class, drawn with a fixed seed, is for testing.
        random.Random(f"caltech256 {folder.name}").shuffle(files)
        held_out = max(1, round(len(files) * CALTECH_TEST_SHARE))
        for split, chosen in (("test", files[:held_out]), ("train", files[held_out:])):
            parts[split][0].extend(sorted(chosen))
            parts[split][1].extend([label] * len(chosen))
    train, test = (
        LabelledImages("caltech256", tuple(keys), tuple(labels), classes, lambda key: open_picture(pictures / key))
        for keys, labels in (parts["train"], parts["test"])
    )
    return train, test


def _caltech_name(folder: str) -> str:
    """Turn "063.electric-guitar-101" into "electric guitar"."""
    return folder.split(".", 1)[-1].removesuffix("-101").replace("-", " ")


def _unpacked(name: str, folder: Path, url: str, md5: str) -> Path:
    """Download and unpack an archive that holds `folder`, unless that is there; it appears whole or not at all."""
    from torchvision.datasets.utils import download_url, extract_archive

    root, archive = folder.parent, url.rpartition("/")[2]
    if not folder.is_dir():
        _download(name, lambda: download_url(url, str(root), archive, md5))
        with TemporaryDirectory(dir=root) as scratch:
            extract_archive(str(root / archive), scratch)
            (Path(scratch) / folder.name).rename(folder)
        (root / archive).unlink()
    return folder


def _download(name: str, open_it: Callable[[], object]) -> object:
    try:
        return open_it()
    except (OSError, RuntimeError) as error:
        raise TrainingDataError(f"{name} is not there and cannot be downloaded: {error}") from error


DATASETS: dict[str, Callable[[Path], Splits]] = {
    "folder": _folder,
    "tiny-imagenet": _tiny_imagenet,
    "cifar100": _cifar100,
    "caltech256": _caltech256,
}
