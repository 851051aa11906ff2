"""Clients that send slowly, read slowly, say nothing or come in masses, on raw sockets; others are served meanwhile."""

import json
import re
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import httpx
import pytest
from fastapi import FastAPI

from tests.patience import PATIENCE_S
from tests.service.fakes import FakeModel, held
from tests.service.live import Live, serve, wait_for
from text2weight_service.metrics import Metrics
from text2weight_service.server import server_config
from text2weight_service.settings import Settings

# A machine that stalls must not cut an honest client off.
HEADER_S = SEND_S = BODY_S = 3.0
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
        connection.settimeout(PATIENCE_S)
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


def cut_off(connection: socket.socket, data: bytes) -> bool:
    """Send byte by byte, for several times longer than any limit; returns whether the service had enough before."""
    assert 0.02 * len(data) > 4 * HEADER_S
    for byte in data:
        try:
            connection.sendall(bytes([byte]))
        except ConnectionError:
            return True
        time.sleep(0.02)
    return False


def served(live: Live) -> bool:
    """Whether a request is answered on a new connection; one that was kept may be cut at any moment."""
    url = f"http://127.0.0.1:{live.port}/generate"
    return httpx.post(url, json={"classes": ["apple", "bus"]}, timeout=PATIENCE_S).status_code == 200


def test_a_connection_that_says_nothing(guarded: Live) -> None:
    with connected(guarded) as connection:
        started_at = time.monotonic()
        assert until_closed(connection) == b""
        assert time.monotonic() - started_at > HEADER_S * 0.9


@pytest.mark.parametrize("first", [True, False], ids=["first request", "second request"])
def test_slow_headers(guarded: Live, first: bool) -> None:
    """Bytes that keep coming win no time: the limit is for the headers as a whole."""
    with connected(guarded) as connection:
        assert first or alive(connection)
        assert cut_off(connection, b"GET / HTTP/1.1\r\n" + b"X-A: b\r\n" * 100)
        assert until_closed(connection) == b""
    assert served(guarded)


def test_slow_body(guarded: Live) -> None:
    body = json.dumps({"classes": ["apple", "bus"]}).encode() + b" " * 1000
    with connected(guarded) as connection:
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
        connection.settimeout(PATIENCE_S)
        answer += until_closed(connection)
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b"urn:text2weight:problem:body-timeout" in answer
    assert served(guarded)


def test_a_body_that_goes_on_after_the_answer(guarded: Live) -> None:
    with connected(guarded) as connection:
        connection.sendall(POST % 10**6)
        answer = connection.recv(4096)
        assert answer.startswith(b"HTTP/1.1 413 ")
        assert cut_off(connection, bytes(1000))


def test_idle_between_requests(guarded: Live) -> None:
    with connected(guarded) as connection:
        for _ in range(4):
            assert alive(connection)
            time.sleep(HEADER_S / 3)  # four of these are longer than the limit, which begins anew with each answer
        until_closed(connection)


def test_idle_connections_live_as_long_as_documented() -> None:
    """uvicorn has a limit of its own, in whole seconds, which must not be the shorter one."""
    assert server_config(FastAPI(), Settings(header_timeout_s=12.5), Metrics()).timeout_keep_alive == 13


def test_a_client_that_does_not_read(guarded: Live) -> None:
    """Answers that nobody takes end the connection, and the memory for them."""
    large = b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n"
    with connected(guarded, receive_buffer=1024) as connection:
        while not any(one.transport.get_write_buffer_size() for one in guarded.server.server_state.connections):
            connection.sendall(large * 8)  # until the system takes no more for the client
            time.sleep(0.1)
        wait_for(lambda: guarded.metric("t2w_connections_cut_total", reason="unread") == 1, "the cut")
        until_closed(connection)
    assert served(guarded)


def test_leaving_with_pipelined_requests() -> None:
    """The request that is being computed learns of it, too, and not only the last one."""
    model = FakeModel()
    body = json.dumps({"classes": ["apple", "bus"]}).encode()
    accepted = {"client": "(anonymous)", "result": "accepted"}
    left = {"method": "POST", "route": "/generate", "status": "499"}
    with serve(lambda _: model) as live, held(model):
        with connected(live) as connection:
            connection.sendall((POST % len(body) + body) * 2)
            wait_for(lambda: live.metric("t2w_client_requests_total", **accepted) == 1, "work")
        wait_for(lambda: live.metric("t2w_http_requests_total", **left) >= 1, "noticing")


