"""Play faults on a worker under load and count what becomes of every request.

Each fault has workers (and a Redis, where it matters) of its own on this machine, and callers that use the real client
with its retries. Prints one JSON line per fault on standard output and, at the end, the table in Markdown on standard
error; the exit code is 0 when every fault that could be played is passed, else 1.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import httpx

from bench import fault_bodies, fault_network, fault_redis, fault_worker
from bench.fault_scene import FULL, QUICK, Row, Scene, Sizes
from bench.timing import significant
from bench.workload import known_names
from demo.service_process import ServiceError
from text2weight.checkpoint import bundled_checkpoint, read_config
from text2weight.errors import Text2WeightError
from text2weight_client import Text2WeightClientError

Fault = Callable[[Scene], Awaitable[Row]]
FAULTS: dict[str, Fault] = {
    "none": fault_worker.no_fault,
    "redis-killed": fault_redis.redis_killed,
    "redis-paused": fault_redis.redis_paused,
    "redis-restarted": fault_redis.redis_restarted,
    "redis-full": fault_redis.redis_full,
    "sigterm-behind-proxy": fault_worker.sigterm_behind_proxy,
    "sigkill-behind-proxy": fault_worker.sigkill_behind_proxy,
    "sigterm-and-restart": fault_worker.sigterm_and_restart,
    "sigkill-and-restart": fault_worker.sigkill_and_restart,
    "clock-jump": fault_worker.clock_jump,
    "slow-loris": fault_network.slow_loris,
    "idle-connections": fault_network.idle_connections,
    "half-closed": fault_network.half_closed,
    "vanishing-clients": fault_network.vanishing_clients,
    "json-bodies": fault_bodies.json_bodies,
    "uploads": fault_bodies.uploads,
}
OPEN_FILES = 4096  # both ends of a thousand connections, where the machine lets us
EXIT_FAILED = 1


def main(arguments: list[str] | None = None) -> int:
    """Play what the command line asks for; returns the exit code."""
    options = _parse(arguments)
    sizes = QUICK if options.quick else FULL
    if options.bodies is not None:
        sizes = dataclasses.replace(sizes, bodies=options.bodies)
    try:
        checkpoint = options.checkpoint or bundled_checkpoint()
        names = known_names(read_config(checkpoint))
    except Text2WeightError as error:
        print(f"faults: {error}", file=sys.stderr)
        return EXIT_FAILED
    _allow_open_files()
    rows = []
    for name in options.only or FAULTS:
        print(f"faults: {name} ...", file=sys.stderr, flush=True)
        rows.append(play(name, checkpoint, names, sizes))
        print(json.dumps(rows[-1].line()), flush=True)
    print(table(rows), file=sys.stderr)
    return EXIT_FAILED if any(row.complaints for row in rows) else 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog="Example: python -m bench.faults --only redis-killed --only slow-loris"
    )
    parser.add_argument("--only", action="append", metavar="NAME", choices=FAULTS, help=f"one of {', '.join(FAULTS)}")
    parser.add_argument("--bodies", type=int, metavar="N", help=f"spoilt JSON bodies (default: {FULL.bodies})")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that everything runs")
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="instead of the bundled model")
    options = parser.parse_args(arguments)
    if options.bodies is not None and options.bodies < 1:
        parser.error(f"--bodies is {options.bodies}: it must be 1 or more")
    return options


def play(name: str, checkpoint: Path, names: tuple[str, ...], sizes: Sizes) -> Row:
    """Play one fault; one that cannot be played to its end is a row with a complaint."""
    if name.startswith("redis-") and shutil.which("redis-server") is None:
        return Row(name, skipped="redis-server is not installed")
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, Scene(checkpoint, names, Path(folder), sizes) as scene:
        try:
            row = asyncio.run(FAULTS[name](scene))
        except (ServiceError, Text2WeightClientError, httpx.HTTPError, OSError) as error:
            row = Row(complaints=[f"{type(error).__name__}: {error}"])
    row.fault = name
    if not row.skipped:
        row.judge()
        row.facts["seconds"] = significant(time.perf_counter() - started, 3)
    return row


def table(rows: list[Row]) -> str:
    """The rows in Markdown."""
    lines = [
        "| fault | sent | answered | documented errors | broken connections | lost | sent again | worst, s | alive | |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row.skipped:
            lines.append(f"| {row.fault} | | | | | | | | | not played: {row.skipped} |")
            continue
        tally = row.tally
        cells = [row.fault, tally.sent, tally.answered, sum(tally.errors.values()), sum(tally.broken.values())]
        cells += [tally.lost, max(0, tally.attempts - tally.sent), tally.worst_s, "yes" if row.alive else "**no**"]
        remark = "; ".join(row.complaints) or "passed"
        lines.append(f"| {' | '.join(str(cell) for cell in cells)} | {remark} |")
    return "\n".join(lines)


def _allow_open_files() -> None:
    """Raise the limit of open files, which the workers inherit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


if __name__ == "__main__":
    sys.exit(main())
