"""POST /fuse: heads for several tasks, from their text or merged from uploaded heads."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from tests.service.fakes import SPEC, FakeModel
from tests.service.forms import a_head, form, post
from tests.service.live import Live, serve
from tests.service.test_bad_input import assert_problem
from tests.service.tiny import NAMES, write_tiny_checkpoint
from text2weight.artifact import HeadArtifact, read_head
from text2weight.generator import Generator
from text2weight.head import HeadSpec
from text2weight.merging import average, git_rebasin, task_arithmetic, ties
from text2weight.weight_tokens import permute_units
from text2weight_service.model import load_model

FRUIT, CARS = ["apple", "pear"], ["bus", "tram", "apple"]
TASKS = [{"classes": FRUIT}, {"classes": CARS}]
ANCHOR = torch.linspace(-1, 1, SPEC.num_parameters)


@pytest.fixture(scope="module")
def fused() -> Iterator[Live]:
    model = FakeModel()
    model.anchor = ANCHOR
    with serve(lambda _: model, max_classes=6) as running:
        yield running


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def real(checkpoint: Path) -> Iterator[Live]:
    with serve(load_model, checkpoint=str(checkpoint)) as running:
        yield running


def heads() -> list[HeadArtifact]:
    return [a_head(*FRUIT, seed=1), a_head(*CARS, seed=2)]


def fuse(live: Live, body: Any, *uploads: HeadArtifact | bytes) -> httpx.Response:
    if not uploads:
        return live.client.post("/fuse", json=body)
    return post(live.client, "/fuse", body, *(h if isinstance(h, bytes) else h.to_bytes() for h in uploads))


class TestText:
    def test_equals_the_library(self, real: Live, checkpoint: Path) -> None:
        tasks = [NAMES[:3], NAMES[2:6]]
        body = {
            "tasks": [{"classes": tasks[0], "weight": 3.0}, {"classes": tasks[1]}],
            "seed": 5, "steps": 3, "sampler": "ddim",
        }  # fmt: skip
        head = read_head(fuse(real, body).content)
        expected = Generator.load(checkpoint).fuse(tasks, weights=[3.0, 1.0], seed=5, steps=3, sampler="ddim")
        for name, tensor in expected.tensors.items():
            torch.testing.assert_close(head.tensors[name], tensor, rtol=1e-4, atol=1e-5)
        assert head.classes == NAMES[:6]
        assert head.metadata.items() >= expected.metadata.items()
        assert head.metadata["method"] == "text"
        assert json.loads(head.metadata["tasks"]) == [
            {"classes": list(tasks[0]), "weight": 3.0},
            {"classes": list(tasks[1])},
        ]

    def test_weights_matter_and_equal_ones_do_not(self, real: Live) -> None:
        def weights(first: float | None, second: float | None) -> torch.Tensor:
            tasks = [{"classes": NAMES[:3], "weight": first}, {"classes": NAMES[3:6], "weight": second}]
            head = read_head(fuse(real, {"tasks": tasks, "seed": 1}).content)
            return HeadSpec(input_dim=12, hidden_dim=4, output_dim=16).flatten(head.tensors)

        plain = weights(None, None)
        torch.testing.assert_close(weights(2.0, 2.0), plain, rtol=1e-4, atol=1e-4)
        assert (weights(5.0, None) - plain).abs().max() > 1e-3

    def test_equal_to_generate_for_the_union(self, real: Live) -> None:
        tasks = [{"classes": NAMES[:3]}, {"classes": NAMES[1:5]}]
        one = read_head(fuse(real, {"tasks": tasks, "seed": 1}).content)
        other = read_head(real.generate(*NAMES[:5], seed=1).content)
        assert one.classes == other.classes
        for name, tensor in one.tensors.items():
            torch.testing.assert_close(tensor, other.tensors[name], rtol=1e-4, atol=1e-5)

    def test_multipart_without_heads(self, fused: Live) -> None:
        response = fused.client.post("/fuse", files=form({"tasks": TASKS, "seed": 3}))
        assert response.content == fuse(fused, {"tasks": TASKS, "seed": 3}).content

    def test_uploaded_heads_do_not_change_it(self, fused: Live) -> None:
        body = {"tasks": TASKS, "seed": 3}
        assert fuse(fused, body, *heads()).content == fuse(fused, body).content

    def test_template_and_precision(self, fused: Live) -> None:
        body = {"tasks": TASKS, "seed": 3, "prompt_template": "one {} here", "precision": "fp16"}
        head = read_head(fuse(fused, body).content)
        assert head.metadata["precision"] == "fp16"
        assert not read_head(fuse(fused, {"tasks": TASKS, "seed": 3}).content).class_embeddings.allclose(
            head.class_embeddings, atol=1e-2
        )

    def test_entity_tag(self, fused: Live) -> None:
        body = {"tasks": TASKS, "seed": 3}
        tag = fuse(fused, body).headers["etag"]
        assert fused.client.post("/fuse", json=body, headers={"If-None-Match": tag}).status_code == 304
        other = {"tasks": [TASKS[0], {**TASKS[1], "weight": 2.0}], "seed": 3}
        assert fused.client.post("/fuse", json=other, headers={"If-None-Match": tag}).status_code == 200


RULES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "average": average,
    "git-rebasin": lambda stack: git_rebasin(SPEC, stack),
    "task-arithmetic": lambda stack: task_arithmetic(ANCHOR, stack, 0.2),
    "ties": lambda stack: ties(ANCHOR, stack, 0.2, 0.2),
}


class TestMerging:
    @pytest.mark.parametrize("method", RULES)
    def test_equals_the_rule(self, fused: Live, method: str) -> None:
        one, other = heads()
        response = fuse(fused, {"tasks": TASKS, "method": method}, one, other)
        assert response.status_code == 200, response.text
        head = read_head(response.content)
        expected = RULES[method](torch.stack([SPEC.flatten(one.tensors), SPEC.flatten(other.tensors)]))
        torch.testing.assert_close(SPEC.flatten(head.tensors), expected)
        assert head.classes == ("apple", "pear", "bus", "tram")
        assert head.class_embeddings.equal(torch.cat([one.class_embeddings, other.class_embeddings[:2]]))
        assert head.metadata["method"] == method
        assert json.loads(head.metadata["tasks"]) == TASKS
        assert "seed" not in head.metadata

    def test_git_rebasin_of_a_permuted_head_is_the_head(self, fused: Live) -> None:
        one = a_head(*FRUIT)
        flat = permute_units(SPEC, SPEC.flatten(one.tensors), torch.tensor([1, 0]))
        other = HeadArtifact(
            {n: t.clone() for n, t in SPEC.unflatten(flat).items()}, one.class_embeddings, one.metadata
        )
        body = {"tasks": [{"classes": FRUIT}] * 2, "method": "git-rebasin"}
        merged = read_head(fuse(fused, body, one, other).content)
        torch.testing.assert_close(SPEC.flatten(merged.tensors), SPEC.flatten(one.tensors))

    def test_model_computes_nothing(self, fused: Live) -> None:
        before = fused.metric("t2w_heads_generated_total")
        assert fuse(fused, {"tasks": TASKS, "method": "average"}, *heads()).status_code == 200
        assert fused.metric("t2w_heads_generated_total") == before

    def test_half_precision_in_and_out(self, fused: Live) -> None:
        body = {"tasks": TASKS, "method": "average", "precision": "bf16"}
        response = fuse(fused, body, heads()[0].to_bytes("fp16"), heads()[1].to_bytes("bf16"))
        head = read_head(response.content)
        assert head.metadata["precision"] == "bf16"
        expected = torch.stack([SPEC.flatten(one.tensors) for one in heads()]).mean(0)
        torch.testing.assert_close(SPEC.flatten(head.tensors), expected, atol=0.02, rtol=0.02)

    def test_server_timing(self, fused: Live) -> None:
        timing = fuse(fused, {"tasks": TASKS, "method": "average"}, *heads()).headers["server-timing"]
        assert re.fullmatch(r"read;dur=[\d.]+, merge;dur=[\d.]+", timing)

    def test_entity_tag_follows_the_heads(self, fused: Live) -> None:
        body = {"tasks": TASKS, "method": "average"}
        tag = fuse(fused, body, *heads()).headers["etag"]
        files = form(body, *(head.to_bytes() for head in heads()))
        assert fused.client.post("/fuse", files=files, headers={"If-None-Match": tag}).status_code == 304
        files = form(body, heads()[0].to_bytes(), a_head(*CARS, seed=3).to_bytes())
        assert fused.client.post("/fuse", files=files, headers={"If-None-Match": tag}).status_code == 200

    def test_a_head_may_know_more_classes_than_its_task(self, fused: Live) -> None:
        body = {"tasks": TASKS, "method": "average"}
        head = read_head(fuse(fused, body, a_head("plum", *reversed(FRUIT)), heads()[1]).content)
        assert head.classes == ("apple", "pear", "bus", "tram")
        assert head.class_embeddings[0].equal(heads()[0].class_embeddings[0])


def zeroed() -> bytes:
    one = heads()[0]
    one.class_embeddings.zero_()
    return one.to_bytes()


def turned() -> bytes:
    other = heads()[1]
    other.class_embeddings.copy_(other.class_embeddings.roll(1, 0))
    return other.to_bytes()


def huge(classes: list[str]) -> bytes:
    head = a_head(*classes)
    head.tensors["linear1.weight"].fill_(3e38)
    return head.to_bytes()


OTHER_SPEC = HeadSpec(input_dim=5, hidden_dim=2, output_dim=8)
MERGE = {"tasks": TASKS, "method": "average"}
REFUSED: dict[str, tuple[dict[str, Any], list[HeadArtifact | bytes], str, str]] = {
    "one task": ({"tasks": TASKS[:1]}, [], "tasks", "at least 2"),
    "17 tasks": ({"tasks": [{"classes": [f"c{i}"]} for i in range(17)]}, [], "tasks", "at most 16"),
    "task without classes": ({"tasks": [TASKS[0], {"classes": []}]}, [], "tasks[1].classes", "1 to 256"),
    "name twice in a task": ({"tasks": [TASKS[0], {"classes": ["a", "A"]}]}, [], "tasks[1].classes[1]", "repeats"),
    "one class in all": ({"tasks": [{"classes": ["a"]}, {"classes": ["A"]}]}, [], "tasks", "1 different classes"),
    "too many classes in all": (
        {"tasks": [{"classes": list("abcd")}, {"classes": list("efgh")}]}, [], "tasks", "allowed are 2 to 6",
    ),
    "no weight": ({"tasks": [TASKS[0], {"classes": ["a"], "weight": 0}]}, [], "tasks[1].weight", "greater than 0"),
    "huge weight": ({"tasks": [TASKS[0], {"classes": ["a"], "weight": 1001}]}, [], "tasks[1].weight", "1000"),
    "unknown method": ({"tasks": TASKS, "method": "fisher"}, [], "method", "'ties'"),
    "deadline": ({"tasks": TASKS, "deadline_ms": 10**7}, [], "deadline_ms", "1 to 30000"),
    "merging in JSON": (MERGE, [], "head", "multipart/form-data"),
    "merging one head": (MERGE, heads()[:1], "head", "1 heads for 2 tasks"),
    "merging three heads": (MERGE, [*heads(), heads()[0]], "head", "3 heads for 2 tasks"),
    "text with one head": ({"tasks": TASKS}, heads()[:1], "head", "1 heads for 2 tasks"),
    "merging with a seed": ({**MERGE, "seed": 0}, heads(), "seed", "leave seed out"),
    "merging with steps": ({**MERGE, "steps": 2}, heads(), "steps", "leave steps out"),
    "merging with a template": ({**MERGE, "prompt_template": "{}"}, heads(), "prompt_template", "leave"),
    "merging with guidance": ({**MERGE, "guidance_scale": 2.0}, heads(), "guidance_scale", "leave"),
    "merging with weights": (
        {**MERGE, "tasks": [TASKS[0], {"classes": CARS, "weight": 2.0}]}, heads(), "tasks[1].weight", "no weights",
    ),
    "heads in the wrong order": (MERGE, heads()[::-1], "head[0]", "no class 'pear' of tasks[0]"),
    "not a head": (MERGE, [heads()[0], b"x" * 90], "head[1]", "not a safetensors file"),
    "head of another layout": (MERGE, [heads()[0], a_head(*CARS, spec=OTHER_SPEC)], "head[1]", "5 inputs"),
    "head of another backbone": (MERGE, [heads()[0], a_head(*CARS, backbone="vit")], "head[1]", "'fake-backbone'"),
    "head of another encoder": (MERGE, [heads()[0], a_head(*CARS, text_encoder="x")], "head[1]", "text_encoder 'x'"),
    "head of another scale": (MERGE, [heads()[0], a_head(*CARS, logit_scale="100")], "head[1]", "is 100: this"),
    "embeddings that disagree": (MERGE, [heads()[0], turned()], "head[1]", "of 'apple' is not that of head[0]"),
    "embeddings of no length": (MERGE, [zeroed(), a_head(*CARS[:2], "apple")], "head[1]", "not that of head[0]"),
    "embeddings of no length alone": (
        {"tasks": [{"classes": ["pear"]}, {"classes": ["bus"]}], "method": "average"},
        [zeroed(), a_head("bus")], "head[0]", "has not length 1",
    ),
    "numbers that overflow": (MERGE, [huge(FRUIT), huge(CARS)], "head", "too large"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(fused: Live, case: str) -> None:
    body, uploads, field, message = REFUSED[case]
    assert message in assert_problem(fuse(fused, body, *uploads), 422, "invalid-input", field)


def test_other_content_types(fused: Live) -> None:
    response = fused.client.post("/fuse", content=b"x", headers={"Content-Type": "text/plain"})
    assert_problem(response, 415, "unsupported-type")


def test_sixteen_tasks(fused: Live) -> None:
    tasks = [{"classes": [name]} for name in ("a", "b", "c", "d") * 4]
    body = {"tasks": tasks, "method": "git-rebasin"}
    assert read_head(fuse(fused, body, *(a_head(task["classes"][0]) for task in tasks)).content).classes == tuple(
        "abcd"
    )
