"""The service under Ray Serve, for real: replicas come with load, one is killed, and all share one Redis."""

import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from tests.patience import PROCESS_S

ROOT = Path(__file__).resolve().parents[2]
REPEATS = 20


@pytest.mark.skipif(shutil.which("redis-server") is None, reason="redis-server is not installed")
def test_replicas_come_with_load_and_lose_no_request() -> None:
    settings = {name: value for name, value in os.environ.items() if not name.startswith("T2W_")}
    command = [sys.executable, "-m", "bench.ray_replicas", "--repeats", str(REPEATS)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, env=settings, start_new_session=True, **pipes) as process:  # type: ignore[call-overload]
        try:
            output, errors = process.communicate(timeout=PROCESS_S)
        finally:
            # With the processes that it started, if it did not come to its end.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, output + errors
    result = json.loads(output.splitlines()[-1])
    # That one replica became two, that the killed one was replaced and that one was left: it waits for each, or fails.
    assert result["lost"] == 0
    assert len(result["computed_by"]) == 2
    # Of heads that were asked for again, the replica that made one knows it, and the other has it from Redis.
    assert result["repeats"] == REPEATS
    assert result["found_in_memory"] + result["found_in_redis"] == REPEATS
    assert result["found_in_redis"] > 0
