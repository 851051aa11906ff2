"""text2weight: class names in, the weights of a classifier head out.

`Generator.load(path).generate(["apple", "bus", "lizard"])` is the whole path; `generator.py` shows its stages.
"""

from text2weight.artifact import HeadArtifact, read_head
from text2weight.errors import ArtifactError, CheckpointError, InvalidInputError, Text2WeightError
from text2weight.generator import GenerationRequest, Generator
from text2weight.head import AdapterHead, HeadSpec

__all__ = [
    "AdapterHead",
    "ArtifactError",
    "CheckpointError",
    "GenerationRequest",
    "Generator",
    "HeadArtifact",
    "HeadSpec",
    "InvalidInputError",
    "Text2WeightError",
    "read_head",
]
