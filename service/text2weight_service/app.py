"""The ASGI application: load, warm up, serve, drain."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version

import structlog
from fastapi import FastAPI
from opentelemetry.trace import TracerProvider

from text2weight_service.engine import Engine, NotReadyError
from text2weight_service.middleware import BodyLimitMiddleware, RequestContextMiddleware
from text2weight_service.openapi import install_openapi
from text2weight_service.problems import install_problem_handlers
from text2weight_service.routes import router
from text2weight_service.settings import Settings, unknown_variables
from text2weight_service.tracing import install_tracer, telemetry

log = structlog.get_logger(__name__)


def create_app(
    settings: Settings, engine: Engine | None = None, tracer_provider: TracerProvider | None = None
) -> FastAPI:
    """Build the application.

    Its lifespan starts the engine, which loads and warms up in the background while the health routes
    already answer, and drains the engine at shutdown.

    Args:
        settings: the service's settings.
        engine: serves the requests; made from the settings where not given.
        tracer_provider: takes the spans of requests and stages; none are made where not given.
    """
    engine = engine or Engine(settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        log.info("settings", **settings.shown())
        for name in unknown_variables():
            log.warning("unknown variable in the environment, it has no effect", variable=name)
        engine.start()
        try:
            yield
        finally:
            await engine.stop()

    app = FastAPI(
        title="text2weight",
        version=version("text2weight"),
        summary="Class names in, the weights of a small classifier head out.",
        lifespan=lifespan,
        redoc_url=None,
        redirect_slashes=False,
        telemetry=telemetry(tracer_provider),
    )
    app.state.engine = engine
    install_tracer(app, tracer_provider)
    engine.metrics.watch_worker(lambda: engine.phase.value, lambda: _build(engine, app.version))
    app.include_router(router)
    install_problem_handlers(app)
    install_openapi(app)
    # The last one added is the outermost.
    app.add_middleware(BodyLimitMiddleware, max_body_bytes=settings.max_body_bytes)
    app.add_middleware(RequestContextMiddleware, metrics=engine.metrics)
    return app


def _build(engine: Engine, version: str) -> dict[str, str] | None:
    """What runs, for the metric t2w_build_info."""
    try:
        model = engine.model
    except NotReadyError:
        return None
    return {
        "version": version,
        "checkpoint": model.checkpoint_hash[:12],
        "text_encoder": model.text_encoder.name,
        "device": engine.settings.device,
    }
