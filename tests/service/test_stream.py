"""POST /generate/stream: events, errors, pings, and what happens when the client goes."""

import asyncio
import base64
import json
import threading
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.patience import PATIENCE_S
from tests.service.fakes import FakeModel
from tests.service.heads import same_head
from tests.service.live import Live, serve, wait_for
from tests.service.test_bad_input import assert_problem
from tests.service.tiny import NAMES, write_tiny_checkpoint
from text2weight.artifact import read_head
from text2weight_service import stream_routes
from text2weight_service.batch_runner import GenerationFailedError
from text2weight_service.engine import Engine
from text2weight_service.job import Job
from text2weight_service.model import load_model
from text2weight_service.work_queue import DeadlineError, Generated, Progress

BODY = {"classes": ["apple", "bus"], "seed": 4, "steps": 3, "sampler": "ddim"}


class ScriptedEngine(Engine):
    """Streams the calls of a request, one each time the test allows it."""

    failure_at: int | None = None
    error: Exception = DeadlineError()

    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self.allowed = threading.Semaphore(0)
        self.closed = threading.Event()
        self.calls = 0

    async def stream(self, job: Job, heads_every: int) -> AsyncGenerator[Progress | Generated]:
        steps = job.steps or 1
        try:
            result = await self.generate(job)  # where a client may go, too
            for step in range(1, steps + 1):
                while not self.allowed.acquire(blocking=False):  # noqa: ASYNC110 - the test is on another thread
                    await asyncio.sleep(0.002)
                if step == self.failure_at:
                    raise self.error
                self.calls += 1
                head = result.data if heads_every and step % heads_every == 0 else None
                yield Progress(step, steps, 1000 - step, head)
            yield result
        finally:
            self.closed.set()


@pytest.fixture
def scripted() -> Iterator[tuple[Live, ScriptedEngine]]:
    with serve(lambda _: FakeModel(), engine_class=ScriptedEngine) as live:
        engine = live.engine
        assert isinstance(engine, ScriptedEngine)
        yield live, engine


def events(response: httpx.Response) -> Iterator[tuple[str, Any]]:
    """Events as a browser would read them; comments are the event "comment"."""
    name, data = "message", ""
    for line in response.iter_lines():
        if line.startswith(":"):
            yield "comment", line[1:].strip()
        elif line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            data = line.removeprefix("data: ")
        elif not line and data:
            yield name, json.loads(data)
            name, data = "message", ""


def stream(live: Live, **body: Any) -> list[tuple[str, Any]]:
    with live.client.stream("POST", "/generate/stream", json={**BODY, **body}) as response:
        assert response.status_code == 200
        return [event for event in events(response) if event[0] != "comment"]


def test_progress_and_the_finished_head(scripted: tuple[Live, ScriptedEngine]) -> None:
    live, engine = scripted
    engine.allowed.release(3)
    *progress, (last, done) = stream(live)
    assert progress == [("progress", {"step": i, "steps": 3, "timestep": 1000 - i}) for i in (1, 2, 3)]
    assert last == "done"
    assert done["seed"] == 4
    assert base64.b64decode(done["head"]) == live.client.post("/generate", json=BODY).content


def test_heads_on_request(scripted: tuple[Live, ScriptedEngine]) -> None:
    live, engine = scripted
    engine.allowed.release(3)
    received = stream(live, heads_every=2, precision="bf16")
    assert [name for name, _ in received] == ["progress", "progress", "head", "progress", "done"]
    assert received[2][1]["step"] == 2
    for _, data in (received[2], received[4]):
        head = read_head(base64.b64decode(data["head"]))
        assert head.classes == ("apple", "bus")
        assert head.metadata["precision"] == "bf16"


def test_events_come_as_they_happen(scripted: tuple[Live, ScriptedEngine]) -> None:
    live, engine = scripted
    engine.allowed.release(1)
    with live.client.stream("POST", "/generate/stream", json=BODY) as response:
        received = events(response)
        assert next(received)[1]["step"] == 1
        assert engine.calls == 1  # the next call has not been made yet
        engine.allowed.release(1)
        assert next(received)[1]["step"] == 2


def test_headers(scripted: tuple[Live, ScriptedEngine]) -> None:
    live, engine = scripted
    engine.allowed.release(3)
    with live.client.stream("POST", "/generate/stream", json=BODY, headers={"X-Request-ID": "mine"}) as response:
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert response.headers["cache-control"] == "no-store"
        assert response.headers["x-accel-buffering"] == "no"
        assert response.headers["x-request-id"] == "mine"
        assert "content-length" not in response.headers
        response.read()


