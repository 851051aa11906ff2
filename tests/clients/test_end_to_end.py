"""The client against the real service with the bundled model."""

from __future__ import annotations

import asyncio
import io
import json
from typing import Any

import httpx
import numpy as np
import pytest
from typer.testing import CliRunner

from tests.patience import PATIENCE_S
from text2weight_client import (
    AsyncClient,
    Client,
    DoneEvent,
    FuseTask,
    GeneratedHead,
    HeadEvent,
    InvalidRequestError,
    ProgressEvent,
)
from text2weight_client.cli import app

# A service process that imports torch: seconds on an idle machine, minutes on a crowded one.
CLASSES = ("apple", "bus", "lizard")


@pytest.fixture(scope="module")
def description(live_url: str) -> dict[str, Any]:
    """The service's own OpenAPI document."""
    document: dict[str, Any] = httpx.get(f"{live_url}/openapi.json", timeout=PATIENCE_S).json()
    return document


@pytest.fixture
def client(live_url: str) -> Any:
    with Client(live_url, timeout_s=25) as connected:
        yield connected


def require(description: dict[str, Any], what: str) -> None:
    """Skip what the service does not have: a path, or a field as `Schema.field`."""
    schema, _, field = what.partition(".")
    known = description["components"]["schemas"].get(schema, {}).get("properties", {})
    if what not in description["paths"] and field not in known:
        pytest.skip(f"the service's OpenAPI document has no {what}")


def same(one: GeneratedHead, other: GeneratedHead, atol: float = 1e-5) -> None:
    assert one.classes == other.classes
    for name, tensor in one.tensors.items():
        np.testing.assert_allclose(tensor, other.tensors[name], atol=atol, err_msg=name)


def differ(one: GeneratedHead, other: GeneratedHead) -> bool:
    return any(not np.allclose(tensor, other.tensors[name], atol=1e-4) for name, tensor in one.tensors.items())


def test_both_clients_get_the_same_head(client: Client, live_url: str) -> None:
    async def ask() -> GeneratedHead:
        async with AsyncClient(live_url) as asynchronous:
            await asynchronous.wait_until_ready(10)
            return await asynchronous.generate(CLASSES, seed=7, steps=4, sampler="ddim")

    head = client.generate(CLASSES, seed=7, steps=4, sampler="ddim")
    same(head, asyncio.run(ask()))
    assert head.metadata["seed"] == "7"
    assert head.response is not None
    assert head.response.request_id
    assert head.response.server_timing_ms["sample"] > 0


def test_refusal_names_the_field(client: Client) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        client.generate(["apple", "Apple"])
    assert (caught.value.kind, caught.value.errors[0]["field"]) == ("invalid-input", "classes[1]")
    assert caught.value.request_id


def test_raw_multipart_is_taken(client: Client) -> None:
    head = client.generate(CLASSES, seed=7)
    fields = {"head": ("h", head.to_bytes()), "request": (None, '{"strength": 0}', "application/json")}
    body = httpx.Request("POST", "http://host", files=fields)
    response = client.request(
        "POST", "/enhance", content=body.read(), headers={"Content-Type": body.headers["content-type"]}
    )
    same(GeneratedHead.from_bytes(response.content), head)


def test_many_heads(client: Client) -> None:
    lists = [[*CLASSES[:2], name] for name in ("cup", "lamp", "tiger", "train", "whale")]
    heads = client.generate_many(lists, concurrency=4, seed=1)
    assert [list(head.classes) for head in heads] == lists
    same(heads[2], client.generate(lists[2], seed=1))


def test_every_timeout_gives_a_deadline_that_is_taken_or_none(live_url: str) -> None:
    with Client(live_url, timeout_s=29.5) as patient, Client(live_url, timeout_s=10_000) as endless:
        same(patient.generate(CLASSES, seed=1), endless.generate(CLASSES, seed=1))


def test_info(client: Client, description: dict[str, Any]) -> None:
    assert client.info().model.samplers == ["mean", "ddpm", "ddim", "dpmpp_2m"]
    require(description, "Info.limits")
    info = client.info()
    assert info.limits.max_samples == 16
    assert info.limits.request_timeout_s == 30
    assert info.precisions == ("fp32", "fp16", "bf16")
    assert info.fuse_methods[0] == "text"
    assert isinstance(info.features.guidance, bool)
    assert info.known_classes is None or len(info.known_classes) > 2


def test_samples_are_the_heads_of_successive_seeds(client: Client, description: dict[str, Any]) -> None:
    require(description, "GenerateRequest.samples")
    heads = client.generate(CLASSES, samples=3, seed=5, steps=4, sampler="ddim")
    assert heads.seeds == (5, 6, 7)
    for head in heads:
        same(head, client.generate(CLASSES, seed=int(head.metadata["seed"]), steps=4, sampler="ddim"))


@pytest.mark.parametrize(("precision", "atol"), [("fp16", 1e-3), ("bf16", 1e-2)])
def test_precision(client: Client, description: dict[str, Any], precision: Any, atol: float) -> None:
    require(description, "GenerateRequest.precision")
    whole, small = client.generate(CLASSES, seed=2), client.generate(CLASSES, seed=2, precision=precision)
    assert (small.precision, whole.precision) == (precision, "fp32")
    assert len(small.to_bytes()) < 0.6 * len(whole.to_bytes())
    same(small, whole, atol)


