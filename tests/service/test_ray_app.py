"""The Ray Serve deployment, without a cluster; `python -m bench.ray_replicas` runs it with two replicas."""

import asyncio
import warnings

import pytest
from fastapi import FastAPI
from pydantic import ValidationError

from tests.patience import PATIENCE_S
from tests.service.fakes import FakeModel
from tests.service.test_auth import ALICE_ENTRY
from text2weight_service.auth import KeysError
from text2weight_service.engine import Engine
from text2weight_service.settings import Settings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray's own
    from text2weight_service import ray_app
    from text2weight_service.ray_app import Scale, Worker, build


@pytest.fixture(autouse=True)
def anonymous(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("T2W_ALLOW_ANONYMOUS", "true")


def test_keys_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("T2W_ALLOW_ANONYMOUS")
    with pytest.raises(KeysError, match="Ray's address can be reached"):
        build(Scale())
    monkeypatch.setenv("T2W_API_KEYS", ALICE_ENTRY)
    assert build(Scale())._bound_deployment.init_args == (Settings(),)


def test_deployment_follows_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"MAX_BATCH_SIZE": "8", "QUEUE_SIZE": "50", "TORCH_THREADS": "3"}.items():
        monkeypatch.setenv(f"T2W_{name}", value)
    scale = Scale(min_replicas=2, max_replicas=5, upscale_delay_s=3, downscale_delay_s=40)
    deployment = build(scale)._bound_deployment
    scaling = deployment._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas) == (2, 5)
    assert scaling.get_target_ongoing_requests() == 8
    assert (scaling.upscale_delay_s, scaling.downscale_delay_s) == (3, 40)
    assert deployment.max_ongoing_requests == 58
    assert deployment._deployment_config.graceful_shutdown_timeout_s > Settings().drain_timeout_s
    assert deployment.ray_actor_options["num_cpus"] == 3
    assert deployment.init_args == (Settings(),)


def test_one_replica_for_each_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("T2W_DEVICE", "cuda")
    assert build(Scale())._bound_deployment.ray_actor_options["num_gpus"] == 1


def test_scale_is_ordered() -> None:
    with pytest.raises(ValidationError, match="max_replicas is 1: allowed is at least min_replicas"):
        Scale(min_replicas=2, max_replicas=1)


@pytest.fixture
def replica(model: FakeModel, monkeypatch: pytest.MonkeyPatch) -> Worker:
    monkeypatch.setattr(ray_app, "Engine", lambda settings: Engine(settings, load=lambda _: model))
    monkeypatch.setattr(ray_app, "configure_logging", lambda _: None)
    return Worker(Settings())


async def test_replica_is_healthy_once_it_is_warm(replica: Worker, model: FakeModel) -> None:
    app = replica.__serve_build_asgi_app__()
    assert isinstance(app, FastAPI)
    model.gate.clear()
    async with app.router.lifespan_context(app):
        checking = asyncio.create_task(replica.check_health())
        await asyncio.sleep(0.1)
        assert not checking.done(), "requests would meet a model that is not loaded"
        model.gate.set()
        await asyncio.wait_for(checking, PATIENCE_S)


async def test_replica_with_a_lost_device_is_replaced(replica: Worker, model: FakeModel) -> None:
    model.lost = True
    app = replica.__serve_build_asgi_app__()
    async with app.router.lifespan_context(app):
        with pytest.raises(RuntimeError, match="device lost"):
            await asyncio.wait_for(replica.check_health(), PATIENCE_S)
