"""Run the benchmarks and print one JSON line for each; `make bench` runs all of them.

Every ratio compares two things measured in turns in the same run, so that a busy or slow machine
touches both. Nothing here asserts; `load_before` in each line tells whether the machine was idle.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
from pathlib import Path

# Name of each benchmark's file, and whether it needs a checkpoint.
BENCHMARKS = {
    "latency": True,
    "throughput": True,
    "mixed_load": True,
    "http_overhead": True,
    "sampler_cost": True,
    "traced_call": True,
    "device_rate": True,
    "zoo_rate": False,
}
EXIT_FAILED = 1


def main(arguments: list[str] | None = None) -> int:
    """Run what the command line asks for; returns the exit code."""
    options = _parse(arguments)
    from demo.service_process import ServiceError
    from text2weight.errors import Text2WeightError
    from text2weight_client import Text2WeightClientError

    try:
        checkpoint = _checkpoint(options)
        for name in options.names or BENCHMARKS:
            print(f"bench: {name} ...", file=sys.stderr, flush=True)
            print(json.dumps(_measure(name, checkpoint, options.quick)), flush=True)
    except (ServiceError, Text2WeightError, Text2WeightClientError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return EXIT_FAILED
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, epilog="Example: bench/run.py latency throughput --quick")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: all of {', '.join(BENCHMARKS)}")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that everything runs")
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="instead of the bundled model")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.names if name not in BENCHMARKS]
    if unknown:
        parser.error(f"no benchmark {', '.join(unknown)}: choose among {', '.join(BENCHMARKS)}")
    return options


def _checkpoint(options: argparse.Namespace) -> Path | None:
    """The folder to measure, found before anything is run; None where no benchmark asked for needs one."""
    from text2weight.checkpoint import bundled_checkpoint
    from text2weight.errors import CheckpointError

    if not any(BENCHMARKS[name] for name in options.names or BENCHMARKS):
        return None
    if options.checkpoint is not None:
        return Path(options.checkpoint)
    try:
        return bundled_checkpoint()
    except CheckpointError as error:
        without = ", ".join(name for name, needs_model in BENCHMARKS.items() if not needs_model)
        raise CheckpointError(f"{error} with --checkpoint DIR, or run only {without}, which needs none") from error


def _measure(name: str, checkpoint: Path | None, quick: bool) -> dict[str, object]:
    """One benchmark's result with the machine it was measured on."""
    import torch

    benchmark = importlib.import_module(f"bench.{name}")
    sizes = benchmark.QUICK if quick else benchmark.FULL
    load_before = os.getloadavg()[0]
    started = time.perf_counter()
    result = benchmark.run(checkpoint, sizes) if BENCHMARKS[name] else benchmark.run(sizes)
    return {
        "benchmark": name,
        "quick": quick,
        **result,
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "load_before": round(load_before, 2),
        "seconds": round(time.perf_counter() - started, 1),
    }


if __name__ == "__main__":
    # Python puts this file's folder on the path; the packages `bench` and `demo` are found in the one above.
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    sys.exit(main())
