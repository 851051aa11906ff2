"""Faults of the network and of clients: slow, idle, half-closed and vanishing connections beside normal traffic."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from collections import Counter
from typing import Any

from bench.fault_scene import PATIENT_RETRIES, Row, Scene, answers, files_settle, metric, open_files
from demo.service_process import ServiceProcess

SLOW_LIMIT_S = "4"  # the worker's limits for headers and body, so that the fault does not take minutes
DRIP_S = 0.5
HEARD_S = 30.0
HALF_CLOSED = 30
LONG_STEPS = 100
ABORTED = struct.pack("ii", 1, 0)  # linger: closing sends a reset


async def slow_loris(scene: Scene) -> Row:
    """Connections send a byte now and then, half of them of the headers and half of the body."""
    worker = scene.worker(T2W_REQUEST_TIMEOUT_S=SLOW_LIMIT_S, T2W_HEADER_TIMEOUT_S=SLOW_LIMIT_S)
    row, before = Row(), open_files(worker)
    head = _request(scene, body_bytes=1000).partition(b"\r\n\r\n")[0]
    starts = [head[:40], head + b"\r\n\r\n{"]
    async with scene.load(worker.url, row):
        slow = [asyncio.create_task(_drip(worker, starts[turn % 2])) for turn in range(scene.sizes.slow_connections)]
        await scene.rest(2)
        done = [task for task in slow if task.done()]
        row.facts["slow connections"] = len(slow)
        row.facts["ended by the worker"] = dict(Counter(await asyncio.gather(*done)))
        await _cancel(slow)
    return _judged(scene, row, worker, before)


async def idle_connections(scene: Scene) -> Row:
    """Many connections that send nothing; at the end all ask at once."""
    worker = scene.worker()
    row, before = Row(), open_files(worker)
    count = scene.sizes.idle_connections
    async with scene.load(worker.url, row, max_retries=PATIENT_RETRIES):
        held = [await _connect(worker) for _ in range(count)]
        await scene.rest()
        row.facts["connections"] = count
        row.facts["descriptors of the worker"] = open_files(worker)
        asked = await asyncio.gather(*(_ask(*pair, _request(scene)) for pair in held))
    row.facts["all ask at once"] = _counted(asked)
    row.expect("500" not in asked, "a connection that had been idle got an internal error")
    row.expect("silence" not in asked, "a connection that had been idle got neither an answer nor an end")
    return _judged(scene, row, worker, before)


async def half_closed(scene: Scene) -> Row:
    """Clients that shut down their sending side: some after a whole request, some in the middle of one."""
    worker = scene.worker()
    row, before = Row(), open_files(worker)
    request = _request(scene)
    async with scene.load(worker.url, row):
        whole = await asyncio.gather(*(_half_close(worker, request) for _ in range(HALF_CLOSED)))
        part = await asyncio.gather(*(_half_close(worker, request[:-10]) for _ in range(HALF_CLOSED)))
    row.facts["after a whole request"] = _counted(whole)
    row.facts["in the middle of one"] = _counted(part)
    row.expect("silence" not in {*whole, *part}, "a half-closed connection is neither answered nor ended")
    return _judged(scene, row, worker, before)


async def vanishing_clients(scene: Scene) -> Row:
    """Clients that reset their connection in the middle of a request, of its body or of the wait for its answer."""
    worker = scene.worker()
    row, before = Row(), open_files(worker)
    request = _request(scene, steps=LONG_STEPS)
    async with scene.load(worker.url, row, max_retries=PATIENT_RETRIES):
        for turn in range(scene.sizes.vanishing_clients):
            sent = request if turn % 2 else request[:-10]
            _, writer = await _connect(worker)
            writer.write(sent)
            await writer.drain()
            await asyncio.sleep(0.002 * (turn % 10))
            _reset(writer)
        await scene.rest()
    row.facts["clients gone"] = scene.sizes.vanishing_clients
    row.facts["given up by the worker"] = metric(worker.url, "t2w_http_requests_total", status="499")
    return _judged(scene, row, worker, before)


def _judged(scene: Scene, row: Row, worker: ServiceProcess, before: int) -> Row:
    """Normal traffic went on, and the worker let go of the connections."""
    row.alive = answers(worker.url, scene.names)
    after = files_settle(worker, before)
    row.facts["descriptors before and after"] = [before, after]
    row.expect(row.tally.answered == row.tally.sent, "normal traffic suffered")
    row.expect(after <= before + 20, f"the worker keeps {after - before} descriptors more than before")
    return row


def _request(scene: Scene, *, steps: int | None = None, body_bytes: int | None = None) -> bytes:
    """A whole request as bytes; `body_bytes` declares a body of another length."""
    fields: dict[str, object] = {"classes": list(scene.names[:3]), "seed": 0}
    if steps is not None:
        fields |= {"steps": steps, "sampler": "ddim"}
    body = json.dumps(fields).encode()
    length = len(body) if body_bytes is None else body_bytes
    head = "POST /generate HTTP/1.1\r\nHost: t2w\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n"
    return head.format(length).encode() + body


Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def _connect(worker: ServiceProcess) -> Connection:
    return await asyncio.open_connection("127.0.0.1", int(worker.url.rpartition(":")[2]))


async def _ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes, half: bool = False) -> str:
    """Send on an open connection, close it, and say what came: a status, an end, or silence."""
    try:
        writer.write(request)
        await writer.drain()
        if half:
            writer.write_eof()
        return await _heard(reader)
    except ConnectionError:
        return "closed"
    finally:
        writer.close()


async def _heard(reader: asyncio.StreamReader) -> str:
    try:
        line = await asyncio.wait_for(reader.readline(), HEARD_S)
    except TimeoutError:
        return "silence"
    return line.split()[1].decode() if line.startswith(b"HTTP/1.1 ") else "closed"


async def _half_close(worker: ServiceProcess, request: bytes) -> str:
    return await _ask(*await _connect(worker), request, half=True)


async def _drip(worker: ServiceProcess, start: bytes) -> str:
    """Send a byte at a time; return when the worker answers or hangs up."""
    reader, writer = await _connect(worker)
    heard = asyncio.create_task(_heard(reader))
    try:
        writer.write(start)
        while not heard.done():
            writer.write(b"x")
            await writer.drain()
            await asyncio.sleep(DRIP_S)
        return await heard
    except ConnectionError:
        return "closed"
    finally:
        heard.cancel()
        writer.close()


def _reset(writer: asyncio.StreamWriter) -> None:
    connection = writer.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, ABORTED)
    writer.transport.abort()


def _counted(heard: list[str]) -> dict[str, int]:
    return dict(sorted(Counter(heard).items()))


async def _cancel(tasks: list[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
