"""Filling Redis with text embeddings before workers ask for them.

Letters: n prompts, D embedding size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from text2weight.condition import normalise_class_names, plain_name
from text2weight.errors import InvalidInputError, Text2WeightError
from text2weight.text_encoder import read_embedding_table
from text2weight_service.embedding_cache import SharedEmbeddings
from text2weight_service.metrics import Metrics
from text2weight_service.model import Model
from text2weight_service.redis_store import BreakerState, RedisStore
from text2weight_service.text_stage import encode_texts

_CHUNK = 256
# Here nobody waits, and a Redis that is merely slow shall be filled all the same.
_REDIS_TIMEOUT_S = 10.0
_CHECKED_ROWS = 32
# What one encoder gives on two machines differs by some 1e-6, what two encoders give by some 1e-2.
_TOLERANCE = 1e-5


class WarmError(Exception):
    """The cache cannot be filled."""


@dataclass(frozen=True)
class Source:
    """Prompts, and where their embeddings come from.

    Attributes:
        prompts: as requests will ask for them.
        rows: embeddings (n, D) of n of the prompts.
    """

    prompts: Sequence[str]
    rows: Callable[[Sequence[str]], Tensor]


@dataclass(frozen=True)
class Warmed:
    """How many embeddings were in Redis already, and how many were added."""

    there: int
    added: int


def names_source(model: Model, file: Path) -> Source:
    """Names from a text file, one per line, to be encoded by the checkpoint's text encoder.

    Raises:
        WarmError: the file cannot be read, holds no names, or one that no request could have.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise WarmError(f"names {file} cannot be read: {error}") from None
    names: list[str] = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                names += normalise_class_names([line], minimum=1)
            except InvalidInputError as error:
                raise WarmError(f"names {file}, line {number}: {error}") from None
    if not names:
        raise WarmError(f"names {file} holds no names: write one per line")

    def encode(prompts: Sequence[str]) -> Tensor:
        try:
            rows = encode_texts(model.text_encoder, prompts)  # bit for bit what a worker computes
        except Text2WeightError as error:
            raise WarmError(str(error)) from None
        return torch.stack([rows[prompt] for prompt in prompts])  # (n, D)

    return Source(tuple(dict.fromkeys(model.prompts(names))), encode)


def table_source(model: Model, table_name: str) -> Source:
    """The rows of an embedding table, where they are what the checkpoint's text encoder gives.

    A table does not say which encoder made it, and a wrong row would spoil every head that reads it from the cache.
    So some rows, evenly spread, are computed again and must agree.

    Args:
        model: the checkpoint.
        table_name: FILE#TABLE.

    Raises:
        WarmError: another template, another encoder, or embeddings of descriptions.
        CheckpointError: the table cannot be read.
    """
    table = read_embedding_table(table_name)
    if table.descriptions:
        raise WarmError(f"{table_name} holds embeddings of descriptions: the cache is for prompts with class names")
    if table.template != model.config.template:
        raise WarmError(
            f"{table_name} has the template {table.template!r}, the checkpoint asks for {model.config.template!r}"
        )
    row_of = dict(zip(model.prompts([plain_name(name) for name in table.names]), table.embeddings, strict=True))
    prompts = tuple(row_of)
    # Every name that is spelt otherwise in prompts than in the table, too: its row may be that of the other spelling.
    respelt = model.prompts([plain_name(name) for name in table.names if plain_name(name) != name])
    spread = prompts[:: max(len(prompts) // _CHECKED_ROWS, 1)]
    _check_rows(model, table_name, list(dict.fromkeys([*spread, *respelt])), row_of)
    return Source(prompts, lambda some: torch.stack([row_of[prompt] for prompt in some]))  # (n, D)


def _check_rows(model: Model, table_name: str, prompts: Sequence[str], row_of: dict[str, Tensor]) -> None:
    encoder = model.text_encoder
    advice = f"it was not made by the checkpoint's text encoder, {encoder.name}; give names instead of a table"
    try:
        expected = encoder.encode(prompts)  # (n, D)
    except InvalidInputError as error:
        raise WarmError(f"{table_name}: {error}; {advice}") from None
    rows = torch.stack([row_of[prompt] for prompt in prompts])  # (n, D)
    if rows.shape != expected.shape:
        raise WarmError(f"{table_name} has {rows.shape[1]} numbers a row, not {expected.shape[1]}: {advice}")
    differences = (rows - expected).abs().amax(1)  # (n,)
    worst = int(differences.argmax())
    if float(differences[worst]) > _TOLERANCE:
        raise WarmError(
            f"{table_name}: the row of {prompts[worst]!r} differs by {float(differences[worst]):.2g}: {advice}"
        )


async def warm(redis_url: str, ttl_s: int, model: Model, source: Source, progress: Callable[[int], None]) -> Warmed:
    """Put every prompt's embedding into Redis, and renew the life of those that are there.

    Args:
        redis_url: address of Redis.
        ttl_s: life of the embeddings there.
        model: the checkpoint, for its text encoder's fingerprint.
        source: the embeddings.
        progress: called with the number of prompts that were dealt with since its last call.

    Raises:
        WarmError: Redis does not answer or does not take the values.
    """
    metrics = Metrics()
    store = RedisStore(redis_url, _REDIS_TIMEOUT_S, metrics)
    encoder = model.text_encoder
    shared = SharedEmbeddings(store, encoder.fingerprint, encoder.embedding_dim, ttl_s, metrics)
    there = 0
    try:
        for start in range(0, len(source.prompts), _CHUNK):
            chunk = source.prompts[start : start + _CHUNK]
            known = await shared.get(chunk)
            if store.reads.state is not BreakerState.CLOSED:
                raise WarmError(f"Redis does not answer: {store.reads.reason}")
            missing = [prompt for prompt in chunk if prompt not in known]
            fresh = dict(zip(missing, source.rows(missing), strict=True)) if missing else {}
            if not await shared.put(known | fresh):
                raise WarmError(f"Redis does not take the embeddings: {store.writes.reason}")
            there += len(known)
            progress(len(chunk))
    finally:
        await store.close()
    return Warmed(there, len(source.prompts) - there)
