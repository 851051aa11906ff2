"""The watch over a fit's losses: what it lets pass and what it does not."""

from __future__ import annotations

import math

import pytest

from text2weight_training.loss_watch import EXPLODED, WINDOW, LossWatch


def test_the_limit_is_a_multiple_of_the_median() -> None:
    watch = LossWatch([0.0, 100.0] + [2.0, 3.0] * (WINDOW // 2 - 1))  # median 2.5
    assert watch.complaint(2.5 * EXPLODED) is None
    assert watch.complaint(2.5 * EXPLODED + 0.1) == "the loss exploded from a median of 2.5 to 25.1"


def test_the_first_steps_may_stray_further() -> None:
    watch = LossWatch([2.5] * (WINDOW - 1))
    assert watch.complaint(2.5 * EXPLODED**2) is None
    assert watch.complaint(2.5 * EXPLODED**2 + 1) == "the loss exploded from a median of 2.5 to 251"
    watch.add(2.5)
    assert watch.complaint(2.5 * EXPLODED**2) is not None


def test_only_the_last_losses_count() -> None:
    watch = LossWatch([1000.0])
    assert watch.complaint(20.0) is None
    for _ in range(WINDOW):
        watch.add(1.0)
    assert watch.losses == [1.0] * WINDOW
    assert watch.complaint(20.0) is not None


def test_the_first_loss_needs_only_be_finite() -> None:
    assert LossWatch().complaint(1e30) is None
    for broken in (math.nan, math.inf):
        assert LossWatch().complaint(broken) == "the loss is not finite"
        assert LossWatch([1.0]).complaint(broken) == "the loss is not finite"


@pytest.mark.parametrize("turns", [[1.0, 2.0] * 100, [5.0 * 0.95**i for i in range(200)], [0.7] * 99 + [3.2]])
def test_what_doubles_falls_or_stands_out_once_is_sound(turns: list[float]) -> None:
    watch = LossWatch()
    for loss in turns:
        assert watch.complaint(loss) is None
        watch.add(loss)


def test_a_watch_goes_on_from_its_losses() -> None:
    watch = LossWatch([1.0, 2.0])
    assert LossWatch(watch.losses).complaint(500.0) == watch.complaint(500.0)
    assert watch.complaint(500.0) is not None
