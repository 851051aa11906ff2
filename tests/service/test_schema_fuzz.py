"""Requests made from the OpenAPI document, valid and broken: every answer is as documented, none an internal error.

`FUZZ_EXAMPLES` sets how many requests of each kind every path gets.
"""

import json
import os
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.patience import PATIENCE_S
from tests.service.live import Live
from text2weight_service.app import create_app
from text2weight_service.settings import Settings

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "15"))
CHECKED = [status_code_conformance, content_type_conformance, response_schema_conformance]
DESCRIPTION = json.loads(json.dumps(create_app(Settings()).openapi()))
SCHEMA = schemathesis.openapi.from_dict(DESCRIPTION)
BODIES = sorted(path for path, item in DESCRIPTION["paths"].items() if "post" in item)

always_the_same = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


def test_checks_are_those_of_the_library() -> None:
    assert {check.__name__ for check in CHECKED} <= set(CHECKS.get_all_names())


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize("path", BODIES)
def test_bodies(shared_live: Live, path: str, mode: GenerationMode) -> None:
    @always_the_same
    @given(case=SCHEMA[path]["POST"].as_strategy(mode))
    def answer(case: Any) -> None:
        response = case.call(base_url=str(shared_live.client.base_url), timeout=PATIENCE_S)
        assert response.status_code != 500, response.text
        case.validate_response(response, checks=CHECKED)

    answer()
    assert shared_live.generate("apple", "bus").status_code == 200


@pytest.mark.parametrize("path", sorted(set(DESCRIPTION["paths"]) - set(BODIES)))
def test_answers_without_a_body(shared_live: Live, path: str) -> None:
    case = SCHEMA[path]["GET"].Case()
    case.call_and_validate(base_url=str(shared_live.client.base_url), checks=CHECKED, timeout=PATIENCE_S)
