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
    DeadlineExceededError,
    InvalidFeaturesError,
    InvalidHeadError,
    InvalidRequestError,
    InvalidResponseError,
    NotReadyError,
    PayloadTooLargeError,
    RateLimitedError,
    ServerError,
    Text2WeightClientError,
    UnsupportedMediaTypeError,
)

if TYPE_CHECKING:
    from text2weight_client.client import AsyncClient, Client
    from text2weight_client.head import GeneratedHead

__all__ = [
    "APIConnectionError",
    "APIError",
    "APITimeoutError",
    "AsyncClient",
    "AuthenticationError",
    "Client",
    "DeadlineExceededError",
    "GeneratedHead",
    "InvalidFeaturesError",
    "InvalidHeadError",
    "InvalidRequestError",
    "InvalidResponseError",
    "NotReadyError",
    "PayloadTooLargeError",
    "RateLimitedError",
    "ServerError",
    "Text2WeightClientError",
    "UnsupportedMediaTypeError",
]

_LAZY = {"AsyncClient": "client", "Client": "client", "GeneratedHead": "head"}


def __getattr__(name: str) -> object:
    """Import `Client`, `AsyncClient` and `GeneratedHead` when they are first asked for (PEP 562)."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
