"""Paired bootstrap intervals."""

from __future__ import annotations

import numpy as np
import pytest

from text2weight_training.bootstrap import PairedBootstrap, interval


def test_mean_and_interval_of_three_tasks_by_hand() -> None:
    entry = PairedBootstrap(3, 4000, seed=0).summary(np.array([0.5, 0.6, 0.7]))
    # The mean of three draws is lowest in 1 of 27 cases, more than 2.5 % of them.
    assert entry["value"] == pytest.approx(0.6)
    assert entry["interval"] == pytest.approx([0.5, 0.7])


def test_methods_share_their_resamples() -> None:
    bootstrap = PairedBootstrap(4, 500, seed=1)
    first = np.array([0.1, 0.5, 0.3, 0.9])
    # Tasks differ widely, yet the second method is better by 0.05 on each of them.
    np.testing.assert_allclose(bootstrap.means(first + 0.05) - bootstrap.means(first), 0.05)
    assert bootstrap.summary(first + 0.05 - first)["interval"] == pytest.approx([0.05, 0.05])


def test_gap_closed_of_three_tasks_by_hand() -> None:
    bootstrap = PairedBootstrap(3, 400, seed=0)
    floor, ceiling = np.array([0.5, 0.6, 0.7]), np.array([0.7, 0.8, 0.9])
    half = bootstrap.gap_closed(np.array([0.6, 0.7, 0.8]), floor, ceiling)
    assert half["value"] == pytest.approx(0.5)
    assert half["interval"] == pytest.approx([0.5, 0.5])
    assert bootstrap.gap_closed(ceiling, floor, floor) == {"value": None, "interval": None}


def test_root_mean_square() -> None:
    entry = PairedBootstrap(2, 200, seed=0).root_mean(np.array([9.0, 16.0]))
    assert entry["value"] == pytest.approx(12.5**0.5)
    assert entry["interval"] == pytest.approx([3.0, 4.0])


def test_interval_holds_the_middle_95_percent() -> None:
    assert interval(np.arange(1001.0)) == pytest.approx([25.0, 975.0])
