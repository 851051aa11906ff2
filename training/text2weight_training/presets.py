"""Strict YAML presets: every number of a training run in one file, unknown keys refused."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from text2weight.denoiser import DenoiserConfig
from text2weight.diffusion import NoiseSchedule, Prediction
from text2weight.head import HeadSpec
from text2weight.outside import OutsideSettings
from text2weight.samplers import SamplerName, check_sampler
from text2weight.weight_space import Scaling
from text2weight_training.files import TrainingDataError
from text2weight_training.stacked import HeadRecipe, RegularisingShare
from text2weight_training.suites.settings import SuitesSettings
from text2weight_training.teacher import TeacherSettings


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def _check_task_size(sizes: tuple[int, int]) -> tuple[int, int]:
    if not 2 <= sizes[0] <= sizes[1]:
        raise ValueError(f"{list(sizes)} must be [least, greatest] with 2 <= least <= greatest")
    return sizes


def _check_pairs(value: int | float) -> int | float:
    if isinstance(value, float) and not 0 <= value < 1:
        raise ValueError(f"{value} must be a whole number of pairs, or a fraction from 0 to less than 1")
    return value


def _check_classes(value: float | tuple[str, ...]) -> float | tuple[str, ...]:
    if isinstance(value, float) and not 0 <= value < 1:
        raise ValueError(f"{value} must be a fraction from 0 to less than 1, or a list of class names")
    return value


TaskSize = Annotated[tuple[int, int], AfterValidator(_check_task_size)]
HeldOutPairs = Annotated[NonNegativeInt | float, AfterValidator(_check_pairs)]
HeldOutClasses = Annotated[float | tuple[str, ...], AfterValidator(_check_classes)]


# What may change when a fit goes on from a saved state: how far and how fast it goes, not what it learns.
RESUMABLE = (
    "fit.steps",
    "fit.learning_rate",
    "fit.discriminator_learning_rate",
    "fit.warmup",
    "fit.gradient_clip",
    "fit.save_every",
)


def _is_off(value: float | tuple[str, ...]) -> bool:
    return not value


class ZooSettings(_Strict):
    """The zoo: which tasks, and how their heads are trained.

    Attributes:
        tasks: number of class combinations, seen and unseen together.
        task_size: least and greatest number of classes, drawn uniformly.
        unseen_fraction: share of tasks kept for evaluation.
        held_out_pairs: class pairs that occur together in no training task, see `splits.py`: a number of them,
            or a fraction of all pairs of training classes; 0 for none.
        held_out_classes: classes that no training sees: a fraction, drawn at random, or a list of names; 0 for none.
        base: recipe of the base head: a short training on all classes from PyTorch's initialisation.
        universal: recipe of the universal head: a long one.
        heads: recipe of the task heads, which start from the universal head.
        stack: heads trained at once, and heads per shard.
    """

    tasks: PositiveInt = 1024
    task_size: TaskSize = (8, 32)
    unseen_fraction: float = Field(default=0.2, gt=0, lt=1)
    # Left out of files while they are off, so that zoos and runs made without them stay what they are.
    held_out_pairs: HeldOutPairs = Field(default=0, exclude_if=_is_off)
    held_out_classes: HeldOutClasses = Field(default=0.0, exclude_if=_is_off)
    base: HeadRecipe
    universal: HeadRecipe
    heads: HeadRecipe
    stack: PositiveInt = 64

    @property
    def unseen_tasks(self) -> int:
        """How many of the tasks are kept for evaluation."""
        return round(self.tasks * self.unseen_fraction)

    @model_validator(mode="after")
    def _both_sides_have_tasks(self) -> ZooSettings:
        if not 0 < self.unseen_tasks < self.tasks:
            raise ValueError(f"{self.tasks} tasks with unseen_fraction {self.unseen_fraction} leave one side empty")
        return self


class FitSettings(_Strict):
    """How the denoiser is trained.

    Attributes:
        steps: optimiser steps, unless a time limit is given.
        zoo_batch: zoo heads per step, noised to uniformly drawn timesteps.
        fresh_batch: fresh class combinations per step, for which there is no head: see `fit.py`. Only the task
            and the adversarial loss use them; without both none are drawn.
        fresh_task_size: least and greatest number of classes of those; where there are fewer training classes, tasks of
            them all are the greatest.
        samples: feature samples per task for the task loss.
        label_smoothing: of the task loss's targets; against fitting the training features too closely.
        feature_dropout: share of each sample's numbers that are dropped; likewise.
        class_mixing: share of the fresh tasks with classes mixed from two, for names nobody has trained on: see
            `class_mixing.py`.
        teacher: a wide classifier whose answers are the task loss's targets, see `teacher.py`; none by default.
        diffusion_weight: factor of the diffusion loss.
        task_weight: factor of the task loss.
        symmetry_weight: factor of the equivariance loss.
        adversarial_weight: factor of the adversarial loss.
        discriminator_learning_rate: Adam's peak for the discriminator; warm-up and cosine as the denoiser's.
        permute_units: put the hidden units of every zoo item into a random order.
        condition_dropout: share of items whose condition is hidden from the denoiser.
        given_share: share of zoo items that the denoiser is given a partly trained head of, to improve: see `given.py`.
        learning_rate: AdamW's peak; warm-up, then a cosine to zero.
        weight_decay: AdamW's decoupled decay.
        warmup: share of the run spent warming up.
        gradient_clip: largest gradient norm.
        ema_decay: of the weights that are kept.
        save_every: steps between saved states.
    """

    steps: PositiveInt = 2000
    zoo_batch: PositiveInt = 32
    fresh_batch: NonNegativeInt = 32
    fresh_task_size: TaskSize = (2, 32)
    samples: PositiveInt = 128
    label_smoothing: RegularisingShare = 0.0
    feature_dropout: RegularisingShare = 0.0
    class_mixing: float = Field(default=0.0, ge=0, le=1, exclude_if=_is_off)
    teacher: TeacherSettings | None = Field(default=None, exclude_if=lambda teacher: teacher is None)
    diffusion_weight: NonNegativeFloat = 1.0
    task_weight: NonNegativeFloat = 1.0
    symmetry_weight: NonNegativeFloat = 0.0
    adversarial_weight: NonNegativeFloat = 0.0
    discriminator_learning_rate: PositiveFloat = 1e-4
    permute_units: bool = False
    condition_dropout: float = Field(default=0.0, ge=0, le=1)
    given_share: float = Field(default=0.0, ge=0, le=1, exclude_if=_is_off)
    learning_rate: PositiveFloat = 1e-3
    weight_decay: NonNegativeFloat = 0.01
    warmup: float = Field(default=0.03, ge=0, lt=1)
    gradient_clip: PositiveFloat = 1.0
    ema_decay: float = Field(default=0.995, ge=0, lt=1)
    save_every: PositiveInt = 100

    @property
    def fresh_items(self) -> int:
        """Fresh items per step: none where no loss would use them."""
        return self.fresh_batch if self.task_weight or self.adversarial_weight else 0


class EvaluationSettings(_Strict):
    """What is measured.

    Attributes:
        tasks: number of unseen tasks.
        samplers: (sampler, steps) pairs to generate with.
        oracle: recipe of heads trained on a task's own data; the better of two starts counts.
        bootstrap: resamples of the tasks for the intervals.
    """

    tasks: PositiveInt = 200
    samplers: tuple[tuple[SamplerName, PositiveInt], ...] = (("mean", 1), ("ddim", 4), ("ddim", 20))
    oracle: HeadRecipe
    bootstrap: PositiveInt = 2000


class Preset(_Strict):
    """One training run.

    Attributes:
        seed: of everything random.
        head: specification of the heads.
        logit_scale: s of the cosine logits.
        zoo: see `ZooSettings`.
        scaling: how heads become the sampler's variable, see `WeightSpace.fit`.
        denoiser: size and variant.
        schedule: noise schedule.
        prediction: what the denoiser outputs.
        fit: see `FitSettings`.
        sampler: default sampler of the checkpoint.
        steps: its default number of denoiser calls.
        outside: how the checkpoint treats names that training does not see; None for as any other.
        evaluation: see `EvaluationSettings`.
        suites: see `SuitesSettings`; not part of a run's identity, as nothing is trained by it.
    """

    seed: int = 0
    head: HeadSpec = HeadSpec()
    logit_scale: PositiveFloat = 30.0
    zoo: ZooSettings
    scaling: Scaling = "standardise"
    denoiser: DenoiserConfig = DenoiserConfig()
    schedule: NoiseSchedule = NoiseSchedule()
    prediction: Prediction = "x0"
    fit: FitSettings = FitSettings()
    sampler: SamplerName = "mean"
    steps: PositiveInt = 1
    outside: OutsideSettings | None = Field(default=None, exclude_if=lambda settings: settings is None)
    evaluation: EvaluationSettings
    suites: SuitesSettings = SuitesSettings()

    def run_description(self) -> dict[str, Any]:
        """The settings that decide what a training run makes: all but what is measured afterwards in suites."""
        return self.model_dump(mode="json", exclude={"suites"})

    @model_validator(mode="after")
    def _parts_fit_together(self) -> Preset:
        """Refuse now what the last stage of a long run would refuse."""
        for sampler, steps in (*self.evaluation.samplers, (self.sampler, self.steps)):
            check_sampler(sampler, steps, self.schedule.num_timesteps)
        if (self.sampler, self.steps) not in self.evaluation.samplers:
            raise ValueError(f"evaluation.samplers lacks the default sampler: add [{self.sampler}, {self.steps}]")
        if self.head.logits != "cosine":
            raise ValueError("head.logits must be cosine: heads are trained and scored against class embeddings")
        if self.head.output_dim != self.denoiser.embedding_dim:
            raise ValueError(
                f"head.output_dim {self.head.output_dim} and denoiser.embedding_dim {self.denoiser.embedding_dim} "
                "must both be the size of a class embedding"
            )
        self._check_switches()
        if self.evaluation.tasks > self.zoo.unseen_tasks:
            raise ValueError(
                f"evaluation.tasks is {self.evaluation.tasks}, but the zoo keeps only "
                f"{self.zoo.unseen_tasks} unseen tasks"
            )
        if "suites" in self.model_fields_set:
            self._check_suites()
        return self

    def _check_switches(self) -> None:
        fit, denoiser = self.fit, self.denoiser
        if fit.permute_units and denoiser.tokens == "unit" and denoiser.unit_identity:
            raise ValueError(
                "fit.permute_units contradicts denoiser.unit_identity, which tells units apart by the anchor head's "
                "order: set denoiser.unit_identity to false"
            )
        if fit.permute_units and self.scaling != "min_max":
            raise ValueError(
                f"fit.permute_units contradicts scaling {self.scaling}: deviations from the mean head, permuted, give "
                "another function; set scaling to min_max"
            )
        if (fit.condition_dropout > 0) != denoiser.null_condition:
            raise ValueError(
                f"fit.condition_dropout {fit.condition_dropout} trains the null condition, and denoiser.null_condition "
                f"is {str(denoiser.null_condition).lower()}: set both or neither"
            )

        if (fit.given_share > 0) != denoiser.reads_given:
            raise ValueError(
                f"fit.given_share {fit.given_share} trains the reading of given heads, and denoiser.reads_given is "
                f"{str(denoiser.reads_given).lower()}: set both or neither"
            )
        if fit.teacher is not None and not fit.task_weight:
            raise ValueError("fit.teacher without fit.task_weight teaches nothing: set both or neither")
        if fit.given_share and (fit.permute_units or fit.symmetry_weight):
            raise ValueError(
                "fit.given_share goes with neither fit.permute_units nor fit.symmetry_weight: a given head is read "
                "beside the sample's units, in the order of the anchor's"
            )

    def _check_suites(self) -> None:
        for sampler, steps in self.suites.samplers():
            check_sampler(sampler, steps, self.schedule.num_timesteps)
        for name, count in self.suites.unseen_tasks().items():
            if count > self.zoo.unseen_tasks:
                raise ValueError(
                    f"suites.{name} is {count}, but the zoo keeps only {self.zoo.unseen_tasks} unseen tasks"
                )


def resume_obstacles(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    """Settings, by dotted name, that keep a fit with the run description `before` from going on with `now`."""
    found: list[str] = []
    for key in dict.fromkeys([*before, *now]):
        one, other, name = before.get(key), now.get(key), f"{prefix}{key}"
        if isinstance(one, dict) and isinstance(other, dict):
            found += resume_obstacles(one, other, f"{name}.")
        elif one != other and name not in RESUMABLE:
            found.append(name)
    return found


def preset_names() -> list[str]:
    """Names of the presets that come with the package."""
    folder = files("text2weight_training") / "presets"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_preset(name: str) -> Preset:
    """Read a preset by name, or from a YAML file's path.

    Raises:
        TrainingDataError: no such preset, not YAML, an unknown key or a value that is not allowed.
    """
    path = Path(name)
    if path.suffix not in {".yaml", ".yml"}:
        if name not in preset_names():
            raise TrainingDataError(f"no preset {name!r}: choose {', '.join(preset_names())}, or give a .yaml file")
        path = Path(str(files("text2weight_training") / "presets" / f"{name}.yaml"))
    try:
        content: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
        return Preset.model_validate(content)
    except (OSError, UnicodeDecodeError) as error:
        raise TrainingDataError(f"preset {path} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise TrainingDataError(f"preset {path} is not YAML: {error}") from error
    except ValidationError as error:
        details = "; ".join(f"{'.'.join(map(str, item['loc'])) or 'preset'}: {item['msg']}" for item in error.errors())
        raise TrainingDataError(f"preset {path.name} is not valid: {details}") from error
