"""A small HTTP client for load: it must cost less than the servers it measures."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from urllib.parse import urlsplit

OK = 200


def request_bytes(path: str, body: Mapping[str, object]) -> bytes:
    """A POST of JSON as it goes over the wire."""
    data = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    return head.encode() + data


class Connections:
    """Kept connections to one server, as many as there are requests at a time."""

    def __init__(self, url: str) -> None:
        """Connect to http://HOST:PORT when asked to."""
        address = urlsplit(url)
        self._host, self._port = address.hostname, address.port
        self._idle: list[_Connection] = []

    async def ask(self, request: bytes) -> int:
        """Send a request and read the whole answer; returns its status."""
        while True:
            reused = bool(self._idle)
            connection = self._idle.pop() if reused else await self._connect()
            try:
                status = await connection.ask(request)
                break
            except ConnectionError:
                if not reused:  # else the server had closed it for being idle, which is no failure
                    raise
        if not connection.transport.is_closing():
            self._idle.append(connection)
        return status

    async def close(self) -> None:
        """Close all connections."""
        for connection in self._idle:
            connection.transport.close()
            await connection.lost.wait()

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(_Connection, self._host, self._port)
        return connection


class _Connection(asyncio.Protocol):
    """Counts an answer's bytes and keeps none but those of its head."""

    transport: asyncio.Transport

    def __init__(self) -> None:
        self.lost = asyncio.Event()
        self._answer: asyncio.Future[int] | None = None

    async def ask(self, request: bytes) -> int:
        """Send a request; returns the status when its answer is complete.

        Raises:
            ConnectionError: the server closed the connection.
        """
        if self.transport.is_closing():
            raise ConnectionResetError
        self._head, self._missing = b"", 0
        self._answer = asyncio.get_running_loop().create_future()
        self.transport.write(request)
        return await self._answer

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        if self._missing:
            self._missing -= len(data)
        else:
            self._head += data
            end = self._head.find(b"\r\n\r\n")
            if end < 0:
                return
            head = self._head[: end + 2].lower()
            length = int(head.partition(b"\r\ncontent-length:")[2].partition(b"\r\n")[0])
            self._missing = length - (len(self._head) - end - 4)
            self._status = int(head[9:12])
            self._closes = b"\r\nconnection: close\r\n" in head
        if self._missing == 0 and self._answer is not None:
            if self._closes:
                self.transport.close()
            self._answer.set_result(self._status)
            self._answer = None

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost.set()
        if self._answer is not None:
            self._answer.set_exception(exc if isinstance(exc, ConnectionError) else ConnectionResetError())
            self._answer = None
