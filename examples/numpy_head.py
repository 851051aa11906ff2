"""Use a head file with NumPy and safetensors alone, without any package of this project.

    t2w generate apple bus lizard -o head.safetensors
    python examples/numpy_head.py head.safetensors features.npy

features.npy holds one row of 512 numbers for each picture, from the backbone that the head's metadata names. The same
few lines are all that another language needs: the file format is described in docs/checkpoint-format.md.
"""

from __future__ import annotations

import json
import math
import sys

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

Array = NDArray[np.float32]


def predict(path: str, features: Array) -> tuple[list[str], Array]:
    """Class names, and the probability of each class for each row of features: (N, 512) -> (N, K)."""
    with safe_open(path, framework="np") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        metadata = file.metadata()
    hidden = features @ tensors["linear1.weight"].T + tensors.get("linear1.bias", 0.0)  # (N, 16)
    if metadata["activation"] == "gelu":
        hidden = hidden * 0.5 * (1.0 + np.vectorize(math.erf)(hidden / math.sqrt(2.0)))
    outputs = hidden @ tensors["linear2.weight"].T + tensors.get("linear2.bias", 0.0)  # (N, 512)
    outputs /= np.linalg.norm(outputs, axis=1, keepdims=True)
    logits = float(metadata["logit_scale"]) * outputs @ tensors["class_embeddings"].T  # (N, K)
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    return json.loads(metadata["classes"]), exponentials / exponentials.sum(axis=1, keepdims=True)


def main() -> None:
    """Print the most probable class of each row."""
    head_path, features_path = sys.argv[1:]
    classes, probabilities = predict(head_path, np.load(features_path))
    for row in probabilities:
        print(f"{classes[int(row.argmax())]}\t{row.max():.2f}")


if __name__ == "__main__":
    main()
