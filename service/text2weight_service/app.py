"""The ASGI application: load, warm up, serve, drain."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version

import structlog
from fastapi import FastAPI
from fastapi.routing import APIRoute
from opentelemetry.trace import TracerProvider

from text2weight_service import (
    classify_routes,
    enhance_routes,
    fuse_routes,
    generate_routes,
    playground_routes,
    routes,
    stream_routes,
)
from text2weight_service.access import AccessControl, AccessMiddleware
from text2weight_service.classify import PictureClassifier
from text2weight_service.engine import Engine, NotReadyError
from text2weight_service.middleware import BodyLimitMiddleware, RequestContextMiddleware, SafeHeadersMiddleware
from text2weight_service.openapi import install_openapi
from text2weight_service.problems import install_problem_handlers
from text2weight_service.settings import Settings, unknown_variables
from text2weight_service.tracing import install_tracer, telemetry
from text2weight_service.uploads import Uploads

log = structlog.get_logger(__name__)

_ROUTERS = (
    generate_routes.router,
    stream_routes.router,
    fuse_routes.router,
    enhance_routes.router,
    classify_routes.router,
    routes.router,
    playground_routes.router,
)


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

    Raises:
        KeysError: the API keys cannot be used.
    """
    engine = engine or Engine(settings)
    access = AccessControl(settings, engine.metrics)

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
            await access.close()

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
    app.state.uploads = Uploads(settings.max_upload_bytes, settings.queue_size)
    app.state.classifier = PictureClassifier(settings.max_classes)
    for router in _ROUTERS:
        app.include_router(router)
    install_problem_handlers(app)
    install_openapi(app)
    # The last one added is the outermost.
    app.add_middleware(
        BodyLimitMiddleware,
        max_body_bytes=settings.max_body_bytes,
        max_upload_bytes=settings.max_upload_bytes,
        timeout_s=settings.request_timeout_s,
    )
    app.add_middleware(AccessMiddleware, access=access)
    paths = {route.path for router in _ROUTERS for route in router.routes if isinstance(route, APIRoute)}
    app.add_middleware(RequestContextMiddleware, metrics=engine.metrics, paths=paths)
    app.add_middleware(SafeHeadersMiddleware, docs_path=app.docs_url or "")
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
