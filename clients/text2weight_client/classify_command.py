"""`t2w classify`: what is on pictures, by the service's own backbone and a head."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from text2weight_client.client import DEFAULT_BASE_URL, DEFAULT_TIMEOUT_S, Client
from text2weight_client.command_options import (
    EXIT_CODES,
    KeyOption,
    TimeoutOption,
    UrlOption,
    one_line_errors,
    waiting,
)
from text2weight_client.errors import InvalidRequestError

if TYPE_CHECKING:
    from text2weight_client.head import GeneratedHead
    from text2weight_client.info import Limits
    from text2weight_client.results import ClassifiedImage

classify_app = typer.Typer(add_completion=False)

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
SHOWN_CLASSES = 3
PART_BYTES = 1024  # what a part of a multipart body takes beside its content, at most


@classify_app.command("classify", epilog=EXIT_CODES)
def classify(
    path: Annotated[Path, typer.Argument(metavar="HEAD", help="A head file.", dir_okay=False)],
    pictures: Annotated[
        list[Path],
        typer.Argument(metavar="PICTURES...", help=f"Files or folders; of a folder all {', '.join(SUFFIXES)} in it."),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print all classes of all pictures, as JSON.")] = False,
    url: UrlOption = DEFAULT_BASE_URL,
    api_key: KeyOption = None,
    timeout: TimeoutOption = DEFAULT_TIMEOUT_S,
) -> None:
    """Ask a running service what is on pictures, by its own backbone and a head.

    Prints a line for each picture: the file and its best classes, each with its probability, between tabs.

    Example: t2w classify head.safetensors photo.jpg my-pictures
    """
    from text2weight_client.head import GeneratedHead

    classified: list[dict[str, Any]] = []
    with one_line_errors(), Client(url, api_key=api_key, timeout_s=timeout) as client:
        head, files = GeneratedHead.load(path), _files(pictures)
        for batch in _batches(files, head, client.info().limits):
            with waiting("classifying"):
                images = _classified(client, head, batch)
            for file, image in zip(batch, images, strict=True):
                if as_json:
                    classified.append(asdict(image) | {"filename": str(file)})
                else:
                    typer.echo(_line(file, image))
    if as_json:
        typer.echo(json.dumps({"images": classified}, indent=2, ensure_ascii=False))


def _files(given: Sequence[Path]) -> list[Path]:
    files: list[Path] = []
    for path in given:
        found = [path]
        if path.is_dir():
            found = sorted(one for one in path.rglob("*") if one.suffix.lower() in SUFFIXES and one.is_file())
            if not found:
                raise ValueError(f"{path}: no picture in this folder: it needs files {', '.join(SUFFIXES)}")
        files += found
    return files


def _batches(files: Sequence[Path], head: GeneratedHead, limits: Limits) -> list[list[Path]]:
    """The files of each call: as many as the service takes pictures, and bytes, at once; at least one."""
    whole = limits.max_upload_bytes - len(head.to_bytes()) - PART_BYTES
    batches: list[list[Path]] = []
    room = 0
    for file in files:
        size = file.stat().st_size + PART_BYTES
        if not batches or len(batches[-1]) == limits.max_pictures or size > room:
            batches.append([])
            room = whole
        batches[-1].append(file)
        room -= size
    return batches


def _classified(client: Client, head: GeneratedHead, batch: Sequence[Path]) -> list[ClassifiedImage]:
    """Classify pictures; the service's `image[i]` becomes the name of the file."""
    try:
        return client.classify(head, batch)
    except InvalidRequestError as error:
        for fault in error.errors:
            number = re.fullmatch(r"image\[(\d+)\]", str(fault.get("field")))
            if number and int(number[1]) < len(batch):
                raise ValueError(f"{batch[int(number[1])]}: {fault.get('message')}") from error
        raise


def _line(file: Path, image: ClassifiedImage) -> str:
    best = [f"{one.name}\t{one.probability:.2f}" for one in image.classes[:SHOWN_CLASSES]]
    return "\t".join([str(file), *best])
