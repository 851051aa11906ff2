"""Strict reading of untrusted safetensors bytes: everything is checked against the header before a tensor is made.

The layout is https://github.com/huggingface/safetensors#format. What is accepted here every reader accepts; refused
are also headers that readers understand differently, such as one with a name twice.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from text2weight.errors import ArtifactError

MAX_HEADER_BYTES = 1 << 20
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_METADATA = "__metadata__"
_HEADER_DEPTH = 3  # {"name": {"shape": [
_MAX_TOKENS = 2048  # strings, brackets and commas: what JSON can turn into objects
# An open string ends with the text: were it no match, each quote in it would be tried again, in quadratic time.
_TOKEN = re.compile(rb'"(?:[^"\\]++|\\.)*+"?|[\[\]{},]', re.DOTALL)


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies in the file's data.

    Attributes:
        dtype: key of `DTYPES`.
        shape: sizes, none of them 0.
        begin: first byte, counted from the end of the header.
        end: byte after the last.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """A header whose tensors fill the file's data without gaps.

    Attributes:
        entries: of the tensors, by name.
        metadata: strings.
        size: bytes before the data.
    """

    entries: dict[str, Entry]
    metadata: dict[str, str]
    size: int


def read_header(data: bytes) -> Header:
    """Check a file's header against the file's length.

    Raises:
        ArtifactError: a header that is too long, nested too deeply, or no JSON object; a name that is there twice;
            metadata that are not strings; a tensor whose type is not among `DTYPES`, whose shape is none, or whose
            length does not fit its shape; tensors that overlap, leave gaps, or do not end with the file.
    """
    if len(data) < 8:
        raise ArtifactError(f"not a safetensors file: {len(data)} bytes are too few")
    length = int.from_bytes(data[:8], "little")
    if length > min(MAX_HEADER_BYTES, len(data) - 8):
        raise ArtifactError(
            f"not a safetensors file: the header claims {length} bytes, more than the file or {MAX_HEADER_BYTES} hold"
        )
    header = load_json(data[8 : 8 + length], "the header", _HEADER_DEPTH)
    if not isinstance(header, dict):
        raise ArtifactError("not a safetensors file: the header is no JSON object")
    metadata = header.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(map(is_text, [*metadata, *metadata.values()])):
        raise ArtifactError("not a safetensors file: its metadata must be strings by name")
    entries = {name: _read_entry(name, value) for name, value in header.items()}
    _check_layout(entries, len(data) - 8 - length)
    return Header(entries, metadata, 8 + length)


def load_json(text: bytes, what: str, depth: int) -> Any:
    """Parse untrusted JSON.

    Args:
        text: UTF-8.
        what: named in errors.
        depth: how deeply it may be nested.

    Raises:
        ArtifactError: no JSON, nested deeper, far more parts than anything valid has, or a name twice in an object.
    """
    # Before anything is built: a megabyte of brackets would become objects of twenty times its size.
    level = deepest = 0
    for count, token in enumerate(_TOKEN.finditer(text), start=1):
        level += (token[0] in (b"[", b"{")) - (token[0] in (b"]", b"}"))
        deepest = max(deepest, level)
        if deepest > depth or count > _MAX_TOKENS:
            raise ArtifactError(f"{what} is nested deeper than {depth}, or has more than {_MAX_TOKENS} parts")
    try:
        return json.loads(text.decode(), object_pairs_hook=_unique(what))
    except ValueError as error:
        raise ArtifactError(f"{what} is not JSON: {error}") from error


def make_tensors(data: bytes, header: Header) -> dict[str, Tensor]:
    """The tensors of a checked header, fp32 whatever they are stored as; they own their memory.

    Raises:
        ArtifactError: a value that is not finite.
    """
    tensors = {}
    for name, entry in header.entries.items():
        stored = bytearray(memoryview(data)[header.size + entry.begin : header.size + entry.end])
        tensor = torch.frombuffer(stored, dtype=DTYPES[entry.dtype]).reshape(entry.shape).float()
        if not bool(torch.isfinite(tensor).all()):
            raise ArtifactError(f"tensor {name!r} holds values that are not finite")
        tensors[name] = tensor
    return tensors


def is_text(value: object) -> bool:
    """Whether a value is a string that can be sent: a lone surrogate parses as JSON and then cannot be encoded."""
    return isinstance(value, str) and not any("\ud800" <= char <= "\udfff" for char in value)


def _unique(what: str) -> Callable[[list[tuple[str, Any]]], dict[str, Any]]:
    def build(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        members = dict(pairs)
        if len(members) != len(pairs):
            raise ArtifactError(f"{what} has a name twice")
        return members

    return build


def _read_entry(name: str, value: object) -> Entry:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise ArtifactError(f"tensor {name[:80]!r}: its entry must hold dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ArtifactError(f"tensor {name[:80]!r} is {str(dtype)[:80]!r}: allowed are {', '.join(DTYPES)}")
    if not _are_sizes(shape) or 0 in shape:
        raise ArtifactError(f"tensor {name[:80]!r} has shape {str(shape)[:80]}: sizes above 0 are allowed")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise ArtifactError(f"tensor {name[:80]!r} has offsets {str(offsets)[:80]}: expected two numbers of bytes")
    begin, end = offsets
    if end - begin != math.prod(shape) * DTYPES[dtype].itemsize:
        raise ArtifactError(
            f"tensor {name[:80]!r} has {end - begin} bytes: shape {tuple(shape)} of {dtype} does not have as many"
        )
    return Entry(dtype, tuple(shape), begin, end)


def _are_sizes(value: object) -> bool:
    # Small enough for arithmetic: no file has more bytes. True and False are integers to Python.
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 1 << 48 for size in value)


def _check_layout(entries: dict[str, Entry], size: int) -> None:
    position = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].begin):
        if entry.begin != position:
            raise ArtifactError(
                f"tensor {name[:80]!r} begins at byte {entry.begin}: expected {position}, "
                "tensors may not overlap or leave gaps"
            )
        position = entry.end
    if position != size:
        raise ArtifactError(f"the tensors have {position} bytes, the file has {size} for them")
