"""POST /generate, and what a worker tells about itself: /info, /health and /metrics."""

from __future__ import annotations

from dataclasses import replace

from fastapi import APIRouter, Request
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST

from text2weight_service.engine import Phase
from text2weight_service.exchange import (
    EngineDependency,
    ReadyEngine,
    body_docs,
    head_docs,
    problem_docs,
    read_json,
)
from text2weight_service.heads import HeadResponse, answer_with_heads, check_seeds, generation_job
from text2weight_service.info import Info, describe_service
from text2weight_service.problems import not_ready_problem
from text2weight_service.schemas import GenerateRequest, Health

router = APIRouter()


@router.post(
    "/generate",
    summary="Generate a classifier head from class names",
    response_class=HeadResponse,
    responses=head_docs("Head artifact: safetensors bytes; the metadata states the seed"),
    openapi_extra=body_docs(GenerateRequest),
)
async def generate(request: Request, engine: ReadyEngine) -> Response:
    """Turn class names into the weights of a classifier head.

    Equal requests to an equal checkpoint give equal heads.
    """
    body = await read_json(request, GenerateRequest)
    job = generation_job(request, engine, body)
    check_seeds(job.seed, body.samples)
    jobs = [replace(job, seed=job.seed + i) for i in range(body.samples)]
    return await answer_with_heads(request, engine, jobs, body.precision)


@router.get("/info", summary="What this worker runs", response_model=Info, responses=problem_docs(503))
async def info(request: Request, engine: EngineDependency) -> Info:
    """Describe the loaded checkpoint, the limits and the settings."""
    return describe_service(engine.model, engine.settings, engine.phase.value, request.app.version)


@router.get("/health/live", summary="Restart me if this is not 200", response_model=Health, responses=problem_docs(503))
async def live(engine: EngineDependency) -> Health:
    """Tell whether the process can still do its work."""
    if not engine.alive:
        raise not_ready_problem(Phase.FAILED)
    return Health(status="alive")


@router.get(
    "/health/ready", summary="Send requests only if this is 200", response_model=Health, responses=problem_docs(503)
)
async def ready(_: ReadyEngine) -> Health:
    """Tell whether the worker takes requests: not while it starts or drains."""
    return Health(status="ready")


@router.get(
    "/metrics",
    summary="Prometheus metrics",
    response_class=Response,
    responses={
        200: {"description": "Prometheus text format", "content": {"text/plain": {"schema": {"type": "string"}}}}
    },
)
async def metrics(engine: EngineDependency) -> Response:
    """All metrics of this worker."""
    return Response(engine.metrics.render(), headers={"Content-Type": CONTENT_TYPE_LATEST})
