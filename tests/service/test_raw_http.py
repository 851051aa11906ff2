"""Requests byte by byte: what two servers in a row could read differently is refused; odd but sound ones are taken."""

import socket
from collections.abc import Iterator

import pytest

from tests.patience import PATIENCE_S
from tests.service.fakes import FakeModel
from tests.service.live import Live, serve

GET = b"GET /health/live HTTP/1.1\r\nHost: x\r\n"
POST = b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
REFUSED = {
    "two lengths": POST + b"Content-Length: 2\r\nContent-Length: 1\r\n\r\n{}",
    "a length below 0": POST + b"Content-Length: -1\r\n\r\n",
    "a space before the colon": POST + b"Content-Length : 2\r\n\r\n{}",
    "an unknown coding": POST + b"Transfer-Encoding: gzip\r\n\r\n{}",
    "chunks that are not the last coding": POST + b"Transfer-Encoding: chunked, gzip\r\n\r\n0\r\n\r\n",
    "a chunk without a size": POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
    "lines without CR": GET.replace(b"\r", b"") + b"\n",
    "a folded header": GET + b"A: b\r\n c\r\n\r\n",
    "a NUL": GET + b"A: b\0c\r\n\r\n",
    "raw bytes in the path": b"GET /\xff\xfe HTTP/1.1\r\nHost: x\r\n\r\n",
    "a path without end": b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    "CONNECT": b"CONNECT x:443 HTTP/1.1\r\nHost: x\r\n\r\n",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(50),
}
ANSWERED = {
    "HTTP/1.0": (b"GET /health/live HTTP/1.0\r\n\r\n", 200),
    "an address in full": (GET.replace(b"/health", b"http://x/health") + b"\r\n", 200),
    "empty lines before": (b"\r\n\r\n" + GET + b"\r\n", 200),
    "more after the last request": (GET + b"Connection: close\r\n\r\nGARBAGE", 200),
    "a body that is asked for": (POST + b"Content-Length: 2\r\nExpect: 100-continue\r\n\r\n", 100),
    "escaped bytes in the path": (b"GET /%ff%00 HTTP/1.1\r\nHost: x\r\n\r\n", 404),
    "OPTIONS *": (b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n", 404),
    "a WebSocket": (b"GET /generate HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n", 405),
}


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with serve(lambda _: FakeModel()) as running:
        yield running


def answer(live: Live, request: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", live.port), timeout=PATIENCE_S) as connection:
        connection.sendall(request)
        return connection.recv(4096)


@pytest.mark.parametrize("request_bytes", REFUSED.values(), ids=REFUSED)
def test_refused(live: Live, request_bytes: bytes) -> None:
    received = answer(live, request_bytes)
    assert received.startswith(b"HTTP/1.1 400 ")
    assert b"connection: close" in received.lower()
    assert live.client.get("/health/live").status_code == 200


@pytest.mark.parametrize(("request_bytes", "status"), ANSWERED.values(), ids=ANSWERED)
def test_answered(live: Live, request_bytes: bytes, status: int) -> None:
    assert answer(live, request_bytes).startswith(b"HTTP/1.1 %d " % status)
