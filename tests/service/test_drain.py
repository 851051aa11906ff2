"""SIGTERM under load: what was accepted is answered, what comes then is told to go elsewhere, and then it is over."""

import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.patience import HELD_S, PATIENCE_S
from tests.service.fakes import FakeModel, held
from tests.service.forms import a_head, form
from tests.service.live import Live, serve, wait_for


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as executor:
        yield executor


def terminate(live: Live) -> None:
    """What uvicorn does on SIGTERM; its own handler works in the main thread only."""
    live.server.handle_exit(signal.SIGTERM, None)


def has_ended(live: Live) -> bool:
    try:
        httpx.get(f"http://127.0.0.1:{live.port}/health/live", timeout=PATIENCE_S)
    except (httpx.NetworkError, httpx.RemoteProtocolError):
        return True
    return False


def test_drain_under_load(model: FakeModel, pool: ThreadPoolExecutor) -> None:
    with serve(lambda _: model, max_batch_size=2, drain_timeout_s=HELD_S) as live:
        with held(model):
            accepted = [pool.submit(live.generate, f"apple {i}", "bus", seed=i) for i in range(8)]
            wait_for(lambda: live.metric("t2w_queue_waiting") + live.metric("t2w_running") == 8, "load")
            terminate(live)
            with httpx.Client(base_url=live.client.base_url, timeout=PATIENCE_S) as newcomer:  # the socket stays open
                late = newcomer.post("/generate", json={"classes": ["apple", "bus"]})
            assert late.status_code == 503
            assert late.json()["type"] == "urn:text2weight:problem:draining"
            assert int(late.headers["retry-after"]) > 0
            assert late.headers["connection"] == "close"
            assert live.client.get("/health/ready").status_code == 503
            assert live.client.get("/health/live").status_code == 200
            assert live.metric("t2w_phase", phase="draining") == 1
            assert not any(future.done() for future in accepted)
        answers = [future.result(PATIENCE_S) for future in accepted]
        assert [answer.status_code for answer in answers] == [200] * 8
        wait_for(lambda: has_ended(live), "end")


TASKS = [{"classes": ["apple", "bus"]}, {"classes": ["tram", "apple"]}]
HEADS = [a_head(*task["classes"]).to_bytes() for task in TASKS]
REQUESTS: dict[str, list[dict[str, Any]]] = {
    "/generate": [{"json": {"classes": ["apple", "bus"], "seed": 1}}],
    "/generate/stream": [{"json": {"classes": ["apple", "bus"], "seed": 1}}],
    "/fuse": [{"json": {"tasks": TASKS, "seed": 1}}, {"files": form({"tasks": TASKS, "method": "average"}, *HEADS)}],
    "/enhance": [{"files": form({"strength": 0, "seed": 1}, HEADS[0])}],
    "/classify": [{"files": [*form(None, HEADS[0]), ("image", ("x.png", b"x", "image/png"))]}],
}


@pytest.mark.parametrize("path", REQUESTS)
@pytest.mark.parametrize("phase", ["draining", "unavailable"])
def test_no_route_takes_work_unless_ready(live: Live, path: str, phase: str) -> None:
    """Neither what needs no model, as a merge of heads, nor what the client has already."""
    tags = [live.client.post(path, **request).headers.get("etag", "*") for request in REQUESTS[path]]
    if phase == "draining":
        live.engine.begin_drain()
    else:
        live.engine.failure = RuntimeError("device lost")
    for request, tag in zip(REQUESTS[path], tags, strict=True):
        response = live.client.post(path, **request, headers={"If-None-Match": tag})
        assert response.status_code == 503
        assert response.json()["type"] == f"urn:text2weight:problem:{phase}"
        assert int(response.headers["retry-after"]) > 0


def test_every_route_that_takes_work_is_among_them(live: Live) -> None:
    paths = live.client.get("/openapi.json").json()["paths"]
    assert {path for path, methods in paths.items() if "post" in methods} == set(REQUESTS)


def test_an_idle_worker_ends_at_once() -> None:
    with serve(lambda _: FakeModel(), drain_timeout_s=HELD_S) as live:
        assert live.generate("apple", "bus").status_code == 200  # and its connection stays open
        terminate(live)
        wait_for(lambda: has_ended(live), "end")  # within a quarter of the drain timeout


def test_a_drain_has_an_end(model: FakeModel, pool: ThreadPoolExecutor) -> None:
    """A request that does not finish in time does not hold the worker up."""
    with serve(lambda _: model, drain_timeout_s=0.2) as live, held(model):
        stuck = pool.submit(live.generate, "apple", "bus")
        wait_for(model.entered.is_set, "batch")
        terminate(live)
        wait_for(lambda: has_ended(live), "end of listening")
        answer = stuck.result(PATIENCE_S)
        assert answer.status_code == 503
        assert answer.json()["type"] == "urn:text2weight:problem:draining"


def test_a_second_signal_does_not_wait(model: FakeModel, pool: ThreadPoolExecutor) -> None:
    with serve(lambda _: model, drain_timeout_s=HELD_S) as live, held(model):
        running = pool.submit(live.generate, "apple", "bus")
        wait_for(model.entered.is_set, "batch")
        terminate(live)
        assert not has_ended(live)
        terminate(live)
        wait_for(lambda: has_ended(live), "end")
        model.gate.set()
        assert running.result(PATIENCE_S).status_code == 200
