"""The client's log says what happened and never holds a key."""

from __future__ import annotations

import logging
import traceback
from typing import Any

import httpx
import pytest

import text2weight_client as t2w
from tests.clients.scripted import Call, Script, problem
from text2weight_client import AsyncClient, Client

KEY = "k-very-secret-0123456789"


def test_answers_and_retries_are_logged_without_the_key(
    call: Call, make_head: Any, sleeps: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)  # httpx's and httpcore's lines too
    headers = {"X-Request-ID": "r-2", "Authorization": "none of the client's"}
    script = Script(
        problem(503, headers={"Retry-After": "4"}), httpx.Response(200, content=make_head(), headers=headers)
    )
    call(script, "generate", ["a", "b"], client_options={"api_key": KEY})
    assert script.requests[0].headers["authorization"] == f"Bearer {KEY}"
    own = [record for record in caplog.records if record.name == "text2weight_client"]
    assert [record.levelname for record in own] == ["DEBUG", "WARNING", "DEBUG"]
    assert own[0].getMessage().startswith("POST /generate answered 503 after ")
    assert own[1].getMessage() == f"attempt 1 failed, the next is in {sleeps[0]:.1f} s: 503 No: Why. (request id r-1)"
    assert own[2].getMessage().endswith("(request id r-2)")
    assert KEY not in caplog.text


def test_real_connection_logs_no_key(
    call: Call, local_service: Any, reply: Any, make_head: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    local_service.play(reply(body=make_head()))
    call(local_service.url, "generate", ["a", "b"], client_options={"api_key": KEY})
    assert any(record.name.startswith("httpcore") for record in caplog.records)
    assert KEY not in caplog.text


@pytest.mark.parametrize("client_type", [Client, AsyncClient])
def test_key_is_not_shown(client_type: Any) -> None:
    client = client_type("http://service:8000", api_key=KEY, timeout_s=5)
    assert repr(client) == f"{client_type.__name__}('http://service:8000', api_key=***, timeout_s=5)"
    assert repr(client_type("http://s")) == f"{client_type.__name__}('http://s', api_key=None, timeout_s=60)"
    assert KEY not in repr(vars(client))


def test_key_is_in_no_error(call: Call) -> None:
    for step in (problem(401), httpx.ConnectError("refused"), httpx.Response(200, content=b"?")):
        with pytest.raises(t2w.Text2WeightClientError) as caught:
            call(Script(step), "generate", ["a", "b"], client_options={"api_key": KEY, "max_retries": 0})
        assert KEY not in "".join(traceback.format_exception(caught.value))
    with pytest.raises(ValueError, match="api_key must be") as refused:
        Client(api_key=f"{KEY}\n")
    assert KEY not in str(refused.value)
