"""Enhancing a given head: noise it part of the way, then denoise it under the text.

The idea is SDEdit's (arXiv 2108.01073). A head at timestep t0 = strength * N keeps sqrt(abar_t0) of itself; the
sampler starts there in place of N. The T2W paper (arXiv 2508.13633) noises by all N steps, which leaves nothing of
the head: docs/method.md. Letters: P numbers in one head, h hidden units.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from text2weight.diffusion import NoiseSchedule
from text2weight.errors import InvalidInputError
from text2weight.head import HeadSpec
from text2weight.merging import match_units
from text2weight.weight_space import WeightSpace
from text2weight.weight_tokens import permute_units

# In the space's scales. Heads trained elsewhere are some hundreds off at most; numbers far above would overflow inside
# the denoiser and come back as a head that is not finite.
MAX_DEVIATION = 1e6


@dataclass(frozen=True)
class Start:
    """Where a request's reverse diffusion begins.

    Attributes:
        timestep: t0; N is pure noise, and 0 leaves nothing to do.
        given: (P,) the head to begin from; None at N.
        order: (h,) brings the given head's hidden units into the weight space's order; None at N.
    """

    timestep: int
    given: Tensor | None = None
    order: Tensor | None = None

    def sample(self, spec: HeadSpec, space: WeightSpace, schedule: NoiseSchedule, noise: Tensor) -> Tensor:
        """x_t0 in the sampler's space from standard normal noise (P,): (P,)."""
        if self.given is None or self.order is None:
            return noise
        clean = space.standardise(permute_units(spec, self.given, self.order))  # (P,)
        return schedule.add_noise(clean[None], torch.tensor([self.timestep]), noise[None])[0]

    def finish(self, spec: HeadSpec, weights: Tensor) -> Tensor:
        """Turn the sampler's flat weights (P,) into the answer (P,): in the order of units that the head was given in.

        Nothing was done at timestep 0, so the answer is the given head itself, free of any rounding.
        """
        if self.given is None or self.order is None:
            return weights
        return self.given if self.timestep == 0 else permute_units(spec, weights, self.order.argsort())


def choose_start(
    spec: HeadSpec, space: WeightSpace, schedule: NoiseSchedule, given: Tensor | None, strength: float
) -> Start:
    """Where to begin for a given head and a strength.

    A head's hidden units can stand in any order without changing what it computes; the denoiser knows them by the
    weight space's anchor. So they are paired with the anchor's one to one, as in Git Re-Basin (arXiv 2209.04836).
    GELU has no other symmetry: a unit's sign and length mean something.

    Args:
        spec: the heads' specification.
        space: the weight space, on the CPU.
        schedule: the noise schedule.
        given: (P,) flat weights in any order of hidden units, on the CPU; None for plain generation.
        strength: 0..1; t0 is rounded to whole timesteps.

    Returns:
        at t0 = N the start of plain generation, in which the given head has no part: the sqrt(abar_N) that noising
        would leave of it is an artefact of the schedule.
    """
    timestep = round(strength * schedule.num_timesteps)
    if given is None or timestep == schedule.num_timesteps:
        return Start(schedule.num_timesteps)
    return Start(timestep, given, match_units(spec, space.anchor, given))


def check_given(spec: HeadSpec, space: WeightSpace, given: Tensor | None, strength: float) -> None:
    """Refuse a given head and a strength that nothing can be computed from.

    Args:
        spec: the heads' specification.
        space: the weight space, on the CPU.
        given: see `choose_start`.
        strength: likewise.

    Raises:
        InvalidInputError: field "strength" or "head".
    """
    if not 0 <= strength <= 1:  # not a number is refused too
        raise InvalidInputError("strength", f"strength is {strength}: allowed are 0 to 1")
    if given is None:
        if strength != 1:
            raise InvalidInputError("strength", f"strength is {strength} without a head: give one, or leave it at 1")
        return
    if tuple(given.shape) != (spec.num_parameters,) or given.dtype != torch.float32:
        raise InvalidInputError(
            "head",
            f"the head's weights are {tuple(given.shape)} {given.dtype}: "
            f"expected ({spec.num_parameters},) torch.float32",
        )
    # Nan and infinite values fail the comparison, too.
    if not bool((space.standardise(given.cpu()).abs() <= MAX_DEVIATION).all()):
        raise InvalidInputError(
            "head",
            f"the head holds values that are not finite, or more than {MAX_DEVIATION:g} standard deviations away from "
            "the heads that this checkpoint knows: give a trained head",
        )


def check_fits(expected: HeadSpec, there: HeadSpec) -> None:
    """Refuse a head that computes something else than the checkpoint's heads do.

    Raises:
        InvalidInputError: field "head"; other sizes, biases or activation.
    """
    if (there.shapes, there.activation) != (expected.shapes, expected.activation):
        raise InvalidInputError(
            "head",
            f"the head has {_describe(there)}: this checkpoint enhances heads with {_describe(expected)}",
        )


def _describe(spec: HeadSpec) -> str:
    biases = "biases" if spec.bias else "no biases"
    sizes = f"{spec.input_dim} inputs, {spec.hidden_dim} hidden units, {spec.output_dim} outputs"
    return f"{sizes}, {biases} and activation {spec.activation}"
