"""Equal requests that are under way at the same time are computed once; each keeps its own deadline."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field

from text2weight_service.metrics import Metrics
from text2weight_service.redis_budget import RequestBudget, current_budget, share_budget
from text2weight_service.work_queue import Generated, WorkItem


@dataclass(eq=False)
class Flight:
    """One computation and who waits for it. Belongs to one event loop.

    Attributes:
        deadline: `time.monotonic()` of the most patient who ever waited.
        item: the computation, once it is queued.
        waiting: how many wait.
        task: resolves with the result.
        budget: its time for Redis, that of the request which started it.
    """

    deadline: float
    item: WorkItem | None = None
    waiting: int = 0
    task: asyncio.Task[Generated] | None = None
    budget: RequestBudget | None = field(default_factory=current_budget)

    def extend(self, deadline: float) -> None:
        """Go on until this deadline at least."""
        self.deadline = max(self.deadline, deadline)
        if self.item is not None:
            self.item.deadline = self.deadline


class Flights:
    """The computations under way, by the key of their work. Belongs to one event loop."""

    def __init__(self, metrics: Metrics) -> None:
        """Start with none."""
        self._flights: dict[str, Flight] = {}
        self._metrics = metrics

    async def wait(
        self, key: str, deadline: float, compute: Callable[[Flight], Coroutine[None, None, Generated]]
    ) -> Generated:
        """Wait for the computation of a key, which is started where there is none.

        It is cancelled as soon as nobody waits any more.

        Args:
            key: of the work.
            deadline: `time.monotonic()` until which to wait.
            compute: makes the computation of a flight.

        Raises:
            TimeoutError: the time is over.
            Exception: whatever the computation raises.
        """
        flight = self._flights.get(key)
        # One that is done but not yet taken off the list was refused or failed for others' reasons.
        if flight is None or (flight.task is not None and flight.task.done()):
            flight = self._flights[key] = Flight(deadline)
            flight.task = asyncio.create_task(compute(flight))
            flight.task.add_done_callback(lambda task: self._landed(key, task))
        else:
            self._metrics.joined.inc()
            share_budget(flight.budget)
        assert flight.task is not None
        flight.extend(deadline)
        flight.waiting += 1
        try:
            await asyncio.wait((flight.task,), timeout=deadline - time.monotonic())
            if not flight.task.done():
                raise TimeoutError
            return flight.task.result()
        finally:
            flight.waiting -= 1
            if flight.waiting == 0 and not flight.task.done():
                del self._flights[key]  # who comes now must not join what is being cancelled
                flight.task.cancel()

    def _landed(self, key: str, task: asyncio.Task[Generated]) -> None:
        flight = self._flights.get(key)
        if flight is not None and flight.task is task:
            del self._flights[key]
        if not task.cancelled():
            task.exception()  # all who wanted to know have been told
