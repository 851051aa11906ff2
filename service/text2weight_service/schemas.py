"""The JSON bodies of the HTTP contract."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, FailFast, Field

from text2weight.generator import MAX_SEED
from text2weight.samplers import SAMPLERS
from text2weight_service.model import Model
from text2weight_service.settings import Settings


class GenerateRequest(BaseModel):
    """Body of `POST /generate`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    # The first name that is not a string is enough to know: ten thousand of them need no list of errors.
    classes: Annotated[list[str], FailFast()] = Field(
        description="class names, at least 2, each once; row i of the head's `class_embeddings` is class i",
        examples=[["apple", "bus", "lizard"]],
    )
    seed: int | None = Field(
        default=None, ge=0, le=MAX_SEED, description="equal requests give equal heads; drawn if absent"
    )
    steps: int | None = Field(default=None, ge=1, description="denoiser calls; the checkpoint's default if absent")
    sampler: str | None = Field(
        default=None, description="the checkpoint's default if absent", json_schema_extra={"enum": [*SAMPLERS, None]}
    )


class Health(BaseModel):
    """Body of the health routes when all is well."""

    status: str = Field(description='"alive" or "ready"')


class ModelInfo(BaseModel):
    """What the loaded checkpoint is."""

    checkpoint: str = Field(description="sha256 of the checkpoint")
    text_encoder: str = Field(description="name of the text encoder")
    text_encoder_fingerprint: str = Field(description="identifies the text encoder's weights")
    template: str = Field(description="prompt with {} for the class name")
    head: dict[str, Any] = Field(description="sizes and variant of the generated heads")
    logit_scale: float = Field(description="s in logits = s * cos(head(f), e_i)")
    backbone: dict[str, Any] = Field(description="the image model whose features the heads take")
    sampler: str = Field(description="used where a request names none")
    steps: int = Field(description="likewise")
    samplers: list[str] = Field(description="allowed samplers")
    evaluation: dict[str, Any] = Field(description="measured results that the checkpoint carries")


class Info(BaseModel):
    """Body of `GET /info`."""

    version: str = Field(description="version of the service")
    phase: str = Field(description="ready or draining")
    model: ModelInfo
    settings: dict[str, Any] = Field(description="the worker's settings by name, secrets masked")


def describe_model(model: Model) -> ModelInfo:
    """What a client may know about the loaded model."""
    config = model.config
    return ModelInfo(
        checkpoint=model.checkpoint_hash,
        text_encoder=model.text_encoder.name,
        text_encoder_fingerprint=model.text_encoder.fingerprint,
        template=config.template,
        head=config.head.model_dump(),
        logit_scale=config.logit_scale,
        backbone=config.backbone,
        sampler=config.sampler,
        steps=config.steps,
        samplers=list(SAMPLERS),
        evaluation=config.evaluation,
    )


def describe_service(model: Model, settings: Settings, phase: str, version: str) -> Info:
    """What a client may know about this worker."""
    return Info(version=version, phase=phase, model=describe_model(model), settings=settings.shown())
