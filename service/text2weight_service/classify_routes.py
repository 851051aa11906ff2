"""POST /classify: pictures in, classes out, for checkpoints that hold their image backbone."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field

from text2weight_service.classify import MAX_PICTURES, ClassifyJob, PictureClassifier, backbone_folder
from text2weight_service.exchange import answer_deadline, problem_docs, ready_engine, while_connected
from text2weight_service.multipart import PartRule, read_parts
from text2weight_service.problems import Kind, ProblemError
from text2weight_service.tracing import server_timing

router = APIRouter()

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


_FILE: dict[str, Any] = {"type": "string", "format": "binary"}


@router.post(
    "/classify",
    summary="Classify pictures with a head",
    response_model=Classification,
    responses=problem_docs(408, 413, 415, 422, 429, 500, 501, 503, 504),
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
async def classify(request: Request, response: Response) -> Classification:
    """Run pictures through the checkpoint's own backbone and preprocessing, and then through a head.

    The head must be made for that backbone. Pictures are turned upright by their EXIF orientation.
    """
    engine = ready_engine(request)
    classifier: PictureClassifier = request.app.state.classifier
    deadline = answer_deadline(request, engine, None)
    folder = backbone_folder(engine.model)
    if folder is None:
        raise ProblemError(Kind.NO_BACKBONE, "run pictures through your own backbone, and the head on its features")
    name = str(engine.model.config.backbone.get("name", "unknown"))
    most = engine.settings.max_upload_bytes
    rules = {"head": PartRule(1, 1, most), "image": PartRule(1, MAX_PICTURES, most)}
    started = time.perf_counter()
    with classifier.place():
        parts = await read_parts(request, rules)
        pictures = parts["image"]
        read = time.perf_counter()
        job = ClassifyJob(parts["head"][0].data, [picture.data for picture in pictures], folder, name, deadline)
        (ranked,) = await while_connected(request, [classifier.classify(job)])
    response.headers.update(
        server_timing(request.app, {"upload": read - started, "classify": time.perf_counter() - read})
    )
    return Classification(
        images=[
            ClassifiedPicture(
                filename=(picture.filename or "")[:_LONGEST_FILENAME],
                classes=[ClassProbability(name=name, probability=value) for name, value in classes],
            )
            for picture, classes in zip(pictures, ranked, strict=True)
        ]
    )
