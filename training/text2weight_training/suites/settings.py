"""Settings of the evaluation suites: the `suites` section of a preset. Defaults are for a full measurement."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_serializer,
    field_validator,
    model_validator,
)

from text2weight.samplers import SamplerName
from text2weight_training.stacked import HeadRecipe, RegularisingShare

Share = Annotated[float, Field(gt=0, le=1)]
Between = Annotated[float, Field(gt=0, lt=1)]
SamplerSteps = tuple[SamplerName, PositiveInt]
# What each of them changes is in variants.py.
VariantName = Literal[
    "full",
    "symmetry_loss",
    "adversarial_loss",
    "task_loss",
    "fresh_items",
    "class_tokens",
    "class_path",
    "tokens",
    "unit_identity",
    "permuted_units",
    "scaling",
    "paper",
]


def table_name(source: str) -> str:
    """Name of a table FILE#TABLE without the file's folder."""
    path, _, table = source.partition("#")
    return f"{Path(path).name}#{table}" if table else Path(path).name


class SuiteSettings(BaseModel):
    """What every suite can be told.

    Attributes:
        bootstrap: resamples of the tasks for the intervals.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    bootstrap: PositiveInt = 2000


class HypernetworkSettings(BaseModel):
    """How the MLP hypernetwork is trained: with every combination of these values, of which the best is kept.

    Attributes:
        steps: optimiser steps of each combination.
        batch_size: zoo heads per step.
        learning_rates: of AdamW.
        weight_decays: of AdamW.
        widths: shares of the width at which it is as large as the denoiser.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: PositiveInt = 2000
    batch_size: PositiveInt = 64
    learning_rates: tuple[PositiveFloat, ...] = Field(default=(3e-4, 1e-3, 3e-3), min_length=1)
    weight_decays: tuple[NonNegativeFloat, ...] = Field(default=(0.01, 0.3), min_length=1)
    widths: tuple[Share, ...] = Field(default=(0.25, 1.0), min_length=1)

    @property
    def total_steps(self) -> int:
        """Of all combinations together."""
        return self.steps * len(self.learning_rates) * len(self.weight_decays) * len(self.widths)


class AccuracySettings(SuiteSettings):
    """Every baseline on every split.

    Attributes:
        tasks: tasks of each split, or all it has.
        oracle_seeds: heads trained on each task's own data, from each start.
        label_smoothing: of the regularised versions of the universal heads and of the oracle.
        feature_dropout: likewise. Nothing else differs from their recipes.
        restricted_universal: recipe of the universal head that is trained on tasks; `batch_size` counts
            samples per task.
        restricted_tasks: tasks per step of it.
        hypernetwork: see `HypernetworkSettings`.
    """

    tasks: PositiveInt = 200
    oracle_seeds: PositiveInt = 3
    label_smoothing: RegularisingShare = 0.1
    feature_dropout: RegularisingShare = 0.1
    restricted_universal: HeadRecipe = HeadRecipe(steps=3000, batch_size=64, learning_rate=1e-3, weight_decay=1.0)
    restricted_tasks: PositiveInt = 16
    hypernetwork: HypernetworkSettings = HypernetworkSettings()


class HeadlineSettings(SuiteSettings):
    """The gap to a tuned oracle on fresh class combinations.

    Attributes:
        tasks: number of fresh combinations.
        generation_seeds: heads generated for each of them.
        samplers: (sampler, steps) pairs, beside the checkpoint's default.
        tuning_tasks: other fresh combinations, on which the oracle is tuned.
        learning_rates: of the oracle, among which it is tuned.
        weight_decays: likewise.
        steps: likewise.
        oracle_seeds: trainings of each task by the tuned recipe.
        regularised_seeds: likewise, by the one with label smoothing and feature dropout.
    """

    tasks: PositiveInt = 500
    generation_seeds: PositiveInt = 3
    samplers: tuple[SamplerSteps, ...] = (("mean", 1), ("ddim", 4), ("ddim", 20))
    tuning_tasks: PositiveInt = 32
    learning_rates: tuple[PositiveFloat, ...] = Field(default=(5e-4, 1e-3, 2e-3, 4e-3), min_length=1)
    weight_decays: tuple[NonNegativeFloat, ...] = Field(default=(1.0, 2.0, 4.0), min_length=1)
    steps: tuple[PositiveInt, ...] = Field(default=(300, 600, 1200), min_length=1)
    oracle_seeds: PositiveInt = 3
    regularised_seeds: PositiveInt = 1


