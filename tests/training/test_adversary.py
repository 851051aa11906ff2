"""The adversarial loss: its mathematics at known logits, and the game."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from tests.tiny import TINY_SPEC, pad_embeddings, save_tiny_checkpoint
from text2weight.checkpoint import load_checkpoint
from text2weight.condition import condition_on_classes
from text2weight.generator import Generator
from text2weight.samplers import make_plan
from text2weight_training.adversary import (
    Adversary,
    Discriminator,
    adversarial_loss,
    discriminator_loss,
    sample_heads,
)

NONE = torch.zeros(0, 6)  # no samples
LOG3 = math.log(3.0)  # a logit of log 3 is a probability of 3/4


def make_adversary(limit: float = 100.0) -> Adversary:
    torch.manual_seed(0)
    return Adversary(6, limit, 1e-2, Accelerator(cpu=True, mixed_precision="bf16"))


def heads(count: int, mean: float, seed: int = 0) -> torch.Tensor:
    return mean + torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))


def test_losses_at_known_logits() -> None:
    """Cross-entropies of probabilities 3/4 and 1/4 "trained", and their means."""
    real, fake = torch.tensor([LOG3, -LOG3]), torch.tensor([LOG3, -LOG3, -LOG3, -LOG3])
    of_real = -(math.log(3 / 4) + math.log(1 / 4)) / 2
    of_fake = -(math.log(1 / 4) + 3 * math.log(3 / 4)) / 4
    assert float(discriminator_loss(real, fake)) == pytest.approx(of_real + of_fake)
    assert float(adversarial_loss(fake)) == pytest.approx(-(math.log(3 / 4) + 3 * math.log(1 / 4)) / 4)


def test_an_undecided_discriminator_costs_log_2_each() -> None:
    zero = torch.zeros(5)
    assert float(adversarial_loss(zero)) == pytest.approx(math.log(2))
    assert float(discriminator_loss(zero, zero)) == pytest.approx(2 * math.log(2))


def test_losses_stay_finite_and_keep_their_slope_when_the_discriminator_wins() -> None:
    fake = torch.tensor([-1e4, -1e30], requires_grad=True)
    loss = adversarial_loss(fake)
    loss.backward()
    assert math.isfinite(float(loss.detach()))
    assert fake.grad is not None
    assert fake.grad.tolist() == [-0.5, -0.5]  # the saturating form, log(1 - p), would have a slope of 0 here
    assert float(discriminator_loss(torch.tensor([1e30]), torch.tensor([-1e30]))) == 0
    assert math.isfinite(float(discriminator_loss(torch.tensor([-1e30]), torch.tensor([1e30]))))


def test_the_discriminator_is_a_4_layer_mlp() -> None:
    discriminator = Discriminator(6)
    shapes = [tuple(layer.weight.shape) for layer in discriminator.layers if isinstance(layer, nn.Linear)]
    assert shapes == [(512, 6), (256, 512), (128, 256), (1, 128)]
    assert discriminator(torch.randn(7, 6)).shape == (7,)


def test_it_learns_to_tell_fakes_from_trained_heads() -> None:
    adversary = make_adversary()
    losses = []
    for turn in range(40):
        adversary.loss(heads(32, 1.0, turn), heads(32, -1.0, turn + 1000), NONE)
        losses.append(float(adversary.step(1.0, 1.0)))
    assert losses[0] == pytest.approx(2 * math.log(2), rel=0.05)
    assert losses[-1] < 0.3
    logits = adversary.discriminator(torch.cat([heads(64, 1.0, 99), heads(64, -1.0, 98)]))
    assert float((logits[:64] > 0).float().mean()) > 0.9
    assert float((logits[64:] < 0).float().mean()) > 0.9


def test_the_denoisers_turn_moves_fakes_towards_trained_heads_and_leaves_the_discriminator_alone() -> None:
    adversary = make_adversary()
    for turn in range(40):
        adversary.loss(heads(32, 1.0, turn), heads(32, -1.0, turn + 1000), NONE)
        adversary.step(1.0, 1.0)
    adversary._optimizer.zero_grad(set_to_none=True)
    before = {name: tensor.clone() for name, tensor in adversary.discriminator.state_dict().items()}
    fakes = heads(32, -1.0).requires_grad_()
    start = float(adversary.loss(heads(32, 1.0), fakes, NONE).detach())
    for _ in range(20):
        loss = adversary.loss(heads(32, 1.0), fakes, NONE)
        (slope,) = torch.autograd.grad(loss, fakes)
        fakes = (fakes - 5 * slope).detach().requires_grad_()
    assert float(adversary.loss(heads(32, 1.0), fakes, NONE).detach()) < 0.5 * start
    assert all(parameter.grad is None for parameter in adversary.discriminator.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in adversary.discriminator.state_dict().items())


def test_fakes_are_cut_off_at_the_zoos_range() -> None:
    """What an estimate near pure noise blows up must not be all that is learned from."""
    adversary = make_adversary(limit=3.0)
    wild, cut = torch.full((1, 6), 1e6, requires_grad=True), torch.full((1, 6), 3.0)
    loss = adversary.loss(heads(2, 0.0), wild, NONE)
    assert float(loss.detach()) == float(adversary.loss(heads(2, 0.0), cut, NONE))
    loss.backward()
    assert wild.grad is not None
    assert not bool(wild.grad.any())


def test_the_sampler_is_known_to_the_discriminator_alone() -> None:
    """Samples change its step as further fakes would, and the denoiser's loss not at all."""
    fakes, samples = heads(8, -1.0, 1), heads(4, 200.0, 2)
    turns = []
    for shown, sampled in ((fakes, samples), (torch.cat([fakes, samples]), NONE), (fakes, NONE)):
        adversary = make_adversary()
        loss = float(adversary.loss(heads(8, 1.0), shown, sampled))
        turns.append((loss, float(adversary.step(1.0, 1.0))))
    assert turns[0][0] == turns[2][0]
    assert turns[0][1] == pytest.approx(turns[1][1])
    assert turns[0][1] != turns[2][1]


