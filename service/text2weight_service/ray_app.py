"""The same application as a Ray Serve deployment: one replica for each device, behind one address.

    serve run text2weight_service.ray_app:build min_replicas=1 max_replicas=4

Needs the extra `ray`. The settings are read once, where this command runs, and handed to every replica; give them
one Redis with T2W_REDIS_URL. Ray listens, so T2W_HTTP_HOST and T2W_HTTP_PORT have no effect, keys are asked for
wherever that is, and what `t2w serve` does for connections and traces is missing.
"""

from __future__ import annotations

import asyncio

from fastapi import FastAPI
from pydantic import BaseModel, Field, model_validator
from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig

from text2weight_service.app import create_app
from text2weight_service.auth import check_exposure
from text2weight_service.engine import Engine, Phase
from text2weight_service.logs import configure_logging
from text2weight_service.settings import Settings

_POLL_S = 0.05
# Ray kills a replica this long after its time to drain.
_SPARE_S = 5.0


class Scale(BaseModel, extra="forbid"):
    """How many replicas there are; `serve run` takes the fields as NAME=VALUE.

    Attributes:
        min_replicas: that there always are.
        max_replicas: under load.
        upscale_delay_s: how long the load must be too high before one is added.
        downscale_delay_s: how long it must be low before one is ended.
    """

    min_replicas: int = Field(default=1, ge=1)
    max_replicas: int = Field(default=1, ge=1)
    upscale_delay_s: float = Field(default=30.0, ge=0)
    downscale_delay_s: float = Field(default=600.0, ge=0)

    @model_validator(mode="after")
    def _ordered(self) -> Scale:
        if self.max_replicas < self.min_replicas:
            raise ValueError(f"max_replicas is {self.max_replicas}: allowed is at least min_replicas")
        return self


class Worker:
    """One replica: an engine and the application around it."""

    def __init__(self, settings: Settings) -> None:
        """Prepare a replica; the application's lifespan starts the engine.

        Args:
            settings: the service's settings.
        """
        configure_logging(settings.log_level)
        self._settings = settings
        self._engine = Engine(settings)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(self._settings, self._engine)

    async def check_health(self) -> None:
        """Answer Ray, which sends requests only after the first answer and replaces a replica that fails.

        Raises:
            RuntimeError: the model cannot be used.
        """
        while self._engine.phase is Phase.STARTING:  # noqa: ASYNC110 the phase changes on another thread
            await asyncio.sleep(_POLL_S)
        if not self._engine.alive:
            raise RuntimeError(f"the model cannot be used: {self._engine.failure}")


def build(scale: Scale) -> Application:
    """Build the deployment from the environment's settings.

    Args:
        scale: how many replicas there are. Between the two numbers Ray adds one when more requests run and wait
            than fit into one batch of each replica, and ends one when fewer replicas would do.

    Raises:
        KeysError: no key is set, and nobody said that this is wanted.
    """
    settings = Settings()
    # Where Ray listens is Ray's own setting.
    check_exposure("Ray's address", keys=settings.has_keys, allow_anonymous=settings.allow_anonymous)
    deploy = serve.deployment(
        name="text2weight",
        autoscaling_config=AutoscalingConfig(
            min_replicas=scale.min_replicas,
            max_replicas=scale.max_replicas,
            target_ongoing_requests=settings.max_batch_size,
            upscale_delay_s=scale.upscale_delay_s,
            downscale_delay_s=scale.downscale_delay_s,
        ),
        # The replica's own queue is the limit, so that a full one is answered by 429.
        max_ongoing_requests=settings.max_batch_size + settings.queue_size,
        ray_actor_options=_resources(settings),
        graceful_shutdown_timeout_s=settings.drain_timeout_s + _SPARE_S,
        health_check_period_s=5,
        health_check_timeout_s=60,
    )
    return deploy(serve.ingress()(Worker)).bind(settings)


def _resources(settings: Settings) -> dict[str, float]:
    """What Ray sets aside for one replica: a whole GPU, or the processors that torch uses."""
    if settings.device.startswith("cuda"):
        return {"num_gpus": 1, "num_cpus": 1}
    return {"num_cpus": settings.torch_threads or 1}
