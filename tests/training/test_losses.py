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
from text2weight_training.losses import DenoisingLosses, TaskBatch, make_task_batch
from text2weight_training.stacked import DROPOUT_RUN, drop_features, smoothed_cross_entropy
from text2weight_training.tasks import PADDING, ClassFeatures

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


def test_label_smoothing_spreads_over_the_classes_a_task_has() -> None:
    """Two classes with probabilities 1/4 and 3/4, and a padded third: smoothing 0.2 counts the two halves of 0.2."""
    logits = torch.tensor([[[math.log(0.25), math.log(0.75), float("-inf")]]], requires_grad=True)  # (1, 1, 3)
    mask = torch.tensor([[True, True, False]])
    found = smoothed_cross_entropy(logits, torch.tensor([[1]]), mask, 0.2)
    assert found.item() == pytest.approx(-0.9 * math.log(0.75) - 0.1 * math.log(0.25), rel=1e-6)
    found.sum().backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad[0, 0], torch.tensor([0.25 - 0.1, 0.75 - 0.9, 0.0]))


def test_dropped_features_keep_their_mean_and_share_masks_in_runs() -> None:
    features = torch.ones(3, 2 * DROPOUT_RUN + 5, 2000)
    drop_features(features, 0.25, torch.Generator().manual_seed(0))
    assert features.unique().tolist() == pytest.approx([0, 4 / 3])
    assert float(features.mean()) == pytest.approx(1, abs=0.02)
    first, second, rest = features.split(DROPOUT_RUN, dim=1)
    for run in (first, second, rest):
        assert torch.equal(run, run[:, :1].expand_as(run))
    assert not torch.equal(first[:, 0], second[:, 0])
    assert not torch.equal(first[0, 0], first[1, 0])


def test_a_batch_with_dropout_leaves_the_stored_features_as_they_are() -> None:
    stored = ClassFeatures.from_labels(torch.ones(6, 40), torch.arange(6) % 3, 3)
    tasks = torch.tensor([[0, 2, PADDING], [2, 1, 0]])
    texts = F.normalize(torch.randn(3, TINY_DIM, generator=torch.Generator().manual_seed(2)), dim=-1)
    plain = make_task_batch(tasks, texts, texts, stored, 8, torch.Generator().manual_seed(1))
    dropped = make_task_batch(tasks, texts, texts, stored, 8, torch.Generator().manual_seed(1), 0.5)
    assert torch.equal(plain.targets, dropped.targets)
    assert bool((dropped.features == 0).any())
    assert bool((stored.features == 1).all())
