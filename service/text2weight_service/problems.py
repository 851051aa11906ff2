"""Every error a client can see: the one table of kinds, and how exceptions become RFC 9457 problem details."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from enum import Enum
from http import HTTPStatus
from typing import get_args

from fastapi import FastAPI, Request
from fastapi.responses import Response
from pydantic import BaseModel, Field, ValidationError
from starlette.exceptions import HTTPException

from text2weight.errors import InvalidInputError
from text2weight_service.batch_runner import GenerationFailedError
from text2weight_service.engine import BusyError, NotReadyError, Phase
from text2weight_service.work_queue import DeadlineError, HopelessError

MEDIA_TYPE = "application/problem+json"
_STARTING_RETRY_AFTER_S = 2
_RESTART_RETRY_AFTER_S = 10
_LONGEST_TEXT = 500
_MOST_ERRORS = 10
_LONGEST_VALUE = 80
_LARGEST_SHOWN = 10**_LONGEST_VALUE


class Kind(Enum):
    """The table of problems: name in the `type` URN, HTTP status, title."""

    UNAUTHORIZED = ("unauthorized", 401, "The request carries no valid key")
    NOT_FOUND = ("not-found", 404, "No such path")
    METHOD_NOT_ALLOWED = ("method-not-allowed", 405, "Method not allowed on this path")
    BODY_TIMEOUT = ("body-timeout", 408, "The request body did not arrive in time")
    BODY_TOO_LARGE = ("body-too-large", 413, "The request body is too large")
    UNSUPPORTED_TYPE = ("unsupported-type", 415, "The request body has a type that this path does not take")
    INVALID_INPUT = ("invalid-input", 422, "A field of the request cannot be used")
    MALFORMED_JSON = ("malformed-json", 422, "The request is not valid JSON")
    MALFORMED_MULTIPART = ("malformed-multipart", 422, "The request body is not valid multipart/form-data")
    QUEUE_FULL = ("queue-full", 429, "Too many requests are waiting")
    RATE_LIMITED = ("rate-limited", 429, "Too many requests of this client")
    INTERNAL = ("internal", 500, "The service failed on this request")
    NO_BACKBONE = ("no-backbone", 501, "The checkpoint has no image backbone")
    STARTING = ("starting", 503, "The worker is loading its model")
    DRAINING = ("draining", 503, "The worker is shutting down")
    UNAVAILABLE = ("unavailable", 503, "The worker's model cannot be used")
    DEADLINE = ("deadline", 504, "The request was not finished in time")

    @property
    def type(self) -> str:
        """URN that identifies this kind of problem."""
        return f"urn:text2weight:problem:{self.value[0]}"

    @property
    def status(self) -> int:
        """HTTP status."""
        return self.value[1]

    @property
    def title(self) -> str:
        """One line that is the same for every problem of this kind."""
        return self.value[2]


class FieldError(BaseModel):
    """What is wrong with one field."""

    field: str = Field(description='path of the field, such as "classes[3]"; "body" for the whole body')
    message: str = Field(description="what is wrong and what is allowed")


class Problem(BaseModel):
    """RFC 9457 problem details."""

    type: str = Field(description="URN that identifies the kind of problem")
    title: str = Field(description="the kind in words")
    status: int = Field(description="HTTP status")
    detail: str = Field(description="what happened this time and what to do")
    request_id: str = Field(description="as in the X-Request-ID header and in the log")
    errors: list[FieldError] = Field(default=[], description="the fields at fault, for status 422")


class ProblemError(Exception):
    """A problem raised by the HTTP layer itself."""

    def __init__(
        self,
        kind: Kind,
        detail: str,
        *,
        errors: Sequence[FieldError] = (),
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(detail)
        self.kind = kind
        self.detail = detail
        self.errors = tuple(errors)
        self.headers = dict(headers or {})


def describe_problem(problem: ProblemError, request_id: str) -> Problem:
    """A problem as its client reads it."""
    return Problem(
        type=problem.kind.type,
        title=problem.kind.title,
        status=problem.kind.status,
        detail=_shorten(problem.detail),
        request_id=request_id,
        errors=list(problem.errors),
    )


def problem_response(problem: ProblemError, request_id: str) -> Response:
    """Answer with a problem."""
    body = describe_problem(problem, request_id).model_dump_json()
    return Response(body, status_code=problem.kind.status, media_type=MEDIA_TYPE, headers=problem.headers)


def internal_problem() -> ProblemError:
    """The problem that tells a client nothing but the request id."""
    return ProblemError(Kind.INTERNAL, "an internal error occurred; the log has it under this request_id")


def invalid_fields(errors: Sequence[FieldError]) -> ProblemError:
    """The problem of fields that cannot be used, all of them named in its detail."""
    shown = [
        FieldError(field=_shorten(error.field, 100), message=_shorten(error.message))
        for error in list(errors)[:_MOST_ERRORS]
    ]
    # Many messages begin with their field: "steps is 0: ...".
    named = [e.message if e.message.startswith(f"{e.field} ") else f"{e.field}: {e.message}" for e in shown]
    return ProblemError(Kind.INVALID_INPUT, "; ".join(named), errors=shown)


def invalid_body(error: ValidationError, model: type[BaseModel]) -> ProblemError:
    """The problem of a body that does not fit its model, or is no JSON at all."""
    fields = []
    for entry in error.errors(include_url=False, include_context=False):
        if entry["type"] == "json_invalid":
            return ProblemError(Kind.MALFORMED_JSON, entry["msg"])
        place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in entry["loc"])
        path = place.lstrip(".") or "body"
        message = entry["msg"]
        if entry["type"] == "extra_forbidden":
            allowed = ", ".join(_model_at(model, entry["loc"][:-1]).model_fields)
            message = f"{path[:_LONGEST_VALUE]} is no field here; allowed are {allowed}"
        elif entry["type"] != "missing" and (shown := _scalar(entry["input"])) is not None:
            message = f"{path} is {shown}: {message}"
        fields.append(FieldError(field=path, message=message))
    return invalid_fields(fields)


def _model_at(model: type[BaseModel], path: Sequence[int | str]) -> type[BaseModel]:
    """The model of what lies at a path within a body, through lists of models."""
    for name in path:
        if isinstance(name, str):
            (model,) = get_args(model.model_fields[name].annotation)
    return model


def _scalar(value: object) -> str | None:
    """A value of a body as its sender wrote it, cut where it is long; None for lists and objects."""
    if isinstance(value, str):
        value = value[:_LONGEST_VALUE]
    if value is None or isinstance(value, str | float) or (isinstance(value, int) and abs(value) < _LARGEST_SHOWN):
        return json.dumps(value, ensure_ascii=False)
    return None


def not_ready_problem(phase: Phase) -> ProblemError:
    """The problem of a worker that takes no requests in its phase."""
    kind, detail, retry_after_s = {
        Phase.STARTING: (Kind.STARTING, "the model is being loaded; try again soon", _STARTING_RETRY_AFTER_S),
        Phase.FAILED: (Kind.UNAVAILABLE, "the model cannot be used; the worker's log says why", _RESTART_RETRY_AFTER_S),
    }.get(phase, (Kind.DRAINING, "this worker takes no new requests; try another one", _RESTART_RETRY_AFTER_S))
    headers = {"Retry-After": str(retry_after_s)}
    if kind is Kind.DRAINING:
        headers["Connection"] = "close"  # or a kept connection would lead back to this worker
    return ProblemError(kind, detail, headers=headers)


def to_problem(error: Exception) -> ProblemError:
    """The problem that a client sees for an exception."""
    match error:
        case ProblemError():
            return error
        case InvalidInputError():
            return invalid_fields([FieldError(field=error.field, message=str(error))])
        case NotReadyError():
            return not_ready_problem(error.phase)
        case BusyError():
            return ProblemError(
                Kind.QUEUE_FULL,
                f"{error}; try again in {error.retry_after_s} s",
                headers={"Retry-After": str(error.retry_after_s)},
            )
        case HopelessError():
            return ProblemError(Kind.DEADLINE, f"{error}; ask for fewer steps or for more time")
        case DeadlineError():
            return ProblemError(
                Kind.DEADLINE,
                "the request's deadline_ms or this worker's timeout is over; ask for fewer steps or later",
            )
        case HTTPException(status_code=HTTPStatus.NOT_FOUND):
            return ProblemError(Kind.NOT_FOUND, "see /docs for the paths of this service")
        case HTTPException(status_code=HTTPStatus.METHOD_NOT_ALLOWED):
            allowed = (error.headers or {}).get("Allow", "")
            return ProblemError(Kind.METHOD_NOT_ALLOWED, f"allowed on this path: {allowed}", headers={"Allow": allowed})
        case _:
            return internal_problem()


def install_problem_handlers(app: FastAPI) -> None:
    """Answer every exception of the application with a problem."""

    async def answer(request: Request, error: Exception) -> Response:
        return problem_response(to_problem(error), request.state.request_id)

    for kind in (
        ProblemError,
        InvalidInputError,
        NotReadyError,
        BusyError,
        DeadlineError,
        GenerationFailedError,
        HTTPException,
    ):
        app.add_exception_handler(kind, answer)


def _shorten(text: str, longest: int = _LONGEST_TEXT) -> str:
    return text if len(text) <= longest else text[: longest - 1] + "…"
