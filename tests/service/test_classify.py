"""POST /classify: right answers, and every bad upload gets its problem while the service goes on."""

import io
import json
import re
import socket
import struct
import threading
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from PIL import Image

from tests.patience import HELD_S, PATIENCE_S
from tests.service.backbones import NAME, encoded, picture, write_checkpoint_with_backbone
from tests.service.live import Live, serve, wait_for
from tests.tiny import TINY_NAMES
from text2weight.artifact import HeadArtifact, read_head
from text2weight.backbone import load_backbone
from text2weight.head import apply_heads, class_logits
from text2weight_service import classify
from text2weight_service.classify import MAX_PICTURES, MAX_PLACES
from text2weight_service.model import load_model

CLASSES = TINY_NAMES[:3]
MAX_UPLOAD_BYTES = 2_000_000


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint_with_backbone(tmp_path_factory.mktemp("classify"))


@pytest.fixture(scope="module")
def service(checkpoint: Path) -> Iterator[Live]:
    with serve(load_model, checkpoint=str(checkpoint), max_upload_bytes=MAX_UPLOAD_BYTES, max_classes=8) as running:
        yield running


@pytest.fixture(scope="module")
def hurried(checkpoint: Path) -> Iterator[Live]:
    """A service that gives its requests little time."""
    with serve(load_model, checkpoint=str(checkpoint), request_timeout_s=4.0) as running:
        yield running


@pytest.fixture(scope="module")
def head(service: Live) -> bytes:
    return service.generate(*CLASSES, seed=1).content


def post(service: Live, head: bytes | None, /, *pictures: bytes, **others: Any) -> httpx.Response:
    parts: list[tuple[str, Any]] = [] if head is None else [("head", ("head.safetensors", head))]
    parts += [("image", (f"picture {i}", data)) for i, data in enumerate(pictures)]
    return service.client.post("/classify", files=[*parts, *others.items()])


def probabilities(response: httpx.Response) -> list[dict[str, float]]:
    assert response.status_code == 200, response.text
    return [{row["name"]: row["probability"] for row in image["classes"]} for image in response.json()["images"]]


def assert_problem(response: httpx.Response, status: int, kind: str, field: str | None = None) -> str:
    problem = response.json()
    assert (response.status_code, problem["type"]) == (status, f"urn:text2weight:problem:{kind}"), response.text
    assert [error["field"] for error in problem["errors"]] == ([] if field is None else [field])
    return str(problem["detail"])


def changed(head: bytes, *, metadata: dict[str, str] | None = None, **tensors: torch.Tensor) -> bytes:
    """The head with other metadata or tensors."""
    artifact = read_head(head)
    embeddings = tensors.pop("class_embeddings", artifact.class_embeddings)
    return HeadArtifact(
        artifact.tensors | {name.replace("__", "."): tensor for name, tensor in tensors.items()},
        embeddings,
        artifact.metadata | (metadata or {}),
    ).to_bytes()


# Right answers.


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
def test_answer_equals_the_library(service: Live, head: bytes, checkpoint: Path, kind: str) -> None:
    files = [encoded(picture(seed), kind) for seed in range(3)]
    response = post(service, head, *files)
    artifact = read_head(head)
    features = load_backbone(checkpoint / "backbone").features([Image.open(io.BytesIO(data)) for data in files])
    outputs = apply_heads(artifact.spec, artifact.spec.flatten(artifact.tensors)[None], features)[0]
    expected = class_logits(outputs, artifact.class_embeddings, 30.0).softmax(-1)
    found = torch.tensor([[row[name] for name in CLASSES] for row in probabilities(response)])
    assert torch.allclose(found, expected, atol=1e-5)
    assert [image["filename"] for image in response.json()["images"]] == ["picture 0", "picture 1", "picture 2"]


