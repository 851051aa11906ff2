"""What calls return, apart from heads and `ServiceInfo`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from text2weight_client.head import GeneratedHead


@dataclass(frozen=True)
class ResponseInfo:
    """Status and headers of an answer.

    Attributes:
        status: HTTP status code.
        headers: names in lower case.
    """

    status: int
    headers: Mapping[str, str]

    @property
    def request_id(self) -> str | None:
        """Names the request in the service's log."""
        return self.headers.get("x-request-id")

    @property
    def server_timing_ms(self) -> dict[str, float]:
        """Milliseconds by stage, from the header Server-Timing; empty if there is none."""
        stages = re.findall(r"([\w-]+)[^,]*?;\s*dur=([0-9.]+)", self.headers.get("server-timing", ""))
        return {name: float(duration) for name, duration in stages}


@dataclass(frozen=True)
class ClassProbability:
    """One class and how probable it is for an image."""

    name: str
    probability: float


@dataclass(frozen=True)
class ClassifiedImage:
    """What the service sees in one image.

    Attributes:
        filename: as it was sent.
        classes: all classes of the head, the most probable first.
    """

    filename: str
    classes: tuple[ClassProbability, ...]

    @property
    def best(self) -> ClassProbability:
        """The most probable class."""
        return self.classes[0]


@dataclass(frozen=True)
class ProgressEvent:
    """Denoiser call `step` of `steps` is done; it was made at `timestep` of the noise schedule."""

    step: int
    steps: int
    timestep: int


@dataclass(frozen=True)
class HeadEvent:
    """The head as the denoiser estimates it after call `step`."""

    step: int
    head: GeneratedHead


@dataclass(frozen=True)
class DoneEvent:
    """The last event: the finished head, as `generate` would have returned it."""

    seed: int
    head: GeneratedHead


StreamEvent = ProgressEvent | HeadEvent | DoneEvent
