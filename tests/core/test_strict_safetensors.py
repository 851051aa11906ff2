from __future__ import annotations

import json
import time
import tracemalloc
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load, save

from text2weight.errors import ArtifactError
from text2weight.strict_safetensors import MAX_HEADER_BYTES, load_json, make_tensors, read_header


def file(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(begin: Any, end: Any, *, dtype: Any = "F32", shape: Any = (1,)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_what_the_library_writes_is_read() -> None:
    tensors = {"a": torch.randn(2, 3), "b": torch.randn(4).half(), "c": torch.randn(1, 1).bfloat16()}
    data = save(tensors, metadata={"key": "välue"})
    header = read_header(data)
    assert header.metadata == {"key": "välue"}
    read = make_tensors(data, header)
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == torch.float32
        assert torch.equal(read[name], tensor.float())


REFUSED = {
    "name twice": (
        b'{"a": {"dtype":"F32","shape":[1],"data_offsets":[0,4]}, "a": {"dtype":"F32","shape":[1],'
        b'"data_offsets":[0,4]}}',
        "has a name twice",
    ),
    "key twice in an entry": (b'{"a": {"dtype":"F32","dtype":"F16","shape":[1],"data_offsets":[0,4]}}', "name twice"),
    "metadata twice": (b'{"__metadata__": {"x":"1"}, "__metadata__": {"x":"2"}}', "name twice"),
    "metadata key twice": (b'{"__metadata__": {"x":"1", "x":"2"}}', "name twice"),
    "overlap": ({"a": entry(0, 4), "b": entry(2, 6)}, "may not overlap or leave gaps"),
    "same place": ({"a": entry(0, 4), "b": entry(0, 4)}, "may not overlap or leave gaps"),
    "gap": ({"a": entry(0, 4), "b": entry(6, 10)}, "may not overlap or leave gaps"),
    "gap at the start": ({"a": entry(4, 8)}, "begins at byte 4: expected 0"),
    "past the end": ({"a": entry(0, 16, shape=[4])}, "have 16 bytes, the file has 8"),
    "far past the end": ({"a": entry(0, 2**40, shape=[2**38])}, "the file has 8"),
    "bytes nobody owns": ({"a": entry(0, 4)}, "have 4 bytes, the file has 8"),
    "backwards": ({"a": entry(4, 0)}, "does not have as many"),
    "negative": ({"a": entry(-4, 0)}, "expected two numbers of bytes"),
    "three offsets": ({"a": {**entry(0, 4), "data_offsets": [0, 4, 8]}}, "expected two numbers"),
    "fraction": ({"a": entry(0, 4.0)}, "expected two numbers"),
    "true": ({"a": entry(False, 4)}, "expected two numbers"),
    "text": ({"a": entry("0", "4")}, "expected two numbers"),
    "astronomic offset": ({"a": entry(10**30, 10**30 + 4)}, "expected two numbers"),
    "shape is a number": ({"a": entry(0, 4, shape=1)}, "sizes above 0"),
    "shape of fractions": ({"a": entry(0, 4, shape=[1.0])}, "sizes above 0"),
    "negative shape": ({"a": entry(0, 4, shape=[-1, -1])}, "sizes above 0"),
    "empty tensor": ({"a": entry(0, 0, shape=[0])}, "sizes above 0"),
    "shape that overflows": ({"a": entry(0, 4, shape=[2**47] * 40)}, "does not have as many"),
    "shape that wraps to 4 bytes": ({"a": entry(0, 4, shape=[2**32, 2**32, 1])}, "does not have as many"),
    "too short for its shape": ({"a": entry(0, 8, shape=[3])}, "does not have as many"),
    "length of another type": ({"a": entry(0, 4, dtype="F16", shape=[1])}, "does not have as many"),
    "integers": ({"a": entry(0, 8, dtype="I64")}, "allowed are F32, F16, BF16"),
    "double": ({"a": entry(0, 8, dtype="F64")}, "allowed are F32, F16, BF16"),
    "type is a list": ({"a": entry(0, 8, dtype=["F32"])}, "allowed are F32, F16, BF16"),
    "type with a lone surrogate": (b'{"a": {"dtype":"\\ud800","shape":[1],"data_offsets":[0,4]}}', "allowed are F32"),
    "key missing": ({"a": {"dtype": "F32", "shape": [1]}}, "must hold dtype, shape and data_offsets"),
    "key unknown": ({"a": {**entry(0, 4), "offset": 3}}, "must hold dtype, shape and data_offsets"),
    "entry is a list": ({"a": ["F32", [1], [0, 4]]}, "must hold dtype"),
    "metadata of numbers": ({"__metadata__": {"seed": 1}}, "must be strings"),
    "metadata with a lone surrogate": (b'{"__metadata__": {"x": "\\ud800"}}', "must be strings"),
    "metadata is null": (b'{"__metadata__": null}', "must be strings"),
    "a number": (b"3", "no JSON object"),
    "not a number": (b'{"a": NaN}', "must hold dtype"),
    "cut short": (b'{"a": ', "is not JSON"),
    "open string": (b'{"a', "is not JSON"),
    "five thousand digits": (b'{"a": ' + b"9" * 5000 + b"}", "is not JSON"),
    "deep": (b"[" * 100_000, "nested deeper than 3"),
    "deep objects": (b'{"a":' * 50_000, "nested deeper than 3"),
    "many objects": (b"[" + b"{}," * 300_000 + b"{}]", "more than 2048 parts"),
    "not UTF-8": (b'{"\xff": 1}', "is not JSON"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "is not JSON"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    header, message = REFUSED[case]
    with pytest.raises(ArtifactError, match=message):
        read_header(file(header, bytes(8)))


def test_header_longer_than_allowed() -> None:
    with pytest.raises(ArtifactError, match="more than the file or 1048576 hold"):
        read_header(file(b" " * (MAX_HEADER_BYTES + 1)))


@pytest.mark.parametrize("unit", [b'\\"', b'"', b"\\", b'"\\', b'{"', b"[[", b'""', b",,"])
def test_no_header_takes_long_or_much_memory(unit: bytes) -> None:
    """Neither a scan in quadratic time nor objects of many times the header's size."""
    data = file(b'{"' + unit * ((MAX_HEADER_BYTES - 2) // len(unit)))
    tracemalloc.start()
    started_at = time.perf_counter()
    try:
        with pytest.raises(ArtifactError):
            read_header(data)
        assert tracemalloc.get_traced_memory()[1] < 8 * len(data)
    finally:
        tracemalloc.stop()
    assert time.perf_counter() - started_at < 20  # a quadratic scan of a megabyte takes minutes


def test_brackets_in_strings_do_not_count() -> None:
    assert load_json(b'{"a": "[[[[\\"[[[{{{,,,"}', "it", depth=1) == {"a": '[[[["[[[{{{,,,'}


def test_values_that_are_not_finite() -> None:
    data = save({"a": torch.tensor([1.0, float("nan")])})
    with pytest.raises(ArtifactError, match="'a' holds values that are not finite"):
        make_tensors(data, read_header(data))


DTYPES = st.sampled_from(["F32", "F16", "BF16", "F64", "I8", "BOOL"])
ENTRIES = st.builds(
    lambda begin, end, dtype, shape: entry(begin, end, dtype=dtype, shape=shape),
    st.integers(-1, 24), st.integers(-1, 24), DTYPES, st.lists(st.integers(0, 4), max_size=2),
)  # fmt: skip


@given(header=st.dictionaries(st.sampled_from(["a", "b", "c"]), ENTRIES, max_size=3), size=st.integers(0, 24))
def test_whatever_is_read_the_library_reads_too(header: dict[str, Any], size: int) -> None:
    data = file(header, bytes(size))
    try:
        tensors = make_tensors(data, read_header(data))
    except ArtifactError:
        return
    try:
        expected = load(data)
    except SafetensorError as error:  # it wants an aligned header
        pytest.fail(str(error))
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        name: tuple(tensor.shape) for name, tensor in expected.items()
    }