def test_prompt_template(client: Client, description: dict[str, Any]) -> None:
    require(description, "GenerateRequest.prompt_template")
    plain, other = client.generate(CLASSES, seed=2), client.generate(CLASSES, seed=2, prompt_template="the {}")
    assert other.metadata["template"] == "the {}"
    assert differ(plain, other)


def test_descriptions_and_guidance_as_info_promises(client: Client, description: dict[str, Any]) -> None:
    require(description, "GenerateRequest.descriptions")
    features = client.info().features
    texts: dict[str, Any] = {"apple": "a round red fruit", "bus": ["a long vehicle"], "lizard": "a small reptile"}
    for promised, options in (
        (features.descriptions, {"descriptions": texts}),
        (features.guidance, {"guidance_scale": 2.0}),
    ):
        if promised:
            assert differ(client.generate(CLASSES, seed=2), client.generate(CLASSES, seed=2, **options))
        else:
            with pytest.raises(InvalidRequestError, match=next(iter(options))):
                client.generate(CLASSES, seed=2, **options)


def test_fuse_by_text_is_the_head_of_the_union(client: Client, description: dict[str, Any]) -> None:
    require(description, "/fuse")
    head = client.fuse([["apple", "bus"], ["lizard", "bus"]], seed=3)
    same(head, client.generate(CLASSES, seed=3))
    weighted = client.fuse([FuseTask(["apple", "bus"], 5.0), FuseTask(["lizard", "bus"], 1.0)], seed=3)
    assert weighted.classes == CLASSES


def test_fuse_by_averaging_is_the_mean_of_the_heads(client: Client, description: dict[str, Any]) -> None:
    require(description, "/fuse")
    one, other = client.generate(["apple", "bus"], seed=1), client.generate(["cup", "lamp"], seed=2)
    merged = client.fuse([one, other], method="average")
    assert merged.classes == ("apple", "bus", "cup", "lamp")
    for name, tensor in merged.tensors.items():
        np.testing.assert_allclose(tensor, (one.tensors[name] + other.tensors[name]) / 2, atol=1e-5, err_msg=name)


def test_enhance_with_no_strength_gives_the_head_back(client: Client, description: dict[str, Any]) -> None:
    require(description, "/enhance")
    head = client.generate(CLASSES, seed=1, steps=4, sampler="ddim")
    same(client.enhance(head, 0.0, seed=5), head, 1e-4)
    better = client.enhance(head, 0.5, seed=5, steps=4, sampler="ddim")
    assert better.classes == CLASSES
    assert differ(better, head)


def test_stream_ends_with_the_head_of_generate(client: Client, description: dict[str, Any]) -> None:
    require(description, "/generate/stream")
    events = list(client.stream(CLASSES, heads_every=2, seed=4, steps=5, sampler="ddim"))
    progress = [event for event in events if isinstance(event, ProgressEvent)]
    assert [(event.step, event.steps) for event in progress] == [(step, 5) for step in range(1, 6)]
    assert [event.timestep for event in progress] == sorted((event.timestep for event in progress), reverse=True)
    assert [event.step for event in events if isinstance(event, HeadEvent)] == [2, 4]
    assert isinstance(events[-1], DoneEvent)
    same(events[-1].head, client.generate(CLASSES, seed=4, steps=5, sampler="ddim"))


def test_classify(client: Client, description: dict[str, Any]) -> None:
    require(description, "/classify")
    from PIL import Image
    from skimage import data

    from text2weight.backbone import load_backbone
    from text2weight.checkpoint import bundled_checkpoint

    picture, encoded = Image.fromarray(data.coffee()), io.BytesIO()
    picture.save(encoded, "PNG")
    head = client.generate(["cup", "clock", "motorcycle", "rocket"], seed=0)
    (image,) = client.classify(head, [encoded.getvalue()])
    features = load_backbone(bundled_checkpoint() / "backbone").features([picture]).numpy()
    expected = dict(zip(head.classes, head.predict(features)[0].tolist(), strict=True))
    assert image.filename == "image-0"
    assert [one.name for one in image.classes] == sorted(expected, key=expected.__getitem__, reverse=True)
    assert {one.name: one.probability for one in image.classes} == pytest.approx(expected, abs=1e-3)


def test_commands(live_url: str, tmp_path: Any, description: dict[str, Any]) -> None:
    runner, environment = CliRunner(), {"T2W_URL": live_url, "COLUMNS": "160"}
    shown = runner.invoke(app, ["info", "--json"], env=environment)
    assert json.loads(shown.stdout)["model"]["template"] == "a {}"
    path = str(tmp_path / "head.safetensors")
    assert runner.invoke(app, ["generate", *CLASSES, "-o", path, "--timeout", "29"], env=environment).exit_code == 0
    require(description, "/generate/stream")
    watched = runner.invoke(app, ["generate", *CLASSES, "-o", path, "--watch"], env=environment)
    assert watched.exit_code == 0, watched.output
