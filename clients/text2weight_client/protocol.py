"""The service's HTTP contract, written once for `Client` and `AsyncClient`.

An `Exchange` is a request together with the function that reads its answer; the clients only carry
it over a blocking or an asynchronous connection.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from importlib.metadata import version
from typing import Any, Generic, NoReturn, TypedDict, TypeVar

import httpx
from tenacity import (
    RetryCallState,
    retry_if_exception,
    retry_if_exception_type,
    stop_after_attempt,
    stop_after_delay,
    wait_exponential,
    wait_fixed,
    wait_random,
)
from tenacity.retry import retry_base
from tenacity.stop import stop_base
from tenacity.wait import wait_base

from text2weight_client.errors import (
    APIConnectionError,
    APIError,
    APITimeoutError,
    InvalidHeadError,
    InvalidResponseError,
    NotReadyError,
    api_error_type,
)
from text2weight_client.head import GeneratedHead

T = TypeVar("T")

RETRIED_STATUSES = frozenset({429, 502, 503, 504})
# A caller who set a timeout does not expect to sleep for much longer than this inside one call.
MAX_RETRY_AFTER_S = 60.0
READY_PROBE_TIMEOUT_S = 5.0
READY_PROBE_INTERVAL_S = 0.2

_BACKOFF = wait_exponential(multiplier=0.25, max=8.0) + wait_random(0.0, 0.25)


@dataclass(frozen=True)
class Exchange(Generic[T]):
    """One request and the reading of its answer.

    Attributes:
        method: HTTP method.
        path: relative to the base URL.
        body: sent as JSON; None for no body.
        read: turns a successful response into the result.
        timeout_s: in place of the client's own timeout.
    """

    method: str
    path: str
    read: Callable[[httpx.Response], T]
    body: dict[str, Any] | None = None
    timeout_s: float | None = None

    def request(self, http: httpx.Client | httpx.AsyncClient) -> httpx.Request:
        """Build the request with the client's base URL, headers and timeout."""
        timeout = http.timeout if self.timeout_s is None else httpx.Timeout(self.timeout_s)
        return http.build_request(self.method, self.path, json=self.body, timeout=timeout)

    def result(self, response: httpx.Response) -> T:
        """Read a response, whatever its status.

        Raises:
            APIError: an error status.
            InvalidResponseError: a success whose body is not what was asked for.
        """
        if not response.is_success:
            raise api_error(response)
        return self.read(response)


def generate_exchange(
    classes: Sequence[str], seed: int | None, steps: int | None, sampler: str | None
) -> Exchange[GeneratedHead]:
    """POST /generate. A missing seed is drawn here, once, so that every retry asks for the same head."""
    body: dict[str, Any] = {
        # A lone string is sent as it is, for the service to refuse, not as a list of its letters.
        "classes": classes if isinstance(classes, str) else list(classes),
        "seed": secrets.randbits(32) if seed is None else seed,
    }
    if steps is not None:
        body["steps"] = steps
    if sampler is not None:
        body["sampler"] = sampler
    return Exchange("POST", "/generate", _read_head, body)


def info_exchange() -> Exchange[dict[str, Any]]:
    """GET /info."""
    return Exchange("GET", "/info", _read_object)


def ready_exchange() -> Exchange[None]:
    """GET /health/ready."""
    return Exchange("GET", "/health/ready", lambda response: None, timeout_s=READY_PROBE_TIMEOUT_S)


def _read_head(response: httpx.Response) -> GeneratedHead:
    try:
        return GeneratedHead.from_bytes(response.content)
    except InvalidHeadError as error:
        raise InvalidResponseError(f"{response.url} answered 200 with a body that is not a head: {error}") from error


def _read_object(response: httpx.Response) -> dict[str, Any]:
    try:
        value = response.json()
    except ValueError as error:
        raise InvalidResponseError(f"{response.url} answered 200 with a body that is not JSON") from error
    if not isinstance(value, dict):
        raise InvalidResponseError(f"{response.url} answered 200 with JSON that is not an object")
    return value


