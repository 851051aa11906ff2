"""Settings of the evaluation suites: the `suites` section of a preset. Defaults are for a full measurement."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, field_serializer, field_validator

from text2weight.samplers import SamplerName
from text2weight_training.stacked import HeadRecipe

Share = Annotated[float, Field(gt=0, le=1)]
Between = Annotated[float, Field(gt=0, lt=1)]
SamplerSteps = tuple[SamplerName, PositiveInt]


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


class AccuracySettings(SuiteSettings):
    """Every baseline on every split.

    Attributes:
        tasks: tasks of each split, or all it has.
        oracle_seeds: heads trained on each task's own data, from each start.
        restricted_universal: recipe of the universal head that is trained on tasks; `batch_size` counts
            samples per task.
        restricted_tasks: tasks per step of it.
        hypernetwork: recipe of the MLP hypernetwork; `batch_size` counts zoo heads per step.
    """

    tasks: PositiveInt = 200
    oracle_seeds: PositiveInt = 3
    restricted_universal: HeadRecipe = HeadRecipe(steps=3000, batch_size=64, learning_rate=1e-3, weight_decay=1.0)
    restricted_tasks: PositiveInt = 16
    hypernetwork: HeadRecipe = HeadRecipe(steps=2000, batch_size=64, learning_rate=1e-3, weight_decay=0.01)


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
    scales: tuple[PositiveFloat, ...] = Field(default=(0.1, 0.2, 0.3, 0.5, 0.7, 1.0), min_length=1)
    density: Share = 0.2
    regmean_decay: Share = 0.9
    selection_samples: PositiveInt = 512


class EnhanceSettings(SuiteSettings):
    """Heads whose training was stopped early, and what improves them.

    Attributes:
        tasks: number of unseen tasks.
        starts: where training starts: the zoo's base or universal head, or PyTorch's initialisation, another one for
            every task.
        shares: after which shares of `evaluation.oracle.steps` it is stopped.
        strengths: at least one of them between 0 and 1.
        samplers: (sampler, steps) pairs.
        factors: shares of the generated head when it is interpolated with the stopped one.
    """

    tasks: Annotated[int, Field(ge=2)] = 100
    starts: tuple[Literal["base", "universal", "default"], ...] = Field(default=("base", "default"), min_length=1)
    shares: tuple[Between, ...] = Field(default=(0.1, 0.25, 0.5, 0.75), min_length=1)
    strengths: tuple[Annotated[float, Field(ge=0, le=1)], ...] = (
        0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0,
    )  # fmt: skip
    samplers: tuple[SamplerSteps, ...] = Field(default=(("mean", 1), ("ddim", 20)), min_length=1)
    factors: tuple[Between, ...] = Field(default=(0.1, 0.25, 0.5, 0.75, 0.9), min_length=1)

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


class SuitesSettings(BaseModel):
    """One section per suite."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    accuracy: AccuracySettings = AccuracySettings()
    denoising: DenoisingSettings = DenoisingSettings()
    reading: ReadingSettings = ReadingSettings()
    fuse: FuseSettings = FuseSettings()
    enhance: EnhanceSettings = EnhanceSettings()
    memorisation: MemorisationSettings = MemorisationSettings()

    def samplers(self) -> Iterator[SamplerSteps]:
        """Every (sampler, steps) pair that a suite asks for."""
        for settings in (self.denoising, self.reading, self.fuse, self.enhance, self.memorisation):
            yield from settings.samplers

    def unseen_tasks(self) -> dict[str, int]:
        """How many unseen tasks each suite asks for."""
        return {name: getattr(self, name).tasks for name in ("denoising", "reading", "enhance", "memorisation")}
