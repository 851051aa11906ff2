"""`t2w serve` as a process: start, flags, signals, and clear words for what cannot work."""

import os
import re
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from tests.patience import PATIENCE_S, PROCESS_S
from tests.service.live import wait_for
from tests.service.tiny import write_tiny_checkpoint
from text2weight.artifact import read_head
from text2weight_service.cli import serve_app

COMMAND = [sys.executable, "-c", "from text2weight_service.cli import serve_app; serve_app()"]


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_serve_and_drain(tmp_path: Path, port: int) -> None:
    """The flags win over the variables; SIGTERM ends the process in good order."""
    checkpoint = write_tiny_checkpoint(tmp_path / "model")
    variables = {
        "T2W_HTTP_PORT": "1",
        "T2W_CHECKPOINT": "/nowhere",
        "T2W_MAX_BATCH_SIZE": "1",
        "T2W_REQUEST_TIMEOUT_S": "500",
        "T2W_DRAIN_TIMEOUT_S": "500",
    }
    log = tmp_path / "log"
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            [*COMMAND, "--checkpoint", str(checkpoint), "--port", str(port)],
            stderr=stderr,
            env={**os.environ, **variables},
        )
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE_S) as client:
                wait_for(lambda: process.poll() is not None or _is_ready(client), "start", PROCESS_S)
                response = client.post("/generate", json={"classes": ["thing 1", "thing 2"]})
                assert read_head(response.content).classes == ("thing 1", "thing 2")
                assert client.get("/info").json()["settings"]["max_batch_size"] == 1
                slow = {"classes": ["thing 1", "thing 2"], "sampler": "ddpm", "steps": 100}
                with ThreadPoolExecutor(3) as pool:
                    accepted = [pool.submit(client.post, "/generate", json=slow, timeout=PROCESS_S) for _ in range(3)]
                    wait_for(lambda: _all_run(client) or all(future.done() for future in accepted), "load")
                    process.send_signal(signal.SIGTERM)
                    assert [future.result().status_code for future in accepted] == [200, 200, 200]
            assert process.wait(PATIENCE_S) == 0
        finally:
            process.kill()
            process.wait()
    text = log.read_text()
    assert '"event": "settings"' in text
    assert '"route": "/generate"' in text
    assert "Traceback" not in text
    # Nothing but log lines: no library complains at the process's end.
    assert [line for line in text.splitlines() if not line.startswith("{")] == []


def _all_run(client: httpx.Client) -> bool:
    return "\nt2w_running 3.0\n" in client.get("/metrics").text


def _is_ready(client: httpx.Client) -> bool:
    try:
        return client.get("/health/ready").status_code == 200
    except httpx.TransportError:
        return False


def test_checkpoint_that_cannot_be_loaded(tmp_path: Path) -> None:
    result = subprocess.run(
        [*COMMAND, "--checkpoint", str(tmp_path), "--port", "0"], capture_output=True, text=True, timeout=PROCESS_S
    )
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith(f"t2w serve: cannot use checkpoint {tmp_path}: ")


def test_port_that_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        result = CliRunner().invoke(serve_app, ["--port", port])
    assert result.exit_code == 2
    assert f"t2w serve: cannot listen on 127.0.0.1:{port}" in result.output


def test_wrong_variable() -> None:
    result = CliRunner().invoke(serve_app, [], env={"T2W_HTTP_PORT": "http", "T2W_QUEUE_SIZE": "0"})
    assert result.exit_code == 2
    assert "T2W_HTTP_PORT" in result.output
    assert "T2W_QUEUE_SIZE" in result.output


def test_wrong_flag() -> None:
    result = CliRunner().invoke(serve_app, ["--port", "70000"])
    assert result.exit_code == 2
    assert "T2W_HTTP_PORT" in result.output


def test_help_has_an_example() -> None:
    result = CliRunner().invoke(serve_app, ["--help"], env={"COLUMNS": "120", "NO_COLOR": "1"})
    assert result.exit_code == 0
    for part in ("--checkpoint", "--host", "--port", "Example:"):
        assert part in re.sub(r"\x1b\[[0-9;]*m", "", result.output)


def test_help_imports_nothing_heavy() -> None:
    code = "import sys, text2weight_service.cli; print([m for m in ('torch', 'fastapi', 'redis') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PROCESS_S, check=True)
    assert done.stdout.strip() == "[]"
