"""The HTTP contract: one function per route."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Coroutine
from email.message import Message as MailMessage
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import ValidationError
from starlette.requests import ClientDisconnect

from text2weight.condition import normalise_class_names
from text2weight.errors import InvalidInputError
from text2weight_service.engine import Engine, Phase
from text2weight_service.job import Job
from text2weight_service.problems import MEDIA_TYPE, Kind, ProblemError, invalid_body, not_ready_problem
from text2weight_service.schemas import GenerateRequest, Health, Info, describe_service
from text2weight_service.tracing import record_stages
from text2weight_service.work_queue import Generated

router = APIRouter()

# Small enough for every JSON reader: JavaScript numbers are exact up to here.
_DRAWN_SEEDS = 2**53


class HeadResponse(Response):
    """A head artifact."""

    media_type = "application/octet-stream"


def _engine(request: Request) -> Engine:
    engine: Engine = request.app.state.engine
    return engine


EngineDependency = Annotated[Engine, Depends(_engine)]


def _problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """OpenAPI entries of problem responses."""
    titles = {kind.status: " / ".join(k.title for k in Kind if k.status == kind.status) for kind in Kind}
    schema = {"$ref": "#/components/schemas/Problem"}
    retry_after = {"Retry-After": {"description": "seconds", "schema": {"type": "integer"}}}
    return {
        status: {
            "description": titles[status],
            "content": {MEDIA_TYPE: {"schema": schema}},
            **({"headers": retry_after} if status in (429, 503) else {}),
        }
        for status in statuses
    }


_HEAD_HEADERS = {
    "Content-Disposition": {"description": "suggested file name", "schema": {"type": "string"}},
    "Server-Timing": {"description": "milliseconds in queue, encode and sample", "schema": {"type": "string"}},
    "X-Request-ID": {"description": "as given, or made here", "schema": {"type": "string"}},
}


@router.post(
    "/generate",
    summary="Generate a classifier head from class names",
    response_class=HeadResponse,
    responses={
        200: {
            "description": "Head artifact: safetensors bytes; the metadata states the seed",
            "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
            "headers": _HEAD_HEADERS,
        },
        **_problems(408, 413, 415, 422, 429, 500, 503, 504),
    },
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/GenerateRequest"}}},
        }
    },
)
async def generate(request: Request, engine: EngineDependency) -> HeadResponse:
    """Turn class names into the weights of a classifier head.

    Equal checkpoint, classes in order, seed, steps and sampler give an equal head.
    """
    deadline = request.state.started_at + engine.settings.request_timeout_s
    body = await _read_generate_request(request, deadline)
    seed = secrets.randbelow(_DRAWN_SEEDS) if body.seed is None else body.seed
    if body.steps is not None and body.steps > engine.settings.max_steps:
        raise InvalidInputError("steps", f"steps is {body.steps}: allowed are 1 to {engine.settings.max_steps}")
    job = Job(
        request_id=request.state.request_id,
        classes=normalise_class_names(body.classes, maximum=engine.settings.max_classes),
        seed=seed,
        steps=body.steps,
        sampler=body.sampler,
        deadline=deadline,
    )
    result = await _while_connected(request, engine.generate(job))
    record_stages(request.app, _stages(result))
    return HeadResponse(
        result.data,
        headers={
            "Content-Disposition": f'attachment; filename="head-{seed}.safetensors"',
            "Server-Timing": _server_timing(result),
        },
    )


@router.get("/info", summary="What this worker runs", response_model=Info, responses=_problems(503))
async def info(request: Request, engine: EngineDependency) -> Info:
    """Describe the loaded checkpoint and the settings."""
    return describe_service(engine.model, engine.settings, engine.phase.value, request.app.version)


@router.get("/health/live", summary="Restart me if this is not 200", response_model=Health, responses=_problems(503))
async def live(engine: EngineDependency) -> Health:
    """Tell whether the process can still do its work."""
    if not engine.alive:
        raise not_ready_problem(Phase.FAILED)
    return Health(status="alive")


@router.get(
    "/health/ready", summary="Send requests only if this is 200", response_model=Health, responses=_problems(503)
)
async def ready(engine: EngineDependency) -> Health:
    """Tell whether the worker takes requests: not while it starts or drains."""
    if engine.phase is not Phase.READY:
        raise not_ready_problem(engine.phase)
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


async def _read_generate_request(request: Request, deadline: float) -> GenerateRequest:
    _check_content_type(request)
    try:
        async with asyncio.timeout(deadline - time.monotonic()):
            raw = await request.body()
    except TimeoutError:
        raise ProblemError(Kind.BODY_TIMEOUT, "send the whole body at once", headers={"Connection": "close"}) from None
    try:
        return GenerateRequest.model_validate_json(raw)
    except ValidationError as error:
        raise invalid_body(error, tuple(GenerateRequest.model_fields)) from None


def _check_content_type(request: Request) -> None:
    header = MailMessage()
    header["content-type"] = request.headers.get("content-type", "")
    kind, charset = header.get_content_type(), header.get_content_charset("utf-8")
    encoding = request.headers.get("content-encoding", "identity")
    if kind != "application/json" or charset not in ("utf-8", "us-ascii") or encoding != "identity":
        raise ProblemError(
            Kind.UNSUPPORTED_TYPE, "send Content-Type: application/json in UTF-8, without Content-Encoding"
        )


async def _while_connected(request: Request, work: Coroutine[Any, Any, Generated]) -> Generated:
    """Await work, but give it up as soon as the client is gone.

    Raises:
        ClientDisconnect: the client is gone.
    """
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_disconnection(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.wait((task, gone))


async def _disconnection(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _stages(result: Generated) -> dict[str, float]:
    return {"queue": result.queue_s, "encode": result.encode_s, "sample": result.sample_s}


def _server_timing(result: Generated) -> str:
    return ", ".join(f"{name};dur={seconds * 1000:.2f}" for name, seconds in _stages(result).items())
