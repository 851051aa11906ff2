"""Which deadline a client sends: its own timeout, but never more than the service allows."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

import text2weight_client as t2w
from tests.clients.scripted import INFO, Call, Script, content, parts, problem
from text2weight_client import AsyncClient, Client, GeneratedHead


def deadline_refused() -> httpx.Response:
    errors = [{"field": "deadline_ms", "message": "allowed are 1 to 5000"}]
    return problem(422, type="urn:text2weight:problem:invalid-input", errors=errors)


@pytest.mark.parametrize(
    ("timeout_s", "deadline_ms"), [(2.5, 2500), (0.0001, 1), (29.9, 29900), (30, None), (60, None)]
)
def test_timeout_below_the_usual_limit_is_sent_as_deadline(
    call: Call, make_head: Any, timeout_s: float, deadline_ms: int | None
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


def test_enhance_has_the_deadline_in_its_request_part(call: Call, make_head: Any) -> None:
    script = Script(httpx.Response(200, content=make_head()))
    call(script, "enhance", GeneratedHead.from_bytes(make_head()), 0.5, client_options={"timeout_s": 2.0})
    assert json.loads(content(parts(script.requests[0])[0]))["deadline_ms"] == 2000


def test_refused_deadline_is_left_out_at_once_and_from_then_on(make_head: Any) -> None:
    script = Script(deadline_refused(), httpx.Response(200, content=make_head()))
    with Client("http://service", timeout_s=20, transport=httpx.MockTransport(script)) as client:
        client.generate(["a", "b"], seed=1)
        client.generate(["a", "b"], seed=2)
    assert [(body["seed"], body.get("deadline_ms")) for body in script.bodies] == [(1, 20000), (1, None), (2, None)]


async def test_refused_deadline_async(make_head: Any) -> None:
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
def test_limit_is_learnt_from_info(make_head: Any, timeout_s: float, deadline_ms: int | None) -> None:
    script = Script(httpx.Response(200, json=INFO), httpx.Response(200, content=make_head()))
    with Client("http://service", timeout_s=timeout_s, transport=httpx.MockTransport(script)) as client:
        client.info()
        client.generate(["a", "b"])
    assert json.loads(script.requests[1].content).get("deadline_ms") == deadline_ms


def test_longer_limit_is_learnt_from_info(make_head: Any) -> None:
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
