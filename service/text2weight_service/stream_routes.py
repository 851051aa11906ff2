"""POST /generate/stream: server-sent events while a head is computed."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing

import structlog
from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from text2weight_service.exchange import DirectRoute, body_docs, problem_docs, read_json, ready_engine
from text2weight_service.heads import generation_job, render, warnings_of
from text2weight_service.problems import Kind, describe_problem, to_problem
from text2weight_service.schemas import StreamRequest
from text2weight_service.work_queue import Generated, Progress

router = APIRouter(route_class=DirectRoute)
log = structlog.get_logger(__name__)

# What goes wrong before this is an ordinary problem response; a stream that waits longer has begun.
_HEADERS_AFTER_S = 0.5
# Proxies close connections on which nothing moves, many of them after 30 or 60 s, and clients sooner.
_PING_S = 2.0
_HEADERS = {
    "Cache-Control": "no-store",
    "X-Accel-Buffering": "no",  # nginx would collect events
}
_EVENTS = {
    "description": (
        "`progress` {step, steps, timestep} after denoiser calls; `head` {step, head: base64 safetensors} every "
        "`heads_every` of them; last `done` {seed, head}, or `error` with problem details"
    ),
    "content": {"text/event-stream": {"schema": {"type": "string"}}},
}

Event = Progress | Generated


@router.post(
    "/generate/stream",
    summary="Generate a head and watch its denoising",
    response_class=StreamingResponse,
    responses={200: _EVENTS, **problem_docs(408, 413, 415, 422, 429, 500, 503, 504)},
    openapi_extra=body_docs(StreamRequest),
)
async def generate_stream(request: Request) -> StreamingResponse:
    """As /generate, with an event after denoiser calls and, on request, the heads that they estimated."""
    engine = ready_engine(request)
    body = await read_json(request, StreamRequest)
    job = generation_job(request, engine, body)
    warnings = warnings_of(engine.model, job)
    metadata = {"warnings": json.dumps(warnings, ensure_ascii=False)} if warnings else {}

    def encode(item: Event) -> bytes:
        if isinstance(item, Progress):
            text = _event("progress", {"step": item.step, "steps": item.steps, "timestep": item.timestep})
            if item.head is None:
                return text
            head = base64.b64encode(render([item.head], body.precision, metadata)).decode()
            return text + _event("head", {"step": item.step, "head": head})
        head = base64.b64encode(render([item.data], body.precision, metadata)).decode()
        return _event("done", {"seed": job.seed, "head": head})

    source = _Source(engine.stream(job, body.heads_every))
    try:
        first = await source.next(_HEADERS_AFTER_S)
        opening = None if first is None else encode(first)
    except BaseException:
        await source.close()
        raise

    async def write() -> AsyncIterator[bytes]:
        item, text = first, opening
        try:
            while True:
                yield text or b": waiting\n\n"
                if isinstance(item, Generated):
                    return
                item = await source.next(_PING_S)
                text = None if item is None else encode(item)
        except Exception as error:  # whatever it is, the status line is gone: the client learns of it here
            problem = to_problem(error)
            request.state.outcome = problem.kind.status
            if problem.kind is Kind.INTERNAL:
                log.error("stream failed", exc_info=error)
            yield _event("error", describe_problem(problem, request.state.request_id).model_dump())

    headers = _HEADERS | ({"X-T2W-Warnings": str(len(warnings))} if warnings else {})
    return _EventResponse(write(), source, headers)


class _Source:
    """The engine's events, which can be awaited for a limited time without disturbing the engine."""

    def __init__(self, events: AsyncGenerator[Event]) -> None:
        self._events = events
        self._queue: asyncio.Queue[Event | Exception] = asyncio.Queue(maxsize=1)
        self._task = asyncio.create_task(self._read())

    async def next(self, timeout_s: float) -> Event | None:
        """The next event, or None if there is none yet; raises what the engine raises."""
        try:
            async with asyncio.timeout(timeout_s):
                item = await self._queue.get()
        except TimeoutError:
            return None
        if isinstance(item, Exception):
            raise item
        return item

    async def close(self) -> None:
        """Give up what is still being computed."""
        self._task.cancel()
        await asyncio.wait({self._task})

    async def _read(self) -> None:
        try:
            async with aclosing(self._events):
                async for item in self._events:
                    await self._queue.put(item)
        except Exception as error:  # handed over to whoever reads
            await self._queue.put(error)


class _EventResponse(StreamingResponse):
    """Server-sent events; closes their source on every path, also where the client goes before the first of them."""

    def __init__(self, events: AsyncIterator[bytes], source: _Source, headers: Mapping[str, str]) -> None:
        super().__init__(events, headers=headers, media_type="text/event-stream")
        self._source = source

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events, as ASGI asks."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._source.close()


def _event(name: str, data: Mapping[str, object]) -> bytes:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n".encode()
