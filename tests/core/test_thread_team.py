"""Threads with a number of torch's threads of their own."""

import gc
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests.patience import PATIENCE_S
from text2weight.thread_team import ThreadTeam


@pytest.fixture
def open_team() -> Iterator[Callable[[int, int], ThreadTeam]]:
    opened: list[ThreadTeam] = []

    def open_one(count: int, threads_each: int) -> ThreadTeam:
        opened.append(ThreadTeam("test", count, threads_each))
        return opened[-1]

    yield open_one
    for team in opened:
        team.close()


def number_in_a_new_thread() -> int:
    with ThreadPoolExecutor(1) as fresh:
        return fresh.submit(torch.get_num_threads).result()


@pytest.mark.usefixtures("four_threads")
@pytest.mark.parametrize(("count", "each"), [(1, 4), (2, 2), (3, 1), (8, 1)])
def test_each_thread_has_its_number_and_others_keep_theirs(
    open_team: Callable[[int, int], ThreadTeam], count: int, each: int
) -> None:
    team = open_team(count, each)
    together = threading.Barrier(count)
    seen: list[int] = []

    def call() -> int:
        together.wait(PATIENCE_S)  # which only calls that are made at once can pass
        seen.append(torch.get_num_threads())
        return 7

    assert [ended.result(PATIENCE_S) for ended in [team.submit(call) for _ in range(count)]] == [7] * count
    assert seen == [each] * count
    assert torch.get_num_threads() == number_in_a_new_thread() == 4


@pytest.mark.usefixtures("four_threads")
def test_teams_that_start_within_teams_change_nothing_for_others(
    open_team: Callable[[int, int], ThreadTeam],
) -> None:
    outer = open_team(2, 2)
    together = threading.Barrier(2)

    def start_another() -> tuple[int, int]:
        together.wait(PATIENCE_S)
        inner = ThreadTeam("inner", 2, 1)
        own = inner.submit(torch.get_num_threads).result(PATIENCE_S)
        inner.close()
        return torch.get_num_threads(), own

    assert [ended.result(PATIENCE_S) for ended in [outer.submit(start_another) for _ in range(2)]] == [(2, 1)] * 2
    assert torch.get_num_threads() == number_in_a_new_thread() == 4


@pytest.mark.parametrize("error", [ValueError("of a call"), SystemExit("of a thread")])
def test_a_thread_survives_whatever_a_call_raises(
    open_team: Callable[[int, int], ThreadTeam], error: BaseException
) -> None:
    team = open_team(1, 1)

    def fail() -> None:
        raise error

    assert team.submit(fail).exception(PATIENCE_S) is error
    assert team.submit(lambda: 7).result(PATIENCE_S) == 7


def test_threads_end_once_nobody_has_the_team() -> None:
    team = ThreadTeam("forgotten", 2, 1)
    threads = list(team._threads)
    assert all(thread.is_alive() for thread in threads)
    del team
    gc.collect()
    for thread in threads:
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
