"""Heads for names that training never saw, on every way out of the service."""

import base64
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load

from tests.service.forms import post
from tests.service.live import Live, serve
from tests.service.test_real_model import assert_close
from tests.service.tiny import NAMES, write_tiny_checkpoint
from text2weight.artifact import read_head
from text2weight.generator import Generator
from text2weight.strict_safetensors import read_header
from text2weight_service.model import load_model

KNOWN, OUTSIDE = NAMES[:4], NAMES[20:24]
HALF = (*KNOWN[:2], *OUTSIDE[:2])
SETTINGS = {"reach": 0.25, "temperature": 0.5}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "model", classes=NAMES[:20], outside=SETTINGS)


@pytest.fixture(scope="module")
def live(checkpoint: Path) -> Iterator[Live]:
    with serve(load_model, checkpoint=str(checkpoint)) as running:
        yield running


@pytest.fixture(scope="module")
def library(checkpoint: Path) -> Generator:
    return Generator.load(checkpoint)


def test_info_tells_how_they_are_treated(live: Live, shared_live: Live) -> None:
    assert live.client.get("/info").json()["model"]["outside"] == SETTINGS
    assert shared_live.client.get("/info").json()["model"]["outside"] is None


@pytest.mark.parametrize(("classes", "reach"), [(KNOWN, None), (HALF, "0.625"), (OUTSIDE, "0.25")])
@pytest.mark.parametrize("sampling", [{}, {"sampler": "ddpm", "steps": 5}])
def test_generate(live: Live, library: Generator, classes: Any, reach: str | None, sampling: dict[str, Any]) -> None:
    """As the library, computed and from the cache."""
    first, again = (live.generate(*classes, seed=3, **sampling) for _ in range(2))
    head = read_head(first.content)
    assert_close(head, library.generate(classes, seed=3, **sampling))
    assert head.metadata.get("reach") == reach
    assert json.loads(head.metadata.get("outside", "[]")) == [name for name in classes if name in OUTSIDE]
    assert again.content == first.content


def test_neighbours_in_a_batch_keep_their_own(live: Live, library: Generator) -> None:
    tasks = [(KNOWN, HALF, OUTSIDE)[i % 3] for i in range(12)]
    bodies = [{"classes": task, "seed": 100 + i, "sampler": "ddim", "steps": 1 + i % 4} for i, task in enumerate(tasks)]
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda body: live.client.post("/generate", json=body), bodies))
    for body, answer in zip(bodies, answers, strict=True):
        assert_close(read_head(answer.content), library.generate(**body))


def test_every_sample_of_a_stack(live: Live, library: Generator) -> None:
    stack = live.generate(*OUTSIDE, seed=5, samples=3).content
    assert read_header(stack).metadata["reach"] == "0.25"
    for i, weights in enumerate(load(stack)["linear1.weight"]):
        expected = library.generate(OUTSIDE, seed=5 + i).tensors["linear1.weight"]
        torch.testing.assert_close(weights, expected, atol=1e-5, rtol=1e-5)


def test_a_streams_heads(live: Live, library: Generator) -> None:
    body = {"classes": OUTSIDE, "seed": 9, "sampler": "ddpm", "steps": 5}
    with live.client.stream("POST", "/generate/stream", json=body | {"heads_every": 1}) as response:
        events = [json.loads(line.removeprefix("data: ")) for line in response.iter_lines() if line.startswith("data")]
    heads = [read_head(base64.b64decode(event["head"])) for event in events if "head" in event]
    assert all(head.metadata["reach"] == "0.25" for head in heads)
    assert_close(heads[-1], library.generate(**body))


def test_fusing_by_text(live: Live, library: Generator) -> None:
    tasks = [KNOWN[:3], OUTSIDE[:1]]
    response = live.client.post("/fuse", json={"method": "text", "seed": 1, "tasks": [{"classes": t} for t in tasks]})
    head = read_head(response.content)
    assert head.metadata["reach"] == repr(1 - 0.25 * 0.75)
    assert {key: head.metadata.pop(key) for key in ("method", "tasks")}["method"] == "text"
    assert_close(head, library.fuse(tasks, seed=1))


def test_enhancing(live: Live, library: Generator) -> None:
    given = library.generate(OUTSIDE, seed=1)
    body = {"strength": 0.5, "classes": OUTSIDE, "seed": 2, "sampler": "ddim", "steps": 3}
    for method, drawn_back in (("interpolate", True), ("noise", False)):
        asked = {**body, "method": method}
        head = read_head(post(live.client, "/enhance", asked, given.to_bytes()).content)
        assert ("reach" in head.metadata) == drawn_back
        assert_close(head, library.enhance(given, **asked))