def test_pipelined_requests(guarded: Live) -> None:
    """A few are answered in their order; more than a few end the connection before they are taken into memory."""
    paths = [b"/health/live", b"/nowhere"] * 8
    with connected(guarded) as connection:
        connection.sendall(b"".join(b"GET %s HTTP/1.1\r\nHost: x\r\n\r\n" % path for path in paths))
        answers = b""
        while answers.count(b"HTTP/1.1 ") < len(paths):
            answers += connection.recv(65536)
        assert re.findall(rb"HTTP/1.1 (\d+)", answers) == [b"200", b"404"] * 8
    with connected(guarded) as connection, pytest.raises(ConnectionError):  # noqa: PT012
        for _ in range(1000):
            connection.sendall(GET * 1000)
    assert served(guarded)
    assert guarded.metric("t2w_connections_cut_total", reason="pipelined") == 1


def test_a_long_request_is_not_cut() -> None:
    """Waiting for the model is no idleness, and a client that reads at once has all the time it needs."""
    model = FakeModel()
    with serve(lambda _: model, header_timeout_s=2, send_timeout_s=2) as live:
        model.gate.clear()
        with connected(live) as connection:
            body = json.dumps({"classes": ["apple", "bus"]}).encode()
            connection.sendall(POST % len(body) + body)
            time.sleep(4)
            model.gate.set()
            assert connection.recv(4096).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("first", [True, False], ids=["first request", "second request"])
@pytest.mark.parametrize("filler", [b"X-Large: " + b"a" * 40_000, b"X-A: b\r\n" * 5_000], ids=["one", "many"])
def test_large_headers(guarded: Live, first: bool, filler: bytes) -> None:
    with connected(guarded) as connection:
        assert first or alive(connection)
        connection.sendall(b"GET /info HTTP/1.1\r\nHost: x\r\n" + filler)
        assert until_closed(connection).startswith(b"HTTP/1.1 400 ")
    assert served(guarded)


def test_large_headers_in_pieces(guarded: Live) -> None:
    """A limit of the whole, not of what comes at once."""
    with connected(guarded) as connection:
        connection.sendall(b"GET /info HTTP/1.1\r\nHost: x\r\n")
        with pytest.raises(ConnectionError):  # noqa: PT012
            for _ in range(100):
                connection.sendall(b"X-A: " + b"b" * 993 + b"\r\n")
                time.sleep(0.01)
    with connected(guarded) as connection:  # and large ones below the limit are taken
        connection.sendall(GET.removesuffix(b"\r\n") + b"".join(b"X-A: " + b"b" * 993 + b"\r\n" for _ in range(14)))
        connection.sendall(b"\r\n")
        assert connection.recv(4096).startswith(b"HTTP/1.1 200 ")
    assert served(guarded)


def test_large_headers_after_a_refused_body(guarded: Live) -> None:
    """What is left of a body is passed over, and then headers are counted as ever."""
    with connected(guarded) as connection:
        connection.sendall(POST % 300_000)
        assert connection.recv(4096).startswith(b"HTTP/1.1 413 ")
        connection.sendall(b" " * 300_000)
        time.sleep(0.1)
        connection.sendall(b"GET /info HTTP/1.1\r\nHost: x\r\nX-Large: " + b"a" * 40_000)
        assert until_closed(connection).startswith(b"HTTP/1.1 400 ")


def test_a_body_before_large_headers(guarded: Live) -> None:
    """Bytes of a body do not count as the headers that begin in the same piece."""
    body = json.dumps({"classes": ["apple", "bus"]}).encode() + b" " * 30_000
    with connected(guarded) as connection:
        connection.sendall(POST % len(body) + body[:100])
        time.sleep(0.1)
        connection.sendall(body[100:] + GET[:-4])
        assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")
        connection.sendall(GET[-4:])
        answer = b""
        while b'{"status":"alive"}' not in answer:
            data = connection.recv(65536)
            assert data
            answer += data


def test_an_upgrade_that_is_offered_is_not_taken(guarded: Live) -> None:
    """Some clients offer HTTP/2 with their first request; the body that follows is read all the same."""
    body = json.dumps({"classes": ["apple", "bus"]}).encode()
    head = (POST % len(body)).removesuffix(b"\r\n\r\n")
    head += b"\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQBAAAA\r\n\r\n"
    with connected(guarded) as connection:
        connection.sendall(head + body)
        assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")
    with connected(guarded) as connection:  # the body in a piece of its own
        connection.sendall(head)
        time.sleep(0.1)
        connection.sendall(body)
        assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")


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