def test_best_class_comes_first(service: Live, head: bytes) -> None:
    for row in probabilities(post(service, head, *(encoded(picture(seed)) for seed in range(4)))):
        assert list(row.values()) == sorted(row.values(), reverse=True)
        assert sum(row.values()) == pytest.approx(1)


def test_server_timing(service: Live, head: bytes) -> None:
    timing = post(service, head, encoded(picture())).headers["server-timing"]
    assert re.fullmatch(r"upload;dur=[\d.]+, classify;dur=[\d.]+", timing)


def test_pictures_are_turned_upright(service: Live, head: bytes) -> None:
    upright, exif = picture(size=(30, 30)), Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to the right before showing
    lying = upright.transpose(Image.Transpose.ROTATE_90)
    shown, turned, left_alone = probabilities(
        post(service, head, encoded(upright), encoded(lying, exif=exif), encoded(lying))
    )
    assert turned == pytest.approx(shown, abs=1e-6)
    assert left_alone != pytest.approx(shown, abs=1e-3)


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "I;16"])
def test_any_mode_of_pixels(service: Live, head: bytes, mode: str) -> None:
    assert len(probabilities(post(service, head, encoded(picture().convert(mode))))) == 1


def test_sixteen_pictures(service: Live, head: bytes) -> None:
    assert len(probabilities(post(service, head, *[encoded(picture())] * MAX_PICTURES))) == MAX_PICTURES


def test_an_upload_may_be_larger_than_other_bodies(service: Live, head: bytes) -> None:
    noise = Image.effect_noise((700, 700), 200).convert("RGB")
    data = encoded(noise)
    assert service.engine.settings.max_body_bytes < len(data) < MAX_UPLOAD_BYTES
    assert post(service, head, data).status_code == 200


# Pictures that cannot be used.


def png_header(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """The beginning of a PNG of this size; no pixels follow."""
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), *chunks, (b"IDAT", b"")]
    packed = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def many_scans() -> bytes:
    data = encoded(picture(), "JPEG", progressive=True)
    scan = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + scan * 500 + data[-2:]


BAD_PICTURES = {
    "nothing": (b"", "not a whole"),
    "words": (b"an apple", "not a whole"),
    "gif": (encoded(picture(), "GIF"), "not a whole"),
    "bmp": (encoded(picture(), "BMP"), "not a whole"),
    "tiff": (encoded(picture(), "TIFF"), "not a whole"),
    "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "not a whole"),
    "half a png": (encoded(picture())[:-500], "not a whole"),
    "half a jpeg": (encoded(picture(), "JPEG")[:-200], "not a whole"),
    "half a webp": (encoded(picture(), "WEBP")[:-20], "not a whole"),
    "text bomb": (png_header(8, 8, (b"zTXt", b"a\0\0" + zlib.compress(b"x" * 2**21))), "not a whole"),
    "just too large": (png_header(5001, 5000), "5001 x 5000 pixels: at most 25000000"),
    "warned about by the decoder": (png_header(10_000, 10_000), "at most 25000000"),
    "bomb": (png_header(2**20, 2**20), "at most 25000000"),
    "narrow": (encoded(Image.new("RGB", (1, 33))), "1 x 33 pixels: one side may be at most 32 times"),
    "many scans": (many_scans(), "too many scans"),
}


@pytest.mark.parametrize("case", BAD_PICTURES)
def test_bad_picture(service: Live, head: bytes, case: str) -> None:
    data, expected = BAD_PICTURES[case]
    good = encoded(picture())
    assert expected in assert_problem(post(service, head, good, data), 422, "invalid-input", "image[1]")
    assert post(service, head, good).status_code == 200


# Heads that cannot be used.


def test_head_must_be_whole(service: Live, head: bytes) -> None:
    for data in (b"", b"words", head[:-1]):
        assert_problem(post(service, data, encoded(picture())), 422, "invalid-input", "head")


