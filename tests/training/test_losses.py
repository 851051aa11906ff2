"""The denoising losses, by hand on networks that output constants."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.tiny import TINY_DIM, TINY_SPEC, tiny_condition, tiny_space
from text2weight.condition import Condition
from text2weight.diffusion import NoiseSchedule, Prediction
from text2weight.head import apply_heads, class_logits
from text2weight_training.losses import DenoisingLosses, TaskBatch

SCHEDULE = NoiseSchedule(num_timesteps=40)
COUNTS = (2, 5, 3)
P = TINY_SPEC.num_parameters


class Constant(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, noisy: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        return torch.full_like(noisy, self.value)


def losses(prediction: Prediction = "x0", logit_scale: float = 7.0) -> DenoisingLosses:
    return DenoisingLosses(TINY_SPEC, tiny_space(), SCHEDULE, prediction, logit_scale)


def batch() -> TaskBatch:
    condition = tiny_condition(COUNTS)
    features = torch.randn(3, 4, TINY_SPEC.input_dim, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([[0, 1, 0, 1], [4, 3, 2, 1], [2, 1, 0, 0]])
    return TaskBatch(condition, condition.tokens, condition.mask, features, targets)


@pytest.mark.parametrize(
    ("prediction", "target"),
    [
        ("x0", lambda clean, noise, abar: clean),
        ("epsilon", lambda clean, noise, abar: noise),
        ("v", lambda clean, noise, abar: math.sqrt(abar) * noise - math.sqrt(1 - abar) * clean),
    ],
)
def test_the_diffusion_loss_counts_items_with_a_head_only(prediction: Prediction, target: object) -> None:
    """x_0 = 2 and noise = -1 everywhere, the network says 5: a squared error that can be written down."""
    clean, noise = torch.full((3, P), 2.0), torch.full((3, P), -1.0)
    clean[2] = 1e3  # not a real head: must not count
    timesteps, only = torch.tensor([20, 20, 20]), torch.tensor([True, True, False])
    found = losses(prediction)
    denoised = found.denoise(Constant(5.0), clean, timesteps, noise, tiny_condition(COUNTS))
    abar = float(SCHEDULE.alphas_bar[20])
    torch.testing.assert_close(
        denoised.noisy[0], torch.full((P,), 2 * math.sqrt(abar) - math.sqrt(1 - abar)), atol=1e-5, rtol=1e-5
    )
    assert callable(target)
    expected = (5 - target(2.0, -1.0, abar)) ** 2
    assert float(found.diffusion(denoised, clean, noise, only)) == pytest.approx(expected, rel=1e-5)


def test_the_task_loss_is_the_cross_entropy_of_the_decoded_heads() -> None:
    clean, tasks, found = torch.randn(3, P, generator=torch.Generator().manual_seed(1)), batch(), losses()
    weights = found.space.restore(clean)
    total = 0.0
    for i, count in enumerate(COUNTS):
        outputs = apply_heads(TINY_SPEC, weights[i : i + 1], tasks.features[i])
        logits = class_logits(outputs, tasks.text[i, :count], 7.0)[0]
        total += float(F.cross_entropy(logits, tasks.targets[i]))
    assert tasks.text.shape[-1] == TINY_DIM
    assert float(found.task(clean, tasks)) == pytest.approx(total / 3, rel=1e-4)


def test_a_hidden_condition_hides_nothing_from_the_task_loss() -> None:
    clean, tasks = torch.randn(3, P), batch()
    hidden = tasks.drop_condition(torch.tensor([True, False, True]))
    assert hidden.condition.count.tolist() == [0, 5, 0]
    assert float(losses().task(clean, hidden)) == float(losses().task(clean, tasks))
    chosen = hidden.select(torch.tensor([1]))
    assert chosen.condition.count.tolist() == [5]
    assert torch.equal(chosen.text[0], tasks.text[1])
