"""Merging rules: identities that can be checked by hand."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.tiny import TINY_SPEC
from text2weight.head import HeadSpec, apply_heads
from text2weight.merging import assign_units, average, git_rebasin, match_units, task_arithmetic, ties
from text2weight.weight_tokens import permute_units

ORDER = torch.tensor([2, 0, 1])


def heads(count: int, spec: HeadSpec = TINY_SPEC, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, spec.num_parameters, generator=torch.Generator().manual_seed(seed))


def test_the_average_of_equal_heads_is_the_head() -> None:
    head = heads(1)[0]
    assert torch.equal(average(torch.stack([head, head])), head)
    torch.testing.assert_close(average(torch.tensor([[1.0, 2.0], [3.0, -2.0]])), torch.tensor([2.0, 0.0]))


def test_an_assignment_by_hand() -> None:
    # Greedily unit 0 would take column 0 (5) and leave unit 1 with -9; crossed, the sum is 4 + 4.
    similarity = torch.tensor([[5.0, 4.0], [4.0, -9.0]])
    assert assign_units(similarity).tolist() == [1, 0]


def test_matching_is_the_best_of_all_orders() -> None:
    reference, head = heads(2)
    order = match_units(TINY_SPEC, reference, head)
    distances = {
        candidate: float((permute_units(TINY_SPEC, head, torch.tensor(candidate)) - reference).square().sum())
        for candidate in itertools.permutations(range(TINY_SPEC.hidden_dim))
    }
    assert min(distances, key=lambda candidate: distances[candidate]) == tuple(order.tolist())


@pytest.mark.parametrize("spec", [TINY_SPEC, HeadSpec(input_dim=6, hidden_dim=3, output_dim=8, bias=False)])
def test_re_basin_of_a_permuted_copy_recovers_the_head(spec: HeadSpec) -> None:
    head = heads(1, spec)[0]
    copy = permute_units(spec, head, ORDER)
    assert not torch.equal(copy, head)
    assert torch.equal(permute_units(spec, copy, match_units(spec, head, copy)), head)
    assert torch.equal(git_rebasin(spec, torch.stack([head, copy])), head)
    # The plain average is another function, re-basin the same one.
    features = torch.randn(5, spec.input_dim, generator=torch.Generator().manual_seed(1))
    expected = apply_heads(spec, head[None], features)
    plain = apply_heads(spec, average(torch.stack([head, copy]))[None], features)
    assert float((plain - expected).abs().max()) > 0.1


def test_re_basin_keeps_the_first_heads_order_whatever_the_others_is() -> None:
    first, second, third = heads(3)
    stack = torch.stack([first, second, third])
    moved = torch.stack(
        [first, permute_units(TINY_SPEC, second, ORDER), permute_units(TINY_SPEC, third, ORDER.flip(0))]
    )
    torch.testing.assert_close(git_rebasin(TINY_SPEC, moved), git_rebasin(TINY_SPEC, stack))


def test_task_arithmetic_by_hand() -> None:
    base = torch.tensor([1.0, 1.0])
    stack = torch.tensor([[2.0, 1.0], [1.0, 4.0]])
    assert task_arithmetic(base, stack).tolist() == [2.0, 4.0]
    torch.testing.assert_close(task_arithmetic(base, stack, 0.5), average(stack))


def test_ties_by_hand() -> None:
    base = torch.full((5,), 10.0)
    deviations = torch.tensor([[4.0, -3.0, 2.0, 0.1, 0.0], [2.0, 5.0, -0.2, 3.0, 0.1]])
    # Trimmed to the three largest of five: [4, -3, 2, 0, 0] and [2, 5, 0, 3, 0].
    # Signs of the sums 6, 2, 2, 3, 0: +, +, +, +, none. Means of those who agree: 3, 5, 2, 3, 0.
    assert ties(base, base + deviations, density=0.6).tolist() == [13.0, 15.0, 12.0, 13.0, 10.0]
    assert ties(base, base + deviations, density=0.6, scale=2.0).tolist() == [16.0, 20.0, 14.0, 16.0, 10.0]


def test_ties_with_one_head_and_full_density_is_the_head() -> None:
    base, head = heads(2)
    torch.testing.assert_close(ties(base, head[None], density=1.0), head)


def test_opposite_deviations_cancel_in_ties() -> None:
    base = torch.zeros(2)
    assert ties(base, torch.tensor([[1.0, 2.0], [-1.0, 2.0]]), density=1.0).tolist() == [0.0, 2.0]


@pytest.mark.parametrize("density", [0.0, -0.1, 1.5])
def test_an_impossible_density_is_refused(density: float) -> None:
    with pytest.raises(ValueError, match="allowed is 0 < density <= 1"):
        ties(torch.zeros(3), torch.ones(2, 3), density)


@pytest.mark.parametrize("shape", [(0, 4), (4,)])
def test_no_heads_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="n at least 1"):
        average(torch.zeros(shape))
