"""POST /classify: pictures in, classes out, for checkpoints that hold their image backbone."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, Field
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from text2weight.errors import InvalidInputError
from text2weight_service.classify import MAX_PICTURES, ClassifyJob, PictureClassifier, backbone_folder
from text2weight_service.engine import Phase
from text2weight_service.problems import Kind, ProblemError, not_ready_problem
from text2weight_service.routes import EngineDependency, _problems

router = APIRouter()

_MAX_TEXT_PARTS = 4
_MAX_TEXT_BYTES = 65_536
_LONGEST_FILENAME = 200


class ClassProbability(BaseModel):
    """One class of a head and how likely it is."""

    name: str = Field(description="class name, as in the head")
    probability: float = Field(description="0 to 1; those of a picture sum to 1")


class ClassifiedPicture(BaseModel):
    """What is on one picture."""

    filename: str = Field(description="as uploaded, at most 200 characters of it")
    classes: list[ClassProbability] = Field(description="all classes of the head, best first")


class Classification(BaseModel):
    """Answer of `POST /classify`."""

    images: list[ClassifiedPicture] = Field(description="one entry per picture, in the order of the request")


def _classifier(request: Request) -> PictureClassifier:
    classifier: PictureClassifier = request.app.state.classifier
    return classifier


_FILE: dict[str, Any] = {"type": "string", "format": "binary"}


@router.post(
    "/classify",
    summary="Classify pictures with a head",
    response_model=Classification,
    responses=_problems(408, 413, 415, 422, 429, 500, 501, 503, 504),
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {
                "multipart/form-data": {
                    "schema": {
                        "type": "object",
                        "required": ["head", "image"],
                        "properties": {
                            "head": {**_FILE, "description": "head artifact, safetensors bytes"},
                            "image": {
                                "type": "array",
                                "items": _FILE,
                                "minItems": 1,
                                "maxItems": MAX_PICTURES,
                                "description": "JPEG, PNG or WebP files, one part each",
                            },
                        },
                    },
                    "encoding": {"image": {"contentType": "image/jpeg, image/png, image/webp"}},
                }
            },
        }
    },
)
async def classify(
    request: Request, engine: EngineDependency, classifier: Annotated[PictureClassifier, Depends(_classifier)]
) -> Classification:
    """Run pictures through the checkpoint's own backbone and preprocessing, and then through a head.

    The head must be made for that backbone. Pictures are turned upright by their EXIF orientation.
    """
    deadline = request.state.started_at + engine.settings.request_timeout_s
    if engine.phase is not Phase.READY:
        raise not_ready_problem(engine.phase)
    folder = backbone_folder(engine.model)
    if folder is None:
        raise ProblemError(Kind.NO_BACKBONE, "run pictures through your own backbone, and the head on its features")
    name = str(engine.model.config.backbone.get("name", "unknown"))
    with classifier.place():
        async with _read_form(request, deadline) as form:
            head, pictures = _parts(form)
            data = [await picture.read() for picture in pictures]
            job = ClassifyJob(await head.read(), data, folder, name, deadline)
        ranked = await classifier.classify(job)
    return Classification(
        images=[
            ClassifiedPicture(
                filename=(picture.filename or "")[:_LONGEST_FILENAME],
                classes=[ClassProbability(name=name, probability=value) for name, value in classes],
            )
            for picture, classes in zip(pictures, ranked, strict=True)
        ]
    )


class _WholeFormParser(MultiPartParser):
    """Refuses a body without its closing boundary, whose last part Starlette's own parser silently drops."""

    _ended = False

    def on_end(self) -> None:
        """The closing boundary was read."""
        self._ended = True

    async def parse(self) -> FormData:
        """Read the body.

        Raises:
            MultiPartException: it is damaged, or over a limit.
        """
        form = await super().parse()
        if not self._ended:
            for file in self._files_to_close_on_error:
                file.close()
            raise MultiPartException("the closing boundary is missing")
        return form


@asynccontextmanager
async def _read_form(request: Request, deadline: float) -> AsyncIterator[FormData]:
    """The parts of a multipart body; its files are closed in the end."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "multipart/form-data" or request.headers.get("content-encoding", "identity") != "identity":
        raise ProblemError(Kind.UNSUPPORTED_TYPE, "send Content-Type: multipart/form-data, without Content-Encoding")
    parser = _WholeFormParser(
        request.headers,
        request.stream(),
        max_files=MAX_PICTURES + 2,
        max_fields=_MAX_TEXT_PARTS,
        max_part_size=_MAX_TEXT_BYTES,
    )
    try:
        async with asyncio.timeout(deadline - time.monotonic()):
            form = await parser.parse()
    except TimeoutError:
        raise ProblemError(Kind.BODY_TIMEOUT, "send the whole body at once", headers={"Connection": "close"}) from None
    except MultiPartException as error:
        raise ProblemError(Kind.MALFORMED_MULTIPART, error.message) from None
    try:
        yield form
    finally:
        await form.close()


def _parts(form: FormData) -> tuple[UploadFile, list[UploadFile]]:
    """The head and the pictures of a request.

    Raises:
        InvalidInputError: a part is missing, not a file, unknown, or there are too many.
    """
    for name, part in form.multi_items():
        if name not in ("head", "image"):
            raise InvalidInputError(name, "unknown part; allowed are head, image")
        if not isinstance(part, UploadFile):
            raise InvalidInputError(name, "must be a file: give the part a file name")
    files = {name: [part for part in form.getlist(name) if isinstance(part, UploadFile)] for name in ("head", "image")}
    if len(files["head"]) != 1:
        raise InvalidInputError("head", f"{len(files['head'])} parts named head: exactly one is allowed")
    if not 1 <= len(files["image"]) <= MAX_PICTURES:
        raise InvalidInputError("image", f"{len(files['image'])} parts named image: allowed are 1 to {MAX_PICTURES}")
    return files["head"][0], files["image"]
