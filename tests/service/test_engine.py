"""Admission, shared calls, deadlines, isolation of failures, and draining, over HTTP."""

import asyncio
import contextlib
import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import pytest
import structlog

from tests.patience import PATIENCE_S
from tests.service.engines import large_calls_pay
from tests.service.fakes import WARM_UP, FakeModel
from tests.service.heads import same_head
from tests.service.live import Live, serve, wait_for
from text2weight.artifact import read_head

# Long enough for a request to reach the model, on a machine that stalls.
HURRIED_S = 3.0

Post = Callable[..., "Future[httpx.Response]"]


@pytest.fixture(autouse=True)
def _logs() -> Iterator[None]:
    """Tracebacks are not rendered: that takes seconds."""
    with structlog.testing.capture_logs():
        yield


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(40) as executor:
        yield executor


@contextmanager
def busy(live: Live, model: FakeModel, pool: ThreadPoolExecutor) -> Iterator[Post]:
    """Keep the model busy with one request while the block posts others; it goes on after the block."""
    model.gate.clear()
    model.entered.clear()
    first = pool.submit(live.generate, "busy", "bee", seed=0)
    try:
        assert model.entered.wait(PATIENCE_S)
        yield lambda *classes, **fields: pool.submit(live.generate, *classes, **fields)
    finally:
        model.gate.set()
    assert first.result().status_code == 200


def waiting(live: Live, count: int) -> None:
    wait_for(lambda: live.metric("t2w_queue_waiting") == count, f"a queue of {count}")


def test_requests_that_wait_are_computed_together(live: Live, model: FakeModel, pool: ThreadPoolExecutor) -> None:
    large_calls_pay(live.engine)
    with busy(live, model, pool) as post:
        posted = [post(f"class {i}", "bus", seed=i) for i in range(10)]
        waiting(live, 10)
    responses = [future.result() for future in posted]
    assert len(model.batches) < 6, "ten requests hardly ever shared a call"
    assert sum(len(batch) for batch in model.batches) == 11
    for i, response in enumerate(responses):
        head = read_head(response.content)
        assert head.classes == (f"class {i}", "bus")
        assert head.metadata["seed"] == str(i)


def test_batches_have_a_largest_size(model: FakeModel, pool: ThreadPoolExecutor) -> None:
    with serve(lambda _: model, max_batch_size=4) as live:
        large_calls_pay(live.engine)
        with busy(live, model, pool) as post:
            posted = [post(f"class {i}", "bus") for i in range(10)]
            waiting(live, 10)
        assert all(future.result().status_code == 200 for future in posted)
    assert max(len(batch) for batch in model.batches) == max(model.rows) == 4
    assert sum(len(batch) for batch in model.batches) == 11


def test_a_prompt_is_encoded_once(live: Live, model: FakeModel, pool: ThreadPoolExecutor) -> None:
    with busy(live, model, pool) as post:
        posted = [post("apple", "bus", seed=i) for i in range(5)]
        waiting(live, 5)
    assert all(future.result().status_code == 200 for future in posted)
    assert model.text_encoder.encoded.count("a apple") == 1


def test_result_does_not_depend_on_neighbours(model: FakeModel, pool: ThreadPoolExecutor) -> None:
    with serve(lambda _: model, head_cache_mb=0) as live:
        alone = live.generate("apple", "bus", seed=5).content
        with busy(live, model, pool) as post:
            posted = [post(f"class {i}", "bus", "extra", seed=i) for i in range(6)]
            among = post("apple", "bus", seed=5)
            waiting(live, 7)
        assert all(future.result().status_code == 200 for future in posted)
        assert same_head(among.result().content, alone)


def test_full_queue_is_refused_at_once(model: FakeModel, pool: ThreadPoolExecutor) -> None:
    with serve(lambda _: model, queue_size=16) as live:  # the one that keeps the model busy has a place, too
        with busy(live, model, pool) as post:
            posted = [post("apple", "bus", seed=i) for i in range(15)]
            waiting(live, 15)
            refused = live.generate("one", "too many")
        assert refused.status_code == 429
        assert refused.json()["type"] == "urn:text2weight:problem:queue-full"
        assert refused.json()["detail"].startswith("16 requests are under way, as many as are allowed; try again in ")
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert live.metric("t2w_refused_total", reason="full") == 1
        assert all(future.result().status_code == 200 for future in posted)
        assert live.generate("one", "too many").status_code == 200


