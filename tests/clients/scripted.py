"""A service that plays a script, for httpx's mock transport."""

from __future__ import annotations

import email
import json
from collections.abc import Callable
from email.message import Message
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


def parts(request: httpx.Request) -> list[Message]:
    """The parts of a multipart body, by the standard library's reader."""
    header = b"Content-Type: " + request.headers["content-type"].encode() + b"\r\n\r\n"
    message = email.message_from_bytes(header + request.content)
    assert message.get_content_type() == "multipart/form-data"
    return [part for part in message.walk() if not part.is_multipart()]


def described(part: Message) -> tuple[Any, ...]:
    return part.get_param("name", header="content-disposition"), part.get_filename(), part.get_content_type()


def content(part: Message) -> bytes:
    payload = part.get_payload(decode=True)
    assert isinstance(payload, bytes)
    return payload


INFO: dict[str, Any] = {
    "version": "0.1.0",
    "libraries": {"torch": "2.8.0"},
    "phase": "ready",
    "model": {
        "checkpoint": "c0ffee",
        "text_encoder": "small",
        "text_encoder_fingerprint": "f00d",
        "template": "a {}",
        "head": {"input_dim": 512},
        "logit_scale": 30.0,
        "backbone": {"name": "resnet18"},
        "sampler": "mean",
        "steps": 1,
        "samplers": ["mean", "ddim"],
        "outside": {"reach": 0.5, "temperature": 0.1},
        "evaluation": {},
        "added_later": 1,
    },
    "settings": {"request_timeout_s": 20.0},
    "limits": {
        "max_classes": 256,
        "max_steps": 1000,
        "max_samples": 16,
        "max_tasks": 16,
        "max_task_weight": 1000.0,
        "max_body_bytes": 262144,
        "max_upload_bytes": 16777216,
        "request_timeout_s": 20.0,
        "max_seed": 2**63 - 1,
        "max_name_length": 200,
        "max_template_length": 200,
        "max_descriptions": 16,
        "max_description_length": 2000,
        "max_guidance_scale": 20.0,
        "max_pictures": 16,
        "exact_steps": {"mean": 1},
    },
    "features": {"guidance": False, "descriptions": True, "enhance_reads_given": True, "classify": True},
    "known_classes": ["apple", "bus"],
    "formats": ["text2weight.head/1"],
    "precisions": ["fp32", "fp16", "bf16"],
    "fuse_methods": ["text", "ties"],
}
