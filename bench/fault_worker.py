"""Faults of the worker's process: it is asked to end, killed, or its clock jumps."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager, closing, suppress
from email.utils import parsedate_to_datetime
from pathlib import Path

import httpx

from bench.fault_scene import PATIENT_RETRIES, Row, Scene, answers
from bench.timing import significant
from demo.service_process import START_TIMEOUT_S, ServiceProcess, free_port
from text2weight_client import Client

EXIT_WAIT_S = 60.0
JUMPS_S = (3_600, -86_400)
CLOSE_S = 60
COPY_BYTES = 65_536
CLOCK_CODE = """
import os, time

def moved(clock, unit, file=os.environ["BENCH_CLOCK_FILE"]):
    def read():
        with open(file) as offset:
            return clock() + unit * int(offset.read())
    return read

time.time, time.time_ns = moved(time.time, 1), moved(time.time_ns, 10**9)
"""


async def no_fault(scene: Scene) -> Row:
    """The same load on a worker that is left alone, for comparison."""
    row, worker = Row(), scene.worker()
    async with scene.load(worker.url, row, max_retries=0):
        await scene.rest()
    row.expect(row.tally.answered == row.tally.sent, "a request failed without any fault")
    row.alive = answers(worker.url, scene.names)
    return row


async def sigterm_behind_proxy(scene: Scene) -> Row:
    """One of two workers behind a round-robin TCP proxy is asked to end; the client has its default retries."""
    return await _one_of_two(scene, signal.SIGTERM)


async def sigkill_behind_proxy(scene: Scene) -> Row:
    """One of two workers behind a round-robin TCP proxy is killed; the client has its default retries."""
    return await _one_of_two(scene, signal.SIGKILL)


async def sigterm_and_restart(scene: Scene) -> Row:
    """The only worker is asked to end and is started again by a supervisor; the client is patient."""
    return await _only_one(scene, signal.SIGTERM)


async def sigkill_and_restart(scene: Scene) -> Row:
    """The only worker is killed and is started again by a supervisor; the client is patient."""
    return await _only_one(scene, signal.SIGKILL)


async def clock_jump(scene: Scene) -> Row:
    """The wall clock of the worker's Python jumps one hour ahead and then one day back; monotonic time does not."""
    offset = scene.folder / "offset"
    _set_clock(offset, 0)
    worker = scene.worker(PYTHONPATH=_with_clock(scene.folder / "clock"), BENCH_CLOCK_FILE=str(offset))
    row, seen = Row(), []
    async with scene.load(worker.url, row):
        for jump_s in JUMPS_S:
            _set_clock(offset, jump_s)
            await scene.rest()
            seen.append(await _seen_offset_s(worker.url, jump_s))
    row.facts["Date header off by, s"] = seen
    jumped = all(abs(offset_s - jump_s) < CLOSE_S for offset_s, jump_s in zip(seen, JUMPS_S, strict=True))
    row.expect(jumped, "the worker's clock did not jump, so nothing was tested")
    row.expect(row.tally.answered == row.tally.sent, "a request failed when the clock jumped")
    row.alive = answers(worker.url, scene.names)
    return row


def _with_clock(folder: Path) -> str:
    """A PYTHONPATH whose `sitecustomize` makes `time.time` add an offset, before anything else is imported.

    It reaches what the worker reads of the wall clock: headers, rate limits, time stamps by `time.time`. No request
    depends on the clock of C code, which libfaketime would move, too.
    """
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(CLOCK_CODE)
    return os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])


def _set_clock(file: Path, offset_s: int) -> None:
    """Say how far the worker's clock is off from now on."""
    temporary = file.with_suffix(".part")
    temporary.write_text(str(offset_s))
    temporary.replace(file)


