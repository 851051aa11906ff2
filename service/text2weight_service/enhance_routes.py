"""POST /enhance: an uploaded head is improved by what is generated for the text.

Letter: P numbers in one head.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from fastapi import APIRouter, Request
from fastapi.responses import Response
from torch import Tensor

from text2weight_service.engine import Engine
from text2weight_service.exchange import (
    DirectRoute,
    answer_deadline,
    body_docs,
    head_docs,
    parse_json,
    ready_engine,
)
from text2weight_service.heads import HeadResponse, answer_with_heads, new_job
from text2weight_service.multipart import read_parts
from text2weight_service.schemas import EnhanceRequest
from text2weight_service.uploads import HEAD_DOCS, Uploads, read_upload, upload_rules, uploads_of

router = APIRouter(route_class=DirectRoute)


@router.post(
    "/enhance",
    summary="Improve a head that was trained for a short while",
    response_class=HeadResponse,
    responses=head_docs("Head artifact, written as the given head is; the metadata states strength, method and seed"),
    openapi_extra=body_docs(
        None,
        {"head": HEAD_DOCS, "request": {"$ref": "#/components/schemas/EnhanceRequest"}},
    ),
)
async def enhance(request: Request) -> Response:
    """Improve an uploaded head for class names.

    Strength 0 returns its weights bit for bit; strength 1 forgets them and equals /generate with the same seed.
    """
    engine, uploads = ready_engine(request), uploads_of(request)
    with uploads.place(request):
        body, classes, given = await _read(request, engine, uploads)
    job = new_job(request, engine, body, classes, given=given, strength=body.strength, method=body.method)
    return await answer_with_heads(request, engine, [job], body.precision)


async def _read(request: Request, engine: Engine, uploads: Uploads) -> tuple[EnhanceRequest, Sequence[str], Tensor]:
    """The request's fields, its classes, and the uploaded weights (P,); nothing else of the upload is kept."""
    model = engine.model
    rules = upload_rules(model, engine.settings.max_body_bytes, heads=1)
    parts = await read_parts(request, rules)
    body = parse_json(parts["request"][0].data, EnhanceRequest)
    deadline = answer_deadline(request, engine, body.deadline_ms)
    head = await uploads.run(partial(read_upload, model, parts["head"][0].data, "head"), deadline)
    classes = head.classes if body.classes is None else body.classes
    return body, classes, model.config.head.flatten(head.tensors)
