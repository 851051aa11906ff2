"""Everything this package raises, as one tree.

Each documented status of the service has a class of its own, but 404 and 405, an `APIError`, and 500, a `ServerError`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from text2weight_client.head import GeneratedHead


class Text2WeightClientError(Exception):
    """Base of every error raised by this package."""


class InvalidHeadError(Text2WeightClientError, ValueError):
    """Tensors, metadata or bytes that are not a head."""


class InvalidFeaturesError(Text2WeightClientError, ValueError):
    """Features that a head cannot classify: wrong shape, wrong type, or not finite."""


class InvalidResponseError(Text2WeightClientError):
    """The service answered 200 with a body that is not what was asked for."""


class APIConnectionError(Text2WeightClientError):
    """The service could not be reached, or the connection broke before the answer was complete."""


class APITimeoutError(APIConnectionError):
    """The service did not answer in time."""


class GenerateManyError(Text2WeightClientError):
    """Some of the requests of `generate_many` failed; what the others brought is kept.

    Attributes:
        heads: finished heads by the index of their class list.
        errors: what failed, by index. An index in neither was not sent, because an error before it was
            one that every request would have met.
    """

    def __init__(
        self, heads: Mapping[int, GeneratedHead], errors: Mapping[int, Text2WeightClientError], total: int
    ) -> None:
        self.heads = dict(heads)
        self.errors = dict(errors)
        index, first = min(self.errors.items())
        unsent = total - len(self.heads) - len(self.errors)
        super().__init__(
            f"{len(self.errors)} of {total} requests failed{f', {unsent} were not sent' if unsent else ''}; "
            f"the first, number {index}: {first}"
        )


class APIError(Text2WeightClientError):
    """The service answered with an error status (RFC 9457 problem details).

    Attributes:
        status: HTTP status code.
        kind: the problem's name, such as "queue-full" (docs/api.md lists all); "" if the answer has none.
        title: the problem in a few words.
        detail: what was wrong with this request and what to do; may be empty.
        request_id: names the request in the service's log; None if the answer carries none.
        errors: one mapping for each invalid field, as the service sent it.
        retry_after_s: seconds the service asks to wait before another attempt; None if it does not say.
    """

    def __init__(
        self,
        status: int,
        title: str,
        detail: str = "",
        *,
        kind: str = "",
        request_id: str | None = None,
        errors: Sequence[Mapping[str, Any]] = (),
        retry_after_s: float | None = None,
    ) -> None:
        self.status = status
        self.kind = kind
        self.title = title
        self.detail = detail
        self.request_id = request_id
        self.errors = tuple(errors)
        self.retry_after_s = retry_after_s
        message = f"{status} {title}"
        if detail:
            message += f": {detail}"
        if request_id:
            message += f" (request id {request_id})"
        super().__init__(message)


class AuthenticationError(APIError):
    """401: the API key is missing or not accepted."""


class BodyTimeoutError(APIError):
    """408: the request body did not arrive within the service's request timeout."""


class PayloadTooLargeError(APIError):
    """413: the request body is over the service's limit."""


class UnsupportedMediaTypeError(APIError):
    """415: the service does not read this content type."""


class InvalidRequestError(APIError):
    """422: a value in the request is not allowed; `detail` and `errors` say which one."""


class RateLimitedError(APIError):
    """429: more requests than this key may send; `retry_after_s` says when to come back."""


class QueueFullError(RateLimitedError):
    """429 of kind "queue-full": the service is busy with everybody's requests."""


class ServerError(APIError):
    """Any 5xx status."""


class NotSupportedError(ServerError):
    """501: what this service has loaded cannot do that, for example classify without a backbone."""


class NotReadyError(ServerError):
    """503: the service is starting, draining, or has lost its device."""


class DeadlineExceededError(ServerError):
    """504: the service could not finish within its own deadline, or within the request's."""


_BY_STATUS: dict[int, type[APIError]] = {
    401: AuthenticationError,
    408: BodyTimeoutError,
    413: PayloadTooLargeError,
    415: UnsupportedMediaTypeError,
    422: InvalidRequestError,
    429: RateLimitedError,
    501: NotSupportedError,
    503: NotReadyError,
    504: DeadlineExceededError,
}


def api_error_type(status: int, kind: str = "") -> type[APIError]:
    """The class that stands for an error status; kind "queue-full" has one of its own."""
    if (status, kind) == (429, "queue-full"):
        return QueueFullError
    return _BY_STATUS.get(status, ServerError if status >= 500 else APIError)
