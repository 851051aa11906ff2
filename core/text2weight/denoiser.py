"""The diffusion transformer that estimates clean weights from noisy ones under a text condition.

Letters: B batch, P numbers in one head, T weight tokens, h hidden units, o output size, K classes,
S = T + K tokens in all (T without class tokens), D embedding size, W width, H attention heads,
M inner size of the class path.
Blocks follow DiT with adaLN-Zero (Peebles & Xie, arXiv 2212.09748); weight tokens and class tokens attend
to each other in one sequence. The class path is ours: a bilinear map from (what names a unit, the set of
classes) to the unit's weights. What a head needs depends on both together; the blocks alone find that
product so slowly that they stay on one head for all tasks for hundreds of steps (docs/results.md).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    model_validator,
)
from torch import Tensor, nn

from text2weight.condition import Condition, GivenHeads
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
        pooled: tell the blocks the pooled text vector. The number of classes they learn in any case.
        class_tokens: let weight tokens attend to one token per class.
        class_path: M, inner size of the class path (class tokens only); 0 leaves it out.
        null_condition: learn what to answer without a condition, for classifier-free guidance.
        reads_given: show the network the head that it is to improve, where there is one (unit tokens only).
        width: W.
        depth: number of blocks.
        heads: attention heads per block.
        mlp_ratio: hidden size of a block's MLP over W.
        embedding_dim: D of the condition.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["dit"] = "dit"
    tokens: Literal["unit", "chunk"] = "unit"
    chunk_size: PositiveInt = 576
    unit_identity: bool = True
    # A checkpoint's hash covers its config as written: fields that were added to the format are left out where they
    # say what was fixed before.
    pooled: bool = Field(default=True, exclude_if=lambda pooled: pooled)
    class_tokens: bool = True
    class_path: NonNegativeInt = 512
    null_condition: bool = Field(default=False, exclude_if=lambda learnt: not learnt)
    reads_given: bool = Field(default=False, exclude_if=lambda reads: not reads)
    width: PositiveInt = 384
    depth: PositiveInt = 6
    heads: PositiveInt = 6
    mlp_ratio: PositiveInt = 4
    embedding_dim: PositiveInt = 512

    @model_validator(mode="after")
    def _heads_divide_width(self) -> DenoiserConfig:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        return self

    @model_validator(mode="after")
    def _reads_the_text(self) -> DenoiserConfig:
        if not (self.pooled or self.class_tokens):
            raise ValueError("pooled and class_tokens are both false: the text is read through one of them at least")
        return self

    @model_validator(mode="after")
    def _reads_given_heads_as_units(self) -> DenoiserConfig:
        if self.reads_given and self.tokens != "unit":
            raise ValueError(f"reads_given is true with {self.tokens} tokens: a given head is read unit by unit")
        return self

    @property
    def class_path_size(self) -> int:
        """M, or 0 without a class path."""
        return self.class_path if self.class_tokens else 0


def sinusoid(values: Tensor, dim: int) -> Tensor:
    """Sine and cosine features of numbers (B,) -> (B, dim), as in arXiv 1706.03762."""
    half = dim // 2
    frequency = torch.exp(-math.log(10_000) * torch.arange(half, device=values.device) / half)
    angle = values.float()[:, None] * frequency  # (B, dim / 2)
    return F.pad(torch.cat([angle.cos(), angle.sin()], dim=-1), (0, dim % 2))  # (B, dim)


def attention(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor, size: int) -> Tensor:
    """Softmax attention over (B, H, S, size), size W / H; mask (B, 1, 1, S) is False where nothing may look.

    Written out, because for sequences this short torch's fused kernel is several times slower in bf16 on a CPU.
    """
    scores = queries @ keys.transpose(-1, -2) / math.sqrt(size)  # (B, H, S, S)
    return scores.masked_fill(~mask, float("-inf")).softmax(-1).to(values.dtype) @ values  # (B, H, S, W / H)


class Block(nn.Module):
    """Self-attention and an MLP, each scaled, shifted and gated by the condition (adaLN-Zero)."""

    def __init__(self, config: DenoiserConfig) -> None:
        super().__init__()
        width = config.width
        self.heads, self.head_size = config.heads, config.width // config.heads
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, config.mlp_ratio * width), nn.GELU(), nn.Linear(config.mlp_ratio * width, width)
        )
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        _zero(self.modulation[1])

    def forward(self, tokens: Tensor, context: Tensor, mask: Tensor) -> Tensor:
        """Update tokens (B, S, W) under context (B, W); mask (B, 1, 1, S) is False at padding."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(context).unsqueeze(1).chunk(6, dim=-1)
        normed = self.norm1(tokens) * (1 + scale1) + shift1  # (B, S, W)
        qkv = self.qkv(normed).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (3, B, H, S, W / H)
        attended = attention(qkv[0], qkv[1], qkv[2], mask, self.head_size)  # (B, H, S, W / H)
        tokens = tokens + gate1 * self.out(attended.transpose(1, 2).flatten(2))  # (B, S, W)
        normed = self.norm2(tokens) * (1 + scale2) + shift2  # (B, S, W)
        updated: Tensor = tokens + gate2 * self.mlp(normed)  # (B, S, W)
        return updated


