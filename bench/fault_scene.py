"""What a fault is played on: workers, a Redis of their own, callers with retries, and the row that comes out."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractContextManager, ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil
import redis
from prometheus_client.parser import text_string_to_metric_families

from bench.traffic import CLIENT_TIMEOUT_S, KINDS, Callers, Mix, Tally, documented_statuses
from demo.service_process import ServiceError, ServiceProcess, free_port, running_service
from text2weight_client import Client, Text2WeightClientError
from text2weight_client.client import DEFAULT_MAX_RETRIES

CALLERS = 6
# Enough for the restart of a lone worker; the client's default bridges about two seconds.
PATIENT_RETRIES = 60
REDIS_START_S = 10.0
# The service's own limit must come before the client's, so that a forgotten request can be told from a slow one.
REQUEST_TIMEOUT_S = 15.0
SHORT_KINDS = KINDS[:2]  # the longest requests would make a fault last minutes on a small machine


@dataclass(frozen=True)
class Sizes:
    """How long the load goes on before, during and after a fault, and how much of each attack is sent."""

    phase_s: float
    bodies: int
    slow_connections: int
    idle_connections: int
    vanishing_clients: int


FULL = Sizes(phase_s=3.0, bodies=10_000, slow_connections=200, idle_connections=1000, vanishing_clients=200)
QUICK = Sizes(phase_s=0.3, bodies=60, slow_connections=5, idle_connections=10, vanishing_clients=5)


@dataclass
class Row:
    """What became of the requests under one fault.

    Attributes:
        fault: its name.
        tally: the requests that count.
        alive: whether a worker answered a request at the end.
        facts: what shows that the fault was there, and what else was seen.
        complaints: what must not be; none means passed.
        skipped: why the fault could not be played here; empty if it was.
    """

    fault: str = ""
    tally: Tally = field(default_factory=Tally)
    alive: bool = False
    facts: dict[str, object] = field(default_factory=dict)
    complaints: list[str] = field(default_factory=list)
    skipped: str = ""

    def expect(self, condition: bool, complaint: str) -> None:
        """Note a complaint unless the condition holds."""
        if not condition:
            self.complaints.append(complaint)

    def judge(self) -> None:
        """Add the complaints that hold for every fault."""
        self.expect(self.alive, "no worker answers at the end")
        self.expect(not self.tally.lost, f"{self.tally.lost} requests lost")
        self.expect(not self.tally.undocumented, f"undocumented: {dict(self.tally.undocumented)}")

    def line(self) -> dict[str, object]:
        """The row for programs."""
        if self.skipped:
            return {"fault": self.fault, "skipped": self.skipped}
        rest = {"alive": self.alive, "facts": self.facts, "complaints": self.complaints}
        return {"fault": self.fault, **self.tally.summary(), **rest, "passed": not self.complaints}


class RedisProcess:
    """A redis-server of our own that can be killed, paused and started again on its port."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._command = ["redis-server", "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", *options]
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until it answers.

        Raises:
            ServiceError: it does not.
        """
        self._process = subprocess.Popen(self._command, cwd=self._folder, stdout=subprocess.DEVNULL)
        with self.connected() as client:
            for _ in range(round(REDIS_START_S / 0.05)):
                with suppress(redis.ConnectionError):
                    if client.ping():
                        return
                time.sleep(0.05)
        raise ServiceError(f"redis-server did not answer on port {self.port} within {REDIS_START_S:g} s")

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal to a running Redis."""
        assert self._process is not None, "Redis is not running"
        self._process.send_signal(number)

    def kill(self) -> None:
        """End it at once; nothing happens if it is not running."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    @contextmanager
    def connected(self) -> Iterator[redis.Redis]:
        """A connection of our own."""
        with redis.Redis(port=self.port) as client:
            yield client


class Scene:
    """Starts what a fault needs; everything is ended when the `with` block is left."""

    def __init__(self, checkpoint: Path, names: tuple[str, ...], folder: Path, sizes: Sizes) -> None:
        self.sizes = sizes
        self.folder = folder
        self.names = names
        self._checkpoint = checkpoint
        self._stack = ExitStack()
        self._logs = 0

    def __enter__(self) -> Scene:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def redis(self, *options: str) -> RedisProcess:
        """A running Redis."""
        server = RedisProcess(self.folder, *options)
        self._stack.callback(server.kill)
        server.start()
        return server

    def serving(self, *, port: int | None = None, **variables: str) -> AbstractContextManager[ServiceProcess]:
        """A worker for as long as a `with` block lasts; not necessarily ready yet."""
        self._logs += 1
        log_path = self.folder / f"worker-{self._logs}.log"
        settings = {"T2W_REQUEST_TIMEOUT_S": f"{REQUEST_TIMEOUT_S:g}", **variables}
        return running_service(self._checkpoint, log_path, port=port, variables=settings)

    def worker(self, **variables: str) -> ServiceProcess:
        """A worker that takes requests."""
        service = self._stack.enter_context(self.serving(**variables))
        with Client(service.url) as client:
            service.wait_until_ready(client)
        return service

    def mix(self, seed: int = 0) -> Mix:
        """Requests with one and with 20 steps."""
        return Mix(self.names, seed, SHORT_KINDS)

    @asynccontextmanager
    async def load(self, url: str, row: Row, max_retries: int = DEFAULT_MAX_RETRIES) -> AsyncIterator[Tally]:
        """Callers at `url` for as long as the block lasts, and a while before and after it; they count in `row`."""
        # In a thread, since a proxy to the worker may run on this event loop.
        documented = await asyncio.to_thread(documented_statuses, url)
        callers = Callers(url, self.mix(), documented, callers=CALLERS, max_retries=max_retries)
        row.tally = callers.tally
        try:
            await self.rest()
            yield callers.tally
            await self.rest()
        finally:
            await callers.stop()

    async def rest(self, phases: float = 1.0) -> None:
        """Let the load go on for a phase."""
        await asyncio.sleep(phases * self.sizes.phase_s)


def answers(url: str, names: tuple[str, ...]) -> bool:
    """Whether a worker is ready there and makes a head."""
    with Client(url, timeout_s=CLIENT_TIMEOUT_S, max_retries=PATIENT_RETRIES) as client:
        try:
            client.wait_until_ready(timeout_s=CLIENT_TIMEOUT_S)
            return client.generate(names[:2], seed=0).classes == names[:2]
        except Text2WeightClientError:
            return False


def metric(url: str, name: str, **labels: str) -> float | None:
    """Sum of all series of a metric of the worker that have these labels; None where there are none."""
    page = httpx.get(f"{url}/metrics", timeout=CLIENT_TIMEOUT_S).text
    samples = (sample for family in text_string_to_metric_families(page) for sample in family.samples)
    values = [sample.value for sample in samples if sample.name == name and labels.items() <= sample.labels.items()]
    return sum(values) if values else None


def open_files(service: ServiceProcess) -> int:
    """File descriptors of a worker."""
    return int(psutil.Process(service.process.pid).num_fds())


def files_settle(service: ServiceProcess, before: int, spare: int = 20) -> int:
    """Descriptors of a worker once they are back near `before`, or after a while that must be enough."""
    end = time.monotonic() + CLIENT_TIMEOUT_S
    while (now := open_files(service)) > before + spare and time.monotonic() < end:
        time.sleep(0.1)
    return now
