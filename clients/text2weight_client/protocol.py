"""The service's HTTP contract, written once for `Client` and `AsyncClient`.

An `Exchange` is a request together with the function that reads its answer; the clients only carry
it over a blocking or an asynchronous connection.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar, Unpack

import httpx

from text2weight_client.connection import MAX_CONNECTIONS, api_error
from text2weight_client.errors import (
    APIConnectionError,
    AuthenticationError,
    GenerateManyError,
    InvalidHeadError,
    InvalidResponseError,
    NotReadyError,
    RateLimitedError,
    Text2WeightClientError,
)
from text2weight_client.fuse_task import FuseTask
from text2weight_client.head import GeneratedHead
from text2weight_client.heads import GeneratedHeads
from text2weight_client.info import ServiceInfo
from text2weight_client.options import EnhanceOptions, FuseOptions, GenerateOptions
from text2weight_client.results import ClassifiedImage, ClassProbability, ResponseInfo

T = TypeVar("T")

READY_PROBE_TIMEOUT_S = 5.0
# A sleep may last a little longer than asked for; an attempt that is late by so much still gets a valid timeout.
MIN_WAIT_S = 0.001
OCTETS = "application/octet-stream"
# Name, file name, content and content type, as httpx takes them.
FilePart = tuple[str, tuple[str | None, bytes, str]]
Image = str | os.PathLike[str] | bytes


@dataclass(frozen=True)
class Exchange(Generic[T]):
    """One request and the reading of its answer.

    Attributes:
        method: HTTP method.
        path: relative to the base URL.
        read: turns a successful response into the result.
        body: sent as JSON, or beside files as the part `request`; None for no body.
        files: parts of a multipart body; none for a JSON body.
        content: bytes sent as they are, in place of both; None for none.
        headers: beside the client's own; None for none.
        timeout_s: the most that one attempt may wait, where that is less than what is left of the call.
        takes_deadline: whether the service reads `deadline_ms` in the body.
    """

    method: str
    path: str
    read: Callable[[httpx.Response], T]
    body: dict[str, Any] | None = None
    files: tuple[FilePart, ...] = ()
    content: bytes | None = None
    headers: Mapping[str, str] | None = None
    timeout_s: float = math.inf
    takes_deadline: bool = False

    def request(self, http: httpx.Client | httpx.AsyncClient, left_s: float) -> httpx.Request:
        """Build the request of one attempt, with the client's base URL and headers.

        Args:
            http: the client.
            left_s: seconds that the attempt may wait for a connection, and for each read of its answer.
        """
        timeout = httpx.Timeout(max(MIN_WAIT_S, min(left_s, self.timeout_s)))
        if not self.files:
            return http.build_request(
                self.method, self.path, content=self.content, json=self.body, headers=self.headers, timeout=timeout
            )
        parts = list(self.files)
        if self.body is not None:
            text = json.dumps(self.body, ensure_ascii=False, allow_nan=False).encode()
            parts.insert(0, ("request", (None, text, "application/json")))
        return http.build_request(self.method, self.path, files=parts, timeout=timeout)

    def result(self, response: httpx.Response) -> T:
        """Read a response, whatever its status; 304, which only `If-None-Match` asks for, is an answer.

        Raises:
            APIError: an error status.
            InvalidResponseError: a success whose body is not what was asked for.
        """
        if not response.is_success and response.status_code != httpx.codes.NOT_MODIFIED:
            raise api_error(response)
        return self.read(response)

    @property
    def wants_deadline(self) -> bool:
        """Whether it is the client that decides on `deadline_ms`: the service takes one and the caller gave none."""
        return self.takes_deadline and self.body is not None and "deadline_ms" not in self.body

    def with_deadline(self, deadline_ms: int | None) -> Exchange[T]:
        """The same exchange with a deadline, if there is one and the caller gave none."""
        if deadline_ms is None or not self.wants_deadline:
            return self
        return dataclasses.replace(self, body={**(self.body or {}), "deadline_ms": deadline_ms})


def generate_exchange(classes: Sequence[str], **options: Unpack[GenerateOptions]) -> Exchange[GeneratedHead]:
    """POST /generate for one head."""
    body = {"classes": _listed(classes), **_sent(options, GenerateOptions)}
    return Exchange("POST", "/generate", _read_head, body, takes_deadline=True)


def samples_exchange(
    classes: Sequence[str], samples: int, **options: Unpack[GenerateOptions]
) -> Exchange[GeneratedHeads]:
    """POST /generate for several seeds."""
    body = {"classes": _listed(classes), "samples": samples, **_sent(options, GenerateOptions)}
    return Exchange("POST", "/generate", _read_heads, body, takes_deadline=True)


def stream_exchange(
    classes: Sequence[str], heads_every: int | None, **options: Unpack[GenerateOptions]
) -> Exchange[httpx.Response]:
    """POST /generate/stream; the answer is the open stream."""
    body = {"classes": _listed(classes), **_sent(options, GenerateOptions)}
    if heads_every is not None:
        body["heads_every"] = heads_every
    return Exchange("POST", "/generate/stream", lambda response: response, body, takes_deadline=True)


def fuse_exchange(
    tasks: Sequence[FuseTask | GeneratedHead | Sequence[str]], **options: Unpack[FuseOptions]
) -> Exchange[GeneratedHead]:
    """POST /fuse: JSON, or multipart where the tasks bring heads."""
    taken = [FuseTask.of(task) for task in tasks]
    heads = [task.head for task in taken if task.head is not None]
    if heads and len(heads) != len(taken):
        raise ValueError(f"{len(heads)} of {len(taken)} tasks have a head: give every task one, or none")
    body = {"tasks": [task.to_json() for task in taken], **_sent(options, FuseOptions)}
    if body.get("method", "text") != "text" and options.get("seed") is None:
        del body["seed"]  # merging draws nothing, and the service refuses a seed there
    files = tuple(_head_part(head, f"head-{number}.safetensors") for number, head in enumerate(heads))
    return Exchange("POST", "/fuse", _read_head, body, files, takes_deadline=True)


def enhance_exchange(
    head: GeneratedHead, strength: float, classes: Sequence[str] | None, **options: Unpack[EnhanceOptions]
) -> Exchange[GeneratedHead]:
    """POST /enhance."""
    body = {"strength": strength, **_sent(options, EnhanceOptions)}
    if classes is not None:
        body["classes"] = _listed(classes)
    return Exchange("POST", "/enhance", _read_head, body, (_head_part(head),), takes_deadline=True)


def classify_exchange(head: GeneratedHead, images: Iterable[Image]) -> Exchange[list[ClassifiedImage]]:
    """POST /classify."""
    if isinstance(images, str | os.PathLike | bytes):
        raise TypeError(f"images is one {type(images).__name__}: give a list of images")
    parts = [_image_part(number, image) for number, image in enumerate(images)]
    return Exchange("POST", "/classify", _read_classified, files=(_head_part(head), *parts))


def info_exchange() -> Exchange[ServiceInfo]:
    """GET /info."""
    return Exchange("GET", "/info", lambda response: ServiceInfo(_read_object(response)))


def ready_exchange() -> Exchange[None]:
    """GET /health/ready."""
    return Exchange("GET", "/health/ready", lambda response: None, timeout_s=READY_PROBE_TIMEOUT_S)


def raw_exchange(
    method: str, path: str, body: dict[str, Any] | None, content: bytes | None, headers: Mapping[str, str] | None
) -> Exchange[httpx.Response]:
    """Any request; its answer as it is."""
    if body is not None and content is not None:
        raise ValueError("both body and content are given: give JSON as body, or bytes as content")
    if any(name.lower() == "authorization" for name in headers or ()):
        raise ValueError("headers hold Authorization, which is the client's own: give the key as api_key")
    return Exchange(method, path, lambda response: response, body, content=content, headers=headers)


class Many:
    """The requests of `generate_many` and what became of them."""

    # Errors of the service rather than of one request: the requests that are left would meet them too.
    _OF_THE_SERVICE = (APIConnectionError, AuthenticationError, NotReadyError, RateLimitedError)

    def __init__(
        self, class_lists: Iterable[Sequence[str]], concurrency: int, **options: Unpack[GenerateOptions]
    ) -> None:
        if not 1 <= concurrency <= MAX_CONNECTIONS:
            raise ValueError(f"concurrency is {concurrency}: allowed are 1 to {MAX_CONNECTIONS}")
        self.exchanges = [generate_exchange(classes, **options) for classes in class_lists]
        self.stopped = False
        self.heads: dict[int, GeneratedHead] = {}
        self._errors: dict[int, Text2WeightClientError] = {}

    @contextmanager
    def keeping_errors(self, index: int) -> Iterator[None]:
        """Keep the error of one request in place of raising it; `stopped` is set if the others would meet it too."""
        try:
            yield
        except Text2WeightClientError as error:
            self._errors[index] = error
            self.stopped = self.stopped or isinstance(error, self._OF_THE_SERVICE)

    def result(self) -> list[GeneratedHead]:
        """All heads in order.

        Raises:
            GenerateManyError: a request failed.
        """
        if self._errors:
            error = GenerateManyError(self.heads, self._errors, len(self.exchanges))
            raise error from self._errors[min(self._errors)]
        return [self.heads[index] for index in range(len(self.exchanges))]


def _listed(classes: Sequence[str]) -> str | list[str]:
    # A lone string is sent as it is, for the service to refuse, not as a list of its letters.
    return classes if isinstance(classes, str) else list(classes)


def _sent(options: Mapping[str, Any], kind: type) -> dict[str, Any]:
    """The options that were given; a missing seed is drawn here, once, so that every retry asks for the same head."""
    unknown = sorted(options.keys() - kind.__annotations__.keys())
    if unknown:
        raise TypeError(f"unknown option {', '.join(unknown)}: allowed are {', '.join(sorted(kind.__annotations__))}")
    given = {name: value for name, value in options.items() if value is not None}
    if "descriptions" in given:
        given["descriptions"] = {name: _listed(texts) for name, texts in given["descriptions"].items()}
    return {"seed": secrets.randbits(32), **given}


def _head_part(head: GeneratedHead, filename: str = "head.safetensors") -> FilePart:
    return "head", (filename, head.to_bytes(), OCTETS)


def _image_part(number: int, image: Image) -> FilePart:
    if isinstance(image, bytes):
        name, data = f"image-{number}", image
    else:
        name, data = Path(image).name, Path(image).read_bytes()
    return "image", (name, data, _image_type(data))


def _image_type(data: bytes) -> str:
    if data.startswith(b"\xff\xd8\xff"):
        return "image/jpeg"
    if data.startswith(b"\x89PNG\r\n"):
        return "image/png"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "image/webp"
    return OCTETS


def response_info(response: httpx.Response) -> ResponseInfo:
    """Status and headers of a response."""
    return ResponseInfo(response.status_code, {name.lower(): value for name, value in response.headers.items()})


def _read_head(response: httpx.Response) -> GeneratedHead:
    try:
        head = GeneratedHead.from_bytes(response.content)
    except InvalidHeadError as error:
        raise InvalidResponseError(f"{response.url} answered 200 with a body that is not a head: {error}") from error
    return dataclasses.replace(head, response=response_info(response))


def _read_heads(response: httpx.Response) -> GeneratedHeads:
    try:
        return GeneratedHeads.from_bytes(response.content, response_info(response))
    except InvalidHeadError as error:
        raise InvalidResponseError(f"{response.url} answered 200 with a body that is not heads: {error}") from error


def _read_classified(response: httpx.Response) -> list[ClassifiedImage]:
    try:
        return [
            ClassifiedImage(
                str(image["filename"]),
                tuple(ClassProbability(str(one["name"]), float(one["probability"])) for one in image["classes"]),
            )
            for image in _read_object(response)["images"]
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidResponseError(f"{response.url} answered 200 without classified images: {error!r}") from error


def _read_object(response: httpx.Response) -> dict[str, Any]:
    try:
        value = response.json()
    except ValueError as error:
        raise InvalidResponseError(f"{response.url} answered 200 with a body that is not JSON") from error
    if not isinstance(value, dict):
        raise InvalidResponseError(f"{response.url} answered 200 with JSON that is not an object")
    return value
