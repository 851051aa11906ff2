"""RegMean: merge linear layers so that the merged one answers each model's inputs as that model does.

Source: arXiv 2212.09849, equation 1. A bias is the weight of an input that is always 1, so that it takes part in the
regression. Letters: n heads, N features, i inputs of a layer (with the constant one), o its outputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from text2weight.head import HeadSpec

LAYERS = ("linear1", "linear2")


def layer_grams(spec: HeadSpec, head: Tensor, features: Tensor) -> list[Tensor]:
    """Gram matrices X'X (i, i), float64, of the inputs X that a head's (P,) two layers see on features (N, d)."""
    weights = spec.unflatten(head)
    hidden = features @ weights["linear1.weight"].T  # (N, h)
    if spec.bias:
        hidden = hidden + weights["linear1.bias"]
    if spec.activation == "gelu":
        hidden = F.gelu(hidden)
    grams = []
    for inputs in (features.double(), hidden.double()):
        extended = F.pad(inputs, (0, 1), value=1.0) if spec.bias else inputs  # (N, i)
        grams.append(extended.T @ extended)
    return grams


def regmean(spec: HeadSpec, heads: Tensor, grams: Sequence[Sequence[Tensor]], decay: float = 0.9) -> Tensor:
    """Merge heads layer by layer: W = (sum_j G_j)^-1 sum_j G_j W_j, the least squares fit to their answers.

    Args:
        spec: the heads' specification.
        heads: (n, P).
        grams: per head the result of `layer_grams` on its own task's features.
        decay: factor of the Gram matrices' off-diagonal entries; the paper's 0.9 keeps the merge near the heads.

    Returns:
        (P,).
    """
    tensors = [spec.unflatten(head) for head in heads]
    merged = {}
    for place, layer in enumerate(LAYERS):
        total, answers = torch.tensor(0.0, dtype=torch.float64), torch.tensor(0.0, dtype=torch.float64)
        for head, layers in zip(tensors, grams, strict=True):
            weights = _with_bias(spec, head, layer).double()  # (o, i)
            gram = decay * layers[place] + (1 - decay) * layers[place].diag().diag()  # (i, i)
            total = total + gram
            answers = answers + gram @ weights.T  # (i, o)
        # An input that is zero for every head leaves its row open; least squares of least norm settles it.
        solution = torch.linalg.lstsq(total, answers, driver="gelsd").solution.T.to(heads.dtype)  # (o, i)
        if spec.bias:
            merged[f"{layer}.weight"], merged[f"{layer}.bias"] = solution[:, :-1], solution[:, -1]
        else:
            merged[f"{layer}.weight"] = solution
    return spec.flatten(merged)


def _with_bias(spec: HeadSpec, tensors: dict[str, Tensor], layer: str) -> Tensor:
    """A layer's weights with the bias as a last column: (o, i)."""
    weight = tensors[f"{layer}.weight"]
    return torch.cat([weight, tensors[f"{layer}.bias"].unsqueeze(-1)], dim=-1) if spec.bias else weight
