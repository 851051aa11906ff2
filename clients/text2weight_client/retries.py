"""Which requests are sent again, when, and how often."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn, TypedDict

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

from text2weight_client.connection import logger
from text2weight_client.errors import APIConnectionError, APIError, APITimeoutError, NotReadyError

RETRIED_STATUSES = frozenset({429, 502, 503, 504})
# A caller who set a timeout does not expect to sleep for much longer than this inside one call.
MAX_RETRY_AFTER_S = 60.0
READY_PROBE_INTERVAL_S = 0.2

_BACKOFF = wait_exponential(multiplier=0.25, max=8.0) + wait_random(0.0, 0.25)


class RetryPolicy(TypedDict, total=False):
    """Arguments of tenacity's `Retrying` and `AsyncRetrying`."""

    retry: retry_base
    wait: wait_base | Callable[[RetryCallState], float]
    stop: stop_base
    reraise: bool
    before_sleep: Callable[[RetryCallState], None]
    retry_error_callback: Callable[[RetryCallState], NoReturn]


def request_policy(max_retries: int) -> RetryPolicy:
    """How a request is repeated; the last error is raised as it is."""
    return {
        "retry": retry_if_exception(is_retryable),
        "wait": wait_before_retry,
        "stop": stop_after_attempt(max_retries + 1),
        "reraise": True,
        "before_sleep": _log_retry,
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


def is_retryable(error: BaseException) -> bool:
    """Whether another attempt may succeed soon: a failed connection, or a status that says "later".

    A request that met its deadline is not repeated: the caller's time is over, and a busy service
    would get busier.
    """
    if isinstance(error, APIError):
        soon = error.retry_after_s is None or error.retry_after_s <= MAX_RETRY_AFTER_S
        return error.status in RETRIED_STATUSES and error.kind != "deadline" and soon
    return isinstance(error, APIConnectionError) and not isinstance(error, APITimeoutError)


def wait_before_retry(state: RetryCallState) -> float:
    """Seconds to wait: what the service asked for, else exponential backoff with jitter."""
    error = state.outcome.exception() if state.outcome else None
    if isinstance(error, APIError) and error.retry_after_s is not None:
        return error.retry_after_s
    return _BACKOFF(state)


def _log_retry(state: RetryCallState) -> None:
    error = state.outcome.exception() if state.outcome else None
    wait_s = state.next_action.sleep if state.next_action else 0.0
    logger.warning("attempt %d failed, the next is in %.1f s: %s", state.attempt_number, wait_s, error)
