"""Connections that hold nothing for ever: clients that send their headers slowly, do not read, or are too many.

uvicorn limits the pause between two requests. It takes headers of any size, and waits without end for those that come
byte by byte and for a client that does not read its answer; the protocol here does not. Bodies that are slow or too
large are the business of `BodyLimitMiddleware`; what still comes of one after its answer is read and dropped for as
long as the next headers may take, so that the client can read that answer.
"""

from __future__ import annotations

import asyncio
import re
import uuid
from dataclasses import dataclass
from typing import ClassVar, Literal

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from text2weight_service.metrics import Metrics
from text2weight_service.problems import MEDIA_TYPE, Kind, ProblemError, problem_response
from text2weight_service.settings import Settings

_LONGEST_INTERVAL_S = 1.0
_MOST_HEADER_BYTES = 16 * 1024
_MOST_PIPELINED = 32
_OFFERED_UPGRADE = re.compile(rb"\r\nupgrade:[^\r\n]*", re.IGNORECASE)
# Bytes that wait to be sent: more than the first stop whoever writes, until fewer than the second wait.
_MOST_UNSENT, _FEW_UNSENT = 64 * 1024, 16 * 1024
_RETRY_AFTER_S = 1


@dataclass(frozen=True)
class ConnectionLimits:
    """Limits of each connection, and of their number.

    Attributes:
        header_timeout_s: from the start of a connection, or the end of an answer, to the end of the next headers.
        send_timeout_s: for a client to take what waits to be sent, or most of it.
        most: open connections.
    """

    header_timeout_s: float
    send_timeout_s: float
    most: int


class GuardedProtocol(HttpToolsProtocol):
    """One connection of uvicorn, looked at from time to time."""

    limits: ClassVar[ConnectionLimits]
    metrics: ClassVar[Metrics]

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to watch; one connection too many ends the one that waits longest for its client, or itself."""
        super().connection_made(transport)
        self._answering: RequestResponseCycle | None = None  # uvicorn's `cycle` is of the newest request
        self._part: Literal["headers", "body"] | None = None  # of a request that is being read
        self._header_bytes = 0
        transport.set_write_buffer_limits(_MOST_UNSENT, _FEW_UNSENT)  # uvloop's own second one is 16 bytes
        self._waiting_since = self.loop.time()
        self._unsent_since: float | None = None
        shortest = min(self.limits.header_timeout_s, self.limits.send_timeout_s)
        self._interval_s = min(_LONGEST_INTERVAL_S, shortest / 4)
        self._watching = self.loop.call_later(self._interval_s, self._watch)
        if len(self.connections) > self.limits.most:
            self._make_room()

    def connection_lost(self, exc: Exception | None) -> None:
        """End watching, and tell the request that is being answered, where uvicorn tells the newest alone."""
        self._watching.cancel()
        if self._answering is not None and not self._answering.response_complete:
            self._answering.disconnected = True
            self._answering.message_event.set()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        """Begin to count a request's headers."""
        super().on_message_begin()
        self._part, self._header_bytes = "headers", 0

    def on_headers_complete(self) -> None:
        """Begin to wait for the body; requests that come before the answers to others wait, a few of them."""
        super().on_headers_complete()
        self._part = "body"
        self._waiting_since = self.loop.time()
        if not self.pipeline:
            self._answering = self.cycle
        elif len(self.pipeline) > _MOST_PIPELINED and not self.transport.is_closing():
            self._cut("pipelined")  # uvicorn would take any number into memory

    def on_message_complete(self) -> None:
        """Await the next request."""
        super().on_message_complete()
        self._part = None

    def data_received(self, data: bytes) -> None:
        """Refuse headers that are too large before they are complete."""
        before, within_body = self.cycle, self._part == "body"
        super().data_received(data if within_body else _without_upgrade(data))
        if self._part == "headers" and self.cycle is before and not within_body:  # all these bytes are of those headers
            self._header_bytes += len(data)
            if self._header_bytes > _MOST_HEADER_BYTES and not self.transport.is_closing():
                self.send_400_response(f"The headers are larger than {_MOST_HEADER_BYTES} bytes.")

    def on_response_complete(self) -> None:
        """Begin to wait for the next request."""
        self._waiting_since = self.loop.time()
        if self.pipeline:
            self._answering = self.pipeline[-1][0]  # which begins now
        super().on_response_complete()

    def resume_writing(self) -> None:
        """The client took most of what waited to be sent."""
        self._unsent_since = None
        super().resume_writing()

    @property
    def idle(self) -> bool:
        """Whether no request is being answered."""
        return self._answering is None or self._answering.response_complete

    @property
    def waits_for_client(self) -> bool:
        """Whether the next move is the client's: headers, or more of a body."""
        now = self._answering
        return self.idle or (now is not None and now.more_body and not now.response_started)

    def _watch(self) -> None:
        now = self.loop.time()
        if self.transport.get_write_buffer_size() == 0:
            self._unsent_since = None
        elif self._unsent_since is None:
            self._unsent_since = now
        if self._unsent_since is not None and now - self._unsent_since > self.limits.send_timeout_s:
            self._cut("unread")
        elif self.idle and self._unsent_since is None and now - self._waiting_since > self.limits.header_timeout_s:
            self._cut("headers")
        else:
            self._watching = self.loop.call_later(self._interval_s, self._watch)

    def _make_room(self) -> None:
        others = [one for one in self.connections if isinstance(one, GuardedProtocol) and one is not self]
        waiting = [one for one in others if one.waits_for_client]
        if waiting:
            # Whoever owes a first request or a body goes first; a client that was served may be about to ask again.
            min(waiting, key=lambda one: (one.idle and one._answering is not None, one._waiting_since))._cut("too-many")
            return
        problem = ProblemError(Kind.UNAVAILABLE, "this worker has too many connections; try again, or another worker")
        request_id = uuid.uuid4().hex
        response = problem_response(problem, request_id)
        head = [f"HTTP/1.1 {problem.kind.status} Service Unavailable", f"Content-Type: {MEDIA_TYPE}"]
        head += [f"Content-Length: {len(response.body)}", f"Retry-After: {_RETRY_AFTER_S}"]
        head += [f"X-Request-ID: {request_id}", "Connection: close", "", ""]
        self.transport.write("\r\n".join(head).encode() + bytes(response.body))
        self.transport.close()

    def _cut(self, reason: str) -> None:
        self.metrics.connections_cut.labels(reason).inc()
        # Not close(), which would wait until the client has read everything.
        self.transport.abort()


def _without_upgrade(data: bytes) -> bytes:
    """Headers without the offer of another protocol, which HTTP allows to ignore.

    The parser drops the body of a request that offers one, as Java's client does with HTTP/2.
    """
    end = data.find(b"\r\n\r\n")
    offer = _OFFERED_UPGRADE.search(data, 0, end if end >= 0 else len(data))
    return data if offer is None else data[: offer.start()] + data[offer.end() :]


def guarded_protocol(settings: Settings, counted_in: Metrics) -> type[GuardedProtocol]:
    """The protocol with the limits of the settings, for `uvicorn.Config(http=...)`; counts what it cuts."""

    class Protocol(GuardedProtocol):
        metrics = counted_in
        limits = ConnectionLimits(settings.header_timeout_s, settings.send_timeout_s, settings.max_connections)

    return Protocol
