"""The service under Ray Serve, for real: replicas come with load, one is killed, and all share one Redis."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.patience import PROCESS_S

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(importlib.util.find_spec("ray.serve") is None, reason="Ray Serve is not installed (extra: ray)")
@pytest.mark.skipif(shutil.which("redis-server") is None, reason="redis-server is not installed")
def test_replicas_come_with_load_and_lose_no_request() -> None:
    settings = {name: value for name, value in os.environ.items() if not name.startswith("T2W_")}
    command = [sys.executable, "-m", "bench.ray_replicas", "--repeats", "20"]
    done = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True, timeout=PROCESS_S)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    # That there were two replicas, again two after the kill, and one in the end: it waits for each, or fails.
    assert result["lost"] == 0
    assert result["requests"] > 20
    assert all(heads > 0 for heads in result["computed_by"])
    # Each of these heads is known to the replica that made it, and to the other by Redis.
    assert result["computed_anew"] == 0
    assert result["found_in_memory"] + result["found_in_redis"] == result["repeats"] == 20
    assert result["found_in_redis"] > 0
