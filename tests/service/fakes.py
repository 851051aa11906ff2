"""A model without a network: its heads are a simple function of the request, and tests can hold or break it."""

import hashlib
import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from text2weight.artifact import FORMAT, HeadArtifact
from text2weight.errors import InvalidInputError
from text2weight.generator import GenerationRequest
from text2weight.head import HeadSpec
from text2weight.samplers import check_sampler

DIM = 8
SPEC = HeadSpec(input_dim=4, hidden_dim=2, output_dim=DIM)
WARM_UP = ("cat", "dog")


class FakeTextEncoder:
    """Unit vectors drawn from a hash of the text; refuses texts with "unknown", fails on "unencodable"."""

    name = "fake"
    fingerprint = "f00d"
    embedding_dim = DIM

    def __init__(self) -> None:
        self.encoded: list[str] = []

    def encode(self, texts: Sequence[str]) -> torch.Tensor:
        self.encoded += texts
        for text in texts:
            if "unknown" in text:
                raise InvalidInputError("classes", f"no embedding for {text}")
            if "unencodable" in text:
                raise RuntimeError("tokenizer exploded")
        return torch.stack([unit_vector(text) for text in texts])


def unit_vector(text: str) -> torch.Tensor:
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")
    vector = torch.randn(DIM, generator=torch.Generator().manual_seed(seed))
    return vector / vector.norm()


@dataclass
class FakeConfig:
    template: str = "a {}"
    head: HeadSpec = SPEC
    sampler: str = "mean"
    steps: int = 1
    logit_scale: float = 30.0
    backbone: dict[str, Any] = field(default_factory=lambda: {"name": "fake-backbone"})
    evaluation: dict[str, Any] = field(default_factory=dict)


class FakeModel:
    """Implements `text2weight_service.model.Model`.

    Attributes:
        batches: the class tuples of every batch that was started, without warm-ups.
        gate: generate_batch waits here; set by default. Clear it to keep the model busy.
        entered: set as soon as a batch has started.
        lost: while true every call fails, as on a lost device.
    """

    checkpoint_hash = "c0ffee"

    def __init__(self) -> None:
        self.path = Path("no such checkpoint")
        self.config = FakeConfig()
        self.text_encoder = FakeTextEncoder()
        self.batches: list[list[tuple[str, ...]]] = []
        self.threads: set[str] = set()
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.lost = False
        self.steps_made = 0

    def prompts(self, classes: Sequence[str]) -> list[str]:
        return [self.config.template.format(name) for name in classes]

    def resolve_sampling(self, sampler: str | None, steps: int | None) -> tuple[str, int]:
        return sampler or "mean", steps or 1

    def check(self, request: GenerationRequest) -> None:
        check_sampler(request.sampler, request.steps, 1000)

    def generate_batch(
        self, requests: Sequence[GenerationRequest], *, on_step: Callable[[int], None] | None = None
    ) -> list[HeadArtifact]:
        self.threads.add(threading.current_thread().name)
        if self.lost:
            raise RuntimeError("device lost")
        if [request.classes for request in requests] != [WARM_UP]:
            self.batches.append([request.classes for request in requests])
            self.entered.set()
        assert self.gate.wait(20)
        for step in range(max(request.steps for request in requests)):
            self.steps_made += 1
            if on_step is not None:
                on_step(step + 1)
        if any("broken" in request.classes for request in requests):
            raise RuntimeError("secret internals")
        return [self._head(request) for request in requests]

    def _head(self, request: GenerationRequest) -> HeadArtifact:
        flat = torch.randn(SPEC.num_parameters, generator=torch.Generator().manual_seed(request.seed))
        flat = flat + request.embeddings.sum()
        metadata = {
            "format": FORMAT,
            "classes": json.dumps(request.classes, ensure_ascii=False),
            "template": self.config.template,
            "logit_scale": str(self.config.logit_scale),
            "activation": "gelu",
            "seed": str(request.seed),
            "steps": str(request.steps),
            "sampler": request.sampler,
        }
        tensors = {name: tensor.clone() for name, tensor in SPEC.unflatten(flat).items()}
        return HeadArtifact(tensors, request.embeddings, metadata)
