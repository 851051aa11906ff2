"""The trace of a denoiser against the denoiser: equal bits at every shape, and no Python after the first call."""

import pytest
import torch

from tests.tiny import TINY_DIM, tiny_condition, tiny_denoiser
from text2weight.condition import Condition, GivenHeads, condition_of_task, stack_conditions
from text2weight.traced import TracedDenoiser, flatten_call, unflatten_call

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
        for rows, classes in [(1, 2), (3, 2), (1, 8), (4, 5), (32, 3), (1, 2)]:
            call = inputs(rows, classes, parameters)
            assert torch.equal(traced(*call), denoiser(*call))
            padded = stack_conditions([call[2], condition_of_task(torch.randn(11, TINY_DIM))])  # more padding
            noisy = torch.cat([call[0], call[0][:1]])
            timesteps = torch.cat([call[1], call[1][:1]])
            assert torch.equal(traced(noisy, timesteps, padded), denoiser(noisy, timesteps, padded))


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
