"""The client knows what the documents promise of the service."""

import json
from dataclasses import fields
from pathlib import Path

import pytest

from tests.service.test_docs import rows
from text2weight_client.errors import APIError, ServerError, api_error_type
from text2weight_client.info import Features, Limits, ModelInfo, ServiceInfo
from text2weight_client.retries import is_retryable

ROOT = Path(__file__).resolve().parents[2]
SCHEMAS = json.loads((ROOT / "docs/openapi.json").read_text(encoding="utf-8"))["components"]["schemas"]
# Attributes that are the client's own.
NOT_IN_THE_SCHEMA = {"Info": {"raw"}}
SHARED_CLASSES = {404: APIError, 405: APIError, 500: ServerError}
ERRORS = [(int(status), kind, again) for status, kind, _, again in rows("api.md", "Errors")]


def test_each_documented_status_has_its_error() -> None:
    types = {status: api_error_type(status) for status, _, _ in ERRORS}
    shared = {status: kind for status, kind in types.items() if kind in {APIError, ServerError}}
    assert shared == SHARED_CLASSES
    own = [kind for status, kind in types.items() if status not in shared]
    assert len(own) == len(set(own))


@pytest.mark.parametrize(("status", "kind", "again"), ERRORS)
def test_what_is_worth_another_try_gets_one(status: int, kind: str, again: str) -> None:
    """The caller decides where the page says "once, perhaps" of 500, or "later, or with fewer steps" of 504."""
    error = api_error_type(status, kind)(status, "Refused", kind=kind)
    assert is_retryable(error) is again.startswith(("yes", "after"))


@pytest.mark.parametrize(
    ("schema", "kind"), [("Info", ServiceInfo), ("ModelInfo", ModelInfo), ("Limits", Limits), ("Features", Features)]
)
def test_info_has_an_attribute_for_each_field(schema: str, kind: type) -> None:
    properties = {name for name, value in vars(kind).items() if isinstance(value, property)}
    attributes = properties | {field.name for field in fields(kind)}
    assert attributes - NOT_IN_THE_SCHEMA.get(schema, set()) == SCHEMAS[schema]["properties"].keys()