class DenoisingSettings(SuiteSettings):
    """Accuracy along the denoising steps.

    Attributes:
        tasks: number of unseen tasks.
        samplers: (sampler, steps) pairs.
    """

    tasks: PositiveInt = 100
    samplers: tuple[SamplerSteps, ...] = Field(
        default=(("ddpm", 20), ("ddpm", 100), ("ddim", 20), ("dpmpp_2m", 20)), min_length=1
    )


class ReadingSettings(SuiteSettings):
    """Whether the text is read.

    Attributes:
        tasks: number of unseen tasks.
        samplers: (sampler, steps) pairs.
        paraphrases: embedding tables FILE#TABLE of the same names under other prompts.
    """

    tasks: PositiveInt = 200
    samplers: tuple[SamplerSteps, ...] = Field(default=(("mean", 1), ("ddim", 20)), min_length=1)
    paraphrases: tuple[str, ...] = ()

    @field_serializer("paraphrases")
    def _without_folders(self, sources: tuple[str, ...]) -> tuple[str, ...]:
        # Results travel to other machines, the folders of this one do not.
        return tuple(table_name(source) for source in sources)


class FuseSettings(SuiteSettings):
    """One head for two tasks.

    Attributes:
        pairs: number of pairs of disjoint tasks.
        task_size: classes of each of the two.
        samplers: (sampler, steps) pairs; the heads of the first are also merged by the classical rules.
        scales: factors of the merged deviation that task arithmetic and TIES may choose from.
        density: share of a deviation's entries that TIES keeps.
        regmean_decay: factor of the off-diagonal entries of RegMean's Gram matrices.
        selection_samples: training features of each pair on which a factor is chosen.
    """

    pairs: PositiveInt = 100
    task_size: Annotated[int, Field(ge=2)] = 8
    samplers: tuple[SamplerSteps, ...] = Field(default=(("mean", 1), ("ddim", 20)), min_length=1)
    scales: tuple[PositiveFloat, ...] = Field(default=(0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 1.0), min_length=1)
    density: Share = 0.2
    regmean_decay: Share = 0.9
    selection_samples: PositiveInt = 512


class InitSettings(SuiteSettings):
    """Heads to begin training with. What is not set here, training takes from `evaluation.oracle`.

    Attributes:
        tasks: number of unseen tasks.
        seeds: trainings of each task from each start.
        samplers: (sampler, steps) pairs; each makes one start, the first is compared with all others.
        learning_rates: among which each start has its own chosen.
        tuning_tasks: further unseen tasks, on which it is chosen.
        tuning_seeds: trainings of each of those for each start and learning rate.
        steps: where the curves are measured; training ends at the last.
        few: the one of them that stands for a short training.
        share: of the oracle's accuracy, to be reached.
        loss_samples: training features of each task on which the loss is measured.
    """

    tasks: PositiveInt = 30
    seeds: PositiveInt = 5
    samplers: tuple[SamplerSteps, ...] = Field(default=(("mean", 1),), min_length=1)
    learning_rates: tuple[PositiveFloat, ...] = Field(
        default=(3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1), min_length=1
    )
    tuning_tasks: PositiveInt = 10
    tuning_seeds: PositiveInt = 1
    steps: tuple[NonNegativeInt, ...] = (0, 1, 2, 5, 10, 20, 35, 50, 75, 100, 150, 200, 300, 400, 500, 600)
    few: PositiveInt = 20
    share: Share = 0.95
    loss_samples: PositiveInt = 1024

    @model_validator(mode="after")
    def _steps_make_a_curve(self) -> InitSettings:
        if self.steps[:1] != (0,) or len(self.steps) < 2 or any(a >= b for a, b in pairwise(self.steps)):
            raise ValueError(f"steps {list(self.steps)} must begin with 0, rise, and go on beyond it")
        if self.few not in self.steps:
            raise ValueError(f"few is {self.few}: choose one of steps, {list(self.steps[1:])}")
        return self


