"""Both clients against httpx's mock transport and against a real server on a loopback port."""

from __future__ import annotations

import inspect
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import httpx
import numpy as np
import pytest

import text2weight_client as t2w
from tests.clients.scripted import Call, Script, problem
from text2weight_client import AsyncClient, Client
from text2weight_client.connection import PROBLEM_TYPES, parse_retry_after


def test_generate_sends_what_was_asked_and_reads_the_head(call: Call, make_head: Any) -> None:
    script = Script(httpx.Response(200, content=make_head(("apple", "bus"), seed=3)))
    head = call(script, "generate", ("apple", "bus"), seed=3, steps=4, sampler="ddim")
    request = script.requests[0]
    assert (request.method, request.url.path) == ("POST", "/generate")
    assert request.headers["content-type"] == "application/json"
    assert script.bodies == [{"classes": ["apple", "bus"], "seed": 3, "steps": 4, "sampler": "ddim"}]
    assert head.classes == ("apple", "bus")
    assert head.predict(np.ones((1, 512))).shape == (1, 2)
    assert "authorization" not in request.headers


def test_defaults_are_left_to_the_service_and_the_seed_is_drawn(call: Call, make_head: Any) -> None:
    script = Script(httpx.Response(200, content=make_head()))
    for _ in range(3):
        call(script, "generate", ["apple", "bus", "lizard"])
    assert all(body.keys() == {"classes", "seed"} for body in script.bodies)
    seeds = [body["seed"] for body in script.bodies]
    assert len(set(seeds)) == 3
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_lone_string_is_not_taken_apart_into_letters(call: Call) -> None:
    script = Script(problem(422))
    with pytest.raises(t2w.InvalidRequestError):
        call(script, "generate", "apple")
    assert script.bodies[0]["classes"] == "apple"


def test_api_key_and_path_prefix(call: Call) -> None:
    script = Script(httpx.Response(200, json={"model": "x"}))
    options = {"api_key": "secret", "transport": httpx.MockTransport(script)}
    assert call("http://host/heads/v1", "info", client_options=options).raw == {"model": "x"}
    assert script.requests[0].headers["authorization"] == "Bearer secret"
    assert str(script.requests[0].url) == "http://host/heads/v1/info"


@pytest.mark.parametrize(
    ("status", "error_type"),
    [
        (400, t2w.APIError),
        (401, t2w.AuthenticationError),
        (404, t2w.APIError),
        (408, t2w.BodyTimeoutError),
        (413, t2w.PayloadTooLargeError),
        (415, t2w.UnsupportedMediaTypeError),
        (422, t2w.InvalidRequestError),
        (429, t2w.RateLimitedError),
        (500, t2w.ServerError),
        (501, t2w.NotSupportedError),
        (502, t2w.ServerError),
        (503, t2w.NotReadyError),
        (504, t2w.DeadlineExceededError),
    ],
)
def test_each_status_has_its_error(
    call: Call, sleeps: list[float], status: int, error_type: type[t2w.APIError]
) -> None:
    fields = {"type": f"{PROBLEM_TYPES}a-kind", "title": "Refused", "detail": "classes[1] is empty"}
    script = Script(problem(status, **fields, errors=[{"field": "classes"}]))
    with pytest.raises(t2w.APIError) as caught:
        call(script, "generate", ["a", ""], client_options={"max_retries": 2})
    error = caught.value
    assert type(error) is error_type
    assert (error.status, error.title, error.detail) == (status, "Refused", "classes[1] is empty")
    assert error.request_id == "r-1"
    assert error.errors == ({"field": "classes"},)
    assert str(error) == f"{status} Refused: classes[1] is empty (request id r-1)"
    assert len(script.requests) == (3 if status in {408, 429, 502, 503, 504} else 1)


def test_error_page_of_a_proxy_is_read_too(call: Call) -> None:
    script = Script(httpx.Response(403, text="<h1>Forbidden</h1>" + "x" * 1000, headers={"X-Request-ID": "p-9"}))
    with pytest.raises(t2w.APIError, match="403 Forbidden: <h1>Forbidden</h1>") as caught:
        call(script, "info")
    assert caught.value.request_id == "p-9"
    assert len(caught.value.detail) == 200


