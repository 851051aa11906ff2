"""The embedding cache: memory, a real Redis, and a Redis that is down, slow, restarted or full of nonsense."""

import asyncio
import hashlib
import re
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.patience import PATIENCE_S
from tests.service.fakes import DIM, FakeModel, unit_vector
from tests.service.live import Live, serve, wait_for
from tests.service.redis_server import RedisServer, needs_redis, redis_server
from text2weight.artifact import read_head
from text2weight_service import redis_store
from text2weight_service.embedding_cache import EmbeddingCache, MemoryCache, SharedEmbeddings
from text2weight_service.metrics import Metrics
from text2weight_service.redis_store import RedisStore

KEY = "t2w:embedding:f00d:" + hashlib.sha256(b"a apple").hexdigest()


def test_memory_keeps_the_most_recently_used() -> None:
    cache = MemoryCache(2)
    cache.put({"a": torch.ones(1)})
    cache.put({"b": torch.ones(1)})
    cache.get(["a"])
    cache.put({"c": torch.ones(1)})
    assert sorted(cache.get(["a", "b", "c"])) == ["a", "c"]


def test_request_larger_than_the_memory(model: FakeModel) -> None:
    with serve(lambda _: model, embedding_cache_size=1) as live:
        assert live.generate("apple", "bus", "lizard").status_code == 200
        assert live.generate("lizard", "apple", "bus").status_code == 200


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    with redis_server(tmp_path) as running:
        yield running


def served(model: FakeModel, url: str) -> "contextmanager[Live]":
    # A generous timeout: a busy test machine must not turn a working Redis into a slow one.
    # Heads have a cache of their own, with tests of its own.
    return serve(lambda _: model, redis_url=url, redis_timeout_s=PATIENCE_S, head_cache_mb=0)


@needs_redis
def test_workers_share_embeddings(server: RedisServer) -> None:
    first, second = FakeModel(), FakeModel()
    with served(first, server.url) as live:
        assert live.generate("apple", "bus").status_code == 200
        wait_for(lambda: server.keys() == 2, "write to redis")
        assert live.metric("t2w_embedding_cache_lookups_total", tier="redis", result="miss") == 2
    with server.connected() as client:
        assert np.allclose(np.frombuffer(client.get(KEY), "<f4"), unit_vector("a apple").numpy())
        assert 0 < client.ttl(KEY) <= 604_800
    with served(second, server.url) as live:
        response = live.generate("apple", "bus", "lizard")
        assert read_head(response.content).class_embeddings[0].equal(unit_vector("a apple"))
        assert live.metric("t2w_embedding_cache_lookups_total", tier="redis", result="hit") == 2
    assert "a apple" not in second.text_encoder.encoded
    assert "a lizard" in second.text_encoder.encoded


@needs_redis
def test_workers_with_other_encoders_share_nothing(server: RedisServer) -> None:
    first, second = FakeModel(), FakeModel()
    second.text_encoder.fingerprint = "beef"
    for model in (first, second):
        with served(model, server.url) as live:
            assert live.generate("apple", "bus").status_code == 200
        assert "a apple" in model.text_encoder.encoded
    assert server.keys() == 4


NONSENSE = {
    "text": b"not an embedding",
    "nothing": b"",
    "too short": np.ones(DIM - 1, "<f4").tobytes(),
    "too long": np.ones(2 * DIM, "<f4").tobytes(),
    "not of length 1": np.ones(DIM, "<f4").tobytes(),
    "NaN": np.full(DIM, np.nan, "<f4").tobytes(),
    "infinite": np.full(DIM, np.inf, "<f4").tobytes(),
    "zero": bytes(4 * DIM),
}


@needs_redis
@pytest.mark.parametrize("case", NONSENSE)
def test_nonsense_is_a_miss(server: RedisServer, model: FakeModel, case: str) -> None:
    with server.connected() as client:
        client.set(KEY, NONSENSE[case])
    with served(model, server.url) as live:
        response = live.generate("apple", "bus")
        assert response.status_code == 200
        assert read_head(response.content).class_embeddings[0].equal(unit_vector("a apple"))
        assert live.metric("t2w_embedding_cache_lookups_total", tier="redis", result="invalid") == 1
        with server.connected() as client:
            wait_for(lambda: client.get(KEY) == unit_vector("a apple").numpy().tobytes(), "repair")


