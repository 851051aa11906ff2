"""The ASGI application: load, warm up, serve, drain."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version

import structlog
from fastapi import FastAPI

from text2weight_service.classify import PictureClassifier
from text2weight_service.classify_routes import router as classify_router
from text2weight_service.engine import Engine
from text2weight_service.middleware import BodyLimitMiddleware, RequestContextMiddleware
from text2weight_service.openapi import install_openapi
from text2weight_service.playground_routes import router as playground_router
from text2weight_service.problems import install_problem_handlers
from text2weight_service.routes import router
from text2weight_service.settings import Settings, unknown_variables

log = structlog.get_logger(__name__)


def create_app(settings: Settings, engine: Engine | None = None) -> FastAPI:
    """Build the application.

    Its lifespan starts the engine, which loads and warms up in the background while the health routes
    already answer, and drains the engine at shutdown.

    Args:
        settings: the service's settings.
        engine: serves the requests; made from the settings where not given.
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
    )
    app.state.engine = engine
    app.state.classifier = PictureClassifier(settings.max_classes)
    app.include_router(router)
    app.include_router(classify_router)
    app.include_router(playground_router)
    install_problem_handlers(app)
    install_openapi(app)
    # The last one added is the outermost.
    app.add_middleware(
        BodyLimitMiddleware, max_body_bytes=settings.max_body_bytes, max_upload_bytes=settings.max_upload_bytes
    )
    app.add_middleware(RequestContextMiddleware, metrics=engine.metrics)
    return app
