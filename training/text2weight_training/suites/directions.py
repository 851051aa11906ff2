"""Directions in weight space, and heads along them.

Letters: J heads, n directions, a and b places along two directions, P numbers in one head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from text2weight.head import HeadSpec


def filter_normalised(spec: HeadSpec, head: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Random directions, each of whose filters is as long as the head's own (arXiv 1712.09913, section 4).

    A filter is what flows into one neuron, a row of a weight matrix. Biases stay as they are, as in the authors' code.
    Without the scaling a head of large weights would look flat only because it is large.

    Args:
        spec: the head's specification.
        head: (P,).
        count: n.
        generator: of the draws.

    Returns:
        (n, P); adding r times a direction moves each filter by r times its length.
    """
    own = spec.unflatten(head)
    drawn = spec.unflatten(torch.randn(count, len(head), generator=generator))  # (n, P)
    scaled = {
        name: draw * (own[name].norm(dim=-1, keepdim=True) / draw.norm(dim=-1, keepdim=True))
        if own[name].ndim == 2
        else torch.zeros_like(draw)
        for name, draw in drawn.items()
    }
    return spec.flatten(scaled)


def between(first: Tensor, second: Tensor, places: Tensor) -> Tensor:
    """Heads on the line through two heads (P,), at 0 the first and at 1 the second: (a, P)."""
    return first + places[:, None] * (second - first)


def equally_long(first: Tensor, second: Tensor) -> Tensor:
    """A direction (P,) with the length of another: the second's course, the first's length."""
    scaled: Tensor = second * (first.norm() / second.norm())
    return scaled