def test_a_stream_that_waits_is_open_and_keeps_proxies_awake(
    scripted: tuple[Live, ScriptedEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_routes, "_HEADERS_AFTER_S", 0.02)
    monkeypatch.setattr(stream_routes, "_PING_S", 0.02)
    live, engine = scripted
    with live.client.stream("POST", "/generate/stream", json=BODY) as response:
        received = events(response)
        assert [next(received)[0] for _ in range(3)] == ["comment"] * 3
        engine.allowed.release(3)
        assert [name for name, _ in received if name != "comment"] == ["progress"] * 3 + ["done"]


def test_an_impatient_client_hears_of_a_stream_that_waits(scripted: tuple[Live, ScriptedEngine]) -> None:
    """A client that gives each read 8 s outlives 9 s without an event."""
    live, engine = scripted
    with live.client.stream("POST", "/generate/stream", json=BODY, timeout=8) as response:
        threading.Timer(9, lambda: engine.allowed.release(3)).start()
        assert [name for name, _ in events(response)][-1] == "done"


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (DeadlineError(), 504, "deadline"),
        (GenerationFailedError(), 500, "internal"),
        (RuntimeError("secret"), 500, "internal"),
    ],
)
def test_errors_after_the_start_are_events(
    scripted: tuple[Live, ScriptedEngine], error: Exception, status: int, kind: str
) -> None:
    live, engine = scripted
    engine.failure_at, engine.error = 2, error
    engine.allowed.release(2)
    with live.client.stream("POST", "/generate/stream", json=BODY) as response:
        assert response.status_code == 200
        received = list(events(response))
        assert [name for name, _ in received] == ["progress", "error"]
        problem = received[1][1]
        assert problem["type"] == f"urn:text2weight:problem:{kind}"
        assert problem["status"] == status
        assert problem["request_id"] == response.headers["x-request-id"]
        assert "secret" not in json.dumps(problem)
    counted = {"method": "POST", "route": "/generate/stream", "status": str(status)}
    wait_for(lambda: live.metric("t2w_http_requests_total", **counted) == 1, "counting the failure, not the 200")


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"samples": 2}, "samples"),
        ({"heads_every": -1}, "heads_every"),
        ({"classes": ["apple"]}, "classes"),
        ({"classes": ["apple", "unknown thing"]}, "classes"),
        ({"sampler": "mean"}, "steps"),
        ({"deadline_ms": 10**6}, "deadline_ms"),
    ],
)
def test_errors_before_the_start_are_problems(
    scripted: tuple[Live, ScriptedEngine], monkeypatch: pytest.MonkeyPatch, body: dict[str, Any], field: str
) -> None:
    monkeypatch.setattr(stream_routes, "_HEADERS_AFTER_S", PATIENCE_S)  # the problem comes first
    response = scripted[0].client.post("/generate/stream", json={**BODY, **body})
    assert_problem(response, 422, "invalid-input", field)


def test_failure_before_the_start_is_a_problem(
    scripted: tuple[Live, ScriptedEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_routes, "_HEADERS_AFTER_S", PATIENCE_S)  # the problem comes first
    live, engine = scripted
    engine.failure_at = 1
    engine.allowed.release(1)
    assert_problem(live.client.post("/generate/stream", json=BODY), 504, "deadline")
    assert engine.closed.wait(PATIENCE_S)


def test_other_content_type(scripted: tuple[Live, ScriptedEngine]) -> None:
    response = scripted[0].client.post("/generate/stream", content=b"{}", headers={"Content-Type": "text/plain"})
    assert_problem(response, 415, "unsupported-type")


@pytest.mark.parametrize("made", [0, 2])
def test_a_client_that_goes_stops_the_computation(
    scripted: tuple[Live, ScriptedEngine], monkeypatch: pytest.MonkeyPatch, made: int
) -> None:
    monkeypatch.setattr(stream_routes, "_HEADERS_AFTER_S", 0.02)
    live, engine = scripted
    if made:
        engine.allowed.release(made)
    with live.client.stream("POST", "/generate/stream", json={**BODY, "steps": 100}) as response:
        received = events(response)
        for _ in range(max(made, 1)):
            next(received)
        assert not engine.closed.is_set()
    assert engine.closed.wait(PATIENCE_S)
    assert engine.calls == made
    wait_for(
        lambda: live.metric("t2w_http_requests_total", method="POST", route="/generate/stream", status="200"), "log"
    )


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    checkpoint: Path = write_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "model")
    with serve(load_model, checkpoint=str(checkpoint)) as running:
        yield running


def test_real_model_equals_generate(real: Live) -> None:
    body = {"classes": NAMES[:4], "seed": 9, "sampler": "ddpm", "steps": 5}
    *before, (name, done) = stream(real, **body, heads_every=1)
    assert name == "done"
    steps = [data["step"] for name, data in before if name == "progress"]
    assert steps  # a slow reader may miss some
    assert steps == sorted(set(steps))
    heads = [read_head(base64.b64decode(data["head"])) for name, data in before if name == "head"]
    assert heads
    assert all(head.classes == NAMES[:4] for head in heads)
    assert same_head(base64.b64decode(done["head"]), real.client.post("/generate", json=body).content)