async def _seen_offset_s(url: str, wanted_s: int) -> int:
    """How far the worker's Date header is off; uvicorn renews it once a second, so it gets a few chances."""
    async with httpx.AsyncClient() as client:
        for _ in range(20):
            date = (await client.get(f"{url}/health/live")).headers["Date"]
            offset_s = round(parsedate_to_datetime(date).timestamp() - time.time())
            if abs(offset_s - wanted_s) < CLOSE_S:
                break
            await asyncio.sleep(0.5)
    return offset_s


async def _one_of_two(scene: Scene, number: signal.Signals) -> Row:
    row, workers = Row(), [scene.worker(), scene.worker()]
    async with proxy([worker.url for worker in workers]) as url:
        async with scene.load(url, row):
            row.facts.update(await _end(workers[0], number))
            await scene.rest()
        row.alive = await asyncio.to_thread(answers, url, scene.names)
    _judge(row, number)
    return row


async def _only_one(scene: Scene, number: signal.Signals) -> Row:
    port = free_port()
    row, url = Row(), f"http://127.0.0.1:{port}"
    starts: list[ServiceProcess] = []
    supervisor = asyncio.create_task(_supervise(scene, port, starts))
    try:
        await _ready(url)
        async with scene.load(url, row, max_retries=PATIENT_RETRIES):
            row.facts.update(await _end(starts[0], number))
            away = time.perf_counter()
            await _ready(url)
            row.facts["away, s"] = significant(time.perf_counter() - away, 2)
            await scene.rest()
        row.alive = answers(url, scene.names)
    finally:
        supervisor.cancel()
        with suppress(asyncio.CancelledError):
            await supervisor
    row.facts["starts"] = len(starts)
    _judge(row, number)
    return row


async def _end(worker: ServiceProcess, number: signal.Signals) -> dict[str, object]:
    """Send the signal and wait until the process is gone."""
    started = time.perf_counter()
    worker.process.send_signal(number)
    code = await asyncio.wait_for(asyncio.to_thread(worker.process.wait), EXIT_WAIT_S)
    return {"exit code": code, "ended after, s": significant(time.perf_counter() - started, 2)}


def _judge(row: Row, number: signal.Signals) -> None:
    wanted = 0 if number == signal.SIGTERM else -number
    row.expect(row.facts["exit code"] == wanted, f"the exit code is {row.facts['exit code']}, not {wanted}")
    row.expect(row.tally.answered == row.tally.sent, "the client's retries did not recover every request")
    # A drain may be so smooth that no request has to be sent twice; a kill under load is not.
    row.expect(number == signal.SIGTERM or row.tally.attempts > row.tally.sent, "no request met the fault")


async def _supervise(scene: Scene, port: int, starts: list[ServiceProcess]) -> None:
    """Keep a worker running at a port."""
    while True:
        with scene.serving(port=port) as service:
            starts.append(service)
            await asyncio.to_thread(service.process.wait)


async def _ready(url: str) -> None:
    def wait() -> None:
        with Client(url) as client:
            client.wait_until_ready(timeout_s=START_TIMEOUT_S)

    await asyncio.to_thread(wait)


@asynccontextmanager
async def proxy(urls: list[str]) -> AsyncIterator[str]:
    """A TCP proxy that gives each connection to the next worker, or to another where that one refuses it."""
    ports = [int(url.rpartition(":")[2]) for url in urls]
    turn = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal turn
        turn += 1
        with closing(writer):
            for step in range(len(ports)):
                try:
                    behind = await asyncio.open_connection("127.0.0.1", ports[(turn + step) % len(ports)])
                except ConnectionRefusedError:
                    continue
                with closing(behind[1]):
                    await _first_end(_copy(reader, behind[1]), _copy(behind[0], writer))
                return

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(ConnectionError):
        while data := await reader.read(COPY_BYTES):
            writer.write(data)
            await writer.drain()


async def _first_end(*directions: Awaitable[None]) -> None:
    """When one side closes, the connection is over: HTTP needs no half of it."""
    tasks = [asyncio.ensure_future(direction) for direction in directions]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
