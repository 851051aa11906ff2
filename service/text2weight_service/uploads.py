"""Uploaded heads and the JSON that comes with them: reading both, and what a head must be to fit the checkpoint."""

from __future__ import annotations

import math

from text2weight.artifact import HeadArtifact, read_head
from text2weight.condition import MAX_CLASSES
from text2weight.enhancement import check_fits
from text2weight.errors import ArtifactError, InvalidInputError
from text2weight.strict_safetensors import MAX_HEADER_BYTES
from text2weight_service.model import Model
from text2weight_service.multipart import PartRule

HEAD_DOCS = {"type": "string", "format": "binary"}


def upload_rules(model: Model, max_request_bytes: int, heads: int, least: int = 1) -> dict[str, PartRule]:
    """The parts of a body with heads: `request`, and so many parts `head`, each as large as a head can be."""
    spec = model.config.head
    largest = 8 + MAX_HEADER_BYTES + 4 * (spec.num_parameters + MAX_CLASSES * spec.output_dim)
    return {
        "request": PartRule(1, 1, max_request_bytes, file=False),
        "head": PartRule(least, heads, largest),
    }


def read_upload(model: Model, data: bytes, field: str) -> HeadArtifact:
    """Read an uploaded head and make sure that it belongs to the loaded checkpoint's backbone and text encoder.

    Args:
        model: what the head has to fit.
        data: untrusted bytes.
        field: of the request, for errors.

    Raises:
        InvalidInputError: no head artifact, of another layout, or for another backbone, text encoder or logit scale.
            A head that does not state its backbone or text encoder is taken at its word.
    """
    try:
        head = read_head(data)
        check_fits(model.config.head, head.spec)
    except (ArtifactError, InvalidInputError) as error:
        raise InvalidInputError(field, str(error)) from None
    expected = {"backbone": str(model.config.backbone.get("name", "unknown")), "text_encoder": model.text_encoder.name}
    for key, name in expected.items():
        stated = head.metadata.get(key, name)
        if stated != name:
            raise InvalidInputError(
                field, f"the head is for the {key} {stated[:200]!r}: this checkpoint's is {name!r}, heads do not mix"
            )
    scale = float(head.metadata["logit_scale"])
    if not math.isclose(scale, model.config.logit_scale, rel_tol=1e-3):
        raise InvalidInputError(
            field, f"the head's logit_scale is {scale:g}: this checkpoint's is {model.config.logit_scale:g}"
        )
    return head
