"""How many threads a worker computes with."""

import os
from pathlib import Path

import pytest
import torch

from text2weight.generator import Generator
from text2weight_service import model
from text2weight_service.model import load_model, usable_cores
from text2weight_service.settings import Settings


@pytest.mark.parametrize(
    ("quota", "expected"),
    [
        ("200000 100000\n", 2),
        ("250000 100000\n", 2),
        ("50000 100000\n", 1),
        ("1600000 100000\n", 8),
        ("max 100000\n", 8),
        ("nonsense", 8),
        (None, 8),
    ],
)
def test_usable_cores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, quota: str | None, expected: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(model, "_QUOTA", tmp_path / "cpu.max")
    if quota is not None:
        (tmp_path / "cpu.max").write_text(quota)
    assert usable_cores() == expected


@pytest.mark.parametrize(
    ("asked", "of_torch", "usable", "expected"),
    [(None, 64, 4, 4), (None, 2, 4, 2), (6, 64, 4, 6), (1, 64, 4, 1)],
    ids=["a quota", "OMP_NUM_THREADS", "more than the quota, as asked", "fewer, as asked"],
)
def test_threads_of_torch(
    monkeypatch: pytest.MonkeyPatch, asked: int | None, of_torch: int, usable: int, expected: int
) -> None:
    taken: list[int] = []
    monkeypatch.setattr(model, "usable_cores", lambda: usable)
    monkeypatch.setattr(torch, "get_num_threads", lambda: of_torch)
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    monkeypatch.setattr(Generator, "load", lambda *_, **__: taken)
    assert load_model(Settings(torch_threads=asked)) is taken
    assert taken == [expected]
