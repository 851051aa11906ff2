"""The service under Ray Serve on this machine: one replica, more under load, one of them killed, fewer when it is over.

All replicas share one Redis. Prints JSON: when each replica took requests, what became of the requests, where heads
that were asked for once more were found (all should be, in the memory of the replica that was asked or in Redis), and
how long after the load the surplus replicas were gone. Run it with: python -m bench.ray_replicas
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil
import ray
from prometheus_client.parser import text_string_to_metric_families
from ray import serve
from rich.console import Console

from bench.fault_scene import RedisProcess
from demo.service_process import free_port
from text2weight_client import Client, Text2WeightClientError
from text2weight_service.ray_app import Scale, build

# A metric's name and the values of its labels.
Series = tuple[str, ...]
HEADS: Series = ("t2w_heads_generated_total",)
STARTED: Series = ("process_start_time_seconds",)
IN_MEMORY: Series = ("t2w_head_cache_lookups_total", "hit", "memory")
IN_REDIS: Series = ("t2w_head_cache_lookups_total", "hit", "redis")

NICENESS = "RAY_worker_niceness"
POLL_S = 0.2
# Ray hears of the load every 10 s and averages it over 30 s; a replica that it adds has a model to load.
PHASE_S = 150.0
METRICS_S = 30.0
# Each replica takes few requests at once, so that a few callers are a load that asks for more replicas.
BATCH = 4
STEPS = 20
MAX_RETRIES = 8
# What is to be seen is that no request is lost and that heads are shared, however slow the machine.
SETTINGS = {
    "T2W_ALLOW_ANONYMOUS": "true",  # on loopback
    "T2W_MAX_BATCH_SIZE": str(BATCH),
    "T2W_TORCH_THREADS": "1",
    "T2W_REQUEST_TIMEOUT_S": f"{PHASE_S:g}",
    "T2W_REDIS_TIMEOUT_S": f"{PHASE_S:g}",
    # Else Ray's workers stand back behind everything else on the machine, and take minutes to start on a busy one.
    NICENESS: "0",
}


@dataclass
class Load:
    """Callers that ask for one head after the other until they are stopped.

    Attributes:
        answered: seeds whose head came.
        lost: errors that clients were left with after their retries.
    """

    url: str
    names: list[str]
    answered: list[int] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    _stopped: threading.Event = field(default_factory=threading.Event)

    @contextmanager
    def running(self, callers: int) -> Iterator[None]:
        """As many callers as asked for, each with seeds of its own, for as long as the block lasts."""
        with ThreadPoolExecutor(callers) as pool:
            asking = [pool.submit(self._ask_on, range(first, sys.maxsize, callers)) for first in range(callers)]
            try:
                yield
            finally:
                self._stopped.set()
            for caller in asking:
                caller.result()

    def _ask_on(self, seeds: range) -> None:
        for seed in seeds:
            if self._stopped.is_set():
                return
            self.ask(seed)

    def ask(self, seed: int) -> None:
        # A client for each request: over a kept connection all would reach one replica.
        with Client(self.url, max_retries=MAX_RETRIES, timeout_s=PHASE_S) as client:
            try:
                client.generate(self.names, seed=seed, sampler="ddim", steps=STEPS)
                self.answered.append(seed)
            except Text2WeightClientError as error:
                self.lost.append(str(error))


class RetryCounter(logging.Handler):
    """Counts the attempts that clients made again."""

    count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.count += "failed, the next is in" in record.getMessage()


def main() -> int:
    """Measure and print; returns the exit code, 1 where a request was lost."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--replicas", type=int, default=2, help="most replicas (default: %(default)s)")
    parser.add_argument("--callers", type=int, default=16, help="callers at once (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=50, help="heads asked for once more (default: %(default)s)")
    parser.add_argument("--names", nargs="+", default=["apple", "bus", "lizard"])
    options = parser.parse_args()
    os.environ |= SETTINGS
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        redis = RedisProcess(Path(folder))
        stack.callback(redis.kill)
        redis.start()
        os.environ["T2W_REDIS_URL"] = redis.url
        stack.callback(ray.shutdown)
        ray.init(
            num_cpus=2 * options.replicas,
            object_store_memory=100_000_000,
            include_dashboard=False,
            log_to_driver=False,
            configure_logging=False,
        )
        stack.callback(serve.shutdown)
        result = measure(options)
    print(json.dumps(result), flush=True)
    return 1 if result["lost"] else 0


def measure(options: argparse.Namespace) -> dict[str, object]:
    """Every phase in turn, on a cluster that runs."""
    port, most = free_port(), options.replicas
    retries = RetryCounter()
    logging.getLogger("text2weight_client").addHandler(retries)
    started = time.monotonic()
    serve.start(http_options={"host": "127.0.0.1", "port": port, "location": "HeadOnly"})
    serve.run(build(Scale(max_replicas=most, upscale_delay_s=0, downscale_delay_s=0)))
    first_s = time.monotonic() - started
    load = Load(f"http://127.0.0.1:{port}", options.names)
    with Console(stderr=True).status("one replica under load") as status, load.running(options.callers):
        grown_s = wait_until(lambda: all_compute(load.url, most))
        status.update("a replica is killed")
        victim = replica_processes()[0]
        victim.kill()
        replaced_s = wait_until(lambda: not victim.is_running() and all_compute(load.url, most))
        # While the load goes on, so that no replica is ended; its own heads are all new.
        repeats = load.answered[-options.repeats :]
        before = replica_metrics(load.url, most)
        for seed in repeats:
            load.ask(seed)
        after = replica_metrics(load.url, most)
    shrunk_s = wait_until(lambda: len(replica_processes()) == 1)
    return {
        "replicas": most,
        "first_ready_s": round(first_s, 1),
        "all_compute_s": round(grown_s, 1),
        "killed_is_replaced_s": round(replaced_s, 1),
        "one_is_left_s": round(shrunk_s, 1),
        "requests": len(load.answered) + len(load.lost),
        "sent_again": retries.count,
        "lost": len(load.lost),
        "failures": sorted(set(load.lost)),
        "computed_by": sorted(int(metrics[HEADS]) for metrics in after.values()),
        "repeats": len(repeats),
        "found_in_memory": total(after, IN_MEMORY) - total(before, IN_MEMORY),
        "found_in_redis": total(after, IN_REDIS) - total(before, IN_REDIS),
        "seconds": round(time.monotonic() - started, 1),
    }


def wait_until(holds: Callable[[], bool]) -> float:
    """Seconds until a condition holds.

    Raises:
        TimeoutError: it does not for a long time.
    """
    began = time.monotonic()
    while not holds():
        if time.monotonic() > began + PHASE_S:
            raise TimeoutError(f"Ray has {len(replica_processes())} replicas after {PHASE_S:g} s")
        time.sleep(POLL_S)
    return time.monotonic() - began


def all_compute(url: str, count: int) -> bool:
    """Whether there are so many replicas, and all have computed heads."""
    if len(replica_processes()) != count:
        return False
    try:
        return all(metrics[HEADS] for metrics in replica_metrics(url, count).values())
    except TimeoutError:
        return False


def replica_metrics(url: str, count: int) -> dict[float, dict[Series, float]]:
    """Metrics of so many replicas, by the time at which their processes started.

    Raises:
        TimeoutError: fewer answer.
    """
    found: dict[float, dict[Series, float]] = {}
    end = time.monotonic() + METRICS_S
    while len(found) < count:
        if time.monotonic() > end:
            raise TimeoutError(f"{len(found)} of {count} replicas answer")
        # Each time over a new connection, which any of them may answer.
        with suppress(httpx.HTTPError):
            response = httpx.get(f"{url}/metrics", timeout=METRICS_S).raise_for_status()
            samples = [each for family in text_string_to_metric_families(response.text) for each in family.samples]
            metrics = {(each.name, *sorted(each.labels.values())): each.value for each in samples}
            found[metrics[STARTED]] = metrics
        time.sleep(POLL_S)
    return found


def total(found: dict[float, dict[Series, float]], series: Series) -> int:
    """Sum over the replicas."""
    return int(sum(metrics.get(series, 0) for metrics in found.values()))


def replica_processes() -> list[psutil.Process]:
    """The replicas' processes, also those that do not answer yet."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if any("ServeReplica" in part for part in process.cmdline()):
                found.append(process)
    return found


if __name__ == "__main__":
    sys.exit(main())
