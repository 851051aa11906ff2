"""Every file in examples/ is run, against a real service with the bundled model."""

from __future__ import annotations

import ast
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from text2weight.backbone import load_backbone
from text2weight.checkpoint import bundled_checkpoint
from text2weight_client import Client, GeneratedHead

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
Run = Callable[..., str]
CLASSES = ("apple", "pickup truck", "lizard")


@pytest.fixture(scope="module")
def head(live_url: str) -> GeneratedHead:
    with Client(live_url) as client:
        return client.generate(CLASSES, seed=3)


@pytest.fixture
def features() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(7, 512)).astype(np.float32)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], live_url: str) -> Run:
    """Run an example as `python examples/NAME ...` does, but in this process, where torch is imported already."""

    def run(name: str, *arguments: str | Path) -> str:
        monkeypatch.setenv("T2W_URL", live_url)
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        capsys.readouterr()
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_every_example_explains_itself_and_is_tested_here() -> None:
    source = Path(__file__).read_text()
    names = {path.name for path in EXAMPLES.glob("*.py")}
    assert len(names) == 4
    for name in names:
        assert f'"{name}"' in source
        assert ast.get_docstring(ast.parse((EXAMPLES / name).read_text())), name


def test_classify_a_folder(run: Run, live_url: str, tmp_path: Path) -> None:
    from skimage import data

    (tmp_path / "more").mkdir()
    Image.fromarray(data.coffee()).save(tmp_path / "coffee.png")
    Image.fromarray(data.rocket()).save(tmp_path / "more" / "rocket.jpg")
    (tmp_path / "notes.txt").write_text("no picture")
    names = ("cup", "clock", "motorcycle", "rocket")
    output = run("classify_folder.py", tmp_path, *names)

    with Client(live_url) as client:
        head = client.generate(names, seed=0)
    pictures = [Image.open(tmp_path / "coffee.png"), Image.open(tmp_path / "more/rocket.jpg")]
    features = load_backbone(bundled_checkpoint() / "backbone").features(pictures).numpy()
    rows = zip(("coffee.png", "more/rocket.jpg"), head.predict(features), strict=True)
    assert output.splitlines() == [f"{name}\t{names[row.argmax()]}\t{row.max():.2f}" for name, row in rows]


def test_numpy_head(run: Run, head: GeneratedHead, features: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "head.safetensors"
    head.save(path)
    np.save(tmp_path / "features.npy", features)
    output = run("numpy_head.py", path, tmp_path / "features.npy")
    expected = head.predict(features)
    assert output.splitlines() == [f"{CLASSES[row.argmax()]}\t{row.max():.2f}" for row in expected]
    names, probabilities = runpy.run_path(str(EXAMPLES / "numpy_head.py"))["predict"](path, features)
    assert tuple(names) == CLASSES
    np.testing.assert_allclose(probabilities, expected, atol=1e-6)


@pytest.mark.parametrize("plain", [False, True])
def test_export_to_onnx(
    run: Run, head: GeneratedHead, features: np.ndarray, make_head: Any, tmp_path: Path, plain: bool
) -> None:
    """With biases and GELU as the service generates them, and without either."""
    exported = GeneratedHead.from_bytes(make_head(CLASSES, bias=False, activation="none")) if plain else head
    exported.save(tmp_path / "head.safetensors")
    run("export_onnx.py", tmp_path / "head.safetensors", tmp_path / "head.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "head.onnx", providers=["CPUExecutionProvider"])
    (probabilities,) = session.run(["probabilities"], {"features": features})
    np.testing.assert_allclose(probabilities, exported.predict(features), atol=1e-5)
    assert session.get_modelmeta().custom_metadata_map["classes"] == exported.metadata["classes"]


def test_head_inside_a_fastapi_application(
    live_url: str, features: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("T2W_URL", live_url)
    monkeypatch.setenv("CLASSES", ",".join(CLASSES))
    application = runpy.run_path(str(EXAMPLES / "fastapi_app.py"))["app"]
    with TestClient(application) as client:
        answer = client.post("/classify", json={"features": features.tolist()})
        refused = client.post("/classify", json={"features": [[1.0]]})
    with Client(live_url) as client_of_service:
        expected = client_of_service.generate(CLASSES, seed=0).predict(features)
    assert [one["name"] for one in answer.json()] == [CLASSES[row.argmax()] for row in expected]
    assert answer.json()[0]["probability"] == pytest.approx(float(expected[0].max()), abs=1e-5)
    assert refused.status_code == 422
    assert "this head takes (N, 512)" in refused.json()["detail"]
