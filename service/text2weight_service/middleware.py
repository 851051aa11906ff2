"""What happens around every request: safe headers, its id, its log line, its metrics, and the limits of its body."""

from __future__ import annotations

import asyncio
import random
import re
import time
from collections.abc import Collection

import structlog
from starlette.datastructures import Headers
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
# Routes that read files, as multipart bodies.
_UPLOAD_ROUTES = frozenset({"/classify", "/enhance", "/fuse"})


_SAFE_HEADERS = {
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
    b"cross-origin-resource-policy": b"same-origin",
    b"content-security-policy": b"default-src 'none'; frame-ancestors 'none'",
}
# The interactive documentation comes from a public CDN and starts by a script in the page.
_DOCS_HEADERS = _SAFE_HEADERS | {
    b"content-security-policy": b"default-src 'none'; script-src https://cdn.jsdelivr.net 'unsafe-inline'; style-src "
    b"https://cdn.jsdelivr.net 'unsafe-inline'; img-src https://fastapi.tiangolo.com data:; connect-src 'self'; "
    b"frame-ancestors 'none'"
}


class SafeHeadersMiddleware:
    """Outermost layer: headers that keep a browser from doing more with an answer than it should.

    What a route sets of them by itself is kept: one that serves a page has a Content-Security-Policy of its own.
    """

    def __init__(self, app: ASGIApp, docs_path: str) -> None:
        self._app = app
        self._docs_path = docs_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection, as ASGI asks."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = _DOCS_HEADERS if scope["path"] == self._docs_path else _SAFE_HEADERS

        async def send_safely(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = message["headers"]
                names = {name for name, _ in own}
                message["headers"] = [*own, *(pair for pair in headers.items() if pair[0] not in names)]
            await send(message)

        await self._app(scope, receive, send_safely)


class RequestContextMiddleware:
    """Request id, last resort for exceptions, log line and metrics of each request.

    Sets `request.state.request_id` and `request.state.started_at` (`time.monotonic()`). An answer that fails after its
    status was sent sets `request.state.outcome`, the status that it would have had: that is counted and logged.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: Collection[str]) -> None:
        """Wrap an application.

        Args:
            app: what to wrap.
            metrics: where requests are counted.
            paths: of its routes, for requests that are refused before they reach one.
        """
        self._app = app
        self._metrics = metrics
        self._paths = frozenset(paths)

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
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
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
        path = path_within(scope)
        route = getattr(scope.get("route"), "path", path if path in self._paths else "other")
        status = scope["state"].get("outcome", status)
        method = scope["method"] if scope["method"] in _METHODS else "other"
        self._metrics.http_requests.labels(method, route, str(status)).inc()
        self._metrics.http_seconds.labels(route).observe(seconds)
        if route not in _QUIET_ROUTES:
            milliseconds = round(seconds * 1000, 2)
            client = scope["state"].get("client")  # the name of its key
            log.info("request", method=method, route=route, status=status, duration_ms=milliseconds, client=client)


class BodyLimitMiddleware:
    """Refuses a body where it is read: too large by its declared length or as it streams in, or too slow."""

    def __init__(self, app: ASGIApp, max_body_bytes: int, max_upload_bytes: int, timeout_s: float) -> None:
        """Wrap an application.

        Args:
            app: what to wrap.
            max_body_bytes: limit of most bodies.
            max_upload_bytes: limit of a multipart body on the routes that take files.
            timeout_s: from a request's start to the end of its body.
        """
        self._app = app
        self._max_body_bytes = max_body_bytes
        self._max_upload_bytes = max_upload_bytes
        self._timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection, as ASGI asks."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        limit = self._limit_of(scope, headers.get("content-type", ""))
        declared = headers.get("content-length", "0")
        received = 0
        complete = False

        async def receive_limited() -> Message:
            nonlocal received, complete
            if declared.isdecimal() and int(declared) > limit:
                raise _too_large(limit)
            if complete:  # what is awaited now is that the client leaves
                return await receive()
            try:
                async with asyncio.timeout(scope["state"]["started_at"] + self._timeout_s - time.monotonic()):
                    message = await receive()
            except TimeoutError:
                raise self._too_slow() from None
            complete = not message.get("more_body", False)
            received += len(message.get("body", b""))
            if received > limit:
                raise _too_large(limit)
            return message

        await self._app(scope, receive_limited, send)

    def _too_slow(self) -> ProblemError:
        detail = f"the whole body must arrive within {self._timeout_s:g} s"
        return ProblemError(Kind.BODY_TIMEOUT, detail, headers={"Connection": "close"})

    def _limit_of(self, scope: Scope, content_type: str) -> int:
        takes_files = path_within(scope) in _UPLOAD_ROUTES and content_type.lower().startswith("multipart/form-data")
        return self._max_upload_bytes if takes_files else self._max_body_bytes


def path_within(scope: Scope) -> str:
    """The path of a connection below the application's root; empty for what has none."""
    path: str = scope.get("path", "").removeprefix(scope.get("root_path", ""))
    return path


def _too_large(limit: int) -> ProblemError:
    return ProblemError(Kind.BODY_TOO_LARGE, f"at most {limit} bytes are allowed")


def _request_id(given: str | None) -> str:
    """The client's id when it is safe to log and to echo, else a new one, which need not be hard to guess."""
    return given if given is not None and _REQUEST_ID.fullmatch(given) else f"{random.getrandbits(128):032x}"