def test_deadline(model: FakeModel, pool: ThreadPoolExecutor) -> None:
    with serve(lambda _: model, request_timeout_s=HURRIED_S) as live:
        model.gate.clear()
        running = pool.submit(live.generate, "apple", "bus")
        assert model.entered.wait(PATIENCE_S)
        late = pool.submit(live.generate, "too", "late")
        for future in (running, late):
            assert future.result().status_code == 504
            assert future.result().json()["type"] == "urn:text2weight:problem:deadline"
        # Asked over HTTP: the places are free before the next request is looked at.
        assert "\nt2w_queue_waiting 0.0\n" in live.client.get("/metrics").text
        model.gate.set()
        wait_for(lambda: live.generate("in", "time").status_code == 200, "an answer in time")
    assert [("too", "late")] not in model.batches, "an expired request must not be computed"


def test_steps_that_cannot_be_made_in_time(model: FakeModel) -> None:
    with serve(lambda _: model) as live:
        live.engine._loaded.runner.times.seconds = lambda shape, rows: 0.1  # type: ignore[union-attr, method-assign]
        refused = live.generate("apple", "bus", sampler="ddim", steps=1000, deadline_ms=9000)
    assert refused.status_code == 504
    assert re.fullmatch(
        r"1000 steps take about 100\.0 s, [89]\.\d s are left; ask for fewer steps or for more time",
        refused.json()["detail"],
    )


def test_diffusion_stops_when_nobody_waits(model: FakeModel) -> None:
    with serve(lambda _: model, request_timeout_s=HURRIED_S) as live:
        model.gate.clear()
        assert live.generate("apple", "bus", sampler="ddim", steps=100).status_code == 504
        model.gate.set()
        wait_for(lambda: live.generate("in", "time").status_code == 200, "an answer in time")
    assert model.steps_made < 10


