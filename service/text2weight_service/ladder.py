"""How many rows the next denoiser call should have, and how long it will take.

Calls have few different sizes, the rungs of a ladder: equal shapes give an item the same bits whatever its neighbours
are, and a device that records its work by shape (CUDA graphs) has few to record.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

# Of the best rate, what a smaller call may give away: it is over sooner, and who comes next waits less.
_WORTH = 0.9
# After running out of memory, so many calls at the smaller size before a larger one is tried.
CALLS_TO_RECOVER = 100
# The weight of older measurements shrinks by this factor with each new one.
_DECAY = 0.95
# A measurement counts as at most so many times what was expected: a pause of the machine is not the model's time.
_MOST_SURPRISE = 3.0
# A call that takes less than this share of what was expected shrinks all older measurements by it.
_SURELY_FASTER = 0.5


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out; torch has no class of its own for that on the CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)


@dataclass(frozen=True)
class Shape:
    """What samples must have in common to share a denoiser call.

    Attributes:
        capacity: class tokens of each, padding included.
        guided: whether each takes two rows of the network.
    """

    capacity: int
    guided: bool

    def tokens(self, rows: int, weight_tokens: int) -> int:
        """Tokens that a call with so many samples puts through the network."""
        return rows * (1 + self.guided) * (weight_tokens + self.capacity)


class StepTimes:
    """Seconds of a denoiser call as a line in its tokens, fitted to the calls so far, recent ones first. Thread-safe.

    A call costs something however small it is, and then about the same for every token; so a few measured shapes tell
    of all the others.
    """

    def __init__(self, weight_tokens: int) -> None:
        """Know nothing yet.

        Args:
            weight_tokens: of one head.
        """
        self._weight_tokens = weight_tokens
        self._lock = threading.Lock()
        # Weighted sums over calls of 1, x, t, x x, x t; x tokens, t seconds.
        self._sums = [0.0] * 5
        self._base_s = 0.0
        self._token_s = 0.0
        self.measured_at = -math.inf  # `time.monotonic()` of the latest measurement

    def seconds(self, shape: Shape, rows: int) -> float:
        """Expected time of a call; 0 before anything was measured."""
        return self._base_s + self._token_s * shape.tokens(rows, self._weight_tokens)

    def add(self, shape: Shape, rows: int, seconds: float) -> None:
        """Learn from one call."""
        x = shape.tokens(rows, self._weight_tokens)
        with self._lock:
            expected = self._base_s + self._token_s * x
            t = min(seconds, _MOST_SURPRISE * expected) if expected > 0 else seconds
            if t < _SURELY_FASTER * expected:
                # No pause makes a call short: it was the machine that was slow before, whatever the size of a call.
                self._sums[2] *= _SURELY_FASTER
                self._sums[4] *= _SURELY_FASTER
            self._sums = [_DECAY * old + new for old, new in zip(self._sums, (1, x, t, x * x, x * t), strict=True)]
            count, sum_x, sum_t, sum_xx, sum_xt = self._sums
            mean_x, mean_t = sum_x / count, sum_t / count
            variance = sum_xx / count - mean_x**2
            if variance > 1e-4 * mean_x**2:
                self._token_s = max((sum_xt / count - mean_x * mean_t) / variance, 0.0)
            # Calls of one size say nothing about the slope. It must not explain more than all of the time either.
            self._token_s = min(self._token_s, mean_t / mean_x)
            self._base_s = mean_t - self._token_s * mean_x
            self.measured_at = time.monotonic()


class Ladder:
    """The sizes of denoiser calls: 1, 2, 4, ... up to the largest. Belongs to the model's thread."""

    def __init__(self, most: int) -> None:
        """Make the rungs up to `most`, which is one itself."""
        self.rungs = sorted({2**i for i in range(most.bit_length()) if 2**i <= most} | {most})
        self.most = most
        self._calls = 0

    def choose(self, count: int, seconds: Callable[[int], float]) -> int:
        """The rows of a call when `count` samples wait for one.

        It is the rung that moves most samples per second, or a smaller one that is nearly as good. So 5 samples are
        4 and 1 where time grows with the rows, as on a CPU, and 8 rows where it does not, as on a large GPU.

        Args:
            count: at least 1.
            seconds: expected time of a call by its rows.
        """
        rungs = [rung for rung in self.rungs if rung <= self.most]
        rates = [min(count, rung) / max(seconds(rung), 1e-9) for rung in rungs]
        return next(rung for rung, rate in zip(rungs, rates, strict=True) if rate >= _WORTH * max(rates))

    def at_least(self, count: int) -> int:
        """The smallest rung that holds `count` samples."""
        return next(rung for rung in self.rungs if rung >= count)

    def shrink(self, rows: int) -> None:
        """A call of so many rows ran out of memory: make none larger than half of it for a while."""
        smaller = max(rung for rung in self.rungs if rung <= max(rows // 2, 1))
        self.most = min(self.most, smaller)  # a call that began before an earlier failure may have been larger
        self._calls = 0

    def succeeded(self) -> None:
        """A call succeeded; after many of them the next larger size is tried again."""
        if self.most == self.rungs[-1]:
            return
        self._calls += 1
        if self._calls >= CALLS_TO_RECOVER:
            self.most = self.at_least(self.most + 1)
            self._calls = 0
