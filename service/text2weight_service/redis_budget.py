"""How long one request may wait for Redis, over all the calls it makes.

A request has its budget in a context variable, so that its tasks share it. What others may want to have, too, goes on
when the budget of a request is over: only the request leaves. Work that no request waits for has no budget.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from contextvars import ContextVar, copy_context
from typing import Any, TypeVar

T = TypeVar("T")


class RequestBudget:
    """Time that a request may still wait for Redis; waits at the same time count once. Belongs to one event loop."""

    def __init__(self, total_s: float) -> None:
        """Start with all of the time."""
        self._left_s = total_s  # while nobody waits
        self._ends_at = 0.0  # while somebody does, by the event loop's clock
        self._waits: set[asyncio.Timeout] = set()

    @property
    def left_s(self) -> float:
        """Seconds that are left, not below 0."""
        left_s = self._ends_at - asyncio.get_running_loop().time() if self._waits else self._left_s
        return max(left_s, 0.0)

    @asynccontextmanager
    async def wait(self) -> AsyncIterator[None]:
        """Count the time within.

        Raises:
            TimeoutError: the budget is over.
        """
        if not self._waits:
            self._ends_at = asyncio.get_running_loop().time() + self._left_s
        async with asyncio.timeout_at(self._ends_at) as timeout:
            self._waits.add(timeout)
            try:
                yield
            finally:
                left_s = self.left_s
                self._waits.discard(timeout)
                self._left_s = left_s

    def shorten(self, left_s: float) -> None:
        """Leave at most so much, to those who wait now as well."""
        if left_s >= self.left_s:
            return
        self._left_s = left_s
        self._ends_at = asyncio.get_running_loop().time() + left_s
        for timeout in self._waits:
            if not timeout.expired():
                timeout.reschedule(self._ends_at)


_current: ContextVar[RequestBudget | None] = ContextVar("t2w_redis_budget", default=None)


@contextmanager
def request_budget(total_s: float) -> Iterator[None]:
    """Give what runs within, and the tasks it starts, one budget together."""
    token = _current.set(RequestBudget(total_s))
    try:
        yield
    finally:
        _current.reset(token)


def current_budget() -> RequestBudget | None:
    """The budget of the request that this task works for; None where no request waits."""
    return _current.get()


def share_budget(other: RequestBudget | None) -> None:
    """Wait for what another request has started: from now on both have the smaller budget of the two, together."""
    own = _current.get()
    if own is not None and other is not None and own is not other:
        other.shorten(own.left_s)
        _current.set(other)


def budget_is_over() -> bool:
    """Whether this task's request must not wait for Redis any more."""
    budget = _current.get()
    return budget is not None and budget.left_s <= 0


async def wait_within_budget(tasks: Collection[asyncio.Task[Any]]) -> None:
    """Wait until all tasks are done or the request's budget is over; the tasks go on."""
    budget = _current.get()
    if budget is None:
        await asyncio.wait(tasks)
        return
    with suppress(TimeoutError):
        async with budget.wait():
            await asyncio.wait(tasks)


def task_without_budget(work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
    """Start work that no request waits for, or none longer than its own budget."""
    context = copy_context()
    context.run(_current.set, None)
    return asyncio.create_task(work, context=context)
