"""What clients send can neither forge log lines nor add metrics, and answers are safe to show in a browser."""

import io
import json
import re
import socket
import sys

import httpx
import pytest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tests.patience import PATIENCE_S
from tests.service.fakes import FakeModel
from tests.service.live import Live, serve
from tests.service.test_auth import ALICE_ENTRY, BOB
from text2weight_service.logs import configure_logging
from text2weight_service.middleware import SafeHeadersMiddleware

FORGED = '{"event": "forged"}'
# Line ends of every kind, terminal escapes, and what might end a JSON string.
EVIL = [f"x\n{FORGED}", f"x\r{FORGED}", f"x\u2028{FORGED}", f"x\x85{FORGED}", "x\x1b[2J\x1b[31m", '", "event": "forged']


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What a service writes to stderr, with logging set up as in `t2w serve`."""
    written = io.StringIO()
    monkeypatch.setattr(sys, "stderr", written)
    configure_logging("debug")
    return written


def raw(port: int, request: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as connection:
        connection.sendall(request)
        answer = b""
        while data := connection.recv(65536):
            answer += data
        return answer


def evil_requests(text: str) -> list[bytes]:
    """A text in every part of a request that is not under the client library's control."""
    encoded = text.encode().replace(b"\n", b"%0A").replace(b"\r", b"%0D").replace(b" ", b"%20")
    line = text.encode().replace(b"\n", b" ").replace(b"\r", b" ")
    body = json.dumps({"classes": [text, "bus"], text: 1}).encode()
    head = b"Host: x\r\nConnection: close\r\n"
    return [
        b"GET /" + encoded + b" HTTP/1.1\r\n" + head + b"\r\n",
        b"GET /info?" + encoded + b" HTTP/1.1\r\n" + head + b"\r\n",
        b"GET /info HTTP/1.1\r\n" + head + b"X-Request-ID: " + line + b"\r\n\r\n",
        b"GET /info HTTP/1.1\r\n" + head + b"X-Forwarded-For: " + line + b"\r\nUser-Agent: " + line + b"\r\n\r\n",
        b"GET /info HTTP/1.1\r\n" + head + b"Authorization: Bearer " + line + b"\r\n\r\n",
        line + b" / HTTP/1.1\r\n" + head + b"\r\n",
        b"POST /generate HTTP/1.1\r\n"
        + head
        + b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
        + body,
    ]


def test_log_lines_cannot_be_forged(log: io.StringIO) -> None:
    """Every line on stderr is one JSON object that the service wrote, whatever came in."""
    with serve(lambda _: FakeModel()) as live:
        for text in EVIL:
            for request in evil_requests(text):
                raw(live.port, request)
        assert live.generate("evil unencodable", "bus").status_code == 500
    content = log.getvalue()
    assert "\x1b" not in content
    lines = [json.loads(line) for line in content.split("\n") if line]
    events = {line["event"] for line in lines}
    assert {"request", "generation failed", "Invalid HTTP request received."} <= events
    assert "forged" not in events
    ids = {line["request_id"] for line in lines if "request_id" in line}
    assert all(re.fullmatch(r"[A-Za-z0-9._-]{1,64}", one) for one in ids)


def series(live: Live) -> set[str]:
    lines = live.engine.metrics.render().decode().splitlines()
    return {line.rpartition(" ")[0] for line in lines if line and not line.startswith("#")}


def test_metrics_cannot_be_multiplied() -> None:
    """Dozens of different methods, paths, keys, ids and statuses leave the series of one request of each kind."""
    with serve(lambda _: FakeModel(), api_keys=ALICE_ENTRY) as live:
        before = series(live)
        for i in range(30):
            live.client.request(f"METHOD{i}", f"/path{i}?q={i}", headers={"X-Request-ID": f"id{i}"})
            live.client.get(
                f"/health/{i}", headers={"Authorization": f"Bearer {BOB}{i}", "X-Forwarded-For": f"10.0.0.{i}"}
            )
        added = series(live) - before
    assert len([line for line in added if line.startswith("t2w_http_requests_total")]) <= 3
    assert len(added) < 60  # the buckets of one route's histogram, and the counters' times of creation
    assert not [line for line in added if re.search(r"METHOD\d|path\d|id\d|10\.0\.", line)]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/info", 200),
        ("GET", "/health/live", 200),
        ("GET", "/metrics", 200),
        ("GET", "/openapi.json", 200),
        ("GET", "/nowhere", 404),
        ("PUT", "/generate", 405),
        ("POST", "/generate", 415),
    ],
)
def test_safe_headers(shared_live: Live, method: str, path: str, status: int) -> None:
    response = shared_live.client.request(method, path)
    assert response.status_code == status
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["content-security-policy"] == "default-src 'none'; frame-ancestors 'none'"
    assert response.headers["referrer-policy"] == "no-referrer"
    assert "server" not in response.headers
    assert "access-control-allow-origin" not in response.headers


def test_safe_headers_on_failures(model: FakeModel) -> None:
    with serve(lambda _: model, api_keys=ALICE_ENTRY) as live:
        assert live.client.get("/info").headers["x-content-type-options"] == "nosniff"
    with serve(lambda _: model) as live:
        response = live.generate("broken", "bus")
        assert response.status_code == 500
        assert response.headers["x-content-type-options"] == "nosniff"


def test_documentation_may_load_its_script(shared_live: Live) -> None:
    """What the page loads is what its policy allows, and no more."""
    page = shared_live.client.get("/docs")
    policy = page.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; ")
    sources = set(re.findall(r'(?:src|href)="(https://[^/"]+)', page.text))
    assert sources
    for source in sources:
        assert source in policy
    assert "frame-ancestors 'none'" in policy


async def test_a_page_keeps_its_own_policy() -> None:
    """A route may widen the policy for what it serves; the other headers stay."""

    async def page(scope: Scope, receive: Receive, send: Send) -> None:
        await Response("hello", headers={"Content-Security-Policy": "default-src 'self'"})(scope, receive, send)

    transport = httpx.ASGITransport(SafeHeadersMiddleware(page, docs_path="/docs"))
    async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
        headers = (await client.get("/")).headers
    assert headers.get_list("content-security-policy") == ["default-src 'self'"]
    assert headers["x-content-type-options"] == "nosniff"
