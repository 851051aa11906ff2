"""The ablation's variants: what each changes in a run's preset, so that the result is a legal one.

A variant turns one part over: off where the preset has it on, and on where it is off. So the table serves any preset.
docs/method.md describes the parts and which exclude each other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError

from text2weight_training.files import TrainingDataError
from text2weight_training.presets import Preset, load_preset
from text2weight_training.suites.settings import VariantName

# Weights of losses that the preset leaves out: those of `paper`, and 1 for the task loss.
SYMMETRY_WEIGHT = 0.1
ADVERSARIAL_WEIGHT = 0.01
TASK_WEIGHT = 1.0
CLASS_PATH = 512


@dataclass(frozen=True)
class Variant:
    """One row of the ablation.

    Attributes:
        title: what differs from the run's preset, in words.
        preset: the whole preset to fit with.
    """

    title: str
    preset: Preset


Changes = dict[str, Any]
Made = tuple[str, Changes]


def make_variant(name: VariantName, preset: Preset, seed: int) -> Variant:
    """Apply a variant to a run's preset.

    Args:
        name: of the table.
        preset: the run's own.
        seed: of the variant's fit; the zoo's seed is part of the zoo.

    Raises:
        TrainingDataError: the preset has nothing that the variant could change, or the change is not allowed in it.
    """
    made = TABLE[name](preset)
    if made is None:
        raise TrainingDataError("the preset has nothing that it could change")
    title, changes = made
    content = preset.run_description() | {"seed": seed}
    for part, value in changes.items():
        content[part] = content[part] | value if isinstance(value, dict) else value
    try:
        return Variant(title, Preset.model_validate(content))
    except ValidationError as error:
        reasons = "; ".join(item["msg"] for item in error.errors())
        raise TrainingDataError(f"the preset does not allow it: {reasons}") from error


def _full(preset: Preset) -> Made:
    return "the preset as it is", {}


def _turned(on: bool, what: str, changes: Changes) -> Made:
    return f"{'without' if on else 'with'} {what}", changes


def _symmetry_loss(preset: Preset) -> Made:
    on = preset.fit.symmetry_weight > 0
    return _turned(on, "L_sym", {"fit": {"symmetry_weight": 0.0 if on else SYMMETRY_WEIGHT}})


def _adversarial_loss(preset: Preset) -> Made:
    on = preset.fit.adversarial_weight > 0
    return _turned(on, "L_adv", {"fit": {"adversarial_weight": 0.0 if on else ADVERSARIAL_WEIGHT}})


def _task_loss(preset: Preset) -> Made:
    fit = preset.fit
    if not fit.task_weight:
        return _turned(False, "L_task", {"fit": {"task_weight": TASK_WEIGHT}})
    # Fresh items are of use to L_task and L_adv alone; without both their places in the batch go to zoo heads.
    zoo_batch = fit.zoo_batch + (0 if fit.adversarial_weight else fit.fresh_batch)
    # A teacher's answers are targets of L_task alone.
    changes = {
        "task_weight": 0.0,
        "teacher": None,
        "zoo_batch": zoo_batch,
        "diffusion_weight": fit.diffusion_weight or 1.0,
    }
    return _turned(True, "L_task", {"fit": changes})


def _fresh_items(preset: Preset) -> Made | None:
    fit = preset.fit
    if not (fit.task_weight or fit.adversarial_weight):
        return None
    if fit.fresh_batch:
        return _turned(True, "fresh items", {"fit": {"fresh_batch": 0, "zoo_batch": fit.zoo_batch + fit.fresh_batch}})
    return _turned(False, "fresh items", {"fit": {"fresh_batch": fit.zoo_batch}})


def _class_tokens(preset: Preset) -> Made:
    on = preset.denoiser.class_tokens
    return _turned(on, "class tokens", {"denoiser": {"class_tokens": not on, "pooled": True}})


def _class_path(preset: Preset) -> Made | None:
    if not preset.denoiser.class_tokens:
        return None
    on = preset.denoiser.class_path > 0
    return _turned(on, "class path", {"denoiser": {"class_path": 0 if on else CLASS_PATH}})


def _tokens(preset: Preset) -> Made:
    if preset.denoiser.tokens == "unit":
        return "chunk tokens, not unit tokens", {"denoiser": {"tokens": "chunk"}}
    named = {"tokens": "unit", "unit_identity": not preset.fit.permute_units}
    return "unit tokens, not chunk tokens", {"denoiser": named}


def _unit_identity(preset: Preset) -> Made | None:
    if preset.denoiser.tokens != "unit":
        return None
    on = preset.denoiser.unit_identity
    return _turned(on, "names of units", {"denoiser": {"unit_identity": not on}, "fit": {"permute_units": False}})


def _permuted_units(preset: Preset) -> Made:
    on = preset.fit.permute_units
    if on:
        return _turned(on, "permuted units", {"fit": {"permute_units": False}})
    # A permutation is a symmetry of min-max scaling alone. Unit tokens either have names, which it contradicts, or obey
    # it by construction, where it has nothing to teach: only of chunk tokens is there something to measure.
    legal = {"fit": {"permute_units": True}, "scaling": "min_max", "denoiser": {"tokens": "chunk"}}
    return "with permuted units (min-max, chunk tokens)", legal


def _scaling(preset: Preset) -> Made:
    if preset.scaling == "standardise":
        return "min-max scaling, not standardised", {"scaling": "min_max"}
    return "standardised, not min-max scaling", {"scaling": "standardise", "fit": {"permute_units": False}}


def _paper(preset: Preset) -> Made:
    """All that decides the fit and its samplers; head, logit scale and tasks stay the zoo's."""
    paper = load_preset("paper")
    denoiser = paper.denoiser.model_copy(update={"embedding_dim": preset.denoiser.embedding_dim})
    return "the paper's configuration (preset `paper`)", {
        "scaling": paper.scaling,
        "denoiser": _fields(denoiser),
        "schedule": _fields(paper.schedule),
        "prediction": paper.prediction,
        "fit": _fields(paper.fit),
        "sampler": paper.sampler,
        "steps": paper.steps,
        "outside": paper.outside,
        "evaluation": {"samplers": paper.evaluation.samplers},
    }


def _fields(model: BaseModel) -> dict[str, Any]:
    """Every field, also those that a dump leaves out because they have their usual value."""
    return {name: getattr(model, name) for name in type(model).model_fields}


TABLE: dict[VariantName, Callable[[Preset], Made | None]] = {
    "full": _full,
    "symmetry_loss": _symmetry_loss,
    "adversarial_loss": _adversarial_loss,
    "task_loss": _task_loss,
    "fresh_items": _fresh_items,
    "class_tokens": _class_tokens,
    "class_path": _class_path,
    "tokens": _tokens,
    "unit_identity": _unit_identity,
    "permuted_units": _permuted_units,
    "scaling": _scaling,
    "paper": _paper,
}
