"""The JSON bodies that the routes read."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, FailFast, Field, WithJsonSchema
from typing_extensions import TypeAliasType

from text2weight.artifact import Precision
from text2weight.condition import MAX_WEIGHT
from text2weight.enhancement import EnhanceMethod
from text2weight.generator import MAX_GUIDANCE_SCALE, MAX_SEED
from text2weight.samplers import SAMPLERS

MAX_SAMPLES = 16
MIN_TASKS = 2
MAX_TASKS = 16

FuseMethod = Literal["text", "average", "git-rebasin", "task-arithmetic", "ties"]
# The first name that is not a string is enough to know: ten thousand of them need no list of errors. A named type,
# because `Annotated[...] | None` would have to hash FailFast, which cannot be.
Names = TypeAliasType("Names", Annotated[list[str], FailFast()])
_TEXT = {"type": "string", "minLength": 1}
_DESCRIPTIONS_SCHEMA = {
    "type": "object",
    "additionalProperties": {"anyOf": [_TEXT, {"type": "array", "items": _TEXT, "minItems": 1}]},
}


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class SamplingFields(_Body):
    """What every head that the model computes may ask for."""

    seed: int | None = Field(
        default=None, ge=0, le=MAX_SEED, description="equal requests give equal heads; drawn if absent"
    )
    steps: int | None = Field(default=None, ge=1, description="denoiser calls; the checkpoint's default if absent")
    sampler: str | None = Field(
        default=None, description="the checkpoint's default if absent", json_schema_extra={"enum": [*SAMPLERS, None]}
    )
    guidance_scale: float | None = Field(
        default=None,
        ge=0,
        le=MAX_GUIDANCE_SCALE,
        description="of classifier-free guidance; other than 1 only where `/info` says so",
    )
    precision: Precision = Field(default="fp32", description="of the returned tensors")
    deadline_ms: int | None = Field(
        default=None, ge=1, description="give up after so long; at most, and by default, the worker's own timeout"
    )


class _PromptFields(SamplingFields):
    prompt_template: str | None = Field(
        default=None,
        description="prompt with one {} for the class name; the checkpoint's if absent",
        examples=["a photo of a {}"],
    )


class GenerateFields(_PromptFields):
    """What a head that is generated for one list of classes may ask for."""

    classes: Names = Field(
        description="class names, at least 2, each once; row i of the head's `class_embeddings` is class i",
        examples=[["apple", "bus", "lizard"]],
    )
    # What a description may be is checked where it is matched with its class, by `match_descriptions`.
    descriptions: Annotated[dict[str, Any], WithJsonSchema(_DESCRIPTIONS_SCHEMA)] | None = Field(
        default=None,
        description="a text, or several to average, for every class: read by the denoiser in place of the prompts",
        examples=[{"apple": "a round fruit", "bus": ["a long vehicle", "many seats"], "lizard": "a small reptile"}],
    )
    describe_classifier: bool = Field(
        default=False, description="make `class_embeddings` from the descriptions, too, which are then required"
    )


class GenerateRequest(GenerateFields):
    """Body of `POST /generate`."""

    samples: int = Field(
        default=1,
        ge=1,
        le=MAX_SAMPLES,
        description="heads with the seeds seed, seed + 1, ...; several come stacked along a new first axis",
    )


class StreamRequest(GenerateFields):
    """Body of `POST /generate/stream`."""

    samples: Literal[1] = Field(default=1, description="a stream is of one head")
    heads_every: int = Field(
        default=0, ge=0, description="send the estimated head after every so many denoiser calls; 0 for never"
    )


class Task(_Body):
    """One of the tasks that a head is made for."""

    classes: Names = Field(description="class names, at least 1, each once")
    weight: float | None = Field(
        default=None,
        gt=0,
        le=MAX_WEIGHT,
        description="share in the pooled condition beside the other tasks'; 1 if absent",
    )


class FuseRequest(_PromptFields):
    """Body of `POST /fuse`, or its part `request`."""

    tasks: list[Task] = Field(
        min_length=MIN_TASKS,
        max_length=MAX_TASKS,
        description="the head is for the classes of all of them, each once, in order of first appearance",
        examples=[[{"classes": ["apple", "pear"]}, {"classes": ["bus", "tram"], "weight": 2.0}]],
    )
    method: FuseMethod = Field(
        default="text", description="text generates the head from the names; the others merge the uploaded heads"
    )


class EnhanceRequest(SamplingFields):
    """Part `request` of `POST /enhance`."""

    strength: float = Field(
        ge=0, le=1, description="0 returns the head's weights, 1 forgets them and equals /generate", examples=[0.3]
    )
    method: EnhanceMethod | None = Field(
        default=None,
        description="interpolate goes that share of the way to the head of /generate; noise hides that share of the "
        "head in noise and denoises it; absent, what suits the head",
    )
    classes: Names | None = Field(default=None, description="class names; those of the head if absent")


class Health(BaseModel):
    """Body of the health routes when all is well."""

    status: str = Field(description='"alive" or "ready"')
