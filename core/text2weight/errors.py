"""The errors of the model library."""

from __future__ import annotations


class Text2WeightError(Exception):
    """Base of every error that this library raises on purpose."""


class InvalidInputError(Text2WeightError, ValueError):
    """A value the caller gave cannot be used.

    Attributes:
        field: name of the offending field of the request ("classes", "classes[3]", "seed", "steps", "sampler", ...).
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


class CheckpointError(Text2WeightError):
    """A checkpoint, text encoder or backbone is missing, damaged or does not fit."""


class ArtifactError(Text2WeightError, ValueError):
    """Bytes that are not a valid head artifact."""
