"""Sizes of denoiser calls, their expected times, and who takes part in the next one."""

import random
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from text2weight_service.ladder import CALLS_TO_RECOVER, Ladder, Shape, StepTimes, is_out_of_memory
from text2weight_service.schedule import FAIR_TURN, Running, choose_call

FEW = Shape(8, guided=False)


def on_a_processor(rows: int) -> float:
    """Seconds of a call as measured on two cores: something to begin with, then as much for every row."""
    return 0.0039 + 0.0021 * rows


def on_a_device(rows: int) -> float:
    """Seconds of a call that a device does at once, however many rows it has."""
    return 0.002


@pytest.mark.parametrize(("most", "rungs"), [(1, [1]), (2, [1, 2]), (32, [1, 2, 4, 8, 16, 32]), (12, [1, 2, 4, 8, 12])])
def test_rungs(most: int, rungs: list[int]) -> None:
    assert Ladder(most).rungs == rungs


def test_five_are_four_and_one_where_rows_cost_and_eight_rows_where_they_do_not() -> None:
    assert Ladder(32).choose(5, on_a_processor) == 4
    assert Ladder(32).choose(5, on_a_device) == 8
    assert Ladder(32).choose(8, on_a_processor) == 8


def test_a_call_is_no_larger_than_pays() -> None:
    assert Ladder(32).choose(32, on_a_processor) == 16
    assert Ladder(32).choose(32, on_a_device) == 32


@given(count=st.integers(1, 100), most=st.integers(1, 64), base=st.floats(0, 1), per_row=st.floats(0, 1))
def test_any_choice_is_a_rung(count: int, most: int, base: float, per_row: float) -> None:
    ladder = Ladder(most)
    rows = ladder.choose(count, lambda rows: base + per_row * rows)
    assert rows in ladder.rungs
    assert ladder.at_least(rows) == rows


def test_out_of_memory_halves_the_largest_call_which_grows_again() -> None:
    ladder = Ladder(32)
    ladder.shrink(32)
    assert ladder.most == 16
    ladder.shrink(16)
    assert (ladder.most, ladder.choose(100, on_a_device)) == (8, 8)
    for _ in range(CALLS_TO_RECOVER):
        assert ladder.most == 8
        ladder.succeeded()
    assert ladder.most == 16
    for _ in range(CALLS_TO_RECOVER):
        ladder.succeeded()
    assert ladder.most == 32
    ladder.shrink(1)
    assert ladder.most == 1


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 7 bytes"),
        RuntimeError("cuBLAS: out of memory"),
    ],
)
def test_errors_of_memory(error: Exception) -> None:
    assert is_out_of_memory(error)
    assert not is_out_of_memory(RuntimeError("device lost"))
    assert not is_out_of_memory(ValueError("out of memory"))


def test_times_of_shapes_that_were_never_measured_follow_from_others() -> None:
    times = StepTimes(17)
    assert times.seconds(FEW, 4) == 0
    source = random.Random(0)
    for _ in range(100):
        rows = source.choice([1, 2, 4, 8])
        times.add(FEW, rows, on_a_processor(rows) * source.uniform(0.98, 1.02))
    assert times.seconds(FEW, 32) == pytest.approx(on_a_processor(32), rel=0.1)
    # 49 tokens in place of 25, and twice as many with guidance.
    assert times.seconds(Shape(32, guided=False), 8) == pytest.approx(0.0039 + 0.0021 * 8 * 49 / 25, rel=0.1)
    assert times.seconds(Shape(8, guided=True), 8) == pytest.approx(on_a_processor(16), rel=0.1)


def test_times_follow_a_machine_that_slows_down() -> None:
    times = StepTimes(17)
    for rows in (1, 2, 4, 8) * 10:
        times.add(FEW, rows, on_a_processor(rows))
    for _ in range(150):
        times.add(FEW, 4, 2 * on_a_processor(4))
    assert times.seconds(FEW, 4) == pytest.approx(2 * on_a_processor(4), rel=0.05)
    assert times.seconds(FEW, 1) <= times.seconds(FEW, 4) <= times.seconds(FEW, 8)


def test_one_pause_of_the_machine_is_not_the_models_time() -> None:
    times = StepTimes(17)
    for rows in (1, 2, 4, 8) * 10:
        times.add(FEW, rows, on_a_processor(rows))
    times.add(FEW, 1, 60.0)
    assert times.seconds(FEW, 1) < 2 * on_a_processor(1)


def test_times_follow_a_machine_that_is_fast_again_at_once_and_for_all_sizes() -> None:
    times = StepTimes(17)
    for rows in (1, 2, 4, 8) * 50:
        times.add(FEW, rows, 30 * on_a_processor(rows))
    for _ in range(8):
        times.add(FEW, 1, on_a_processor(1))
    for rows in (1, 8, 32):
        assert on_a_processor(rows) < times.seconds(FEW, rows) < 2.5 * on_a_processor(rows)


def one(left: int, *, last_turn: int = 0, capacity: int = 8, guided: bool = False, deadline: float = 0.0) -> Running:
    """A running item with so many calls left."""
    item: Any = SimpleNamespace(calls_left=left, guided=guided, deadline=deadline)
    mask = torch.ones(1, capacity, dtype=torch.bool)  # (1, K)
    return Running(item, cast("Any", SimpleNamespace(condition=SimpleNamespace(mask=mask))), last_turn)


def choose(running: list[Running], turn: int = 1, most: int = 4, lanes: int = 1) -> list[Running]:
    return choose_call(running, turn, Ladder(most), lambda _, rows: on_a_processor(rows), lanes)[0]


def test_the_fewest_calls_left_go_first_and_the_earliest_deadline_among_equals() -> None:
    long, late, early = one(200), one(1, deadline=9.0), one(1, deadline=8.0)
    assert choose([long, late, early], most=1) == [early]
    assert choose([long, late, early], most=2) == [early, late]


def test_only_what_has_one_shape_shares_a_call() -> None:
    running = [one(1), one(2, capacity=16), one(3), one(4, guided=True)]
    assert choose(running) == [running[0], running[2]]


def test_lanes_that_are_free_share_what_waits() -> None:
    running = [one(1) for _ in range(8)]
    assert len(choose(running, most=8, lanes=1)) == 8
    assert len(choose(running, most=8, lanes=2)) == 4
    assert len(choose(running[:1], most=8, lanes=2)) == 1


@given(longs=st.lists(st.tuples(st.integers(2, 500), st.sampled_from([8, 16])), min_size=1, max_size=12))
def test_nobody_starves_while_short_requests_keep_coming(longs: list[tuple[int, int]]) -> None:
    """With n running, each makes a call at least every 4 n calls, whatever comes."""
    waiting = [one(left, capacity=capacity) for left, capacity in longs]
    for turn in range(1, 8 * FAIR_TURN * len(waiting)):
        shorts = [one(1, last_turn=turn - 1) for _ in range(4)]
        for member in choose([*waiting, *shorts], turn):
            member.last_turn = turn
        assert all(turn - long.last_turn <= FAIR_TURN * (len(waiting) + len(shorts)) for long in waiting)