@pytest.mark.parametrize("body", [b"[1]", b'"text"', b'{"errors": "many", "title": null}', b""])
def test_odd_error_bodies_do_not_break_the_client(call: Call, body: bytes) -> None:
    with pytest.raises(t2w.InvalidRequestError, match="422 Unprocessable"):
        call(Script(httpx.Response(422, content=body)), "info")


@pytest.mark.parametrize("status", [408, 429, 502, 503, 504])
def test_retries_ask_for_the_same_head(call: Call, make_head: Any, sleeps: list[float], status: int) -> None:
    script = Script(problem(status), httpx.ConnectError("refused"), httpx.Response(200, content=make_head()))
    call(script, "generate", ["apple", "bus", "lizard"])
    assert len(script.bodies) == 3
    assert script.bodies[0] == script.bodies[1] == script.bodies[2]
    assert len(sleeps) == 2


def test_retry_after_in_seconds_is_honoured(call: Call, make_head: Any, sleeps: list[float]) -> None:
    busy = problem(429, headers={"Retry-After": "7"})
    call(Script(busy, busy, httpx.Response(200, content=make_head())), "generate", ["apple", "bus"])
    assert len(sleeps) == 2
    assert all(7.0 <= seconds <= 8.75 for seconds in sleeps)


@pytest.mark.parametrize(("asked", "spread"), [(0, 0.25), (1, 0.25), (40, 10.0)])
def test_clients_that_were_refused_together_do_not_come_back_together(
    call: Call, make_head: Any, sleeps: list[float], asked: int, spread: float
) -> None:
    waits = []
    for _ in range(20):
        busy = problem(429, headers={"Retry-After": str(asked)})
        call(Script(busy, httpx.Response(200, content=make_head())), "generate", ["apple", "bus"])
        waits.append(sleeps.pop())
    assert asked <= min(waits) < max(waits) <= asked + spread
    assert max(waits) - min(waits) > spread / 4


def test_a_worker_that_shuts_down_is_left_at_once(call: Call, make_head: Any, sleeps: list[float]) -> None:
    """Another may be there; if none is, the time that it asks for is waited."""
    leaving = problem(503, type="urn:text2weight:problem:draining", headers={"Retry-After": "10"})
    call(Script(leaving, leaving, httpx.Response(200, content=make_head())), "generate", ["apple", "bus"])
    assert sleeps[0] <= 0.5
    assert 10 <= sleeps[1] <= 12.5


def test_retry_after_as_a_date_is_honoured(call: Call, make_head: Any, sleeps: list[float]) -> None:
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=20), usegmt=True)
    call(
        Script(problem(503, headers={"Retry-After": date}), httpx.Response(200, content=make_head())),
        "generate",
        ["a", "b"],
    )
    assert len(sleeps) == 1
    assert 15 < sleeps[0] <= 25


@pytest.mark.parametrize("page", [{"text": "Internal Server Error"}, {"json": {"error": "replica died"}}, {}])
@pytest.mark.parametrize("status", [500, 502, 504])
def test_failure_of_what_stands_before_the_service_is_retried(
    call: Call, make_head: Any, sleeps: list[float], status: int, page: dict[str, Any]
) -> None:
    script = Script(httpx.Response(status, **page), httpx.Response(200, content=make_head()))
    assert call(script, "generate", ["a", "b"]).classes == ("apple", "bus", "lizard")
    assert script.bodies[0] == script.bodies[1]
    assert len(sleeps) == 1


def test_failure_before_the_service_is_retried_without_a_seed_too(call: Call, make_head: Any, sleeps: Any) -> None:
    heads = [t2w.GeneratedHead.from_bytes(make_head(classes)) for classes in (("a", "b"), ("c", "d"))]
    script = Script(httpx.Response(500, text="died"), httpx.Response(200, content=make_head()))
    call(script, "fuse", heads, method="average")
    script = Script(httpx.Response(500, text="died"), httpx.Response(200, json={"images": []}))
    assert call(script, "classify", heads[0], [b"x"]) == []


