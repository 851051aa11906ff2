"""Server-sent events of POST /generate/stream, read by both clients."""

from __future__ import annotations

import asyncio
import json
from base64 import b64encode
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, closing
from typing import Any

import httpx
import pytest

import text2weight_client as t2w
from tests.clients.scripted import Call, Script, problem
from text2weight_client import AsyncClient, Client, DoneEvent, HeadEvent, ProgressEvent


class Pieces(httpx.SyncByteStream, httpx.AsyncByteStream):
    """A body that arrives in pieces; `error` breaks it off, `closed` tells that the reader let go of it."""

    def __init__(self, text: str, size: int = 7, error: Exception | None = None) -> None:
        data = text.encode()
        self.pieces = [data[start : start + size] for start in range(0, len(data), size)]
        self.error = error
        self.closed = False

    def __iter__(self) -> Iterator[bytes]:
        yield from self.pieces
        if self.error is not None:
            raise self.error

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in self:
            yield piece

    def close(self) -> None:
        self.closed = True

    async def aclose(self) -> None:
        self.closed = True


def event(name: str, **data: Any) -> str:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"


def encoded(head: bytes) -> str:
    return b64encode(head).decode()


def answer(text: str, **options: Any) -> httpx.Response:
    headers = {"Content-Type": "text/event-stream; charset=utf-8", "X-Request-ID": "s-1"}
    return httpx.Response(200, headers=headers, stream=Pieces(text, **options))


PROGRESS = event("progress", step=1, steps=2, timestep=999) + event("progress", step=2, steps=2, timestep=500)


@pytest.mark.parametrize("size", [1000, 100_000])
def test_events_are_typed_and_in_order(call: Call, make_head: Any, size: int) -> None:
    text = ": kept alive\n\n" + PROGRESS + event("head", step=2, head=encoded(make_head(seed=1)))
    text += event("novelty", x=1) + event("done", seed=7, head=encoded(make_head(seed=7))) + event("progress", step=9)
    script = Script(answer(text, size=size))
    events = call(script, "stream", ["apple", "bus"], heads_every=2, steps=2, seed=7, sampler="ddim")
    assert script.requests[0].url.path == "/generate/stream"
    assert script.bodies == [{"classes": ["apple", "bus"], "seed": 7, "steps": 2, "sampler": "ddim", "heads_every": 2}]
    assert events[:2] == [ProgressEvent(1, 2, 999), ProgressEvent(2, 2, 500)]
    assert [type(one) for one in events[2:]] == [HeadEvent, DoneEvent]
    assert (events[2].step, events[2].head.metadata["seed"]) == (2, "1")
    assert (events[3].seed, events[3].head.metadata["seed"]) == (7, "7")
    assert events[3].head.response.request_id == "s-1"


def test_stream_has_the_timeout_as_its_deadline(call: Call, make_head: Any, sleeps: list[float]) -> None:
    script = Script(*(answer(event("done", seed=1, head=encoded(make_head()))) for _ in range(2)))
    call(script, "stream", ["a", "b"], client_options={"timeout_s": 2.0})
    call(script, "stream", ["a", "b"], deadline_ms=50, client_options={"timeout_s": 2.0})
    assert [body.get("deadline_ms") for body in script.bodies] == [2000, 50]
    assert all("heads_every" not in body for body in script.bodies)


def test_refusal_before_the_stream_is_an_error_like_any_other(call: Call, sleeps: list[float], make_head: Any) -> None:
    with pytest.raises(t2w.InvalidRequestError, match="422 No: Why"):
        call(Script(problem(422)), "stream", ["a", "a"])
    done = answer(event("done", seed=1, head=encoded(make_head())))
    assert len(call(Script(problem(503), httpx.ConnectError("refused"), done), "stream", ["a", "b"])) == 1
    assert len(sleeps) == 2


def test_error_in_mid_stream_is_raised_with_the_request_id(call: Call, sleeps: list[float]) -> None:
    failed = event("error", type="urn:text2weight:problem:deadline", title="Too late", status=504, detail="At step 2.")
    script = Script(answer(PROGRESS + failed))
    with pytest.raises(t2w.DeadlineExceededError, match=r"504 Too late: At step 2\. \(request id s-1\)") as caught:
        call(script, "stream", ["a", "b"])
    assert caught.value.kind == "deadline"
    assert len(script.requests) == 1


@pytest.mark.parametrize("error", [None, httpx.RemoteProtocolError("peer closed"), httpx.ReadError("reset")])
def test_stream_that_breaks_off(call: Call, error: Exception | None) -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        if isinstance(error, httpx.RequestError):
            error.request = request
        return answer(PROGRESS, error=error)

    with pytest.raises(t2w.APIConnectionError, match=r"/generate/stream"):
        call(handler, "stream", ["a", "b"])


@pytest.mark.parametrize(
    "bad",
    [
        event("progress", step=1),
        event("head", step=1, head="???"),
        event("done", seed=1, head=encoded(b"not a head")),
        "event: progress\ndata: {not json\n\n",
        "event: progress\ndata: [1]\n\n",
        "event: error\ndata: 7\n\n",
    ],
)
def test_event_that_cannot_be_read(call: Call, bad: str) -> None:
    with pytest.raises(t2w.InvalidResponseError, match=r"sent an event '(progress|head|done|error)' that cannot be"):
        call(Script(answer(bad)), "stream", ["a", "b"])


def test_answer_that_is_no_stream(call: Call) -> None:
    with pytest.raises(t2w.InvalidResponseError, match="not an event stream"):
        call(Script(httpx.Response(200, json={})), "stream", ["a", "b"])


def test_stopping_early_lets_go_of_the_connection() -> None:
    response = answer(PROGRESS)
    with Client("http://service", transport=httpx.MockTransport(lambda request: response)) as client:
        with closing(client.stream(["a", "b"])) as events:
            assert next(events) == ProgressEvent(1, 2, 999)
            assert not response.is_closed
        assert response.is_closed


def test_stopping_early_async() -> None:
    response = answer(PROGRESS)

    async def run() -> None:
        async with AsyncClient("http://service", transport=httpx.MockTransport(lambda request: response)) as client:
            async with aclosing(client.stream(["a", "b"])) as events:
                async for one in events:
                    assert one == ProgressEvent(1, 2, 999)
                    break
            assert response.is_closed

    asyncio.run(run())
