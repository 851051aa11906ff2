"""Enhancing a given head under a text, in one of two ways.

"interpolate" generates a head for the text and goes from the given one a share of the way to it: the two err in
different ways, and heads of one family can be averaged (model soups, arXiv 2203.05482). "noise" is SDEdit
(arXiv 2108.01073): a head at timestep t0 = strength * N keeps sqrt(abar_t0) of itself, and the sampler starts there in
place of N. The T2W paper (arXiv 2508.13633) noises by all N steps, which leaves nothing of the head: docs/method.md.
Heads of another family lie in another valley, where averages are worse than the generated head: those are noised unless
told otherwise. Letters: P numbers in one head, h hidden units.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from text2weight.condition import GivenHeads
from text2weight.diffusion import NoiseSchedule
from text2weight.errors import InvalidInputError
from text2weight.head import HeadSpec
from text2weight.merging import match_units
from text2weight.weight_space import WeightSpace
from text2weight.weight_tokens import permute_units

EnhanceMethod = Literal["interpolate", "noise"]

# In the space's scales: PyTorch's initial heads reach 150 in the bundled checkpoint. Numbers far above would overflow
# inside the denoiser and come back as a head that is not finite.
MAX_DEVIATION = 1e6
# Cosine with the anchor from which a head is of its family. On the zoo of docs/results.md, heads that are trained from
# the universal head stay above 0.75, those of other starts below 0.3.
FAMILY = 0.5


@dataclass(frozen=True)
class Alignment:
    """How to write a head so that it resembles another one and still is the same classifier.

    Attributes:
        order: (h,) brings its hidden units into the other head's order.
        factor: brings its last layer to the length of the other head's.
    """

    order: Tensor
    factor: float

    def apply(self, spec: HeadSpec, head: Tensor) -> Tensor:
        """Head (P,) -> (P,), aligned."""
        return scale_last_layer(spec, permute_units(spec, head, self.order), self.factor)

    def undo(self, spec: HeadSpec, head: Tensor) -> Tensor:
        """An aligned head (P,) -> (P,), as before, but for rounding."""
        return scale_last_layer(spec, permute_units(spec, head, self.order.argsort()), 1 / self.factor)


def align(spec: HeadSpec, reference: Tensor, head: Tensor) -> Alignment:
    """Find how to write a head (P,) so that it resembles a reference (P,), on the same device.

    Hidden units can stand in any order: they are paired with the reference's one to one, as in Git Re-Basin
    (arXiv 2209.04836). Cosine logits do not see the length of the head's output: the last layer gets the reference's.
    GELU leaves no more freedom; a unit's sign and length mean something.
    """
    factor = 1.0
    if spec.logits == "cosine":
        lengths = [_last_layer_length(spec, weights) for weights in (reference, head)]
        # A layer of next to nothing stays one: its ratio would not be a number in fp32.
        factor = lengths[0] / lengths[1] if min(lengths) > max(lengths) / MAX_DEVIATION else 1.0
    return Alignment(match_units(spec, reference, head), factor)


def scale_last_layer(spec: HeadSpec, flat: Tensor, factor: float) -> Tensor:
    """Multiply a head's last layer, weights and bias, by a positive factor: flat (P,) -> (P,).

    Cosine logits stay the same.
    """
    blocks = spec.unflatten(flat)
    return spec.flatten(
        {name: block * factor if name.startswith("linear2.") else block for name, block in blocks.items()}
    )


def _last_layer_length(spec: HeadSpec, flat: Tensor) -> float:
    blocks = spec.unflatten(flat.double())
    return math.hypot(*(float(block.norm()) for name, block in blocks.items() if name.startswith("linear2.")))


def interpolate(spec: HeadSpec, given: Tensor, generated: Tensor, share: float) -> Tensor:
    """(1 - share) of a given head (P,) and share of a generated one (P,), written as the given head is: (P,)."""
    alignment = align(spec, generated, given)
    return alignment.undo(spec, torch.lerp(alignment.apply(spec, given), generated, share))


@dataclass(frozen=True)
class Start:
    """Where a request's reverse diffusion begins, and what becomes of the given head at its end.

    Attributes:
        timestep: t0; N is pure noise, and 0 leaves nothing to do.
        given: (P,) the head to enhance; None where it has no part in the answer.
        share: of the generated head in the answer, where the two are interpolated.
        alignment: of the given head to the weight space's anchor, where it is noised.
        clean: (P,) the aligned head in the sampler's space, where it is noised.
    """

    timestep: int
    given: Tensor | None = None
    share: float = 1.0
    alignment: Alignment | None = None
    clean: Tensor | None = None

    def sample(self, schedule: NoiseSchedule, noise: Tensor) -> Tensor:
        """x_t0 in the sampler's space from standard normal noise (P,): (P,)."""
        if self.clean is None:
            return noise
        return schedule.add_noise(self.clean[None], torch.tensor([self.timestep]), noise[None])[0]

    def finish(self, spec: HeadSpec, weights: Tensor) -> Tensor:
        """Turn the sampler's flat weights (P,) into the answer (P,), written as the given head is.

        Nothing was done at timestep 0, so the answer is the given head itself, free of any rounding.
        """
        if self.given is None:
            return weights
        if self.timestep == 0:
            return self.given
        if self.alignment is None:
            return interpolate(spec, self.given, weights, self.share)
        return self.alignment.undo(spec, weights)


