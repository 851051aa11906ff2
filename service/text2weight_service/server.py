"""The HTTP server process: uvicorn around the application, with signals that drain."""

from __future__ import annotations

import asyncio
import gc
import math
import os
import resource
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from types import FrameType

import structlog
import uvicorn
from fastapi import FastAPI

from text2weight_service.app import create_app
from text2weight_service.auth import check_exposure
from text2weight_service.connections import guarded_protocol
from text2weight_service.engine import Engine
from text2weight_service.logs import configure_logging
from text2weight_service.metrics import Metrics
from text2weight_service.model import Model, load_model
from text2weight_service.settings import Settings
from text2weight_service.tracing import end_traces, exporting_provider

# The model's files, Redis, and what libraries keep open.
_OTHER_FILES = 256
# For how long a worker without a model that answers goes on: longer than an orchestrator needs to see it by itself.
MOST_FAILED_S = 60.0

log = structlog.get_logger(__name__)


class DrainingServer(uvicorn.Server):
    """From the signal on answers new requests with 503, and ends when those before it are answered.

    It also ends a process whose model does not come back, for whoever restarts programs that have ended.
    """

    def __init__(self, config: uvicorn.Config, engine: Engine) -> None:
        super().__init__(config)
        self._engine = engine
        self._accepted: set[asyncio.Task[None]] | None = None
        self._failed_since: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """React to SIGTERM and SIGINT; a second signal ends the wait."""
        if self._accepted is not None:
            super().handle_exit(sig, frame)
            return
        self._engine.begin_drain()
        self._accepted = set(self.server_state.tasks)

    async def on_tick(self, counter: int) -> bool:
        """Tell uvicorn, which asks ten times a second, whether to close its sockets and end."""
        if self._accepted is not None and not self.should_exit:
            left_s = self._engine.drain_left_s
            self.should_exit = left_s <= 0 or all(task.done() for task in self._accepted)
            # What is still open then: answers that clients are slow to read.
            self.config.timeout_graceful_shutdown = max(1, math.ceil(left_s))
        elif self._engine.failure is None:  # else `run_server` ends in order
            self._watch_for_failure()
        return await super().on_tick(counter)

    def _watch_for_failure(self) -> None:
        if self._engine.alive:
            self._failed_since = None
        elif self._failed_since is None:
            self._failed_since = time.monotonic()
        elif time.monotonic() - self._failed_since > MOST_FAILED_S:
            log.critical("the model does not come back: this worker ends, so that another can be started")
            os._exit(1)  # an orderly end would wait for the thread that hangs


def run_server(settings: Settings) -> Exception | None:
    """Serve until SIGTERM or SIGINT, then drain.

    Returns:
        why the model could not be used, or None after an orderly end.

    Raises:
        OSError: the address cannot be listened on.
        KeysError: the API keys cannot be used, or there are none and other machines can reach the service.
    """
    configure_logging(settings.log_level)
    engine = Engine(settings, load_to_stay)
    tracer_provider = exporting_provider(version("text2weight"))
    app = create_app(settings, engine, tracer_provider)
    check_exposure(settings.http_host, keys=settings.has_keys, allow_anonymous=settings.allow_anonymous)
    listener = _listen(settings.http_host, settings.http_port)
    _allow_open_files(settings.max_connections + _OTHER_FILES)
    server = DrainingServer(server_config(app, settings, engine.metrics), engine)

    def give_up() -> None:
        server.should_exit = True

    engine.on_failure = give_up
    with listener, _ignored(signal.SIGTERM, signal.SIGINT):
        log.info("listening", host=settings.http_host, port=listener.getsockname()[1])
        server.run(sockets=[listener])
    gc.unfreeze()  # or libraries report at exit that objects were left over
    if tracer_provider is not None:
        end_traces(tracer_provider)
    return engine.failure


def server_config(app: FastAPI, settings: Settings, metrics: Metrics) -> uvicorn.Config:
    """How uvicorn serves the application: quietly, and with the limits of the settings."""
    return uvicorn.Config(
        app,
        http=guarded_protocol(settings, metrics),
        loop="uvloop",
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        # uvicorn's own 5 s would end connections that a proxy still counts on.
        timeout_keep_alive=math.ceil(settings.header_timeout_s),
        timeout_graceful_shutdown=math.ceil(settings.drain_timeout_s),
    )


def load_to_stay(settings: Settings) -> Model:
    """Load the model, and spare the garbage collector the search of what will be there until the end.

    Libraries and model are half a million objects; each full collection stops all threads to look at them.

    Raises:
        CheckpointError: see `load_model`.
    """
    model = load_model(settings)
    gc.collect()
    gc.freeze()
    return model


def _allow_open_files(needed: int) -> None:
    """Raise this process's limit of open files, as far as the machine lets it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed < needed:
        log.warning("the limit of open files is below T2W_MAX_CONNECTIONS", limit=allowed, needed=needed)


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
