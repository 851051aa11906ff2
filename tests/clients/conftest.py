from __future__ import annotations

import asyncio
import inspect
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import numpy as np
import pytest
from safetensors.numpy import save

from tests.clients.scripted import Call
from text2weight_client import AsyncClient, Client

MakeHead = Callable[..., bytes]


@pytest.fixture
def make_head() -> MakeHead:
    """Bytes of a head file drawn from a seed, as the service would send them."""

    def make(
        classes: Sequence[str] = ("apple", "bus", "lizard"),
        *,
        seed: int = 0,
        bias: bool = True,
        activation: str = "gelu",
        input_dim: int = 512,
        metadata: dict[str, str] | None = None,
        tensors: dict[str, Any] | None = None,
    ) -> bytes:
        rng = np.random.default_rng(seed)

        def draw(*shape: int) -> np.ndarray:
            return rng.normal(0.0, 0.2, shape).astype(np.float32)

        parts = {"linear1.weight": draw(16, input_dim), "linear2.weight": draw(512, 16)}
        if bias:
            parts |= {"linear1.bias": draw(16), "linear2.bias": draw(512)}
        embeddings = draw(len(classes), 512)
        parts["class_embeddings"] = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
        fields = {
            "format": "text2weight.head/1",
            "classes": json.dumps(list(classes)),
            "template": "a {}",
            "logit_scale": "30.0",
            "activation": activation,
            "seed": str(seed),
            "steps": "1",
            "sampler": "mean",
            "checkpoint": "0" * 64,
            "backbone": "resnet18",
        }
        changed = {**parts, **(tensors or {})}
        kept = {name: tensor for name, tensor in changed.items() if tensor is not None}
        return save(kept, metadata={**fields, **(metadata or {})})

    return make


@dataclass
class Reply:
    """What the local service answers to one request; `drop` closes the connection instead."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    drop: bool = False
    declared_length: int | None = None


@dataclass
class LocalService:
    """A real HTTP server on a loopback port that plays a script and records what it was sent."""

    url: str
    script: list[Reply] = field(default_factory=list)
    requests: list[dict[str, Any]] = field(default_factory=list)

    def play(self, *replies: Reply) -> None:
        """Answer with these, in order; the last one is repeated."""
        self.script[:] = replies

    def next_reply(self) -> Reply:
        return self.script.pop(0) if len(self.script) > 1 else self.script[0]

    @property
    def bodies(self) -> list[dict[str, Any]]:
        return [request["json"] for request in self.requests]


@pytest.fixture
def local_service() -> Iterator[LocalService]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            raw = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            service.requests.append(
                {
                    "path": self.path,
                    "method": self.command,
                    "headers": dict(self.headers),
                    "json": json.loads(raw) if self.headers.get("Content-Type") == "application/json" else None,
                    "raw": raw,
                }
            )
            reply = service.next_reply()
            self.close_connection = True
            if reply.drop:
                return
            self.send_response(reply.status)
            for name, value in {"Connection": "close", **reply.headers}.items():
                self.send_header(name, value)
            length = len(reply.body) if reply.declared_length is None else reply.declared_length
            self.send_header("Content-Length", str(length))
            self.end_headers()
            self.wfile.write(reply.body)

        do_GET = do_POST = answer  # noqa: N815 - names that http.server looks up

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    service = LocalService(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield service
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def reply() -> type[Reply]:
    return Reply


@pytest.fixture
def sleeps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that the clients would have slept; nothing sleeps, and the clock goes on by sleeps alone."""
    asked: list[float] = []

    async def note(seconds: float) -> None:
        asked.append(seconds)

    monkeypatch.setattr(time, "sleep", asked.append)
    monkeypatch.setattr(asyncio, "sleep", note)
    monkeypatch.setattr(time, "monotonic", lambda: float(sum(asked)))
    return asked


@pytest.fixture(params=["sync", "async"])
def call(request: pytest.FixtureRequest) -> Call:
    """Make one call with a new client of either kind: call(url_or_handler, "generate", [...], seed=1)."""

    def prepared(target: Any, client_options: dict[str, Any] | None) -> tuple[str, dict[str, Any]]:
        options = dict(client_options or {})
        if callable(target):
            return "http://service", options | {"transport": httpx.MockTransport(target)}
        return target, options

    def sync_call(
        target: Any, name: str, /, *args: Any, client_options: dict[str, Any] | None = None, **kwargs: Any
    ) -> Any:
        url, options = prepared(target, client_options)
        with Client(url, **options) as client:
            result = getattr(client, name)(*args, **kwargs)
            return list(result) if inspect.isgenerator(result) else result

    def async_call(
        target: Any, name: str, /, *args: Any, client_options: dict[str, Any] | None = None, **kwargs: Any
    ) -> Any:
        async def run() -> Any:
            url, options = prepared(target, client_options)
            async with AsyncClient(url, **options) as client:
                result = getattr(client, name)(*args, **kwargs)
                return [event async for event in result] if inspect.isasyncgen(result) else await result

        return asyncio.run(run())

    return sync_call if request.param == "sync" else async_call


@pytest.fixture(scope="session")
def live_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where a real service with the bundled model listens; one process for all tests that want it."""
    from demo.service_process import running_service

    with running_service(None, tmp_path_factory.mktemp("service") / "log") as service, Client(service.url) as client:
        service.wait_until_ready(client)
        yield service.url
