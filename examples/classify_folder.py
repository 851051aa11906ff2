"""Classify the pictures of a folder, with classes that you name.

    python examples/classify_folder.py my-pictures cup clock motorcycle rocket tabby

A running service (`t2w serve`) gives the head, the bundled backbone turns pictures into features on this machine, so
no picture leaves it. Needs the extra `service`, for the backbone. T2W_URL and T2W_API_KEY say where the service is.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from PIL import Image, ImageOps

from text2weight.backbone import load_backbone
from text2weight.checkpoint import bundled_checkpoint
from text2weight_client import Client

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
BATCH_SIZE = 32


def read_picture(path: Path) -> Image.Image:
    """A picture the right way up, as its camera meant it."""
    with Image.open(path) as picture:
        return ImageOps.exif_transpose(picture).convert("RGB")


def main() -> None:
    """Print one line for each picture: the most probable class and its probability."""
    parser = argparse.ArgumentParser(description="Classify the pictures of a folder.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("classes", nargs="+")
    options = parser.parse_args()

    url, api_key = os.environ.get("T2W_URL", "http://127.0.0.1:8000"), os.environ.get("T2W_API_KEY")
    with Client(url, api_key=api_key) as client:
        head = client.generate(options.classes, seed=0)

    backbone = load_backbone(bundled_checkpoint() / "backbone")
    paths = sorted(path for path in options.folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    for start in range(0, len(paths), BATCH_SIZE):
        batch = paths[start : start + BATCH_SIZE]
        features = backbone.features([read_picture(path) for path in batch])  # (N, 512)
        for path, probabilities in zip(batch, head.predict(features.numpy()), strict=True):
            best = int(probabilities.argmax())
            print(f"{path.relative_to(options.folder)}\t{head.classes[best]}\t{probabilities[best]:.2f}")


if __name__ == "__main__":
    main()
