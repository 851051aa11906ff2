"""`t2w serve` as a real process, for as long as a `with` block lasts."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from text2weight_client import APITimeoutError, Client

START_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 10.0
SHOWN_LOG_LINES = 30


class ServiceError(Exception):
    """The service did not come up; the message ends with its log."""


@dataclass(frozen=True)
class ServiceProcess:
    """A service that was started; not necessarily ready yet."""

    url: str
    process: subprocess.Popen[bytes]
    log_path: Path

    def wait_until_ready(self, client: Client) -> None:
        """Return when the service takes requests.

        Raises:
            ServiceError: its process ended, or it took too long.
        """
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                client.wait_until_ready(timeout_s=0.5)
                return
            except APITimeoutError as error:
                if self.process.poll() is not None:
                    raise ServiceError(
                        f"`t2w serve` ended with code {self.process.returncode} before it was ready{self._log()}"
                    ) from error
                if time.monotonic() > deadline:
                    raise ServiceError(f"`t2w serve` was not ready after {START_TIMEOUT_S:g} s{self._log()}") from error

    def _log(self) -> str:
        lines = self.log_path.read_text(errors="replace").splitlines()[-SHOWN_LOG_LINES:]
        return f"; the end of {self.log_path}:\n" + "\n".join(f"  {line}" for line in lines)


@contextmanager
def running_service(
    checkpoint: Path | None, log_path: Path, *, port: int | None = None, variables: Mapping[str, str] | None = None
) -> Iterator[ServiceProcess]:
    """Start the service on this machine; it is stopped in any case when the block is left.

    Args:
        checkpoint: its folder; None for the bundled one.
        log_path: receives all that the service prints.
        port: where it listens; None for a free one.
        variables: its settings and whatever else its environment should have.
    """
    port = free_port() if port is None else port
    command = [sys.executable, "-m", "text2weight_client.cli", "serve"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    command += ["--checkpoint", str(checkpoint)] if checkpoint else []
    # The defaults and what the caller set, whatever settings this shell has.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("T2W_")} | dict(
        variables or {}
    )
    with log_path.open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
    try:
        yield ServiceProcess(f"http://127.0.0.1:{port}", process, log_path)
    finally:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def free_port() -> int:
    """A port of this machine that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
