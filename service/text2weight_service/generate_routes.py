"""POST /generate: class names in, a head out."""

from __future__ import annotations

from dataclasses import replace

from fastapi import APIRouter, Request
from fastapi.responses import Response

from text2weight_service.exchange import DirectRoute, body_docs, head_docs, read_json, ready_engine
from text2weight_service.heads import HeadResponse, answer_with_heads, check_seeds, generation_job
from text2weight_service.schemas import GenerateRequest

router = APIRouter(route_class=DirectRoute)


@router.post(
    "/generate",
    summary="Generate a classifier head from class names",
    response_class=HeadResponse,
    responses=head_docs("Head artifact: safetensors bytes; the metadata states the seed"),
    openapi_extra=body_docs(GenerateRequest),
)
async def generate(request: Request) -> Response:
    """Turn class names into the weights of a classifier head.

    Equal requests to an equal checkpoint give equal heads.
    """
    engine = ready_engine(request)
    body = await read_json(request, GenerateRequest)
    job = generation_job(request, engine, body)
    check_seeds(job.seed, body.samples)
    jobs = [job, *(replace(job, seed=job.seed + i) for i in range(1, body.samples))]
    return await answer_with_heads(request, engine, jobs, body.precision)
