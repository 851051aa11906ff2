"""What the playground needs of a service beyond /generate and /classify, around the real model."""

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from text2weight.generator import DenoiserCall, GenerationRequest, Generator
from text2weight_service.classify import backbone_folder
from text2weight_service.schemas import describe_service

STEP_S = 0.02  # so that a test can see progress


def add_contract(app: FastAPI) -> None:
    """Put GET /info with limits and features, and POST /generate/stream, before the application's own routes."""
    app.router.routes[:0] = [Route("/info", _info), Route("/generate/stream", _stream, methods=["POST"])]


async def _info(request: Request) -> Response:
    engine = request.app.state.engine
    info = describe_service(engine.model, engine.settings, engine.phase.value, request.app.version).model_dump()
    info["limits"] = {"max_classes": 256, "max_steps": 1000, "max_name_length": 200, "max_seed": 2**63 - 1}
    info["features"] = {"guidance": False, "classify": backbone_folder(engine.model) is not None}
    info["known_classes"] = list(engine.model.config.classes)
    return JSONResponse(info)


async def _stream(request: Request) -> Response:
    body = await request.json()
    return StreamingResponse(_events(request.app.state.engine.model, body), media_type="text/event-stream")


class _GoneError(Exception):
    """Nobody reads the stream any more."""


async def _events(generator: Generator, body: dict[str, Any]) -> AsyncIterator[str]:
    loop, queue = asyncio.get_running_loop(), asyncio.Queue[str]()
    sampler, steps = generator.resolve_sampling(body.get("sampler"), body.get("steps"))
    names, seed, every = tuple(body["classes"]), body.get("seed", 5), body["heads_every"]
    calls, gone = 0, False

    def tell(event: str, **data: object) -> None:
        loop.call_soon_threadsafe(queue.put_nowait, f"event: {event}\ndata: {json.dumps(data)}\n\n")

    def on_call(call: DenoiserCall) -> None:
        nonlocal calls
        calls += 1
        tell("progress", step=calls, steps=steps, timestep=int(call.timesteps[0]))
        if every and calls % every == 0:
            tell("head", step=calls, head=encode(call.estimates[0]))
        if gone:
            raise _GoneError
        time.sleep(STEP_S)

    def encode(flat: Any) -> str:
        artifact = generator._to_artifact(request, flat)
        return base64.b64encode(artifact.to_bytes()).decode()

    def work() -> None:
        head = generator.generate_batch([request], on_call=on_call)[0]
        tell("done", seed=seed, head=base64.b64encode(head.to_bytes()).decode())

    embeddings = generator.text_encoder.encode(generator.prompts(names))
    request = GenerationRequest(names, embeddings, seed, steps, sampler)
    working = loop.run_in_executor(None, work)
    try:
        while True:
            event = await queue.get()
            yield event
            if event.startswith("event: done"):
                break
        await working
    finally:
        gone = True
