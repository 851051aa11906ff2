"""What a worker tells about itself: /info, /health and /metrics."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST

from text2weight_service.engine import Phase
from text2weight_service.exchange import engine_of, problem_docs, ready_engine
from text2weight_service.info import Info, describe_service
from text2weight_service.problems import not_ready_problem
from text2weight_service.schemas import Health

router = APIRouter()


@router.get("/info", summary="What this worker runs", response_model=Info, responses=problem_docs(503))
async def info(request: Request) -> Info:
    """Describe the loaded checkpoint, the limits and the settings."""
    engine = engine_of(request)
    return describe_service(engine.model, engine.settings, engine.phase.value, request.app.version)


@router.get("/health/live", summary="Restart me if this is not 200", response_model=Health, responses=problem_docs(503))
async def live(request: Request) -> Health:
    """Tell whether the process can still do its work."""
    if not engine_of(request).alive:
        raise not_ready_problem(Phase.FAILED)
    return Health(status="alive")


@router.get(
    "/health/ready", summary="Send requests only if this is 200", response_model=Health, responses=problem_docs(503)
)
async def ready(request: Request) -> Health:
    """Tell whether the worker takes requests: not while it starts or drains."""
    ready_engine(request)
    return Health(status="ready")


@router.get(
    "/metrics",
    summary="Prometheus metrics",
    response_class=Response,
    responses={
        200: {"description": "Prometheus text format", "content": {"text/plain": {"schema": {"type": "string"}}}}
    },
)
async def metrics(request: Request) -> Response:
    """All metrics of this worker."""
    return Response(engine_of(request).metrics.render(), headers={"Content-Type": CONTENT_TYPE_LATEST})
