"""What `GET /info` tells: all that a client needs to choose."""

from __future__ import annotations

import platform
from importlib.metadata import version
from typing import Any, get_args

from pydantic import BaseModel, Field

from text2weight.artifact import FORMAT, PRECISIONS, STACK_FORMAT
from text2weight.condition import MAX_NAME_LENGTH, MAX_WEIGHT
from text2weight.descriptions import MAX_DESCRIPTION_LENGTH
from text2weight.generator import MAX_GUIDANCE_SCALE, MAX_SEED, MAX_TEMPLATE_LENGTH
from text2weight.outside import OutsideSettings
from text2weight.samplers import EXACT_STEPS, SAMPLERS
from text2weight.text_encoder import TableTextEncoder
from text2weight_service.classify import MAX_PICTURES, backbone_folder
from text2weight_service.heads import MAX_DESCRIPTIONS
from text2weight_service.model import Model
from text2weight_service.schemas import MAX_SAMPLES, MAX_TASKS, FuseMethod
from text2weight_service.settings import Settings

_LIBRARIES = ("open_clip_torch", "safetensors", "torch")


class ModelInfo(BaseModel):
    """What the loaded checkpoint is."""

    checkpoint: str = Field(description="sha256 of the checkpoint")
    text_encoder: str = Field(description="name of the text encoder")
    text_encoder_fingerprint: str = Field(description="identifies the text encoder's weights")
    template: str = Field(description="prompt with {} for the class name")
    head: dict[str, Any] = Field(description="sizes and variant of the generated heads")
    logit_scale: float = Field(description="s in logits = s * cos(head(f), e_i)")
    backbone: dict[str, Any] = Field(description="the image model whose features the heads take, and its preprocessing")
    sampler: str = Field(description="used where a request names none")
    steps: int = Field(description="likewise")
    samplers: list[str] = Field(description="allowed samplers")
    outside: OutsideSettings | None = Field(
        description="how class names that training never saw are treated; null for as any other"
    )
    evaluation: dict[str, Any] = Field(description="measured results that the checkpoint carries")


class Limits(BaseModel):
    """The largest values that this worker accepts."""

    max_classes: int = Field(description="class names in one request")
    max_steps: int = Field(description="denoiser calls in one request")
    max_samples: int = Field(description="heads in one request")
    max_tasks: int = Field(description="tasks that one head is made for")
    max_task_weight: float = Field(description="weight of a task; it is above 0")
    max_body_bytes: int = Field(description="size of a JSON body")
    max_upload_bytes: int = Field(description="size of a multipart body")
    request_timeout_s: float = Field(description="from first byte of a request to its answer")
    max_seed: int = Field(description="seed")
    max_name_length: int = Field(description="characters of a class name")
    max_template_length: int = Field(description="characters of a prompt_template")
    max_descriptions: int = Field(description="descriptions of one class")
    max_description_length: int = Field(description="characters of a description")
    max_guidance_scale: float = Field(description="guidance_scale")
    max_pictures: int = Field(description="pictures in one request")
    exact_steps: dict[str, int] = Field(description="samplers that make exactly so many denoiser calls")


class Features(BaseModel):
    """What not every checkpoint can do."""

    guidance: bool = Field(description="a guidance_scale other than 1")
    descriptions: bool = Field(description="descriptions: the text encoder takes any text")
    enhance_reads_given: bool = Field(description="/enhance by noise shows the given head to the network")
    classify: bool = Field(description="/classify: the checkpoint holds its backbone")


class Info(BaseModel):
    """Body of `GET /info`."""

    version: str = Field(description="version of the service")
    libraries: dict[str, str] = Field(description="versions of what it computes with")
    phase: str = Field(description="ready or draining")
    model: ModelInfo
    limits: Limits
    features: Features
    known_classes: list[str] | None = Field(
        description="names that the text encoder was trained on or holds; null where it takes any text"
    )
    formats: list[str] = Field(description="formats of the heads that are returned")
    precisions: list[str] = Field(description="allowed values of precision")
    fuse_methods: list[str] = Field(description="allowed methods of /fuse")
    settings: dict[str, Any] = Field(description="the worker's settings by name, secrets masked")


def describe_service(model: Model, settings: Settings, phase: str, version: str) -> Info:
    """What a client may know about this worker."""
    vocabulary = model.text_encoder.vocabulary
    return Info(
        version=version,
        libraries=_libraries(),
        phase=phase,
        model=_describe_model(model),
        limits=Limits(
            max_classes=settings.max_classes,
            max_steps=min(settings.max_steps, model.config.schedule.num_timesteps),
            max_samples=MAX_SAMPLES,
            max_tasks=MAX_TASKS,
            max_task_weight=MAX_WEIGHT,
            max_body_bytes=settings.max_body_bytes,
            max_upload_bytes=settings.max_upload_bytes,
            request_timeout_s=settings.request_timeout_s,
            max_seed=MAX_SEED,
            max_name_length=MAX_NAME_LENGTH,
            max_template_length=MAX_TEMPLATE_LENGTH,
            max_descriptions=MAX_DESCRIPTIONS,
            max_description_length=MAX_DESCRIPTION_LENGTH,
            max_guidance_scale=MAX_GUIDANCE_SCALE,
            max_pictures=MAX_PICTURES,
            exact_steps=dict(EXACT_STEPS),
        ),
        features=Features(
            guidance=model.config.denoiser.null_condition,
            descriptions=not isinstance(model.text_encoder, TableTextEncoder),
            enhance_reads_given=model.config.denoiser.reads_given,
            classify=backbone_folder(model) is not None,
        ),
        known_classes=None if vocabulary is None else list(vocabulary.names),
        formats=[FORMAT, STACK_FORMAT],
        precisions=list(PRECISIONS),
        fuse_methods=list(get_args(FuseMethod)),
        settings=settings.shown(),
    )


def _describe_model(model: Model) -> ModelInfo:
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
        outside=config.outside,
        evaluation=config.evaluation,
    )


def _libraries() -> dict[str, str]:
    return {"python": platform.python_version()} | {name: version(name) for name in _LIBRARIES}
