"""Reverse diffusion as plans of linear steps.

Every sampler here moves x_n to the next timestep by

    x_next = keep * x_n + clean * x0 + previous * x0_previous + noise * z

with x0 the denoiser's present estimate, x0_previous its last one and z standard normal. A plan is the
immutable list of those coefficients, so items with different samplers, step counts and starting
points advance together in one batch, and nothing shared has a "current step".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, get_args

import torch
from torch import Tensor

from text2weight.diffusion import NoiseSchedule
from text2weight.errors import InvalidInputError

SamplerName = Literal["mean", "ddpm", "ddim", "dpmpp_2m"]
SAMPLERS: tuple[str, ...] = get_args(SamplerName)
# Samplers whose number of denoiser calls is no choice.
EXACT_STEPS: Mapping[str, int] = MappingProxyType({"mean": 1})


@dataclass(frozen=True)
class Step:
    """One denoiser call at `timestep` and the coefficients of the move that follows it."""

    timestep: int
    keep: float
    clean: float
    previous: float = 0.0
    noise: float = 0.0


def check_sampler(sampler: str, steps: int, num_timesteps: int) -> None:
    """Refuse what no plan exists for.

    Raises:
        InvalidInputError: unknown sampler, or a step count outside 1..N (exactly 1 for "mean").
    """
    if sampler not in SAMPLERS:
        raise InvalidInputError("sampler", f"unknown sampler {sampler[:80]!r}: choose one of {', '.join(SAMPLERS)}")
    if not 1 <= steps <= num_timesteps:
        raise InvalidInputError("steps", f"steps is {steps}: allowed are 1 to {num_timesteps}")
    exact = EXACT_STEPS.get(sampler, steps)
    if steps != exact:
        raise InvalidInputError(
            "steps", f"steps is {steps}: sampler {sampler!r} makes exactly {exact}; choose ddim for more"
        )


def make_plan(sampler: str, steps: int, schedule: NoiseSchedule, start: int | None = None) -> tuple[Step, ...]:
    """Lay out `steps` denoiser calls from timestep `start` down to 0, evenly spaced.

    Args:
        sampler: "mean" (the estimate of the first call), "ddpm" (ancestral, fixed small variance,
            arXiv 2006.11239), "ddim" (eta 0, arXiv 2010.02502) or "dpmpp_2m" (arXiv 2211.01095).
        steps: number of denoiser calls.
        schedule: the noise schedule.
        start: first timestep, N unless given; below `steps` it limits their number, and 0 leaves none.

    Raises:
        InvalidInputError: see `check_sampler`.
        ValueError: `start` is not in 0..N.
    """
    start = schedule.num_timesteps if start is None else start
    check_sampler(sampler, steps, schedule.num_timesteps)
    if not 0 <= start <= schedule.num_timesteps:
        raise ValueError(f"start is {start}: allowed are 0 to {schedule.num_timesteps}")
    if start == 0:
        return ()
    steps = min(steps, start)
    grid = [round(start * (steps - i) / steps) for i in range(steps + 1)]
    alphas_bar = [float(schedule.alphas_bar[n]) for n in grid]
    plan = []
    for i, timestep in enumerate(grid[:-1]):
        if grid[i + 1] == 0:
            # At n = 0 all four samplers agree: what is left is the estimate itself.
            plan.append(Step(timestep, keep=0.0, clean=1.0))
        elif sampler == "ddpm":
            plan.append(_ddpm_step(timestep, alphas_bar[i], alphas_bar[i + 1]))
        elif sampler == "ddim":
            plan.append(_ddim_step(timestep, alphas_bar[i], alphas_bar[i + 1]))
        else:
            before = alphas_bar[i - 1] if i > 0 else None
            plan.append(_dpmpp_2m_step(timestep, before, alphas_bar[i], alphas_bar[i + 1]))
    return tuple(plan)


def _ddpm_step(timestep: int, now: float, after: float) -> Step:
    ratio = now / after
    remaining = 1 - now
    return Step(
        timestep,
        keep=math.sqrt(ratio) * (1 - after) / remaining,
        clean=math.sqrt(after) * (1 - ratio) / remaining,
        noise=math.sqrt((1 - ratio) * (1 - after) / remaining),
    )


def _ddim_step(timestep: int, now: float, after: float) -> Step:
    keep = math.sqrt((1 - after) / (1 - now))
    return Step(timestep, keep=keep, clean=math.sqrt(after) - keep * math.sqrt(now))


def _log_snr(alpha_bar: float) -> float:
    return 0.5 * math.log(alpha_bar / (1 - alpha_bar))


def _dpmpp_2m_step(timestep: int, before: float | None, now: float, after: float) -> Step:
    step = _log_snr(after) - _log_snr(now)
    clean = -math.sqrt(after) * math.expm1(-step)
    keep = math.sqrt((1 - after) / (1 - now))
    if before is None:
        return Step(timestep, keep=keep, clean=clean)
    half_ratio = step / (2 * (_log_snr(now) - _log_snr(before)))
    return Step(timestep, keep=keep, clean=clean * (1 + half_ratio), previous=-clean * half_ratio)


def take_steps(steps: Sequence[Step], noisy: Tensor, clean: Tensor, previous: Tensor, noise: Tensor) -> Tensor:
    """Move every item of a batch by its own step.

    Args:
        steps: B steps.
        noisy: (B, P) x_n.
        clean: (B, P) the denoiser's estimates of x_0.
        previous: (B, P) the estimates of the call before (ignored where the coefficient is 0).
        noise: (B, P) standard normal draws (likewise).

    Returns:
        (B, P) the samples at each item's next timestep.
    """
    rows = [[step.keep, step.clean, step.previous, step.noise] for step in steps]
    keep, gain, carry, spread = torch.tensor(rows, device=noisy.device).T.unsqueeze(-1)  # 4 x (B, 1)
    moved: Tensor = keep * noisy + gain * clean + carry * previous + spread * noise  # (B, P)
    return moved
