"""Fixtures for every room."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# A shared machine may stall any single example, and the drawing of it; the whole test has a time limit of its own.
settings.register_profile("text2weight", deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("text2weight")

# Nothing here may reach a model hub, whatever a library would like to look up.
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny checkpoint with random weights; read it, never write to it."""
    from tests.tiny import save_tiny_checkpoint

    folder = tmp_path_factory.mktemp("tiny") / "checkpoint"
    save_tiny_checkpoint(folder)
    return folder


@pytest.fixture
def four_threads() -> Iterator[None]:
    """Have torch compute on four threads."""
    from tests.torch_threads import torch_threads

    with torch_threads(4):
        yield
