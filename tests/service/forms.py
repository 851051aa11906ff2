"""Multipart bodies, and the heads that go into them."""

import json
from typing import Any

import httpx
import torch
import torch.nn.functional as F

from tests.service.fakes import SPEC, FakeConfig, unit_vector
from text2weight.artifact import FORMAT, HeadArtifact
from text2weight.head import HeadSpec

Part = tuple[str, tuple[str | None, bytes, str]]


def form(request: Any = None, *heads: bytes) -> list[Part]:
    """Parts for httpx; no `request` where it is None."""
    parts: list[Part] = [
        ("head", (f"head-{i}.safetensors", data, "application/octet-stream")) for i, data in enumerate(heads)
    ]
    if request is not None:
        text = request if isinstance(request, bytes) else json.dumps(request).encode()
        parts.append(("request", (None, text, "application/json")))
    return parts


def post(client: httpx.Client, path: str, request: Any = None, *heads: bytes) -> httpx.Response:
    return client.post(path, files=form(request, *heads))


def a_head(*classes: str, seed: int = 0, spec: HeadSpec = SPEC, **metadata: str) -> HeadArtifact:
    """A head as the fake model's clients might have trained it."""
    source = torch.Generator().manual_seed(seed)
    flat = torch.randn(spec.num_parameters, generator=source)  # (P,)
    rows = torch.stack([F.pad(unit_vector(f"a {name}"), (0, spec.output_dim - SPEC.output_dim)) for name in classes])
    values = {
        "format": FORMAT,
        "classes": json.dumps(classes, ensure_ascii=False),
        "logit_scale": str(FakeConfig().logit_scale),
        "activation": spec.activation,
        **metadata,
    }
    return HeadArtifact({name: tensor.clone() for name, tensor in spec.unflatten(flat).items()}, rows, values)