def test_failure_of_the_service_itself_is_not_retried(call: Call, sleeps: list[float]) -> None:
    script = Script(problem(500, type="urn:text2weight:problem:internal"))
    with pytest.raises(t2w.ServerError) as caught:
        call(script, "generate", ["a", "b"])
    assert caught.value.kind == "internal"
    assert (len(script.requests), sleeps) == (1, [])


def test_backoff_grows_without_retry_after(call: Call, sleeps: list[float]) -> None:
    with pytest.raises(t2w.NotReadyError):
        call(Script(problem(503)), "generate", ["a", "b"], client_options={"max_retries": 5})
    assert len(sleeps) == 5
    assert sleeps[-1] > 4 * sleeps[0] > 0
    assert max(sleeps) <= 8.25


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, None),
        ("0", 0.0),
        (" 12 ", 12.0),
        ("soon", None),
        ("-5", None),
        ("", None),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0),
        ("Wed, 21 Oct 2015 07:28:00", 0.0),
    ],
)
def test_retry_after_values(value: str | None, seconds: float | None) -> None:
    assert parse_retry_after(value) == seconds


def test_no_retries_when_none_are_wanted(call: Call, sleeps: list[float]) -> None:
    script = Script(httpx.ConnectError("refused"))
    with pytest.raises(t2w.APIConnectionError, match=r"cannot reach http://service/generate: refused"):
        call(script, "generate", ["a", "b"], client_options={"max_retries": 0})
    assert (len(script.requests), sleeps) == (1, [])


def test_slow_answer_is_not_asked_for_again(call: Call, sleeps: list[float]) -> None:
    script = Script(httpx.ReadTimeout("slow"))
    with pytest.raises(t2w.APITimeoutError, match="raise timeout_s"):
        call(script, "generate", ["a", "b"])
    assert len(script.requests) == 1


def test_connect_timeout_counts_as_a_failed_connection(call: Call, make_head: Any, sleeps: list[float]) -> None:
    script = Script(httpx.ConnectTimeout("slow"), httpx.Response(200, content=make_head()))
    call(script, "generate", ["a", "b"])
    assert len(script.requests) == 2


@pytest.mark.parametrize("cut", [0, 10, 1000, -4])
def test_body_that_is_no_head(call: Call, make_head: Any, cut: int) -> None:
    script = Script(httpx.Response(200, content=make_head()[:cut]))
    with pytest.raises(t2w.InvalidResponseError, match="200 with a body that is not a head"):
        call(script, "generate", ["a", "b"])
    assert len(script.requests) == 1


@pytest.mark.parametrize(("body", "message"), [(b"<html>", "not JSON"), (b"[]", "not an object")])
def test_info_that_is_no_object(call: Call, body: bytes, message: str) -> None:
    with pytest.raises(t2w.InvalidResponseError, match=message):
        call(Script(httpx.Response(200, content=body)), "info")


def test_undecodable_answer(call: Call) -> None:
    response = httpx.Response(200, headers={"Content-Encoding": "gzip"}, stream=httpx.ByteStream(b"not gzip"))
    with pytest.raises(t2w.InvalidResponseError, match="cannot be decoded"):
        call(Script(response), "info")


def test_wait_until_ready_polls_until_ready(call: Call, sleeps: list[float]) -> None:
    script = Script(httpx.ConnectError("refused"), problem(503), problem(503), httpx.Response(200, json={}))
    assert call(script, "wait_until_ready", 30.0) is None
    assert [request.url.path for request in script.requests] == ["/health/ready"] * 4
    assert len(sleeps) == 3


def test_wait_until_ready_gives_up(call: Call) -> None:
    with pytest.raises(t2w.APITimeoutError, match=r"not ready within 0\.05 s; the last attempt: 503 No: Why\."):
        call(Script(problem(503)), "wait_until_ready", 0.05)


