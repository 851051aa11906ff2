"""The service around the real generator with a small random checkpoint."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from tests.service.live import Live, serve, wait_for
from tests.service.tiny import NAMES, write_tiny_checkpoint
from text2weight.artifact import HeadArtifact, read_head
from text2weight.generator import Generator
from text2weight_service.model import load_model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def real(checkpoint: Path) -> Iterator[Live]:
    with serve(load_model, checkpoint=str(checkpoint), head_cache_mb=0) as running:
        yield running


def assert_close(one: HeadArtifact, other: HeadArtifact) -> None:
    assert one.metadata == other.metadata
    assert torch.allclose(one.class_embeddings, other.class_embeddings, atol=1e-5)
    for name, tensor in one.tensors.items():
        assert torch.allclose(tensor, other.tensors[name], atol=1e-5), name


@pytest.mark.parametrize(("sampler", "steps"), [("mean", 1), ("ddpm", 5), ("ddim", 4), ("dpmpp_2m", 4)])
def test_answer_equals_the_library(real: Live, checkpoint: Path, sampler: str, steps: int) -> None:
    response = real.generate(*NAMES[:5], seed=11, sampler=sampler, steps=steps)
    assert response.status_code == 200
    expected = Generator.load(checkpoint).generate(NAMES[:5], seed=11, sampler=sampler, steps=steps)
    assert_close(read_head(response.content), expected)


def test_defaults_are_the_checkpoints(real: Live) -> None:
    head = read_head(real.generate("thing 1", "thing 2").content)
    assert (head.metadata["sampler"], head.metadata["steps"]) == ("mean", "1")
    assert head.metadata["checkpoint"] == real.client.get("/info").json()["model"]["checkpoint"]


def test_batched_equals_single(real: Live) -> None:
    """Requests of different size, sampler and step count in one batch do not touch each other."""
    requests = [
        {
            "classes": NAMES[i : i + 2 + i % 7],
            "seed": i,
            **({"sampler": "ddim", "steps": 1 + i % 5} if i % 2 else {"sampler": "mean"}),
        }
        for i in range(16)
    ]
    alone = [real.client.post("/generate", json=request) for request in requests]
    before = real.metric("t2w_batch_size_count")
    with ThreadPoolExecutor(16) as pool:
        for _ in range(3):
            together = list(pool.map(lambda request: real.client.post("/generate", json=request), requests))
            for one, other in zip(alone, together, strict=True):
                assert one.status_code == other.status_code == 200
                assert_close(read_head(one.content), read_head(other.content))
    assert real.metric("t2w_batch_size_count") - before < 48, "no two requests ever shared a batch"


def test_mean_takes_one_step(real: Live) -> None:
    response = real.generate("thing 1", "thing 2", sampler="mean", steps=3)
    assert response.status_code == 422
    assert response.json()["errors"][0]["field"] == "steps"


def test_step_count_without_a_sampler_is_the_librarys_choice(real: Live) -> None:
    head = read_head(real.generate("thing 1", "thing 2", steps=3).content)
    assert (head.metadata["sampler"], head.metadata["steps"]) == ("ddim", "3")


def test_damaged_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    copy = tmp_path / "checkpoint"
    copy.mkdir()
    for file in checkpoint.iterdir():
        content = bytearray(file.read_bytes())
        if file.suffix == ".safetensors":
            content[-1] ^= 1
        (copy / file.name).write_bytes(content)
    with serve(load_model, checkpoint=str(copy)) as live:
        wait_for(lambda: live.engine.failure is not None, "failure to load")
        assert "hash" in str(live.engine.failure)
