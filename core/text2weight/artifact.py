"""Head artifacts: a generated head as safetensors bytes, and strict reading of such bytes.

Letters: K classes, d input size, h hidden units, o output size, n heads in a stack.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

import torch
from torch import Tensor

from text2weight.errors import ArtifactError, InvalidInputError
from text2weight.head import HeadSpec
from text2weight.strict_safetensors import DTYPES, Entry, is_text, load_json, make_tensors, read_header

FORMAT = "text2weight.head/1"
STACK_FORMAT = "text2weight.heads/1"
Precision = Literal["fp32", "fp16", "bf16"]
PRECISIONS: dict[Precision, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MATRICES = ("linear1.weight", "linear2.weight")
_EMBEDDINGS = "class_embeddings"


@cache
def created_by() -> str:
    """Program and version, as written into every file."""
    try:
        return f"text2weight {version('text2weight')}"
    except PackageNotFoundError:
        return "text2weight"


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

    def with_metadata(self, **values: str) -> HeadArtifact:
        """The same head with further metadata."""
        return replace(self, metadata=self.metadata | values)

    def to_bytes(self, precision: Precision = "fp32") -> bytes:
        """Serialise as safetensors; equal heads give equal bytes.

        Args:
            precision: of all tensors; another one than fp32 is stated in the metadata.

        Raises:
            InvalidInputError: field "precision"; a number is too large for it.
        """
        return _to_bytes({**self.tensors, _EMBEDDINGS: self.class_embeddings}, self.metadata, precision)


def stack_to_bytes(heads: Sequence[HeadArtifact], precision: Precision = "fp32") -> bytes:
    """Serialise n heads that differ in their seeds as one safetensors file.

    Args:
        heads: equal in classes and metadata but for `seed`.
        precision: see `HeadArtifact.to_bytes`.

    Returns:
        weight tensors with a leading axis n, `class_embeddings` (K, o) of all of them, and the metadata `seeds`.

    Raises:
        InvalidInputError: see `HeadArtifact.to_bytes`.
    """
    first = heads[0]
    tensors = {name: torch.stack([head.tensors[name] for head in heads]) for name in first.tensors}  # (n, ...)
    metadata = {key: value for key, value in first.metadata.items() if key != "seed"}
    metadata |= {"format": STACK_FORMAT, "seeds": json.dumps([int(head.metadata["seed"]) for head in heads])}
    return _to_bytes({**tensors, _EMBEDDINGS: first.class_embeddings}, metadata, precision)


def _to_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], precision: Precision) -> bytes:
    dtype = PRECISIONS[precision]
    written = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in tensors.items()}
    if dtype != torch.float32:
        metadata = {**metadata, "precision": precision}
        _check_range(tensors, written, precision)
    return _safetensors(written, metadata)


def _check_range(tensors: Mapping[str, Tensor], written: Mapping[str, Tensor], precision: Precision) -> None:
    for name, tensor in written.items():
        if bool(tensor.isinf().any()):
            largest = float(tensors[name].abs().max())
            limit = torch.finfo(tensor.dtype).max
            raise InvalidInputError(
                "precision",
                f"tensor {name!r} holds {largest:g}, and {precision} at most {limit:g}: ask for another precision",
            )


def _safetensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The file of contiguous tensors of one precision.

    Written here because the library puts metadata in random order, and takes ten times as long as the copying of the
    numbers: as long as a tenth of the denoiser's call.
    """
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    parts, end = [], 0
    for name, tensor in sorted(tensors.items()):
        parts.append(tensor.view(torch.uint8).numpy().data)
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": _DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, *parts])


def read_head(data: bytes) -> HeadArtifact:
    """Read untrusted bytes as a head artifact; numbers stored as fp16 or bf16 become fp32.

    Everything is checked before a tensor is made, but for the values themselves.

    Raises:
        ArtifactError: not safetensors as `strict_safetensors` reads them, a wrong format, name, shape or type, a value
            that is not finite, or metadata that is missing or does not fit the tensors.
    """
    header = read_header(data)
    classes = _check_metadata(header.metadata)
    _check_shapes(header.entries, len(classes))
    tensors = make_tensors(data, header)
    class_embeddings = tensors.pop(_EMBEDDINGS)
    return HeadArtifact(tensors, class_embeddings, header.metadata)


def _check_metadata(metadata: Mapping[str, str]) -> list[str]:
    """Check what a reader of a head needs; returns the class names."""
    if metadata.get("format") != FORMAT:
        raise ArtifactError(f"metadata 'format' must be {FORMAT!r}: this is not a head artifact")
    if metadata.get("activation") not in ("gelu", "none"):
        raise ArtifactError(f"metadata 'activation' is {metadata.get('activation')!r}: allowed are gelu and none")
    if "classes" not in metadata or "logit_scale" not in metadata:
        raise ArtifactError("metadata 'classes' and 'logit_scale' are required")
    classes = load_json(metadata["classes"].encode(), "metadata 'classes'", depth=1)
    if not isinstance(classes, list) or not classes or not all(map(is_text, classes)):
        raise ArtifactError("metadata 'classes' must be a JSON list of at least one name")
    if len(set(classes)) != len(classes):
        raise ArtifactError("metadata 'classes' names a class twice")
    try:
        scale = float(metadata["logit_scale"])
    except ValueError as error:
        raise ArtifactError(f"metadata 'logit_scale' is no number: {error}") from error
    if not math.isfinite(scale) or scale <= 0:
        raise ArtifactError(f"metadata 'logit_scale' is {scale}: it must be a positive number")
    return list(classes)


def _check_shapes(entries: Mapping[str, Entry], classes: int) -> None:
    for name in _MATRICES:
        if name not in entries or len(entries[name].shape) != 2:
            raise ArtifactError(f"tensor {name!r} is missing or not a matrix")
    hidden, inputs = entries["linear1.weight"].shape
    outputs = entries["linear2.weight"].shape[0]
    spec = HeadSpec(input_dim=inputs, hidden_dim=hidden, output_dim=outputs, bias="linear1.bias" in entries)
    expected = spec.shapes | {_EMBEDDINGS: (classes, outputs)}
    if set(entries) != set(expected):
        raise ArtifactError(f"tensors are {str(sorted(entries))[:500]}: expected {sorted(expected)}")
    for name, shape in expected.items():
        if entries[name].shape != shape:
            raise ArtifactError(f"tensor {name!r} has shape {entries[name].shape}: expected {shape}")
