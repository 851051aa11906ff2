"""`Client` and `AsyncClient`: the same calls over a blocking and over an asynchronous connection.

httpx, tenacity and numpy are imported when a client is made, not when this module is.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

if TYPE_CHECKING:
    import httpx

    from text2weight_client.head import GeneratedHead
    from text2weight_client.protocol import Exchange, RetryPolicy

T = TypeVar("T")

DEFAULT_BASE_URL = "http://127.0.0.1:8000"
DEFAULT_TIMEOUT_S = 60.0
DEFAULT_MAX_RETRIES = 3
DEFAULT_READY_TIMEOUT_S = 120.0


class Client:
    """Blocking client of a text2weight service; safe to share between threads.

    Args:
        base_url: where the service listens; may hold a path prefix.
        api_key: sent as a Bearer token, if the service wants one.
        timeout_s: seconds to wait for a connection, and for each read of an answer.
        max_retries: further attempts after a failed connection or status 429, 502, 503 or 504.
        transport: an httpx transport in place of the network (tests, Unix sockets).

    Raises:
        ValueError: a setting is not allowed.
    """

    def __init__(
        self,
        base_url: str = DEFAULT_BASE_URL,
        *,
        api_key: str | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        max_retries: int = DEFAULT_MAX_RETRIES,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        import httpx

        from text2weight_client import protocol

        self._protocol = protocol
        self._request_policy = protocol.request_policy(max_retries)
        options = protocol.http_options(base_url, api_key, timeout_s, max_retries)
        self._http = httpx.Client(**options, transport=transport)

    def generate(
        self,
        classes: Sequence[str],
        *,
        seed: int | None = None,
        steps: int | None = None,
        sampler: str | None = None,
    ) -> GeneratedHead:
        """Ask for a classifier head for a list of class names.

        Args:
            classes: two or more different names; row i of the result is class i.
            seed: the same seed, classes, steps and sampler give the same head; drawn at random if None.
            steps: denoiser calls; the service's default if None.
            sampler: one of the names that `info()` lists; the service's default if None.

        Raises:
            InvalidRequestError: a value is not allowed; the message says which.
            APIError: any other error status, by class (see `text2weight_client.errors`).
            APIConnectionError: the service cannot be reached.
            APITimeoutError: no answer within `timeout_s`.
            InvalidResponseError: the answer is not a head.
        """
        return self._send(self._protocol.generate_exchange(classes, seed, steps, sampler), self._request_policy)

    def info(self) -> dict[str, Any]:
        """The service's model, limits and settings, as GET /info gives them."""
        return self._send(self._protocol.info_exchange(), self._request_policy)

    def wait_until_ready(self, timeout_s: float = DEFAULT_READY_TIMEOUT_S) -> None:
        """Return as soon as the service takes requests.

        Raises:
            APITimeoutError: it does not within `timeout_s` seconds.
            APIError: what listens there answers neither "ready" nor "not yet".
        """
        self._send(self._protocol.ready_exchange(), self._protocol.ready_policy(timeout_s))

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _send(self, exchange: Exchange[T], policy: RetryPolicy) -> T:
        from tenacity import Retrying

        result: T = Retrying(**policy)(self._attempt, exchange)
        return result

    def _attempt(self, exchange: Exchange[T]) -> T:
        with self._protocol.connection_errors():
            response = self._http.send(exchange.request(self._http))
        return exchange.result(response)


class AsyncClient:
    """Asynchronous client of a text2weight service; arguments, calls and errors as in `Client`."""

    def __init__(
        self,
        base_url: str = DEFAULT_BASE_URL,
        *,
        api_key: str | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        max_retries: int = DEFAULT_MAX_RETRIES,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        import httpx

        from text2weight_client import protocol

        self._protocol = protocol
        self._request_policy = protocol.request_policy(max_retries)
        options = protocol.http_options(base_url, api_key, timeout_s, max_retries)
        self._http = httpx.AsyncClient(**options, transport=transport)

    async def generate(
        self,
        classes: Sequence[str],
        *,
        seed: int | None = None,
        steps: int | None = None,
        sampler: str | None = None,
    ) -> GeneratedHead:
        """Ask for a classifier head; see `Client.generate`."""
        return await self._send(self._protocol.generate_exchange(classes, seed, steps, sampler), self._request_policy)

    async def info(self) -> dict[str, Any]:
        """The service's model, limits and settings, as GET /info gives them."""
        return await self._send(self._protocol.info_exchange(), self._request_policy)

    async def wait_until_ready(self, timeout_s: float = DEFAULT_READY_TIMEOUT_S) -> None:
        """Return as soon as the service takes requests; see `Client.wait_until_ready`."""
        await self._send(self._protocol.ready_exchange(), self._protocol.ready_policy(timeout_s))

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def _send(self, exchange: Exchange[T], policy: RetryPolicy) -> T:
        from tenacity import AsyncRetrying

        result: T = await AsyncRetrying(**policy)(self._attempt, exchange)
        return result

    async def _attempt(self, exchange: Exchange[T]) -> T:
        with self._protocol.connection_errors():
            response = await self._http.send(exchange.request(self._http))
        return exchange.result(response)
