from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save
from torch import Tensor

from tests.tiny import TINY_DIM, TINY_SPEC
from text2weight.artifact import FORMAT, STACK_FORMAT, HeadArtifact, Precision, read_head, stack_to_bytes
from text2weight.errors import ArtifactError, InvalidInputError
from text2weight.head import HeadSpec, apply_heads
from text2weight.strict_safetensors import MAX_HEADER_BYTES, read_header

CLASSES = ("apple", "s\u00e9a lion", "\N{LIZARD}")


def head(spec: HeadSpec = TINY_SPEC, classes: tuple[str, ...] = CLASSES) -> HeadArtifact:
    source = torch.Generator().manual_seed(0)
    metadata = {
        "format": FORMAT,
        "classes": json.dumps(list(classes), ensure_ascii=False),
        "template": "a {}",
        "logit_scale": "30.0",
        "activation": spec.activation,
        "seed": "0",
    }
    tensors = spec.unflatten(torch.randn(spec.num_parameters, generator=source))
    embeddings = F.normalize(torch.randn(len(classes), spec.output_dim, generator=source), dim=-1)
    return HeadArtifact(tensors, embeddings, metadata)


VALID = head().to_bytes()


def parts() -> tuple[dict[str, Tensor], dict[str, str]]:
    artifact = head()
    tensors = {name: tensor.contiguous() for name, tensor in artifact.tensors.items()}
    return {**tensors, "class_embeddings": artifact.class_embeddings}, dict(artifact.metadata)


@pytest.mark.parametrize("spec", [TINY_SPEC, TINY_SPEC.model_copy(update={"bias": False, "activation": "none"})])
def test_round_trip(spec: HeadSpec) -> None:
    written = head(spec)
    read = read_head(written.to_bytes())
    assert read.spec == spec
    assert read.classes == CLASSES
    assert read.metadata == written.metadata
    assert set(read.tensors) == set(spec.shapes)
    for name, tensor in written.tensors.items():
        assert torch.equal(read.tensors[name], tensor)
    assert torch.equal(read.class_embeddings, written.class_embeddings)


def test_any_safetensors_reader_can_use_the_head() -> None:
    written = head()
    arrays = safetensors.numpy.load(VALID)
    assert {name: array.shape for name, array in arrays.items()} == {**TINY_SPEC.shapes, "class_embeddings": (3, 8)}
    assert {array.dtype for array in arrays.values()} == {np.dtype(np.float32)}
    sequential = torch.nn.Sequential(torch.nn.Linear(6, 3), torch.nn.GELU(), torch.nn.Linear(3, 8))
    names = {
        "0.weight": "linear1.weight",
        "0.bias": "linear1.bias",
        "2.weight": "linear2.weight",
        "2.bias": "linear2.bias",
    }
    sequential.load_state_dict({key: torch.from_numpy(arrays[name]) for key, name in names.items()})
    features = torch.randn(4, 6)
    expected = apply_heads(TINY_SPEC, TINY_SPEC.flatten(written.tensors)[None], features[None])[0]
    torch.testing.assert_close(sequential(features), expected)


def test_equal_heads_have_equal_bytes() -> None:
    assert head().to_bytes() == VALID


def test_tensors_are_written_as_plain_fp32_whatever_they_were() -> None:
    artifact = head()
    other = HeadArtifact(
        {name: tensor.double().requires_grad_() for name, tensor in artifact.tensors.items()},
        artifact.class_embeddings.T.contiguous().T.double(),
        artifact.metadata,
    )
    assert other.to_bytes() == VALID


def test_what_was_read_can_be_changed_and_trained() -> None:
    read = read_head(VALID)
    weight = read.tensors["linear1.weight"].requires_grad_()
    weight.square().sum().backward()
    assert weight.grad is not None
    read.class_embeddings.zero_()


Change = Callable[[dict[str, Tensor], dict[str, str]], None]


def tensor(name: str, value: Callable[[Tensor], Tensor]) -> Change:
    def change(tensors: dict[str, Tensor], _: dict[str, str]) -> None:
        tensors[name] = value(tensors[name]).contiguous()

    return change


def metadata(key: str, value: str | None) -> Change:
    def change(_: dict[str, Tensor], values: dict[str, str]) -> None:
        if value is None:
            del values[key]
        else:
            values[key] = value

    return change


def with_value(value: float) -> Callable[[Tensor], Tensor]:
    def change(old: Tensor) -> Tensor:
        new = old.clone()
        new.view(-1)[0] = value
        return new

    return change


def remove(name: str) -> Change:
    return lambda tensors, _: tensors.__delitem__(name)


