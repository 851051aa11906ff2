"""The data commands as a user runs them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from typer.testing import CliRunner, Result

from text2weight.backbone import load_backbone
from text2weight.text_encoder import EmbeddingTable, load_text_encoder, read_embedding_table
from text2weight_training.data_cli import backbone_app, distill_text_app, embed_app, features_app
from text2weight_training.feature_file import read_feature_file

COLOURS = {"red_square": (200, 0, 0), "blue_square": (0, 0, 200)}


def run(app: typer.Typer, *arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("squares")
    source = np.random.default_rng(0)
    for split, count in (("train", 24), ("val", 4)):
        for name, colour in COLOURS.items():
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                noise = source.integers(-40, 40, (16, 20, 3))  # flat colours have no variance to normalise by
                pixels = np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{number:02d}.png")
    return root


@pytest.fixture(scope="module")
def backbone(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("work") / "backbone"
    result = run(
        backbone_app, pictures, "--half", "first", "-o", out, "--epochs-sides", "16,16",
        "--input-side", 16, "--batch-size", 8, "--learning-rate", 0.02,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "epoch 2/2: side 16, loss" in result.output
    return out


def test_backbone_then_features_of_the_other_half(backbone: Path, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "features.safetensors"
    result = run(features_app, "--root", pictures, "--backbone", f"dir:{backbone}", "--half", "second", "-o", out)
    assert result.exit_code == 0, result.output
    content = read_feature_file(out)
    assert content.classes == ("blue square", "red square")
    assert content.backbone == load_backbone(backbone).description
    assert len(content.test_labels) == 8  # the test split is never halved
    everything = run(features_app, "--root", pictures, "--backbone", f"dir:{backbone}", "-o", tmp_path / "all.st")
    assert everything.exit_code == 0
    assert 0 < len(content.train_labels) < len(read_feature_file(tmp_path / "all.st").train_labels) == 48


def test_more_views_of_the_training_pictures(backbone: Path, pictures: Path, tmp_path: Path) -> None:
    contents = {}
    for views in (1, 3):
        out = tmp_path / f"{views}.safetensors"
        result = run(features_app, "--root", pictures, "--backbone", f"dir:{backbone}", "--views", views, "-o", out)
        assert result.exit_code == 0, result.output
        contents[views] = read_feature_file(out)
    assert "48 (3 views of each) training and 8 test images" in result.output
    plain, viewed = contents[1], contents[3]
    torch.testing.assert_close(viewed.train_features[:48], plain.train_features)
    assert not torch.allclose(viewed.train_features[96:], plain.train_features)
    assert torch.equal(viewed.train_labels, plain.train_labels.repeat(3))
    torch.testing.assert_close(viewed.test_features, plain.test_features)


def test_distil_then_embed(tmp_path: Path) -> None:
    import torch.nn.functional as F

    from text2weight.text_encoder import write_embedding_tables

    names = ("apple", "bus", "lizard", "owl", "maple tree", "lamp")
    vectors = F.normalize(torch.randn(6, 16, generator=torch.Generator().manual_seed(0)), dim=-1)
    write_embedding_tables(tmp_path / "e.safetensors", {"few.a": EmbeddingTable("a {}", names, vectors)})
    tower = tmp_path / "tower"
    result = run(
        distill_text_app, "--table", f"{tmp_path}/e.safetensors#few.a", "-o", tower,
        "--width", 16, "--heads", 2, "--context-length", 8, "--epochs", 150,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "e.safetensors#few.a: " in result.output
    output = f"{tmp_path}/e.safetensors#two.a"
    result = run(embed_app, "--names", "bus", "--names", "owl", "--model", f"dir:{tower}", "-o", output)
    assert result.exit_code == 0, result.output
    table = read_embedding_table(output)
    assert table.names == ("bus", "owl")
    (tmp_path / "d.json").write_text('{"bus": "lamp", "owl": ["apple", "lizard"]}')
    described = f"{tmp_path}/e.safetensors#two.nl"
    result = run(embed_app, "--descriptions", tmp_path / "d.json", "--model", f"dir:{tower}", "-o", described)
    assert result.exit_code == 0, result.output
    assert read_embedding_table(described).descriptions == (("lamp",), ("apple", "lizard"))
    torch.testing.assert_close(table.embeddings, load_text_encoder(f"dir:{tower}").encode(["a bus", "a owl"]))
    assert (table.embeddings * vectors[[1, 3]]).sum(1).min() > 0.9
    assert torch.equal(read_embedding_table(f"{tmp_path}/e.safetensors#few.a").embeddings, F.normalize(vectors, dim=-1))


@pytest.mark.parametrize(
    ("app", "arguments", "message"),
    [
        (features_app, ["--root", "absent", "-o", "f.st"], "has no labelled 'train' split"),
        (features_app, ["--root", "{pictures}", "--backbone", "vgg", "-o", "f.st"], "unknown backbone 'vgg'"),
        (features_app, ["--root", "{pictures}", "--backbone", "dir:absent", "-o", "f.st"], "is not a backbone folder"),
        (features_app, ["--root", "{pictures}", "--device", "gpu", "-o", "f.st"], "unknown device 'gpu'"),
        (backbone_app, ["absent", "-o", "b"], "has no labelled 'train' split"),
        (backbone_app, ["{pictures}", "-o", "b", "--epochs-sides", "32,big"], "whole numbers from 8 to 1024"),
        (embed_app, ["--names", "cat", "-o", "e.safetensors"], "give FILE#TABLE"),
        (embed_app, ["--names", "cat", "--model", "gpt", "-o", "e#t"], "text encoder 'gpt'"),
        (embed_app, ["-o", "e#t"], "no class name to embed: give --names"),
        (embed_app, ["--descriptions", "absent.json", "-o", "e#t"], "absent.json cannot be read"),
        (embed_app, ["--descriptions", "d.json", "--template", "the", "-o", "e#t"], "--template belongs to --names"),
        (distill_text_app, ["--table", "absent#t", "-o", "t"], "absent#t cannot be read"),
    ],
)
def test_unusable_input_is_one_line_and_status_2(
    app: typer.Typer,
    arguments: list[str],
    message: str,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(app, *(argument.format(pictures=pictures) for argument in arguments))
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_broken_image_is_named(pictures: Path, backbone: Path, tmp_path: Path) -> None:
    for split in ("train", "val"):
        for name in COLOURS:
            (tmp_path / split / name).mkdir(parents=True)
            (tmp_path / split / name / "0.png").write_bytes((pictures / "val" / name / "00.png").read_bytes())
    (tmp_path / "train" / "red_square" / "1.png").write_bytes(b"\x89PNG broken")
    result = run(features_app, "--root", tmp_path, "--backbone", f"dir:{backbone}", "-o", tmp_path / "f.safetensors")
    assert result.exit_code == 2
    assert "red_square/1.png is not a readable image" in result.stderr
    assert not (tmp_path / "f.safetensors").exists()


@pytest.mark.parametrize("app", [features_app, backbone_app, embed_app, distill_text_app])
def test_help_has_an_example(app: typer.Typer) -> None:
    result = run(app, "--help")
    assert result.exit_code == 0
    assert "Example: t2w " in result.output


def test_module_imports_nothing_heavy() -> None:
    code = "import sys, text2weight_training.data_cli; print({'torch', 'numpy', 'PIL'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
