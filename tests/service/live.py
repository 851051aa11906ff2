"""A real HTTP server around the application, on a thread of the test."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import httpx
from opentelemetry.trace import TracerProvider

from tests.patience import PATIENCE_S
from text2weight_service.app import create_app
from text2weight_service.engine import Engine, Phase
from text2weight_service.model import Model
from text2weight_service.server import DrainingServer, server_config
from text2weight_service.settings import Settings


def wait_for(condition: Callable[[], object], what: str, timeout_s: float = PATIENCE_S) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, f"{what} did not happen within {timeout_s} s"
        time.sleep(0.005)


class Live:
    """A running service: `client` speaks to it, `engine` is its engine, `server` what listens."""

    def __init__(self, engine: Engine, client: httpx.Client, port: int, server: DrainingServer) -> None:
        self.engine = engine
        self.server = server
        self.client = client
        self.port = port

    def generate(self, *classes: str, **fields: object) -> httpx.Response:
        return self.client.post("/generate", json={"classes": list(classes), **fields})

    def metric(self, name: str, **labels: str) -> float:
        return self.engine.metrics.registry.get_sample_value(name, labels) or 0.0


@contextmanager
def serve(
    load: Callable[[Settings], Model],
    *,
    wait_until_ready: bool = True,
    engine_class: type[Engine] = Engine,
    tracer_provider: TracerProvider | None = None,
    **settings: object,
) -> Iterator[Live]:
    """Serve a model with the given settings on a free port."""
    chosen = Settings(http_port=0, **settings)  # type: ignore[arg-type]
    engine = engine_class(chosen, load=load)
    config = server_config(create_app(chosen, engine, tracer_provider), chosen, engine.metrics)
    config.port = 0
    config.timeout_graceful_shutdown = 5
    server = DrainingServer(config, engine)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        wait_for(lambda: server.started, "server start")
        port = server.servers[0].sockets[0].getsockname()[1]
        if wait_until_ready:
            wait_for(lambda: engine.phase is not Phase.STARTING, "warm-up")
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE_S) as client:
            yield Live(engine, client, port, server)
    finally:
        server.should_exit = True
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
