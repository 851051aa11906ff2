"""Health states and metrics."""

import os
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.patience import HELD_S
from tests.service.fakes import FakeModel, held
from tests.service.live import Live, serve, wait_for
from text2weight.errors import CheckpointError
from text2weight_service import engine, server
from text2weight_service.model import Model
from text2weight_service.settings import Settings


def test_starting_then_ready(model: FakeModel) -> None:
    may_load = threading.Event()

    def load(_: Settings) -> Model:
        assert may_load.wait(HELD_S)
        return model

    with serve(load, wait_until_ready=False) as live:
        assert live.client.get("/health/live").status_code == 200
        for response in (live.client.get("/health/ready"), live.client.get("/info"), live.generate("apple", "bus")):
            assert response.status_code == 503
            assert response.json()["type"] == "urn:text2weight:problem:starting"
            assert int(response.headers["retry-after"]) > 0
        assert live.metric("t2w_ready") == 0
        assert live.metric("t2w_phase", phase="starting") == 1
        may_load.set()
        wait_for(lambda: live.client.get("/health/ready").status_code == 200, "ready")
        assert live.client.get("/health/ready").json() == {"status": "ready"}
        assert live.client.get("/health/live").json() == {"status": "alive"}
        assert live.metric("t2w_ready") == 1


def test_model_that_cannot_be_loaded() -> None:
    def load(_: Settings) -> Model:
        raise CheckpointError("/secret/place is not a checkpoint")

    with serve(load) as live:
        for path in ("/health/live", "/health/ready", "/info"):
            response = live.client.get(path)
            assert response.status_code == 503
            assert response.json()["type"] == "urn:text2weight:problem:unavailable"
            assert "secret" not in response.text
        assert isinstance(live.engine.failure, CheckpointError)


def test_model_that_fails_its_warm_up(model: FakeModel) -> None:
    model.lost = True
    with serve(lambda _: model) as live:
        assert live.client.get("/health/live").status_code == 503


def test_a_call_that_hangs_takes_the_worker_out_until_it_returns(
    live: Live, model: FakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "LONGEST_CALL_S", 0.1)
    model.gate.clear()
    with ThreadPoolExecutor(1) as pool:
        try:
            hung = pool.submit(live.generate, "apple", "bus")
            wait_for(lambda: live.client.get("/health/live").status_code == 503, "noticing")
            for response in (live.client.get("/health/ready"), live.generate("other", "bus")):
                assert response.status_code == 503
                assert response.json()["type"] == "urn:text2weight:problem:unavailable"
            assert live.metric("t2w_ready") == 0
            assert live.metric("t2w_phase", phase="failed") == 1
        finally:
            model.gate.set()
        assert hung.result().status_code == 200
    assert live.client.get("/health/live").status_code == 200
    assert live.client.get("/health/ready").status_code == 200
    assert live.generate("other", "bus").status_code == 200


def test_a_model_that_does_not_come_back_ends_the_process(
    live: Live, model: FakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "LONGEST_CALL_S", 0.1)
    monkeypatch.setattr(server, "MOST_FAILED_S", 0.3)
    ends: list[int] = []
    monkeypatch.setattr(os, "_exit", ends.append)
    time.sleep(0.5)
    assert not ends  # a model that waits for work has not failed
    with ThreadPoolExecutor(1) as pool, held(model):
        pool.submit(live.generate, "apple", "bus")
        wait_for(lambda: live.client.get("/health/live").status_code == 503, "noticing")
        wait_for(lambda: ends, "the end")
    assert set(ends) == {1}


def test_metrics(live: Live) -> None:
    live.generate("apple", "bus")
    live.generate("apple")
    response = live.client.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain; version=")
    for line in (
        't2w_http_requests_total{method="POST",route="/generate",status="200"} 1.0',
        't2w_http_requests_total{method="POST",route="/generate",status="422"} 1.0',
        't2w_http_request_duration_seconds_count{route="/generate"} 2.0',
        "t2w_queue_wait_seconds_count 1.0",
        't2w_batch_duration_seconds_count{stage="encode"} 1.0',
        't2w_batch_duration_seconds_count{stage="sample"} 1.0',
        't2w_batch_size_bucket{le="1.0"} 1.0',
        "t2w_batch_failures_total 0.0",
        "t2w_heads_generated_total 1.0",
        't2w_embedding_cache_lookups_total{result="miss",tier="memory"} 2.0',
        "t2w_redis_failures_total 0.0",
        "t2w_queue_waiting 0.0",
        "t2w_ready 1.0",
        't2w_phase{phase="ready"} 1.0',
        't2w_phase{phase="draining"} 0.0',
    ):
        assert f"\n{line}\n" in response.text, line
    assert "process_resident_memory_bytes" in response.text
    build = re.findall(r"^t2w_build_info\{(.*)\} 1\.0$", response.text, re.MULTILINE)
    assert len(build) == 1
    assert 'checkpoint="c0ffee"' in build[0]


def test_labels_are_bounded(live: Live) -> None:
    """Nothing that a client invents becomes a label."""
    for i in range(20):
        live.client.get(f"/random/{i}")
        assert live.client.request(f"VERB{i}", "/generate").status_code == 400  # no HTTP, so no request
        live.client.request("PROPFIND", "/generate")
        live.client.get("/health/live", headers={"X-Request-ID": f"id-{i}"})
    labels = re.findall(r"^t2w_http_requests_total\{(.*)\}", live.client.get("/metrics").text, re.MULTILINE)
    assert 'method="GET",route="other",status="404"' in labels
    assert 'method="other",route="/generate",status="405"' in labels
    assert len(labels) == 3