def all_zero_size(tensors: dict[str, Tensor], _: dict[str, str]) -> None:
    tensors["linear1.weight"] = torch.zeros(0, 6)
    tensors["linear1.bias"] = torch.zeros(0)
    tensors["linear2.weight"] = torch.zeros(8, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (metadata("format", None), "'format' must be"),
        (metadata("format", "text2weight.head/2"), "'format' must be"),
        (metadata("activation", None), "allowed are gelu and none"),
        (metadata("activation", "relu"), "allowed are gelu and none"),
        (metadata("classes", None), "are required"),
        (metadata("classes", "apple, bus"), "is not JSON"),
        (metadata("classes", "[" * 100_000), "nested deeper than 1"),
        (metadata("classes", '{"apple": 0}'), "must be a JSON list"),
        (metadata("classes", '"abc"'), "must be a JSON list"),
        (metadata("classes", '["apple", "bus", 3]'), "must be a JSON list"),
        (metadata("classes", '["apple", "bus", "\\ud800"]'), "must be a JSON list"),
        (metadata("classes", "[]"), "at least one name"),
        (metadata("classes", '["apple", "bus", "apple"]'), "names a class twice"),
        (metadata("classes", '["apple", "bus"]'), r"shape \(3, 8\): expected \(2, 8\)"),
        (metadata("logit_scale", None), "are required"),
        (metadata("logit_scale", "thirty"), "no number"),
        (metadata("logit_scale", "nan"), "must be a positive number"),
        (metadata("logit_scale", "inf"), "must be a positive number"),
        (metadata("logit_scale", "0"), "must be a positive number"),
        (metadata("logit_scale", "-3"), "must be a positive number"),
        (remove("linear1.weight"), "'linear1.weight' is missing"),
        (remove("linear2.weight"), "'linear2.weight' is missing"),
        (remove("linear1.bias"), "expected"),
        (remove("linear2.bias"), "expected"),
        (remove("class_embeddings"), "expected .*class_embeddings"),
        (lambda tensors, _: tensors.update(extra=torch.zeros(1)), "'extra'"),
        (tensor("linear1.weight", lambda t: t[0]), "not a matrix"),
        (tensor("linear1.weight", lambda t: t[None]), "not a matrix"),
        (tensor("linear1.weight", lambda t: t[:2]), "has shape"),
        (tensor("linear2.weight", lambda t: t.T), "has shape"),
        (tensor("linear1.bias", lambda t: t[:1]), "has shape"),
        (tensor("linear1.bias", lambda t: t.sum()), "has shape"),
        (tensor("linear2.bias", lambda t: t[:, None]), "has shape"),
        (tensor("class_embeddings", lambda t: t[:, :4]), "has shape"),
        (tensor("class_embeddings", lambda t: t[:0]), "has shape"),
        (all_zero_size, "sizes above 0"),
        (tensor("linear2.bias", Tensor.double), "allowed are F32, F16, BF16"),
        (tensor("linear1.bias", Tensor.long), "allowed are F32, F16, BF16"),
        (tensor("linear1.bias", Tensor.bool), "allowed are F32, F16, BF16"),
        (tensor("class_embeddings", Tensor.cfloat), "allowed are F32, F16, BF16"),
        (tensor("linear1.weight", with_value(float("nan"))), "not finite"),
        (tensor("linear2.weight", with_value(float("inf"))), "not finite"),
        (tensor("class_embeddings", with_value(float("-inf"))), "not finite"),
    ],
)
def test_what_is_no_head_is_refused(change: Change, message: str) -> None:
    tensors, values = parts()
    change(tensors, values)
    with pytest.raises(ArtifactError, match=message):
        read_head(save(tensors, metadata=values))


def test_no_classes_at_all_are_refused() -> None:
    tensors, values = parts()
    with pytest.raises(ArtifactError, match="sizes above 0"):
        read_head(save({**tensors, "class_embeddings": torch.zeros(0, TINY_DIM)}, metadata={**values, "classes": "[]"}))


