"""The good path of POST /generate, and what goes around it."""

import json
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from safetensors.torch import load

from tests.service.fakes import FakeModel, unit_vector
from tests.service.heads import same_head
from tests.service.live import Live, serve
from tests.service.test_bad_input import assert_problem
from tests.service.tiny import write_tower_checkpoint
from text2weight.artifact import PRECISIONS, HeadArtifact, read_head
from text2weight.strict_safetensors import read_header
from text2weight_service.model import load_model

DESCRIPTIONS = {"Apple": "a round red fruit", "bus": ["a long vehicle", "it has many seats"]}


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A service around a tiny random checkpoint with a text tower, which knows apple and bus."""
    with serve(load_model, checkpoint=str(write_tower_checkpoint(tmp_path_factory.mktemp("tower")))) as running:
        yield running


def test_no_request_changes_threads_on_its_way_to_the_engine() -> None:
    before = set(threading.enumerate())
    with serve(lambda _: FakeModel()) as fresh:
        assert fresh.generate("apple", "bus", seed=1).status_code == 200
        pool = [one.name for one in set(threading.enumerate()) - before if one.name.startswith("AnyIO")]
        assert pool == []


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


def test_the_network_runs_on_a_thread_of_its_own(live: Live, model: FakeModel) -> None:
    live.generate("apple", "bus")
    assert model.threads == {"t2w-lane-0"}


def test_docs(live: Live) -> None:
    assert "swagger" in live.client.get("/docs").text.lower()


class TestSamples:
    def test_are_the_heads_of_following_seeds(self, live: Live) -> None:
        response = live.generate("apple", "bus", seed=2**62, samples=3)
        assert response.headers["content-disposition"] == f'attachment; filename="head-{2**62}.safetensors"'
        tensors = load(response.content)
        for i in range(3):
            single = read_head(live.generate("apple", "bus", seed=2**62 + i).content)
            for name, tensor in single.tensors.items():
                assert tensors[name][i].equal(tensor), name
            assert tensors["class_embeddings"].equal(single.class_embeddings)
        metadata = read_header(response.content).metadata
        assert metadata["format"] == "text2weight.heads/1"
        assert json.loads(metadata["seeds"]) == [2**62, 2**62 + 1, 2**62 + 2]
        assert "seed" not in metadata

    def test_run_together(self, live: Live, model: FakeModel) -> None:
        live.generate("apple", "bus", samples=16)
        assert sum(len(batch) for batch in model.batches) == 16
        assert len(model.batches) < 16

    def test_one_is_a_plain_head(self, live: Live) -> None:
        assert live.generate("apple", "bus", seed=1, samples=1).content == live.generate("apple", "bus", seed=1).content

    def test_in_half_precision(self, live: Live) -> None:
        tensors = load(live.generate("apple", "bus", seed=1, samples=2, precision="bf16").content)
        assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}

    def test_drawn_seeds_are_exact_in_every_json_reader(self, live: Live) -> None:
        seeds = json.loads(read_header(live.generate("apple", "bus", samples=16).content).metadata["seeds"])
        assert seeds == list(range(seeds[0], seeds[0] + 16))
        assert seeds[-1] < 2**53

    def test_last_seed(self, live: Live) -> None:
        assert live.generate("apple", "bus", seed=2**63 - 2, samples=2).status_code == 200
        detail = assert_problem(live.generate("apple", "bus", seed=2**63 - 2, samples=3), 422, "invalid-input", "seed")
        assert str(2**63 - 3) in detail

    def test_one_that_fails_fails_all(self, live: Live) -> None:
        assert_problem(live.generate("broken", "bus", samples=2), 500, "internal")
        assert live.generate("apple", "bus").status_code == 200


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", "F32"), ("fp16", "F16"), ("bf16", "BF16")])
def test_precision(live: Live, precision: str, dtype: str) -> None:
    exact = read_head(live.generate("apple", "bus", seed=1).content)
    data = live.generate("apple", "bus", seed=1, precision=precision).content
    assert {entry.dtype for entry in read_header(data).entries.values()} == {dtype}
    head = read_head(data)
    for name, tensor in exact.tensors.items():
        assert head.tensors[name].equal(tensor.to(PRECISIONS[precision]).float())  # type: ignore[index]
    assert head.metadata == exact.metadata | ({} if precision == "fp32" else {"precision": precision})


class TestText:
    """What the denoiser and the classifier read; the real model, because the fake one reads class names only."""

    @pytest.fixture
    def heads(self, tower: Live) -> Callable[..., HeadArtifact]:
        def make(**fields: Any) -> HeadArtifact:
            response = tower.generate("apple", "bus", seed=1, **fields)
            assert response.status_code == 200, response.text
            return read_head(response.content)

        return make

    def test_template(self, heads: Callable[..., HeadArtifact]) -> None:
        plain, other = heads(), heads(prompt_template="a photo of one {}, outdoors")
        assert other.metadata["template"] == "a photo of one {}, outdoors"
        assert not other.class_embeddings.allclose(plain.class_embeddings, atol=1e-3)
        assert heads(prompt_template="a {}").class_embeddings.allclose(plain.class_embeddings)

    def test_descriptions_condition_the_denoiser_alone(self, heads: Callable[..., HeadArtifact]) -> None:
        plain, described = heads(), heads(descriptions=DESCRIPTIONS)
        assert described.class_embeddings.allclose(plain.class_embeddings, atol=1e-6)
        assert not described.tensors["linear1.weight"].allclose(plain.tensors["linear1.weight"], atol=1e-4)
        assert described.metadata["condition_text"].startswith("descriptions sha256:")

    def test_descriptions_in_the_classifier(self, heads: Callable[..., HeadArtifact]) -> None:
        described = heads(descriptions=DESCRIPTIONS, describe_classifier=True)
        assert not described.class_embeddings.allclose(heads().class_embeddings, atol=1e-3)
        assert described.metadata["class_text"] == described.metadata["condition_text"]

    def test_guidance(self, heads: Callable[..., HeadArtifact], tower: Live) -> None:
        assert heads(guidance_scale=1).metadata == heads().metadata
        response = tower.generate("apple", "bus", guidance_scale=2.5)
        assert "condition dropout" in assert_problem(response, 422, "invalid-input", "guidance_scale")

    def test_known_words_carry_no_warning(self, tower: Live) -> None:
        response = tower.generate("Apple", "BUS", seed=1)
        assert "x-t2w-warnings" not in response.headers
        assert "warnings" not in read_head(response.content).metadata

    @pytest.mark.parametrize(
        ("fields", "expected"),
        [
            ({"classes": ["apple", "quokka", "okapi"]}, ["'quokka'", "'okapi'"]),
            ({"prompt_template": "one {}"}, ["prompt_template 'one {}'"]),
            ({"descriptions": DESCRIPTIONS}, ["no descriptions"]),
            ({"classes": ["apple", "quokka"], "samples": 2}, ["'quokka'"]),
        ],
    )
    def test_warnings(self, tower: Live, fields: dict[str, Any], expected: list[str]) -> None:
        response = tower.client.post("/generate", json={"classes": ["apple", "bus"], "seed": 1, **fields})
        assert response.headers["x-t2w-warnings"] == str(len(expected))
        warnings = json.loads(read_header(response.content).metadata["warnings"])
        assert len(warnings) == len(expected)
        assert all(part in warning for part, warning in zip(expected, warnings, strict=True))


def test_too_many_descriptions(live: Live) -> None:
    descriptions = {"apple": ["red"] * 17, "bus": "long"}
    response = live.generate("apple", "bus", descriptions=descriptions)
    assert "at most 16" in assert_problem(response, 422, "invalid-input", "descriptions")


class TestCaching:
    def test_entity_tag(self, live: Live, model: FakeModel) -> None:
        first = live.generate("apple", "bus", seed=1)
        assert first.headers["cache-control"] == "private, no-cache"
        assert first.headers["vary"] == "Authorization"
        tag = first.headers["etag"]
        assert re.fullmatch(r'"[0-9a-f]{64}"', tag)
        computed = len(model.batches)
        for given in (tag, f"W/{tag}", f'"x", {tag}'):
            again = live.client.post(
                "/generate", json={"classes": ["apple", "bus"], "seed": 1}, headers={"If-None-Match": given}
            )
            assert again.status_code == 304
            assert again.content == b""
            assert again.headers["etag"] == tag
        assert len(model.batches) == computed

    @pytest.mark.parametrize("given", ["*", '"x"', "", "garbage", '""'])
    def test_other_tags_do_not_match(self, live: Live, given: str) -> None:
        body = {"classes": ["apple", "bus"], "seed": 1}
        assert live.client.post("/generate", json=body, headers={"If-None-Match": given}).status_code == 200

    def test_every_field_that_changes_the_answer_changes_the_tag(self, live: Live) -> None:
        changes: list[dict[str, Any]] = [
            {},
            {"classes": ["bus", "apple"]},
            {"seed": 2},
            {"sampler": "ddim"},
            {"sampler": "ddim", "steps": 2},
            {"prompt_template": "the {}"},
            {"descriptions": DESCRIPTIONS},
            {"descriptions": DESCRIPTIONS, "describe_classifier": True},
            {"precision": "fp16"},
            {"samples": 2},
        ]
        bodies = [{"classes": ["apple", "bus"], "seed": 1, **change} for change in changes]
        tags = [live.client.post("/generate", json=body).headers["etag"] for body in bodies]
        assert len(set(tags)) == len(changes)
        assert live.generate("apple", "bus", seed=1, deadline_ms=9000).headers["etag"] == tags[0]

    def test_a_drawn_seed_is_not_to_be_kept(self, live: Live) -> None:
        headers = live.generate("apple", "bus").headers
        assert headers["cache-control"] == "no-store"
        assert "etag" not in headers


class TestDeadline:
    def test_is_kept(self, live: Live, model: FakeModel) -> None:
        model.gate.clear()
        try:
            response = live.generate("apple", "bus", deadline_ms=100)
        finally:
            model.gate.set()
        assert "deadline_ms" in assert_problem(response, 504, "deadline")

    @pytest.mark.parametrize("deadline_ms", [0, -1, 30_001, 10**9])
    def test_out_of_range(self, live: Live, deadline_ms: int) -> None:
        response = live.generate("apple", "bus", deadline_ms=deadline_ms)
        assert_problem(response, 422, "invalid-input", "deadline_ms")
