"""The OpenAPI description says what the service does."""

import json
from pathlib import Path
from typing import Any

import pytest

from text2weight_service.app import create_app
from text2weight_service.openapi import DEFAULT_PATH, write_openapi
from text2weight_service.problems import Kind
from text2weight_service.settings import Settings


@pytest.fixture(scope="module")
def description() -> dict[str, Any]:
    return create_app(Settings()).openapi()


def test_routes(description: dict[str, Any]) -> None:
    assert sorted(description["paths"]) == [
        "/classify",
        "/enhance",
        "/fuse",
        "/generate",
        "/generate/stream",
        "/health/live",
        "/health/ready",
        "/info",
        "/metrics",
    ]


@pytest.mark.parametrize("path", ["/generate", "/generate/stream", "/fuse", "/enhance"])
def test_documented_statuses(description: dict[str, Any], path: str) -> None:
    responses = description["paths"][path]["post"]["responses"]
    kept = [] if path.endswith("stream") else ["304"]
    assert sorted(responses) == sorted(["200", "401", "408", "413", "415", "422", "429", "500", "503", "504", *kept])
    answer = "text/event-stream" if path.endswith("stream") else "application/octet-stream"
    assert list(responses["200"]["content"]) == [answer]
    for status, response in responses.items():
        if status not in ("200", "304"):
            assert response["content"] == {
                "application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}
            }
    classify = description["paths"]["/classify"]["post"]["responses"]
    documented = {int(status) for status in responses | classify} | {404, 405}
    assert {kind.status for kind in Kind} <= documented


def test_every_reference_resolves(description: dict[str, Any]) -> None:
    text = json.dumps(description)
    for name in {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}:
        assert name in description["components"]["schemas"], name


@pytest.mark.parametrize(
    ("path", "kinds", "name"),
    [
        ("/generate", ["application/json"], "GenerateRequest"),
        ("/generate/stream", ["application/json"], "StreamRequest"),
        ("/fuse", ["application/json", "multipart/form-data"], "FuseRequest"),
        ("/enhance", ["multipart/form-data"], "EnhanceRequest"),
    ],
)
def test_request_bodies(description: dict[str, Any], path: str, kinds: list[str], name: str) -> None:
    content = description["paths"][path]["post"]["requestBody"]["content"]
    assert list(content) == kinds
    reference = {"$ref": f"#/components/schemas/{name}"}
    if "application/json" in kinds:
        assert content["application/json"]["schema"] == reference
    if "multipart/form-data" in kinds:
        assert content["multipart/form-data"]["schema"]["properties"]["request"] == reference
    schema = description["components"]["schemas"][name]
    assert schema["additionalProperties"] is False
    assert schema["properties"]["sampler"]["enum"] == ["mean", "ddpm", "ddim", "dpmpp_2m", None]


def test_committed_file_is_current(tmp_path: Path) -> None:
    write_openapi(tmp_path / "openapi.json")
    committed = Path(__file__).resolve().parents[2] / DEFAULT_PATH
    assert committed.read_bytes() == (tmp_path / "openapi.json").read_bytes(), "run: make openapi"


def test_variables_do_not_change_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_openapi(tmp_path / "one.json")
    monkeypatch.setenv("T2W_MAX_CLASSES", "3")
    write_openapi(tmp_path / "two.json")
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()
