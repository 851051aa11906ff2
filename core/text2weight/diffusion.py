"""The noise schedule, forward noising, and conversions between prediction targets.

Timesteps n run from 0 (clean) to N (noise): q(x_n | x_0) = N(sqrt(abar_n) x_0, (1 - abar_n) I),
Ho et al., arXiv 2006.11239. Letters: B batch, P numbers in one head.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, PositiveInt
from torch import Tensor

from text2weight.condition import Condition, stack_conditions

Prediction = Literal["x0", "epsilon", "v"]


class NoiseSchedule(BaseModel):
    """An immutable noise schedule.

    Attributes:
        kind: "linear" betas from 1e-4 to 0.02 at N = 1000 (DDPM), scaled for other N;
            "cosine" as in Nichol & Dhariwal, arXiv 2102.09672.
        num_timesteps: N.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["linear", "cosine"] = "linear"
    num_timesteps: PositiveInt = 1000

    @property
    def alphas_bar(self) -> Tensor:
        """abar_n for n = 0..N, float64, (N + 1,); abar_0 is exactly 1. Shared by all callers: do not write to it."""
        return _alphas_bar(self.kind, self.num_timesteps)

    def signal_and_noise(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Return sqrt(abar_n) and sqrt(1 - abar_n) as (B, 1) fp32 columns for timesteps (B,)."""
        alphas_bar = self.alphas_bar.to(timesteps.device)[timesteps]  # (B,)
        return alphas_bar.sqrt().float()[:, None], (1 - alphas_bar).sqrt().float()[:, None]

    def add_noise(self, clean: Tensor, timesteps: Tensor, noise: Tensor) -> Tensor:
        """Sample q(x_n | x_0): clean (B, P), timesteps (B,), standard normal noise (B, P) -> (B, P)."""
        signal, sigma = self.signal_and_noise(timesteps)
        return signal * clean + sigma * noise  # (B, P)

    def target(self, prediction: Prediction, clean: Tensor, timesteps: Tensor, noise: Tensor) -> Tensor:
        """What a network of the given kind should output; v is that of Salimans & Ho, arXiv 2202.00512."""
        if prediction == "x0":
            return clean
        if prediction == "epsilon":
            return noise
        signal, sigma = self.signal_and_noise(timesteps)
        return signal * noise - sigma * clean  # (B, P)

    def to_clean(self, prediction: Prediction, output: Tensor, noisy: Tensor, timesteps: Tensor) -> Tensor:
        """Turn a network's output (B, P) at x_n = noisy (B, P) into its estimate of x_0 (B, P)."""
        if prediction == "x0":
            return output
        signal, sigma = self.signal_and_noise(timesteps)
        if prediction == "epsilon":
            return (noisy - sigma * output) / signal
        return signal * noisy - sigma * output  # (B, P)

    def run_denoiser(
        self,
        denoiser: Callable[[Tensor, Tensor, Condition], Tensor],
        prediction: Prediction,
        noisy: Tensor,
        timesteps: Tensor,
        condition: Condition,
        guidance_scale: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Evaluate a denoiser at x_n = noisy (B, P), timesteps (B,): its output and its estimate of x_0, both (B, P).

        With `guidance_scale` s (B,) the estimate is null + s (cond - null), where `null` is that under the null
        condition (classifier-free guidance, arXiv 2207.12598). Items with s = 1 need only `cond`; the others' two
        halves go through the network in the same call.

        A network that predicts x_0 is shown sqrt(abar_n) x_n, the best linear estimate of x_0 (its entries have unit
        variance). Near n = N that hides the noise, which says nothing about x_0 there and would only drown the
        condition. One that predicts noise or v has to see it.
        """
        shown = noisy * self.signal_and_noise(timesteps)[0] if prediction == "x0" else noisy  # (B, P)
        if guidance_scale is None:
            output = denoiser(shown, timesteps, condition)  # (B, P)
        else:
            output = _run_guided(denoiser, shown, timesteps, condition, guidance_scale)  # (B, P)
        return output, self.to_clean(prediction, output, noisy, timesteps)


def _run_guided(
    denoiser: Callable[[Tensor, Tensor, Condition], Tensor],
    shown: Tensor,
    timesteps: Tensor,
    condition: Condition,
    scale: Tensor,
) -> Tensor:
    """null + s (cond - null) of the network's outputs (B, P).

    The estimate of x_0 is an affine function of the output, so it is combined in the same proportions.
    """
    guided = (scale != 1).nonzero().squeeze(1)  # (b,)
    null = condition.select(guided).drop(torch.ones_like(guided, dtype=torch.bool))
    both = denoiser(
        torch.cat([shown, shown[guided]]),
        torch.cat([timesteps, timesteps[guided]]),
        stack_conditions([condition, null]),
    )  # (B + b, P)
    output, without = both[: len(shown)], both[len(shown) :]  # (B, P), (b, P)
    combined = without + scale[guided, None] * (output[guided] - without)  # (b, P)
    return output.index_copy(0, guided, combined)


# Cached here and not on the schedule: a copy of a model with other fields would carry the old values along.
@lru_cache(maxsize=32)
def _alphas_bar(kind: Literal["linear", "cosine"], count: int) -> Tensor:
    if kind == "linear":
        scale = 1000 / count
        betas = torch.linspace(1e-4 * scale, min(0.02 * scale, 0.999), count, dtype=torch.float64)  # (N,)
    else:
        angle = (torch.arange(count + 1, dtype=torch.float64) / count + 0.008) / 1.008 * math.pi / 2  # (N + 1,)
        squared = angle.cos() ** 2
        betas = (1 - squared[1:] / squared[:-1]).clamp(max=0.999)  # (N,)
    return torch.cat([torch.ones(1, dtype=torch.float64), (1 - betas).cumprod(0)])  # (N + 1,)
