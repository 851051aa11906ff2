"""Image folders: both layouts, stable disjoint halves, broken pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from text2weight_training.files import TrainingDataError
from text2weight_training.image_data import LabelledImages, decode_blocks, find_images, load_pixels


def save_picture(path: Path, colour: tuple[int, int, int] = (10, 200, 30), size: tuple[int, int] = (12, 8)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def class_folder(root: Path, count: int = 6) -> Path:
    for split in ("train", "test"):
        for name in ("red_fox", "owl"):
            for number in range(count):
                save_picture(root / split / name / f"{number}.png")
    return root


def tiny_imagenet_folder(root: Path) -> Path:
    root.mkdir()
    (root / "words.txt").write_text("n02\tgoldfish, Carassius auratus\nn01\tbullfrog\nn09\tnever used\n")
    for wnid in ("n01", "n02"):
        for number in range(3):
            save_picture(root / "train" / wnid / "images" / f"{wnid}_{number}.JPEG")
    for number, _ in enumerate(("n02", "n01")):
        save_picture(root / "val" / "images" / f"val_{number}.JPEG")
    (root / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn02\t0\t0\t9\t9\nval_1.JPEG\tn01\t0\t0\t9\t9\n")
    save_picture(root / "test" / "images" / "test_0.JPEG")
    return root


def test_class_folders_give_names_and_labels(tmp_path: Path) -> None:
    train = find_images(class_folder(tmp_path / "pets"), "train")
    assert train.name == "pets"
    assert train.classes == ("owl", "red fox")
    assert [train.keys[i].split("/")[1] for i in (0, -1)] == ["owl", "red_fox"]
    assert train.labels == (0,) * 6 + (1,) * 6


def test_tiny_imagenet_takes_first_synonyms_and_val_annotations(tmp_path: Path) -> None:
    root = tiny_imagenet_folder(tmp_path / "tiny")
    train, test = find_images(root, "train"), find_images(root, "test")
    assert train.classes == test.classes == ("bullfrog", "goldfish")
    assert train.labels == (0, 0, 0, 1, 1, 1)
    assert test.keys == ("val/images/val_0.JPEG", "val/images/val_1.JPEG")
    assert test.labels == (1, 0)


def test_annotation_of_an_unknown_class_is_named(tmp_path: Path) -> None:
    root = tiny_imagenet_folder(tmp_path / "tiny")
    (root / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn77\t0\t0\t9\t9\n")
    with pytest.raises(TrainingDataError, match="n77"):
        find_images(root, "test")


def test_halves_are_disjoint_complete_and_stable(tmp_path: Path) -> None:
    images = find_images(class_folder(tmp_path / "a", count=40), "train")
    first, second = images.half("first"), images.half("second")
    assert set(first.keys) | set(second.keys) == set(images.keys)
    assert not set(first.keys) & set(second.keys)
    assert 20 < len(first.keys) < 60
    # Neither the place of the dataset nor its other images move an image to the other half.
    smaller = find_images(class_folder(tmp_path / "elsewhere" / "b", count=10), "train").half("first")
    assert set(smaller.keys) == set(first.keys) & {f"train/{c}/{i}.png" for c in ("owl", "red_fox") for i in range(10)}


def test_missing_split_and_empty_split_are_errors(tmp_path: Path) -> None:
    save_picture(tmp_path / "train" / "cat" / "0.png")
    with pytest.raises(TrainingDataError, match="no labelled 'test' split"):
        find_images(tmp_path, "test")
    (tmp_path / "val" / "cat").mkdir(parents=True)
    with pytest.raises(TrainingDataError, match="holds no images"):
        find_images(tmp_path, "test")


@pytest.mark.parametrize("content", [b"not a picture", b"", b"\x89PNG\r\n\x1a\n half a header"])
def test_broken_image_is_named(tmp_path: Path, content: bytes) -> None:
    root = class_folder(tmp_path)
    (root / "train" / "owl" / "3.png").write_bytes(content)
    with pytest.raises(TrainingDataError, match=r"owl/3\.png is not a readable image"):
        load_pixels(find_images(root, "train"), 8)


def test_truncated_image_is_named(tmp_path: Path) -> None:
    path = class_folder(tmp_path) / "train" / "owl" / "3.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(TrainingDataError, match=r"owl/3\.png"):
        load_pixels(find_images(tmp_path, "train"), 8)


def test_blocks_come_in_order_and_equal_one_by_one_decoding(tmp_path: Path) -> None:
    for number in range(7):
        save_picture(tmp_path / "train" / "c" / f"{number}.png", (number, 255 - number, 3), size=(20, 9))
    images = find_images(tmp_path, "train")
    blocks = list(decode_blocks(images, 8, block=3))
    assert [len(block) for block in blocks] == [3, 3, 1]
    assert torch.cat(blocks)[:, 0, 4, 4].tolist() == list(range(7))
    assert torch.equal(torch.cat(blocks), load_pixels(images, 8))


def test_no_images_give_no_blocks(tmp_path: Path) -> None:
    images = find_images(class_folder(tmp_path), "train").subset([])
    assert list(decode_blocks(images, 8)) == []


def speckled(root: Path, side: int = 16) -> Path:
    """A data set of one class whose two pictures have no two pixels alike."""
    for number in range(2):
        pixels = np.random.default_rng(number).permutation(side * side * 3).reshape(side, side, 3) % 256
        path = root / "train" / "fox" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(path)
    return root


def pixels_by_view(images: LabelledImages, views: int) -> np.ndarray:
    """(views, N, H, W, 3)"""
    viewed = images.with_views(views)
    pixels = np.stack([np.asarray(viewed.open(key)) for key in viewed.keys])
    return pixels.reshape(views, len(images.keys), *pixels.shape[1:])


def test_views_are_the_picture_its_mirror_image_and_shifted_ones(tmp_path: Path) -> None:
    images = find_images(speckled(tmp_path), "train")
    views = pixels_by_view(images, 6)
    plain = views[0]
    for view, expected in ((0, plain), (1, plain[:, :, ::-1])):
        np.testing.assert_array_equal(views[view], expected)
    for view in range(2, 6):
        for number in range(2):
            origin = plain[number, :, ::-1] if view % 2 else plain[number]
            padded = np.pad(origin, [(2, 2), (2, 2), (0, 0)], mode="reflect")
            windows = [padded[top : top + 16, left : left + 16] for top in range(5) for left in range(5)]
            assert sum(np.array_equal(window, views[view, number]) for window in windows) == 1
    shifts = {views[view, number].tobytes() for view in (2, 4) for number in range(2)}
    assert len(shifts) == 4


def test_a_view_depends_on_the_picture_and_its_number_alone(tmp_path: Path) -> None:
    images = find_images(speckled(tmp_path), "train")
    many, few = pixels_by_view(images, 6), pixels_by_view(images.subset([1]), 4)
    np.testing.assert_array_equal(many[:4, 1], few[:, 0])


def test_views_have_their_pictures_labels_and_another_digest(tmp_path: Path) -> None:
    images = find_images(class_folder(tmp_path, 3), "train")
    viewed = images.with_views(2)
    assert viewed.labels == images.labels * 2
    assert viewed.keys[:6] == images.keys
    assert viewed.digest != images.digest
    assert images.with_views(1).digest == images.digest


def test_a_broken_picture_is_named_in_a_view_too(tmp_path: Path) -> None:
    images = find_images(class_folder(tmp_path, 2), "train")
    (tmp_path / images.keys[3]).write_bytes(b"no picture")
    viewed = images.with_views(3)
    with pytest.raises(TrainingDataError, match=r"red_fox/1\.png is not a readable image"):
        viewed.open(viewed.keys[-1])