class ClassPath(nn.Module):
    """The set of classes (B, M) times what names each token (T, I) -> numbers for each token (B, T, c)."""

    def __init__(self, identity_dim: int, size: int, token_dim: int) -> None:
        super().__init__()
        self.gate = nn.Linear(identity_dim, size)
        self.out = nn.Linear(size, token_dim)
        _zero(self.out)

    def forward(self, identity: Tensor, classes: Tensor) -> Tensor:
        """identity (T, I), classes (B, M) -> (B, T, c)."""
        # Both factors are of order one; the smaller product keeps the first steps small.
        product = 0.3 * self.gate(identity) * classes.unsqueeze(1)  # (B, T, M)
        numbers: Tensor = self.out(product)
        return numbers


class GivenPath(nn.Module):
    """Shows the network a given head, unit by unit, and lets it keep a share of each unit.

    Tokens are narrower than units: without the second part most of a head's numbers could not reach the output. Both
    add nothing at first. The layers' biases say that there is a head; where there is none nothing is added.
    """

    def __init__(self, layout: UnitTokens, width: int) -> None:
        super().__init__()
        self.layout = layout
        spec = layout.spec
        # Without random numbers: the other layers start as they do in a network that reads no heads.
        self.unit_in = nn.utils.skip_init(nn.Linear, layout.unit_dim, width)
        self.bias_in = nn.utils.skip_init(nn.Linear, spec.output_dim, width) if spec.bias else None
        self.kept = nn.utils.skip_init(nn.Linear, width, 1)
        _zero(self)

    def encode(self, given: GivenHeads) -> Tensor:
        """What is added to the weight tokens: (B, T, W), T as in `UnitEmbedding.encode`."""
        units, output_bias = self.layout.split(given.weights)  # (B, h, unit_dim), (B, o)
        tokens: Tensor = self.unit_in(units)  # (B, h, W)
        if self.bias_in is not None and output_bias is not None:
            tokens = torch.cat([tokens, self.bias_in(output_bias).unsqueeze(1)], dim=1)  # (B, T, W)
        return tokens * given.present[:, None, None]

    def decode(self, tokens: Tensor, given: GivenHeads) -> Tensor:
        """What is added to the output, given the final tokens (B, T, W): (B, P)."""
        units, output_bias = self.layout.split(given.weights)  # (B, h, unit_dim), (B, o)
        shares = self.kept(tokens) * given.present[:, None, None]  # (B, T, 1)
        hidden = units.shape[1]
        return self.layout.join(
            shares[:, :hidden] * units, None if output_bias is None else shares[:, hidden] * output_bias
        )


