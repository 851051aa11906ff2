"""Distil tables of text embeddings into a small open_clip text tower.

The tower is trained to return a table's vector for each of its prompts, so that a checkpoint can
bring its own text encoder. It knows the words it was trained on and few others.

Only tokens that occur in the prompts are trained, in a compact vocabulary; the file that open_clip
loads has all 49,408 rows, and rows of other tokens hold the mean of the trained ones. The token
table makes up most of the file, so it is stored as float8 (e4m3), which torch widens when loading.

Letters: n prompts, L tokens per prompt, V tokens that occur, W tower width, D embedding size.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from open_clip.model import CLIP
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from safetensors.torch import save_file
from torch import Tensor, nn

from text2weight.text_encoder import EmbeddingTable
from text2weight_training.files import TrainingDataError, atomic_path

VOCABULARY_SIZE = 49408
LOG_INTERVAL_S = 15.0
SAVE_INTERVAL_S = 60.0


@dataclass(frozen=True)
class DistillConfig:
    """The tower's size and how long it is trained.

    Attributes:
        width: W; the embeddings of all prompts lie in a W-dimensional affine subspace, so W bounds
            how well many different names can be told apart.
        epochs: times that every table row is seen.
        minutes: end earlier than that where this much time on the clock is up; the learning rate
            follows whichever is further. None leaves the result independent of the machine's speed.
        learning_rate: peak of the one-cycle schedule.
        token_learning_rate: the same for the token table, whose rows get few updates each.
    """

    width: int = 256
    layers: int = 1
    heads: int = 4
    context_length: int = 24
    epochs: int = 200
    minutes: float | None = None
    batch_size: int = 64
    learning_rate: float = 1e-3
    token_learning_rate: float = 1e-2
    weight_decay: float = 0.01
    seed: int = 0


@dataclass(frozen=True)
class Prompts:
    """Unique prompts of one or more tables.

    Attributes:
        texts: n prompts.
        tokens: (n, L) int64, CLIP's byte-pair ids, 0 behind the end token.
        targets: (n, D) L2-normalised.
        counts: (n,) number of table rows that ask for each prompt.
    """

    texts: tuple[str, ...]
    tokens: Tensor
    targets: Tensor
    counts: Tensor


@dataclass(frozen=True)
class Agreement:
    """How close a tower comes to one table.

    Attributes:
        mean_cosine: over the table's rows.
        min_cosine: of the worst row.
        mean_centred: the same after the table's mean vector is subtracted from both sides.
        min_centred: of the worst row.
        same_neighbour: share of rows whose most similar other row is the same one on both sides.
    """

    mean_cosine: float
    min_cosine: float
    mean_centred: float
    min_centred: float
    same_neighbour: float

    def __str__(self) -> str:
        return (
            f"cosine {self.mean_cosine:.4f} (least {self.min_cosine:.4f}), centred {self.mean_centred:.4f} "
            f"(least {self.min_centred:.4f}), same nearest neighbour {self.same_neighbour:.1%}"
        )


def table_prompts(table: EmbeddingTable) -> list[str]:
    """The prompt of each row: the template with the first of the row's comma-separated synonyms."""
    return [table.template.format(name.split(",")[0].strip()) for name in table.names]


def collect_prompts(tables: Sequence[EmbeddingTable], context_length: int) -> Prompts:
    """Tokenise the tables' prompts; a prompt that several rows share is kept once, with its count.

    Raises:
        TrainingDataError: no table, tables of different sizes, or a prompt that is too long.
    """
    if not tables:
        raise TrainingDataError("no embedding table to distil: give at least one FILE#TABLE")
    sizes = {table.embeddings.shape[1] for table in tables}
    if len(sizes) != 1:
        raise TrainingDataError(
            f"the tables have embeddings of different sizes {sorted(sizes)}: use one text encoder's"
        )
    targets: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    for table in tables:
        for text, vector in zip(table_prompts(table), table.embeddings, strict=True):
            targets.setdefault(text, vector)
            counts[text] = counts.get(text, 0) + 1
    tokenizer = open_clip.SimpleTokenizer()
    encoded = [[tokenizer.sot_token_id, *tokenizer.encode(text), tokenizer.eot_token_id] for text in targets]
    tokens = torch.zeros(len(encoded), context_length, dtype=torch.long)  # (n, L)
    for row, (text, ids) in enumerate(zip(targets, encoded, strict=True)):
        if len(ids) > context_length:
            raise TrainingDataError(
                f"{text!r} has {len(ids)} tokens, more than the tower's context length {context_length}: raise it"
            )
        tokens[row, : len(ids)] = torch.tensor(ids)
    return Prompts(tuple(targets), tokens, torch.stack(list(targets.values())), torch.tensor(list(counts.values())))


