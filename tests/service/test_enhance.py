"""POST /enhance: strict reading of the upload, and the two identities of strength."""

import json
import socket
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.patience import PATIENCE_S
from tests.service.fakes import SPEC, FakeModel
from tests.service.forms import a_head, form, post
from tests.service.live import Live, serve
from tests.service.test_bad_input import assert_problem
from tests.service.tiny import NAMES, write_tiny_checkpoint
from text2weight.artifact import HeadArtifact, Precision, read_head
from text2weight.generator import Generator
from text2weight.head import HeadSpec
from text2weight_service.model import load_model

TINY_SPEC = HeadSpec(input_dim=12, hidden_dim=4, output_dim=16)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def real(checkpoint: Path) -> Iterator[Live]:
    with serve(load_model, checkpoint=str(checkpoint)) as running:
        yield running


@pytest.fixture(scope="module")
def fake() -> Iterator[Live]:
    with serve(lambda _: FakeModel(), max_body_bytes=3_000_000) as running:
        yield running


@pytest.fixture(scope="module")
def trained() -> HeadArtifact:
    """A head as a client might have trained it: of the checkpoint's layout, with names it knows."""
    head = a_head(*NAMES[:4], spec=TINY_SPEC, seed=8)
    return head.with_metadata(trained_for="3 minutes")


def enhance(live: Live, head: HeadArtifact | bytes, **request: Any) -> httpx.Response:
    return post(live.client, "/enhance", request, head if isinstance(head, bytes) else head.to_bytes())


def flat(head: HeadArtifact) -> torch.Tensor:
    return head.spec.flatten(head.tensors)


METHODS = pytest.mark.parametrize("method", ["interpolate", "noise"])


class TestStrength:
    @pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
    def test_none_returns_the_weights_bit_for_bit(
        self, real: Live, trained: HeadArtifact, precision: Precision
    ) -> None:
        upload = trained.to_bytes(precision)
        response = enhance(real, upload, strength=0, sampler="ddim", steps=3, precision=precision)
        assert response.status_code == 200, response.text
        answer, given = read_head(response.content), read_head(upload)
        for name, tensor in given.tensors.items():
            assert answer.tensors[name].equal(tensor), name
        assert answer.classes == given.classes
        assert answer.metadata["strength"] == "0.0"

    @METHODS
    def test_full_equals_generate(self, real: Live, trained: HeadArtifact, method: str) -> None:
        sampling = {"seed": 6, "sampler": "ddim", "steps": 4}
        enhanced = read_head(enhance(real, trained, strength=1, method=method, **sampling).content)
        generated = read_head(real.generate(*NAMES[:4], **sampling).content)
        for name, tensor in generated.tensors.items():
            torch.testing.assert_close(enhanced.tensors[name], tensor, rtol=1e-4, atol=1e-5)
        assert enhanced.class_embeddings.allclose(generated.class_embeddings)
        assert enhanced.metadata == {**generated.metadata, "strength": "1.0", "method": method}

    @METHODS
    def test_between_equals_the_library(self, real: Live, checkpoint: Path, trained: HeadArtifact, method: str) -> None:
        sampling: dict[str, Any] = {"seed": 6, "sampler": "ddim", "steps": 4, "strength": 0.4, "method": method}
        head = read_head(enhance(real, trained, classes=NAMES[2:7], **sampling).content)
        expected = Generator.load(checkpoint).enhance(trained, NAMES[2:7], **sampling)
        torch.testing.assert_close(flat(head), flat(expected), rtol=1e-4, atol=1e-4)
        assert head.metadata == expected.metadata
        assert (flat(head) - flat(trained)).abs().max() > 1e-3


def test_entity_tag_follows_the_head(real: Live, trained: HeadArtifact) -> None:
    request = {"strength": 0.3, "seed": 1}
    tag = enhance(real, trained, **request).headers["etag"]
    headers = {"If-None-Match": tag}
    files = form(request, trained.to_bytes())
    assert real.client.post("/enhance", files=files, headers=headers).status_code == 304
    other_way = form({**request, "method": "noise"}, trained.to_bytes())
    assert real.client.post("/enhance", files=other_way, headers=headers).status_code == 200
    files = form(request, a_head(*NAMES[:4], spec=TINY_SPEC, seed=9).to_bytes())
    assert real.client.post("/enhance", files=files, headers=headers).status_code == 200


HEAD = a_head("apple", "bus")
UPLOAD = HEAD.to_bytes()


def with_weight(value: float) -> bytes:
    head = a_head("apple", "bus")
    head.tensors["linear2.bias"][0] = value
    return head.to_bytes()


