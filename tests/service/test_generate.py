"""The good path of POST /generate, and what goes around it."""

import json
import re

import pytest

from tests.service.fakes import FakeModel, unit_vector
from tests.service.heads import same_head
from tests.service.live import Live
from text2weight.artifact import read_head


def test_answer_is_a_head_artifact(live: Live) -> None:
    response = live.generate("apple", "bus", "lizard", seed=7)
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/octet-stream"
    assert response.headers["content-disposition"] == 'attachment; filename="head-7.safetensors"'
    head = read_head(response.content)
    assert head.classes == ("apple", "bus", "lizard")
    assert head.metadata["seed"] == "7"
    assert head.metadata["sampler"] == "mean"
    assert head.class_embeddings[1].allclose(unit_vector("a bus"))


def test_equal_requests_give_equal_heads(live: Live) -> None:
    first, again = (live.generate("apple", "bus", seed=3).content for _ in range(2))
    assert same_head(first, again)
    assert not same_head(first, live.generate("apple", "bus", seed=4).content)


def test_seed_is_drawn_and_stated(live: Live) -> None:
    heads = [read_head(live.generate("apple", "bus").content) for _ in range(2)]
    seeds = [int(head.metadata["seed"]) for head in heads]
    assert seeds[0] != seeds[1]
    assert all(0 <= seed < 2**53 for seed in seeds)
    repeated = live.generate("apple", "bus", seed=seeds[0])
    assert read_head(repeated.content).tensors["linear1.bias"].equal(heads[0].tensors["linear1.bias"])


def test_names_are_normalised(live: Live) -> None:
    head = read_head(live.generate("  sea_lion ", "bus\tstop").content)
    assert head.classes == ("sea lion", "bus stop")


@pytest.mark.parametrize("name", ["🍎🚌", "سحلية", "שלום עולם", "naïve café", "日本語", "👩‍👩‍👧‍👦"])
def test_any_script_is_valid(shared_live: Live, name: str) -> None:
    response = shared_live.generate(name, "bus")
    assert response.status_code == 200
    assert read_head(response.content).classes == (name, "bus")


def test_body_is_utf8_also_when_the_charset_is_stated(live: Live) -> None:
    body = json.dumps({"classes": ["Käse", "bus"]}, ensure_ascii=False).encode()
    response = live.client.post(
        "/generate", content=body, headers={"Content-Type": 'Application/JSON; charset="UTF-8"'}
    )
    assert read_head(response.content).classes == ("Käse", "bus")


def test_server_timing(live: Live) -> None:
    timing = live.generate("apple", "bus").headers["server-timing"]
    assert re.fullmatch(r"queue;dur=[\d.]+, encode;dur=[\d.]+, sample;dur=[\d.]+", timing)


@pytest.mark.parametrize("given", ["abc-1.2_Z", "x" * 64])
def test_request_id_is_echoed(live: Live, given: str) -> None:
    response = live.client.post("/generate", json={"classes": ["apple", "bus"]}, headers={"X-Request-ID": given})
    assert response.headers["x-request-id"] == given


@pytest.mark.parametrize("given", ["", "x" * 65, "a b", 'a"}', "a;b", "é".encode()])
def test_unsafe_request_id_is_replaced(live: Live, given: str | bytes) -> None:
    response = live.client.get("/health/live", headers={"X-Request-ID": given})
    assert re.fullmatch(r"[0-9a-f]{32}", response.headers["x-request-id"])


def test_known_prompts_are_not_encoded_again(live: Live, model: FakeModel) -> None:
    live.generate("apple", "bus")
    live.generate("bus", "lizard")
    assert [text for text in model.text_encoder.encoded if text not in ("a cat", "a dog")] == [
        "a apple",
        "a bus",
        "a lizard",
    ]


def test_model_runs_on_its_own_thread(live: Live, model: FakeModel) -> None:
    live.generate("apple", "bus")
    assert model.threads == {"t2w-model"}


def test_info(live: Live) -> None:
    info = live.client.get("/info").json()
    assert info["phase"] == "ready"
    assert info["model"]["checkpoint"] == "c0ffee"
    assert info["model"]["head"]["hidden_dim"] == 2
    assert info["model"]["samplers"] == ["mean", "ddpm", "ddim", "dpmpp_2m"]
    assert info["settings"]["max_batch_size"] == 32


def test_docs(live: Live) -> None:
    assert "swagger" in live.client.get("/docs").text.lower()
