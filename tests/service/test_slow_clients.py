"""Clients that send slowly, read slowly, say nothing or come in masses, on raw sockets; others are served meanwhile."""

import json
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
from fastapi import FastAPI

from tests.service.fakes import FakeModel
from tests.service.live import Live, serve, wait_for
from text2weight_service.metrics import Metrics
from text2weight_service.server import server_config
from text2weight_service.settings import Settings

HEADER_S = 0.4
SEND_S = 0.5
BODY_S = 1.0
# A busy test machine may look at its clocks this late.
GRACE_S = 1.5
GET = b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n"
POST = b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"


@pytest.fixture(scope="module")
def guarded() -> Iterator[Live]:
    limits = {"header_timeout_s": HEADER_S, "send_timeout_s": SEND_S, "request_timeout_s": BODY_S}
    with serve(lambda _: FakeModel(), max_connections=40, **limits) as running:
        yield running


@contextmanager
def connected(live: Live, receive_buffer: int | None = None) -> Iterator[socket.socket]:
    with socket.socket() as connection:
        if receive_buffer is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        connection.settimeout(10)
        connection.connect(("127.0.0.1", live.port))
        yield connection


def until_closed(connection: socket.socket) -> bytes:
    """Everything the service still sends."""
    received = b""
    try:
        while data := connection.recv(65536):
            received += data
    except ConnectionError:
        pass
    return received


def alive(connection: socket.socket) -> bool:
    """Whether a probe on this connection is answered in full."""
    connection.sendall(GET)
    answer = b""
    while not answer.endswith(b'{"status":"alive"}'):
        data = connection.recv(4096)
        if not data:
            return False
        answer += data
    return True


def drip(connection: socket.socket, data: bytes, pause_s: float) -> None:
    """Send byte by byte until the service has had enough."""
    for byte in data:
        try:
            connection.sendall(bytes([byte]))
        except ConnectionError:
            return
        time.sleep(pause_s)


def served(live: Live) -> bool:
    return live.generate("apple", "bus").status_code == 200


def test_a_connection_that_says_nothing(guarded: Live) -> None:
    with connected(guarded) as connection:
        started_at = time.monotonic()
        assert until_closed(connection) == b""
        assert HEADER_S * 0.9 < time.monotonic() - started_at < HEADER_S + GRACE_S


@pytest.mark.parametrize("first", [True, False], ids=["first request", "second request"])
def test_slow_headers(guarded: Live, first: bool) -> None:
    """Bytes that keep coming win no time: the limit is for the headers as a whole."""
    with connected(guarded) as connection:
        assert first or alive(connection)
        started_at = time.monotonic()
        drip(connection, b"GET / HTTP/1.1\r\n" + b"X-A: b\r\n" * 100, 0.02)
        assert until_closed(connection) == b""
        assert time.monotonic() - started_at < HEADER_S + GRACE_S
    assert served(guarded)


def test_slow_body(guarded: Live) -> None:
    body = json.dumps({"classes": ["apple", "bus"]}).encode() + b" " * 1000
    with connected(guarded) as connection:
        started_at = time.monotonic()
        connection.sendall(POST % len(body))
        connection.settimeout(0.02)
        answer = b""
        for byte in body:
            try:
                connection.sendall(bytes([byte]))
                answer = connection.recv(4096)
                break
            except TimeoutError:
                continue
        connection.settimeout(10)
        answer += until_closed(connection)
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b"urn:text2weight:problem:body-timeout" in answer
        assert time.monotonic() - started_at < BODY_S + GRACE_S
    assert served(guarded)


def test_a_body_that_goes_on_after_the_answer(guarded: Live) -> None:
    with connected(guarded) as connection:
        connection.sendall(POST % 10**6)
        answer = connection.recv(4096)
        assert answer.startswith(b"HTTP/1.1 413 ")
        started_at = time.monotonic()
        drip(connection, bytes(1000), 0.02)
        until_closed(connection)
        assert time.monotonic() - started_at < HEADER_S + GRACE_S


