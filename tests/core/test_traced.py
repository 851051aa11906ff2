"""The trace of a denoiser against the denoiser: equal bits at every shape, and no Python after the first call."""

import pytest
import torch

from tests.tiny import TINY_DIM, tiny_condition, tiny_denoiser
from text2weight.condition import Condition, GivenHeads, condition_of_task, stack_conditions
from text2weight.traced import ROWS_OF_A_PART, TracedDenoiser, count_parts, flatten_call, unflatten_call

VARIANTS = [
    {},
    {"tokens": "chunk", "chunk_size": 7},
    {"unit_identity": False},
    {"class_tokens": False},
    {"pooled": False},
    {"null_condition": True},
]


def inputs(rows: int, classes: int, parameters: int) -> tuple[torch.Tensor, torch.Tensor, Condition]:
    torch.manual_seed(rows + 100 * classes)
    condition = stack_conditions([condition_of_task(torch.randn(classes, TINY_DIM)) for _ in range(rows)])
    return torch.randn(rows, parameters), torch.randint(1, 1000, (rows,)), condition


@pytest.mark.parametrize("config", VARIANTS, ids=str)
def test_equal_bits_at_every_shape(config: dict[str, object]) -> None:
    """One trace, recorded at one shape, serves all."""
    denoiser = tiny_denoiser(**config).eval()
    parameters = denoiser.weights.layout.spec.num_parameters
    traced = TracedDenoiser(denoiser)
    with torch.inference_mode():
        for rows, classes in [(1, 2), (3, 2), (1, 8), (4, 5), (31, 3), (1, 2)]:  # none of them in parts
            call = inputs(rows, classes, parameters)
            assert torch.equal(traced(*call), denoiser(*call))
            padded = stack_conditions([call[2], condition_of_task(torch.randn(11, TINY_DIM))])  # more padding
            noisy = torch.cat([call[0], call[0][:1]])
            timesteps = torch.cat([call[1], call[1][:1]])
            assert torch.equal(traced(noisy, timesteps, padded), denoiser(noisy, timesteps, padded))


@pytest.mark.usefixtures("four_threads")
@pytest.mark.parametrize(("rows", "parts"), [(4, 1), (8, 2), (9, 1), (12, 2), (16, 4), (64, 4)])
def test_calls_of_many_rows_are_made_in_parts(rows: int, parts: int) -> None:
    """What a part computes has the bits of a call of its own, on its share of the threads."""
    assert count_parts(rows, 4) == parts
    denoiser = tiny_denoiser().eval()
    noisy, timesteps, condition = inputs(rows, 3, denoiser.weights.layout.spec.num_parameters)
    calls = zip(*(tensor.chunk(parts) for tensor in flatten_call(noisy, timesteps, condition)), strict=True)
    with torch.inference_mode():
        output = TracedDenoiser(denoiser)(noisy, timesteps, condition)
        assert torch.get_num_threads() == 4
        torch.set_num_threads(4 // parts)
        assert torch.equal(output, torch.cat([denoiser(*unflatten_call(call)) for call in calls]))


@pytest.mark.usefixtures("four_threads")
def test_a_rows_bits_do_not_depend_on_its_place_among_the_parts() -> None:
    denoiser = tiny_denoiser().eval()
    noisy, timesteps, condition = inputs(1, 3, denoiser.weights.layout.spec.num_parameters)
    many = [tensor.repeat_interleave(16, dim=0) for tensor in flatten_call(noisy, timesteps, condition)]
    with torch.inference_mode():
        output = TracedDenoiser(denoiser)(*unflatten_call(tuple(many)))
    assert torch.equal(output, output[:1].expand_as(output))


@pytest.mark.usefixtures("four_threads")
def test_a_part_that_fails_fails_the_call() -> None:
    denoiser = tiny_denoiser().eval()
    traced = TracedDenoiser(denoiser)
    call = inputs(8, 3, denoiser.weights.layout.spec.num_parameters)
    with torch.inference_mode():
        expected = traced(*call)
        with pytest.raises(RuntimeError):
            traced(call[0][:, :-1], *call[1:])
        assert torch.equal(traced(*call), expected)


def test_threads_share_the_parts_evenly() -> None:
    for threads in range(1, 20):
        for rows in (1, 2, 4, 8, 16, 32, 64, 256, 24, 100):
            parts = count_parts(rows, threads)
            assert parts <= threads
            assert rows % parts == 0
            assert parts == 1 or rows // parts >= ROWS_OF_A_PART


def test_a_null_condition_in_the_call() -> None:
    """Which rows have one is data, and no shape: the trace must not have kept that of its first call."""
    denoiser = tiny_denoiser(null_condition=True).eval()
    traced = TracedDenoiser(denoiser)
    noisy, timesteps, condition = inputs(3, 4, denoiser.weights.layout.spec.num_parameters)
    with torch.inference_mode():
        for dropped in ([False] * 3, [True, False, True], [True] * 3):
            shown = condition.drop(torch.tensor(dropped))
            assert torch.equal(traced(noisy, timesteps, shown), denoiser(noisy, timesteps, shown))


def test_with_given_heads_and_without() -> None:
    denoiser = tiny_denoiser(reads_given=True).eval()
    traced = TracedDenoiser(denoiser)
    condition = tiny_condition()
    rows = len(condition.pooled)
    noisy, timesteps = inputs(rows, 2, denoiser.weights.layout.spec.num_parameters)[:2]
    given = GivenHeads(torch.randn_like(noisy), torch.tensor([i % 2 == 0 for i in range(rows)]))
    shown = Condition(condition.pooled, condition.tokens, condition.mask, given)
    with torch.inference_mode():
        for one in (condition, shown, condition):
            assert torch.equal(traced(noisy, timesteps, one), denoiser(noisy, timesteps, one))
        assert not torch.equal(traced(noisy, timesteps, shown), traced(noisy, timesteps, condition))


def test_flattening_keeps_everything() -> None:
    noisy, timesteps, condition = inputs(2, 3, 5)
    given = GivenHeads(torch.randn(2, 5), torch.tensor([True, False]))
    for one in (condition, Condition(condition.pooled, condition.tokens, condition.mask, given)):
        back = unflatten_call(flatten_call(noisy, timesteps, one))
        assert back[0] is noisy
        assert back[1] is timesteps
        assert back[2] == one


def test_only_the_first_call_is_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """Begun from Python, each of a call's operations would wait for whatever other threads do there."""
    denoiser = tiny_denoiser().eval()
    traced = TracedDenoiser(denoiser)
    call = inputs(1, 2, denoiser.weights.layout.spec.num_parameters)
    with torch.inference_mode():
        expected = traced(*call)
        for module in denoiser.modules():
            monkeypatch.setattr(module, "forward", None)
        assert torch.equal(traced(*call), expected)
        with pytest.raises(TypeError):
            denoiser(*call)
