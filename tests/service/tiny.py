"""A real checkpoint with random weights, small enough to be made in a test."""

from pathlib import Path

import torch
from torch.nn import functional as F

from text2weight.checkpoint import CheckpointConfig, TextEncoderConfig, save_checkpoint
from text2weight.denoiser import Denoiser, DenoiserConfig
from text2weight.head import HeadSpec
from text2weight.text_encoder import EmbeddingTable, write_embedding_tables
from text2weight.weight_space import WeightSpace

NAMES = tuple(f"thing {i}" for i in range(40))
DIM = 16


def write_tiny_checkpoint(folder: Path) -> Path:
    """Write a checkpoint for the class names NAMES; returns its folder."""
    source = torch.Generator().manual_seed(0)
    table = folder / "table.safetensors"
    folder.mkdir(parents=True)
    embeddings = F.normalize(torch.randn(len(NAMES), DIM, generator=source), dim=-1)
    write_embedding_tables(table, {"names": EmbeddingTable("a {}", NAMES, embeddings)})
    spec = HeadSpec(input_dim=12, hidden_dim=4, output_dim=DIM)
    config = CheckpointConfig(
        created_by="test",
        head=spec,
        text_encoder=TextEncoderConfig(source=f"table:{table}#names", name="names"),
        denoiser=DenoiserConfig(width=32, depth=2, heads=2, embedding_dim=DIM),
        backbone={"name": "none"},
    )
    anchor = torch.randn(spec.num_parameters, generator=source)
    space = WeightSpace(anchor, torch.zeros_like(anchor), torch.full_like(anchor, 0.1))
    denoiser = Denoiser(spec, config.denoiser, anchor, embeddings.mean(0))
    with torch.no_grad():  # adaLN starts at zero, which would make every output alike
        for parameter in denoiser.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=source) * 0.1)
    save_checkpoint(folder / "checkpoint", config, denoiser, space)
    return folder / "checkpoint"
