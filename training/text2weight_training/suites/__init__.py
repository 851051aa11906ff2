"""Evaluation suites by name; a suite's module is imported only when it is asked for.

Each module has `run(run: SuiteRun) -> dict`, which measures and returns what JSON can hold, and
`report(result: dict) -> str`, which makes the suite's Markdown section from that result alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol, cast

from text2weight_training.files import TrainingDataError

if TYPE_CHECKING:
    from text2weight_training.suites.base import SuiteRun

ALL = "all"
# In the order in which `all` runs them and a page shows them.
SUITES = {
    "accuracy": "text2weight_training.suites.accuracy",
    "headline": "text2weight_training.suites.headline",
    "reading": "text2weight_training.suites.reading",
    "denoising": "text2weight_training.suites.denoising",
    "fuse": "text2weight_training.suites.fuse",
    "init": "text2weight_training.suites.init",
    "landscape": "text2weight_training.suites.landscape",
    "enhance": "text2weight_training.suites.enhance",
    "memorisation": "text2weight_training.suites.memorisation",
    "ablation": "text2weight_training.suites.ablation",
    "gradcam": "text2weight_training.suites.gradcam",
}


class SuiteModule(Protocol):
    """What a suite's module offers."""

    def run(self, run: SuiteRun) -> dict[str, Any]:
        """Measure; figures go to `run.out`."""
        ...

    def report(self, result: dict[str, Any]) -> str:
        """The Markdown section of a result of `run`."""
        ...


def choose_suites(names: Sequence[str]) -> list[str]:
    """Suites by name, each once, in the registry's order; `all` stands for every one.

    Raises:
        TrainingDataError: an unknown name.
    """
    for name in names:
        if name not in SUITES and name != ALL:
            raise TrainingDataError(f"no suite {name!r}: choose {', '.join(SUITES)}, or {ALL}")
    return [name for name in SUITES if name in names or ALL in names]


def load_suite(name: str) -> SuiteModule:
    """Import a suite's module."""
    return cast("SuiteModule", import_module(SUITES[name]))
