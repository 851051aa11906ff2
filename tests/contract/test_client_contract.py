"""The client knows what the documents promise of the service."""

import pytest

from tests.service.test_docs import rows
from text2weight_client.errors import APIError, ServerError, api_error_type
from text2weight_client.retries import is_retryable

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
