"""What the service needs of a model, so that the engine can be tested without a real one."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from text2weight.artifact import HeadArtifact
from text2weight.denoiser import DenoiserConfig
from text2weight.diffusion import NoiseSchedule
from text2weight.generator import GenerationRequest
from text2weight.head import HeadSpec
from text2weight.outside import OutsideSettings
from text2weight.sampling import Sample
from text2weight.text_encoder import TextEncoder
from text2weight_service.settings import Settings


class ModelConfig(Protocol):
    """The part of a checkpoint's configuration that the service reads."""

    @property
    def template(self) -> str:
        """Prompt with one `{}` for a class name."""
        ...

    @property
    def head(self) -> HeadSpec:
        """Specification of the generated heads."""
        ...

    @property
    def sampler(self) -> str:
        """Used where a request names none."""
        ...

    @property
    def steps(self) -> int:
        """Used where a request names none."""
        ...

    @property
    def classes(self) -> tuple[str, ...]:
        """Names it was trained on; empty where it does not say."""
        ...

    @property
    def outside(self) -> OutsideSettings | None:
        """How names that training never saw are treated; None for as any other."""
        ...

    @property
    def logit_scale(self) -> float:
        """Scale s of the cosine logits."""
        ...

    @property
    def schedule(self) -> NoiseSchedule:
        """The noise schedule."""
        ...

    @property
    def backbone(self) -> dict[str, Any]:
        """The image model whose features the heads take."""
        ...

    @property
    def evaluation(self) -> dict[str, Any]:
        """Measured results."""
        ...

    @property
    def denoiser(self) -> DenoiserConfig:
        """What the network was trained to read."""
        ...


class Model(Protocol):
    """The methods of `text2weight.generator.Generator` that the engine calls.

    `prompts`, `resolve_sampling` and `check` are cheap and run on the event loop. The text encoder runs on a thread of
    its own, and for checks on the model's thread; `advance` on `calls_at_once` threads; the rest on the model's alone.
    """

    @property
    def path(self) -> Path:
        """The checkpoint's folder."""
        ...

    @property
    def config(self) -> ModelConfig:
        """The checkpoint's configuration."""
        ...

    @property
    def checkpoint_hash(self) -> str:
        """The sha256 of the checkpoint."""
        ...

    @property
    def text_encoder(self) -> TextEncoder:
        """Embeds prompts."""
        ...

    @property
    def calls_at_once(self) -> int:
        """How many threads should call `advance`, with equal shares of torch's."""
        ...

    @property
    def anchor(self) -> Tensor:
        """(P,) the head that deviations are measured from, on the CPU."""
        ...

    def prompts(self, classes: Sequence[str], template: str | None = None) -> list[str]:
        """One prompt per class name; raises InvalidInputError for a template that is none."""
        ...

    def resolve_sampling(self, sampler: str | None, steps: int | None) -> tuple[str, int]:
        """Fill in the sampler and steps that a request left out."""
        ...

    def check(self, request: GenerationRequest) -> None:
        """Raise InvalidInputError for a request that cannot be computed."""
        ...

    def begin(self, request: GenerationRequest) -> Sample:
        """Begin a request's reverse diffusion; raises InvalidInputError for one that cannot be computed."""
        ...

    def advance(self, samples: Sequence[Sample], rows: int | None = None) -> None:
        """Make the next denoiser call of each sample, all in one of so many rows; on an error none has moved."""
        ...

    def finish(self, sample: Sample) -> HeadArtifact:
        """The head of a sample that is done."""
        ...

    def preview(self, sample: Sample) -> HeadArtifact:
        """The head that the last call of a sample estimated."""
        ...


_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def usable_cores() -> int:
    """Processor cores that this process may use, by its affinity and by the quota of its control group."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = _QUOTA.read_text().split()
        return max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):  # no control group, or "max": no quota
        return cores


def load_model(settings: Settings) -> Model:
    """Load the configured checkpoint, or the bundled one.

    Raises:
        CheckpointError: the checkpoint is missing, damaged or does not fit this version.
    """
    import torch

    from text2weight.checkpoint import bundled_checkpoint
    from text2weight.generator import Generator

    # A container's quota is unknown to torch: with a thread for every core of the machine it would mostly wait.
    # OMP_NUM_THREADS, which torch reads, may ask for fewer.
    torch.set_num_threads(settings.torch_threads or min(torch.get_num_threads(), usable_cores()))
    path: str | Path = settings.checkpoint if settings.checkpoint is not None else bundled_checkpoint()
    return Generator.load(path, device=settings.device)
