"""Freed memory goes back to the machine, although what is kept lies in between."""

import ctypes
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.service.engines import running, until
from tests.service.fakes import FakeModel
from text2weight_service.memory import FreedMemory

pytestmark = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="the C library cannot do it")

BLOCK = 100_000  # about the bytes of a head
BLOCKS = 2_000
FREED = BLOCK * BLOCKS * 0.9


def resident() -> int:
    """Bytes of this process that the machine holds."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def leave_holes() -> list[bytes]:
    """Allocate a lot and free all but every tenth block, which are returned."""
    return [bytes([i % 251]) * BLOCK for i in range(BLOCKS)][::10]


@pytest.fixture
def kept() -> Iterator[list[bytes]]:
    """Blocks with freed memory between them, in the arena of a thread of its own."""
    FreedMemory().give_back()  # what other tests have freed would be used again, and the process not grow by it
    before = resident()
    with ThreadPoolExecutor(1) as thread:
        kept = thread.submit(leave_holes).result()
        # Half, as an arena that another test's thread has left may still hold tens of megabytes at its top.
        assert resident() - before > FREED / 2, "the C library gave it back by itself: this proves nothing"
        yield kept


def test_what_any_thread_freed_is_given_back(kept: list[bytes]) -> None:
    before = resident()
    FreedMemory().give_back()
    assert before - resident() > FREED / 2
    assert all(block == bytes([10 * i % 251]) * BLOCK for i, block in enumerate(kept))


def test_memory_is_given_back_only_when_that_is_due() -> None:
    freed = FreedMemory(every_s=3600)
    freed.give_back()
    blocks = leave_holes()
    before = resident()
    freed.give_back()
    assert abs(before - resident()) < FREED / 10
    FreedMemory().give_back()
    assert before - resident() > FREED / 2
    del blocks


async def test_a_worker_gives_memory_back(model: FakeModel, kept: list[bytes]) -> None:
    before = resident()
    async with running(model):
        await until(lambda: before - resident() > FREED / 2, "giving memory back")
    del kept
