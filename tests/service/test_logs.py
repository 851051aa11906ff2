"""Log lines are JSON with the request id, and tracebacks keep secrets to themselves."""

import json
import os
import pty
import re
import subprocess
import sys

from tests.patience import PROCESS_S

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
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=PROCESS_S, check=True)
    failed, library = (json.loads(line) for line in done.stderr.splitlines())
    assert (failed["event"], failed["level"], failed["request_id"]) == ("failed", "error", "r-1")
    assert failed["exception"][0]["exc_value"] == "no luck"
    assert (library["event"], library["logger"]) == ("from a library: 3", "library")
    assert "hunter2" not in done.stderr


TERMINAL = """
import logging, structlog
from text2weight_service.logs import configure_logging

configure_logging("info")
structlog.get_logger("service").info("model ready", load_s=1.5)
logging.getLogger("uvicorn.error").warning("Invalid HTTP request received.")
"""


def test_lines_on_a_terminal_are_for_people() -> None:
    ours, theirs = pty.openpty()
    subprocess.run([sys.executable, "-c", TERMINAL], stderr=theirs, stdout=theirs, timeout=PROCESS_S, check=True)
    os.close(theirs)
    shown = re.sub(r"\x1b\[[0-9;]*m", "", os.read(ours, 65536).decode())
    os.close(ours)
    first, second = shown.splitlines()
    assert re.search(r"\[info +\] model ready +\[service\] +load_s=1\.5", first), first
    assert re.search(r"\[warning +\] Invalid HTTP request received\. +\[uvicorn\.error\]", second), second


def test_warnings_of_libraries_are_log_lines() -> None:
    code = CODE.split("log =")[0] + "import warnings; warnings.warn('old', FutureWarning)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PROCESS_S, check=True)
    (line,) = (json.loads(text) for text in done.stderr.splitlines())
    assert line["logger"] == "py.warnings"
    assert "FutureWarning: old" in line["event"]