class LandscapeSettings(SuiteSettings):
    """The loss around trained heads. They are trained by `evaluation.oracle`.

    Attributes:
        tasks: number of unseen tasks; surfaces are drawn for the first, together with the second.
        sampler: (sampler, steps) that makes the generated start.
        samples: training features of each task on which the loss is measured.
        line_points: points of the line between two heads.
        radii: lengths of random steps, relative to the length of each filter.
        directions: random directions for each task and start.
        surface_points: points of a surface along each of its two directions.
        random_extent: a surface of random directions reaches from minus this to this, in filter lengths.
        task_extent: a surface of training directions does so in lengths of the training's own change.
    """

    tasks: Annotated[int, Field(ge=2)] = 30
    sampler: SamplerSteps = ("mean", 1)
    samples: PositiveInt = 1024
    line_points: Annotated[int, Field(ge=3)] = 21
    radii: tuple[PositiveFloat, ...] = Field(default=(0.1, 0.25, 0.5, 1.0), min_length=1)
    directions: PositiveInt = 8
    surface_points: Annotated[int, Field(ge=3)] = 33
    random_extent: PositiveFloat = 1.0
    task_extent: PositiveFloat = 4.0


class EnhanceSettings(SuiteSettings):
    """Heads whose training was stopped early, and what improves them.

    Attributes:
        tasks: number of unseen tasks.
        starts: where training starts: the zoo's base or universal head, or PyTorch's initialisation, another one for
            every task.
        shares: after which shares of `evaluation.oracle.steps` it is stopped.
        strengths: at least one of them between 0 and 1.
        samplers: (sampler, steps) pairs.
    """

    tasks: Annotated[int, Field(ge=2)] = 100
    starts: tuple[Literal["base", "universal", "default"], ...] = Field(
        default=("universal", "base", "default"), min_length=1
    )
    shares: tuple[Between, ...] = Field(default=(0.1, 0.25, 0.5, 0.75), min_length=1)
    strengths: tuple[Annotated[float, Field(ge=0, le=1)], ...] = (
        0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0,
    )  # fmt: skip
    samplers: tuple[SamplerSteps, ...] = Field(default=(("mean", 1), ("ddim", 20)), min_length=1)

    @field_validator("strengths")
    @classmethod
    def _one_enhances(cls, strengths: tuple[float, ...]) -> tuple[float, ...]:
        if not any(0 < strength < 1 for strength in strengths):
            raise ValueError(f"{list(strengths)}: 0 returns the head and 1 ignores it, give one between them")
        return strengths


class MemorisationSettings(SuiteSettings):
    """Whether the zoo's heads are recalled or new ones made.

    Attributes:
        tasks: number of unseen tasks, and of zoo tasks.
        samplers: (sampler, steps) pairs.
        seeds: samples of one task, and trainings of one task.
        noise: standard deviations of the noise-adding baseline, in units of the zoo heads' own spread.
        neighbours: how many nearest zoo heads the averaging baseline takes, one entry per row.
    """

    tasks: PositiveInt = 100
    samplers: tuple[SamplerSteps, ...] = Field(default=(("mean", 1), ("ddpm", 20)), min_length=1)
    seeds: Annotated[int, Field(ge=2)] = 3
    noise: tuple[PositiveFloat, ...] = (0.3, 1.0)
    neighbours: tuple[PositiveInt, ...] = (2, 8)


