"""What happens around every request: its id, its log line, its metrics, and the limit of its body."""

from __future__ import annotations

import asyncio
import re
import time
import uuid

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from text2weight_service.engine import Phase
from text2weight_service.metrics import Metrics
from text2weight_service.problems import Kind, ProblemError, internal_problem, not_ready_problem, problem_response

log = structlog.get_logger(__name__)

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
# Probes and scrapes come every few seconds; their log lines would hide the others.
_QUIET_ROUTES = frozenset({"/health/live", "/health/ready", "/metrics"})
_CLIENT_CLOSED = 499


class RequestContextMiddleware:
    """Outermost layer: request id, last resort for exceptions, log line and metrics of each request.

    Sets `request.state.request_id` and `request.state.started_at` (`time.monotonic()`).
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection, as ASGI asks."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(Headers(scope=scope).get("x-request-id"))
        started_at = time.monotonic()
        scope.setdefault("state", {}).update(request_id=request_id, started_at=started_at)
        status = _CLIENT_CLOSED

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-ID"] = request_id
            await send(message)

        with structlog.contextvars.bound_contextvars(request_id=request_id):
            try:
                await self._app(scope, receive, send_with_id)
            except ClientDisconnect:
                status = _CLIENT_CLOSED
            except asyncio.CancelledError:  # the time to drain is over
                if status == _CLIENT_CLOSED:
                    await problem_response(not_ready_problem(Phase.DRAINING), request_id)(scope, receive, send_with_id)
                raise
            except Exception as error:
                log.error("unexpected error", exc_info=error)
                if status == _CLIENT_CLOSED:  # nothing was sent yet
                    await problem_response(internal_problem(), request_id)(scope, receive, send_with_id)
            finally:
                self._record(scope, status, time.monotonic() - started_at)

    def _record(self, scope: Scope, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "other")
        method = scope["method"] if scope["method"] in _METHODS else "other"
        self._metrics.http_requests.labels(method, route, str(status)).inc()
        self._metrics.http_seconds.labels(route).observe(seconds)
        if route not in _QUIET_ROUTES:
            log.info("request", method=method, route=route, status=status, duration_ms=round(seconds * 1000, 2))


class BodyLimitMiddleware:
    """Refuses a body over the limit where it is read: by its declared length, and while it streams in."""

    def __init__(self, app: ASGIApp, max_body_bytes: int) -> None:
        self._app = app
        self._limit = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection, as ASGI asks."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "0")
        received = 0

        async def receive_limited() -> Message:
            nonlocal received
            if declared.isdecimal() and int(declared) > self._limit:
                raise self._too_large()
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._limit:
                raise self._too_large()
            return message

        await self._app(scope, receive_limited, send)

    def _too_large(self) -> ProblemError:
        return ProblemError(Kind.BODY_TOO_LARGE, f"at most {self._limit} bytes are allowed")


def _request_id(given: str | None) -> str:
    """The client's id when it is safe to log and to echo, else a new one."""
    return given if given is not None and _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
