"""Labelled image collections: which pictures there are, and their pixels in memory.

Letters: N images, R side in pixels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from rich.progress import track

from text2weight.backbone import pixels_of
from text2weight_training.files import TrainingDataError

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}
SPLIT_NAMES = {"train": ("train", "training"), "test": ("test", "val", "valid", "validation")}
DECODE_BLOCK = 2048
LARGEST_SHIFT = 1 / 8  # of each side
Half = Literal["first", "second"]
Split = Literal["train", "test"]


@dataclass(frozen=True)
class LabelledImages:
    """Pictures with labels.

    Attributes:
        name: the dataset's name.
        keys: N names that identify the pictures within the dataset, wherever it lies.
        labels: N indices into `classes`.
        classes: class names.
        open: returns the RGB picture of a key; raises TrainingDataError naming a broken one.
    """

    name: str
    keys: tuple[str, ...]
    labels: tuple[int, ...]
    classes: tuple[str, ...]
    open: Callable[[str], Image.Image]

    def half(self, which: Half) -> LabelledImages:
        """Return one of two disjoint halves.

        The side of an image is a hash of its key, so it depends neither on the order of the images
        nor on which others exist: a backbone trained on one half never saw the other.
        """
        return self.subset([i for i, key in enumerate(self.keys) if _half_of(key) == which])

    def subset(self, indices: Iterable[int]) -> LabelledImages:
        """Return the pictures at `indices`, with all class names kept."""
        chosen = list(indices)
        keys, labels = tuple(self.keys[i] for i in chosen), tuple(self.labels[i] for i in chosen)
        return LabelledImages(self.name, keys, labels, self.classes, self.open)

    def with_views(self, count: int) -> LabelledImages:
        """Return `count` views of each picture, all pictures' first ones first: more to learn from.

        The first is the picture itself and the second its mirror image; further ones are shifted at random by up to an
        eighth of each side, filled up by reflection, and every other one is mirrored, too. What a view looks like
        depends on the picture's key and the view's number alone.
        """
        names = [(key, number) for number in range(count) for key in self.keys]
        keys = tuple(f"{key}\tview {number}" if number else key for key, number in names)
        origins = dict(zip(keys, names, strict=True))

        def open_view(key: str) -> Image.Image:
            origin, number = origins[key]
            return _view(self.open(origin), key, number)

        return LabelledImages(self.name, keys, self.labels * count, self.classes, open_view)

    @property
    def digest(self) -> str:
        """SHA-256 of the keys and labels: equal for equal lists of pictures."""
        state = hashlib.sha256()
        for key, label in zip(self.keys, self.labels, strict=True):
            state.update(f"{label}\t{key}\n".encode())
        return state.hexdigest()


def _half_of(key: str) -> Half:
    return "first" if hashlib.sha256(key.encode()).digest()[0] % 2 == 0 else "second"


def _view(picture: Image.Image, key: str, number: int) -> Image.Image:
    """View `number` of a picture; see `LabelledImages.with_views`."""
    if number % 2:
        picture = ImageOps.mirror(picture)
    if number < 2:
        return picture
    pixels = np.asarray(picture)  # (H, W, 3)
    most = [int(side * LARGEST_SHIFT) for side in pixels.shape[:2]]
    padded = np.pad(pixels, [(room, room) for room in most] + [(0, 0)], mode="reflect")
    source = np.random.default_rng(list(hashlib.sha256(key.encode()).digest()))
    top, left = (int(source.integers(0, 2 * room, endpoint=True)) for room in most)
    return Image.fromarray(padded[top : top + pixels.shape[0], left : left + pixels.shape[1]])


def find_images(root: Path, split: Split) -> LabelledImages:
    """List the images of one split of a folder.

    Two layouts are read: `split/class/image` (any depth below the class), and Tiny-ImageNet's own
    (`words.txt`, `train/<wnid>/images`, `val/val_annotations.txt`), whose classes are named by the
    first synonym of each WordNet id.

    Args:
        root: the dataset's folder.
        split: "train" or "test"; the folder may also be called val, valid or validation.

    Raises:
        TrainingDataError: no such split, no image in it, or an annotation that names an unknown class.
    """
    folder = next((root / name for name in SPLIT_NAMES[split] if _has_labels(root / name)), None)
    if folder is None:
        wanted = ", ".join(SPLIT_NAMES[split])
        raise TrainingDataError(f"{root} has no labelled '{split}' split: expected one of the folders {wanted}")
    if (root / "words.txt").is_file():
        pairs, classes = _tiny_imagenet(root, folder)
    else:
        pairs, classes = _class_folders(folder)
    if not pairs:
        raise TrainingDataError(f"{folder} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    keys = tuple(path.relative_to(root).as_posix() for path, _ in pairs)
    return LabelledImages(
        root.resolve().name, keys, tuple(label for _, label in pairs), classes, lambda key: open_picture(root / key)
    )


def open_picture(path: Path) -> Image.Image:
    """Read a picture file as RGB.

    Raises:
        TrainingDataError: it is missing or not a picture; the message names it.
    """
    try:
        with Image.open(path) as opened:
            return opened.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise TrainingDataError(f"{path} is not a readable image: {error}; replace or remove it") from error


def _has_labels(folder: Path) -> bool:
    if (folder / "val_annotations.txt").is_file():
        return True
    subfolders = [entry for entry in folder.iterdir() if entry.is_dir()] if folder.is_dir() else []
    # Tiny-ImageNet's test split is one unlabelled folder named "images".
    return bool(subfolders) and [entry.name for entry in subfolders] != ["images"]


def _images_below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)


def _class_folders(folder: Path) -> tuple[list[tuple[Path, int]], tuple[str, ...]]:
    class_folders = sorted(entry for entry in folder.iterdir() if entry.is_dir())
    pairs = [(path, label) for label, entry in enumerate(class_folders) for path in _images_below(entry)]
    return pairs, tuple(entry.name.replace("_", " ") for entry in class_folders)


def _tiny_imagenet(root: Path, folder: Path) -> tuple[list[tuple[Path, int]], tuple[str, ...]]:
    words = dict(line.split("\t", 1) for line in (root / "words.txt").read_text().splitlines() if "\t" in line)
    ids = sorted(entry.name for entry in (root / "train").iterdir() if entry.is_dir())
    _check_known(ids, words, root / "words.txt")
    index = {wnid: label for label, wnid in enumerate(ids)}
    classes = tuple(words[wnid].split(",")[0].strip() for wnid in ids)
    annotations = folder / "val_annotations.txt"
    if not annotations.is_file():
        return [(path, index[wnid]) for wnid in ids for path in _images_below(folder / wnid)], classes
    rows = [line.split("\t") for line in annotations.read_text().splitlines() if "\t" in line]
    _check_known([row[1] for row in rows], index, annotations)
    return [(folder / "images" / row[0], index[row[1]]) for row in rows], classes


def _check_known(ids: Iterable[str], known: Iterable[str], file: Path) -> None:
    unknown = sorted(set(ids) - set(known))
    if unknown:
        raise TrainingDataError(
            f"{file} does not fit the training folders: {', '.join(unknown[:5])} is only in one of them"
        )


def check_same_classes(train: LabelledImages, test: LabelledImages) -> None:
    """Raise TrainingDataError where two splits do not have the same classes."""
    different = sorted(set(train.classes) ^ set(test.classes))
    if different:
        raise TrainingDataError(
            f"{train.name}: the classes {different[:5]} are in only one of the splits train and test; "
            "each split needs a folder for each class"
        )


def decode_blocks(images: LabelledImages, side: int, block: int = DECODE_BLOCK) -> Iterator[torch.Tensor]:
    """Yield the pictures' pixels in order, `block` at a time, decoding one block ahead.

    Args:
        images: what to read.
        side: R; shorter side resized to it, centre square cut out.
        block: images per tensor; the last one holds the rest.

    Yields:
        (B, 3, R, R) uint8, RGB.

    Raises:
        TrainingDataError: a file is not a readable image (its path is named).
    """

    def decode(key: str) -> np.ndarray:
        return pixels_of([images.open(key)], side)[0].numpy()

    def decode_from(start: int) -> torch.Tensor:
        return torch.from_numpy(np.stack(list(pool.map(decode, images.keys[start : start + block]))))

    pending: Future[torch.Tensor] | None = None
    with ThreadPoolExecutor() as pool, ThreadPoolExecutor(1) as ahead:
        for start in range(0, len(images.keys), block):
            current, pending = pending, ahead.submit(decode_from, start)
            if current is not None:
                yield current.result()
        if pending is not None:
            yield pending.result()


def load_pixels(images: LabelledImages, side: int) -> torch.Tensor:
    """Decode every image once into memory; see `decode_blocks`.

    Returns:
        (N, 3, R, R) uint8, RGB.
    """
    pixels = torch.empty(len(images.keys), 3, side, side, dtype=torch.uint8)  # (N, 3, R, R)
    blocks = -(-len(images.keys) // DECODE_BLOCK)
    done = 0
    for block in track(decode_blocks(images, side), f"decoding {images.name}", total=blocks):
        pixels[done : done + len(block)] = block
        done += len(block)
    return pixels


def concatenate_labels(datasets: Sequence[LabelledImages]) -> tuple[torch.Tensor, list[range]]:
    """Give several datasets one label space, each dataset its own range of it.

    Returns:
        labels (N,) int64 over all images, and each dataset's range of labels.
    """
    ranges: list[range] = []
    labels: list[int] = []
    for dataset in datasets:
        start = ranges[-1].stop if ranges else 0
        ranges.append(range(start, start + len(dataset.classes)))
        labels.extend(start + label for label in dataset.labels)
    return torch.tensor(labels), ranges


def batches(count: int, size: int, generator: torch.Generator) -> Iterable[torch.Tensor]:
    """Yield shuffled index batches of one epoch; a last, smaller batch is dropped."""
    order = torch.randperm(count, generator=generator)
    yield from order[: count // size * size].split(size)
