"""Log lines are JSON with the request id, and tracebacks keep secrets to themselves."""

import json
import subprocess
import sys

CODE = """
import logging, structlog
from text2weight_service.logs import configure_logging

configure_logging("info")
log = structlog.get_logger("service")

def fail():
    password = "hunter2"
    raise RuntimeError("no luck")

with structlog.contextvars.bound_contextvars(request_id="r-1"):
    log.debug("hidden")
    try:
        fail()
    except RuntimeError as error:
        log.error("failed", exc_info=error)
    logging.getLogger("library").warning("from a library: %s", 3)
"""


def test_lines() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=60, check=True)
    failed, library = (json.loads(line) for line in done.stderr.splitlines())
    assert (failed["event"], failed["level"], failed["request_id"]) == ("failed", "error", "r-1")
    assert failed["exception"][0]["exc_value"] == "no luck"
    assert (library["event"], library["logger"]) == ("from a library: 3", "library")
    assert "hunter2" not in done.stderr
