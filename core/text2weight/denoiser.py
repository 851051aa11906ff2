"""The diffusion transformer that estimates clean weights from noisy ones under a text condition.

Letters: B batch, P numbers in one head, T weight tokens, h hidden units, o output size, K classes,
S = T + K tokens in all (T without class tokens), D embedding size, W width, H attention heads.
Blocks follow DiT with adaLN-Zero (Peebles & Xie, arXiv 2212.09748); weight tokens and class tokens attend
to each other in one sequence.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator
from torch import Tensor, nn

from text2weight.condition import Condition
from text2weight.head import HeadSpec
from text2weight.weight_tokens import ChunkTokens, UnitTokens


class DenoiserConfig(BaseModel):
    """Size and variant of a denoiser.

    Attributes:
        kind: the architecture; "dit" is the one there is.
        tokens: "unit" (one token per hidden unit) or "chunk" (runs of `chunk_size` numbers).
        chunk_size: numbers per chunk token.
        unit_identity: tell hidden units apart by the anchor head's units (unit tokens only). Without it
            the denoiser is exactly equivariant to permutations of the sample's units; with it, to joint
            permutations of anchor and sample.
        class_tokens: let weight tokens attend to one token per class, beside the pooled vector.
        width: W.
        depth: number of blocks.
        heads: attention heads per block.
        mlp_ratio: hidden size of a block's MLP over W.
        embedding_dim: D of the condition.
        dropout: share of a block's outputs dropped in training.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["dit"] = "dit"
    tokens: Literal["unit", "chunk"] = "unit"
    chunk_size: PositiveInt = 576
    unit_identity: bool = True
    class_tokens: bool = True
    width: PositiveInt = 384
    depth: PositiveInt = 6
    heads: PositiveInt = 6
    mlp_ratio: PositiveInt = 4
    embedding_dim: PositiveInt = 512
    dropout: float = Field(default=0.0, ge=0, lt=1)

    @model_validator(mode="after")
    def _heads_divide_width(self) -> DenoiserConfig:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        return self


def sinusoid(values: Tensor, dim: int) -> Tensor:
    """Sine and cosine features of numbers (B,) -> (B, dim), as in arXiv 1706.03762."""
    half = dim // 2
    frequency = torch.exp(-math.log(10_000) * torch.arange(half, device=values.device) / half)
    angle = values.float()[:, None] * frequency  # (B, dim / 2)
    return F.pad(torch.cat([angle.cos(), angle.sin()], dim=-1), (0, dim % 2))  # (B, dim)


