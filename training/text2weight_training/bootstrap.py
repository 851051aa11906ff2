"""Bootstrap intervals over tasks, paired: every method is judged on the same resampled tasks.

Letters: M tasks, R resamples.
"""

from __future__ import annotations

from typing import Any

import numpy as np

QUANTILES = (0.025, 0.975)


class PairedBootstrap:
    """A fixed set of resamples of M tasks, drawn once and used for all methods."""

    def __init__(self, count: int, resamples: int, seed: int) -> None:
        """Draw the resamples.

        Args:
            count: M.
            resamples: R.
            seed: of the draws.
        """
        self._draws = np.random.default_rng(seed).integers(0, count, (resamples, count))  # (R, M)

    def means(self, values: np.ndarray) -> np.ndarray:
        """Mean of values (M,) in every resample: (R,)."""
        means: np.ndarray = values[self._draws].mean(1, dtype=np.float64)
        return means

    def summary(self, values: np.ndarray) -> dict[str, Any]:
        """Mean of values (M,) and its 95 % interval: {"value", "interval"}."""
        return {"value": float(values.mean(dtype=np.float64)), "interval": interval(self.means(values))}

    def gap_closed(self, values: np.ndarray, floor: np.ndarray, ceiling: np.ndarray) -> dict[str, Any]:
        """Share of the gap between two methods that a third one closes, and its interval.

        Args:
            values: (M,) accuracies of the method.
            floor: (M,) accuracies of the method that closes nothing.
            ceiling: (M,) accuracies of the one that closes all.

        Returns:
            {"value", "interval"}; the value is None where the ceiling is no higher than the floor, the interval
            where that is so in a resample.
        """
        gain, gap = float(values.mean() - floor.mean()), float(ceiling.mean() - floor.mean())
        floors = self.means(floor)  # (R,)
        gains, gaps = self.means(values) - floors, self.means(ceiling) - floors  # (R,)
        return {
            "value": gain / gap if gap > 0 else None,
            "interval": interval(gains / gaps) if gaps.min() > 0 else None,
        }

    def root_mean(self, squares: np.ndarray) -> dict[str, Any]:
        """Root of the mean of squares (M,), such as variances, and its 95 % interval: {"value", "interval"}."""
        return {
            "value": float(np.sqrt(squares.mean(dtype=np.float64))),
            "interval": interval(np.sqrt(self.means(squares))),
        }


def interval(values: np.ndarray) -> list[float]:
    """95 % interval of resampled values (R,): [low, high]."""
    return [float(value) for value in np.quantile(values, QUANTILES)]
