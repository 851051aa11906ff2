"""Several heads in one file, and heads in fp16 and bf16."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load, save
from safetensors.torch import save as save_torch

from text2weight_client import GeneratedHead, GeneratedHeads, InvalidHeadError
from text2weight_client.tensor_file import read_tensors, write_tensors

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def features(n: int = 5) -> np.ndarray:
    return np.random.default_rng(1).normal(0.0, 1.0, (n, 512)).astype(np.float32)


def metadata_of(data: bytes) -> dict[str, str]:
    return dict(json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"])


def in_precision(data: bytes, precision: str) -> bytes:
    """The same head as torch, and so the service, would write it in another type."""
    tensors = {name: torch.from_numpy(tensor.copy()).to(DTYPES[precision]) for name, tensor in load(data).items()}
    metadata = metadata_of(data) | ({} if precision == "fp32" else {"precision": precision})
    return save_torch(tensors, metadata=metadata)


def stacked(make_head: Any, seeds: tuple[int, ...], changes: dict[str, str | None] | None = None) -> bytes:
    """A file of several heads as the service would send it."""
    files = [make_head(seed=seed) for seed in seeds]
    loaded = [load(data) for data in files]
    tensors = {name: np.stack([one[name] for one in loaded]) for name in loaded[0] if name != "class_embeddings"}
    metadata = metadata_of(files[0]) | {"format": "text2weight.heads/1", "seeds": json.dumps(seeds)}
    metadata |= changes or {}
    kept = {key: value for key, value in metadata.items() if value is not None and key != "seed"}
    return save(tensors | {"class_embeddings": loaded[0]["class_embeddings"]}, metadata=kept)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_each_precision_is_read_as_torch_reads_it(make_head: Any, precision: str) -> None:
    whole = GeneratedHead.from_bytes(make_head())
    head = GeneratedHead.from_bytes(in_precision(make_head(), precision))
    assert head.precision == precision
    for name, tensor in head.tensors.items():
        expected = torch.from_numpy(whole.tensors[name].copy()).to(DTYPES[precision]).float().numpy()
        assert tensor.dtype == np.float32
        np.testing.assert_array_equal(tensor, expected)
    np.testing.assert_allclose(head.predict(features()), whole.predict(features()), atol=0.02)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_head_is_saved_in_the_precision_it_came_in(make_head: Any, tmp_path: Path, precision: str) -> None:
    data = in_precision(make_head(), precision)
    head = GeneratedHead.from_bytes(data)
    path = tmp_path / "head.safetensors"
    head.save(path)
    again = GeneratedHead.load(path)
    assert again.precision == precision
    assert abs(path.stat().st_size - len(data)) < 64
    for name, tensor in head.tensors.items():
        np.testing.assert_array_equal(again.tensors[name], tensor)
    assert path.read_bytes() == again.to_bytes()
    assert again.metadata.get("precision", "fp32") == precision
    assert "precision" not in GeneratedHead.from_bytes(dataclasses.replace(again, precision="fp32").to_bytes()).metadata


def test_numbers_are_rounded_to_bf16_as_torch_rounds_them() -> None:
    ties = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF, 0xBF818000, 0x7F7F0000], np.uint32)
    values = np.concatenate([ties.view(np.float32), np.random.default_rng(0).normal(0, 3, 1000).astype(np.float32)])
    data = write_tensors({"x": values}, {}, "bf16")
    expected = torch.from_numpy(values).to(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(read_tensors(data)[0]["x"], expected)


def test_mixed_precision_is_kept_as_fp32(make_head: Any) -> None:
    data = make_head(tensors={"linear1.bias": np.full(16, 0.5, np.float16)})
    head = GeneratedHead.from_bytes(data)
    assert head.precision == "fp32"
    np.testing.assert_array_equal(head.tensors["linear1.bias"], np.full(16, 0.5, np.float32))


def test_unknown_precision_is_refused(make_head: Any) -> None:
    with pytest.raises(InvalidHeadError, match=r"precision is 'fp8': it must be one of \['fp32', 'fp16', 'bf16'\]"):
        dataclasses.replace(GeneratedHead.from_bytes(make_head()), precision="fp8")


def test_bf16_needs_no_torch(make_head: Any, tmp_path: Path) -> None:
    path = tmp_path / "head.safetensors"
    path.write_bytes(in_precision(make_head(), "bf16"))
    program = (
        "import sys; sys.modules['torch'] = None\nfrom text2weight_client import GeneratedHead\n"
        f"print(GeneratedHead.load({str(path)!r}).precision)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "bf16\n"


def test_file_of_several_heads_is_a_sequence_of_them(make_head: Any) -> None:
    heads = GeneratedHeads.from_bytes(stacked(make_head, (7, 8, 9)))
    assert (len(heads), heads.seeds, heads.classes) == (3, (7, 8, 9), ("apple", "bus", "lizard"))
    for seed, head in zip((7, 8, 9), heads, strict=True):
        alone = GeneratedHead.from_bytes(make_head(seed=seed))
        assert head.metadata["seed"] == str(seed)
        assert head.metadata["format"] == "text2weight.head/1"
        assert "seeds" not in head.metadata
        for name, tensor in alone.tensors.items():
            np.testing.assert_array_equal(head.tensors[name], tensor)
    assert heads[1:] == heads.heads[1:]
    assert heads[-1].metadata["seed"] == "9"


def test_predictions_of_several_heads(make_head: Any) -> None:
    heads = GeneratedHeads.from_bytes(stacked(make_head, (1, 2)))
    probabilities = heads.predict(features(4))
    assert probabilities.shape == (2, 4, 3)
    for head, own in zip(heads, probabilities, strict=True):
        np.testing.assert_array_equal(head.predict(features(4)), own)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_several_heads_survive_a_file(make_head: Any, tmp_path: Path, precision: str) -> None:
    heads = GeneratedHeads.from_bytes(in_precision(stacked(make_head, (3, 4)), precision))
    path = tmp_path / "heads.safetensors"
    heads.save(path)
    again = GeneratedHeads.load(path)
    assert (again.seeds, again[0].precision) == ((3, 4), precision)
    assert [head.metadata for head in again] == [head.metadata for head in heads]
    np.testing.assert_array_equal(again.predict(features()), heads.predict(features()))


def test_file_of_one_head_is_a_sequence_of_one(make_head: Any) -> None:
    heads = GeneratedHeads.from_bytes(make_head(seed=5))
    assert (len(heads), heads.seeds) == (1, (5,))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": None}, "'seeds' must be a JSON list"),
        ({"seeds": "[1, 2.5]"}, "'seeds' must be a JSON list"),
        ({"seeds": "[]"}, "'seeds' must be a JSON list"),
        ({"seeds": "[1, 2, 3]"}, "asks for 3 heads"),
        ({"format": "text2weight.heads/2"}, "'format' is 'text2weight.heads/2': allowed are"),
    ],
)
def test_damaged_file_of_several_heads_is_refused(make_head: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidHeadError, match=message):
        GeneratedHeads.from_bytes(stacked(make_head, (1, 2), changes))


def test_heads_that_do_not_belong_together_are_refused(make_head: Any) -> None:
    one, other = (GeneratedHead.from_bytes(make_head(classes)) for classes in (("a", "b"), ("a", "c")))
    with pytest.raises(InvalidHeadError, match="head 1 differs"):
        GeneratedHeads((one, other))
    with pytest.raises(InvalidHeadError, match="at least one"):
        GeneratedHeads(())


def test_head_without_a_seed_says_so(make_head: Any) -> None:
    merged = GeneratedHead.from_bytes(make_head())
    del merged.metadata["seed"]
    with pytest.raises(InvalidHeadError, match="'seed' is missing"):
        GeneratedHeads((merged,)).seeds  # noqa: B018


def test_names_of_the_file_are_in_the_error(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("not a head")
    with pytest.raises(InvalidHeadError, match=r"notes\.txt: not a readable safetensors file"):
        GeneratedHeads.load(path)


def test_warnings_are_a_list(make_head: Any) -> None:
    assert GeneratedHead.from_bytes(make_head()).warnings == ()
    head = GeneratedHead.from_bytes(make_head(metadata={"warnings": '["class \'x\' is unknown", "é"]'}))
    assert head.warnings == ("class 'x' is unknown", "é")
    for text in ("not JSON", '{"a": 1}'):
        assert GeneratedHead.from_bytes(make_head(metadata={"warnings": text})).warnings == (text,)


def test_repr_is_short(make_head: Any) -> None:
    assert repr(GeneratedHead.from_bytes(make_head(seed=4))) == "<GeneratedHead for apple, bus, lizard; seed 4>"
