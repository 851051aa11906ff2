"""A service that plays a script, for httpx's mock transport."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx

Call = Callable[..., Any]


class Script:
    """A mock transport's handler that plays responses or exceptions and records the requests."""

    def __init__(self, *steps: httpx.Response | Exception) -> None:
        self.steps = list(steps)
        self.requests: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        step = self.steps.pop(0) if len(self.steps) > 1 else self.steps[0]
        if isinstance(step, Exception):
            raise step
        return step

    @property
    def bodies(self) -> list[dict[str, Any]]:
        return [json.loads(request.content) for request in self.requests]


def problem(status: int, **fields: Any) -> httpx.Response:
    headers = fields.pop("headers", {})
    body = {"type": "about:blank", "title": "No", "status": status, "detail": "Why.", "request_id": "r-1", **fields}
    return httpx.Response(
        status, content=json.dumps(body), headers={"Content-Type": "application/problem+json", **headers}
    )
