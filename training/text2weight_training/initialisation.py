"""Heads to begin training with, drawn at random by the usual rules.

The rules are those of the T2W authors' published code (github.com/TianSuya/T2W, data_gen/cifar100/fusion.py):
PyTorch's functions with their defaults on both weight matrices, and 0.01 in every bias. Its "uniform" and "normal"
are the functions' defaults too, U(0, 1) and N(0, 1). Letters: M heads, P numbers in one head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from text2weight.head import AdapterHead, HeadSpec
from text2weight_training.stacked import initial_head

BIAS = 0.01
XAVIER = "Xavier uniform"
PYTORCH = "PyTorch default"
WEIGHT_RULES: dict[str, Callable[[Tensor], Tensor]] = {
    XAVIER: nn.init.xavier_uniform_,
    "Kaiming uniform": nn.init.kaiming_uniform_,
    "Kaiming normal": nn.init.kaiming_normal_,
    "uniform U(0, 1)": nn.init.uniform_,
    "normal N(0, 1)": nn.init.normal_,
}
RANDOM_STARTS = (PYTORCH, *WEIGHT_RULES)


def random_head(spec: HeadSpec, rule: str, seed: int) -> Tensor:
    """One random head, flat (P,).

    Args:
        spec: the head's specification.
        rule: one of `RANDOM_STARTS`.
        seed: of the draw.
    """
    if rule == PYTORCH:
        return initial_head(spec, seed)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        head = AdapterHead(spec)
        for layer in (head.linear1, head.linear2):
            WEIGHT_RULES[rule](layer.weight)
            if spec.bias:
                layer.bias.fill_(BIAS)
    return spec.flatten({name: tensor.detach() for name, tensor in head.state_dict().items()})


def random_heads(spec: HeadSpec, rule: str, seeds: Sequence[int]) -> Tensor:
    """One random head per seed: (M, P)."""
    return torch.stack([random_head(spec, rule, seed) for seed in seeds])