def choose_method(spec: HeadSpec, anchor: Tensor, given: Tensor) -> EnhanceMethod:
    """What suits a head (P,): "interpolate" if it is of the anchor's (P,) family, else "noise"."""
    aligned = align(spec, anchor, given).apply(spec, given)  # (P,)
    return "interpolate" if float(F.cosine_similarity(aligned, anchor, dim=0)) > FAMILY else "noise"


def start_timestep(schedule: NoiseSchedule, strength: float, method: EnhanceMethod | None) -> int:
    """t0: N where a whole head is generated, 0 where nothing is, else strength * N, rounded to whole timesteps.

    Where the method is yet to be chosen, the greatest it may come to.
    """
    share = strength if method == "noise" else math.ceil(strength)
    return round(share * schedule.num_timesteps)


def choose_start(
    spec: HeadSpec,
    space: WeightSpace,
    schedule: NoiseSchedule,
    given: Tensor | None,
    strength: float,
    method: EnhanceMethod | None,
) -> Start:
    """Where to begin for a given head and a strength.

    Args:
        spec: the heads' specification.
        space: the weight space, on the CPU.
        schedule: the noise schedule.
        given: (P,) flat weights on the CPU, written in any of the ways that `align` undoes: the denoiser knows heads
            as they look beside the anchor. None for plain generation.
        strength: 0..1, see `start_timestep`.
        method: how the given head is enhanced; None without one.

    Returns:
        at strength 1 the start of plain generation, in which the given head has no part: the sqrt(abar_N) that noising
        would leave of it is an artefact of the schedule.
    """
    timestep = start_timestep(schedule, strength, method)
    if timestep == 0:
        return Start(0, given)
    if given is None or strength == 1 or (method == "noise" and timestep == schedule.num_timesteps):
        return Start(timestep)
    if method == "interpolate":
        return Start(timestep, given, share=strength)
    alignment = align(spec, space.anchor, given)
    clean = space.standardise(alignment.apply(spec, given))  # (P,)
    return Start(timestep, given, alignment=alignment, clean=clean)


def heads_to_read(starts: Sequence[Start], size: int) -> GivenHeads:
    """What a denoiser that reads given heads is shown of B requests, each with `size` numbers in its head."""
    nothing = torch.zeros(size)
    rows = [nothing if start.clean is None else start.clean for start in starts]
    return GivenHeads(torch.stack(rows), torch.tensor([start.clean is not None for start in starts]))


def check_given(spec: HeadSpec, space: WeightSpace, given: Tensor | None, strength: float, method: str | None) -> None:
    """Refuse a given head, a strength and a method that nothing can be computed from.

    Args:
        spec: the heads' specification.
        space: the weight space, on the CPU.
        given: see `choose_start`.
        strength: likewise.
        method: None for what suits the head.

    Raises:
        InvalidInputError: field "strength", "method" or "head".
    """
    if method is not None and method not in get_args(EnhanceMethod):
        allowed = " and ".join(get_args(EnhanceMethod))
        raise InvalidInputError(
            "method", f"method is {method!r}: allowed are {allowed}, or none for what suits the head"
        )
    if not 0 <= strength <= 1:  # not a number is refused too
        raise InvalidInputError("strength", f"strength is {strength}: allowed are 0 to 1")
    if given is None:
        if strength != 1:
            raise InvalidInputError("strength", f"strength is {strength} without a head: give one, or leave it at 1")
        if method is not None:
            raise InvalidInputError("method", f"method is {method!r} without a head: give one, or no method")
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
