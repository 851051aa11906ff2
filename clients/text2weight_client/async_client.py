"""`AsyncClient`: the calls of `Client` over an asynchronous connection."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar, Unpack, overload

from text2weight_client.client import DEFAULT_CONCURRENCY, DEFAULT_READY_TIMEOUT_S, BaseClient
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


class AsyncClient(BaseClient["httpx.AsyncClient", "httpx.AsyncBaseTransport"]):
    """Asynchronous client of a text2weight service; calls and errors are those of `Client`, awaited."""

    @overload
    async def generate(
        self, classes: Sequence[str], *, samples: None = None, **options: Unpack[GenerateOptions]
    ) -> GeneratedHead: ...
    @overload
    async def generate(
        self, classes: Sequence[str], *, samples: int, **options: Unpack[GenerateOptions]
    ) -> GeneratedHeads: ...
    async def generate(
        self, classes: Sequence[str], *, samples: int | None = None, **options: Unpack[GenerateOptions]
    ) -> GeneratedHead | GeneratedHeads:
        """Ask for a classifier head, or for several; see `Client.generate`."""
        from text2weight_client.protocol import generate_exchange, samples_exchange

        if samples is None:
            return await self._send(generate_exchange(classes, **options))
        return await self._send(samples_exchange(classes, samples, **options))

    async def generate_many(
        self,
        class_lists: Iterable[Sequence[str]],
        *,
        concurrency: int = DEFAULT_CONCURRENCY,
        **options: Unpack[GenerateOptions],
    ) -> list[GeneratedHead]:
        """Ask for one head for each class list, several at a time; see `Client.generate_many`."""
        from text2weight_client.protocol import Many

        many = Many(class_lists, concurrency, **options)
        free = asyncio.Semaphore(concurrency)
        try:
            async with asyncio.TaskGroup() as group:
                for index in range(len(many.exchanges)):
                    group.create_task(self._send_one_of(many, index, free))
        except ExceptionGroup as errors:  # a fault in the arguments; the service's errors are in `many`
            raise errors.exceptions[0] from errors
        return many.result()

    async def fuse(
        self, tasks: Sequence[FuseTask | GeneratedHead | Sequence[str]], **options: Unpack[FuseOptions]
    ) -> GeneratedHead:
        """Ask for one head for the classes of several tasks together; see `Client.fuse`."""
        from text2weight_client.protocol import fuse_exchange

        return await self._send(fuse_exchange(tasks, **options))

    async def enhance(
        self,
        head: GeneratedHead,
        strength: float,
        *,
        classes: Sequence[str] | None = None,
        **options: Unpack[EnhanceOptions],
    ) -> GeneratedHead:
        """Ask for a better version of a head; see `Client.enhance`."""
        from text2weight_client.protocol import enhance_exchange

        return await self._send(enhance_exchange(head, strength, classes, **options))

    async def stream(
        self, classes: Sequence[str], *, heads_every: int | None = None, **options: Unpack[GenerateOptions]
    ) -> AsyncGenerator[StreamEvent, None]:
        """Watch a head being generated; see `Client.stream`. To stop early: `contextlib.aclosing`."""
        from contextlib import aclosing

        from text2weight_client.connection import connection_errors
        from text2weight_client.events import EventReader
        from text2weight_client.protocol import stream_exchange
        from text2weight_client.results import DoneEvent

        exchange = stream_exchange(classes, heads_every, **options)
        async with aclosing(await self._send(exchange, stream=True)) as response:
            with connection_errors():
                reader = EventReader(response)
                async for message in reader.source.aiter_sse():
                    event = reader.read(message)
                    if event is not None:
                        yield event
                    if isinstance(event, DoneEvent):
                        return
        raise reader.ended_early()

    async def classify(self, head: GeneratedHead, images: Iterable[Image]) -> list[ClassifiedImage]:
        """Let the service classify images by its own backbone and a head; see `Client.classify`."""
        from text2weight_client.protocol import classify_exchange

        return await self._send(await asyncio.to_thread(classify_exchange, head, images))

    async def info(self) -> ServiceInfo:
        """The service's model, limits and settings, as GET /info gives them."""
        from text2weight_client.protocol import info_exchange

        info = await self._send(info_exchange())
        self._deadline.learn(info.raw)
        return info

    async def wait_until_ready(self, timeout_s: float = DEFAULT_READY_TIMEOUT_S) -> None:
        """Return as soon as the service takes requests; see `Client.wait_until_ready`."""
        from text2weight_client.protocol import ready_exchange

        await self._repeat(ready_exchange(), *self._ready_plan(timeout_s))

    async def request(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
        *,
        content: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> httpx.Response:
        """Send any request and get the answer as it is; see `Client.request`."""
        from text2weight_client.protocol import raw_exchange

        return await self._send(raw_exchange(method, path, body, content, headers))

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def _open_http(self, options: HttpOptions, transport: httpx.AsyncBaseTransport | None) -> httpx.AsyncClient:
        import httpx

        return httpx.AsyncClient(**options, transport=transport)

    async def _send_one_of(self, many: Many, index: int, free: asyncio.Semaphore) -> None:
        async with free:
            if not many.stopped:
                with many.keeping_errors(index):
                    many.heads[index] = await self._send(many.exchanges[index])

    async def _send(self, exchange: Exchange[T], *, stream: bool = False) -> T:
        left, policy = self._plan()
        try:
            return await self._repeat(exchange, left, policy, stream)
        except InvalidRequestError as error:
            if not self._without_deadline(exchange, error):
                raise
        return await self._repeat(exchange, left, policy, stream)

    async def _repeat(self, exchange: Exchange[T], left: TimeLeft, policy: RetryPolicy, stream: bool = False) -> T:
        from tenacity import AsyncRetrying

        result: T = await AsyncRetrying(**policy)(self._attempt, exchange, left, stream)
        return result

    async def _attempt(self, exchange: Exchange[T], left: TimeLeft, stream: bool) -> T:
        from text2weight_client.connection import connection_errors, log_answer

        started = time.perf_counter()
        with connection_errors():
            response = await self._http.send(self._request(exchange, left), stream=stream)
            log_answer(response, started)
            if stream and not response.is_success:
                await response.aread()
        return exchange.result(response)
