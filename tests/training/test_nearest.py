"""Nearest heads modulo hidden-unit permutations."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.tiny import TINY_SPEC
from text2weight.head import HeadSpec
from text2weight.weight_tokens import permute_units
from text2weight_training.suites import nearest
from text2weight_training.suites.nearest import aligned_distances, nearest_heads

NO_BIAS = HeadSpec(input_dim=6, hidden_dim=3, output_dim=8, bias=False)


def heads(count: int, spec: HeadSpec = TINY_SPEC, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, spec.num_parameters, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("spec", [TINY_SPEC, NO_BIAS])
def test_the_distance_is_the_least_over_all_orders(spec: HeadSpec) -> None:
    queries, known = heads(2, spec), heads(3, spec, seed=1)
    table = aligned_distances(spec, queries, known)
    for i, j in itertools.product(range(2), range(3)):
        orders = [torch.tensor(order) for order in itertools.permutations(range(3))]
        by_hand = min(float((permute_units(spec, known[j], order) - queries[i]).square().mean()) for order in orders)
        assert float(table[i, j]) == pytest.approx(by_hand**0.5, rel=1e-5)


def test_a_permuted_copy_is_at_distance_zero() -> None:
    known = heads(4)
    copy = permute_units(TINY_SPEC, known[2], torch.tensor([1, 2, 0]))
    found = nearest_heads(TINY_SPEC, copy[None], known)
    assert found.indices.tolist() == [2]
    assert float(found.distances) == pytest.approx(0, abs=1e-6)
    shifted = nearest_heads(TINY_SPEC, copy[None] + 0.01, known)
    assert float(shifted.distances) == pytest.approx(0.01, rel=1e-4)


def test_a_head_left_out_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    known = heads(5)
    alone = nearest_heads(TINY_SPEC, known, known)
    assert alone.indices.tolist() == [0, 1, 2, 3, 4]
    others = nearest_heads(TINY_SPEC, known, known, leave_out=range(5))
    assert all(index != i for i, index in enumerate(others.indices.tolist()))
    table = aligned_distances(TINY_SPEC, known, known) + 1e9 * torch.eye(5)
    torch.testing.assert_close(others.distances, table.min(1).values)
    # The size of a chunk changes nothing.
    monkeypatch.setattr(nearest, "CHUNK", 2)
    torch.testing.assert_close(nearest_heads(TINY_SPEC, known, known, leave_out=range(5)).distances, others.distances)