def test_wait_until_ready_does_not_begin_a_probe_when_its_time_is_over(call: Call, sleeps: list[float]) -> None:
    script = Script(problem(503))
    with pytest.raises(t2w.APITimeoutError, match="not ready within 1 s"):
        call(script, "wait_until_ready", 1.0)
    assert sum(sleeps) <= 1.0
    assert [request.extensions["timeout"]["read"] for request in script.requests][:2] == [1.0, pytest.approx(0.8)]


def test_wait_until_ready_does_not_wait_for_something_else(call: Call) -> None:
    script = Script(problem(404))
    with pytest.raises(t2w.APIError, match="404"):
        call(script, "wait_until_ready", 30.0)
    assert len(script.requests) == 1


@pytest.mark.parametrize("client_type", [Client, AsyncClient])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base_url": "localhost:8000"}, "base_url is 'localhost:8000'"),
        ({"base_url": "https://{}@host".format("me:pa55")}, "^base_url holds a user name or password[^5]*$"),
        ({"timeout_s": 0}, "timeout_s is 0"),
        ({"timeout_s": float("nan")}, "timeout_s is nan"),
        ({"max_retries": -1}, "max_retries is -1"),
        ({"api_key": "a\nb"}, "api_key must be"),
        ({"api_key": "clé"}, "api_key must be"),
        ({"api_key": ""}, "api_key must be"),
    ],
)
def test_bad_settings_are_refused(client_type: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        client_type(**options)


def test_both_clients_have_the_same_calls() -> None:
    calls = {name for name in vars(Client) if not name.startswith("_")} - {"close"}
    assert calls == {name for name in vars(AsyncClient) if not name.startswith("_")} - {"aclose"}
    assert len(calls) == 9
    for name in calls:
        blocking, asynchronous = (inspect.signature(getattr(kind, name)) for kind in (Client, AsyncClient))
        assert blocking.parameters.keys() == asynchronous.parameters.keys()
        for parameter in blocking.parameters:
            assert blocking.parameters[parameter].default == asynchronous.parameters[parameter].default


def test_real_connection(call: Call, local_service: Any, reply: Any, make_head: Any) -> None:
    local_service.play(reply(body=make_head(("apple", "bus"))))
    head = call(local_service.url, "generate", ["apple", "bus"], client_options={"api_key": "k"})
    assert head.classes == ("apple", "bus")
    sent = local_service.requests[0]
    assert (sent["method"], sent["path"], sent["headers"]["Authorization"]) == ("POST", "/generate", "Bearer k")
    assert sent["headers"]["User-Agent"].startswith("text2weight-client/")


def test_dropped_and_cut_connections_are_retried_with_the_same_seed(
    call: Call, local_service: Any, reply: Any, make_head: Any, sleeps: list[float]
) -> None:
    whole = make_head()
    local_service.play(reply(drop=True), reply(body=whole[:500], declared_length=len(whole)), reply(body=whole))
    head = call(local_service.url, "generate", ["apple", "bus", "lizard"])
    assert head.classes == ("apple", "bus", "lizard")
    assert len(local_service.bodies) == 3
    assert len({body["seed"] for body in local_service.bodies}) == 1


def test_connection_that_always_drops(call: Call, local_service: Any, reply: Any, sleeps: list[float]) -> None:
    local_service.play(reply(drop=True))
    with pytest.raises(t2w.APIConnectionError, match="cannot reach http://127"):
        call(local_service.url, "generate", ["a", "b"], client_options={"max_retries": 1})
    assert len(local_service.requests) == 2


def test_nobody_listens(call: Call, local_service: Any, unused_tcp_port: int, sleeps: list[float]) -> None:
    with pytest.raises(t2w.APIConnectionError, match="cannot reach"):
        call(f"http://127.0.0.1:{unused_tcp_port}", "info", client_options={"max_retries": 1})
    assert len(sleeps) == 1
