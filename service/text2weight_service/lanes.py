"""Threads that make the denoiser's calls, while the model's thread begins and finishes requests.

A call computes without the interpreter for most of its time. With two under way, each on half of the processors, one
computes while the other's heads are finished and handed over, and whoever takes a processor from one of them for a
while holds up that one alone.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue

import torch

from text2weight_service.call_watch import CallWatch


class Lanes:
    """So many threads, each with an equal share of torch's.

    The share is the same for every call, and so a call's bits depend on its shape and on nothing else.
    """

    def __init__(self, count: int, watch: CallWatch, on_end: Callable[[], None]) -> None:
        """Start the threads; `watch` goes around each call, and `on_end` is called after it, on its thread."""
        self.count = count
        self._watch = watch
        self._on_end = on_end
        self._calls: SimpleQueue[tuple[Future[float], Callable[[], None]] | None] = SimpleQueue()
        threads = torch.get_num_threads()
        started = threading.Barrier(count + 1)
        arguments = (max(threads // count, 1), started)
        # Daemons: a call that hangs must not keep the process from ending.
        self._threads = [
            threading.Thread(target=self._run, args=arguments, name=f"t2w-lane-{i}", daemon=True) for i in range(count)
        ]
        for thread in self._threads:
            thread.start()
        started.wait()
        torch.set_num_threads(threads)  # what a lane sets for itself is also what new threads begin with

    def submit(self, call: Callable[[], None]) -> Future[float]:
        """Have a call made by the first thread that is free; its seconds or its error come in the future."""
        future: Future[float] = Future()
        self._calls.put((future, call))
        return future

    def close(self) -> None:
        """Return when all calls have ended, and with them the threads."""
        for _ in self._threads:
            self._calls.put(None)
        for thread in self._threads:
            thread.join()

    def _run(self, threads: int, started: threading.Barrier) -> None:
        torch.get_num_threads()  # which takes the number that new threads begin with, and would later, over this one
        torch.set_num_threads(threads)
        started.wait()
        while (work := self._calls.get()) is not None:
            future, call = work
            started_at = time.monotonic()
            try:
                with self._watch:
                    call()
            except BaseException as error:  # whatever it is, who submitted the call must learn that it has ended
                future.set_exception(error)
            else:
                future.set_result(time.monotonic() - started_at)
            self._on_end()
            del work, future, call  # until the next one comes, nothing may keep these samples alive