def test_slow_body_is_refused(model: FakeModel) -> None:
    head = b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 50\r\n\r\n{"
    with serve(lambda _: model, request_timeout_s=HURRIED_S) as live:
        with socket.create_connection(("127.0.0.1", live.port), timeout=PATIENCE_S) as connection:
            connection.sendall(head)
            assert connection.recv(100).startswith(b"HTTP/1.1 408 ")
        assert live.generate("apple", "bus").status_code == 200


@pytest.mark.parametrize("culprit", ["broken", "unencodable", "unbeginnable"])
def test_a_broken_request_fails_alone(live: Live, model: FakeModel, pool: ThreadPoolExecutor, culprit: str) -> None:
    with busy(live, model, pool) as post:
        posted = [post(culprit if i == 2 else f"class {i}", "bus", seed=i) for i in range(5)]
        waiting(live, 4 if culprit == "unencodable" else 5)
    responses = [future.result() for future in posted]
    assert [response.status_code for response in responses] == [200, 200, 500, 200, 200]
    problem = responses[2].json()
    assert problem["type"] == "urn:text2weight:problem:internal"
    assert problem["request_id"] == responses[2].headers["x-request-id"]
    assert "secret" not in responses[2].text
    assert "exploded" not in responses[2].text
    assert culprit != "broken" or live.metric("t2w_batch_failures_total") > 0
    assert live.client.get("/health/live").status_code == 200
    assert live.generate("apple", "bus").status_code == 200


def test_refused_input_of_one_request_spares_the_others(live: Live, model: FakeModel, pool: ThreadPoolExecutor) -> None:
    with busy(live, model, pool) as post:
        posted = [post("unknown" if i == 1 else f"class {i}", "bus") for i in range(3)]
        waiting(live, 2)
        assert posted[1].result().status_code == 422
    assert [future.result().status_code for future in posted] == [200, 422, 200]


def test_lost_device_flips_liveness(live: Live, model: FakeModel) -> None:
    model.lost = True
    assert live.generate("apple", "bus").status_code == 500
    wait_for(lambda: live.client.get("/health/live").status_code == 503, "liveness flip")
    assert live.client.get("/health/ready").json()["type"] == "urn:text2weight:problem:unavailable"
    refused = live.generate("apple", "bus")
    assert refused.status_code == 503
    assert refused.headers["retry-after"]


def test_client_that_leaves_gives_its_place_up(live: Live, model: FakeModel, pool: ThreadPoolExecutor) -> None:
    with busy(live, model, pool) as post:
        kept = post("kept", "bus")
        waiting(live, 1)
        body = json.dumps({"classes": ["left", "bus"]}).encode()
        with socket.create_connection(("127.0.0.1", live.port), timeout=PATIENCE_S) as connection:
            connection.sendall(
                b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
            )
            waiting(live, 2)
        waiting(live, 1)
    assert kept.result().status_code == 200
    assert live.generate("apple", "bus").status_code == 200
    assert not any(("left", "bus") in batch for batch in model.batches)
    assert live.metric("t2w_http_requests_total", method="POST", route="/generate", status="499") == 1


def test_event_loop_stays_free_while_the_model_works(live: Live, model: FakeModel, pool: ThreadPoolExecutor) -> None:
    with busy(live, model, pool):
        assert live.client.get("/health/ready", timeout=PATIENCE_S).status_code == 200


def test_draining_finishes_accepted_requests(model: FakeModel, pool: ThreadPoolExecutor) -> None:
    with serve(lambda _: model) as live:
        with busy(live, model, pool) as post:
            accepted = [post(f"class {i}", "bus") for i in range(3)]
            waiting(live, 3)
            live.engine.begin_drain()
            refused = live.generate("too", "late")
            assert refused.status_code == 503
            assert refused.json()["type"] == "urn:text2weight:problem:draining"
            assert int(refused.headers["retry-after"]) > 0
            assert live.client.get("/health/ready").status_code == 503
            assert live.client.get("/health/live").status_code == 200
        assert [future.result().status_code for future in accepted] == [200, 200, 200]


def test_drain_has_an_end(model: FakeModel, pool: ThreadPoolExecutor) -> None:
    """What is not computed when the drain timeout is over is refused, not left hanging."""
    with serve(lambda _: model, drain_timeout_s=0.2) as live:
        model.gate.clear()
        running = pool.submit(live.generate, "apple", "bus", sampler="ddim", steps=50)
        assert model.entered.wait(PATIENCE_S)
        queued = pool.submit(live.generate, "apple", "bus")
        waiting(live, 1)
        stopping = threading.Thread(target=_stop, args=(live,))
        stopping.start()
        assert queued.result().status_code == 503
        stopping.join(PATIENCE_S)
        model.gate.set()
        assert running.result().status_code == 503
    assert model.steps_made == 1, "the one that was under way when the stop came"


def test_storm(model: FakeModel, pool: ThreadPoolExecutor) -> None:
    """Good, broken, refused, impatient and surplus requests at once: each gets its own answer, nothing is left."""
    names = ["good", "broken", "unknown", "unencodable"]
    expected = {"good": 200, "broken": 500, "unknown": 422, "unencodable": 500}

    def ask(live: Live, i: int) -> tuple[str, int | None]:
        name = names[i % 4] if i % 3 == 0 else "good"
        if i % 7 == 0:
            with contextlib.suppress(httpx.ReadTimeout):
                live.client.post("/generate", json={"classes": ["left", "bus"]}, timeout=0.002)
            return name, None
        response = live.generate(name, f"number {i}", seed=i)
        if response.status_code == 200:
            assert read_head(response.content).classes == (name, f"number {i}")
        return name, response.status_code

    with serve(lambda _: model, queue_size=20, max_batch_size=8) as live:
        answers = list(pool.map(lambda i: ask(live, i), range(120)))
        wait_for(lambda: live.metric("t2w_queue_waiting") == 0, "empty queue")
        assert live.generate("good", "bus").status_code == 200
        assert live.client.get("/health/live").status_code == 200
    for name, status in answers:
        assert status in (None, expected[name], 429)
    assert sum(status == 200 for _, status in answers) > 10


def _stop(live: Live) -> None:
    """End the engine as the lifespan does, from another event loop."""
    asyncio.run(live.engine.stop())


def test_warm_up_runs_before_ready(live: Live, model: FakeModel) -> None:
    assert model.text_encoder.encoded == [f"a {name}" for name in WARM_UP]
    assert model.batches == []
