"""Timing in turns, and the figures that are reported."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np


def interleave(
    actions: Mapping[str, Callable[[int], object]], *, repeats: int, warmup: int, pause_s: float = 0.0
) -> dict[str, list[float]]:
    """Time several actions in turns, in changing order.

    Args:
        actions: each is called with the number of its round, from 0.
        repeats: rounds that count.
        warmup: rounds before them that do not.
        pause_s: rest before every call.

    Returns:
        Seconds of each action's `repeats` calls.
    """
    times: dict[str, list[float]] = {name: [] for name in actions}
    for turn in range(warmup + repeats):
        names = list(actions)
        for name in names if turn % 2 else reversed(names):
            time.sleep(pause_s)
            started = time.perf_counter()
            actions[name](turn)
            spent = time.perf_counter() - started
            if turn >= warmup:
                times[name].append(spent)
    return times


def summary_ms(seconds: Sequence[float]) -> dict[str, float]:
    """Median and spread in milliseconds."""
    low, median, high = np.percentile(np.asarray(seconds) * 1000, [10, 50, 90])
    return {"median": round(float(median), 3), "p10": round(float(low), 3), "p90": round(float(high), 3)}


def significant(value: float, digits: int = 4) -> float:
    """Round to a number of significant digits."""
    return float(f"{value:.{digits}g}")
