"""Client for a text2weight service: class names in, a small classifier head out.

    from text2weight_client import Client

    with Client("http://127.0.0.1:8000") as client:
        head = client.generate(["apple", "bus", "lizard"])
    probabilities = head.predict(features)  # (N, 512) backbone features -> (N, 3)

Importing this package loads neither numpy nor httpx: each public name brings what it needs when it
is first used, so that a program which only sometimes calls the service starts fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from text2weight_client.errors import (
    APIConnectionError,
    APIError,
    APITimeoutError,
    AuthenticationError,
    BodyTimeoutError,
    DeadlineExceededError,
    GenerateManyError,
    InvalidFeaturesError,
    InvalidHeadError,
    InvalidRequestError,
    InvalidResponseError,
    NotReadyError,
    NotSupportedError,
    PayloadTooLargeError,
    QueueFullError,
    RateLimitedError,
    ServerError,
    Text2WeightClientError,
    UnsupportedMediaTypeError,
)

if TYPE_CHECKING:
    from text2weight_client.async_client import AsyncClient
    from text2weight_client.client import Client
    from text2weight_client.fuse_task import FuseTask
    from text2weight_client.head import GeneratedHead
    from text2weight_client.heads import GeneratedHeads
    from text2weight_client.info import ServiceInfo
    from text2weight_client.options import EnhanceOptions, FuseOptions, GenerateOptions, SamplingOptions
    from text2weight_client.results import (
        ClassifiedImage,
        ClassProbability,
        DoneEvent,
        HeadEvent,
        ProgressEvent,
        ResponseInfo,
    )

__all__ = [
    "APIConnectionError",
    "APIError",
    "APITimeoutError",
    "AsyncClient",
    "AuthenticationError",
    "BodyTimeoutError",
    "ClassProbability",
    "ClassifiedImage",
    "Client",
    "DeadlineExceededError",
    "DoneEvent",
    "EnhanceOptions",
    "FuseOptions",
    "FuseTask",
    "GenerateManyError",
    "GenerateOptions",
    "GeneratedHead",
    "GeneratedHeads",
    "HeadEvent",
    "InvalidFeaturesError",
    "InvalidHeadError",
    "InvalidRequestError",
    "InvalidResponseError",
    "NotReadyError",
    "NotSupportedError",
    "PayloadTooLargeError",
    "ProgressEvent",
    "QueueFullError",
    "RateLimitedError",
    "ResponseInfo",
    "SamplingOptions",
    "ServerError",
    "ServiceInfo",
    "Text2WeightClientError",
    "UnsupportedMediaTypeError",
]

_LAZY = {
    "AsyncClient": "async_client",
    "ClassProbability": "results",
    "ClassifiedImage": "results",
    "Client": "client",
    "DoneEvent": "results",
    "EnhanceOptions": "options",
    "FuseOptions": "options",
    "FuseTask": "fuse_task",
    "GenerateOptions": "options",
    "GeneratedHead": "head",
    "GeneratedHeads": "heads",
    "HeadEvent": "results",
    "ProgressEvent": "results",
    "ResponseInfo": "results",
    "SamplingOptions": "options",
    "ServiceInfo": "info",
}


def __getattr__(name: str) -> object:
    """Import a public name that needs numpy or httpx when it is first asked for (PEP 562)."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
