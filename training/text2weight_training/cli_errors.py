"""How the training commands report what they cannot do: one line on standard error, exit status 2.

Only the standard library is imported here, so that `t2w --help` stays fast.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def one_line_errors(command: Callable[P, R]) -> Callable[P, R]:
    """Turn the errors that name their cause into one line and exit status 2; others keep their traceback.

    Those are `TrainingDataError`, the model library's `Text2WeightError`, and the operating system's
    (a full disk, a folder that cannot be written).
    """

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        from text2weight.errors import Text2WeightError
        from text2weight_training.files import TrainingDataError

        try:
            return command(*args, **kwargs)
        except (TrainingDataError, Text2WeightError, OSError) as error:
            print("error:", " ".join(str(error).split()), file=sys.stderr)
            raise SystemExit(2) from error

    return run


def check_device(name: str) -> str:
    """Return the name of a torch device that this machine has.

    Raises:
        TrainingDataError: torch does not know the name, or the device is not there.
    """
    import torch

    from text2weight_training.files import TrainingDataError

    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        reason = str(error).partition("\n")[0]
        raise TrainingDataError(f"unknown device {name!r}: give cpu, or cuda:0 where it exists ({reason})") from error
    return name
