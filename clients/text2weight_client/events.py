"""Reading the server-sent events of POST /generate/stream."""

from __future__ import annotations

import binascii
import dataclasses
import json
from base64 import b64decode
from typing import Any

import httpx
from httpx_sse import EventSource, ServerSentEvent

from text2weight_client.connection import problem_error
from text2weight_client.errors import APIConnectionError, InvalidHeadError, InvalidResponseError
from text2weight_client.head import GeneratedHead
from text2weight_client.protocol import response_info
from text2weight_client.results import DoneEvent, HeadEvent, ProgressEvent, StreamEvent


class EventReader:
    """Turns the events of one response into this package's.

    Args:
        response: an open answer with status 200.

    Raises:
        InvalidResponseError: it is no event stream.
    """

    def __init__(self, response: httpx.Response) -> None:
        if not response.headers.get("Content-Type", "").startswith("text/event-stream"):
            raise InvalidResponseError(f"{response.url} answered 200 with something that is not an event stream")
        self.source = EventSource(response)
        self._response = response

    def read(self, message: ServerSentEvent) -> StreamEvent | None:
        """One event; None for a kind that this version does not know.

        Raises:
            APIError: the service reports a failure in mid-stream.
            InvalidResponseError: the event is not what it should be.
        """
        try:
            data: Any = json.loads(message.data) if message.data else {}
            match message.event:
                case "progress":
                    return ProgressEvent(int(data["step"]), int(data["steps"]), int(data["timestep"]))
                case "head":
                    return HeadEvent(int(data["step"]), self._head(data["head"]))
                case "done":
                    return DoneEvent(int(data["seed"]), self._head(data["head"]))
                case "error":
                    data.setdefault("request_id", self._response.headers.get("X-Request-ID"))
                    error = problem_error(int(data["status"]), data)
                case _:
                    return None
        except (InvalidHeadError, KeyError, TypeError, ValueError, AttributeError) as cause:
            raise InvalidResponseError(
                f"{self._response.url} sent an event {message.event!r} that cannot be read: {cause!r}"
            ) from cause
        raise error

    def ended_early(self) -> APIConnectionError:
        """The stream is over, but there was no last event."""
        return APIConnectionError(f"the stream of {self._response.url} broke off before the head was finished")

    def _head(self, text: str) -> GeneratedHead:
        try:
            head = GeneratedHead.from_bytes(b64decode(text, validate=True))
        except binascii.Error as error:
            raise InvalidHeadError(f"not base64: {error}") from error
        return dataclasses.replace(head, response=response_info(self._response))
