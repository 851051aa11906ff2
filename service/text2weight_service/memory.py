"""Gives memory that the process has freed back to the machine.

The C library keeps what is freed for later, in each thread's own arena. A batch larger than any before grows an arena,
and the finished heads that are kept for a while come to lie in between, so that it never shrinks by itself: without
this, a worker holds about as much as its busiest moments needed, one upon the other.
"""

from __future__ import annotations

import ctypes
import time

# A trim takes milliseconds, and the next call some tens of them more, for what it needs again.
TRIM_EVERY_S = 15.0


class FreedMemory:
    """Freed memory of this process. Belongs to one thread; what other threads freed is given back, too."""

    def __init__(self, every_s: float = TRIM_EVERY_S) -> None:
        """Give memory back at most once in `every_s` seconds, the first time at once."""
        # glibc's own; other C libraries keep little, and have no such call.
        self._trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if self._trim is not None:
            self._trim.argtypes = [ctypes.c_size_t]
        self._every_s = every_s
        self._due_at = time.monotonic()

    def give_back(self) -> None:
        """Give it back to the machine where that is due."""
        if self._trim is None or time.monotonic() < self._due_at:
            return
        self._trim(0)
        self._due_at = time.monotonic() + self._every_s
