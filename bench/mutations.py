"""Spoiling what a client sends: JSON values and bytes, and safetensors files."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from typing import Any

LENGTH_BYTES = 8  # a safetensors file begins with the length of its header
NASTY: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1.5, 1e308, -0.0, float("nan"), float("inf"), 2**31, 2**63 - 1, 2**63, 2**64, -(2**63)),
    *("", " ", "0", "\x00", "\n", "\u202e", "\ud800", "\U0001f600" * 50, "a" * 201, "a" * 5000, "{}", "{0.__class__}"),
    *("../../etc/passwd", "%s%n", "' OR 1=1 --", "<script>", "fp32", "ddpm", "apple", "A\u030a" * 100),
    *([], [[]], {}, [None], {"": {}}, ["apple"], ["apple", "apple"], ["apple", "APPLE"], ["a"] * 300, {"apple": "bus"}),
)
DTYPES = ("F64", "F32", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "f32", "object", "", None, 7)


def spoil_json(body: object, source: random.Random) -> bytes:
    """A JSON body with one to three things changed in it, or its bytes spoilt."""
    value = json.loads(json.dumps(body))
    for _ in range(source.randint(1, 3)):
        value = _change_somewhere(value, source)
    data = json.dumps(value).encode()
    return source.choice(_BYTES)(data, source) if source.random() < 0.3 else data


def _change_somewhere(value: Any, source: random.Random) -> Any:
    """Walk down at random and change what is there."""
    if isinstance(value, dict) and value and source.random() < 0.8:
        key = source.choice(list(value))
        match source.randrange(6):
            case 0:
                return {name: item for name, item in value.items() if name != key}
            case 1:
                return {**value, str(source.choice(NASTY))[:50]: source.choice(NASTY)}
            case _:
                return {**value, key: _change_somewhere(value[key], source)}
    if isinstance(value, list) and value and source.random() < 0.7:
        place = source.randrange(len(value))
        match source.randrange(4):
            case 0:
                return value[:place]
            case 1:
                return value * source.randint(2, 40)
            case _:
                return [*value[:place], _change_somewhere(value[place], source), *value[place + 1 :]]
    return source.choice(NASTY)


def _truncate(data: bytes, source: random.Random) -> bytes:
    return data[: source.randrange(len(data) + 1)]


def _flip(data: bytes, source: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(source.randint(1, 8)):
        if changed:
            changed[source.randrange(len(changed))] = source.randrange(256)
    return bytes(changed)


def _repeat(data: bytes, source: random.Random) -> bytes:
    place = source.randrange(len(data) + 1)
    return data[:place] + data[:place]


def _nest(data: bytes, source: random.Random) -> bytes:
    depth = source.choice((10, 500, 20_000))
    opening, closing = source.choice(((b"[", b"]"), (b'{"classes":', b"}")))
    return opening * depth + data + closing * depth


def _long_number(data: bytes, source: random.Random) -> bytes:
    digits = b"9" * source.choice((30, 500, 5_000))
    return b'{"classes": ["apple", "bus"], "seed": ' + source.choice((b"", b"-", b"0.", b"1e")) + digits + b"}"


def _other_encoding(data: bytes, source: random.Random) -> bytes:
    text = data.decode(errors="replace")
    return source.choice((b"\xef\xbb\xbf" + data, text.encode("utf-16"), b"\xff\xfe" + data, b"\x1f\x8b" + data))


def _too_long(data: bytes, source: random.Random) -> bytes:
    return data + b" " * source.choice((1_000, 270_000))


_BYTES: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    _truncate,
    _flip,
    _repeat,
    _nest,
    _long_number,
    _other_encoding,
    _too_long,
)


def spoil_safetensors(data: bytes, source: random.Random) -> bytes:
    """A safetensors file with its length, its header, its numbers or its bytes spoilt."""
    return source.choice(_FILES)(data, source)


def _spoil_length(data: bytes, source: random.Random) -> bytes:
    right = len(data)
    wrong = (0, 1, 7, right - 8, right, right + 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1, 100_000_001)
    return struct.pack("<Q", source.choice(wrong)) + data[LENGTH_BYTES:]


def _spoil_header(data: bytes, source: random.Random) -> bytes:
    """Change one entry of the header, which stays valid JSON of the right length."""
    header, numbers = _split(data)
    name = source.choice([name for name in header if name != "__metadata__"])
    entry, size = header[name], len(numbers)
    begin, end = entry["data_offsets"]
    match source.randrange(9):
        case 0:
            entry["dtype"] = source.choice(DTYPES)
        case 1:
            entry["shape"] = source.choice(([], [0], [-1, 5], [2**62, 4], [2**32, 2**32], [1.5], [True], "4", None))
        case 2:
            choices = ([end, begin], [begin, end + 4], [begin + 1, end], [size, size + 4], [-4, 0], [0, 0], [0, size])
            entry["data_offsets"] = source.choice((*choices, [begin], [begin, end, end], [2**63, 2**64], None, "0"))
        case 3:
            header[source.choice(("extra", "", "linear1.weight\x00", "../head", "a" * 10_000))] = dict(entry)
        case 4:
            del header[name]
        case 5:
            metadata = header.setdefault("__metadata__", {})
            key = source.choice([*metadata, "extra"])
            metadata[key] = str(source.choice(NASTY)).encode(errors="replace").decode()
        case 6:
            header["__metadata__"] = source.choice(({}, None, [], {"classes": 3}, {"format": "other"}, "x"))
        case 7:
            header.update({f"tensor{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(2_000)})
        case _:
            header[name] = source.choice(NASTY)
    return _join(json.dumps(header).encode(), numbers)


def _spoil_header_text(data: bytes, source: random.Random) -> bytes:
    header, numbers = _split(data)
    return _join(source.choice(_BYTES)(json.dumps(header).encode(), source), numbers)


def _spoil_numbers(data: bytes, source: random.Random) -> bytes:
    """NaN, infinity or numbers that overflow somewhere in the tensors."""
    header, numbers = _split(data)
    changed = bytearray(numbers)
    for _ in range(source.choice((1, 100))):
        place = 4 * source.randrange(len(changed) // 4)
        changed[place : place + 4] = struct.pack("<f", source.choice((float("nan"), float("inf"), 3e38, -3e38, 1e-40)))
    return _join(json.dumps(header).encode(), bytes(changed))


def _spoil_size(data: bytes, source: random.Random) -> bytes:
    if source.random() < 0.5:
        return data[: source.choice((0, 1, 7, 8, 9, len(data) // 2, len(data) - 1))]
    return data + bytes(source.choice((1, 4, 4096, 300_000)))


def _another_file(data: bytes, source: random.Random) -> bytes:
    pickled = b"\x80\x04\x95\x1c\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R."
    return source.choice(
        (b"", pickled, b"PK\x03\x04" + data, b"\x89PNG\r\n\x1a\n", b"\x93NUMPY", source.randbytes(500))
    )


_FILES: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    _spoil_length,
    _spoil_header,
    _spoil_header,
    _spoil_header,
    _spoil_header_text,
    _spoil_numbers,
    _spoil_size,
    _another_file,
    _flip,
)


def _split(data: bytes) -> tuple[dict[str, Any], bytes]:
    [length] = struct.unpack("<Q", data[:LENGTH_BYTES])
    return json.loads(data[LENGTH_BYTES : LENGTH_BYTES + length]), data[LENGTH_BYTES + length :]


def _join(header: bytes, numbers: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + numbers
