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

from text2weight_client import GeneratedHead, InvalidFeaturesError, InvalidHeadError


def features(n: int = 5, d: int = 512, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(0.0, 1.0, (n, d)).astype(np.float32)


@pytest.mark.parametrize(("bias", "activation"), [(True, "gelu"), (False, "none"), (False, "gelu"), (True, "none")])
def test_numpy_and_torch_agree(make_head: Any, bias: bool, activation: str) -> None:
    head = GeneratedHead.from_bytes(make_head(bias=bias, activation=activation))
    x = features(64)
    module = head.to_torch()
    with torch.no_grad():
        outputs = module(torch.from_numpy(x))
        cosines = torch.nn.functional.cosine_similarity(
            outputs[:, None], torch.from_numpy(head.class_embeddings.copy())[None], dim=-1
        )
        expected = (30.0 * cosines).softmax(-1).numpy()
    np.testing.assert_allclose(head.logits(x), 30.0 * cosines.numpy(), atol=1e-4)
    np.testing.assert_allclose(head.predict(x), expected, atol=1e-5)
    np.testing.assert_allclose(head.predict(x).sum(1), 1.0, atol=1e-6)
    assert [type(layer).__name__ for layer in module] == [
        "Linear",
        "GELU" if activation == "gelu" else "Identity",
        "Linear",
    ]
    assert (module[0].bias is not None) is bias


def test_gelu_is_the_exact_one() -> None:
    from text2weight_client.head import _gelu

    x = np.linspace(-8.0, 8.0, 4001).astype(np.float32)
    exact = torch.nn.functional.gelu(torch.from_numpy(x).double()).numpy()
    np.testing.assert_allclose(_gelu(x), exact, atol=2e-7, rtol=1e-6)


def test_changing_the_module_leaves_the_head_as_it_was(make_head: Any) -> None:
    head = GeneratedHead.from_bytes(make_head())
    before = head.predict(features())
    with torch.no_grad():
        head.to_torch()[0].weight.zero_()
    np.testing.assert_array_equal(head.predict(features()), before)


def test_saved_head_loads_as_the_same_head(make_head: Any, tmp_path: Path) -> None:
    head = GeneratedHead.from_bytes(make_head(("apple", "pickup truck", "Ж🚌")))
    path = tmp_path / "head.safetensors"
    head.save(path)
    again = GeneratedHead.load(path)
    assert again.metadata == head.metadata
    assert again.classes == ("apple", "pickup truck", "Ж🚌")
    assert again.tensors.keys() == head.tensors.keys()
    np.testing.assert_array_equal(again.predict(features()), head.predict(features()))
    assert [item.name for item in tmp_path.iterdir()] == ["head.safetensors"]


def test_failed_save_leaves_the_old_file_and_no_other(
    make_head: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "head.safetensors"
    path.write_bytes(b"old")

    def full_disk(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full_disk)
    with pytest.raises(OSError, match="No space left"):
        GeneratedHead.from_bytes(make_head()).save(path)
    assert path.read_bytes() == b"old"
    assert [item.name for item in tmp_path.iterdir()] == ["head.safetensors"]


def test_head_is_frozen(make_head: Any) -> None:
    head = GeneratedHead.from_bytes(make_head())
    with pytest.raises(dataclasses.FrozenInstanceError):
        head.metadata = {}  # type: ignore[misc]


def test_extreme_features_give_finite_probabilities(make_head: Any) -> None:
    head = GeneratedHead.from_bytes(make_head(bias=False))
    x = np.stack([np.zeros(512), np.full(512, 1e6), np.full(512, -1e6)])
    assert np.isfinite(head.predict(x)).all()
    np.testing.assert_allclose(head.predict(x[:1]), 1 / 3, atol=1e-6)


def test_no_images_give_no_rows(make_head: Any) -> None:
    assert GeneratedHead.from_bytes(make_head()).logits(np.zeros((0, 512))).shape == (0, 3)
    assert GeneratedHead.from_bytes(make_head()).predict(np.zeros((0, 512))).shape == (0, 3)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.zeros((4, 511)), r"shape \(4, 511\): this head takes \(N, 512\), from the backbone resnet18"),
        (np.zeros(512), r"for one image pass features\[None\]"),
        (np.zeros((1, 2, 512)), r"shape \(1, 2, 512\)"),
        (np.where(np.arange(512) == 3, np.nan, 0.0)[None].repeat(2, 0), r"features\[0\] holds NaN or infinity"),
        (np.r_[np.zeros((2, 512)), np.full((1, 512), np.inf)], r"features\[2\] holds NaN or infinity"),
        ([["apple"] * 512], "must be numbers"),
        ([[1.0], [1.0, 2.0]], "must be numbers"),
    ],
)
def test_unusable_features_are_refused(make_head: Any, bad: Any, message: str) -> None:
    head = GeneratedHead.from_bytes(make_head())
    with pytest.raises(InvalidFeaturesError, match=message):
        head.predict(bad)


