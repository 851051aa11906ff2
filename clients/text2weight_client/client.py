"""`Client`: every call over a blocking connection, and the settings it shares with `AsyncClient`.

httpx, tenacity and numpy are imported when a client is made, not when this module is.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar, Unpack, overload

from text2weight_client.errors import InvalidRequestError

if TYPE_CHECKING:
    import httpx

    from text2weight_client.connection import HttpOptions, TimeLeft
    from text2weight_client.fuse_task import FuseTask
    from text2weight_client.head import GeneratedHead
    from text2weight_client.heads import GeneratedHeads
    from text2weight_client.info import ServiceInfo
    from text2weight_client.options import EnhanceOptions, FuseOptions, GenerateOptions
    from text2weight_client.protocol import Exchange, Image, Many
    from text2weight_client.results import ClassifiedImage, StreamEvent
    from text2weight_client.retries import RetryPolicy

T = TypeVar("T")
HttpT = TypeVar("HttpT", bound="httpx.Client | httpx.AsyncClient")
TransportT = TypeVar("TransportT", bound="httpx.BaseTransport | httpx.AsyncBaseTransport")

DEFAULT_BASE_URL = "http://127.0.0.1:8000"
DEFAULT_TIMEOUT_S = 60.0
DEFAULT_MAX_RETRIES = 3
DEFAULT_READY_TIMEOUT_S = 120.0
DEFAULT_CONCURRENCY = 8


class BaseClient(ABC, Generic[HttpT, TransportT]):
    """What both clients are made of: settings and a pool of connections."""

    def __init__(
        self,
        base_url: str = DEFAULT_BASE_URL,
        *,
        api_key: str | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        max_retries: int = DEFAULT_MAX_RETRIES,
        transport: TransportT | None = None,
    ) -> None:
        """Check the settings and open the pool of connections.

        Args:
            base_url: where the service listens; may hold a path prefix.
            api_key: sent as a Bearer token, if the service wants one; never logged or shown.
            timeout_s: seconds that a call may take, with all its attempts and the waits between them; of
                `generate_many`, each request. What is left is sent along as `deadline_ms` where it is
                shorter than the service's own request timeout.
            max_retries: further attempts after a failed connection, status 408, 429, 502, 503 or 504, or a
                500 that is not the service's own.
            transport: an httpx transport in place of the network (tests, Unix sockets).

        Raises:
            ValueError: a setting is not allowed.
        """
        from text2weight_client import connection

        options = connection.http_options(base_url, api_key, timeout_s, max_retries)
        self._http = self._open_http(options, transport)
        self._deadline = connection.Deadline()
        self._timeout_s = timeout_s
        self._max_retries = max_retries
        self._shown = f"{base_url!r}, api_key={'None' if api_key is None else '***'}, timeout_s={timeout_s:g}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._shown})"

    @abstractmethod
    def _open_http(self, options: HttpOptions, transport: TransportT | None) -> HttpT:
        """The pool of connections."""

    def _plan(self) -> tuple[TimeLeft, RetryPolicy]:
        """The time of a call that begins now, and how its request is repeated within it."""
        from text2weight_client.connection import TimeLeft
        from text2weight_client.retries import request_policy

        left = TimeLeft(self._timeout_s)
        return left, request_policy(self._max_retries, left)

    def _ready_plan(self, timeout_s: float) -> tuple[TimeLeft, RetryPolicy]:
        """The same for a wait until the service is ready."""
        from text2weight_client.connection import TimeLeft
        from text2weight_client.retries import ready_policy

        left = TimeLeft(timeout_s)
        return left, ready_policy(left)

    def _request(self, exchange: Exchange[T], left: TimeLeft) -> httpx.Request:
        """The request of one attempt; it may wait, and asks the service to work, only for the time that is left."""
        left_s = left.seconds
        return exchange.with_deadline(self._deadline.milliseconds(left_s)).request(self._http, left_s)

    def _without_deadline(self, exchange: Exchange[T], error: InvalidRequestError) -> bool:
        """Whether to ask again at once, because all that was refused is the deadline that this client chose."""
        return exchange.wants_deadline and self._deadline.give_up_if_refused(error)


class Client(BaseClient["httpx.Client", "httpx.BaseTransport"]):
    """Blocking client of a text2weight service; safe to share between threads."""

    @overload
    def generate(
        self, classes: Sequence[str], *, samples: None = None, **options: Unpack[GenerateOptions]
    ) -> GeneratedHead: ...
    @overload
    def generate(
        self, classes: Sequence[str], *, samples: int, **options: Unpack[GenerateOptions]
    ) -> GeneratedHeads: ...
    def generate(
        self, classes: Sequence[str], *, samples: int | None = None, **options: Unpack[GenerateOptions]
    ) -> GeneratedHead | GeneratedHeads:
        """Ask for a classifier head for a list of class names.

        Args:
            classes: two or more different names; row i of the result is class i.
            samples: ask for so many heads, of seeds `seed`, `seed` + 1, ...; None for a single head.
            options: see `GenerateOptions`.

        Returns:
            One head; where `samples` is given, even as 1, the sequence `GeneratedHeads`.

        Raises:
            InvalidRequestError: a value is not allowed; the message says which.
            APIError: any other error status, by class (see `text2weight_client.errors`).
            APIConnectionError: the service cannot be reached.
            APITimeoutError: no answer within what was left of `timeout_s`. Where no time is left to wait for
                another attempt, the error of the last one is raised and says so.
            InvalidResponseError: the answer is not a head.
        """
        from text2weight_client.protocol import generate_exchange, samples_exchange

        if samples is None:
            return self._send(generate_exchange(classes, **options))
        return self._send(samples_exchange(classes, samples, **options))

    def generate_many(
        self,
        class_lists: Iterable[Sequence[str]],
        *,
        concurrency: int = DEFAULT_CONCURRENCY,
        **options: Unpack[GenerateOptions],
    ) -> list[GeneratedHead]:
        """Ask for one head for each class list, several at a time.

        Args:
            class_lists: as `generate` takes them.
            concurrency: most requests on their way at once, 1 to 100.
            options: for all of them; without a seed each draws its own.

        Returns:
            The heads in the order of `class_lists`.

        Raises:
            GenerateManyError: requests failed. The others were finished and are in its `heads`, unless the
                failure was the service's rather than the request's (no connection, 401, 429, 503): then
                no further ones were sent.
        """
        from text2weight_client.protocol import Many

        many = Many(class_lists, concurrency, **options)
        with ThreadPoolExecutor(concurrency, thread_name_prefix="text2weight") as pool:
            list(pool.map(self._send_one_of, [many] * len(many.exchanges), range(len(many.exchanges))))
        return many.result()

    def fuse(
        self, tasks: Sequence[FuseTask | GeneratedHead | Sequence[str]], **options: Unpack[FuseOptions]
    ) -> GeneratedHead:
        """Ask for one head for the classes of several tasks together.

        Args:
            tasks: 2 to 16; class lists, heads to be merged, or `FuseTask` for weights.
            options: see `FuseOptions`; its `method` says whether to generate or how to merge.

        Raises:
            ValueError: some tasks have a head and some have none.
            Text2WeightClientError: as for `generate`.
        """
        from text2weight_client.protocol import fuse_exchange

        return self._send(fuse_exchange(tasks, **options))

    def enhance(
        self,
        head: GeneratedHead,
        strength: float,
        *,
        classes: Sequence[str] | None = None,
        **options: Unpack[EnhanceOptions],
    ) -> GeneratedHead:
        """Ask for a better version of a head: one between it and a head that is generated for the text.

        Args:
            head: what to start from.
            strength: 0 gives the head back, 1 is a new generation.
            classes: the text; the head's own classes if None.
            options: see `EnhanceOptions`.

        Raises:
            Text2WeightClientError: as for `generate`.
        """
        from text2weight_client.protocol import enhance_exchange

        return self._send(enhance_exchange(head, strength, classes, **options))

    def stream(
        self, classes: Sequence[str], *, heads_every: int | None = None, **options: Unpack[GenerateOptions]
    ) -> Generator[StreamEvent, None, None]:
        """Watch a head being generated. To stop early, close the iterator (`contextlib.closing`).

        Args:
            classes: as for `generate`.
            heads_every: also send the estimated head after every so many denoiser calls; none if None or 0.
            options: see `GenerateOptions`.

        Yields:
            A `ProgressEvent` for each denoiser call, `HeadEvent` where asked for, and one `DoneEvent` at last.

        Raises:
            Text2WeightClientError: as for `generate`. A stream that has begun is not asked for again; from
                then on what was left of `timeout_s` bounds each read, and the service's own work.
        """
        from contextlib import closing

        from text2weight_client.connection import connection_errors
        from text2weight_client.events import EventReader
        from text2weight_client.protocol import stream_exchange
        from text2weight_client.results import DoneEvent

        exchange = stream_exchange(classes, heads_every, **options)
        with closing(self._send(exchange, stream=True)) as response, connection_errors():
            reader = EventReader(response)
            for message in reader.source.iter_sse():
                event = reader.read(message)
                if event is not None:
                    yield event
                if isinstance(event, DoneEvent):
                    return
        raise reader.ended_early()

    def classify(self, head: GeneratedHead, images: Iterable[Image]) -> list[ClassifiedImage]:
        """Let the service classify images by its own backbone and a head.

        Args:
            head: from a checkpoint with the same backbone.
            images: 1 to 16 paths, or contents, of JPEG, PNG or WebP files.

        Raises:
            NotSupportedError: the service has no backbone; see `info().features.classify`.
            OSError: a file cannot be read.
            Text2WeightClientError: as for `generate`.
        """
        from text2weight_client.protocol import classify_exchange

        return self._send(classify_exchange(head, images))

    def info(self) -> ServiceInfo:
        """The service's model, limits and settings, as GET /info gives them."""
        from text2weight_client.protocol import info_exchange

        info = self._send(info_exchange())
        self._deadline.learn(info.raw)
        return info

    def wait_until_ready(self, timeout_s: float = DEFAULT_READY_TIMEOUT_S) -> None:
        """Return as soon as the service takes requests.

        Raises:
            APITimeoutError: it does not within `timeout_s` seconds, which go before the client's own.
            APIError: what listens there answers neither "ready" nor "not yet".
        """
        from text2weight_client.protocol import ready_exchange

        self._repeat(ready_exchange(), *self._ready_plan(timeout_s))

    def request(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
        *,
        content: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> httpx.Response:
        """Send any request and get the answer as it is; retries and errors are those of the other calls.

        Args:
            method: such as "GET".
            path: such as "/metrics".
            body: sent as JSON.
            content: sent as it is, in place of `body`; its `Content-Type` belongs into the headers.
            headers: such as `If-None-Match`, which makes status 304 an answer, or `X-Request-ID`.

        Raises:
            ValueError: both `body` and `content` are given, or `Authorization`, which is the client's own.
            Text2WeightClientError: as for `generate`; also for every other status that is no success.
        """
        from text2weight_client.protocol import raw_exchange

        return self._send(raw_exchange(method, path, body, content, headers))

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open_http(self, options: HttpOptions, transport: httpx.BaseTransport | None) -> httpx.Client:
        import httpx

        return httpx.Client(**options, transport=transport)

    def _send_one_of(self, many: Many, index: int) -> None:
        if not many.stopped:
            with many.keeping_errors(index):
                many.heads[index] = self._send(many.exchanges[index])

    def _send(self, exchange: Exchange[T], *, stream: bool = False) -> T:
        left, policy = self._plan()
        try:
            return self._repeat(exchange, left, policy, stream)
        except InvalidRequestError as error:
            if not self._without_deadline(exchange, error):
                raise
        return self._repeat(exchange, left, policy, stream)

    def _repeat(self, exchange: Exchange[T], left: TimeLeft, policy: RetryPolicy, stream: bool = False) -> T:
        from tenacity import Retrying

        result: T = Retrying(**policy)(self._attempt, exchange, left, stream)
        return result

    def _attempt(self, exchange: Exchange[T], left: TimeLeft, stream: bool) -> T:
        from text2weight_client.connection import connection_errors, log_answer

        started = time.perf_counter()
        with connection_errors():
            response = self._http.send(self._request(exchange, left), stream=stream)
            log_answer(response, started)
            if stream and not response.is_success:
                response.read()
        return exchange.result(response)