@needs_redis
def test_key_of_another_type_is_a_miss(server: RedisServer, model: FakeModel) -> None:
    with server.connected() as client:
        client.rpush(KEY, "a list")
    with served(model, server.url) as live:
        assert live.generate("apple", "bus").status_code == 200


@needs_redis
def test_redis_goes_and_comes_back(server: RedisServer, model: FakeModel) -> None:
    with served(model, server.url) as live:
        assert live.generate("apple", "bus").status_code == 200
        server.stop()
        for i in range(3):
            assert live.generate(f"down {i}", "bus").status_code == 200
        assert live.metric("t2w_redis_failures_total") >= 1
        server.start()
        numbers = iter(range(1000))

        def used_again() -> bool:
            assert live.generate(f"back {next(numbers)}", "bus").status_code == 200
            time.sleep(0.05)
            return server.keys() > 0

        wait_for(used_again, "use of the restarted redis")


def test_redis_is_down(model: FakeModel) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with served(model, f"redis://127.0.0.1:{unused.getsockname()[1]}/0") as live:
            assert live.generate("apple", "bus").status_code == 200
            assert live.metric("t2w_redis_failures_total") <= 2  # one read, one write
            assert live.metric("t2w_redis_breaker_state", operation="read") == 2


def test_redis_hangs(model: FakeModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A Redis that accepts and never answers costs its timeout once, not once per request."""
    monkeypatch.setattr(redis_store, "FIRST_PAUSE_S", 60.0)  # no probe within the test
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"redis://:secret@127.0.0.1:{silent.getsockname()[1]}/0"
        with serve(lambda _: model, redis_url=url, redis_timeout_s=0.1) as live:
            for i in range(5):
                assert live.generate(f"apple {i}", "bus").status_code == 200
            assert live.metric("t2w_redis_failures_total") >= 1
            assert "secret" not in live.client.get("/info").text
    # Reads are waited for, so that every failed one has cost a request its time limit.
    assert len(re.findall(r"redis breaker.*operation=read .*state=open", capsys.readouterr().out)) == 1


def test_redis_talks_nonsense(model: FakeModel) -> None:
    with socket.create_server(("127.0.0.1", 0)) as babbler:
        threading.Thread(target=_babble, args=(babbler,), daemon=True).start()
        with served(model, f"redis://127.0.0.1:{babbler.getsockname()[1]}/0") as live:
            assert live.generate("apple", "bus").status_code == 200
            assert live.metric("t2w_redis_failures_total") <= 2  # one read, one write
            assert live.metric("t2w_redis_breaker_state", operation="read") == 2


def _babble(listener: socket.socket) -> None:
    with suppress(OSError):  # the listener is closed
        while True:
            connection, _ = listener.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")


async def test_lookups_of_the_same_prompts_are_one_question() -> None:
    """Nobody asks what another asks already, also when the one who asked first leaves."""
    metrics = Metrics()
    asked: list[Sequence[str]] = []
    release = asyncio.Event()

    class SlowShared(SharedEmbeddings):
        async def get(self, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
            asked.append(prompts)
            await release.wait()
            return {prompt: unit_vector(prompt) for prompt in prompts if prompt != "unknown"}

    store = RedisStore("redis://127.0.0.1:1/0", 1, metrics)
    memory = MemoryCache(10)
    cache = EmbeddingCache(memory, SlowShared(store, "f00d", DIM, 60, metrics), metrics)
    first = asyncio.create_task(cache.lookup(["a", "b"]))
    await asyncio.sleep(0)
    others = [asyncio.create_task(cache.lookup(["b", "a", "c", "unknown"])) for _ in range(20)]
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.sleep(0)
    release.set()
    for rows in await asyncio.gather(*others):
        assert sorted(rows) == ["a", "b", "c"]
        assert rows["b"].equal(unit_vector("b"))
    assert asked == [["a", "b"], ["c", "unknown"]]
    assert sorted(memory.get(["a", "b", "c"])) == ["a", "b", "c"]
    await cache.lookup(["unknown"])
    assert asked[-1] == ["unknown"]
