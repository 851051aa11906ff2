"""The two scans of `make audit` find what they look for."""

import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from tests.patience import PROCESS_S

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A small repository with this one's scan and baseline."""
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci/secrets", tmp_path / ".ci")
    shutil.copy(ROOT / ".secrets.baseline", tmp_path)
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    (tmp_path / "harmless.py").write_text("x = 1\n")
    return tmp_path


def scan(checkout: Path) -> subprocess.CompletedProcess[str]:
    command = [str(checkout / ".ci/secrets"), str(BIN)]
    return subprocess.run(command, capture_output=True, text=True, timeout=PROCESS_S, check=False)


def test_a_secret_is_found(checkout: Path) -> None:
    assert scan(checkout).returncode == 0
    # Put together from halves, so that the scan of this repository does not find it here.
    (checkout / "settings.py").write_text('key = "' + "AKIA" + 'IOSFODNN7ABCDEFG"\n')
    result = scan(checkout)
    assert result.returncode == 1
    assert "settings.py:1" in result.stderr


def test_known_false_alarms_may_move(checkout: Path) -> None:
    """More lines before a false alarm are no finding, and the baseline stays as it is."""
    before = (checkout / ".secrets.baseline").read_bytes()
    known = json.loads(before)["results"]
    name = next(iter(known))
    (checkout / name).parent.mkdir(parents=True)
    (checkout / name).write_text("# one more line\n" + (ROOT / name).read_text(encoding="utf-8"), encoding="utf-8")
    assert scan(checkout).returncode == 0
    assert (checkout / ".secrets.baseline").read_bytes() == before


@contextmanager
def vulnerability_service(vulnerabilities: list[dict[str, object]]) -> Iterator[str]:
    """An answer to every question, in the form of osv.dev."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(405)

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            body = json.dumps({"vulns": vulnerabilities} if vulnerabilities else {}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1/query"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


VULNERABILITY = {
    "id": "GHSA-test-test-test",
    "published": "2024-01-01T00:00:00Z",
    "summary": "Everything is broken",
    "affected": [
        {
            "package": {"ecosystem": "PyPI", "name": "limits"},
            "ranges": [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "99.0"}]}],
            "versions": ["1.0"],
        }
    ],
}


def audit(url: str, folder: Path) -> subprocess.CompletedProcess[str]:
    (folder / "pins.txt").write_text("limits==1.0\n")
    command = [str(ROOT / ".ci/audit"), str(BIN), str(folder / "pins.txt")]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=PROCESS_S,
        check=False,
        env={"PATH": "/usr/bin:/bin", "OSV_URL": url},
    )


def test_a_vulnerability_fails(tmp_path: Path) -> None:
    with vulnerability_service([VULNERABILITY]) as url:
        result = audit(url, tmp_path)
    assert result.returncode == 1
    assert "GHSA-test-test-test" in result.stdout


def test_no_vulnerability_passes(tmp_path: Path) -> None:
    with vulnerability_service([]) as url:
        result = audit(url, tmp_path)
    assert result.returncode == 0, result.stderr
    assert "skipped" not in result.stdout


def test_no_network_is_said(tmp_path: Path) -> None:
    result = audit("http://127.0.0.1:1/v1/query", tmp_path)
    assert result.returncode == 0
    assert "audit skipped" in result.stdout
    assert "NOT looked up" in result.stdout