def api_error(response: httpx.Response) -> APIError:
    """Read an error response; one that is not problem details (a proxy's page) is quoted in part."""
    try:
        parsed = response.json()
    except ValueError:
        parsed = None
    problem: dict[str, Any] = parsed if isinstance(parsed, dict) else {"detail": response.text.strip()[:200]}
    errors = problem.get("errors")
    request_id = problem.get("request_id") or response.headers.get("X-Request-ID")
    return api_error_type(response.status_code)(
        response.status_code,
        str(problem.get("title") or response.reason_phrase),
        str(problem.get("detail") or ""),
        request_id=str(request_id) if request_id else None,
        errors=[item for item in errors if isinstance(item, dict)] if isinstance(errors, list) else (),
        retry_after_s=parse_retry_after(response.headers.get("Retry-After")),
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


def is_retryable(error: BaseException) -> bool:
    """Whether another attempt may succeed soon: a failed connection, or a status that says "later"."""
    if isinstance(error, APIError):
        soon = error.retry_after_s is None or error.retry_after_s <= MAX_RETRY_AFTER_S
        return error.status in RETRIED_STATUSES and soon
    return isinstance(error, APIConnectionError) and not isinstance(error, APITimeoutError)


def wait_before_retry(state: RetryCallState) -> float:
    """Seconds to wait: what the service asked for, else exponential backoff with jitter."""
    error = state.outcome.exception() if state.outcome else None
    if isinstance(error, APIError) and error.retry_after_s is not None:
        return error.retry_after_s
    return _BACKOFF(state)


class RetryPolicy(TypedDict, total=False):
    """Arguments of tenacity's `Retrying` and `AsyncRetrying`."""

    retry: retry_base
    wait: wait_base | Callable[[RetryCallState], float]
    stop: stop_base
    reraise: bool
    retry_error_callback: Callable[[RetryCallState], NoReturn]


def request_policy(max_retries: int) -> RetryPolicy:
    """How a request is repeated; the last error is raised as it is."""
    return {
        "retry": retry_if_exception(is_retryable),
        "wait": wait_before_retry,
        "stop": stop_after_attempt(max_retries + 1),
        "reraise": True,
    }


def ready_policy(timeout_s: float) -> RetryPolicy:
    """How the readiness probe is repeated, until `timeout_s` has passed."""

    def give_up(state: RetryCallState) -> NoReturn:
        last = state.outcome.exception() if state.outcome else None
        raise APITimeoutError(f"the service was not ready after {timeout_s:g} s; the last attempt: {last}") from last

    return {
        "retry": retry_if_exception_type((NotReadyError, APIConnectionError)),
        "wait": wait_fixed(READY_PROBE_INTERVAL_S),
        "stop": stop_after_delay(timeout_s),
        "retry_error_callback": give_up,
    }


# Every open connection is kept, so that many requests at once do not reconnect all the time.
_LIMITS = httpx.Limits(max_connections=100, max_keepalive_connections=100)


class HttpOptions(TypedDict):
    """Arguments common to httpx's two clients."""

    base_url: str
    headers: dict[str, str]
    timeout: float
    limits: httpx.Limits


def http_options(base_url: str, api_key: str | None, timeout_s: float, max_retries: int) -> HttpOptions:
    """Check a client's settings.

    Raises:
        ValueError: a setting is not allowed; the message says which.
    """
    if not base_url.startswith(("http://", "https://")):
        raise ValueError(f"base_url is {base_url!r}: it must start with http:// or https://")
    if not timeout_s > 0:
        raise ValueError(f"timeout_s is {timeout_s}: it must be above 0")
    if max_retries < 0:
        raise ValueError(f"max_retries is {max_retries}: it must be 0 or more")
    headers = {"User-Agent": f"text2weight-client/{version('text2weight')}"}
    if api_key is not None:
        if not api_key.isascii() or not api_key.isprintable() or not api_key.strip():
            raise ValueError("api_key must be printable ASCII text without line ends")
        headers["Authorization"] = f"Bearer {api_key}"
    return {"base_url": base_url, "headers": headers, "timeout": timeout_s, "limits": _LIMITS}
