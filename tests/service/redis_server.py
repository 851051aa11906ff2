"""A redis-server process for tests that kill, pause, restart and fill it."""

import math
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import redis

from tests.patience import HELD_S
from tests.service.live import wait_for

needs_redis = pytest.mark.skipif(shutil.which("redis-server") is None, reason="redis-server is not installed")


class RedisServer:
    """A redis-server process that can be stopped and started again on the same port."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = ["redis-server", "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
        self._process = subprocess.Popen(command, cwd=self._folder, stdout=subprocess.DEVNULL)
        wait_for(self._answers, "redis start")

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def pause(self) -> None:
        """Stop the process without closing its connections."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def fill(self) -> None:
        """Refuse writes for want of memory, and evict nothing."""
        with self.connected() as client:
            client.config_set("maxmemory-policy", "noeviction")
            client.config_set("maxmemory", 1)

    def make_room(self) -> None:
        with self.connected() as client:
            client.config_set("maxmemory", 0)

    def keys(self) -> int:
        with self.connected() as client:
            return int(client.dbsize())

    @contextmanager
    def connected(self) -> Iterator["redis.Redis"]:
        client = redis.Redis(port=self.port)
        try:
            yield client
        finally:
            client.close()

    def _answers(self) -> bool:
        with self.connected() as client:
            try:
                return bool(client.ping())
            except redis.ConnectionError:
                return False


class HeldRedis:
    """Stands between a worker and a server. From `hold` to `let_go`, only answers that were `let_through` pass."""

    def __init__(self, port: int) -> None:
        self.waiting = 0  # answers that are held back now
        self.passed = 0  # those that passed since `hold`
        self._allowed = math.inf
        self._asking: set[socket.socket] = set()  # the workers' ends of connections that are due an answer
        self._changed = threading.Condition()
        self._port = port
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"redis://127.0.0.1:{self.listener.getsockname()[1]}/0"
        threading.Thread(target=self._accept, daemon=True).start()

    def is_quiet(self) -> bool:
        """Whether every question has its answer."""
        return not self._asking

    def hold(self) -> None:
        with self._changed:
            self.passed, self._allowed = 0, 0

    def holds(self, number: int) -> bool:
        """Whether it is the answer of this number since `hold`, from 0, that waits, and no other."""
        return (self.passed, self.waiting) == (number, 1)

    def let_through(self, count: int) -> None:
        """Let so many more answers pass."""
        with self._changed:
            self._allowed += count
            self._changed.notify_all()

    def let_go(self) -> None:
        with self._changed:
            self._allowed = math.inf
            self._changed.notify_all()

    def _accept(self) -> None:
        with suppress(OSError):  # the listener is closed
            while True:
                worker, _ = self.listener.accept()
                redis = socket.create_connection(("127.0.0.1", self._port))
                for pump in (self._pass_questions, self._pass_answers):
                    threading.Thread(target=pump, args=(worker, redis), daemon=True).start()

    def _pass_questions(self, worker: socket.socket, redis: socket.socket) -> None:
        with suppress(OSError), worker, redis:
            while data := worker.recv(65536):
                self._asking.add(worker)
                redis.sendall(data)

    def _pass_answers(self, worker: socket.socket, redis: socket.socket) -> None:
        with suppress(OSError), worker, redis:
            while data := redis.recv(65536):
                self._await_passage()
                self._asking.discard(worker)
                worker.sendall(data)

    def _await_passage(self) -> None:
        with self._changed:
            self.waiting += 1
            self._changed.wait_for(lambda: self.passed < self._allowed, HELD_S)
            self.waiting -= 1
            self.passed += 1


@contextmanager
def redis_server(folder: Path) -> Iterator[RedisServer]:
    """A running server on a free port."""
    running = RedisServer(folder)
    running.start()
    try:
        yield running
    finally:
        running.stop()