HEADS = {
    "nothing": (b"", "too few"),
    "words": (b"this is not a head at all", "not a safetensors file"),
    "cut short": (UPLOAD[:-1], "the tensors have"),
    "longer": (UPLOAD + b"\0", "the tensors have"),
    "a stack": (HEAD.with_metadata(format="text2weight.heads/1").to_bytes(), "'format' must be"),
    "infinite": (with_weight(float("inf")), "not finite"),
    "another layout": (a_head("a", "b", spec=SPEC.model_copy(update={"bias": False})).to_bytes(), "no biases"),
    "another activation": (HEAD.with_metadata(activation="none").to_bytes(), "activation none"),
    "another backbone": (HEAD.with_metadata(backbone="resnet").to_bytes(), "the backbone 'resnet'"),
    "another text encoder": (HEAD.with_metadata(text_encoder="other").to_bytes(), "the text_encoder 'other'"),
    "another scale": (HEAD.with_metadata(logit_scale="29").to_bytes(), "logit_scale is 29"),
}


@pytest.mark.parametrize("case", HEADS)
def test_bad_heads(fake: Live, case: str) -> None:
    data, message = HEADS[case]
    assert message in assert_problem(enhance(fake, data, strength=0.5), 422, "invalid-input", "head")


def test_head_far_from_all_that_the_checkpoint_knows(real: Live) -> None:
    head = a_head(*NAMES[:2], spec=TINY_SPEC)
    head.tensors["linear1.weight"][0, 0] = 1e30
    assert "standard deviations" in assert_problem(enhance(real, head, strength=0.5), 422, "invalid-input", "head")


def test_numbers_that_do_not_fit_the_precision(real: Live) -> None:
    head = a_head(*NAMES[:2], spec=TINY_SPEC)
    head.tensors["linear1.weight"][0, 0] = 70_000.0  # within what the checkpoint takes
    detail = assert_problem(enhance(real, head, strength=0, precision="fp16"), 422, "invalid-input", "precision")
    assert "70000" in detail
    assert "ask for another precision" in detail
    assert enhance(real, head, strength=0, precision="bf16").status_code == 200


FIELDS: dict[str, tuple[dict[str, Any], str]] = {
    "no strength": ({}, "strength"),
    "strength below 0": ({"strength": -0.1}, "strength"),
    "strength above 1": ({"strength": 1.5}, "strength"),
    "strength is text": ({"strength": "0.5"}, "strength"),
    "classes": ({"strength": 0.5, "classes": ["apple"]}, "classes"),
    "no classes": ({"strength": 0.5, "classes": []}, "classes"),
    "samples": ({"strength": 0.5, "samples": 2}, "samples"),
    "method": ({"strength": 0.5, "method": "ties"}, "method"),
    "precision": ({"strength": 0.5, "precision": "fp8"}, "precision"),
    "deadline": ({"strength": 0.5, "deadline_ms": 0}, "deadline_ms"),
}


@pytest.mark.parametrize("case", FIELDS)
def test_bad_fields(fake: Live, case: str) -> None:
    request, field = FIELDS[case]
    assert_problem(enhance(fake, UPLOAD, **request), 422, "invalid-input", field)


GOOD = {"strength": 0.5, "seed": 1}
PARTS = {
    "no head": (form(GOOD), "head", "0 parts"),
    "no request": (form(None, UPLOAD), "request", "0 parts"),
    "two heads": (form(GOOD, UPLOAD, UPLOAD), "head", "2 parts"),
    "two requests": ([*form(GOOD, UPLOAD), *form(GOOD)], "request", "2 parts"),
    "unknown part": ([*form(GOOD, UPLOAD), ("extra", ("x", b"x", "text/plain"))], "extra", "allowed are request, head"),
    "head is no file": ([*form(GOOD), ("head", (None, UPLOAD, "text/plain"))], "head", "as a file"),
    "request is no object": (form([1], UPLOAD), "body", "object"),
}


@pytest.mark.parametrize("case", PARTS)
def test_bad_parts(fake: Live, case: str) -> None:
    files, field, message = PARTS[case]
    response = fake.client.post("/enhance", files=files)
    assert message in assert_problem(response, 422, "invalid-input", field)


@pytest.mark.parametrize("name", ["head", "request"])
def test_a_part_that_grows_too_large_ends_the_upload(fake: Live, name: str) -> None:
    """What was sent of a body that never ends is refused as soon as it is more than a part can be."""
    part = f'--b\r\nContent-Disposition: form-data; name="{name}"; filename="x"\r\n\r\n'.encode()
    start = (
        f"POST /enhance HTTP/1.1\r\nHost: x\r\nContent-Type: {BOUNDARY}\r\nContent-Length: 16000000\r\n\r\n".encode()
    )
    with socket.create_connection(("127.0.0.1", fake.port), timeout=PATIENCE_S) as connection:
        connection.sendall(start + part + bytes(3_100_000))
        answer = b""
        while not answer.endswith(b"}"):
            answer += connection.recv(65536)
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert f"part '{name}': at most ".encode() in answer


