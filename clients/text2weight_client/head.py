"""A generated head in numpy: read, check, classify, save.

The file format and the mathematics are described in docs/checkpoint-format.md; reading does not need
this package (any safetensors reader will do).

Letters: N images, K classes, d feature size, h hidden units, o size of a class embedding.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from text2weight_client.errors import InvalidFeaturesError, InvalidHeadError
from text2weight_client.tensor_file import PRECISIONS, read_tensors, write_file, write_tensors

if TYPE_CHECKING:
    import torch

    from text2weight_client.results import ResponseInfo

HEAD_FORMAT = "text2weight.head/1"
HEADS_FORMAT = "text2weight.heads/1"
ACTIVATIONS = ("gelu", "none")
WEIGHTS = ("linear1.weight", "linear2.weight")
BIASES = ("linear1.bias", "linear2.bias")
CLASS_EMBEDDINGS = "class_embeddings"

_erf = np.frompyfunc(math.erf, 1, 1)


@dataclass(frozen=True, eq=False)
class GeneratedHead:
    """A small classifier head for image features.

    Attributes:
        tensors: `linear1.weight` (h, d), `linear2.weight` (o, h) and, unless the head has no biases,
            `linear1.bias` (h,) and `linear2.bias` (o,); fp32.
        class_embeddings: (K, o) fp32, L2-normalised; row i is class i.
        metadata: strings that travel with the head: classes, seed, checkpoint, text encoder, ...
        precision: "fp32", "fp16" or "bf16": what the head came in and is saved in; here everything is fp32.
        response: headers of the answer that brought the head; None for one that was read from a file.

    Raises:
        InvalidHeadError: the parts do not make up a head.
    """

    tensors: dict[str, NDArray[np.float32]]
    class_embeddings: NDArray[np.float32]
    metadata: dict[str, str]
    precision: str = "fp32"
    response: ResponseInfo | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS.values():
            raise InvalidHeadError(f"precision is {self.precision!r}: it must be one of {[*PRECISIONS.values()]}")
        _check_metadata(self.metadata, len(self.class_embeddings))
        _check_tensors(self.tensors, self.class_embeddings)

    def __repr__(self) -> str:
        return f"<GeneratedHead for {', '.join(self.classes)}; seed {self.metadata.get('seed')}>"

    @property
    def classes(self) -> tuple[str, ...]:
        """The K class names, in the order of the columns of `predict`."""
        return tuple(json.loads(self.metadata["classes"]))

    @property
    def activation(self) -> str:
        """Between the two layers: "gelu" (the exact, erf form) or "none"."""
        return self.metadata["activation"]

    @property
    def logit_scale(self) -> float:
        """Factor from cosine to logit."""
        return float(self.metadata["logit_scale"])

    @property
    def input_dim(self) -> int:
        """d, the length of a feature vector."""
        return int(self.tensors["linear1.weight"].shape[1])

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the service warns about, such as a class name that its text encoder was not trained on."""
        text = self.metadata.get("warnings", "[]")
        try:
            warnings = json.loads(text)
        except ValueError:
            warnings = None
        return tuple(map(str, warnings)) if isinstance(warnings, list) else (text,)

    @property
    def num_parameters(self) -> int:
        """Numbers in the head itself, without the class embeddings."""
        return sum(tensor.size for tensor in self.tensors.values())

    def logits(self, features: ArrayLike) -> NDArray[np.float32]:
        """Score features against every class: logit_scale * cos(head(f), e_i).

        Args:
            features: (N, d), from the backbone that `metadata["backbone"]` names.

        Returns:
            (N, K).

        Raises:
            InvalidFeaturesError: wrong shape, not numbers, or not finite.
        """
        values = self._checked(features)  # (N, d)
        hidden = values @ self.tensors["linear1.weight"].T  # (N, h)
        if "linear1.bias" in self.tensors:
            hidden = hidden + self.tensors["linear1.bias"]
        if self.activation == "gelu":
            hidden = _gelu(hidden)
        outputs = hidden @ self.tensors["linear2.weight"].T  # (N, o)
        if "linear2.bias" in self.tensors:
            outputs = outputs + self.tensors["linear2.bias"]
        norms = np.linalg.norm(outputs, axis=1, keepdims=True)  # (N, 1)
        cosines = outputs / np.maximum(norms, 1e-12) @ self.class_embeddings.T  # (N, K)
        return np.asarray(self.logit_scale * cosines, dtype=np.float32)

    def predict(self, features: ArrayLike) -> NDArray[np.float32]:
        """Probability of every class for every image.

        Args:
            features: (N, d), from the backbone that `metadata["backbone"]` names.

        Returns:
            (N, K), rows sum to 1; column i is `classes[i]`.

        Raises:
            InvalidFeaturesError: wrong shape, not numbers, or not finite.
        """
        logits = self.logits(features)  # (N, K)
        exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
        return np.asarray(exponentials / exponentials.sum(axis=1, keepdims=True), dtype=np.float32)

    def to_torch(self) -> torch.nn.Sequential:
        """The head as `Sequential(Linear, GELU, Linear)`, from features (N, d) to outputs (N, o).

        Logits are `logit_scale` times the cosine between an output and each row of `class_embeddings`.
        A head without biases or activation gives `Linear(bias=False)` or `Identity` in their place.

        Raises:
            ImportError: PyTorch is not installed.
        """
        try:
            import torch
        except ImportError as error:
            raise ImportError("to_torch() needs PyTorch, which is not installed: pip install torch") from error

        def linear(name: str) -> torch.nn.Linear:
            weight = self.tensors[f"{name}.weight"]
            layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=f"{name}.bias" in self.tensors)
            prefix = f"{name}."
            own = {key.removeprefix(prefix): value for key, value in self.tensors.items() if key.startswith(prefix)}
            layer.load_state_dict({key: torch.from_numpy(value.copy()) for key, value in own.items()})
            return layer

        activation = torch.nn.GELU() if self.activation == "gelu" else torch.nn.Identity()
        return torch.nn.Sequential(linear("linear1"), activation, linear("linear2"))

    def to_bytes(self) -> bytes:
        """The head as a safetensors file in its precision; equal heads give equal bytes."""
        tensors = {**self.tensors, CLASS_EMBEDDINGS: self.class_embeddings}
        return write_tensors(tensors, self.metadata, self.precision)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file; it appears whole or not at all.

        Raises:
            OSError: the folder does not exist or cannot be written.
        """
        write_file(path, self.to_bytes())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> GeneratedHead:
        """Read a file written by `save` or sent by the service.

        Raises:
            OSError: the file cannot be read.
            InvalidHeadError: it is not a head; the message names the file.
        """
        with naming_file(path):
            return cls.from_bytes(Path(path).read_bytes())

    @classmethod
    def from_bytes(cls, data: bytes) -> GeneratedHead:
        """Read the bytes of a head file.

        Raises:
            InvalidHeadError: they are not a head; the message says what is wrong.
        """
        tensors, metadata, precision = read_tensors(data)
        return cls(tensors, pop_class_embeddings(tensors), metadata, precision)

    def _checked(self, features: ArrayLike) -> NDArray[np.float32]:
        try:
            values = np.asarray(features, dtype=np.float32)
        except (TypeError, ValueError) as error:
            raise InvalidFeaturesError(f"features must be numbers of shape (N, {self.input_dim}): {error}") from error
        if values.ndim != 2 or values.shape[1] != self.input_dim:
            hint = "; for one image pass features[None]" if values.shape == (self.input_dim,) else ""
            raise InvalidFeaturesError(
                f"features have shape {values.shape}: this head takes (N, {self.input_dim}), "
                f"from the backbone {self.metadata.get('backbone', 'it was generated for')}{hint}"
            )
        if not np.isfinite(values).all():
            row = int(np.argwhere(~np.isfinite(values).all(axis=1))[0, 0])
            raise InvalidFeaturesError(f"features[{row}] holds NaN or infinity: every value must be finite")
        return values


def _gelu(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Exact GELU, x * Phi(x), by the C library's erf (Hendrycks & Gimpel, arXiv 1606.08415)."""
    phi = 0.5 * (1.0 + _erf(x / math.sqrt(2.0)).astype(np.float64))
    return np.asarray(x * phi, dtype=np.float32)