def attention(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Softmax attention over (B, H, S, W / H); mask (B, 1, 1, S) is False where nothing may look.

    Written out, because for sequences this short torch's fused kernel is several times slower in bf16 on a CPU.
    """
    scores = queries @ keys.transpose(-1, -2) / math.sqrt(queries.shape[-1])  # (B, H, S, S)
    return scores.masked_fill(~mask, float("-inf")).softmax(-1).to(values.dtype) @ values  # (B, H, S, W / H)


class Block(nn.Module):
    """Self-attention and an MLP, each scaled, shifted and gated by the condition (adaLN-Zero)."""

    def __init__(self, config: DenoiserConfig) -> None:
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, config.mlp_ratio * width), nn.GELU(), nn.Linear(config.mlp_ratio * width, width)
        )
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.dropout = nn.Dropout(config.dropout)
        _zero(self.modulation[1])

    def forward(self, tokens: Tensor, context: Tensor, mask: Tensor) -> Tensor:
        """Update tokens (B, S, W) under context (B, W); mask (B, 1, 1, S) is False at padding."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(context).unsqueeze(1).chunk(6, dim=-1)
        normed = self.norm1(tokens) * (1 + scale1) + shift1  # (B, S, W)
        qkv = self.qkv(normed).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (3, B, H, S, W / H)
        attended = attention(qkv[0], qkv[1], qkv[2], mask)  # (B, H, S, W / H)
        tokens = tokens + (1 + gate1) * self.dropout(self.out(attended.transpose(1, 2).flatten(2)))  # (B, S, W)
        normed = self.norm2(tokens) * (1 + scale2) + shift2  # (B, S, W)
        updated: Tensor = tokens + (1 + gate2) * self.dropout(self.mlp(normed))  # (B, S, W)
        return updated


class UnitEmbedding(nn.Module):
    """Flat weights <-> one W-wide token per hidden unit and one for the output bias."""

    def __init__(self, spec: HeadSpec, config: DenoiserConfig, anchor: Tensor) -> None:
        super().__init__()
        self.layout = UnitTokens(spec)
        width = config.width
        self.unit_in = nn.Linear(self.layout.unit_dim, width)
        self.unit_out = nn.Linear(width, self.layout.unit_dim)
        _zero(self.unit_out)
        if spec.bias:
            self.bias_in = nn.Linear(spec.output_dim, width)
            self.bias_out = nn.Linear(width, spec.output_dim)
            _zero(self.bias_out)
        self.identity_in = nn.Linear(self.layout.unit_dim, width) if config.unit_identity else None
        self.register_buffer("anchor", anchor, persistent=False)

    def encode(self, flat: Tensor) -> Tensor:
        """(B, P) -> (B, T, W), T = h + 1 with an output bias, else h."""
        units, output_bias = self.layout.split(flat)  # (B, h, unit_dim), (B, o)
        tokens: Tensor = self.unit_in(units)  # (B, h, W)
        if self.identity_in is not None:
            assert isinstance(self.anchor, Tensor)
            anchor_units, _ = self.layout.split(self.anchor.unsqueeze(0))
            # Unit variance within a unit, whatever the size of the anchor's weights.
            tokens = tokens + self.identity_in(F.layer_norm(anchor_units, anchor_units.shape[-1:]))
        if output_bias is None:
            return tokens
        return torch.cat([tokens, self.bias_in(output_bias).unsqueeze(1)], dim=1)

    def decode(self, tokens: Tensor) -> Tensor:
        """(B, T, W) -> (B, P)."""
        hidden = self.layout.spec.hidden_dim
        output_bias = self.bias_out(tokens[:, hidden]) if self.layout.spec.bias else None  # (B, o)
        return self.layout.join(self.unit_out(tokens[:, :hidden]), output_bias)


class ChunkEmbedding(nn.Module):
    """Flat weights <-> one W-wide token per chunk, with learned positions."""

    def __init__(self, spec: HeadSpec, config: DenoiserConfig) -> None:
        super().__init__()
        self.layout = ChunkTokens(spec, config.chunk_size)
        self.chunk_in = nn.Linear(config.chunk_size, config.width)
        self.chunk_out = nn.Linear(config.width, config.chunk_size)
        self.position = nn.Parameter(torch.randn(self.layout.count, config.width) * 0.02)
        _zero(self.chunk_out)

    def encode(self, flat: Tensor) -> Tensor:
        """(B, P) -> (B, T, W)."""
        tokens: Tensor = self.chunk_in(self.layout.split(flat)) + self.position
        return tokens

    def decode(self, tokens: Tensor) -> Tensor:
        """(B, T, W) -> (B, P)."""
        return self.layout.join(self.chunk_out(tokens))


class Denoiser(nn.Module):
    """x_n, n and a condition -> the network's output, in the sampler's (standardised) space.

    The output is zero at initialisation, so an untrained denoiser generates the zoo's mean head.
    """

    def __init__(self, spec: HeadSpec, config: DenoiserConfig, anchor: Tensor, embedding_center: Tensor) -> None:
        """Build the network.

        Args:
            spec: the heads' specification.
            config: size and variant.
            anchor: (P,) the weight space's anchor, which names the hidden units.
            embedding_center: (D,) subtracted from embeddings: class names' CLIP embeddings share most of
                their length, and what tells classes apart is the rest.
        """
        super().__init__()
        width = config.width
        self.weights = UnitEmbedding(spec, config, anchor) if config.tokens == "unit" else ChunkEmbedding(spec, config)
        self.class_in = nn.Linear(config.embedding_dim, width) if config.class_tokens else None
        self.pooled_in = nn.Linear(config.embedding_dim, width)
        self.count_in = nn.Linear(1, width)
        self.timestep_in = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.final_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        _zero(self.final_modulation[1])
        self.register_buffer("embedding_center", embedding_center, persistent=False)

    def forward(self, noisy: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """Evaluate the network.

        Args:
            noisy: (B, P) standardised weights at each item's timestep.
            timesteps: (B,) integers 0..N.
            condition: B items.

        Returns:
            (B, P).
        """
        weight_tokens = self.weights.encode(noisy)  # (B, T, W)
        count = weight_tokens.shape[1]
        context = self._context(timesteps, condition)  # (B, W)
        mask = condition.mask.new_ones(len(noisy), count)  # (B, T)
        tokens = weight_tokens
        if self.class_in is not None:
            class_tokens = self.class_in(self._centre(condition.tokens))  # (B, K, W)
            tokens = torch.cat([weight_tokens, class_tokens], dim=1)  # (B, S, W)
            mask = torch.cat([mask, condition.mask], dim=1)  # (B, S)
        for block in self.blocks:
            tokens = block(tokens, context, mask[:, None, None, :])
        shift, scale = self.final_modulation(context).unsqueeze(1).chunk(2, dim=-1)
        output: Tensor = self.weights.decode(self.norm(tokens[:, :count]) * (1 + scale) + shift)
        return output.float()  # (B, P)

    def _context(self, timesteps: Tensor, condition: Condition) -> Tensor:
        count = condition.count.float().log()[:, None]  # (B, 1)
        context: Tensor = (
            self.timestep_in(sinusoid(timesteps, 256))
            + self.pooled_in(self._centre(condition.pooled))
            + self.count_in(count)
        )
        return context  # (B, W)

    def _centre(self, embeddings: Tensor) -> Tensor:
        assert isinstance(self.embedding_center, Tensor)
        # Unit variance per coordinate for a unit vector: the projections see inputs of order one.
        return (embeddings - self.embedding_center) * math.sqrt(embeddings.shape[-1])


def _zero(layer: nn.Module) -> None:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
