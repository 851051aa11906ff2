"""The mixed requests of the robustness programs, sent through the real client, and the fate of each."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import httpx
import numpy as np

from bench.timing import significant
from text2weight_client import APIConnectionError, APIError, APITimeoutError, AsyncClient, InvalidResponseError

FEWEST_CLASSES, MOST_CLASSES = 2, 32
# A worker answers 504 before this, so a client that waits longer was forgotten.
CLIENT_TIMEOUT_S = 40.0
CONNECTIONS = 100
PAUSE_S = 0.05  # rest of a caller between two requests


@dataclass(frozen=True)
class Kind:
    """One kind of request and its share of the traffic."""

    name: str
    sampler: str
    steps: int
    share: float


KINDS = (
    Kind("1 step", "mean", 1, 0.80),
    Kind("20 steps", "ddim", 20, 0.15),
    Kind("200 steps", "ddim", 200, 0.05),
)
REPEATED = 0.2  # share of requests that equal one of the last, so that caches and shared work take part
REMEMBERED = 50


@dataclass(frozen=True)
class Ask:
    """What one request asks for."""

    kind: Kind
    classes: tuple[str, ...]
    seed: int


class Mix:
    """Draws requests: kinds by their shares, 2 to 32 classes, one in five equal to an earlier one."""

    def __init__(self, names: Sequence[str], seed: int = 0, kinds: Sequence[Kind] = KINDS) -> None:
        self._names = list(names)
        self._source = random.Random(seed)
        self._kinds = list(kinds)
        self._recent: deque[Ask] = deque(maxlen=REMEMBERED)

    def draw(self) -> Ask:
        source = self._source
        if self._recent and source.random() < REPEATED:
            return source.choice(self._recent)
        [kind] = source.choices(self._kinds, [kind.share for kind in self._kinds])
        count = source.randint(FEWEST_CLASSES, min(MOST_CLASSES, len(self._names)))
        ask = Ask(kind, tuple(source.sample(self._names, count)), source.getrandbits(32))
        self._recent.append(ask)
        return ask


@dataclass
class Tally:
    """Fates of requests. What is neither answered nor an error to its client is lost.

    Attributes:
        sent: requests begun.
        answered: 200 with the head that was asked for.
        errors: documented problems, by status and title.
        undocumented: everything that no document promises: another status, a wrong head, a server error.
        broken: connections that failed, an error that the client sees.
        lost: no answer and no error within `CLIENT_TIMEOUT_S`.
        attempts: HTTP requests, each try of a repeated one counted.
        seconds: from the begin to the fate, retries included, of answered requests.
    """

    sent: int = 0
    answered: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    undocumented: Counter[str] = field(default_factory=Counter)
    broken: Counter[str] = field(default_factory=Counter)
    lost: int = 0
    attempts: int = 0
    seconds: list[float] = field(default_factory=list)

    def add_answer(self, seconds: float) -> None:
        self.answered += 1
        self.seconds.append(seconds)

    @property
    def worst_s(self) -> float:
        return significant(max(self.seconds, default=0.0), 3)

    def percentile_ms(self, percent: float) -> float:
        return round(float(np.percentile(self.seconds, percent)) * 1000, 1) if self.seconds else 0.0

    def summary(self) -> dict[str, object]:
        return {
            "sent": self.sent,
            "answered": self.answered,
            "errors": dict(self.errors),
            "undocumented": dict(self.undocumented),
            "broken": dict(self.broken),
            "lost": self.lost,
            "repeated": max(0, self.attempts - self.sent),
            "p50_ms": self.percentile_ms(50),
            "worst_s": self.worst_s,
        }


def documented_statuses(url: str, path: str = "/generate") -> frozenset[int]:
    """The statuses that the worker's OpenAPI document names for POST `path`."""
    document = httpx.get(f"{url}/openapi.json", timeout=CLIENT_TIMEOUT_S).raise_for_status().json()
    return frozenset(int(status) for status in document["paths"][path]["post"]["responses"])


class CountingTransport(httpx.AsyncHTTPTransport):
    """The network, with a count of the requests that went out."""

    def __init__(self, tally: Tally) -> None:
        super().__init__(limits=httpx.Limits(max_connections=CONNECTIONS, max_keepalive_connections=CONNECTIONS))
        self._tally = tally

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self._tally.attempts += 1
        return await super().handle_async_request(request)


def open_client(url: str, tally: Tally, max_retries: int, timeout_s: float = CLIENT_TIMEOUT_S) -> AsyncClient:
    """The project's own client, its attempts counted."""
    return AsyncClient(url, timeout_s=timeout_s, max_retries=max_retries, transport=CountingTransport(tally))


async def send(client: AsyncClient, ask: Ask, tally: Tally, documented: frozenset[int], due: float) -> bool:
    """Send one request and record its fate; `due` is the moment (`perf_counter`) its latency counts from.

    Returns:
        whether the right head came.
    """
    tally.sent += 1
    try:
        head = await client.generate(ask.classes, seed=ask.seed, steps=ask.kind.steps, sampler=ask.kind.sampler)
    except APIError as error:
        known = error.status in documented and error.status != httpx.codes.INTERNAL_SERVER_ERROR
        (tally.errors if known else tally.undocumented)[f"{error.status} {error.title}"] += 1
    except APITimeoutError:
        tally.lost += 1
    except APIConnectionError as error:
        tally.broken[type(error.__cause__ or error).__name__] += 1
    except InvalidResponseError as error:
        tally.undocumented[str(error)[:100]] += 1
    else:
        if head.classes == ask.classes and head.metadata["seed"] == str(ask.seed):
            tally.add_answer(time.perf_counter() - due)
            return True
        tally.undocumented["a head that nobody asked for"] += 1
    return False


class Callers:
    """A few callers that each send one request after the other, with a short rest, until stopped."""

    def __init__(
        self,
        url: str,
        mix: Mix,
        documented: frozenset[int],
        *,
        callers: int,
        max_retries: int,
        pause_s: float = PAUSE_S,
    ) -> None:
        self.tally = Tally()
        self._mix = mix
        self._documented = documented
        self._client = open_client(url, self.tally, max_retries)
        self._pause_s = pause_s
        self._stopping = asyncio.Event()
        self._tasks = [asyncio.create_task(self._call()) for _ in range(callers)]

    async def stop(self) -> Tally:
        """Let every caller finish the request that is under way."""
        self._stopping.set()
        await asyncio.gather(*self._tasks)
        await self._client.aclose()
        return self.tally

    async def _call(self) -> None:
        while not self._stopping.is_set():
            await send(self._client, self._mix.draw(), self.tally, self._documented, time.perf_counter())
            await asyncio.sleep(self._pause_s)
