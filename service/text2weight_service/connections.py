"""Connections that hold nothing for ever: clients that send their headers slowly, do not read, or are too many.

uvicorn limits the size of headers and the pause between two requests. It waits without end for headers that come
byte by byte and for a client that does not read its answer; the protocol here does not. Slow bodies are the
business of `BodyLimitMiddleware`.
"""

from __future__ import annotations

import asyncio
import uuid
from dataclasses import dataclass
from typing import ClassVar

from uvicorn.protocols.http.h11_impl import H11Protocol

from text2weight_service.metrics import Metrics
from text2weight_service.problems import MEDIA_TYPE, Kind, ProblemError, problem_response
from text2weight_service.settings import Settings

_LONGEST_INTERVAL_S = 1.0
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


class GuardedProtocol(H11Protocol):
    """One connection of uvicorn, looked at from time to time."""

    limits: ClassVar[ConnectionLimits]
    metrics: ClassVar[Metrics]

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to watch; one connection too many ends the one that waits longest for its client, or itself."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(_MOST_UNSENT, _FEW_UNSENT)  # uvloop's own second one is 16 bytes
        self._waiting_since = self.loop.time()
        self._unsent_since: float | None = None
        shortest = min(self.limits.header_timeout_s, self.limits.send_timeout_s)
        self._interval_s = min(_LONGEST_INTERVAL_S, shortest / 4)
        self._watching = self.loop.call_later(self._interval_s, self._watch)
        if len(self.connections) > self.limits.most:
            self._make_room()

    def connection_lost(self, exc: Exception | None) -> None:
        """End watching."""
        self._watching.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Begin to wait for the body when the headers are complete."""
        before = self.cycle
        super().data_received(data)
        if self.cycle is not before:
            self._waiting_since = self.loop.time()

    def on_response_complete(self) -> None:
        """Begin to wait for the next request."""
        self._waiting_since = self.loop.time()
        super().on_response_complete()

    def resume_writing(self) -> None:
        """The client took most of what waited to be sent."""
        self._unsent_since = None
        super().resume_writing()

    @property
    def idle(self) -> bool:
        """Whether no request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    @property
    def waits_for_client(self) -> bool:
        """Whether the next move is the client's: headers, or more of a body."""
        return self.idle or (self.cycle.more_body and not self.cycle.response_started)

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
            min(waiting, key=lambda one: (one.idle and one.cycle is not None, one._waiting_since))._cut("too-many")
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


def guarded_protocol(settings: Settings, counted_in: Metrics) -> type[GuardedProtocol]:
    """The protocol with the limits of the settings, for `uvicorn.Config(http=...)`; counts what it cuts."""

    class Protocol(GuardedProtocol):
        metrics = counted_in
        limits = ConnectionLimits(settings.header_timeout_s, settings.send_timeout_s, settings.max_connections)

    return Protocol
