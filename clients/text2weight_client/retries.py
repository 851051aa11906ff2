"""Which requests are sent again, when, and how often."""

from __future__ import annotations

from collections.abc import Callable
from http import HTTPStatus
from typing import NoReturn, TypedDict

from tenacity import (
    RetryCallState,
    retry_if_exception,
    retry_if_exception_type,
    wait_exponential,
    wait_fixed,
    wait_random,
)
from tenacity.retry import retry_base
from tenacity.wait import wait_base

from text2weight_client.connection import TimeLeft, logger
from text2weight_client.errors import APIConnectionError, APIError, APITimeoutError, NotReadyError

RETRIED_STATUSES = frozenset({408, 429, 502, 503, 504})
READY_PROBE_INTERVAL_S = 0.2

_JITTER_S = 0.25
_JITTER_SHARE = 0.25
_BACKOFF = wait_exponential(multiplier=0.25, max=8.0) + wait_random(0.0, _JITTER_S)


class RetryPolicy(TypedDict, total=False):
    """Arguments of tenacity's `Retrying` and `AsyncRetrying`."""

    retry: retry_base
    wait: wait_base | Callable[[RetryCallState], float]
    stop: Callable[[RetryCallState], bool]
    before_sleep: Callable[[RetryCallState], None]
    retry_error_callback: Callable[[RetryCallState], NoReturn]


def request_policy(max_retries: int, left: TimeLeft) -> RetryPolicy:
    """How a request is repeated, within the time of its call; the last error is raised, and says if time ran out."""

    def give_up(state: RetryCallState) -> NoReturn:
        error = _last_error(state)
        if state.attempt_number <= max_retries:
            error.args = (
                f"{error}; not asked again: the next attempt, in {state.upcoming_sleep:.1f} s, "
                f"would be after the {left.total_s:g} s of timeout_s",
            )
        raise error

    return {
        "retry": retry_if_exception(is_retryable),
        "wait": wait_before_retry,
        "stop": lambda state: state.attempt_number > max_retries or _too_late(state, left),
        "before_sleep": _log_retry,
        "retry_error_callback": give_up,
    }


def ready_policy(left: TimeLeft) -> RetryPolicy:
    """How the readiness probe is repeated, within its time."""

    def give_up(state: RetryCallState) -> NoReturn:
        last = _last_error(state)
        raise APITimeoutError(
            f"the service was not ready within {left.total_s:g} s; the last attempt: {last}"
        ) from last

    return {
        "retry": retry_if_exception_type((NotReadyError, APIConnectionError)),
        "wait": wait_fixed(READY_PROBE_INTERVAL_S),
        "stop": lambda state: _too_late(state, left),
        "retry_error_callback": give_up,
    }


def is_retryable(error: BaseException) -> bool:
    """Whether another attempt may succeed: a failed connection, a status that asks for one, or a proxy's 500.

    The service names every problem of its own. A 500 without a name comes from what stands before it,
    such as Ray Serve when a replica dies under a request, and another replica may answer. Repeating is
    safe: the service stores nothing, and a drawn seed stays. A request that met its deadline is not
    repeated: the caller's time is over, and a busy service would get busier.
    """
    if isinstance(error, APIError):
        if error.status == HTTPStatus.INTERNAL_SERVER_ERROR:
            return not error.kind
        return error.status in RETRIED_STATUSES and error.kind != "deadline"
    return isinstance(error, APIConnectionError) and not isinstance(error, APITimeoutError)


def wait_before_retry(state: RetryCallState) -> float:
    """Seconds to wait: what the service asked for, or exponential backoff, and jitter on top.

    All clients that were refused together were told the same time; the longer it is, the more of them
    have gathered, so the jitter grows with it. A worker that shuts down says when another may have taken
    its place, but where there are several, the next connection leads to one of them.
    """
    error = _last_error(state)
    elsewhere = isinstance(error, APIError) and error.kind == "draining" and state.attempt_number == 1
    if isinstance(error, APIError) and error.retry_after_s is not None and not elsewhere:
        return error.retry_after_s + wait_random(0.0, max(_JITTER_S, _JITTER_SHARE * error.retry_after_s))(state)
    return _BACKOFF(state)


def _too_late(state: RetryCallState, left: TimeLeft) -> bool:
    return state.upcoming_sleep >= left.seconds


def _last_error(state: RetryCallState) -> BaseException:
    error = state.outcome.exception() if state.outcome else None
    if error is None:
        raise AssertionError("only a failed attempt is repeated")
    return error


def _log_retry(state: RetryCallState) -> None:
    wait_s, error = state.upcoming_sleep, _last_error(state)
    logger.warning("attempt %d failed, the next is in %.1f s: %s", state.attempt_number, wait_s, error)
