"""A redis-server process for tests that kill, pause, restart and fill it."""

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


class SlowRedis:
    """Stands between a worker and a server, holds every answer back for `delay_s` and counts those in `delayed`.

    None is held any longer once `let_go` is set.
    """

    def __init__(self, port: int) -> None:
        self.delay_s = 0.0
        self.delayed = 0
        self.let_go = threading.Event()
        self._port = port
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"redis://127.0.0.1:{self.listener.getsockname()[1]}/0"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):  # the listener is closed
            while True:
                worker, _ = self.listener.accept()
                redis = socket.create_connection(("127.0.0.1", self._port))
                for source, sink, is_answer in ((worker, redis, False), (redis, worker, True)):
                    threading.Thread(target=self._pump, args=(source, sink, is_answer), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, is_answer: bool) -> None:
        with suppress(OSError), source, sink:
            while data := source.recv(65536):
                if is_answer and self.delay_s:
                    self.let_go.wait(self.delay_s)
                    self.delayed += 1
                sink.sendall(data)


@contextmanager
def redis_server(folder: Path) -> Iterator[RedisServer]:
    """A running server on a free port."""
    running = RedisServer(folder)
    running.start()
    try:
        yield running
    finally:
        running.stop()
