"""Equal requests share one computation, but not one that has ended."""

import asyncio
import time

import pytest

from tests.patience import PATIENCE_S
from text2weight_service.flights import Flight, Flights
from text2weight_service.metrics import Metrics
from text2weight_service.work_queue import Generated, HopelessError


async def test_nobody_joins_a_computation_that_was_refused_for_another() -> None:
    flights, refuse = Flights(Metrics()), asyncio.Event()

    async def refused(_: Flight) -> Generated:
        await refuse.wait()
        raise HopelessError("100 steps take about 1.0 s, 0.1 s are left")

    async def computed(_: Flight) -> Generated:
        return Generated(b"head", "key")

    first = asyncio.create_task(flights.wait("key", time.monotonic() + PATIENCE_S, refused))
    await asyncio.sleep(0.01)
    refuse.set()
    await asyncio.sleep(0)  # the computation has ended, and whoever waited for it does not know yet
    second = await flights.wait("key", time.monotonic() + PATIENCE_S, computed)
    assert second.data == b"head"
    with pytest.raises(HopelessError):
        await first


async def test_who_runs_out_of_time_leaves_the_others_their_computation() -> None:
    flights, end = Flights(Metrics()), asyncio.Event()
    ended: list[str] = []

    async def computed(_: Flight) -> Generated:
        try:
            await end.wait()
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise
        return Generated(b"head", "key")

    patient = asyncio.create_task(flights.wait("key", time.monotonic() + PATIENCE_S, computed))
    await asyncio.sleep(0)
    with pytest.raises(TimeoutError):
        await flights.wait("key", time.monotonic(), computed)
    assert not ended
    end.set()
    assert (await patient).data == b"head"

    end.clear()
    with pytest.raises(TimeoutError):
        await flights.wait("key", time.monotonic() + 0.01, computed)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert ended == ["cancelled"], "nobody waits for it any more"
