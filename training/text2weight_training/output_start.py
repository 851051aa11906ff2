"""Where a denoiser's output starts, so that an untrained network answers with the zoo's mean head.

Letters: n zoo heads, P numbers in one head.
"""

from __future__ import annotations

from torch import Tensor

from text2weight.head import HeadSpec
from text2weight.weight_space import WeightSpace
from text2weight.weight_tokens import UnitTokens
from text2weight_training.presets import Preset


def output_start(preset: Preset, space: WeightSpace, weights: Tensor) -> Tensor | None:
    """The mean of zoo heads (n, P) in the sampler's space, (P,); None where nothing is to be added to the output.

    Standardised, that mean is zero already. The target of a network that predicts epsilon or v is noise, wholly or for
    the most part, and has no such mean. Where the preset asks for a network without an order of the hidden units, by
    tokens without names, permuted heads or L_sym, the mean is over the units as well.
    """
    if preset.scaling == "standardise" or preset.prediction != "x0":
        return None
    mean = space.standardise(weights).mean(0)  # (P,)
    unnamed = preset.denoiser.tokens == "unit" and not preset.denoiser.unit_identity
    orderless = unnamed or preset.fit.permute_units or preset.fit.symmetry_weight > 0
    return _mean_over_units(preset.head, mean) if orderless else mean


def _mean_over_units(spec: HeadSpec, flat: Tensor) -> Tensor:
    layout = UnitTokens(spec)
    units, output_bias = layout.split(flat.unsqueeze(0))  # (1, h, unit_dim), (1, o)
    return layout.join(units.mean(1, keepdim=True).expand_as(units), output_bias).squeeze(0)  # (P,)
