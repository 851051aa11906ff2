"""What the routes have in common: reading JSON bodies, deadlines, giving up work nobody waits for, documentation."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from email.message import Message as MailMessage
from functools import lru_cache
from typing import Any, TypeVar

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from text2weight.errors import InvalidInputError
from text2weight_service.engine import Engine, NotReadyError, Phase
from text2weight_service.problems import MEDIA_TYPE, Kind, ProblemError, invalid_body

Body = TypeVar("Body", bound=BaseModel)
Result = TypeVar("Result")

HEAD_TYPE = "application/octet-stream"
_JSON_TYPE = "application/json"
_HEAD_HEADERS = {
    "Content-Disposition": "suggested file name",
    "Server-Timing": "milliseconds in each stage",
    "X-Request-ID": "as given, or made here",
    "X-T2W-Warnings": "number of the metadata's warnings; absent where there are none",
    "ETag": "names the answer; only where the request leaves nothing to chance",
    "Cache-Control": "whether the answer may be kept",
}


class DirectRoute(APIRoute):
    """A route whose function takes the request alone and answers with a response.

    It is called as it is: FastAPI's search for parameters, and what it keeps open for them, would cost a seventh of
    what the event loop does for a head.
    """

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["method"] not in (self.methods or ()):
            await super().handle(scope, receive, send)  # 405
            return
        response: Response = await self.endpoint(Request(scope, receive, send))
        await response(scope, receive, send)


def engine_of(request: Request) -> Engine:
    """The engine, in whatever phase it is."""
    engine: Engine = request.app.state.engine
    return engine


def ready_engine(request: Request) -> Engine:
    """The engine, for routes that take work: also for work that the engine has no part in.

    Raises:
        NotReadyError: starting, draining or failed.
    """
    engine = engine_of(request)
    if engine.phase is not Phase.READY:
        raise NotReadyError(engine.phase)
    return engine


def problem_docs(*statuses: int) -> dict[int | str, dict[str, Any]]:
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


def head_docs(description: str) -> dict[int | str, dict[str, Any]]:
    """OpenAPI entries of a route that answers with a head."""
    headers = {name: {"description": text, "schema": {"type": "string"}} for name, text in _HEAD_HEADERS.items()}
    content = {HEAD_TYPE: {"schema": {"type": "string", "format": "binary"}}}
    return {
        200: {"description": description, "content": content, "headers": headers},
        304: {"description": "If-None-Match names this answer"},
        **problem_docs(408, 413, 415, 422, 429, 500, 503, 504),
    }


def body_docs(model: type[BaseModel] | None, parts: dict[str, Any] | None = None) -> dict[str, Any]:
    """OpenAPI entry of a body that is read by hand: JSON of a model, multipart with these parts, or either."""
    content: dict[str, Any] = {}
    if model is not None:
        content[_JSON_TYPE] = {"schema": {"$ref": f"#/components/schemas/{model.__name__}"}}
    if parts is not None:
        required = ["request"] if model is not None else list(parts)
        schema = {"type": "object", "properties": parts, "required": required}
        encoding = {"request": {"contentType": "application/json"}}
        content["multipart/form-data"] = {"schema": schema, "encoding": encoding}
    return {"requestBody": {"required": True, "content": content}}


def answer_deadline(request: Request, engine: Engine, deadline_ms: int | None) -> float:
    """`time.monotonic()` at which the caller gives up.

    Raises:
        InvalidInputError: field "deadline_ms"; more than the worker's own timeout.
    """
    if deadline_ms is None:
        return float(request.state.started_at + engine.settings.request_timeout_s)
    longest = int(engine.settings.request_timeout_s * 1000)
    if deadline_ms > longest:
        raise InvalidInputError("deadline_ms", f"deadline_ms is {deadline_ms}: allowed are 1 to {longest}")
    return float(request.state.started_at + deadline_ms / 1000)


async def read_json(request: Request, model: type[Body]) -> Body:
    """Read a JSON body.

    Raises:
        ProblemError: another content type, or a body that does not fit the model.
    """
    _check_content_type(request)
    return parse_json(await request.body(), model)


def parse_json(raw: bytes, model: type[Body]) -> Body:
    """Read JSON bytes as a model.

    Raises:
        ProblemError: they are no JSON, or do not fit the model.
    """
    try:
        return model.model_validate_json(raw)
    except ValidationError as error:
        raise invalid_body(error, model) from None


def _check_content_type(request: Request) -> None:
    kind, charset = media_type(request)
    encoding = request.headers.get("content-encoding", "identity")
    if kind != _JSON_TYPE or charset not in ("utf-8", "us-ascii") or encoding != "identity":
        raise ProblemError(
            Kind.UNSUPPORTED_TYPE, "send Content-Type: application/json in UTF-8, without Content-Encoding"
        )


def media_type(request: Request) -> tuple[str, str]:
    """Type and charset of a request's body; the charset is UTF-8 where none is named."""
    return _parse_content_type(request.headers.get("content-type", ""))


@lru_cache(maxsize=64)  # it is nearly always the same
def _parse_content_type(value: str) -> tuple[str, str]:
    header = MailMessage()
    header["content-type"] = value
    return header.get_content_type(), header.get_content_charset("utf-8")


async def while_connected(request: Request, works: Sequence[Coroutine[Any, Any, Result]]) -> list[Result]:
    """Await several pieces of work at once, but give all of them up as soon as one fails or the client is gone.

    Raises:
        ClientDisconnect: the client is gone.
    """
    try:
        async with asyncio.timeout(None) as until_gone:
            watch = asyncio.create_task(_watch_for_leaving(request, until_gone))
            try:
                return await _all_of(works)
            finally:
                watch.cancel()
    except TimeoutError:
        if until_gone.expired():
            raise ClientDisconnect from None
        raise


async def _all_of(works: Sequence[Coroutine[Any, Any, Result]]) -> list[Result]:
    if len(works) == 1:  # mostly: the task of the request does it
        return [await works[0]]
    tasks = [asyncio.create_task(work) for work in works]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def _watch_for_leaving(request: Request, until_gone: asyncio.Timeout) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    until_gone.reschedule(0)
