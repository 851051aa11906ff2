"""L_adv: a discriminator that learns to tell the denoiser's heads from trained ones.

The T2W paper's adversarial term (arXiv 2508.13633) in the non-saturating form of Goodfellow et al.
(arXiv 1406.2661). With logits l and softplus(l) = log(1 + exp(l)),

    discriminator: mean softplus(-l(real)) + mean softplus(l(fake))
    denoiser:      mean softplus(-l(fake))

Both grow no faster than the logits, and the second keeps its slope when the discriminator wins.

Letters: B items, P numbers in one head, k denoiser calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from text2weight.condition import Condition
from text2weight.diffusion import NoiseSchedule, Prediction
from text2weight.samplers import Step, take_steps

HIDDEN_SIZES = (512, 256, 128)
# Samples of each step that only the discriminator sees, and the denoiser calls made for each, without gradients: half a
# forward pass of 32 heads.
SAMPLES = 4
SAMPLER_CALLS = 4


class Discriminator(nn.Module):
    """A 4-layer MLP on flat weights in the sampler's space: (B, P) -> logits (B,), positive for "trained"."""

    def __init__(self, size: int) -> None:
        """Build it for heads of `size` P numbers."""
        super().__init__()
        layers: list[nn.Module] = []
        for wide, narrow in pairwise((size, *HIDDEN_SIZES)):
            layers += [nn.Linear(wide, narrow), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Linear(HIDDEN_SIZES[-1], 1))

    def forward(self, weights: Tensor) -> Tensor:
        """Weights (B, P) -> logits (B,)."""
        logits: Tensor = self.layers(weights)  # (B, 1)
        return logits.squeeze(-1)


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Binary cross-entropy of logits for trained heads (B,) and for fakes (B',), each averaged."""
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def adversarial_loss(fake: Tensor) -> Tensor:
    """L_adv, the denoiser's side: small where the discriminator takes fakes, logits (B,), for trained heads."""
    return F.softplus(-fake).mean()


@torch.no_grad()
def sample_heads(
    denoiser: nn.Module,
    plan: Sequence[Step],
    schedule: NoiseSchedule,
    prediction: Prediction,
    noise: Tensor,
    condition: Condition,
) -> Tensor:
    """Run a sampler from pure noise to its end, as generation does.

    Args:
        denoiser: the network.
        plan: k steps, the first from N.
        schedule: the noise schedule.
        prediction: what the network outputs.
        noise: (k, B, P) standard normal: the start, and what the k - 1 steps before the last may add.
        condition: B items.

    Returns:
        (B, P) samples.
    """
    noisy, previous = noise[0], torch.zeros_like(noise[0])  # (B, P)
    count = len(noisy)
    # At its last step a plan adds no noise.
    for step, draw in zip(plan, [*noise[1:], previous], strict=True):
        timesteps = torch.full((count,), step.timestep, device=noisy.device)
        _, clean = schedule.run_denoiser(denoiser, prediction, noisy, timesteps, condition)  # (B, P)
        noisy, previous = take_steps([step] * count, noisy, clean, previous, draw), clean
    return noisy


class Adversary:
    """The discriminator's half of the game: its network, its optimiser and its turns."""

    def __init__(self, size: int, limit: float, learning_rate: float, accelerator: Accelerator) -> None:
        """Build the discriminator.

        Args:
            size: P.
            limit: greatest absolute number of the zoo's heads in the sampler's space. Fakes are cut off there: a
                network that predicts noise divides by sqrt(abar_n), and what that blows up near n = N would be
                all that either side learns from.
            learning_rate: Adam's peak.
            accelerator: places and wraps the network.
        """
        self._limit = limit
        self._learning_rate = learning_rate
        self._accelerator = accelerator
        self.discriminator = Discriminator(size)
        optimizer = torch.optim.Adam(self.discriminator.parameters(), lr=learning_rate, betas=(0.5, 0.999))
        self._model, self._optimizer = accelerator.prepare(self.discriminator, optimizer)
        self._round: tuple[Tensor, Tensor] | None = None

    def loss(self, real: Tensor, fakes: Tensor, samples: Tensor) -> Tensor:
        """L_adv, the denoiser's turn; leaves no gradient on the discriminator.

        Args:
            real: (B, P) trained heads in the sampler's space, kept for the discriminator's turn.
            fakes: (B', P) the denoiser's; likewise.
            samples: (B'', P) the sampler's, through which no gradient runs; for the discriminator's turn alone.
        """
        fakes = fakes.clamp(-self._limit, self._limit)  # (B', P)
        self._round = real, torch.cat([fakes.detach(), samples.clamp(-self._limit, self._limit)])
        fixed = {name: parameter.detach() for name, parameter in self.discriminator.named_parameters()}
        logits = torch.func.functional_call(self.discriminator, fixed, (fakes,))  # (B',)
        return adversarial_loss(logits)

    def step(self, factor: float, gradient_clip: float) -> Tensor:
        """The discriminator's turn: one optimiser step on the heads that `loss` was last given.

        Args:
            factor: of the learning rate, 0..1.
            gradient_clip: largest gradient norm.

        Returns:
            the loss before the step.
        """
        assert self._round is not None, "loss comes first"
        real, fakes = self._round
        for group in self._optimizer.param_groups:
            group["lr"] = self._learning_rate * factor
        logits = self._model(torch.cat([real, fakes]))  # (B + B',)
        loss = discriminator_loss(logits[: len(real)], logits[len(real) :])
        self._optimizer.zero_grad(set_to_none=True)
        self._accelerator.backward(loss)
        self._accelerator.clip_grad_norm_(self._model.parameters(), gradient_clip)
        self._optimizer.step()
        return loss.detach()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {"discriminator": self.discriminator.state_dict(), "optimizer": self._optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`'s content."""
        self.discriminator.load_state_dict(state["discriminator"])
        self._optimizer.load_state_dict(state["optimizer"])
