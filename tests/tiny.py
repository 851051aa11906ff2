"""A tiny checkpoint, text table and denoiser: every stage of the core room in milliseconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from text2weight.checkpoint import CheckpointConfig, TextEncoderConfig, save_checkpoint
from text2weight.condition import Condition, condition_on_classes
from text2weight.denoiser import Denoiser, DenoiserConfig
from text2weight.diffusion import NoiseSchedule
from text2weight.head import HeadSpec
from text2weight.text_encoder import EmbeddingTable, TableTextEncoder, write_embedding_tables
from text2weight.weight_space import WeightSpace

TINY_DIM = 8
TINY_SPEC = HeadSpec(input_dim=6, hidden_dim=3, output_dim=TINY_DIM)
TINY_NAMES = ("apple", "bus", "lizard", "rocket", "cat, house cat", "maple tree", "clock", "coffee cup", "bear", "sea")


def tiny_table(names: tuple[str, ...] = TINY_NAMES, seed: int = 0) -> EmbeddingTable:
    """Random unit vectors for a few names."""
    source = torch.Generator().manual_seed(seed)
    return EmbeddingTable("a {}", names, F.normalize(torch.randn(len(names), TINY_DIM, generator=source), dim=-1))


def randomise(module: nn.Module, seed: int = 0, scale: float = 0.3) -> nn.Module:
    """Fill every parameter with noise: a fresh denoiser outputs zero, which would make identities trivial."""
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=source))
    return module.eval()


def tiny_space(spec: HeadSpec = TINY_SPEC, seed: int = 1) -> WeightSpace:
    """A weight space as a zoo of small deviations gives it."""
    source = torch.Generator().manual_seed(seed)
    anchor = torch.randn(spec.num_parameters, generator=source)
    return WeightSpace.fit(spec, anchor, anchor + 0.05 * torch.randn(32, spec.num_parameters, generator=source) + 0.01)


def tiny_denoiser(
    spec: HeadSpec = TINY_SPEC,
    *,
    seed: int | None = 2,
    anchor: torch.Tensor | None = None,
    start: torch.Tensor | None = None,
    **config: Any,
) -> Denoiser:
    """A denoiser of width 16 with random weights, or as initialised where `seed` is None."""
    settings = {
        "width": 16,
        "depth": 2,
        "heads": 2,
        "embedding_dim": TINY_DIM,
        "chunk_size": 16,
        "class_path": 8,
        **config,
    }
    anchor = tiny_space(spec).anchor if anchor is None else anchor
    denoiser = Denoiser(spec, DenoiserConfig(**settings), anchor, torch.full((TINY_DIM,), 0.1), start)
    return denoiser.eval() if seed is None else randomise(denoiser, seed)  # type: ignore[return-value]


def tiny_condition(counts: tuple[int, ...] = (2, 5, 3), seed: int = 3) -> Condition:
    """Conditions of several requests with random classes, padded to the largest."""
    source = torch.Generator().manual_seed(seed)
    rows = [F.normalize(torch.randn(count, TINY_DIM, generator=source), dim=-1) for count in counts]
    return condition_on_classes(*pad_embeddings(rows))


def save_tiny_checkpoint(
    folder: Path, *, seed: int = 2, parts: dict[str, Path] | None = None, **config: Any
) -> CheckpointConfig:
    """Write a checkpoint with random weights; its text table lies beside it, in `table.safetensors`.

    Args:
        folder: where to.
        seed: of the denoiser's weights.
        parts: see `save_checkpoint`.
        config: fields of `CheckpointConfig` that differ from the tiny defaults.
    """
    table_file = folder.parent / "table.safetensors"
    folder.parent.mkdir(parents=True, exist_ok=True)
    write_embedding_tables(table_file, {"tiny": tiny_table()})
    encoder = TableTextEncoder.from_file(table_file, "tiny")
    settings: dict[str, Any] = {
        "created_by": "tests",
        "head": TINY_SPEC,
        "text_encoder": TextEncoderConfig(
            source=f"table:{table_file}#tiny", name=encoder.name, fingerprint=encoder.fingerprint
        ),
        "backbone": {"name": "tiny backbone"},
        "denoiser": DenoiserConfig(width=16, depth=2, heads=2, embedding_dim=TINY_DIM, chunk_size=16, class_path=8),
        "schedule": NoiseSchedule(num_timesteps=40),
    }
    written = CheckpointConfig(**{**settings, **config})
    denoiser = tiny_denoiser(written.head, seed=seed, **written.denoiser.model_dump())
    return save_checkpoint(folder, written, denoiser, tiny_space(written.head), parts)


def pad_embeddings(embeddings: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Stack class embeddings (K_i, D) of several tasks into (B, K, D), K that of the largest, and a mask (B, K)."""
    longest = max(len(rows) for rows in embeddings)
    padded = torch.stack([F.pad(rows, (0, 0, 0, longest - len(rows))) for rows in embeddings])  # (B, K, D)
    counts = torch.tensor([len(rows) for rows in embeddings], device=padded.device)
    mask = torch.arange(longest, device=padded.device) < counts[:, None]  # (B, K)
    return padded, mask
