"""What the service needs of a model, so that the engine can be tested without a real one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from text2weight.artifact import HeadArtifact
from text2weight.generator import GenerationRequest
from text2weight.head import HeadSpec
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
    def logit_scale(self) -> float:
        """Scale s of the cosine logits."""
        ...

    @property
    def backbone(self) -> dict[str, Any]:
        """The image model whose features the heads take."""
        ...

    @property
    def evaluation(self) -> dict[str, Any]:
        """Measured results."""
        ...


class Model(Protocol):
    """The methods of `text2weight.generator.Generator` that the engine calls.

    `prompts`, `resolve_sampling` and `check` are cheap and run on the event loop; the text encoder and
    `generate_batch` run on the engine's thread only.
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

    def prompts(self, classes: Sequence[str]) -> list[str]:
        """One prompt per class name."""
        ...

    def resolve_sampling(self, sampler: str | None, steps: int | None) -> tuple[str, int]:
        """Fill in the sampler and steps that a request left out."""
        ...

    def check(self, request: GenerationRequest) -> None:
        """Raise InvalidInputError for a request that cannot be computed."""
        ...

    def generate_batch(
        self, requests: Sequence[GenerationRequest], *, on_step: Callable[[int], None] | None = None
    ) -> list[HeadArtifact]:
        """Generate heads in one reverse diffusion; `on_step` may raise to stop it."""
        ...


def load_model(settings: Settings) -> Model:
    """Load the configured checkpoint, or the bundled one.

    Raises:
        CheckpointError: the checkpoint is missing, damaged or does not fit this version.
    """
    import torch

    from text2weight.checkpoint import bundled_checkpoint
    from text2weight.generator import Generator

    if settings.torch_threads is not None:
        torch.set_num_threads(settings.torch_threads)
    path: str | Path = settings.checkpoint if settings.checkpoint is not None else bundled_checkpoint()
    return Generator.load(path, device=settings.device)
