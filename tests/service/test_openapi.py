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
        "/generate",
        "/health/live",
        "/health/ready",
        "/info",
        "/metrics",
    ]


def test_documented_statuses(description: dict[str, Any]) -> None:
    responses = description["paths"]["/generate"]["post"]["responses"]
    assert sorted(responses) == ["200", "408", "413", "415", "422", "429", "500", "503", "504"]
    assert list(responses["200"]["content"]) == ["application/octet-stream"]
    for status, response in responses.items():
        if status != "200":
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


def test_request_body(description: dict[str, Any]) -> None:
    schema = description["components"]["schemas"]["GenerateRequest"]
    assert list(schema["properties"]) == ["classes", "seed", "steps", "sampler"]
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
