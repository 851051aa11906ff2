"""The keyword options of the calls; each is left to the service where it is absent or None."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, TypedDict

Precision = Literal["fp32", "fp16", "bf16"]
FuseMethod = Literal["text", "average", "git-rebasin", "task-arithmetic", "ties"]
EnhanceMethod = Literal["interpolate", "noise"]


class SamplingOptions(TypedDict, total=False):
    """What every call that makes a head takes.

    Attributes:
        seed: the same seed, input, steps and sampler give the same head; drawn by the client if absent.
        steps: denoiser calls.
        sampler: one of `info().model.samplers`.
        guidance_scale: how far to go towards the text; needs `info().features.guidance`.
        precision: type of the numbers in the answer; fp32 if absent.
        deadline_ms: the service gives up after this many milliseconds; what is left of `timeout_s` if absent.
    """

    seed: int | None
    steps: int | None
    sampler: str | None
    guidance_scale: float | None
    precision: Precision | None
    deadline_ms: int | None


class FuseOptions(SamplingOptions, total=False):
    """What `fuse` takes besides the tasks.

    Attributes:
        method: "text" generates a head for all classes; the others merge the heads of the tasks.
        prompt_template: in place of the checkpoint's; holds one `{}` for the class name.
    """

    method: FuseMethod | None
    prompt_template: str | None


class EnhanceOptions(SamplingOptions, total=False):
    """What `enhance` takes besides the head, its strength and its classes.

    Attributes:
        method: "interpolate" goes a share of the way to a generated head; "noise" hides a share of the head in noise
            and denoises it; absent, the service takes what suits the head.
    """

    method: EnhanceMethod | None


class GenerateOptions(SamplingOptions, total=False):
    """What `generate`, `generate_many` and `stream` take besides the classes.

    Attributes:
        prompt_template: in place of the checkpoint's; holds one `{}` for the class name.
        descriptions: for every class one text, or several that are averaged; needs `info().features.descriptions`.
        describe_classifier: make the class embeddings from the descriptions too.
    """

    prompt_template: str | None
    descriptions: Mapping[str, str | Sequence[str]] | None
    describe_classifier: bool | None
