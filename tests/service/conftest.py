import logging
import os
from collections.abc import Iterator

import pytest
import structlog

from tests.service.fakes import FakeModel
from tests.service.live import Live, serve
from tests.service.redis_server import RedisServer, redis_server


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Variables of the machine must not change what a test sees."""
    for name in [name for name in os.environ if name.upper().startswith("T2W_")]:
        monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def default_logging() -> Iterator[None]:
    """A command that runs within a test sets logging up, to a stream that ends with the test."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    if structlog.is_configured():
        structlog.reset_defaults()
        root.handlers[:] = handlers
        root.setLevel(level)
        logging.captureWarnings(False)


@pytest.fixture
def model() -> FakeModel:
    return FakeModel()


@pytest.fixture
def live(model: FakeModel) -> Iterator[Live]:
    """A service with default settings around a fake model."""
    with serve(lambda _: model) as running:
        yield running


@pytest.fixture(scope="module")
def shared_live() -> Iterator[Live]:
    """One service for a module of tests that must leave it unharmed."""
    with serve(lambda _: FakeModel(), max_body_bytes=200_000) as running:
        yield running


@pytest.fixture(scope="module")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A Redis of a test module's own; `server` is the same, emptied for each test."""
    with redis_server(tmp_path_factory.mktemp("redis")) as running:
        yield running


@pytest.fixture
def server(shared_server: RedisServer) -> RedisServer:
    with shared_server.connected() as client:
        client.flushall()
    return shared_server
