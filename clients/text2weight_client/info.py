"""`ServiceInfo`: GET /info as typed values."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, TypeVar

from text2weight_client.errors import InvalidResponseError

S = TypeVar("S")


@dataclass(frozen=True)
class ModelInfo:
    """What the loaded checkpoint is.

    Attributes:
        checkpoint: its sha256.
        text_encoder: name of the text encoder.
        text_encoder_fingerprint: identifies the text encoder's weights.
        template: prompt with one `{}` for the class name.
        head: sizes and variant of the generated heads.
        logit_scale: s in logits = s * cos(head(f), e_i).
        backbone: the image model whose features the heads take, with its preprocessing.
        sampler: used where a request names none.
        steps: likewise.
        samplers: allowed samplers.
        outside: `reach` and `temperature` for class names that training never saw; None if treated as any other.
        evaluation: measured results that the checkpoint carries.
    """

    checkpoint: str
    text_encoder: str
    text_encoder_fingerprint: str
    template: str
    head: dict[str, Any]
    logit_scale: float
    backbone: dict[str, Any]
    sampler: str
    steps: int
    samplers: list[str]
    outside: dict[str, float] | None
    evaluation: dict[str, Any]


@dataclass(frozen=True)
class Limits:
    """The most of everything that one request may ask for; sizes in bytes, times in seconds, lengths in characters.

    Attributes:
        max_task_weight: of a task of `fuse`.
        max_descriptions: of one class.
        max_pictures: of one call of `classify`.
        exact_steps: samplers that take exactly so many steps.
    """

    max_classes: int
    max_steps: int
    max_samples: int
    max_tasks: int
    max_task_weight: float
    max_body_bytes: int
    max_upload_bytes: int
    request_timeout_s: float
    max_seed: int
    max_name_length: int
    max_template_length: int
    max_descriptions: int
    max_description_length: int
    max_guidance_scale: float
    max_pictures: int
    exact_steps: dict[str, int]


@dataclass(frozen=True)
class Features:
    """What the loaded checkpoint can do.

    Attributes:
        guidance: takes a guidance scale.
        descriptions: takes descriptions of classes.
        enhance_reads_given: its denoiser reads the head that `enhance` is given, where that goes by noise.
        classify: it holds its backbone, so that the service can classify images.
    """

    guidance: bool
    descriptions: bool
    enhance_reads_given: bool
    classify: bool


@dataclass(frozen=True)
class ServiceInfo:
    """What a service runs and allows. Each attribute is read from `raw` when it is asked for.

    Attributes:
        raw: the JSON as the service sent it; may hold more than the attributes.

    Raises:
        InvalidResponseError: on reading an attribute that this service does not state.
    """

    raw: dict[str, Any]

    @property
    def version(self) -> str:
        """Version of the service."""
        return str(self._value("version"))

    @property
    def libraries(self) -> dict[str, str]:
        """Versions of what the service computes with, by name."""
        return dict(self._value("libraries"))

    @property
    def phase(self) -> str:
        """What the worker is doing: "ready" or "draining"."""
        return str(self._value("phase"))

    @property
    def model(self) -> ModelInfo:
        """The loaded checkpoint."""
        return self._section("model", ModelInfo)

    @property
    def limits(self) -> Limits:
        """The most that one request may ask for."""
        return self._section("limits", Limits)

    @property
    def features(self) -> Features:
        """What the checkpoint can do."""
        return self._section("features", Features)

    @property
    def known_classes(self) -> tuple[str, ...] | None:
        """Names that the text encoder was validated on; None where any text is as good."""
        names = self._value("known_classes")
        return None if names is None else tuple(names)

    @property
    def formats(self) -> tuple[str, ...]:
        """Formats of the heads that are returned."""
        return tuple(self._value("formats"))

    @property
    def precisions(self) -> tuple[str, ...]:
        """Allowed values of `precision`."""
        return tuple(self._value("precisions"))

    @property
    def fuse_methods(self) -> tuple[str, ...]:
        """Allowed values of the `method` of `fuse`."""
        return tuple(self._value("fuse_methods"))

    @property
    def settings(self) -> dict[str, Any]:
        """The worker's settings by name, secrets masked."""
        return dict(self._value("settings"))

    def _value(self, name: str) -> Any:
        if name not in self.raw:
            raise InvalidResponseError(f"GET /info of this service does not state {name!r}; `raw` has all it states")
        return self.raw[name]

    def _section(self, name: str, kind: type[S]) -> S:
        section = self._value(name)
        wanted = {field.name for field in fields(kind)}  # type: ignore[arg-type]
        missing = sorted(wanted - section.keys()) if isinstance(section, dict) else sorted(wanted)
        if missing:
            raise InvalidResponseError(f"GET /info of this service states no {name}.{', '.join(missing)}")
        return kind(**{key: section[key] for key in wanted})