@contextmanager
def naming_file(path: str | os.PathLike[str]) -> Iterator[None]:
    """Put the path of a file before what is wrong with it."""
    try:
        yield
    except InvalidHeadError as error:
        raise InvalidHeadError(f"{os.fspath(path)}: {error}") from error


def pop_class_embeddings(tensors: dict[str, NDArray[np.float32]]) -> NDArray[np.float32]:
    """Take the class embeddings (K, o) out of the tensors of a file.

    Raises:
        InvalidHeadError: there are none.
    """
    if CLASS_EMBEDDINGS not in tensors:
        raise InvalidHeadError(f"tensor {CLASS_EMBEDDINGS!r} is missing; the file has {sorted(tensors)}")
    return tensors.pop(CLASS_EMBEDDINGS)


def _check_tensors(tensors: dict[str, NDArray[np.float32]], class_embeddings: NDArray[np.float32]) -> None:
    names = set(tensors)
    if names not in ({*WEIGHTS}, {*WEIGHTS, *BIASES}):
        raise InvalidHeadError(
            f"tensors are {sorted(names)}: a head has {[*WEIGHTS]}, with or without both of {[*BIASES]}"
        )
    for name, tensor in {**tensors, CLASS_EMBEDDINGS: class_embeddings}.items():
        rank = 1 if name in BIASES else 2
        if tensor.dtype != np.float32 or tensor.ndim != rank or tensor.size == 0:
            raise InvalidHeadError(
                f"tensor {name!r} is {tensor.dtype} of shape {tensor.shape}: it must be a float32 tensor of rank {rank}"
            )
        if not np.isfinite(tensor).all():
            raise InvalidHeadError(f"tensor {name!r} holds NaN or infinity")
    hidden = tensors["linear1.weight"].shape[0]
    outputs = tensors["linear2.weight"].shape[0]
    expected = {"linear2.weight": (outputs, hidden), "linear1.bias": (hidden,), "linear2.bias": (outputs,)}
    for name, shape in expected.items():
        if name in tensors and tensors[name].shape != shape:
            raise InvalidHeadError(
                f"tensor {name!r} has shape {tensors[name].shape}: the other tensors ask for {shape}"
            )
    if class_embeddings.shape[1] != outputs:
        raise InvalidHeadError(
            f"{CLASS_EMBEDDINGS!r} has {class_embeddings.shape[1]} columns: linear2.weight has {outputs} rows"
        )


def _check_metadata(metadata: dict[str, str], num_classes: int) -> None:
    if metadata.get("format") != HEAD_FORMAT:
        hint = "; read it with GeneratedHeads" if metadata.get("format") == HEADS_FORMAT else ""
        raise InvalidHeadError(f"metadata 'format' is {metadata.get('format')!r}: a head has {HEAD_FORMAT!r}{hint}")
    try:
        classes = json.loads(metadata.get("classes", ""))
    except ValueError:
        classes = None
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise InvalidHeadError("metadata 'classes' must be a JSON list of class names")
    if len(classes) != num_classes:
        raise InvalidHeadError(f"metadata 'classes' has {len(classes)} names for {num_classes} class embeddings")
    if metadata.get("activation") not in ACTIVATIONS:
        raise InvalidHeadError(
            f"metadata 'activation' is {metadata.get('activation')!r}: it must be one of {ACTIVATIONS}"
        )
    try:
        logit_scale = float(metadata.get("logit_scale", ""))
    except ValueError:
        logit_scale = math.nan
    if not (math.isfinite(logit_scale) and logit_scale > 0):
        raise InvalidHeadError(
            f"metadata 'logit_scale' is {metadata.get('logit_scale')!r}: it must be a number above 0"
        )
