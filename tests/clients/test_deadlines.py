"""`timeout_s` bounds a call with all its retries; what is left of it is the deadline that the service is sent."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

import text2weight_client as t2w
from tests.clients.scripted import INFO, Call, Script, content, parts, problem
from text2weight_client import AsyncClient, Client, GeneratedHead

EACH_CALL = pytest.mark.parametrize("name", ["generate", "samples", "fuse", "enhance", "stream", "classify", "request"])


def deadline_refused() -> httpx.Response:
    errors = [{"field": "deadline_ms", "message": "allowed are 1 to 5000"}]
    return problem(422, type="urn:text2weight:problem:invalid-input", errors=errors)


@pytest.mark.parametrize(
    ("timeout_s", "deadline_ms"), [(2.5, 2500), (0.0001, 1), (29.9, 29900), (30, None), (60, None)]
)
def test_timeout_below_the_usual_limit_is_sent_as_deadline(
    call: Call, make_head: Any, sleeps: list[float], timeout_s: float, deadline_ms: int | None
) -> None:
    script = Script(httpx.Response(200, content=make_head()))
    call(script, "generate", ["a", "b"], client_options={"timeout_s": timeout_s})
    call(script, "fuse", [["a", "b"], ["c", "d"]], client_options={"timeout_s": timeout_s})
    call(script, "generate", ["a", "b"], samples=1, client_options={"timeout_s": timeout_s})
    assert [body.get("deadline_ms") for body in script.bodies] == [deadline_ms] * 3


def test_own_deadline_goes_before_the_timeout(call: Call, make_head: Any) -> None:
    script = Script(httpx.Response(200, content=make_head()))
    call(script, "generate", ["a", "b"], deadline_ms=7, client_options={"timeout_s": 2.0})
    assert script.bodies[0]["deadline_ms"] == 7


def test_enhance_has_the_deadline_in_its_request_part(call: Call, make_head: Any, sleeps: list[float]) -> None:
    script = Script(httpx.Response(200, content=make_head()))
    call(script, "enhance", GeneratedHead.from_bytes(make_head()), 0.5, client_options={"timeout_s": 2.0})
    assert json.loads(content(parts(script.requests[0])[0]))["deadline_ms"] == 2000


def test_refused_deadline_is_left_out_at_once_and_from_then_on(make_head: Any, sleeps: list[float]) -> None:
    script = Script(deadline_refused(), httpx.Response(200, content=make_head()))
    with Client("http://service", timeout_s=20, transport=httpx.MockTransport(script)) as client:
        client.generate(["a", "b"], seed=1)
        client.generate(["a", "b"], seed=2)
    assert [(body["seed"], body.get("deadline_ms")) for body in script.bodies] == [(1, 20000), (1, None), (2, None)]


async def test_refused_deadline_async(make_head: Any, sleeps: list[float]) -> None:
    script = Script(deadline_refused(), httpx.Response(200, content=make_head()))
    async with AsyncClient("http://service", timeout_s=20, transport=httpx.MockTransport(script)) as client:
        await client.generate(["a", "b"], seed=1)
    assert [body.get("deadline_ms") for body in script.bodies] == [20000, None]


def test_own_deadline_that_is_refused_is_an_error(call: Call) -> None:
    script = Script(deadline_refused())
    with pytest.raises(t2w.InvalidRequestError):
        call(script, "generate", ["a", "b"], deadline_ms=90_000, client_options={"timeout_s": 2.0})
    assert len(script.requests) == 1


@pytest.mark.parametrize(("timeout_s", "deadline_ms"), [(19.0, 19000), (25.0, None)])
def test_limit_is_learnt_from_info(
    make_head: Any, sleeps: list[float], timeout_s: float, deadline_ms: int | None
) -> None:
    script = Script(httpx.Response(200, json=INFO), httpx.Response(200, content=make_head()))
    with Client("http://service", timeout_s=timeout_s, transport=httpx.MockTransport(script)) as client:
        client.info()
        client.generate(["a", "b"])
    assert json.loads(script.requests[1].content).get("deadline_ms") == deadline_ms


def test_longer_limit_is_learnt_from_info(make_head: Any, sleeps: list[float]) -> None:
    info = INFO | {"limits": INFO["limits"] | {"request_timeout_s": 300}}
    script = Script(httpx.Response(200, json=info), httpx.Response(200, content=make_head()))

    async def run() -> None:
        async with AsyncClient("http://service", timeout_s=100, transport=httpx.MockTransport(script)) as client:
            await client.info()
            await client.generate(["a", "b"])

    asyncio.run(run())
    assert json.loads(script.requests[1].content)["deadline_ms"] == 100_000


def test_deadline_that_has_passed_is_not_asked_for_again(call: Call, sleeps: list[float]) -> None:
    script = Script(problem(504, type="urn:text2weight:problem:deadline"))
    with pytest.raises(t2w.DeadlineExceededError):
        call(script, "generate", ["a", "b"], client_options={"timeout_s": 2.0})
    assert (len(script.requests), sleeps) == (1, [])


def ask(call: Call, make_head: Any, script: Script, name: str, **client_options: Any) -> None:
    """Make one of the calls that `EACH_CALL` names."""
    head = GeneratedHead.from_bytes(make_head())
    arguments: dict[str, tuple[Any, ...]] = {
        "generate": ("generate", ["a", "b"]),
        "samples": ("generate", ["a", "b"]),
        "fuse": ("fuse", [["a", "b"], ["c", "d"]]),
        "enhance": ("enhance", head, 0.5),
        "stream": ("stream", ["a", "b"]),
        "classify": ("classify", head, [b"x"]),
        "request": ("request", "GET", "/metrics"),
    }
    options = {"samples": 2} if name == "samples" else {}
    call(script, *arguments[name], client_options=client_options, **options)


def busy(seconds: float) -> httpx.Response:
    return problem(503, headers={"Retry-After": str(seconds)})


def deadline_of(request: httpx.Request) -> int | None:
    body = request.content
    if request.headers["content-type"].startswith("multipart"):
        body = content(parts(request)[0])
    return json.loads(body).get("deadline_ms")


@EACH_CALL
@pytest.mark.parametrize(("timeout_s", "retry_after_s"), [(2.0, 10), (60.0, 60)])
def test_wait_that_would_pass_the_timeout_is_not_begun(
    call: Call, make_head: Any, sleeps: list[float], name: str, timeout_s: float, retry_after_s: int
) -> None:
    script = Script(busy(retry_after_s))
    message = rf"503 No: Why\. \(request id r-1\); not asked again: .* after the {timeout_s:g} s of timeout_s"
    with pytest.raises(t2w.NotReadyError, match=message) as caught:
        ask(call, make_head, script, name, timeout_s=timeout_s)
    assert caught.value.retry_after_s == retry_after_s
    assert (len(script.requests), sleeps) == (1, [])


@EACH_CALL
def test_each_attempt_may_wait_for_what_is_left(call: Call, make_head: Any, sleeps: list[float], name: str) -> None:
    script = Script(busy(4))
    with pytest.raises(t2w.NotReadyError, match="not asked again"):
        ask(call, make_head, script, name, timeout_s=12.0)
    assert len(script.requests) == 3
    assert sum(sleeps) < 12.0
    left = [12.0, 12.0 - sleeps[0], 12.0 - sum(sleeps)]
    for kind in ("connect", "read", "write", "pool"):
        assert [request.extensions["timeout"][kind] for request in script.requests] == pytest.approx(left)
    if name not in {"classify", "request"}:  # these have no deadline
        sent = [deadline_of(request) for request in script.requests]
        assert sent == pytest.approx([1000 * seconds for seconds in left], abs=1)


def test_time_left_becomes_a_deadline_once_it_is_below_the_services_limit(
    call: Call, make_head: Any, sleeps: list[float]
) -> None:
    script = Script(busy(25), httpx.Response(200, content=make_head()))
    call(script, "generate", ["a", "b"], client_options={"timeout_s": 50.0})
    assert [body.get("deadline_ms") for body in script.bodies] == [None, pytest.approx(1000 * (50 - sleeps[0]), abs=1)]


def test_refused_deadline_does_not_make_the_call_longer(call: Call, sleeps: list[float]) -> None:
    script = Script(busy(4), deadline_refused(), busy(4))
    with pytest.raises(t2w.NotReadyError, match="not asked again"):
        call(script, "generate", ["a", "b"], client_options={"timeout_s": 7.0})
    assert [body.get("deadline_ms") is None for body in script.bodies] == [False, False, True]
    assert len(sleeps) == 1


def test_own_deadline_is_sent_with_every_attempt(call: Call, make_head: Any, sleeps: list[float]) -> None:
    script = Script(busy(4), httpx.Response(200, content=make_head()))
    call(script, "generate", ["a", "b"], deadline_ms=900, client_options={"timeout_s": 12.0})
    assert [body["deadline_ms"] for body in script.bodies] == [900, 900]


def test_failed_connections_end_with_the_timeout_too(call: Call, sleeps: list[float]) -> None:
    script = Script(httpx.ConnectError("refused"))
    with pytest.raises(t2w.APIConnectionError, match=r"refused; not asked again: .* after the 3 s of timeout_s"):
        call(script, "generate", ["a", "b"], client_options={"timeout_s": 3.0, "max_retries": 50})
    assert 1.0 < sum(sleeps) < 3.0


def test_last_error_says_nothing_of_time_when_there_was_enough(call: Call, sleeps: list[float]) -> None:
    with pytest.raises(t2w.NotReadyError) as caught:
        call(Script(busy(1)), "generate", ["a", "b"], client_options={"max_retries": 2})
    assert str(caught.value) == "503 No: Why. (request id r-1)"
    assert len(sleeps) == 2


def test_each_request_of_many_has_the_whole_timeout(call: Call, make_head: Any, sleeps: list[float]) -> None:
    heads = [httpx.Response(200, content=make_head()) for _ in range(3)]
    script = Script(busy(4), heads[0], busy(4), heads[1], busy(4), heads[2])
    lists = [["a", "b"], ["c", "d"], ["e", "f"]]
    assert len(call(script, "generate_many", lists, concurrency=1, client_options={"timeout_s": 6.0})) == 3
    first = [body["deadline_ms"] for body in script.bodies][::2]
    assert first == pytest.approx([6000] * 3, abs=1)
    assert len(sleeps) == 3


def test_many_stop_when_one_has_no_time_left(call: Call, sleeps: list[float]) -> None:
    script = Script(busy(10))
    with pytest.raises(t2w.GenerateManyError, match=r"1 of 3 requests failed, 2 were not sent; .*not asked again"):
        call(
            script,
            "generate_many",
            [["a", "b"], ["c", "d"], ["e", "f"]],
            concurrency=1,
            client_options={"timeout_s": 2.0},
        )
    assert (len(script.requests), sleeps) == (1, [])
