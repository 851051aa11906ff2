"""Who may call, and how often: the middleware that asks for a key and counts requests."""

from __future__ import annotations

import ipaddress
from contextlib import AsyncExitStack
from functools import lru_cache

import structlog
from starlette.types import ASGIApp, Receive, Scope, Send

from text2weight_service.auth import KeyRing, bearer_secret
from text2weight_service.metrics import Metrics
from text2weight_service.middleware import path_within
from text2weight_service.problems import Kind, ProblemError, problem_response
from text2weight_service.rate_limits import ConcurrencyLimiter, RateLimiter, SharedCounts
from text2weight_service.redis_budget import request_budget
from text2weight_service.settings import Settings

# Names of clients without a key in metrics; no key can have them, since key names have no brackets.
_ANONYMOUS = "(anonymous)"
_UNKNOWN = "(unknown)"
# What becomes of a request with a valid key.
_RESULTS = ("accepted", "rate-limited", "busy")
# An IPv6 customer has at least a /64, whose addresses cost nothing.
_IPV6_PREFIX = 64
_BUSY_RETRY_AFTER_S = 1
# For what no time limit sees, such as an event loop that was held up.
_LEASE_MARGIN_S = 10.0


def is_open(path: str) -> bool:
    """Whether a path never needs a key and never counts: the page, its parts and the probes."""
    return path == "/" or path.startswith(("/health/", "/playground/"))


class AccessControl:
    """The keys and limits of one worker."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        """Read the keys and prepare the limits.

        Raises:
            KeysError: the keys cannot be used.
        """
        keys = settings.api_keys.get_secret_value() if settings.api_keys is not None else None
        self.requests = metrics.client_requests
        self.keys = KeyRing(keys, settings.api_keys_file, self._forget)
        self.public_metrics = settings.public_metrics
        self.redis_timeout_s = settings.redis_timeout_s
        self._counts: SharedCounts | None = None
        if settings.redis_url is not None and (settings.rate_limit or settings.max_concurrent_per_key):
            self._counts = SharedCounts(settings.redis_url.get_secret_value(), settings.redis_timeout_s, metrics)
        self.concurrency: ConcurrencyLimiter | None = None
        if settings.max_concurrent_per_key is not None:
            # A body, a computation and a stream all end by the request's time limit; then the answer must be read.
            lease_s = settings.request_timeout_s + settings.send_timeout_s + _LEASE_MARGIN_S
            self.concurrency = ConcurrencyLimiter(settings.max_concurrent_per_key, self._counts, lease_s)
        self.rate = RateLimiter(settings.rate_limit, self._counts) if settings.rate_limit is not None else None

    def _forget(self, name: str) -> None:
        """Drop the metrics of a client whose last key is gone."""
        for result in _RESULTS:
            self.requests.remove(name, result)

    async def close(self) -> None:
        """Give the last places back and close the connections to Redis."""
        if self.concurrency is not None:
            await self.concurrency.close()
        if self._counts is not None:
            await self._counts.close()


class AccessMiddleware:
    """Answers 401 to clients without a key where one is needed, and 429 to those over their limits.

    Sets `request.state.client` to the key's name.
    """

    def __init__(self, app: ASGIApp, access: AccessControl) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection, as ASGI asks."""
        path = path_within(scope)
        if scope["type"] != "http" or is_open(path) or (path == "/metrics" and self._access.public_metrics):
            await self._app(scope, receive, send)
            return
        async with AsyncExitStack() as held:
            held.enter_context(request_budget(self._access.redis_timeout_s))
            try:
                await self._admit(scope, held)
            except ProblemError as problem:
                await problem_response(problem, scope["state"]["request_id"])(scope, receive, send)
                return
            await self._app(scope, receive, send)

    async def _admit(self, scope: Scope, held: AsyncExitStack) -> None:
        """Find out who calls and take a place; `held` gives it back."""
        access = self._access
        name, client = self._identify(scope)
        scope["state"]["client"] = name
        if access.concurrency is not None:
            place = await held.enter_async_context(access.concurrency.place(client))
            if not place:
                access.requests.labels(name, "busy").inc()
                what = f"{access.concurrency.most} requests of this client are running, as many as are allowed"
                raise _rate_limited(what, _BUSY_RETRY_AFTER_S)
        if access.rate is not None:
            wait_s = await access.rate.hit(client)
            if wait_s is not None:
                access.requests.labels(name, "rate-limited").inc()
                raise _rate_limited(f"this client made more requests than {access.rate.limit} allows", wait_s)
        access.requests.labels(name, "accepted").inc()
        held.enter_context(structlog.contextvars.bound_contextvars(client=name))

    def _identify(self, scope: Scope) -> tuple[str, str]:
        """The name of a client for people, and what its requests are counted under."""
        if not self._access.keys.required:
            return _ANONYMOUS, f"address:{_network(scope)}"
        secret = bearer_secret([value for name, value in scope["headers"] if name == b"authorization"])
        name = self._access.keys.name_of(secret) if secret is not None else None
        if name is None:
            self._access.requests.labels(_UNKNOWN, "unauthorized").inc()
            raise ProblemError(
                Kind.UNAUTHORIZED,
                "send a valid key: Authorization: Bearer KEY",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return name, f"key:{name}"


def _network(scope: Scope) -> str:
    """The client's address, or that of its IPv6 network; proxies can write anything there."""
    client = scope["client"]
    return "unknown" if client is None else _network_of(client[0])


@lru_cache(maxsize=1024)
def _network_of(host: str) -> str:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return "unknown"
    if address.version == 4:
        return str(address)
    return str(ipaddress.ip_network((int(address), _IPV6_PREFIX), strict=False))


def _rate_limited(what: str, retry_after_s: int) -> ProblemError:
    return ProblemError(
        Kind.RATE_LIMITED, f"{what}; try again in {retry_after_s} s", headers={"Retry-After": str(retry_after_s)}
    )
