"""Requests on their way through the reverse diffusion, each at a step of its own plan.

Items join and leave a batch between two denoiser calls, so one with few calls never waits for one with many.
Letters: B items of a batch, R rows of a denoiser call, K classes, P numbers in one head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from text2weight.condition import Condition, stack_conditions
from text2weight.diffusion import NoiseSchedule, Prediction
from text2weight.enhancement import Start
from text2weight.samplers import Step, take_steps

if TYPE_CHECKING:
    from text2weight.generator import GenerationRequest

Denoiser = Callable[[Tensor, Tensor, Condition], Tensor]


@dataclass(eq=False)
class Sample:
    """One request and how far its reverse diffusion is. It belongs to one caller; `advance` moves it on.

    Attributes:
        request: what is generated.
        start: where its reverse diffusion began.
        plan: one step for each denoiser call.
        source: of its noise; no other item draws from it.
        condition: of this item alone, on the denoiser's device.
        noisy: (P,) x_n, on the device.
        estimate: (P,) of x_0 by the last call, zeros before the first; on the device.
        calls: how many denoiser calls were made.
        drawn: (P,) noise of the present step, kept until the step is made: a call that fails and is made again draws
            nothing new.
    """

    request: GenerationRequest
    start: Start
    plan: tuple[Step, ...]
    source: torch.Generator
    condition: Condition
    noisy: Tensor
    estimate: Tensor
    calls: int = 0
    drawn: Tensor | None = None

    @property
    def done(self) -> bool:
        """Whether no denoiser call is left."""
        return self.calls == len(self.plan)

    @property
    def step(self) -> Step:
        """The step that the next call makes."""
        return self.plan[self.calls]

    def draw(self) -> Tensor:
        """Noise for the next step, (P,) on the CPU: the same numbers on every device and in any batch."""
        if self.drawn is None:
            self.drawn = torch.randn(self.noisy.shape, generator=self.source)
        return self.drawn


def advance(
    samples: Sequence[Sample], denoiser: Denoiser, schedule: NoiseSchedule, prediction: Prediction, rows: int
) -> None:
    """Make the next denoiser call of each of B samples, in one call of R rows.

    Args:
        samples: at least one, none of them done.
        denoiser: the network.
        schedule: its noise schedule.
        prediction: what it predicts.
        rows: R, at least B; the rows above B repeat the first sample and are thrown away. Equal shapes give an item
            the same bits whatever its neighbours are.

    Raises:
        Whatever the network raises; then no sample has moved.
    """
    padded = [*samples, *[samples[0]] * (rows - len(samples))]
    device = samples[0].noisy.device
    noisy = torch.stack([sample.noisy for sample in padded])  # (R, P)
    timesteps = torch.tensor([sample.step.timestep for sample in padded], device=device)  # (R,)
    scales = [sample.request.guidance_scale for sample in padded]
    guidance = torch.tensor(scales, device=device) if any(scale != 1 for scale in scales) else None  # (R,)
    condition = stack_conditions([sample.condition for sample in padded])
    _, clean = schedule.run_denoiser(denoiser, prediction, noisy, timesteps, condition, guidance)  # (R, P)
    count = len(samples)
    previous = torch.stack([sample.estimate for sample in samples])  # (B, P)
    draws = _draw(samples, noisy[:count])  # (B, P)
    moved = take_steps([sample.step for sample in samples], noisy[:count], clean[:count], previous, draws)  # (B, P)
    if device.type == "cuda":
        # A device reports its failures late: no sample may move before its call is known to be good.
        torch.cuda.current_stream(device).synchronize()
    for sample, row, estimate in zip(samples, _copies(moved), _copies(clean[:count]), strict=True):
        sample.noisy, sample.estimate = row, estimate
        sample.drawn = None
        sample.calls += 1


def _copies(batch: Tensor) -> tuple[Tensor, ...]:
    """The rows of a batch, each on its own: a view would keep the whole batch alive."""
    rows: tuple[Tensor, ...] = torch.unbind_copy(batch)  # type: ignore[func-returns-value,assignment]
    return rows


def _draw(samples: Sequence[Sample], like: Tensor) -> Tensor:
    """The noise of the next step of each of B samples, of the shape and on the device of `like` (B, P)."""
    draws = torch.zeros(like.shape)  # (B, P) on the CPU, so that one copy brings all to a device
    for row, sample in enumerate(samples):
        if sample.step.noise:
            draws[row] = sample.draw()
    return draws.to(like.device)
