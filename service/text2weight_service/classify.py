"""Pictures through the checkpoint's backbone and a head: strict decoding, one request at a time, off the event loop.

Letters: N pictures, K classes, R side in pixels, D features.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor

from text2weight.artifact import HeadArtifact, read_head
from text2weight.backbone import Backbone, load_backbone, pixels_of
from text2weight.errors import ArtifactError, InvalidInputError
from text2weight.head import apply_heads, class_logits
from text2weight_service.engine import BusyError
from text2weight_service.model import Model
from text2weight_service.uploads import run_in_time

MAX_PICTURES = 16
MAX_PIXELS = 25_000_000
# Preprocessing enlarges the shorter side of a picture to R, and the longer one with it.
MAX_ASPECT = 32
# A progressive JPEG of a few hundred bytes per scan can ask for thousands of passes over all its pixels.
MAX_JPEG_SCANS = 500
_SCAN = b"\xff\xda"
FORMATS = ("JPEG", "PNG", "WEBP")
# Each place may hold an upload in memory.
MAX_PLACES = 8
_RETRY_AFTER_S = 1


@dataclass(frozen=True)
class ClassifyJob:
    """Pictures to classify, as they came in.

    Attributes:
        head: safetensors bytes.
        pictures: N encoded pictures.
        backbone: folder of the backbone.
        backbone_name: as heads name it in their metadata.
        deadline: `time.monotonic()` at which the caller gives up.
    """

    head: bytes
    pictures: Sequence[bytes]
    backbone: Path
    backbone_name: str
    deadline: float


def backbone_folder(model: Model) -> Path | None:
    """Where the loaded checkpoint keeps its image backbone; None if it has none."""
    folder = model.path / "backbone"
    return folder if (folder / "config.json").is_file() else None


class PictureClassifier:
    """Classifies pictures on one thread of its own, on the CPU.

    A denoiser on a GPU goes on undisturbed; with one on the CPU it shares the cores.
    """

    def __init__(self, max_classes: int) -> None:
        """Prepare a classifier; the backbone is loaded with the first request.

        Args:
            max_classes: most classes of a head.
        """
        self._max_classes = max_classes
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="t2w-pictures")
        self._places = MAX_PLACES
        self._backbone: Backbone | None = None

    @contextmanager
    def place(self) -> Iterator[None]:
        """Hold one of the places; take it before the upload is read.

        Raises:
            BusyError: all of them are taken.
        """
        if self._places == 0:
            raise BusyError(f"{MAX_PLACES} uploads are being worked on", _RETRY_AFTER_S)
        self._places -= 1
        try:
            yield
        finally:
            self._places += 1

    async def classify(self, job: ClassifyJob) -> list[list[tuple[str, float]]]:
        """Give every picture its classes with their probabilities, best first.

        Cancelled or late, it stops at the next picture.

        Raises:
            InvalidInputError: the head or a picture cannot be used; `field` is "head" or "image[i]".
            DeadlineError: not finished in time.
        """
        gone = threading.Event()
        try:
            return await run_in_time(self._thread, partial(self._work, job, gone), job.deadline)
        finally:
            gone.set()

    # Below: the classifier's thread.

    def _work(self, job: ClassifyJob, gone: threading.Event) -> list[list[tuple[str, float]]]:
        if self._backbone is None:
            self._backbone = load_backbone(job.backbone)
        head = self._read_head(job, int(self._backbone.config["feature_dim"]))
        rows = []
        for index, data in enumerate(job.pictures):
            # One decoded picture at a time: only its small square is kept.
            rows.append(picture_pixels(data, self._backbone.side, f"image[{index}]"))  # (1, 3, R, R)
            if gone.is_set():  # nobody waits any more
                return []
        probabilities = _probabilities(head, self._backbone.features_from_pixels(torch.cat(rows)))  # (N, K)
        ranked = probabilities.argsort(descending=True, stable=True)  # (N, K)
        return [
            [(head.classes[i], float(values[i])) for i in order.tolist()]
            for values, order in zip(probabilities, ranked, strict=True)
        ]

    def _read_head(self, job: ClassifyJob, feature_dim: int) -> HeadArtifact:
        try:
            head = read_head(job.head)
        except ArtifactError as error:
            raise InvalidInputError("head", str(error)) from error
        if head.spec.input_dim != feature_dim:
            raise InvalidInputError(
                "head", f"the head takes {head.spec.input_dim} numbers per picture, this backbone gives {feature_dim}"
            )
        named = head.metadata.get("backbone", job.backbone_name)
        if named != job.backbone_name:
            raise InvalidInputError(
                "head", f"the head is for the backbone {named[:100]!r}, this worker has {job.backbone_name!r}"
            )
        if len(head.classes) > self._max_classes:
            raise InvalidInputError(
                "head", f"the head has {len(head.classes)} classes: at most {self._max_classes} are allowed"
            )
        return head


def picture_pixels(data: bytes, side: int, field: str) -> Tensor:
    """Decode an untrusted picture, turn it upright and cut it to the backbone's input.

    Its size is known, and refused if too large, before any pixel is decoded.

    Args:
        data: a JPEG, PNG or WebP file.
        side: R.
        field: what to call the picture in an error.

    Returns:
        (1, 3, R, R) uint8.

    Raises:
        InvalidInputError: of another format, damaged, too large, too narrow, or too slow to decode.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            _check_size(picture.size, field)
            if picture.format in ("JPEG", "MPO") and data.count(_SCAN) > MAX_JPEG_SCANS:
                raise InvalidInputError(field, f"the JPEG has too many scans: at most {MAX_JPEG_SCANS} are allowed")
            ImageOps.exif_transpose(picture, in_place=True)
            return pixels_of([picture], side)  # (1, 3, R, R)
    except InvalidInputError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InvalidInputError(field, f"the picture has too many pixels: at most {MAX_PIXELS} are allowed") from error
    except Exception as error:  # what damaged files make decoders raise has no common base
        raise InvalidInputError(field, "not a whole JPEG, PNG or WebP picture") from error


def _check_size(size: tuple[int, int], field: str) -> None:
    width, height = size
    if width * height > MAX_PIXELS:
        raise InvalidInputError(
            field, f"the picture has {width} x {height} pixels: at most {MAX_PIXELS} in all are allowed"
        )
    if max(size) > MAX_ASPECT * min(size):
        raise InvalidInputError(
            field, f"the picture has {width} x {height} pixels: one side may be at most {MAX_ASPECT} times the other"
        )


def _probabilities(head: HeadArtifact, features: Tensor) -> Tensor:
    """Probability of every class for every picture, (N, K)."""
    flat = head.spec.flatten(head.tensors).float()  # (P,)
    outputs = apply_heads(head.spec, flat[None], features)[0]  # (N, o)
    logits = class_logits(outputs, head.class_embeddings.float(), float(head.metadata["logit_scale"]))  # (N, K)
    probabilities = logits.softmax(-1)  # (N, K)
    if not bool(probabilities.isfinite().all()):
        raise InvalidInputError("head", "the head's numbers are too large to compute with")
    return probabilities
