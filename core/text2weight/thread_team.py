"""Threads that make calls, each with a number of torch's threads of its own.

torch keeps that number for each thread, and one for threads that are new: a thread that sets its own sets the other,
too. And a thread takes the number for new ones over its own when it is first asked, however late.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from queue import SimpleQueue
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")

_Calls = SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None]

# While one team starts, the number for new threads is not what others should find.
_starting = threading.Lock()


class ThreadTeam:
    """So many threads for calls; they end with `close`, or once nobody has the team any more.

    Daemons: a call that hangs does not keep the process from ending.
    """

    def __init__(self, name: str, count: int, threads_each: int) -> None:
        """Start the threads.

        Args:
            name: of the threads, with their numbers.
            count: how many.
            threads_each: on how many of torch's threads each computes. For others, new ones too, nothing changes.
        """
        self._calls: _Calls = SimpleQueue()
        with _starting:
            for_new = _in_new_thread(torch.get_num_threads)
            started = threading.Barrier(count + 1)
            arguments = (self._calls, threads_each, started)
            self._threads = [
                threading.Thread(target=_serve, args=arguments, name=f"{name}-{i}", daemon=True) for i in range(count)
            ]
            for thread in self._threads:
                thread.start()
            started.wait()
            _in_new_thread(partial(torch.set_num_threads, for_new))
        self._end = weakref.finalize(self, _end, self._calls, count)

    def submit(self, call: Callable[[], Result]) -> Future[Result]:
        """Have a call made by the first thread that is free; what it returns or raises comes in the future."""
        future: Future[Result] = Future()
        self._calls.put((future, call))
        return future

    def close(self) -> None:
        """Return when all calls have ended, and with them the threads."""
        self._end()
        for thread in self._threads:
            thread.join()


def _serve(calls: _Calls, threads: int, started: threading.Barrier) -> None:
    torch.get_num_threads()  # which sets it to that of new threads, and would later, over this thread's own
    torch.set_num_threads(threads)
    started.wait()
    while (work := calls.get()) is not None:
        future, call = work
        try:
            result = call()
        except BaseException as error:  # whatever it is, who submitted the call must learn that it has ended
            future.set_exception(error)
        else:
            future.set_result(result)
            del result
        del work, future, call  # until the next one comes, nothing may keep what this one used


def _end(calls: _Calls, count: int) -> None:
    for _ in range(count):
        calls.put(None)


def _in_new_thread(call: Callable[[], Result]) -> Result:
    with ThreadPoolExecutor(1) as fresh:
        return fresh.submit(call).result()
