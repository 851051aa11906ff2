"""Threads that make the denoiser's calls, while the model's thread begins and finishes requests.

A call computes without the interpreter for most of its time. With two under way, each on half of the processors, one
computes while the other's heads are finished and handed over, and whoever takes a processor from one of them for a
while holds up that one alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future

import torch

from text2weight.thread_team import ThreadTeam
from text2weight_service.call_watch import CallWatch


class Lanes:
    """So many threads, each with an equal share of torch's.

    The share is the same for every call, and so a call's bits depend on its shape and on nothing else.
    """

    def __init__(self, count: int, watch: CallWatch, on_end: Callable[[], None]) -> None:
        """Start the threads; `watch` goes around each call, and `on_end` is called after it, on any thread."""
        self.count = count
        self._watch = watch
        self._on_end = on_end
        self._team = ThreadTeam("t2w-lane", count, max(torch.get_num_threads() // count, 1))

    def submit(self, call: Callable[[], None]) -> Future[float]:
        """Have a call made by the first thread that is free; its seconds or its error come in the future."""

        def timed() -> float:
            started_at = time.monotonic()
            with self._watch:
                call()
            return time.monotonic() - started_at

        ended = self._team.submit(timed)
        ended.add_done_callback(lambda _: self._on_end())
        return ended

    def close(self) -> None:
        """Return when all calls have ended, and with them the threads."""
        self._team.close()