class UnitEmbedding(nn.Module):
    """Flat weights <-> one W-wide token per hidden unit and one for the output bias."""

    identity: Tensor

    def __init__(self, spec: HeadSpec, config: DenoiserConfig, anchor: Tensor) -> None:
        super().__init__()
        self.layout = UnitTokens(spec)
        width, unit_dim, size = config.width, self.layout.unit_dim, config.class_path_size
        self.unit_in = nn.Linear(unit_dim, width)
        self.unit_out = nn.Linear(width, unit_dim)
        _zero(self.unit_out)
        if spec.bias:
            self.bias_in = nn.Linear(spec.output_dim, width)
            self.bias_out = nn.Linear(width, spec.output_dim)
            _zero(self.bias_out)
        self.identity_in = nn.Linear(unit_dim, width) if config.unit_identity else None
        self.class_path = ClassPath(unit_dim, size, unit_dim) if size else None
        self.class_bias = nn.Linear(size, spec.output_dim) if size and spec.bias else None
        if self.class_bias is not None:
            _zero(self.class_bias)
        self.given_path = GivenPath(self.layout, width) if config.reads_given else None
        # What names the hidden units: the anchor's units, or nothing but zeros.
        units = self.layout.split(anchor.unsqueeze(0))[0].squeeze(0)  # (h, unit_dim)
        # Unit variance within a unit, whatever the size of the anchor's weights.
        identity = F.layer_norm(units, units.shape[-1:]) if config.unit_identity else torch.zeros_like(units)
        self.register_buffer("identity", identity, persistent=False)

    def encode(self, flat: Tensor, given: GivenHeads | None = None) -> Tensor:
        """(B, P) -> (B, T, W), T = h + 1 with an output bias, else h."""
        units, output_bias = self.layout.split(flat)  # (B, h, unit_dim), (B, o)
        tokens: Tensor = self.unit_in(units)  # (B, h, W)
        if self.identity_in is not None:
            tokens = tokens + self.identity_in(self.identity)
        if output_bias is not None:
            tokens = torch.cat([tokens, self.bias_in(output_bias).unsqueeze(1)], dim=1)  # (B, T, W)
        return tokens if self.given_path is None or given is None else tokens + self.given_path.encode(given)

    def decode(self, tokens: Tensor, classes: Tensor | None, given: GivenHeads | None = None) -> Tensor:
        """Tokens (B, T, W) and the set of classes (B, M) -> (B, P)."""
        hidden = self.layout.spec.hidden_dim
        units = self.unit_out(tokens[:, :hidden])  # (B, h, unit_dim)
        output_bias = self.bias_out(tokens[:, hidden]) if self.layout.spec.bias else None  # (B, o)
        if self.class_path is not None:
            units = units + self.class_path(self.identity, classes)
        if self.class_bias is not None:
            output_bias = output_bias + self.class_bias(classes)
        output = self.layout.join(units, output_bias)  # (B, P)
        return output if self.given_path is None or given is None else output + self.given_path.decode(tokens, given)


class ChunkEmbedding(nn.Module):
    """Flat weights <-> one W-wide token per chunk, with learned positions."""

    def __init__(self, spec: HeadSpec, config: DenoiserConfig) -> None:
        super().__init__()
        self.layout = ChunkTokens(spec, config.chunk_size)
        width, size = config.width, config.class_path_size
        self.chunk_in = nn.Linear(config.chunk_size, width)
        self.chunk_out = nn.Linear(width, config.chunk_size)
        self.position = nn.Parameter(torch.randn(self.layout.count, width) * 0.02)
        self.class_path = ClassPath(width, size, config.chunk_size) if size else None
        _zero(self.chunk_out)

    def encode(self, flat: Tensor, given: GivenHeads | None = None) -> Tensor:
        """(B, P) -> (B, T, W); given heads are not read."""
        tokens: Tensor = self.chunk_in(self.layout.split(flat)) + self.position
        return tokens

    def decode(self, tokens: Tensor, classes: Tensor | None, given: GivenHeads | None = None) -> Tensor:
        """Tokens (B, T, W) and the set of classes (B, M) -> (B, P); given heads are not read."""
        chunks = self.chunk_out(tokens)  # (B, T, c)
        if self.class_path is not None:
            chunks = chunks + self.class_path(F.layer_norm(self.position, self.position.shape[-1:]), classes)
        return self.layout.join(chunks)