def test_head_must_fit_the_backbone(service: Live, head: bytes) -> None:
    def detail(data: bytes) -> str:
        return assert_problem(post(service, data, encoded(picture())), 422, "invalid-input", "head")

    assert "takes 6 numbers per picture, this backbone gives 512" in detail(
        changed(head, linear1__weight=torch.zeros(3, 6))
    )
    assert f"is for the backbone 'another', this worker has '{NAME}'" in detail(
        changed(head, metadata={"backbone": "another"})
    )


def test_head_may_not_have_more_classes_than_a_request(service: Live, head: bytes) -> None:
    names = json.dumps([f"class {i}" for i in range(9)])
    many = changed(head, metadata={"classes": names}, class_embeddings=torch.zeros(9, 8))
    assert "9 classes: at most 8" in assert_problem(
        post(service, many, encoded(picture())), 422, "invalid-input", "head"
    )


def test_head_that_overflows(service: Live, head: bytes) -> None:
    huge = changed(head, linear1__weight=torch.full((3, 512), 3e38))
    assert "too large" in assert_problem(post(service, huge, encoded(picture())), 422, "invalid-input", "head")


# Bodies that cannot be read.


def test_parts(service: Live, head: bytes) -> None:
    good = encoded(picture())
    assert "0 parts" in assert_problem(post(service, None, good), 422, "invalid-input", "head")
    assert "2 parts" in assert_problem(post(service, head, good, head=head), 422, "invalid-input", "head")
    assert "1 to 16" in assert_problem(post(service, head), 422, "invalid-input", "image")
    assert "allowed are head, image" in assert_problem(post(service, head, good, x=good), 422, "invalid-input", "x")
    text = {"head": (None, "words")}
    assert "file name" in assert_problem(post(service, None, good, **text), 422, "invalid-input", "head")


@pytest.mark.parametrize("number", [17, 40])
def test_too_many_pictures(service: Live, head: bytes, number: int) -> None:
    response = post(service, head, *[encoded(picture())] * number)
    if number == 17:
        assert_problem(response, 422, "invalid-input", "image")
    else:
        assert_problem(response, 422, "malformed-multipart")


def test_body_must_be_multipart(service: Live, head: bytes) -> None:
    assert_problem(service.client.post("/classify", json={"image": "x"}), 415, "unsupported-type")
    assert_problem(service.client.post("/classify", content=head), 415, "unsupported-type")
    form = {"content-type": "multipart/form-data; boundary=b", "content-encoding": "gzip"}
    assert_problem(service.client.post("/classify", content=b"x", headers=form), 415, "unsupported-type")


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("multipart/form-data", b"--b--"),
        ("multipart/form-data; boundary=b", b"no boundary in here"),
        (
            "multipart/form-data; boundary=b",
            b'--b\r\nContent-Disposition: form-data; name="head"; filename="h"\r\n\r\nx',
        ),
        ("multipart/form-data; boundary=b", b"--b\r\nContent-Disposition: form-data\r\n\r\nx\r\n--b--\r\n"),
    ],
)
def test_damaged_multipart(service: Live, kind: str, body: bytes) -> None:
    response = service.client.post("/classify", content=body, headers={"content-type": kind})
    assert_problem(response, 422, "malformed-multipart")


def test_upload_limit(service: Live, head: bytes) -> None:
    data = b"\0" * MAX_UPLOAD_BYTES
    assert str(MAX_UPLOAD_BYTES) in assert_problem(post(service, head, data), 413, "body-too-large")
    # Other bodies keep their own limit, and no other route takes files.
    form = {"content-type": "multipart/form-data; boundary=b"}
    assert_problem(service.client.post("/generate", content=data[:1000], headers=form), 415, "unsupported-type")
    assert_problem(service.client.post("/generate", json={"classes": ["x" * 300_000, "y"]}), 413, "body-too-large")


# Load, and workers that cannot.