@pytest.mark.parametrize("keep", [0, 7, 8, 100, 5000, -1])
def test_truncated_file_is_refused(make_head: Any, tmp_path: Path, keep: int) -> None:
    path = tmp_path / "cut.safetensors"
    path.write_bytes(make_head()[:keep])
    with pytest.raises(InvalidHeadError, match=r"cut\.safetensors: not a readable safetensors file"):
        GeneratedHead.load(path)


def test_bytes_that_are_no_safetensors_are_refused() -> None:
    with pytest.raises(InvalidHeadError, match="not a readable safetensors file"):
        GeneratedHead.from_bytes(b"<html>" * 100)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metadata": {"format": "text2weight.head/9"}}, r"'format' is 'text2weight.head/9'"),
        ({"metadata": {"classes": "apple"}}, "JSON list of class names"),
        ({"metadata": {"classes": "[1, 2, 3]"}}, "JSON list of class names"),
        ({"metadata": {"classes": '["apple", "bus"]'}}, "2 names for 3 class embeddings"),
        ({"metadata": {"activation": "relu"}}, "'activation' is 'relu'"),
        ({"metadata": {"logit_scale": "warm"}}, "'logit_scale' is 'warm'"),
        ({"metadata": {"logit_scale": "nan"}}, "'logit_scale' is 'nan'"),
        ({"metadata": {"logit_scale": "-1"}}, "'logit_scale' is '-1'"),
        ({"tensors": {"linear1.weight": None}}, r"tensors are \['linear1.bias'"),
        ({"tensors": {"linear1.bias": None}}, "with or without both"),
        ({"tensors": {"extra": np.zeros(3, np.float32)}}, "'extra'"),
        ({"tensors": {"class_embeddings": None}}, "'class_embeddings' is missing"),
        ({"tensors": {"linear1.bias": np.zeros(15, np.float32)}}, r"'linear1.bias' has shape \(15,\)"),
        ({"tensors": {"linear2.weight": np.zeros((512, 15), np.float32)}}, r"'linear2.weight' has shape \(512, 15\)"),
        ({"tensors": {"class_embeddings": np.ones((3, 500), np.float32)}}, "500 columns"),
        ({"tensors": {"linear1.weight": np.zeros((16, 512))}}, "is F64: it must be one of F32, F16, BF16"),
        ({"metadata": {"format": "text2weight.heads/1"}}, "read it with GeneratedHeads"),
        ({"tensors": {"linear1.weight": np.zeros(8, np.float32)}}, "must be a float32 tensor of rank 2"),
        ({"tensors": {"linear2.bias": np.full(512, np.nan, np.float32)}}, "'linear2.bias' holds NaN"),
    ],
)
def test_damaged_head_is_refused(make_head: Any, change: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidHeadError, match=message):
        GeneratedHead.from_bytes(make_head(**change))


def test_file_without_metadata_is_refused(make_head: Any) -> None:
    with pytest.raises(InvalidHeadError, match="'format' is None"):
        GeneratedHead.from_bytes(save(load(make_head())))


def test_head_of_another_size_works(make_head: Any) -> None:
    head = GeneratedHead.from_bytes(make_head(input_dim=64))
    assert head.input_dim == 64
    assert head.predict(features(2, 64)).shape == (2, 3)


def test_missing_torch_is_explained(make_head: Any, tmp_path: Path) -> None:
    path = tmp_path / "head.safetensors"
    path.write_bytes(make_head())
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "from text2weight_client import GeneratedHead\n"
        f"head = GeneratedHead.load({json.dumps(str(path))})\n"
        "try: head.to_torch()\n"
        "except ImportError as error: print(error)\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "pip install torch" in result.stdout