def test_idle_between_requests(guarded: Live) -> None:
    with connected(guarded) as connection:
        for _ in range(5):
            assert alive(connection)
            time.sleep(HEADER_S / 2)  # five of these are longer than the limit, which begins anew with each answer
        started_at = time.monotonic()
        until_closed(connection)
        assert time.monotonic() - started_at < HEADER_S + GRACE_S


def test_idle_connections_live_as_long_as_documented() -> None:
    """uvicorn has a limit of its own, in whole seconds, which must not be the shorter one."""
    assert server_config(FastAPI(), Settings(header_timeout_s=12.5), Metrics()).timeout_keep_alive == 13


def test_a_client_that_does_not_read(guarded: Live) -> None:
    """Pipelined requests whose answers nobody takes end the connection, and the memory for them."""
    info = b"GET /docs HTTP/1.1\r\nHost: x\r\n\r\n"
    with connected(guarded, receive_buffer=1024) as connection:
        connection.settimeout(0.2)
        started_at = time.monotonic()
        with pytest.raises(ConnectionError):  # noqa: PT012
            while time.monotonic() - started_at < 20:
                try:
                    connection.sendall(info * 200)
                except TimeoutError:
                    continue
    assert served(guarded)
    assert guarded.metric("t2w_connections_cut_total", reason="unread") == 1


def test_a_long_request_is_not_cut() -> None:
    """Waiting for the model is no idleness, and a client that reads at once has all the time it needs."""
    model = FakeModel()
    with serve(lambda _: model, header_timeout_s=0.1, send_timeout_s=0.1) as live:
        model.gate.clear()
        with connected(live) as connection:
            body = json.dumps({"classes": ["apple", "bus"]}).encode()
            connection.sendall(POST % len(body) + body)
            time.sleep(0.5)
            model.gate.set()
            assert connection.recv(4096).startswith(b"HTTP/1.1 200 ")


def test_large_headers(guarded: Live) -> None:
    with connected(guarded) as connection:
        connection.sendall(b"GET /info HTTP/1.1\r\nHost: x\r\nX-Large: " + b"a" * 40_000)
        assert until_closed(connection).startswith(b"HTTP/1.1 400 ")
    assert served(guarded)


@pytest.mark.parametrize("sent", [b"", b"GET / HT", POST % 1000 + b"{"], ids=["nothing", "half headers", "half body"])
def test_many_idle_connections(guarded: Live, sent: bytes) -> None:
    """Five times as many as are allowed: the newest and every honest client are served all the time."""
    before = guarded.metric("t2w_connections_cut_total", reason="too-many")
    with ExitStack() as open_ones:
        for _ in range(200):
            open_ones.enter_context(connected(guarded)).sendall(sent)
        for _ in range(20):
            assert served(guarded)
    assert served(guarded)
    assert guarded.metric("t2w_connections_cut_total", reason="too-many") >= before + 100


def test_too_many_working_connections() -> None:
    """Where every connection works, one more is told to come back, and the working ones go on."""
    model = FakeModel()
    body = json.dumps({"classes": ["apple", "bus"]}).encode()
    with serve(lambda _: model, max_connections=3) as live, ExitStack() as open_ones:
        model.gate.clear()
        working = [open_ones.enter_context(connected(live)) for _ in range(3)]
        for connection in working:
            connection.sendall(POST % len(body) + body)
        wait_for(lambda: live.metric("t2w_client_requests_total", client="(anonymous)", result="accepted") == 3, "work")
        with connected(live) as refused:
            answer = until_closed(refused)
            head, _, content = answer.partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 503 ")
            assert b"Retry-After: 1" in head
            problem = json.loads(content)
            assert problem["type"] == "urn:text2weight:problem:unavailable"
            assert f"X-Request-ID: {problem['request_id']}".encode() in head
        model.gate.set()
        for connection in working:
            assert connection.recv(4096).startswith(b"HTTP/1.1 200 ")