def distill(prompts: Prompts, config: DistillConfig, out: Path, device: str = "cpu") -> Path:
    """Train a tower on the prompts and write it as an open_clip local directory.

    The state is saved about once a minute under `out`; a second call goes on from there.
    Without `minutes`, that gives the same tower as an undisturbed run.

    Args:
        prompts: what to reproduce.
        config: size and training time.
        out: folder that receives `open_clip_config.json` and `open_clip_model.safetensors`.
        device: torch device.

    Returns:
        `out`.

    Raises:
        TrainingDataError: heads that do not divide the width, an interrupted run with other settings, or
            a loss that is no longer finite.
    """
    if config.width % config.heads:
        raise TrainingDataError(f"{config.heads} heads do not divide width {config.width}: choose a divisor")
    vocabulary = torch.unique(prompts.tokens)  # (V,) ascending, so the end token stays the greatest id
    compact = torch.searchsorted(vocabulary, prompts.tokens)  # (n, L)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = CLIP(**model_config(config, prompts.targets.shape[1], len(vocabulary)))
        nn.init.normal_(model.token_embedding.weight, std=0.3)  # within float8's range of normal numbers
    model = model.to(device)
    _train(model, Prompts(prompts.texts, compact, prompts.targets, prompts.counts), config, out, device)
    save_tower(model.cpu(), vocabulary, config, prompts.targets.shape[1], out)
    (out / "training-state.pt").unlink(missing_ok=True)
    return out


def model_config(config: DistillConfig, embed_dim: int, vocab_size: int = VOCABULARY_SIZE) -> dict[str, Any]:
    """open_clip's `model_cfg`; the image tower that it insists on is a few thousand numbers."""
    return {
        "embed_dim": embed_dim,
        "vision_cfg": {"image_size": 8, "patch_size": 8, "layers": 1, "width": 8, "head_width": 8},
        "text_cfg": {
            "context_length": config.context_length,
            "vocab_size": vocab_size,
            "width": config.width,
            "heads": config.heads,
            "layers": config.layers,
            "proj_bias": True,
        },
    }


def encode_prompts(model: CLIP, tokens: Tensor) -> Tensor:
    """The tower's `encode_text` without the padding behind the longest prompt.

    Attention is causal and the end token is read, so the padding cannot change the result.

    Args:
        model: open_clip's CLIP.
        tokens: (B, L) ids of the model's own vocabulary.

    Returns:
        (B, D) L2-normalised.
    """
    end = tokens.argmax(dim=1)  # (B,) the end token has the greatest id
    length = int(end.max()) + 1
    hidden = model.token_embedding(tokens[:, :length]) + model.positional_embedding[:length]
    hidden = model.transformer(hidden, attn_mask=model.attn_mask[:length, :length])
    last = hidden[torch.arange(len(tokens), device=tokens.device), end]  # (B, W)
    output: Tensor = model.text_projection(model.ln_final(last))
    return F.normalize(output, dim=-1)  # (B, D)


def cosine_loss(output: Tensor, target: Tensor, mean: Tensor) -> Tensor:
    """One minus the cosine, plus the same for both sides minus `mean`; (B, D), (B, D), (D,) -> (B,).

    Text embeddings share a large common part; without it, the differences between names show.
    """
    raw = 1 - (output * target).sum(dim=1)  # (B,)
    centred = 1 - F.cosine_similarity(output - mean, target - mean, dim=1)  # (B,)
    return raw + centred


