"""generate_many: in order, few at a time, and what a failure means for the others."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from typing import Any

import httpx
import numpy as np
import pytest

import text2weight_client as t2w
from tests.clients.scripted import problem
from tests.patience import PATIENCE_S
from text2weight_client import AsyncClient, Client, GeneratedHead


class Worker:
    """Answers /generate with a head for the classes asked for, and counts how many it holds at once.

    Errors are answered at once, heads after `pause_s`, the first ones not before there are `together` of them.
    """

    def __init__(
        self,
        make_head: Any,
        errors: dict[str, httpx.Response] | None = None,
        *,
        pause_s: float = 0.005,
        together: int = 1,
    ) -> None:
        self.make_head = make_head
        self.pause_s = pause_s
        self.together = together
        self.met = threading.Event()
        self.errors = errors or {}
        self.now = self.most = 0
        self.bodies: list[dict[str, Any]] = []
        self.lock = threading.Lock()

    def enter(self, request: httpx.Request) -> httpx.Response:
        with self.lock:
            self.now += 1
            self.most = max(self.most, self.now)
            if self.most >= self.together:
                self.met.set()
            body = json.loads(request.content)
            self.bodies.append(body)
        first = body["classes"][0]
        return self.errors.get(first) or httpx.Response(200, content=self.make_head(body["classes"]))

    def blocking(self, request: httpx.Request) -> httpx.Response:
        response = self.enter(request)
        if response.status_code == 200:
            assert self.met.wait(PATIENCE_S)
            time.sleep(self.pause_s)
        with self.lock:
            self.now -= 1
        return response

    async def asynchronous(self, request: httpx.Request) -> httpx.Response:
        response = self.enter(request)
        if response.status_code == 200:
            await asyncio.sleep(self.pause_s)
        self.now -= 1
        return response


def generate_many(kind: str, worker: Worker, lists: Any, **options: Any) -> list[GeneratedHead]:
    settings: dict[str, Any] = {"max_retries": 0}
    if kind == "sync":
        with Client("http://service", transport=httpx.MockTransport(worker.blocking), **settings) as client:
            return client.generate_many(lists, **options)

    async def run() -> list[GeneratedHead]:
        transport = httpx.MockTransport(worker.asynchronous)
        async with AsyncClient("http://service", transport=transport, **settings) as client:
            return await client.generate_many(lists, **options)

    return asyncio.run(run())


each_kind = pytest.mark.parametrize("kind", ["sync", "async"])


@each_kind
def test_many_heads_come_in_order_and_few_at_a_time(make_head: Any, kind: str) -> None:
    worker = Worker(make_head, together=3)
    lists = [[f"class {number}", "other"] for number in range(20)]
    heads = generate_many(kind, worker, iter(lists), concurrency=3, steps=2)
    assert [head.classes for head in heads] == [tuple(classes) for classes in lists]
    assert worker.most == 3
    assert {body["steps"] for body in worker.bodies} == {2}
    assert len({body["seed"] for body in worker.bodies}) == 20


@each_kind
def test_no_lists_give_no_heads(make_head: Any, kind: str) -> None:
    assert generate_many(kind, Worker(make_head), []) == []


@each_kind
def test_one_bad_list_does_not_cost_the_others(make_head: Any, kind: str) -> None:
    worker = Worker(make_head, {"bad": problem(422), "worse": problem(500)})
    with pytest.raises(t2w.GenerateManyError) as caught:
        generate_many(kind, worker, [["a", "b"], ["bad", "b"], ["c", "d"], ["worse", "b"], ["e", "f"]], seed=1)
    assert {index: head.classes[0] for index, head in caught.value.heads.items()} == {0: "a", 2: "c", 4: "e"}
    assert {index: type(error) for index, error in caught.value.errors.items()} == {
        1: t2w.InvalidRequestError,
        3: t2w.ServerError,
    }
    assert str(caught.value).startswith("2 of 5 requests failed; the first, number 1: 422 No")
    assert caught.value.__cause__ is caught.value.errors[1]


@each_kind
@pytest.mark.parametrize("status", [401, 429, 503])
def test_failure_of_the_service_stops_the_rest(make_head: Any, kind: str, status: int) -> None:
    worker = Worker(make_head, {"bad": problem(status)}, pause_s=0.2)
    lists = [["a", "b"], ["bad", "b"], *([f"c{number}", "d"] for number in range(30))]
    with pytest.raises(t2w.GenerateManyError, match=r"1 of 32 requests failed, \d+ were not sent; the first, number 1"):
        generate_many(kind, worker, lists, concurrency=2)
    assert len(worker.bodies) < 16


@each_kind
@pytest.mark.parametrize("concurrency", [0, 101])
def test_impossible_concurrency_is_refused(make_head: Any, kind: str, concurrency: int) -> None:
    with pytest.raises(ValueError, match=f"concurrency is {concurrency}: allowed are 1 to 100"):
        generate_many(kind, Worker(make_head), [["a", "b"]], concurrency=concurrency)


@each_kind
def test_fault_in_the_arguments_is_raised_as_it_is(make_head: Any, kind: str) -> None:
    with pytest.raises(ValueError, match="JSON"):
        generate_many(kind, Worker(make_head), [["a", "b"], ["c", "d"]], guidance_scale=float("nan"))


def test_head_in_sync_and_async_is_the_same(make_head: Any) -> None:
    lists = [["a", "b"], ["c", "d"]]
    both = [generate_many(kind, Worker(make_head), lists, seed=4) for kind in ("sync", "async")]
    for one, other in zip(*both, strict=True):
        np.testing.assert_array_equal(one.tensors["linear1.weight"], other.tensors["linear1.weight"])
