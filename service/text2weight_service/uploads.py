"""Uploaded heads: room for those under way, and what a head must be to fit the checkpoint."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

from fastapi import Request

from text2weight.artifact import HeadArtifact, read_head
from text2weight.condition import MAX_CLASSES
from text2weight.enhancement import check_fits
from text2weight.errors import ArtifactError, InvalidInputError
from text2weight.strict_safetensors import MAX_HEADER_BYTES
from text2weight_service.engine import BusyError
from text2weight_service.model import Model
from text2weight_service.multipart import PartRule
from text2weight_service.work_queue import DeadlineError

Result = TypeVar("Result")

HEAD_DOCS = {"type": "string", "format": "binary"}
# Uploads of the largest size that may be in memory at a time.
LARGEST_AT_ONCE = 8
_RETRY_AFTER_S = 1


class Uploads:
    """Bounds what uploads under way may hold, and works on them one at a time, off the event loop.

    One more may be held: the one that the thread works on when its caller is gone.
    """

    def __init__(self, max_bytes: int, most: int) -> None:
        """Prepare the room.

        Args:
            max_bytes: largest upload.
            most: most uploads at a time, however small.
        """
        self._max_bytes = max_bytes
        self._free = LARGEST_AT_ONCE * max_bytes
        self._least = self._free // most
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="t2w-uploads")

    @contextmanager
    def place(self, request: Request) -> Iterator[None]:
        """Hold room for a request's body; take it before the body is read, and keep it until its heads are used.

        Raises:
            BusyError: the others leave no room for the length that it announces.
        """
        announced = request.headers.get("content-length", "")
        # A body in chunks is as long as its chunks, whatever length is announced beside them.
        known = announced.isdecimal() and "transfer-encoding" not in request.headers
        size = int(announced) if known else self._max_bytes
        taken = max(min(size, self._max_bytes), self._least)  # a larger one is refused as it is read
        if taken > self._free:
            raise BusyError("the uploads under way leave no room for this one", _RETRY_AFTER_S)
        self._free -= taken
        try:
            yield
        finally:
            self._free += taken

    async def run(self, work: Callable[[], Result], deadline: float) -> Result:
        """Have a thread work on an upload.

        Args:
            work: what to do.
            deadline: `time.monotonic()` at which the caller gives up.

        Raises:
            DeadlineError: not finished in time.
        """
        return await run_in_time(self._thread, work, deadline)


async def run_in_time(thread: ThreadPoolExecutor, work: Callable[[], Result], deadline: float) -> Result:
    """Have a thread do some work until a deadline, a `time.monotonic()`.

    Work that was not begun by then, or when the caller was cancelled, never is, and what it holds is let go at once:
    the thread's queue would keep it until its turn.

    Raises:
        DeadlineError: not finished in time.
    """
    slot = [work]
    del work  # or the traceback that the cancelled future keeps would hold it
    try:
        async with asyncio.timeout(deadline - time.monotonic()):
            return await asyncio.get_running_loop().run_in_executor(thread, lambda: slot.pop()())
    except TimeoutError:
        raise DeadlineError from None
    finally:
        slot.clear()


def uploads_of(request: Request) -> Uploads:
    """The room for uploads."""
    uploads: Uploads = request.app.state.uploads
    return uploads


def upload_rules(model: Model, max_request_bytes: int, heads: int, least: int = 1) -> dict[str, PartRule]:
    """The parts of a body with heads: `request`, and so many parts `head`, each as large as a head can be."""
    spec = model.config.head
    largest = 8 + MAX_HEADER_BYTES + 4 * (spec.num_parameters + MAX_CLASSES * spec.output_dim)
    return {
        "request": PartRule(1, 1, max_request_bytes, file=False),
        "head": PartRule(least, heads, largest),
    }


def read_upload(model: Model, data: bytes, field: str) -> HeadArtifact:
    """Read an uploaded head and make sure that it belongs to the loaded checkpoint's backbone and text encoder.

    Args:
        model: what the head has to fit.
        data: untrusted bytes.
        field: of the request, for errors.

    Raises:
        InvalidInputError: no head artifact, of another layout, or for another backbone, text encoder or logit scale.
            A head that does not state its backbone or text encoder is taken at its word.
    """
    try:
        head = read_head(data)
        check_fits(model.config.head, head.spec)
    except (ArtifactError, InvalidInputError) as error:
        raise InvalidInputError(field, str(error)) from None
    expected = {"backbone": str(model.config.backbone.get("name", "unknown")), "text_encoder": model.text_encoder.name}
    for key, name in expected.items():
        stated = head.metadata.get(key, name)
        if stated != name:
            raise InvalidInputError(
                field, f"the head is for the {key} {stated[:200]!r}: this checkpoint's is {name!r}, heads do not mix"
            )
    scale = float(head.metadata["logit_scale"])
    if not math.isclose(scale, model.config.logit_scale, rel_tol=1e-3):
        raise InvalidInputError(
            field, f"the head's logit_scale is {scale:g}: this checkpoint's is {model.config.logit_scale:g}"
        )
    return head
