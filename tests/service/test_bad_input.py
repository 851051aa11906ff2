"""Every bad request gets its problem, and the service goes on as if nothing had happened."""

import json
import socket
from collections.abc import Iterator

import httpx
import pytest

from tests.patience import PATIENCE_S
from tests.service.fakes import FakeModel
from tests.service.heads import same_head
from tests.service.live import Live, serve

GOOD = {"classes": ["apple", "bus"], "seed": 1}


@pytest.fixture(scope="module")
def impatient() -> Iterator[Live]:
    with serve(lambda _: FakeModel(), request_timeout_s=0.2) as running:
        yield running


@pytest.fixture(autouse=True)
def unharmed(shared_live: Live) -> Iterator[None]:
    """After each test of this module the service still answers a good request, always the same."""
    expected = shared_live.client.post("/generate", json=GOOD)
    assert expected.status_code == 200
    yield
    after = shared_live.client.post("/generate", json=GOOD)
    assert after.status_code == 200
    assert same_head(after.content, expected.content)


def assert_problem(response: httpx.Response, status: int, name: str, field: str | None = None) -> str:
    """The response is this problem; returns its detail."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    problem = response.json()
    assert problem["type"] == f"urn:text2weight:problem:{name}"
    assert problem["status"] == status
    assert problem["title"]
    assert problem["request_id"] == response.headers["x-request-id"]
    assert len(response.content) < 10_000
    if field is not None:
        assert field in [error["field"] for error in problem["errors"]]
    return str(problem["detail"])


CLASSES = {
    "empty list": ([], "classes", "2 to 256"),
    "one class": (["apple"], "classes", "2 to 256"),
    "ten thousand": ([f"class {i}" for i in range(10_000)], "classes", "10000 class names"),
    "equal": (["apple", "bus", "apple"], "classes[2]", "repeats classes[0]"),
    "equal but for case": (["apple", "Apple"], "classes[1]", "repeats"),
    "equal once normalised": (["sea_lion", " sea  lion"], "classes[1]", "repeats"),
    "equal once composed": (["caf\u00e9", "cafe\u0301"], "classes[1]", "repeats"),
    "empty name": (["apple", ""], "classes[1]", "empty"),
    "white space": (["apple", " \t\u2003"], "classes[1]", "empty"),
    "underscores": (["apple", "___"], "classes[1]", "empty"),
    "100 kB name": (["apple", "x" * 100_000], "classes[1]", "100000 characters"),
    "control character": (["apple", "bus\x00"], "classes[1]", "control"),
    "escape sequence": (["apple", "\x1b[31mbus"], "classes[1]", "control"),
}


@pytest.mark.parametrize("case", CLASSES)
def test_class_names(shared_live: Live, case: str) -> None:
    classes, field, expected = CLASSES[case]
    detail = assert_problem(shared_live.generate(*classes), 422, "invalid-input", field)
    assert expected in detail


def test_names_of_one_of_several_tasks(shared_live: Live) -> None:
    body = {"tasks": [{"classes": ["apple"]}, {"classes": ["bus", "tram", "Bus"]}]}
    detail = assert_problem(shared_live.client.post("/fuse", json=body), 422, "invalid-input", "tasks[1].classes[2]")
    assert detail == "tasks[1].classes[2] 'Bus' repeats tasks[1].classes[0]: name each class once"


FIELDS = {
    "number among names": ({"classes": ["apple", 3]}, "classes[1]"),
    "null among names": ({"classes": [None, "bus"]}, "classes[0]"),
    "list among names": ({"classes": ["apple", ["bus"]]}, "classes[1]"),
    "classes is text": ({"classes": "apple"}, "classes"),
    "classes is an object": ({"classes": {"0": "apple"}}, "classes"),
    "classes is null": ({"classes": None}, "classes"),
    "classes is missing": ({"seed": 1}, "classes"),
    "unknown field": ({**GOOD, "strength": 0.5}, "strength"),
    "unknown long field": ({**GOOD, "y" * 100_000: 1}, "y" * 99 + "…"),
    "negative seed": ({**GOOD, "seed": -1}, "seed"),
    "huge seed": ({**GOOD, "seed": 2**63}, "seed"),
    "hundred-digit seed": ({**GOOD, "seed": 10**100}, "seed"),
    "seed is a fraction": ({**GOOD, "seed": 1.5}, "seed"),
    "seed is a float": ({**GOOD, "seed": 1.0}, "seed"),
    "seed is text": ({**GOOD, "seed": "1"}, "seed"),
    "seed is a bool": ({**GOOD, "seed": True}, "seed"),
    "no steps": ({**GOOD, "sampler": "ddim", "steps": 0}, "steps"),
    "negative steps": ({**GOOD, "sampler": "ddim", "steps": -4}, "steps"),
    "a million steps": ({**GOOD, "sampler": "ddim", "steps": 10**6}, "steps"),
    "more steps than this worker allows": ({**GOOD, "sampler": "ddim", "steps": 1001}, "steps"),
    "mean with steps": ({**GOOD, "sampler": "mean", "steps": 4}, "steps"),
    "unknown sampler": ({**GOOD, "sampler": "euler"}, "sampler"),
    "sampler is a number": ({**GOOD, "sampler": 1}, "sampler"),
}


@pytest.mark.parametrize("case", FIELDS)
def test_fields(shared_live: Live, case: str) -> None:
    body, field = FIELDS[case]
    assert_problem(shared_live.client.post("/generate", json=body), 422, "invalid-input", field)


def test_details_say_what_is_allowed(shared_live: Live) -> None:
    def detail(**fields: object) -> str:
        return assert_problem(shared_live.client.post("/generate", json={**GOOD, **fields}), 422, "invalid-input")

    assert "1 to 100" in detail(sampler="ddim", steps=10**6)
    assert "mean, ddpm, ddim, dpmpp_2m" in detail(sampler="euler")
    assert "9223372036854775807" in detail(seed=2**64)
    assert "classes, descriptions, describe_classifier, samples" in detail(extra=1)
    assert detail(samples=17) == "samples is 17: Input should be less than or equal to 16"
    assert detail(guidance_scale="two").startswith('guidance_scale is "two": ')
    assert detail(un=1).startswith("un is no field here; allowed are ")
    assert detail(seed=-(10**100)).startswith("seed: Input should be")
    assert "mean, ddpm, ddim, dpmpp_2m" in detail(sampler="x" * 10_000)


def test_unknown_fields_within_a_field(shared_live: Live) -> None:
    body = {"tasks": [{"classes": ["apple"], "x": 1}, {"classes": ["bus"]}]}
    detail = assert_problem(shared_live.client.post("/fuse", json=body), 422, "invalid-input", "tasks[0].x")
    assert detail == "tasks[0].x is no field here; allowed are classes, weight"


@pytest.mark.parametrize("body", [b"[]", b"null", b'"apple"', b"3", b'["apple", "bus"]'])
def test_top_level_is_no_object(shared_live: Live, body: bytes) -> None:
    response = shared_live.client.post("/generate", content=body, headers={"Content-Type": "application/json"})
    assert assert_problem(response, 422, "invalid-input", "body").startswith(("body is ", "body: "))


MALFORMED = {
    "nothing": b"",
    "words": b"apple, bus",
    "cut short": b'{"classes": ["apple", "b',
    "two documents": b'{"classes": ["apple", "bus"]} {}',
    "single quotes": b"{'classes': ['apple', 'bus']}",
    "invalid UTF-8": b'{"classes": ["apple", "\xff\xfe"]}',
    "UTF-16": json.dumps(GOOD).encode("utf-16"),
    "lone surrogate": b'{"classes": ["apple", "\\ud800"]}',
    "deep list": b"[" * 100_000,
    "deep classes": b'{"classes": ' + b"[" * 90_000 + b"]" * 90_000 + b"}",
    "deep objects": b'{"a":' * 30_000,
    "five-thousand-digit seed": b'{"classes": ["apple", "bus"], "seed": ' + b"9" * 5000 + b"}",
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_json(shared_live: Live, case: str) -> None:
    response = shared_live.client.post(
        "/generate", content=MALFORMED[case], headers={"Content-Type": "application/json"}
    )
    assert_problem(response, 422, "malformed-json")


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity"])
@pytest.mark.parametrize("field", ["classes", "seed", "steps"])
def test_nan(shared_live: Live, field: str, value: str) -> None:
    body = json.dumps({**GOOD, field: "?"}).replace('"?"', value)
    response = shared_live.client.post("/generate", content=body, headers={"Content-Type": "application/json"})
    assert_problem(response, 422, "invalid-input", field)


@pytest.mark.parametrize(
    "content_type",
    [
        None,
        "",
        "text/plain",
        "application/x-www-form-urlencoded",
        "application/jsonp",
        'application/json; charset="',
        ";;;=",
        "application/json; charset=utf-16",
    ],
)
def test_wrong_content_type(shared_live: Live, content_type: str | None) -> None:
    headers = {} if content_type is None else {"Content-Type": content_type}
    response = shared_live.client.post("/generate", content=json.dumps(GOOD), headers=headers)
    assert "application/json" in assert_problem(response, 415, "unsupported-type")


def test_compressed_body(shared_live: Live) -> None:
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    assert_problem(shared_live.client.post("/generate", content=b"\x1f\x8b", headers=headers), 415, "unsupported-type")


@pytest.mark.parametrize("size", [200_001, 5_000_000])
def test_body_over_the_limit(shared_live: Live, size: int) -> None:
    response = shared_live.client.post("/generate", content=b" " * size, headers={"Content-Type": "application/json"})
    assert "200000" in assert_problem(response, 413, "body-too-large")


def test_streamed_body_over_the_limit(shared_live: Live) -> None:
    sent = 0

    def chunks() -> Iterator[bytes]:
        nonlocal sent
        for _ in range(50):
            sent += 10_000
            yield b" " * 10_000

    response = shared_live.client.post("/generate", content=chunks(), headers={"Content-Type": "application/json"})
    assert "content-length" not in response.request.headers
    assert_problem(response, 413, "body-too-large")


def test_body_at_the_limit(shared_live: Live) -> None:
    body = json.dumps(GOOD).encode().ljust(200_000)
    response = shared_live.client.post("/generate", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 200


def test_declared_length_alone_is_refused(shared_live: Live) -> None:
    """The answer comes before the body does."""
    head = b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 9999999999\r\n\r\n"
    with socket.create_connection(("127.0.0.1", shared_live.port), timeout=PATIENCE_S) as connection:
        connection.sendall(head)
        assert connection.recv(100).startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/generate", "application/json"),
        ("/generate/stream", "application/json"),
        ("/fuse", "application/json"),
        ("/fuse", "multipart/form-data; boundary=b"),
        ("/enhance", "multipart/form-data; boundary=b"),
    ],
)
def test_body_that_does_not_come(impatient: Live, path: str, kind: str) -> None:
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\nContent-Length: 90\r\n\r\n--b\r\n"
    with socket.create_connection(("127.0.0.1", impatient.port), timeout=PATIENCE_S) as connection:
        connection.sendall(head.encode())
        answer = b"".join(iter(lambda: connection.recv(4096), b""))  # up to the end of the connection
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"urn:text2weight:problem:body-timeout" in answer


def test_unknown_path(shared_live: Live) -> None:
    assert_problem(shared_live.client.get("/nothing"), 404, "not-found")
    assert_problem(shared_live.client.post("/generate/", json=GOOD), 404, "not-found")


def test_wrong_method(shared_live: Live) -> None:
    response = shared_live.client.get("/generate")
    assert_problem(response, 405, "method-not-allowed")
    assert response.headers["allow"] == "POST"
    assert_problem(shared_live.client.delete("/info"), 405, "method-not-allowed")


def test_class_the_encoder_does_not_know(shared_live: Live) -> None:
    assert_problem(shared_live.generate("apple", "unknown thing"), 422, "invalid-input", "classes")
