"""GET /info tells a client all that it needs to choose."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.service.fakes import FakeModel
from tests.service.live import Live, serve
from tests.service.test_bad_input import assert_problem
from tests.service.tiny import NAMES, write_tiny_checkpoint, write_tower_checkpoint
from tests.tiny import TINY_DIM, save_tiny_checkpoint
from text2weight.checkpoint import bundled_checkpoint
from text2weight.denoiser import DenoiserConfig
from text2weight.diffusion import NoiseSchedule
from text2weight.text_encoder import VOCABULARY, read_vocabulary
from text2weight_service.classify import MAX_PICTURES
from text2weight_service.engine import Engine
from text2weight_service.info import describe_service
from text2weight_service.model import load_model
from text2weight_service.schemas import MAX_SAMPLES
from text2weight_service.settings import Settings


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with serve(load_model, checkpoint=str(write_tower_checkpoint(tmp_path_factory.mktemp("tower")))) as running:
        yield running


@pytest.fixture(scope="module")
def info(tower: Live) -> dict[str, Any]:
    answer: dict[str, Any] = tower.client.get("/info").json()
    return answer


def test_model(info: dict[str, Any]) -> None:
    model = info["model"]
    assert len(model["checkpoint"]) == len(model["text_encoder_fingerprint"]) == 64
    assert model["head"] == {
        "input_dim": 12, "hidden_dim": 4, "output_dim": 16, "bias": True, "activation": "gelu", "logits": "cosine",
    }  # fmt: skip
    assert model["samplers"] == ["mean", "ddpm", "ddim", "dpmpp_2m"]
    assert (model["sampler"], model["steps"], model["template"]) == ("mean", 1, "a {}")
    assert model["backbone"] == {"name": "none"}


def test_choices(info: dict[str, Any]) -> None:
    assert info["phase"] == "ready"
    assert info["precisions"] == ["fp32", "fp16", "bf16"]
    assert info["fuse_methods"] == ["text", "average", "git-rebasin", "task-arithmetic", "ties"]
    assert info["formats"] == ["text2weight.head/1", "text2weight.heads/1"]
    assert info["libraries"]["torch"] == torch.__version__.split("+")[0]
    assert info["settings"]["max_batch_size"] == 32


def test_known_classes(info: dict[str, Any], tmp_path: Path) -> None:
    assert info["known_classes"] == ["apple, pomme", "bus"]
    with serve(load_model, checkpoint=str(write_tiny_checkpoint(tmp_path / "table"))) as table:
        answer = table.client.get("/info").json()
    assert answer["known_classes"] == list(NAMES)
    assert answer["features"]["descriptions"] is False


def test_an_encoder_of_any_text_names_no_classes(shared_live: Live) -> None:
    answer = shared_live.client.get("/info").json()
    assert answer["known_classes"] is None
    assert answer["features"] == {
        "guidance": False, "descriptions": True, "enhance_reads_given": False, "classify": False,
    }  # fmt: skip


def test_features_are_the_checkpoints(tmp_path: Path) -> None:
    model = FakeModel()
    model.config.denoiser = DenoiserConfig(null_condition=True, reads_given=True)
    model.path = tmp_path
    (tmp_path / "backbone").mkdir()
    (tmp_path / "backbone" / "config.json").touch()
    features = describe_service(model, Settings(), "ready", "1").features
    assert (features.guidance, features.enhance_reads_given, features.classify) == (True, True, True)


def test_limits_are_kept(tower: Live, info: dict[str, Any]) -> None:
    """A value at its limit is not refused for it, and the next one is."""
    limits = info["limits"]
    assert limits["request_timeout_s"] == 30
    assert limits["max_body_bytes"] == 262_144

    def refused(path: str = "/generate", **fields: Any) -> bool:
        body = {"classes": ["apple", "bus"], "seed": 1, "sampler": "ddim", "steps": 1, "deadline_ms": 1, **fields}
        return tower.client.post(path, json=body).status_code == 422

    assert not refused(steps=limits["max_steps"])
    assert refused(steps=limits["max_steps"] + 1)
    assert not refused(samples=limits["max_samples"])
    assert refused(samples=limits["max_samples"] + 1)
    assert not refused(seed=limits["max_seed"])
    assert refused(seed=limits["max_seed"] + 1)
    assert not refused(classes=["x" * limits["max_name_length"], "bus"])
    assert refused(classes=["x" * (limits["max_name_length"] + 1), "bus"])
    assert not refused(classes=[f"c{i}" for i in range(limits["max_classes"])])
    assert refused(classes=[f"c{i}" for i in range(limits["max_classes"] + 1)])
    assert not refused(prompt_template="{}".ljust(limits["max_template_length"], "x"))
    assert refused(prompt_template="{}".ljust(limits["max_template_length"] + 1, "x"))
    long = "x" * limits["max_description_length"]
    assert not refused(descriptions={"apple": ["x"] * limits["max_descriptions"], "bus": long})
    assert refused(descriptions={"apple": ["x"] * (limits["max_descriptions"] + 1), "bus": long})
    assert refused(descriptions={"apple": "x", "bus": long + "x"})
    assert (limits["max_samples"], limits["max_pictures"]) == (MAX_SAMPLES, MAX_PICTURES)


def test_limits_of_tasks_are_kept(tower: Live, info: dict[str, Any]) -> None:
    limits = info["limits"]

    def refused(weight: float, tasks: int = 2) -> bool:
        body = {"tasks": [{"classes": ["apple", "bus"], "weight": weight}] * tasks, "seed": 1, "deadline_ms": 1}
        return tower.client.post("/fuse", json=body).status_code == 422

    assert not refused(limits["max_task_weight"])
    assert refused(limits["max_task_weight"] * 1.001)
    assert not refused(1.0, limits["max_tasks"])
    assert refused(1.0, limits["max_tasks"] + 1)


def test_exact_steps_are_the_only_ones(tower: Live, info: dict[str, Any]) -> None:
    def refused(sampler: str, steps: int) -> bool:
        body = {"classes": ["apple", "bus"], "seed": 1, "sampler": sampler, "steps": steps}
        return tower.client.post("/generate", json=body).status_code == 422

    exact = info["limits"]["exact_steps"]
    assert exact == {"mean": 1}
    for sampler in info["model"]["samplers"]:
        assert not refused(sampler, exact.get(sampler, 1))
        assert refused(sampler, exact.get(sampler, 1) + 1) is (sampler in exact)


def test_largest_guidance_scale(tmp_path: Path) -> None:
    denoiser = DenoiserConfig(width=16, depth=2, heads=2, embedding_dim=TINY_DIM, null_condition=True)
    save_tiny_checkpoint(tmp_path / "guided", denoiser=denoiser)
    with serve(load_model, checkpoint=str(tmp_path / "guided")) as guided:
        most = guided.client.get("/info").json()["limits"]["max_guidance_scale"]
        assert guided.generate("apple", "bus", guidance_scale=most).status_code == 200
        assert guided.generate("apple", "bus", guidance_scale=most + 0.1).status_code == 422


def test_short_schedules_bound_the_steps() -> None:
    model = FakeModel()
    model.config.schedule = NoiseSchedule(num_timesteps=40)
    assert describe_service(model, Settings(), "ready", "1").limits.max_steps == 40
    assert describe_service(model, Settings(max_steps=7), "ready", "1").limits.max_steps == 7


def test_bundled_checkpoint_names_what_its_text_tower_was_trained_on() -> None:
    vocabulary = read_vocabulary(bundled_checkpoint() / "text_encoder" / VOCABULARY)
    assert vocabulary is not None
    assert len(vocabulary.names) > 2000
    assert vocabulary.templates == ("a photo of a {}", "a {}")
    assert "Maple_Tree" in vocabulary
    assert "quokka wearing a hat" not in vocabulary


def test_starting() -> None:
    class Unstarted(Engine):
        def start(self) -> None:
            pass

    with serve(lambda _: FakeModel(), engine_class=Unstarted, wait_until_ready=False) as live:
        assert_problem(live.client.get("/info"), 503, "starting")
        assert_problem(live.generate("apple", "bus"), 503, "starting")
        assert_problem(live.client.post("/enhance"), 503, "starting")
        assert_problem(live.client.post("/fuse"), 503, "starting")
        assert_problem(live.client.post("/generate/stream", json={"classes": ["a", "b"]}), 503, "starting")