def header(value: Any, body: bytes = b"") -> bytes:
    text = value if isinstance(value, bytes) else json.dumps(value).encode()
    return len(text).to_bytes(8, "little") + text + body


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "0 bytes are too few"),
        (b"\0" * 7, "7 bytes are too few"),
        (b"\0" * 8, "is not JSON"),
        (b"\xff" * 8 + b"{}", "more than the file"),
        ((2**63).to_bytes(8, "little") + b"{}", "more than the file"),
        ((MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b" " * (MAX_HEADER_BYTES + 2), "more than the file"),
        (b"not a safetensors file at all", "more than the file"),
        (header(b"\xff\xfe"), "not JSON"),
        (header(b"[" * 100_000), "nested deeper than 3"),
        (header([]), "no JSON object"),
        (header({"__metadata__": []}), "must be strings"),
        (header({"__metadata__": {"format": 1}}), "must be strings"),
        (header({"__metadata__": {**head().metadata, "seed": 0}}), "must be strings"),
        (header({"__metadata__": {**head().metadata, "activation": ["gelu"]}}), "must be strings"),
        (header({"__metadata__": {**head().metadata, "classes": ["apple"]}}), "must be strings"),
        (header({"__metadata__": head().metadata}), "is missing"),
        (
            header({"__metadata__": head().metadata, "x": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 4]}}),
            "does not have as many",
        ),
        (
            header({"__metadata__": head().metadata, "x": {"dtype": "X1", "shape": [1], "data_offsets": [0, 4]}}),
            "allowed are F32, F16, BF16",
        ),
        (VALID[:-1], "the file has 307"),
        (VALID + b"\0", "the file has 309"),
    ],
)
def test_other_bytes_are_refused(data: bytes, message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        read_head(data)


@pytest.mark.parametrize(("precision", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_half_precision_is_written_stated_and_read_as_fp32(precision: Precision, dtype: torch.dtype) -> None:
    data = head().to_bytes(precision)
    assert {tensor.dtype for tensor in safetensors.torch.load(data).values()} == {dtype}
    read = read_head(data)
    assert read.metadata == {**head().metadata, "precision": precision}
    for name, written in head().tensors.items():
        assert read.tensors[name].dtype == torch.float32
        assert torch.equal(read.tensors[name], written.to(dtype).float())
    assert torch.equal(read.class_embeddings, head().class_embeddings.to(dtype).float())


def test_what_does_not_fit_a_precision_is_refused() -> None:
    artifact = head()
    artifact.tensors["linear2.bias"][1] = -70_000.0
    with pytest.raises(InvalidInputError, match=r"'linear2.bias' holds 70000, and fp16 at most 65504") as caught:
        artifact.to_bytes("fp16")
    assert caught.value.field == "precision"
    assert read_head(artifact.to_bytes("bf16")).tensors["linear2.bias"][1] == pytest.approx(-70_000, rel=0.01)


def test_stack() -> None:
    heads = [
        HeadArtifact(
            {name: tensor + i for name, tensor in head().tensors.items()},
            head().class_embeddings,
            {**head().metadata, "seed": str(2**62 + i)},
        )
        for i in range(3)
    ]
    data = stack_to_bytes(heads)
    tensors = safetensors.torch.load(data)
    for name in TINY_SPEC.shapes:
        assert torch.equal(tensors[name], torch.stack([one.tensors[name] for one in heads]))
    assert torch.equal(tensors["class_embeddings"], head().class_embeddings)
    values = read_header(data).metadata
    assert values["format"] == STACK_FORMAT
    assert json.loads(values["seeds"]) == [2**62, 2**62 + 1, 2**62 + 2]
    assert values.keys() - {"seeds"} == head().metadata.keys() - {"seed"}
    with pytest.raises(ArtifactError, match="'format' must be"):
        read_head(data)


def test_further_metadata() -> None:
    assert read_head(head().with_metadata(method="ties").to_bytes()).metadata == {**head().metadata, "method": "ties"}


@given(st.binary(max_size=400))
def test_random_bytes_raise_nothing_else(data: bytes) -> None:
    with pytest.raises(ArtifactError):
        read_head(data)


@given(
    cuts=st.lists(
        st.tuples(st.integers(0, len(VALID)), st.integers(0, 12), st.binary(max_size=12)), min_size=1, max_size=4
    )
)
def test_mutated_heads_are_read_or_refused(cuts: list[tuple[int, int, bytes]]) -> None:
    data = VALID
    for start, length, replacement in cuts:
        data = data[:start] + replacement + data[start + length :]
    try:
        artifact = read_head(data)
    except ArtifactError:
        return
    assert artifact.class_embeddings.shape == (len(artifact.classes), artifact.spec.output_dim)
    assert read_head(artifact.to_bytes()).metadata == artifact.metadata


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(key=st.sampled_from([*TINY_SPEC.shapes, "class_embeddings", "__metadata__", "new"]), value=JSON)
def test_any_header_entry_is_read_or_refused(key: str, value: object) -> None:
    length = int.from_bytes(VALID[:8], "little")
    entries = json.loads(VALID[8 : 8 + length])
    with pytest.raises(ArtifactError):
        read_head(header({**entries, key: value}, VALID[8 + length :]))


@given(
    name=st.sampled_from([*TINY_SPEC.shapes, "class_embeddings"]),
    dtype=st.sampled_from(["F32", "F16", "BF16", "F64", "I8", "U8", "I64", "BOOL", "F8_E4M3", "F8_E5M2", "F4", "C64"]),
    shape=st.lists(st.integers(0, 24), max_size=4),
    shift=st.integers(-8, 8),
)
def test_any_tensor_entry_is_read_or_refused(name: str, dtype: str, shape: list[int], shift: int) -> None:
    length = int.from_bytes(VALID[:8], "little")
    entries = json.loads(VALID[8 : 8 + length])
    begin, end = entries[name]["data_offsets"]
    entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end + shift]}
    try:
        read_head(header(entries, VALID[8 + length :]))
    except ArtifactError:
        return
    # Two bytes per number fit nowhere: the sizes of the others are not halved.
    assert (dtype, tuple(shape), shift) == ("F32", {**TINY_SPEC.shapes, "class_embeddings": (3, 8)}[name], 0)
