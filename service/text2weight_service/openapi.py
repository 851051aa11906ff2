"""The OpenAPI description; `python -m text2weight_service.openapi FILE` writes it, the same bytes every time."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from text2weight_service.access import is_open
from text2weight_service.problems import MEDIA_TYPE, Kind, Problem
from text2weight_service.schemas import EnhanceRequest, FuseRequest, GenerateRequest, StreamRequest

DEFAULT_PATH = Path("docs/openapi.json")
_BODIES = (GenerateRequest, StreamRequest, FuseRequest, EnhanceRequest, Problem)


def install_openapi(app: FastAPI) -> None:
    """Make the application describe the bodies that its routes read and write by hand."""

    def describe() -> dict[str, Any]:
        if app.openapi_schema is None:
            description = get_openapi(title=app.title, version=app.version, summary=app.summary, routes=app.routes)
            schemas = description.setdefault("components", {}).setdefault("schemas", {})
            for model in _BODIES:
                schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
                schemas.update(schema.pop("$defs", {}))
                schemas[model.__name__] = schema
            _describe_access(description)
            app.openapi_schema = description
        return app.openapi_schema

    # FastAPI's documented way to replace the description.
    app.openapi = describe  # type: ignore[method-assign]


def _describe_access(description: dict[str, Any]) -> None:
    """Say which paths ask for a key where keys are set, and what they answer without one or too often."""
    description["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, operations in description["paths"].items():
        if is_open(path):
            continue
        for operation in operations.values():
            operation["security"] = [{"key": []}, {}]
            for kind in (Kind.UNAUTHORIZED, Kind.RATE_LIMITED):
                operation["responses"].setdefault(str(kind.status), _problem(kind))


def _problem(kind: Kind) -> dict[str, Any]:
    name = "WWW-Authenticate" if kind is Kind.UNAUTHORIZED else "Retry-After"
    schema = {"$ref": "#/components/schemas/Problem"}
    return {
        "description": kind.title,
        "content": {MEDIA_TYPE: {"schema": schema}},
        "headers": {name: {"schema": {"type": "string" if kind is Kind.UNAUTHORIZED else "integer"}}},
    }


def write_openapi(path: Path = DEFAULT_PATH) -> None:
    """Write the description of the default settings' application; nothing is loaded."""
    from text2weight_service.app import create_app
    from text2weight_service.settings import Settings

    description = create_app(Settings()).openapi()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(description, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write_openapi(*(Path(argument) for argument in sys.argv[1:2]))
