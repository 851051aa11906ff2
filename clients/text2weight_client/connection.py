"""What both clients need around a request: settings, deadlines, error answers, logging."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from importlib.metadata import version
from typing import Any, TypedDict

import httpx

from text2weight_client.errors import (
    APIConnectionError,
    APIError,
    APITimeoutError,
    InvalidResponseError,
    api_error_type,
)

PROBLEM_TYPES = "urn:text2weight:problem:"
# What a service allows if nothing else is known; one that allows less refuses once and is then asked without.
USUAL_REQUEST_TIMEOUT_S = 30.0
# Every open connection is kept, so that many requests at once do not reconnect all the time.
MAX_CONNECTIONS = 100
_LIMITS = httpx.Limits(max_connections=MAX_CONNECTIONS, max_keepalive_connections=MAX_CONNECTIONS)

logger = logging.getLogger("text2weight_client")


class HttpOptions(TypedDict):
    """Arguments common to httpx's two clients."""

    base_url: str
    headers: dict[str, str]
    limits: httpx.Limits


def http_options(base_url: str, api_key: str | None, timeout_s: float, max_retries: int) -> HttpOptions:
    """Check a client's settings.

    Raises:
        ValueError: a setting is not allowed; the message says which, and never holds a secret.
    """
    if not base_url.startswith(("http://", "https://")):
        raise ValueError(f"base_url is {base_url!r}: it must start with http:// or https://")
    if httpx.URL(base_url).userinfo:
        raise ValueError("base_url holds a user name or password, which would end up in logs: use api_key")
    if not timeout_s > 0:
        raise ValueError(f"timeout_s is {timeout_s}: it must be above 0")
    if max_retries < 0:
        raise ValueError(f"max_retries is {max_retries}: it must be 0 or more")
    headers = {"User-Agent": f"text2weight-client/{version('text2weight')}"}
    if api_key is not None:
        if not api_key.isascii() or not api_key.isprintable() or not api_key.strip():
            raise ValueError("api_key must be printable ASCII text without line ends")
        headers["Authorization"] = f"Bearer {api_key}"
    return {"base_url": base_url, "headers": headers, "limits": _LIMITS}


class TimeLeft:
    """The time of one call, which all its attempts and the waits between them share; it begins at once."""

    def __init__(self, total_s: float) -> None:
        self.total_s = total_s
        self._ends = time.monotonic() + total_s

    @property
    def seconds(self) -> float:
        """What is left of it; below 0 when it is over."""
        return self._ends - time.monotonic()


class Deadline:
    """Decides which `deadline_ms` to send where a caller gave none.

    The service refuses a deadline beyond its own request timeout, and needs none there: that timeout
    ends the request anyway.
    """

    def __init__(self) -> None:
        self._limit_s = USUAL_REQUEST_TIMEOUT_S

    def milliseconds(self, left_s: float) -> int | None:
        """The time that is left of a call, if that is shorter than the service's own timeout."""
        return max(1, int(left_s * 1000)) if left_s < self._limit_s else None

    def learn(self, info: dict[str, Any]) -> None:
        """Take the service's request timeout from its GET /info."""
        limits = info.get("limits")
        limit_s = limits.get("request_timeout_s") if isinstance(limits, dict) else None
        if isinstance(limit_s, int | float):
            self._limit_s = limit_s

    def give_up_if_refused(self, error: APIError) -> bool:
        """Whether the service refused the deadline; from then on none is sent."""
        refused = any(item.get("field") == "deadline_ms" for item in error.errors)
        if refused:
            self._limit_s = 0.0
        return refused


def api_error(response: httpx.Response) -> APIError:
    """Read an error response; one that is not problem details (a proxy's page) is quoted in part."""
    try:
        parsed = response.json()
    except ValueError:
        parsed = None
    if not isinstance(parsed, dict):
        parsed = {"detail": response.text.strip()[:200]}
    parsed.setdefault("request_id", response.headers.get("X-Request-ID"))
    parsed["title"] = parsed.get("title") or response.reason_phrase
    return problem_error(response.status_code, parsed, parse_retry_after(response.headers.get("Retry-After")))


def problem_error(status: int, problem: dict[str, Any], retry_after_s: float | None = None) -> APIError:
    """The error that problem details stand for."""
    kind = str(problem.get("type") or "")
    kind = kind.removeprefix(PROBLEM_TYPES) if kind.startswith(PROBLEM_TYPES) else ""
    errors = problem.get("errors")
    request_id = problem.get("request_id")
    return api_error_type(status, kind)(
        status,
        str(problem.get("title") or ""),
        str(problem.get("detail") or ""),
        kind=kind,
        request_id=str(request_id) if request_id else None,
        errors=[item for item in errors if isinstance(item, dict)] if isinstance(errors, list) else (),
        retry_after_s=retry_after_s,
    )


def parse_retry_after(value: str | None) -> float | None:
    """Read a Retry-After header (RFC 9110, 10.2.3): seconds, or a date; None if absent or unreadable."""
    if value is None:
        return None
    if value.strip().isdecimal():
        return float(value)
    try:
        moment = parsedate_to_datetime(value)
    except ValueError:
        return None
    if moment.tzinfo is None:  # HTTP dates are in GMT whether they say so or not
        moment = moment.replace(tzinfo=UTC)
    return max(0.0, (moment - datetime.now(UTC)).total_seconds())


@contextmanager
def connection_errors() -> Iterator[None]:
    """Turn httpx's errors into this package's."""
    try:
        yield
    except httpx.ConnectTimeout as error:  # nothing was sent, so this is a failed connection
        raise APIConnectionError(f"could not connect to {error.request.url} in time") from error
    except httpx.TimeoutException as error:
        raise APITimeoutError(
            f"no complete answer from {error.request.url} in time: raise timeout_s, or lower the number of steps"
        ) from error
    except httpx.DecodingError as error:
        raise InvalidResponseError(f"the answer of {error.request.url} cannot be decoded: {error}") from error
    except httpx.RequestError as error:
        reason = str(error) or type(error).__name__
        raise APIConnectionError(f"cannot reach {error.request.url}: {reason}") from error


def log_answer(response: httpx.Response, started: float) -> None:
    """Log one answer. Neither headers nor bodies are logged, so that no key can be."""
    logger.debug(
        "%s %s answered %d after %.0f ms (request id %s)",
        response.request.method,
        response.request.url.path,
        response.status_code,
        (time.perf_counter() - started) * 1000,
        response.headers.get("X-Request-ID"),
    )
