"""The adversarial loss: its mathematics at known logits, and the game."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from text2weight_training.adversary import Adversary, Discriminator, adversarial_loss, discriminator_loss

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
        adversary.loss(heads(32, 1.0, turn), heads(32, -1.0, turn + 1000))
        losses.append(float(adversary.step(1.0, 1.0)))
    assert losses[0] == pytest.approx(2 * math.log(2), rel=0.05)
    assert losses[-1] < 0.3
    logits = adversary.discriminator(torch.cat([heads(64, 1.0, 99), heads(64, -1.0, 98)]))
    assert float((logits[:64] > 0).float().mean()) > 0.9
    assert float((logits[64:] < 0).float().mean()) > 0.9


def test_the_denoisers_turn_moves_fakes_towards_trained_heads_and_leaves_the_discriminator_alone() -> None:
    adversary = make_adversary()
    for turn in range(40):
        adversary.loss(heads(32, 1.0, turn), heads(32, -1.0, turn + 1000))
        adversary.step(1.0, 1.0)
    adversary._optimizer.zero_grad(set_to_none=True)
    before = {name: tensor.clone() for name, tensor in adversary.discriminator.state_dict().items()}
    fakes = heads(32, -1.0).requires_grad_()
    start = float(adversary.loss(heads(32, 1.0), fakes).detach())
    for _ in range(20):
        loss = adversary.loss(heads(32, 1.0), fakes)
        (slope,) = torch.autograd.grad(loss, fakes)
        fakes = (fakes - 5 * slope).detach().requires_grad_()
    assert float(adversary.loss(heads(32, 1.0), fakes).detach()) < 0.5 * start
    assert all(parameter.grad is None for parameter in adversary.discriminator.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in adversary.discriminator.state_dict().items())


def test_fakes_are_cut_off_at_the_zoos_range() -> None:
    """What an estimate near pure noise blows up must not be all that is learned from."""
    adversary = make_adversary(limit=3.0)
    wild, cut = torch.full((1, 6), 1e6, requires_grad=True), torch.full((1, 6), 3.0)
    loss = adversary.loss(heads(2, 0.0), wild)
    assert float(loss.detach()) == float(adversary.loss(heads(2, 0.0), cut))
    loss.backward()
    assert wild.grad is not None
    assert not bool(wild.grad.any())


def test_a_loaded_state_goes_on_as_the_saved_one() -> None:
    one, two = make_adversary(), make_adversary()
    for turn in range(3):
        one.loss(heads(8, 1.0, turn), heads(8, -1.0, turn))
        one.step(1.0, 1.0)
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    for adversary in (one, two):
        adversary.loss(heads(8, 1.0, 9), heads(8, -1.0, 9))
        adversary.step(0.5, 1.0)
    for name, tensor in one.discriminator.state_dict().items():
        assert torch.equal(tensor, two.discriminator.state_dict()[name]), name
