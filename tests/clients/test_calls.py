"""What each call sends and how it reads the answer; both clients, against httpx's mock transport."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

import text2weight_client as t2w
from tests.clients.scripted import INFO, Call, Script, content, described, parts, problem
from tests.clients.test_heads import stacked
from text2weight_client import FuseTask, GeneratedHead

OPTIONS: dict[str, Any] = {
    "seed": 3,
    "steps": 4,
    "sampler": "ddim",
    "guidance_scale": 1.5,
    "precision": "fp16",
    "deadline_ms": 900,
}


def test_generate_sends_every_option(call: Call, make_head: Any) -> None:
    script = Script(httpx.Response(200, content=make_head()))
    descriptions = {"apple": "a round fruit", "bus": ("a long car", "it carries people")}
    text = {"prompt_template": "a photo of a {}", "descriptions": descriptions, "describe_classifier": True}
    call(script, "generate", ("apple", "bus"), **OPTIONS, **text)
    sent = text | {"descriptions": {"apple": "a round fruit", "bus": ["a long car", "it carries people"]}}
    assert script.bodies == [{"classes": ["apple", "bus"], **OPTIONS, **sent}]


def test_unknown_options_are_refused_before_anything_is_sent(call: Call) -> None:
    script = Script(problem(500))
    with pytest.raises(TypeError, match="unknown option sed: allowed are deadline_ms, describe_classifier, "):
        call(script, "generate", ["a", "b"], sed=1)
    with pytest.raises(TypeError, match="unknown option descriptions"):
        call(script, "fuse", [["a", "b"], ["c", "d"]], descriptions={})
    assert script.requests == []


@pytest.mark.parametrize("samples", [1, 3])
def test_samples_give_a_sequence_of_heads(call: Call, make_head: Any, samples: int) -> None:
    seeds = tuple(range(5, 5 + samples))
    script = Script(httpx.Response(200, content=stacked(make_head, seeds) if samples > 1 else make_head(seed=5)))
    heads = call(script, "generate", ["apple", "bus", "lizard"], samples=samples, seed=5)
    assert script.bodies == [{"classes": ["apple", "bus", "lizard"], "samples": samples, "seed": 5}]
    assert isinstance(heads, t2w.GeneratedHeads)
    assert heads.seeds == seeds


def test_answer_that_is_no_file_of_heads(call: Call, make_head: Any) -> None:
    with pytest.raises(t2w.InvalidResponseError, match="200 with a body that is not heads"):
        call(Script(httpx.Response(200, content=b"x" * 100)), "generate", ["a", "b"], samples=2)


def test_headers_of_the_answer_come_with_the_head(call: Call, make_head: Any) -> None:
    headers = {"X-Request-ID": "r-7", "Server-Timing": 'queue;dur=0.50, sample;desc="all steps";dur=12', "ETag": '"e"'}
    script = Script(httpx.Response(200, content=make_head(), headers=headers))
    response = call(script, "generate", ["a", "b"]).response
    assert (response.status, response.request_id) == (200, "r-7")
    assert response.server_timing_ms == {"queue": 0.5, "sample": 12.0}
    assert response.headers["etag"] == '"e"'
    bare = call(Script(httpx.Response(200, content=make_head())), "generate", ["a", "b"]).response
    assert (bare.request_id, bare.server_timing_ms) == (None, {})


def test_fuse_of_class_lists_is_json(call: Call, make_head: Any) -> None:
    script = Script(httpx.Response(200, content=make_head()))
    call(script, "fuse", [["apple", "bus"], FuseTask(("cup", "bus"), weight=2.0)], prompt_template="the {}", **OPTIONS)
    assert script.requests[0].url.path == "/fuse"
    tasks = [{"classes": ["apple", "bus"]}, {"classes": ["cup", "bus"], "weight": 2.0}]
    assert script.bodies == [{"tasks": tasks, "prompt_template": "the {}", **OPTIONS}]


def test_fuse_of_heads_is_multipart_in_task_order(call: Call, make_head: Any) -> None:
    script = Script(httpx.Response(200, content=make_head()))
    first, second = (GeneratedHead.from_bytes(make_head(classes)) for classes in (("a", "b"), ("c", "d")))
    call(script, "fuse", [first, FuseTask(second.classes, 3.0, second)], method="ties")
    request, *heads = parts(script.requests[0])
    assert described(request) == ("request", None, "application/json")
    tasks = [{"classes": ["a", "b"]}, {"classes": ["c", "d"], "weight": 3.0}]
    assert json.loads(content(request)) == {"tasks": tasks, "method": "ties"}
    assert [described(part)[0] for part in heads] == ["head", "head"]
    assert [GeneratedHead.from_bytes(content(part)).classes for part in heads] == [("a", "b"), ("c", "d")]


def test_fuse_draws_a_seed_only_where_something_is_drawn(call: Call, make_head: Any) -> None:
    head = GeneratedHead.from_bytes(make_head())
    for options, has_seed in (({}, True), ({"method": "text"}, True), ({"method": "ties"}, False)):
        script = Script(httpx.Response(200, content=make_head()))
        call(script, "fuse", [head, head], **options)
        assert ("seed" in json.loads(content(parts(script.requests[0])[0]))) is has_seed
    script = Script(problem(422))
    with pytest.raises(t2w.InvalidRequestError):
        call(script, "fuse", [head, head], method="ties", seed=1)
    assert json.loads(content(parts(script.requests[0])[0]))["seed"] == 1


def test_fuse_of_heads_for_some_tasks_only_is_refused(call: Call, make_head: Any) -> None:
    head = GeneratedHead.from_bytes(make_head())
    with pytest.raises(ValueError, match="1 of 2 tasks have a head: give every task one, or none"):
        call(Script(problem(500)), "fuse", [head, ["a", "b"]])


def test_enhance_sends_the_head_as_it_is(call: Call, make_head: Any) -> None:
    script = Script(httpx.Response(200, content=make_head(metadata={"strength": "0.3"})))
    given = GeneratedHead.from_bytes(make_head(seed=9))
    better = call(script, "enhance", given, 0.3, **OPTIONS)
    assert better.metadata["strength"] == "0.3"
    request, head = parts(script.requests[0])
    assert json.loads(content(request)) == {"strength": 0.3, **OPTIONS}
    assert described(head) == ("head", "head.safetensors", "application/octet-stream")
    assert content(head) == given.to_bytes()
    call(script, "enhance", given, 1, classes=("x", "y"), method="noise")
    body = json.loads(content(parts(script.requests[1])[0]))
    assert (body["classes"], body["method"]) == (["x", "y"], "noise")


@pytest.mark.parametrize("status", [408, 503])
def test_multipart_is_sent_again_whole(call: Call, make_head: Any, sleeps: list[float], status: int) -> None:
    script = Script(problem(status), httpx.ConnectError("refused"), httpx.Response(200, content=make_head()))
    call(script, "enhance", GeneratedHead.from_bytes(make_head()), 0.5)
    bodies = [[content(part) for part in parts(request)] for request in script.requests]
    assert bodies[0] == bodies[1] == bodies[2]
    assert len(sleeps) == 2


def test_pictures_are_sent_again_whole(call: Call, make_head: Any, tmp_path: Path, sleeps: list[float]) -> None:
    """What can be read only once is read before the first attempt."""
    path = tmp_path / "cup.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n...")
    once = (image for image in (path, b"?"))
    script = Script(problem(408), httpx.Response(200, json={"images": []}))
    call(script, "classify", GeneratedHead.from_bytes(make_head()), once)
    first, second = ([content(part) for part in parts(request)] for request in script.requests)
    assert first == second
    assert first[1:] == [path.read_bytes(), b"?"]


def test_classify_sends_images_and_reads_the_ranking(call: Call, make_head: Any, tmp_path: Path) -> None:
    path = tmp_path / "cup.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n...")
    ranking = [{"name": "cup", "probability": 0.9}, {"name": "bus", "probability": 0.1}]
    answer = {"images": [{"filename": "cup.png", "classes": ranking}, {"filename": "image-1", "classes": ranking}]}
    script = Script(httpx.Response(200, json=answer))
    images = [path, b"\xff\xd8\xff..", b"RIFF....WEBP", b"?"]
    result = call(script, "classify", GeneratedHead.from_bytes(make_head()), images)
    assert [image.filename for image in result] == ["cup.png", "image-1"]
    assert (result[0].best.name, result[0].classes[1].probability) == ("cup", 0.1)
    assert [described(part) for part in parts(script.requests[0])] == [
        ("head", "head.safetensors", "application/octet-stream"),
        ("image", "cup.png", "image/png"),
        ("image", "image-1", "image/jpeg"),
        ("image", "image-2", "image/webp"),
        ("image", "image-3", "application/octet-stream"),
    ]


def test_classify_of_one_path_is_not_taken_for_a_list(call: Call, make_head: Any) -> None:
    head = GeneratedHead.from_bytes(make_head())
    with pytest.raises(TypeError, match="images is one str: give a list"):
        call(Script(problem(500)), "classify", head, "cup.png")
    with pytest.raises(FileNotFoundError):
        call(Script(problem(500)), "classify", head, ["absent.png"])


@pytest.mark.parametrize("answer", [{}, {"images": [{"filename": "a"}]}, {"images": [1]}])
def test_classify_with_an_odd_answer(call: Call, make_head: Any, answer: Any) -> None:
    with pytest.raises(t2w.InvalidResponseError, match="without classified images"):
        call(Script(httpx.Response(200, json=answer)), "classify", GeneratedHead.from_bytes(make_head()), [b"?"])


def test_classify_without_backbone(call: Call, make_head: Any) -> None:
    unsupported = problem(501, type="urn:text2weight:problem:no-backbone", title="No backbone")
    with pytest.raises(t2w.NotSupportedError, match="501 No backbone"):
        call(Script(unsupported), "classify", GeneratedHead.from_bytes(make_head()), [b"?"])


def test_info_is_typed_and_raw(call: Call) -> None:
    info = call(Script(httpx.Response(200, json=INFO)), "info")
    assert (info.version, info.phase, info.raw) == ("0.1.0", "ready", INFO)
    assert (info.model.checkpoint, info.model.samplers) == ("c0ffee", ["mean", "ddim"])
    assert (info.limits.max_samples, info.limits.request_timeout_s) == (16, 20.0)
    assert (info.limits.max_pictures, info.limits.exact_steps) == (16, {"mean": 1})
    assert (info.features.guidance, info.features.descriptions) == (False, True)
    assert (info.known_classes, info.fuse_methods) == (("apple", "bus"), ("text", "ties"))
    assert info.model.outside == {"reach": 0.5, "temperature": 0.1}
    assert (info.libraries, info.formats) == ({"torch": "2.8.0"}, ("text2weight.head/1",))
    assert info.precisions == ("fp32", "fp16", "bf16")
    assert info.settings == {"request_timeout_s": 20.0}
    assert call(Script(httpx.Response(200, json=INFO | {"known_classes": None})), "info").known_classes is None


def test_info_of_another_version_says_what_is_missing(call: Call) -> None:
    info = call(Script(httpx.Response(200, json={"version": "0.0.1", "limits": {"max_steps": 4}})), "info")
    assert info.version == "0.0.1"
    with pytest.raises(t2w.InvalidResponseError, match="does not state 'features'"):
        info.features  # noqa: B018
    with pytest.raises(t2w.InvalidResponseError, match=r"states no limits\.exact_steps, max_body_bytes, "):
        info.limits  # noqa: B018


def test_request_gives_the_answer_as_it_is(call: Call, sleeps: list[float]) -> None:
    script = Script(problem(503), httpx.Response(200, text="# metrics", headers={"X-Request-ID": "r"}))
    response = call(script, "request", "GET", "/metrics")
    assert (response.text, response.headers["x-request-id"], len(sleeps)) == ("# metrics", "r", 1)
    script = Script(httpx.Response(200, json={}))
    call(script, "request", "POST", "/generate", {"classes": ["a", "b"]})
    assert script.bodies == [{"classes": ["a", "b"]}]


def test_request_sends_bytes_and_headers(call: Call, sleeps: list[float]) -> None:
    script = Script(problem(503), httpx.Response(200))
    headers = {"Content-Type": "multipart/form-data; boundary=b", "X-Request-ID": "mine"}
    call(script, "request", "POST", "/enhance", content=b"--b--", headers=headers, client_options={"api_key": "k"})
    assert len(script.requests) == 2
    for request in script.requests:
        assert request.content == b"--b--"
        assert {name: request.headers[name] for name in headers} == headers
        assert request.headers["authorization"] == "Bearer k"


def test_request_takes_not_modified_for_an_answer(call: Call) -> None:
    script = Script(httpx.Response(304, headers={"ETag": '"a"'}))
    body = {"classes": ["a", "b"]}
    response = call(script, "request", "POST", "/generate", body, headers={"If-None-Match": '"a"'})
    assert (response.status_code, response.headers["etag"], script.bodies) == (304, '"a"', [body])
    assert script.requests[0].headers["if-none-match"] == '"a"'
    with pytest.raises(t2w.InvalidResponseError):
        call(script, "generate", ["a", "b"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"body": {}, "content": b""}, "both body and content are given"),
        ({"headers": {"authorization": "Bearer other"}}, "the client's own: give the key as api_key"),
    ],
)
def test_request_that_contradicts_itself(call: Call, arguments: dict[str, Any], message: str) -> None:
    script = Script(httpx.Response(200))
    with pytest.raises(ValueError, match=message):
        call(script, "request", "POST", "/generate", **arguments)
    assert script.requests == []


@pytest.mark.parametrize(
    ("kind", "error_type"),
    [("queue-full", t2w.QueueFullError), ("rate-limited", t2w.RateLimitedError), ("", t2w.RateLimitedError)],
)
def test_both_kinds_of_429(call: Call, sleeps: list[float], kind: str, error_type: type[t2w.APIError]) -> None:
    busy = problem(429, type=f"urn:text2weight:problem:{kind}", headers={"Retry-After": "2"})
    with pytest.raises(t2w.RateLimitedError) as caught:
        call(Script(busy), "generate", ["a", "b"], client_options={"max_retries": 1})
    assert type(caught.value) is error_type
    assert (caught.value.kind, caught.value.retry_after_s, len(sleeps)) == (kind, 2.0, 1)


def test_wrong_key_is_not_tried_twice(call: Call, sleeps: list[float]) -> None:
    script = Script(problem(401, type="urn:text2weight:problem:unauthorized", headers={"WWW-Authenticate": "Bearer"}))
    with pytest.raises(t2w.AuthenticationError) as caught:
        call(script, "info")
    assert (caught.value.kind, caught.value.request_id, len(script.requests)) == ("unauthorized", "r-1", 1)
