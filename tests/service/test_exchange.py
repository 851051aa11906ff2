"""Work that nobody waits for any more is given up, all of it."""

import asyncio

import pytest
from starlette.requests import ClientDisconnect, Request
from starlette.types import Message

from text2weight_service.exchange import while_connected


class Watched:
    """Work that ends when it is told to, and remembers that it was given up."""

    def __init__(self, result: str | Exception = "done") -> None:
        self.result = result
        self.end = asyncio.Event()
        self.given_up = False

    async def work(self) -> str:
        try:
            await self.end.wait()
        except asyncio.CancelledError:
            self.given_up = True
            raise
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


def request_that_leaves(leaves: asyncio.Event) -> Request:
    async def receive() -> Message:
        await leaves.wait()
        return {"type": "http.disconnect"}

    return Request({"type": "http"}, receive)


@pytest.mark.parametrize("count", [1, 3])
async def test_a_client_that_leaves_ends_all_its_work(count: int) -> None:
    leaves, works = asyncio.Event(), [Watched() for _ in range(count)]
    waiting = asyncio.create_task(while_connected(request_that_leaves(leaves), [one.work() for one in works]))
    await asyncio.sleep(0.01)
    assert not waiting.done()
    leaves.set()
    with pytest.raises(ClientDisconnect):
        await waiting
    assert all(one.given_up for one in works)


@pytest.mark.parametrize("count", [1, 3])
async def test_results_come_in_the_order_of_the_works(count: int) -> None:
    works = [Watched(str(i)) for i in range(count)]
    waiting = asyncio.create_task(while_connected(request_that_leaves(asyncio.Event()), [one.work() for one in works]))
    for one in reversed(works):
        one.end.set()
        await asyncio.sleep(0)
    assert await waiting == [str(i) for i in range(count)]


async def test_the_first_failure_ends_the_others() -> None:
    works = [Watched(), Watched(ValueError("broken")), Watched()]
    waiting = asyncio.create_task(while_connected(request_that_leaves(asyncio.Event()), [one.work() for one in works]))
    works[1].end.set()
    with pytest.raises(ValueError, match="broken"):
        await waiting
    assert works[0].given_up
    assert works[2].given_up


@pytest.mark.parametrize("count", [1, 2])
async def test_work_whose_own_time_is_over_is_not_taken_for_a_client_that_left(count: int) -> None:
    works = [Watched(TimeoutError("too slow")) for _ in range(count)]
    works[0].end.set()
    with pytest.raises(TimeoutError, match="too slow"):
        await while_connected(request_that_leaves(asyncio.Event()), [one.work() for one in works])


async def test_whoever_is_cancelled_ends_its_work() -> None:
    works = [Watched(), Watched()]
    waiting = asyncio.create_task(while_connected(request_that_leaves(asyncio.Event()), [one.work() for one in works]))
    await asyncio.sleep(0.01)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert all(one.given_up for one in works)