class AblationSettings(SuiteSettings):
    """What each part of the method is worth.

    Attributes:
        minutes: wall time of each fit.
        seeds: fits of each variant.
        tasks: tasks of each split, or all it has.
        samplers: (sampler, steps) pairs; a variant's own default is measured beside them.
        variants: which, `full` among them, the preset as it is.
    """

    minutes: PositiveFloat = 10.0
    seeds: PositiveInt = 3
    tasks: PositiveInt = 200
    samplers: tuple[SamplerSteps, ...] = Field(default=(("mean", 1), ("ddim", 20)), min_length=1)
    variants: tuple[VariantName, ...] = get_args(VariantName)

    @field_validator("variants")
    @classmethod
    def _has_something_to_compare_with(cls, names: tuple[VariantName, ...]) -> tuple[VariantName, ...]:
        if "full" not in names or len(set(names)) != len(names):
            raise ValueError(f"{list(names)} must hold full, which all others are compared with, and each name once")
        return names


class GradcamSettings(SuiteSettings):
    """Where generated classifiers look.

    Attributes:
        images: picture folder with test/CLASS/*.png, the classes called as the data's; none, nothing is measured.
        backbone: the one the features were made with, as `t2w features` takes it; by default the one that lies in
            the checkpoint.
        side: of its pictures in pixels, where the features were made with `t2w features --side`.
        tasks: unseen tasks, or all of whose classes the folder has pictures.
        pictures: of each task.
        sampler: (sampler, steps), at least three steps: first, middle and last estimate are shown.
        rows: tasks in the figure, one picture each.
    """

    images: Path | None = None
    backbone: str | None = None
    side: int | None = Field(default=None, ge=8, le=1024)
    tasks: PositiveInt = 50
    pictures: PositiveInt = 16
    sampler: SamplerSteps = ("ddim", 20)
    rows: PositiveInt = 6

    @field_validator("sampler")
    @classmethod
    def _has_three_calls(cls, pair: SamplerSteps) -> SamplerSteps:
        if pair[1] < 3:
            raise ValueError(f"{list(pair)} makes {pair[1]} call(s): first, middle and last need at least 3")
        return pair

    @field_serializer("images", "backbone")
    def _without_folders(self, source: Path | str | None) -> str | None:
        # As the paraphrase tables: results travel without this machine's folders.
        if source is None:
            return None
        kind, colon, place = str(source).rpartition(":")
        return f"{kind}{colon}{Path(place).name}"


class SuitesSettings(BaseModel):
    """One section per suite."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    accuracy: AccuracySettings = AccuracySettings()
    headline: HeadlineSettings = HeadlineSettings()
    denoising: DenoisingSettings = DenoisingSettings()
    reading: ReadingSettings = ReadingSettings()
    fuse: FuseSettings = FuseSettings()
    init: InitSettings = InitSettings()
    landscape: LandscapeSettings = LandscapeSettings()
    enhance: EnhanceSettings = EnhanceSettings()
    memorisation: MemorisationSettings = MemorisationSettings()
    ablation: AblationSettings = AblationSettings()
    gradcam: GradcamSettings = GradcamSettings()

    def samplers(self) -> Iterator[SamplerSteps]:
        """Every (sampler, steps) pair that a suite asks for."""
        for settings in (
            self.headline,
            self.denoising,
            self.reading,
            self.fuse,
            self.init,
            self.enhance,
            self.memorisation,
            self.ablation,
        ):
            yield from settings.samplers
        yield self.landscape.sampler
        yield self.gradcam.sampler

    def unseen_tasks(self) -> dict[str, int]:
        """How many unseen tasks each suite that was set asks for, by the names of the settings that say so.

        Suites left at their defaults are checked when they are run.
        """
        suites = ("denoising", "reading", "landscape", "enhance", "memorisation")
        wanted = {f"{name}.tasks": getattr(self, name).tasks for name in suites if name in self.model_fields_set}
        if "init" in self.model_fields_set:
            wanted["init.tasks + tuning_tasks"] = self.init.tasks + self.init.tuning_tasks
        return wanted
