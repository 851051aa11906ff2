"""The store over a real Redis that is killed, paused, full or flooded: what comes back, and that nobody waits."""

import asyncio
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import closing, contextmanager, suppress

import pytest

from tests.patience import HELD_S, PATIENCE_S
from tests.service.live import wait_for
from tests.service.redis_server import RedisServer, needs_redis
from text2weight_service import redis_store
from text2weight_service.metrics import Metrics
from text2weight_service.redis_store import BreakerState, RedisStore

BUDGET_S = 0.2
PAUSE_S = 0.2

pytestmark = needs_redis


@pytest.fixture
async def store(server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[RedisStore]:
    monkeypatch.setattr(redis_store, "FIRST_PAUSE_S", PAUSE_S)
    store = RedisStore(server.url, PATIENCE_S, Metrics())
    yield store
    await store.close()


@contextmanager
def short_budget(store: RedisStore) -> Iterator[None]:
    """Let calls run out of time soon; elsewhere a machine that stalls must not make a working Redis a slow one."""
    for breaker in (store.reads, store.writes):
        breaker._timeout_s = BUDGET_S
    # What is bounded by no budget hangs, or ends with the patient one.
    started_at = time.monotonic()
    yield
    assert time.monotonic() - started_at < PATIENCE_S / 2
    for breaker in (store.reads, store.writes):
        breaker._timeout_s = PATIENCE_S


def failures(store: RedisStore) -> float:
    return store.reads._failures._value.get()


async def recovered(store: RedisStore) -> None:
    """Wait until both breakers are closed again, by calls such as requests make them."""
    end = time.monotonic() + PATIENCE_S
    while store.reads.state is not BreakerState.CLOSED or store.writes.state is not BreakerState.CLOSED:
        assert time.monotonic() < end
        await store.get_many(["probe"])
        await store.set_many({"probe": b"1"}, 60)
        await asyncio.sleep(0.02)


async def test_values_come_back(server: RedisServer, store: RedisStore) -> None:
    values = {f"k{i}": bytes([i, 0, 255]) for i in range(100)}
    assert await store.set_many(values, 60)
    assert await store.get_many(["absent", *values]) == values
    assert await store.get_many([]) == {}
    assert await store.set_many({}, 60)
    with server.connected() as client:
        assert 0 < client.ttl("k0") <= 60


async def test_one_command_reads_many(server: RedisServer, store: RedisStore) -> None:
    await store.get_many(["warm"])
    with server.connected() as client:
        client.config_resetstat()
        await store.get_many([f"k{i}" for i in range(50)])
        calls = {name.removeprefix("cmdstat_"): stat["calls"] for name, stat in client.info("commandstats").items()}
    assert calls["mget"] == 1
    assert "get" not in calls


async def test_values_of_other_types(server: RedisServer, store: RedisStore) -> None:
    with server.connected() as client:
        client.rpush("list", "a")
        client.set("good", b"\xff")
    assert await store.get_many(["list", "good"]) == {"good": b"\xff"}
    decoding = RedisStore(server.url + "?decode_responses=true", PATIENCE_S, Metrics())
    with server.connected() as client:
        client.set("text", "a")
    assert await decoding.get_many(["text"]) == {}
    await decoding.close()


async def test_killed_and_restarted(server: RedisServer, store: RedisStore) -> None:
    assert await store.set_many({"a": b"1"}, 60)
    server.stop()
    try:
        for _ in range(20):
            assert await store.get_many(["a"]) == {}
            assert not await store.set_many({"a": b"1"}, 60)
        assert store.reads.state is BreakerState.OPEN
    finally:
        server.start()
    await recovered(store)
    assert await store.set_many({"a": b"2"}, 60)
    assert await store.get_many(["a"]) == {"a": b"2"}


async def test_paused(server: RedisServer, store: RedisStore) -> None:
    """One call pays the budget; the ones after it do not call at all until a probe is due."""
    assert await store.set_many({"a": b"1"}, 60)
    store.reads._pause_s = HELD_S
    server.pause()
    try:
        with short_budget(store):
            for _ in range(5):
                assert await store.get_many(["a"]) == {}
        assert failures(store) == 1
    finally:
        server.resume()
    store.reads._probe_at = 0
    await recovered(store)
    assert await store.get_many(["a"]) == {"a": b"1"}


async def test_late_answers_are_never_taken_for_others(server: RedisServer, store: RedisStore) -> None:
    values = {f"k{i}": str(i).encode() for i in range(40)}
    assert await store.set_many(values, 60)
    await asyncio.gather(*(store.get_many([key]) for key in values))  # open several connections
    server.pause()
    try:
        with short_budget(store):
            results = await asyncio.gather(*(store.get_many([key]) for key in values))
        assert results == [{}] * len(values)
    finally:
        server.resume()
    tasks = [asyncio.create_task(store.get_many([key])) for key in values]
    await asyncio.sleep(0)
    for task in tasks:
        task.cancel()
    await recovered(store)
    for key, value in values.items():
        assert await store.get_many([key]) == {key: value}


async def test_full(server: RedisServer, store: RedisStore) -> None:
    """A full Redis refuses writes and goes on serving reads."""
    assert await store.set_many({"a": b"1"}, 60)
    server.fill()
    try:
        for _ in range(3):
            assert not await store.set_many({"b": bytes(1000)}, 60)
            assert await store.get_many(["a", "b"]) == {"a": b"1"}
        assert store.writes.state is BreakerState.OPEN
        assert store.reads.state is BreakerState.CLOSED
    finally:
        server.make_room()
    await recovered(store)
    assert await store.set_many({"b": b"2"}, 60)


async def test_enormous_value() -> None:
    """It is not read to its end: the connection is cut when the budget is over."""
    cut = threading.Event()

    def speak(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(4096)
            connection.sendall(b"*1\r\n$536870912\r\n")
            try:
                for _ in range(536870912 // 65536):
                    connection.sendall(bytes(65536))
                    time.sleep(0.01)  # the whole of it takes over a minute
            except OSError:
                cut.set()

    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        threading.Thread(target=speak, args=(listener,), daemon=True).start()
        store = RedisStore(f"redis://127.0.0.1:{listener.getsockname()[1]}/0", BUDGET_S, Metrics())
        assert await store.get_many(["a"]) == {}
        assert store.reads.state is BreakerState.OPEN
        await asyncio.to_thread(wait_for, cut.is_set, "the end of the connection")
        await store.close()


async def test_flood(server: RedisServer) -> None:
    """A thousand calls at once share few connections; the last ones may come too late, none of them fails."""
    store = RedisStore(server.url, PATIENCE_S / 2, Metrics())
    assert await store.set_many({"a": b"1"}, 60)
    results = await asyncio.gather(*(store.get_many(["a"]) for _ in range(1000)))
    assert all(result in ({"a": b"1"}, {}) for result in results)
    assert {"a": b"1"} in results
    with server.connected() as client:
        assert client.info("clients")["connected_clients"] <= 64 + 10
    await store.close()


async def test_redis_takes_no_more_connections(server: RedisServer, store: RedisStore) -> None:
    with server.connected() as client:
        client.config_set("maxclients", 1)
        try:
            with short_budget(store):
                assert await store.get_many(["a"]) == {}
        finally:
            client.config_set("maxclients", 100)
    await recovered(store)


async def test_a_wrong_password(server: RedisServer, capsys: pytest.CaptureFixture[str]) -> None:
    with server.connected() as client:
        client.config_set("requirepass", "right")
        client.execute_command("AUTH", "right")
        try:
            store = RedisStore(server.url.replace("//", "//:hunter2@"), PATIENCE_S, Metrics())
            assert await store.get_many(["a"]) == {}
            await store.close()
        finally:
            client.config_set("requirepass", "")
    printed = capsys.readouterr()
    assert "AuthenticationError" in printed.out
    assert "hunter2" not in printed.out


def _speak(answer: bytes, listener: socket.socket) -> None:
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        with connection, suppress(OSError):
            while connection.recv(4096):
                connection.sendall(answer)


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"+OK\r\n",
        b":5\r\n",
        b"*-1\r\n",
        b"*0\r\n",
        b"*2\r\n$1\r\na\r\n$1\r\nb\r\n",
        b"-LOADING Redis is loading the dataset in memory\r\n",
        b"-READONLY You can't write against a read only replica\r\n",
        b"$999999999\r\nx",
        b"\0" * 100,
        b"*1\r\n" * 5000,
    ],
)
async def test_nonsense_of_a_stranger(answer: bytes) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        threading.Thread(target=_speak, args=(answer, listener), daemon=True).start()
        store = RedisStore(f"redis://127.0.0.1:{listener.getsockname()[1]}/0", BUDGET_S, Metrics())
        assert await store.get_many(["a"]) == {}
        assert store.reads.state is BreakerState.OPEN
        await store.close()


async def test_one_probe_at_a_time(server: RedisServer, store: RedisStore) -> None:
    """While a probe is on its way nobody else calls; a cancelled probe leaves its place to the next call."""
    store.reads.state = BreakerState.OPEN
    calls: list[int] = []
    release = asyncio.Event()

    async def work() -> str:
        calls.append(1)
        await release.wait()
        return "done"

    first = asyncio.create_task(store.reads.call(work, "otherwise"))
    await asyncio.sleep(0)
    assert store.reads.state is BreakerState.HALF_OPEN
    assert await store.reads.call(work, "otherwise") == "otherwise"
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    assert store.reads.state is BreakerState.OPEN
    release.set()
    assert await store.reads.call(work, "otherwise") == "done"
    assert store.reads.state is BreakerState.CLOSED
    assert len(calls) == 2


async def test_pauses_grow_and_are_logged(capsys: pytest.CaptureFixture[str]) -> None:
    metrics = Metrics()
    clock = 1000.0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(redis_store.time, "monotonic", lambda: clock)
        breaker = redis_store.CircuitBreaker("read", 60, metrics)

        async def fail() -> None:
            raise OSError("redis://:hunter2@host")

        pauses = []
        for _ in range(8):
            await breaker.call(fail, None)
            assert metrics.registry.get_sample_value("t2w_redis_breaker_state", {"operation": "read"}) == 2
            pauses.append(breaker._probe_at - clock)
            clock = breaker._probe_at
    assert pauses == [1, 2, 4, 8, 16, 30, 30, 30]
    printed = capsys.readouterr().out
    assert printed.count("redis breaker") == 1 + 2 * 7
    assert "OSError" in printed
    assert "hunter2" not in printed
