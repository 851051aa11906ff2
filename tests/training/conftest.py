"""A toy problem and one finished training run on it, made once and read by many tests."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.toy import hard_preset, toy_preset, write_toy_files
from text2weight_training.presets import Preset
from text2weight_training.suites.base import SuiteRun
from text2weight_training.tasks import TaskData, load_task_data
from text2weight_training.zoo import Zoo, build_zoo


@dataclass(frozen=True)
class Toy:
    """Files and data of the toy problem; read them, never write to them."""

    features: Path
    text: str
    data: TaskData
    preset: Preset
    zoo_folder: Path
    zoo: Zoo


@dataclass(frozen=True)
class ToyRun:
    """A finished `train` on the toy problem."""

    out: Path
    preset: Preset
    result: dict[str, Any]


@pytest.fixture(scope="session")
def one_thread() -> Iterator[None]:
    """Sums in one order, so that runs in different processes can be compared bit by bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Toy:
    folder = tmp_path_factory.mktemp("toy")
    features, text = write_toy_files(folder)
    data, preset = load_task_data([features], text), toy_preset()
    return Toy(features, text, data, preset, folder / "zoo", build_zoo(data, preset, folder / "zoo"))


@pytest.fixture(scope="session")
def toy_run(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> ToyRun:
    from text2weight_training.train import train

    out = tmp_path_factory.mktemp("run")
    preset = toy_preset(fit__steps=100, fit__save_every=50, fit__learning_rate=1e-2)
    return ToyRun(out, preset, train(toy.data, preset, out))


@dataclass(frozen=True)
class ToySuites:
    """Every suite's results on the toy run, as `run_suites` wrote them into `out`."""

    out: Path
    written: dict[str, dict[str, Any]]

    def result(self, name: str) -> dict[str, Any]:
        result: dict[str, Any] = self.written[name]["result"]
        return result


@pytest.fixture(scope="session")
def toy_suites(toy: Toy, toy_run: ToyRun, tmp_path_factory: pytest.TempPathFactory) -> ToySuites:
    from text2weight_training.suites.runner import run_suites

    out = tmp_path_factory.mktemp("suites")
    every = run_suites(["all"], toy.data, toy.zoo, toy_run.out / "checkpoint", toy_run.preset, out)
    return ToySuites(out, {written["suite"]: written for written in every})


@pytest.fixture(scope="session")
def suite_run(toy: Toy, toy_run: ToyRun, tmp_path_factory: pytest.TempPathFactory) -> SuiteRun:
    """What a suite is given for the toy run."""
    from text2weight_training.evaluate import load_generator

    generator = load_generator(toy_run.out / "checkpoint", toy.data, toy.zoo, toy_run.preset)
    return SuiteRun(toy.data, toy.zoo, generator, toy_run.preset, tmp_path_factory.mktemp("suite"))


@pytest.fixture(scope="session")
def hard_toy(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> Toy:
    """The toy problem with three of its twelve classes and four pairs of the others held out."""
    preset, folder = hard_preset(), tmp_path_factory.mktemp("hard") / "zoo"
    return replace(toy, preset=preset, zoo_folder=folder, zoo=build_zoo(toy.data, preset, folder))