def test_full_house_answers_429_and_blocks_nobody_else(
    service: Live, head: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, decode = threading.Event(), classify.picture_pixels
    at_once, most = 0, 0

    def held(data: bytes, side: int, field: str) -> torch.Tensor:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        assert gate.wait(HELD_S)
        at_once -= 1
        return decode(data, side, field)

    monkeypatch.setattr(classify, "picture_pixels", held)
    good = encoded(picture())
    with ThreadPoolExecutor(MAX_PLACES + 1) as pool:
        requests = [pool.submit(post, service, head, good) for _ in range(MAX_PLACES + 1)]
        try:
            wait_for(lambda: any(request.done() for request in requests), "refusal")
            refused = next(request.result() for request in requests if request.done())
            assert_problem(refused, 429, "queue-full")
            assert refused.headers["retry-after"] == "1"
            assert service.client.get("/health/ready").status_code == 200
            assert service.generate(*CLASSES).status_code == 200
        finally:
            gate.set()
        assert sorted(request.result().status_code for request in requests) == [200] * MAX_PLACES + [429]
        assert most == 1, "two uploads were decoded at once"
    assert post(service, head, good).status_code == 200


def hold_pictures(monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, list[str]]:
    """From now on pictures are decoded only once the event is set; the list has the fields of those that came."""
    gate, calls, decode = threading.Event(), list[str](), classify.picture_pixels

    def held(data: bytes, side: int, field: str) -> torch.Tensor:
        calls.append(field)
        assert gate.wait(HELD_S)
        return decode(data, side, field)

    monkeypatch.setattr(classify, "picture_pixels", held)
    return gate, calls


def test_deadline(hurried: Live, head: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    good = encoded(picture())
    wait_for(lambda: post(hurried, head, good).status_code == 200, "a loaded backbone")
    gate, calls = hold_pictures(monkeypatch)
    assert_problem(post(hurried, head, good, good), 504, "deadline")
    gate.set()
    monkeypatch.undo()
    wait_for(lambda: post(hurried, head, good).status_code == 200, "an answer in time")
    assert "image[1]" not in calls, "pictures were decoded that nobody waited for"


def test_nothing_is_computed_for_a_client_that_left(
    service: Live, head: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = encoded(picture())
    assert post(service, head, good).status_code == 200  # the backbone is loaded
    gate, calls = hold_pictures(monkeypatch)
    left = {"method": "POST", "route": "/classify", "status": "499"}
    before = service.metric("t2w_http_requests_total", **left)
    request = service.client.build_request(
        "POST", "/classify", files=[("head", head), ("image", good), ("image", good)]
    )
    lines = ["POST /classify HTTP/1.1", *(f"{name}: {value}" for name, value in request.headers.items()), "", ""]
    try:
        with socket.create_connection(("127.0.0.1", service.port), timeout=PATIENCE_S) as leaver:
            leaver.sendall("\r\n".join(lines).encode() + request.read())
            wait_for(lambda: len(calls) == 1, "the first picture")
        wait_for(lambda: service.metric("t2w_http_requests_total", **left) == before + 1, "noticing")
    finally:
        gate.set()
    assert post(service, head, good).status_code == 200
    assert calls == ["image[0]", "image[0]"], "a picture was decoded that nobody waited for"


def test_body_that_does_not_arrive(hurried: Live) -> None:
    with socket.create_connection(("127.0.0.1", hurried.port), timeout=PATIENCE_S) as connection:
        lines = ["POST /classify HTTP/1.1", "Host: x", "Content-Type: multipart/form-data; boundary=b"]
        connection.sendall("\r\n".join([*lines, "Content-Length: 100", "", "--b"]).encode())
        assert b" 408 " in connection.recv(4096)


def test_checkpoint_without_backbone(live: Live, head: bytes) -> None:
    detail = assert_problem(post(live, head, encoded(picture())), 501, "no-backbone")
    assert "own backbone" in detail


def test_worker_that_drains(live: Live, head: bytes) -> None:
    live.engine.begin_drain()
    assert_problem(post(live, head, encoded(picture())), 503, "draining")