class Denoiser(nn.Module):
    """x_n, n and a condition -> the network's output, in the sampler's (standardised) space.

    At initialisation the output is `start`, or zero. Where the sampler's variable measures deviations from the zoo's
    mean head, or the network predicts x_0 and starts at that head, an untrained denoiser generates it.
    """

    start: Tensor | None

    def __init__(
        self,
        spec: HeadSpec,
        config: DenoiserConfig,
        anchor: Tensor,
        embedding_center: Tensor,
        start: Tensor | None = None,
    ) -> None:
        """Build the network.

        Args:
            spec: the heads' specification.
            config: size and variant.
            anchor: (P,) the weight space's anchor, which names the hidden units.
            embedding_center: (D,) subtracted from embeddings: class names' CLIP embeddings share most of
                their length, and what tells classes apart is the rest.
            start: (P,) what is added to the output; nothing by default.
        """
        super().__init__()
        width = config.width
        self.weights = UnitEmbedding(spec, config, anchor) if config.tokens == "unit" else ChunkEmbedding(spec, config)
        self.class_in = nn.Linear(config.embedding_dim, width) if config.class_tokens else None
        self.pooled_in = nn.Linear(config.embedding_dim, width) if config.pooled else None
        self.count_in = nn.Linear(1, width)
        self.timestep_in = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.final_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        _zero(self.final_modulation[1])
        if config.class_path_size:
            self.text_path = nn.Linear(config.embedding_dim, config.class_path)
            self.token_path = nn.Linear(width, config.class_path)
            self.path_gate = nn.Sequential(nn.SiLU(), nn.Linear(width, config.class_path))
            _zero(self.path_gate[1])
        self.has_class_path = config.class_path_size > 0
        self.embedding_dim = config.embedding_dim
        # In place of the pooled vector and the count; an item without classes has no class tokens either.
        self.null_context = nn.Parameter(torch.zeros(width)) if config.null_condition else None
        self.register_buffer("embedding_center", embedding_center, persistent=False)
        self.register_buffer("start", start, persistent=False)

    def forward(self, noisy: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """Evaluate the network.

        Args:
            noisy: (B, P) standardised weights at each item's timestep.
            timesteps: (B,) integers 0..N.
            condition: B items; null conditions among them only with `null_condition`. Given heads are read only
                with `reads_given`.

        Returns:
            (B, P).
        """
        weight_tokens = self.weights.encode(noisy, condition.given)  # (B, T, W)
        count = weight_tokens.shape[1]
        context = self._context(timesteps, condition)  # (B, W)
        mask = condition.mask.new_ones(noisy.shape[0], count)  # (B, T)
        tokens = weight_tokens
        if self.class_in is not None:
            class_tokens = self.class_in(self._centre(condition.tokens))  # (B, K, W)
            tokens = torch.cat([weight_tokens, class_tokens], dim=1)  # (B, S, W)
            mask = torch.cat([mask, condition.mask], dim=1)  # (B, S)
        for block in self.blocks:
            tokens = block(tokens, context, mask[:, None, None, :])
        shift, scale = self.final_modulation(context).unsqueeze(1).chunk(2, dim=-1)
        tokens = self.norm(tokens) * (1 + scale) + shift  # (B, S, W)
        classes = self._class_set(tokens[:, count:], context, condition) if self.has_class_path else None
        output: Tensor = self.weights.decode(tokens[:, :count], classes, condition.given)
        return output.float() if self.start is None else output.float() + self.start  # (B, P)

    def _class_set(self, class_tokens: Tensor, context: Tensor, condition: Condition) -> Tensor:
        """Sum text and final tokens (B, K, W) over the classes, gate by the context (B, W) -> (B, M)."""
        present = condition.mask.unsqueeze(-1)  # (B, K, 1)
        # The sum of K independent vectors grows with its root.
        root = condition.count.clamp(min=1).sqrt().unsqueeze(-1)  # (B, 1)
        text = (self._centre(condition.tokens) * present).sum(1) / root  # (B, D)
        final = (class_tokens * present).sum(1) / root  # (B, W)
        gated: Tensor = (self.text_path(text) + self.token_path(final)) * (1 + self.path_gate(context))
        return gated  # (B, M)

    def _context(self, timesteps: Tensor, condition: Condition) -> Tensor:
        is_null = (condition.count == 0).unsqueeze(-1)  # (B, 1)
        count: Tensor = self.count_in(condition.count.clamp(min=1).float().log()[:, None])  # (B, W)
        if self.null_context is not None:
            count = torch.where(is_null, self.null_context.to(count.dtype), count)
        context: Tensor = self.timestep_in(sinusoid(timesteps, 256))  # (B, W)
        if self.pooled_in is not None:
            pooled: Tensor = self.pooled_in(self._centre(condition.pooled))  # (B, W)
            context = context + pooled.masked_fill(is_null, 0)
        return context + count

    def _centre(self, embeddings: Tensor) -> Tensor:
        assert isinstance(self.embedding_center, Tensor)
        # Unit variance per coordinate for a unit vector: the projections see inputs of order one.
        return (embeddings - self.embedding_center) * math.sqrt(self.embedding_dim)


def _zero(layer: nn.Module) -> None:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