def test_a_part_may_be_as_large_as_its_rule(fake: Live) -> None:
    largest = json.dumps(GOOD).encode().ljust(3_000_000)
    assert post(fake.client, "/enhance", largest, UPLOAD).status_code == 200
    assert_problem(post(fake.client, "/enhance", largest + b" ", UPLOAD), 413, "body-too-large")


def test_request_may_be_a_file(fake: Live) -> None:
    files = [*form(None, UPLOAD), ("request", ("request.json", json.dumps(GOOD).encode(), "application/json"))]
    assert fake.client.post("/enhance", files=files).status_code == 200


def test_request_that_is_no_json(fake: Live) -> None:
    assert_problem(post(fake.client, "/enhance", b"{strength: 1}", UPLOAD), 422, "malformed-json")


BOUNDARY = "multipart/form-data; boundary=b"
BODIES = {
    "no boundary": ("multipart/form-data", b"--b--\r\n"),
    "another boundary": (BOUNDARY, b"--c\r\n\r\n--c--\r\n"),
    "nothing": (BOUNDARY, b""),
    "cut short": (BOUNDARY, b'--b\r\nContent-Disposition: form-data; name="head"; filename="x"\r\n\r\nabc'),
    "part without a name": (BOUNDARY, b"--b\r\nContent-Disposition: form-data\r\n\r\nabc\r\n--b--\r\n"),
    "part without headers": (BOUNDARY, b"--b\r\n\r\nabc\r\n--b--\r\n"),
    "a hundred parts": (
        BOUNDARY,
        b"".join(b'--b\r\nContent-Disposition: form-data; name="head"; filename="x"\r\n\r\n\r\n' for _ in range(100))
        + b"--b--\r\n",
    ),
    "broken header": (BOUNDARY, b"--b\r\nContent Disposition\x00\r\n\r\nabc\r\n--b--\r\n"),
}


@pytest.mark.parametrize("case", BODIES)
def test_broken_multipart(fake: Live, case: str) -> None:
    kind, body = BODIES[case]
    response = fake.client.post("/enhance", content=body, headers={"Content-Type": kind})
    assert_problem(response, 422, "malformed-multipart")


@pytest.mark.parametrize("kind", ["application/json", "multipart/mixed; boundary=b", f"{BOUNDARY}; charset=utf-16", ""])
def test_other_content_types(fake: Live, kind: str) -> None:
    response = fake.client.post("/enhance", content=b"{}", headers={"Content-Type": kind})
    assert "multipart/form-data" in assert_problem(response, 415, "unsupported-type")


def test_compressed_body(fake: Live) -> None:
    headers = {"Content-Type": BOUNDARY, "Content-Encoding": "gzip"}
    assert_problem(fake.client.post("/enhance", content=b"x", headers=headers), 415, "unsupported-type")


def test_body_over_the_limit(fake: Live) -> None:
    assert_problem(enhance(fake, bytes(20_000_000), strength=0.5), 413, "body-too-large")


HEADER = 8 + int.from_bytes(UPLOAD[:8], "little")
CUTS = st.tuples(
    st.integers(0, HEADER + 40) | st.integers(0, len(UPLOAD)),
    st.integers(0, 12),
    st.binary(max_size=12) | st.sampled_from([b"[", b"{", b'"', b"0", b"9" * 30, b"-", b"\\ud800", b"F16", b"BF16"]),
)


@settings(
    max_examples=250,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(cuts=st.lists(CUTS, min_size=1, max_size=4))
def test_mutated_heads_are_read_or_refused(fake: Live, cuts: list[tuple[int, int, bytes]]) -> None:
    data = UPLOAD
    for start, length, replacement in cuts:
        data = data[:start] + replacement + data[start + length :]
    response = enhance(fake, data, strength=0.5)
    if response.status_code == 200:
        assert len(read_head(response.content).classes) >= 2
    else:
        assert response.status_code == 422, response.text
        assert response.json()["errors"][0]["field"] in ("head", "classes")


@given(
    claims=st.lists(
        st.tuples(st.sampled_from(["F32", "F16", "BF16"]), st.lists(st.integers(0, 2**50), max_size=3)), max_size=8
    )
)
def test_claimed_sizes_allocate_nothing(claims: list[tuple[str, list[int]]]) -> None:
    """Whatever sizes a header claims, reading takes memory for the bytes that came, not for those it claims."""
    entries = {
        f"t{i}": {"dtype": dtype, "shape": shape, "data_offsets": [0, max(shape, default=0)]}
        for i, (dtype, shape) in enumerate(claims)
    }
    text = json.dumps(entries | {"__metadata__": HEAD.metadata}).encode()
    data = len(text).to_bytes(8, "little") + text + UPLOAD[HEADER:]
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"tensor|bytes"):
            read_head(data)
        assert tracemalloc.get_traced_memory()[1] < 100_000 + 10 * len(data)
    finally:
        tracemalloc.stop()