@pytest.mark.parametrize(("sampler", "steps"), [("mean", 1), ("ddpm", 3), ("ddim", 3), ("dpmpp_2m", 3)])
def test_samples_are_the_generators(tmp_path: Path, sampler: str, steps: int) -> None:
    """What generation makes of the same noise and condition."""
    save_tiny_checkpoint(tmp_path / "checkpoint")
    generator = Generator.load(tmp_path / "checkpoint")
    classes = ["apple", "bus", "sea"]
    expected = generator.generate(classes, seed=5, sampler=sampler, steps=steps)
    checkpoint = load_checkpoint(tmp_path / "checkpoint")
    source, schedule = torch.Generator().manual_seed(5), checkpoint.config.schedule
    noise = torch.stack([torch.randn(1, TINY_SPEC.num_parameters, generator=source) for _ in range(steps)])
    embeddings = generator.text_encoder.encode([f"a {name}" for name in classes])
    condition = condition_on_classes(*pad_embeddings([embeddings]))
    plan = make_plan(sampler, steps, schedule)
    sampled = sample_heads(checkpoint.denoiser, plan, schedule, checkpoint.config.prediction, noise, condition)
    restored = TINY_SPEC.unflatten(checkpoint.space.restore(sampled))
    for name, tensor in expected.tensors.items():
        torch.testing.assert_close(restored[name].squeeze(0), tensor, atol=1e-5, rtol=1e-5)
    assert not sampled.requires_grad


def test_a_loaded_state_goes_on_as_the_saved_one() -> None:
    one, two = make_adversary(), make_adversary()
    for turn in range(3):
        one.loss(heads(8, 1.0, turn), heads(8, -1.0, turn), NONE)
        one.step(1.0, 1.0)
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    for adversary in (one, two):
        adversary.loss(heads(8, 1.0, 9), heads(8, -1.0, 9), NONE)
        adversary.step(0.5, 1.0)
    for name, tensor in one.discriminator.state_dict().items():
        assert torch.equal(tensor, two.discriminator.state_dict()[name]), name
