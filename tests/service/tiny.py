"""A real checkpoint with random weights, small enough to be made in a test."""

import json
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from text2weight.checkpoint import CheckpointConfig, TextEncoderConfig, save_checkpoint
from text2weight.denoiser import Denoiser, DenoiserConfig
from text2weight.head import HeadSpec
from text2weight.text_encoder import EmbeddingTable, write_embedding_tables
from text2weight.weight_space import WeightSpace

NAMES = tuple(f"thing {i}" for i in range(40))
DIM = 16


def write_tiny_checkpoint(folder: Path, **fields: Any) -> Path:
    """Write a checkpoint for the class names NAMES, with further fields of its config; returns its folder."""
    source = torch.Generator().manual_seed(0)
    table = folder / "table.safetensors"
    folder.mkdir(parents=True)
    embeddings = F.normalize(torch.randn(len(NAMES), DIM, generator=source), dim=-1)
    write_embedding_tables(table, {"names": EmbeddingTable("a {}", NAMES, embeddings)})
    encoder = TextEncoderConfig(source=f"table:{table}#names", name="names")
    return _write(folder / "checkpoint", encoder, source, embeddings.mean(0), **fields)


def write_tower_checkpoint(folder: Path) -> Path:
    """Write a checkpoint with a random text tower that claims to know apple and bus; returns its folder."""
    model_config = {
        "embed_dim": DIM,
        "vision_cfg": {"image_size": 8, "layers": 1, "width": 8, "head_width": 8, "patch_size": 8},
        "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    tower = folder / "text_encoder"
    tower.mkdir(parents=True)
    (tower / "open_clip_config.json").write_text(json.dumps({"model_cfg": model_config, "preprocess_cfg": {}}))
    (tower / "vocabulary.json").write_text(json.dumps({"templates": ["a {}"], "names": ["apple, pomme", "bus"]}))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_file(open_clip.CLIP(**model_config).state_dict(), tower / "open_clip_model.safetensors")
    encoder = TextEncoderConfig(source="dir:text_encoder", name="tower")
    parts = {"text_encoder": tower}
    return _write(folder / "checkpoint", encoder, torch.Generator().manual_seed(0), torch.zeros(DIM), parts)


def _write(
    folder: Path,
    encoder: TextEncoderConfig,
    source: torch.Generator,
    center: torch.Tensor,
    parts: dict[str, Path] | None = None,
    **fields: Any,
) -> Path:
    spec = HeadSpec(input_dim=12, hidden_dim=4, output_dim=DIM)
    config = CheckpointConfig(
        created_by="test",
        head=spec,
        text_encoder=encoder,
        denoiser=DenoiserConfig(width=32, depth=2, heads=2, embedding_dim=DIM),
        backbone={"name": "none"},
        **fields,
    )
    anchor = torch.randn(spec.num_parameters, generator=source)
    space = WeightSpace(anchor, torch.zeros_like(anchor), torch.full_like(anchor, 0.1))
    denoiser = Denoiser(spec, config.denoiser, anchor, center)
    with torch.no_grad():  # adaLN starts at zero, which would make every output alike
        for parameter in denoiser.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=source) * 0.1)
    save_checkpoint(folder, config, denoiser, space, parts)
    return folder
