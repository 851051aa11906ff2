"""The HTTP server process: uvicorn around the application, with signals that drain."""

from __future__ import annotations

import asyncio
import math
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from types import FrameType

import structlog
import uvicorn

from text2weight_service.app import create_app
from text2weight_service.engine import Engine
from text2weight_service.logs import configure_logging
from text2weight_service.settings import Settings
from text2weight_service.tracing import exporting_provider

log = structlog.get_logger(__name__)


class DrainingServer(uvicorn.Server):
    """From the signal on answers new requests with 503, and ends when those before it are answered."""

    def __init__(self, config: uvicorn.Config, engine: Engine) -> None:
        super().__init__(config)
        self._engine = engine
        self._accepted: set[asyncio.Task[None]] | None = None
        self._drain_ends_at = math.inf

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """React to SIGTERM and SIGINT; a second signal ends the wait."""
        if self._accepted is not None:
            super().handle_exit(sig, frame)
            return
        self._engine.begin_drain()
        self._accepted = set(self.server_state.tasks)
        self._drain_ends_at = time.monotonic() + self._engine.settings.drain_timeout_s

    async def on_tick(self, counter: int) -> bool:
        """Tell uvicorn, which asks ten times a second, whether to close its sockets and end."""
        if self._accepted is not None and not self.should_exit:
            left_s = self._drain_ends_at - time.monotonic()
            self.should_exit = left_s <= 0 or all(task.done() for task in self._accepted)
            # What is still open then: answers that clients are slow to read.
            self.config.timeout_graceful_shutdown = max(1, math.ceil(left_s))
        return await super().on_tick(counter)


def run_server(settings: Settings) -> Exception | None:
    """Serve until SIGTERM or SIGINT, then drain.

    Returns:
        why the model could not be used, or None after an orderly end.

    Raises:
        OSError: the address cannot be listened on.
    """
    listener = _listen(settings.http_host, settings.http_port)
    configure_logging(settings.log_level)
    engine = Engine(settings)
    tracer_provider = exporting_provider(version("text2weight"))
    config = uvicorn.Config(
        create_app(settings, engine, tracer_provider),
        log_config=None,
        access_log=False,
        ws="none",
        # Chosen here, or another extra would change them: uvicorn takes what happens to be installed.
        loop="asyncio",
        http="h11",
        timeout_graceful_shutdown=math.ceil(settings.drain_timeout_s),
    )
    server = DrainingServer(config, engine)

    def give_up() -> None:
        server.should_exit = True

    engine.on_failure = give_up
    with listener, _ignored(signal.SIGTERM, signal.SIGINT):
        log.info("listening", host=settings.http_host, port=listener.getsockname()[1])
        server.run(sockets=[listener])
    if tracer_provider is not None:
        tracer_provider.shutdown()  # sends what waits
    return engine.failure


@contextmanager
def _ignored(*signals: signal.Signals) -> Iterator[None]:
    """Ignore signals outside uvicorn's own handling of them.

    uvicorn raises a signal again once it has drained; an orderly end must not look like a kill.
    """
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in signals}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=2048)
