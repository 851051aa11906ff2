"""Two replicas on this machine behind one address; one is killed while clients ask.

Prints JSON: how long the replicas took to be ready, requests sent and answered by each, how many a client had to
send again, and how many were lost. No request may be lost. Run it with: python -m bench.ray_replicas
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil
import ray
from ray import serve

from text2weight_client import APIConnectionError, Client, ServerError
from text2weight_service.ray_app import Scale, build

ATTEMPTS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--names", nargs="+", default=["apple", "bus", "lizard"])
    options = parser.parse_args()
    os.environ.setdefault("T2W_TORCH_THREADS", "1")
    os.environ["T2W_ALLOW_ANONYMOUS"] = "true"  # on loopback, see below
    ray.init(
        num_cpus=4,
        object_store_memory=100_000_000,
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
    )
    try:
        print(json.dumps(measure(options)), flush=True)
    finally:
        serve.shutdown()
        ray.shutdown()


def measure(options: argparse.Namespace) -> dict[str, object]:
    port = free_port()
    started = time.monotonic()
    serve.start(http_options={"host": "127.0.0.1", "port": port, "location": "HeadOnly"})
    serve.run(build(Scale(min_replicas=2, max_replicas=2)))
    ready_s = time.monotonic() - started
    url = f"http://127.0.0.1:{port}"
    victims = replica_processes()
    assert len(victims) == 2, victims
    half = options.requests // 2
    failures: list[str] = []
    with ThreadPoolExecutor(options.clients) as pool:
        done = [pool.submit(ask, url, seed, options.names, failures) for seed in range(half)]
        lost = sum(not future.result() for future in done)
        answered = heads_by_replica(url)
        done = [pool.submit(ask, url, seed, options.names, failures) for seed in range(half, 2 * half)]
        while not any(future.done() for future in done):
            time.sleep(0.001)
        os.kill(victims[0].pid, signal.SIGKILL)
        lost += sum(not future.result() for future in done)
    return {
        "ready_s": round(ready_s, 1),
        "requests": 2 * half,
        "answered_by": sorted(answered.values()),
        "sent_again": len(failures),
        "failures": sorted(set(failures)),
        "lost": lost,
        "seconds": round(time.monotonic() - started, 1),
    }


def ask(url: str, seed: int, names: list[str], failures: list[str]) -> bool:
    """Ask as a careful client does: what fails on the server's side is asked again."""
    with Client(url) as client:
        for attempt in range(ATTEMPTS):
            try:
                return len(client.generate(names, seed=seed).classes) == len(names)
            except (ServerError, APIConnectionError) as error:
                failures.append(str(error))
                time.sleep(0.1 * 2**attempt)
    return False


def heads_by_replica(url: str) -> dict[str, float]:
    """Heads generated, by the time at which the replica's process started."""
    found: dict[str, float] = {}
    end = time.monotonic() + 10
    while len(found) < 2 and time.monotonic() < end:
        text = httpx.get(f"{url}/metrics").text
        started, heads = (
            re.search(rf"^{name} (\S+)$", text, re.MULTILINE)
            for name in ("process_start_time_seconds", "t2w_heads_generated_total")
        )
        assert started is not None
        assert heads is not None
        found[started[1]] = float(heads[1])
    return found


def replica_processes() -> list[psutil.Process]:
    return [
        process
        for process in psutil.Process().children(recursive=True)
        if any("ServeReplica" in part for part in process.cmdline())
    ]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    main()
