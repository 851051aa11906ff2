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
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def ask(self, request: bytes) -> int:
        """Send a request and read the whole answer; returns its status."""
        while True:
            reused = bool(self._idle)
            reader, writer = self._idle.pop() if reused else await asyncio.open_connection(self._host, self._port)
            try:
                writer.write(request)
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
                break
            except (asyncio.IncompleteReadError, ConnectionError):
                writer.close()
                if not reused:  # else the server had closed it for being idle, which is no failure
                    raise
        length = int(head.split("content-length:", 1)[1].split("\r\n", 1)[0])
        await reader.readexactly(length)
        if "connection: close" in head:
            writer.close()
        else:
            self._idle.append((reader, writer))
        return int(head.split(" ", 2)[1])

    async def close(self) -> None:
        """Close all connections."""
        for _, writer in self._idle:
            writer.close()
            await writer.wait_closed()
