"""A model without a network: its heads are a simple function of the request, and tests can hold or break it."""

import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tests.patience import HELD_S
from text2weight.artifact import FORMAT, HeadArtifact
from text2weight.condition import condition_of_task
from text2weight.denoiser import DenoiserConfig
from text2weight.diffusion import NoiseSchedule
from text2weight.enhancement import Start
from text2weight.errors import InvalidInputError
from text2weight.generator import GenerationRequest
from text2weight.head import HeadSpec
from text2weight.outside import OutsideSettings
from text2weight.samplers import check_sampler, make_plan
from text2weight.sampling import Sample

DIM = 8
SPEC = HeadSpec(input_dim=4, hidden_dim=2, output_dim=DIM)
WARM_UP = ("cat", "dog")


class FakeTextEncoder:
    """Unit vectors drawn from a hash of the text; refuses texts with "unknown", fails on "unencodable"."""

    name = "fake"
    fingerprint = "f00d"
    embedding_dim = DIM
    vocabulary = None

    def __init__(self) -> None:
        self.encoded: list[str] = []

    def encode(self, texts: Sequence[str]) -> torch.Tensor:
        self.encoded += dict.fromkeys(texts)  # repeated ones are padding
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
    outside: OutsideSettings | None = None
    classes: tuple[str, ...] = ()
    logit_scale: float = 30.0
    schedule: NoiseSchedule = field(default_factory=NoiseSchedule)
    backbone: dict[str, Any] = field(default_factory=lambda: {"name": "fake-backbone"})
    evaluation: dict[str, Any] = field(default_factory=dict)
    denoiser: DenoiserConfig = field(default_factory=DenoiserConfig)


class FakeModel:
    """Implements `text2weight_service.model.Model`.

    Attributes:
        batches: the class tuples of every call that was made, without warm-ups.
        rows: how many rows each of those calls had.
        gate: advance waits here; set by default. Clear it to keep the model busy.
        entered: set as soon as a call has started.
        lost: while true every call fails, as on a lost device.
        wrong: while true numbers are others than before.
        trouble: called with the samples and rows of every call before it moves anything; it may raise.
        steps_made: calls that were made, without warm-ups.
    """

    checkpoint_hash = "c0ffee"
    calls_at_once = 1

    def __init__(self) -> None:
        self.path = Path("no such checkpoint")
        self.config = FakeConfig()
        self.anchor = torch.zeros(SPEC.num_parameters)
        self.text_encoder = FakeTextEncoder()
        self.batches: list[list[tuple[str, ...]]] = []
        self.rows: list[int] = []
        self.threads: set[str] = set()
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.lost = False
        self.wrong = False
        self.trouble: Callable[[Sequence[Sample], int], None] | None = None
        self.steps_made = 0

    def prompts(self, classes: Sequence[str], template: str | None = None) -> list[str]:
        return [(template or self.config.template).format(name) for name in classes]

    def resolve_sampling(self, sampler: str | None, steps: int | None) -> tuple[str, int]:
        return sampler or "mean", steps or 1

    def check(self, request: GenerationRequest) -> None:
        check_sampler(request.sampler, request.steps, 1000)

    def begin(self, request: GenerationRequest) -> Sample:
        if "unbeginnable" in request.classes:
            raise RuntimeError("secret internals")
        source = torch.Generator().manual_seed(request.seed)
        noisy = torch.randn(SPEC.num_parameters, generator=source)  # (P,)
        plan = make_plan(request.sampler, request.steps, self.config.schedule)
        condition = condition_of_task(request.embeddings)
        return Sample(request, Start(1000), plan, source, condition, noisy, torch.zeros_like(noisy))

    def advance(self, samples: Sequence[Sample], rows: int | None = None) -> None:
        self.threads.add(threading.current_thread().name)
        if self.lost:
            raise RuntimeError("device lost")
        asked = [sample.request.classes for sample in samples]
        assert rows is not None
        assert len(samples) <= rows
        warms_up = [set(classes) for classes in asked] == [set(WARM_UP)]
        if not warms_up:
            self.batches.append(asked)
            self.rows.append(rows)
            self.entered.set()
        assert self.gate.wait(HELD_S)
        if self.trouble is not None:
            self.trouble(samples, rows)
        if any("broken" in classes for classes in asked):
            raise RuntimeError("secret internals")
        for sample in samples:
            sample.calls += 1
        self.steps_made += not warms_up

    def finish(self, sample: Sample) -> HeadArtifact:
        assert sample.done
        return self._head(sample.request, 0.0)

    def preview(self, sample: Sample) -> HeadArtifact:
        return self._head(sample.request, float(len(sample.plan) - sample.calls))

    def _head(self, request: GenerationRequest, offset: float) -> HeadArtifact:
        flat = torch.randn(SPEC.num_parameters, generator=torch.Generator().manual_seed(request.seed))
        flat = flat + request.embeddings.sum() + offset + (float("nan") if self.wrong else 0.0)
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


@contextmanager
def held(model: FakeModel) -> Iterator[None]:
    """Keep the model busy; a test that fails meanwhile lets it go."""
    model.gate.clear()
    try:
        yield
    finally:
        model.gate.set()