def batches_by_length(tokens: Tensor, counts: Tensor, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield index batches of one epoch in random order; a batch holds prompts of similar length.

    Each prompt occurs as often as its count says.
    """
    rows = torch.arange(len(tokens)).repeat_interleave(counts)  # (sum of counts,)
    rows = rows[torch.randperm(len(rows), generator=generator)]
    rows = rows[torch.argsort(tokens[rows].argmax(dim=1), stable=True)]
    chunks = rows.split(size)
    for position in torch.randperm(len(chunks), generator=generator):
        yield chunks[int(position)]


def _new_optimizer(model: CLIP, config: DistillConfig) -> torch.optim.Optimizer:
    tokens = model.token_embedding.weight
    weights = [p for p in model.parameters() if p.ndim >= 2 and p is not tokens]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": weights, "weight_decay": config.weight_decay, "peak_lr": config.learning_rate},
        {"params": vectors, "weight_decay": 0.0, "peak_lr": config.learning_rate},
        {"params": [tokens], "weight_decay": 0.0, "peak_lr": config.token_learning_rate},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98))


class _Clock:
    """How much of a run is done: the greater of its shares of the epochs and of the minutes."""

    def __init__(self, config: DistillConfig, spent_s: float) -> None:
        self._config = config
        self._started = time.monotonic() - spent_s

    @property
    def spent_s(self) -> float:
        return time.monotonic() - self._started

    def progress(self, epochs: float) -> float:
        by_time = self.spent_s / (60 * self._config.minutes) if self._config.minutes else 0.0
        return max(epochs / self._config.epochs, by_time)


def _train(model: CLIP, prompts: Prompts, config: DistillConfig, out: Path, device: str) -> None:
    optimizer = _new_optimizer(model, config)
    state_file = out / "training-state.pt"
    spent_s, epoch = _resume(state_file, config, prompts, model, optimizer)
    clock = _Clock(config, spent_s)
    logged = saved = spent_s
    with Progress(TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()) as progress:
        bar = progress.add_task("distilling", total=100)
        while clock.progress(epoch) < 1:
            loss = _run_epoch(model, optimizer, prompts, config, epoch, clock, device)
            epoch += 1
            if not math.isfinite(loss):
                raise TrainingDataError(f"the loss became {loss} in epoch {epoch}: lower the learning rate")
            done, now = clock.progress(epoch), clock.spent_s
            progress.update(bar, completed=100 * done, description=f"epoch {epoch} loss {loss:.4f}")
            if now - logged >= LOG_INTERVAL_S or done >= 1:
                progress.console.print(f"epoch {epoch}: loss {loss:.4f} after {now:.0f} s")
                logged = now
            if now - saved >= SAVE_INTERVAL_S:
                _save_state(state_file, config, prompts, model, optimizer, now, epoch)
                saved = now


def _run_epoch(
    model: CLIP,
    optimizer: torch.optim.Optimizer,
    prompts: Prompts,
    config: DistillConfig,
    epoch: int,
    clock: _Clock,
    device: str,
) -> float:
    """Train on every table row once; returns the mean loss."""
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + epoch)
    mean = (prompts.targets * prompts.counts[:, None]).sum(dim=0) / prompts.counts.sum()  # (D,)
    batches = list(batches_by_length(prompts.tokens, prompts.counts, config.batch_size, generator))
    total = 0.0
    for number, rows in enumerate(batches):
        share = one_cycle(clock.progress(epoch + number / len(batches)))
        tokens, targets = prompts.tokens[rows].to(device), prompts.targets[rows].to(device)  # (B, L), (B, D)
        total += _step(model, optimizer, tokens, targets, mean.to(device), share)
    return total / len(batches)


def _step(
    model: CLIP, optimizer: torch.optim.Optimizer, tokens: Tensor, targets: Tensor, mean: Tensor, share: float
) -> float:
    """Take one optimiser step at `share` of the peak learning rates; returns the loss."""
    for group in optimizer.param_groups:
        group["lr"] = share * group["peak_lr"]
    loss = cosine_loss(encode_prompts(model, tokens), targets, mean).mean()
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return float(loss.detach())


def one_cycle(progress: float, warm_up: float = 0.05) -> float:
    """Share of the peak learning rate at `progress` 0..1: linear rise, cosine fall to zero."""
    if progress < warm_up:
        return max(progress, 1e-3) / warm_up
    return (1 + math.cos(math.pi * min((progress - warm_up) / (1 - warm_up), 1.0))) / 2


def _run_settings(config: DistillConfig, prompts: Prompts) -> dict[str, Any]:
    return {**asdict(config), "prompts": list(prompts.texts)}


def _save_state(
    path: Path,
    config: DistillConfig,
    prompts: Prompts,
    model: CLIP,
    optimizer: torch.optim.Optimizer,
    spent_s: float,
    epoch: int,
) -> None:
    state = {"settings": _run_settings(config, prompts), "spent_s": spent_s, "epoch": epoch}
    with atomic_path(path) as temporary:
        torch.save(state | {"model": model.state_dict(), "optimizer": optimizer.state_dict()}, temporary)


def _resume(
    path: Path, config: DistillConfig, prompts: Prompts, model: CLIP, optimizer: torch.optim.Optimizer
) -> tuple[float, int]:
    """Load an interrupted run's state, if there is one; returns its seconds and epochs."""
    if not path.is_file():
        return 0.0, 0
    state = torch.load(path, weights_only=True)
    if state["settings"] != _run_settings(config, prompts):
        raise TrainingDataError(f"{path} belongs to a run with other settings: remove it or use its settings")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return float(state["spent_s"]), int(state["epoch"])


def save_tower(model: CLIP, vocabulary: Tensor, config: DistillConfig, embed_dim: int, out: Path) -> None:
    """Write the tower with open_clip's full vocabulary.

    Args:
        model: CLIP over the compact vocabulary.
        vocabulary: (V,) CLIP's id of each compact id.
        config: the tower's size.
        embed_dim: D.
        out: folder.
    """
    tensors = {name: tensor.detach().half().contiguous() for name, tensor in model.state_dict().items()}
    trained = model.state_dict()["token_embedding.weight"].float()  # (V, W)
    rows = trained.mean(dim=0).repeat(VOCABULARY_SIZE, 1)  # (49408, W)
    rows[vocabulary] = trained
    tensors["token_embedding.weight"] = rows.to(torch.float8_e4m3fn)
    with atomic_path(out / "open_clip_model.safetensors") as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    description = {
        "model_cfg": model_config(config, embed_dim),
        "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
    }
    with atomic_path(out / "open_clip_config.json") as temporary:
        temporary.write_text(json.dumps(description, indent=2) + "\n")


def write_vocabulary(tables: Sequence[EmbeddingTable], out: Path) -> None:
    """Write `vocabulary.json`: the names and templates the tower was trained on."""
    names = sorted({name.split(",")[0].strip() for table in tables for name in table.names})
    content = {"templates": sorted({table.template for table in tables}), "names": names}
    with atomic_path(out / "vocabulary.json") as temporary:
        temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def load_tower(folder: Path) -> tuple[CLIP, Any]:
    """Load a written tower the way every open_clip user does; returns the model and its tokenizer."""
    model = open_clip.create_model(f"local-dir:{folder}").eval()
    return model, open_clip.get_tokenizer(f"local-dir:{folder}")


@torch.inference_mode()
def measure_agreement(folder: Path, table: EmbeddingTable) -> Agreement:
    """Compare a written tower with a table."""
    model, tokenizer = load_tower(folder)
    tokens = tokenizer(table_prompts(table))  # (n, L)
    output = torch.cat([model.encode_text(chunk, normalize=True) for chunk in tokens.split(256)])  # (n, D)
    target = F.normalize(table.embeddings.float(), dim=-1)  # (n, D)
    mean = target.mean(dim=0)  # (D,)
    raw = F.cosine_similarity(output, target, dim=1)  # (n,)
    centred = F.cosine_similarity(output - mean, target - mean, dim=1)  # (n,)
    same = (_nearest_other(output - mean) == _nearest_other(target - mean)).float().mean()
    return Agreement(*(float(value) for value in (raw.mean(), raw.min(), centred.mean(), centred.min(), same)))


def _nearest_other(vectors: Tensor) -> Tensor:
    """Index of each row's most similar other row; (n, D) -> (n,)."""
    normalised = F.normalize(vectors, dim=-1)
    similarity = normalised @ normalised.T  # (n, n)
    return similarity.fill_diagonal_(-2).argmax(dim=1)
