from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.tiny import TINY_SPEC
from text2weight.head import HeadSpec
from text2weight.weight_tokens import ChunkTokens, UnitTokens, permute_units

SPECS = st.builds(
    HeadSpec,
    input_dim=st.integers(1, 9),
    hidden_dim=st.integers(1, 5),
    output_dim=st.integers(1, 9),
    bias=st.booleans(),
)


@given(spec=SPECS, batch=st.integers(1, 3))
def test_unit_tokens_round_trip(spec: HeadSpec, batch: int) -> None:
    layout = UnitTokens(spec)
    flat = torch.randn(batch, spec.num_parameters)
    units, output_bias = layout.split(flat)
    assert units.shape == (batch, spec.hidden_dim, layout.unit_dim)
    assert (output_bias is None) == (not spec.bias)
    assert torch.equal(layout.join(units, output_bias), flat)


@given(spec=SPECS, batch=st.integers(1, 3), size=st.integers(1, 300))
def test_chunk_tokens_round_trip(spec: HeadSpec, batch: int, size: int) -> None:
    layout = ChunkTokens(spec, size)
    flat = torch.randn(batch, spec.num_parameters)
    chunks = layout.split(flat)
    assert chunks.shape == (batch, math.ceil(spec.num_parameters / size), size)
    assert torch.equal(layout.join(chunks), flat)
    padding = chunks.flatten(1)[:, spec.num_parameters :]
    assert bool((padding == 0).all())


def test_the_papers_head_has_30_chunks_of_576() -> None:
    assert ChunkTokens(HeadSpec()).count == 30
    assert ChunkTokens(HeadSpec(bias=False)).count == 29


def test_a_unit_token_holds_all_that_one_unit_owns() -> None:
    tensors = {name: torch.randn(1, *shape) for name, shape in TINY_SPEC.shapes.items()}
    units, output_bias = UnitTokens(TINY_SPEC).split(TINY_SPEC.flatten(tensors))
    for j in range(TINY_SPEC.hidden_dim):
        expected = [
            tensors["linear1.weight"][0, j],
            tensors["linear1.bias"][0, j : j + 1],
            tensors["linear2.weight"][0, :, j],
        ]
        assert torch.equal(units[0, j], torch.cat(expected))
    assert output_bias is not None
    assert torch.equal(output_bias, tensors["linear2.bias"])


@given(spec=SPECS, data=st.data())
def test_permuting_units_permutes_unit_tokens(spec: HeadSpec, data: st.DataObject) -> None:
    order = torch.tensor(data.draw(st.permutations(range(spec.hidden_dim))))
    flat = torch.randn(2, spec.num_parameters)
    units, output_bias = UnitTokens(spec).split(flat)
    permuted, permuted_bias = UnitTokens(spec).split(permute_units(spec, flat, order))
    assert torch.equal(permuted, units[:, order])
    if output_bias is not None:
        assert permuted_bias is not None
        assert torch.equal(permuted_bias, output_bias)
