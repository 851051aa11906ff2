"""Safetensors bytes to fp32 arrays and back, also in fp16 and bf16, which numpy lacks.

bf16 is the upper half of fp32: sign, 8 bits of exponent, 7 of mantissa. So reading it needs no torch.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from text2weight_client.errors import InvalidHeadError

PRECISIONS = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}


def read_tensors(data: bytes) -> tuple[dict[str, NDArray[np.float32]], dict[str, str], str]:
    """Read a safetensors file of floating point tensors.

    Returns:
        The tensors as fp32, the metadata, and the precision of the file: "fp32", "fp16" or "bf16"; "fp32"
        where the tensors differ, because it holds every value of the other two.

    Raises:
        InvalidHeadError: not a safetensors file, or a tensor of another type.
    """
    from safetensors import SafetensorError, deserialize

    try:
        stored: list[tuple[str, dict[str, Any]]] = deserialize(data)  # type: ignore[no-untyped-call]
    except SafetensorError as error:
        raise InvalidHeadError(f"not a readable safetensors file ({len(data)} bytes): {error}") from error
    tensors, found = {}, set()
    for name, tensor in stored:
        kind = tensor["dtype"]
        if kind not in PRECISIONS:
            raise InvalidHeadError(f"tensor {name!r} is {kind}: it must be one of {', '.join(PRECISIONS)}")
        tensors[name] = _decode(kind, tensor["data"]).reshape(tensor["shape"])
        found.add(PRECISIONS[kind])
    return tensors, _header(data).get("__metadata__") or {}, found.pop() if len(found) == 1 else "fp32"


def write_tensors(tensors: Mapping[str, NDArray[np.float32]], metadata: dict[str, str], precision: str) -> bytes:
    """Write a safetensors file; equal input gives equal bytes. The metadata states a precision other than fp32."""
    from safetensors.numpy import save

    metadata = {key: value for key, value in metadata.items() if key != "precision"}
    metadata |= {} if precision == "fp32" else {"precision": precision}
    data = save({name: _encode(precision, tensor) for name, tensor in tensors.items()}, metadata=metadata)
    header = _header(data)
    header["__metadata__"] = dict(sorted(metadata.items()))  # the library writes them in random order
    if precision == "bf16":
        for name in tensors:
            header[name]["dtype"] = "BF16"  # written as integers, see _encode
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + _header_length(data) :]


def _decode(kind: str, data: bytes) -> NDArray[np.float32]:
    if kind == "BF16":
        return (np.frombuffer(data, np.dtype("<u2")).astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(data, np.dtype("<f4" if kind == "F32" else "<f2")).astype(np.float32)


def _encode(precision: str, tensor: NDArray[np.float32]) -> NDArray[Any]:
    tensor = np.ascontiguousarray(tensor)
    if precision == "bf16":  # rounded to the nearest, ties to even
        bits = tensor.view(np.uint32)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return tensor.astype(np.float16 if precision == "fp16" else np.float32)


def _header_length(data: bytes) -> int:
    return int.from_bytes(data[:8], "little")


def _header(data: bytes) -> dict[str, Any]:
    header: dict[str, Any] = json.loads(data[8 : 8 + _header_length(data)])
    return header


def write_file(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file that appears whole or not at all.

    Raises:
        OSError: the folder does not exist or cannot be written.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        temporary.write_bytes(data)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
