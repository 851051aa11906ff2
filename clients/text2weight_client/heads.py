"""Several heads for one list of classes, one for each seed, in one file.

Letters: S heads, N images, K classes, d feature size, h hidden units, o size of a class embedding.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from text2weight_client.errors import InvalidHeadError
from text2weight_client.head import (
    CLASS_EMBEDDINGS,
    HEAD_FORMAT,
    HEADS_FORMAT,
    GeneratedHead,
    naming_file,
    pop_class_embeddings,
)
from text2weight_client.tensor_file import read_tensors, write_file, write_tensors

if TYPE_CHECKING:
    from text2weight_client.results import ResponseInfo


@dataclass(frozen=True, eq=False)
class GeneratedHeads(Sequence[GeneratedHead]):
    """A sequence of heads that differ in their seeds only: `heads[0]`, `len(heads)`, `for head in heads`.

    Attributes:
        heads: one or more, with the same classes, layout and class embeddings.
        response: headers of the answer that brought the heads; None for a file.

    Raises:
        InvalidHeadError: there are none, or they do not belong together.
    """

    heads: tuple[GeneratedHead, ...]
    response: ResponseInfo | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not self.heads:
            raise InvalidHeadError("no heads: at least one is needed")
        first = _common(self.heads[0])
        for number, head in enumerate(self.heads[1:], 1):
            if _common(head) != first or not np.array_equal(head.class_embeddings, self.heads[0].class_embeddings):
                raise InvalidHeadError(f"head {number} differs from head 0 in more than weights and seed")

    @overload
    def __getitem__(self, index: int) -> GeneratedHead: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[GeneratedHead, ...]: ...
    def __getitem__(self, index: int | slice) -> GeneratedHead | tuple[GeneratedHead, ...]:
        return self.heads[index]

    def __len__(self) -> int:
        return len(self.heads)

    @property
    def classes(self) -> tuple[str, ...]:
        """The K class names of every head."""
        return self.heads[0].classes

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seed of each head.

        Raises:
            InvalidHeadError: a head states none, because it was not drawn from noise.
        """
        try:
            return tuple(int(head.metadata["seed"]) for head in self.heads)
        except (KeyError, ValueError) as error:
            raise InvalidHeadError(f"metadata 'seed' is missing or not a number: {error}") from error

    def predict(self, features: ArrayLike) -> NDArray[np.float32]:
        """Probability of every class for every image by every head; `.mean(0)` is the ensemble's.

        Args:
            features: (N, d), from the backbone that the metadata names.

        Returns:
            (S, N, K).

        Raises:
            InvalidFeaturesError: wrong shape, not numbers, or not finite.
        """
        return np.stack([head.predict(features) for head in self.heads])  # (S, N, K)

    def to_bytes(self) -> bytes:
        """One safetensors file: every weight tensor with a leading axis S."""
        first = self.heads[0]
        stacked = {name: np.stack([head.tensors[name] for head in self.heads]) for name in first.tensors}
        metadata = {key: value for key, value in first.metadata.items() if key != "seed"}
        metadata |= {"format": HEADS_FORMAT, "seeds": json.dumps(self.seeds)}
        return write_tensors({**stacked, CLASS_EMBEDDINGS: first.class_embeddings}, metadata, first.precision)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file; it appears whole or not at all.

        Raises:
            OSError: the folder does not exist or cannot be written.
        """
        write_file(path, self.to_bytes())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> GeneratedHeads:
        """Read a file of several heads, or of one.

        Raises:
            OSError: the file cannot be read.
            InvalidHeadError: it holds no heads; the message names the file.
        """
        with naming_file(path):
            return cls.from_bytes(Path(path).read_bytes())

    @classmethod
    def from_bytes(cls, data: bytes, response: ResponseInfo | None = None) -> GeneratedHeads:
        """Read the bytes of a file of several heads, or of one.

        Raises:
            InvalidHeadError: they are not heads; the message says what is wrong.
        """
        tensors, metadata, precision = read_tensors(data)
        embeddings = pop_class_embeddings(tensors)
        if metadata.get("format") == HEAD_FORMAT:
            return cls((GeneratedHead(tensors, embeddings, metadata, precision, response),), response)
        if metadata.get("format") != HEADS_FORMAT:
            raise InvalidHeadError(
                f"metadata 'format' is {metadata.get('format')!r}: allowed are {HEAD_FORMAT!r} and {HEADS_FORMAT!r}"
            )
        seeds = _read_seeds(metadata)
        for name, tensor in tensors.items():
            if tensor.ndim == 0 or len(tensor) != len(seeds):
                raise InvalidHeadError(
                    f"tensor {name!r} has shape {tensor.shape}: metadata 'seeds' asks for {len(seeds)} heads"
                )
        own = {key: value for key, value in metadata.items() if key != "seeds"} | {"format": HEAD_FORMAT}
        heads = [
            GeneratedHead(
                {name: tensor[row] for name, tensor in tensors.items()},
                embeddings,
                own | {"seed": str(seed)},
                precision,
                response,
            )
            for row, seed in enumerate(seeds)
        ]
        return cls(tuple(heads), response)


def _common(head: GeneratedHead) -> tuple[object, ...]:
    """What all heads of one file share, apart from their class embeddings."""
    metadata = {key: value for key, value in head.metadata.items() if key != "seed"}
    return metadata, head.precision, {name: tensor.shape for name, tensor in head.tensors.items()}


def _read_seeds(metadata: dict[str, str]) -> list[int]:
    try:
        seeds = json.loads(metadata.get("seeds", ""))
    except ValueError:
        seeds = None
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int for seed in seeds):
        raise InvalidHeadError("metadata 'seeds' must be a JSON list of whole numbers, one for each head")
    return seeds
