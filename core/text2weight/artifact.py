"""Head artifacts: a generated head as safetensors bytes, and strict reading of such bytes.

Letters: K classes, o output size.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from text2weight.errors import ArtifactError
from text2weight.head import HeadSpec

FORMAT = "text2weight.head/1"
MAX_HEADER_BYTES = 1 << 20


@dataclass(frozen=True)
class HeadArtifact:
    """A head with all that is needed to use it.

    Attributes:
        tensors: the head's tensors by name, fp32.
        class_embeddings: (K, o) fp32, L2-normalised; row i belongs to class i.
        metadata: strings, as listed in docs/checkpoint-format.md.
    """

    tensors: dict[str, Tensor]
    class_embeddings: Tensor
    metadata: dict[str, str]

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in row order."""
        return tuple(json.loads(self.metadata["classes"]))

    @property
    def spec(self) -> HeadSpec:
        """The head's specification, read off its tensors."""
        hidden, inputs = self.tensors["linear1.weight"].shape
        return HeadSpec(
            input_dim=inputs,
            hidden_dim=hidden,
            output_dim=self.tensors["linear2.weight"].shape[0],
            bias="linear1.bias" in self.tensors,
            activation="gelu" if self.metadata["activation"] == "gelu" else "none",
        )

    def to_bytes(self) -> bytes:
        """Serialise as safetensors; equal heads give equal bytes."""
        tensors = {**self.tensors, "class_embeddings": self.class_embeddings}
        plain = {name: tensor.detach().cpu().float().contiguous() for name, tensor in tensors.items()}
        return _with_ordered_metadata(save(plain, metadata=self.metadata))


def _with_ordered_metadata(data: bytes) -> bytes:
    # The library writes metadata in random order.
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def read_head(data: bytes) -> HeadArtifact:
    """Read untrusted bytes as a head artifact.

    Raises:
        ArtifactError: not safetensors, a wrong format, name, shape or dtype, a value that is not finite,
            or metadata that is missing or does not fit the tensors.
    """
    metadata = _read_metadata(data)
    try:
        tensors = load(data)
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise ArtifactError(f"not a safetensors file: {error}") from error
    class_embeddings = tensors.pop("class_embeddings", None)
    artifact = HeadArtifact(tensors, torch.empty(0) if class_embeddings is None else class_embeddings, metadata)
    _check_tensors(artifact, has_embeddings=class_embeddings is not None)
    return artifact


def _read_metadata(data: bytes) -> dict[str, str]:
    if len(data) < 8:
        raise ArtifactError(f"{len(data)} bytes are too few for a safetensors file")
    length = int.from_bytes(data[:8], "little")
    if length > min(MAX_HEADER_BYTES, len(data) - 8):
        raise ArtifactError(f"the header claims {length} bytes: more than the file or {MAX_HEADER_BYTES} hold")
    try:
        header: Any = json.loads(data[8 : 8 + length])
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"the header is not JSON: {error}") from error
    metadata = header.get("__metadata__", {}) if isinstance(header, dict) else {}
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise ArtifactError(f"metadata 'format' must be {FORMAT!r}: this is not a head artifact")
    if metadata.get("activation") not in ("gelu", "none"):
        raise ArtifactError(f"metadata 'activation' is {metadata.get('activation')!r}: allowed are gelu and none")
    try:
        classes = json.loads(metadata["classes"])
        scale = float(metadata["logit_scale"])
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise ArtifactError(f"metadata 'classes' and 'logit_scale' are required and must parse: {error!r}") from error
    if not isinstance(classes, list) or not classes or not all(_is_text(name) for name in classes):
        raise ArtifactError("metadata 'classes' must be a JSON list of at least one name")
    if len(set(classes)) != len(classes):
        raise ArtifactError("metadata 'classes' names a class twice")
    if not math.isfinite(scale) or scale <= 0:
        raise ArtifactError(f"metadata 'logit_scale' is {scale}: it must be a positive number")
    return metadata


def _is_text(value: object) -> bool:
    # A lone surrogate parses as JSON and then breaks whoever prints or sends it.
    return isinstance(value, str) and not any("\ud800" <= char <= "\udfff" for char in value)


def _check_tensors(artifact: HeadArtifact, *, has_embeddings: bool) -> None:
    tensors = artifact.tensors
    for name in ("linear1.weight", "linear2.weight"):
        if name not in tensors or tensors[name].ndim != 2:
            raise ArtifactError(f"tensor {name!r} is missing or not a matrix")
    try:
        expected = artifact.spec.shapes
    except ValidationError as error:
        raise ArtifactError("a tensor has a dimension of size 0") from error
    if set(tensors) != set(expected) or not has_embeddings:
        raise ArtifactError(f"tensors are {sorted(tensors)}: expected {sorted(expected)} and class_embeddings")
    expected = expected | {"class_embeddings": (len(artifact.classes), artifact.spec.output_dim)}
    for name, tensor in {**tensors, "class_embeddings": artifact.class_embeddings}.items():
        if tuple(tensor.shape) != expected[name]:
            raise ArtifactError(f"tensor {name!r} has shape {tuple(tensor.shape)}: expected {expected[name]}")
        if tensor.dtype != torch.float32:
            raise ArtifactError(f"tensor {name!r} is {tensor.dtype}: expected float32")
        if not bool(torch.isfinite(tensor).all()):
            raise ArtifactError(f"tensor {name!r} holds values that are not finite")
